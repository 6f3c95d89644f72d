"""
What the model sees: one record of a jsonl file -> image(s) with a marker, a question, an answer, tokens.

    unify the focal length -> crop or pad to the patch grid -> draw the marker -> question and answer -> tokens, patches

Every other script calls these functions, so that training, evaluation, GRPO and point clouds cannot differ in what they
show the model. Run as a script it draws a contact sheet, so that a person can see it too:

    python render.py data/toy/val.jsonl                                   # -> sheet.png
    python render.py data/nyuv2/val.jsonl --focal 1000 --marker cross --crop 1000 1400 700 1200 --n 6
    python render.py data/toy/val.jsonl --settings ckpt/toy               # as that checkpoint was trained to see it

Reads a jsonl (README, "file formats"), writes a PNG. Paper: Sec. 3.1 (markers, prompts), 3.3 (camera strategies), 3.4.
"""
import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

# ----------------------------------------------------------------------------------------------------------------------
# what a checkpoint was trained to see: ckpt/<run>/depthlm.json overrides these, flags override both

DEFAULTS = {"focal": 1000, "marker": "arrow", "marker_size": 5, "prompt": "paper", "camera": "unify", "tasks": ["distance"]}
PIXTRAL = {"focal": 750}  # App. A.6: memory
DEPTHLM_12B = {"focal": 750, "prompt": "release"}  # facebook/DepthLM has no depthlm.json
MARKERS = ("arrow", "cross", "dot")
PROMPTS = ("paper", "release", "text")
CAMERAS = ("unify", "none", "prompt", "ray")
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
MARGIN = 6  # px kept free around a query in a random crop, so that the arrow fits

# How the families differ, by `model_type` of config.json. Everything else is read from the checkpoint's own files.
FAMILIES = {
    "qwen2_5_vl": {"image_token": "<|image_pad|>", "mrope": True},
    "qwen3_vl": {"image_token": "<|image_pad|>", "mrope": True},
    "llava": {"image_token": "[IMG]", "row_end": "[IMG_BREAK]", "image_end": "[IMG_END]", "mrope": False},  # Pixtral
}
PIXTRAL_TEMPLATE = ("<s>{% for m in messages %}[INST]{% for c in m['content'] %}{% if c['type'] == 'image' %}[IMG]"
                    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}[/INST]{% endfor %}")


# ----------------------------------------------------------------------------------------------------------------------
# records


class Records:
    """A jsonl file opened by its index: any of 16 million records is read by one seek, none is kept in memory.

    records[i] -> dict with "image" an absolute path, "depth" Euclidean metres (N,) float, "pixel_coords" (N, 2) float,
    "where" the file and line for messages. `label_type` "z" or "euclidean" says what the file holds, over the record's
    own `depth_type`. Raises ValueError with file, line, value and remedy."""

    def __init__(self, path: str, image_root: str | None = None, label_type: str | None = None):
        self.path, self.label_type = str(path), label_type
        self.image_root = Path(image_root) if image_root else Path(path).parent
        self.offsets = open_index(self.path)
        if len(self.offsets) < 2:
            raise ValueError(f"{path}: holds no record. Make it with prepare.py, or check the path.")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> dict:
        where = f"{self.path}, line {i + 1}"
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[i]))
            line = file.read(int(self.offsets[i + 1] - self.offsets[i]))
        try:
            record = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{where}: not a JSON object ({e}). The line is damaged or cut off: "
                             "write the file again.") from None
        return check_record(record, where, self.image_root, self.label_type)


def open_index(path: str) -> np.ndarray:
    """Byte offset of each line of a jsonl, and the file's size: (N + 1,) int64, memory-mapped from <name>.idx beside it.
    The index is rebuilt when it is missing, older than the jsonl, or of another file size."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Make it with prepare.py, or check the path.")
    index, size = path.with_suffix(".idx"), path.stat().st_size
    fresh = index.is_file() and index.stat().st_mtime_ns >= path.stat().st_mtime_ns
    if fresh and index.stat().st_size % 8 == 0 < index.stat().st_size:
        offsets = np.memmap(index, dtype="<i8", mode="r")
        if int(offsets[-1]) == size:
            return offsets
    starts, at = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + at + 1)
            at += len(chunk)
    offsets = np.concatenate(starts)
    offsets = offsets if offsets[-1] == size else np.append(offsets, size)  # a last line without a line feed
    try:
        temporary = index.with_name(f".{index.name}.{os.getpid()}")
        offsets.astype("<i8").tofile(temporary)
        os.replace(temporary, index)
    except OSError:
        pass  # a read-only folder: the index stays in memory
    return offsets


def check_record(record: dict, where: str, image_root: Path = Path(), label_type: str | None = None) -> dict:
    """Validate a record and bring it to one form (see Records). Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is a JSON object, this is {type(record).__name__}.")
    for key in ("image", "intrinsics", "pixel_coords", "depth"):
        if key not in record:
            hint = " (rename 'image_path' to 'image')" if key == "image" and "image_path" in record else ""
            raise ValueError(f"{where}: key '{key}' is missing{hint}; it has {sorted(record)}.")
    if not isinstance(record["image"], str):
        raise ValueError(f"{where}: image {record['image']!r} is not a path.")
    try:
        fx, fy, cx, cy, w, h = (float(v) for v in record["intrinsics"])
        xy = np.asarray(record["pixel_coords"], float).reshape(-1, 2)
        depth_m = np.asarray(record["depth"], float).reshape(-1)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: needs intrinsics [fx, fy, cx, cy, w, h], pixel_coords [[x, y], ...] and "
                         "depth [metres, ...] as numbers.") from None
    if not (fx > 0 and fy > 0 and w >= 1 and h >= 1 and all(map(math.isfinite, (fx, fy, cx, cy, w, h)))):
        raise ValueError(f"{where}: intrinsics {record['intrinsics']} need positive, finite fx, fy, w, h (in pixels).")
    if len(xy) != len(depth_m):
        raise ValueError(f"{where}: {len(xy)} pixel_coords but {len(depth_m)} depths; they go in pairs.")
    bad = ~(np.isfinite(depth_m) & (depth_m > 0))
    if bad.any():
        raise ValueError(f"{where}: depth {depth_m[bad][0]} of point {np.flatnonzero(bad)[0]} is not a positive "
                         "distance in metres; drop the point.")
    x, y = xy.T
    bad = ~((x >= -0.5) & (x <= w - 0.5) & (y >= -0.5) & (y <= h - 0.5))
    if bad.any():
        raise ValueError(f"{where}: point {xy[bad][0].tolist()} is outside of the {w:g} x {h:g} image; drop it, or "
                         "correct the intrinsics.")
    kind = label_type or record.get("depth_type", "euclidean")
    if kind not in ("z", "euclidean"):
        raise ValueError(f"{where}: depth_type '{kind}' is neither 'z' nor 'euclidean'.")
    if kind == "z":
        depth_m = depth_m * ray_length(x, y, (fx, fy, cx, cy))
    return {**record, "image": str(image_root / record["image"]), "intrinsics": (fx, fy, cx, cy, w, h),
            "pixel_coords": xy, "depth": depth_m, "where": where}


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


# ----------------------------------------------------------------------------------------------------------------------
# images


def open_image(path: str, size: tuple[float, float] | None = None) -> Image.Image:
    """Any image file as 8-bit RGB: grey, palette, CMYK, 16-bit; alpha is laid on black; EXIF rotation is applied, unless
    `size` (the labels' width and height) says that the labels were made on the unrotated pixels."""
    try:
        with Image.open(path) as file:
            image = file
            upright = ImageOps.exif_transpose(image)
            if size is None or upright.size == tuple(map(int, size)) or image.size != tuple(map(int, size)):
                image = upright
            if image.mode.startswith("I") or image.mode == "F":  # 16 bits to 8; anything else than I;16 by its range
                values = np.asarray(image, np.float64)
                top = 65535.0 if image.mode != "F" and values.max() <= 65535 else max(values.max(), 1e-9)
                image = Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image. Image paths are relative to the jsonl's folder (or --image-root).") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: cannot be read as an image ({e}). Replace the file or drop its record.") from None


def match_size(image: Image.Image, intrinsics, where: str) -> tuple[tuple, float, float]:
    """Intrinsics for the image as it is on disk, and the scale from label pixels to its pixels. An image that was
    resized after labelling is accepted if both axes agree within 1 %; anything else raises ValueError."""
    fx, fy, cx, cy, w, h = intrinsics
    sx, sy = image.width / w, image.height / h
    if abs(sx / sy - 1) > 0.01:
        raise ValueError(f"{where}: the image is {image.width} x {image.height}, its intrinsics say {w:g} x {h:g}: not a "
                         "resized version of the same image. Correct the record's intrinsics, or the image.")
    scaled = (fx * sx, fy * sy, (cx + 0.5) * sx - 0.5, (cy + 0.5) * sy - 0.5, image.width, image.height)
    return scaled, sx, sy


@dataclass
class View:
    """An image as the model gets it: pixels (H, W, 3) uint8, the camera of these pixels, and how original pixels map:
    x' = scale_x (x + 0.5) - 0.5 - left."""
    pixels: np.ndarray
    intrinsics: tuple
    scale: tuple[float, float]
    offset: tuple[int, int]

    def move(self, x: float, y: float) -> tuple[float, float]:
        (sx, sy), (left, top) = self.scale, self.offset
        return sx * (x + 0.5) - 0.5 - left, sy * (y + 0.5) - 0.5 - top


def unify_focal(image: Image.Image, intrinsics, focal: float | None, grid: int, crop=None, keep=(), rng=None) -> View:
    """Resize so that fx = fy = `focal` px exactly (Sec. 3.4), both sides a multiple of `grid`. focal None keeps the scale.

    crop (w_min, w_max, h_min, h_max): training, a random window of that size at a true random place that keeps the
    `keep` pixels (original coordinates) inside. crop None: evaluation, nothing is lost, the edge is repeated to fill the
    grid; so it is in training where an image is smaller than the window. Only the window is resampled, from its exact
    (fractional) box in the original: no second resize, no rounding of the focal length; in exchange the last fraction of
    a pixel at the right and bottom is dropped."""
    # paper: W' = f/fx W is rounded there, and the processor resizes again to the patch grid; here the focal is exact
    fx, fy, cx, cy = intrinsics[:4]
    scale = (focal / fx, focal / fy) if focal else (1.0, 1.0)
    window = []
    for axis, (length, s) in enumerate(zip(image.size, scale)):
        whole = max(1, math.floor(length * s + 1e-3))  # intrinsics are often rounded to a few decimals
        start, size = 0, whole
        if crop is not None:
            at = [s * (p[axis] + 0.5) - 0.5 for p in keep] or [whole / 2]
            needed = math.ceil(max(at) - min(at) + 2 * MARGIN + 1)
            size = max(int(rng.integers(crop[2 * axis], crop[2 * axis + 1] + 1)) // grid, -(-needed // grid)) * grid
            size = min(size, whole)  # a smaller image is shown whole, and padded as in evaluation
            first = math.ceil(max(0, min(max(at) + MARGIN, whole - 1) - size + 1))
            last = math.floor(min(whole - size, max(min(at) - MARGIN, 0)))
            start = int(rng.integers(first, last + 1)) if first < last else min(first, whole - size)
        window.append((start, size, min(start / s, length), min((start + size) / s, length)))
    (left, width, x0, x1), (top, height, y0, y1) = window
    if scale == (1.0, 1.0):
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    else:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)))
    # the last original pixel may lie in the dropped fraction: it gets a pixel of the repeated edge
    least = (width, height) if crop is not None else (max(n, math.floor(s * (length - 0.5)) + 1)
                                                      for n, s, length in zip((width, height), scale, image.size))
    wide, high = (-(-n // grid) * grid for n in least)
    pad = ((0, high - height), (0, wide - width), (0, 0))
    pixels = np.pad(pixels, pad, mode="edge") if any(p[1] for p in pad) else np.array(pixels)
    camera = (fx * scale[0], fy * scale[1], (cx + 0.5) * scale[0] - 0.5 - left, (cy + 0.5) * scale[1] - 0.5 - top,
              width, height)
    return View(pixels, camera, scale, (left, top))


def draw_marker(pixels: np.ndarray, x: float, y: float, shape: str = "arrow", size: int = 5, color=(255, 0, 0)) -> None:
    """Draw a marker for the point (x, y) into pixels (H, W, 3), in place (App. A.1). The arrow points at it from the left
    (from the right where the left border is too near) and leaves the pixel itself visible, as the cross does."""
    height, width = pixels.shape[:2]
    x, y = min(max(math.floor(x + 0.5), 0), width - 1), min(max(math.floor(y + 0.5), 0), height - 1)
    half, thick = max(1, size // 2), max(1, size // 5)
    if shape == "arrow":
        side = -1 if x >= size or 2 * x >= width else 1
        length = size // thick
        strokes = [(k, 0) for k in range(1, length + 1)]
        strokes += [(1 + k, sign * k) for k in range(1, (length - 1) // 2 + 1) for sign in (-1, 1)]
        spots = [(side * (thick * (k - 1) + 1 + i), thick * up - thick // 2 + j)
                 for k, up in strokes for i in range(thick) for j in range(thick)]
    elif shape == "cross":
        arm = [(k, j) for k in range(-half, half + 1) if k for j in range(-(thick // 2), thick - thick // 2)]
        spots = arm + [(j, k) for k, j in arm]
    elif shape == "dot":
        spots = [(i, j) for i in range(-half, half + 1) for j in range(-half, half + 1) if i * i + j * j <= half * half + 1]
    else:
        raise ValueError(f"marker '{shape}' is none of {MARKERS}.")
    for dx, dy in spots:
        if 0 <= x + dx < width and 0 <= y + dy < height:
            pixels[y + dy, x + dx] = color


# ----------------------------------------------------------------------------------------------------------------------
# tasks: one function each, records -> what is asked about which pixels, and the true value (Sec. 3.4)


@dataclass
class Query:
    """One question before it is rendered: the record(s) it is about, the pixels (in the first record's image, as
    labelled), the true value, and the number that the question gives (time or speed)."""
    task: str
    records: list[dict]
    points: list[tuple[float, float]]
    value: float
    given: float | None = None


class Unfit(ValueError):
    """A record that a task cannot be asked about, though nothing is wrong with it: no pose, a standing car."""


def ask_distance(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Euclidean distance of a point from the camera [m]: metric depth."""
    record = records[i]
    point = pick(record, rng) if point is None else point
    return Query("distance", [record], [tuple(record["pixel_coords"][point])], float(record["depth"][point]))


def ask_axis(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Distance along the principal axis [m]: z, the depth of pure vision models."""
    query = ask_distance(records, i, rng, point)
    ray = float(ray_length(*query.points[0], query.records[0]["intrinsics"]))
    return replace(query, task="axis", value=query.value / ray)


def ask_speed(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Speed that reaches a point within a given time [m/s]."""
    query, given = ask_distance(records, i, rng, point), draw_given(rng, TIMES)
    return replace(query, task="speed", value=query.value / given, given=given)


def ask_time(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Time in which a given speed reaches a point [s]."""
    query, given = ask_distance(records, i, rng, point), draw_given(rng, SPEEDS)
    return replace(query, task="time", value=query.value / given, given=given)


def ask_two_point(records: Records, i: int, rng, point: int | None = None) -> Query:
    """Distance between two points [m], the first marked in red, the second in blue."""
    record = records[i]
    point = pick(record, rng) if point is None else point
    xyz = unproject(record["pixel_coords"], record["depth"], record["intrinsics"])
    apart = np.linalg.norm(xyz - xyz[point], axis=1)
    others = np.flatnonzero(apart >= NEAREST_PAIR)
    if not len(others):
        raise Unfit(f"{record['where']}: has no second point {NEAREST_PAIR} m or more from point {point}.")
    other = int(rng.choice(others))
    return Query("two_point", [record], [tuple(record["pixel_coords"][k]) for k in (point, other)], float(apart[other]))


def ask_motion(records: Records, i: int, rng, point: int | None = None) -> Query:
    """How far the camera moved [m] between a record and one near it in the file, of the same scene and camera."""
    record = records[i]
    if record.get("pose") is None:
        raise Unfit(f"{record['where']}: has no 'pose', so it cannot be asked how far the camera moved.")
    for offset in rng.permutation([*range(-MOTION_WINDOW, 0), *range(1, MOTION_WINDOW + 1)]):
        if not 0 <= i + offset < len(records):
            continue
        other = records[i + int(offset)]
        if other.get("pose") is not None and all(other.get(k) == record.get(k) for k in ("scene", "camera")):
            moved = float(np.linalg.norm(center(other) - center(record)))
            if MOTION[0] <= moved <= MOTION[1]:
                return Query("motion", [record, other], [], moved)
    raise Unfit(f"{record['where']}: none of the {MOTION_WINDOW} records before and after it is of the same scene and "
                f"camera, with its 'pose' {MOTION[0]} to {MOTION[1]} m away.")


def pick(record: dict, rng) -> int:
    if not len(record["depth"]):
        raise ValueError(f"{record['where']}: has no labelled point.")
    return int(rng.integers(len(record["depth"])))


def draw_given(rng, limits: tuple[float, float]) -> float:
    """The number that a question gives, one decimal; log-uniform, so that no order of magnitude is rare."""
    return round(float(np.exp(rng.uniform(*np.log(limits)))), 1)


def center(record: dict) -> np.ndarray:
    """Position of a record's camera in its scene [m]."""
    pose = np.asarray(record["pose"], float)
    if pose.size != 16 or not np.isfinite(pose).all():
        raise ValueError(f"{record['where']}: pose needs 16 finite numbers, camera-to-world.")
    return pose.reshape(4, 4)[:3, 3]


def can_ask(records: Records, task: str, tries: int = 64) -> bool:
    """Whether a task fits any of some records spread over a file."""
    def unfit(i):
        try:
            TASKS[task](records, i, np.random.default_rng(i))
        except Unfit:
            return True
        except ValueError:  # a damaged record says nothing about the others
            pass
        return False
    return not all(unfit(int(i)) for i in np.linspace(0, len(records) - 1, min(tries, len(records))))


# paper: it does not say which numbers its questions give, nor how far its pairs of frames are apart
TIMES = (1.0, 10.0)  # s. A factor of ten where delta1 forgives 1.25: who ignores the given number is wrong
SPEEDS = (0.5, 5.0)  # m/s, a stroll to a run: two decimals can still tell the time to a point half a metre away
NEAREST_PAIR = 0.1  # m; nearer points are one to the eye, and two decimals cannot tell their distance
MOTION = (0.1, 10.0)  # m; below, a pose is mostly noise (a standing car), beyond, the frames share hardly any view
MOTION_WINDOW = 30  # records: 3 s of a 10 Hz camera; 2.5 s of nuScenes, whose six cameras take turns
TASKS: dict[str, Callable] = {"distance": ask_distance, "axis": ask_axis, "speed": ask_speed, "time": ask_time,
                              "two_point": ask_two_point, "motion": ask_motion}

# task -> prompt -> question, answer. {x} is the value, {given} the time or speed. "release" is the think/answer form of
# Sec. 3.2. The words before {x} are the same in all answers of a task, so that decoding can verify them at once.
THINK = ("Output the thinking process in <think> </think> and final answer (the {unit} number only, without the unit) in "
         "<answer> </answer> tags.")
QUESTIONS = {
    "distance": {"paper": "How many meters is this point from the camera?",
                 "release": "How far is this point from the camera? " + THINK.format(unit="meter")},
    # paper: of the other tasks it shows pictures only (Fig. 7); these are in the style of the first
    "axis": {"paper": "How many meters is this point from the camera along the forward direction?",
             "release": "How far is this point from the camera along the forward direction? "
                        + THINK.format(unit="meter")},
    "speed": {"paper": "How many meters per second must the camera move to reach this point in {given} seconds?",
              "release": "How fast must the camera move to reach this point in {given} seconds? "
                         + THINK.format(unit="meters per second")},
    "time": {"paper": "How many seconds does the camera take to reach this point at {given} meters per second?",
             "release": "How long does the camera take to reach this point at {given} meters per second? "
                        + THINK.format(unit="second")},
    "two_point": {"paper": "How many meters is the point of the red marker from the point of the blue marker?",
                  "release": "How far is the point of the red marker from the point of the blue marker? "
                             + THINK.format(unit="meter")},
    "motion": {"paper": "How many meters has the camera moved between the two images?",
               "release": "How far has the camera moved between the two images? " + THINK.format(unit="meter")},
}
ANSWERS = {"distance": "The point is around {x} meters away from the camera.",
           "axis": "The point is around {x} meters in front of the camera.",
           "speed": "The camera must move at around {x} meters per second.",
           "time": "The camera takes around {x} seconds.",
           "two_point": "The two points are around {x} meters apart.",
           "motion": "The camera has moved around {x} meters."}
TEXT_QUESTION = "Given this image of size (width = {w}, height = {h}), how far is the pixel at ({u}, {v}) from the camera?"
CAMERA_QUESTION = ("Given this image of size (width = {w}, height = {h}), where the camera intrinsics are (fx = {fx}, fy = {fy}, "
                   "cx = {cx}, cy = {cy}) and the images are without distortions, how many meters is this point away from "
                   "the camera?")
RAY_ANSWER = "The point is around {right} degrees to the {side}, {up} degrees {updown} and {x} meters away from the camera."


def answer_form(task: str, prompt: str) -> str:
    """The answer as a template with {x} for the number; what comes before {x} is the same for every answer."""
    sentence = ANSWERS[task]
    return f"<think> {sentence} </think>\n\n<answer> {{x}} </answer>" if prompt == "release" else sentence


def phrase(query: Query, view: View, settings: dict) -> tuple[str, str]:
    """-> question, answer (Sec. 3.1, App. A.1 and A.5). Numbers have two decimals."""
    prompt, camera, x = settings["prompt"], settings["camera"], f"{query.value:.2f}"
    fx, fy, cx, cy, w, h = view.intrinsics
    question, answer = QUESTIONS[query.task].get(prompt), answer_form(query.task, prompt)
    if query.task != "distance" and (prompt == "text" or camera in ("prompt", "ray")):
        raise ValueError(f"task '{query.task}': prompt 'text' and the camera strategies 'prompt' and 'ray' are for the "
                         "distance alone (App. A.1, A.5).")
    if camera in ("prompt", "ray") and prompt != "paper":
        raise ValueError(f"--camera {camera} --prompt {prompt}: App. A.5 words its questions and answers in the form of "
                         "prompt 'paper' alone.")
    if prompt == "text":
        u, v = (math.floor(p + 0.5) for p in view.move(*query.points[0]))
        question = TEXT_QUESTION.format(w=w, h=h, u=u, v=v)
    elif camera == "prompt":
        question = CAMERA_QUESTION.format(w=w, h=h, fx=f"{fx:.2f}", fy=f"{fy:.2f}", cx=f"{cx:.2f}", cy=f"{cy:.2f}")
    elif camera == "ray":
        u, v = view.move(*query.points[0])
        right, up = math.degrees(math.atan2(u - cx, fx)), math.degrees(math.atan2(cy - v, fy))
        answer = RAY_ANSWER.format(right=f"{abs(right):.0f}", side="right" if right >= 0 else "left", up=f"{abs(up):.0f}",
                                   updown="above" if up >= 0 else "below", x="{x}")
    return question.format(given=query.given), answer.format(x=x)


def open_labelled(path: str, intrinsics: tuple, where: str) -> tuple[Image.Image, tuple, float, float]:
    """A record's image, the intrinsics of its pixels, and their scale against the labelled ones."""
    image = open_image(path, intrinsics[4:])
    return image, *match_size(image, intrinsics, where)


@lru_cache(maxsize=2)
def whole_view(path: str, changed: float | None, intrinsics: tuple, where: str, focal: float | None, grid: int):
    """-> view without a marker, label scale: opening and resizing is most of the work, and is done once for all points
    of an image that are asked one after another. `changed`: the file's time, so that a new image is read."""
    image, camera, sx, sy = open_labelled(path, intrinsics, where)
    return unify_focal(image, camera, focal, grid), sx, sy


def render(query: Query, settings: dict, grid: int, crop=None, rng=None) -> tuple[list[View], str, str]:
    """A query as the model gets it -> views (one per image, markers drawn), question, answer."""
    views = []
    for k, record in enumerate(query.records):
        focal = settings["focal"] if settings["camera"] == "unify" else None
        points = query.points if k == 0 else []
        if crop is None:
            changed = os.path.getmtime(record["image"]) if os.path.exists(record["image"]) else None
            view, sx, sy = whole_view(record["image"], changed, record["intrinsics"], record["where"], focal, grid)
            view = replace(view, pixels=view.pixels.copy())
        else:
            image, intrinsics, sx, sy = open_labelled(record["image"], record["intrinsics"], record["where"])
            keep = [(sx * (x + 0.5) - 0.5, sy * (y + 0.5) - 0.5) for x, y in points]
            view = unify_focal(image, intrinsics, focal, grid, crop, keep, rng)
        view.scale = (view.scale[0] * sx, view.scale[1] * sy)  # from label pixels
        if settings["prompt"] != "text":
            for point, color in zip(points, COLORS.values()):
                draw_marker(view.pixels, *view.move(*point), settings["marker"], settings["marker_size"], color)
        views.append(view)
    return views, *phrase(query, views[0], settings)


# ----------------------------------------------------------------------------------------------------------------------
# ordinary chat: {"question", "answer", "image" (optional)} a line, to mix into training and to probe what is left of it


def read_chats(path: str, answers: bool = True) -> list[dict]:
    """All lines of a chat file, images as absolute paths. Raises ValueError with file and line."""
    chats = []
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file of chat samples.")
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            chat = json.loads(text)
        except ValueError:
            chat = None
        needed = ("question", "answer") if answers else ("question",)
        if not isinstance(chat, dict) or not all(isinstance(chat.get(k), str) and chat[k] for k in needed):
            raise ValueError(f"{path}, line {number}: needs a JSON object with the texts {' and '.join(needed)}.")
        if chat.get("image"):
            chat["image"] = str((Path(path).parent / chat["image"]).resolve())
        chats.append(chat)
    if not chats:
        raise ValueError(f"{path}: holds no chat sample.")
    return chats


def chat_views(chat: dict, grid: int, longest: int = 1024) -> list[View]:
    """The image of a chat sample, if it has one: no marker, no focal length, at most `longest` px."""
    if not chat.get("image"):
        return []
    image = open_image(chat["image"])
    image.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return [unify_focal(image, (1.0, 1.0, 0.0, 0.0, *image.size), None, grid)]


# ----------------------------------------------------------------------------------------------------------------------
# numbers in answers

METERS = {"m": 1.0, "meter": 1.0, "meters": 1.0, "metre": 1.0, "metres": 1.0, "cm": 0.01, "centimeter": 0.01,
          "centimeters": 0.01, "centimetre": 0.01, "centimetres": 0.01, "mm": 0.001, "millimeters": 0.001,
          "millimetres": 0.001, "km": 1000.0, "kilometer": 1000.0, "kilometers": 1000.0, "kilometres": 1000.0,
          "ft": 0.3048, "foot": 0.3048, "feet": 0.3048, "in": 0.0254, "inch": 0.0254, "inches": 0.0254,
          "yard": 0.9144, "yards": 0.9144, "mile": 1609.344, "miles": 1609.344}
SECONDS = {"s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "ms": 0.001, "millisecond": 0.001,
           "milliseconds": 0.001, "min": 60.0, "mins": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hr": 3600.0,
           "hour": 3600.0, "hours": 3600.0}
UNITS = {"distance": METERS, "axis": METERS, "two_point": METERS, "motion": METERS, "time": SECONDS,
         "speed": {"mps": 1.0, "kmh": 1 / 3.6, "kph": 1 / 3.6, "mph": 0.44704, "knots": 0.514444} | {
             way + per + time: METERS[way] / SECONDS[time] for way in METERS for time in SECONDS
             for per in ("/", " / ", " per ")}}
THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"
NUMBER = re.compile(rf"(?<![\w.])[-+\u2212]?(?:{THOUSANDS}|\d+[.,]\d+|\d+\.?|\.\d+)(?:[eE][-+]?\d+)?(?!\d)")
PERCENT = re.compile(r"\s*(?:%|percent)", re.I)


@lru_cache
def unit_pattern(task: str) -> re.Pattern:
    names = sorted(map(re.escape, UNITS.get(task, METERS)), key=len, reverse=True)
    return re.compile(r"[\s\-]*(" + "|".join(names) + r")(?![A-Za-z/])", re.I)


def parse_answer(text: str, task: str = "distance") -> float | None:
    """The number of an answer in metres (seconds, m/s: the task's unit), or None: a wrong answer, counted as unparsed.

    The last <answer> tag decides if there is one; else the first number that stands before a unit, converted to metres;
    else the only number there is. Several bare numbers, no number, or a number that is not finite: None."""
    units, pattern = UNITS.get(task, METERS), unit_pattern(task)
    tags = re.findall(r"<answer>(.*?)(?:</answer>|$)", text or "", re.S)
    text = tags[-1] if tags else text or ""
    found = [(m.group(), m.end()) for m in NUMBER.finditer(text) if not PERCENT.match(text, m.end())]
    with_unit = [(n, unit.group(1).lower()) for n, end in found if (unit := pattern.match(text, end))]
    with_unit = [(n, u) for n, u in with_unit if u != "in" or len(with_unit) == 1]  # "2 in front" is no length
    if with_unit:
        number, factor = with_unit[0][0], units[with_unit[0][1]]
    elif len(found) == 1 or (tags and found):
        number, factor = found[0][0], 1.0
    else:
        return None
    number = number.replace(",", "" if re.match(rf"\D?{THOUSANDS}(?!\d)", number) else ".")
    value = float(number.replace("\u2212", "-")) * factor
    return value if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------------------
# tokens and patches


@dataclass
class Encoder:
    """What turns views and text into model inputs, all read from the checkpoint folder."""
    folder: str
    family: str
    tokenizer: object
    patch: int  # px
    merge: int  # patches per token and axis
    table: np.ndarray  # (3, 256) float32: the normalised value of each uint8, per channel
    image_id: int
    row_end_id: int | None = None
    image_end_id: int | None = None
    stop_ids: frozenset[int] = frozenset()  # where decoding ends: the end of turn, and what generation_config.json adds
    cache: dict = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """Image sides are multiples of this, px."""
        return self.patch * self.merge

    @property
    def end_id(self) -> int:
        """The end-of-turn token that closes an answer."""
        return self.tokenizer.eos_token_id


def find_checkpoint(path: str) -> str:
    """A local folder, or the folder to which a Hugging Face repository is downloaded."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"{path}: has no config.json, so it is not a checkpoint folder. Give the folder that "
                             "train_sft.py wrote (ckpt/<run>), or a Hugging Face repository name.")
        return str(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1 or path.endswith("/") \
            or Path(path).parent.is_dir():  # ckpt/tpyo is a slip, and no repository of a user named ckpt
        raise ValueError(f"{path}: no such checkpoint folder.")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"])
    except Exception as e:  # offline, no such repository, no access: one line for all
        raise ValueError(f"{path}: neither a local folder nor a repository that can be downloaded "
                         f"({type(e).__name__}).") from None


def load_settings(path: str, overrides: dict | None = None, quiet: bool = False) -> dict:
    """What the checkpoint was trained to see: depthlm.json, else its family's defaults; overrides (None = not given) win."""
    folder = Path(find_checkpoint(path))
    settings = dict(DEFAULTS)
    if (folder / "depthlm.json").is_file():
        settings.update(json.loads((folder / "depthlm.json").read_text()))
    else:
        if read_family(folder) == "llava":
            settings.update(DEPTHLM_12B if "depthlm" in str(path).lower() else PIXTRAL)
        if not quiet:
            shown = ", ".join(f"{k} {v}" for k, v in settings.items())
            print(f"{path}: no depthlm.json, so the defaults of its family: {shown}", file=sys.stderr)
    settings.update({k: v for k, v in (overrides or {}).items() if v is not None})
    for key, allowed in (("marker", MARKERS), ("prompt", PROMPTS), ("camera", CAMERAS)):
        if settings[key] not in allowed:
            raise ValueError(f"{key} '{settings[key]}' is none of {allowed}.")
    if not settings["focal"] > 0:
        raise ValueError(f"focal {settings['focal']}: needs a positive number of pixels.")
    return settings


def read_family(folder) -> str | None:
    """model_type of config.json; a Llava whose vision tower is not Pixtral's is another family."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except ValueError as e:
        raise ValueError(f"{folder}/config.json: is not JSON ({e}). Download the model folder again.") from None
    kind, vision = config.get("model_type"), (config.get("vision_config") or {}).get("model_type", "pixtral")
    return f"llava with {vision}" if kind == "llava" and vision != "pixtral" else kind


def model_type(folder) -> str:
    if (kind := read_family(folder)) not in FAMILIES:
        raise ValueError(f"{folder}: model_type '{kind}' in config.json is unknown here; known: {', '.join(FAMILIES)}. "
                         "evaluate.py can score it: as it is, or by --export-queries and --predictions.")
    return kind


def load_encoder(path: str) -> Encoder:
    """The tokenizer and the image constants of a checkpoint. (AutoProcessor would need torchvision.)"""
    from transformers import AutoTokenizer
    folder = Path(find_checkpoint(path))
    family = FAMILIES[kind := model_type(folder)]
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    processor = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())
            processor = found.get("image_processor", found)
            break
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "chat_template.json").is_file():
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    if tokenizer.chat_template is None:
        if kind != "llava":
            raise ValueError(f"{folder}: has no chat template; copy chat_template.json from the base model.")
        tokenizer.chat_template = PIXTRAL_TEMPLATE
    default = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3} if kind == "qwen3_vl" else {
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
    mean, std = (np.array(processor.get(k, default[k]), np.float32)[:, None] for k in ("image_mean", "image_std"))
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0  # Pixtral as released
    scaled = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
    ids = {k: tokenizer.convert_tokens_to_ids(family[k]) for k in ("row_end", "image_end") if k in family}
    stops = generation_stops(folder) | {tokenizer.eos_token_id}
    return Encoder(str(folder), kind, tokenizer, vision.get("patch_size", 16 if kind != "qwen2_5_vl" else 14),
                   vision.get("spatial_merge_size", 2) if family["mrope"] else 1, (scaled[None] - mean) / std,
                   tokenizer.convert_tokens_to_ids(family["image_token"]), ids.get("row_end"), ids.get("image_end"), stops)


def generation_stops(folder: Path) -> frozenset[int]:
    """The tokens at which transformers' generate ends for this checkpoint."""
    path = folder / "generation_config.json"
    stops = (json.loads(path.read_text()).get("eos_token_id") or []) if path.is_file() else []
    return frozenset([stops] if isinstance(stops, int) else stops)


def patchify(pixels: np.ndarray, encoder: Encoder) -> np.ndarray:
    """(H, W, 3) uint8 -> what the vision tower takes, still uint8: Qwen (patches, 3 * patch * patch), the merge x merge
    patches of a token next to each other; Pixtral (3, H, W)."""
    if encoder.family == "llava":
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    p, m = encoder.patch, encoder.merge
    h, w = pixels.shape[0] // p, pixels.shape[1] // p
    blocks = pixels.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(blocks).reshape(h * w, 3 * p * p)


def prompt_tokens(encoder: Encoder, question: str, images: int) -> list[int]:
    """Chat template around images and question; one image token per image."""
    key = (question, images)
    if key not in encoder.cache:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        text = encoder.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                     add_generation_prompt=True)
        if len(encoder.cache) > 4096:
            encoder.cache.clear()
        encoder.cache[key] = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoder.cache[key]


def encode(encoder: Encoder, views: list[View], question: str, answer: list[int] = ()) -> dict:
    """-> one sample: input_ids (T,), position_ids (3, T) (mRoPE) or (1, T), pixels: list of uint8 arrays, sizes: their
    patch grids [(rows, columns)], prompt_length. answer: tokens behind the prompt, for training with the end token."""
    sizes = [(v.pixels.shape[0] // encoder.patch, v.pixels.shape[1] // encoder.patch) for v in views]
    ids, positions, at, image = [], [], 0, iter(sizes)
    for token in prompt_tokens(encoder, question, len(views)):
        if token != encoder.image_id:
            ids.append(token)
            positions.append(np.full((3, 1), at))
            at += 1
            continue
        rows, columns = (n // encoder.merge for n in next(image))
        if encoder.family == "llava":  # each row of patches ends with a break token, the last with the end token
            row = [encoder.image_id] * columns + [encoder.row_end_id]
            block = row * (rows - 1) + row[:-1] + [encoder.image_end_id]
            grid = np.broadcast_to(np.arange(len(block)), (3, len(block)))
            step = len(block)
        else:  # image tokens share one time, and rows and columns count on (mRoPE)
            block = [encoder.image_id] * (rows * columns)
            grid = np.stack([np.zeros(rows * columns, int), *np.divmod(np.arange(rows * columns), columns)])
            step = max(rows, columns)
        ids += block
        positions.append(grid + at)
        at += step
    prompt_length = len(ids)
    ids += answer
    positions.append(np.broadcast_to(np.arange(at, at + len(answer)), (3, len(answer))))
    positions = np.concatenate(positions, 1)
    return {"input_ids": np.array(ids), "position_ids": positions if FAMILIES[encoder.family]["mrope"] else positions[:1],
            "pixels": [patchify(v.pixels, encoder) for v in views], "sizes": sizes, "prompt_length": prompt_length}


def answer_tokens(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def pack(samples: list[dict]) -> dict:
    """Samples one after another in one row, not padded: input_ids (1, S), position_ids (3 or 1, 1, S), segments (n + 1,)
    where each sample starts; and for the loss, targets: the answer tokens, predict_at: the position that predicts each."""
    import torch
    lengths = [len(s["input_ids"]) for s in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([s["input_ids"] for s in samples])
    at = np.concatenate([np.arange(a + s["prompt_length"], b) for s, a, b in zip(samples, starts, starts[1:])])
    pixels = [p for s in samples for p in s["pixels"]]
    if pixels and pixels[0].ndim == 2:
        pixels = np.concatenate(pixels)
    elif pixels:  # Pixtral's patch convolution takes a padded batch
        height, width = (max(p.shape[k] for p in pixels) for k in (1, 2))
        pixels = np.stack([np.pad(p, ((0, 0), (0, height - p.shape[1]), (0, width - p.shape[2]))) for p in pixels])
    return {"input_ids": torch.from_numpy(ids)[None], "segments": torch.from_numpy(starts.astype(np.int32)),
            "position_ids": torch.from_numpy(np.concatenate([s["position_ids"] for s in samples], 1))[:, None],
            "pixels": torch.from_numpy(pixels) if len(pixels) else None, "sizes": [z for s in samples for z in s["sizes"]],
            "predict_at": torch.from_numpy(at - 1), "targets": torch.from_numpy(ids[at])}


def model_inputs(batch: dict, encoder: Encoder, device="cpu") -> dict:
    """A packed batch as arguments of the model: moved to the device as uint8 and normalised there, by a table, so that
    the values are bit for bit those of the image processors of transformers."""
    import torch
    inputs = {k: batch[k].to(device, non_blocking=True) for k in ("input_ids", "position_ids", "segments")}
    if encoder.family == "llava":
        inputs["position_ids"] = inputs["position_ids"][0]
    if batch["pixels"] is None:
        return inputs
    pixels = batch["pixels"].to(device, non_blocking=True)
    table = torch.from_numpy(encoder.table).to(device)
    if encoder.family == "llava":
        sizes = torch.tensor(batch["sizes"]) * encoder.patch
        values = torch.stack([table[c][pixels[:, c].int()] for c in range(3)], 1)
        for value, (height, width) in zip(values, sizes.tolist()):  # padding is 0 after normalisation
            value[:, height:], value[:, :, width:] = 0, 0
        return {**inputs, "pixel_values": values, "image_sizes": sizes}
    n, p = len(pixels), encoder.patch * encoder.patch
    pixels = pixels.view(n, 3, p)
    values = torch.stack([table[c][pixels[:, c].int()] for c in range(3)], 1)
    # a still image is shown to both frames of the temporal patch
    values = values[:, :, None].expand(n, 3, 2, p).reshape(n, 6 * p)
    grids = torch.tensor([(1, rows, columns) for rows, columns in batch["sizes"]])
    return {**inputs, "pixel_values": values, "image_grid_thw": grids.to(device)}


# ----------------------------------------------------------------------------------------------------------------------
# the contact sheet


def contact_sheet(tiles: list[tuple[list[View], str, str]], columns: int = 3, width: int = 480) -> Image.Image:
    """Rendered queries as one picture: the image(s) with markers, question and answer under each."""
    import textwrap
    cells = []
    for views, question, answer in tiles:
        images = [Image.fromarray(v.pixels) for v in views]
        scale = width / sum(i.width for i in images)
        images = [i.resize((max(1, round(i.width * scale)), max(1, round(i.height * scale))),
                           Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS) for i in images]
        lines = textwrap.wrap("Q: " + question, width // 6) + textwrap.wrap("A: " + answer, width // 6)
        height = max(i.height for i in images)
        cell = Image.new("RGB", (width, height + 14 * len(lines) + 10), "white")
        x = 0
        for image in images:
            cell.paste(image, (x, 0))
            x += image.width
        ImageDraw.Draw(cell).multiline_text((2, height + 3), "\n".join(lines), fill="black", spacing=3)
        cells.append(cell)
    rows = [cells[k:k + columns] for k in range(0, len(cells), columns)]
    heights = [max(c.height for c in row) for row in rows]
    sheet = Image.new("RGB", (columns * (width + 8), sum(heights) + 8 * len(rows)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for k, cell in enumerate(row):
            sheet.paste(cell, (k * (width + 8), y))
        y += height + 8
    return sheet


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """What the model sees, the same flags in every script. None: as the checkpoint says, else the paper's."""
    parser.add_argument("--focal", type=float, help="unified focal length, px (Sec. 3.4: 1000; Pixtral 750)")
    parser.add_argument("--marker", choices=MARKERS, help="marker shape (App. A.1): arrow")
    parser.add_argument("--marker-size", type=int, help="marker size, px (App. A.1): 5")
    parser.add_argument("--prompt", choices=PROMPTS, help="paper (Sec. 3.1), release: think/answer (Sec. 3.2), text: "
                        "coordinates in the text (App. A.1)")
    parser.add_argument("--camera", choices=CAMERAS, help="camera strategy (Sec. 3.3, App. A.5): unify")


def given_settings(args: argparse.Namespace) -> dict:
    return {k: getattr(args, k) for k in ("focal", "marker", "marker_size", "prompt", "camera")}


def fail(message) -> None:
    """One line about what is wrong and what helps, and a non-zero exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a jsonl file")
    parser.add_argument("--out", default="sheet.png", help="the picture to write")
    parser.add_argument("--n", type=int, default=9, help="samples on the sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-root", help="folder of the images, if not the jsonl's own")
    parser.add_argument("--task", default="distance", choices=list(TASKS))
    parser.add_argument("--settings", help="checkpoint folder whose depthlm.json is followed")
    parser.add_argument("--grid", type=int, default=28, help="image sides are multiples of this, px")
    parser.add_argument("--crop", type=int, nargs=4, metavar=("W0", "W1", "H0", "H1"), help="random crop as in training")
    add_settings_flags(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        settings = {**DEFAULTS, **{k: v for k, v in given_settings(args).items() if v is not None}}
        grid = args.grid
        if args.settings:
            settings, grid = load_settings(args.settings, given_settings(args)), load_encoder(args.settings).grid
        records, rng = Records(args.data, args.image_root), np.random.default_rng(args.seed)
        tiles = []
        for i in rng.permutation(len(records))[:args.n]:
            query = TASKS[args.task](records, int(i), rng)
            tiles.append(render(query, settings, grid, args.crop, rng))
        contact_sheet(tiles).save(args.out)
    except ValueError as e:
        fail(e)
    print(f"{args.out}: {len(tiles)} samples, images of {tiles[0][0][0].pixels.shape[1]} x {tiles[0][0][0].pixels.shape[0]} px "
          f"and the like, focal {settings['focal']:g} px")


if __name__ == "__main__":
    main()
