"""
A point cloud from one photo: about 10,000 pixels on an even grid, one query each (Sec. 4, Fig. 8).

    python pointcloud.py ckpt/sft_3b photo.jpg --photo-focal 1200     # pixels -> out/photo/
    python pointcloud.py ckpt/sft_3b photo.jpg                        # by its EXIF data, printed
    python pointcloud.py ckpt/sft_3b photo.jpg --fov 65 --at 320,240  # the distance of that pixel
    python pointcloud.py ckpt/toy data/toy/val.jsonl --record 0       # a prepared image and camera

Reads a checkpoint and a photo (or a jsonl record). Writes into --out: answers.jsonl (one line a
query), cloud.ply (binary: x, y, z, red, green, blue), depth.npy ((rows, columns) float32: Euclidean
distance on the grid [m], NaN where the answer was no distance), points.npz (the cloud's pixels,
depth, xyz and colors, and the intrinsics), picture.png and run.json.

Camera axes: x right, y down, z forward, metres. A point is its Euclidean distance times the unit
ray of its pixel; pixel (0, 0) is the centre of the first pixel of the upright photo. The same
command resumes an interrupted run; with other filters it makes the cloud anew from the answers.
"""
import argparse
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw
from tqdm import tqdm

import evaluate
import render
from render import COUNT, NATURAL, POSITIVE, SHARE, file_path, number

NUM_POINTS = 10_000  # Sec. 4, "Visualization"
NEAREST, FARTHEST = 1e-6, 1e6  # m; a number beyond these is no distance of anything in a photo
HOW_FOCAL = "Give --photo-focal PIXELS, --fov DEGREES (the horizontal one) or --focal-35mm MM."
FILES = ("cloud.ply", "depth.npy", "points.npz", "picture.png")
ANSWERS = "answers.jsonl"
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
    columns, 2) int, x and y. Rows and columns are the best compromise between that number and
    square cells; no pixel comes twice."""
    columns = np.arange(1, min(width, count) + 1)
    rows = np.clip(np.round(count / columns), 1, height)
    off_count = np.abs(np.log(columns * rows / count))
    off_square = np.abs(np.log((width / columns) / (height / rows)))
    best = (off_count + off_square).argmin()
    x, y = ((2 * np.arange(n) + 1) * length // (2 * n)
            for n, length in ((int(columns[best]), width), (int(rows[best]), height)))
    return np.stack(np.meshgrid(x, y), -1)


def has_neighbour(depth_m: np.ndarray, limit: float) -> np.ndarray:
    """(rows, columns) bool: distances within a factor 1 + `limit` of at least one of their four
    neighbours. The others float between two surfaces, or are single wrong answers."""
    logs = np.pad(np.log(depth_m), 1, constant_values=np.nan)
    around = np.stack([logs[:-2, 1:-1], logs[2:, 1:-1], logs[1:-1, :-2], logs[1:-1, 2:]])
    near = np.abs(around - logs[1:-1, 1:-1]) <= math.log1p(limit)  # never with NaN
    return near.any(0)


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
    labels: tuple[np.ndarray, np.ndarray] | None = None
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

    def positive(name: str) -> float:
        try:
            value = float(tags.get(ExifTags.Base[name], 0))
        except (TypeError, ValueError, ZeroDivisionError):
            return 0.0
        return value if math.isfinite(value) and value > 0 else 0.0

    aspect = max(width, height) / min(width, height)
    made_by = f"{tags.get(ExifTags.Base.Make)} {tags.get(ExifTags.Base.Model)}"
    spherical = abs(aspect - 2) < 0.02 and CAMERAS_360.search(made_by)
    by_apple = positive("CustomRendered") == 6
    if spherical or by_apple or aspect > 2.5 or NO_PINHOLE.search(text):
        raise ValueError(f"{path}: is a panorama, or spherical, or of a fisheye lens, so that its "
                         f"EXIF data have no focal length in pixels. {HOW_FOCAL}")
    taken, now = (positive("ExifImageWidth"), positive("ExifImageHeight")), (width, height)
    if all(taken) and abs(max(taken) / min(taken) / aspect - 1) > 0.01:
        raise ValueError(f"{path}: was taken at {taken[0]:g} x {taken[1]:g} and is {width} x "
                         f"{height}: it was cropped, so the focal length of its EXIF data does not "
                         f"hold. {HOW_FOCAL}")

    units = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # mm
    unit = units.get(int(positive("FocalPlaneResolutionUnit")) or 2)
    focal_mm, density = positive("FocalLength"), positive("FocalPlaneXResolution")
    film_mm, zoom = positive("FocalLengthIn35mmFilm"), positive("DigitalZoomRatio") or 1.0
    zoomed, on_sensor = abs(zoom - 1) > 0.02, focal_mm and density and unit
    if film_mm and not zoomed:
        focal = film_focal(film_mm, width, height)
        return focal, focal, f"EXIF: {film_mm:g} mm on 35 mm film, by the diagonal"
    if film_mm and not on_sensor:
        raise ValueError(f"{path}: was taken at {film_mm:g} mm on 35 mm film, and with a digital "
                         f"zoom of {zoom:g}, which some makers count in and others do not. Give "
                         f"--focal-35mm {film_mm:g} or {film_mm * zoom:g}.")
    if not on_sensor:
        raise ValueError(f"{path}: its EXIF data have no focal length that can be had in pixels. "
                         f"{HOW_FOCAL}")
    resized = zoom * (max(now) / max(taken) if all(taken) else 1.0)
    fx = focal_mm * density / unit * resized
    fy = focal_mm * (positive("FocalPlaneYResolution") or density) / unit * resized
    if turned:  # the tags are about the sensor
        fx, fy = fy, fx
    source = f"EXIF: {focal_mm:g} mm on a sensor of {density / unit:.4g} px/mm"
    return fx, fy, source + f", digital zoom {zoom:g}" * zoomed


def open_photo(path: str, photo_focal: list[float] | None = None, fov: float | None = None,
               film_mm: float | None = None, center: list[float] | None = None) -> Photo:
    """The upright photo and its camera: by its focal length [px] (or fx and fy), its horizontal
    field of view [degrees], its 35 mm equivalent, or its EXIF data. Raises ValueError; it does not
    guess: without the focal length the scale of the answers would mean nothing."""
    if path.endswith(".jsonl"):
        raise ValueError(f"{path}: say which of its records, with --record N (0 is the first).")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such photo.")
    image = render.open_image(path)
    width, height = image.size
    if photo_focal:
        fx, fy, source = photo_focal[0], photo_focal[-1], "--photo-focal"
    elif fov:
        fx = fy = width / 2 / math.tan(math.radians(fov) / 2)
        source = f"--fov {fov:g}"
    elif film_mm:
        fx = fy = film_focal(film_mm, width, height)
        source = f"--focal-35mm {film_mm:g}"
    else:
        fx, fy, source = exif_focal(path)
    cx, cy = center or ((width - 1) / 2, (height - 1) / 2)
    check_inside("--center", cx, cy, width, height)
    intrinsics = (fx, fy, cx, cy, width, height)
    if fault := render.camera_fault(intrinsics):
        raise ValueError(f"{path}: {source}: {fault} {HOW_FOCAL}")
    return Photo(path, image, intrinsics, source)


def open_record(path: str, number: int, image_root: str | None, label_type: str | None) -> Photo:
    """An image of a jsonl, with the record's camera and labels."""
    if not path.endswith(".jsonl"):
        raise ValueError(f"{path}: --record is for a jsonl file; leave it out for a photo.")
    records = render.Records(path, image_root, label_type)
    if number >= len(records):
        raise ValueError(f"--record {number}: {path} has the records 0 to {len(records) - 1}.")
    record = records[number]
    orientation = record.get("orientation")
    image = render.open_image(record["image"], record["intrinsics"][4:], orientation)
    intrinsics, sx, sy = render.match_size(image, record["intrinsics"], record["where"])
    labels = (record["pixel_coords"] + 0.5) * (sx, sy) - 0.5, record["depth"]
    return Photo(record["image"], image, intrinsics, "the record", labels, orientation)


def check_inside(flag: str, x: float, y: float, width: int, height: int) -> None:
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        raise ValueError(f"{flag} {x:g},{y:g}: is outside of the photo; x is 0 to {width - 1}, y "
                         f"to {height - 1}.")


# --------------------------------------------------------------------------------------------------
# queries


def query_pixels(model, checkpoint, photo: Photo, pixels: np.ndarray, batch_size: int,
                 workers: int, decode: str):
    """Query the model about pixels (N, 2) -> yields batches of {"pixel", "pred" [m] or None,
    "text", ...}."""
    record = {"image": photo.path, "intrinsics": photo.intrinsics, "pixel_coords": pixels,
              "depth": np.ones(len(pixels)), "orientation": photo.orientation}
    records = [render.check_record(record, photo.path)]  # a list serves as Records
    pairs = [(0, k) for k in range(len(pixels))]
    remaining = iter(pixels.tolist())
    for _, answers, _ in evaluate.run_queries(model, checkpoint, records, pairs, "distance",
                                              batch_size, workers, decode=decode):
        batch = []
        for answer, pixel in zip(answers, remaining):
            value = render.read_answer(answer)
            possible = value is not None and NEAREST < value < FARTHEST
            batch.append({"pixel": pixel, "pred": value if possible else None, **answer})
        yield batch


def answer_grid(load_model, checkpoint, photo: Photo, pixels: np.ndarray, path: Path,
                batch_size: int, workers: int, decode: str) -> tuple[list[dict], str]:
    """Query the model about all pixels (N, 2) whose answers are not in `path`; they are on disk
    before the next batch begins. -> lines in the order of the pixels, and what a query took."""
    done = {}
    if path.exists():
        with render.blaming(path):
            done = {tuple(line["pixel"]): line for _, line in render.read_jsonl(path, True)
                    if line["pred"] is None or NEAREST < line["pred"] < FARTHEST}
    order = [tuple(pixel) for pixel in pixels.tolist()]
    kept = next((k for k, pixel in enumerate(order) if pixel not in done), len(order))
    if kept == len(order):
        return [done[pixel] for pixel in order], "answered before"
    kept -= kept % batch_size  # the rest is batched as it is without an interruption
    lines = [done[pixel] for pixel in order[:kept]]
    render.write_jsonl(path, lines)
    if kept:
        print(f"{path}: resumes after {kept:,} answers", flush=True)

    model = load_model()
    times = [time.time()]
    bar = tqdm(total=len(order), initial=kept, desc="queries", disable=None, dynamic_ncols=True)
    with open(path, "a") as file, bar:
        for batch in query_pixels(model, checkpoint, photo, pixels[kept:], batch_size, workers,
                                  decode):
            file.write("".join(map(render.json_text, batch)))
            file.flush()
            lines += batch
            times.append(time.time())
            bar.set_postfix(unparsed=sum(line["pred"] is None for line in lines), refresh=False)
            bar.update(len(batch))
            left = len(order) - len(lines)
            if len(times) == 3 and left:  # the first batch includes starting the workers
                seconds = (times[2] - times[1]) / len(batch)
                bar.write(f"{seconds:.3g} s a query, so about {left * seconds / 60:.1f} minutes "
                          "to go", file=sys.stderr)
    return lines, f"{(times[-1] - times[0]) / (len(order) - kept):.3g} s a query"


def print_pixels(lines: list[dict], intrinsics) -> None:
    """--at: Euclidean distance and z of each pixel."""
    for line in lines:
        x, y = line["pixel"]
        if line["pred"] is None:
            print(f"{x:g},{y:g}: no distance in {line['text']!r}")
            continue
        z = line["pred"] / render.ray_length(x, y, intrinsics)
        print(f"{x:g},{y:g}: {line['pred']:.2f} m from the camera, z {z:.2f} m")


# --------------------------------------------------------------------------------------------------
# the cloud


@dataclass
class Cloud:
    """Points on a grid. depth_m (rows, columns) with NaN; keep (rows, columns) bool: those in the
    cloud; pixels (N, 2), xyz (N, 3) [m], colors (N, 3) uint8 and measures (N,) of these:
    confidence, q10, q90, 0 where a greedy answer knows none."""
    depth_m: np.ndarray
    keep: np.ndarray
    pixels: np.ndarray
    xyz: np.ndarray
    colors: np.ndarray
    measures: dict[str, np.ndarray]


def make_cloud(photo: Photo, grid: np.ndarray, lines: list[dict], decode: str,
               min_confidence: float | None, edge_filter: float | None) -> Cloud:
    """Answers on a grid (rows, columns, 2), filtered and unprojected. Raises ValueError if no point
    is left."""
    shape = grid.shape[:2]
    depth_m = np.array([line["pred"] or np.nan for line in lines], np.float32).reshape(shape)
    measures = {}
    if decode == "median":
        measures = {name: np.array([line.get(name, 0.0) for line in lines],
                                   np.float32).reshape(shape)
                    for name in ("confidence", "q10", "q90")}
    keep = np.isfinite(depth_m)
    if min_confidence is not None:
        keep = keep & (measures["confidence"] >= min_confidence)
        if not keep.any():
            raise ValueError(f"--min-confidence {min_confidence:g}: leaves no point; the highest "
                             f"is {measures['confidence'].max():.2f}. Give a lower one.")
    if edge_filter is not None:
        keep = keep & has_neighbour(depth_m, edge_filter)
        if not keep.any():
            raise ValueError(f"--edge-filter {edge_filter:g}: leaves no point. Give a larger "
                             "ratio.")
    pixels = grid[keep]
    xyz = render.unproject(pixels, depth_m[keep], photo.intrinsics).astype(np.float32)
    colors = np.asarray(photo.image)[pixels[:, 1], pixels[:, 0]]
    measures = {name: values[keep] for name, values in measures.items()}
    return Cloud(depth_m, keep, pixels, xyz, colors, measures)


def label_ratios(photo: Photo, depth_m: np.ndarray) -> np.ndarray:
    """Answer / truth at a record's labels (N,), by the grid cell of each; NaN where none is."""
    pixels, true = photo.labels
    rows, columns = depth_m.shape
    cell = (pixels + 0.5) * (columns, rows) // photo.image.size
    x, y = np.clip(cell, 0, (columns - 1, rows - 1)).astype(int).T
    return depth_m[y, x] / true


def label_error(photo: Photo, depth_m: np.ndarray) -> str | None:
    """How the cloud compares with a record's labels."""
    if photo.labels is None:
        return None
    error = np.abs(label_ratios(photo, depth_m) - 1)
    known = np.isfinite(error).sum()
    if not known:
        return None
    return (f"against the record's labels: median error {np.nanmedian(error):.1%} at {known} "
            "points")


def write_ply(file, **columns: np.ndarray) -> None:
    """A binary PLY with one vertex a row: each column (N,) a property, uint8 as uchar, anything
    else as float."""
    kinds = {name: "u1" if column.dtype == np.uint8 else "<f4"
             for name, column in columns.items()}
    vertices = np.empty(len(columns["x"]), list(kinds.items()))
    header = ["ply", "format binary_little_endian 1.0",
              "comment metres; camera axes x right, y down, z forward",
              f"element vertex {len(vertices)}"]
    for name, column in columns.items():
        vertices[name] = column
        kind = "uchar" if kinds[name] == "u1" else "float"
        header.append(f"property {kind} {name}")
    file.write("\n".join([*header, "end_header\n"]).encode())
    file.write(vertices.tobytes())


def write_cloud(out: Path, photo: Photo, cloud: Cloud, drawn: Image.Image) -> None:
    """The files of the cloud, each whole or not at all."""
    x, y, z = cloud.xyz.T
    red, green, blue = cloud.colors.T
    writers = {
        "depth.npy": lambda file: np.save(file, cloud.depth_m),
        "points.npz": lambda file: np.savez(
            file, pixels=cloud.pixels, depth=cloud.depth_m[cloud.keep], xyz=cloud.xyz,
            colors=cloud.colors, intrinsics=photo.intrinsics, **cloud.measures),
        "picture.png": lambda file: drawn.save(file, "PNG"),
        "cloud.ply": lambda file: write_ply(file, x=x, y=y, z=z, red=red, green=green, blue=blue,
                                            **cloud.measures)}
    for name, write in writers.items():
        with render.replacing(out / name) as temporary, open(temporary, "wb") as file:
            write(file)


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
    near, far, length = ticks[0], ticks[-1], height - 13
    bar = colorize(near * (far / near) ** np.linspace(1, 0, length), near, far)
    image.paste(Image.fromarray(np.repeat(bar[:, None], 16, 1)), (8, 6))
    draw = ImageDraw.Draw(image)
    for tick in ticks:
        y = 6 + (1 - math.log(tick / near) / math.log(far / near)) * (length - 1)
        draw.line((24, y, 28, y), "black")
        draw.text((31, y), f"{tick:g}{unit}", "black", anchor="lm", font_size=12)
    return image


def mark_labels(photo: Photo, size, colors: np.ndarray) -> Image.Image:
    """The photo in grey with a dot in its own colour (N, 3) at each label."""
    image = photo.image.resize(size, Image.Resampling.LANCZOS).convert("L").convert("RGB")
    draw = ImageDraw.Draw(image)
    places = (photo.labels[0] + 0.5) * size / photo.image.size - 0.5
    for (x, y), color in zip(places.tolist(), colors.tolist()):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), tuple(color), "black")
    return image


def view_rotation(yaw: float, pitch: float) -> np.ndarray:
    """(3, 3): a view from `yaw` degrees to the right and `pitch` upwards."""
    a, b = math.radians(yaw), math.radians(pitch)
    around = [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]
    above = [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]]
    return np.array(above) @ np.array(around)


def fill_in(photo: Photo, cloud: Cloud, size) -> tuple[np.ndarray, np.ndarray]:
    """The cloud without gaps: points (N, 3) [m] and colours (N, 3), about one a pixel of an image
    of `size` (w, h). Distances are interpolated between neighbours on the grid, except across
    edges."""
    grid = np.where(cloud.keep, cloud.depth_m, np.nan).astype(np.float32)
    size = np.maximum(size, grid.shape[::-1])
    image = Image.fromarray(grid)
    smooth, depth_m = (np.asarray(image.resize(size, method))
                       for method in (Image.Resampling.BILINEAR, Image.Resampling.NEAREST))
    depth_m = np.where(np.abs(smooth / depth_m - 1) < EDGE, smooth, depth_m)
    y, x = np.nonzero(np.isfinite(depth_m))
    pixels = (np.stack([x, y], -1) + 0.5) * photo.image.size / size - 0.5
    colors = np.asarray(photo.image.resize(size, Image.Resampling.BICUBIC))[y, x]
    return render.unproject(pixels, depth_m[y, x], photo.intrinsics), colors


def draw_cloud(xyz: np.ndarray, colors: np.ndarray, size, yaw: float, pitch: float) -> Image.Image:
    """Points (N, 3) as seen from `yaw` degrees to the right and `pitch` upwards (0, 0: as the
    camera did), in parallel projection, 5 px wide; nearer ones hide others. Colours (N, 3) uint8,
    size (w, h)."""
    width, height = size
    turned = xyz @ view_rotation(yaw, pitch).T
    order = np.argsort(-turned[:, 2], kind="stable")  # far to near: what is assigned last, stays
    turned, colors = turned[order], np.repeat(colors[order], 25, 0)
    low, high = np.quantile(turned[:, :2], (0.01, 0.99), 0)  # outliers may leave the frame
    scale = 0.92 * min((width, height) / np.maximum(high - low, 0.01))  # px a metre
    places = np.floor((turned[:, :2] - (low + high) / 2) * scale + np.divide(size, 2))
    offsets = np.mgrid[-2:3, -2:3].reshape(2, 25)
    x, y = (places.clip(-9, 1e5).astype(int).T[:, :, None] + offsets[:, None]).reshape(2, -1)
    inside = (0 <= x) & (x < width) & (0 <= y) & (y < height)
    canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
    canvas[y[inside], x[inside]] = colors[inside]
    return Image.fromarray(canvas)


def draw_picture(photo: Photo, cloud: Cloud, note: str) -> Image.Image:
    """The photo, the answers and, where there are labels, the truth and the error, in colours with
    a legend; the cloud from two sides; a note below."""
    size = [max(round(n * PANEL / max(photo.image.size)), 160) for n in photo.image.size]
    ticks = render.round_ticks(*np.nanquantile(cloud.depth_m, (0.01, 0.99)), log=True)
    depth = Image.fromarray(colorize(cloud.depth_m, ticks[0], ticks[-1]))
    xyz, colors = fill_in(photo, cloud, size)
    low = xyz[:, 1] > 0
    if low.mean() <= 0.2:
        low = np.ones_like(low)
    above = [(photo.image.resize(size, Image.Resampling.LANCZOS), "Photo"),
             (depth.resize(size, Image.Resampling.NEAREST), "Answers: Euclidean distance")]
    below = [(draw_cloud(xyz, colors, size, 30, 20), "The cloud from the upper right"),
             (draw_cloud(xyz[low], colors[low], size, 0, 45),
              "From above, without what is higher than the camera")]
    legends = [legend(size[1], ticks, " m")]
    if photo.labels:
        ratios = label_ratios(photo, cloud.depth_m)
        true = colorize(photo.labels[1], ticks[0], ticks[-1])
        above.append((mark_labels(photo, size, true), "Truth at the labels"))
        below.append((mark_labels(photo, size, colorize(ratios, 0.5, 2)), "Answer / truth"))
        legends.append(legend(size[1], RATIOS, ""))
    tiles = [render.captioned(*tile) for tile in above + below]
    tiles.insert(len(above), legends[0])
    picture = render.sheet(tiles + legends[1:], len(above) * (size[0] + render.GAP) + 90)
    return render.captioned(picture, note)


# --------------------------------------------------------------------------------------------------


def pixel(text: str) -> tuple[float, float]:
    """An argparse type: X,Y."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no pixel; give x,y") from None
    return x, y


def parse_args(argv=None) -> argparse.Namespace:
    parser = render.make_parser(__doc__)
    parser.add_argument("checkpoint", help="model folder or hub name")
    parser.add_argument("photo", type=file_path, help="an image; or a jsonl file, with --record")

    flag = parser.add_argument_group("files").add_argument
    flag("--out", type=file_path, help="folder of the results; default: out/<photo name>")
    flag("--overwrite", action="store_true", help="drop the answers that are in --out")
    flag("--record", type=NATURAL, metavar="N",
         help="this record of the jsonl (0 is the first), with its camera; default: a photo")
    render.add_record_flags(flag)

    camera = parser.add_argument_group("the photo's camera (default: its EXIF data)")
    flag = camera.add_mutually_exclusive_group().add_argument
    flag("--photo-focal", type=POSITIVE, nargs="+", metavar="PX",
         help="its focal length, px; or fx fy")
    flag("--fov", type=number(float, 1, 160), metavar="DEGREES", help="horizontal field of view")
    flag("--focal-35mm", type=POSITIVE, metavar="MM", help="35 mm equivalent focal length")
    camera.add_argument("--center", type=float, nargs=2, metavar=("CX", "CY"),
                        help="principal point, px; default: the photo's centre")

    flag = parser.add_argument_group("queries").add_argument
    flag("--points", type=COUNT, default=NUM_POINTS,
         help="queries, as nearly as an even grid allows (Sec. 4)")
    flag("--at", type=pixel, nargs="+", metavar="X,Y",
         help="print the distance of these pixels, and make no cloud; default: a cloud")
    flag("--edge-filter", type=POSITIVE, metavar="R",
         help="leave out of the cloud what differs by more than the ratio R (such as 0.1) from all "
         "four neighbours on the grid; default: keep all")
    flag("--min-confidence", type=SHARE, metavar="P",
         help="leave points out of which the model puts less than P of its probability within "
         "25 %% of the median; needs --decode median; default: keep all")
    render.add_settings_flags(parser)
    evaluate.add_decoding_flags(parser.add_argument_group("decoding, system").add_argument)
    args = parser.parse_args(argv)
    if args.min_confidence is not None and args.decode != "median":
        parser.error("--min-confidence: needs --decode median; greedy answers have no confidence")
    if args.photo_focal and len(args.photo_focal) > 2:
        parser.error("--photo-focal: needs one number of pixels, or two (fx and fy)")
    if args.record is not None and (args.photo_focal or args.fov or args.focal_35mm or args.center):
        parser.error("--record brings its own camera: leave --photo-focal, --fov, --focal-35mm and "
                     "--center out")
    return args


def run(args: argparse.Namespace, out: Path, photo: Photo, checkpoint, device, dtype) -> None:
    """Query the grid, or read what was answered before, and write all files."""
    width, height = photo.image.size
    grid = pixel_grid(width, height, args.points)
    rows, columns = grid.shape[:2]
    print(f"{columns} x {rows} = {rows * columns:,} queries on an even grid ({args.points:,} were "
          f"wanted), one every {width / columns:.3g} x {height / rows:.3g} px", flush=True)
    inputs = {"weights": evaluate.weights_hash(checkpoint), "settings": checkpoint.settings,
              "dtype": str(dtype), "decode": args.decode, "grid": grid.shape[:2],
              "image": evaluate.file_hash(photo.path), "intrinsics": photo.intrinsics}
    evaluate.claim(out, args, inputs, (ANSWERS, *FILES))

    lines, cost = answer_grid(lambda: evaluate.load_model(checkpoint, device, dtype), checkpoint,
                              photo, grid.reshape(-1, 2), out / ANSWERS, args.batch_size,
                              args.workers, args.decode)
    unparsed = sum(line["pred"] is None for line in lines)
    truncated = sum("truncated" in line for line in lines)
    cut = f"{truncated:,} cut by the token limit, " if truncated else ""
    if unparsed == len(lines):
        (out / ANSWERS).unlink()
        raise ValueError(f"{checkpoint.name}: none of its {len(lines):,} answers is a distance "
                         f"(the first: {lines[0]['text']!r}). Was it trained for the prompt "
                         f"'{checkpoint.settings['prompt']}'?")
    cloud = make_cloud(photo, grid, lines, args.decode, args.min_confidence, args.edge_filter)
    fx, fy = photo.intrinsics[:2]
    note = (f"{len(cloud.xyz):,} points, {unparsed:,} of {len(lines):,} answers were no distance, "
            f"{cut}focal {fx:.1f} {fy:.1f} px ({photo.source})")
    write_cloud(out, photo, cloud, draw_picture(photo, cloud, note))
    print(f"{note}; {cost}")
    if (error := label_error(photo, cloud.depth_m)):
        print(error)
    print(", ".join(str(out / name) for name in FILES))


@render.command
def main(argv=None) -> None:
    args = parse_args(argv)
    if args.record is None:
        photo = open_photo(args.photo, args.photo_focal, args.fov, args.focal_35mm, args.center)
        name = Path(args.photo).stem
    else:
        photo = open_record(args.photo, args.record, args.image_root, args.label_type)
        name = f"{evaluate.dataset_names([args.photo])[0]}-{args.record}"
    width, height = photo.image.size
    fx, fy, cx, cy = photo.intrinsics[:4]
    print(f"{photo.path}: {width} x {height} px, focal {fx:.1f} {fy:.1f} px ({photo.source}), "
          f"center {cx:g} {cy:g}", flush=True)
    for x, y in args.at or ():
        check_inside("--at", x, y, width, height)

    checkpoint = render.open_checkpoint(args.checkpoint, render.settings_from_flags(args))
    device = evaluate.pick_device(args.device)
    dtype = evaluate.pick_dtype(args.dtype, device)
    if not args.at:
        out = Path(args.out or Path("out") / name)
        with render.lock_folder(out):
            return run(args, out, photo, checkpoint, device, dtype)
    model = evaluate.load_model(checkpoint, device, dtype)
    batches = query_pixels(model, checkpoint, photo, np.array(args.at), args.batch_size, 0,
                           args.decode)
    lines = [line for batch in batches for line in batch]
    print_pixels(lines, photo.intrinsics)
    if all(line["pred"] is None for line in lines):
        raise ValueError(f"{checkpoint.name}: none of its answers is a distance. Was it trained "
                         f"for the prompt '{checkpoint.settings['prompt']}'?")


if __name__ == "__main__":
    main()
