"""
A point cloud from one photo: about 10,000 pixels on an even grid, one query each (Sec. 4, Fig. 8).

    python pointcloud.py ckpt/sft_3b photo.jpg --photo-focal 1200     # pixels -> out/photo/
    python pointcloud.py ckpt/sft_3b photos/                          # each, by its EXIF data
    python pointcloud.py ckpt/sft_3b photo.jpg --fov 65 --at 320,240  # the distance of that pixel
    python pointcloud.py ckpt/toy data/toy/val.jsonl --record 0       # a prepared image and camera
    python pointcloud.py ckpt/sft_3b --serve                          # a page: click, measure, turn

Reads a checkpoint and photos (or a jsonl record). Writes into --out: answers.jsonl (one line a
query), cloud.ply (points), cloud.glb (a textured mesh), cloud.html (the cloud to turn, in one
file), depth.npy and depth.png (the grid of distances; of z), points.npz, picture.png and run.json;
README, "File formats", has their axes and units. In Python: see Reader.

Camera axes: x right, y down, z forward, metres. A point is its Euclidean distance times the unit
ray of its pixel; pixel (0, 0) is the centre of the first pixel of the upright photo. The same
command resumes an interrupted run; with other filters it makes the cloud anew from the answers.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from PIL import ExifTags, Image, ImageDraw
from tqdm import tqdm

import render
from render import COUNT, NATURAL, POSITIVE, SHARE, file_path, number

# evaluate, and torch with it, is imported where a model is needed: a photo that cannot be read, or
# has no focal length, is said at once

NUM_POINTS = 10_000  # Sec. 4, "Visualization"
NEAREST, FARTHEST = 1e-6, 1e6  # m; a number beyond these is no distance of anything in a photo
HOW_FOCAL = ("Give --fov DEGREES (horizontal; the main camera of a phone has about --fov 65, held "
             "upright 52), --photo-focal PIXELS or --focal-35mm MM; in Python fov, focal or "
             "focal_35mm.")
PHOTOS = {".avif", ".bmp", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MEASURES = ("pred", "q10", "q90", "confidence")
ANSWERS = "answers.jsonl"
FILES = ("cloud.ply", "cloud.glb", "cloud.html", "depth.npy", "depth.png", "points.npz",
         "picture.png", "cloud.gif")
PAGE = Path(__file__).parent / "viewer.html"
CUT = 0.15  # a mesh is cut where neighbours differ by more than this share
GLTF = """{"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}],
 "nodes": [{"mesh": 0}],
 "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "indices": 2,
                             "material": 0}]}],
 "accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3"},
               {"bufferView": 1, "componentType": 5126, "type": "VEC2"},
               {"bufferView": 2, "componentType": 5125, "type": "SCALAR"}],
 "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}, "doubleSided": true,
                "extensions": {"KHR_materials_unlit": {}}}],
 "extensionsUsed": ["KHR_materials_unlit"],
 "textures": [{"source": 0}], "images": [{"bufferView": 3, "mimeType": "image/jpeg"}]}"""
MOST_BYTES = 1 << 26  # of a photo that is posted
PANEL = 480  # px, longer side of each image of the picture
NEAR_TO_FAR = np.array([(128, 8, 32), (228, 60, 36), (252, 164, 52), (200, 228, 72),
                        (64, 200, 140), (44, 124, 216), (48, 36, 120)], float)  # by log distance
UNKNOWN, BACKGROUND = (110, 110, 110), (24, 24, 24)
RATIOS = [0.5, 0.6, 0.8, 1, 1.25, 1.6, 2]  # answer / truth, of the picture's legend
EDGE = 0.1  # as a ratio: the largest step for which the picture leaves an answered distance


# --------------------------------------------------------------------------------------------------
# geometry


def pixel_grid(width: int, height: int, count: int) -> np.ndarray:
    """About `count` pixels spread evenly over an image, the middles of nearly square cells: (rows,
    columns, 2) int, x and y. No pixel comes twice."""
    columns = min(max(round(math.sqrt(count * width / height)), 1), width)
    rows = min(max(round(count / columns), 1), height)
    x = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    y = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    return np.stack(np.meshgrid(x, y), -1)


def has_neighbour(depth_m: np.ndarray, limit: float) -> np.ndarray:
    """(rows, columns) bool: distances within a factor 1 + `limit` of at least one of their four
    neighbours. The others float between two surfaces, or are single wrong answers."""
    logs = np.pad(np.log(depth_m), 1, constant_values=np.nan)
    near = [np.abs(np.roll(logs, step, axis) - logs) <= math.log1p(limit)  # False with NaN
            for axis in (0, 1) for step in (-1, 1)]
    return np.any(near, 0)[1:-1, 1:-1]


# --------------------------------------------------------------------------------------------------
# the photo and its camera


@dataclass
class Photo:
    """path: the file that the model is shown; image: its pixels; intrinsics (fx, fy, cx, cy, w, h)
    [px]; source: where the focal length is from; labels: of a record, pixels (N, 2) and Euclidean
    distances (N,) [m]; orientation: of the pixels, as in a record."""
    path: str
    image: Image.Image
    intrinsics: tuple
    source: str
    labels: tuple | None = None
    orientation: str | None = "upright"


def film_focal(film_mm: float, width: int, height: int) -> float:
    """35 mm equivalent [mm] -> focal length [px], by the diagonal: that is how the equivalent is
    defined (CIPA DCG-001). Film is 3:2 and most sensors are 4:3, so that the same rule by the width
    would give 4 % less."""
    return film_mm / math.hypot(*render.FILM) * math.hypot(width, height)


# in the metadata of images that no pinhole camera took: XMP of Google's panoramas and spherical
# images, what Hugin writes, names of lenses
NO_PINHOLE = re.compile(
    r"ns\.google\.com/(photos/1\.0/panorama|videos/1\.0/spherical)|projection_?type|fullpano|"
    r"usepanorama|equirectangular|cylindrical|photo ?sphere|fish-?eye", re.I)
CAMERAS_360 = re.compile(r"360|theta|gopro max|fusion|qoocam|keymission|panono", re.I)


def exif_focal(path: str) -> tuple[float, float, str]:
    """fx, fy of the upright photo [px] from its EXIF data, and how they were found. Raises
    ValueError if it has none, or if it was cropped after it was taken, or is a panorama."""
    with render.image_file(path) as file:
        width, height = file.size
        turned = render.exif_orientation(file) >= 5
        exif = file.getexif()
        tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
        text = f"{file.info} {tags}"

    def tag(name: str):
        return tags.get(ExifTags.Base[name])

    def positive(name: str) -> float:
        with suppress(TypeError, ValueError, ZeroDivisionError):
            value = float(tag(name))
            if 0 < value < math.inf:
                return value
        return 0.0

    longer, shorter = max(width, height), min(width, height)
    aspect = longer / shorter
    spherical = abs(aspect - 2) < 0.02 and CAMERAS_360.search(f"{tag('Make')} {tag('Model')}")
    by_apple = positive("CustomRendered") == 6
    if spherical or by_apple or aspect > 2.5 or NO_PINHOLE.search(text):
        raise ValueError(f"{path}: is a panorama, or spherical, or of a fisheye lens, so that its "
                         f"EXIF data have no focal length in pixels. {HOW_FOCAL}")
    taken = positive("ExifImageWidth"), positive("ExifImageHeight")
    if all(taken) and abs(max(taken) / min(taken) / aspect - 1) > 0.01:
        raise ValueError(f"{path}: was taken at {taken[0]:g} x {taken[1]:g} and is {width} x "
                         f"{height}: it was cropped, so the focal length of its EXIF data does not "
                         f"hold. {HOW_FOCAL}")

    units = {0: 25.4, 2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # mm; 0: not said, which means inches
    unit = units.get(positive("FocalPlaneResolutionUnit"))
    focal_mm, density = positive("FocalLength"), positive("FocalPlaneXResolution")
    film_mm, zoom = positive("FocalLengthIn35mmFilm"), positive("DigitalZoomRatio") or 1.0
    zoomed = abs(zoom - 1) > 0.02
    on_sensor = focal_mm and density and unit
    if film_mm and not zoomed:
        focal = film_focal(film_mm, width, height)
        return focal, focal, f"EXIF: {film_mm:g} mm on 35 mm film, by the diagonal"
    if not on_sensor:
        fault = f"its EXIF data have no focal length that can be had in pixels. {HOW_FOCAL}"
        if film_mm:
            fault = (f"was taken at {film_mm:g} mm on 35 mm film, and with a digital zoom of "
                     f"{zoom:g}, which some makers count in and others do not. Give --focal-35mm "
                     f"{film_mm:g} or {film_mm * zoom:g}.")
        raise ValueError(f"{path}: {fault}")
    scale = focal_mm / unit * zoom
    if all(taken):
        scale *= longer / max(taken)
    fx = scale * density
    fy = scale * (positive("FocalPlaneYResolution") or density)
    if turned:  # the tags are about the sensor
        fx, fy = fy, fx
    source = f"EXIF: {focal_mm:g} mm on a sensor of {density / unit:.4g} px/mm"
    return fx, fy, source + f", digital zoom {zoom:g}" * zoomed


def open_photo(path: str, fov: float | None = None, focal: float | None = None,
               focal_35mm: float | None = None, intrinsics=None) -> Photo:
    """The upright photo and its camera: by its horizontal field of view [degrees], its focal length
    [px], its 35 mm equivalent [mm], or (fx, fy, cx, cy) [px]; else by its EXIF data. Raises
    ValueError; it does not guess: without the focal length the scale of the answers would mean
    nothing."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such photo.")
    image = render.open_image(path)
    width, height = image.size
    center = (width - 1) / 2, (height - 1) / 2
    if intrinsics is not None:
        fx, fy, *center = intrinsics
        source = "--intrinsics"
    elif focal is not None:
        fx, fy, source = focal, focal, "--photo-focal"
    elif fov is not None:
        if not 1 <= fov <= 160:
            raise ValueError(f"{path}: a field of view of {fov:g} degrees; it is 1 to 160.")
        fx = fy = width / 2 / math.tan(math.radians(fov) / 2)
        source = f"--fov {fov:g}"
    elif focal_35mm is not None:
        fx = fy = film_focal(focal_35mm, width, height)
        source = f"--focal-35mm {focal_35mm:g}"
    else:
        fx, fy, source = exif_focal(path)
    intrinsics = (fx, fy, *center, width, height)
    if fault := render.camera_fault(intrinsics):
        raise ValueError(f"{path}: {source}: {fault} {HOW_FOCAL}")
    return Photo(path, image, intrinsics, source)


def open_record(path: str, number: int, image_root: str | None, label_type: str | None) -> Photo:
    """An image of a jsonl, with the record's camera and labels."""
    records = render.Records(path, image_root, label_type)
    if number >= len(records):
        raise ValueError(f"--record {number}: {path} has the records 0 to {len(records) - 1}.")
    record = records[number]
    orientation = record.get("orientation")
    image = render.open_image(record["image"], record["intrinsics"][4:], orientation)
    intrinsics, sx, sy = render.match_size(image, record["intrinsics"], record["where"])
    labels = (record["pixel_coords"] + 0.5) * (sx, sy) - 0.5, record["depth"]
    return Photo(record["image"], image, intrinsics, "the record", labels, orientation)


def check_inside(photo: Photo, pixels) -> None:
    width, height = photo.image.size
    for x, y in pixels:
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise ValueError(f"{photo.path}: the pixel {x:g},{y:g} is outside of it; x is 0 to "
                             f"{width - 1}, y to {height - 1}.")


@contextmanager
def image_path(image) -> Iterator[str]:
    """A path as it is; a PIL image or an array as a temporary file, because what the model is shown
    is read from files."""
    if isinstance(image, (str, os.PathLike)):
        yield os.fspath(image)
        return
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image of {image.dtype} {image.shape}: give (height, width, 3) of "
                             "uint8, 0 to 255, or a PIL image.")
        image = Image.fromarray(image)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "image.png")
        image.save(path, exif=image.getexif(), compress_level=1)
        yield path


# --------------------------------------------------------------------------------------------------
# queries


class Reader:
    """A checkpoint in memory that reads photos; all that this script does, it does by this class.

        reader = Reader("ckpt/toy")
        metres, q10, q90, confidence = reader("photo.jpg", at=[(320, 240)], fov=65)
        xyz, colors = reader.cloud("photo.jpg", fov=65)

    image: a path, a PIL image, or an array (H, W, 3) uint8. camera: fov, focal, focal_35mm or
    intrinsics, see open_photo; none of them: by its EXIF data. settings: what is to differ from
    the checkpoint's depthlm.json."""

    # paper: the median instead of greedy answers; it is as accurate and brings an interval
    def __init__(self, checkpoint: str, device: str = "auto", dtype: str = "auto",
                 decode: str = "median", batch_size: int = 32, workers: int = 0, **settings):
        import evaluate
        self.checkpoint = render.open_checkpoint(str(checkpoint), settings)
        self.device = evaluate.pick_device(device)
        self.dtype = evaluate.pick_dtype(dtype, self.device)
        self.decode = decode
        self.batch_size = batch_size
        self.workers = workers

    @cached_property
    def model(self):
        """Loaded by the first query: a cloud of kept answers needs none."""
        import evaluate
        return evaluate.load_model(self.checkpoint, self.device, self.dtype)

    def __call__(self, image, at, **camera) -> np.ndarray:
        """Pixels (N, 2), or one -> (4, N): Euclidean distance [m], its 10 % and 90 % quantiles,
        confidence; NaN where an answer is no distance, or has no interval."""
        with image_path(image) as path:
            photo = open_photo(path, **camera)
            return measures(self.lines(photo, np.reshape(at, (-1, 2))))

    def cloud(self, image, points: int = NUM_POINTS, min_confidence: float | None = None,
              edge_filter: float | None = None, **camera) -> tuple[np.ndarray, np.ndarray]:
        """-> points (N, 3) in camera axes [m], colours (N, 3) uint8."""
        with image_path(image) as path:
            photo = open_photo(path, **camera)
            grid = pixel_grid(*photo.image.size, points)
            lines = self.lines(photo, grid.reshape(-1, 2))
        need_a_distance(self, lines)
        cloud = make_cloud(photo, grid, lines, min_confidence, edge_filter)
        return cloud.xyz, cloud.colors

    def lines(self, photo: Photo, pixels) -> list[dict]:
        return [line for batch in self.query(photo, pixels) for line in batch]

    def query(self, photo: Photo, pixels) -> Iterator[list[dict]]:
        """Query the model about pixels (N, 2) -> batches of {"pixel", "pred" [m] or None, "text",
        ...}."""
        import evaluate
        pixels = np.asarray(pixels)
        record = {"image": photo.path, "intrinsics": photo.intrinsics, "pixel_coords": pixels,
                  "depth": np.ones(len(pixels)), "orientation": photo.orientation}
        records = [render.check_record(record, photo.path)]  # a list serves as Records
        pairs = [(0, k) for k in range(len(pixels))]
        remaining = iter(pixels.tolist())
        workers = self.workers if len(pixels) > self.batch_size else 0
        for _, answers, _ in evaluate.run_queries(self.model, self.checkpoint, records, pairs,
                                                  "distance", self.batch_size, workers,
                                                  decode=self.decode):
            batch = []
            for answer, pixel in zip(answers, remaining):
                value = render.read_answer(answer)
                possible = value is not None and NEAREST < value < FARTHEST
                batch.append({"pixel": pixel, "pred": value if possible else None, **answer})
            yield batch


def measures(lines: list[dict]) -> np.ndarray:
    """(4, N), see MEASURES; NaN where an answer is no distance, or has no interval."""
    return np.array([[line.get(key) for line in lines] for key in MEASURES], np.float64)


def answer_pixels(reader: Reader, photo: Photo, pixels: list[tuple],
                  path: Path) -> tuple[list[dict], str]:
    """Query the model about the pixels whose answers are not in `path`; each batch is on disk
    before the next one begins. -> lines in the order of the pixels, and the time a query took."""
    done = {}
    if path.exists():
        with render.blaming(path):
            done = {tuple(line["pixel"]): line for _, line in render.read_jsonl(path, True)
                    if line["pred"] is None or NEAREST < line["pred"] < FARTHEST}
    kept = next((k for k, pixel in enumerate(pixels) if pixel not in done), len(pixels))
    if kept == len(pixels):
        return [done[pixel] for pixel in pixels], "answered before"
    kept -= kept % reader.batch_size  # so that a resumed run has the batches of a whole one
    lines = [done[pixel] for pixel in pixels[:kept]]
    render.write_jsonl(path, lines)
    left = len(pixels) - kept
    if left > reader.batch_size:
        if kept:
            print(f"{path}: resumes after {kept:,} answers", flush=True)
        for _ in range(2):  # the first one loads the model and opens the photo
            start = time.time()
            reader.lines(photo, pixels[:1])
        most = timedelta(seconds=math.ceil(left * (time.time() - start)))
        print(f"{left:,} queries take at most {most} (h:mm:ss), the time of one by one; "
              f"{reader.batch_size} at once are faster", flush=True)
    batches = reader.query(photo, pixels[kept:])
    bar = tqdm(total=len(pixels), initial=kept, desc="queries", disable=None, dynamic_ncols=True)
    start = time.time()
    with open(path, "a") as file, bar:
        for batch in batches:
            file.write("".join(map(render.json_text, batch)))
            file.flush()
            lines += batch
            bar.set_postfix(unparsed=sum(line["pred"] is None for line in lines), refresh=False)
            bar.update(len(batch))
    return lines, f"{(time.time() - start) / left:.3g} s a query"


# --------------------------------------------------------------------------------------------------
# distances of pixels


def length_between(photo: Photo, lines: list[dict]) -> dict | None:
    """The length between the points of two answers [m], and its interval if their errors are
    independent; None if there are not two distances."""
    if len(lines) != 2 or None in [line["pred"] for line in lines]:
        return None
    depth_m, q10, q90, _ = measures(lines)
    errors = np.random.default_rng(0).standard_normal((2000, 2)) / 1.2816  # 10 % are below -1
    errors[0] = 0
    errors *= np.where(errors > 0, q90 - depth_m, depth_m - q10)
    pixels = np.array([line["pixel"] for line in lines])
    ends = render.unproject(pixels, depth_m + np.nan_to_num(errors), photo.intrinsics)
    lengths = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=-1)
    found = {"pred": float(lengths[0])}
    if np.isfinite(q10).all():
        found["q10"], found["q90"] = np.quantile(lengths, (0.1, 0.9)).tolist()
    return found


def with_interval(found: dict) -> str:
    if "q10" not in found:
        return f"{found['pred']:.2f} m"
    return f"{found['pred']:.2f} m ({found['q10']:.2f}-{found['q90']:.2f})"


def print_answers(photo: Photo, lines: list[dict]) -> None:
    """For --at: Euclidean distance and z of each pixel, the length between two."""
    for line in lines:
        x, y = line["pixel"]
        if line["pred"] is None:
            print(f"{x:g},{y:g}: no distance in {line['text']!r}")
            continue
        z = line["pred"] / render.ray_length(x, y, photo.intrinsics)
        print(f"{x:g},{y:g}: {with_interval(line)} from the camera, z {z:.2f} m")
    if (length := length_between(photo, lines)):
        print(f"between the two: {with_interval(length)}")
    if any("q10" in line for line in lines):
        print("(in brackets: what the model believes with 80 %)")


def need_a_distance(reader: Reader, lines: list[dict]) -> None:
    """Raises ValueError if no answer is a distance, and warns if half of them are not."""
    others = [line["text"] for line in lines if line["pred"] is None]
    count = len(lines) - len(others)
    if 2 * count > len(lines):
        return
    fault = (f"{reader.checkpoint.name}: {count or 'none'} of its {len(lines):,} answers is a "
             f"distance (the first that is not: {others[0]!r}). Was it trained for the prompt "
             f"'{reader.checkpoint.settings['prompt']}'?")
    if not count:
        raise ValueError(fault)
    print("warning:", render.printable(fault), file=sys.stderr)


def rescale(reader: Reader, lines: list[dict], metres: list[float]) -> list[dict]:
    """The last lines are those of pixels at known distances: -> the others, times the median of
    known / read distance. Raises ValueError if no known pixel has an answer."""
    if not metres:
        return lines
    lines, known = lines[:-len(metres)], lines[-len(metres):]
    need_a_distance(reader, known)
    ratios = np.array(metres) / measures(known)[0]
    scale = float(np.nanmedian(ratios))
    errors = ", ".join(f"{error:+.1%}" for error in scale / ratios - 1)
    print(f"scaled by {scale:.3f}; of the known distances the answers now differ by {errors}")
    return [line | {key: line[key] * scale for key in MEASURES[:3] if line.get(key)}
            for line in lines]


# --------------------------------------------------------------------------------------------------
# the cloud


@dataclass
class Cloud:
    """Points on a grid. pixels (rows, columns, 2); depth_m (rows, columns) with NaN; keep (rows,
    columns) bool: those in the cloud; of these xyz (N, 3) [m], colors (N, 3) uint8 and intervals
    (N,): confidence, q10, q90, 0 where an answer has none, {} where none has."""
    pixels: np.ndarray
    depth_m: np.ndarray
    keep: np.ndarray
    xyz: np.ndarray
    colors: np.ndarray
    intervals: dict[str, np.ndarray]


def make_cloud(photo: Photo, grid: np.ndarray, lines: list[dict],
               min_confidence: float | None = None, edge_filter: float | None = None) -> Cloud:
    """Answers on a grid (rows, columns, 2), filtered and unprojected. Raises ValueError if no point
    is left."""
    values = measures(lines).astype(np.float32)
    depth_m, q10, q90, confidence = values.reshape(-1, *grid.shape[:2])
    keep = np.isfinite(depth_m)
    if min_confidence is not None:
        keep &= confidence >= min_confidence
    if edge_filter is not None:
        keep &= has_neighbour(depth_m, edge_filter)
    if not keep.any():
        raise ValueError("--min-confidence or --edge-filter leaves no point. Lower the first (of "
                         f"all confidences the highest is {np.nan_to_num(confidence).max():.2f}), "
                         "or raise the second.")
    intervals = {"confidence": confidence, "q10": q10, "q90": q90}
    return place_points(photo, grid, depth_m, keep, {
        key: np.nan_to_num(values[keep]) for key, values in intervals.items()
        if np.isfinite(values).any()})


def place_points(photo: Photo, grid: np.ndarray, depth_m: np.ndarray, keep: np.ndarray,
                 intervals: dict) -> Cloud:
    xyz = render.unproject(grid[keep], depth_m[keep], photo.intrinsics).astype(np.float32)
    x, y = grid[keep].T
    return Cloud(grid, depth_m, keep, xyz, np.asarray(photo.image)[y, x], intervals)


def mapped_clouds(args, photo: Photo, grid: np.ndarray) -> dict[str, Cloud]:
    """--compare: the depth maps at the pixels of the grid."""
    import evaluate
    clouds = {}
    for path in args.compare:
        depth_m = evaluate.mapped_depth(Path(path), grid.reshape(-1, 2), photo.intrinsics,
                                        args.depth_scale, args.depth_type).reshape(grid.shape[:2])
        keep = (depth_m > NEAREST) & (depth_m < FARTHEST)  # False with NaN
        if not keep.any():
            raise ValueError(f"{path}: has no distance of {NEAREST:g} to {FARTHEST:g} m.")
        depth_m[~keep] = np.nan
        name = Path(path).stem
        clouds[path if name in clouds else name] = place_points(photo, grid, depth_m, keep, {})
    return clouds


def label_ratios(photo: Photo, depth_m: np.ndarray) -> np.ndarray:
    """Answer / truth at a record's labels (N,), by the grid cell of each; NaN where none is."""
    pixels, true = photo.labels
    rows, columns = depth_m.shape
    cell = (pixels + 0.5) * (columns, rows) // photo.image.size
    x, y = np.clip(cell, 0, (columns - 1, rows - 1)).astype(int).T
    return depth_m[y, x] / true


def print_label_error(photo: Photo, depth_m: np.ndarray, whose: str = "") -> None:
    """How a cloud compares with a record's labels."""
    if photo.labels is None:
        return
    error = np.abs(label_ratios(photo, depth_m) - 1)
    error = error[np.isfinite(error)]
    if len(error):
        print(f"{whose}against the record's labels: median error {np.median(error):.1%} at "
              f"{len(error)} points")


def write_ply(file, **columns: np.ndarray) -> None:
    """A binary PLY with one vertex a row: each column (N,) a property, uint8 as uchar, anything
    else as float."""
    header = ["ply", "format binary_little_endian 1.0",
              "comment metres; camera axes x right, y down, z forward",
              f"element vertex {len(columns['x'])}"]
    arrays = []
    for name, column in columns.items():
        color = column.dtype == np.uint8
        header.append(f"property {'uchar' if color else 'float'} {name}")
        arrays.append(column if color else column.astype("<f4"))
    file.write("\n".join([*header, "end_header\n"]).encode())
    file.write(np.rec.fromarrays(arrays).tobytes())


def write_glb(file, photo: Photo, cloud: Cloud) -> None:
    """The grid as a mesh in binary glTF, the photo its texture, cut between neighbours that differ
    by more than CUT. glTF's axes: x right, y up, z backward."""
    number = np.full(cloud.keep.shape, -1)
    number[cloud.keep] = np.arange(len(cloud.xyz))
    left_up, right_up = number[:-1, :-1], number[:-1, 1:]
    left_low, right_low = number[1:, :-1], number[1:, 1:]
    corners = [left_up, left_low, right_up, right_up, left_low, right_low]
    triangles = np.stack(corners, -1).reshape(-1, 3)
    triangles = triangles[(triangles >= 0).all(1)]
    depth_m = cloud.depth_m[cloud.keep][triangles]
    triangles = triangles[depth_m.max(1) <= (1 + CUT) * depth_m.min(1)]
    if not len(triangles):
        triangles = np.zeros((1, 3))  # a mesh of none is no glTF

    texture, jpeg = photo.image.copy(), io.BytesIO()
    texture.thumbnail((2048, 2048))
    texture.save(jpeg, "JPEG", quality=90)
    arrays = [cloud.xyz * np.float32([1, -1, -1]),
              np.float32((cloud.pixels[cloud.keep] + 0.5) / photo.image.size),
              triangles.reshape(-1, 1).astype(np.uint32)]
    scene = json.loads(GLTF)
    for accessor, array in zip(scene["accessors"], arrays):
        accessor["count"] = len(array)
        accessor["min"] = array.min(0).tolist()
        accessor["max"] = array.max(0).tolist()
    views, body = [], b""
    for part in [*(array.tobytes() for array in arrays), jpeg.getvalue()]:
        views.append({"buffer": 0, "byteOffset": len(body), "byteLength": len(part)})
        body += part + bytes(-len(part) % 4)
    scene |= {"bufferViews": views, "buffers": [{"byteLength": len(body)}]}
    header = json.dumps(scene).encode()
    header += b" " * (-len(header) % 4)
    file.write(struct.pack("<4sII", b"glTF", 2, 28 + len(header) + len(body)))
    for kind, chunk in (b"JSON", header), (b"BIN\0", body):
        file.write(struct.pack("<I4s", len(chunk), kind) + chunk)


def z_millimetres(photo: Photo, cloud: Cloud) -> Image.Image:
    """The grid's z as a 16-bit image, 0 where it is unknown or beyond 65.5 m."""
    x, y = np.moveaxis(cloud.pixels, -1, 0)
    z = 1000 * cloud.depth_m / render.ray_length(x, y, photo.intrinsics)
    z[~(z < 65535.5)] = 0  # NaN, too
    return Image.fromarray(z.round().astype(np.uint16))


def page_data(photo: Photo, cloud: Cloud, note: str) -> dict:
    """A cloud as viewer.html takes it, arrays in base64. spacing: of points, a share of z."""
    fx, fy, _, _, w, h = photo.intrinsics
    rows, columns = cloud.keep.shape
    data = {"note": note, "spacing": max(w / columns / fx, h / rows / fy)}
    arrays = {"xyz": cloud.xyz, "colors": cloud.colors, **cloud.intervals}
    for key, values in arrays.items():
        data[key] = base64.b64encode(values.tobytes()).decode()
    return data


def page_text(data: dict) -> str:
    """cloud.html: viewer.html with a cloud inside."""
    inside = json.dumps(data).replace("<", "\\u003c")  # no text can end the script element
    return PAGE.read_text("utf-8").replace(">null</script>", f">{inside}</script>")


def note_of(photo: Photo, cloud: Cloud, lines: list[dict]) -> str:
    fx, fy = photo.intrinsics[:2]
    unparsed = sum(line["pred"] is None for line in lines)
    truncated = sum("truncated" in line for line in lines)
    cut = f"{truncated:,} cut by the token limit, " if truncated else ""
    return (f"{len(cloud.xyz):,} points, {unparsed:,} of {len(lines):,} answers were no distance, "
            f"{cut}focal {fx:.1f} {fy:.1f} px ({photo.source})")


def write_cloud(out: Path, photo: Photo, cloud: Cloud, note: str, gif: bool,
                others: dict[str, Cloud]) -> list[str]:
    """The files of the cloud, each whole or not at all; others: for the picture alone."""
    x, y, z = cloud.xyz.T
    red, green, blue = cloud.colors.T
    writers = {
        "depth.npy": lambda file: np.save(file, cloud.depth_m),
        "depth.png": lambda file: z_millimetres(photo, cloud).save(file, "PNG"),
        "points.npz": lambda file: np.savez(
            file, pixels=cloud.pixels[cloud.keep], depth=cloud.depth_m[cloud.keep],
            xyz=cloud.xyz, colors=cloud.colors, intrinsics=photo.intrinsics, **cloud.intervals),
        "picture.png": lambda file: draw_picture(photo, cloud, note, others).save(file, "PNG"),
        "cloud.glb": lambda file: write_glb(file, photo, cloud),
        "cloud.html": lambda file: file.write(page_text(page_data(photo, cloud, note)).encode()),
        "cloud.ply": lambda file: write_ply(file, x=x, y=y, z=z, red=red, green=green, blue=blue,
                                            **cloud.intervals)}
    if gif:
        writers["cloud.gif"] = lambda file: save_turn(file, photo, cloud)
    else:
        (out / "cloud.gif").unlink(missing_ok=True)  # of other filters
    for name, write in writers.items():
        with render.replacing(out / name) as temporary, open(temporary, "wb") as file:
            write(file)
    return list(writers)


# --------------------------------------------------------------------------------------------------
# the picture


def colorize(depth_m: np.ndarray, near: float, far: float) -> np.ndarray:
    """Distances (...) -> colours (..., 3) uint8 from near (red) to far (blue); NaN is grey."""
    known = np.isfinite(depth_m)
    t = np.log(np.where(known, depth_m, near) / near) / math.log(far / near)
    stops = np.linspace(0, 1, len(NEAR_TO_FAR))
    colors = np.stack([np.interp(t, stops, channel) for channel in NEAR_TO_FAR.T], -1)
    return np.where(known[..., None], colors, UNKNOWN).round().astype(np.uint8)


def legend(height: int, ticks: list[float], unit: str) -> Image.Image:
    """The colours as a bar with round numbers beside it, far at the top: 80 x height px."""
    image = Image.new("RGB", (80, height), "white")
    near, far = ticks[0], ticks[-1]
    length = height - 13
    bar = colorize(np.geomspace(far, near, length), near, far)
    image.paste(Image.fromarray(bar[:, None]).resize((16, length)), (8, 6))
    draw = ImageDraw.Draw(image)
    for tick in ticks:
        y = 6 + math.log(far / tick) / math.log(far / near) * (length - 1)
        draw.line((24, y, 28, y), "black")
        draw.text((31, y), f"{tick:g}{unit}", "black", anchor="lm", font_size=12)
    return image


def mark_labels(photo: Photo, size, colors: np.ndarray) -> Image.Image:
    """The photo in grey with a dot in its own colour (N, 3) at each label."""
    image = photo.image.resize(size).convert("L").convert("RGB")
    draw = ImageDraw.Draw(image)
    places = (photo.labels[0] + 0.5) * size / photo.image.size - 0.5
    for (x, y), color in zip(places.tolist(), colors.tolist()):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), tuple(color), "black")
    return image


def panel_size(photo: Photo) -> list[int]:
    return [max(round(n * PANEL / max(photo.image.size)), 160) for n in photo.image.size]


def fill_in(photo: Photo, cloud: Cloud, size) -> tuple:
    """The cloud without gaps: points (N, 3) [m] and colours (N, 3), about one a pixel of an image
    of `size` (w, h). Distances are interpolated between neighbours on the grid, except across
    edges."""
    grid = np.where(cloud.keep, cloud.depth_m, np.nan).astype(np.float32)
    size = np.maximum(size, grid.shape[::-1])
    image = Image.fromarray(grid)
    smooth = np.asarray(image.resize(size, Image.BILINEAR))
    depth_m = np.asarray(image.resize(size, Image.NEAREST))
    depth_m = np.where(np.abs(smooth / depth_m - 1) < EDGE, smooth, depth_m)
    y, x = np.nonzero(np.isfinite(depth_m))
    pixels = (np.stack([x, y], -1) + 0.5) * photo.image.size / size - 0.5
    colors = np.asarray(photo.image.resize(size))[y, x]
    return render.unproject(pixels, depth_m[y, x], photo.intrinsics), colors


def seen_from(yaw: float, pitch: float, xyz: np.ndarray) -> np.ndarray:
    """Points (N, 3), turned as they are seen from `yaw` degrees to the right and `pitch` upwards;
    0, 0: as the camera did."""
    a, b = math.radians(yaw), math.radians(pitch)
    x, y, z = xyz.T
    x, z = x * math.cos(a) + z * math.sin(a), z * math.cos(a) - x * math.sin(a)
    y, z = y * math.cos(b) - z * math.sin(b), z * math.cos(b) + y * math.sin(b)
    return np.stack([x, y, z], -1)


def frame_of(xyz: np.ndarray) -> np.ndarray:
    """(2, 2): the least and the largest x, y that a drawing shows; outliers may leave it."""
    return np.quantile(xyz[:, :2], (0.01, 0.99), 0)


def draw_cloud(xyz: np.ndarray, colors: np.ndarray, size, frame: np.ndarray) -> Image.Image:
    """Points (N, 3), as `seen_from` turned them, in parallel projection, 5 px wide; nearer ones
    hide others. Colours (N, 3) uint8, size (w, h), frame (2, 2) [m]."""
    width, height = size
    order = np.argsort(-xyz[:, 2], kind="stable")  # far to near: what is assigned last, stays
    places, (low, high) = xyz[order, :2], frame
    scale = 0.92 * min(size / np.maximum(high - low, 0.01))  # px a metre
    places = np.floor((places - (low + high) / 2) * scale + np.divide(size, 2))
    places = 5 + places.clip(-3, np.add(size, 2)).astype(int)  # those outside: on a border of 5 px
    offsets = np.mgrid[-2:3, -2:3].reshape(2, 25)
    x, y = (places.T[:, :, None] + offsets[:, None]).reshape(2, -1)
    canvas = np.full((height + 10, width + 10, 3), BACKGROUND, np.uint8)
    canvas[y, x] = np.repeat(colors[order], 25, 0)
    return Image.fromarray(canvas[5:-5, 5:-5])


def draw_picture(photo: Photo, cloud: Cloud, note: str, others: dict[str, Cloud]) -> Image.Image:
    """The photo, the answers and, where there are labels, the truth and the error, in colours with
    a legend; the cloud from two sides; a row of the same for each other cloud, all at one scale; a
    note below."""
    size, clouds = panel_size(photo), [cloud, *others.values()]
    ends = np.array([np.nanquantile(one.depth_m, (0.01, 0.99)) for one in clouds])
    ticks = render.round_ticks(ends.min(), ends.max(), log=True)
    views = [views_of(photo, one, size) for one in clouds]
    frames = []
    for same_view in zip(*views):
        ends = np.array([frame_of(xyz) for xyz, _ in same_view])
        frames.append((ends[:, 0].min(0), ends[:, 1].max(0)))

    def tile(image: Image.Image, caption: str, method=Image.BICUBIC) -> Image.Image:
        return render.captioned(image.resize(size, method), caption)

    def depth_tile(one: Cloud, caption: str) -> Image.Image:
        colors = colorize(one.depth_m, ticks[0], ticks[-1])
        return tile(Image.fromarray(colors), caption, Image.NEAREST)

    def view_tiles(k: int, name: str) -> list[Image.Image]:
        captions = (f"{name} from the upper right",
                    f"{name} from above, without what is higher than the camera")
        return [tile(draw_cloud(*view, size, frame), caption)
                for view, frame, caption in zip(views[k], frames, captions)]

    def ratio_tile(one: Cloud, name: str) -> list[Image.Image]:
        if photo.labels is None:
            return []
        ratios = colorize(label_ratios(photo, one.depth_m), RATIOS[0], RATIOS[-1])
        return [tile(mark_labels(photo, size, ratios), f"{name} / truth")]

    above = [tile(photo.image, "Photo"), depth_tile(cloud, "Answers: Euclidean distance")]
    below = view_tiles(0, "The cloud") + ratio_tile(cloud, "Answer")
    if photo.labels:
        true = colorize(photo.labels[1], ticks[0], ticks[-1])
        above.append(tile(mark_labels(photo, size, true), "Truth at the labels"))
        below.append(legend(size[1], RATIOS, ""))
    above.append(legend(size[1], ticks, " m"))
    rows = [above, below]
    for k, (name, other) in enumerate(others.items(), 1):
        rows.append([depth_tile(other, f"{name}: Euclidean distance"), *view_tiles(k, name),
                     *ratio_tile(other, name)])
    width = max(sum(image.width + render.GAP for image in row) for row in rows)
    picture = render.sheet([render.sheet(row, width) for row in rows], 0)
    return render.captioned(picture, "     " + note)  # below the tiles, not below their margin


def views_of(photo: Photo, cloud: Cloud, size) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points and colours as seen from two sides, the second without what is higher than the
    camera."""
    xyz, colors = fill_in(photo, cloud, size)
    low = xyz[:, 1] > 0
    if low.mean() <= 0.2:
        low[:] = True
    return [(seen_from(30, 20, xyz), colors), (seen_from(0, 45, xyz[low]), colors[low])]


def save_turn(file, photo: Photo, cloud: Cloud) -> None:
    """A GIF of a view that circles around that of the camera, behind which nothing is known."""
    size = panel_size(photo)
    xyz, colors = fill_in(photo, cloud, np.floor_divide(size, 2))
    turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    views = [seen_from(yaw, pitch, xyz - np.median(xyz, 0))
             for yaw, pitch in zip(28 * np.sin(turn), 14 - 10 * np.cos(turn))]
    low, high = np.swapaxes([frame_of(view) for view in views], 0, 1)
    frame = low.min(0), high.max(0)  # of all, so that it stands still
    images = [draw_cloud(view, colors, size, frame) for view in views]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=70, loop=0)


# --------------------------------------------------------------------------------------------------
# the page


class Desk:
    """What the page may post. Each action yields JSON objects: an answer, or progress first. id and
    camera say of which photo, so that two pages do not meet; the lock lets clicks in between the
    batches of a cloud."""

    def __init__(self, reader: Reader):
        reader.workers = 0  # a process with threads should not fork
        self.reader, self.lock = reader, threading.Lock()
        self.folder, self.opened = tempfile.TemporaryDirectory(), lru_cache(4)(open_photo)
        self.actions = {"/photo": self.photo, "/distance": self.distance, "/cloud": self.cloud}

    def open(self, id: str, camera: dict[str, str]) -> Photo:
        path = os.path.join(self.folder.name, os.path.basename(id))
        return self.opened(path, **{key: float(text) for key, text in camera.items()})

    def photo(self, data: bytes, **camera: str) -> Iterator[dict]:
        id = hashlib.sha256(data).hexdigest()
        Path(self.folder.name, id).write_bytes(data)
        photo = self.open(id, camera)
        yield {"id": id, "intrinsics": photo.intrinsics, "source": photo.source}

    def distance(self, data: bytes, id: str, **camera: str) -> Iterator[dict]:
        photo = self.open(id, camera)
        with self.lock:
            lines = self.reader.lines(photo, render.parse_json(data))
        yield {"answers": lines, "length": length_between(photo, lines)}

    def cloud(self, data: bytes, id: str, points: str, **camera: str) -> Iterator[dict]:
        photo = self.open(id, camera)
        grid = pixel_grid(*photo.image.size, COUNT(points))
        pixels = grid.reshape(-1, 2)
        batches = self.reader.query(photo, pixels)
        lines = []
        while len(lines) < len(pixels):
            with self.lock:
                lines += next(batches)
            yield {"done": len(lines), "total": len(pixels)}
        need_a_distance(self.reader, lines)
        cloud = make_cloud(photo, grid, lines)
        yield {"cloud": page_data(photo, cloud, note_of(photo, cloud, lines))}


def make_server(reader: Reader, port: int) -> ThreadingHTTPServer:
    """viewer.html and what it posts, for this machine alone: a page of another site cannot send the
    header without leave, and is known by its Host if it calls its own name 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # s

        def log_message(self, *_):
            """Not a line a request."""

        def start(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def do_GET(self):
            if self.headers["Host"] not in hosts or self.path != "/":
                return self.send_error(404)
            self.start("text/html; charset=utf-8")
            self.wfile.write(PAGE.read_bytes())

        def do_POST(self):
            url, length = urlsplit(self.path), int(self.headers["Content-Length"] or 0)
            action = desk.actions.get(url.path)
            ours = self.headers["Host"] in hosts and self.headers["X-nanoDepthLM"] == "1"
            if not (ours and action and 0 <= length <= MOST_BYTES):
                return self.send_error(403)
            self.start("application/x-ndjson")
            try:
                for found in action(self.rfile.read(length), **dict(parse_qsl(url.query))):
                    self.wfile.write(render.json_text(found).encode())
            except ConnectionError:  # the page was closed
                pass
            except Exception as e:  # it says so, and the next request is answered
                self.wfile.write(render.json_text({"error": str(e)}).encode())

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as e:
        raise ValueError(f"--serve {port}: {e.strerror}. Give another port.") from None
    hosts = {f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")}
    desk = Desk(reader)
    return server


# --------------------------------------------------------------------------------------------------


def pixel(text: str) -> tuple[float, ...]:
    """An argparse type."""
    x, y = map(float, text.split(","))
    return x, y


def known_distance(text: str) -> tuple[tuple[float, ...], float]:
    """An argparse type."""
    place, metres = text.split("=")
    return pixel(place), POSITIVE(metres)


def four_numbers(text: str) -> tuple[float, ...]:
    """An argparse type."""
    fx, fy, cx, cy = map(float, text.split(","))
    return fx, fy, cx, cy


pixel.__name__, known_distance.__name__ = "X,Y", "X,Y=METRES"  # for argparse's messages
four_numbers.__name__ = "FX,FY,CX,CY"


def parse_args(argv=None) -> argparse.Namespace:
    parser = render.make_parser(__doc__)
    parser.add_argument("checkpoint", help="model folder or hub name")
    parser.add_argument("photo", type=file_path, nargs="*",
                        help="images, folders of images; or a jsonl file, with --record")
    parser.add_argument("--serve", type=number(int, 0, 65535), nargs="?", const=8000,
                        metavar="PORT", help="no photos, a page to open them in, for this machine "
                        "alone; default: no page, and 8000 for its port")

    flag = parser.add_argument_group("files").add_argument
    flag("--out", type=file_path, help="folder of the results, of several photos that of their "
         "folders; default: out/<photo name>")
    flag("--overwrite", action="store_true", help="drop the answers that are in --out")
    flag("--record", type=NATURAL, metavar="N",
         help="this record of the jsonl (0 is the first), with its camera; default: a photo")
    render.add_record_flags(flag)
    flag("--compare", type=file_path, nargs="+", metavar="MAP", default=[],
         help="depth maps of the photo by other models, or of the truth, .npy or 16-bit .png: "
         "beside ours in the picture (Fig. 8); default: none")
    render.add_map_flags(flag)
    flag("--gif", action="store_true", help="also cloud.gif, a turn around the cloud")
    flag("--json", action="store_true", help="print one JSON object a photo, all else to stderr")

    camera = parser.add_argument_group("the photo's camera (default: its EXIF data)")
    flag = camera.add_mutually_exclusive_group().add_argument
    flag("--photo-focal", type=POSITIVE, metavar="PX", help="its focal length, px")
    flag("--fov", type=number(float, 1, 160), metavar="DEGREES", help="horizontal field of view")
    flag("--focal-35mm", type=POSITIVE, metavar="MM", help="35 mm equivalent focal length")
    flag("--intrinsics", type=four_numbers, metavar="FX,FY,CX,CY",
         help="focal lengths and principal point, px")

    flag = parser.add_argument_group("queries").add_argument
    flag("--points", type=COUNT, default=NUM_POINTS,
         help="queries, as nearly as an even grid allows (Sec. 4)")
    flag("--at", type=pixel, nargs="+", metavar="X,Y", default=[],
         help="print the distance of these pixels, and make no cloud; default: a cloud")
    flag("--known", type=known_distance, nargs="+", metavar="X,Y=METRES", default=[],
         help="distances that were measured: all answers are scaled by the median ratio; default: "
         "none")
    flag("--edge-filter", type=POSITIVE, metavar="R",
         help="leave out of the cloud what differs by more than the ratio R (such as 0.1) from all "
         "four neighbours on the grid; default: keep all")
    flag("--min-confidence", type=SHARE, metavar="P",
         help="leave points out of which the model puts less than P of its probability within "
         "25 %% of the median; default: keep all")
    render.add_settings_flags(parser)
    render.add_decoding_flags(parser.add_argument_group("decoding, system").add_argument)
    parser.set_defaults(decode="median")
    args = parser.parse_intermixed_args(argv)  # photos may follow flags
    if args.min_confidence is not None and args.decode != "median":
        parser.error("--min-confidence: needs --decode median; greedy answers have no confidence")
    if bool(args.photo) == (args.serve is not None):
        parser.error(f"give a checkpoint ({args.checkpoint} was taken for it) and photos, or "
                     "--serve without any")
    if args.compare and (len(args.photo) != 1 or args.at):
        parser.error("--compare: is for the cloud of one photo")
    jsonl = [path for path in args.photo if path.endswith(".jsonl")]
    if args.record is None and jsonl:
        parser.error(f"{jsonl[0]}: say which of its records, with --record N (0 is the first)")
    if args.record is not None and (len(jsonl) != 1 or len(args.photo) > 1):
        parser.error("--record is for one jsonl file; leave it out for photos")
    if args.record is not None and any(camera_of(args).values()):
        parser.error("--record brings its own camera: leave --photo-focal, --fov, --focal-35mm and "
                     "--intrinsics out")
    return args


def camera_of(args) -> dict:
    return {"fov": args.fov, "focal": args.photo_focal, "focal_35mm": args.focal_35mm,
            "intrinsics": args.intrinsics}


def list_photos(paths: list[str]) -> list[str]:
    """The photos, and those of the folders, among paths."""
    found = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PHOTOS)
        if not inside:
            raise ValueError(f"{path}: holds no photo (such as *.jpg).")
        found += map(str, inside)
    return found


def result_folder(args, path: str, alone: bool) -> Path:
    if args.out and alone:
        return Path(args.out)
    name = Path(path).stem
    if args.record is not None:
        import evaluate
        name = f"{evaluate.dataset_names([path])[0]}-{args.record}"
    return Path(args.out or "out", name)


@contextmanager
def one_line_each(failed: list, alone: bool) -> Iterator[None]:
    """The fault of one photo of several is a line, and the others go on."""
    try:
        yield
    except (ValueError, OSError) as e:
        if alone:
            raise
        print("error:", render.printable(e), file=sys.stderr, flush=True)
        failed.append(e)


def run(args, reader: Reader, photo: Photo, out: Path) -> dict:
    """Distances of pixels, or a cloud, of one photo. -> what --json prints."""
    width, height = photo.image.size
    fx, fy, cx, cy = photo.intrinsics[:4]
    print(f"{photo.path}: {width} x {height} px, focal {fx:.1f} {fy:.1f} px ({photo.source}), "
          f"center {cx:g} {cy:g}", flush=True)
    about = {"photo": photo.path, "intrinsics": photo.intrinsics, "source": photo.source}
    if not args.at:
        with render.lock_folder(out):
            return about | run_cloud(args, reader, photo, out)

    known = dict(args.known)
    lines = reader.lines(photo, [*args.at, *known])
    lines = rescale(reader, lines, [*known.values()])
    print_answers(photo, lines)
    need_a_distance(reader, lines)
    return about | {"at": lines, "length": length_between(photo, lines)}


def run_cloud(args, reader: Reader, photo: Photo, out: Path) -> dict:
    """Query the grid, or read what was answered before, and write all files."""
    import evaluate
    width, height = photo.image.size
    grid = pixel_grid(width, height, args.points)
    rows, columns = grid.shape[:2]
    print(f"{columns} x {rows} = {rows * columns:,} queries on an even grid ({args.points:,} were "
          f"wanted), one every {width / columns:.3g} x {height / rows:.3g} px", flush=True)
    inputs = {"weights": evaluate.weights_hash(reader.checkpoint),
              "settings": reader.checkpoint.settings, "dtype": str(reader.dtype),
              "decode": args.decode, "grid": grid.shape[:2],
              "image": evaluate.file_hash(photo.path), "intrinsics": photo.intrinsics}
    evaluate.claim(out, args, inputs, (ANSWERS, *FILES))

    others = mapped_clouds(args, photo, grid)
    known = dict(args.known)
    pixels = [*map(tuple, grid.reshape(-1, 2).tolist()), *known]
    lines, cost = answer_pixels(reader, photo, pixels, out / ANSWERS)
    if all(line["pred"] is None for line in lines):
        (out / ANSWERS).unlink()
    need_a_distance(reader, lines)
    lines = rescale(reader, lines, [*known.values()])
    cloud = make_cloud(photo, grid, lines, args.min_confidence, args.edge_filter)
    note = note_of(photo, cloud, lines)
    files = write_cloud(out, photo, cloud, note, args.gif, others)
    print(f"{note}; {cost}")
    print_label_error(photo, cloud.depth_m)
    for name, other in others.items():
        print_label_error(photo, other.depth_m, f"{name} ")
        both = cloud.keep & other.keep
        ratios = cloud.depth_m[both] / other.depth_m[both]
        if not len(ratios):
            continue
        print(f"ours / {name}: median {np.median(ratios):.3f}, between 1 / 1.25 and 1.25 at "
              f"{evaluate.within(ratios, np.ones(1), 1.25).mean():.1%} of {both.sum():,} points")
    print(f"{out}/: {', '.join(files)}")
    return {"out": str(out), "points": len(cloud.xyz), "note": note, "files": files}


@render.command
def main(argv=None) -> None:
    args = parse_args(argv)

    def open_one(path: str) -> Photo:
        if args.record is None:
            photo = open_photo(path, **camera_of(args))
        else:
            photo = open_record(path, args.record, args.image_root, args.label_type)
        check_inside(photo, [*args.at, *dict(args.known)])
        return photo

    photos, failed, folders = list_photos(args.photo), [], {}
    alone = len(photos) == 1
    for path in photos:  # all of them before any waits for the model
        with one_line_each(failed, alone):
            open_one(path)
            out = result_folder(args, path, alone)
            if not args.at and out in folders.values():
                raise ValueError(f"{path}: {out} is the folder of another photo of that name. "
                                 "Rename one, or give each a call and an --out of its own.")
            folders[path] = out
    if folders or args.serve is not None:
        reader = Reader(args.checkpoint, args.device, args.dtype, args.decode, args.batch_size,
                        args.workers, **render.settings_from_flags(args))
    if args.serve is not None:
        with make_server(reader, args.serve) as server, suppress(KeyboardInterrupt):
            print(f"open http://127.0.0.1:{server.server_port}/ (the model is on "
                  f"{reader.model.device}; Ctrl-C ends it)", flush=True)
            return server.serve_forever()
    for path, out in folders.items():
        with one_line_each(failed, alone):
            with redirect_stdout(sys.stderr if args.json else sys.stdout):
                found = run(args, reader, open_one(path), out)
            if args.json:
                print(render.json_text(found), end="", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(photos)} photos failed, each with a line above.")


if __name__ == "__main__":
    main()
