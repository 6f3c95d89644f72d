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
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
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
ETH3D_FOCAL = 1000              # ETH3D's 24-megapixel fisheye images become pinhole images of this focal length [px]
ETH3D_BORDER = 10               # laser pixels nearer to the border than this are left out [px]
WAYMO_CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT")      # camera_name 1..5
WAYMO_TOP = 1                   # laser_name of the roof LiDAR, the only one with a pose for each range-image cell
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# range: Euclidean depth of the labels [m], on which evaluation code agrees. marks: a folder that holds one is the root.
# get: what, where, how large, under which terms. download: (url, file name, md5 or None), if open to all.
TRAIN, VAL, BOTH = ("train",), ("val",), ("train", "val")
SUNRGBD_ZIP = ("https://rgbd.cs.princeton.edu/data/SUNRGBD.zip", "SUNRGBD.zip", None)
DATASETS = {
    "argoverse2": dict(range=(1, 200), splits=BOTH, marks=("train/*/sensors", "val/*/sensors"), get="""
        the Sensor dataset: train-*.tar and val-*.tar, all unpacked to one tree (train/<log>, val/<log>)
        https://www.argoverse.org/av2.html; about 1 TB; CC BY-NC-SA 4.0"""),
    "waymo": dict(range=(1, 200), splits=TRAIN, marks=("training/camera_image",), chunk=1000, get="""
        Waymo Open Dataset v2.0.1, training/: camera_image, camera_calibration, lidar, lidar_calibration, lidar_pose,
        lidar_camera_projection, vehicle_pose
        https://waymo.com/open/download (registration); about 1 TB; Waymo Open Dataset licence"""),
    "nuscenes": dict(range=(1, 200), splits=BOTH, marks=("v1.0-trainval", "v1.0-mini", "samples"), get="""
        train: v1.0-trainval metadata and blobs 01-10; val: v1.0-mini.tgz, or the same scenes of trainval
        https://www.nuscenes.org/nuscenes#download (registration); mini 4 GB, trainval about 300 GB;
        CC BY-NC-SA 4.0, non-commercial"""),
    "scannetpp": dict(range=(0.1, 10), splits=BOTH, marks=("data/*/iphone",), get="""
        splits/ and data/<scene>/iphone with rgb/, rgb_masks/ and depth/ decoded by the official toolkit
        https://kaldir.vc.in.tum.de/scannetpp (registration); about 1.5 TB with the decoded frames;
        ScanNet++ terms of use, non-commercial"""),
    "taskonomy": dict(range=(0.1, 50), splits=TRAIN, marks=("rgb", "*/rgb"), get="""
        domains rgb, depth_euclidean, point_info of component taskonomy, and train_val_test_fullplus.csv
        https://github.com/StanfordVL/taskonomy (omnitools.download); about 5 TB for the three domains;
        MIT for the tools, Gibson terms of use for the data"""),
    "hm3d": dict(range=(0.1, 50), splits=TRAIN, marks=("rgb", "*/rgb"), get="""
        domains rgb, depth_zbuffer (or depth_euclidean), point_info of component hm3d of Omnidata's starter set
        https://github.com/EPFL-VILAB/omnidata (registration); several TB; Matterport terms of use"""),
    "matterport3d": dict(range=(0.1, 50), splits=TRAIN, marks=(
        "v1/scans", "scans", "undistorted_camera_parameters", "*/undistorted_camera_parameters"), get="""
        undistorted_color_images, undistorted_depth_images, undistorted_camera_parameters of all houses, unzipped
        https://niessner.github.io/Matterport (registration); about 300 GB; Matterport terms of use"""),
    "ddad": dict(range=(1, 200), splits=VAL, marks=("ddad.json",), download=(
        "https://tri-ml-public.s3.amazonaws.com/github/DDAD/datasets/DDAD.tar", "DDAD.tar",
        "027686329dda41bd540e71ac5b43ebcb"), get="""
        DDAD.tar (train+val), unpacked to ddad_train_val/
        https://github.com/TRI-ML/DDAD; 257 GB; CC BY-NC-SA 4.0"""),
    "eth3d": dict(range=(0.1, 100), splits=VAL, marks=("*/dslr_calibration_jpg", "*/*/dslr_calibration_jpg"), get="""
        multi_view_training_dslr_jpg.7z and the dslr depth archives of the training scenes, unpacked to one tree
        https://www.eth3d.net/datasets; about 30 GB; CC BY-NC-SA 4.0"""),
    "sunrgbd": dict(range=(0.1, 8), splits=VAL, marks=("SUNRGBD", "kv1", "kv2", "realsense", "xtion"), get="""
        SUNRGBD.zip
        https://rgbd.cs.princeton.edu; 6.4 GB; research use, cite the authors""", download=SUNRGBD_ZIP),
    "ibims1": dict(range=(0.1, 25), splits=VAL, marks=("depth", "calib"), download=(
        "https://dataserv.ub.tum.de/s/m1455541/download?path=%2F&files=ibims1_core_raw.zip", "ibims1_core_raw.zip",
        None), get="""
        ibims1_core_raw.zip
        https://www.asg.ed.tum.de/lmf/ibims1; 55 MB; see its download page for the terms"""),
    "nyuv2": dict(range=(0.1, 10), splits=VAL, raw="sunrgbd", marks=(
        "SUNRGBD", "kv1", "NYUdata", "NYU0001", "*/sync_depth_*.png", "sync_depth_*.png"), get="""
        SUNRGBD.zip (its kv1/NYUdata), or the 640 x 480 test images with sync_depth_*.png
        https://rgbd.cs.princeton.edu; 6.4 GB; research use, cite the authors""", download=SUNRGBD_ZIP),
    "folder": dict(range=(0.1, 200), splits=BOTH, marks=("rgb", "*/rgb"), get="""
        your own RGB-D images: rgb/<name>.jpg or .png, depth/<name>.png (16 bit) or .npy, intrinsics.txt
        (fx fy cx cy, or 3 x 3) or --intrinsics; optional poses/<name>.txt (4 x 4 camera-to-world)"""),
    "toy": dict(range=(0.1, 100), splits=BOTH)}
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


def rotations_of(roll, pitch, yaw):
    """Rz(yaw) Ry(pitch) Rx(roll) for arrays of N angles -> (N, 3, 3)."""
    (cr, sr), (cp, sp), (cy, sy) = ((np.cos(a), np.sin(a)) for a in (roll, pitch, yaw))
    return np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
                     sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
                     -sp, cp * sr, cp * cr], -1).reshape(-1, 3, 3)


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
    """Brown-Conrady (OpenCV order), normalised coordinates: pinhole -> distorted."""
    q = x * x + y * y
    radial = 1 + q * (k1 + q * (k2 + q * k3))
    return x * radial + 2 * p1 * x * y + p2 * (q + 2 * x * x), y * radial + 2 * p2 * x * y + p1 * (q + 2 * y * y)


def distort_thin_prism(u, v, k1, k2, p1, p2, k3, k4, sx, sy):
    """THIN_PRISM_FISHEYE, normalised coordinates: pinhole -> distorted."""
    r = np.sqrt(u * u + v * v) + 1e-12
    a, b = u * np.arctan(r) / r, v * np.arctan(r) / r
    q = a * a + b * b
    radial = 1 + q * (k1 + q * (k2 + q * (k3 + q * k4)))
    return (a * radial + 2 * p1 * a * b + p2 * (q + 2 * a * a) + sx * q,
            b * radial + 2 * p2 * a * b + p1 * (q + 2 * b * b) + sy * q)


def undistort(distort, x, y, *lens):
    """The inverse of distort(u, v, *lens) by Newton, slopes from differences: a fixed point diverges in corners."""
    u, v, h = x, y, 1e-6
    for _ in range(6):
        (a, b), (au, bu), (av, bv) = (distort(u + i, v + j, *lens) for i, j in ((0, 0), (h, 0), (0, h)))
        au, bu, av, bv = (au - a) / h, (bu - b) / h, (av - a) / h, (bv - b) / h
        det = au * bv - av * bu
        u, v = u + (bv * (x - a) - av * (y - b)) / det, v + (au * (y - b) - bu * (x - a)) / det
    return u, v


def remap(image, size, source, step=16):
    """Resample an image: source(x, y) says where the output point (x, y) lies in `image`, both counted from the corner
    of the first pixel. Bilinear; between the points of a grid of `step` px the source is interpolated."""
    xs, ys = [np.append(np.arange(0, n, step), n).astype(float) for n in size]
    at = np.stack(source(*np.meshgrid(xs, ys)), -1)       # (rows, columns, 2)
    quads = [((int(xs[i]), int(ys[j]), int(xs[i + 1]), int(ys[j + 1])),
              (*at[j, i], *at[j + 1, i], *at[j + 1, i + 1], *at[j, i + 1]))
             for j in range(len(ys) - 1) for i in range(len(xs) - 1)]
    return image.transform(size, Image.Transform.MESH, quads, Image.Resampling.BILINEAR)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def reason(error):
    return f"{error} is not there" if isinstance(error, KeyError) else str(error) or type(error).__name__


@contextmanager
def naming(path):
    """Errors of reading `path` say which file it was."""
    try:
        yield
    except Exception as error:                            # readers of broken files raise whatever they like
        raise ValueError(reason(error) if path in str(error) else f"{path}: {reason(error)}") from error


@contextmanager
def replacing(path):
    """A temporary path that becomes `path` when all went well, and vanishes otherwise (the disk was full)."""
    os.makedirs(dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if exists(temporary):
            os.remove(temporary)


def read_image(path):
    with naming(path), Image.open(path) as image:
        return np.asarray(image)


def read_png(path, scale=None):
    """16-bit grey PNG (H, W) -> float32 metres, of which one is `scale` units; or as it is, uint16."""
    raw = read_image(path)
    if raw.ndim != 2 or raw.dtype.itemsize == 1:
        raise ValueError(f"{path}: not a 16-bit grey PNG (of {raw.dtype}, {raw.ndim} axes)")
    return raw.astype(np.float32) / np.float32(scale) if scale else raw.astype(np.uint16)


def image_size(path):
    """(w, h) of an image, of which the end must be there too: a half-extracted archive leaves cut files."""
    with naming(path), Image.open(path) as image, open(path, "rb") as f:
        f.seek(max(0, getsize(path) - 1024))
        if {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format, b"") not in f.read():
            image.load()                                  # cut off, or an unusual end: only decoding can tell
        return image.size


def write_json(path, value):
    with replacing(path) as temporary, open(temporary, "w") as f:
        json.dump(value, f, indent=1)


def read_text(path):
    with naming(path), open(path, encoding="utf-8") as f:
        return f.read()


def read_json(path):
    with naming(path):
        return json.loads(read_text(path))


def read_json_list(path):
    """The records of a JSON list one by one: nuScenes' tables are over 1 GB, several times that as Python objects."""
    decoder, between, text, at = json.JSONDecoder(), re.compile(r"[\[,\s]*"), "", 0
    with naming(path), open(path, encoding="utf-8") as f:
        while block := f.read(1 << 22):
            text, at = text[at:] + block, 0
            while True:
                at = between.match(text, at).end()
                try:
                    record, at = decoder.raw_decode(text, at)
                except json.JSONDecodeError:              # the end of the list, or of what has been read
                    break
                yield record
        if text[at:].strip() != "]":
            raise ValueError("ends in the middle of a record: extract the archive again")


def need_pyarrow():
    try:
        import pyarrow.feather
        import pyarrow.parquet
    except ImportError:
        fail("Argoverse2 and Waymo are stored in Arrow files: pip install pyarrow")
    return pyarrow


def read_feather(path):
    """Columns of a feather file as numpy arrays by name."""
    with naming(path):
        table = need_pyarrow().feather.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}


def read_sweep(path):
    """LiDAR points (N, 3) of Argoverse2 (float16), nuScenes and DDAD."""
    with naming(path):
        if path.endswith(".feather"):
            table = read_feather(path)
            return np.stack([table[k] for k in "xyz"], 1).astype(np.float64)
        if path.endswith(".bin"):
            return np.fromfile(path, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
        with np.load(path) as file:
            return file["data"][:, :3].astype(np.float64)


def folders(path):
    """Names of the folders in `path`, sorted; hidden ones do not count."""
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".") if isdir(path) else []


def names(path, ending):
    """Names of the files in `path` that end so, without it, sorted."""
    return sorted(name.removesuffix(ending) for name in os.listdir(path) if name.endswith(ending))


def only_file(path):
    found = os.listdir(path)
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} files, expected one")
    return join(path, found[0])


def parse_intrinsics(text):
    """fx fy cx cy, or a 3 x 3 or 4 x 4 matrix, in words or with commas -> (fx, fy, cx, cy)."""
    k = [float(v) for v in text.replace(",", " ").split()]
    if len(k) not in (4, 9, 16):
        raise ValueError(f"intrinsics of {len(k)} numbers: expected fx fy cx cy, or a 3 x 3 matrix")
    side = math.isqrt(len(k))
    return tuple(k) if len(k) == 4 else (k[0], k[side + 1], k[2], k[side + 2])


def read_intrinsics(path):
    with naming(path):
        return parse_intrinsics(read_text(path))


# ---------------------------------------------------------------------------------------------------------------------
# From a frame to a line of the jsonl

def rng_for(seed, name):
    """A generator that depends on nothing but seed and name: any worker on any machine draws the same."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little"))


def candidates(frame, intrinsics, occlusion):
    """All pixels with a depth -> x, y (int), Euclidean, z, each (N,)."""
    (w, h), cloud = intrinsics[4:], frame.depth
    if frame.kind in ("z", "euclidean"):
        if cloud.shape != (h, w):
            raise ValueError(f"depth map of {cloud.shape[1]} x {cloud.shape[0]}, image of {w} x {h}")
        y, x = np.nonzero(np.isfinite(cloud) & (cloud > 0))
        depth = cloud[y, x].astype(np.float64)
        rays = ray_lengths(x, y, intrinsics)
        return (x, y, depth * rays, depth) if frame.kind == "z" else (x, y, depth, depth / rays)
    cloud = cloud[np.isfinite(cloud).all(1) & (cloud[:, :2] >= 0).all(1) & (cloud[:, :2] <= (w - 1, h - 1)).all(1)]
    if occlusion and frame.kind == "lidar":
        cloud = visible(cloud, intrinsics[0])
    cloud = cloud[np.argsort(cloud[:, 2], kind="stable")]             # the nearest point of a pixel counts
    x, y = np.floor(cloud[:, :2] + 0.5).astype(int).T
    first = np.unique(y * w + x, return_index=True)[1]
    return x[first], y[first], cloud[first, 2], cloud[first, 3]


def make_record(frame, folder, points, seed, limits, occlusion, paper, label_z):
    """Load a frame and draw its pixels -> its line of the jsonl, or "" if it has too few labels.
    limits: (min, max) of the Euclidean depth [m]; label_z: write z instead, as published for some datasets."""
    frame = frame.load(frame)
    size = image_size(frame.image) if frame.pixels is None else frame.pixels.size
    intrinsics = (*frame.intrinsics[:4], *(frame.intrinsics[4:] or size))
    if intrinsics[4:] != size:
        raise ValueError("image of {} x {}, intrinsics for {} x {}".format(*size, *intrinsics[4:]))
    if not (np.isfinite(intrinsics).all() and intrinsics[0] > 0 and intrinsics[1] > 0):
        raise ValueError(f"focal lengths {intrinsics[0]}, {intrinsics[1]}")
    # paper: it asks for the distance from the camera, but publishes z for the datasets of PAPER_Z; here all Euclidean
    x, y, euclidean, z = candidates(frame, intrinsics, occlusion)
    valid = np.flatnonzero((euclidean >= limits[0]) & (euclidean <= limits[1]))
    if len(valid) < min(MIN_POINTS, points):
        return ""
    chosen = valid[np.sort(rng_for(seed, frame.id).choice(len(valid), min(points, len(valid)), replace=False))]
    image = frame.image
    if frame.pixels is None:
        image = os.path.relpath(os.path.abspath(image), os.path.realpath(folder))
    else:
        with replacing(join(folder, image)) as temporary:
            frame.pixels.save(temporary, "PNG" if image.endswith(".png") else "JPEG", quality=95)
    record = {"image": image, "intrinsics": [round(float(v), 4) for v in intrinsics[:4]] + [int(v) for v in size],
              "pixel_coords": np.stack([x[chosen], y[chosen]], 1).tolist(),
              "depth": np.round((z if label_z else euclidean)[chosen], 4).tolist()}
    record |= {k: getattr(frame, k) for k in ("scene", "camera", "time") if getattr(frame, k) is not None}
    if frame.pose is not None:
        record["pose"] = [round(v, 6) for v in np.asarray(frame.pose, np.float64).ravel().tolist()]
    if paper:
        record |= {"depth_type": "z" if label_z else "euclidean", "labels": "paper"}
    elif frame.kind == "euclidean":                       # measured as such: the self-check wants to know
        record["depth_type"] = "euclidean"
    return json.dumps(record) + "\n"


def make_chunk(frames, make):
    """-> number of frames, the lines of those that have enough labels, messages of those that could not be read."""
    lines, bad = [], []
    for frame in frames:
        try:
            lines.append(make(frame))
        except Exception as error:                        # one bad frame must not end a run of days; it is counted
            if getattr(error, "errno", None) in DISK_FULL:
                raise
            bad.append(f"{frame.id}: {reason(error)}")
    return len(frames), list(filter(None, lines)), bad


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
        yield from map(function, chunks)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(function, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        yield from (job.result() for job in waiting)


def versions():
    """What made the file, for its .prepare.json."""
    found = {"python": sys.version.split()[0], "numpy": np.__version__}
    with suppress(OSError):
        found["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=dirname(os.path.abspath(__file__)),
                                         capture_output=True, text=True).stdout.strip()
    return found


def beside(path, ending):
    return os.path.splitext(path)[0] + ending


def saved_state(path, command, overwrite):
    """What an earlier run of the same command left, or the state of a new one. Another command's output is refused."""
    state, new = None, {"command": command, "versions": versions(), "finished": False, "frames": 0, "bytes": 0,
                        "records": 0, "too_few_labels": 0, "bad": 0, "bad_examples": []}
    if overwrite or not (exists(path) or exists(beside(path, ".prepare.json"))):
        return new
    with suppress(ValueError):
        state = read_json(beside(path, ".prepare.json"))
    if not state or state["command"] != command:
        other = {k: v for k, v in command.items() if state and state["command"].get(k) != v}
        fail(f"{path} was not made by this command, with {other}: choose another --out, or --overwrite it")
    file = path if state["finished"] else path + ".partial"
    return state if exists(file) and getsize(file) >= state["bytes"] else new


def write_records(frames, total, path, make, workers, chunk, state):
    """Frames -> path, in order, going on from `state`. After each chunk the state says how many bytes are good."""
    part = path + ".partial"
    next(islice(frames, state["frames"], state["frames"]), None)          # skip what is done
    with open(part, "ab") as out, tqdm(
            total=total, initial=state["frames"], unit=" images", smoothing=0.05, desc=basename(path),
            mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{path} is being written by another run of this command: wait for it, or choose another --out")
        out.truncate(state["bytes"])
        chunks = iter(lambda: list(islice(frames, chunk)), [])
        for count, lines, bad in in_order(partial(make_chunk, make=make), chunks, workers):
            out.write("".join(lines).encode())
            out.flush()
            few = count - len(lines) - len(bad)
            state |= {"frames": state["frames"] + count, "bytes": os.fstat(out.fileno()).st_size,
                      "records": state["records"] + len(lines), "too_few_labels": state["too_few_labels"] + few,
                      "bad": state["bad"] + len(bad), "bad_examples": (state["bad_examples"] + bad)[:5]}
            write_json(beside(path, ".prepare.json"), state)
            bar.update(count)
    if total and not state["records"]:
        os.remove(part)
        os.remove(beside(path, ".prepare.json"))
        why = "; ".join(state["bad_examples"][:2]) or "no pixel has a depth in the range (see --min-depth, --max-depth)"
        fail(f"none of the {total} images gives labels of depth: {why}")
    os.replace(part, path)
    with replacing(beside(path, ".idx")) as temporary:
        line_offsets(path).tofile(temporary)
    write_json(beside(path, ".prepare.json"), state | {"finished": True})


def line_offsets(path):
    """Where each of the N lines starts, and the file's size: (N + 1,) int64. The .idx file holds just this."""
    pieces, position = [np.zeros(1, "<i8")], 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            pieces.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (position + 1))
            position += len(block)
    offsets = np.concatenate(pieces)
    return (offsets if offsets[-1] == position else np.append(offsets, position)).astype("<i8")


# ---------------------------------------------------------------------------------------------------------------------
# Readers, one a dataset: (root, split, ...) -> frames in a fixed order. They list and pair files; workers open them
# and call the frame's load_..., which says in what form the depth is.

def refuse(frame, why):
    raise ValueError(why)


def one_by_one(scenes, frames):
    """The frames of each scene. One whose listing fails gives a frame that cannot be used: counted, and named."""
    for scene in scenes:
        try:
            yield from frames(scene)
        except Exception as error:                        # as in make_chunk
            yield Frame(str(scene), str(scene), partial(refuse, why=reason(error)))


def load_map(frame, path, scale):
    """A 16-bit PNG of z, of the image's own size."""
    return frame._replace(depth=read_png(path, scale))


def load_lidar(frame, path, camera_from_lidar):
    """A point cloud, moved into the camera at the time of the image."""
    return frame._replace(depth=project(move(camera_from_lidar, read_sweep(path)), frame.intrinsics), kind="lidar")


def frames_argoverse2(root, split):
    """One image a ring camera and sweep: 850 logs x 157 sweeps x 7 cameras, the paper's 1 M. Points are in the ego
    frame of the sweep's time and go through the city to the camera at the image's time. Images are undistorted."""
    need_pyarrow()
    train, val = ([join(root, s, log) for log in folders(join(root, s))] for s in BOTH)

    def pose(table, i):
        return transform([table[k][i] for k in ("qw", "qx", "qy", "qz")], [table[f"t{k}_m"][i] for k in "xyz"])

    def frames(folder):
        log = basename(folder)
        cameras, sensors, ego = (read_feather(join(folder, name + ".feather")) for name in (
            "calibration/intrinsics", "calibration/egovehicle_SE3_sensor", "city_SE3_egovehicle"))
        sensor_rows = {name: i for i, name in enumerate(sensors["sensor_name"])}
        ego_rows = {int(stamp): i for i, stamp in enumerate(ego["timestamp_ns"])}
        sweeps = np.array([int(name) for name in names(join(folder, "sensors/lidar"), ".feather")])
        for i, camera in enumerate(cameras["sensor_name"]):
            images = join(folder, "sensors/cameras", camera)
            if not (camera.startswith("ring_") and camera in sensor_rows and isdir(images) and len(sweeps)):
                continue
            nearest = {}                                  # sweep -> the image that is nearest to it
            for stamp in map(int, names(images, ".jpg")):
                sweep = int(sweeps[np.abs(sweeps - stamp).argmin()])
                if abs(sweep - stamp) <= LIDAR_WINDOW and abs(sweep - stamp) < abs(sweep - nearest.get(sweep, 0)):
                    nearest[sweep] = stamp
            ego_from_camera = pose(sensors, sensor_rows[camera])
            intrinsics = (*(float(cameras[k][i]) for k in ("fx_px", "fy_px", "cx_px", "cy_px")),
                          *(int(cameras[k][i]) for k in ("width_px", "height_px")))
            for sweep, stamp in nearest.items():
                if stamp in ego_rows and sweep in ego_rows:           # else there is no way from the sweep to the image
                    city_from_camera = pose(ego, ego_rows[stamp]) @ ego_from_camera
                    load = partial(load_lidar, path=join(folder, f"sensors/lidar/{sweep}.feather"),
                                   camera_from_lidar=np.linalg.inv(city_from_camera) @ pose(ego, ego_rows[sweep]))
                    yield Frame(f"{log}/{camera}/{stamp}", join(images, f"{stamp}.jpg"), load, intrinsics, log, camera,
                                stamp / 1e9, city_from_camera)
    return one_by_one(val[:ARGOVERSE2_VAL_LOGS] if split == "val" else train + val[ARGOVERSE2_VAL_LOGS:], frames)


@lru_cache(maxsize=16)
def parquet_rows(path, columns):
    """A function row number -> that row as a record batch. Reads forward and keeps one row: the lidar and image files
    of a segment are gigabytes when unpacked."""
    with naming(path):
        file = need_pyarrow().parquet.ParquetFile(path)
    position, batches = math.inf, None

    def read(row):
        nonlocal position, batches
        if row < position:
            position, batches = 0, file.iter_batches(1, columns=list(columns))
        while position <= row:
            batch, position = next(batches), position + 1
        return batch
    return read


@lru_cache(maxsize=16)
def waymo_keys(path):
    """Row number of each (timestamp, sensor) of a component's file; 0 stands for a key that the component lacks."""
    with naming(path):
        file = need_pyarrow().parquet.ParquetFile(path)
        keys = file.read([n for n in file.schema_arrow.names if n.startswith("key.")]).to_pydict()
    none = [0] * file.metadata.num_rows
    sensors = keys.get("key.camera_name", keys.get("key.laser_name", none))
    sensors = [WAYMO_CAMERAS.index(s) + 1 if isinstance(s, str) else s for s in sensors]
    return {key: row for row, key in enumerate(zip(keys.get("key.frame_timestamp_micros", none), sensors))}


def waymo_read(folder, component, segment, stamp, sensor, columns):
    """Columns of one row of a component; None if the row is not there."""
    path = join(folder, component, segment + ".parquet")
    row = waymo_keys(path).get((stamp, sensor))
    if row is None:
        return None
    prefix = component.title().replace("_", "").replace("Lidar", "LiDAR") + "Component"       # lidar_pose: LiDARPose...
    batch = parquet_rows(path, tuple(f"[{prefix}].{name}" for name in columns))(row)
    values = [batch.column(i)[0] for i in range(len(columns))]
    return [np.asarray(v.values) if hasattr(v, "values") and v.is_valid else v.as_py() for v in values]


@lru_cache(maxsize=2)
def waymo_points(folder, segment, stamp):
    """All LiDARs of one frame: world points (N, 3), and the table (N, 6) of camera, x, y (twice) that sees them."""
    def grid(component):
        """A range image (H, W, channels) of the first return, or None."""
        found = waymo_read(folder, component, segment, stamp, laser,
                           ("range_image_return1.values", "range_image_return1.shape"))
        return found and found[0].reshape(found[1])

    points, seen = [], []
    vehicle_pose, = waymo_read(folder, "vehicle_pose", segment, stamp, 0, ("world_from_vehicle.transform",))
    for laser in range(1, 6):
        cells, table = grid("lidar"), grid("lidar_camera_projection")
        if cells is None or table is None:
            continue
        extrinsic, low, high, beams = waymo_read(folder, "lidar_calibration", segment, 0, laser, (
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
        poses = grid("lidar_pose") if laser == WAYMO_TOP else None
        if poses is None:
            points.append(move(vehicle_pose.astype(np.float64).reshape(4, 4), vehicle))
        else:                                             # the car moves while the roof LiDAR turns
            p = poses[i, j].astype(np.float64)
            points.append(np.einsum("nij,nj->ni", rotations_of(p[:, 0], p[:, 1], p[:, 2]), vehicle) + p[:, 3:])
        seen.append(table[i, j])
    if not points:
        raise ValueError(f"lidar/{segment}.parquet has no range images at {stamp}")
    return np.concatenate(points), np.concatenate(seen)


def load_waymo(frame, folder, segment, stamp, camera):
    """Undistort the JPEG; labels are where the projection table says (it knows the rolling shutter), moved along; their
    distance is from the camera at the image's own time."""
    # paper: the released script moves labels by the map of the opposite direction (up to 400 px) and drops four LiDARs
    jpeg, pose = waymo_read(folder, "camera_image", segment, stamp, camera, ("image", "pose.transform"))
    columns = [f"intrinsic.{k}" for k in ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")]
    *numbers, extrinsic = waymo_read(folder, "camera_calibration", segment, 0, camera,
                                     (*columns, "extrinsic.transform"))
    (fx, fy, cx, cy), lens = numbers[:4], numbers[4:]
    pose = pose.astype(np.float64).reshape(4, 4) @ extrinsic.astype(np.float64).reshape(4, 4) @ WAYMO_FROM_OPENCV
    world, seen = waymo_points(folder, segment, stamp)
    first, second = seen[:, 0] == camera, seen[:, 3] == camera
    pixel = np.where(first[:, None], seen[:, 1:3], seen[:, 4:6])[first | second]
    points = move(np.linalg.inv(pose), world[first | second])
    a, b = ((np.floor(pixel) + 0.5 - (cx, cy)) / (fx, fy)).T
    x, y = undistort(distort_brown, a, b, *lens)
    cloud = np.stack([fx * x + cx - 0.5, fy * y + cy - 0.5, np.linalg.norm(points, axis=1), points[:, 2]], 1)
    # where the lens moves a pixel by a fifth of its radius the polynomial is no lens any more
    cloud = cloud[(points[:, 2] > 0) & (np.hypot(a - x, b - y) <= 0.2 * np.hypot(x, y))]

    def source(u, v):
        a, b = distort_brown((u - cx) / fx, (v - cy) / fy, *lens)
        return fx * a + cx, fy * b + cy
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return frame._replace(pixels=remap(image, image.size, source), depth=cloud, kind="lidar", pose=pose,
                          intrinsics=(fx, fy, cx - 0.5, cy - 0.5))


def frames_waymo(root, split):
    """Images are in parquet files: undistorted copies go to rgb/<segment>/."""
    need_pyarrow()
    folder = join(root, "training")

    def frames(segment):
        for stamp, camera in waymo_keys(join(folder, "camera_image", segment + ".parquet")):
            title = WAYMO_CAMERAS[camera - 1]
            yield Frame(f"{segment}/{stamp}/{title}", f"rgb/{segment}/{stamp}_{title}.jpg",
                        partial(load_waymo, folder=folder, segment=segment, stamp=stamp, camera=camera),
                        scene=segment, camera=title, time=stamp / 1e6)
    return one_by_one(names(join(folder, "camera_image"), ".parquet"), frames)


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
    images = sorted((r for r in data if "/CAM" in r["filename"]), key=lambda r: (r["timestamp"], r["filename"]))
    return tables | {"ego_pose": poses, "image": {r["filename"]: r for r in images},
                     "sweep": {r["sample_token"]: r for r in data if "/LIDAR_TOP/" in r["filename"]}}


def frames_nuscenes(root, split):
    """Key frames. LiDAR -> ego -> world at the sweep's time, world -> ego -> camera at the image's time."""
    there = [v for v in ("v1.0-trainval", "v1.0-mini") if isdir(join(root, v))]
    if not there:
        fail(f"{root} has neither v1.0-trainval nor v1.0-mini: extract the metadata archive there, too", 2)
    tables = nuscenes_tables(root, there[-1 if split == "val" else 0])

    def sensor_and_pose(row):
        sensor = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
        return sensor, tables["ego_pose"][row["ego_pose_token"]] @ transform(sensor["rotation"], sensor["translation"])

    def frames(filename):
        row = tables["image"][filename]
        scene = tables["scene"][tables["sample"][row["sample_token"]]["scene_token"]]["name"]
        if (scene in NUSCENES_VAL) == (split == "val"):
            sweep = tables["sweep"][row["sample_token"]]
            (camera, pose), (_, world_from_lidar) = sensor_and_pose(row), sensor_and_pose(sweep)
            load = partial(load_lidar, path=join(root, sweep["filename"]),
                           camera_from_lidar=np.linalg.inv(pose) @ world_from_lidar)
            k = camera["camera_intrinsic"]
            yield Frame(row["token"], join(root, filename), load, (k[0][0], k[1][1], k[0][2], k[1][2], row["width"],
                        row["height"]), scene, tables["sensor"][camera["sensor_token"]]["channel"],
                        row["timestamp"] / 1e6, pose)
    return one_by_one(tables["image"], frames)            # a token that is in no table costs its image


def load_scannetpp(frame, folder, info):
    """256 x 192 z for a 1920 x 1440 image, with the frame's own intrinsics: each depth pixel labels the image pixel at
    its centre. Anonymised pixels are left out."""
    name = os.path.splitext(basename(frame.image))[0] + ".png"
    if info is None:
        raise ValueError(f"{folder}/pose_intrinsic_imu.json has no {name[:-4]}")
    k, pose, size = info["intrinsic"], info.get("aligned_pose", info.get("aligned_poses")), image_size(frame.image)
    s = size[0] / 1920                                    # the frames may have been decoded smaller
    intrinsics = (k[0][0] * s, k[1][1] * s, (k[0][2] + 0.5) * s - 0.5, (k[1][2] + 0.5) * s - 0.5)
    depth, mask = read_png(join(folder, "depth", name), 1000), join(folder, "rgb_masks", name)
    j, i = np.nonzero(depth)
    x, y = (np.floor((n + 0.5) * wide / small).astype(int) for n, wide, small in zip((i, j), size, depth.shape[::-1]))
    z = depth[j, i].astype(np.float64)
    if exists(mask):
        mask = read_image(mask)
        keep = mask[y * mask.shape[0] // size[1], x * mask.shape[1] // size[0]] > 0
        x, y, z = x[keep], y[keep], z[keep]
    return frame._replace(depth=np.stack([x, y, z * ray_lengths(x, y, intrinsics), z], 1), kind="points",
                          intrinsics=intrinsics, pose=pose and np.array(pose, np.float64))


def frames_scannetpp(root, split, every=SCANNETPP_EVERY):
    """Decoded frames of the iPhone stream, paired by their number; `every` counts video frames (60 a second)."""
    train, val = (read_text(join(root, f"splits/nvs_sem_{s}.txt")).split() for s in BOTH)
    held_out = val[:SCANNETPP_VAL_SCENES]
    rest = [s for s in train + val[SCANNETPP_VAL_SCENES:] if s not in held_out]

    def frames(scene):
        folder = join(root, "data", scene, "iphone")
        table = read_json(join(folder, "pose_intrinsic_imu.json"))
        for name in sorted(os.listdir(join(folder, "rgb"))):
            stem = os.path.splitext(name)[0]
            if stem.startswith("frame_") and int(stem[6:]) % every == 0:
                load = partial(load_scannetpp, folder=folder, info=table.get(stem))
                yield Frame(f"{scene}/{stem}", join(folder, "rgb", name), load, scene=scene, camera="iphone",
                            time=int(stem[6:]) / 60)
    there = (s for s in (held_out if split == "val" else rest) if isdir(join(root, "data", s, "iphone/rgb")))
    return one_by_one(there, frames)


def load_omnidata(frame):
    """Taskonomy and HM3D: focal length and pose from the JSON; Euclidean depth if it is there, else the z-buffer."""
    parts = frame.image.split(os.sep)
    place = max(i for i, part in enumerate(parts) if part == "rgb")

    def other(domain, ending):
        """The file of another domain beside .../rgb/.../point_1_view_2_domain_rgb.png: folder and ending change."""
        return os.sep.join([*parts[:place], domain, *parts[place + 1:]]).removesuffix("rgb.png") + ending
    info = other("point_info", "point_info.json")
    info = read_json(info if exists(info) else other("point_info", "fixatedpose.json"))
    size = info.get("resolution", 512)
    focal = size / 2 / math.tan(info["field_of_view_rads"] / 2)
    domain = "depth_euclidean" if exists(other("depth_euclidean", "depth_euclidean.png")) else "depth_zbuffer"
    depth = read_png(other(domain, domain + ".png"), 512)
    depth[depth >= 65535 / 512] = 0                       # nothing there
    pose = None
    if "camera_rotation_final" in info and "camera_location" in info:
        pose = np.eye(4)
        pose[:3, :3] = rotations_of(*np.array(info["camera_rotation_final"], np.float64))[0]      # Blender XYZ Euler
        pose[:3, 3] = info["camera_location"]
        pose = pose @ OPENGL_TO_OPENCV
    return frame._replace(depth=depth, kind="euclidean" if domain == "depth_euclidean" else "z", pose=pose,
                          camera=info.get("camera_uuid"),
                          intrinsics=(focal, focal, (size - 1) / 2, (size - 1) / 2, size, size))


def frames_omnidata(root, component, table, bad=()):
    """Every *_domain_rgb.png below root, whatever of the three layouts in the wild it has, of the scenes that the split
    table of the download marks as train, or of all where there is no table."""
    tables = [p for p in (join(root, table), join(dirname(os.path.abspath(root)), table)) if exists(p)]
    if tables:
        head, *rows = [[cell.strip() for cell in line.split(",")] for line in read_text(tables[0]).splitlines() if line]
        listed = {row[0] for row in rows if row[head.index("train")] == "1"}
    skip = {"depth_euclidean", "depth_zbuffer", "point_info", "mask_valid", "normal", "taskonomy", "hm3d"} - {component}
    for folder, below, files in os.walk(root):
        below[:] = sorted(set(below) - skip)
        scene = basename(folder if basename(folder) != "rgb" else dirname(folder))
        if scene not in bad and (not tables or scene in listed):
            for name in sorted(files):
                if name.endswith("_domain_rgb.png"):
                    yield Frame(f"{scene}/{name[:-15]}", join(folder, name), load_omnidata, scene=scene)


def frames_taskonomy(root, split):
    """All buildings of the fullplus train split. The official trainer also stretches these images at random."""
    # paper: no random stretch; the rendering intrinsics explain Euclidean against z depth to 0.7 mm
    return frames_omnidata(root, "taskonomy", "train_val_test_fullplus.csv", TASKONOMY_BAD)


def frames_hm3d(root, split):
    return frames_omnidata(root, "hm3d", "train_val_test_hm3d.csv")


def frames_matterport3d(root, split):
    """Images, depth and poses of a house are named line by line in its .conf. All houses: none is evaluated on."""
    confs = []
    for folder, below, files in os.walk(root):
        if basename(folder) == "undistorted_camera_parameters":
            confs += [join(folder, name) for name in files if name.endswith(".conf")]
        below[:] = [name for name in below if name not in ("undistorted_color_images", "undistorted_depth_images")]

    def frames(conf):
        house, base, images, intrinsics = basename(conf)[:-5], dirname(dirname(conf)), 0, (0, 0, 0, 0)
        for key, *rest in filter(None, map(str.split, read_text(conf).splitlines())):
            if key == "n_images":
                images = int(rest[0])
            elif key == "intrinsics_matrix" and len(rest) == 9:       # counts until the next such line
                k = [float(v) for v in rest]              # their origin is the bottom left corner, y up
                intrinsics = (k[0], k[4], k[2] - 0.5, 1024 - k[5] - 0.5, 1280, 1024)
            elif key == "scan" and len(rest) == 18:
                depth, image, pose = rest[0], rest[1], np.array(rest[2:], np.float64).reshape(4, 4)
                load = partial(load_map, path=join(base, "undistorted_depth_images", depth), scale=4000)
                images -= 1
                yield Frame(f"{house}/{image}", join(base, "undistorted_color_images", image), load, intrinsics, house,
                            image.rsplit("_", 2)[1], None, pose @ OPENGL_TO_OPENCV)
        if images > 0:
            raise ValueError(f"{conf} is cut off: {images} of the images that it announces are missing")
    return one_by_one(sorted(confs), frames)


def frames_ddad(root, split):
    """The six cameras of the 50 val scenes (DGP format). Protobuf JSON: numbers that are zero may be absent."""
    def pose(datum):
        r, t = (datum.get("pose", {}).get(k, {}) for k in ("rotation", "translation"))
        return transform([r.get(k, 0) for k in ("qw", "qx", "qy", "qz")], [t.get(k, 0) for k in "xyz"])

    def frames(listed):
        folder, scene, content = join(root, dirname(listed)), dirname(listed), read_json(join(root, listed))
        data = {d["key"]: d for d in content["data"]}
        samples = {f"{scene}/{number}": sample for number, sample in enumerate(content["samples"])}

        def of_sample(name):
            sample = samples[name]
            calibration = read_json(join(folder, "calibration", sample["calibration_key"] + ".json"))
            intrinsics = {n.upper(): k for n, k in zip(calibration["names"], calibration["intrinsics"])}
            datums = {data[key]["id"]["name"].upper(): data[key]["datum"] for key in sample["datum_keys"]}
            lidar = datums["LIDAR"]["point_cloud"]
            for camera in sorted(n for n in datums if "image" in datums[n]):
                image, k = datums[camera]["image"], intrinsics.get(camera, {})
                load = partial(load_lidar, path=join(folder, lidar["filename"]),
                               camera_from_lidar=np.linalg.inv(pose(image)) @ pose(lidar))
                k = (*(k.get(n, 0) for n in ("fx", "fy", "cx", "cy")), image["width"], image["height"])
                # stamps in DDAD are ten times too large; samples are 0.1 s apart
                yield Frame(f"{name}/{camera}", join(folder, image["filename"]), load, k, scene, camera,
                            round(0.1 * int(basename(name)), 1), pose(image))
        return one_by_one(samples, of_sample)
    return one_by_one(read_json(join(root, "ddad.json"))["scene_splits"]["1"]["filenames"], frames)


def load_eth3d(frame, depth, camera):
    """Fisheye image and z map -> pinhole image of focal length ETH3D_FOCAL, labels at the laser pixels' new places."""
    model, *numbers = camera
    if model != "THIN_PRISM_FISHEYE" or len(numbers) != 14:
        raise ValueError(f"camera of the model {model} in cameras.txt, expected THIN_PRISM_FISHEYE")
    w, h = map(int, numbers[:2])
    fx, fy, cx, cy, *lens = map(float, numbers[2:])       # cx, cy from the corner of the first pixel
    if getsize(depth) != 4 * w * h:
        raise ValueError(f"{depth} has {getsize(depth)} bytes, not 4 x {w} x {h}: extract it again")
    z = np.memmap(depth, "<f4", "r", shape=(h, w))[ETH3D_BORDER:-ETH3D_BORDER, ETH3D_BORDER:-ETH3D_BORDER]
    j, i = np.nonzero(np.isfinite(z) & (z > 0))
    z = z[j, i].astype(np.float64)
    u, v = undistort(distort_thin_prism, (i + ETH3D_BORDER + 0.5 - cx) / fx, (j + ETH3D_BORDER + 0.5 - cy) / fy, *lens)
    focal = min(ETH3D_FOCAL, fx)
    scale = focal / fx
    size, centre = (round(w * scale), round(h * scale)), (cx * scale, cy * scale)
    points = np.stack([focal * u + centre[0] - 0.5, focal * v + centre[1] - 0.5, z * np.sqrt(1 + u * u + v * v), z], 1)
    if image_size(frame.image) != (w, h):
        raise ValueError("{}: {} x {} px, cameras.txt says {} x {}".format(frame.image, *image_size(frame.image), w, h))
    shrink = max(1, int(1 / scale))                       # average before sampling, or it would flicker

    def source(x, y):
        a, b = distort_thin_prism((x - centre[0]) / focal, (y - centre[1]) / focal, *lens)
        return (fx * a + cx) / shrink, (fy * b + cy) / shrink
    image = Image.open(frame.image).convert("RGB").reduce(shrink)
    name = os.path.splitext(basename(frame.image))[0]
    return frame._replace(pixels=remap(image, size, source), depth=points, kind="points",
                          image=f"rgb/{frame.scene}/{name}.jpg",
                          intrinsics=(focal, focal, centre[0] - 0.5, centre[1] - 0.5))


def frames_eth3d(root, split):
    """The 13 training scenes. Image and depth may have been unpacked to two trees: paired by scene and name."""
    def found(name):                                      # scene -> folder, at most two levels below root
        paths = sorted(p for n in ("*", "*/*") for p in glob.glob(join(glob.escape(root), n, name)))
        return {basename(dirname(p)): p for p in paths}
    images, depths, calibrations = found("images"), found("ground_truth_depth"), found("dslr_calibration_jpg")

    def lines(path):
        return [line.split() for line in read_text(path).splitlines() if line[:1] != "#"]

    def frames(scene):
        cameras = {line[0]: line[1:] for line in lines(join(calibrations[scene], "cameras.txt")) if line}
        placed = lines(join(calibrations[scene], "images.txt"))[::2]      # each second line, maybe empty, lists points
        for _, *pose, camera, name in sorted(filter(None, placed), key=lambda line: line[-1]):
            pose = [float(v) for v in pose]               # world-to-camera
            load = partial(load_eth3d, depth=join(depths.get(scene, scene), name), camera=cameras.get(camera, ["none"]))
            yield Frame(f"{scene}/{name}", join(images.get(scene, scene), name), load, scene=scene,
                        camera=f"camera {camera}", pose=np.linalg.inv(transform(pose[:4], pose[4:])))
    return one_by_one(sorted(calibrations), frames)


def load_sunrgbd(frame, folder, paper, filled):
    """One image in image/, one map in depth*/, a 1-based intrinsics.txt, of which fx is 0 in a few. The map's bits are
    rotated left by three: what lies beyond 8.19 m has low bits set."""
    fx, fy, cx, cy = read_intrinsics(join(folder, "intrinsics.txt"))
    raw = read_png(only_file(join(folder, "depth_bfx" if filled else "depth")))
    # paper: raw / 10000 is 0.8 x the true depth (and wraps beyond 8.19 m): only with --paper-labels
    depth = raw / np.float32(10000) if paper else ((raw >> 3) | (raw << 13)) / np.float32(1000)
    return frame._replace(image=only_file(join(folder, "image")), depth=depth,
                          intrinsics=(fx or fy, fy or fx, cx - 1, cy - 1))


def frames_sunrgbd(root, split, paper=False):
    """All frames except NYUv2's own, wherever they lie in the tree."""
    for folder, below, _ in os.walk(root):
        below[:] = sorted(set(below) - {"NYUdata"})
        if "image" in below or "depth" in below:
            below.clear()
            name = os.path.relpath(folder, root)
            # paper: the filled maps (depth_bfx) were used; what was not measured is no ground truth
            yield Frame(name, folder, partial(load_sunrgbd, folder=folder, paper=paper, filled=paper),
                        scene=dirname(name) if "sun3ddata" in name else name)         # there the parent is a place


def load_nyuv2_png(frame, depth):
    """640 x 480, millimetres, Eigen crop (the SUN RGB-D version of NYUv2 is that crop already); 10 m is saturation."""
    metres = read_png(depth, 1000)
    metres[:45] = metres[471:] = metres[:, :41] = metres[:, 601:] = 0
    metres[metres >= 10] = 0
    return frame._replace(depth=metres)


def frames_nyuv2(root, split, paper=False, every_image=False):
    """kv1/NYUdata of SUN RGB-D (the number is the index in NYUv2), else pairs rgb_*.jpg and sync_depth_*.png."""
    # paper: the released script takes all 1,449 images, 795 of them training images of NYUv2; --all-images does that
    ranges = ([int(n) for n in part.split("-")] for part in NYUV2_TEST.split())
    test, found = {n for r in ranges for n in range(r[0], r[-1] + 1)}, False
    for folder, below, files in os.walk(root):
        below[:] = sorted(set(below) - {"kv2", "realsense", "xtion", "b3dodata"})
        name = basename(folder)
        if name.startswith("NYU") and name[3:].isdigit():
            found = True
            below.clear()
            if every_image or int(name[3:]) in test:
                yield Frame(name, folder, partial(load_sunrgbd, folder=folder, paper=paper, filled=False), scene=name)
        for file in sorted(files):
            if file.startswith("sync_depth_") and not found:
                image = file.replace("sync_depth_", "rgb_").replace(".png", ".jpg")
                places = [join(p, image) for p in (folder, join(dirname(folder), "rgb"))]
                path = next(filter(exists, places), places[0])
                name = os.path.relpath(path, root)
                yield Frame(name, path, partial(load_nyuv2_png, depth=join(folder, file)),
                            (518.8579, 519.4696, 324.5824, 252.7362, 640, 480), scene=name[:-4])


def load_ibims1(frame, root):
    name = basename(frame.image)
    metres = read_png(join(root, "depth", name), 65535 / 50)
    for mask in ("mask_invalid", "mask_transp"):          # > 0 means usable in both: valid, not transparent
        metres[read_image(join(root, mask, name)) == 0] = 0
    return frame._replace(depth=metres, intrinsics=read_intrinsics(join(root, "calib", name[:-4] + ".txt")))


def frames_ibims1(root, split):
    """100 laser-scanned interiors."""
    listed = join(root, "imagelist.txt")
    stems = read_text(listed).split() if exists(listed) else names(join(root, "rgb"), ".png")
    for n, stem in enumerate(stems):
        if n == 0:
            mask = join(root, "mask_invalid", stem + ".png")
            usable = (read_image(mask) > 0).mean()
            if usable < 0.5:
                fail(f"{mask} leaves only {usable:.0%} of the image: its sense is not > 0 for valid, as expected")
        yield Frame(stem, join(root, "rgb", stem + ".png"), partial(load_ibims1, root=root), scene=stem)


def load_folder(frame, depth, depth_scale, depth_type, pose):
    """A depth map of the image's size, .npy or PNG, and the pose if there is one."""
    for path in (frame.image, depth):
        if not exists(path):
            raise ValueError(f"{path} is missing: image or depth only")
    if depth.endswith(".npy"):
        with naming(depth):
            metres = np.load(depth).astype(np.float32) / np.float32(depth_scale or 1)
    else:
        metres = read_png(depth, depth_scale or 1000)
    if exists(pose):
        with naming(pose):
            frame = frame._replace(pose=np.loadtxt(pose).reshape(4, 4))
    return frame._replace(depth=metres, kind=depth_type)


def frames_folder(root, split, intrinsics=None, depth_scale=None, depth_type="z"):
    """Your own: rgb/ and depth/ with files of the same stem, in root or in folders of it (each one a scene)."""
    def frames(scene):
        folder = join(root, scene)
        images, depths = ({os.path.splitext(name)[0]: name for name in sorted(os.listdir(part))}
                          for part in (join(folder, "rgb"), join(folder, "depth")))
        place = next(filter(exists, (join(p, "intrinsics.txt") for p in (folder, root))), None)
        if not (intrinsics or place):
            fail(f"{folder} has no intrinsics.txt: write 'fx fy cx cy' [px] into it, or give --intrinsics", 2)
        k = parse_intrinsics(intrinsics) if intrinsics else read_intrinsics(place)
        for stem in sorted(images | depths):
            load = partial(load_folder, depth=join(folder, "depth", depths.get(stem, stem)), depth_scale=depth_scale,
                           depth_type=depth_type, pose=join(folder, "poses", stem + ".txt"))
            yield Frame(join(scene, stem), join(folder, "rgb", images.get(stem, stem)), load, k, scene or None)
    scenes = [""] if isdir(join(root, "rgb")) else [s for s in folders(root) if isdir(join(root, s, "rgb"))]
    return one_by_one(scenes, frames)


# ---------------------------------------------------------------------------------------------------------------------
# Toy world: rooms made of boxes, ray-cast with exact depth. Axes: x, y along the walls, z up, metres.

TOY_VIEWS = 5                                             # images a room
TOY_SHAPES = ((112, 84), (112, 84), (112, 84), (84, 112))  # image size once the focal length is 100 px
TOY_SCALES = (0.75, 1.0, 1.25, 1.5)                       # the image is this times larger: four focal lengths, mixed
TOY_SIDE = 112                                            # with --focals: side of the images, whatever the focal length
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


def frames_toy(root, split, images, light, focals, seed):
    """Procedural rooms; a room is made from (seed, split, number) alone, so train and val share none."""
    for number in range(math.ceil(images / TOY_VIEWS)):
        scene = f"{split}_{number:05d}"
        rng = rng_for(seed, "toy room " + scene)
        boxes = toy_room(rng)
        colours = TOY_COLOURS * rng.uniform(0.99, 1.01, TOY_COLOURS.shape)
        w, h = TOY_SHAPES[rng.integers(len(TOY_SHAPES))]
        lens = rng.integers(len(focals or TOY_SCALES))
        if focals:
            wide = high = TOY_SIDE
            fx = fy = focals[lens]
        else:                                             # so that the image at focal length 100 is w x h exactly
            wide, high = (round(n * TOY_SCALES[lens]) + rng.integers(-2, 3) for n in (w, h))
            fx, fy = 100 * wide / w, 100 * high / h
        cx, cy = (wide - 1) / 2 + rng.uniform(-2, 2), (high - 1) / 2 + rng.uniform(-2, 2)
        intrinsics = tuple(round(float(v), 4) for v in (fx, fy, cx, cy)) + (int(wide), int(high))
        for view, pose in enumerate(toy_poses(boxes, light, rng)[:images - number * TOY_VIEWS]):
            yield Frame(f"{scene}/{view}", f"rgb/{scene}/{view}.png", partial(load_toy, light=light, boxes=boxes,
                        colours=colours), intrinsics, scene, "toy", 0.5 * view, pose, "euclidean")


# ---------------------------------------------------------------------------------------------------------------------
# Self-check: the table of a jsonl, and what is wrong with it. Only what a file itself can prove is called a fault.

CHECK_LINES = 100_000           # quantiles are taken from so many lines, spread over the file
CHECK_IMAGES = 20_000           # at most so many image headers are opened
CHECK_SHAPES = 300              # records whose labels are tested for z sold as Euclidean
CHECK_PAIRS = 120               # images opened with their neighbours to find labels on the wrong image


def read_record(line):
    """A line of a jsonl -> record with arrays, or ValueError."""
    try:
        r = json.loads(line)
        intrinsics = np.array(r["intrinsics"], np.float64)
        xy, depth = np.array(r["pixel_coords"], np.float64).reshape(-1, 2), np.array(r["depth"], np.float64)
        if intrinsics.shape != (6,) or depth.shape != (len(xy),) or not isinstance(r["image"], str):
            raise ValueError(f"{len(xy)} pixels, {depth.size} depths, {intrinsics.size} intrinsics (6 needed)")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a record: {reason(error)}") from None
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
    planes, plain, divided = [], [np.zeros(0)], [np.zeros(0)]
    steps = (1 / 1000, 1 / 4000, 50 / 65535, 1 / 5000, 1 / 256)
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
    planes = np.array(planes).reshape(-1, 2)
    as_euclidean, as_z = planes.sum(0)
    if on_grid(np.concatenate(divided), (*steps, 1 / 512)):
        return "euclidean"
    if on_grid(np.concatenate(plain), steps) and as_z > 0.9 * as_euclidean:
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


def shifted_by(record, folder, count):
    """+1 or -1 if the labels fit the image of the next or the previous line better than their own, else 0. The verdict
    needs a difference that chance does not make (4.5 standard errors)."""
    gains = {1: [], -1: []}
    for n in np.unique(np.linspace(1, count - 2, CHECK_PAIRS).astype(int)) if count >= 12 else ():
        try:
            own, *others = record(n), record(n + 1), record(n - 1)
            log_depth, xy = np.log(np.maximum(own["depth"], 1e-6)), own["pixel_coords"]
            here, *there = (colours_at(join(folder, r["image"]), xy) for r in (own, *others))
        except (OSError, ValueError):                     # counted elsewhere
            continue
        for k, colours in zip(gains, there):
            if len(xy) >= 20 and here is not None and colours is not None:
                gains[k].append(unexplained(here, log_depth) - unexplained(colours, log_depth))
    for k, gain in gains.items():
        if len(gain) >= 10 and np.mean(gain) > 4.5 * np.std(gain, ddof=1) / math.sqrt(len(gain)) > 0:
            return k
    return 0


def check_images(records, folder, add):
    """Headers of the images: there, of the size that the intrinsics say, no two files of the same content. -> notes"""
    missing, sizes, seen = [], {}, {}
    for n, r in records:
        path = join(folder, r["image"])
        try:
            with Image.open(path) as image:
                if tuple(r["intrinsics"][4:]) != image.size:
                    add("image size is not that of the intrinsics", n,
                        "{} is {} x {}, intrinsics say {:g} x {:g}".format(path, *image.size, *r["intrinsics"][4:]))
            sizes.setdefault(getsize(path), []).append((n, path))
        except FileNotFoundError:
            missing.append((n, path))
        except OSError as error:
            add("unreadable image", n, f"{path}: {error}")
    for n, path in (file for group in sizes.values() if len(group) > 1 for file in group):
        with open(path, "rb") as f:
            first = seen.setdefault(hashlib.sha256(f.read()).digest(), (n, os.path.realpath(path)))
        if first[1] != os.path.realpath(path):
            add("duplicate image", n, f"{path} has the same content as line {first[0] + 1}")
    if missing and not sizes:
        return [f"no image found (first: {missing[0][1]}): give --image-root; what needs the images was not checked"]
    for n, path in missing:
        add("image not found", n, path)
    return []


def check_file(path, image_root=None):
    """-> the row of the table, with "faults" {what: [count, first example]}, "notes", and the "scenes"."""
    folder, faults, offsets = image_root or dirname(os.path.abspath(path)), {}, line_offsets(path)
    count, depths, images, focals, scenes = len(offsets) - 1, [np.zeros(0)], array("q"), set(), set()
    points, declared_z, low, high = 0, 0, math.inf, 0.0

    def add(what, n, example):
        faults.setdefault(what, [0, f"line {n + 1}: {example}"])[0] += 1

    def record(n):
        with open(path, "rb") as f:
            f.seek(offsets[n])
            return read_record(f.read(offsets[n + 1] - offsets[n]))

    def spread(most):
        """At most so many lines that can be read: number, record."""
        for n in np.linspace(0, count - 1, min(count, most)).astype(int):
            with suppress(ValueError):
                yield n, record(n)

    with open(path, "rb") as f:
        lines = tqdm(f, total=count, unit=" lines", desc="check", leave=False, disable=count < 20_000)
        for n, line in enumerate(lines):
            try:
                r = read_record(line)
            except ValueError as error:
                add("malformed line", n, error)
                images.append(n)
                continue
            (fx, fy, _, _, w, h), (x, y), d = r["intrinsics"], r["pixel_coords"].T, r["depth"]
            if not (fx > 0 and fy > 0 and np.isfinite(r["intrinsics"]).all()):
                add("fx or fy not positive", n, f"fx {fx:g}, fy {fy:g}")
            outside = (x < -0.5) | (y < -0.5) | (x >= w - 0.5) | (y >= h - 0.5)
            if outside.any():
                add("label outside of the image", n, f"{x[outside][0]:g}, {y[outside][0]:g} of {w:g} x {h:g} pixels")
            good = d[np.isfinite(d) & (d > 0)]
            if len(good) < max(len(d), 1):
                add("depth not positive and finite", n, f"{len(d)} labels, {len(good)} of them good")
            points, low, high = points + len(good), min(low, good.min(initial=low)), max(high, good.max(initial=high))
            if n % (1 + count // CHECK_LINES) == 0:
                depths.append(good)
            if len(focals) < 1000:
                focals.add(round(fx, 1))
            declared_z += r.get("depth_type") == "z"
            if r.get("scene") is not None:
                scenes.add(r["scene"])
            images.append(int.from_bytes(hashlib.blake2b(r["image"].encode(), digest_size=7).digest(), "little"))
    order = np.argsort(images, kind="stable")
    for i in np.flatnonzero(np.diff(np.array(images)[order]) == 0):
        add("duplicate image", int(order[i + 1]), f"the image of line {order[i] + 1} again")
    if not points:
        add("no labels", 0, "the file is empty" if not count else "in any of the lines")
    notes = check_images(spread(CHECK_IMAGES), folder, add)
    shift = shifted_by(record, folder, count)
    if shift:
        add("labels on the wrong image", 0,
            f"shifted: they fit the image of the {'next' if shift > 0 else 'previous'} line better")
    said, looks = "z" if 2 * declared_z > count else "euclidean", depth_kind(r for _, r in spread(CHECK_SHAPES))
    if (looks, said) == ("z", "euclidean"):
        add("z sold as Euclidean", 0, "the labels lie on planes, or on the steps of a depth PNG, only when taken as z; "
            'convert them, or mark each record with "depth_type": "z"')
    if (looks, said) == ("euclidean", "z"):
        add("Euclidean depth declared as z", 0, 'the records say "depth_type": "z", their labels do not look like it')
    d = np.concatenate(depths)
    return {"path": path, "images": count, "points": points, "low": min(low, high), "high": high,
            "focals": sorted(focals), "quantiles": np.quantile(d, (0.05, 0.25, 0.5, 0.75, 0.95)) if len(d) else [0] * 5,
            "two": np.mean(np.maximum(d / 2, 2 / d) < 1.25) if len(d) else 0.0, "scenes": scenes, "faults": faults,
            "notes": notes + [f"labels are said to be {said}" + ", and look like it" * (looks == said)]}


def split_of(path):
    return next((s for s in ("train", "val", "test") if s in basename(path)), None)


def check(paths, image_root=None):
    """Print table and faults of the files -> number of faults."""
    rows = [check_file(path, image_root) for path in paths]
    print(f"\n{'file':32}{'images':>9}{'points':>11}{'min':>8}{'5%':>7}{'25%':>7}{'50%':>7}{'75%':>7}{'95%':>7}"
          f"{'max':>8}{'focal px':>15}{'2.0 m':>7}{'paper':>7}")
    for r in rows:
        name = next((k for k in PAPER_CONSTANT if k in os.path.abspath(r["path"]).lower()), None)
        paper = f"{PAPER_CONSTANT[name]:.3f}" if name and split_of(r["path"]) != "train" else "-"
        focals = f"{r['focals'][0]:.0f}" if r["focals"] else "-"
        focals += f"-{r['focals'][-1]:.0f} ({len(r['focals'])})" if len(r["focals"]) > 1 else ""
        print(f"{r['path'][-31:]:32}{r['images']:>9}{r['points']:>11}{r['low']:>8.2f}"
              + "".join(f"{q:>7.2f}" for q in r["quantiles"])
              + f"{r['high']:>8.2f}{focals:>15}{r['two']:>7.3f}{paper:>7}")
    print("always 2.0 m in the paper: " + ", ".join(f"{name} {value:.3f}" for name, value in PAPER_CONSTANT.items()))
    for i, a in enumerate(rows):
        for b in rows[i + 1:]:
            shared = sorted(a["scenes"] & b["scenes"], key=str)
            if shared and (split_of(a["path"]) != split_of(b["path"]) or split_of(a["path"]) is None):
                a["faults"]["scenes shared between splits"] = [
                    len(shared), f"{shared[0]} is in {a['path']} and in {b['path']}"]
    for r in rows:
        for note in r["notes"]:
            print(f"  {r['path']}: {note}")
        for what, (times, example) in r["faults"].items():
            print(f"  FAULT {r['path']}: {what} ({times} x); {example}")
    total = sum(len(r["faults"]) for r in rows)
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
    open(part, "ab").close()
    bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=basename(path))
    while True:
        start, why, headers = getsize(part), "the connection ended", {"User-Agent": "prepare.py"}
        if start:
            headers |= {"Range": f"bytes={start}-"} | ({"If-Range": read_text(tag)} if exists(tag) else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
                begin = start if reply.status == 206 else 0           # 200: another file by now, or all of it again
                length, mark = reply.headers["Content-Length"], reply.headers["ETag"] or reply.headers["Last-Modified"]
                total = begin + int(length) if length else None
                if mark and not mark.startswith("W/"):
                    with open(tag, "w") as f:
                        f.write(mark)
                bar.total, bar.n = total, begin
                with open(part, "r+b") as f:
                    f.truncate(begin)
                    f.seek(begin)
                    while block := reply.read(1 << 18):
                        f.write(block)
                        bar.update(len(block))
            total = getsize(part) if total is None else total         # without an announced size, the end is the end
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}"
            if error.code == 416:                         # nothing beyond what we have: all of it, or a stale part
                announced = (error.headers["Content-Range"] or "").rpartition("/")[2]
                total = int(announced) if announced.isdigit() else 0
            elif error.code < 500:
                fail(f"{url}: {why}; fetch it by hand and put it at {path}")
        except Exception as error:                        # of the socket, of HTTP, or of the disk
            why = reason(error)
        have = getsize(part)
        if have == total:
            break
        if total is not None and have > total:
            os.remove(part)
            fail(f"{url} sent {have} bytes instead of {total}: wrong size, thrown away; give the command again")
        failures = 0 if have > start else failures + 1
        if failures == RETRIES:
            fail(f"{url}: {RETRIES} attempts failed ({why}), {have} of {total or 'unknown'} bytes are in {part}; "
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
    """Zip or tar -> root, by way of a hidden folder: what is seen in root is whole."""
    hidden = join(root, ".unpacking")
    shutil.rmtree(hidden, ignore_errors=True)
    print(f"unpacking {archive}", flush=True)
    try:
        shutil.unpack_archive(archive, hidden, **({"filter": "data"} if archive.endswith(".tar") else {}))
        for name in os.listdir(hidden):
            os.replace(join(hidden, name), join(root, name))
        os.rmdir(hidden)
    except Exception as error:                            # readers of damaged archives raise whatever they like
        shutil.rmtree(hidden, ignore_errors=True)
        fail(f"{archive} cannot be unpacked ({reason(error)}): if it is damaged, delete it; then repeat the command")


def missing_raw(dataset, root, why):
    """The message for raw data that is not there: what, where from, how large, which terms, and where to put it."""
    d = DATASETS[dataset]
    by_us = f"\n    or run: python prepare.py --dataset {dataset} --download --root {root}" if "download" in d else ""
    fail(f"{why}\n    {dataset} needs:{d['get']}\n    put it in: {root} (or give --root){by_us}", 2)


def find_root(dataset, root):
    """The folder that looks like the dataset: root, or one or two below it or above it. None if there is none."""
    def marks(folder):
        return (p for mark in DATASETS[dataset]["marks"] for p in glob.iglob(join(glob.escape(folder), mark)))
    below = [join(root, a) for a in folders(root)]
    below += [join(a, b) for a in below[:200] for b in folders(a)[:200]]
    found = next((folder for folder in (root, *below) if next(marks(folder), None)), None)
    inside = os.path.abspath(root)                        # further up only where root is a part of what is found
    for folder in (dirname(inside), dirname(dirname(inside))) if isdir(root) else ():
        found = found or next((folder for path in marks(folder) if (path + os.sep).startswith(inside + os.sep)), None)
    if found and found != root:
        print(f"prepare.py: {root} is not the root of {dataset}; using {found}", file=sys.stderr)
    return found


# ---------------------------------------------------------------------------------------------------------------------

def prepare(command, options, path, workers, overwrite, must_exist):
    """One split of one dataset -> path. False if it has no frames and need not have any.
    command: all that decides what is written, for the reader (its own `options` among them) and for the labels."""
    command = json.loads(json.dumps(command | options))
    dataset, split, root, paper = (command[k] for k in ("dataset", "split", "root", "paper_labels"))
    limit, stride, (i, n) = command["limit"], command["stride"], command["shard"] or (1, 1)
    state = saved_state(path, command, overwrite)
    if state["finished"]:
        print(f"{path}: already made by this command, kept (--overwrite makes it anew)")
        return True

    def frames():
        reader = globals()[f"frames_{dataset}"]
        return islice(reader(root, split, **options), 0, limit and limit * stride, stride)
    try:
        total = sum(1 for _ in frames())
        if not total:
            return must_exist and missing_raw(dataset, root, f"{root} has no frames of {dataset} ({split})")
        first, last = total * (i - 1) // n, total * i // n
        os.makedirs(dirname(path), exist_ok=True)
        make = partial(make_record, folder=dirname(path), points=command["points"], seed=command["seed"],
                       limits=command["range"], occlusion=command["occlusion"], paper=paper,
                       label_z=paper and dataset in PAPER_Z)
        write_records(islice(frames(), first, last), last - first, path, make, workers,
                      DATASETS[dataset].get("chunk", CHUNK), state)
    except BrokenProcessPool:
        fail("a worker was killed, most likely for lack of memory: the same command with fewer --workers goes on")
    except (OSError, ValueError, KeyError) as error:      # a listing or the disk; frames are caught one by one
        fail(f"{dataset} in {root} to {path}: {reason(error)}; once that is mended, the same command goes on")
    print(f"{path}: {state['records']} images of {last - first}; {state['too_few_labels']} with fewer than "
          f"{MIN_POINTS} labels and {state['bad']} unreadable left out"
          + ", hidden LiDAR points too" * command["occlusion"])
    for example in state["bad_examples"]:
        print(f"prepare.py: left out {example}", file=sys.stderr)
    if state["bad"] > 0.01 * (last - first):
        print(f"prepare.py: WARNING: {state['bad']} of {last - first} images could not be read: is the download "
              "complete?", file=sys.stderr)
    return True


def shard_of(text):
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/8")
    return i, n


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
    p.add_argument("--points", type=int, default=100, help="labelled pixels an image (Sec. 4)")
    p.add_argument("--seed", type=int, default=0, help="decides which pixels are drawn")
    p.add_argument("--min-depth", type=float, help="Euclidean [m]; default by dataset")
    p.add_argument("--max-depth", type=float, help="Euclidean [m]; default by dataset")
    p.add_argument("--occlusion", action="store_true", help="drop LiDAR points that the camera cannot see")
    p.add_argument("--paper-labels", action="store_true", help="the published labels (z, 0.8 x), marked")
    # amount
    p.add_argument("--stride", type=int, help="every k-th image (default 1; ScanNet++: every 10th video frame)")
    p.add_argument("--limit", type=int, help="at most so many images")
    p.add_argument("--shard", type=shard_of, metavar="I/N", help="part I of N, to be joined with cat")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    # nyuv2, folder, toy
    p.add_argument("--all-images", action="store_true", help="nyuv2: all 1,449 instead of the 654 test images")
    p.add_argument("--intrinsics", help="folder: fx,fy,cx,cy [px]")
    p.add_argument("--depth-scale", type=float, help="folder: units per metre (default 1000 for PNG, 1 for .npy)")
    p.add_argument("--depth-type", choices=("z", "euclidean"), default="z", help="folder: what the depth maps hold")
    p.add_argument("--images", type=int, default=2600, help="toy: training images")
    p.add_argument("--val-images", type=int, default=400, help="toy: validation images")
    p.add_argument("--light", choices=("lamp", "ambient"), default="lamp", help="toy: lamp on the camera, or daylight")
    p.add_argument("--focals", type=float, nargs="+", metavar="F", help="toy: these focal lengths [px] in images of one "
                   "size; default: one field of view in images of four sizes")
    args = p.parse_args(argv)
    if not (args.dataset or args.check):
        p.error("give --dataset NAME or --check FILE.jsonl")
    for name in ("points", "stride", "limit", "images", "val_images", "depth_scale"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            p.error(f"--{name.replace('_', '-')} must be positive")
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
    if not all(0 < f < math.inf for f in args.focals or ()):
        fail(f"--focals {' '.join(f'{f:g}' for f in args.focals)}: need positive numbers of pixels")

    # ---- raw data
    root = None
    if dataset != "toy":
        wanted = args.root or join("data", "raw", d.get("raw", dataset))
        root = find_root(dataset, wanted)
        if not root and args.download:
            if "download" not in d:
                missing_raw(dataset, wanted, f"{dataset} cannot be fetched without registering")
            url, name, md5 = d["download"] if not args.url else (args.url, d["download"][1], None)
            if not exists(join(wanted, name)):
                download(url, join(wanted, name), md5)
            unpack(join(wanted, name), wanted)
            root = find_root(dataset, wanted)
        if not root:
            missing_raw(dataset, wanted, f"no raw data of {dataset} in {wanted}")

    # ---- the splits
    options = {"sunrgbd": {"paper": args.paper_labels},
               "nyuv2": {"paper": args.paper_labels, "every_image": args.all_images},
               "scannetpp": {"every": args.stride or SCANNETPP_EVERY},
               "folder": {"intrinsics": args.intrinsics, "depth_scale": args.depth_scale,
                          "depth_type": args.depth_type}}.get(dataset, {})
    out, written = args.out or join("data", dataset), []
    default = d["splits"] if dataset != "folder" else TRAIN
    for split in (args.split,) if args.split else default:
        if dataset == "toy":
            images = args.images if split == "train" else args.val_images
            options = {"images": images, "light": args.light, "focals": args.focals, "seed": args.seed}
        command = {"dataset": dataset, "split": split, "root": root and os.path.abspath(root), "points": args.points,
                   "seed": args.seed, "range": limits, "occlusion": args.occlusion, "paper_labels": args.paper_labels,
                   "stride": args.stride or 1, "limit": args.limit, "shard": args.shard}
        if dataset == "scannetpp":                        # its reader counts video frames
            command["stride"] = 1
        part = "" if not args.shard else ".{:0{}d}-of-{}".format(args.shard[0], len(str(args.shard[1])), args.shard[1])
        path = join(out, f"{split}{part}.jsonl")
        if prepare(command, options, path, args.workers, args.overwrite,
                   must_exist=args.split or split == default[-1] and not written):
            written.append(path)

    # ---- self-check, with the other split if it is there: they must share no scene
    other = [join(out, f"{split}.jsonl") for split in d["splits"]]
    if check(written + [path for path in other if exists(path) and path not in written]):
        print("prepare.py: WARNING: the self-check found faults in what was written, see above", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 130)
