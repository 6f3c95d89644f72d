"""
Raw dataset -> one jsonl of labelled pixels, the only form of data that the other scripts know.

    python prepare.py --dataset toy                  # procedural rooms, half a minute, no download
    python prepare.py --dataset ibims1 --download    # fetch, unpack, prepare
    python prepare.py --dataset nuscenes --root /data/nuscenes --workers 16
    python prepare.py --dataset hm3d --root /data/omnidata --shard 3/8  # machine 3 of 8
    python prepare.py --dataset folder --root my_room --name home     # README, "Your own data"
    python prepare.py --dataset folder --root my_room --verify        # are depth and poses right?
    python prepare.py --check data/*/*.jsonl         # table and faults

Reads a dataset as its authors distribute it (--root), or nothing at all (--dataset toy).
Writes data/<name>/<split>.jsonl, one image a line: {"image", "intrinsics": [fx, fy, cx, cy, w, h],
"pixel_coords": [[x, y], ...], "depth": [metres, ...]} and, where known, "scene", "camera", "time"
[s], "pose" (camera-to-world, 4 x 4 row-major, OpenCV axes); <split>.idx (byte offsets of the
lines); <split>.run.json (flags, versions, progress); rgb/ with the images that cannot be used as
they are (toy, Waymo, ETH3D). Depth is the Euclidean distance from the camera centre; pixel (0, 0)
is the centre of the first pixel.

Give the same command again to resume an interrupted run. Exit code of --check: 1 if there are
faults. After preparing, the same check only warns: whether its findings matter is for you to judge.
Paper: Sec. 4 (DepthLMBench) and App. A.2. Deviations are marked by comments: "# paper:".
"""
import argparse
import csv
import errno
import hashlib
import io
import math
import os
import re
import shlex
import shutil
import sys
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from http.client import HTTPException
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

import render
from render import COUNT, NATURAL, POSITIVE, file_path, ray_length, read_json, replacing, write_json

MIN_POINTS = 10  # an image with fewer labelled pixels is left out
BAD_SHARE = 0.01  # more unreadable images than this are a warning
BOTH = ("train", "val")
MAPS = ("z", "euclidean")


class Frame(NamedTuple):
    """One image as a reader lists it, small enough to be sent to a worker. There, load(frame) fills
    in what only the files can tell, above all the depth."""
    id: str  # unique in the dataset; with --seed it decides which pixels are drawn
    image: Path  # the raw image; if load makes `pixels`, where to put them below the output folder
    load: Callable  # Frame -> Frame
    intrinsics: tuple = ()  # fx, fy, cx, cy [px], and w, h if the image must have that size
    scene: str | None = None
    camera: str | None = None
    time: float | None = None  # [s]
    pose: np.ndarray | None = None  # (4, 4) camera-to-world, OpenCV axes
    kind: str = "z"  # what depth holds: a map (H, W) of "z" or "euclidean"; or points (N, 4) of
    # x, y [px], Euclidean, z [m]: "points", or "lidar", where some hide others
    depth: np.ndarray | None = None
    scale: float = 1  # numbers of the depth file per metre
    centre: float = 0.5  # where the place that was measured is in a pixel of a smaller depth map
    notes: tuple = ()  # (what the user should know, how often)
    pixels: Image.Image | None = None


# --------------------------------------------------------------------------------------------------
# geometry: matrices are 4 x 4, named target_from_source or, if camera-to-world, pose

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # of a pose: y up, looking along -z


def matrix(values):
    """16 numbers, row-major -> (4, 4)."""
    return np.asarray(values, np.float64).reshape(4, 4)


def transform(quaternion, translation):
    """(4, 4) of a quaternion w, x, y, z (any length; all zero: no rotation) and a translation."""
    w, *axis = np.asarray(quaternion) / (np.linalg.norm(quaternion) or 1)
    turn = np.cross(np.eye(3), axis)  # turn @ p = axis x p
    m = np.eye(4)
    m[:3, :3] += 2 * w * turn + 2 * turn @ turn
    m[:3, 3] = translation
    return m


def rotations(axis, angles):
    """About a unit axis by N angles [rad] -> (N, 3, 3)."""
    turn = np.cross(np.eye(3), axis)
    angles = np.asarray(angles)[..., None, None]
    return np.eye(3) + np.sin(angles) * turn + (1 - np.cos(angles)) * (turn @ turn)


def euler(roll, pitch, yaw):
    """Rz(yaw) Ry(pitch) Rx(roll) -> (N, 3, 3)."""
    x, y, z = np.eye(3)
    return rotations(z, yaw) @ rotations(y, pitch) @ rotations(x, roll)


def move(target_from_source, points):
    """Points (N, 3) in another coordinate system."""
    return points @ target_from_source[:3, :3].T + target_from_source[:3, 3]


def project(points, intrinsics):
    """Camera points (N, 3) -> (M, 4) of x, y [px], Euclidean depth, z [m] of those in front."""
    fx, fy, cx, cy = intrinsics[:4]
    x, y, z = points[points[:, 2] > 0].T
    distance = np.sqrt(x * x + y * y + z * z)
    return np.stack([fx * x / z + cx, fy * y / z + cy, distance, z], 1)


def visible(cloud, fx):
    """The points (N, 4) in an image that no nearer surface hides: a LiDAR stands above the cameras
    and sees over what they meet. In cells of 8 px (at f = 1000) nothing may lie further than 1.1 x
    + 0.5 m behind the nearest point of the 3 x 3 cells around."""
    x, y = (np.floor(cloud[:, :2] / (8 * fx / 1000)).astype(int) + 1).T
    nearest = np.full((x.max(initial=0) + 2, y.max(initial=0) + 2), np.inf)
    np.minimum.at(nearest, (x, y), cloud[:, 2])
    around = [nearest[x + i, y + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return cloud[cloud[:, 2] <= 1.1 * np.min(around, 0) + 0.5]


def distort(x, y, k1, k2, p1, p2, k3, k4=0, sx=0, sy=0):
    """Brown-Conrady in OpenCV's order, normalised coordinates: pinhole -> distorted."""
    q = x * x + y * y
    radial = 1 + q * (k1 + q * (k2 + q * (k3 + q * k4)))
    return (
        x * radial + 2 * p1 * x * y + p2 * (q + 2 * x * x) + sx * q,
        y * radial + 2 * p2 * x * y + p1 * (q + 2 * y * y) + sy * q,
    )


def distort_fisheye(x, y, *lens):
    """COLMAP's THIN_PRISM_FISHEYE: the same on angles."""
    r = np.sqrt(x * x + y * y) + 1e-12
    return distort(x * np.arctan(r) / r, y * np.arctan(r) / r, *lens)


def undistort(distort, x, y, *lens):
    """The inverse of distort(u, v, *lens), by Newton with slopes from differences: in the corners
    of an image a fixed-point iteration diverges."""
    u, v, h = x, y, 1e-6
    for _ in range(6):
        a, b = here = distort(u, v, *lens)
        au, bu = np.subtract(distort(u + h, v, *lens), here) / h
        av, bv = np.subtract(distort(u, v + h, *lens), here) / h
        det = au * bv - av * bu
        du = (bv * (x - a) - av * (y - b)) / det
        dv = (au * (y - b) - bu * (x - a)) / det
        u, v = u + du, v + dv
    return u, v


def remap(image, size, source):
    """Resample bilinearly to `size`: source(x, y) says where the output point (x, y) lies in
    `image`, both counted from the corner of the first pixel. It is evaluated on a grid of 16 px and
    interpolated between."""
    xs, ys = ([*range(0, n, 16), n] for n in size)
    at = np.stack(source(*np.meshgrid(xs, ys)), -1)  # (rows, columns, 2)
    mesh = []
    for j, i in np.ndindex(len(ys) - 1, len(xs) - 1):
        box = xs[i], ys[j], xs[i + 1], ys[j + 1]
        corners = at[[j, j + 1, j + 1, j], [i, i, i + 1, i + 1]]
        mesh.append((box, corners.ravel().tolist()))
    return image.transform(size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


# --------------------------------------------------------------------------------------------------
# files


def reason(error, about=""):
    """What went wrong, with the name of what it is about."""
    text = str(error) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{error} is missing"
    elif isinstance(error, ModuleNotFoundError):
        text = f"{error}: pip install {error.name}"
    return text if str(about) in text else f"{about}: {text}"


@contextmanager
def naming(path):
    """Whatever goes wrong with a file becomes a ValueError that names it."""
    try:
        if Path(path).is_fifo():
            raise ValueError("is a pipe, no file")
        yield
    except Exception as error:  # readers of damaged files raise whatever they like
        raise ValueError(reason(error, path)) from error


def read_text(path):
    with naming(path):
        return path.read_text()


def read_image(path):
    """The stored pixels, (H, W) or (H, W, channels)."""
    if not os.path.isfile(path):
        raise ValueError("no such file")
    with render.image_file(path) as file:
        return np.asarray(render.stored_pixels(file))


# numbers that mean "no return" in depth files: the largest of a type, also of float16
NOTHING = [np.iinfo(kind).max for kind in (np.int16, np.uint16, np.int32, np.uint32)] + [65504]


def load_map(path, scale, frame):
    """A depth file: 16-bit grey PNG, TIFF, .npy or .npz -> the frame with its depth."""
    with naming(path):
        raw = np.load(path) if path.suffix in (".npy", ".npz") else read_image(path)
        if path.suffix == ".npz":
            (raw,) = raw.values()
        return add_depth(raw, scale, frame)


def add_depth(raw, scale, frame):
    """-> the frame with a depth map (H, W): float32 metres at `scale` numbers a metre (None: a
    floating-point file holds metres, one of integers millimetres), 0 where it says that there is
    nothing. Of points (N, 3 or more) in camera axes: with their cloud."""
    raw = raw.squeeze() if raw.ndim > 2 else raw
    if raw.ndim != 2 or raw.dtype.kind not in "fiu" or raw.dtype.itemsize == 1:
        raise ValueError(f"has no number of 16 bits or more a pixel: {raw.shape} of {raw.dtype}. "
                         "Save depth as 16-bit PNG, TIFF of floats or .npy.")
    if 2 < raw.shape[1] < 16:  # no map is that narrow: LiDAR points
        points = raw[:, :3].astype(np.float64) / (scale or 1)
        return frame._replace(depth=project(points, frame.intrinsics), kind="lidar")
    notes = frame.notes
    if scale is None:
        scale, unit = (1, "metres") if raw.dtype.kind == "f" else (1000, "millimetres")
        notes += ((f"depth files of {raw.dtype} are taken as {unit}: no --depth-scale", 1),)

    number = raw.astype(np.float64)
    nothing = ~((number > 0) & (number < 1e9)) | np.isin(number, NOTHING)
    nothing |= np.isin(np.round(number * 1000), NOTHING)  # converted to metres
    metres = raw.astype(np.float32) / np.float32(scale)
    metres[nothing] = 0
    notes += (("depth pixels hold nothing: 0, negative, NaN, infinite, or the largest number of "
               "their type, such as 65535", int(nothing.sum())),)
    return frame._replace(depth=metres, scale=scale, notes=notes)


def image_size(path):
    """Stored (w, h) and EXIF orientation of an image. Raises ValueError if it is cut off, as files
    of a half-extracted archive are."""
    with render.image_file(path) as image, open(path, "rb") as file:
        orientation = render.exif_orientation(image)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
        end = b"IEND\xaeB`\x82" if image.format == "PNG" else b"\xff\xd9"
        whole = file.read().rstrip(b"\0").endswith(end)
        if whole and image.format in ("JPEG", "MPO", "PNG"):
            return image.size, orientation
        # cut, or unusual at the end: only decoding can tell
        size = render.stored_pixels(image).size
        for number in range(1, getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
        return size, orientation


def read_feather(path):
    """Column name -> array. Needs pip install pyarrow, as does Waymo."""
    with naming(path):
        from pyarrow import feather
        table = feather.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}


def read_sweep(path):
    """LiDAR points (N, 3) of Argoverse2 (.feather), nuScenes (.bin) or DDAD (.npz)."""
    with naming(path):
        if path.suffix == ".feather":
            columns = read_feather(path)
            points = np.stack([columns[axis] for axis in "xyz"], 1)
        elif path.suffix == ".bin":
            points = np.fromfile(path, np.float32).reshape(-1, 5)
        else:
            points = np.load(path)["data"]
        return points[:, :3].astype(np.float64)


SYSTEM_NAMES = ("thumbs.db, ehthumbs.db, desktop.ini, icon\r, __macosx, @eadir, @tmp, @recycle, "
                "#recycle, #snapshot, $recycle.bin, recycler, lost+found, "
                "system volume information").split(", ")


def is_data(name):
    """Whether a file or folder belongs to the data, rather than to macOS, Windows, a NAS or an
    editor."""
    name = name.lower()
    own = name.startswith((".", "~")) or name.endswith(("~", ".tmp", ".aae", ":zone.identifier"))
    return not (own or name in SYSTEM_NAMES)


def listed(folder, pattern="*"):
    """Sorted paths in a folder that fit a glob pattern and are data."""
    return sorted(path for path in folder.glob(pattern)
                  if all(map(is_data, path.relative_to(folder).parts)))


def stems(path, ending):
    """Names of the files in a folder that end so, without the ending, sorted."""
    names = filter(is_data, os.listdir(path))
    return sorted(name.removesuffix(ending) for name in names if name.endswith(ending))


def only_file(path):
    found = listed(path)
    if len(found) != 1:
        raise ValueError(f"{path}: holds {len(found)} files instead of one.")
    return found[0]


def parse_intrinsics(text):
    """fx fy cx cy or a matrix (3 x 3, 4 x 4), with spaces or commas -> [fx, fy, cx, cy]."""
    k = [float(word) for word in text.replace(",", " ").split()]
    if len(k) == 16:
        k = matrix(k)[:3, :3].ravel().tolist()
    if len(k) == 9:
        cx, cy = (k[2], k[5]) if k[2] else k[6:8]  # row by row, or column by column
        k = [k[0], k[4], cx, cy]
    if len(k) != 4:
        raise ValueError(f"intrinsics of {len(k)} numbers: need fx fy cx cy, or a 3 x 3 matrix.")
    return k


def read_intrinsics(path):
    with naming(path):
        return parse_intrinsics(read_text(path))


# --------------------------------------------------------------------------------------------------
# readers: (root, split, flags of the dataset) -> its frames in a fixed order. They list and pair
# files; workers open these and call the frame's load_..., which says in what form the depth is.


def refuse(why, frame):
    raise ValueError(why)


def one_by_one(scenes, frames):
    """frames(scene) of each scene. One that cannot be listed gives a frame that cannot be loaded,
    so that it is counted and named, and the others are prepared."""
    for scene in scenes:
        try:
            yield from frames(scene)
        except Exception as error:  # as in naming
            yield Frame(str(scene), "", partial(refuse, reason(error)))


def with_10_for_val(split, train, val):
    """The scenes of a split if the first 10 of the authors' val are evaluated on, and all others
    trained on."""
    held_out = val[:10]
    return held_out if split == "val" else [s for s in train + val if s not in held_out]


def load_lidar(path, world_from_lidar, frame):
    """A point cloud, moved into the camera at the time of the image."""
    camera_from_lidar = np.linalg.inv(frame.pose) @ world_from_lidar
    points = move(camera_from_lidar, read_sweep(path))
    return frame._replace(depth=project(points, frame.intrinsics), kind="lidar")


# ---- Argoverse2

LIDAR_WINDOW = 51_000_000  # [ns] between an image and its sweep: half a turn + 1 ms


def frames_argoverse2(root, split):
    """One image per ring camera and sweep: 850 logs x 157 sweeps x 7 cameras, the paper's 1 M.

    {train,val}/<log>/calibration/{intrinsics,egovehicle_SE3_sensor}.feather
    {train,val}/<log>/city_SE3_egovehicle.feather         pose of the car
    {train,val}/<log>/sensors/cameras/<camera>/<ns>.jpg   undistorted
    {train,val}/<log>/sensors/lidar/<ns>.feather          in the car's frame at that time"""
    # paper: it holds out "around 10 scenes" without naming them; here the first 10 logs of val
    logs = with_10_for_val(split, *(listed(root / name, "*/") for name in BOTH))
    return one_by_one(logs, argoverse2_log)


def argoverse2_log(folder):
    """Points go through the city to the camera at the image's time."""
    cameras = read_feather(folder / "calibration/intrinsics.feather")
    car_from = argoverse2_poses(folder / "calibration/egovehicle_SE3_sensor.feather", "sensor_name")
    city_from_car = argoverse2_poses(folder / "city_SE3_egovehicle.feather", "timestamp_ns")
    sweeps = np.array(stems(folder / "sensors/lidar", ".feather"), int)

    columns = "sensor_name fx_px fy_px cx_px cy_px width_px height_px".split()
    for camera, *intrinsics in zip(*(cameras[name] for name in columns)):
        images = folder / f"sensors/cameras/{camera}"
        if not (camera.startswith("ring_") and camera in car_from and images.is_dir()):
            continue
        stamps = map(int, stems(images, ".jpg"))
        for sweep, stamp in nearest_in_time(sweeps, stamps, LIDAR_WINDOW).items():
            if not {sweep, stamp} <= city_from_car.keys():
                continue  # there is no way from the sweep to the image
            sweep_path = folder / f"sensors/lidar/{sweep}.feather"
            yield Frame(
                f"{folder.name}/{camera}/{stamp}",
                images / f"{stamp}.jpg",
                partial(load_lidar, sweep_path, city_from_car[sweep]),
                intrinsics,
                folder.name,
                camera,
                stamp / 1e9,
                city_from_car[stamp] @ car_from[camera],
            )


def argoverse2_poses(path, key):
    """The transform of each row of a table, by its sensor's name or time [ns]."""
    table = read_feather(path)
    columns = [table[name] for name in "qw qx qy qz tx_m ty_m tz_m".split()]
    return {name: transform(row[:4], row[4:]) for name, *row in zip(table[key], *columns)}


def nearest_in_time(times, others, window):
    """{time: that of `others` which is nearest to it}, of the pairs within a window; none is in
    two."""
    times, nearest = np.asarray(times), {}
    for other in others if len(times) else ():
        time = times[np.abs(times - other).argmin()].item()
        gap = abs(time - other)
        if gap <= window and gap < abs(time - nearest.get(time, math.inf)):
            nearest[time] = other
    return nearest


# ---- Waymo

WAYMO_CAMERAS = "FRONT FRONT_LEFT FRONT_RIGHT SIDE_LEFT SIDE_RIGHT".split()  # camera_name 1-5
WAYMO_TOP = 1  # laser_name of the roof LiDAR, the only one with a pose for each range-image cell
WAYMO_LENS = "f_u f_v c_u c_v k1 k2 p1 p2 k3".split()
WAYMO_FROM_OPENCV = matrix([0, 0, 1, 0, -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 1])  # x ahead, z up


def frames_waymo(root, split):
    """All images of all segments. They are stored in parquet files: undistorted copies go
    to rgb/<segment>/.

    training/<component>/<segment>.parquet   the components are named in DATASETS"""
    folder = root / "training"

    def frames(segment):
        rows, _ = waymo_table(folder / f"camera_image/{segment}.parquet")
        for stamp, camera in rows:
            name = WAYMO_CAMERAS[camera - 1]
            yield Frame(
                f"{segment}/{stamp}/{name}",
                f"rgb/{segment}/{stamp}_{name}.jpg",
                partial(load_waymo, (folder, segment, stamp), camera),
                scene=segment,
                camera=name,
                time=stamp / 1e6,
            )

    return one_by_one(stems(folder / "camera_image", ".parquet"), frames)


def load_waymo(place, camera, frame):
    """Undistort the JPEG. Labels are where the projection table says (it knows the rolling shutter)
    and move with the pixels; their distance is from the camera at the image's own time."""
    # paper: the released script moves labels by the map of the opposite direction (up to 400 px)
    # and drops four LiDARs
    image = waymo_row(place, "camera_image", camera)
    calibration = waymo_row(place, "camera_calibration", camera)
    fx, fy, cx, cy, *lens = (calibration[f"intrinsic.{name}"] for name in WAYMO_LENS)
    vehicle_from_camera = matrix(calibration["extrinsic.transform"]) @ WAYMO_FROM_OPENCV
    pose = matrix(image["pose.transform"]) @ vehicle_from_camera

    points, seen = waymo_points(place)
    first, second = seen[:, 0] == camera, seen[:, 3] == camera
    pixel = np.where(first[:, None], seen[:, 1:3], seen[:, 4:6])
    a, b = ((np.floor(pixel) + 0.5 - (cx, cy)) / (fx, fy))[first | second].T
    x, y = undistort(distort, a, b, *lens)
    points = move(np.linalg.inv(pose), points[first | second])
    distance, z = np.linalg.norm(points, axis=1), points[:, 2]
    cloud = np.stack([fx * x + cx - 0.5, fy * y + cy - 0.5, distance, z], 1)
    # where the lens moves a pixel by a fifth of its radius, the polynomial describes no lens
    sound = np.hypot(a - x, b - y) <= 0.2 * np.hypot(x, y)

    def source(u, v):
        a, b = distort((u - cx) / fx, (v - cy) / fy, *lens)
        return fx * a + cx, fy * b + cy

    with render.image_file(frame.id, io.BytesIO(image["image"])) as file:
        jpeg = file.convert("RGB")
    return frame._replace(
        pixels=remap(jpeg, jpeg.size, source),
        intrinsics=(fx, fy, cx - 0.5, cy - 0.5),
        pose=pose,
        depth=cloud[sound & (z > 0)],
        kind="lidar",
    )


@lru_cache(maxsize=2)  # the cameras of a frame share them
def waymo_points(place):
    """All LiDARs of a frame -> world points (N, 3), and the table (N, 6) of the camera, x, y (each
    twice) that see them."""
    vehicle_pose = waymo_row(place, "vehicle_pose", 0)["world_from_vehicle.transform"]
    points, seen = [], []
    for laser in range(1, 6):
        cells = waymo_grid(place, "lidar", laser)
        table = waymo_grid(place, "lidar_camera_projection", laser)
        if cells is None:
            continue
        returned, in_image = cells[..., 0] > 0, (table[..., [0, 3]] > 0).any(-1)
        i, j = np.nonzero(returned & in_image)
        vehicle = waymo_vehicle_points(place, laser, cells, i, j)
        poses = waymo_grid(place, "lidar_pose", laser) if laser == WAYMO_TOP else None
        if poses is None:
            points.append(move(matrix(vehicle_pose), vehicle))
        else:  # the car moves while the roof LiDAR turns
            turned = np.einsum("nij,nj->ni", euler(*poses[i, j, :3].T), vehicle)
            points.append(turned + poses[i, j, 3:])
        seen.append(table[i, j])
    if not points:
        raise ValueError(f"no range image of {place[1:]}")
    return np.concatenate(points), np.concatenate(seen)


def waymo_vehicle_points(place, laser, cells, i, j):
    """Cells (i, j) of a range image (H, W, channels) -> points (N, 3) in the vehicle."""
    calibration = waymo_row(place, "lidar_calibration", laser)
    extrinsic = matrix(calibration["extrinsic.transform"])
    height, width = cells.shape[:2]
    beams = calibration["beam_inclination.values"]
    if beams is None or not len(beams):
        low, high = (calibration[f"beam_inclination.{end}"] for end in ("min", "max"))
        beams = low + (np.arange(height) + 0.5) / height * (high - low)

    up = beams[::-1][i]  # row 0 is the highest beam
    around = (2 * (width - j - 0.5) / width - 1) * np.pi
    around = around - math.atan2(extrinsic[1, 0], extrinsic[0, 0])
    rays = [np.cos(around) * np.cos(up), np.sin(around) * np.cos(up), np.sin(up)]
    return move(extrinsic, np.stack(rays, 1) * cells[i, j, :1])


def waymo_grid(place, component, laser):
    """A range image (H, W, channels) of the first return, or None."""
    row = waymo_row(place, component, laser)
    if row:
        shape = row["range_image_return1.shape"].astype(int)
        return row["range_image_return1.values"].reshape(shape)
    return None


def waymo_row(place, component, sensor):
    """The row of a sensor in a component at a place (folder, segment, timestamp): its values by
    name; None if there is none."""
    folder, segment, stamp = place
    rows, read = waymo_table(folder / component / f"{segment}.parquet")
    row = rows.get((0 if "calibration" in component else stamp, sensor))
    return None if row is None else read(row)


@lru_cache(maxsize=16)
def waymo_table(path):
    """-> {(timestamp, sensor): row number}, where 0 stands for a key that the component lacks, and
    a function row number -> row. It reads forward, row by row: the lidar and image files of a
    segment are gigabytes when unpacked."""
    with naming(path):
        from pyarrow import parquet
        file = parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if "return2" not in name]
        keys = file.read([name for name in names if name.startswith("key.")]).to_pydict()
    none = [0] * file.metadata.num_rows
    stamps = keys.get("key.frame_timestamp_micros", none)
    sensors = keys.get("key.camera_name", keys.get("key.laser_name", none))
    rows = {key: row for row, key in enumerate(zip(stamps, sensors))}
    following, batches = math.inf, None

    def read(row):
        nonlocal following, batches
        if row < following:
            following, batches = 0, file.iter_batches(1, columns=names)
        batch = next(islice(batches, row - following, None))
        following = row + 1
        values = {}
        for name, column in zip(batch.schema.names, batch.columns):
            # [LiDARComponent].range_image_return1.values -> range_image_return1.values
            name = name.rpartition("].")[2]
            array = getattr(column[0], "values", None)
            values[name] = column[0].as_py() if array is None else np.asarray(array, np.float64)
        return values

    return rows, read


# ---- nuScenes

# paper: it evaluates on the last 5 % of the mini samples (one scene); here on all scenes of
# v1.0-mini, wherever they are
NUSCENES_VAL = "0061 0103 0553 0655 0757 0796 0916 1077 1094 1100".split()


def frames_nuscenes(root, split):
    """Key frames. LiDAR -> car -> world at the sweep's time, world -> car -> camera at the image's
    time. A token that is in no table costs its image.

    v1.0-{trainval,mini}/{scene,sample,sample_data,...}.json   tables
    samples/CAM_*/*.jpg, samples/LIDAR_TOP/*.pcd.bin"""
    versions = [v for v in ("v1.0-trainval", "v1.0-mini") if (root / v).is_dir()]
    if not versions:
        raise ValueError(f"{root}: has neither v1.0-trainval nor v1.0-mini. Extract the metadata "
                         "archive there, too.")
    tables = nuscenes_tables(root / versions[-1 if split == "val" else 0])

    def look_up(table, row):
        return tables[table][row[f"{table}_token"]]

    def pose(row):
        car, sensor = look_up("ego_pose", row), look_up("calibrated_sensor", row)
        world_from_car = transform(car["rotation"], car["translation"])
        return world_from_car @ transform(sensor["rotation"], sensor["translation"])

    def frames(filename):
        row = tables["image"][filename]
        scene = look_up("scene", look_up("sample", row))["name"]
        if (scene.removeprefix("scene-") in NUSCENES_VAL) != (split == "val"):
            return
        sweep = tables["sweep"][row["sample_token"]]
        camera = look_up("calibrated_sensor", row)
        (fx, _, cx), (_, fy, cy), _ = camera["camera_intrinsic"]
        yield Frame(
            row["token"],
            root / filename,
            partial(load_lidar, root / sweep["filename"], pose(sweep)),
            (fx, fy, cx, cy, row["width"], row["height"]),
            scene,
            look_up("sensor", camera)["channel"],
            row["timestamp"] / 1e6,
            pose(row),
        )

    return one_by_one(tables["image"], frames)


@lru_cache(maxsize=1)  # both splits read the same
def nuscenes_tables(folder):
    """Rows by token, all in memory as in the devkit (5 GB for trainval); and of key frames,
    "image" by file name, in the order of time, and "sweep" by its sample's token."""
    tables = {
        name: {row["token"]: row for row in read_json(folder / f"{name}.json", list)}
        for name in "scene sample sensor calibrated_sensor ego_pose".split()
    }
    data = read_json(folder / "sample_data.json", list)
    data = {row["filename"]: row for row in data if row["is_key_frame"]}
    in_time = sorted(data, key=lambda name: (data[name]["timestamp"], name))
    tables["image"] = {name: data[name] for name in in_time if "/CAM" in name}
    sweeps = (data[name] for name in data if "/LIDAR_TOP/" in name)
    tables["sweep"] = {row["sample_token"]: row for row in sweeps}
    return tables


# ---- ScanNet++

SCANNETPP_EVERY = 10  # the paper uses 1 M of 10 M video frames


def frames_scannetpp(root, split, stride):
    """Frames of the iPhone stream; stride counts video frames (60 a second).

    splits/nvs_sem_{train,val}.txt
    data/<scene>/iphone/pose_intrinsic_imu.json        for each frame
    data/<scene>/iphone/rgb/frame_<number>.jpg         as the official toolkit decodes them, like
    data/<scene>/iphone/{rgb_masks,depth}/*.png        these"""
    # paper: the released code cuts at 98 % of the lines, inside a scene; here the first 10 scenes
    # of nvs_sem_val.txt are evaluated, and the others trained on
    lists = (read_text(root / f"splits/nvs_sem_{name}.txt").split() for name in BOTH)
    scenes = with_10_for_val(split, *lists)

    def frames(scene):
        folder = root / f"data/{scene}/iphone"
        infos = read_json(folder / "pose_intrinsic_imu.json")
        for image in listed(folder / "rgb", "frame_*"):
            number = int(image.stem.removeprefix("frame_"))
            if number % (stride or SCANNETPP_EVERY) == 0:
                yield Frame(
                    f"{scene}/{image.stem}",
                    image,
                    partial(load_scannetpp, folder, infos.get(image.stem)),
                    scene=scene,
                    camera="iphone",
                    time=number / 60,
                )

    return one_by_one([s for s in scenes if (root / f"data/{s}/iphone/rgb").is_dir()], frames)


def load_scannetpp(folder, info, frame):
    """256 x 192 z for the 1920 x 1440 image (it may have been decoded smaller), with the frame's
    own intrinsics. Depth pixel i lies at 7.5 i of the image: on 30 real frames, colour edges are 3
    px left of and above 7.5 (i + 0.5) - 0.5. Anonymised pixels are left out."""
    name = frame.image.stem
    if info is None:
        raise ValueError(f"{folder}/pose_intrinsic_imu.json: has no {name}.")
    (fx, _, cx), (_, fy, cy), _ = info["intrinsic"]
    (w, _), _ = image_size(frame.image)
    s = w / 1920
    pose = info.get("aligned_pose", info.get("aligned_poses"))
    frame = load_map(folder / f"depth/{name}.png", 1000, frame)._replace(
        intrinsics=(fx * s, fy * s, (cx + 0.5) * s - 0.5, (cy + 0.5) * s - 0.5, w, round(1440 * s)),
        pose=matrix(pose) if pose else None,
        centre=0.5 / 7.5,
    )
    mask = folder / f"rgb_masks/{name}.png"
    if mask.exists():
        mask = read_image(mask)
        rows, columns = (rescaled(np.arange(n), n, side, frame.centre)
                         for n, side in zip(frame.depth.shape, mask.shape))
        frame.depth[mask[np.ix_(rows, columns)] == 0] = 0
    return frame


# ---- Taskonomy and HM3D, both rendered by Omnidata

TASKONOMY_BAD = "mosquito tansboro tomkins darnestown brinnon".split()  # known to be broken


def frames_taskonomy(root, split):
    """All buildings of the fullplus train split."""
    # paper: the official trainer also stretches these images at random; not here, because the
    # rendering intrinsics explain Euclidean against z depth to 0.7 mm
    return frames_omnidata(root, "train_val_test_fullplus.csv", ["hm3d", *TASKONOMY_BAD])


def frames_hm3d(root, split):
    return frames_omnidata(root, "train_val_test_hm3d.csv", ["taskonomy"])


def frames_omnidata(root, table, skip):
    """Every image below root, without the folders in skip, of the scenes that the download's table
    marks as train, or all if there is none. Three layouts are in the wild:

    <domain>/<component>/<scene>/point_<p>_view_<v>_domain_<domain>.png
    <domain>/<scene>/point_<p>_view_<v>_domain_<domain>.png
    <scene>/<domain>/point_<p>_view_<v>_domain_<domain>.png"""
    scenes = None
    for path in filter(Path.exists, (root.parent / table, root / table)):  # root's own counts
        rows = csv.DictReader(read_text(path).splitlines())
        scenes = {row["id"] for row in rows if row["train"] == "1"}

    for folder, below, files in os.walk(root):
        below[:] = ["rgb"] if "rgb" in below else sorted(set(filter(is_data, below)) - set(skip))
        folder = Path(folder)
        scene = folder.parent.name if folder.name == "rgb" else folder.name
        if scenes is not None and scene not in scenes:
            continue
        for name in sorted(filter(is_data, files)):
            view, rgb, _ = name.partition("_domain_rgb.png")
            if rgb:
                yield Frame(f"{scene}/{view}", folder / name, load_omnidata, scene=scene)


def load_omnidata(frame):
    """Focal length and pose from the JSON; Euclidean depth if it is there, else the z-buffer."""
    def other(domain, ending):
        """Beside .../rgb/.../point_1_view_2_domain_rgb.png: folder and ending change."""
        before, _, after = str(frame.image).rpartition("/rgb/")
        return Path(f"{before}/{domain}/{after.removesuffix('rgb.png')}{ending}")

    info = other("point_info", "point_info.json")
    info = read_json(info if info.exists() else other("point_info", "fixatedpose.json"))
    size = info.get("resolution", 512)
    focal = size / 2 / math.tan(info["field_of_view_rads"] / 2)
    centre = (size - 1) / 2
    pose = None
    if "camera_location" in info:
        pose = np.eye(4)
        pose[:3, :3] = euler(*info["camera_rotation_final"])  # Blender's XYZ
        pose[:3, 3] = info["camera_location"]
        pose = pose @ OPENGL_TO_OPENCV

    kind, path = "euclidean", other("depth_euclidean", "depth_euclidean.png")
    if not path.exists():
        kind, path = "z", other("depth_zbuffer", "depth_zbuffer.png")
    return load_map(path, 512, frame)._replace(
        kind=kind,
        intrinsics=(focal, focal, centre, centre, size, size),
        camera=info.get("camera_uuid"),
        pose=pose,
    )


# ---- Matterport3D


def frames_matterport3d(root, split):
    """All houses: none is evaluated on.

    .../<house>/undistorted_camera_parameters/<house>.conf   images, depth and poses, line by line
    .../<house>/undistorted_color_images/*.jpg
    .../<house>/undistorted_depth_images/*.png"""
    confs = listed(root, "**/undistorted_camera_parameters/*.conf")
    return one_by_one(confs, matterport3d_house)


def matterport3d_house(conf):
    folder, house = conf.parent.parent, conf.stem
    missing, intrinsics = 0, (0, 0, 0, 0)
    for key, *words in filter(None, map(str.split, read_text(conf).splitlines())):
        if key == "n_images":
            missing = int(words[0])
        elif key == "intrinsics_matrix":  # counts until the next such line
            fx, fy, cx, cy = parse_intrinsics(" ".join(words))
            # their origin is the bottom left corner, y up
            intrinsics = (fx, fy, cx - 0.5, 1024 - cy - 0.5, 1280, 1024)
        elif key == "scan":
            depth, image, *pose = words
            missing -= 1
            yield Frame(
                f"{house}/{image}",
                folder / f"undistorted_color_images/{image}",
                partial(load_map, folder / f"undistorted_depth_images/{depth}", 4000),
                intrinsics,
                house,
                image.rsplit("_", 2)[1],
                pose=matrix(pose) @ OPENGL_TO_OPENCV,
            )
    if missing > 0:
        raise ValueError(f"{conf}: is cut off; {missing} of the images it announces are missing.")


# ---- DDAD, in the DGP format. In its protobuf JSON, numbers that are zero may be absent


def frames_ddad(root, split):
    """The six cameras of the 50 val scenes.

    ddad.json                                     the scenes of each split
    <scene>/scene_<sha>.json                      samples, images and sweeps with their poses
    <scene>/calibration/<key>.json
    <scene>/rgb/CAMERA_*/*.png, <scene>/point_cloud/LIDAR/*.npz"""
    scenes = read_json(root / "ddad.json")["scene_splits"]["1"]["filenames"]
    return one_by_one(scenes, partial(ddad_scene, root))


def ddad_scene(root, filename):
    folder, scene = (root / filename).parent, os.path.dirname(filename)
    content = read_json(root / filename)
    data = {datum["key"]: datum for datum in content["data"]}
    for number, sample in enumerate(content["samples"]):
        calibration = read_json(folder / f"calibration/{sample['calibration_key']}.json")
        intrinsics = dict(zip(map(str.upper, calibration["names"]), calibration["intrinsics"]))
        datums = (data[key] for key in sample["datum_keys"])
        datums = {datum["id"]["name"].upper(): datum["datum"] for datum in datums}
        lidar = datums["LIDAR"]["point_cloud"]

        for camera in sorted(name for name in datums if "image" in datums[name]):
            image = datums[camera]["image"]
            k = [intrinsics[camera].get(name, 0) for name in "fx fy cx cy".split()]
            yield Frame(
                f"{scene}/{number}/{camera}",
                folder / image["filename"],
                partial(load_lidar, folder / lidar["filename"], ddad_pose(lidar)),
                (*k, image["width"], image["height"]),
                scene,
                camera,
                # timestamps in DDAD are ten times too large; samples are 0.1 s apart
                round(0.1 * number, 1),
                ddad_pose(image),
            )


def ddad_pose(datum):
    pose = datum.get("pose", {})
    rotation, translation = pose.get("rotation", {}), pose.get("translation", {})
    return transform(
        [rotation.get(name, 0) for name in "qw qx qy qz".split()],
        [translation.get(name, 0) for name in "xyz"],
    )


# ---- ETH3D

ETH3D_FOCAL = 1000  # of the pinhole images that are made of the fisheye ones [px]
ETH3D_BORDER = 10  # laser pixels nearer to the border than this are left out [px]


def frames_eth3d(root, split):
    """The 13 training scenes, 24 megapixels an image.

    <scene>/dslr_calibration_jpg/{cameras,images}.txt    COLMAP's
    <scene>/images/dslr_images/*.JPG                     fisheye
    <scene>/ground_truth_depth/dslr_images/*.JPG         raw float32 z of the fisheye pixels"""
    return one_by_one(listed(root, "*/dslr_calibration_jpg"), eth3d_scene)


def eth3d_scene(calibration):
    folder = calibration.parent
    scene = folder.name
    cameras = {words[0]: words[1:] for words in word_lines(calibration / "cameras.txt") if words}
    # each second line lists points, and may be empty
    images = filter(None, word_lines(calibration / "images.txt")[::2])
    for _, *numbers, camera, name in sorted(images, key=lambda words: words[-1]):
        numbers = [float(word) for word in numbers]
        camera_from_world = transform(numbers[:4], numbers[4:])
        yield Frame(
            f"{scene}/{name}",
            folder / f"images/{name}",
            partial(load_eth3d, folder / f"ground_truth_depth/{name}", cameras[camera]),
            scene=scene,
            camera=f"camera {camera}",
            pose=np.linalg.inv(camera_from_world),
        )


def word_lines(path):
    """The words of each line that is not a comment."""
    return [line.split() for line in read_text(path).splitlines() if not line.startswith("#")]


def load_eth3d(depth, camera, frame):
    """Fisheye image and z map -> pinhole image of focal length ETH3D_FOCAL, and labels where it
    shows the laser pixels. camera: THIN_PRISM_FISHEYE w h fx fy cx cy k1 ..."""
    fx, fy, cx, cy, *lens = map(float, camera[3:])  # cx, cy from the corner of the first pixel
    with render.image_file(frame.image) as file:
        image = render.stored_pixels(file).convert("RGB")
    w, h = image.size
    inner = slice(ETH3D_BORDER, -ETH3D_BORDER)
    with naming(depth):
        raw = np.fromfile(depth, "<f4").reshape(h, w)[inner, inner]
    frame = add_depth(raw, 1, frame)
    j, i = np.nonzero(frame.depth)
    z = frame.depth[j, i].astype(np.float64)
    x, y = i + ETH3D_BORDER + 0.5, j + ETH3D_BORDER + 0.5
    u, v = undistort(distort_fisheye, (x - cx) / fx, (y - cy) / fy, *lens)

    focal = min(ETH3D_FOCAL, fx)
    scale = focal / fx
    left, top = cx * scale, cy * scale
    intrinsics = (focal, focal, left - 0.5, top - 0.5)
    shrink = max(1, int(1 / scale))  # average before sampling, or it would alias

    def source(x, y):
        a, b = distort_fisheye((x - left) / focal, (y - top) / focal, *lens)
        return (fx * a + cx) / shrink, (fy * b + cy) / shrink

    return frame._replace(
        image=f"rgb/{frame.scene}/{frame.image.stem}.jpg",
        pixels=remap(image.reduce(shrink), (round(w * scale), round(h * scale)), source),
        intrinsics=intrinsics,
        depth=project(np.stack([u * z, v * z, z], 1), intrinsics),
        kind="points",
    )


# ---- SUN RGB-D, and NYUv2 as a part of it


def frames_sunrgbd(root, split, paper_labels):
    """All frames except NYUv2's own, wherever they lie in the tree.

    .../<frame>/{image,depth,depth_bfx}/*   one file each
    .../<frame>/intrinsics.txt              3 x 3"""
    for folder in sorted(image.parent for image in listed(root, "**/image")):
        name = os.path.relpath(folder, root)
        if "NYUdata" in name:
            continue
        place = os.path.dirname(name) if "sun3ddata" in name else name
        # paper: it used the filled maps (depth_bfx); what was not measured is no ground truth
        part = "depth_bfx" if paper_labels else "depth"
        yield Frame(name, folder, partial(load_sunrgbd, part, paper_labels), scene=place)


def load_sunrgbd(part, paper_labels, frame):
    """The bits of the map are rotated left by three: beyond 8.19 m the low bits are set. The
    intrinsics are 1-based; a few have fx = 0."""
    folder = frame.image
    fx, fy, cx, cy = read_intrinsics(folder / "intrinsics.txt")
    frame = load_map(only_file(folder / part), 1, frame)
    raw = frame.depth.astype(np.uint16)
    if paper_labels:
        # paper: this is 0.8 x the true depth, and wraps beyond 8.19 m
        depth = raw / np.float32(10000)
    else:
        depth = ((raw >> 3) | (raw << 13)) / np.float32(1000)
    return frame._replace(
        image=only_file(folder / "image"),
        depth=depth,
        intrinsics=(fx or fy, fy or fx, cx - 1, cy - 1),
    )


NYUV2_CAMERA = (518.8579, 519.4696, 324.5824, 252.7362, 640, 480)  # of the 640 x 480 images
NYUV2_TEST = """1-2 9 14-18 21 28-43 46-47 56-57 59-63 76-79 84-91 117-119 125-129 131-134 137
153-155 167-169 171-176 180-202 207-212 220-222 250 264 271-273 279-285 296-302 310-312 315-317
325-335 351-352 355-364 384-390 395-397 411-414 430-435 441-448 462-466 469-477 508-513 515-526
531-533 537-539 549-551 555-571 579-583 591-594 603-607 612-613 617-621 633-638 644-645 650-651
656-658 663-664 668-673 676-681 686-690 693-694 697-699 706-713 717-718 724-728 731-734 743-744
759-787 800-804 810-814 821-823 833-846 850-852 857-862 869-871 906-908 917-919 926-928 932-935
945-947 959-962 965-967 970-977 991-995 1001-1004 1010-1012 1021-1023 1032-1034 1038-1039 1048-1049
1052-1053 1057-1058 1075-1084 1088-1096 1098-1104 1106-1109 1117-1119 1123-1131 1135-1136 1144-1158
1162-1167 1170-1171 1174-1176 1179-1184 1192-1196 1201-1212 1216-1220 1226-1230 1233-1235 1247-1250
1254-1265 1275-1280 1285-1295 1297-1299 1302-1308 1314-1315 1329-1332 1335-1340 1347-1349 1353-1356
1364-1365 1368-1369 1384-1391 1394-1401 1407-1414 1421-1424 1430-1433 1441-1449"""  # 1-based


def frames_nyuv2(root, split, paper_labels, all_images):
    """kv1/NYUdata of SUN RGB-D; where there is none, pairs of 640 x 480.

    .../NYU<index in NYUv2>/                            as in SUN RGB-D
    .../sync_depth_<n>.png, and rgb_<n>.jpg beside it or in ../rgb/"""
    # paper: the released script takes all 1,449 images, 795 of them training images of NYUv2
    test = set()
    for part in NYUV2_TEST.split():
        first, _, last = part.partition("-")
        test |= set(range(int(first), int(last or first) + 1))

    scenes = listed(root, "**/NYU[0-9]*/")
    for folder in scenes:
        if all_images or int(folder.name.removeprefix("NYU")) in test:
            load = partial(load_sunrgbd, "depth", paper_labels)
            yield Frame(folder.name, folder, load, scene=folder.name)

    for depth in [] if scenes else listed(root, "**/sync_depth_*.png"):
        name = depth.stem.replace("sync_depth_", "rgb_") + ".jpg"
        image = depth.with_name(name)
        if not image.exists():
            image = depth.parent.parent / f"rgb/{name}"
        name = os.path.relpath(image, root)
        load = partial(load_nyuv2_png, depth)
        yield Frame(name, image, load, NYUV2_CAMERA, scene=name.removesuffix(".jpg"))


def load_nyuv2_png(path, frame):
    """Millimetres, cut to the Eigen crop (SUN RGB-D's version is that crop); 10 m is saturation."""
    frame = load_map(path, 1000, frame)
    metres = frame.depth
    metres[:45] = metres[471:] = metres[:, :41] = metres[:, 601:] = 0
    metres[metres >= 10] = 0
    return frame


# ---- iBims-1


def frames_ibims1(root, split):
    """100 laser-scanned interiors.

    imagelist.txt, calib/<name>.txt    fx,fy,cx,cy
    {rgb,depth,mask_invalid,mask_transp}/<name>.png"""
    names = read_text(root / "imagelist.txt").split()
    for name in names[:1]:
        mask = root / f"mask_invalid/{name}.png"
        if (read_image(mask) > 0).mean() < 0.5:
            raise ValueError(f"{mask}: masks most of the image, if > 0 means valid, as it should.")
    for name in names:
        yield Frame(name, root / f"rgb/{name}.png", partial(load_ibims1, root), scene=name)


def load_ibims1(root, frame):
    name = frame.image.stem
    frame = load_map(root / f"depth/{name}.png", 65535 / 50, frame)
    for mask in ("mask_invalid", "mask_transp"):  # both: > 0 means usable
        frame.depth[read_image(root / f"{mask}/{name}.png") == 0] = 0
    return frame._replace(intrinsics=read_intrinsics(root / f"calib/{name}.txt"))


# ---- your own RGB-D images: which photo, depth, intrinsics, pose and time belong together

# what a file holds, by a word in the name of its folder, or else in its own; the first counts
ROLES = render.each_word({
    "intrinsics intrinsic": "intrinsics",
    "poses pose": "pose",
    "depth depths lidar": "depth",
    "rgb color colour image images": "image",
})
WORDS = re.compile(f"(?<![a-z])({'|'.join(ROLES)})(?![a-z])", re.IGNORECASE)
STAMP_WINDOW = 0.02  # [s] between a photo and its depth, as in TUM RGB-D's associate.py


def frames_folder(root, split, intrinsics, depth_scale, depth_type):
    """Files of one scene in root, or of many, each in a folder of root:

    rgb/<name>.jpg, depth/<name>.png      or <name>.color.jpg, <name>.depth.png: see ROLES
    intrinsics.txt, intrinsics/<name>.txt here or in root: fx fy cx cy, 3 x 3 or 4 x 4
    poses/<name>.txt                      optional: 4 x 4 camera-to-world
    groundtruth.txt                       or TUM RGB-D's poses: time, x y z, qx qy qz qw a line
    cameras.txt, sparse/0/cameras.txt     or COLMAP's one camera
    transforms.json                       or all of it from nerfstudio's"""
    given = parse_intrinsics(intrinsics) if intrinsics else None
    files = own_files(root)

    def frames(folder):
        scene = os.path.relpath(folder, root).removeprefix(".")
        shots = transforms_shots if (folder / "transforms.json").exists() else named_shots
        for name, image, depth, camera, pose in shots(folder):
            camera = given or camera or files["intrinsics"].get("")
            if camera is None:
                raise ValueError(f"{folder}: has no intrinsics.txt. Write 'fx fy cx cy' [px] into "
                                 "it, or give --intrinsics (COLMAP: in its text format).")
            yield Frame(
                os.path.join(scene, name),
                image,
                partial(load_own, depth, camera, pose, depth_scale, depth_type),
                scene=scene or None,
                time=stamp(name),
            )

    single = files["image"] or files["depth"] or (root / "transforms.json").exists()
    return one_by_one([root] if single else listed(root, "*/"), frames)


def own_files(folder):
    """-> by role, {name without the words of ROLES: path}."""
    found = {role: {} for role in ROLES.values()}
    inner = [path for path in listed(folder, "*/") if WORDS.search(path.name)]
    for path in listed(folder) + [path for part in inner for path in listed(part)]:
        inside = path.parent.name if path.parent != folder else ""
        words = WORDS.findall(inside.lower()) or WORDS.findall(path.stem.lower())
        role = next((ROLES[word] for word in ROLES if word in words), None)
        if not role and path.suffix.lower() in Image.registered_extensions():
            role = "image"
        if role and path.is_file() and (path.suffix == ".txt") == (role in ("pose", "intrinsics")):
            found[role].setdefault(plain_name(path), path)
    return found


def plain_name(path):
    return WORDS.sub("", path.stem).strip("._- ")


def named_shots(folder):
    """Photos, and what has their name, or if all names are time stamps the nearest one -> name,
    photo, depth, camera, pose: paths, numbers or None."""
    files = own_files(folder)
    if (folder / "groundtruth.txt").exists():
        for time, *numbers in word_lines(folder / "groundtruth.txt"):
            x, y, z, *axis, w = map(float, numbers)
            files["pose"][time] = transform([w, *axis], [x, y, z])
    images, cameras = files["image"], files["intrinsics"]
    shared = cameras.pop("", None) or colmap_camera(folder)
    depths, poses, cameras = (
        by_time(found, images) for found in (files["depth"], files["pose"], cameras))
    names = images | depths
    if images and None not in map(stamp, images):  # 30 photos a second, and perhaps 15 maps
        names = images.keys() & depths
        times = [time for time in map(stamp, files["depth"]) if time is not None]
        gaps = [abs(stamp(name) - time) for name in images for time in times[:1000] if not names]
        nearest = f"; the nearest is {min(gaps):.3g} s away" if gaps else ""
        print(f"{folder}: {len(names)} of {len(images)} photos have depth within {STAMP_WINDOW} s"
              f"{nearest}", file=sys.stderr)
    for name in sorted(names):
        yield name, images.get(name), depths.get(name), cameras.get(name, shared), poses.get(name)


def colmap_camera(folder):
    """The one camera of COLMAP's cameras.txt -> fx, fy, cx, cy, w, h; None without that file. Its
    poses are not read: their unit is not the metre."""
    paths = listed(folder, "cameras.txt") + listed(folder, "sparse/**/cameras.txt")
    for path in paths[:1]:
        (_, model, w, h, fx, *numbers), *others = filter(None, word_lines(path))
        if others or model not in ("PINHOLE", "SIMPLE_PINHOLE"):
            raise ValueError(f"{path}: needs one camera without distortion, a PINHOLE. Undistort "
                             "first: colmap image_undistorter.")
        fy, cx, cy = map(float, [fx, *numbers][-3:])
        return float(fx), fy, cx - 0.5, cy - 0.5, int(w), int(h)
    return None


def stamp(name):
    """A name that is a time, such as 1305031102.175304, or digits of s, ms, us or ns -> [s]."""
    if re.fullmatch(r"\d+\.\d+", name):
        return float(name)
    return int(name) / 10 ** (len(name) - 10) if re.fullmatch(r"\d{10}(\d{3}){0,3}", name) else None


def by_time(files, images):
    """{name: file} -> {name of an image: file}, by the nearest time if all names are times."""
    times, stamps = ({stamp(name): name for name in names} for names in (files, images))
    if None in times or None in stamps:
        return files
    pairs = nearest_in_time(list(times), stamps, STAMP_WINDOW)
    return {stamps[image]: files[times[time]] for time, image in pairs.items()}


def transforms_shots(folder):
    """The same from nerfstudio's transforms.json: OpenGL axes, cx and cy from the image's
    corner."""
    path = folder / "transforms.json"
    shared, depths = read_json(path), own_files(folder)["depth"]
    for shot in shared["frames"]:
        camera, name = shared | shot, shot["file_path"]
        lens = {key: camera[key] for key in "k1 k2 k3 k4 p1 p2".split() if camera.get(key)}
        if lens or "FISHEYE" in camera.get("camera_model", ""):
            raise ValueError(f"{path}: a lens with distortion ({lens or 'fisheye'}). Undistort "
                             "first: colmap image_undistorter, and ns-process-data again.")
        fx, cx, cy = (camera[key] for key in ("fl_x", "cx", "cy"))
        size = [camera[key] for key in "wh" if key in camera]
        depth = depths.get(plain_name(Path(name)))
        if "depth_file_path" in shot:
            depth = folder / shot["depth_file_path"]
        pose = matrix(shot["transform_matrix"]) @ OPENGL_TO_OPENCV
        yield (name, folder / name, depth, (fx, camera.get("fl_y", fx), cx - 0.5, cy - 0.5, *size),
               pose)


def load_own(depth, camera, pose, scale, kind, frame):
    """A depth map, of the photo's size or of another, or LiDAR points (N, 3 or more) in camera
    axes. camera and pose: numbers or paths."""
    if not (depth and frame.image and frame.image.exists()):
        raise ValueError(f"{depth or frame.image}: has no counterpart, photo or depth.")
    if isinstance(pose, Path):
        with naming(pose):
            pose = matrix(np.loadtxt(pose))
    if isinstance(camera, Path):
        camera = read_intrinsics(camera)
    return load_map(depth, scale, frame._replace(intrinsics=camera, pose=pose, kind=kind))


# --------------------------------------------------------------------------------------------------
# toy world: rooms made of boxes, ray-cast with exact depth. Axes: x, y along the walls, z up [m]

TOY_VIEWS = 5  # images a room
TOY_SHAPES = 3 * [(112, 84)] + [(84, 112)]  # image size at a focal length of 100 px
TOY_SCALES = (0.75, 1.0, 1.25, 1.5)  # the image is this times larger: four focal lengths, mixed
TOY_SIDE = 112  # with --focals: side of the images, whatever the focal length [px]
TOY_CHECKER = 0.5  # side of a texture square [m]
# By surface: floor, ceiling, walls x, walls y, box sides, box tops. Red : green is the same for
# all, so that the red of a marker is found by a linear look at a patch, and green alone is
# brightness: a tiny model learns from few samples.
TOY_COLOURS = np.array([[0.63, 0.90, blue] for blue in (0.30, 0.98, 0.78, 0.54, 0.04, 0.17)])
TOY_DAYLIGHT = np.array([0.75, 0.95, 0.65, 0.85, 0.7, 0.9])


def frames_toy(root, split, images, light, focals, seed, lenses=None, drive=False):
    """A room is made from (seed, split, number) alone, so that train and val share none."""
    for number in range(math.ceil(images / TOY_VIEWS)):
        scene = f"{split}_{number:05d}"
        rng = rng_for(seed, f"toy room {scene}")
        boxes = toy_room(rng)
        colours = TOY_COLOURS * rng.uniform(0.99, 1.01, TOY_COLOURS.shape)
        if drive:  # red is one mixture of the others; above it is a red marker, below a blue one
            colours[:, 0] = colours @ (0, 0.4, 0.5)
        intrinsics = toy_camera(focals, lenses, rng)
        poses = toy_poses(boxes, light, drive, rng)
        for view, pose in enumerate(poses[:images - number * TOY_VIEWS]):
            yield Frame(
                f"{scene}/{view}",
                f"rgb/{scene}/{view}.png",
                partial(load_toy, light, boxes, colours),
                intrinsics,
                scene,
                "toy",
                0.5 * view,
                pose,
                "euclidean",
            )


def toy_room(rng):
    """Boxes (n, 2, 3) of min and max corners; the first is the room itself, seen from inside."""
    room = rng.uniform((3.5, 3.5, 2.4), (8.0, 8.0, 3.2))
    boxes = [[np.zeros(3), room]]
    for _ in range(rng.integers(2, 6)):
        size = rng.uniform((0.4, 0.4, 0.3), (1.4, 1.4, 1.9))
        corner = np.array([*rng.uniform(0, room[:2] - size[:2]), 0])
        if rng.random() < 0.5:  # furniture likes to stand along a wall
            corner[0 if rng.random() < 0.5 else 1] = 0
        boxes.append([corner, corner + size])
    return np.array(boxes)


def toy_camera(focals, lenses, rng):
    if lenses:  # no two cameras are alike: fx unlike fy, a centre off the middle, as in a crop
        focal = rng.uniform(*lenses) * np.array([1, rng.uniform(0.75, 1.33)])
        centre = TOY_SIDE * rng.uniform(0.4, 0.6, 2)
        return *np.round([*focal, *centre], 4).tolist(), TOY_SIDE, TOY_SIDE
    shape = TOY_SHAPES[rng.integers(len(TOY_SHAPES))]
    lens = rng.integers(len(focals or TOY_SCALES))
    if focals:
        size, focal = [TOY_SIDE] * 2, [focals[lens]] * 2
    else:  # so that the image at focal length 100 has that shape exactly
        size = [round(n * TOY_SCALES[lens]) + int(rng.integers(-2, 3)) for n in shape]
        focal = [100 * n / whole for n, whole in zip(size, shape)]
    centre = [(n - 1) / 2 + rng.uniform(-2, 2) for n in size]
    return *np.round(focal + centre, 4).tolist(), *size


def toy_poses(boxes, light, drive, rng):
    """A short walk through the room: TOY_VIEWS poses, a few decimetres to a metre apart; on a drive
    up to a few metres, and all look straight ahead."""
    for _ in range(1000):
        start = rng.uniform(*boxes[0])
        # in daylight the height is the metric cue
        start[2] = 1.5 if light == "ambient" else rng.uniform(1.1, 1.8)
        walk = rng.uniform(0, 2 * math.pi)
        shortest, longest = (0.3, 1.2) if drive else (0.1, 0.45)
        steps = np.cumsum([0, *rng.uniform(shortest, longest, TOY_VIEWS - 1)])
        path = start + steps[:, None] * (math.cos(walk), math.sin(walk), 0)
        if all(toy_is_free(point, boxes) for point in path):
            break
    else:  # a crowded room: stand still in its middle, and look around
        path = np.repeat([boxes[0].mean(0)], TOY_VIEWS, 0)
        drive = False

    # look into the room rather than at a wall
    target = boxes[0, 0] + rng.uniform(0.25, 0.75, 3) * boxes[0, 1]
    x, y, _ = target - path[0]
    poses = []
    for point in path:
        yaw = math.atan2(y, x) + rng.normal(0, 0.2)
        pitch = rng.uniform(-0.40, 0.05)
        if drive:
            yaw, pitch = walk, 0.0
        level = np.array([math.cos(yaw), math.sin(yaw), 0])
        forward = level * math.cos(pitch) + (0, 0, math.sin(pitch))
        right = np.array([math.sin(yaw), -math.cos(yaw), 0])
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(forward, right), forward, point], 1)
        poses.append(pose)
    return poses


def toy_is_free(point, boxes):
    """Whether a camera at a point keeps half a metre from all surfaces."""
    low, high = boxes[:, 0], boxes[:, 1]
    in_room = (point > low[0] + 0.5) & (point < high[0] - 0.5)
    in_box = (point > low[1:] - 0.5) & (point < high[1:] + 0.5)
    return in_room.all() and not in_box.all(1).any()


def load_toy(light, boxes, colours, frame):
    """Ray-cast one view: RGB image and Euclidean depth map."""
    w, h = frame.intrinsics[4:]
    pixels = np.mgrid[:w, :h].T.reshape(-1, 2)
    rays = render.unproject(pixels, 1.0, frame.intrinsics) @ frame.pose[:3, :3].T
    rays[rays == 0] = 1e-12
    eye, n = frame.pose[:3, 3], np.arange(h * w)
    depth, axis, surface = toy_hits(eye, rays, boxes)

    # texture: squares, counted along the two axes of the surface
    squares = np.floor((eye + depth[:, None] * rays) / TOY_CHECKER)
    squares[n, axis] = 0
    dark = squares.sum(1) % 2
    shade = TOY_DAYLIGHT[surface]
    if light == "lamp":  # falls with 1 / d^2; in 8 bits, a logarithmic tone curve tells 0.5 to 12 m
        facing = np.abs(rays[n, axis])
        shade = 0.94 - 0.86 * np.log(depth / 0.5) / math.log(12 / 0.5) + 0.06 * facing
    rgb = colours[surface] * (shade * (1 - 0.08 * dark))[:, None]
    rgb = (rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8).reshape(h, w, 3)
    return frame._replace(pixels=Image.fromarray(rgb), depth=depth.reshape(h, w))


def toy_hits(eye, rays, boxes):
    """What each of N rays meets first -> its distance, the axis across the surface, the surface."""
    planes = (boxes[:, :, None] - eye) / rays  # (boxes, 2, N, 3): crossings of each pair of planes
    near, far = planes.min(1), planes.max(1)
    # the room: the first plane to leave through
    depth, axis = far[0].min(1), far[0].argmin(1)
    surface = np.where(axis == 2, rays[:, 2] > 0, 2 + axis)
    # a box: the last plane to enter through
    for box_near, box_far in zip(near[1:], far[1:]):
        enter, side = box_near.max(1), box_near.argmax(1)
        hit = (enter < box_far.min(1)) & (enter > 0) & (enter < depth)
        depth[hit] = enter[hit]
        axis[hit] = side[hit]
        surface[hit] = np.where(side == 2, 5, 4)[hit]
    return depth, axis, surface


# --------------------------------------------------------------------------------------------------
# the datasets


class Dataset(NamedTuple):
    """All that the rest of prepare.py knows of a dataset: a new one needs a reader and a row.
    Splits, marks and flags are words with spaces between them."""
    reader: Callable  # (root, split, **flags) -> Frames
    range: tuple  # of the Euclidean depth [m], on which evaluation code agrees
    splits: str  # that the paper uses
    marks: str = ""  # a folder that holds one of these is the root of the raw data
    get: str = ""  # what to get, from where, how large it is, under which terms
    download: tuple = ()  # URL, file name, MD5 or None, if it is open to all
    raw: str = ""  # folder in data/raw, if it is not the dataset's name
    flags: str = ""  # of the command line, that the reader takes
    paper_labels: str = "euclidean"  # what the published labels hold
    chunk: int = 32  # frames that a worker takes at once, and that a killed run loses at most


SUNRGBD_ZIP = ("https://rgbd.cs.princeton.edu/data/SUNRGBD.zip", "SUNRGBD.zip", None)
DATASETS = {
    "argoverse2": Dataset(
        frames_argoverse2, (1, 200), "train val", "train/*/sensors val/*/sensors", """
        the Sensor dataset: train-*.tar and val-*.tar, all unpacked to one tree (train/<log>,
        val/<log>)
        https://www.argoverse.org/av2.html; about 1 TB; CC BY-NC-SA 4.0"""),
    "waymo": Dataset(
        frames_waymo, (1, 200), "train", "training/camera_image", """
        Waymo Open Dataset v2.0.1, training/: camera_image, camera_calibration, lidar,
        lidar_calibration, lidar_pose, lidar_camera_projection, vehicle_pose
        https://waymo.com/open/download (registration); about 1 TB; Waymo Open Dataset licence""",
        chunk=1000),  # about a segment, whose files are read forward
    "nuscenes": Dataset(
        frames_nuscenes, (1, 200), "train val", "v1.0-trainval v1.0-mini samples", """
        train: v1.0-trainval metadata and blobs 01-10; val: v1.0-mini.tgz, or the same scenes of
        trainval
        https://www.nuscenes.org/nuscenes#download (registration); mini 4 GB, trainval about 300 GB;
        CC BY-NC-SA 4.0, non-commercial""",
        paper_labels="z"),
    "scannetpp": Dataset(
        frames_scannetpp, (0.1, 10), "train val", "data/*/iphone", """
        splits/ and data/<scene>/iphone with rgb/, rgb_masks/ and depth/ decoded by the official
        toolkit
        https://kaldir.vc.in.tum.de/scannetpp (registration); about 1.5 TB with the decoded frames;
        ScanNet++ terms of use, non-commercial""",
        flags="stride"),
    "taskonomy": Dataset(
        frames_taskonomy, (0.1, 50), "train", "rgb */rgb", """
        domains rgb, depth_euclidean, point_info of component taskonomy, and
        train_val_test_fullplus.csv
        https://github.com/StanfordVL/taskonomy (omnitools.download); about 5 TB for the three
        domains; MIT for the tools, Gibson terms of use for the data"""),
    "hm3d": Dataset(
        frames_hm3d, (0.1, 50), "train", "rgb */rgb", """
        domains rgb, depth_zbuffer (or depth_euclidean), point_info of component hm3d of Omnidata's
        starter set
        https://github.com/EPFL-VILAB/omnidata (registration); several TB; Matterport terms of
        use"""),
    "matterport3d": Dataset(
        frames_matterport3d, (0.1, 50), "train",
        "v1/scans scans undistorted_camera_parameters */undistorted_camera_parameters",
        """
        undistorted_color_images, undistorted_depth_images, undistorted_camera_parameters of all
        houses, unzipped
        https://niessner.github.io/Matterport (registration); about 300 GB; Matterport terms of
        use"""),
    "ddad": Dataset(
        frames_ddad, (1, 200), "val", "ddad.json", """
        DDAD.tar (train+val), unpacked to ddad_train_val/
        https://github.com/TRI-ML/DDAD; 257 GB; CC BY-NC-SA 4.0""",
        ("https://tri-ml-public.s3.amazonaws.com/github/DDAD/datasets/DDAD.tar", "DDAD.tar",
         "027686329dda41bd540e71ac5b43ebcb"),
        paper_labels="z"),
    "eth3d": Dataset(
        frames_eth3d, (0.1, 100), "val", "*/dslr_calibration_jpg", """
        multi_view_training_dslr_jpg.7z and the dslr depth archives of the training scenes, unpacked
        to one tree
        https://www.eth3d.net/datasets; about 30 GB; CC BY-NC-SA 4.0"""),
    "sunrgbd": Dataset(
        frames_sunrgbd, (0.1, 8), "val", "SUNRGBD kv1 kv2 realsense xtion", """
        SUNRGBD.zip
        https://rgbd.cs.princeton.edu; 6.4 GB; research use, cite the authors""",
        SUNRGBD_ZIP, flags="paper_labels"),
    "ibims1": Dataset(
        frames_ibims1, (0.1, 25), "val", "depth calib", """
        ibims1_core_raw.zip
        https://www.asg.ed.tum.de/lmf/ibims1; 55 MB; see its download page for the terms""",
        ("https://dataserv.ub.tum.de/s/m1455541/download?path=%2F&files=ibims1_core_raw.zip",
         "ibims1_core_raw.zip", None),
        paper_labels="z"),
    "nyuv2": Dataset(
        frames_nyuv2, (0.1, 10), "val",
        "SUNRGBD kv1 NYUdata NYU0001 */sync_depth_*.png sync_depth_*.png", """
        SUNRGBD.zip (its kv1/NYUdata), or the 640 x 480 test images with sync_depth_*.png
        https://rgbd.cs.princeton.edu; 6.4 GB; research use, cite the authors""",
        SUNRGBD_ZIP, raw="sunrgbd", flags="paper_labels all_images"),
    "folder": Dataset(
        frames_folder, (0.1, 200), "train val",
        "transforms.json */transforms.json rgb */rgb *depth* */*depth*", """
        your own RGB-D images: rgb/<name>.jpg or .png, depth/<name>.png (16 bit), .tif or .npy,
        intrinsics.txt (fx fy cx cy, or 3 x 3) or --intrinsics; optional poses/<name>.txt (4 x 4
        camera-to-world); or nerfstudio's transforms.json, COLMAP's text files, TUM RGB-D's""",
        flags="intrinsics depth_scale depth_type"),
    "toy": Dataset(
        frames_toy, (0.1, 100), "train val", flags="images light focals seed lenses drive"),
}


# --------------------------------------------------------------------------------------------------
# from a frame to a line of the jsonl


def rng_for(seed, name):
    """A generator that depends on nothing but seed and name: any worker on any machine draws the
    same."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def rescaled(i, side, other, centre=0.5):
    """Pixels i of `side` pixels -> those of `other` pixels along the same axis that show the
    place."""
    return np.floor((i + centre) * (other / side)).astype(int)


def map_labels(depth, kind, centre, intrinsics):
    """All pixels of a map that have a depth, which may have another resolution than the image -> x,
    y, Euclidean, z, each (N,)."""
    w, h = intrinsics[4:]
    rows, columns = depth.shape
    if abs(columns * h - rows * w) >= max(columns, w):  # more than rounding
        raise ValueError(f"depth map of {columns} x {rows}, image of {w} x {h}: not the same view. "
                         "Crop both alike.")
    j, i = np.nonzero(np.isfinite(depth) & (depth > 0))
    x, y = rescaled(i, columns, w, centre), rescaled(j, rows, h, centre)
    depth = depth[j, i].astype(np.float64)
    if columns > w or rows > h:  # several in one pixel
        first = np.unique(y * w + x, return_index=True)[1]
        x, y, depth = x[first], y[first], depth[first]
    rays = ray_length(x, y, intrinsics)
    return (x, y, depth * rays, depth) if kind == "z" else (x, y, depth, depth / rays)


def cloud_labels(cloud, occlusion, intrinsics):
    """The nearest point at each pixel of the image -> x, y, Euclidean, z, each (N,).
    occlusion: drop what a nearer surface hides."""
    w, h = intrinsics[4:]
    x, y = cloud[:, :2].T
    inside = (x >= 0) & (y >= 0) & (x <= w - 1) & (y <= h - 1)
    cloud = cloud[inside & np.isfinite(cloud).all(1)]
    if occlusion:
        cloud = visible(cloud, intrinsics[0])
    cloud = cloud[np.argsort(cloud[:, 2], kind="stable")]
    x, y = np.floor(cloud[:, :2] + 0.5).astype(int).T
    first = np.unique(y * w + x, return_index=True)[1]
    return x[first], y[first], *cloud[first, 2:].T


class Refused(ValueError):
    """A fault of an image that most likely all others share: its camera, or its unit."""


UNITS = {1: "metres", 100: "centimetres", 1000: "millimetres", 10**6: "micrometres"}


def other_unit(depths, scale, low=0.02, high=200):
    """Why depths (N,) are not in metres at `scale` numbers a metre, if their median shows it: of
    UNITS that in which it would be nearest to 3 m."""
    median = np.median(depths) if len(depths) else 1.0
    if low <= median <= high:
        return None
    likely = min(UNITS, key=lambda unit: abs(math.log(median * scale / unit / 3)))
    return f"median depth {median:.4g}: {UNITS[likely]}? Give --depth-scale {likely}"


def label_orientation(frame, size, exif):
    """Whether the depth belongs to the stored or the upright pixels of an image -> "stored",
    "upright" or None (no EXIF), the size of these, and notes."""
    if exif == 1:
        return None, size, ()
    told = frame.depth.shape[::-1] if frame.kind in MAPS else tuple(frame.intrinsics[4:])
    if told and render.labels_are_upright(exif, size, told, None):
        return "upright", size[::-1], ()
    if told and exif >= 5 and size[0] != size[1]:
        return "stored", size, ()
    return "stored", size, (
        ("images are turned or mirrored by EXIF, and whether their depth is, too, does not show: "
         "taken as of the stored pixels", 1),)


def load_labels(frame, occlusion):
    """-> the frame loaded, with intrinsics fx, fy, cx, cy, w, h; all its labels x, y, Euclidean, z,
    each (N,); to which pixels of the file they belong; notes."""
    frame = frame.load(frame)
    size, exif = (frame.pixels.size, 1) if frame.pixels else image_size(frame.image)
    orientation, size, notes = label_orientation(frame, size, exif)
    fx, fy, cx, cy, *said = frame.intrinsics
    if said and tuple(said) != size:
        raise ValueError(f"image of {size} px, intrinsics for {tuple(said)}")
    intrinsics = (fx, fy, cx, cy, *size)
    if fault := render.camera_fault(intrinsics, doubt=True):
        raise Refused(fault)

    notes += frame.notes
    if frame.kind in MAPS:
        labels = map_labels(frame.depth, frame.kind, frame.centre, intrinsics)
        if frame.depth.shape != size[::-1]:
            notes += ((f"depth maps of {frame.depth.shape[1]} x {frame.depth.shape[0]} px are of "
                       f"images of {size[0]} x {size[1]}: labels are where their pixels are", 1),)
    else:
        labels = cloud_labels(frame.depth, occlusion and frame.kind == "lidar", intrinsics)
    return frame._replace(intrinsics=intrinsics), labels, orientation, notes


def make_record(frame, folder, points, seed, limits, occlusion, published):
    """Load a frame and draw its pixels -> its line of the jsonl, or "" if it has too few labels;
    and notes. limits: (min, max) of the Euclidean depth [m]. published: what the paper's labels
    hold, "z" or "euclidean", where they are wanted."""
    frame, labels, orientation, notes = load_labels(frame, occlusion)
    low, high = limits
    if fault := other_unit(labels[2], frame.scale, min(0.02, low), max(200, high)):
        raise Refused(f"{frame.id}: {fault}, or other --min-depth, --max-depth.")
    valid = np.flatnonzero((labels[2] >= low) & (labels[2] <= high))
    if len(valid) < min(MIN_POINTS, points):
        return "", notes
    drawn = rng_for(seed, frame.id).choice(len(valid), min(points, len(valid)), replace=False)
    x, y, euclidean, z = (column[valid[np.sort(drawn)]] for column in labels)

    image = frame.image
    if frame.pixels:
        with replacing(folder / image) as temporary:
            kind = "PNG" if image.endswith(".png") else "JPEG"
            frame.pixels.save(temporary, kind, quality=95)
    else:
        image = os.path.relpath(image, os.path.realpath(folder))
    pose = render.pose_matrix(frame.pose)
    if pose is None and frame.pose is not None:
        notes += (("poses are not finite, or no rotation: left out", 1),)
    measured = "euclidean" if frame.kind == "euclidean" else None  # the self-check wants to know
    record = {
        "image": image,
        "intrinsics": [*np.round(frame.intrinsics[:4], 4).tolist(), *frame.intrinsics[4:]],
        "pixel_coords": np.stack([x, y], 1).tolist(),
        # paper: it asks for the distance from the camera, but publishes z for some datasets
        "depth": np.round(z if published == "z" else euclidean, 4).tolist(),
        "scene": frame.scene,
        "camera": frame.camera,
        "time": frame.time,
        "orientation": orientation,
        "pose": None if pose is None else np.round(pose, 6).ravel().tolist(),
        "depth_type": published or measured,
        "labels": "paper" if published else None,
    }
    return render.json_text({k: v for k, v in record.items() if v is not None}), notes


def make_chunk(frames, make):
    """-> number of frames, lines of those with enough labels, notes, what is wrong with the others,
    and why all are refused if so."""
    lines, notes, bad, refused = [], Counter(), [], None
    for frame in frames:
        try:
            line, about = make(frame)
            if line:
                lines.append(line)
            notes.update(dict(about))
        except Exception as error:  # one bad frame must not end a run of days; it is counted
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # a full disk
                raise
            if isinstance(error, Refused):
                refused = refused or reason(error)
            bad.append(reason(error, frame.id))
    return len(frames), lines, notes, bad, None if lines else refused


def in_order(function, chunks, workers):
    """Results of function(chunk) in order, with a bounded number of chunks at work."""
    if workers == 1:
        yield from map(function, chunks)
        return
    waiting = []
    try:
        with ProcessPoolExecutor(workers, initializer=render.start_worker) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(function, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            yield from (job.result() for job in waiting)
    except BrokenProcessPool:
        raise ValueError("a worker was killed, most likely for lack of memory. Give the same "
                         "command with fewer --workers to resume.") from None


def write_records(frames, path, make, workers, chunk, state):
    """Frames -> path, in order, from where `state` ends. After each chunk the state, which is
    run.json, says how many bytes are good."""
    part, run_json = path.with_suffix(".jsonl.partial"), path.with_suffix(".run.json")
    write_json(run_json, state)
    chunks = (frames[i:i + chunk] for i in range(state["frames"], len(frames), chunk))
    bar = tqdm(total=len(frames), initial=state["frames"], unit=" images", desc=path.name,
               mininterval=0.5 if sys.stderr.isatty() else 10)
    refused = None
    with bar, open(part, "ab") as file:
        file.truncate(state["bytes"])
        results = in_order(partial(make_chunk, make=make), chunks, workers)
        for count, lines, notes, bad, refused in results:
            if refused and not state["records"]:
                break
            file.write("".join(lines).encode())
            file.flush()
            state["frames"] += count
            state["bytes"] = os.path.getsize(part)
            state["records"] += len(lines)
            state["bad"] += len(bad)
            state["bad_examples"] = (state["bad_examples"] + bad)[:5]
            state["notes"] = dict(notes + Counter(state["notes"]))
            write_json(run_json, state)
            bar.update(count)

    if frames and not state["records"]:
        part.unlink()
        run_json.unlink()
        why = "; ".join(state["bad_examples"])
        raise ValueError(refused or f"none of the {len(frames)} images gives labels of depth: "
                         + (why or "no depth is within --min-depth and --max-depth."))
    os.replace(part, path)
    render.open_index(path)
    state["finished"] = True
    write_json(run_json, state)


def saved_state(path, new, overwrite):
    """The run.json of an earlier run of the same inputs, if its file is there to resume, else
    `new`. Raises ValueError if the file was made from other inputs."""
    run_json = path.with_suffix(".run.json")
    if overwrite or not (path.exists() or run_json.exists()):
        return new
    state = read_json(run_json) if run_json.exists() else {}
    before = state.get("inputs", {})
    other = ", ".join(key for key, value in new["inputs"].items() if before.get(key) != value)
    if other:
        raise ValueError(f"{path}: was made by another command (different {other}). Choose another "
                         "--out, or --overwrite it.")
    file = path if state["finished"] else path.with_suffix(".jsonl.partial")
    return new | state if file.exists() and file.stat().st_size >= state["bytes"] else new


def prepare_split(path, inputs, info, workers, overwrite):
    """One split of a dataset, or a shard of it -> path. False if the raw data has none of it.
    inputs: all that decides what is written; info: what else run.json says."""
    progress = dict.fromkeys(("frames", "bytes", "records", "bad"), 0)
    progress |= {"finished": False, "bad_examples": [], "notes": {}}
    # splits and shards may be prepared side by side: each has a lock of its own
    with render.lock_folder(path.with_name(f".{path.stem}.lock")), naming(path):
        state = saved_state(path, info | {"inputs": inputs} | progress, overwrite)
        if state["finished"]:
            print(f"{path}: was prepared before, by the same command; kept")
            return True
        frames = list_frames(inputs)
        if not frames:
            return False
        i, n = inputs["shard"]
        frames = frames[len(frames) * (i - 1) // n:len(frames) * i // n]

        dataset = DATASETS[inputs["dataset"]]
        labels = {key: inputs[key] for key in "points seed limits occlusion".split()}
        published = inputs["paper_labels"] and dataset.paper_labels
        make = partial(make_record, folder=path.parent, published=published, **labels)
        write_records(frames, path, make, workers, dataset.chunk, state)

    few = len(frames) - state["records"] - state["bad"]
    print(f"{path}: {state['records']} of {len(frames)} images; {few} have fewer than {MIN_POINTS} "
          f"labels, {state['bad']} cannot be read")
    for what, times in state["notes"].items():
        print(f"  {times:,} {what}")
    for example in state["bad_examples"]:
        print(f"left out: {render.printable(example)}", file=sys.stderr)
    if state["bad"] > BAD_SHARE * len(frames):
        print(f"WARNING: {state['bad']} of {len(frames)} images cannot be read: is the download "
              "complete?", file=sys.stderr)
    return True


def list_frames(inputs):
    """What --stride and --limit leave of a split, about 1 KB an image in memory."""
    dataset = DATASETS[inputs["dataset"]]
    flags = {flag: inputs[flag] for flag in dataset.flags.split()}
    frames = dataset.reader(Path(inputs["root"]), inputs["split"], **flags)
    if "stride" not in flags:
        frames = islice(frames, 0, None, inputs["stride"])
    return list(islice(frames, inputs["limit"]))


# --------------------------------------------------------------------------------------------------
# self-check: the table of a jsonl, and what is wrong with it. Only what a file itself can prove is
# called a fault.

CHECK_LINES = 100_000  # whose depths are in the quantiles, spread over the file
CHECK_IMAGES = 20_000  # whose headers are read, at most
CHECK_SHAPES = 300  # records whose labels are tested for being z
CHECK_PAIRS = 120  # images compared with their neighbours, to find labels on the wrong image
CHECK_POINTS = 200  # labels of an image in any statistics
# largest numbers of 16 bits, in the units of depth files [m]
SATURATED = [top / scale for top in NOTHING[:2] for scale in (100, 256, 512, 1000, 4000, 5000)]
DEPTH_STEPS = (1 / 1000, 1 / 4000, 50 / 65535, 1 / 5000, 1 / 256)  # of depth PNGs [m]


def check(paths, image_root=None):
    """Print table and faults of jsonl files -> number of kinds of fault."""
    reports = [check_file(str(path), image_root) for path in paths]
    for a, b in combinations(reports, 2):
        shared = sorted(a["scenes"] & b["scenes"], key=str)
        if shared and is_train(a["path"]) != is_train(b["path"]):
            example = f"{shared[0]} is in {a['path']} and in {b['path']}"
            a["faults"]["scenes shared between splits"] = [len(shared), example]

    head = "file images points min 5% 25% 50% 75% 95% max focal 2.0m paper".split()
    print("\n" + render.text_table([head, *(report["row"] for report in reports)]))
    for report in reports:
        print(f"  {report['path']}: {report['note']}")
        for what, (times, example) in report["faults"].items():
            line = f"  FAULT {report['path']}: {what} ({times} x); {example}"
            print(render.printable(line))
    total = sum(len(report["faults"]) for report in reports)
    kinds = "1 kind" if total == 1 else f"{total} kinds"
    print(f"{kinds} of faults found" if total else "no faults found", flush=True)
    return total


def is_train(path):
    return "train" in os.path.basename(path)


def check_file(path, image_root):
    """-> "path", "row" of the table, "faults" {what: [count, first example]}, "note", "scenes"."""
    faults = {}

    def add(what, n, example):
        faults.setdefault(what, [0, f"line {n + 1}: {example}"])[0] += 1

    with suppress(OSError):  # the index is made anew
        Path(path).with_suffix(".idx").unlink()
    # labels as they are in the file, whatever kind of depth it says
    records = render.Records(path, image_root, label_type="euclidean")
    numbers, scenes, said = check_labels(path, len(records), add)
    check_images(spread(records, CHECK_IMAGES), add)
    neighbour = shifted_by(records)
    if neighbour:
        add("labels on the wrong image", 0,
            f"shifted: they fit the image of the {neighbour} line better")
    looks = depth_kind(record for _, record in spread(records, CHECK_SHAPES))
    if looks and looks != said:
        fault = "z sold as Euclidean" if looks == "z" else "Euclidean depth declared as z"
        add(fault, 0, "the labels lie on planes, or on the steps of a depth PNG, only when taken "
            f"as {looks}; convert them, or correct the 'depth_type' of each record")
    note = f"labels are said to be {said}" + ", and look like it" * (looks == said)
    return {
        "path": path,
        "row": table_row(path, len(records), *numbers),
        "faults": faults,
        "note": note,
        "scenes": scenes,
    }


def spread(records, most):
    """(line number, record) of the lines that can be read, of at most `most` spread evenly."""
    for n in np.linspace(0, len(records) - 1, min(len(records), most)).astype(int):
        with suppress(ValueError):
            yield int(records.lines[n]), thinned(records[n])


def thinned(record):
    """The record with at most CHECK_POINTS of its labels."""
    step = math.ceil(len(record["depth"]) / CHECK_POINTS) or 1
    return record | {key: record[key][::step] for key in ("pixel_coords", "depth")}


def check_labels(path, count, add):
    """One pass over all lines for the faults that need no other file -> numbers for the table, all
    scenes, and the kind of depth that most records declare."""
    samples = [np.zeros((2, 0))]  # labels, and the same as the other kind of depth
    focals, scenes, images = set(), set(), {}
    points, z, low, high = 0, 0, math.inf, 0.0
    with open(path, "rb") as file:
        for n, line in enumerate(tqdm(file, "check", count, disable=count < 20_000)):
            if not line.strip():
                continue
            try:
                record = render.record_arrays(render.parse_line(line, "cannot be read"))
            except ValueError as error:
                add("malformed line", n, error)
                continue
            faults = list(render.label_faults(record, doubt=True))
            for what, example in faults:
                add(what, n, example)
            if record.get("pose") is not None and render.pose_matrix(record["pose"]) is None:
                add("pose is none", n, "it needs 16 finite numbers with a rotation")
            depth = record["depth"]
            if not len(depth):
                add("no labels", n, "the record has no point")
            depth = depth[np.isfinite(depth) & (depth > 0)]
            points += len(depth)
            low, high = depth.min(initial=low), depth.max(initial=high)
            is_z = record.get("depth_type") == "z"
            z += is_z
            if n % (1 + count // CHECK_LINES) == 0 and not faults:
                part = thinned(record)
                rays = ray_length(*part["pixel_coords"].T, part["intrinsics"])
                samples.append([part["depth"], part["depth"] * (rays if is_z else 1 / rays)])
            focals.add(round(record["intrinsics"][0], 1))
            scenes.add(str(record.get("scene")))
            first = images.setdefault(hash(record["image"]), n)
            if first < n:
                add("duplicate image", n, f"the image of line {first + 1} again")

    depths, others = np.concatenate(samples, 1)
    check_values(depths, others, add)
    numbers = points, min(low, high), high, depths, sorted(focals)
    return numbers, scenes - {"None"}, "z" if 2 * z > count else "euclidean"


def check_values(depths, others, add):
    """Finds labels in another unit than metres, and many at one value, by which sensors say that
    nothing returned. depths: a file's labels (N,); others: as the other kind, z or Euclidean."""
    if fault := other_unit(depths, 1):
        add("labels are not in metres", 0, fault)
    for values in (np.round(depths, 3), np.round(others, 3)):
        found, times = np.unique(values, return_counts=True)
        low, high = np.searchsorted(np.sort(values), (0.95 * found, 1.05 * found))
        saturated = np.abs(found[:, None] - SATURATED).min(1, initial=1) < 0.002
        # ranges end at whole and half metres, and a wall straight ahead, without noise, anywhere
        limit = np.abs(found - np.round(2 * found) / 2) < 0.002
        many = np.where(saturated, 0.002 * len(values) + 4, 0.03 * len(values) + 20)
        alone = (times > many) & (times > 0.4 * (high - low)) & (saturated | limit)
        for k in np.flatnonzero(alone)[:1]:
            add("many labels at one value", 0, f"in the whole file {times[k]} of {len(values)} at "
                f"{found[k]:g} m, and few near it: where the sensor saw nothing? Its depth files "
                "should hold 0 there")


def table_row(path, count, points, low, high, depths, focals):
    if not len(depths):
        depths = np.array([math.nan])
    quantiles = np.quantile(depths, (0.05, 0.25, 0.5, 0.75, 0.95))
    two = np.mean(np.maximum(depths / 2, 2 / depths) < 1.25)  # delta1 of always answering 2.0 m
    focal = "-".join(f"{f:.0f}" for f in sorted({*focals[:1], *focals[-1:]}))
    paper = "-"
    for name, constant in render.PAPER_CONSTANT.items():
        if name in os.path.abspath(path).lower() and not is_train(path):
            paper = f"{constant:.3f}"
    return [
        path,
        str(count),
        str(points),
        *(f"{d:.2f}" for d in (low, *quantiles, high)),
        focal + f" ({len(focals)})" * (len(focals) > 1),
        f"{two:.3f}",
        paper,
    ]


def check_images(records, add):
    """The images are there, of the size that the intrinsics say, and no two files are the same."""
    seen = {}
    for n, record in records:
        path, said = record["image"], record["intrinsics"][4:]
        try:
            size, exif = image_size(path)
            with open(path, "rb") as file:
                content = hash((os.path.getsize(path), file.read(1 << 16)))
        except (OSError, ValueError) as error:
            add("image not found or not readable", n, error)
            continue
        if exif >= 5 and render.labels_are_upright(exif, size, said, record.get("orientation")):
            size = size[::-1]
        if size != said:
            add("image size is not that of the intrinsics", n,
                f"{path} is {size} px, intrinsics say {said}")
        line, first = seen.setdefault(content, (n, path))
        if first != path:
            add("duplicate image", n, f"{path} has the same content as line {line + 1}")


def depth_kind(records):
    """What the labels look like: "euclidean", "z", or None where one cannot tell.

    Two kinds of evidence. Planes: rooms and streets are full of them, and labels lie on flat ones
    only when they are read as what they are. Steps: a depth PNG holds z in fixed steps, so labels
    converted from it are multiples of a step after division by their ray, and hardly before. Plain
    multiples of a step prove less (somebody may have rounded, or measured Euclidean depth), so they
    count only where neither planes nor the record itself speak against it."""
    planes, plain, divided = [], [np.zeros(0)], [np.zeros(0)]
    for n, record in enumerate(records):
        xy, depth, intrinsics = record["pixel_coords"], record["depth"], record["intrinsics"]
        if len(depth) < 20:
            continue
        rays = ray_length(*xy.T, intrinsics)
        places = render.unproject(xy, rays, intrinsics)  # (N, 3): x, y, 1
        triples = rng_for(0, f"triples {n}").integers(0, len(depth), (300, 3))
        as_euclidean = largest_plane(rays / depth, places, triples)
        planes.append([as_euclidean, largest_plane(1 / depth, places, triples)])
        far = rays > 1.02  # near the axis the two kinds are equal
        divided.append((depth / rays)[far])
        if record.get("depth_type") != "euclidean":
            plain.append(depth[far])

    planes = np.array(planes).reshape(-1, 2)
    as_euclidean, as_z = planes.sum(0)
    if on_steps(np.concatenate(divided), (*DEPTH_STEPS, 1 / 512)):
        return "euclidean"
    if on_steps(np.concatenate(plain), DEPTH_STEPS) and as_z > 0.9 * as_euclidean:
        return "z"
    gain = planes[:, 0] - planes[:, 1]
    behind, ahead = sorted((as_euclidean, as_z))
    clear = len(gain) >= 5 and ahead - behind >= 30 and ahead > 1.25 * behind
    steady = len(gain) >= 20 and abs(gain.mean()) > 6 * standard_error(gain)
    if clear or steady:
        return "euclidean" if as_euclidean > as_z else "z"
    return None


def largest_plane(inverse_depth, places, triples):
    """Most points (of N) within 0.5 % of a plane through three of them: on a plane 1 / z is linear
    in x and y."""
    triples = triples[np.abs(np.linalg.det(places[triples])) > 1e-4]  # (T, 3)
    planes = np.linalg.solve(places[triples], inverse_depth[triples][..., None])[..., 0]
    near = np.abs(planes @ places.T - inverse_depth) < 0.005 * inverse_depth
    return int(near.sum(1).max(initial=0))


def on_steps(values, steps):
    """Whether (nearly) all values are multiples of one of the steps, up to their 4 decimals."""
    return len(values) >= 50 and any(
        np.mean(np.abs(values / s - np.round(values / s)) * s < 6e-5) > 0.98 for s in steps)


def standard_error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))


def shifted_by(records):
    """"next" or "previous" if the labels fit the image of that line better than their own, by a
    difference that chance does not make (4.5 standard errors)."""
    if len(records) < 12:
        return None
    gains = []
    for n in np.unique(np.linspace(1, len(records) - 2, CHECK_PAIRS).astype(int)):
        with suppress(OSError, ValueError):  # counted elsewhere
            record, shown = thinned(records[n]), [records[n + step] for step in (0, 1, -1)]
            own, *others = (unexplained(record, other) for other in shown)
            gains.append([own - other for other in others])
    for gain, neighbour in zip(np.array(gains).reshape(-1, 2).T, ("next", "previous")):
        gain = gain[np.isfinite(gain)]
        if len(gain) >= 10 and gain.mean() > 4.5 * standard_error(gain) > 0:
            return neighbour
    return None


def unexplained(record, shown):
    """How badly the colours in the image of `shown` explain the labels of `record`: the error of
    predicting each log depth from those of similar colour. NaN if the labels are few, or not all in
    the image."""
    xy, log_depth = record["pixel_coords"], np.log(record["depth"])
    image = render.open_image(shown["image"], shown["intrinsics"][4:], shown.get("orientation"))
    if len(xy) < 20 or (xy < 0).any() or (xy >= image.size).any():
        return math.nan
    rgb = image.filter(ImageFilter.BoxBlur(1))  # the mean of 3 x 3
    x, y = xy.astype(int).T
    colours = np.asarray(rgb, np.float32)[y, x]
    gap = ((colours[:, None] - colours[None]) ** 2).sum(-1) / (2 * 12 ** 2)
    weight = np.exp(-gap) + 1e-6
    np.fill_diagonal(weight, 0)
    return np.abs(weight @ log_depth / weight.sum(1) - log_depth).mean()


# --------------------------------------------------------------------------------------------------
# --verify: whether images bear out the conventions by which their depth and poses are read

VERIFY_IMAGES = 40
VERIFY_AHEAD = 6  # an image is compared with this many that follow it
VERIFY_POINTS = 400  # of its labels, about, that are moved to each of these
VERIFY_GAIN = 0.02  # of agreement, by which another convention has to be better


class Seen(NamedTuple):
    """An image and its labels, and a grid of cells about as wide as the labels are apart."""
    frame: Frame
    colours: np.ndarray  # (H, W, 3) of mean 0 and deviation 1
    xy: np.ndarray  # (N, 2) [px]
    z: np.ndarray  # (N,) [m]
    pose: np.ndarray | None
    intrinsics: tuple
    cell: int  # [px]
    grid: np.ndarray  # (rows, columns): a label in each cell, -1 where there is none


def verify(frames):
    """Print a table of verdicts -> how many are wrong."""
    seen, bad = [], []
    for frame in tqdm(frames, "verify", disable=None):
        try:
            seen.append(see(frame))
        except Exception as error:  # as in naming
            bad.append(reason(error, frame.id))
    count = f"{len(seen)} of {len(frames)} images read"
    rows = [("files", not bad, "; ".join([count, *bad[:1]]))]
    if seen:
        depths = np.concatenate([one.z for one in seen])
        fault = other_unit(depths, seen[0].frame.scale)
        poses = verify_poses(list(pairs_in(seen, False)))
        rows += [
            # nothing but poses can prove it
            ("unit", False if fault else poses[0] or None,
             fault or f"median depth {np.median(depths):.2f} m: does that fit the place?"),
            ("places of labels", *verify_edges(seen)),
            ("z or Euclidean", *verify_kind(seen)),
            ("poses", *poses),
            ("poses of two cameras", *verify_poses(list(pairs_in(seen, True)))),
        ]
    said = {True: "right", False: "WRONG", None: "cannot tell"}
    for what, right, why in rows:
        print(f"{what:22}{said[right]:13}{why}")
    return sum(right is False for _, right, _ in rows)


def see(frame):
    frame, (x, y, _, z), orientation, _ = load_labels(frame, occlusion=False)
    w, h = frame.intrinsics[4:]
    image = frame.pixels or render.open_image(frame.image, (w, h), orientation)
    colours = np.asarray(image, np.float32)
    colours = (colours - colours.mean()) / (colours.std() + 1e-6)
    cell = max(1, int(math.sqrt(w * h / len(z))))
    grid = np.full((h // cell + 1, w // cell + 1), -1)
    grid[y // cell, x // cell] = np.arange(len(z))
    return Seen(frame, colours, np.stack([x, y], 1), z, frame.pose, frame.intrinsics, cell, grid)


def beyond(gains, least):
    """Whether gains (N,) are above `least` on average, and above 0 not by chance."""
    return len(gains) >= 3 and np.mean(gains) > max(least, 4 * standard_error(gains))


def verify_edges(seen):
    """Colours change where depth does if labels are at their pixels -> right or not, why."""
    reach = max(6, *(len(one.colours) // 40 for one in seen))
    near, found = [], []
    for axis, way in enumerate(("right of", "below")):
        profiles = (edge_profile(one, axis, reach) for one in seen)
        profiles = np.array([profile for profile in profiles if profile is not None])
        if not len(profiles):
            continue
        best = int(profiles.mean(0).argmax())
        peak, unshifted = profiles[:, best], profiles[:, reach]
        if beyond(peak, 1.5):
            off = best - reach
            close = abs(off) <= max(1, 0.3 * seen[0].cell)
            near.append(close or (False if beyond(peak - unshifted, 0.2) else None))
            found.append(f"{off:+} px {way}")
    why = f"colour edges lie {', '.join(found)} those of depth" if found else "few clear edges"
    return False if False in near else near == [True, True] or None, why


def edge_profile(one, axis, reach):
    """How often, as a multiple of chance, colours along an axis change most at -reach..reach px
    from a jump of depth (2 reach + 1,). None if there are few jumps."""
    change = np.abs(np.diff(one.colours.swapaxes(0, axis), axis=1)).sum(-1)
    along, across = one.xy[:, axis], one.xy[:, 1 - axis]
    strip = across // one.cell
    order = np.lexsort((along, strip))
    a, b = order[:-1], order[1:]  # neighbours along the axis
    jump = np.abs(np.log(one.z[a] / one.z[b])) > 0.1
    jump &= (strip[a] == strip[b]) & (along[b] - along[a] <= 2 * one.cell)

    place = (along[a] + along[b] - 1) // 2
    jump &= (place >= reach) & (place < change.shape[1] - reach)
    if jump.sum() < 20:
        return None
    around = place[jump, None] + np.arange(-reach, reach + 1)
    around = change[across[a][jump, None], around]
    shares = np.bincount(around.argmax(1), minlength=2 * reach + 1) / len(around)
    shares[[0, -1]] = 0  # where the colours change most beyond the reach
    return np.convolve(shares, [0.25, 0.5, 0.25], "same") * len(shares)


def other_kind(one):
    """Its map read as holding Euclidean depth instead of z, or the other way round."""
    rays = ray_length(*one.xy.T, one.intrinsics)
    return one._replace(z=one.z * rays if one.frame.kind == "euclidean" else one.z / rays)


def verify_kind(seen):
    """Depths lie on planes only when read as the kind they are -> right or not, why."""
    kind = seen[0].frame.kind
    if kind not in MAPS:
        return None, "points, not maps"
    held = (other_kind(one) if kind == "euclidean" else one for one in seen)
    looks = depth_kind(
        thinned({"pixel_coords": one.xy, "depth": one.z, "intrinsics": one.intrinsics})
        for one in held)
    return looks and looks == kind, f"maps look like {looks or 'either'}, and are read as {kind}"


def pairs_in(seen, stereo):
    """Images (a, b) of a scene, both with a pose: of two cameras at one time, or others."""
    for i, a in enumerate(seen):
        for b in seen[i + 1:i + 1 + VERIFY_AHEAD]:
            if a.pose is None or b.pose is None or a.frame.scene != b.frame.scene:
                continue
            same = a.frame.camera == b.frame.camera or a.frame.time is None
            if stereo != same and (same or abs(a.frame.time - b.frame.time) < 0.1):
                yield a, b


def posed(change):
    return lambda one: one._replace(pose=change(one.pose))


def divided(factor):
    return lambda one: one._replace(z=one.z / factor)


MISTAKES = {  # -> an image without it
    "poses are world-to-camera": posed(np.linalg.inv),
    "poses are transposed": posed(np.transpose),
    "poses have OpenGL axes": posed(lambda pose: pose @ OPENGL_TO_OPENCV),
    "poses are world-to-camera with OpenGL axes":
        posed(lambda pose: np.linalg.inv(pose) @ OPENGL_TO_OPENCV),
    "poses are of other images": posed(lambda pose: np.eye(4)),
    "fx and fy are swapped":
        lambda one: one._replace(intrinsics=one.intrinsics[1::-1] + one.intrinsics[2:]),
    "z and Euclidean depth are confused": other_kind,
    **{f"depth is {factor:g} x that in the unit of the poses": divided(factor)
       for factor in (0.001, 0.01, 0.1, 0.25, 0.5, 0.8, 1.25, 2, 4, 10, 100, 1000)},
}


def verify_poses(pairs):
    """Labels that are moved to another image find their depth and colour there -> right or not,
    why. A mistake is likely if without it they agree better."""
    if len(pairs) < 3:
        return None, f"{len(pairs)} pairs of images with poses"
    given = np.array([agreement(a, b) for a, b in pairs])
    gains = {
        what: np.array([agreement(mend(a), mend(b)) for a, b in pairs]) - given
        for what, mend in MISTAKES.items()
    }
    likely = max(gains, key=lambda what: gains[what].mean())
    why = f"agreement {given.mean():.2f}"
    if beyond(gains[likely], VERIFY_GAIN):
        return False, f"{why}, and {np.mean(given + gains[likely]):.2f} if {likely}"
    still = gains["poses are of other images"]
    return beyond(-still, VERIFY_GAIN) or None, f"{why}, without poses {np.mean(given + still):.2f}"


def agreement(a, b):
    """Of a's labels, moved to image b, with the depth and colour there: 1 if all are the same, 0 if
    they match no better than at random places of b, or fall outside."""
    step = 1 + len(a.z) // VERIFY_POINTS
    xy, z = a.xy[::step], a.z[::step]
    x, y = xy.T
    colours = a.colours[y, x]
    points = render.unproject(xy, z * ray_length(x, y, a.intrinsics), a.intrinsics)
    points = move(np.linalg.inv(b.pose) @ a.pose, points)

    ahead = points[:, 2] > 0
    place = project(points, b.intrinsics)
    pixels = np.floor(place[:, :2] + 0.5)
    inside = ((pixels >= 0) & (pixels < b.intrinsics[4:])).all(1)
    u, v = pixels[inside].astype(int).T
    there = unlike(colours[ahead][inside], place[inside, 3], b, u, v)
    u, v = b.xy[rng_for(0, "chance").integers(0, len(b.xy), len(xy))].T
    chance = unlike(colours, z, b, u, v).mean()
    return (1 - there / chance).sum() / len(xy)


def unlike(colours, z, b, u, v):
    """0 to 1: colours and z of points (N,) against those at pixels u, v of b."""
    off = np.abs(colours - b.colours[v, u]).mean(-1).clip(0, 1)
    if b.frame.kind not in MAPS:  # LiDAR points are the same in all images, whatever the poses
        return off
    label = b.grid[v // b.cell, u // b.cell]
    far = (10 * np.abs(np.log(z / b.z[label]))).clip(0, 1)
    return np.where(label < 0, off, (off + far) / 2)


# --------------------------------------------------------------------------------------------------
# download and raw data

RETRIES = 5  # attempts in a row that bring no byte
RETRY_WAIT = 0.5  # [s], doubled each time


def download(url, path, md5=None):
    """Fetch url to path, resuming where a cut connection or an earlier run stopped. Accepts nothing
    but the size that the server announced and, if known, the checksum."""
    part, noted = (path.with_name(f"{path.name}.part{end}") for end in ("", ".json"))
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    failures, size = 0, None
    while failures < RETRIES:
        before = part.stat().st_size
        why = "the connection ended"
        try:
            size = fetch(url, part, noted)
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}"
            if error.code < 500:
                raise ValueError(f"{url}: {why}. Fetch it by hand and put it at {path}.") from None
        except (OSError, HTTPException) as error:
            why = reason(error)
        have = part.stat().st_size
        if have == size:
            break
        failures = 0 if have > before else failures + 1
        time.sleep(RETRY_WAIT * 2 ** failures)
    else:
        raise ValueError(f"{url}: {RETRIES} attempts failed ({why}); {have} of {size or 'unknown'} "
                         f"bytes are in {part}. Give the same command again to resume.")

    noted.unlink(missing_ok=True)
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise ValueError(f"{url}: has checksum {found} instead of {md5}, and was thrown away. "
                             "Give the same command again.")
    else:
        print(f"{path}: there is no checksum to compare it with")
    os.replace(part, path)


def fetch(url, part, noted):
    """One attempt -> the size that the file should have. Appends to `part` only if the server
    confirms (If-Range) that its file is still the one that was noted: [ETag or date, size]."""
    headers = {"User-Agent": "prepare.py"}
    start = part.stat().st_size
    if noted.exists():
        mark, size = read_json(noted, list)
        if start == size:
            return size
        headers |= {"Range": f"bytes={start}-", "If-Range": mark}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply, open(part, "r+b") as file:
        if reply.status != 206:  # another file by now, or all of it again
            start = 0
        noted.unlink(missing_ok=True)
        file.truncate(start)
        file.seek(start)
        length = reply.headers["Content-Length"]
        size = start + int(length) if length else None
        mark = reply.headers["ETag"] or reply.headers["Last-Modified"]
        if size and mark:
            write_json(noted, [mark, size])
        with tqdm.wrapattr(reply, "read", size, initial=start, desc=part.stem) as source:
            shutil.copyfileobj(source, file)
        return file.tell() if size is None else size  # without a size, the end is the end


def unpack(archive, root):
    """Zip or tar -> root, by way of a hidden folder, so that root never holds half of it."""
    hidden = root / ".unpacking"
    shutil.rmtree(hidden, ignore_errors=True)
    print(f"unpacking {archive}")
    try:
        options, size = {"filter": "data"}, archive.stat().st_size
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                options, size = {}, sum(part.file_size for part in file.infolist())
        free = shutil.disk_usage(root).free
        if free < size:
            raise ValueError(f"takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        shutil.unpack_archive(archive, hidden, **options)
        for path in listed(hidden):
            if (root / path.name).exists():
                print(f"{root / path.name}: is there already, and is kept")
            else:
                os.replace(path, root / path.name)
    except Exception as error:  # as in naming
        raise ValueError(f"{archive}: cannot be unpacked ({reason(error)}). If it is damaged, "
                         "delete it; then give the same command again.") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def find_root(dataset, root):
    """The folder that looks like the dataset's: root, or one or two below or above it, where what
    was found is in root. None if there is none."""
    below = listed(root, "*/") + listed(root, "*/*/")
    for folder in (root, *below, *root.parents[:2]):
        for mark in DATASETS[dataset].marks.split():
            if any(found.is_relative_to(root) for found in listed(folder, mark)):
                return folder
    return None


def raw_root(dataset, wanted, fetch_it, url):
    """The root of the raw data, which is downloaded if need be. Raises ValueError that says what to
    get, from where, how large, under which terms, and where to put it."""
    row = DATASETS[dataset]
    root = find_root(dataset, wanted)
    if not root and fetch_it and row.download:
        known, name, md5 = row.download
        if not (wanted / name).exists():
            download(url or known, wanted / name, None if url else md5)
        unpack(wanted / name, wanted)
        root = find_root(dataset, wanted)
    if not root:
        raise missing_raw(dataset, wanted)
    if root != wanted:
        print(f"{wanted} is not the root of {dataset}; using {root}", file=sys.stderr)
    return root


def missing_raw(dataset, root):
    row = DATASETS[dataset]
    fetch = f"\n    or run: python prepare.py --dataset {dataset} --download --root {root}"
    if dataset == "folder" and not os.path.isdir(root):
        return ValueError(f"{root}: no such folder. Give that of your photos and depth as --root.")
    return ValueError(f"{root}: has no raw data of {dataset}, or none of this split.\n"
                      f"    needed: {row.get.strip()}\n    put it in: {root} (or give --root)"
                      + fetch * bool(row.download))


# --------------------------------------------------------------------------------------------------


def shard_of(text):
    """An argparse type: I/N -> [I, N]."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text}: needs I/N with I from 1 to N, such as 3/8")
    return [i, n]


def parse_args(argv=None):
    parser = render.make_parser(__doc__)
    group = parser.add_argument_group("what to do: one of these, there is no default")
    flag = group.add_mutually_exclusive_group(required=True).add_argument
    flag("--dataset", choices=sorted(DATASETS), help="prepare this")
    flag("--check", type=file_path, nargs="+", metavar="JSONL",
         help="table and faults of jsonl files; exit code 1 if there are any")
    flag = group.add_argument
    flag("--verify", action="store_true",
         help="with --dataset: do its first images bear out how it is read? Exit code 1 if a "
         "verdict is WRONG")
    flag("--split", choices=BOTH,
         help="default: all splits that the paper uses of the dataset; folder: train")
    flag("--workers", type=COUNT, default=os.cpu_count(), help="processes")

    flag = parser.add_argument_group("files").add_argument
    flag("--root", type=file_path, help="raw data; default: data/raw/<dataset>")
    flag("--out", type=file_path, help="output folder; default: data/<dataset>, or data/<name>")
    flag("--overwrite", action="store_true", help="replace what another command wrote to --out")
    flag("--image-root", type=file_path,
         help="with --check: folder of the images; default: each jsonl's own")
    flag("--download", action="store_true",
         help="fetch and unpack (SUN RGB-D, NYUv2, iBims-1, DDAD)")
    flag("--url", help="with --download: fetch this address; default: the authors'")

    flag = parser.add_argument_group("images and labels").add_argument
    flag("--points", type=COUNT, default=100, help="labelled pixels an image (Sec. 4)")
    flag("--seed", type=NATURAL, default=0, help="which pixels are drawn; toy: also the rooms")
    flag("--min-depth", type=render.number(float, 0), help="Euclidean [m]; default: by dataset")
    flag("--max-depth", type=render.number(float, 0, render.FARTHEST, exclusive=True),
         help="Euclidean [m]; default: by dataset")
    flag("--occlusion", action="store_true", help="drop LiDAR points that the camera cannot see")
    flag("--paper-labels", action="store_true", help="the published labels (z, 0.8 x), marked")

    flag("--stride", type=COUNT,
         help="every k-th image; default: 1, ScanNet++: every 10th video frame")
    flag("--limit", type=COUNT, help="at most this many images; default: all")
    flag("--shard", type=shard_of, metavar="I/N", default="1/1",
         help="part I of N, to be joined with cat")
    flag("--all-images", action="store_true",
         help="nyuv2: all 1,449 images, not the 654 test images")

    flag = parser.add_argument_group("--dataset folder").add_argument
    flag("--name", type=file_path, help="of the set, for --out; default: that of dataset or --root")
    flag("--intrinsics", metavar="FX,FY,CX,CY", help="[px]; default: from its files")
    flag("--depth-scale", type=POSITIVE,
         help="numbers per metre; default: 1000 for integers, 1 for floating-point numbers")
    flag("--depth-type", choices=("z", "euclidean"), default="z", help="what the depth maps hold")

    flag = parser.add_argument_group("--dataset toy").add_argument
    flag("--images", type=COUNT, default=2600, help="training images")
    flag("--val-images", type=COUNT, default=400, help="validation images")
    flag("--light", choices=("lamp", "ambient"), default="lamp",
         help="a lamp on the camera, or daylight")
    flag("--focals", type=POSITIVE, nargs="+", help="these focal lengths [px] in "
         "images of one size; default: one field of view in images of four sizes")
    flag("--lenses", type=POSITIVE, nargs=2, metavar=("LOW", "HIGH"), help="each room has a camera "
         "of its own: fx between these [px], fy up to a third unlike it, its centre off the "
         "middle; default: --focals")
    flag("--drive", action="store_true", help="the views of a room are those of a cart that drives "
         "straight ahead, instead of a walk")
    return parser.parse_args(argv)


def split_inputs(args, split, root):
    """All that decides what is written for a split, as run.json holds it."""
    dataset = DATASETS[args.dataset]
    low, high = args.min_depth or dataset.range[0], args.max_depth or dataset.range[1]
    if low >= high:
        raise ValueError(f"--min-depth {low} --max-depth {high}: no depth lies between them.")
    inputs = {"split": split, "root": str(root), "limits": [low, high]}
    keys = "dataset points seed occlusion paper_labels stride limit shard " + dataset.flags
    inputs |= {key: getattr(args, key) for key in keys.split()}
    if args.dataset == "toy" and split == "val":
        inputs["images"] = args.val_images
    return inputs


@render.command
def main(argv=None):
    args = parse_args(argv)
    if args.check:
        sys.exit(check(args.check, args.image_root) > 0)
    dataset = DATASETS[args.dataset]
    splits = dataset.splits.split()
    if args.split and args.split not in splits:
        raise ValueError(f"--split {args.split}: the paper uses {args.dataset} for {splits[0]}.")
    name, wanted = args.dataset, splits
    if name == "folder":
        name = os.path.basename(os.path.abspath(args.root or name))
        wanted = ["train"]
    name = args.name or name
    if args.split:
        wanted = [args.split]
    out = Path(args.out or f"data/{name}")
    i, n = args.shard
    shard = f".{i:0{len(str(n))}d}-of-{n}" if n > 1 else ""

    root = ""
    if dataset.marks:
        root = Path(args.root or f"data/raw/{dataset.raw or args.dataset}").absolute()
        root = raw_root(args.dataset, root, args.download, args.url)
    info, paths = render.run_info(args), []
    for split in wanted:
        path = out / f"{split}{shard}.jsonl"
        inputs = split_inputs(args, split, root)
        if args.verify:
            frames = list_frames(inputs | {"limit": args.limit or VERIFY_IMAGES})
            if frames:
                sys.exit(verify(frames) > 0)
        elif prepare_split(path, inputs, info, args.workers, args.overwrite):
            paths.append(path)
    if not paths:
        raise missing_raw(args.dataset, root)

    # together with the other split, if it is there: they must share no scene
    paths += [out / f"{split}.jsonl" for split in splits]
    paths = [path for path in dict.fromkeys(paths) if path.exists() and path.stat().st_size]
    if check(paths):
        print("WARNING: the self-check found faults in what was written, see above",
              file=sys.stderr)
    if args.dataset == "folder":
        print(f"are poses and depth read rightly? python prepare.py --dataset folder --root "
              f"{shlex.quote(str(root))} --verify")


if __name__ == "__main__":
    main()
