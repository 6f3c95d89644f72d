"""
A point cloud from one photo: about 10,000 pixels on an even grid, one question each (Sec. 4, Fig. 8).

    python pointcloud.py ckpt/sft_3b photo.jpg --focal 1200            # CPU or one GPU -> out/photo/
    python pointcloud.py ckpt/sft_3b photo.jpg                         # focal length from the photo's EXIF, printed
    python pointcloud.py ckpt/sft_3b photo.jpg --fov 65 --at 320,240   # only the distance of that pixel
    python pointcloud.py ckpt/toy data/toy/val.jsonl --record 0        # a prepared image, with its own intrinsics

Reads a checkpoint and a photo (or a jsonl record). Writes into --out: cloud.ply (binary: x, y, z, red, green, blue),
depth.npy ((rows, columns) float32: Euclidean distance on the grid [m], NaN where the answer was no distance),
points.npz (the cloud's pixels, depth, xyz and colors, and the intrinsics), picture.png and run.json.

Camera axes: x right, y down, z forward, metres. A point is its Euclidean distance times the unit ray of its pixel;
pixel (0, 0) is the centre of the first pixel of the upright photo. A run that was interrupted goes on when its command
is given again.
"""
import argparse
import hashlib
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw
from tqdm import tqdm

import evaluate
import render
from render import fail

NUM_POINTS = 10_000  # Sec. 4, "Visualization"
NEAREST, FARTHEST = 1e-6, 1e6  # m; a number beyond these is no distance of anything in a photo
FILM_DIAGONAL = math.hypot(36, 24)  # mm, of a frame of 35 mm film
HOW_FOCAL = "Give --focal PIXELS or --fov DEGREES (the horizontal one)."
FILES, PART = ("cloud.ply", "depth.npy", "points.npz", "picture.png"), "answers.part.jsonl"
PANEL = 600  # px, longer side of each image of the picture
NEAR_TO_FAR = np.array([(128, 8, 32), (228, 60, 36), (252, 164, 52), (200, 228, 72), (64, 200, 140), (44, 124, 216),
                        (48, 36, 120)], float)  # colours of distances, at even steps of the logarithm
UNKNOWN, BACKGROUND = (110, 110, 110), (24, 24, 24)


# ----------------------------------------------------------------------------------------------------------------------
# geometry


def pixel_grid(width: int, height: int, count: int) -> np.ndarray:
    """About `count` pixels spread evenly over an image, the middles of nearly square cells: (rows, columns, 2) int, x
    and y. Rows and columns are the best compromise between that number and square cells; no pixel comes twice."""
    columns = np.arange(1, min(width, count) + 1)
    rows = np.clip(np.round(count / columns), 1, height)
    off = np.abs(np.log(columns * rows / count)) + np.abs(np.log((width / columns) / (height / rows)))
    columns, rows = int(columns[off.argmin()]), int(rows[off.argmin()])
    x, y = ((2 * np.arange(n) + 1) * length // (2 * n) for n, length in ((columns, width), (rows, height)))
    return np.stack(np.meshgrid(x, y), -1)


def has_neighbour(depth_m: np.ndarray, limit: float) -> np.ndarray:
    """(rows, columns) bool: distances within a factor 1 + `limit` of one of their four neighbours, at least. The others
    float between two surfaces, or are single wrong answers."""
    logs = np.pad(np.log(depth_m), 1, constant_values=np.nan)
    around = np.stack([logs[:-2, 1:-1], logs[2:, 1:-1], logs[1:-1, :-2], logs[1:-1, 2:]])
    return (np.abs(around - logs[1:-1, 1:-1]) <= math.log1p(limit)).any(0)  # a comparison with NaN is False


# ----------------------------------------------------------------------------------------------------------------------
# the photo and its camera


def exif_focal(path: str) -> tuple[float, float, str]:
    """fx, fy of the upright photo [px] from its EXIF data, and how they were found. Raises ValueError if it has none,
    or if it was cropped after it was taken."""
    with Image.open(path) as file:
        width, height = file.size  # as stored, not yet upright
        exif = file.getexif()
    tags, turned = exif.get_ifd(ExifTags.IFD.Exif), exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)

    def number(name: str) -> float:
        try:
            value = float(tags.get(ExifTags.Base[name], 0))
        except (TypeError, ValueError, ZeroDivisionError):
            return 0.0
        return value if math.isfinite(value) and value > 0 else 0.0

    taken, now = (number("ExifImageWidth"), number("ExifImageHeight")), (width, height)
    if all(taken) and abs(max(taken) / min(taken) * min(now) / max(now) - 1) > 0.01:
        raise ValueError(f"{path}: was taken at {taken[0]:g} x {taken[1]:g} and is {width} x {height}: it was cropped, "
                         f"so the focal length of its EXIF data does not hold. {HOW_FOCAL}")
    if film := number("FocalLengthIn35mmFilm"):
        # By the diagonal, because that is how the equivalent is defined (CIPA DCG-001): film is 3:2 and most sensors
        # are 4:3, so that the same rule by the width would give 4 % less.
        focal = film / FILM_DIAGONAL * math.hypot(width, height)
        return focal, focal, f"EXIF: {film:g} mm on 35 mm film, by the diagonal"
    unit = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}.get(int(number("FocalPlaneResolutionUnit")) or 2)  # mm
    focal_mm, x_density = number("FocalLength"), number("FocalPlaneXResolution")
    if focal_mm and x_density and unit:
        resized = max(now) / max(taken) if all(taken) else 1.0
        fx, fy = (focal_mm * d / unit * resized for d in (x_density, number("FocalPlaneYResolution") or x_density))
        fx, fy = (fy, fx) if turned else (fx, fy)  # the tags are about the sensor's axes
        return fx, fy, f"EXIF: {focal_mm:g} mm on a sensor of {x_density / unit:.4g} px/mm"
    raise ValueError(f"{path}: its EXIF data have no focal length that can be had in pixels. {HOW_FOCAL}")


def photo_camera(path: str, size, focal: list[float] | None, fov: float | None, center) -> tuple[tuple, str]:
    """-> intrinsics (fx, fy, cx, cy, w, h) [px] and where its focal length is from. Raises ValueError; no guessing."""
    width, height = size
    if focal is not None and fov is not None:
        raise ValueError("give --focal or --fov, not both.")
    if focal is not None:
        if len(focal) > 2 or not all(math.isfinite(f) and f > 0 for f in focal):
            given = " ".join(f"{f:g}" for f in focal)
            raise ValueError(f"--focal {given}: needs a positive number of pixels, or two (fx and fy).")
        fx, fy, source = focal[0], focal[-1], "--focal"
    elif fov is not None:
        if not 0 < fov < 180:
            raise ValueError(f"--fov {fov:g}: needs the horizontal field of view in degrees, between 0 and 180.")
        fx = fy = width / 2 / math.tan(math.radians(fov) / 2)
        source = f"--fov {fov:g}"
    else:
        fx, fy, source = exif_focal(path)
    cx, cy = center or ((width - 1) / 2, (height - 1) / 2)
    check_inside("--center", cx, cy, width, height)
    return (fx, fy, cx, cy, width, height), source


def check_inside(flag: str, x: float, y: float, width: int, height: int) -> None:
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        raise ValueError(f"{flag} {x:g},{y:g}: is outside of the photo; x is 0 to {width - 1}, y to {height - 1}.")


def open_record(path: str, number: int, image_root: str | None):
    """-> image path, image, intrinsics of its pixels, and its labels: pixels (N, 2), distances (N,) [m]."""
    records = render.Records(path, image_root)
    if not 0 <= number < len(records):
        raise ValueError(f"--record {number}: {path} has the records 0 to {len(records) - 1}.")
    record = records[number]
    image = render.open_image(record["image"], record["intrinsics"][4:])
    intrinsics, sx, sy = render.match_size(image, record["intrinsics"], record["where"])
    return record["image"], image, intrinsics, ((record["pixel_coords"] + 0.5) * (sx, sy) - 0.5, record["depth"])


# ----------------------------------------------------------------------------------------------------------------------
# asking


def ask_pixels(model, encoder, settings: dict, path: str, intrinsics, pixels: np.ndarray, batch_size: int, workers: int,
               max_new_tokens: int, decode: str = "greedy", first: int = 0):
    """Ask about pixels (N, 2), from number `first` on -> yields batches of {"pixel", "pred" [m] or None, "text", ...}."""
    record = {"image": path, "intrinsics": intrinsics, "pixel_coords": pixels, "depth": np.ones(len(pixels))}
    records = [render.check_record(record, path)]  # evaluate.ask needs no more of Records; the depth is unused
    pairs = [(0, k) for k in range(first, len(pixels))]
    for _, answers, _ in evaluate.ask(model, encoder, settings, records, pairs, "distance", batch_size, workers,
                                      max_new_tokens, decode=decode):
        values = [render.parse_answer(answer["text"]) for answer in answers]
        yield [{"pixel": pixel, "pred": value if value and NEAREST < value < FARTHEST else None, **answer}
               for pixel, value, answer in zip(pixels[first:].tolist(), values, answers)]
        first += len(answers)


def identity(path: str, intrinsics, grid: np.ndarray, settings: dict, folder: str, dtype, max_new_tokens: int, decode: str) -> dict:
    """What the answers depend on: those of an interrupted run are taken up only if all of it is the same."""
    stats = [(p.name, p.stat()) for p in sorted(Path(folder).glob("*.safetensors"))]
    found = {"weights": [(name, s.st_size, s.st_mtime_ns) for name, s in stats],  # a checksum would read many GB
             "image": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "intrinsics": intrinsics,
             "grid": grid.shape[:2], "settings": settings, "dtype": str(dtype), "max_new_tokens": max_new_tokens,
             "decode": decode}
    return json.loads(json.dumps(found))


def read_part(path: Path, asked: dict) -> dict[tuple, dict]:
    """Answers of an interrupted run, by pixel; a line that was cut off is dropped. Raises ValueError if it asked
    another checkpoint, about another photo, or in another way."""
    found = {}
    done: dict[tuple, dict] = {}
    for number, text in enumerate(path.read_text().splitlines()):
        try:
            line = json.loads(text)
            if number:
                done[tuple(line["pixel"])] = line
            else:
                found = line
        except (ValueError, KeyError, TypeError):
            break
    if different := [k for k in asked if found.get(k) != asked[k]]:
        raise ValueError(f"{path}: is the beginning of another cloud (another {', '.join(different)}). Give another "
                         "--out, or --overwrite.")
    return done


def ask_grid(ask, pixels: np.ndarray, part: Path, done: dict, asked: dict, batch_size: int) -> tuple[list[dict], str]:
    """Ask about all pixels (N, 2) that are not `done`; answers are on disk before the next batch is asked. -> lines in
    the order of the pixels, and what a query cost."""
    order = [tuple(p) for p in pixels.tolist()]
    kept = next((k for k, p in enumerate(order) if p not in done), len(order))
    if kept < len(order):  # whole batches only: the rest is then asked in the same company as without the interruption
        kept -= kept % batch_size
    lines = [done[p] for p in order[:kept]]
    evaluate.write_text(part, "".join(json.dumps(line) + "\n" for line in [asked, *lines]))
    if kept:
        print(f"{part}: goes on behind {kept:,} answers", flush=True)
    times, unparsed = [time.time()], sum(line["pred"] is None for line in lines)
    with open(part, "a") as file, tqdm(total=len(order), initial=kept, desc="queries", disable=None,
                                         dynamic_ncols=True) as bar:
        for batch in ask(pixels=pixels, first=kept):
            file.write("".join(json.dumps(line) + "\n" for line in batch))
            file.flush()
            lines += batch
            times.append(time.time())
            unparsed += sum(line["pred"] is None for line in batch)
            bar.set_postfix(unparsed=unparsed, refresh=False)
            bar.update(len(batch))
            if len(times) == 3 and len(lines) < len(order):  # the first batch includes starting the workers
                cost = (times[2] - times[1]) / len(batch)
                bar.write(f"{cost:.3g} s a query, so about {(len(order) - len(lines)) * cost / 60:.1f} minutes to go")
    asked_now = len(order) - kept
    return lines, f"{(times[-1] - times[0]) / asked_now:.3g} s a query" if asked_now else "no query was left"


# ----------------------------------------------------------------------------------------------------------------------
# files


def save(path: Path, write) -> None:
    """write(file), whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_ply(file, **columns: np.ndarray) -> None:
    """A binary PLY with one vertex a row: each column (N,) a property, uint8 as uchar, anything else as float."""
    kinds = {name: "u1" if column.dtype == np.uint8 else "<f4" for name, column in columns.items()}
    vertices = np.empty(len(columns["x"]), list(kinds.items()))
    for name, column in columns.items():
        vertices[name] = column
    properties = "".join(f"property {'uchar' if kind == 'u1' else 'float'} {name}\n" for name, kind in kinds.items())
    file.write(("ply\nformat binary_little_endian 1.0\ncomment metres; camera axes x right, y down, z forward\n"
                f"element vertex {len(vertices)}\n{properties}end_header\n").encode())
    file.write(vertices.tobytes())


# ----------------------------------------------------------------------------------------------------------------------
# the picture


def colorize(depth_m: np.ndarray, near: float, far: float) -> np.ndarray:
    """Distances (...) -> colours (..., 3) uint8 from near (red) to far (blue); NaN is grey."""
    known = np.isfinite(depth_m)
    t = np.log(np.where(known, depth_m, near) / near) / math.log(far / near)
    steps = np.linspace(0, 1, len(NEAR_TO_FAR))
    colors = np.stack([np.interp(t, steps, channel) for channel in NEAR_TO_FAR.T], -1)
    return np.where(known[..., None], colors, UNKNOWN).round().astype(np.uint8)


def legend(height: int, near: float, far: float) -> Image.Image:
    """The colours as a bar with distances in metres beside it, far at the top: 80 x height px."""
    image = Image.new("RGB", (80, height), "white")
    length = height - 13
    bar = colorize(near * (far / near) ** np.linspace(1, 0, length), near, far)
    image.paste(Image.fromarray(np.repeat(bar[:, None], 16, 1)), (8, 6))
    draw = ImageDraw.Draw(image)
    for t in np.linspace(0, 1, 6):
        y = 6 + (1 - t) * (length - 1)
        draw.line((24, y, 28, y), "black")
        draw.text((31, y - 6), f"{near * (far / near) ** t:.3g} m", "black")
    return image


def draw_cloud(xyz: np.ndarray, colors: np.ndarray, side: np.ndarray, size, yaw: float, pitch: float) -> Image.Image:
    """The cloud as seen from `yaw` degrees to the right and `pitch` upwards (0, 0: as the camera did), in parallel
    projection. Points are squares of `side` (N,) metres; nearer ones hide others. Colours (N, 3) uint8, size (w, h)."""
    width, height = size
    (sin_a, cos_a), (sin_b, cos_b) = ((math.sin(math.radians(a)), math.cos(math.radians(a))) for a in (yaw, pitch))
    around = np.array([[cos_a, 0, sin_a], [0, 1, 0], [-sin_a, 0, cos_a]])
    above = np.array([[1, 0, 0], [0, cos_b, -sin_b], [0, sin_b, cos_b]])
    turned = xyz @ (above @ around).T
    low, high = np.quantile(turned[:, :2], (0.01, 0.99), 0)  # outliers may leave the frame
    scale = 0.92 * min((width, height) / np.maximum(high - low, side.max()))  # px a metre
    x, y = np.floor((turned[:, :2] - (low + high) / 2) * scale + (width / 2, height / 2)).clip(-1e6, 1e6).astype(int).T
    half = np.ceil(np.clip(side * scale, 1, 31) / 2 - 0.5).astype(int)
    cells, points = [], []
    for dx in range(-half.max(), half.max() + 1):
        for dy in range(-half.max(), half.max() + 1):
            ok = (half >= max(abs(dx), abs(dy))) & (0 <= x + dx) & (x + dx < width) & (0 <= y + dy) & (y + dy < height)
            points.append(np.flatnonzero(ok))
            cells.append((y + dy)[ok] * width + (x + dx)[ok])
    cells, points = np.concatenate(cells), np.concatenate(points)
    order = np.argsort(-turned[points, 2], kind="stable")  # far to near: what is assigned last to a pixel, stays
    canvas = np.full((height * width, 3), BACKGROUND, np.uint8)
    canvas[cells[order]] = colors[points[order]]
    return Image.fromarray(canvas.reshape(height, width, 3))


def picture(photo: Image.Image, depth_m: np.ndarray, xyz: np.ndarray, colors: np.ndarray, side: np.ndarray,
            note: str) -> Image.Image:
    """The photo, its depth (rows, columns) in colours with a legend, and the cloud from two sides, a note below."""
    width, height = (max(round(n * PANEL / max(photo.size)), 160) for n in photo.size)
    near, far = np.nanquantile(depth_m, (0.01, 0.99))
    far = max(far, 1.01 * near)
    low = xyz[:, 1] > 0
    low = low if low.mean() > 0.2 else np.ones(len(xyz), bool)
    panels = {"photo": photo.resize((width, height), Image.Resampling.LANCZOS),
              "Euclidean distance from the camera": Image.fromarray(colorize(depth_m, near, far)).resize(
                  (width, height), Image.Resampling.NEAREST),
              "the cloud from the upper right": draw_cloud(xyz, colors, side, (width, height), 30, 20),
              "from above; without what is higher than the camera, such as a ceiling": draw_cloud(
                  xyz[low], colors[low], side[low], (width, height), 0, 45)}
    sheet = Image.new("RGB", (2 * width + 104, 2 * height + 72), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (title, panel) in enumerate(panels.items()):
        x, y = 8 + k % 2 * (width + 8), 20 + k // 2 * (height + 24)
        draw.text((x, y - 15), title, "black")
        sheet.paste(panel, (x, y))
    sheet.paste(legend(height, near, far), (2 * width + 20, 20))
    draw.text((8, 2 * height + 52), note, "black")
    return sheet


# ----------------------------------------------------------------------------------------------------------------------


def pixel(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no pixel; give x,y") from None
    return x, y


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@", conflict_handler="resolve")
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    flag = parser.add_argument
    # I/O
    flag("checkpoint", help="model folder or hub name")
    flag("photo", help="an image; or a jsonl file, with --record")
    flag("--record", type=int, metavar="N", help="this record of the jsonl (0 is the first), with its intrinsics")
    flag("--image-root", help="folder of the images, if not the jsonl's own")
    flag("--out", help="folder of the results; default: out/<photo name>")
    flag("--overwrite", action="store_true", help="replace the cloud that is in --out")
    # what is asked
    flag("--points", type=int, default=NUM_POINTS, help="queries, as nearly as an even grid allows (Sec. 4)")
    flag("--at", type=pixel, nargs="+", metavar="X,Y", help="print the distance of these pixels, and make no cloud")
    flag("--edge-filter", type=float, metavar="R", help="leave out of the cloud what differs by more than the ratio R "
         "(such as 0.1) from all four neighbours on the grid")
    flag("--decode", choices=("greedy", "median"), default="greedy", help="median: of the distribution over numbers, with "
         "confidence, q10 and q90 in points.npz and cloud.ply")
    flag("--min-confidence", type=float, metavar="P", help="leave points out of which the model puts less than P of its "
         "probability within 25 %% of the median (0 to 1; needs --decode median)")
    render.add_settings_flags(parser)
    # the photo's camera: --focal is the photo's own here, so the model's has another name
    flag("--unified-focal", dest="focal", type=float, help="unified focal length, px (Sec. 3.4)")
    flag("--focal", dest="photo_focal", type=float, nargs="+", metavar="F", help="photo's focal length, px (or fx fy)")
    flag("--fov", type=float, help="horizontal field of view of the photo, degrees")
    flag("--center", type=float, nargs=2, metavar=("CX", "CY"), help="principal point, px; default: the photo's centre")
    # decoding, system
    flag("--max-new-tokens", type=int, default=64)
    flag("--batch-size", type=int, default=32)
    flag("--workers", type=int, default=min(4, (os.cpu_count() or 2) - 1), help="processes that prepare images")
    flag("--device", default="auto")
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    return parser.parse_args(argv)


def open_input(args) -> tuple:
    """-> image path, image, intrinsics, source of the focal length, labels (pixels, distances) or None. Prints it."""
    labels = None
    if args.record is not None:
        if args.photo_focal or args.fov is not None or args.center:
            raise ValueError("--record brings its own camera: leave --focal, --fov and --center out.")
        if not args.photo.endswith(".jsonl"):
            raise ValueError(f"{args.photo}: --record is for a jsonl file; leave it out for a photo.")
        source = "the record"
        path, image, intrinsics, labels = open_record(args.photo, args.record, args.image_root)
    elif args.photo.endswith(".jsonl"):
        raise ValueError(f"{args.photo}: say which of its records, with --record N (0 is the first).")
    elif not Path(args.photo).is_file():
        raise ValueError(f"{args.photo}: no such photo.")
    else:
        path, image = args.photo, render.open_image(args.photo)
        intrinsics, source = photo_camera(path, image.size, args.photo_focal, args.fov, args.center)
    print("{}: {} x {} px, focal {:.1f} {:.1f} px ({}), center {:g} {:g}".format(
        path, *image.size, *intrinsics[:2], source, *intrinsics[2:4]), flush=True)
    return path, image, intrinsics, source, labels


def make_cloud(args, out: Path, inputs: tuple, ask, asked: dict, grid: np.ndarray, done: dict) -> None:
    """Ask about the grid, write all files, print what was found. Raises ValueError if nothing is left to write."""
    path, image, intrinsics, source, labels = inputs
    (rows, columns), (width, height), (fx, fy) = grid.shape[:2], image.size, intrinsics[:2]
    lines, cost = ask_grid(ask, grid.reshape(-1, 2), out / PART, done, asked, args.batch_size)
    depth_m = np.array([line["pred"] or np.nan for line in lines], np.float32).reshape(rows, columns)
    keep = known = np.isfinite(depth_m)
    if not known.any():
        (out / PART).unlink()
        raise ValueError(f"{args.checkpoint}: none of its {len(lines):,} answers is a distance (the first: "
                         f"{lines[0]['text']!r}). Was it trained for the prompt '{asked['settings']['prompt']}'?")
    # 0 where a greedy fallback knows no interval
    measures = {name: np.array([line.get(name, 0.0) for line in lines], np.float32).reshape(rows, columns)
                for name in ("confidence", "q10", "q90") if args.decode == "median"}
    if args.min_confidence is not None:
        keep = known & (measures["confidence"] >= args.min_confidence)
        if not keep.any():
            raise ValueError(f"--min-confidence {args.min_confidence:g}: leaves no point; the highest is "
                             f"{measures['confidence'].max():.2f}. Give a lower one, and go on.")
    if args.edge_filter is not None:
        keep = keep & has_neighbour(depth_m, args.edge_filter)
        if not keep.any():
            raise ValueError(f"--edge-filter {args.edge_filter:g}: leaves no point. Give a larger ratio, and go on.")
    pixels = grid[keep]
    xyz = render.unproject(pixels, depth_m[keep], intrinsics).astype(np.float32)
    colors = np.asarray(image)[pixels[:, 1], pixels[:, 0]]
    note = (f"{len(xyz):,} points, {(~known).sum():,} of {len(lines):,} answers were no distance, "
            f"focal {fx:.1f} {fy:.1f} px ({source})")
    side = 1.8 * xyz[:, 2] * max(width / columns / fx, height / rows / fy)  # so that slanted surfaces have no gaps
    drawn = picture(image, depth_m, xyz, colors, side, note)
    save(out / "depth.npy", lambda file: np.save(file, depth_m))
    measures = {name: values[keep] for name, values in measures.items()}
    save(out / "points.npz", lambda file: np.savez(file, pixels=pixels, depth=depth_m[keep], xyz=xyz, colors=colors,
                                                   intrinsics=intrinsics, **measures))
    save(out / "picture.png", lambda file: drawn.save(file, "PNG"))
    save(out / "cloud.ply", lambda file: write_ply(file, **dict(zip("xyz", xyz.T)),
                                                   **dict(zip(("red", "green", "blue"), colors.T)), **measures))
    result = {"checkpoint": args.checkpoint, "photo": str(path), "focal_source": source, "queries": len(lines),
              "unparsed": int((~known).sum()), "points": len(xyz), "edge_filter": args.edge_filter, "min_confidence": args.min_confidence, **asked}
    evaluate.write_text(out / "run.json", json.dumps(result, indent=2) + "\n")
    (out / PART).unlink()
    print(f"{note}; {cost}")
    if labels is not None:
        x, y = np.clip((labels[0] + 0.5) * (columns, rows) // (width, height), 0, (columns - 1, rows - 1)).astype(int).T
        error = np.abs(depth_m[y, x] / labels[1] - 1)
        if (n := np.isfinite(error).sum()):
            print(f"against the record's labels: median error {np.nanmedian(error):.1%} at {n} points")
    print(", ".join(str(out / name) for name in FILES))


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        for name in ("points", "batch_size", "max_new_tokens"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: needs at least 1.")
        if args.min_confidence is not None and args.decode != "median":
            raise ValueError("--min-confidence: needs --decode median; greedy answers have no confidence.")
        if args.edge_filter is not None and not (math.isfinite(args.edge_filter) and args.edge_filter > 0):
            raise ValueError(f"--edge-filter {args.edge_filter:g}: needs a positive ratio, such as 0.1.")
        inputs = path, image, intrinsics, *_ = open_input(args)
        for x, y in args.at or ():
            check_inside("--at", x, y, *image.size)
        name = Path(args.photo).stem if args.record is None else f"{evaluate.dataset_name(args.photo)}-{args.record}"
        out = Path(args.out or Path("out") / name)
        there = [f for f in FILES if (out / f).exists()]
        if there and not (args.at or args.overwrite or (out / PART).exists()):  # a part: replacing them was allowed
            raise ValueError(f"{out}: holds a cloud already ({', '.join(there)}). Give another --out, or --overwrite.")

        settings = render.load_settings(args.checkpoint, render.given_settings(args))
        encoder = render.load_encoder(args.checkpoint)
        device = evaluate.pick_device(args.device)
        dtype = evaluate.pick_dtype(args.dtype, device)
        grid = pixel_grid(*image.size, args.points)
        if not args.at:
            (rows, columns), (width, height) = grid.shape[:2], image.size
            print(f"{columns} x {rows} = {rows * columns:,} queries on an even grid ({args.points:,} were wanted), one "
                  f"every {width / columns:.3g} x {height / rows:.3g} px", flush=True)
            asked = identity(path, intrinsics, grid, settings, encoder.folder, dtype, args.max_new_tokens, args.decode)
            done = {}
            if (out / PART).exists():
                try:
                    done = read_part(out / PART, asked)
                except ValueError:
                    if not args.overwrite:
                        raise
            out.mkdir(parents=True, exist_ok=True)

        model = evaluate.load_model(args.checkpoint, device, dtype)
        ask = partial(ask_pixels, model, encoder, settings, str(path), intrinsics, batch_size=args.batch_size,
                      workers=0 if args.at else args.workers, max_new_tokens=args.max_new_tokens, decode=args.decode)
        if not args.at:
            return make_cloud(args, out, inputs, ask, asked, grid, done)
        lines = [line for batch in ask(pixels=np.array(args.at)) for line in batch]
        for (x, y), line in zip(args.at, lines):
            z = line["pred"] and line["pred"] / render.ray_length(x, y, intrinsics)
            print(f"{x:g},{y:g}: " + (f"{line['pred']:.2f} m from the camera, z {z:.2f} m" if z else
                                      f"no distance in {line['text']!r}"))
        if not any(line["pred"] for line in lines):
            raise ValueError(f"{args.checkpoint}: none of its answers is a distance. Was it trained for the prompt "
                             f"'{settings['prompt']}'?")
    except (ValueError, OSError) as e:
        fail(e)
    except (KeyboardInterrupt, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "DataLoader worker" not in str(e):
            raise
        fail("interrupted, or a worker was ended. Give the same command again to go on.")  # workers get a Ctrl-C, too


if __name__ == "__main__":
    main()
