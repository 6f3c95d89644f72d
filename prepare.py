"""Turn a raw dataset into one jsonl of labelled pixels, the only form of data that the other scripts know.

Reads:  a dataset as its authors distribute it (--root), or nothing at all (--dataset toy).
Writes: data/<name>/<split>.jsonl, one image a line: {"image", "intrinsics": [fx, fy, cx, cy, w, h], "pixel_coords":
        [[x, y], ...], "depth": [metres, ...]} and, where known, "scene", "camera", "time" [s], "pose" (camera-to-world,
        4 x 4 row-major, OpenCV axes); <split>.idx (byte offsets of the lines); <split>.prepare.json (the flags and
        how far it got); rgb/ with the images that cannot be used as they are (toy, Waymo, ETH3D).

Depth is the Euclidean distance from the camera centre in metres. Pixel (0, 0) is the centre of the first pixel.

    python prepare.py --dataset toy                                # procedural rooms: half a minute, no download
    python prepare.py --dataset ibims1 --download                  # fetch, unpack, prepare
    python prepare.py --dataset nuscenes --root /data/nuscenes --workers 16
    python prepare.py --dataset hm3d --root /data/omnidata --shard 3/8   # machine 3 of 8; join the parts with cat
    python prepare.py --dataset folder --root my_rgbd --intrinsics 610,610,319.5,239.5
    python prepare.py --check data/*/*.jsonl                       # table and faults; exit code 1 if there are any

A run that was interrupted goes on where it stopped when the same command is given again. The self-check also runs after
each prepare; there its findings are warnings, because the file is complete and the judgement is the user's.
Paper: Sec. 4 (DepthLMBench) and App. A.2. Deviations are marked by lines that begin with "# paper:".
"""

import argparse
import csv
import errno
import fcntl
import glob
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from os.path import basename, dirname, exists, getsize, isdir, join
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

MIN_POINTS = 10                 # an image with fewer labelled pixels is left out
CHUNK = 32                      # frames that a worker takes at once, and what a kill can cost
LIDAR_WINDOW = 51_000_000       # Argoverse2: an image and its sweep are at most half a turn + 1 ms apart [ns]
SCANNETPP_EVERY = 10            # the paper uses 1 M of 10 M video frames
SCANNETPP_VIDEO = (1920, 1440)  # the size that the intrinsics of ScanNet++'s iPhone stream refer to [px]
ETH3D_FOCAL = 1000              # ETH3D's 24-megapixel fisheye images become pinhole images of this focal length [px]
ETH3D_BORDER = 10               # laser pixels nearer to the border than this are left out [px]
WAYMO_CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT")      # camera_name 1..5
WAYMO_TOP = 1                   # laser_name of the roof LiDAR, the only one with a pose for each range-image cell

# What each dataset is, where it comes from, and the Euclidean range of its labels [m] (what evaluation code agrees on).
# marks: a folder that holds one of these is the root. download: (url, file name, md5 or None), if open to all.
DATASETS = {
    "argoverse2": dict(
        range=(1, 200), splits=("train", "val"), marks=("train/*/sensors", "val/*/sensors"),
        get="the Sensor dataset: train-*.tar and val-*.tar, all unpacked to one tree (train/<log>, val/<log>)",
        url="https://www.argoverse.org/av2.html", size="about 1 TB", licence="CC BY-NC-SA 4.0"),
    "waymo": dict(
        range=(1, 200), splits=("train",), marks=("training/camera_image",), chunk=1000,
        get="Waymo Open Dataset v2.0.1, training/: camera_image, camera_calibration, lidar, lidar_calibration, "
            "lidar_pose, lidar_camera_projection, vehicle_pose",
        url="https://waymo.com/open/download (registration)", size="about 1 TB", licence="Waymo Open Dataset licence"),
    "nuscenes": dict(
        range=(1, 200), splits=("train", "val"), marks=("v1.0-trainval", "v1.0-mini", "samples"),
        get="train: v1.0-trainval metadata and blobs 01-10; val: v1.0-mini.tgz, or the same scenes of trainval",
        url="https://www.nuscenes.org/nuscenes#download (registration)", size="mini 4 GB, trainval about 300 GB",
        licence="CC BY-NC-SA 4.0, non-commercial"),
    "scannetpp": dict(
        range=(0.1, 10), splits=("train", "val"), marks=("data/*/iphone",),
        get="splits/ and data/<scene>/iphone with rgb/, rgb_masks/ and depth/ decoded by the official toolkit",
        url="https://kaldir.vc.in.tum.de/scannetpp (registration)", size="about 1.5 TB with the decoded frames",
        licence="ScanNet++ terms of use, non-commercial"),
    "taskonomy": dict(
        range=(0.1, 50), splits=("train",), marks=("rgb", "*/rgb"),
        get="domains rgb, depth_euclidean, point_info of component taskonomy (omnitools.download), and "
            "train_val_test_fullplus.csv",
        url="https://github.com/StanfordVL/taskonomy", size="about 5 TB for the three domains",
        licence="MIT for the tools, Gibson terms of use for the data"),
    "hm3d": dict(
        range=(0.1, 50), splits=("train",), marks=("rgb", "*/rgb"),
        get="domains rgb, depth_zbuffer (or depth_euclidean), point_info of component hm3d of Omnidata's starter set",
        url="https://github.com/EPFL-VILAB/omnidata (registration)", size="several TB",
        licence="Matterport terms of use"),
    "matterport3d": dict(
        range=(0.1, 50), splits=("train",), marks=("v1/scans", "scans", "undistorted_camera_parameters",
                                                   "*/undistorted_camera_parameters"),
        get="undistorted_color_images, undistorted_depth_images, undistorted_camera_parameters of all houses, unzipped",
        url="https://niessner.github.io/Matterport (registration)", size="about 300 GB",
        licence="Matterport terms of use"),
    "ddad": dict(
        range=(1, 200), splits=("val",), marks=("ddad.json",),
        get="DDAD.tar (train+val), unpacked to ddad_train_val/", url="https://github.com/TRI-ML/DDAD", size="257 GB",
        licence="CC BY-NC-SA 4.0",
        download=("https://tri-ml-public.s3.amazonaws.com/github/DDAD/datasets/DDAD.tar", "DDAD.tar",
                  "027686329dda41bd540e71ac5b43ebcb")),
    "eth3d": dict(
        range=(0.1, 100), splits=("val",), marks=("*/dslr_calibration_jpg", "*/*/dslr_calibration_jpg"),
        get="multi_view_training_dslr_jpg.7z and the dslr depth archives of the training scenes, unpacked to one tree",
        url="https://www.eth3d.net/datasets", size="about 30 GB", licence="CC BY-NC-SA 4.0"),
    "sunrgbd": dict(
        range=(0.1, 8), splits=("val",), marks=("SUNRGBD", "kv1", "kv2", "realsense", "xtion"),
        get="SUNRGBD.zip", url="https://rgbd.cs.princeton.edu", size="6.4 GB", licence="research use, cite the authors",
        download=("https://rgbd.cs.princeton.edu/data/SUNRGBD.zip", "SUNRGBD.zip", None)),
    "ibims1": dict(
        range=(0.1, 25), splits=("val",), marks=("depth", "calib"),
        get="ibims1_core_raw.zip", url="https://www.asg.ed.tum.de/lmf/ibims1", size="55 MB",
        licence="see its download page",
        download=("https://dataserv.ub.tum.de/s/m1455541/download?path=%2F&files=ibims1_core_raw.zip",
                  "ibims1_core_raw.zip", None)),
    "nyuv2": dict(
        range=(0.1, 10), splits=("val",), raw="sunrgbd",
        marks=("SUNRGBD", "kv1", "NYUdata", "NYU0001", "*/sync_depth_*.png", "sync_depth_*.png"),
        get="SUNRGBD.zip (its kv1/NYUdata), or the 640 x 480 test images with sync_depth_*.png",
        url="https://rgbd.cs.princeton.edu", size="6.4 GB", licence="research use, cite the authors",
        download=("https://rgbd.cs.princeton.edu/data/SUNRGBD.zip", "SUNRGBD.zip", None)),
    "folder": dict(
        range=(0.1, 200), splits=("train", "val"), marks=("rgb", "*/rgb"),
        get="your own RGB-D images: rgb/<name>.jpg or .png, depth/<name>.png (16 bit) or .npy, intrinsics.txt "
            "(fx fy cx cy, or 3 x 3) or --intrinsics; optional poses/<name>.txt (4 x 4 camera-to-world)",
        url="yourself", size="any", licence="yours"),
    "toy": dict(range=(0.1, 100), splits=("train", "val")),
}
# "Always 2.0 m": delta1 of the constant answer in the paper's Table 1, to recognise the ground truth that was used
PAPER_CONSTANT = {"argoverse2": 0.006, "ddad": 0.010, "nuscenes": 0.010, "eth3d": 0.106, "scannetpp": 0.305,
                  "sunrgbd": 0.384, "ibims1": 0.280, "nyuv2": 0.383}
PAPER_Z = ("nuscenes", "ddad", "ibims1")     # the published labels of these are z

# Splits, always by scene. Lists that come with the data are read from it; these are the ones that do not.
# paper: it holds out "around 10 scenes" unnamed; the released code cuts ScanNet++ at 98 % of the lines (in a scene) and
# evaluates nuScenes on the last 5 % of the mini samples (one scene); here whole scenes are held out and all are used
ARGOVERSE2_VAL_LOGS = 10        # evaluation: the first 10 logs of val in sorted order; the others are trained on
SCANNETPP_VAL_SCENES = 10       # evaluation: the first 10 scenes of nvs_sem_val.txt; the others are trained on
NUSCENES_VAL = ("scene-0061", "scene-0103", "scene-0553", "scene-0655", "scene-0757", "scene-0796", "scene-0916",
                "scene-1077", "scene-1094", "scene-1100")           # the scenes of v1.0-mini, by name
TASKONOMY_BAD = ("mosquito", "tansboro", "tomkins", "darnestown", "brinnon")    # broken, as other loaders know
NYUV2_TEST = """1-2 9 14-18 21 28-43 46-47 56-57 59-63 76-79 84-91 117-119 125-129 131-134 137 153-155 167-169 171-176
180-202 207-212 220-222 250 264 271-273 279-285 296-302 310-312 315-317 325-335 351-352 355-364 384-390 395-397 411-414
430-435 441-448 462-466 469-477 508-513 515-526 531-533 537-539 549-551 555-571 579-583 591-594 603-607 612-613 617-621
633-638 644-645 650-651 656-658 663-664 668-673 676-681 686-690 693-694 697-699 706-713 717-718 724-728 731-734 743-744
759-787 800-804 810-814 821-823 833-846 850-852 857-862 869-871 906-908 917-919 926-928 932-935 945-947 959-962 965-967
970-977 991-995 1001-1004 1010-1012 1021-1023 1032-1034 1038-1039 1048-1049 1052-1053 1057-1058 1075-1084 1088-1096
1098-1104 1106-1109 1117-1119 1123-1131 1135-1136 1144-1158 1162-1167 1170-1171 1174-1176 1179-1184 1192-1196 1201-1212
1216-1220 1226-1230 1233-1235 1247-1250 1254-1265 1275-1280 1285-1295 1297-1299 1302-1308 1314-1315 1329-1332 1335-1340
1347-1349 1353-1356 1364-1365 1368-1369 1384-1391 1394-1401 1407-1414 1421-1424 1430-1433 1441-1449"""   # 1-based


class Frame(NamedTuple):
    """One image as a reader describes it: light enough to be sent to a worker, where load(frame) fills in the rest."""
    id: str                          # unique in the dataset; with --seed it decides which pixels are drawn
    image: str                       # path of the raw image or, if load gives pixels, the path below the out folder
    load: Callable                   # Frame -> Frame with depth (and what else only the files can tell)
    intrinsics: tuple = ()           # fx, fy, cx, cy [px], and w, h if the image must have that size
    scene: str | None = None
    camera: str | None = None
    time: float | None = None        # [s]
    pose: np.ndarray | None = None   # (4, 4) camera-to-world, OpenCV axes (x right, y down, z forward)
    kind: str = "z"                  # what depth holds: a map (H, W) of "z" or "euclidean"; or points (N, 4) of
    depth: np.ndarray | None = None  # x, y, Euclidean, z: "points" at their pixels or "lidar", where some hide others
    pixels: Image.Image | None = None


def fail(message, code=1):
    """End with one clear line. Code 2 is kept for raw data that is not there."""
    print(f"prepare.py: {message}", file=sys.stderr)
    raise SystemExit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry. Matrices are 4 x 4, named target_from_source or, for a pose, camera-to-world.

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])     # y up, looking along -z (Blender, Matterport)
WAYMO_FROM_OPENCV = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])   # x forward, y left, z up


def transform(quaternion, translation):
    """4 x 4 matrix of a quaternion w, x, y, z (any length; all zero means no rotation) and a translation."""
    q = np.asarray(quaternion, np.float64)
    w, x, y, z = q / np.linalg.norm(q) if q.any() else (1, 0, 0, 0)
    m = np.eye(4)
    m[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                 [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                 [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    m[:3, 3] = translation
    return m


def move(matrix, points):
    """Points (N, 3) through a 4 x 4 matrix."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def ray_lengths(x, y, intrinsics):
    """Length of the ray through pixel (x, y) that has z = 1: Euclidean depth = z * this."""
    fx, fy, cx, cy = intrinsics[:4]
    return np.sqrt(1 + ((x - cx) / fx) ** 2 + ((y - cy) / fy) ** 2)


def project(points, intrinsics):
    """Camera points (N, 3) -> (M, 4) of x, y [px], Euclidean depth, z [m] for those in front of the camera."""
    fx, fy, cx, cy = intrinsics[:4]
    x, y, z = points[points[:, 2] > 0].T
    return np.stack([fx * x / z + cx, fy * y / z + cy, np.sqrt(x * x + y * y + z * z), z], 1)


def visible(cloud, fx):
    """Drop the points that a nearer surface hides: LiDARs stand above the cameras and see over what the camera meets.
    In cells of 8 px (at f = 1000) nothing may lie further than 1.1 x + 0.5 m behind the nearest of 3 x 3 cells."""
    cell = np.floor(cloud[:, :2] / (8 * fx / 1000)).astype(int)
    cell -= cell.min(0, initial=0) - 1                    # a border of one empty cell all around
    nearest = np.full(cell.max(0, initial=0) + 2, np.inf)
    np.minimum.at(nearest, tuple(cell.T), cloud[:, 2])
    around = np.min([nearest[cell[:, 0] + i, cell[:, 1] + j] for i in (-1, 0, 1) for j in (-1, 0, 1)], 0)
    return cloud[cloud[:, 2] <= 1.1 * around + 0.5]


def distort_brown(x, y, k1, k2, p1, p2, k3):
    """Brown-Conrady (OpenCV order), normalised coordinates: pinhole -> distorted, and the radial factor."""
    q = x * x + y * y
    radial = 1 + q * (k1 + q * (k2 + q * k3))
    return (x * radial + 2 * p1 * x * y + p2 * (q + 2 * x * x), y * radial + 2 * p2 * x * y + p1 * (q + 2 * y * y),
            radial)


def undistort_brown(x, y, coefficients):
    """The inverse, by fixed point: 10 rounds reach 1e-6 px on Waymo's lenses."""
    u, v = x, y
    for _ in range(10):
        a, b, _ = distort_brown(u, v, *coefficients)
        u, v = u + x - a, v + y - b
    return u, v


def distort_thin_prism(u, v, k1, k2, p1, p2, k3, k4, sx, sy):
    """THIN_PRISM_FISHEYE: pinhole ray (u, v, 1) -> distorted, normalised coordinates."""
    r = np.sqrt(u * u + v * v) + 1e-12
    a, b = u * np.arctan(r) / r, v * np.arctan(r) / r
    q = a * a + b * b
    radial = 1 + q * (k1 + q * (k2 + q * (k3 + q * k4)))
    return (a * radial + 2 * p1 * a * b + p2 * (q + 2 * a * a) + sx * q,
            b * radial + 2 * p2 * a * b + p1 * (q + 2 * b * b) + sy * q)


def undistort_thin_prism(x, y, k1, k2, p1, p2, k3, k4, sx, sy):
    """The inverse, by Newton in the fisheye plane: near the corners the usual fixed point diverges."""
    r = np.sqrt(x * x + y * y) + 1e-12
    a, b = x * np.arctan(r) / r, y * np.arctan(r) / r
    for _ in range(8):
        q = a * a + b * b
        radial = 1 + q * (k1 + q * (k2 + q * (k3 + q * k4)))
        slope = 2 * (k1 + q * (2 * k2 + q * (3 * k3 + q * 4 * k4)))          # d radial / da = slope * a
        dx = a * radial + 2 * p1 * a * b + p2 * (q + 2 * a * a) + sx * q - x
        dy = b * radial + 2 * p2 * a * b + p1 * (q + 2 * b * b) + sy * q - y
        xa = radial + slope * a * a + 2 * p1 * b + 6 * p2 * a + 2 * sx * a
        xb = slope * a * b + 2 * p1 * a + 2 * p2 * b + 2 * sx * b
        ya = slope * a * b + 2 * p2 * b + 2 * p1 * a + 2 * sy * a
        yb = radial + slope * b * b + 2 * p2 * a + 6 * p1 * b + 2 * sy * b
        det = xa * yb - xb * ya
        a, b = a - (yb * dx - xb * dy) / det, b - (xa * dy - ya * dx) / det
    rho = np.sqrt(a * a + b * b) + 1e-12
    return a * np.tan(rho) / rho, b * np.tan(rho) / rho


def remap(image, size, source, step=16):
    """Resample an image: source(x, y) says where the output point (x, y) lies in `image`, both counted from the corner
    of the first pixel. Bilinear; between the points of a grid of `step` px the source is interpolated."""
    w, h = size
    xs, ys = [np.append(np.arange(0, n, step), n).astype(float) for n in (w, h)]
    at = np.stack(source(*np.meshgrid(xs, ys)), -1)       # (rows, columns, 2)
    quads = [((int(xs[i]), int(ys[j]), int(xs[i + 1]), int(ys[j + 1])),
              (*at[j, i], *at[j + 1, i], *at[j + 1, i + 1], *at[j, i + 1]))
             for j in range(len(ys) - 1) for i in range(len(xs) - 1)]
    return image.transform(size, Image.Transform.MESH, quads, Image.Resampling.BILINEAR)


# ---------------------------------------------------------------------------------------------------------------------
# Files

@contextmanager
def naming(path):
    """Errors of reading `path` say which file it was."""
    try:
        yield
    except Exception as error:                            # readers of broken files raise whatever they like
        raise ValueError(str(error) if path in str(error) else f"{path}: {error or type(error).__name__}") from error


def read_png(path):
    """16-bit grey PNG -> uint16 (H, W)."""
    with naming(path), Image.open(path) as image:
        if image.mode not in ("I;16", "I", "I;16B"):
            raise ValueError(f"not a 16-bit grey PNG (mode {image.mode})")
        return np.asarray(image).astype(np.uint16)


def read_depth_png(path, scale):
    """16-bit grey PNG -> float32 metres; `scale` units are a metre."""
    return read_png(path).astype(np.float32) / np.float32(scale)


def image_size(path):
    """(w, h) of an image, of which the end must be there too: a half-extracted archive leaves cut files."""
    with naming(path), Image.open(path) as image:
        size, kind = image.size, image.format
        with open(path, "rb") as f:
            f.seek(max(0, getsize(path) - 1024))
            end = f.read()
        if {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"") not in end:
            image.load()                                  # cut off, or an unusual end: only decoding can tell
    return size


def save_image(pixels, path):
    """PNG or JPEG by the name; never a half-written file."""
    os.makedirs(dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        if path.endswith(".png"):
            pixels.save(temporary, "PNG")
        else:
            pixels.convert("RGB").save(temporary, "JPEG", quality=95)
        os.replace(temporary, path)
    finally:
        if exists(temporary):                             # the disk was full
            os.remove(temporary)


def write_json(path, value):
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w") as f:
        json.dump(value, f, indent=1)
    os.replace(temporary, path)


def read_text(path):
    with naming(path), open(path, encoding="utf-8") as f:
        return f.read()


def read_json(path):
    with naming(path):
        return json.loads(read_text(path))


def read_json_list(path):
    """The records of a JSON list one by one: nuScenes' tables are over 1 GB, several times that as Python objects."""
    decoder, text, position = json.JSONDecoder(), "", 0
    with open(path, encoding="utf-8") as f:
        while True:
            while position < len(text) and text[position] in "[, \r\n\t":
                position += 1
            try:
                record, position = decoder.raw_decode(text, position)
                yield record
                continue
            except json.JSONDecodeError:                  # the end of the list, or of what has been read
                if text[position:].strip() == "]":
                    return
            more = f.read(1 << 22)
            if not more:
                raise ValueError(f"{path} ends in the middle of a record: extract the archive again")
            text, position = text[position:] + more, 0


def feather_rows(path):
    """Columns of a feather file as numpy arrays by name (Argoverse2)."""
    with naming(path):
        table = need_pyarrow().feather.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def need_pyarrow():
    try:
        import pyarrow.feather
        import pyarrow.parquet
    except ImportError:
        fail("Argoverse2 and Waymo are stored in Arrow files: pip install pyarrow")
    return pyarrow


def folders(path):
    """Names of the folders in `path`, sorted."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def parse_intrinsics(text):
    """fx fy cx cy, or a 3 x 3 or 4 x 4 matrix, in words or with commas -> (fx, fy, cx, cy)."""
    numbers = [float(v) for v in text.replace(",", " ").split()]
    if len(numbers) not in (4, 9, 16):
        raise ValueError(f"intrinsics of {len(numbers)} numbers: expected fx fy cx cy, or a 3 x 3 matrix")
    side = 3 if len(numbers) == 9 else 4
    return tuple(numbers) if len(numbers) == 4 else (numbers[0], numbers[side + 1], numbers[2], numbers[side + 2])


def read_intrinsics(path):
    with naming(path):
        return parse_intrinsics(read_text(path))


def unusable(frame, why):
    """A frame of which the reader already knows that it cannot be used: its worker counts and names it."""
    return frame._replace(load=partial(refuse, why=why))


def refuse(frame, why):
    raise ValueError(why)


# ---------------------------------------------------------------------------------------------------------------------
# From a frame to a line of the jsonl

def rng_for(seed, name):
    """A generator that depends on nothing but seed and name: any worker on any machine draws the same."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little"))


def candidates(frame, intrinsics, occlusion):
    """All pixels with a depth -> x, y (int), Euclidean, z, each (N,)."""
    fx, w, h = intrinsics[0], intrinsics[4], intrinsics[5]
    if frame.kind in ("z", "euclidean"):
        if frame.depth.shape != (h, w):
            raise ValueError(f"depth map of {frame.depth.shape[1]} x {frame.depth.shape[0]}, image of {w} x {h}")
        y, x = np.nonzero(np.isfinite(frame.depth) & (frame.depth > 0))
        depth = frame.depth[y, x].astype(np.float64)
        rays = ray_lengths(x, y, intrinsics)
        return (x, y, depth * rays, depth) if frame.kind == "z" else (x, y, depth, depth / rays)
    cloud = frame.depth
    cloud = cloud[np.isfinite(cloud).all(1) & (cloud[:, :2] >= 0).all(1) & (cloud[:, :2] <= (w - 1, h - 1)).all(1)]
    if occlusion and frame.kind == "lidar":
        cloud = visible(cloud, fx)
    cloud = cloud[np.argsort(cloud[:, 2], kind="stable")]             # the nearest point of a pixel counts
    x, y = np.floor(cloud[:, :2] + 0.5).astype(int).T
    first = np.unique(y * w + x, return_index=True)[1]
    return x[first], y[first], cloud[first, 2], cloud[first, 3]


def make_record(frame, folder, points, seed, limits, occlusion, paper, label_z):
    """Load a frame and draw its pixels -> its line of the jsonl, or None if it has too few labels.
    limits: (min, max) of the Euclidean depth [m]; label_z: write z instead, as published for some datasets."""
    frame = frame.load(frame)
    size = image_size(frame.image) if frame.pixels is None else frame.pixels.size
    intrinsics = tuple(frame.intrinsics[:4]) + tuple(frame.intrinsics[4:] or size)
    if intrinsics[4:] != size:
        raise ValueError("image of {} x {}, intrinsics for {} x {}".format(*size, *intrinsics[4:]))
    if not (np.isfinite(intrinsics).all() and intrinsics[0] > 0 and intrinsics[1] > 0):
        raise ValueError(f"focal lengths {intrinsics[0]}, {intrinsics[1]}")
    # paper: it asks for the distance from the camera, but publishes z for the datasets of PAPER_Z; here all Euclidean
    x, y, euclidean, z = candidates(frame, intrinsics, occlusion)
    valid = np.flatnonzero((euclidean >= limits[0]) & (euclidean <= limits[1]))
    if len(valid) < min(MIN_POINTS, points):
        return None
    chosen = valid[np.sort(rng_for(seed, frame.id).choice(len(valid), min(points, len(valid)), replace=False))]
    image = frame.image
    if frame.pixels is None:
        image = os.path.relpath(os.path.abspath(image), os.path.realpath(folder))
    else:
        save_image(frame.pixels, join(folder, image))
    record = {"image": image, "intrinsics": [round(float(v), 4) for v in intrinsics[:4]] + [int(v) for v in size],
              "pixel_coords": np.stack([x[chosen], y[chosen]], 1).tolist(),
              "depth": np.round((z if label_z else euclidean)[chosen], 4).tolist()}
    record |= {key: value for key, value in (("scene", frame.scene), ("camera", frame.camera), ("time", frame.time))
               if value is not None}
    if frame.pose is not None:
        record["pose"] = [round(v, 6) for v in np.asarray(frame.pose, np.float64).ravel().tolist()]
    if paper:
        record |= {"depth_type": "z" if label_z else "euclidean", "labels": "paper"}
    elif frame.kind == "euclidean":                       # measured as such: the self-check wants to know
        record["depth_type"] = "euclidean"
    return json.dumps(record) + "\n"


def make_chunk(frames, make):
    """-> lines, number of images with too few labels, messages of the frames that could not be read."""
    lines, few, bad = [], 0, []
    for frame in frames:
        try:
            line = make(frame)
        except Exception as error:                        # one bad frame must not end a run of days; it is counted
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            bad.append(f"{frame.id}: {error or type(error).__name__}")
            continue
        lines.append(line or "")
        few += line is None
    return "".join(lines), sum(map(bool, lines)), few, bad


def start_worker():
    """A worker dies with Ctrl-C, in silence, and when its parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_order(function, chunks, workers):
    """Results of function(chunk) in order, a bounded number of chunks under way in `workers` processes."""
    if workers <= 1:
        yield from ((len(chunk), function(chunk)) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append((len(chunk), pool.submit(function, chunk)))
            if len(waiting) > 2 * workers:
                count, job = waiting.popleft()
                yield count, job.result()
        while waiting:
            count, job = waiting.popleft()
            yield count, job.result()


def state_path(path):
    return os.path.splitext(path)[0] + ".prepare.json"


def saved_state(path, command, overwrite):
    """What an earlier run of the same command left, or None. Another command's output is refused."""
    if overwrite or not (exists(path) or exists(state_path(path))):
        return None
    try:
        state = read_json(state_path(path))
    except (OSError, ValueError):
        fail(f"{path} exists and was not made by this script: choose another --out, or give --overwrite to replace it")
    if state["command"] != json.loads(json.dumps(command)):
        different = {k: v for k, v in command.items() if state["command"].get(k) != json.loads(json.dumps(v))}
        there = {k: state["command"].get(k) for k in different}
        fail(f"{path} was made by another command ({there}, now {different}): other --out, or --overwrite")
    if state["finished"] and (not exists(path) or getsize(path) != state["bytes"]):
        fail(f"{path} was changed since it was made: choose another --out, or give --overwrite to make it anew")
    return state


def write_records(frames, total, path, make, workers, chunk, command, state):
    """Frames -> path, in order, going on from `state`. After each chunk the state says how many bytes are good."""
    part = path + ".partial"
    if not (state and exists(part) and getsize(part) >= state["bytes"]):
        state = {"command": command, "versions": versions(), "finished": False, "chunks": 0, "frames": 0, "bytes": 0,
                 "records": 0, "too_few_labels": 0, "bad": 0, "bad_examples": []}
        open(part, "wb").close()
        write_json(state_path(path), state)
    chunks = iter(lambda: list(islice(frames, chunk)), [])
    next(islice(frames, state["frames"], state["frames"]), None)          # skip what is done
    with open(part, "r+b") as out, tqdm(
            total=total, initial=state["frames"], unit=" images", smoothing=0.05, desc=basename(path),
            mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{path} is being written by another run of this command: wait for it, or choose another --out")
        out.truncate(state["bytes"])
        out.seek(state["bytes"])
        for count, (lines, records, few, bad) in in_order(partial(make_chunk, make=make), chunks, workers):
            out.write(lines.encode())
            out.flush()
            state |= {"chunks": state["chunks"] + 1, "frames": state["frames"] + count, "bytes": out.tell(),
                      "records": state["records"] + records, "too_few_labels": state["too_few_labels"] + few,
                      "bad": state["bad"] + len(bad), "bad_examples": (state["bad_examples"] + bad)[:5]}
            write_json(state_path(path), state)
            bar.update(count)
    if total and not state["records"]:
        os.remove(part)
        os.remove(state_path(path))
        why = "; ".join(state["bad_examples"][:2]) or "no pixel has a depth in the range (see --min-depth, --max-depth)"
        fail(f"none of the {total} images of {command['dataset']} ({command['split']}) gives labels of depth: {why}")
    os.replace(part, path)
    build_index(path)
    write_json(state_path(path), state | {"finished": True})
    return state


def versions():
    """What made the file, for its .prepare.json."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=dirname(os.path.abspath(__file__)),
                                capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {"python": sys.version.split()[0], "numpy": np.__version__, "commit": commit}


# ---------------------------------------------------------------------------------------------------------------------
# Index: <name>.idx beside <name>.jsonl, int64 little-endian: where each line starts, and the file size at the end

def index_path(path):
    return os.path.splitext(path)[0] + ".idx"


def line_offsets(path):
    """Byte offsets of the N lines and the file size, (N + 1,)."""
    pieces, position = [np.zeros(1, "<i8")], 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            pieces.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (position + 1))
            position += len(block)
    offsets = np.concatenate(pieces)
    return (offsets if offsets[-1] == position else np.append(offsets, position)).astype("<i8")


def build_index(path):
    temporary = f"{index_path(path)}.{os.getpid()}.tmp"
    line_offsets(path).tofile(temporary)
    os.replace(temporary, index_path(path))


def open_index(path):
    """The offsets, memory-mapped; made anew when missing or older than the jsonl. Line i is bytes [i] to [i + 1]."""
    path = os.fspath(path)
    index = index_path(path)
    if not exists(index) or os.path.getmtime(index) < os.path.getmtime(path):
        try:
            build_index(path)
        except PermissionError:                           # somebody else's folder: without a file, then
            return line_offsets(path)
    return np.memmap(index, "<i8", "r")


# ---------------------------------------------------------------------------------------------------------------------
# Loaders: what a worker does with a frame

def load_map(frame, path, scale, kind="z"):
    """A 16-bit depth PNG of the image's own size."""
    return frame._replace(depth=read_depth_png(path, scale), kind=kind)


def load_lidar(frame, path, read, camera_from_lidar):
    """A point cloud, moved into the camera at the time of the image."""
    with naming(path):
        points = move(camera_from_lidar, read(path))
    return frame._replace(depth=project(points, frame.intrinsics), kind="lidar")


def spread_small_map(depth, size, intrinsics, mask=None):
    """A z map smaller than its image -> points: each depth pixel labels the image pixel at its centre."""
    (h, w), (wide, high) = depth.shape, size
    j, i = np.nonzero(np.isfinite(depth) & (depth > 0))
    x = np.floor((i + 0.5) * wide / w).astype(int)        # = round((i + 0.5) * wide / w - 0.5)
    y = np.floor((j + 0.5) * high / h).astype(int)
    keep = slice(None) if mask is None else mask[y, x] > 0
    x, y, z = x[keep], y[keep], depth[j, i][keep].astype(np.float64)
    return np.stack([x, y, z * ray_lengths(x, y, intrinsics), z], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Readers, one a dataset: (root, split, ...) -> frames in a fixed order. They list and pair files; workers open them.

def read_argoverse2_sweep(path):
    table = feather_rows(path)
    return np.stack([table["x"], table["y"], table["z"]], 1).astype(np.float64)       # float16 on disk


def frames_argoverse2(root, split):
    """One image a ring camera and sweep: 850 logs x 157 sweeps x 7 cameras, the paper's 1 M. Points are in the ego
    frame of the sweep's time and go through the city to the camera at the image's time. Images are undistorted."""
    need_pyarrow()
    logs = {s: folders(join(root, s)) if isdir(join(root, s)) else [] for s in ("train", "val")}
    held_out = [("val", log) for log in logs["val"][:ARGOVERSE2_VAL_LOGS]]
    rest = [("train", log) for log in logs["train"]] + [("val", log) for log in logs["val"][ARGOVERSE2_VAL_LOGS:]]
    for part, log in held_out if split == "val" else rest:
        folder = join(root, part, log)
        try:
            cameras, sensors, ego = (feather_rows(join(folder, name)) for name in (
                "calibration/intrinsics.feather", "calibration/egovehicle_SE3_sensor.feather",
                "city_SE3_egovehicle.feather"))
            sweeps = np.array(sorted(int(name[:-8]) for name in os.listdir(join(folder, "sensors/lidar"))
                                     if name.endswith(".feather")))
        except (OSError, ValueError) as error:
            yield unusable(Frame(log, folder, None), str(error))
            continue

        def pose(table, i):
            numbers = [table[k][i] for k in ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")]
            return transform(numbers[:4], numbers[4:])
        sensor_rows = {name: i for i, name in enumerate(sensors["sensor_name"])}
        ego_rows = {int(stamp): i for i, stamp in enumerate(ego["timestamp_ns"])}
        for i, camera in enumerate(cameras["sensor_name"]):
            images = join(folder, "sensors/cameras", camera)
            if not (camera.startswith("ring_") and camera in sensor_rows and isdir(images) and len(sweeps)):
                continue
            ego_from_camera = pose(sensors, sensor_rows[camera])
            intrinsics = tuple(float(cameras[k][i]) for k in ("fx_px", "fy_px", "cx_px", "cy_px")) + tuple(
                int(cameras[k][i]) for k in ("width_px", "height_px"))
            nearest = {}                                  # sweep -> the image that is nearest to it
            for stamp in sorted(int(name[:-4]) for name in os.listdir(images) if name.endswith(".jpg")):
                sweep = int(sweeps[np.abs(sweeps - stamp).argmin()])
                if abs(sweep - stamp) <= LIDAR_WINDOW and abs(sweep - stamp) < abs(sweep - nearest.get(sweep, 0)):
                    nearest[sweep] = stamp
            for sweep, stamp in nearest.items():
                if stamp not in ego_rows or sweep not in ego_rows:
                    continue                              # no pose: no way from the sweep to the image
                pose_camera = pose(ego, ego_rows[stamp]) @ ego_from_camera
                yield Frame(f"{log}/{camera}/{stamp}", join(images, f"{stamp}.jpg"),
                            partial(load_lidar, path=join(folder, f"sensors/lidar/{sweep}.feather"),
                                    read=read_argoverse2_sweep,
                                    camera_from_lidar=np.linalg.inv(pose_camera) @ pose(ego, ego_rows[sweep])),
                            intrinsics, log, camera, stamp / 1e9, pose_camera)


@lru_cache(maxsize=16)
def parquet_rows(path, columns):
    """A function row number -> that row as a record batch. Reads forward and keeps no more than it must: the lidar and
    image files of a segment are gigabytes when unpacked."""
    with naming(path):
        file = need_pyarrow().parquet.ParquetFile(path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.cumsum([0, *groups])
    position, batches = math.inf, None

    def read(row):
        nonlocal position, batches
        group = int(np.searchsorted(starts, row, "right")) - 1
        if row < position or starts[group] > position:
            position, batches = starts[group], file.iter_batches(1, range(group, len(groups)), list(columns))
        while position <= row:
            batch, position = next(batches), position + 1
        return batch
    return read


@lru_cache(maxsize=16)
def waymo_keys(path, sensor):
    """Row number of each (timestamp, sensor) of a component file; calibrations have no timestamp: (None, sensor)."""
    parquet = need_pyarrow().parquet
    with naming(path):
        table = parquet.read_table(path, columns=[n for n in parquet.read_schema(path).names if n.startswith("key.")])
    def column(name, otherwise):
        return table[name].to_pylist() if name in table.column_names else [otherwise] * table.num_rows
    sensors = [WAYMO_CAMERAS.index(s) + 1 if isinstance(s, str) else s for s in column(sensor, 0)]
    return {key: row for row, key in enumerate(zip(column("key.frame_timestamp_micros", None), sensors))}


def waymo_read(folder, component, segment, stamp, sensor, names):
    """The named columns of one row of a component, without their prefix; None if the row is not there."""
    path = join(folder, component, segment + ".parquet")
    key = {"camera": "key.camera_name", "lidar": "key.laser_name"}.get(component.split("_")[0])
    row = waymo_keys(path, key).get((stamp, sensor))
    if row is None:
        return None
    prefix = component.title().replace("_", "").replace("Lidar", "LiDAR") + "Component"       # lidar_pose: LiDARPose...
    batch = parquet_rows(path, tuple(f"[{prefix}].{name}" for name in names))(row)
    values = [batch.column(i)[0] for i in range(len(names))]
    return [np.asarray(v.values) if hasattr(v, "values") and v.is_valid else v.as_py() for v in values]


def waymo_grid(folder, component, segment, stamp, laser):
    """A range image (H, W, channels) of the first return, or None."""
    names = ("range_image_return1.values", "range_image_return1.shape")
    found = waymo_read(folder, component, segment, stamp, laser, names)
    return found and found[0].reshape(found[1])


def rotations_of(roll, pitch, yaw):
    """Rz(yaw) Ry(pitch) Rx(roll) for arrays of N angles -> (N, 3, 3)."""
    (cr, sr), (cp, sp), (cy, sy) = ((np.cos(a), np.sin(a)) for a in (roll, pitch, yaw))
    return np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
                     sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
                     -sp, cp * sr, cp * cr], -1).reshape(-1, 3, 3)


@lru_cache(maxsize=2)
def waymo_points(folder, segment, stamp):
    """All LiDARs of one frame: world points (N, 3), and the table (N, 6) of camera, x, y (twice) that sees them."""
    points, seen = [], []
    for laser in range(1, 6):
        cells = waymo_grid(folder, "lidar", segment, stamp, laser)
        table = waymo_grid(folder, "lidar_camera_projection", segment, stamp, laser)
        if cells is None or table is None:
            continue
        extrinsic, low, high, beams = waymo_read(folder, "lidar_calibration", segment, None, laser, (
            "extrinsic.transform", "beam_inclination.min", "beam_inclination.max", "beam_inclination.values"))
        extrinsic = extrinsic.astype(np.float64).reshape(4, 4)
        height, width = cells.shape[:2]
        if beams is None or not len(beams):
            beams = low + (np.arange(height) + 0.5) / height * (high - low)
        i, j = np.nonzero((cells[..., 0] > 0) & ((table[..., 0] > 0) | (table[..., 3] > 0)))
        up = np.asarray(beams, np.float64)[::-1][i]       # row 0 is the highest beam
        around = (2 * (width - j - 0.5) / width - 1) * np.pi - math.atan2(extrinsic[1, 0], extrinsic[0, 0])
        rays = np.stack([np.cos(around) * np.cos(up), np.sin(around) * np.cos(up), np.sin(up)], 1)
        vehicle = move(extrinsic, rays * cells[i, j, :1].astype(np.float64))
        poses = waymo_grid(folder, "lidar_pose", segment, stamp, laser) if laser == WAYMO_TOP else None
        if poses is not None:                             # the car moves while the roof LiDAR turns
            p = poses[i, j].astype(np.float64)
            world = np.einsum("nij,nj->ni", rotations_of(p[:, 0], p[:, 1], p[:, 2]), vehicle) + p[:, 3:]
        else:
            pose, = waymo_read(folder, "vehicle_pose", segment, stamp, 0, ("world_from_vehicle.transform",))
            world = move(pose.astype(np.float64).reshape(4, 4), vehicle)
        points.append(world)
        seen.append(table[i, j])
    if not points:
        raise ValueError(f"lidar/{segment}.parquet has no range images at {stamp}")
    return np.concatenate(points), np.concatenate(seen)


def load_waymo(frame, folder, segment, stamp, camera):
    """Undistort the JPEG; labels are where the projection table says (it knows the rolling shutter), moved along; their
    distance is from the camera at the image's own time."""
    # paper: the released script moves labels by the map of the opposite direction (up to 400 px) and drops four LiDARs
    jpeg, pose = waymo_read(folder, "camera_image", segment, stamp, camera, ("image", "pose.transform"))
    names = [f"intrinsic.{k}" for k in ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")]
    calibration = waymo_read(folder, "camera_calibration", segment, None, camera, (*names, "extrinsic.transform"))
    (fx, fy, cx, cy), lens = calibration[:4], calibration[4:9]
    pose = pose.astype(np.float64).reshape(4, 4) @ calibration[9].astype(np.float64).reshape(4, 4) @ WAYMO_FROM_OPENCV
    world, seen = waymo_points(folder, segment, stamp)
    first, second = seen[:, 0] == camera, seen[:, 3] == camera
    pixel = np.where(first[:, None], seen[:, 1:3], seen[:, 4:6])[first | second]
    points = move(np.linalg.inv(pose), world[first | second])
    x, y = undistort_brown(*((np.floor(pixel) + 0.5 - (cx, cy)) / (fx, fy)).T, lens)
    radial = distort_brown(x, y, *lens)[2]
    cloud = np.stack([fx * x + cx - 0.5, fy * y + cy - 0.5, np.linalg.norm(points, axis=1), points[:, 2]], 1)
    cloud = cloud[(points[:, 2] > 0) & (np.abs(radial - 1) < 0.2)]     # beyond, the polynomial is no lens any more

    def source(u, v):
        a, b, _ = distort_brown((u - cx) / fx, (v - cy) / fy, *lens)
        return fx * a + cx, fy * b + cy
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return frame._replace(pixels=remap(image, image.size, source), depth=cloud, kind="lidar", pose=pose,
                          intrinsics=(fx, fy, cx - 0.5, cy - 0.5))


def frames_waymo(root, split):
    """Images are in parquet files: undistorted copies go to rgb/<segment>/."""
    need_pyarrow()
    folder = join(root, "training")
    for name in sorted(os.listdir(join(folder, "camera_image"))):
        if not name.endswith(".parquet"):
            continue
        segment = name[:-8]
        try:
            keys = waymo_keys(join(folder, "camera_image", name), "key.camera_name")
        except (OSError, ValueError, KeyError) as error:
            yield unusable(Frame(segment, name, None), str(error))
            continue
        for stamp, camera in keys:
            title = WAYMO_CAMERAS[camera - 1]
            yield Frame(f"{segment}/{stamp}/{title}", f"rgb/{segment}/{stamp}_{title}.jpg",
                        partial(load_waymo, folder=folder, segment=segment, stamp=stamp, camera=camera),
                        scene=segment, camera=title, time=stamp / 1e6)


@lru_cache(maxsize=2)
def nuscenes_tables(root, version):
    """The tables that lead from an image to its scene, sensors and poses, by token; of the largest only key frames."""
    def table(name):
        return read_json_list(join(root, version, name + ".json"))
    keep = ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "filename", "timestamp", "width",
            "height")
    data = [{k: r[k] for k in keep} for r in table("sample_data")
            if r["is_key_frame"] and r["filename"].split("/")[1].startswith(("CAM", "LIDAR"))]
    wanted = {r["ego_pose_token"] for r in data}
    poses = {r["token"]: transform(r["rotation"], r["translation"]) for r in table("ego_pose") if r["token"] in wanted}
    tables = {name: {r["token"]: r for r in table(name)} for name in ("scene", "sample", "sensor", "calibrated_sensor")}
    return tables | {"ego_pose": poses}, data


def read_nuscenes_sweep(path):
    return np.fromfile(path, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)


def frames_nuscenes(root, split):
    """Key frames. LiDAR -> ego -> world at the sweep's time, world -> ego -> camera at the image's time."""
    there = [v for v in ("v1.0-trainval", "v1.0-mini") if isdir(join(root, v))]
    if not there:
        fail(f"{root} has neither v1.0-trainval nor v1.0-mini: extract the metadata archive there, too", 2)
    version = there[-1 if split == "val" else 0]
    tables, data = nuscenes_tables(root, version)

    def look_up(name, token):
        if token not in tables[name]:
            raise ValueError(f"{version}: token {token} is not in {name}.json: extract the metadata again")
        return tables[name][token]

    def world_from(row):
        sensor = look_up("calibrated_sensor", row["calibrated_sensor_token"])
        return sensor, look_up("ego_pose", row["ego_pose_token"]) @ transform(sensor["rotation"], sensor["translation"])

    sweeps = {r["sample_token"]: r for r in data if "/LIDAR_TOP/" in r["filename"]}
    for row in sorted(data, key=lambda r: (r["timestamp"], r["filename"])):
        frame = Frame(row["token"], join(root, row["filename"]), None, time=row["timestamp"] / 1e6)
        try:
            scene = look_up("scene", look_up("sample", row["sample_token"])["scene_token"])["name"]
            if (scene in NUSCENES_VAL) != (split == "val") or "/CAM" not in row["filename"]:
                continue
            if row["sample_token"] not in sweeps:
                raise ValueError(f"no key frame of LIDAR_TOP in sample_data.json for sample {row['sample_token']}")
            sweep = sweeps[row["sample_token"]]
            (camera, pose), (_, world_from_lidar) = world_from(row), world_from(sweep)
            channel = look_up("sensor", camera["sensor_token"])["channel"]
        except ValueError as error:
            yield unusable(frame, str(error))
            continue
        k = camera["camera_intrinsic"]
        yield frame._replace(
            load=partial(load_lidar, path=join(root, sweep["filename"]), read=read_nuscenes_sweep,
                         camera_from_lidar=np.linalg.inv(pose) @ world_from_lidar),
            intrinsics=(k[0][0], k[1][1], k[0][2], k[1][2], row["width"], row["height"]), scene=scene, camera=channel,
            pose=pose)


def load_scannetpp(frame, depth, mask):
    """256 x 192 depth for a 1920 x 1440 image, with the frame's own intrinsics; anonymised pixels are left out."""
    size = image_size(frame.image)
    scale = size[0] / SCANNETPP_VIDEO[0]                  # the frames may have been decoded smaller
    fx, fy, cx, cy = frame.intrinsics
    intrinsics = (fx * scale, fy * scale, (cx + 0.5) * scale - 0.5, (cy + 0.5) * scale - 0.5)
    if exists(mask):
        with naming(mask), Image.open(mask) as m:
            mask = np.asarray(m.convert("L").resize(size, Image.Resampling.NEAREST))
    else:
        mask = None
    points = spread_small_map(read_depth_png(depth, 1000), size, intrinsics, mask)
    return frame._replace(depth=points, kind="points", intrinsics=intrinsics)


def frames_scannetpp(root, split, every=SCANNETPP_EVERY):
    """Decoded frames of the iPhone stream, paired by their number; `every` counts video frames (60 a second)."""
    lists = {}
    for name in ("nvs_sem_train", "nvs_sem_val"):
        lists[name] = read_text(join(root, "splits", name + ".txt")).split()
    held_out = lists["nvs_sem_val"][:SCANNETPP_VAL_SCENES]
    rest = [s for s in lists["nvs_sem_train"] + lists["nvs_sem_val"][SCANNETPP_VAL_SCENES:] if s not in held_out]
    for scene in held_out if split == "val" else rest:
        folder = join(root, "data", scene, "iphone")
        if not isdir(join(folder, "rgb")):
            continue                                      # not downloaded, or not decoded
        try:
            table = read_json(join(folder, "pose_intrinsic_imu.json"))
        except (OSError, ValueError) as error:
            yield unusable(Frame(scene, folder, None), str(error))
            continue
        for name in sorted(os.listdir(join(folder, "rgb"))):
            stem = os.path.splitext(name)[0]
            if not stem.startswith("frame_") or int(stem[6:]) % every:
                continue
            frame = Frame(f"{scene}/{stem}", join(folder, "rgb", name), None, scene=scene, camera="iphone",
                          time=int(stem[6:]) / 60)
            if stem not in table:
                yield unusable(frame, f"{stem} is not in {scene}/iphone/pose_intrinsic_imu.json")
                continue
            k, pose = table[stem]["intrinsic"], table[stem].get("aligned_pose", table[stem].get("aligned_poses"))
            yield frame._replace(
                load=partial(load_scannetpp, depth=join(folder, "depth", stem + ".png"),
                             mask=join(folder, "rgb_masks", stem + ".png")),
                intrinsics=(k[0][0], k[1][1], k[0][2], k[1][2]), pose=pose and np.array(pose, np.float64))


def load_omnidata(frame, domain_file):
    """Taskonomy and HM3D: focal length and pose from the JSON; Euclidean depth if it is there, else the z-buffer."""
    for suffix in ("point_info", "fixatedpose"):
        path = domain_file("point_info", suffix + ".json")
        if exists(path):
            break
    info = read_json(path)
    size = info.get("resolution", 512)
    focal = size / 2 / math.tan(info["field_of_view_rads"] / 2)
    kind = "euclidean" if exists(domain_file("depth_euclidean", "depth_euclidean.png")) else "z"
    name = "depth_euclidean" if kind == "euclidean" else "depth_zbuffer"
    depth = read_depth_png(domain_file(name, name + ".png"), 512)
    depth[depth >= 65535 / 512] = 0                       # nothing there
    pose = None
    if "camera_rotation_final" in info and "camera_location" in info:
        pose = np.eye(4)
        pose[:3, :3] = rotations_of(*np.array(info["camera_rotation_final"], np.float64))[0]      # Blender XYZ Euler
        pose[:3, 3] = info["camera_location"]
        pose = pose @ OPENGL_TO_OPENCV
    return frame._replace(depth=depth, kind=kind, pose=pose, camera=info.get("camera_uuid"),
                          intrinsics=(focal, focal, (size - 1) / 2, (size - 1) / 2, size, size))


def omnidata_file(image, domain, suffix):
    """The file of another domain beside .../rgb/.../point_1_view_2_domain_rgb.png: folder and suffix both change."""
    parts = image.split(os.sep)
    parts[max(i for i, part in enumerate(parts) if part == "rgb")] = domain
    return os.sep.join(parts).removesuffix("_domain_rgb.png") + "_domain_" + suffix


def frames_omnidata(root, component, allowed):
    """Every *_domain_rgb.png below root, whatever of the three layouts in the wild it has."""
    skip = {"depth_euclidean", "depth_zbuffer", "point_info", "mask_valid", "normal", "taskonomy", "hm3d"} - {component}
    for folder, below, files in os.walk(root):
        below[:] = sorted(set(below) - skip)
        scene = basename(folder if basename(folder) != "rgb" else dirname(folder))
        for name in sorted(files):
            if name.endswith("_domain_rgb.png") and allowed(scene):
                image = join(folder, name)
                yield Frame(f"{scene}/{name[:-15]}", image,
                            partial(load_omnidata, domain_file=partial(omnidata_file, image)), scene=scene)


def omnidata_split(root, table):
    """Scenes marked as train in the split table of the download, or None where the table is not there."""
    for folder in (root, dirname(os.path.abspath(root))):
        path = join(folder, table)
        if exists(path):
            with open(path, newline="") as f:
                rows = [[cell.strip() for cell in row] for row in csv.reader(f) if row]
            column = rows[0].index("train")
            return {row[0] for row in rows[1:] if row[column] == "1"}
    return None


def frames_taskonomy(root, split):
    """All buildings of the fullplus train split. The official trainer also stretches these images at random."""
    # paper: no random stretch; the rendering intrinsics explain Euclidean against z depth to 0.7 mm
    listed = omnidata_split(root, "train_val_test_fullplus.csv")
    return frames_omnidata(root, "taskonomy", lambda s: s not in TASKONOMY_BAD and (listed is None or s in listed))


def frames_hm3d(root, split):
    listed = omnidata_split(root, "train_val_test_hm3d.csv")
    return frames_omnidata(root, "hm3d", lambda s: listed is None or s in listed)


def frames_matterport3d(root, split):
    """Images, depth and poses of a house are named line by line in its .conf. All houses: none is evaluated on."""
    confs = []
    for folder, below, files in os.walk(root):
        if basename(folder) == "undistorted_camera_parameters":
            confs += [join(folder, name) for name in files if name.endswith(".conf")]
        below[:] = [name for name in below if name not in ("undistorted_color_images", "undistorted_depth_images")]
    for conf in sorted(confs):
        house, base, intrinsics = basename(conf)[:-5], dirname(dirname(conf)), None
        lines = [line.split() for line in read_text(conf).splitlines()]
        announced = next((int(line[1]) for line in lines if line and line[0] == "n_images"), 0)
        if announced > sum(len(line) == 19 for line in lines):
            yield unusable(Frame(house, conf, None), f"{conf} is cut off: it announces {announced} images")
        for line in lines:
            if line and line[0] == "intrinsics_matrix" and len(line) == 10:       # counts until the next such line
                k = [float(v) for v in line[1:]]          # their origin is the bottom left corner, y up
                intrinsics = (k[0], k[4], k[2] - 0.5, 1024 - k[5] - 0.5, 1280, 1024)
            elif line and line[0] == "scan" and len(line) == 19:
                depth, image, pose = line[1], line[2], np.array(line[3:], np.float64).reshape(4, 4)
                yield Frame(f"{house}/{image}", join(base, "undistorted_color_images", image),
                            partial(load_map, path=join(base, "undistorted_depth_images", depth), scale=4000),
                            intrinsics, house, image.rsplit("_", 2)[1], None, pose @ OPENGL_TO_OPENCV)


def read_ddad_sweep(path):
    with np.load(path) as file:
        return file["data"][:, :3].astype(np.float64)


def frames_ddad(root, split):
    """The six cameras of the 50 val scenes (DGP format). Protobuf JSON: numbers that are zero may be absent."""
    def pose(datum):
        r, t = (datum.get("pose", {}).get(k, {}) for k in ("rotation", "translation"))
        return transform([r.get(k, 0) for k in ("qw", "qx", "qy", "qz")], [t.get(k, 0) for k in "xyz"])

    for listed in read_json(join(root, "ddad.json"))["scene_splits"]["1"]["filenames"]:
        folder, scene = join(root, dirname(listed)), dirname(listed)
        try:
            content = read_json(join(root, listed))
        except (OSError, ValueError) as error:
            yield unusable(Frame(scene, listed, None), str(error))
            continue
        data = {d["key"]: d for d in content["data"]}
        for number, sample in enumerate(content["samples"]):
            where = f"{scene}/{number}"
            try:
                calibration = read_json(join(folder, "calibration", sample["calibration_key"] + ".json"))
                datums = {data[key]["id"]["name"].upper(): data[key]["datum"] for key in sample["datum_keys"]}
                lidar = datums["LIDAR"]["point_cloud"]
            except (OSError, ValueError, KeyError) as error:
                yield unusable(Frame(where, listed, None), f"{listed}, sample {number}: {error}")
                continue
            cameras = {name.upper(): k for name, k in zip(calibration["names"], calibration["intrinsics"])}
            for camera in sorted(name for name in datums if "image" in datums[name]):
                image, k = datums[camera]["image"], cameras.get(camera, {})
                yield Frame(f"{where}/{camera}", join(folder, image["filename"]),
                            partial(load_lidar, path=join(folder, lidar["filename"]), read=read_ddad_sweep,
                                    camera_from_lidar=np.linalg.inv(pose(image)) @ pose(lidar)),
                            (*(k.get(name, 0) for name in ("fx", "fy", "cx", "cy")), image["width"], image["height"]),
                            # stamps in DDAD are ten times too large; samples are 0.1 s apart
                            scene, camera, round(0.1 * number, 1), pose(image))


def load_eth3d(frame, depth, camera):
    """Fisheye image and z map -> pinhole image of focal length ETH3D_FOCAL, labels at the laser pixels' new places."""
    w, h, fx, fy, cx, cy, *lens = camera                  # cx, cy from the corner of the first pixel
    if getsize(depth) != 4 * w * h:
        raise ValueError(f"{depth} has {getsize(depth)} bytes, not 4 x {w} x {h}: extract it again")
    z = np.memmap(depth, "<f4", "r", shape=(h, w))[ETH3D_BORDER:-ETH3D_BORDER, ETH3D_BORDER:-ETH3D_BORDER]
    j, i = np.nonzero(np.isfinite(z) & (z > 0))
    z = z[j, i].astype(np.float64)
    u, v = undistort_thin_prism((i + ETH3D_BORDER + 0.5 - cx) / fx, (j + ETH3D_BORDER + 0.5 - cy) / fy, *lens)
    focal = min(ETH3D_FOCAL, fx)
    scale = focal / fx
    size, centre = (round(w * scale), round(h * scale)), (cx * scale, cy * scale)
    points = np.stack([focal * u + centre[0] - 0.5, focal * v + centre[1] - 0.5, z * np.sqrt(1 + u * u + v * v), z], 1)

    def source(x, y):
        a, b = distort_thin_prism((x - centre[0]) / focal, (y - centre[1]) / focal, *lens)
        return (fx * a + cx) / shrink, (fy * b + cy) / shrink
    image_size(frame.image)                               # refuses a cut file
    image = Image.open(frame.image).convert("RGB")
    if image.size != (w, h):
        raise ValueError("image of {} x {}, cameras.txt says {} x {}".format(*image.size, w, h))
    shrink = max(1, int(1 / scale))                       # average before sampling, or it would flicker
    name = os.path.splitext(basename(frame.image))[0]
    return frame._replace(pixels=remap(image.reduce(shrink), size, source), depth=points, kind="points",
                          image=f"rgb/{frame.scene}/{name}.jpg",
                          intrinsics=(focal, focal, centre[0] - 0.5, centre[1] - 0.5))


def frames_eth3d(root, split):
    """The 13 training scenes. Image and depth may have been unpacked to two trees: paired by scene and name."""
    def found(pattern):                                   # scene -> folder, at most two levels below root
        paths = sorted(p for n in ("*", "*/*") for p in glob.glob(join(glob.escape(root), n, pattern)))
        return {p.removesuffix("/" + pattern).split(os.sep)[-1]: p for p in paths}
    images, depths = found("images"), found("ground_truth_depth")
    for scene, folder in sorted(found("dslr_calibration_jpg").items()):
        cameras = {}
        for line in read_text(join(folder, "cameras.txt")).splitlines():
            if line.strip() and line[0] != "#":
                number, model, *numbers = line.split()
                cameras[number] = (model, [int(v) for v in numbers[:2]] + [float(v) for v in numbers[2:]])
        lines = [line for line in read_text(join(folder, "images.txt")).splitlines() if line[:1] != "#"]
        for line in sorted(lines[::2], key=lambda s: s.split()[-1:]):     # each second line, maybe empty, lists points
            if not line.strip():
                continue
            _, *numbers, camera, name = line.split()
            numbers = [float(v) for v in numbers]         # world-to-camera
            frame = Frame(f"{scene}/{name}", join(images.get(scene, scene), name), None, scene=scene,
                          camera=f"camera {camera}", pose=np.linalg.inv(transform(numbers[:4], numbers[4:])))
            model, parameters = cameras.get(camera, ("no model", []))
            if model != "THIN_PRISM_FISHEYE" or len(parameters) != 14:
                yield unusable(frame, f"{scene}: camera {camera} is {model} in cameras.txt, not THIN_PRISM_FISHEYE")
                continue
            yield frame._replace(load=partial(load_eth3d, depth=join(depths.get(scene, scene), name),
                                              camera=parameters))


def load_sunrgbd(frame, depth, paper):
    """Millimetres with their bits rotated left by three: what lies beyond 8.19 m has low bits set."""
    raw = read_png(depth)
    metres = ((raw >> 3) | (raw << 13)).astype(np.float32) / np.float32(1000)
    # paper: raw / 10000 is 0.8 x the true depth (and wraps beyond 8.19 m): only with --paper-labels
    return frame._replace(depth=raw.astype(np.float32) / np.float32(10000) if paper else metres)


def sunrgbd_frame(folder, root, depth_folder, paper):
    """A frame of one SUN RGB-D folder: exactly one image in image/, one map in depth*/, a 3 x 3 intrinsics.txt."""
    name = os.path.relpath(folder, root)
    # in sun3ddata the parent folder is a place, elsewhere each frame is its own
    frame = Frame(name, folder, None, scene=dirname(name) if "sun3ddata" in name else name)
    try:
        image, = os.listdir(join(folder, "image"))
        depth, = os.listdir(join(folder, depth_folder))
        fx, fy, cx, cy = read_intrinsics(join(folder, "intrinsics.txt"))
    except (OSError, ValueError) as error:
        return unusable(frame, f"{folder}: one image, one depth map and intrinsics.txt are needed: {error}")
    return frame._replace(image=join(folder, "image", image),
                          load=partial(load_sunrgbd, depth=join(folder, depth_folder, depth), paper=paper),
                          intrinsics=(fx or fy, fy or fx, cx - 1, cy - 1))        # 1-based; fx is 0 in a few files


def frames_sunrgbd(root, split, paper=False):
    """All frames except NYUv2's own, wherever they lie in the tree."""
    for folder, below, _ in os.walk(root):
        below.sort()
        if "NYUdata" in below:
            below.remove("NYUdata")
        if "image" in below or "depth" in below:
            below.clear()
            # paper: the filled maps (depth_bfx) were used; what was not measured is no ground truth
            yield sunrgbd_frame(folder, root, "depth_bfx" if paper else "depth", paper)


def nyuv2_test():
    """The 654 official test indices, 1-based."""
    return {n for part in NYUV2_TEST.split() for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}


def load_nyuv2_png(frame, depth):
    """640 x 480, millimetres, Eigen crop (the SUN RGB-D version of NYUv2 is that crop already); 10 m is saturation."""
    metres = read_depth_png(depth, 1000)
    cropped = np.zeros_like(metres)
    cropped[45:471, 41:601] = metres[45:471, 41:601]
    cropped[cropped >= 10] = 0
    return frame._replace(depth=cropped)


def frames_nyuv2(root, split, paper=False, every_image=False):
    """kv1/NYUdata of SUN RGB-D (the number is the index in NYUv2), else pairs rgb_*.jpg and sync_depth_*.png."""
    # paper: the released script takes all 1,449 images, 795 of them training images of NYUv2; --all-images does that
    test, found = nyuv2_test(), False
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in ("kv2", "realsense", "xtion", "b3dodata"))
        name = basename(folder)
        if name.startswith("NYU") and name[3:].isdigit():
            found = True
            below.clear()
            if every_image or int(name[3:]) in test:
                yield sunrgbd_frame(folder, dirname(folder), "depth", paper)
        for file in sorted(files):
            if file.startswith("sync_depth_") and not found:
                image = file.replace("sync_depth_", "rgb_").replace(".png", ".jpg")
                places = [join(p, image) for p in (folder, join(dirname(folder), "rgb"))]
                path = next((p for p in places if exists(p)), places[0])
                name = os.path.relpath(path, root)
                yield Frame(name, path, partial(load_nyuv2_png, depth=join(folder, file)),
                            (518.8579, 519.4696, 324.5824, 252.7362, 640, 480), scene=name[:-4])


def read_mask(path):
    with naming(path), Image.open(path) as image:
        return np.asarray(image)


def load_ibims1(frame, depth, masks):
    metres = read_depth_png(depth, 65535 / 50)
    for mask in masks:                                    # > 0 means usable in both: valid, not transparent
        metres[read_mask(mask) == 0] = 0
    return frame._replace(depth=metres)


def frames_ibims1(root, split):
    """100 laser-scanned interiors."""
    if exists(join(root, "imagelist.txt")):
        names = read_text(join(root, "imagelist.txt")).split()
    else:
        names = sorted(name[:-4] for name in os.listdir(join(root, "rgb")) if name.endswith(".png"))
    for n, name in enumerate(names):
        masks = [join(root, folder, name + ".png") for folder in ("mask_invalid", "mask_transp")]
        frame = Frame(name, join(root, "rgb", name + ".png"), None, scene=name)
        try:
            intrinsics = read_intrinsics(join(root, "calib", name + ".txt"))
            usable = 1 if n else float((read_mask(masks[0]) > 0).mean())
            if usable < 0.5:
                fail(f"{masks[0]} leaves only {usable:.0%} of the image: its sense is not > 0 for valid, as expected")
        except (OSError, ValueError) as error:
            yield unusable(frame, str(error))
            continue
        yield frame._replace(load=partial(load_ibims1, depth=join(root, "depth", name + ".png"), masks=masks),
                             intrinsics=intrinsics)


def load_folder(frame, depth, depth_scale, depth_type, pose):
    """A depth map of the image's size, .npy or PNG, and the pose if there is one."""
    if depth.endswith(".npy"):
        with naming(depth):
            depth = np.load(depth).astype(np.float32) / np.float32(depth_scale or 1)
    else:
        depth = read_depth_png(depth, depth_scale or 1000)
    if exists(pose):
        with naming(pose):
            frame = frame._replace(pose=np.loadtxt(pose).reshape(4, 4))
    return frame._replace(depth=depth, kind=depth_type)


def frames_folder(root, split, intrinsics=None, depth_scale=None, depth_type="z"):
    """Your own: rgb/ and depth/ with files of the same stem, in root or in folders of it (each one a scene)."""
    scenes = [""] if isdir(join(root, "rgb")) else folders(root)
    for scene in scenes:
        folder = join(root, scene)
        if not isdir(join(folder, "rgb")):
            continue
        images, depths = ({os.path.splitext(name)[0]: name for name in sorted(os.listdir(join(folder, part)))}
                          if isdir(join(folder, part)) else {} for part in ("rgb", "depth"))
        for stem in sorted(images | depths):
            frame = Frame(join(scene, stem), join(folder, "rgb", images.get(stem, stem)), None,
                          scene=scene or None)
            try:
                if stem not in images or stem not in depths:
                    raise ValueError(f"{folder}: {stem} has {'an image' if stem in images else 'depth'} only")
                places = [join(folder, "intrinsics", stem + ".txt"), join(folder, "intrinsics.txt"),
                          join(root, "intrinsics.txt")]
                place = next(filter(exists, places), None)
                if not (intrinsics or place):
                    fail(f"{folder} has no intrinsics.txt: write 'fx fy cx cy' [px] into it, or give --intrinsics", 2)
                k = parse_intrinsics(intrinsics) if intrinsics else read_intrinsics(place)
                frame = frame._replace(intrinsics=k)
            except ValueError as error:
                yield unusable(frame, str(error))
                continue
            yield frame._replace(load=partial(load_folder, depth=join(folder, "depth", depths[stem]),
                                              depth_scale=depth_scale, depth_type=depth_type,
                                              pose=join(folder, "poses", stem + ".txt")))


# ---------------------------------------------------------------------------------------------------------------------
# Toy world: rooms made of boxes, ray-cast with exact depth. Axes: x, y along the walls, z up, metres.

TOY_VIEWS = 5                                             # images a room
TOY_SHAPES = ((112, 84), (112, 84), (112, 84), (84, 112))  # image size once the focal length is 100 px
TOY_SCALES = (0.75, 1.0, 1.25, 1.5)                       # the image is this times larger: four focal lengths, mixed
TOY_CHECKER = 0.5                                         # side of a texture square [m]
# Floor, ceiling, walls x, walls y, box sides, box tops. Red : green is the same for all, so that the red of a marker is
# found by a linear look at a patch, and green alone is brightness: a tiny model learns from few samples.
TOY_COLOURS = np.array([[0.63, 0.90, 0.30], [0.63, 0.90, 0.98], [0.63, 0.90, 0.78], [0.63, 0.90, 0.54],
                        [0.63, 0.90, 0.04], [0.63, 0.90, 0.17]])


def toy_room(rng):
    """Boxes (n, 2, 3) of min and max corners; the first is the room itself, seen from inside."""
    w, d, h = rng.uniform(3.5, 8.0), rng.uniform(3.5, 8.0), rng.uniform(2.4, 3.2)
    boxes = [[(0, 0, 0), (w, d, h)]]
    for _ in range(rng.integers(2, 6)):
        size = rng.uniform((0.4, 0.4, 0.3), (1.4, 1.4, 1.9))
        x, y = rng.uniform(0, w - size[0]), rng.uniform(0, d - size[1])
        if rng.random() < 0.5:                            # furniture likes to stand along a wall
            x, y = (0.0, y) if rng.random() < 0.5 else (x, 0.0)
        boxes.append([(x, y, 0), (x + size[0], y + size[1], size[2])])
    return np.array(boxes)


def toy_is_free(point, boxes, margin=0.5):
    """Whether a camera at `point` keeps `margin` metres from all surfaces."""
    inside = (point > boxes[0, 0] + margin).all() and (point < boxes[0, 1] - margin).all()
    return inside and not ((point > boxes[1:, 0] - margin) & (point < boxes[1:, 1] + margin)).all(1).any()


def toy_poses(boxes, light, rng):
    """A short walk through the room: TOY_VIEWS camera-to-world poses, a few decimetres to a metre apart."""
    for _ in range(1000):
        start = rng.uniform(boxes[0, 0], boxes[0, 1])
        start[2] = 1.5 if light == "ambient" else rng.uniform(1.1, 1.8)   # ambient: the height is the metric cue
        walk = rng.uniform(0, 2 * math.pi)
        steps = np.cumsum(np.concatenate([[0], rng.uniform(0.1, 0.45, TOY_VIEWS - 1)]))
        path = start + steps[:, None] * (math.cos(walk), math.sin(walk), 0)
        if all(toy_is_free(point, boxes) for point in path):
            break
    else:                                                 # a crowded room: stand still in the middle of the free space
        path = np.repeat([boxes[0].mean(0)], TOY_VIEWS, 0)
    target = boxes[0, 0] + rng.uniform(0.25, 0.75, 3) * boxes[0, 1]       # look into the room rather than at a wall
    poses, yaw = [], math.atan2(target[1] - path[0, 1], target[0] - path[0, 0])
    for point in path:
        a, b = yaw + rng.normal(0, 0.2), rng.uniform(-0.40, 0.05)         # yaw and pitch [rad]
        forward = np.array([math.cos(a) * math.cos(b), math.sin(a) * math.cos(b), math.sin(b)])
        right = np.array([math.sin(a), -math.cos(a), 0])
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(forward, right), forward, point], 1)
        poses.append(pose)
    return poses


def load_toy(frame, light, boxes, colours):
    """Ray-cast one view: RGB image and Euclidean depth map (h, w) [m]."""
    intrinsics, pose = frame.intrinsics, frame.pose
    fx, fy, cx, cy, w, h = intrinsics
    y, x = np.mgrid[0:h, 0:w].reshape(2, -1)
    rays = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(h * w)], 1) / ray_lengths(x, y, intrinsics)[:, None]
    rays = rays @ pose[:3, :3].T
    rays[rays == 0] = 1e-12
    eye, n = pose[:3, 3], np.arange(h * w)
    planes = (boxes[:, :, None] - eye) / rays             # (boxes, 2, rays, 3): where a ray crosses each pair of planes
    near, far = planes.min(1), planes.max(1)
    depth, axis = far[0].min(1), far[0].argmin(1)         # the room: the first plane that the ray leaves through
    kind = np.where(axis == 2, (rays[:, 2] > 0).astype(int), 2 + axis)
    for box_near, box_far in zip(near[1:], far[1:]):      # a box: the last plane that the ray enters through
        enter, side = box_near.max(1), box_near.argmax(1)
        hit = (enter < box_far.min(1)) & (enter > 0) & (enter < depth)
        depth, axis = np.where(hit, enter, depth), np.where(hit, side, axis)
        kind = np.where(hit, np.where(side == 2, 5, 4), kind)
    # Texture: squares of half a metre, counted along the two axes of the surface
    squares = np.floor((eye + depth[:, None] * rays) / TOY_CHECKER)
    squares[n, axis] = 0
    dark = squares.sum(1) % 2
    facing = np.abs(rays[n, axis])
    if light == "lamp":                                   # falls with 1 / d^2; the fixed logarithmic tone curve keeps
        # 0.5 m and 12 m apart in 8 bits
        shade = 0.94 - 0.86 * np.log(depth / 0.5) / math.log(12 / 0.5) + 0.06 * facing
    else:
        shade = np.array([0.75, 0.95, 0.65, 0.85, 0.7, 0.9])[kind]
    rgb = colours[kind] * (shade * (1 - 0.08 * dark))[:, None]
    image = Image.fromarray((rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8).reshape(h, w, 3))
    return frame._replace(pixels=image, depth=depth.reshape(h, w))


def frames_toy(root, split, images, light, seed):
    """Procedural rooms; a room is made from (seed, split, number) alone, so train and val share none."""
    for number in range(math.ceil(images / TOY_VIEWS)):
        scene = f"{split}_{number:05d}"
        rng = rng_for(seed, "toy room " + scene)
        boxes = toy_room(rng)
        colours = TOY_COLOURS * rng.uniform(0.99, 1.01, TOY_COLOURS.shape)
        w, h = TOY_SHAPES[rng.integers(len(TOY_SHAPES))]
        scale = TOY_SCALES[rng.integers(len(TOY_SCALES))]
        wide, high = round(w * scale) + rng.integers(-2, 3), round(h * scale) + rng.integers(-2, 3)
        fx, fy = 100 * wide / w, 100 * high / h           # so that the image at focal length 100 is w x h exactly
        cx, cy = (wide - 1) / 2 + rng.uniform(-2, 2), (high - 1) / 2 + rng.uniform(-2, 2)
        intrinsics = tuple(round(float(v), 4) for v in (fx, fy, cx, cy)) + (int(wide), int(high))
        for view, pose in enumerate(toy_poses(boxes, light, rng)[:images - number * TOY_VIEWS]):
            yield Frame(f"{scene}/{view}", f"rgb/{scene}/{view}.png", partial(load_toy, light=light, boxes=boxes,
                        colours=colours), intrinsics, scene, "toy", 0.5 * view, pose, "euclidean")


FRAMES = {"argoverse2": frames_argoverse2, "waymo": frames_waymo, "nuscenes": frames_nuscenes,
          "scannetpp": frames_scannetpp, "taskonomy": frames_taskonomy, "hm3d": frames_hm3d,
          "matterport3d": frames_matterport3d, "ddad": frames_ddad, "eth3d": frames_eth3d, "sunrgbd": frames_sunrgbd,
          "ibims1": frames_ibims1, "nyuv2": frames_nyuv2, "folder": frames_folder, "toy": frames_toy}


# ---------------------------------------------------------------------------------------------------------------------
# Self-check: the table of a jsonl, and what is wrong with it. Only what a file itself can prove is called a fault.

CHECK_IMAGES = 20_000           # at most so many image headers are opened
CHECK_SHAPES = 300              # records whose labels are tested for z sold as Euclidean
CHECK_PAIRS = 120               # images opened with their neighbours to find labels on the wrong image
BINS = np.geomspace(1e-3, 1e4, 40_001)                    # of the depth histogram: 0.04 % wide


def read_record(line):
    """A line of a jsonl -> record with arrays, or ValueError."""
    try:
        r = json.loads(line)
        intrinsics = np.array(r["intrinsics"], np.float64)
        xy, depth = np.array(r["pixel_coords"], np.float64).reshape(-1, 2), np.array(r["depth"], np.float64)
        if intrinsics.shape != (6,) or depth.shape != (len(xy),) or not isinstance(r["image"], str):
            raise ValueError(f"{len(xy)} pixels, {depth.size} depths, {intrinsics.size} intrinsics (6 needed)")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"missing key {error}" if isinstance(error, KeyError) else f"not a record: {error}") from None
    return r | {"intrinsics": intrinsics, "pixel_coords": xy, "depth": depth}


def largest_plane(inverse_depth, x, y, triples):
    """Most points (of N) within 0.5 % of a plane through three of them: on a plane 1 / z is linear in x and y."""
    a = np.stack([x, y, np.ones_like(x)], 1)
    corners = a[triples]                                  # (T, 3, 3)
    good = np.abs(np.linalg.det(corners)) > 1e-4
    planes = np.linalg.solve(corners[good], inverse_depth[triples[good]][..., None])[..., 0]
    return int((np.abs(planes @ a.T - inverse_depth) < 0.005 * inverse_depth).sum(1).max(initial=0))


def on_grid(values, steps):
    """Whether (nearly) all values are multiples of one of the steps, up to their rounding to 4 decimals."""
    return len(values) >= 50 and any(
        np.mean(np.abs(values / s - np.round(values / s)) * s < 6e-5) > 0.98 for s in steps)


def depth_kind(records):
    """What the labels look like: "euclidean", "z", or None where one cannot tell.

    Two kinds of evidence. Planes: rooms and streets are full of them, and labels lie on flat ones only when they are
    read as what they are. Grid: a depth PNG holds z in fixed steps, so labels converted from it are multiples of a step
    after division by their ray and hardly before. Plain multiples of a step prove less (somebody may have rounded, or
    measured Euclidean depth), so they count only where neither planes nor the record itself speak against it."""
    planes, plain, divided, steps = [], [], [], (1 / 1000, 1 / 4000, 50 / 65535, 1 / 5000, 1 / 256)
    for n, r in enumerate(records):
        (fx, fy, cx, cy), (u, v), d = r["intrinsics"][:4], r["pixel_coords"].T, r["depth"]
        if len(d) < 20 or fx <= 0 or fy <= 0 or not (d > 0).all():
            continue
        rays = ray_lengths(u, v, r["intrinsics"])
        triples = rng_for(0, f"triples {n}").integers(0, len(d), (300, 3))
        planes.append([largest_plane(q, (u - cx) / fx, (v - cy) / fy, triples) for q in (rays / d, 1 / d)])
        far = rays > 1.02                                 # near the axis the two kinds are equal
        plain.append(d[far] if r.get("depth_type") != "euclidean" else [])
        divided.append((d / rays)[far])
    if not planes:
        return None
    plain, divided, planes = np.concatenate(plain), np.concatenate(divided), np.array(planes)
    if on_grid(divided, (*steps, 1 / 512)):
        return "euclidean"
    as_euclidean, as_z = planes.sum(0)
    if on_grid(plain, steps) and as_z > 0.9 * as_euclidean:
        return "z"
    gain = planes[:, 0] - planes[:, 1]
    sure = len(gain) >= 20 and abs(gain.mean()) > 6 * gain.std(ddof=1) / math.sqrt(len(gain))
    ahead, behind = max(as_euclidean, as_z), min(as_euclidean, as_z)
    clear = len(gain) >= 5 and ahead - behind >= 30 and ahead > 1.25 * behind
    return ("euclidean" if as_euclidean > as_z else "z") if sure or clear else None


def colours_at(path, xy):
    """RGB around the pixels (mean of 3 x 3), (N, 3); None if they do not all lie in this image."""
    with Image.open(path) as image:
        if (xy < 0).any() or (xy >= image.size).any():
            return None
        rgb = np.pad(np.asarray(image.convert("RGB"), np.float32), ((1, 1), (1, 1), (0, 0)), "edge")
    x, y = xy.astype(int).T
    return np.mean([rgb[y + i, x + j] for i in range(3) for j in range(3)], 0)


def unexplained(colours, log_depth):
    """How badly an image's colours explain its labels: error of predicting each one from the others of like colour."""
    gap = ((colours[:, None] - colours[None]) ** 2).sum(-1) / (2 * 12 ** 2)
    weight = np.exp(-gap) + 1e-6
    np.fill_diagonal(weight, 0)
    return float(np.abs(weight @ log_depth / weight.sum(1) - log_depth).mean())


def shifted_by(records, image_path, count):
    """+1 or -1 if the labels fit the image of the next or the previous line better than their own, else 0.
    records: position -> record. The verdict needs a difference that chance does not make (4.5 standard errors)."""
    better = {1: [], -1: []}
    for n in np.unique(np.linspace(1, count - 2, CHECK_PAIRS).astype(int)) if count >= 12 else ():
        own, neighbours = records(n), {k: records(n + k) for k in (1, -1)}     # 0 < n < count - 1
        if own is None or len(own["depth"]) < 20:
            continue
        log_depth = np.log(np.maximum(own["depth"], 1e-6))
        try:
            here = colours_at(image_path(own), own["pixel_coords"])
            for k, r in neighbours.items():
                there = None if r is None or here is None else colours_at(image_path(r), own["pixel_coords"])
                if there is not None:
                    better[k].append(unexplained(here, log_depth) - unexplained(there, log_depth))
        except OSError:
            continue
    for k, gains in better.items():
        gains = np.array(gains)
        if len(gains) >= 10 and gains.mean() > 4.5 * gains.std(ddof=1) / math.sqrt(len(gains)) > 0:
            return k
    return 0


def check_images(records, numbers, image_path, add):
    """Headers of the images: there, of the size that the intrinsics say, and no two the same file contents."""
    missing, sizes = [], {}
    for n in numbers:
        r = records(n)
        if r is None:
            continue
        path = image_path(r)
        try:
            with Image.open(path) as image:
                size = image.size
        except FileNotFoundError:
            missing.append((n, path))
            continue
        except OSError as error:
            add("unreadable image", n, f"{path}: {error}")
            continue
        if tuple(r["intrinsics"][4:]) != size:
            add("image size is not that of the intrinsics", n, "{} is {} x {}, intrinsics say {:g} x {:g}".format(
                path, *size, *r["intrinsics"][4:]))
        sizes.setdefault(getsize(path), []).append((n, path))
    seen = {}
    for same in (group for group in sizes.values() if len(group) > 1):
        for n, path in same:
            with open(path, "rb") as f:
                first = seen.setdefault(hashlib.sha256(f.read()).digest(), (n, os.path.realpath(path)))
            if first[1] != os.path.realpath(path):
                add("duplicate image", n, f"{path} has the same content as line {first[0] + 1}")
    if len(missing) == len(numbers):
        return f"no image found (first: {missing[0][1]}): give --image-root; what needs the images was not checked"
    for n, path in missing:
        add("image not found", n, path)
    return None


def scan(path, count, add):
    """One pass over the lines; faults of single lines go to add(what, line, example). -> the row of the table, the
    scenes as keys, a hash of each line's image. Memory does not grow with the labels."""
    scenes, names, focals, pending = {}, array("q"), set(), []
    histogram, points, two, declared_z, low, high = np.zeros(len(BINS) + 1, np.int64), 0, 0, 0, math.inf, 0.0

    def tally():
        nonlocal histogram, points, two, low, high
        d = np.concatenate([np.zeros(0), *pending])
        pending.clear()
        histogram += np.bincount(np.searchsorted(BINS, d), minlength=len(BINS) + 1)
        points, two = points + len(d), two + int((np.maximum(d / 2, 2 / d) < 1.25).sum())
        low, high = min(low, d.min(initial=math.inf)), max(high, d.max(initial=0))

    with open(path, "rb") as f:
        lines = tqdm(f, total=count, unit=" lines", desc="check", leave=False, disable=count < 20_000)
        for n, line in enumerate(lines):
            try:
                r = read_record(line)
            except ValueError as error:
                add("malformed line", n, error)
                names.append(n)
                continue
            fx, fy, _, _, w, h = r["intrinsics"]
            (x, y), d = r["pixel_coords"].T, r["depth"]
            if not (fx > 0 and fy > 0 and np.isfinite(r["intrinsics"]).all()):
                add("fx or fy not positive", n, f"fx {fx:g}, fy {fy:g}")
            outside = (x < -0.5) | (y < -0.5) | (x >= w - 0.5) | (y >= h - 0.5)
            if outside.any():
                add("label outside of the image", n, "pixel {:g}, {:g} of {:g} x {:g}".format(
                    x[outside][0], y[outside][0], w, h))
            good = np.isfinite(d) & (d > 0)
            if not good.all():
                add("depth not positive and finite", n, f"{d[~good][0]}")
            if not len(d):
                add("no labels", n, r["image"])
            pending.append(d[good])
            if len(pending) == 1000:                      # a thousand lines at once: twice as fast
                tally()
            if len(focals) < 1000:
                focals.add(round(fx, 1))
            declared_z += r.get("depth_type") == "z"
            if r.get("scene") is not None:
                scenes[r["scene"]] = None
            names.append(int.from_bytes(hashlib.blake2b(r["image"].encode(), digest_size=7).digest(), "little"))
    tally()
    where = np.searchsorted(np.cumsum(histogram), np.array([0.05, 0.25, 0.5, 0.75, 0.95]) * points)
    return {"path": path, "images": count, "points": points, "low": low if points else 0.0, "high": high,
            "quantiles": BINS[np.minimum(where, len(BINS) - 1)] * bool(points), "focals": sorted(focals),
            "two": two / max(points, 1), "kind": "z" if 2 * declared_z > count else "euclidean"}, scenes, names


def check_file(path, image_root=None):
    """-> the row of the table with "faults" {what: [count, first example]} and "notes"; and the scenes."""
    folder, faults, offsets = image_root or dirname(os.path.abspath(path)), {}, line_offsets(path)
    count = len(offsets) - 1

    def add(what, n, example):
        faults.setdefault(what, [0, f"line {n + 1}: {example}"])[0] += 1

    def record(n):
        with open(path, "rb") as f:
            f.seek(offsets[n])
            try:
                return read_record(f.read(offsets[n + 1] - offsets[n]))
            except ValueError:
                return None

    def image_path(r):
        return join(folder, r["image"])

    def spread(most):
        return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else []

    row, scenes, names = scan(path, count, add)
    order = np.argsort(names, kind="stable")
    for i in np.flatnonzero(np.diff(np.array(names)[order]) == 0):
        add("duplicate image", int(order[i + 1]), f"the image of line {order[i] + 1} again")
    if not count:
        add("empty file", 0, "no record")
    note = count and check_images(record, spread(CHECK_IMAGES), image_path, add)
    if count and not note:
        shift = shifted_by(record, image_path, count)
        if shift:
            add("labels on the wrong image", 0,
                f"shifted: they fit the image of the {'next' if shift > 0 else 'previous'} line better")
    for n in spread(CHECK_IMAGES):                        # .../<scene>/... of another scene of this very file
        r = record(n)
        parts = set(r["image"].split("/")) if r and r.get("scene") else set()
        if parts and r["scene"] not in parts and parts & scenes.keys():
            add("labels on the wrong image", n, f"scene {r['scene']}, but the image is {r['image']}")
    looks = depth_kind([r for n in spread(CHECK_SHAPES) if (r := record(n))])
    if (looks, row["kind"]) == ("z", "euclidean"):
        add("z sold as Euclidean", 0, "the labels lie on planes, or on the steps of a depth PNG, only when taken as z; "
            'convert them, or mark each record with "depth_type": "z"')
    if (looks, row["kind"]) == ("euclidean", "z"):
        add("Euclidean depth declared as z", 0, 'the records say "depth_type": "z", their labels do not look like it')
    return row | {"looks": looks, "faults": faults, "notes": [note] if note else []}, scenes


def split_of(path):
    return next((s for s in ("train", "val", "test") if s in basename(path)), None)


def check(paths, image_root=None):
    """Print table and faults of the files -> number of faults. A file's own sibling (train beside val) counts as given
    where scenes are compared."""
    results = [check_file(path, image_root) for path in paths]
    print(f"\n{'file':32}{'images':>9}{'points':>11}{'min':>8}{'5%':>7}{'25%':>7}{'50%':>7}{'75%':>7}{'95%':>7}"
          f"{'max':>8}{'focal px':>15}{'2.0 m':>7}{'paper':>7}")
    for r, _ in results:
        name = next((k for k in PAPER_CONSTANT if k in os.path.abspath(r["path"]).lower()), None)
        focals = f"{r['focals'][0]:.0f}" if r["focals"] else "-"
        focals += f"-{r['focals'][-1]:.0f} ({len(r['focals'])})" if len(r["focals"]) > 1 else ""
        print(f"{r['path'][-31:]:32}{r['images']:>9}{r['points']:>11}{r['low']:>8.2f}"
              + "".join(f"{q:>7.2f}" for q in r["quantiles"]) + f"{r['high']:>8.2f}{focals:>15}{r['two']:>7.3f}"
              + f"{format(PAPER_CONSTANT[name], '.3f') if name and split_of(r['path']) != 'train' else '-':>7}")
        r["notes"] += [f"labels are said to be {r['kind']}" + ", and look like it" * (r["looks"] == r["kind"])]
    print("always 2.0 m in the paper: " + ", ".join(f"{name} {value:.3f}" for name, value in PAPER_CONSTANT.items()))
    compared = [(r["path"], scenes) for r, scenes in results]
    for path in paths:
        other = {"train": "val", "val": "train"}.get(split_of(path))
        base = basename(path)
        sibling = join(dirname(path), base.replace(split_of(path), other, 1)) if other else ""
        if os.path.isfile(sibling) and os.path.realpath(sibling) not in map(os.path.realpath, paths):
            with open(sibling) as f:
                compared.append((sibling, {r["scene"]: None for r in map(json.loads, f) if "scene" in r}))
    for i, (a, scenes_a) in enumerate(compared):
        for b, scenes_b in compared[i + 1:]:
            shared = sorted(scenes_a.keys() & scenes_b.keys(), key=str)
            if shared and (split_of(a) != split_of(b) or split_of(a) is None):
                faults = next(r for r, _ in results if r["path"] in (a, b))["faults"]
                faults["scenes shared between splits"] = [len(shared), f"{shared[0]} is in {a} and in {b}"]
    total = 0
    for r, _ in results:
        for note in r["notes"]:
            print(f"  {r['path']}: {note}")
        for what, (times, example) in r["faults"].items():
            total += 1
            print(f"  FAULT {r['path']}: {what} ({times} x); {example}")
    print(f"{total} kinds of fault found" if total else "no faults found", flush=True)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Download and raw data

RETRIES = 5                     # attempts in a row that bring no byte
RETRY_WAIT = 0.5                # [s], doubled each time


def download(url, path, md5=None):
    """Fetch url to path. Goes on where a cut connection or an earlier run stopped (if the file is still the same one),
    and accepts nothing but the size that the server announced and, if known, the checksum."""
    part, tag, failures, total = path + ".part", path + ".part.tag", 0, None
    os.makedirs(dirname(os.path.abspath(path)), exist_ok=True)
    bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=basename(path))
    while True:
        have = getsize(part) if exists(part) else 0
        start, request = have, urllib.request.Request(url, headers={"User-Agent": "prepare.py"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            if exists(tag):
                request.add_header("If-Range", open(tag).read())
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                if have and reply.status != 206:
                    have = 0                              # another file by now, or a server that cannot go on
                length = reply.headers.get("Content-Length")
                total = None if length is None else have + int(length)
                if total and shutil.disk_usage(dirname(os.path.abspath(path))).free < total - have:
                    fail(f"{path} needs {(total - have) / 1e9:.1f} GB, which the disk does not have")
                mark = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
                if mark and not mark.startswith("W/"):
                    with open(tag, "w") as f:
                        f.write(mark)
                bar.total, bar.n = total, have
                with open(part, "ab" if have else "wb") as f:
                    while block := reply.read(1 << 18):
                        f.write(block)
                        bar.update(len(block))
            done = total is None                          # without an announced size, the end is the end
        except urllib.error.HTTPError as error:
            done = False
            if error.code == 416:                         # nothing beyond what we have: all of it, or a stale part
                announced = (error.headers.get("Content-Range") or "").rpartition("/")[2]
                done = announced == str(have) and total in (None, have)
                if not done:
                    os.remove(part)
                    if announced.isdigit() and total is not None:
                        fail(f"{url} announced {total} bytes, then {announced}: wrong size, thrown away")
            elif error.code < 500:
                fail(f"{url}: {error.code} {error.reason}; fetch it by hand and put it at {path}")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                fail(f"{part}: {error.strerror}; make room and give the command again")
            done = False
        have = getsize(part) if exists(part) else 0
        if done or have == total:
            break
        if total is not None and have > total:
            os.remove(part)
            fail(f"{url} sent {have} bytes instead of {total}: wrong size, thrown away; give the command again")
        failures = 0 if have > start else failures + 1
        if failures >= RETRIES:
            fail(f"{url}: the connection failed {RETRIES} times, {have} of {total or 'unknown'} bytes are in {part}; "
                 "give the command again to go on")
        time.sleep(RETRY_WAIT * 2 ** failures * (failures > 0))
    bar.close()
    if md5:
        with open(part, "rb") as f:
            found = hashlib.file_digest(f, "md5").hexdigest()
        if found != md5:
            os.remove(part)
            fail(f"{url}: checksum {found} instead of {md5}; the file was thrown away, give the command again")
    os.replace(part, path)
    if exists(tag):
        os.remove(tag)


def unpack(archive, root):
    """Zip or tar -> root. What is there with the right size is kept, so that an interrupted unpacking goes on."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                for m in tqdm(z.infolist(), unit=" files", desc="unpack"):
                    target = join(root, m.filename)
                    if not (os.path.isfile(target) and getsize(target) == m.file_size):
                        z.extract(m, root)
        else:
            with tarfile.open(archive) as t:
                for m in tqdm(t, unit=" files", desc="unpack"):
                    target = join(root, m.name)
                    if not (os.path.isfile(target) and getsize(target) == m.size):
                        t.extract(m, root, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        fail(f"{archive} is damaged ({str(error).splitlines()[0]}): delete it and give the command again")


def missing_raw(dataset, root, why):
    """The message for raw data that is not there: what, where from, how large, which terms, and where to put it."""
    d = DATASETS[dataset]
    open_text = f"\n  or run: python prepare.py --dataset {dataset} --download --root {root}" if "download" in d else ""
    fail(f"{why}\n  {dataset} needs: {d['get']}\n  published at: {d['url']}\n  size: {d['size']}\n"
         f"  terms: {d['licence']}\n  put it in: {root} (or give --root){open_text}", 2)


def find_root(dataset, root):
    """The folder that looks like the dataset: root, or one or two below it or above it. None if there is none."""
    def marks(folder):
        patterns = (join(glob.escape(folder), mark) for mark in DATASETS[dataset]["marks"])
        return (path for pattern in patterns for path in glob.iglob(pattern))
    if not isdir(root):
        return None
    below = [join(root, a) for a in folders(root)]
    below += [join(a, b) for a in below[:200] for b in folders(a)[:200]]
    found = next((folder for folder in (root, *below) if next(marks(folder), None)), None)
    inside = os.path.abspath(root)                        # further up only where root is a part of what is found
    for folder in (dirname(inside), dirname(dirname(inside))):
        found = found or next((folder for path in marks(folder) if (path + os.sep).startswith(inside + os.sep)), None)
    if found and found != root:
        print(f"prepare.py: {root} is not the root of {dataset}; using {found}", file=sys.stderr)
    return found


# ---------------------------------------------------------------------------------------------------------------------

def prepare(dataset, split, options, root, path, points, seed, limits, occlusion, paper, stride, limit, shard, workers,
            overwrite, must_exist):
    """One split of one dataset -> path. False if it has no frames and need not have any."""
    command = {"dataset": dataset, "split": split, "root": root and os.path.abspath(root), "points": points,
               "seed": seed, "range": limits, "occlusion": occlusion, "paper_labels": paper, "stride": stride,
               "limit": limit, "shard": shard, **options}
    state = saved_state(path, command, overwrite)
    if state and state["finished"]:
        print(f"{path}: already made by this command, kept (--overwrite makes it anew)")
        return True

    def frames():
        return islice(FRAMES[dataset](root, split, **options), 0, limit and limit * stride, stride)
    try:
        total = sum(1 for _ in frames())
        if not total:
            return must_exist and missing_raw(dataset, root, f"{root} has no frames of {dataset} ({split})")
        first, last = (total * (shard[0] - 1) // shard[1], total * shard[0] // shard[1]) if shard else (0, total)
        os.makedirs(dirname(path), exist_ok=True)
        make = partial(make_record, folder=dirname(path), points=points, seed=seed, limits=limits,
                       occlusion=occlusion, paper=paper, label_z=paper and dataset in PAPER_Z)
        state = write_records(islice(frames(), first, last), last - first, path, make, workers,
                              DATASETS[dataset].get("chunk", CHUNK), command, state)
    except BrokenProcessPool:
        fail("a worker was killed, most likely for lack of memory: the same command with fewer --workers goes on")
    except (OSError, ValueError, KeyError) as error:      # a listing or a table; frames are caught one by one
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            fail(f"{path}: {error.strerror}; make room, then the same command goes on from here")
        where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        fail(f"{dataset} in {root}: {where} (half-extracted archive? wrong folder?)")
    print(f"{path}: {state['records']} images of {last - first}; {state['too_few_labels']} with fewer than "
          f"{MIN_POINTS} labels and {state['bad']} unreadable left out" + ", hidden LiDAR points too" * occlusion)
    for example in state["bad_examples"]:
        print(f"prepare.py: left out {example}", file=sys.stderr)
    if state["bad"] > 0.01 * (last - first):
        print(f"prepare.py: WARNING: {state['bad']} of {last - first} images could not be read: is the download "
              "complete?", file=sys.stderr)
    return True


def shard_of(text):
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/8")
    return int(i), int(n)


def at_least(minimum, kind=int):
    def number(text):
        if kind(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return kind(text)
    return number


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                fromfile_prefix_chars="@")
    p.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    # what
    p.add_argument("--dataset", choices=sorted(DATASETS))
    p.add_argument("--split", choices=("train", "val"), help="default: all splits that the paper uses of the dataset")
    p.add_argument("--check", nargs="+", metavar="FILE", help="table and faults of jsonl files; exit code 1 if any")
    # input and output
    p.add_argument("--root", help="raw data (default: data/raw/<dataset>)")
    p.add_argument("--out", help="default: data/<dataset>")
    p.add_argument("--overwrite", action="store_true", help="replace what another command wrote to --out")
    p.add_argument("--image-root", help="with --check: where the images are, if not beside the jsonl")
    p.add_argument("--download", action="store_true", help="fetch and unpack (SUN RGB-D, NYUv2, iBims-1, DDAD)")
    p.add_argument("--url", help="with --download: fetch this address instead")
    # labels
    p.add_argument("--points", type=at_least(1), default=100, help="labelled pixels an image (Sec. 4)")
    p.add_argument("--seed", type=int, default=0, help="decides which pixels are drawn")
    p.add_argument("--min-depth", type=float, help="Euclidean [m]; default by dataset")
    p.add_argument("--max-depth", type=float, help="Euclidean [m]; default by dataset")
    p.add_argument("--occlusion", action="store_true", help="drop LiDAR points that the camera cannot see")
    p.add_argument("--paper-labels", action="store_true", help="the published labels (z, 0.8 x), marked")
    # amount
    p.add_argument("--stride", type=at_least(1), help="every k-th image (default 1; ScanNet++: every 10th video frame)")
    p.add_argument("--limit", type=at_least(1), help="at most so many images")
    p.add_argument("--shard", type=shard_of, metavar="I/N", help="part I of N, to be joined with cat")
    p.add_argument("--workers", type=at_least(0), default=os.cpu_count() or 1, help="processes")
    # nyuv2, folder, toy
    p.add_argument("--all-images", action="store_true", help="nyuv2: all 1,449 instead of the 654 test images")
    p.add_argument("--intrinsics", help="folder: fx,fy,cx,cy [px]")
    p.add_argument("--depth-scale", type=float, help="folder: units per metre (default 1000 for PNG, 1 for .npy)")
    p.add_argument("--depth-type", choices=("z", "euclidean"), default="z", help="folder: what the depth maps hold")
    p.add_argument("--images", type=at_least(1), default=2600, help="toy: training images")
    p.add_argument("--val-images", type=at_least(1), default=400, help="toy: validation images")
    p.add_argument("--light", choices=("lamp", "ambient"), default="lamp", help="toy: lamp on the camera, or daylight")
    args = p.parse_args(argv)
    if not (args.dataset or args.check):
        p.error("give --dataset NAME or --check FILE.jsonl")
    if args.depth_scale is not None and args.depth_scale <= 0:
        p.error("--depth-scale must be positive")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        for path in args.check:
            if not os.path.isfile(path):
                fail(f"{path}: no such file")
        return 1 if check(args.check, args.image_root) else 0
    dataset, d = args.dataset, DATASETS[args.dataset]
    if args.split and args.split not in d["splits"]:
        fail(f"{dataset} has no split {args.split}: the paper uses it for {' and '.join(d['splits'])}")
    limits = (d["range"][0] if args.min_depth is None else args.min_depth,
              d["range"][1] if args.max_depth is None else args.max_depth)
    if not 0 <= limits[0] < limits[1]:
        fail(f"--min-depth {limits[0]} --max-depth {limits[1]}: no depth lies between them")

    # ---- raw data
    root = None
    if dataset != "toy":
        wanted = args.root or join("data", "raw", d.get("raw", dataset))
        root = find_root(dataset, wanted)
        if not root and args.download:
            if "download" not in d:
                missing_raw(dataset, wanted, f"{dataset} cannot be fetched without registering")
            url, name, md5 = d["download"]
            if args.url:
                url, md5 = args.url, None
            archive = join(wanted, name)
            if not exists(archive):
                download(url, archive, md5)
            unpack(archive, wanted)
            root = find_root(dataset, wanted)
        if not root:
            missing_raw(dataset, wanted, f"no raw data of {dataset} in {wanted}")

    # ---- the splits
    options = {"sunrgbd": {"paper": args.paper_labels},
               "nyuv2": {"paper": args.paper_labels, "every_image": args.all_images},
               "scannetpp": {"every": args.stride or SCANNETPP_EVERY},
               "folder": {"intrinsics": args.intrinsics, "depth_scale": args.depth_scale,
                          "depth_type": args.depth_type}}.get(dataset, {})
    stride = 1 if dataset == "scannetpp" else args.stride or 1
    out, written = args.out or join("data", dataset), []
    default = d["splits"] if dataset != "folder" else ("train",)
    for split in (args.split,) if args.split else default:
        if dataset == "toy":
            images = args.images if split == "train" else args.val_images
            options = {"images": images, "light": args.light, "seed": args.seed}
        part = "" if not args.shard else ".{:0{}d}-of-{}".format(args.shard[0], len(str(args.shard[1])), args.shard[1])
        path = join(out, f"{split}{part}.jsonl")
        if prepare(dataset, split, options, root, path, args.points, args.seed, limits, args.occlusion,
                   args.paper_labels, stride, args.limit, args.shard, args.workers, args.overwrite,
                   must_exist=args.split or split == default[-1] and not written):
            written.append(path)

    # ---- self-check
    if check(written):
        print("prepare.py: WARNING: the self-check found faults in what was written, see above", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 130)
