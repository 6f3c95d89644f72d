"""
What the model sees: one record of a jsonl -> image(s) with a marker, question, answer, tokens.

    unify the focal length -> crop or pad to the patch grid -> draw the marker
    -> question and answer -> tokens and patches

Every other script calls these functions, so that training, evaluation, GRPO and point clouds
cannot differ in what they show the model. Run as a script it draws a contact sheet, for people:

    python render.py data/toy/val.jsonl                              # -> sheet.png
    python render.py data/toy/val.jsonl --checkpoint ckpt/toy        # as it was trained to see it
    python render.py data/nyuv2/val.jsonl --marker cross --crop 1000 1400 700 1200 --n 6

Reads a jsonl (README, "File formats"), writes a PNG.
Paper: Sec. 3.1 (markers, prompts), Sec. 3.3 (camera strategies), Sec. 3.4 (focal length, tasks).
"""
import argparse
import copy
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, wraps
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps, UnidentifiedImageError

try:
    import fcntl
except ImportError:  # on Windows: no lock
    fcntl = None

# --------------------------------------------------------------------------------------------------
# files


@contextmanager
def replacing(path, writer: str = "") -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and vanishes if it fails: a reader
    finds the old file or the new one at any moment, never a part. What a killed run leaves is
    overwritten by the next; writer: which one it is, where there may be several."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value, indent: int | None = None) -> str:
    """Standard JSON, which has no NaN and no Infinity. Raises ValueError."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def write_json(path, value) -> None:
    write_text(path, json_text(value, indent=2))


def write_jsonl(path, lines) -> None:
    write_text(path, "".join(map(json_text, lines)))


def parse_json(data: bytes, nan: bool = False):
    """Standard JSON in UTF-8, with or without a byte order mark; nan: NaN and Infinity may stand in
    it. Raises ValueError."""

    def unique(pairs: list[tuple]) -> dict:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice")
        return value

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is no finite number")
        return float(text)

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique,
                           parse_constant=float if nan else finite, parse_float=finite)
        if b"\\u" in data:  # half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(path, kind: type = dict):
    """The content of a JSON file, a dict or a list. Raises ValueError with the file's name."""
    with blaming(path):
        value = parse_json(Path(path).read_bytes())
        if not isinstance(value, kind):
            form = "object" if kind is dict else "array"
            raise ValueError(f"needs a JSON {form}, this is {type(value).__name__}")
    return value


@contextmanager
def blaming(path, remedy: str = "The file is damaged, or of something else: copy or download it "
            "again.") -> Iterator[None]:
    """Whatever a parser raises inside, others' too, becomes one line that names the file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would not end
            raise ValueError("is no file")
        yield
    except BaseException as e:  # a panic of the tokenizers is no Exception
        if isinstance(e, (KeyboardInterrupt, SystemExit)) or str(e).startswith(str(path)):
            raise
        if isinstance(e, OSError) and e.strerror:
            raise ValueError(f"{path}: {e.strerror}.") from None
        kind = "" if type(e) is ValueError else f"{type(e).__name__} "
        raise ValueError(f"{path}: {kind}{first_line(e)}. {remedy}") from None


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_line(line: bytes, where: str, nan: bool = False) -> dict:
    """One line of a jsonl. Raises ValueError."""
    try:
        value = parse_json(line, nan)
    except ValueError as e:
        raise ValueError(f"{where}: not a JSON object ({e}). The line is damaged or cut off: "
                         "write the file again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: needs a JSON object, this is {type(value).__name__}.")
    return value


def read_jsonl(path, interrupted: bool = False, nan: bool = False) -> Iterator[tuple[str, dict]]:
    """-> "file, line n" and the object of each line. interrupted: the file of a run that may have
    been killed while it wrote; reading ends before a damaged line. nan: see parse_json."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file.")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = parse_line(line, where, nan)
            except ValueError:
                if interrupted:
                    return
                raise
            yield where, value


def run_info(args: argparse.Namespace, **more) -> dict:
    """What a run's run.json holds, in one form for all scripts: script, flags, versions, commit;
    more: what a script adds."""
    commit = None
    with suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
        commit = found.stdout.strip() or None
    versions = {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}
    versions["python"] = sys.version.split()[0]
    flags = json.loads(json.dumps(vars(args), default=str))
    return {"script": Path(sys.argv[0]).name, "flags": flags, "git": commit,
            "versions": versions, **more}


def other_flags(info: dict, before: dict, free: set[str]) -> str:
    """The flags of the run.json `before` that are others in that of now, as they were given."""
    flags, given = info["flags"], before.get("flags") or {}
    return ", ".join(f"--{key.replace('_', '-')} {given[key]}" for key in flags
                     if key not in free and key in given and given[key] != flags[key])


@contextmanager
def lock_folder(folder, when: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be, and sweep what dead ones have left
    half-written. Raises ValueError if one is in. when: on rank 0 only; the others wait for it."""
    folder = Path(folder)
    if not when:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if fcntl:  # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another run is at work in it. Wait for its end, or "
                                 "choose another --out.") from None
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        held_locks.append(file)
        try:
            yield
        finally:
            held_locks.remove(file)


held_locks: list = []  # of this process


def start_worker(*_) -> None:
    """For each loader worker: it dies with Ctrl-C, silently, and when its parent was killed."""
    for file in held_locks:  # inherited, a lock would outlive the parent
        file.close()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def text_table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def printable(text) -> str:
    """What comes from data, without characters that would control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def fail(message, code: int = 2) -> None:
    """End with one line that says what is wrong and what helps."""
    sys.stderr.write(f"error: {printable(message)}\n")  # at once: other processes may write, too
    raise SystemExit(code)


def command(main: Callable) -> Callable:
    """Decorator of each script's main(argv): an error that the user can mend ends in one line."""

    @wraps(main)
    def run(argv=None):
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError) as e:
            said = str(e)
            if isinstance(e, OSError) and e.filename:
                said = f"{e.filename}: {e.strerror}."
            if "Original Traceback" in said:  # of a loader worker, which sends the whole of it
                said = said.rstrip().splitlines()[-1].removeprefix("ValueError: ")
            fail(said)
        except (RuntimeError, KeyboardInterrupt) as e:
            # of a loader worker it may be known first
            if isinstance(e, KeyboardInterrupt) or "signal: Interrupt" in str(e):
                if os.environ.get("RANK", "0") != "0":  # one line is enough
                    raise SystemExit(130) from None
                fail("interrupted. Give the same command again to resume.", 130)
            if "DataLoader worker" in str(e):
                fail("a loader worker was killed, most likely for lack of memory. Give the same "
                     "command with fewer --workers to resume.")
            if type(e).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                raise
            fail(f"the GPU has not enough memory ({str(e).splitlines()[0]}). Lower --micro-batch "
                 "or --batch-size; for training there are --checkpointing, --reshard, --lora and "
                 "--offload, too.")

    return run


# --------------------------------------------------------------------------------------------------
# flags: what all parsers share


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Every default is shown; where it depends on something, the help text says on what."""

    def _get_help_string(self, action):
        if action.default is None or action.const is True or "default: " in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags may also stand in a file, given as @FILE, with # comments; an error is one line."""

    def error(self, message: str) -> None:
        fail(f"{message}. See --help.")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def _read_args_from_files(self, words: list[str]) -> list[str]:
        with blaming(" ".join(word for word in words if word.startswith("@"))):
            return super()._read_args_from_files(words)


def make_parser(doc: str) -> argparse.ArgumentParser:
    return Parser(description=doc, formatter_class=HelpFormatter, fromfile_prefix_chars="@",
                  allow_abbrev=False)


def number(kind: type, low: float, high: float = math.inf, exclusive: bool = False) -> Callable:
    """An argparse type: a finite int or float from `low` (exclusive: greater than it) to `high`."""

    def parse(text: str):
        value = float(text)
        fits = low < value if exclusive else low <= value
        if not (fits and value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        if kind(value) != value:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number")
        return kind(value)

    wanted = f"greater than {low:g}" if exclusive else f"{low:g} or more"
    wanted += f" and at most {high:g}" if high < math.inf else ""
    parse.__name__ = "number"  # for argparse: "invalid number value: 'x'"
    return parse


WORKERS = min(4, (os.cpu_count() or 2) - 1)  # processes, by default
COUNT = number(int, 1)
NATURAL = number(int, 0)
POSITIVE = number(float, 0, exclusive=True)
SHARE = number(float, 0, 1)


def file_path(text: str) -> str:
    """An argparse type: the name of a file or folder, not an empty word."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is an empty path")
    return text


def add_record_flags(flag: Callable) -> None:
    """How jsonl files are read, the same flags in every script."""
    flag("--image-root", type=file_path, help="folder of the images; default: each jsonl's own")
    flag("--label-type", choices=("euclidean", "z"),
         help="what the files hold; default: what their records say, else euclidean")


# --------------------------------------------------------------------------------------------------
# records

# Table 1: the order of the sets, and delta1 of always answering 2.0 m as published
PAPER_CONSTANT = {"argoverse2": 0.006, "ddad": 0.010, "nuscenes": 0.010, "eth3d": 0.106,
                  "scannetpp": 0.305, "sunrgbd": 0.384, "ibims1": 0.280, "nyuv2": 0.383}


WIDEST = 160  # degrees: beyond it nothing is a pinhole camera, or its numbers are no pixels
LONGEST = 20  # focal length / side of the image
FARTHEST = 10_000  # m; no label is
FILM = 36, 24  # mm, of a frame of 35 mm film


class Records:
    """A jsonl file opened by its index: any of 16 million records is read by one seek, and none is
    kept in memory.

    records[i] -> dict with "image" a path, "depth" Euclidean metres (N,), "pixel_coords" (N, 2),
    "where" the file and line for messages. `label_type` "z" or "euclidean" says what the file
    holds, whatever its records say. Blank lines are skipped. Raises ValueError with file, line,
    value and remedy."""

    def __init__(self, path: str, image_root: str | None = None, label_type: str | None = None):
        self.path = str(path)
        self.label_type = label_type
        self.image_root = Path(image_root) if image_root else Path(path).parent
        self.offsets = open_index(self.path)
        self.lines = filled_lines(self.path, self.offsets)
        if len(self) < 1:
            raise ValueError(f"{path}: holds no record. Make it with prepare.py.")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        number = int(self.lines[i])
        where = f"{self.path}, line {number + 1}"
        with open(self.path, "rb") as file:
            line = read_line(file, self.offsets, number)
        return check_record(parse_line(line, where), where, self.image_root, self.label_type)


def read_line(file, offsets: np.ndarray, number: int) -> bytes:
    """Line `number` (from 0) of an open jsonl. Raises ValueError if the index is of another
    file."""
    start, end = map(int, offsets[number:number + 2])
    file.seek(max(start - 1, 0))
    text = b"\n" * (not start) + file.read(end - max(start - 1, 0))
    complete = text.endswith(b"\n") or end == offsets[-1]
    if not (text.startswith(b"\n") and complete) or b"\n" in text[1:-1]:
        raise ValueError(f"{file.name}: its .idx is of another file. Delete that.")
    return text[1:]


def filled_lines(path: str, offsets: np.ndarray):
    """Numbers of the lines that are not blank."""
    lines = range(len(offsets) - 1)
    short = np.flatnonzero(np.diff(offsets) < 64)  # no record is
    with open(path, "rb") as file:
        blank = [number for number in short if not read_line(file, offsets, number).strip()]
    return np.delete(lines, blank) if blank else lines


def open_index(path: str) -> np.ndarray:
    """Byte offset of each line of a jsonl, and the file's size: (N + 1,) int64, memory-mapped from
    <name>.idx beside it, which is rebuilt when missing, older than the jsonl or of another file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Make it with prepare.py, or check the path.")
    index = path.with_suffix(".idx")
    size = path.stat().st_size
    fresh = index.is_file() and index.stat().st_mtime_ns >= path.stat().st_mtime_ns
    if fresh and index.stat().st_size % 8 == 0 < index.stat().st_size:
        offsets = np.memmap(index, dtype="<i8", mode="r")
        if (offsets[0], offsets[-1]) == (0, size) and (offsets[1:] > offsets[:-1]).all():
            return offsets

    starts = [np.zeros(1, np.int64)]
    position = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            line_feeds = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            starts.append(line_feeds + position + 1)
            position += len(chunk)
    offsets = np.concatenate(starts)
    if offsets[-1] != size:  # the last line has no line feed
        offsets = np.append(offsets, size)
    with suppress(OSError):  # in a read-only folder the index stays in memory
        for leftover in path.parent.glob(f".{index.name}.*.tmp"):
            leftover.unlink()
        with replacing(index, f".{os.getpid()}") as temporary:
            offsets.astype("<i8").tofile(temporary)
    return offsets


def check_record(record: dict, where: str, image_root: Path = Path(),
                 label_type: str | None = None) -> dict:
    """Validate a record and bring it to one form (see Records). Raises ValueError."""
    try:
        record = record_arrays(record)
        for _, fault in label_faults(record):
            raise ValueError(fault)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None

    if (label_type or record.get("depth_type")) == "z":
        x, y = record["pixel_coords"].T
        record["depth"] = record["depth"] * ray_length(x, y, record["intrinsics"])
    return {**record, "image": str(image_root / record["image"]), "where": where}


def record_arrays(record: dict) -> dict:
    """The record with its numbers as arrays. Raises ValueError if it has not the form of one."""
    for key in ("image", "intrinsics", "pixel_coords", "depth"):
        if key not in record:
            renamed = key == "image" and "image_path" in record
            hint = " (rename 'image_path' to 'image')" if renamed else ""
            raise ValueError(f"key '{key}' is missing{hint}; it has {sorted(record)}.")
    if not isinstance(record["image"], str):
        raise ValueError(f"image {record['image']!r} is not a path.")
    try:
        fx, fy, cx, cy, w, h = (float(v) for v in record["intrinsics"])
        xy = np.asarray(record["pixel_coords"], float).reshape(-1, 2)
        depth_m = np.asarray(record["depth"], float).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("needs intrinsics [fx, fy, cx, cy, w, h], pixel_coords [[x, y], ...] and "
                         "depth [metres, ...] as numbers.") from None
    if len(xy) != len(depth_m):
        raise ValueError(f"{len(xy)} pixel_coords but {len(depth_m)} depths; they go in pairs.")
    for key, *allowed in ("depth_type", "euclidean", "z"), ("orientation", "stored", "upright"):
        if record.get(key) not in (None, *allowed):
            raise ValueError(f"{key} {record[key]!r} is neither of {allowed}.")
    return {**record, "intrinsics": (fx, fy, cx, cy, w, h), "pixel_coords": xy, "depth": depth_m}


def label_faults(record: dict, doubt: bool = False) -> Iterator[tuple[str, str]]:
    """What cannot be true of a record in array form, or with `doubt` hardly is: (kind of fault,
    example and remedy)."""
    fx, fy, _, _, w, h = record["intrinsics"]
    xy, depth_m = record["pixel_coords"], record["depth"]
    if fault := camera_fault(record["intrinsics"], doubt):
        yield "camera of another image" if min(fx, fy) > 0 else "fx or fy not positive", fault
    bad = np.flatnonzero(~((depth_m > 0) & (depth_m <= FARTHEST)))
    if len(bad):
        yield "depth not positive and finite", (
            f"depth {depth_m[bad[0]]} of point {bad[0]} ({len(bad)} of {len(depth_m)}) is not a "
            f"positive distance in metres, at most {FARTHEST}; drop the point.")
    x, y = xy.T
    outside = xy[~((x >= -0.5) & (x <= w - 0.5) & (y >= -0.5) & (y <= h - 0.5))]
    if len(outside):
        yield "label outside of the image", (
            f"point {outside[0].tolist()} is outside of the {w:g} x {h:g} image; drop it, or "
            "correct the intrinsics.")


def camera_fault(intrinsics, doubt: bool = False) -> str | None:
    """Why intrinsics cannot be those of an image of w x h px, and what was meant, where that can be
    told. doubt: also why they hardly are: the camera is off the centre, and would not be with its
    numbers in another order or scale."""
    *camera, w, h = intrinsics
    off = off_centre(*intrinsics)
    possible = off < 0.5 and all(camera[2:])
    if possible and not (doubt and off > 0.1):
        return None
    for mistake, meant in mistaken_cameras(*intrinsics):
        if off_centre(*meant, w, h) < (0.035 if possible else 0.1):
            why = f"{mistake}? Then {', '.join(f'{value:.6g}' for value in meant)}."
            break
    else:
        if possible:
            return None
        why = (f"They need finite numbers of pixels, positive fx and fy of at most {LONGEST} sides,"
               f" a field of view of at most {WIDEST} degrees, a principal point in the image.")
    return f"intrinsics {camera} do not fit an image of {w:g} x {h:g} px. {why}"


def off_centre(fx, fy, cx, cy, w, h) -> float:
    """How far a principal point is from the middle of the image, as a share of its sides (0.5: on
    its border); infinite for a camera that there cannot be."""
    if not (all(map(math.isfinite, (fx, fy, cx, cy))) and min(fx, fy, w, h) > 0):
        return math.inf
    widest = 2 * math.degrees(math.atan(max(w / fx, h / fy) / 2))
    longest = max(fx, fy) / max(w, h)
    if widest > WIDEST + 1e-6 or longest > LONGEST or not 0.5 <= fx / fy <= 2:
        return math.inf
    return max(abs((cx + 0.5) / w - 0.5), abs((cy + 0.5) / h - 0.5))


def mistaken_cameras(fx, fy, cx, cy, w, h) -> Iterator[tuple[str, np.ndarray]]:
    """What fx, fy, cx, cy may be by mistake, and what was meant."""
    camera = np.array([fx, fy, cx, cy])
    if not (np.isfinite(camera).all() and min(w, h) > 0):
        return
    yield "Are cx and cy swapped", camera[[0, 1, 3, 2]]
    yield "Are they in the order fx, cx, fy, cy", camera[[0, 2, 1, 3]]
    yield "Are they in the order cx, cy, fx, fy", camera[[2, 3, 0, 1]]
    yield "Are they divided by the image's sides", camera * (w, h, w, h)
    scale = cx / w + cy / h  # 1 for a centred camera
    common = np.array([0.25, 0.333, 0.5, 0.667, 0.75, 1.333, 1.5])
    if 0 < scale < 0.2 or scale > 1.8 or np.abs(common - scale).min() < 0.02:
        yield f"Are they of an image of {scale * w:.4g} x {scale * h:.4g} px", camera / scale
    film = math.hypot(w, h) / math.hypot(*FILM)  # px a mm
    yield "Is the focal length in mm of 35 mm film", camera * (film, film, 1, 1)
    yield "Is the focal length divided by the image's width", camera * (w, w, 1, 1)


def ray_length(x, y, intrinsics) -> np.ndarray:
    """Euclidean distance / z of a pixel: the length of its ray to the plane z = 1 (no unit)."""
    fx, fy, cx, cy = intrinsics[:4]
    return np.sqrt(1 + ((np.asarray(x) - cx) / fx) ** 2 + ((np.asarray(y) - cy) / fy) ** 2)


def unproject(pixels: np.ndarray, depth_m: np.ndarray, intrinsics) -> np.ndarray:
    """Pixels (..., 2) at Euclidean distances (...) -> points (..., 3) in camera axes [m]."""
    fx, fy, cx, cy = intrinsics[:4]
    x, y = pixels[..., 0], pixels[..., 1]
    z = depth_m / ray_length(x, y, intrinsics)
    return np.stack([(x - cx) / fx * z, (y - cy) / fy * z, z], -1)


# --------------------------------------------------------------------------------------------------
# images

MARGIN = 6  # px kept free around a query in a random crop, so that the arrow fits
MAX_PIXELS = 1 << 27  # of a resized image: 160 degrees at f = 1000; 400 MB


# others start programs (EPS: Ghostscript); JPEG is also MPO
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
MAX_MEMORY = 1 << 30  # bytes of an image while it is read: 268 megapixels in 8 bits
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # what makes the pixels of an EXIF orientation upright


@cache
def image_formats() -> list[str]:
    """Also HEIF, as phones write it, where pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
        return [*FORMATS, "HEIF"]
    return FORMATS


@contextmanager
def image_file(path, data=None) -> Iterator[Image.Image]:
    """An image file (or `data`, a file object) of which only the header was read yet. Whatever goes
    wrong with it becomes a ValueError that names it."""
    if not data and not os.path.isfile(path):
        raise ValueError(f"{path}: no such image. In a jsonl, paths are relative to its folder (or "
                         "--image-root).")
    Image.MAX_IMAGE_PIXELS = None  # the limit is on memory, below
    try:
        with Image.open(data or path, formats=image_formats()) as file:
            memory = file.width * file.height * (16 if file.mode[0] in "IF" else 4)
            if memory > MAX_MEMORY:
                raise ValueError(f"{file.width} x {file.height} px take {memory / 1e9:.1f} GB of "
                                 f"memory, and {MAX_MEMORY / 1e9:.1f} are the limit")
            yield file
    except UnidentifiedImageError:
        formats = image_formats()
        heic = " (HEIC: pip install pillow-heif)" if "HEIF" not in formats else ""
        raise ValueError(f"{path}: is no image of {', '.join(formats)}. Convert it{heic}, or leave "
                         "it out.") from None
    except Exception as e:  # decoders of damaged files raise whatever they like
        raise ValueError(f"{path}: cannot be read as an image ({str(e) or type(e).__name__}). "
                         "Replace the file, or leave it out.") from None


def exif_orientation(file: Image.Image) -> int:
    """1 to 8; 1 where there is none, or the EXIF data are damaged."""
    with suppress(Exception):
        # not file.getexif(): for a PNG without EXIF data that decodes the image
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation)
        return orientation if orientation in TURNS else 1
    return 1


def stored_pixels(file: Image.Image) -> Image.Image:
    """The pixels as they are in the file: Pillow turns those of TIFF files upright."""
    orientation = exif_orientation(file)
    file.load()
    if file.format != "TIFF" or orientation == 1:
        return file
    return file.transpose(TURNS[{6: 8, 8: 6}.get(orientation, orientation)])


def labels_are_upright(orientation: int, stored: tuple, size: tuple, said: str | None) -> bool:
    """Whether labels belong to the upright pixels of a file with that EXIF orientation, or to the
    stored ones. said: the record's "orientation". Without it the size of the labels' image tells,
    and where it cannot (mirrored, upside down, square) it is the stored ones: so were the first
    jsonl files made."""
    if said:
        return said == "upright"
    return orientation >= 5 and (stored[0] - stored[1]) * (size[0] - size[1]) < 0


def open_image(path: str, size: tuple[float, float] | None = None,
               said: str | None = None) -> Image.Image:
    """Any image file as 8-bit RGB: grey, palette, CMYK, 16-bit; alpha is laid on black. It is
    turned upright by EXIF, unless `size`, of the labels' image, and what their record said of its
    orientation show that they belong to the stored pixels. Raises ValueError."""
    with image_file(path) as file:
        orientation = exif_orientation(file)
        image = stored_pixels(file)
        upright = not size or labels_are_upright(orientation, image.size, size, said)
        if upright and orientation > 1:
            image = image.transpose(TURNS[orientation])
        if image.mode.startswith("I") or image.mode == "F":
            image = to_8_bit(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image)
        return image.convert("RGB")


def to_8_bit(image: Image.Image) -> Image.Image:
    """16 bits to 8; anything else by its range."""
    values = np.asarray(image, np.float64)
    top = 65535.0
    if image.mode == "F" or values.max() > top:
        top = max(values.max(), 1e-9)
    return Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))


def match_size(image: Image.Image, intrinsics, where: str) -> tuple[tuple, float, float]:
    """Intrinsics for the image as it is on disk, and the scale from label pixels to its pixels. An
    image that was resized after labelling is accepted if both axes agree within 1 %; anything else
    raises ValueError."""
    fx, fy, cx, cy, w, h = intrinsics
    sx, sy = image.width / w, image.height / h
    if abs(sx / sy - 1) > 0.01:
        raise ValueError(f"{where}: the image is {image.width} x {image.height}, its intrinsics "
                         f"say {w:g} x {h:g}: not a resized version of the same image. Correct "
                         "the record's intrinsics, or the image.")
    cx, cy = (cx + 0.5) * sx - 0.5, (cy + 0.5) * sy - 0.5
    return (fx * sx, fy * sy, cx, cy, image.width, image.height), sx, sy


@dataclass
class View:
    """An image as the model gets it: pixels (H, W, 3) uint8, the camera of these pixels, and how
    original pixels map: x' = scale_x (x + 0.5) - 0.5 - left."""
    pixels: np.ndarray
    intrinsics: tuple
    scale: tuple[float, float]
    offset: tuple[int, int]

    def move(self, x: float, y: float) -> tuple[float, float]:
        (sx, sy), (left, top) = self.scale, self.offset
        return sx * (x + 0.5) - 0.5 - left, sy * (y + 0.5) - 0.5 - top


def unify_focal(image: Image.Image, intrinsics, focal: float | None, grid: int, crop=None,
                keep=(), rng=None) -> View:
    """Resize so that fx = fy = `focal` px exactly (Sec. 3.4), both sides a multiple of `grid`.
    focal None keeps the scale.

    crop (w_min, w_max, h_min, h_max): training, a random window of that size at a random place that
    keeps the `keep` pixels (original coordinates) inside. crop None: evaluation, nothing is lost:
    the edge is repeated to fill the grid, as it is in training where an image is smaller than the
    window. Only the window is resampled, from its exact (fractional) box in the original: the focal
    length is not rounded, and the last fraction of a pixel at the right and bottom is dropped."""
    # paper: W' = f/fx W is rounded there, and the processor resizes again to the patch grid
    fx, fy, cx, cy = intrinsics[:4]
    sx, sy = (focal / fx, focal / fy) if focal else (1.0, 1.0)
    if focal and image.width * sx * image.height * sy > MAX_PIXELS:
        raise ValueError(f"an image of {image.width} x {image.height} px and focal length {fx:g} "
                         f"{fy:g} px becomes {image.width * sx:.3g} x {image.height * sy:.3g} px "
                         f"at focal {focal:g}. Correct its intrinsics.")

    left, width = 0, whole_pixels(image.width * sx)
    top, height = 0, whole_pixels(image.height * sy)
    if crop is not None:
        xs = [sx * (x + 0.5) - 0.5 for x, _ in keep] or [width / 2]
        ys = [sy * (y + 0.5) - 0.5 for _, y in keep] or [height / 2]
        left, width = crop_window(width, xs, crop[:2], grid, rng)
        top, height = crop_window(height, ys, crop[2:], grid, rng)
    if (sx, sy) == (1.0, 1.0):
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    else:
        right, bottom = (left + width) / sx, (top + height) / sy
        box = (min(left / sx, image.width), min(top / sy, image.height),
               min(right, image.width), min(bottom, image.height))
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))

    needed_width, needed_height = width, height
    if crop is None:  # the last original pixel may lie in the dropped fraction
        needed_width = max(width, math.floor(sx * (image.width - 0.5)) + 1)
        needed_height = max(height, math.floor(sy * (image.height - 0.5)) + 1)
    right = needed_width + -needed_width % grid - width
    bottom = needed_height + -needed_height % grid - height
    pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="edge")
    camera = (fx * sx, fy * sy, (cx + 0.5) * sx - 0.5 - left, (cy + 0.5) * sy - 0.5 - top,
              width, height)
    return View(pixels, camera, (sx, sy), (left, top))


def whole_pixels(length: float) -> int:
    return max(1, math.floor(length + 1e-3))  # intrinsics are often rounded to a few decimals


def crop_window(length: int, keep: list[float], limits, grid: int, rng) -> tuple[int, int]:
    """-> start and size of a random window along one axis of `length` px around the places `keep`,
    with a margin where there is room: of as many cells of the grid as fit within `limits` (low,
    high), each number as likely."""
    needed = math.ceil(max(keep) - min(keep) + 2 * MARGIN + 1)
    most = max(1, limits[1] // grid)
    cells = int(rng.integers(min(-(-limits[0] // grid), most), most + 1))
    size = max(cells, -(-needed // grid)) * grid
    size = min(size, length)  # a smaller image is not cut, and padded as in evaluation
    first = math.ceil(max(0, min(max(keep) + MARGIN, length - 1) - size + 1))
    last = math.floor(min(length - size, max(min(keep) - MARGIN, 0)))
    start = int(rng.integers(first, last + 1)) if first < last else min(first, length - size)
    return start, size


def arrow(size: int, side: int) -> list[tuple[int, int]]:
    """Offsets from the point to an arrow's pixels: its tip is beside the point, on `side` (-1 left,
    1 right), so that the pixel itself stays visible."""
    thick = max(1, size // 5)
    length = size // thick
    strokes = [(k, 0) for k in range(1, length + 1)]
    strokes += [(1 + k, up * k) for k in range(1, (length - 1) // 2 + 1) for up in (-1, 1)]
    return [(side * (thick * (along - 1) + 1 + i), thick * up - thick // 2 + j)
            for along, up in strokes for i in range(thick) for j in range(thick)]


def cross(size: int, side: int) -> list[tuple[int, int]]:
    """Two bars around the point, which stays visible."""
    half, thick = max(1, size // 2), max(1, size // 5)
    arms = [k for k in range(-half, half + 1) if k]
    bar = [(k, j) for k in arms for j in range(-(thick // 2), thick - thick // 2)]
    return bar + [(j, k) for k, j in bar]


def dot(size: int, side: int) -> list[tuple[int, int]]:
    """A disc over the point."""
    half = max(1, size // 2)
    square = [(i, j) for i in range(-half, half + 1) for j in range(-half, half + 1)]
    return [(i, j) for i, j in square if i * i + j * j <= half * half + 1]


MARKERS = {"arrow": arrow, "cross": cross, "dot": dot}  # App. A.1
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}  # of the first and the second point


def draw_marker(pixels: np.ndarray, x: float, y: float, shape: str = "arrow", size: int = 5,
                color=(255, 0, 0)) -> None:
    """Draw a marker for the point (x, y) into pixels (H, W, 3), in place (App. A.1). An arrow comes
    from the left, or from the right where the left border is too near."""
    height, width = pixels.shape[:2]
    x = min(max(math.floor(x + 0.5), 0), width - 1)
    y = min(max(math.floor(y + 0.5), 0), height - 1)
    side = -1 if x >= size or 2 * x >= width else 1
    for dx, dy in MARKERS[shape](size, side):
        if 0 <= x + dx < width and 0 <= y + dy < height:
            pixels[y + dy, x + dx] = color


# --------------------------------------------------------------------------------------------------
# tasks (Sec. 3.4): what is asked about which pixels, and the true value


@dataclass
class Query:
    """One question before it is rendered: the record(s) it is about, the pixels (in the first
    record's image, as labelled), the true value, and the number that the question gives."""
    task: str
    records: list[dict]
    points: list[tuple[float, float]]
    value: float
    given: float | None = None


class Unfit(ValueError):
    """A task does not suit a record, though nothing is wrong with it: no pose, a standing car."""


# paper: it does not say which numbers its questions give, nor how far its frames are apart
TIMES = (1.0, 10.0)  # s. A factor of ten where delta1 forgives 1.25: the number has to be read
SPEEDS = (0.5, 5.0)  # m/s, a stroll to a run: two decimals still tell the time to half a metre
NEAREST_PAIR = 0.1  # m; nearer points are one to the eye, and two decimals cannot tell them apart
MOTION = (0.1, 10.0)  # m; below, a pose is mostly noise, beyond, the frames share hardly any view
MOTION_WINDOW = 30  # records: 3 s at 10 Hz; 2.5 s of nuScenes, whose six cameras take turns


def distance(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Euclidean distance of a point from the camera [m]: metric depth."""
    record = records[i]
    point = pick_point(record, rng) if point is None else point
    xy = tuple(record["pixel_coords"][point])
    return Query("distance", [record], [xy], float(record["depth"][point]))


def axis_distance(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Distance along the principal axis [m]: z, the depth of pure vision models."""
    query = distance(records, i, rng, point)
    ray = float(ray_length(*query.points[0], query.records[0]["intrinsics"]))
    return replace(query, task="axis", value=query.value / ray)


def speed(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Speed that reaches a point within a given time [m/s]."""
    query = distance(records, i, rng, point)
    given = draw_given(rng, TIMES)
    return replace(query, task="speed", value=query.value / given, given=given)


def travel_time(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Time in which a given speed reaches a point [s]."""
    query = distance(records, i, rng, point)
    given = draw_given(rng, SPEEDS)
    return replace(query, task="time", value=query.value / given, given=given)


def two_point(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Distance between two points [m], the first marked in red, the second in blue."""
    record = records[i]
    point = pick_point(record, rng) if point is None else point
    xyz = unproject(record["pixel_coords"], record["depth"], record["intrinsics"])
    apart = np.linalg.norm(xyz - xyz[point], axis=1)
    others = np.flatnonzero(apart >= NEAREST_PAIR)
    if not len(others):
        raise Unfit(f"{record['where']}: has no second point {NEAREST_PAIR} m or more from point "
                    f"{point}.")
    other = int(rng.choice(others))
    pair = [tuple(record["pixel_coords"][k]) for k in (point, other)]
    return Query("two_point", [record], pair, float(apart[other]))


def motion(records: Records, i: int, rng, point: int | None = None) -> Query:
    """How far a camera moved [m] from a record to one near it in the file, of the same scene and
    camera. Images without a time are no path: such sets share no view."""
    record = records[i]
    if record.get("pose") is None or record.get("time") is None:
        raise Unfit(f"{record['where']}: has no 'pose' and 'time', so no camera moved here.")
    pose = pose_matrix(record["pose"])
    if pose is None:
        raise Unfit(f"{record['where']}: its 'pose' is not 16 finite numbers, camera-to-world, "
                    "with a rotation.")
    around = [*range(-MOTION_WINDOW, 0), *range(1, MOTION_WINDOW + 1)]
    for offset in rng.permutation(around):
        if not 0 <= i + offset < len(records):
            continue
        other = records[i + int(offset)]
        same = all(other.get(k) == record.get(k) for k in ("scene", "camera"))
        other_pose = pose_matrix(other.get("pose"))
        if other_pose is None or other.get("time") is None or not same:
            continue
        moved = float(np.linalg.norm(other_pose[:3, 3] - pose[:3, 3]))
        if MOTION[0] <= moved <= MOTION[1]:
            return Query("motion", [record, other], [], moved)
    raise Unfit(f"{record['where']}: none of the {MOTION_WINDOW} records before and after it is of "
                f"the same scene and camera, with its 'pose' {MOTION[0]} to {MOTION[1]} m away.")


def pick_point(record: dict, rng) -> int:
    if not len(record["depth"]):
        raise ValueError(f"{record['where']}: has no labelled point.")
    return int(rng.integers(len(record["depth"])))


def draw_given(rng, limits: tuple[float, float]) -> float:
    """The number in a question, one decimal; log-uniform, so that no order of magnitude is rare."""
    return round(float(np.exp(rng.uniform(*np.log(limits)))), 1)


def pose_matrix(values) -> np.ndarray | None:
    """(4, 4) camera-to-world of 16 numbers; None unless they are a finite rigid motion."""
    try:
        pose = np.asarray(values, float).reshape(4, 4)
    except (TypeError, ValueError, OverflowError):
        return None
    turn = pose[:3, :3]
    with np.errstate(all="ignore"):
        rigid = np.allclose(turn.T @ turn, np.eye(3), atol=0.01) and np.linalg.det(turn) > 0
        whole = np.isfinite(pose).all() and np.allclose(pose[3], (0, 0, 0, 1))
    return pose if rigid and whole else None


def each_word(table: dict) -> dict:
    """{"several words": value} -> {word: value}."""
    return {word: value for words, value in table.items() for word in words.split()}


# what answers call the units, in common languages, in lower case and without accents
METER = ("m mts mtr mtrs meter meters metern metre metres metro metros metri metr metry metra "
         "metru metrow metreler metria met м метр метра метры метров метре метрах метрів метри "
         "μετρο μετρα 米 公尺 メートル メーター 미터 मीटर เมตร متر مترا מטר מטרים")
SECOND = ("s sec secs second seconds sekunde sekunden seconde secondes seconden segundo segundos "
          "secondo secondi sekund sekunda sekundy sekunder с сек секунда секунды секунд "
          "секунду 秒 초")
PREFIXES = {"k kilo quilo chilo к кило 千 キロ 킬로 किलो": 1000.0, "d deci dezi д деци 分": 0.1,
            "c centi centy zenti senti sentti santi с санти 厘 センチ 센티 सेंटी": 0.01,
            "m mili milli м милли 毫 ミリ 밀리": 0.001}
METERS = each_word({METER: 1.0, "kms 公里 كم": 1000.0, "cms 公分 センチ 센티 سم": 0.01,
                    "inch inches": 0.0254, "yd yard yards": 0.9144, "mile miles": 1609.344,
                    "ft foot feet fuß pieds piedi фута футов 英尺 フィート 피트": 0.3048})
METERS |= {prefix + word: factor for prefix, factor in each_word(PREFIXES).items()
           for word in METER.split() if prefix.isascii() == word.isascii()}
SECONDS = each_word({
    SECOND: 1.0, "ms millisecond milliseconds 毫秒": 0.001,
    "min mins minute minutes minuten minut minuto minutos minuti минута минуты минут "
    "分 分钟 분": 60.0,
    "h hr hrs hour hours stunde stunden heure heures hora horas ora ore uur ч час часа часов "
    "小时 时 時間 시간": 3600.0})
METERS_PER_SECOND = {f"{way}/{time}": METERS[way] / SECONDS[time]
                     for way in METERS for time in SECONDS}
METERS_PER_SECOND |= {"mps": 1.0, "kmh": 1 / 3.6, "kph": 1 / 3.6, "mph": 0.44704,
                      "knots": 0.514444}


def think(question: str, unit: str, sentence: str) -> tuple[str, str]:
    """Question and answer in the think/answer form of Sec. 3.2, which the released model has."""
    question += (" Output the thinking process in <think> </think> and final answer (the "
                 f"{unit} number only, without the unit) in <answer> </answer> tags.")
    return question, f"<think> {sentence} </think>\n\n<answer> {{x}} </answer>"


@dataclass(frozen=True)
class Task:
    """All that the scripts know of a task. make: (records, i, rng, point) -> Query. wordings: for
    each prompt, and each camera strategy with words of its own, templates of question and answer
    (fields: `phrase`; {x} is the value, with the same words before it in all answers of a task, so
    that decoding can draft them). unit: lower-case words behind a number in an answer -> factor.
    markers: how many points are drawn. needs: what not every record has."""
    make: Callable
    wordings: dict[str, tuple[str, str]]
    unit: dict[str, float]
    markers: int = 1
    needs: str | None = None


AWAY = "The point is around {x} meters away from the camera."
AHEAD = "The point is around {x} meters in front of the camera."
MUST_MOVE = "The camera must move at around {x} meters per second."
TAKES = "The camera takes around {x} seconds."
APART = "The two points are around {x} meters apart."
MOVED = "The camera has moved around {x} meters."

TASKS = {
    "distance": Task(distance, {
        "paper": ("How many meters is this point from the camera?", AWAY),
        "release": think("How far is this point from the camera?", "meter", AWAY),
        "text": ("Given this image of size (width = {w}, height = {h}), how far is the pixel at "
                 "({u}, {v}) from the camera?", AWAY),  # App. A.1
        "camera prompt": (
            "Given this image of size (width = {w}, height = {h}), where the camera intrinsics are "
            "(fx = {fx}, fy = {fy}, cx = {cx}, cy = {cy}) and the images are without distortions, "
            "how many meters is this point away from the camera?", AWAY),  # App. A.5
        "camera prompt text": (
            "Given this image of size (width = {w}, height = {h}), where the camera intrinsics are "
            "(fx = {fx}, fy = {fy}, cx = {cx}, cy = {cy}) and the images are without distortions, "
            "how many meters is the pixel at ({u}, {v}) away from the camera?", AWAY),  # Table 1
        "camera ray": (
            "How many meters is this point from the camera?",
            "The point is around {right} degrees to the {side}, {up} degrees {updown} and {x} "
            "meters away from the camera."),  # App. A.5
    }, METERS),
    # paper: of the other tasks it shows pictures only (Fig. 7); these are in the style of the first
    "axis": Task(axis_distance, {
        "paper": ("How many meters is this point from the camera along the forward direction?",
                  AHEAD),
        "release": think("How far is this point from the camera along the forward direction?",
                         "meter", AHEAD),
    }, METERS),
    "speed": Task(speed, {
        "paper": ("How many meters per second must the camera move to reach this point in {given} "
                  "seconds?", MUST_MOVE),
        "release": think("How fast must the camera move to reach this point in {given} seconds?",
                         "meters per second", MUST_MOVE),
    }, METERS_PER_SECOND),
    "time": Task(travel_time, {
        "paper": ("How many seconds does the camera take to reach this point at {given} meters per "
                  "second?", TAKES),
        "release": think("How long does the camera take to reach this point at {given} meters per "
                         "second?", "second", TAKES),
    }, SECONDS),
    "two_point": Task(two_point, {
        "paper": ("How many meters is the point of the red marker from the point of the blue "
                  "marker?", APART),
        "release": think("How far is the point of the red marker from the point of the blue "
                         "marker?", "meter", APART),
    }, METERS, markers=2, needs="two labelled points"),
    "motion": Task(motion, {
        "paper": ("How many meters has the camera moved between the two images?", MOVED),
        "release": think("How far has the camera moved between the two images?", "meter", MOVED),
    }, METERS, markers=0, needs="'pose', 'time', 'scene' and 'camera'"),
}


def make_query(task: str, records: Records, i: int, rng, point: int | None = None) -> Query:
    """A query of a task about record i, one of its points, or a random one. Raises Unfit, or
    ValueError: answers are positive numbers, because delta1 and the rewards are about ratios."""
    query = TASKS[task].make(records, i, rng, point)
    if not (query.value > 0 and math.isfinite(query.value)):
        raise ValueError(f"task '{task}': the true value {query.value:g} is not a positive number. "
                         "Word the task so that all of its values are.")
    return query


def task_fits(task: str, records: Records, tries: int = 64) -> bool:
    """Whether a task fits any of some records spread over a file."""
    for i in np.linspace(0, len(records) - 1, min(tries, len(records))):
        try:
            make_query(task, records, int(i), np.random.default_rng(int(i)))
        except Unfit:
            continue
        except ValueError:  # a damaged record says nothing about the others
            pass
        return True
    return False


# --------------------------------------------------------------------------------------------------
# what a checkpoint was trained to see: its depthlm.json overrides these, flags override both

DEFAULTS = {"focal": 1000, "marker": "arrow", "marker_size": 5, "prompt": "paper",
            "camera": "unify", "tasks": ["distance"], "max_new_tokens": 128, "question": ""}
PROMPTS = [name for name in TASKS["distance"].wordings if not name.startswith("camera ")]
FIELDS = {"w", "h", "fx", "fy", "cx", "cy", "u", "v", "given"}  # of a question
CAMERAS = ("unify", "none", "prompt", "ray")  # Sec. 3.3, App. A.5
RANGES = {"focal": (1, 1e5), "marker_size": (1, 1000), "max_new_tokens": (1, 1e5)}

PLAIN = r"\d+(?:\.\d+)?"
THINKING = (r"<think>(?:(?!</?think>|</?answer>).)*</think>\s*,?\s*"
            rf"<answer>\s*{PLAIN}\s*</answer>")


def check_settings(settings: dict) -> dict:
    """The settings, if they go together. Raises ValueError."""
    for key, allowed in (("marker", MARKERS), ("prompt", PROMPTS), ("camera", CAMERAS)):
        if str(settings[key]) not in allowed:
            raise ValueError(f"{key} '{settings[key]}' is none of {', '.join(allowed)}")
    for key, (low, high) in RANGES.items():
        value = settings[key]
        kinds = (int, float) if key == "focal" else (int,)
        if type(value) not in kinds or not low <= value <= high:
            raise ValueError(f"{key} {value!r} is no number from {low} to {high:g}")
    if type(settings["tasks"]) is not list or {*map(type, settings["tasks"])} != {str}:
        raise ValueError(f"tasks {settings['tasks']!r} is no list of tasks")
    with blaming(f"question {settings['question']!r}", "{u} and the like are its fields, {{ is a "
                 "brace."):
        if unknown := template_fields(settings["question"]) - FIELDS:
            raise ValueError(f"{min(unknown)} is none of the fields {', '.join(sorted(FIELDS))}")
    for task in settings["tasks"]:
        if task in TASKS:
            wording(task, settings)
    return settings


def wording(task: str, settings: dict) -> tuple[str, str]:
    """Templates of question and answer; the question may be of one's own."""
    name, camera = settings["prompt"], settings["camera"]
    if camera in ("prompt", "ray"):
        name = f"camera {camera}" + f" {name}" * (name != "paper")
    if name not in TASKS[task].wordings:
        raise ValueError(f"task '{task}' has no wording for --prompt {settings['prompt']} with "
                         f"--camera {settings['camera']}: text coordinates and the camera "
                         "strategies 'prompt' and 'ray' are for distance alone (App. A.1, A.5).")
    question, answer = TASKS[task].wordings[name]
    return settings.get("question") or question, answer


def template_fields(template: str) -> set[str]:
    """Their names; {w:9} has none of ours."""
    parts = string.Formatter().parse(template)
    return {name + spec + (kind or "") for _, name, spec, kind in parts if name is not None}


def answer_form(task: str, settings: dict) -> str | None:
    """The answer as a template of its number alone, {x}; None where it says other numbers, too."""
    answer = wording(task, settings)[1]
    return answer if template_fields(answer) == {"x"} else None


def has_form(text: str, task: str, settings: dict) -> bool:
    """Whether the whole of an answer has the form that the prompt asks for, with a plain number
    (App. A.4)."""
    form = THINKING
    if settings["prompt"] != "release":
        answer = re.escape(wording(task, settings)[1])
        form = re.sub(r"\\\{(\w+)\\\}", lambda name: PLAIN if name[1] == "x" else r"\S+", answer)
    return re.fullmatch(form, text.strip(), re.S) is not None


def phrase(query: Query, view: View, settings: dict) -> tuple[str, str]:
    """-> question, answer (Sec. 3.1, App. A.1 and A.5). Numbers have two decimals."""
    fx, fy, cx, cy, w, h = view.intrinsics
    fields = {"x": f"{query.value:.2f}", "given": query.given, "w": w, "h": h,
              "fx": f"{fx:.2f}", "fy": f"{fy:.2f}", "cx": f"{cx:.2f}", "cy": f"{cy:.2f}"}
    if query.points:
        u, v = view.move(*query.points[0])
        right, up = math.degrees(math.atan2(u - cx, fx)), math.degrees(math.atan2(cy - v, fy))
        fields |= {"u": math.floor(u + 0.5), "v": math.floor(v + 0.5),
                   "right": f"{abs(right):.0f}", "side": "right" if right >= 0 else "left",
                   "up": f"{abs(up):.0f}", "updown": "above" if up >= 0 else "below"}
    question, answer = wording(query.task, settings)
    return question.format(**fields), answer.format(**fields)


def render(query: Query, settings: dict, grid: int, crop=None,
           rng=None) -> tuple[list[View], str, str]:
    """A query as the model gets it -> views (one per image, markers drawn), question, answer."""
    focal = settings["focal"] if settings["camera"] == "unify" else None
    views = []
    for k, record in enumerate(query.records):
        points = query.points if k == 0 else []
        # the same random numbers: two images are cropped alike
        view = record_view(record, focal, grid, crop, points, copy.deepcopy(rng))
        if settings["prompt"] != "text":
            for point, color in zip(points, COLORS.values()):
                draw_marker(view.pixels, *view.move(*point), settings["marker"],
                            settings["marker_size"], color)
        views.append(view)
    return views, *phrase(query, views[0], settings)


def record_view(record: dict, focal: float | None, grid: int, crop, points: list, rng) -> View:
    """A record's image without a marker; its scale is that from label pixels."""
    path = record["image"]
    shown = path, record["intrinsics"], record["where"], record.get("orientation"), focal, grid
    if crop is not None:
        return label_view(*shown, crop, points, rng)
    changed = os.path.getmtime(path) if os.path.exists(path) else None
    view = whole_view(changed, *shown)
    return replace(view, pixels=view.pixels.copy())


@lru_cache(maxsize=2)
def whole_view(changed: float | None, *shown) -> View:
    """Opening and resizing is most of the work, so it is done once for all points of an image that
    are queried in a row. `changed`: the file's time, to see a new image."""
    return label_view(*shown)


def label_view(path: str, intrinsics: tuple, where: str, orientation: str | None,
               focal: float | None, grid: int, crop=None, points=(), rng=None) -> View:
    """unify_focal of an image file, with points and scale in label pixels. Raises ValueError with
    the record's file and line."""
    image = open_image(path, intrinsics[4:], orientation)
    intrinsics, sx, sy = match_size(image, intrinsics, where)
    keep = [(sx * (x + 0.5) - 0.5, sy * (y + 0.5) - 0.5) for x, y in points]
    try:
        view = unify_focal(image, intrinsics, focal, grid, crop, keep, rng)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    return replace(view, scale=(view.scale[0] * sx, view.scale[1] * sy))


# --------------------------------------------------------------------------------------------------
# numbers in answers

LETTER = r"[a-z\u00df-\u058f]"  # of an alphabet that puts spaces between words
NO_SPACES = "|".join(sorted((word for word in METERS | SECONDS if not re.search(LETTER, word)),
                            key=len, reverse=True))

# a number is no part of a longer one or of a name; it has a sign and an exponent
START = rf"(?<!{LETTER})(?<![\d.,])(?:(?<![)%])[-+])?"
END = r"(?:e[-+]?\d+)?(?!\d|[.,:'/]\d)"

# An answer is read as a string with a letter for each of its tokens:
#   n number, f fraction, u unit of the task, x other digits (2:30, a pixel), h number in words,
#   b between, e and, j to or, a is about, w any other word.
# Other characters are themselves, and \0 stands for </answer>.
TOKEN = re.compile(rf"""
    (?P<w1> {LETTER}+ (?:['/]{LETTER}+)* )
  | (?P<x1> [(\[] \s*-?[\d.]++ (?:\s*,\s*-?[\d.]++)+ \s*[)\]] )
  | {START} (?:
      (?P<f> \d+/[1-9]\d* )
    | (?P<n1> [1-9]\d{{0,2}} (?: (?:[.\ ']\d{{3}})+ ,\d+ | (?:\.\d{{3}}){{2,}} ) )   # 1.234,5
    | (?P<n2> [1-9]\d{{0,2}} (?:[,\ ']\d{{3}})+ (?:\.\d+)? | \d++(?:\.\d++)? | \.\d++ )  # 1,234.5
    | (?P<n3> \d++,\d++ )  # 2,5; but 12,345 is an English number
    ) {END}
  | (?P<x2> \d[\d.,:'/]* )
  | (?P<w2> (?:{NO_SPACES}) (?:/(?:{NO_SPACES}))? | [^\W\d_] )
  | (?P<s> \S | \n )""", re.X)
WORDS = each_word({
    "half quarter couple few dozen one two three four five six seven eight nine ten twenty thirty "
    "forty fifty hundred thousand zwei drei vier funf deux trois quatre cinq dos tres cuatro cinco "
    "due tre quattro cinque dois quatro twee drie два две три четыре 两 二 三 四 五 "
    "halb halbe demi medio mezzo meio 半 반": "h",
    "between zwischen entre tra fra tussen mellan miedzy между minus not": "b",
    "and und et y e en и plus 和 と": "e",
    "to till until or bis oder a an ou o tot of do lub до или x times point 点 到 至 或 か ら "
    "에 서 부 터 × ± + / & →": "j",
    "is it's at about around approx approximately roughly nearly almost circa equals answer "
    "distance depth 约 約": "a"})
QUANTITY = re.compile("(?:nf?|f)[-([\0]?u(?:e?(?:nf?|f)u)*")  # becomes the letter q
# a range, a list or a sum before a quantity; a remainder behind it
UNCLEAR = re.compile(r"(?:[nfx](?:w|[ej,.~^·•-]*)|u[ej-]*|h[ej-]*|[b√])q|"
                     r"q[ej~^-]*[nfxh]|q[j~-]+q|xu")
# a number without a unit that is no part of a phrase
ALONE = re.compile("""(?:^|[a:=~≈([|\n])n(?=$|[].,;:!?)|\n\0])|(?<=(["']))n(?=\\1)""")
THOUGHT = r"[<\[]%s(?:think|thought|reason|analysis)\w*[>\]]"
MARKUP = re.compile(r"\\(?:text|math)\w*|\\(?:[mh]box|rm|bf|left|right|q?quad|[^a-z])|"
                    r"[$*_`{}\\\0\u00ad\u200b-\u200f]|<(?!/?answer>)/?[a-z|][^<>]*>")
SMALL_DIGITS = "[²³¹⁰-₉¼-¾⅐-⅟①-⒛⓪-⓿❶-➓㉈-㊿]"
SIGNS = str.maketrans("−‐‑‒–—〜∼、⁄∕÷每٫٬’‘′“”", "------~~~////.,'''\"\"")


def parse_answer(text: str, task: str = "distance", truncated: bool = False) -> float | None:
    """The number of an answer in metres (seconds, m/s: the task's unit), or None: a wrong answer,
    counted as unparsed.

    What follows a thought is the answer; of that the last complete <answer>, or what follows
    \\boxed or "answer is". It is a quantity with a unit, converted (5 ft 6 in), or else a number
    alone. None: several that differ, ranges, words, numbers of something else. truncated: the token
    limit ended the text, so that a number at its end may be a part of one."""
    text = plain_text(text or "")
    _, *tagged = text.split("<answer>")
    if tagged:
        closed = [part for part in tagged if "</answer>" in part]
        if truncated and tagged[-1] not in closed:
            return None
        text = (closed or tagged)[-1].replace("</answer>", "\0")
    text = re.split(r"\bboxed\b|\banswer\s*(?:is\b|:|=)", text)[-1]

    letters, values = "", []
    for token in TOKEN.finditer(text):
        letter, value = read_token(token, TASKS[task].unit)
        letters += letter
        values.append(value)
    if "\0" in letters:
        letters = re.sub("\0(u?)[^\0]*", "\0\\1", letters)  # <answer>250</answer> cm, because
    elif truncated:
        letters = re.sub("((?<=n)[.,']+)?$", "x", letters)
    found = [quantity(m[0], values[m.start():]) for m in QUANTITY.finditer(letters)]
    alone = ALONE.search(letters)
    if not found and alone and len(re.findall("n(?![a-z%/])", letters)) == 1:
        units = [value for letter, value in zip(letters, values) if letter == "u"]
        if {*units} <= {1.0}:  # not {"distance_cm": 250}
            found.append(values[alone.end() - 1])
    clear = found and not UNCLEAR.search(QUANTITY.sub("q", letters))
    # 2.5 m (8.2 ft) is one answer
    if clear and all(map(math.isfinite, found)) and np.ptp(found) <= 0.1 * abs(found[0]):
        return found[0]
    return None


def read_answer(answer: dict, task: str = "distance") -> float | None:
    """parse_answer of {"text"}, and "truncated" if the token limit ended it."""
    return parse_answer(answer["text"], task, answer.get("truncated", False))


def plain_text(text: str) -> str:
    """What follows the thought: lower case, one form of each digit and sign, no accents, no markup
    but <answer>."""
    text = re.sub("([a-z])([A-Z])", r"\1 \2", text)  # distanceCm
    text = re.sub(SMALL_DIGITS, r" \g<0> ", text.lower())  # 10² is no 102, and 2½ no 21/2
    text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    text = unicodedata.normalize("NFC", text).translate(SIGNS)
    text = re.split(THOUGHT % "/", text)[-1]
    text = MARKUP.sub(" ", re.split(THOUGHT % "", text)[0])
    text = re.sub(rf"(?<!{LETTER})in\b(?!\s*{LETTER})", "inch", text)
    return re.sub(r"\s*(?:/|\b(?:per|pro|par|por|al|в)\b)\s*", "/", text)


def read_token(token: re.Match, unit: dict[str, float]) -> tuple[str, float | None]:
    """-> its letter, and the value of a number or unit."""
    word, kind = token[0], token.lastgroup
    if word in unit:
        return "u", unit[word]
    if kind[0] not in "nf":
        return WORDS.get(word, word if kind == "s" else kind[0]), None
    point, comma = (",", ".") if kind in ("n1", "n3") else (".", ",")
    digits = re.sub(f"[ '{comma}]", "", word).replace(point, ".")
    above, _, below = digits.partition("/")
    return kind[0], float(above) / float(below or 1)


def quantity(letters: str, values: list) -> float:
    """The sum of its parts: 1 m 20 cm; NaN if they are not of one quantity."""
    total, number, last = 0.0, 0.0, math.inf
    for letter, value in zip(letters, values):
        if letter != "u":
            number += value or 0.0
        elif max(value, number * value) >= last or round(total / last, 6) % 1:
            return math.nan
        else:
            total, number, last = total + number * value, 0.0, value
    return total


# --------------------------------------------------------------------------------------------------
# checkpoints


@dataclass(frozen=True)
class Family:
    """How a model family differs, by `model_type` of its config.json. All else is read from the
    checkpoint's own files."""
    image_token: str
    patch: int  # px, where the config does not say
    vision_blocks: str  # where the model has the layers of its vision tower
    published: tuple = ()  # (module, its name in the files that the family was published with)
    mrope: bool = True  # image tokens have rows and columns; else each row ends with a token
    row_end: str | None = None
    image_end: str | None = None
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    settings: dict = field(default_factory=dict)  # where they differ from DEFAULTS
    chat_template: str | None = None


FAMILIES = {
    "qwen2_5_vl": Family("<|image_pad|>", 14, "model.visual.blocks", (
        ("model.visual.", "visual."), ("model.language_model.", "model."))),
    "qwen3_vl": Family("<|image_pad|>", 16, "model.visual.blocks", mean=(0.5,) * 3, std=(0.5,) * 3),
    "llava": Family(  # Pixtral
        "[IMG]", 16, "model.vision_tower.transformer.layers", (
            ("model.vision_tower.", "vision_tower."),
            ("lm_head.", "language_model.lm_head."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model.")),
        mrope=False, row_end="[IMG_BREAK]", image_end="[IMG_END]",
        settings={"focal": 750},  # App. A.6: memory
        chat_template="<s>{% for m in messages %}[INST]{% for c in m['content'] %}"
                      "{% if c['type'] == 'image' %}[IMG]{% else %}{{ c['text'] }}{% endif %}"
                      "{% endfor %}[/INST]{% endfor %}"),
}
TEMPLATE_SECONDS = 30  # a chat template that loops for ever is given up
HUB_SETTINGS = {"facebook/DepthLM": {"prompt": "release"}}  # public, without a depthlm.json


@dataclass
class Checkpoint:
    """An opened model folder: all that turns views and text into model inputs and back, and what
    the model was trained to see."""
    name: str  # as it was given
    folder: Path
    family: Family
    settings: dict
    tokenizer: object
    patch: int  # px
    merge: int  # patches per token and axis
    table: np.ndarray  # (3, 256) float32: the normalised value of each uint8, per channel
    image_id: int
    row_end_id: int | None
    image_end_id: int | None
    stop_ids: frozenset[int]  # where decoding ends: the end of turn and generation_config's
    prompt_cache: dict = field(default_factory=dict)  # number of images -> tokens of the template
    template_cache: dict = field(default_factory=dict)  # answer form -> evaluate.Template

    @property
    def grid(self) -> int:
        """Image sides are multiples of this, px."""
        return self.patch * self.merge

    @property
    def end_id(self) -> int:
        """The end-of-turn token that closes an answer."""
        return self.tokenizer.eos_token_id

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """special: read "<|im_end|>" and the like as control tokens, not as text."""
        return self.tokenizer(text, add_special_tokens=False,
                              split_special_tokens=not special)["input_ids"]

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode([t for t in tokens if t not in self.stop_ids])

    def answer(self, tokens: list[int]) -> dict:
        """{"text"}, and "truncated" if no end token ended it."""
        cut = {} if self.stop_ids & {*tokens[-1:]} else {"truncated": True}
        return {"text": self.text(tokens), **cut}


def find_checkpoint(name: str) -> Path:
    """A local folder, or the folder to which a Hugging Face repository is downloaded."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name}: has no config.json, so it is not a checkpoint folder. Give "
                             "the folder that train_sft.py wrote (ckpt/<run>), or a Hugging Face "
                             "repository name.")
        return path
    # ckpt/tpyo is a slip, and no repository of a user named ckpt
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir()
    if path.exists() or not on_hub:
        made = "train_sft.py writes one; bash runs/toy.sh makes ckpt/toy"
        raise ValueError(f"{name}: no such checkpoint folder ({made}).")

    from huggingface_hub import snapshot_download
    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # offline, no such repository, no access: one line for all
        raise ValueError(f"{name}: neither a local folder nor a repository that can be downloaded "
                         f"({type(e).__name__}).") from None


def read_family(folder: Path) -> Family:
    """By config.json; a Llava whose vision tower is not Pixtral's is another family."""
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    with blaming(folder / "config.json"):
        vision = (config.get("vision_config") or {}).get("model_type", "pixtral")
    if kind not in FAMILIES or (kind == "llava" and vision != "pixtral"):
        raise ValueError(f"{folder}: model_type '{kind}' in config.json is none of "
                         f"{', '.join(FAMILIES)} (llava with the vision tower of Pixtral). Query "
                         "such a model elsewhere: evaluate.py --export-queries DIR, then "
                         "--predictions FILE.")
    return FAMILIES[kind]


def open_checkpoint(name: str, overrides: dict | None = None, fallback: dict | None = None,
                    quiet: bool = False) -> Checkpoint:
    """Open a model folder or hub repository; its weights are not read. overrides: settings given by
    flags (None: not given); fallback: what holds where the folder has no depthlm.json.
    (AutoProcessor would need torchvision, so the tokenizer is loaded alone.)"""
    folder = find_checkpoint(name)
    family = read_family(folder)
    settings = read_settings(name, folder, family, overrides or {}, fallback or {}, quiet)
    config = read_json(folder / "config.json")
    with blaming(folder / "config.json"):
        vision = config["vision_config"]
        patch = vision.get("patch_size", family.patch)
        merge = vision.get("spatial_merge_size", 2) if family.mrope else 1
        if patch not in range(4, 65) or merge not in range(1, 9):
            raise ValueError(f"vision_config has patches of {patch!r} px, {merge!r} a token")

    tokenizer = load_tokenizer(folder, family)
    with blaming(folder / "tokenizer.json"):
        ids = tokenizer.get_vocab()
        needed = {family.image_token, family.row_end, family.image_end} - {None}
        for token in (*needed, tokenizer.eos_token):
            if token not in ids:
                raise ValueError(f"has no token {token or 'that ends an answer'}")
        size = config.get("text_config", config).get("vocab_size", math.inf)
        if len(ids) > size:
            raise ValueError(f"has {len(ids)} tokens, the model of config.json has {size}")

    checkpoint = Checkpoint(
        name, folder, family, settings, tokenizer, patch, merge, pixel_table(folder, family),
        image_id=ids[family.image_token], row_end_id=ids.get(family.row_end),
        image_end_id=ids.get(family.image_end),
        stop_ids=generation_stops(folder) | {tokenizer.eos_token_id})
    with blaming(f"{folder}, chat template"), ThreadPool(1) as pool:
        pool.apply_async(prompt_tokens, (checkpoint, "", 1)).get(TEMPLATE_SECONDS)
    return checkpoint


def read_settings(name: str, folder: Path, family: Family, overrides: dict, fallback: dict,
                  quiet: bool) -> dict:
    """What the model was trained to see."""
    settings, path = dict(DEFAULTS), folder / "depthlm.json"
    given = {key: value for key, value in overrides.items() if value is not None}
    if path.is_file():
        with blaming(path):
            known = read_json(path)
            settings |= {key: known[key] for key in DEFAULTS if key in known}
            check_settings(settings)
    else:
        settings |= {**family.settings, **HUB_SETTINGS.get(name, {}), **fallback}
        if not quiet:
            shown = ", ".join(f"{k} {v}" for k, v in settings.items() if v and k not in given)
            print(f"{name}: no depthlm.json, so the defaults of its family: {shown}",
                  file=sys.stderr)
    return check_settings(settings | given)


def load_tokenizer(folder: Path, family: Family):
    if not version("transformers").startswith("5."):
        raise ValueError(f"transformers {version('transformers')} is installed, 5 is needed: pip "
                         "install -r requirements.txt")
    from transformers import AutoTokenizer
    with blaming(folder / "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    path = folder / "chat_template.json"
    if path.is_file():
        with blaming(path):
            tokenizer.chat_template = read_json(path)["chat_template"]
    tokenizer.chat_template = tokenizer.chat_template or family.chat_template
    if tokenizer.chat_template is None:
        raise ValueError(f"{folder}: has no chat template; copy chat_template.json from the base "
                         "model.")
    return tokenizer


def pixel_table(folder: Path, family: Family) -> np.ndarray:
    """(3, 256) float32: the normalised value of each uint8, per channel."""
    processor, path = {}, folder / "processor_config.json"
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (folder / file).is_file():
            path = folder / file
            processor = read_json(path)
    with blaming(path), np.errstate(all="ignore"):
        processor = processor.get("image_processor", processor)
        mean, std = (np.array(processor.get(f"image_{name}", default), np.float32).reshape(3, 1)
                     for name, default in (("mean", family.mean), ("std", family.std)))
        factor = processor.get("rescale_factor", 1 / 255)
        if not processor.get("do_rescale", True):  # Pixtral as released
            factor = 1.0
        scaled = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
        table = (scaled - mean) / std
        if not np.isfinite(table).all():
            raise ValueError(f"image_std {std.tolist()} makes no numbers of pixels")
    return table


def generation_stops(folder: Path) -> frozenset[int]:
    """The tokens at which transformers' generate ends for this checkpoint."""
    path = folder / "generation_config.json"
    with blaming(path):
        stops = (read_json(path).get("eos_token_id") or []) if path.is_file() else []
        stops = stops if type(stops) is list else [stops]
        if any(type(token) is not int for token in stops):
            raise ValueError(f"eos_token_id {stops} are no tokens")
    return frozenset(stops)


# --------------------------------------------------------------------------------------------------
# tokens and patches


def patchify(pixels: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """(H, W, 3) uint8 -> what the vision tower takes, still uint8: Qwen (patches, 3 * patch *
    patch), the merge x merge patches of a token next to each other; Pixtral (3, H, W)."""
    if not checkpoint.family.mrope:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    p, m = checkpoint.patch, checkpoint.merge
    h, w = pixels.shape[0] // p, pixels.shape[1] // p
    blocks = pixels.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(blocks).reshape(h * w, 3 * p * p)


QUESTION = "@question@"  # stands for the question in a chat template


def prompt_tokens(checkpoint: Checkpoint, question: str, images: int) -> list[int]:
    """Chat template around images and question; one image token per image. What looks like a
    control token in the question is text."""
    if images not in checkpoint.prompt_cache:
        content = [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]
        text = checkpoint.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        halves = [checkpoint.tokens(half, special=True) for half in text.split(QUESTION)]
        found = sum(half.count(checkpoint.image_id) for half in halves)
        if len(halves) != 2 or found != images:
            raise ValueError(f"holds {len(halves) - 1} questions and {found} images, where 1 and "
                             f"{images} were given")
        checkpoint.prompt_cache[images] = halves
    start, end = checkpoint.prompt_cache[images]
    return start + checkpoint.tokens(question) + end


def image_tokens(checkpoint: Checkpoint, rows: int, columns: int) -> tuple[list, np.ndarray, int]:
    """-> ids of an image of rows x columns tokens, their positions (3, T) from 0 on, and how many
    positions it takes."""
    if checkpoint.family.mrope:  # one time for all, rows and columns count on
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions = np.stack([np.zeros_like(row), row, column])
        return [checkpoint.image_id] * (rows * columns), positions, max(rows, columns)
    row = [checkpoint.image_id] * columns
    ids = (row + [checkpoint.row_end_id]) * (rows - 1) + row + [checkpoint.image_end_id]
    return ids, np.broadcast_to(np.arange(len(ids)), (3, len(ids))), len(ids)


def encode(checkpoint: Checkpoint, views: list[View], question: str,
           answer: list[int] = ()) -> dict:
    """-> one sample: input_ids (T,), position_ids (3, T) (mRoPE) or (1, T), pixels: list of uint8
    arrays, sizes: their patch grids [(rows, columns)], prompt_length. answer: tokens behind the
    prompt, for training with the end token."""
    height_width = [view.pixels.shape[:2] for view in views]
    sizes = [(h // checkpoint.patch, w // checkpoint.patch) for h, w in height_width]
    image = iter(sizes)
    ids, positions, at = [], [], 0
    for token in prompt_tokens(checkpoint, question, len(views)):
        if token == checkpoint.image_id:
            rows, columns = (n // checkpoint.merge for n in next(image))
            block, places, advance = image_tokens(checkpoint, rows, columns)
        else:
            block, places, advance = [token], np.zeros((3, 1), int), 1
        ids += block
        positions.append(places + at)
        at += advance
    prompt_length = len(ids)
    ids += answer
    positions.append(np.broadcast_to(np.arange(at, at + len(answer)), (3, len(answer))))
    positions = np.concatenate(positions, 1)
    return {"input_ids": np.array(ids), "prompt_length": prompt_length, "sizes": sizes,
            "position_ids": positions if checkpoint.family.mrope else positions[:1],
            "pixels": [patchify(view.pixels, checkpoint) for view in views]}


def pack(samples: list[dict]) -> dict:
    """Samples one after another in one row, not padded: input_ids (1, S), position_ids (3 or 1, 1,
    S), segments (n + 1,) where each sample starts, longest: of them; and for the loss, targets: the
    answer tokens, predict_at: the position that predicts each."""
    import torch
    starts = np.concatenate([[0], np.cumsum([len(s["input_ids"]) for s in samples])])
    ids = np.concatenate([s["input_ids"] for s in samples])
    answers = [np.arange(start + s["prompt_length"], end)
               for s, start, end in zip(samples, starts, starts[1:])]
    answers = np.concatenate(answers)
    positions = np.concatenate([s["position_ids"] for s in samples], 1)

    pixels = [p for s in samples for p in s["pixels"]]
    if pixels and pixels[0].ndim == 2:
        pixels = np.concatenate(pixels)
    elif pixels:  # Pixtral's patch convolution takes a padded batch
        height, width = (max(p.shape[k] for p in pixels) for k in (1, 2))
        pixels = np.stack([np.pad(p, ((0, 0), (0, height - p.shape[1]), (0, width - p.shape[2])))
                           for p in pixels])
    return {"input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[:, None],
            "segments": torch.from_numpy(starts.astype(np.int32)),
            "longest": int(np.diff(starts).max()),
            "pixels": torch.from_numpy(pixels) if len(pixels) else None,
            "sizes": [size for s in samples for size in s["sizes"]],
            "predict_at": torch.from_numpy(answers - 1), "targets": torch.from_numpy(ids[answers])}


def model_inputs(batch: dict, checkpoint: Checkpoint, device="cpu", dtype=None) -> dict:
    """A packed batch as arguments of the model: moved to the device as uint8 and normalised there,
    by a table, so that the values are bit for bit those of transformers' image processors (in
    float32, then rounded to `dtype`)."""
    import torch
    inputs = {k: batch[k].to(device, non_blocking=True)
              for k in ("input_ids", "position_ids", "segments")}
    inputs["longest"] = batch["longest"]
    if not checkpoint.family.mrope:
        inputs["position_ids"] = inputs["position_ids"][0]
    if batch["pixels"] is None:
        return inputs

    table = torch.from_numpy(checkpoint.table).to(device)
    pixels = batch["pixels"].to(device, non_blocking=True)
    n, p = len(pixels), checkpoint.patch * checkpoint.patch
    if checkpoint.family.mrope:
        pixels = pixels.view(n, 3, p)
    values = torch.stack([table[c][pixels[:, c].int()] for c in range(3)], 1)
    if checkpoint.family.mrope:
        # a still image is shown to both frames of the temporal patch
        values = values[:, :, None].expand(n, 3, 2, p).reshape(n, 6 * p)
        grids = torch.tensor([(1, rows, columns) for rows, columns in batch["sizes"]])
        inputs["image_grid_thw"] = grids.to(device)
    else:
        inputs["image_sizes"] = torch.tensor(batch["sizes"]) * checkpoint.patch
        for value, (height, width) in zip(values, inputs["image_sizes"].tolist()):
            value[:, height:], value[:, :, width:] = 0, 0  # padding is 0 after normalisation
    return {**inputs, "pixel_values": values.to(dtype) if dtype else values}


# --------------------------------------------------------------------------------------------------
# pictures: what all scripts draw with

INK, PALE, FRAME = (40, 40, 40), (222, 222, 222), (255, 214, 0)
HUES = ((36, 104, 180), (214, 92, 32), (60, 146, 80), (140, 80, 170), (200, 160, 20),
        (40, 160, 170), (190, 70, 120), (110, 110, 110))  # of the series of a chart, in order
ROUND = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,))  # first digits of ticks, fine to coarse
GAP = 10  # px between tiles
AROUND, ZOOM = 16, 4  # px on each side of a marker that are magnified, and how many times


def round_ticks(low: float, high: float, log: bool = False, most: int = 8) -> list[float]:
    """Round numbers, at most `most` unless there are more decades: the first is at or below `low`,
    the last at or above `high`. log: of a logarithmic axis, which spans a factor of two at least,
    so that noise does not fill it."""
    if log:
        middle = math.sqrt(low * high)
        low, high = min(low, middle / math.sqrt(2)), max(high, middle * math.sqrt(2))
        scales = [[float(f"{digit}e{k}") for k in range(-12, 13) for digit in digits]
                  for digits in ROUND]
    else:
        decade = math.floor(math.log10(high - low or 1))
        steps = [float(f"{digit}e{k}") for k in (decade - 1, decade) for digit in (1, 2, 5)]
        scales = [np.arange(math.floor(low / step), math.ceil(high / step) + 2) * step
                  for step in steps]
    for scale in scales:
        first, last = np.searchsorted(scale, low, "right") - 1, np.searchsorted(scale, high)
        ticks = list(scale[first:max(last, first + 1) + 1])
        if len(ticks) <= most:
            break
    return ticks


class Axes:
    """A chart with round ticks on both axes: lines and points are drawn on it in the data's units,
    and what is outside, on its border. x, y: all that it has to hold."""

    def __init__(self, title: str, x, y, log=(False, False), size=(380, 280)):
        self.image = Image.new("RGB", size, "white")
        self.draw = ImageDraw.Draw(self.image, "RGBA")  # colours may have an alpha
        self.log, self.ends = log, ((48, size[0] - 18), (size[1] - 24, 24))  # px: first, last tick
        self.ticks = [round_ticks(min(values), max(values), logarithmic)
                      for values, logarithmic in zip((x, y), log)]
        self.draw.text((48, 4), title, INK, font_size=12)
        for axis, (anchor, shift) in enumerate((("ma", (0, 4)), ("rm", (-6, 0)))):
            for tick in self.ticks[axis]:
                ends = [[ticks[0], ticks[-1]] for ticks in self.ticks]
                ends[axis] = [tick, tick]
                self.line(*ends, PALE, 1)
                self.draw.text(tuple(self.place(*ends)[0] + shift), f"{tick:g}", INK, anchor=anchor)

    def place(self, x, y) -> np.ndarray:
        """Pixels (N, 2) of points in the data's units."""
        places = []
        for values, ticks, ends, log in zip((x, y), self.ticks, self.ends, self.log):
            scale = np.log if log else np.asarray
            with np.errstate(divide="ignore"):  # 0 is at the low end of a logarithmic axis
                places.append(np.interp(scale(values), scale([ticks[0], ticks[-1]]), ends))
        return np.stack(places, -1)

    def line(self, x, y, color, width: int = 2) -> None:
        self.draw.line(self.place(x, y).flatten().tolist(), color, width)

    def points(self, x, y, color, radius: float = 3) -> None:
        for place in self.place(x, y).tolist():
            self.draw.circle(place, radius, color)

    def name(self, series: int, text: str) -> None:
        """A line of the legend, in the colour of a series."""
        self.draw.text((56, 30 + 14 * series), text, hue(series))


def hue(series: int) -> tuple[int, int, int]:
    return HUES[series % len(HUES)]


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """An image with a caption below, its lines wrapped to the image's width."""
    lines = [textwrap.fill(line, image.width // 6) for line in caption.split("\n")]
    text = "\n".join(lines)
    tile = Image.new("RGB", (image.width, image.height + 15 * text.count("\n") + 20), "white")
    tile.paste(image)
    ImageDraw.Draw(tile).text((2, image.height + 2), text, INK, font_size=12, spacing=3)
    return tile


def sheet(tiles: list[Image.Image], width: int = 1500) -> Image.Image:
    """Tiles as one picture, in rows of at most `width` px."""
    places, x, y, below = [], 0, 0, 0
    for tile in tiles:
        if x and x + tile.width + GAP > width:
            x, y = 0, below
        places.append((x + GAP, y + GAP))
        x, below = x + tile.width + GAP, max(below, y + tile.height + GAP)
    right = max(place[0] + tile.width for place, tile in zip(places, tiles))
    picture = Image.new("RGB", (right + GAP, below + GAP), "white")
    for place, tile in zip(places, tiles):
        picture.paste(tile, place)
    return picture


def query_tile(query: Query, views: list[View], caption: str, height: int = 300) -> Image.Image:
    """The images of a rendered query side by side, and the surroundings of each of its points
    magnified in a corner: at f = 1000 a marker of 5 px cannot be seen in an image made small."""
    images = [Image.fromarray(view.pixels) for view in views]
    first = images[0]
    scale = min(height / first.height, 2 * height / sum(image.width for image in images))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    small = [image.resize([math.ceil(n * scale) for n in image.size], method) for image in images]
    draw = ImageDraw.Draw(small[0])
    for k, point in enumerate(query.points if scale < 1.5 else []):
        x, y = np.floor(np.add(views[0].move(*point), 0.5)).tolist()
        box = x - AROUND, y - AROUND, x + AROUND + 1, y + AROUND + 1
        side = min(ZOOM * (2 * AROUND + 1), small[0].width // 2)
        inset = first.crop(box).resize((side, side), Image.Resampling.NEAREST)
        inset = ImageOps.expand(inset, 1, FRAME)
        left = 0 if x > first.width / 2 else small[0].width - inset.width
        small[0].paste(inset, (left, k * (small[0].height - inset.height)))
        draw.rectangle([scale * end for end in box], outline=FRAME)
    return captioned(sheet(small) if len(small) > 1 else small[0], caption)


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """What the model sees, the same flags in every script; None: as the checkpoint says."""
    flag = parser.add_argument_group("what the model sees (default: as the checkpoint was "
                                     "trained, else the paper's)").add_argument
    flag("--focal", type=POSITIVE, metavar="PX",
         help="unified focal length; the paper's: 1000, Pixtral 750 (Sec. 3.4, App. A.6)")
    flag("--marker", choices=MARKERS, help="marker shape; the paper's: arrow (App. A.1)")
    flag("--marker-size", type=COUNT, metavar="PX", help="the paper's: 5 (App. A.1)")
    flag("--prompt", choices=PROMPTS, help="paper (Sec. 3.1), release: think, then answer (Sec. "
         "3.2), text: coordinates in the question (App. A.1)")
    flag("--question", metavar="TEXT", help="instead of the prompt's, for models that were not "
         f"trained here; fields: {' '.join(f'{{{name}}}' for name in sorted(FIELDS))}")
    flag("--camera", choices=CAMERAS, help="camera strategy; the paper's: unify (Sec. 3.3)")


def add_decoding_flags(flag) -> None:
    """The same flags in evaluate.py and pointcloud.py."""
    flag("--decode", choices=("greedy", "median"), default="greedy",
         help="median of the distribution over numbers, with an interval; the paper is greedy")
    flag("--max-new-tokens", type=COUNT,
         help="tokens an answer may have; default: as the checkpoint was trained, else 128")
    flag("--batch-size", type=COUNT, default=32, help="queries a forward pass")
    flag("--workers", type=NATURAL, default=WORKERS,
         help="processes that prepare images, per rank")
    flag("--device", default="auto", help="such as cpu or cuda:1; auto: a GPU "
         "if there is one (Apple's MPS is untested)")
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
         help="auto: bfloat16 on a GPU, float32 elsewhere")


def add_map_flags(flag) -> None:
    """Of depth maps that other systems made, the same flags in evaluate.py and pointcloud.py."""
    flag("--depth-scale", type=POSITIVE,
         help="of the maps: a metre in their unit; default: 1000 for integers, 1 for others")
    flag("--depth-type", choices=("euclidean", "z"), default="euclidean",
         help="what those numbers are, where a line does not say: z is converted by its ray")


def settings_from_flags(args: argparse.Namespace) -> dict:
    return {key: getattr(args, key) for key in DEFAULTS if hasattr(args, key) and key != "tasks"}


def parse_args(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("data", type=file_path, help="a jsonl file")
    flag("--out", type=file_path, default="sheet.png", help="the picture to write")
    flag("--n", type=COUNT, default=9, help="samples on the sheet")
    flag("--seed", type=NATURAL, default=0, help="which samples, and their crops")
    add_record_flags(flag)
    flag("--task", default="distance", choices=TASKS, help="what is asked")
    flag("--checkpoint", help="model folder whose settings and grid are followed; default: none")
    flag("--grid", type=COUNT, default=28, help="image sides are multiples of this, px")
    flag("--crop", type=COUNT, nargs=4, metavar=("W0", "W1", "H0", "H1"),
         help="random crop, as in training; default: whole images, as in evaluation")
    add_settings_flags(parser)
    return parser.parse_args(argv)


@command
def main(argv=None) -> None:
    args = parse_args(argv)
    given = settings_from_flags(args)
    if args.checkpoint:
        checkpoint = open_checkpoint(args.checkpoint, given)
        settings, grid = checkpoint.settings, checkpoint.grid
    else:
        given = {key: value for key, value in given.items() if value is not None}
        settings, grid = check_settings(DEFAULTS | given), args.grid

    records = Records(args.data, args.image_root, args.label_type)
    rng = np.random.default_rng(args.seed)
    tiles = []
    for i in rng.permutation(len(records))[:args.n].tolist():
        query = make_query(args.task, records, i, rng)
        views, question, answer = render(query, settings, grid, args.crop, rng)
        where = "".join(f", pixel ({x:g}, {y:g})" for x, y in query.points)
        tiles.append(query_tile(query, views, f"record {i}{where}\nQ: {question}\nA: {answer}"))
    with replacing(args.out) as temporary:
        sheet(tiles).save(temporary, "PNG")
    height, width = views[0].pixels.shape[:2]
    print(f"{args.out}: {len(tiles)} samples, images of {width} x {height} px and the like, focal "
          f"{settings['focal']:g} px")


if __name__ == "__main__":
    main()
