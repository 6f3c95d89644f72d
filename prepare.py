"""Turn a raw dataset into data/<name>/<split>.jsonl: one image a line, with its camera and 100 labelled pixels."""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

MIN_POINTS = 10        # an image with fewer labelled pixels is left out
CHUNK = 32             # frames a worker takes at once, and what a kill can cost


class Frame(NamedTuple):
    """One image as a reader describes it: light enough to be sent to a worker, which then calls `load`."""
    id: str                       # unique in the dataset; with --seed it decides which pixels are drawn
    image: str                    # the raw image; or, if load returns pixels, the path below the out folder
    intrinsics: tuple             # fx, fy, cx, cy, w, h [px]
    load: Callable                # -> (pixels or None, depth): a map (H, W) or points (N, 4) of x, y, Euclidean, z
    kind: str = "euclidean"       # what a depth map holds: "euclidean" or "z" [m]
    scene: str | None = None
    camera: str | None = None
    time: float | None = None     # [s]
    pose: np.ndarray | None = None  # (4, 4) camera-to-world, OpenCV axes (x right, y down, z forward)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry and sampling

def ray_lengths(x, y, intrinsics):
    """Length of the ray through pixel (x, y) that has z = 1: Euclidean depth = z * this."""
    fx, fy, cx, cy = intrinsics[:4]
    return np.sqrt(1 + ((x - cx) / fx) ** 2 + ((y - cy) / fy) ** 2)


def rng_for(seed, name):
    """A generator that depends on nothing but the seed and the name: any worker on any machine draws the same."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little"))


def sample_points(depth, kind, intrinsics, points, min_depth, max_depth, rng):
    """Draw `points` labelled pixels -> x (n,), y (n,) int, Euclidean (n,), z (n,) [m], in reading order."""
    if depth.ndim == 2:                                   # a map: every pixel with a depth is a candidate
        h, w = depth.shape
        y, x = np.mgrid[0:h, 0:w]
        rays = ray_lengths(x, y, intrinsics).ravel()
        depth = depth.ravel().astype(np.float64)
        euclidean = depth * rays if kind == "z" else depth
        valid = np.flatnonzero(np.isfinite(euclidean) & (euclidean >= min_depth) & (euclidean <= max_depth))
        x, y, z = x.ravel(), y.ravel(), euclidean / rays
    else:
        raise NotImplementedError
    chosen = np.sort(rng.choice(valid, min(points, len(valid)), replace=False))
    return x[chosen], y[chosen], euclidean[chosen], z[chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Records

def make_record(frame, folder, points, seed, min_depth, max_depth):
    """Load one frame, draw its pixels, write its image if it is not used as it is -> one line of the jsonl."""
    pixels, depth = frame.load()
    x, y, euclidean, z = sample_points(depth, frame.kind, frame.intrinsics, points, min_depth, max_depth,
                                       rng_for(seed, frame.id))
    image = frame.image if pixels is not None else os.path.relpath(frame.image, folder)
    if pixels is not None:
        save_image(pixels, os.path.join(folder, image))
    record = {"image": image, "intrinsics": [round(float(v), 4) for v in frame.intrinsics],
              "pixel_coords": np.stack([x, y], 1).tolist(), "depth": np.round(euclidean, 4).tolist()}
    record |= {k: v for k, v in (("scene", frame.scene), ("camera", frame.camera), ("time", frame.time)) if v is not None}
    if frame.pose is not None:
        record["pose"] = [round(v, 6) for v in np.asarray(frame.pose, np.float64).ravel().tolist()]
    return json.dumps(record) + "\n"


def save_image(pixels, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    pixels.save(temporary, "PNG" if path.endswith(".png") else "JPEG", **({} if path.endswith(".png") else {"quality": 95}))
    os.replace(temporary, path)


def make_chunk(frames, make):
    return "".join(make(frame) for frame in frames)


def write_records(frames, total, path, make, workers):
    partial_path = path + ".partial"
    chunks = iter(lambda: list(islice(frames, CHUNK)), [])
    with ProcessPoolExecutor(workers) as pool, open(partial_path, "w") as out, tqdm(total=total, unit="img") as bar:
        waiting = deque()
        while True:
            while len(waiting) < 3 * workers and (chunk := next(chunks, None)):
                waiting.append((len(chunk), pool.submit(make_chunk, chunk, make)))
            if not waiting:
                break
            count, job = waiting.popleft()
            out.write(job.result())
            bar.update(count)
    os.replace(partial_path, path)
    build_index(path)


def index_path(path):
    return path.removesuffix(".jsonl") + ".idx"


def build_index(path):
    """Write <name>.idx beside <name>.jsonl: where each line starts, and the file size (int64, little-endian)."""
    pieces, position = [np.zeros(1, "<i8")], 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            pieces.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + position + 1)
            position += len(block)
    offsets = np.concatenate(pieces).astype("<i8")
    if offsets[-1] != position:                           # the last line has no newline
        offsets = np.append(offsets, np.int64(position)).astype("<i8")
    temporary = f"{index_path(path)}.{os.getpid()}.tmp"
    offsets.tofile(temporary)
    os.replace(temporary, index_path(path))


def open_index(path):
    """Offsets of the lines of a jsonl, memory-mapped (N + 1,); made anew when missing or older than the jsonl."""
    index = index_path(path)
    if not os.path.exists(index) or os.path.getmtime(index) < os.path.getmtime(path):
        build_index(path)
    return np.memmap(index, "<i8", "r")


# ---------------------------------------------------------------------------------------------------------------------
# Toy world: rooms made of boxes, ray-cast with exact depth. Axes: x, y along the walls, z up, metres.

TOY_VIEWS = 5                                             # images a room
TOY_SHAPES = ((112, 84), (112, 84), (112, 84), (84, 112))  # image size once the focal length is 100 px
TOY_SCALES = (0.75, 1.0, 1.25, 1.5)                       # the image is this times larger: four focal lengths, mixed
TOY_CHECKER = 0.5                                         # side of a texture square [m]
TOY_COLOURS = np.array([[0.98, 0.80, 0.56], [0.92, 0.92, 0.92], [0.60, 0.78, 0.98], [0.62, 0.94, 0.66],
                        [0.95, 0.62, 0.95], [0.55, 0.95, 0.95]])  # floor, ceiling, walls x, walls y, box sides, box top


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


def toy_render(room_name, view, light, intrinsics, pose, boxes, colours):
    """Ray-cast one view -> RGB image, Euclidean depth map (h, w) [m]."""
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
    if light == "lamp":   # light falls with 1 / d^2; a fixed logarithmic tone curve keeps 0.5 m and 12 m apart in 8 bits
        shade = 0.94 - 0.86 * np.log(depth / 0.5) / math.log(12 / 0.5) + 0.06 * facing
    else:
        shade = np.array([0.75, 0.95, 0.65, 0.85, 0.7, 0.9])[kind]
    rgb = colours[kind] * (shade * (1 - 0.08 * dark))[:, None]
    image = Image.fromarray((rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8).reshape(h, w, 3))
    return image, depth.reshape(h, w)


def frames_toy(root, split, images, light, seed):
    """Procedural rooms; a room is made from (seed, split, number) alone, so train and val share none."""
    for number in range(math.ceil(images / TOY_VIEWS)):
        scene = f"{split}_{number:05d}"
        rng = rng_for(seed, "toy room " + scene)
        boxes = toy_room(rng)
        colours = TOY_COLOURS * rng.uniform(0.97, 1.03, TOY_COLOURS.shape)
        w, h = TOY_SHAPES[rng.integers(len(TOY_SHAPES))]
        scale = TOY_SCALES[rng.integers(len(TOY_SCALES))]
        wide, high = round(w * scale) + rng.integers(-2, 3), round(h * scale) + rng.integers(-2, 3)
        fx, fy = 100 * wide / w, 100 * high / h           # so that the image at focal length 100 is w x h exactly
        cx, cy = (wide - 1) / 2 + rng.uniform(-2, 2), (high - 1) / 2 + rng.uniform(-2, 2)
        intrinsics = tuple(round(float(v), 4) for v in (fx, fy, cx, cy)) + (int(wide), int(high))
        for view, pose in enumerate(toy_poses(boxes, light, rng)[:images - number * TOY_VIEWS]):
            yield Frame(f"{scene}/{view}", f"rgb/{scene}/{view}.png", intrinsics,
                        partial(toy_render, scene, view, light, intrinsics, pose, boxes, colours),
                        scene=scene, camera="toy", time=0.5 * view, pose=pose)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dataset", required=True)
    p.add_argument("--split", choices=["train", "val"])
    p.add_argument("--out")
    p.add_argument("--points", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--images", type=int, default=2600)
    p.add_argument("--val-images", type=int, default=400)
    p.add_argument("--light", choices=["lamp", "ambient"], default="lamp")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = args.out or os.path.join("data", args.dataset)
    os.makedirs(out, exist_ok=True)
    for split in [args.split] if args.split else ["train", "val"]:
        total = args.images if split == "train" else args.val_images
        make = partial(make_record, folder=out, points=args.points, seed=args.seed, min_depth=0.1, max_depth=100)
        write_records(frames_toy(None, split, total, args.light, args.seed), total, os.path.join(out, split + ".jsonl"),
                      make, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
