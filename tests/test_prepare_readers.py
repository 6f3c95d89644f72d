"""
prepare.py: every reader against a raw folder built here in the dataset's own layout, with depth in
closed form.

The expected numbers come from geometry written in this file (Rodrigues, pinhole, the thin-prism
polynomial), never from prepare.py. Two ideas carry most of it: a LiDAR label must be one of the
points projected here (1 px, 1e-3 m), and the pictures of the dense sets carry their depth in the
red channel, so that a label on the wrong pixel, or on the picture of another frame, shows a wrong
colour.
"""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

# ---- running prepare and reading what it wrote ----


def run(*args):
    """prepare.main as the command line would call it -> (exit code, message of SystemExit). One
    process unless told."""
    args = [str(a) for a in args]
    args += ["--workers", "1"] if "--dataset" in args and "--workers" not in args else []
    try:
        return int(prepare.main(args) or 0), ""
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0, ""
        return 1, str(stop.code)


def records(out, split="val"):
    return [json.loads(line) for line in (Path(out) / f"{split}.jsonl").read_text().splitlines()]


def prepared(tmp_path, dataset, raw, *flags, split="val", out="out"):
    """Run one dataset that must succeed; returns its records. Every file written also passes
    `well_formed`."""
    code, message = run(
        "--dataset", dataset, "--root", raw, "--split", split, "--out", tmp_path / out, *flags
    )
    assert code == 0, message
    rows = records(tmp_path / out, split)
    for row in rows:
        well_formed(tmp_path / out, row)
    return rows


def picture_of(out, row):
    return np.asarray(Image.open(Path(out) / row["image"]).convert("RGB")).astype(int)


def well_formed(out, row):
    """What every record promises, whatever the dataset."""
    fx, fy, cx, cy, w, h = row["intrinsics"]
    assert picture_of(out, row).shape == (h, w, 3) and fx > 0 and fy > 0
    xy, d = np.array(row["pixel_coords"]), np.array(row["depth"])
    assert len(xy) == len(d) > 0 and np.isfinite(d).all() and (d > 0).all()
    assert (xy >= 0).all() and (xy < [w, h]).all() and (xy == np.round(xy)).all()
    assert len(np.unique(xy @ [1, w])) == len(xy)  # sampled without replacement
    if "pose" in row:
        m = np.array(row["pose"]).reshape(4, 4)
        assert (
            np.allclose(m[:3, :3] @ m[:3, :3].T, np.eye(3), atol=1e-4)
            and np.linalg.det(m[:3, :3]) > 0
        )
        assert m[3].tolist() == [0, 0, 0, 1]


# ---- geometry, from first principles ----

# x forward, y left, z up  <-  x right, y down, z forward
OPENCV_IN_VEHICLE = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float)


def rotation(axis, angle):
    """Rodrigues: rotation by angle (rad) about axis."""
    x, y, z = np.array(axis, float) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def rigid(r, t):
    m = np.eye(4)
    m[:3, :3], m[:3, 3] = r, t
    return m


def quaternion(m):
    """w, x, y, z of a rotation by less than 180 degrees, up to sign."""
    r = np.array(m)[:3, :3]
    w = np.sqrt(1 + np.trace(r)) / 2
    return [w, *(np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / (4 * w))]


def apply(m, points):
    return points @ m[:3, :3].T + m[:3, 3]


def rays(w, h, fx, fy, cx, cy):
    """(h, w, 3) directions with z = 1 through the pixel centres (index convention)."""
    v, u = np.mgrid[:h, :w].astype(float)
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones((h, w))], -1)


def wall(camera, z=12.0, step=10, margin=12):
    """Camera points of a slanted wall about z metres ahead on a pixel grid, no two at the same
    distance."""
    fx, fy, cx, cy, w, h = camera
    u, v = [
        a.ravel().astype(float)
        for a in np.meshgrid(
            np.arange(margin, w - margin, step), np.arange(margin, h - margin, step)
        )
    ]
    depth = z + 0.01 * u + 0.003 * v
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], 1) * depth[:, None]


def never_seen(camera):
    """Camera points that must give no label: behind the camera, left of, right of and below the
    image."""
    fx, fy, cx, cy, w, h = camera
    p = wall(camera, step=40)
    aside = [
        np.array([[(u - cx) / fx, (v - cy) / fy, 1.0]]) * 9
        for u, v in ((-30, h / 2), (w + 30, h / 2), (w / 2, h + 30))
    ]
    return np.concatenate([-p, *aside])


def project(points, camera):
    """Camera points -> (N, 3) table of u, v, Euclidean distance."""
    fx, fy, cx, cy = camera[:4]
    x, y, z = points.T
    return np.stack([fx * x / z + cx, fy * y / z + cy, np.sqrt(x * x + y * y + z * z)], 1)


def is_lidar(row, table, camera, whole=True):
    """Every label is one point of the table: 1 px and 1e-3 m; with `whole` none of them is lost."""
    assert row["intrinsics"] == pytest.approx(camera, abs=0.51)
    xy, d = np.array(row["pixel_coords"]), np.array(row["depth"])
    hit = (np.abs(xy[:, None] - table[None, :, :2]).max(-1) <= 1) & (
        np.abs(d[:, None] - table[None, :, 2]) <= 1e-3
    )
    assert hit.any(1).all(), f"{(~hit.any(1)).sum()} of {len(d)} labels are no point of the scene"
    assert not whole or len(d) == len(table)


def is_pose(row, expected, atol=1e-5):
    assert np.allclose(np.array(row["pose"]).reshape(4, 4), expected, atol=atol)


# ---- pictures that carry their depth ----

NEAR, FAR = 1.0, 11.0


def ramp(w, h, base=2.0, span=2.5):
    """A smooth z map in metres, different for each base."""
    v, u = np.mgrid[:h, :w].astype(float)
    return base + span * u / w + 0.3 * np.sin(3 * v / h)


def painted(z):
    """RGB picture whose red channel says z (25 levels a metre)."""
    red = np.clip((z - NEAR) / (FAR - NEAR) * 250, 0, 250)
    return Image.fromarray(np.stack([red, red, red], -1).round().astype(np.uint8))


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(
        path,
        **({"quality": 98, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}),
    )


def save_depth(raw, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(raw.astype(np.uint16)).save(path)


def red_is(out, row, z, tolerance=0.2):
    """The picture at the label pixels shows the depth z (one value a label): the pairing and the
    pixels are right."""
    xy = np.array(row["pixel_coords"])
    seen = picture_of(out, row)[xy[:, 1], xy[:, 0], 0] / 250 * (FAR - NEAR) + NEAR
    assert np.abs(seen - z).max() < tolerance


def euclidean(z, camera):
    return z * np.linalg.norm(rays(*camera[4:], *camera[:4]), axis=-1)


def is_dense(out, row, exact, camera, z):
    """Labels are the map `exact` (Euclidean, nan = invalid) at their own pixel, on the picture that
    shows z there."""
    assert row["intrinsics"] == pytest.approx(camera, abs=2e-3)
    x, y = np.array(row["pixel_coords"]).T
    assert np.isfinite(exact[y, x]).all(), "a label on an invalid pixel"
    assert np.abs(exact[y, x] - row["depth"]).max() < 1e-3
    red_is(out, row, z[y, x])


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# ---- Argoverse 2 ----

AV2_CAMERA = [222.0, 220.5, 98.3, 127.1, 194, 256]  # portrait, as ring_front_center
AV2_T0 = 315966265259836000
MS = 1_000_000


def argoverse_log(root, log, times=(0, 100), images=(20,), lost=(), seed=0, wall_z=12.0):
    """One log: sweeps at `times` ms, images at `images` ms, a turning car at 12 m/s -> {image time:
    (table, c2w)}."""
    feather = pytest.importorskip("pyarrow.feather")
    import pyarrow as pa

    folder = Path(root) / log

    def city_ego(ms):
        return rigid(
            rotation([0.02, 0.01, 1], 0.9 + 0.0015 * ms),
            [5012.5 + 0.012 * ms, 3107.25 + 0.003 * ms, 14.0],
        )

    ego_cam = rigid(OPENCV_IN_VEHICLE @ rotation([0.1, 1, 0], 0.05), [1.63, -0.02, 1.39])
    sensors = [
        ("up_lidar", rigid(np.eye(3), [1.35, 0, 1.64])),
        ("ring_front_center", ego_cam),
        ("ring_rear_left", rigid(ego_cam[:3, :3], [1, 1, 1])),
    ]
    (folder / "calibration").mkdir(parents=True)

    def write(path, columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        feather.write_feather(pa.table(columns), str(path))

    def se3(matrices):
        q = np.array([quaternion(m) for m in matrices])
        t = np.array([m[:3, 3] for m in matrices])
        return {
            **{k: q[:, i] for i, k in enumerate(("qw", "qx", "qy", "qz"))},
            **{k: t[:, i] for i, k in enumerate(("tx_m", "ty_m", "tz_m"))},
        }

    fx, fy, cx, cy, w, h = AV2_CAMERA
    write(
        folder / "calibration/intrinsics.feather",
        {
            "sensor_name": ["ring_side_left", "ring_front_center"],
            "fx_px": [fx - 9, fx],
            "fy_px": [fy - 9, fy],
            "cx_px": [cx + 9, cx],
            "cy_px": [cy - 9, cy],
            "k1": [-0.2] * 2,
            "k2": [-0.1] * 2,
            "k3": [0.2] * 2,
            "height_px": np.full(2, h, np.uint16),
            "width_px": np.full(2, w, np.uint16),
        },
    )  # k1..k3: not to be used
    write(
        folder / "calibration/egovehicle_SE3_sensor.feather",
        {"sensor_name": [s for s, _ in sensors], **se3([m for _, m in sensors])},
    )
    stamps = sorted({*times, *images} - set(lost))
    write(
        folder / "city_SE3_egovehicle.feather",
        {
            "timestamp_ns": [AV2_T0 + ms * MS for ms in stamps],
            **se3([city_ego(ms) for ms in stamps]),
        },
    )
    expected = {}
    for ms in images:
        save(
            painted(ramp(w, h)),
            folder / f"sensors/cameras/ring_front_center/{AV2_T0 + ms * MS}.jpg",
        )
        # camera folders that lack one of their two calibration rows (log 7606de8d... lacks its
        # stereo intrinsics)
        for name in ("ring_side_left", "ring_rear_left"):
            save(painted(ramp(w, h)), folder / f"sensors/cameras/{name}/{AV2_T0 + ms * MS}.jpg")
    for ms in times:
        near = [i for i in images if abs(i - ms) <= 51]
        at = min(near or images, key=lambda i: abs(i - ms))
        city_cam = city_ego(at) @ ego_cam
        seen = wall(AV2_CAMERA, z=wall_z + ms / 100)
        points = apply(
            np.linalg.inv(city_ego(ms)) @ city_cam, np.concatenate([seen, never_seen(AV2_CAMERA)])
        )
        points = points.astype(np.float16)
        write(
            folder / f"sensors/lidar/{AV2_T0 + ms * MS}.feather",
            {
                **{k: points[:, i] for i, k in enumerate("xyz")},
                "intensity": np.zeros(len(points), np.uint8),
                "laser_number": np.zeros(len(points), np.uint8),
                "offset_ns": np.zeros(len(points), np.int32),
            },
        )
        # the labels follow from the float16 points of the file; the wall itself is a check on this
        # chain
        back = apply(np.linalg.inv(city_cam) @ city_ego(ms), points[: len(seen)].astype(float))
        assert np.abs(back - seen).max() < 0.02
        expected[at] = project(back, AV2_CAMERA), city_cam
    return expected


def test_argoverse2_moving_ego(tmp_path):
    """Images 20 ms after their sweep, the car turning: labels, pose, time; one image a sweep, none
    far from a sweep."""
    raw = tmp_path / "raw"
    # 70 and 145 are within 51 ms of the second sweep but not the nearest to it; the third sweep has
    # none within 51 ms
    expected = argoverse_log(raw / "val", "0a", times=(0, 100, 800), images=(20, 70, 120, 145, 880))
    rows = prepared(tmp_path, "argoverse2", raw, "--points", 100000)
    assert [round(r["time"] * 1e3 - AV2_T0 / MS) for r in rows] == [20, 120]
    for row, ms in zip(rows, (20, 120)):
        table, pose = expected[ms]
        is_lidar(row, table, AV2_CAMERA)
        is_pose(row, pose)
        assert "0a" in row["scene"] and row["camera"] == "ring_front_center"
    # without the two city steps the labels would be elsewhere: the fixture can tell
    still = project(
        apply(np.linalg.inv(expected[20][1]) @ expected[120][1], wall(AV2_CAMERA)), AV2_CAMERA
    )
    assert np.abs(still - project(wall(AV2_CAMERA), AV2_CAMERA))[:, :2].max() > 3


def test_argoverse2_without_pose_row(tmp_path):
    """The image whose time has no pose row is left out, the others stay."""
    argoverse_log(tmp_path / "raw/val", "0a", images=(20, 120), lost=(120,))
    assert len(prepared(tmp_path, "argoverse2", tmp_path / "raw")) == 1


def test_argoverse2_splits(tmp_path):
    """Evaluation is the first 10 val logs in sorted order; the other val logs are trained on."""
    for i in range(12):
        argoverse_log(tmp_path / "raw/val", f"v{i:02d}", times=(0,))
    argoverse_log(tmp_path / "raw/train", "t00", times=(0,))
    val = {r["scene"] for r in prepared(tmp_path, "argoverse2", tmp_path / "raw")}
    train = {r["scene"] for r in prepared(tmp_path, "argoverse2", tmp_path / "raw", split="train")}
    assert {s.split("/")[-1] for s in val} == {f"v{i:02d}" for i in range(10)}
    assert {s.split("/")[-1] for s in train} == {"t00", "v10", "v11"}


# ---- nuScenes ----

NUSC_CAMERA = [316.6, 316.6, 204.1, 122.9, 400, 225]


def nuscenes_root(
    root, scenes=("scene-0103", "scene-0001"), version="v1.0-trainval", samples=1, cloud=None
):
    """A car at 10 m/s; the camera fires 35 ms before the LiDAR -> {(scene, k): (table, c2w, camera
    points)}."""
    tables = {
        k: []
        for k in (
            "scene",
            "sample",
            "sample_data",
            "calibrated_sensor",
            "ego_pose",
            "sensor",
            "log",
        )
    }
    lidar_ego = rigid(
        rotation([0.01, 0.02, 1], -np.pi / 2 + 0.01), [0.94, 0.0, 1.84]
    )  # x right, y forward, z up
    cam_ego = rigid(OPENCV_IN_VEHICLE @ rotation([0, 1, 0], -0.02), [1.70, 0.02, 1.51])
    flat = {
        "CAM_FRONT": cam_ego,
        "LIDAR_TOP": lidar_ego,
        "RADAR_FRONT": rigid(np.eye(3), [3.4, 0, 0.5]),
    }
    fx, fy, cx, cy, w, h = NUSC_CAMERA
    for channel, m in flat.items():
        tables["sensor"].append(
            {
                "token": f"s_{channel}",
                "channel": channel,
                "modality": {"C": "camera", "L": "lidar", "R": "radar"}[channel[0]],
            }
        )
        tables["calibrated_sensor"].append(
            {
                "token": f"c_{channel}",
                "sensor_token": f"s_{channel}",
                "translation": m[:3, 3].tolist(),
                "rotation": quaternion(m),
                "camera_intrinsic": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
                if "CAM" in channel
                else [],
            }
        )
    expected, seconds = {}, 1532402927.647951
    for s, scene in enumerate(scenes):
        names = [f"{scene}_{k}" for k in range(samples)]
        tables["log"].append(
            {"token": f"log_{scene}", "logfile": "n015", "vehicle": "n015", "location": "x"}
        )
        tables["scene"].append(
            {
                "token": f"t_{scene}",
                "log_token": f"log_{scene}",
                "nbr_samples": samples,
                "name": scene,
                "description": "",
                "first_sample_token": names[0],
                "last_sample_token": names[-1],
            }
        )
        for k, token in enumerate(names):
            t_lidar = seconds + 100 * s + 0.5 * k

            def ego(t):
                moved = t - seconds - 100 * s
                return rigid(
                    rotation([0, 0, 1], 1.1 + 0.4 * moved),
                    [411.3 + 10 * moved, 1180.9 - 3 * moved, 0.0],
                )

            tables["sample"].append(
                {
                    "token": token,
                    "timestamp": round(t_lidar * 1e6),
                    "scene_token": f"t_{scene}",
                    "prev": names[k - 1] if k else "",
                    "next": names[k + 1] if k + 1 < samples else "",
                }
            )
            files = [
                ("LIDAR_TOP", 0.0, "pcd.bin", True),
                ("CAM_FRONT", -0.035, "jpg", True),
                ("CAM_FRONT", 0.05, "jpg", False),
                ("RADAR_FRONT", 0.01, "pcd", True),
            ]
            for channel, dt, ext, key in files:
                t = t_lidar + dt
                folder = "samples" if key else "sweeps"
                name = f"{folder}/{channel}/{scene}__{channel}__{round(t * 1e6)}.{ext}"
                tables["sample_data"].append(
                    {
                        "token": f"d_{name}",
                        "sample_token": token,
                        "ego_pose_token": f"e_{name}",
                        "calibrated_sensor_token": f"c_{channel}",
                        "filename": name,
                        "is_key_frame": key,
                        "prev": "",
                        "next": "",
                        "timestamp": round(t * 1e6),
                        "width": w if ext == "jpg" else 0,
                        "height": h if ext == "jpg" else 0,
                        "fileformat": ext.split(".")[0],
                    }
                )
                tables["ego_pose"].append(
                    {
                        "token": f"e_{name}",
                        "timestamp": round(t * 1e6),
                        "rotation": quaternion(ego(t)),
                        "translation": ego(t)[:3, 3].tolist(),
                    }
                )
                path = Path(root) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if ext == "jpg":
                    save(painted(ramp(w, h, 2 + s)), path)
                elif channel == "LIDAR_TOP":
                    c2w = ego(t_lidar - 0.035) @ cam_ego
                    seen = wall(NUSC_CAMERA, z=10.0 + s + k) if cloud is None else cloud
                    points = np.concatenate([seen, never_seen(NUSC_CAMERA)])
                    points = apply(np.linalg.inv(ego(t) @ lidar_ego) @ c2w, points)
                    np.pad(points, ((0, 0), (0, 2))).astype(np.float32).tofile(path)
                    expected[scene, k] = project(seen, NUSC_CAMERA), c2w, seen
    for name, rows in tables.items():
        write_json(Path(root) / version / f"{name}.json", rows)
    return expected


def test_nuscenes_moving_ego(tmp_path):
    """The camera fires 35 ms before the LiDAR on a car that drives and turns; sweeps and radar give
    no record."""
    expected = nuscenes_root(tmp_path / "raw", samples=2)
    rows = prepared(tmp_path, "nuscenes", tmp_path / "raw", "--points", 100000)
    assert [r["scene"] for r in rows] == ["scene-0103"] * 2
    for k, row in enumerate(sorted(rows, key=lambda r: r["time"])):
        table, pose, _ = expected["scene-0103", k]
        is_lidar(row, table, NUSC_CAMERA)
        is_pose(row, pose)
        assert row["camera"] == "CAM_FRONT" and row["time"] == pytest.approx(
            1532402927.612951 + 0.5 * k, abs=1e-4
        )


def test_nuscenes_split_by_scene_name(tmp_path):
    """The ten scenes of v1.0-mini are held out by name, so that a trainval download alone
    suffices."""
    mini = [
        f"scene-{n}"
        for n in ("0061", "0103", "0553", "0655", "0757", "0796", "0916", "1077", "1094", "1100")
    ]
    nuscenes_root(tmp_path / "raw", scenes=(*mini, "scene-0001", "scene-0062"))
    assert {r["scene"] for r in prepared(tmp_path, "nuscenes", tmp_path / "raw")} == set(mini)
    train = prepared(tmp_path, "nuscenes", tmp_path / "raw", split="train")
    assert {r["scene"] for r in train} == {"scene-0001", "scene-0062"}


def test_nuscenes_paper_labels(tmp_path):
    """--paper-labels: z, marked as such, as the released script stored it."""
    expected = nuscenes_root(tmp_path / "raw", version="v1.0-mini", samples=2)
    rows = prepared(tmp_path, "nuscenes", tmp_path / "raw", "--points", 100000, "--paper-labels")
    assert rows and all(r["depth_type"] == "z" for r in rows)
    zs = np.concatenate([e[2][:, 2] for e in expected.values()])
    for row in rows:
        assert max(np.abs(zs - d).min() for d in row["depth"]) < 1e-3


# ---- Waymo v2 ----

WAYMO_CAMERA = [
    402.3,
    401.8,
    239.1,
    158.3,
    480,
    320,
]  # index convention; the file holds c + 0.5 (edge convention)
WAYMO_DISTORTION = (0.04036, -0.33002, 0.00104, -0.00157, 0.0)


def brown_conrady(x, y, k1, k2, p1, p2, k3):
    q = x * x + y * y
    radial = 1 + k1 * q + k2 * q * q + k3 * q**3
    return x * radial + 2 * p1 * x * y + p2 * (q + 2 * x * x), y * radial + 2 * p2 * x * y + p1 * (
        q + 2 * y * y
    )


def waymo_root(
    root, distortion=(0.0,) * 5, split="training", segment="1024360143612057520_3580_000_3600_000"
):
    """One frame of a wall at world x = 18 m: TOP with per-cell poses and a turned extrinsic, FRONT
    without poses.

    Returns the table of camera 1 (undistorted pinhole pixels), its c2w, and the distorted pixels
    that the file states.
    """
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    stamp = 1553735853462203
    yaw_rate, speed = 0.3, 10.0

    def vehicle(dt):  # vehicle-to-world, dt seconds after the frame's time
        yaw = 0.1 + yaw_rate * dt
        return rigid(rotation([0, 0, 1], yaw), [3.0 + speed * dt, -1.0 + 2 * dt, 0.5])

    cam_vehicle = rigid(
        rotation([0.05, 0.02, 1], 0.03), [1.54, -0.02, 2.11]
    )  # Waymo axes: x forward, z up
    image_pose = vehicle(0.045)
    c2w = image_pose @ cam_vehicle @ rigid(OPENCV_IN_VEHICLE, [0, 0, 0])
    wall_x = 18.0
    table, stated, lidar, projection, poses, calibration = [], [], [], [], [], []
    fx, fy, cx, cy, w, h = WAYMO_CAMERA
    for laser, (rows, cols, spin, limits) in {
        1: (9, 240, 2.6, None),
        2: (8, 90, 0.4, (-0.5, 0.6)),
    }.items():
        e = rigid(rotation([0.01, 0.02, 1], spin), [1.43, 0.0, 2.18])
        if limits is None:
            inclination = np.linspace(-0.35, 0.3, rows) + 0.005 * np.sin(np.arange(rows))
            lo, hi = -0.31, 0.05
        else:
            lo, hi = limits
            inclination = lo + (np.arange(rows) + 0.5) / rows * (hi - lo)
        inc = inclination[::-1, None]  # row 0 is the highest beam
        az = (2 * (cols - np.arange(cols) - 0.5) / cols - 1) * np.pi - np.arctan2(e[1, 0], e[0, 0])
        beams = np.stack(
            [np.cos(az) * np.cos(inc), np.sin(az) * np.cos(inc), np.sin(inc) + 0 * az], -1
        )
        ranges, cell_pose = np.zeros((rows, cols)), np.zeros((rows, cols, 6))
        ids = np.zeros((rows, cols, 6))
        for i in range(rows):
            for j in range(cols):
                dt = 0.1 * (j / cols - 0.5) if laser == 1 else 0.0
                v2w = vehicle(dt)
                cell_pose[i, j] = [0, 0, 0.1 + yaw_rate * dt, *v2w[:3, 3]]
                origin, way = apply(v2w, e[:3, 3]), v2w[:3, :3] @ e[:3, :3] @ beams[i, j]
                r = (wall_x - origin[0]) / way[0]
                if not 0 < r < 60:
                    continue
                ranges[i, j] = np.float32(r)
                x, y, z = apply(np.linalg.inv(c2w), origin + way * r)
                if (
                    z <= 0.5 or abs(x / z) > 0.75 or abs(y / z) > 0.6
                ):  # beyond, the polynomial folds back
                    continue
                a, b = brown_conrady(x / z, y / z, *distortion)
                u, v = fx * a + cx, fy * b + cy
                if 12 < u < w - 12 and 12 < v < h - 12:
                    # odd columns: camera 1 is the second entry, after camera 2
                    first = (1, np.floor(u + 0.5), np.floor(v + 0.5))
                    ids[i, j] = (2, 3, 3, *first) if j % 2 else (*first, 0, 0, 0)
                    table.append([fx * x / z + cx, fy * y / z + cy, np.sqrt(x * x + y * y + z * z)])
                    stated.append([u, v])
        common = {
            "key.segment_context_name": [segment],
            "key.laser_name": pa.array([laser], pa.int8()),
        }
        frame = {**common, "key.frame_timestamp_micros": [stamp]}

        def image(prefix, cells):
            return {
                f"[{prefix}].range_image_return1.values": pa.array(
                    [cells.ravel().astype(np.float32)]
                ),
                f"[{prefix}].range_image_return1.shape": pa.array(
                    [list(cells.shape)], pa.list_(pa.int32())
                ),
            }

        cells = np.concatenate([ranges[..., None], np.zeros((rows, cols, 3))], -1)
        none = {
            k.replace("return1", "return2"): v
            for k, v in image("LiDARComponent", cells * 0).items()
        }
        lidar.append({**frame, **image("LiDARComponent", cells), **none})
        none = {
            k.replace("return1", "return2"): v
            for k, v in image("LiDARCameraProjectionComponent", ids * 0).items()
        }
        projection.append({**frame, **image("LiDARCameraProjectionComponent", ids), **none})
        if laser == 1:
            poses.append({**frame, **image("LiDARPoseComponent", cell_pose)})
        calibration.append(
            {
                **common,
                "[LiDARCalibrationComponent].extrinsic.transform": matrix(pa, e),
                "[LiDARCalibrationComponent].beam_inclination.min": [lo],
                "[LiDARCalibrationComponent].beam_inclination.max": [hi],
                "[LiDARCalibrationComponent].beam_inclination.values": pa.array(
                    [None if limits else inclination.tolist()], pa.list_(pa.float64())
                ),
            }
        )
    data = io.BytesIO()
    # the picture: red waves along the column in which a pinhole camera would show the ray of this
    # pixel
    painted(waves(source_column(rays(w, h, fx, fy, cx, cy), WAYMO_CAMERA, distortion))).save(
        data, "JPEG", quality=98, subsampling=0
    )
    camera = {"key.segment_context_name": [segment], "key.camera_name": pa.array([1], pa.int8())}
    k = dict(
        zip(
            ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3"),
            (fx, fy, cx + 0.5, cy + 0.5, *distortion),
        )
    )
    name = "[CameraImageComponent]"
    parts = {
        "camera_calibration": [
            {
                **camera,
                **{f"[CameraCalibrationComponent].intrinsic.{n}": [v] for n, v in k.items()},
                "[CameraCalibrationComponent].extrinsic.transform": matrix(pa, cam_vehicle),
                "[CameraCalibrationComponent].width": pa.array([w], pa.int32()),
                "[CameraCalibrationComponent].height": pa.array([h], pa.int32()),
                "[CameraCalibrationComponent].rolling_shutter_direction": pa.array([2], pa.int8()),
            }
        ],
        "camera_image": [
            {
                **camera,
                "key.frame_timestamp_micros": [stamp],
                f"{name}.image": [data.getvalue()],
                f"{name}.pose.transform": matrix(pa, image_pose),
                f"{name}.pose_timestamp": [stamp / 1e6 + 0.045],
                **{
                    f"{name}.velocity.linear_velocity.{a}": pa.array([v], pa.float32())
                    for a, v in zip("xyz", (speed, 2.0, 0.0))
                },
                **{
                    f"{name}.velocity.angular_velocity.{a}": [v]
                    for a, v in zip("xyz", (0.0, 0.0, yaw_rate))
                },
                f"{name}.rolling_shutter_params.shutter": [0.001],
                f"{name}.rolling_shutter_params.camera_trigger_time": [stamp / 1e6 + 0.03],
                f"{name}.rolling_shutter_params.camera_readout_done_time": [stamp / 1e6 + 0.06],
            }
        ],
        "vehicle_pose": [
            {
                "key.segment_context_name": [segment],
                "key.frame_timestamp_micros": [stamp],
                "[VehiclePoseComponent].world_from_vehicle.transform": matrix(pa, vehicle(0.0)),
            }
        ],
        "lidar": lidar,
        "lidar_camera_projection": projection,
        "lidar_pose": poses,
        "lidar_calibration": calibration,
    }
    for part, tables in parts.items():
        path = Path(root) / split / part / f"{segment}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables([pa.table(t) for t in tables]), str(path))
    return np.array(table), c2w, np.array(stated)


def waves(column):
    """A triangle between 1.5 and 10.5 m with a period of 80 px: 0.22 m a pixel."""
    return 1.5 + 9 * np.abs((column / 80) % 1 - 0.5) * 2


def matrix(pa, m):
    return pa.array([m.ravel().tolist()], pa.list_(pa.float64(), 16))


def source_column(r, camera, distortion):
    """For each pixel of a distorted image, the column in which the undistorted image shows the same
    ray."""
    fx, fy, cx, cy = camera[:4]
    tx, ty = r[..., 0], r[..., 1]
    x, y = tx.copy(), ty.copy()
    for _ in range(30):  # contraction: the coefficients are small
        a, b = brown_conrady(x, y, *distortion)
        x, y = x + tx - a, y + ty - b
    return fx * x + cx


def test_waymo_range_image_of_a_wall(tmp_path):
    """Cells become points by their own pose; distance is from the camera at image time; pixel from
    the table."""
    table, c2w, _ = waymo_root(tmp_path / "raw")
    assert len(table) > 100
    rows = prepared(tmp_path, "waymo", tmp_path / "raw", "--points", 100000, split="train")
    assert len(rows) == 1
    is_lidar(rows[0], table, WAYMO_CAMERA, whole=False)  # two LiDARs may meet in one pixel
    assert len(rows[0]["depth"]) > 0.9 * len(table)
    is_pose(rows[0], c2w)
    assert (
        rows[0]["scene"] == "1024360143612057520_3580_000_3600_000"
        and "FRONT" in str(rows[0]["camera"]).upper()
    )


def test_waymo_distortion(tmp_path):
    """With real coefficients (shift up to 8 px here) image and label move together, whichever way
    is chosen."""
    table, _, stated = waymo_root(tmp_path / "raw", WAYMO_DISTORTION)
    assert np.abs(table[:, :2] - stated).max() > 4
    (row,) = prepared(tmp_path, "waymo", tmp_path / "raw", "--points", 100000, split="train")
    xy, d = np.array(row["pixel_coords"]), np.array(row["depth"])
    near = (
        np.abs(d[:, None] - table[None, :, 2]) <= 1e-3
    )  # candidates by distance, then the pixel must agree
    undone = near & (np.abs(xy[:, None] - table[None, :, :2]).max(-1) <= 1.5)
    kept = near & (np.abs(xy[:, None] - stated[None]).max(-1) <= 1)
    assert undone.any(1).all() or kept.any(1).all()
    # the picture says which pinhole column each pixel shows: the label's own, to 2 px
    which = (undone if undone.any(1).all() else kept).argmax(1)
    red_is(tmp_path / "out", row, waves(table[which, 0]), tolerance=0.45)


# ---- ScanNet++ ----


def scannetpp_scene(root, scene, frames, key="aligned_pose", width=1920):
    """Decoded iPhone frames, JSON in reverse order, K and pose of each frame its own -> {frame: (z,
    camera, c2w)}. Depth pixel i is at 7.5 i of the image of 1920 px, which may have been decoded
    smaller."""
    folder, poses, expected = Path(root) / "data" / scene / "iphone", {}, {}
    for n in frames:
        z = np.round(ramp(256, 192, base=1.2 + 0.02 * n, span=0.8) * 1000)
        z[:40] = 0  # no depth at the top
        mask = np.full((1440, 1920), 255, np.uint8)
        mask[:, :446] = 0  # anonymised at the left (60 depth pixels)
        rows, columns = ((np.arange(k) / 7.5 + 0.5).astype(int).clip(0, m - 1)
                         for k, m in ((1440, 192), (1920, 256)))
        colours = painted(z[rows[:, None], columns] / 1000)
        for name, image in (
            (f"rgb/frame_{n:06d}.jpg", colours),
            (f"rgb_masks/frame_{n:06d}.png", Image.fromarray(mask)),
        ):
            save(image.resize((width, width * 3 // 4), Image.NEAREST), folder / name)
        save_depth(z, folder / f"depth/frame_{n:06d}.png")
        camera = [1427.4 + n, 1428.6 + n, 957.2, 719.4, 1920, 1440]
        c2w = rigid(rotation([1, n, 2], 0.4 + 0.1 * n), [n, 1.5, -2])
        fx, fy, cx, cy = camera[:4]
        poses[f"frame_{n:06d}"] = {
            "pose": rigid(rotation([0, 0, 1], 1.5), [9, 9, 9]).tolist(),
            key: c2w.tolist(),
            "intrinsic": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]],
            "timestamp": 100 + n / 60,
        }
        z[:, :60] = 0
        expected[n] = np.where(z > 0, z / 1000, np.nan), camera, c2w
    write_json(folder / "pose_intrinsic_imu.json", dict(reversed(poses.items())))
    return expected


def scannetpp_splits(root, train, val):
    (Path(root) / "splits").mkdir(parents=True, exist_ok=True)
    (Path(root) / "splits/nvs_sem_train.txt").write_text("".join(f"{s}\n" for s in train))
    (Path(root) / "splits/nvs_sem_val.txt").write_text("".join(f"{s}\n" for s in val))


def scannetpp_labels(out, row, z, camera, c2w):
    fx, fy, cx, cy, w, h = camera
    s = row["intrinsics"][4] / w  # the reader may store a smaller picture
    resized = [fx * s, fy * s, s * (cx + 0.5) - 0.5, s * (cy + 0.5) - 0.5, w * s, h * s]
    assert row["intrinsics"] == pytest.approx(resized, abs=0.51)
    x, y = (np.array(row["pixel_coords"]).T + 0.5) / s - 0.5  # at full size
    i, j = np.round(x / 7.5).astype(int), np.round(y / 7.5).astype(int)
    assert max(np.abs(7.5 * i - x).max(), np.abs(7.5 * j - y).max()) <= 0.51 / s
    zz = z[j, i]
    assert np.isfinite(zz).all(), "a label in the masked or empty part"
    exact = zz * np.sqrt(1 + ((7.5 * i - cx) / fx) ** 2 + ((7.5 * j - cy) / fy) ** 2)
    assert np.abs(exact - row["depth"]).max() < 1e-3 / s  # of the ray through the whole pixel
    red_is(out, row, zz)
    is_pose(row, c2w)


def test_scannetpp_pairs_by_name(tmp_path):
    """Frames listed out of order keep their own depth, mask, K and aligned pose; both spellings of
    the pose key."""
    for scene, key in (("aaa", "aligned_pose"), ("bbb", "aligned_poses")):
        expected = scannetpp_scene(tmp_path / "raw", scene, (20, 0, 10), key)
        scannetpp_splits(tmp_path / "raw", [], [scene])
        rows = prepared(
            tmp_path, "scannetpp", tmp_path / "raw", "--stride", 1, "--points", 300, out=scene
        )
        assert len(rows) == 3 and all(scene in r["scene"] for r in rows)
        for row in rows:
            n = round(row["pose"][3])
            scannetpp_labels(tmp_path / scene, row, *expected[n])
        assert len({round(r["pose"][3]) for r in rows}) == 3


@pytest.mark.parametrize("width", [960, 640])
def test_scannetpp_decoded_smaller(tmp_path, width):
    """Frames that were decoded at a fraction of 1920 x 1440: intrinsics and places scale."""
    expected = scannetpp_scene(tmp_path / "raw", "aaa", (0, 10), width=width)
    scannetpp_splits(tmp_path / "raw", [], ["aaa"])
    for row in prepared(tmp_path, "scannetpp", tmp_path / "raw", "--points", 300):
        assert row["intrinsics"][4:] == [width, width * 3 // 4]
        scannetpp_labels(tmp_path / "out", row, *expected[round(row["pose"][3])])


@pytest.mark.parametrize("edge", [(1000, 700), (1003, 703), (1006, 696)])
def test_scannetpp_edges(tmp_path, edge):
    """A near quarter of the view ends at a pixel of the image; the depth map shows it where its
    pixels lie, at 7.5 i. No label of the quarter is beside it, and none of the wall is on it."""
    folder, (right, low) = tmp_path / "raw/data/aaa/iphone", edge
    scannetpp_scene(tmp_path / "raw", "aaa", [0])
    scannetpp_splits(tmp_path / "raw", [], ["aaa"])
    near = (np.arange(1440)[:, None] < low) & (np.arange(1920) < right)
    save(Image.fromarray(np.where(near, 250, 20).astype(np.uint8)), folder / "rgb/frame_000000.jpg")
    shown = (7.5 * np.arange(192)[:, None] < low) & (7.5 * np.arange(256) < right)
    save_depth(np.where(shown, 1500, 4000), folder / "depth/frame_000000.png")
    (row,) = prepared(tmp_path, "scannetpp", tmp_path / "raw", "--points", 100000)
    x, y = np.array(row["pixel_coords"]).T
    z = np.array(row["depth"]) / np.linalg.norm(rays(1920, 1440, *row["intrinsics"][:4])[y, x],
                                                axis=1)
    assert ((z < 2) == near[y, x]).all() and 1000 < (z < 2).sum() < len(z) - 1000


def test_scannetpp_splits_and_stride(tmp_path):
    """Evaluation = the first 10 scenes of nvs_sem_val, the rest trains; every tenth frame by
    default."""
    first = scannetpp_scene(tmp_path / "raw", "s00", [0])
    folder = tmp_path / "raw/data/s00/iphone"
    table = json.loads((folder / "pose_intrinsic_imu.json").read_text())["frame_000000"]
    for n in range(1, 21):
        for name in (
            "rgb/frame_{:06d}.jpg",
            "rgb_masks/frame_{:06d}.png",
            "depth/frame_{:06d}.png",
        ):
            os.link(folder / name.format(0), folder / name.format(n))
    write_json(folder / "pose_intrinsic_imu.json", {f"frame_{n:06d}": table for n in range(21)})
    for n in range(1, 13):
        shutil.copytree(folder.parent, folder.parents[1] / f"s{n:02d}", copy_function=os.link)
        if n > 1:
            for f in folder.parents[1].glob(f"s{n:02d}/iphone/*/frame_0000[0-2][1-9].*"):
                f.unlink()
    scannetpp_splits(tmp_path / "raw", ["s00", "s01"], [f"s{n:02d}" for n in (12, *range(2, 12))])
    assert first[0] is not None
    rows = prepared(tmp_path, "scannetpp", tmp_path / "raw", "--limit", 4, split="train")
    assert [Path(r["image"]).name for r in rows][:3] == [f"frame_0000{n}0.jpg" for n in range(3)]
    val = prepared(tmp_path, "scannetpp", tmp_path / "raw", "--stride", 30, "--points", 20)
    assert {r["scene"].split("/")[-1] for r in val} == {"s12", *(f"s{n:02d}" for n in range(2, 11))}


# ---- Taskonomy and HM3D (Omnidata) ----

FOV = 1.18051
OMNI = [256 / np.tan(FOV / 2)] * 2 + [255.5, 255.5, 512, 512]


def blender(euler, place):
    """c2w in OpenCV axes of a Blender camera: Rz Ry Rx, looking along -z with y up."""
    r = (
        rotation([0, 0, 1], euler[2])
        @ rotation([0, 1, 0], euler[1])
        @ rotation([1, 0, 0], euler[0])
    )
    return rigid(r @ np.diag([1.0, -1, -1]), place)


def omnidata_view(path_of, n, domains, info):
    """One view written through path_of(domain, suffix), 40 % of it 65535. Returns z, the Euclidean
    map that the domain states (nan = invalid) and c2w."""
    z = ramp(512, 512, base=2 + 0.6 * n)
    raw = {
        "depth_euclidean": np.round(euclidean(z, OMNI) * 512),
        "depth_zbuffer": np.round(z * 512),
    }
    exact = {
        "depth_euclidean": raw["depth_euclidean"] / 512,
        "depth_zbuffer": euclidean(raw["depth_zbuffer"] / 512, OMNI),
    }
    for name in domains:
        raw[name][:, :200], exact[name][:, :200] = 65535, np.nan
        save_depth(raw[name], path_of(name, f"{name}.png"))
    save(painted(z), path_of("rgb", "rgb.png"))
    euler, place = [1.3, 0.05 * n, 0.7 + n], [1.0 + n, -2.0, 1.6]
    write_json(
        path_of("point_info", f"{info}.json"),
        {
            "field_of_view_rads": FOV,
            "resolution": 512,
            "camera_location": place,
            "camera_rotation_final": euler,
            "camera_uuid": f"c{n}",
            "point_uuid": f"{n}",
            "point_location": [0, 0, 0],
            "camera_distance": 2.0,
            "view_id": n,
        },
    )
    return z, exact[domains[0]], blender(euler, place)


LAYOUTS = {
    "omnitools": "{domain}/{component}/{scene}/{stem}_domain_{suffix}",
    "by_domain": "{domain}/{scene}/{stem}_domain_{suffix}",
    "by_building": "{scene}/{domain}/{stem}_domain_{suffix}",
}


def omnidata_root(raw, layout, component, scenes, domains, info):
    expected = {}
    for n, scene in enumerate(scenes):

        def path_of(domain, suffix):
            return raw / LAYOUTS[layout].format(
                domain=domain,
                component=component,
                scene=scene,
                suffix=suffix,
                stem=f"point_{n}_view_0",
            )

        expected[scene] = omnidata_view(path_of, n, domains, info)
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_taskonomy(tmp_path, layout):
    """Three layouts in the wild: metres = raw / 512, 65535 is nothing, K from the field of view,
    the Blender pose."""
    expected = omnidata_root(
        tmp_path / "raw",
        layout,
        "taskonomy",
        ("allensville", "ackermanville"),
        ("depth_euclidean", "depth_zbuffer"),
        "point_info" if layout == "omnitools" else "fixatedpose",
    )
    rows = prepared(
        tmp_path, "taskonomy", tmp_path / "raw", "--points", 300, "--max-depth", 300, split="train"
    )
    assert len(rows) == 2  # 65535 / 512 = 128 m is within that limit
    for row in rows:
        z, exact, c2w = expected[next(s for s in expected if s in row["scene"])]
        is_dense(tmp_path / "out", row, exact, OMNI, z)
        is_pose(row, c2w)


def test_taskonomy_split_table_and_bad_buildings(tmp_path):
    """Buildings outside of the train column of the fullplus table, and the five known bad ones, are
    left out."""
    omnidata_root(
        tmp_path / "raw",
        "omnitools",
        "taskonomy",
        ("allensville", "mosquito", "beechwood"),
        ("depth_euclidean",),
        "point_info",
    )
    assert (
        len(
            prepared(
                tmp_path, "taskonomy", tmp_path / "raw", "--points", 20, split="train", out="all"
            )
        )
        == 2
    )
    (tmp_path / "raw/train_val_test_fullplus.csv").write_bytes(
        b"id,train,val,test\r\nallensville,0,1,0\r\nbeechwood,1,0,0\r\nmosquito,1,0,0\r\n"
    )
    (row,) = prepared(tmp_path, "taskonomy", tmp_path / "raw", "--points", 20, split="train")
    assert "beechwood" in row["scene"]


def test_hm3d_from_the_z_buffer(tmp_path):
    """Without depth_euclidean the z-buffer is converted with the view's own field of view."""
    expected = omnidata_root(
        tmp_path / "raw",
        "omnitools",
        "hm3d",
        ("00000-kfPV7w3FaU5", "00001-UVdNNRcVyV1"),
        ("depth_zbuffer",),
        "fixatedpose",
    )
    rows = prepared(
        tmp_path, "hm3d", tmp_path / "raw", "--points", 300, "--max-depth", 300, split="train"
    )
    assert len(rows) == 2
    for row in rows:
        z, exact, c2w = expected[next(s for s in expected if s in row["scene"])]
        is_dense(tmp_path / "out", row, exact, OMNI, z)
        is_pose(row, c2w)


# ---- Matterport3D ----


def matterport_house(root, house="17DRP5sb8fy"):
    """Two cameras, each with its own intrinsics line before its scan lines. Returns (c, y) -> (z,
    camera, c2w)."""
    folder, expected = Path(root) / "v1/scans" / house / house, {}
    lines = [
        "dataset matterport",
        "n_images 4",
        "depth_directory undistorted_depth_images",
        "color_directory undistorted_color_images",
        "",
    ]
    uuid = "03a8325e3b054e3fad7e1e7091f9d283"
    for c, (fx, cx, fy, cy) in enumerate(
        [(1076.45, 631.116, 1077.19, 490.202), (1176.01, 635.509, 1176.38, 511.999)]
    ):
        lines.append(f"intrinsics_matrix {fx} 0 {cx}  0 {fy} {cy}  0 0 1")
        for yaw in range(2):
            m = rigid(rotation([1, 0.1 * c, 0.3], 1.2 + yaw), [-2.9 + c, -14.4, 1.3])
            m[:3] = np.round(m[:3], 9)
            lines.append(
                f"scan {uuid}_d{c}_{yaw}.png {uuid}_i{c}_{yaw}.jpg "
                + " ".join(str(v) for v in m.ravel())
            )
            raw = np.round(ramp(1280, 1024, base=2 + c + 0.4 * yaw) * 4000)
            raw[:200] = 0
            save(painted(raw / 4000), folder / f"undistorted_color_images/{uuid}_i{c}_{yaw}.jpg")
            save_depth(raw, folder / f"undistorted_depth_images/{uuid}_d{c}_{yaw}.png")
            # image origin at the bottom left, pixel centres at + 0.5
            camera = [fx, fy, cx - 0.5, 1024 - cy - 0.5, 1280, 1024]
            expected[c, yaw] = (
                np.where(raw > 0, raw / 4000, np.nan),
                camera,
                m @ np.diag([1.0, -1, -1, 1]),
            )
        lines.append("")
    conf = folder / f"undistorted_camera_parameters/{house}.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("\n".join(lines))
    return expected


def test_matterport_two_intrinsics_and_opengl_pose(tmp_path):
    """One intrinsics line counts until the next one; metres = raw / 4000; y-up camera; flipped
    principal point."""
    expected = matterport_house(tmp_path / "raw")
    rows = prepared(tmp_path, "matterport3d", tmp_path / "raw", split="train")
    assert len(rows) == 4 and all("17DRP5sb8fy" in r["scene"] for r in rows)
    for row in rows:
        c, yaw = (int(v) for v in Path(row["image"]).stem.split("_i")[1].split("_"))
        z, camera, c2w = expected[c, yaw]
        is_dense(tmp_path / "out", row, euclidean(z, camera), camera, z)
        is_pose(row, c2w)


def test_depth_without_image_and_image_without_depth(tmp_path):
    """A missing half of a pair costs that pair only; the others do not shift against each other."""
    expected = matterport_house(tmp_path / "raw")
    folder = tmp_path / "raw/v1/scans/17DRP5sb8fy/17DRP5sb8fy"
    next(folder.glob("undistorted_color_images/*_i0_0.jpg")).unlink()
    next(folder.glob("undistorted_depth_images/*_d1_1.png")).unlink()
    rows = prepared(tmp_path, "matterport3d", tmp_path / "raw", split="train")
    assert len(rows) == 2
    for row in rows:
        c, yaw = (int(v) for v in Path(row["image"]).stem.split("_i")[1].split("_"))
        assert (c, yaw) in ((0, 1), (1, 0))
        z, camera, _ = expected[c, yaw]
        is_dense(tmp_path / "out", row, euclidean(z, camera), camera, z)


# ---- DDAD ----

DDAD_CAMERAS = {
    "CAMERA_01": [541.9, 539.0, 237.8, 151.2, 480, 300],
    "CAMERA_05": [265.6, 264.2, 234.8, 155.6, 480, 300],
}


def ddad_root(root, splits={"0": 1, "1": 1}):
    """DGP JSON, zero fields left out, calibration names in lower case -> {(folder, camera): (table,
    c2w, points)}."""
    root, expected, listing = Path(root) / "ddad_train_val", {}, {}

    def xyz(values, names):
        return {k: float(v) for k, v in zip(names, values) if v != 0}  # protobuf JSON drops zeros

    def pose(m):
        full = {
            "translation": xyz(m[:3, 3], "xyz"),
            "rotation": xyz(quaternion(m), ("qw", "qx", "qy", "qz")),
        }
        return {k: v for k, v in full.items() if v}

    number = 0
    for split, scenes in splits.items():
        listing[split] = {"filenames": []}
        for _ in range(scenes):
            folder, number = f"{number:06d}", number + 1
            car = rigid(rotation([0, 0, 1], 0.5 * number), [400.0 * number, -259.0, 0.0])
            lidar = (
                rigid(np.eye(3), [0, 0, 0]) if number == 1 else car
            )  # the identity: every zero field absent
            data, keys, points, stamp = [], [], [], f"1556919593820375{number}"
            for k, (name, camera) in enumerate(DDAD_CAMERAS.items()):
                moved = rigid(rotation([0, 0, 1], 0.01), [0.25, 0.02, 0])  # 20 ms later
                c2w = (
                    lidar
                    @ moved
                    @ rigid(rotation([0, 0, 1], 0.9 * k) @ OPENCV_IN_VEHICLE, [1.6, 0.3 * k, 0])
                )
                seen = wall(camera, z=14 + k, step=14)
                points.append(
                    apply(np.linalg.inv(lidar) @ c2w, np.concatenate([seen, never_seen(camera)]))
                )
                expected[folder, name] = c2w
                save(painted(ramp(480, 300, 2 + k)), root / folder / f"rgb/{name}/{stamp}.png")
                data.append(
                    {
                        "key": f"{folder}k{k}",
                        "next_key": "",
                        "prev_key": "",
                        "id": {
                            "name": name,
                            "timestamp": "2463-05-15T00:38:58.2Z",
                            "log": "x",
                            "index": "0",
                        },
                        "datum": {
                            "image": {
                                "filename": f"rgb/{name}/{stamp}.png",
                                "height": 300,
                                "width": 480,
                                "channels": 3,
                                "pose": pose(c2w),
                                "annotations": {},
                                "metadata": {},
                            }
                        },
                    }
                )
                keys.append(f"{folder}k{k}")
            cloud = np.concatenate(points)
            path = root / folder / f"point_cloud/LIDAR/{stamp}.npz"
            path.parent.mkdir(parents=True)
            np.savez(path, data=np.pad(cloud, ((0, 0), (0, 1))))
            data.append(
                {
                    "key": f"{folder}lidar",
                    "id": {"name": "LIDAR", "timestamp": "2463-05-15T00:38:58.2Z"},
                    "datum": {
                        "point_cloud": {
                            "filename": f"point_cloud/LIDAR/{stamp}.npz",
                            "pose": pose(lidar),
                            "point_format": ["X", "Y", "Z", "INTENSITY"],
                        }
                    },
                }
            )
            write_json(
                root / folder / "calibration/c0e1.json",
                {
                    "names": ["lidar", "camera_05", "camera_01"],
                    "intrinsics": [
                        {},
                        *(
                            {k: v for k, v in zip(("fx", "fy", "cx", "cy"), DDAD_CAMERAS[n])}
                            for n in ("CAMERA_05", "CAMERA_01")
                        ),
                    ],
                    "extrinsics": [{}, {"rotation": {"qw": 1.0}}, {"rotation": {"qw": 1.0}}],
                },
            )
            scene = f"{folder}/scene_{number}.json"
            write_json(
                root / scene,
                {
                    "name": "x",
                    "data": data[::-1],
                    "samples": [
                        {
                            "id": {"index": "0"},
                            "datum_keys": [f"{folder}lidar", *keys],
                            "calibration_key": "c0e1",
                        }
                    ],
                },
            )
            listing[split]["filenames"].append(scene)
            for name, camera in DDAD_CAMERAS.items():
                p = apply(np.linalg.inv(expected[folder, name]) @ lidar, cloud)
                uvd = project(p, camera)
                inside = (
                    (p[:, 2] > 0) & (uvd[:, :2] > 1).all(1) & (uvd[:, 0] < 478) & (uvd[:, 1] < 298)
                )
                expected[folder, name] = uvd[inside], expected[folder, name], p[inside]
    write_json(root / "ddad.json", {"metadata": {"name": "ddad"}, "scene_splits": listing})
    return expected


def test_ddad_missing_zeros_and_letter_case(tmp_path):
    """Both cameras of the one val scene; its pose with absent zero fields; calibration names in the
    other case."""
    expected = ddad_root(tmp_path / "raw", {"1": 1, "0": 1})
    rows = prepared(tmp_path, "ddad", tmp_path / "raw", "--points", 100000)
    assert sorted(r["camera"].upper() for r in rows) == sorted(DDAD_CAMERAS)
    for row in rows:
        table, c2w, _ = expected["000000", row["camera"].upper()]
        is_lidar(row, table, DDAD_CAMERAS[row["camera"].upper()], whole=False)
        assert len(row["depth"]) > 0.95 * len(table) > 300
        is_pose(row, c2w)


def test_ddad_paper_labels(tmp_path):
    """--paper-labels: the DGP depth map, which is z."""
    expected = ddad_root(tmp_path / "raw")
    for row in prepared(tmp_path, "ddad", tmp_path / "raw", "--paper-labels"):
        zs = expected["000001", row["camera"].upper()][2][:, 2]
        assert row["depth_type"] == "z" and max(np.abs(zs - d).min() for d in row["depth"]) < 1e-3


# ---- ETH3D ----

ETH_W, ETH_H, ETH_S = 302, 202, 302 / 6048
ETH_CAMERAS = {
    3: (
        3408.35,
        3408.8,
        3033.92,
        2019.32,
        0.21167,
        0.20864,
        0.00053,
        -0.00015,
        -0.16568,
        0.4075,
        0.00048,
        0.00028,
    ),
    0: (
        3411.42,
        3410.02,
        3041.29,
        2014.07,
        0.21047,
        0.21102,
        -5.36231e-06,
        0.00051541,
        -0.158023,
        0.406856,
        -8.46499e-05,
        0.000861313,
    ),
}


def eth_camera(number):
    """A courtyard camera at 302 x 202, its terms p, s made ten times as large so that leaving them
    out shows."""
    p = np.array(ETH_CAMERAS[number])
    p[:4] *= ETH_S
    p[[6, 7, 10, 11]] *= 10
    return p


def thin_prism(u, v, p):
    """Pinhole ray (u, v, 1) -> pixel, edge convention."""
    fx, fy, cx, cy, k1, k2, p1, p2, k3, k4, s1, s2 = p
    r = np.sqrt(u * u + v * v) + 1e-12
    a, b = u * np.arctan(r) / r, v * np.arctan(r) / r
    q = a * a + b * b
    radial = k1 * q + k2 * q**2 + k3 * q**3 + k4 * q**4
    x = a + a * radial + 2 * p1 * a * b + p2 * (q + 2 * a * a) + s1 * q
    y = b + b * radial + 2 * p2 * a * b + p1 * (q + 2 * b * b) + s2 * q
    return fx * x + cx, fy * y + cy


def eth_rays(number):
    """(u, v) of each pixel centre of the distorted image; exact, as the forward model confirms."""
    p = eth_camera(number)
    y, x = np.mgrid[:ETH_H, :ETH_W] + 0.5
    u, v = (x - p[2]) / p[0], (y - p[3]) / p[1]
    for _ in range(12):  # Newton with a numeric Jacobian
        fx, fy = thin_prism(u, v, p)
        h = 1e-6
        (xu, yu), (xv, yv) = thin_prism(u + h, v, p), thin_prism(u, v + h, p)
        j = [(xu - fx) / h, (xv - fx) / h, (yu - fy) / h, (yv - fy) / h]
        det = j[0] * j[3] - j[1] * j[2]
        dx, dy = x - fx, y - fy
        u, v = u + (j[3] * dx - j[1] * dy) / det, v + (j[0] * dy - j[2] * dx) / det
    fx, fy = thin_prism(u, v, p)
    assert max(np.abs(fx - x).max(), np.abs(fy - y).max()) < 1e-6
    return u, v


def eth3d_root(root):
    """Two scenes whose pictures have the same names, two cameras listed out of order. -> (scene,
    name) -> expected."""
    expected, solved = {}, {n: eth_rays(n) for n in ETH_CAMERAS}
    for s, scene in enumerate(("courtyard", "kicker")):
        folder, lines = Path(root) / scene, ["# Image list with two lines of data per image:"]
        cameras = ["# Camera list with one line of data per camera:"] + [
            f"{n} THIN_PRISM_FISHEYE {ETH_W} {ETH_H} " + " ".join(f"{v:.9g}" for v in eth_camera(n))
            for n in (3, 0)
        ]
        for k, number in enumerate((0, 3)):
            name = f"DSC_030{7 + k}.JPG"
            z = ramp(ETH_W, ETH_H, base=2 + 2 * s + k).astype(np.float32)
            save(painted(z), folder / "images/dslr_images" / name)
            u, v = solved[number]
            z[60:90], z[120:150] = np.inf, 0
            path = folder / "ground_truth_depth/dslr_images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            z.astype("<f4").tofile(path)
            w2c = rigid(rotation([0.3, 1, k], 0.8 + s), [1.8, -0.8, -7 + k])
            lines += [
                " ".join(
                    map(
                        repr, [22 + k, *(float(x) for x in (*quaternion(w2c), *w2c[:3, 3])), number]
                    )
                )
                + f" dslr_images/{name}",
                "" if k == 0 else "10.5 20.5 -1 30.5 40.5 7",
            ]
            z = np.where(np.isfinite(z) & (z > 0), z, np.nan).astype(float)
            expected[scene, name] = u, v, z, np.linalg.inv(w2c)
        for path, text in (("images.txt", lines), ("cameras.txt", cameras)):
            (folder / "dslr_calibration_jpg").mkdir(exist_ok=True)
            (folder / "dslr_calibration_jpg" / path).write_text("\n".join(text) + "\n")
    return expected


@pytest.mark.parametrize("focal", [1000, 70])
def test_eth3d_thin_prism(tmp_path, monkeypatch, focal):
    """Each label is one laser pixel moved by the full model of its own image's camera, and the
    picture moves with it; the same where the picture is made smaller (a real one of 24 Mpx always
    is)."""
    monkeypatch.setattr(prepare, "ETH3D_FOCAL", focal)
    expected = eth3d_root(tmp_path / "raw")
    rows = prepared(tmp_path, "eth3d", tmp_path / "raw", "--points", 200, "--workers", 1)
    assert all((r["intrinsics"][0] < 71) == (focal == 70) for r in rows)
    assert len(rows) == 4
    seen = set()
    for row in rows:
        (scene, name), (u, v, z, c2w) = min(
            expected.items(),
            key=lambda e: np.abs(e[1][3] - np.array(row["pose"]).reshape(4, 4)).max(),
        )
        seen.add((scene, name))
        assert scene in row["scene"]
        is_pose(row, c2w)
        fx, fy, cx, cy, w, h = row["intrinsics"]
        x, y = fx * u + cx, fy * v + cy  # where the reader's pinhole shows each laser pixel
        exact = z * np.sqrt(1 + u * u + v * v)
        which = []
        for (px, py), d in zip(row["pixel_coords"], row["depth"]):
            near = (np.abs(x - px) <= 1) & (np.abs(y - py) <= 1)
            gap = np.where(near & np.isfinite(exact), np.abs(exact - d), np.inf)
            assert gap.min() < 1e-3, (
                f"{scene}/{name}: no laser pixel within 1 px of {px, py} has {d} m"
            )
            which.append(z.flat[gap.argmin()])
        red_is(tmp_path / "out", row, np.array(which))
    assert seen == set(expected)


# ---- SUN RGB-D and NYUv2 ----

SUN_CAMERA = [518.858, 519.470, 283.58, 207.74, 561, 427]  # index convention; the file is 1-based


def rotated(millimetres):
    """SUN's PNG bits: uint16 rotated left by three."""
    mm = millimetres.astype(np.uint32)
    return ((mm << 3) | (mm >> 13)) & 0xFFFF


def sun_scene(folder, base=2.0, far=None, camera=SUN_CAMERA, fx=None):
    """One SUN folder -> z in metres (nan = hole). far: z of a block beyond the 13 bits; fx: what
    the file says."""
    w, h = camera[4:]
    mm = np.round(ramp(w, h, base=base) * 1000)
    if far:
        mm[100:200, 100:200] = far * 1000
    mm[:, :60] = 0
    name = Path(folder).name
    save(painted(mm / 1000), folder / f"image/{name}.jpg")
    save_depth(rotated(mm), folder / f"depth/{name}_abs.png")
    save_depth(
        rotated(np.full_like(mm, 1234)), folder / f"depth_bfx/{name}_abs.png"
    )  # inpainted: never a label
    k = [camera[0] if fx is None else fx, 0, camera[2] + 1, 0, camera[1], camera[3] + 1, 0, 0, 1]
    (folder / "intrinsics.txt").write_text(
        "{:f} {:f} {:f}\n{:f} {:f} {:f}\n{:f} {:f} {:f}\n".format(*k)
    )
    (folder / "extrinsics").mkdir()
    (folder / "extrinsics/20140915210114.txt").write_text("1 0 0 0\n0 0.99 0.1 0\n0 -0.1 0.99 0\n")
    (folder / "scene.txt").write_text("office")
    return np.where(mm > 0, mm / 1000, np.nan)


def test_sunrgbd_rotated_bits(tmp_path):
    """mm = bits rotated right by 3; a 9 m block has bits in the wrap; 8 m is the default cap;
    NYUdata is left out."""
    sun = tmp_path / "raw/SUNRGBD"
    z = sun_scene(sun / "kv2/align_kv2/2014-12-18_11", far=9.0)
    sun_scene(sun / "kv1/NYUdata/NYU0001")
    (row,) = prepared(tmp_path, "sunrgbd", tmp_path / "raw", "--points", 2000)
    is_dense(
        tmp_path / "out", row, np.where(z < 8, euclidean(z, SUN_CAMERA), np.nan), SUN_CAMERA, z
    )
    (row,) = prepared(
        tmp_path, "sunrgbd", tmp_path / "raw", "--points", 2000, "--max-depth", 20, out="far"
    )
    is_dense(tmp_path / "far", row, euclidean(z, SUN_CAMERA), SUN_CAMERA, z)
    assert (np.array(row["depth"]) > 9).sum() > 20


def test_sunrgbd_every_folder_and_missing_fx(tmp_path):
    """sun3ddata lies two levels deeper, and each of its frames counts; fx = 0 falls back to fy."""
    sun, camera, z = tmp_path / "raw/SUNRGBD", [525.0, 525.0, 79.0, 59.0, 160, 120], {}
    for n, name in enumerate(
        (
            "xtion/sun3ddata/hotel/room1/0001",
            "xtion/sun3ddata/hotel/room1/0002",
            "xtion/xtion_align_data/a3",
            "realsense/lg/b4",
            "kv1/b3dodata/img_0005",
        )
    ):
        z[name.split("/")[-1]] = sun_scene(
            sun / name, base=2 + n, camera=camera, fx=0 if n == 3 else None
        )
    rows = prepared(tmp_path, "sunrgbd", tmp_path / "raw")
    assert len(rows) == 5
    for row in rows:
        own = z[Path(row["image"]).stem]
        exact = euclidean(own, camera)
        is_dense(tmp_path / "out", row, np.where(exact <= 8, exact, np.nan), camera, own)


def test_nyuv2_from_sunrgbd(tmp_path):
    """kv1/NYUdata: only the 654 test indices by default (here 1, 2, 1449 and not 3, 1448 .. are
    drawn), from depth/."""
    z = {
        n: sun_scene(tmp_path / f"raw/SUNRGBD/kv1/NYUdata/NYU{n:04d}", base=2 + i / 2)
        for i, n in enumerate((1, 2, 3, 10, 1440, 1449))
    }
    rows = prepared(tmp_path, "nyuv2", tmp_path / "raw")
    assert sorted(Path(r["image"]).stem for r in rows) == ["NYU0001", "NYU0002", "NYU1449"]
    for row in rows:
        own = z[int(Path(row["image"]).stem[3:])]
        is_dense(tmp_path / "out", row, euclidean(own, SUN_CAMERA), SUN_CAMERA, own)


def test_nyuv2_in_millimetres(tmp_path):
    """The 640 x 480 distribution: 1-based principal point, Eigen crop, 10.0 m is saturation
    whatever the limit."""
    camera = [518.8579, 519.4696, 324.5824, 252.7362, 640, 480]
    mm = np.round(ramp(640, 480, base=3) * 1000)
    save(painted(mm / 1000), tmp_path / "raw/rgb/rgb_00001.jpg")
    mm[200:260, 100:500] = 10000
    save_depth(mm, tmp_path / "raw/depth/sync_depth_00001.png")
    z = np.full((480, 640), np.nan)
    z[45:471, 41:601] = mm[45:471, 41:601] / 1000
    z[z >= 10] = np.nan
    (row,) = prepared(tmp_path, "nyuv2", tmp_path / "raw", "--points", 3000, "--max-depth", 30)
    is_dense(tmp_path / "out", row, euclidean(z, camera), camera, z)


@pytest.mark.parametrize("dataset", ["nyuv2", "sunrgbd"])
def test_nyuv2_and_sunrgbd_paper_labels(tmp_path, dataset):
    """--paper-labels: raw / 10000, which is 0.8 x the true Euclidean depth; the record says which
    labels it has."""
    part = "kv1/NYUdata/NYU0001" if dataset == "nyuv2" else "kv2/kinect2data/a1"
    raw = tmp_path / "raw/SUNRGBD" / part
    z = sun_scene(raw)
    bfx = Image.fromarray(rotated(np.round(np.nan_to_num(z) * 1000)).astype(np.uint16))
    bfx.save(
        next((raw / "depth_bfx").iterdir())
    )  # the released SUN script read depth_bfx: make both equal
    (row,) = prepared(tmp_path, dataset, tmp_path / "raw", "--paper-labels")
    is_dense(tmp_path / "out", row, 0.8 * euclidean(z, SUN_CAMERA), row["intrinsics"], z)
    assert "depth_type" in row


# ---- iBims-1 ----

IBIMS_CAMERA = [559.62, 558.14, 361.87, 241.99, 640, 480]


def ibims_root(root, names=("corridor_01", "lab_07")):
    root, expected = Path(root) / "ibims1_core_raw", {}
    for n, name in enumerate(names):
        raw = np.round(ramp(640, 480, base=2 + n) * 65535 / 50)
        valid, solid = np.full((480, 640), 255, np.uint8), np.full((480, 640), 255, np.uint8)
        raw[:50], valid[:, :80], solid[:, 560:] = 0, 0, 0  # no return; invalid; transparent
        save(painted(raw * 50 / 65535), root / f"rgb/{name}.png")
        save_depth(raw, root / f"depth/{name}.png")
        save(Image.fromarray(valid), root / f"mask_invalid/{name}.png")
        save(Image.fromarray(solid), root / f"mask_transp/{name}.png")
        (root / "calib").mkdir(exist_ok=True)
        (root / f"calib/{name}.txt").write_text(",".join(str(v) for v in IBIMS_CAMERA[:4]))
        expected[name] = np.where((raw > 0) & (valid > 0) & (solid > 0), raw * 50 / 65535, np.nan)
    (root / "imagelist.txt").write_text("".join(f"{n}\n" for n in names))
    return expected


def test_ibims1(tmp_path):
    """value * 50 / 65535 is z; both masks (> 0 is good) and zero depth are respected."""
    expected = ibims_root(tmp_path / "raw")
    rows = prepared(tmp_path, "ibims1", tmp_path / "raw", "--points", 1000)
    assert [Path(r["image"]).stem for r in rows] == list(expected)
    for row in rows:
        z = expected[Path(row["image"]).stem]
        is_dense(tmp_path / "out", row, euclidean(z, IBIMS_CAMERA), IBIMS_CAMERA, z)


def test_ibims1_paper_labels(tmp_path):
    """--paper-labels: the released example file holds z."""
    expected = ibims_root(tmp_path / "raw")
    for row in prepared(tmp_path, "ibims1", tmp_path / "raw", "--paper-labels"):
        z = expected[Path(row["image"]).stem]
        is_dense(tmp_path / "out", row, z, IBIMS_CAMERA, z)
        assert row["depth_type"] == "z"


def test_ibims1_inverted_mask_is_refused(tmp_path):
    """If > 0 meant invalid, most of the first image would be masked: a message, not labels on
    invalid pixels."""
    ibims_root(tmp_path / "raw")
    for f in (tmp_path / "raw/ibims1_core_raw/mask_invalid").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(f))).save(f)
    code, message = run(
        "--dataset",
        "ibims1",
        "--root",
        tmp_path / "raw",
        "--split",
        "val",
        "--out",
        tmp_path / "out",
    )
    assert code != 0 and not (tmp_path / "out/val.jsonl").exists()


# ---- your own RGB-D folder ----
OWN_CAMERA = [70.0, 71.0, 39.5, 29.5, 80, 60]


def own_folder(
    root, count=3, camera=OWN_CAMERA, scale=1000, npy=False, kind="z", hole=True, bases=None
):
    """rgb/, depth/, intrinsics.txt. Returns [(z, exact Euclidean)] in name order; the depth file
    holds `kind`."""
    root, expected = Path(root), []
    for n in range(count):
        z = ramp(camera[4], camera[5], base=2 + (n % 7) * 0.7 if bases is None else bases[n])
        stored = (z if kind == "z" else euclidean(z, camera)) * scale
        stored = stored if npy else np.round(stored)
        if hole:
            stored[:10] = 0
        (root / "depth").mkdir(parents=True, exist_ok=True)
        if npy:
            np.save(root / f"depth/{n:04d}.npy", stored.astype(np.float32))
        else:
            save_depth(stored, root / f"depth/{n:04d}.png")
        save(painted(z), root / f"rgb/{n:04d}.png")
        exact = (euclidean(stored, camera) if kind == "z" else stored) / scale
        expected.append((z, np.where(stored > 0, exact, np.nan)))
    fx, fy, cx, cy = camera[:4]
    (root / "intrinsics.txt").write_text(f"{fx} 0 {cx}\n0 {fy} {cy}\n0 0 1\n")
    return expected


@pytest.mark.parametrize("npy", [False, True], ids=["png", "npy"])
@pytest.mark.parametrize("kind", ["z", "euclidean"])
def test_folder(tmp_path, npy, kind):
    """PNG or .npy, a scale, and either kind of depth: the labels are Euclidean."""
    scale = 1 if npy else 5000
    expected = own_folder(tmp_path / "raw", scale=scale, npy=npy, kind=kind)
    rows = prepared(
        tmp_path, "folder", tmp_path / "raw", "--depth-scale", scale, "--depth-type", kind
    )
    assert len(rows) == 3
    for row in rows:
        z, exact = expected[int(Path(row["image"]).stem)]
        is_dense(tmp_path / "out", row, exact, OWN_CAMERA, z)


def depth_files(root, write, z_of=lambda z: z):
    """The own folder with other depth files: write(path without ending, z in metres)."""
    expected = own_folder(root)
    shutil.rmtree(root / "depth")
    (root / "depth").mkdir()
    for n, (z, _) in enumerate(expected):
        write(root / f"depth/{n:04d}", z_of(z.copy()))
    return [z for z, _ in expected]


def as_image(dtype, ending, **options):
    """Writes z as an image file: millimetres in integers, metres in floating point."""

    def write(path, z):
        z = z if np.dtype(dtype).kind == "f" else np.nan_to_num(np.round(z * 1000))
        Image.fromarray(z.astype(dtype)).save(f"{path}.{ending}", **options)

    return write


def as_array(dtype, shape=lambda z: z, save_array=np.save):
    def write(path, z):
        z = z if np.dtype(dtype).kind == "f" else np.nan_to_num(np.round(z * 1000))
        save_array(path, shape(z.astype(dtype)))

    return write


DEPTH_FILES = {
    "uint16 png": as_image(np.uint16, "png"),
    "uint16 tif": as_image(np.uint16, "tif"),
    "uint16 tiff lzw": as_image(np.uint16, "tiff", compression="tiff_lzw"),
    "big endian": as_image(">u2", "tif"),
    "int32 tif": as_image(np.int32, "tif"),
    "float32 tiff": as_image(np.float32, "tiff"),
    "float32 deflate": as_image(np.float32, "tif", compression="tiff_deflate"),
    **{f"{kind} npy": as_array(kind) for kind in (
        "uint16", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
        ">f4")},
    "1 H W": as_array(np.float32, lambda z: z[None]),
    "H W 1": as_array(np.uint16, lambda z: z[..., None]),
    "1 1 H W": as_array(np.float64, lambda z: z[None, None]),
    "npz": as_array(np.float32, save_array=np.savez),
    "npz packed": as_array(np.uint16, save_array=lambda p, z: np.savez_compressed(p, depth=z)),
}


@pytest.mark.parametrize("kind", DEPTH_FILES)
def test_depth_files(tmp_path, capfd, kind):
    """A file of floating-point numbers holds metres, one of integers millimetres; it is said which
    was assumed."""
    z = depth_files(tmp_path / "raw", DEPTH_FILES[kind])
    rows = prepared(tmp_path, "folder", tmp_path / "raw")
    assert len(rows) == 3
    for n, row in enumerate(rows):
        x, y = np.array(row["pixel_coords"]).T
        exact = euclidean(z[n], OWN_CAMERA)[y, x]
        assert np.abs(exact - row["depth"]).max() < (4e-3 if "float16" in kind else 1e-3)
    said = capfd.readouterr().out
    floats = "float" in kind or "f4" in kind or kind in ("1 H W", "1 1 H W", "npz")
    assert re.search(rf"3 depth files of \S+ are taken as {'metres' if floats else 'millimetres'}",
                     said), said
    prepared(tmp_path, "folder", tmp_path / "raw", "--depth-scale", 1 if floats else 1000, out="2")
    assert "taken as" not in capfd.readouterr().out
    assert records(tmp_path / "2") == rows


NOTHING = {
    "zero": (0, None), "uint16": (65535, "uint16"), "int16": (32767, "int16"),
    "negative int": (-1, "int16"), "lowest int": (-32768, "int16"),
    "int32": (2**31 - 1, "int32"), "uint32": (2**32 - 1, "uint32"), "int64": (2**63 - 1, "int64"),
    "uint64": (2**64 - 1, "uint64"), "65535 in int32": (65535, "int32"),
    "NaN": (np.nan, "float32"), "inf": (np.inf, "float32"), "-inf": (-np.inf, "float64"),
    "negative": (-1, "float32"), "the largest float32": (np.finfo(np.float32).max, "float32"),
    "the largest float16": (65504, "float16"), "1e10": (1e10, "float64"),
    "65535 in float": (65535, "float32"), "65.535": (65.535, "float32"),
    "65.535 in float64": (65.535, "float64"), "32.767": (32.767, "float32"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_depth_files_that_say_nothing(tmp_path, capfd, kind):
    """A third of the pixels hold what sensors and tools write where there is nothing: no label is
    there, and they are counted."""
    value, dtype = NOTHING[kind]

    def write(path, z):
        holed = z if np.dtype(dtype or "uint16").kind == "f" else np.round(z * 1000)
        holed = holed.astype(dtype or "uint16")
        holed[::3] = value
        np.save(path, holed)

    z = depth_files(tmp_path / "raw", write)
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--max-depth", 9999, "--points", 9999)
    for n, row in enumerate(rows):
        x, y = np.array(row["pixel_coords"]).T
        assert (y % 3 > 0).all() and len(x) == 80 * 40
        assert np.abs(euclidean(z[n], OWN_CAMERA)[y, x] - row["depth"]).max() < 4e-3
    said = capfd.readouterr().out
    assert f"{3 * 20 * 80:,} depth pixels hold nothing" in said, said
    assert "no faults found" in said


@pytest.mark.parametrize("write", [
    lambda path, z: np.save(path, np.stack([z] * 3, -1)),
    lambda path, z: np.save(path, z.astype(np.uint8)),
    lambda path, z: np.save(path, z > 3), lambda path, z: np.save(path, z.astype(complex)),
    lambda path, z: np.save(path, z.astype(object)), lambda path, z: np.save(path, z[0]),
    lambda path, z: np.savez(path, z, z), lambda path, z: np.save(path, z.astype("S4")),
    lambda path, z: Path(f"{path}.npy").write_bytes(b"\x93NUMPY"),
    lambda path, z: Image.fromarray(z.astype(np.uint8)).save(f"{path}.png"),
    lambda path, z: painted(z).save(f"{path}.png"), lambda path, z: painted(z).save(f"{path}.jpg"),
    lambda path, z: Path(f"{path}.exr").write_bytes(bytes(99))])
def test_files_that_are_no_depth(tmp_path, capfd, write):
    """Named, each, and nothing is written."""
    depth_files(tmp_path / "raw", write)
    code, _ = run(*folder_of(tmp_path))
    said = capfd.readouterr().err
    assert code == 2 and "depth/0000" in said and "Traceback" not in said, said
    assert not list((tmp_path / "out").glob("*.jsonl*"))


def folder_of(tmp_path):
    return ("--dataset", "folder", "--root", tmp_path / "raw", "--split", "val", "--out",
            tmp_path / "out")


UNITS = {
    "metres in integers": (1, np.uint16, (), "metres", 1),
    "centimetres in floats": (100, np.float32, (), "centimetres", 100),
    "millimetres in floats": (1000, np.float32, (), "millimetres", 1000),
    "micrometres": (1e6, np.float64, (), "micrometres", 1000000),
    "metres at 1000": (1, np.float32, ("--depth-scale", 1000), "metres", 1),
    "millimetres at 1": (1000, np.uint16, ("--depth-scale", 1), "millimetres", 1000),
    "millimetres at 1, near": (1000, np.uint16, ("--depth-scale", 1, "--max-depth", 10),
                               "millimetres", 1000),
}


@pytest.mark.parametrize("case", UNITS)
def test_depth_in_another_unit(tmp_path, capfd, case):
    """The median says that the unit is another: the error names it and the flag, before anything is
    written, and with that flag it works."""
    factor, dtype, flags, unit, scale = UNITS[case]

    def write(path, z):
        np.save(path, (z * factor).astype(dtype))

    z = depth_files(tmp_path / "raw", write, lambda z: z + 0.5 if factor != 100 else z + 3)
    code, _ = run(*folder_of(tmp_path), *flags)
    said = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and f"{unit}? Give --depth-scale {scale}" in said, said
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [
        tmp_path / "out/.val.lock/.lock"]
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--depth-scale", scale)
    assert np.median(rows[0]["depth"]) == pytest.approx(np.median(z[0]) + 1, abs=3)


def test_far_depth_is_no_other_unit(tmp_path):
    """A drone sees 120 to 180 m; beyond 200 m it needs a word."""
    depth_files(tmp_path / "raw", as_array(np.float32), lambda z: 30 * z + 80)
    rows = prepared(tmp_path, "folder", tmp_path / "raw")
    assert 120 < np.median(rows[0]["depth"]) < 200
    depth_files(tmp_path / "raw", as_array(np.float32), lambda z: 30 * z + 380)
    assert run(*folder_of(tmp_path), "--overwrite")[0] == 2
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--max-depth", 900, "--overwrite")
    assert np.median(rows[0]["depth"]) > 400


# ---- your own data, as it is in life ----


def pose_of(n):
    return rigid(rotation([1, 2, 3], 0.3 + n), [1.5, n, -2])


def is_own(tmp_path, rows, expected, poses=None):
    """All frames, each with its own photo (red is depth), depth and pose."""
    assert len(rows) == len(expected)
    for n, row in enumerate(rows):
        z, exact = expected[n]
        is_dense(tmp_path / "out", row, exact, OWN_CAMERA, z)
        if poses:
            is_pose(row, poses(n))


OWN_LAYOUTS = {  # where photo, depth, pose and intrinsics of number n are
    "folders": ("rgb/{n}.png", "depth/{n}.png", "poses/{n}.txt", "intrinsics.txt"),
    "7-Scenes": ("frame-{n}.color.png", "frame-{n}.depth.png", "frame-{n}.pose.txt",
                 "intrinsics.txt"),
    "ScanNet": ("color/{n}.png", "depth/{n}.png", "pose/{n}.txt", "intrinsic/intrinsic_color.txt"),
    "prefixes": ("rgb_{n}.png", "depth_{n}.png", "pose_{n}.txt", "intrinsics.txt"),
    "no separator": ("image{n}.png", "depth{n}.png", "pose{n}.txt", "intrinsics.txt"),
    "plain photos": ("{n}.png", "{n}_depth.png", "{n}_pose.txt", "intrinsics.txt"),
    "words": ("color_images/image_{n}.png", "depth_images/depth_{n}.png", "poses/pose_{n}.txt",
              "intrinsics.txt"),
    "each its own camera": ("rgb/{n}.png", "depth/{n}.png", "poses/{n}.txt", "intrinsics/{n}.txt"),
}


def relaid(root, layout, expected):
    """An own folder in another layout."""
    image, depth, pose, camera = OWN_LAYOUTS[layout]
    moved = root.with_name("moved")
    for n in range(len(expected)):
        for old, new in (f"rgb/{n:04d}.png", image), (f"depth/{n:04d}.png", depth):
            to = moved / new.format(n=f"{n:04d}")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / old, to)
        fx, fy, cx, cy = OWN_CAMERA[:4]
        k = np.array([[fx, 0, cx, 0], [0, fy, cy, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        for name, numbers in (pose, pose_of(n)), (camera, k):
            to = moved / name.format(n=f"{n:04d}")
            to.parent.mkdir(parents=True, exist_ok=True)
            np.savetxt(to, numbers)
    shutil.rmtree(root)
    moved.rename(root)


@pytest.mark.parametrize("layout", OWN_LAYOUTS)
@pytest.mark.parametrize("scenes", [False, True], ids=["one", "scenes"])
def test_own_layouts(tmp_path, layout, scenes):
    """The common namings, of one scan or of one in a folder of scans."""
    room = tmp_path / "raw" / ("room" * scenes)
    expected = own_folder(room)
    relaid(room, layout, expected)
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--points", 100)
    is_own(tmp_path, rows, expected, pose_of)
    assert {row.get("scene") for row in rows} == {"room" if scenes else None}


def test_own_camera_of_each_photo(tmp_path):
    """intrinsics/<name>.txt goes before intrinsics.txt, --intrinsics before both."""
    own_folder(tmp_path / "raw")
    (tmp_path / "raw/intrinsics").mkdir()
    (tmp_path / "raw/intrinsics/0001.txt").write_text("75 76 40 30")
    cameras = [row["intrinsics"][:4] for row in prepared(tmp_path, "folder", tmp_path / "raw")]
    assert cameras == [OWN_CAMERA[:4], [75, 76, 40, 30], OWN_CAMERA[:4]]
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--intrinsics", "65,66,40,30", out="2")
    assert {tuple(row["intrinsics"][:4]) for row in rows} == {(65, 66, 40, 30)}


@pytest.mark.parametrize("size", [(320, 240), (100, 75), (40, 30), (30, 22)])
@pytest.mark.parametrize("kind", ["z", "euclidean"])
def test_own_depth_of_another_resolution(tmp_path, capfd, size, kind):
    """A phone's depth is smaller than its photo; a photo may have been shrunk. A depth pixel's
    centre lies on the same ray as the photo's pixel that is labelled, within half of one."""
    w, h = size
    camera = [0.9 * w, 0.9 * w, (w - 1) / 2, (h - 1) / 2, w, h]
    own_folder(tmp_path / "raw", hole=False, kind=kind, camera=[72, 72, 39.5, 29.5, 80, 60])
    (tmp_path / "raw/intrinsics.txt").write_text(" ".join(map(str, camera[:4])))
    for path in (tmp_path / "raw/rgb").iterdir():
        Image.open(path).resize(size).save(path)
    for n, row in enumerate(prepared(tmp_path, "folder", tmp_path / "raw", "--depth-type", kind,
                                     "--points", 9999)):
        assert len(row["depth"]) == min(80 * 60, w * h)
        stored = np.asarray(Image.open(tmp_path / f"raw/depth/{n:04d}.png")) / 1000
        x, y = np.array(row["pixel_coords"]).T
        d = np.array(row["depth"])
        if kind == "z":
            d = d / np.sqrt(1 + ((x - camera[2]) / camera[0]) ** 2 +
                            ((y - camera[3]) / camera[1]) ** 2)
        near = np.full(len(d), np.inf)
        for i in (-1, 0, 1):  # among the depth pixels whose centre is that near
            for j in (-1, 0, 1):
                u = np.round((x + 0.5) * 80 / w - 0.5).astype(int) + i
                v = np.round((y + 0.5) * 60 / h - 0.5).astype(int) + j
                far = np.maximum(np.abs((u + 0.5) * w / 80 - 0.5 - x),
                                 np.abs((v + 0.5) * h / 60 - 0.5 - y))
                fits = (far <= 0.5 + 1e-9) & (u >= 0) & (v >= 0) & (u < 80) & (v < 60)
                off = np.abs(stored[v.clip(0, 59), u.clip(0, 79)] - d)
                near = np.where(fits, np.minimum(near, off), near)
        assert near.max() < 2e-4
    assert f"depth maps of 80 x 60 px are of images of {w} x {h}" in capfd.readouterr().out


@pytest.mark.parametrize("size", [(80, 58), (120, 80), (60, 80)])
def test_own_depth_of_another_view(tmp_path, capfd, size):
    """Cropped, or turned: refused, and told."""
    own_folder(tmp_path / "raw")
    for path in (tmp_path / "raw/rgb").iterdir():
        Image.open(path).resize(size).save(path)
    code, _ = run(*folder_of(tmp_path), "--intrinsics",
                  f"70,70,{(size[0] - 1) / 2},{(size[1] - 1) / 2}")
    said = capfd.readouterr().err
    assert code == 2 and "depth map of 80 x 60, image of" in said and "Crop both alike" in said


def test_own_phone_photo_stored_sideways(tmp_path):
    """A portrait photo, stored in landscape and turned by EXIF; its depth is upright and small."""
    w, h = 120, 160
    (tmp_path / "raw/rgb").mkdir(parents=True)
    (tmp_path / "raw/depth").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    z = ramp(30, 40, base=2)
    photo = painted(z).resize((w, h), Image.Resampling.NEAREST)
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "raw/rgb/a.png", exif=exif)
    save_depth(np.round(z * 1000), tmp_path / "raw/depth/a.png")
    code, message = run(*folder_of(tmp_path), "--intrinsics", "130,130,59.5,79.5")
    assert code == 0, message
    (row,) = records(tmp_path / "out")
    assert row["orientation"] == "upright" and row["intrinsics"][4:] == [w, h]
    x, y = np.array(row["pixel_coords"]).T
    rays = np.sqrt(1 + ((x - 59.5) / 130) ** 2 + ((y - 79.5) / 130) ** 2)
    assert np.abs(z[y // 4, x // 4] - row["depth"] / rays).max() < 1e-3


def test_own_lidar(tmp_path):
    """Points (N, 3) or (N, 4) in camera axes, in metres: labels where they are seen, and the nearer
    one of two."""
    own_folder(tmp_path / "raw", count=2)
    fx, fy, cx, cy, w, h = OWN_CAMERA
    rng, clouds = np.random.default_rng(0), []
    for n, columns in enumerate((3, 4)):
        (tmp_path / f"raw/depth/{n:04d}.png").unlink()
        points = rng.uniform((-3, -2, -5, 0), (3, 2, 12, 1), (900, 4))
        points[0] = 0, 0, 0, np.nan
        np.save(tmp_path / f"raw/depth/{n:04d}.npy", points[:, :columns])
        clouds.append(points[points[:, 2] > 0, :3])
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--points", 500)
    for cloud, row in zip(clouds, rows):
        place = np.round(cloud[:, :2] / cloud[:, 2:] * (fx, fy) + (cx, cy))
        far = np.linalg.norm(cloud, axis=1)
        for (x, y), d in zip(row["pixel_coords"], row["depth"]):
            assert d == pytest.approx(far[(place == (x, y)).all(1)].min(), abs=1e-4)
        assert len(row["depth"]) > 100


@pytest.mark.parametrize("form", ["{:.6f}", "{:.0f}", "ms", "us", "ns"])
def test_own_time_stamps(tmp_path, capfd, form):
    """Photos at 30 Hz, depth at 15 Hz and some ms late, poses at 100 Hz: each photo has the depth
    and pose nearest to it, and one that has no depth within 20 ms is left out, not a fault."""
    raw, start = tmp_path / "raw", 1305031102
    step = 1 if form == "{:.0f}" else 1 / 30
    expected = own_folder(tmp_path / "own", count=6)

    def name(time):
        digits = {"ms": 1e3, "us": 1e6, "ns": 1e9}
        return f"{round(time * digits[form])}" if form in digits else form.format(time)

    for part in ("rgb", "depth"):
        (raw / part).mkdir(parents=True)
    shutil.copy(tmp_path / "own/intrinsics.txt", raw)
    late = 0 if step == 1 else 0.012
    for n in range(6):
        shutil.copy(tmp_path / f"own/rgb/{n:04d}.png", raw / f"rgb/{name(start + n * step)}.png")
        if n % 2 == 0:
            shutil.copy(tmp_path / f"own/depth/{n:04d}.png",
                        raw / f"depth/{name(start + n * step + late)}.png")
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for n in range(6):
        w, x, y, z = quaternion(pose_of(n / 10))
        for shift in (0.004, 0.015):  # the nearer one is right
            t = pose_of(n / 10)[:3, 3] + (shift > 0.01)
            lines.append(f"{start + n * step + shift:.6f} {t[0]} {t[1]} {t[2]} {x} {y} {z} {w}")
    (raw / "groundtruth.txt").write_text("\n".join(lines))
    rows = prepared(tmp_path, "folder", raw)
    is_own(tmp_path, rows, expected[::2], lambda n: pose_of(2 * n / 10))
    assert [row["time"] for row in rows] == pytest.approx(
        [start + n * step for n in (0, 2, 4)], abs=6e-4)
    said = capfd.readouterr()
    assert "3 of 6 photos have depth within 0.02 s" in said.err and "WARNING" not in said.err


def test_own_frame_numbers_are_no_times(tmp_path):
    """Number 7 never takes the depth of number 8."""
    own_folder(tmp_path / "raw", count=4)
    (tmp_path / "raw/depth/0002.png").rename(tmp_path / "raw/depth/0009.png")
    assert len(prepared(tmp_path, "folder", tmp_path / "raw")) == 3


def transforms_scan(root, change=lambda content: None):
    """nerfstudio's form of an own folder: OpenGL poses, cx and cy from the image's corner."""
    expected = own_folder(root)
    fx, fy, cx, cy, w, h = OWN_CAMERA
    (root / "intrinsics.txt").unlink()
    (root / "rgb").rename(root / "images")
    (root / "depth").rename(root / "maps")
    content = {"camera_model": "OPENCV", "k1": 0.0, "k2": 0, "p1": 0.0, "fl_x": fx, "fl_y": fy,
               "cx": cx + 0.5, "cy": cy + 0.5, "w": w, "h": h, "frames": [
                   {"file_path": f"images/{n:04d}.png", "depth_file_path": f"maps/{n:04d}.png",
                    "transform_matrix": (pose_of(n) @ np.diag([1, -1, -1, 1])).tolist()}
                   for n in (2, 0, 1)]}
    change(content)
    (root / "transforms.json").write_text(json.dumps(content))
    return [expected[n] for n in (2, 0, 1)]


def per_frame(content):
    for frame in content["frames"]:
        frame |= {key: content[key] for key in "fl_x fl_y cx cy w h".split()}
    content |= {"fl_x": 1, "cx": 1}


def by_name(content):
    """Depth beside the photos, in a folder that is named so."""
    for frame in content["frames"]:
        frame.pop("depth_file_path")


@pytest.mark.parametrize("change", [lambda content: None, per_frame, by_name,
                                    lambda content: [content.pop(key) for key in "wh"]])
@pytest.mark.parametrize("scenes", [False, True], ids=["one", "scenes"])
def test_transforms_json(tmp_path, change, scenes):
    root = tmp_path / "raw" / ("room" * scenes)
    expected = transforms_scan(root, change)
    if change is by_name:
        (root / "maps").rename(root / "depth")
    rows = prepared(tmp_path, "folder", tmp_path / "raw")
    is_own(tmp_path, rows, expected, lambda n: pose_of((2, 0, 1)[n]))


@pytest.mark.parametrize("lens", [{"k1": 0.01}, {"p2": -1e-3}, {"k4": 0.2},
                                  {"camera_model": "OPENCV_FISHEYE"}])
@pytest.mark.parametrize("each", [False, True])
def test_distortion_is_refused(tmp_path, capfd, lens, each):
    def change(content):
        (content["frames"][1] if each else content).update(lens)

    transforms_scan(tmp_path / "raw", change)
    code, _ = run(*folder_of(tmp_path))
    said = capfd.readouterr().err
    assert "transforms.json: a lens with distortion" in said and "Undistort first" in said
    assert code == (0 if each else 2)  # the photos before the one that says so are prepared


@pytest.mark.parametrize("cameras, works", [
    ("1 PINHOLE 80 60 70 71 40 30", True), ("1 SIMPLE_PINHOLE 80 60 70 40 30", True),
    ("1 SIMPLE_RADIAL 80 60 70 40 30 0.1", False), ("1 OPENCV 80 60 70 71 40 30 0 0 0 0", False),
    ("1 PINHOLE 80 60 70 71 40 30\n2 PINHOLE 80 60 70 71 40 30", False)])
@pytest.mark.parametrize("place", ["", "sparse/0"])
def test_colmap_camera(tmp_path, capfd, cameras, works, place):
    """One camera for all photos, from its text; cx and cy from the corner."""
    own_folder(tmp_path / "raw")
    (tmp_path / "raw/intrinsics.txt").unlink()
    (tmp_path / "raw" / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "raw" / place / "cameras.txt").write_text(f"# Camera list\n#\n{cameras}\n\n")
    code, _ = run(*folder_of(tmp_path))
    said = capfd.readouterr().err
    assert code == (0 if works else 2), said
    if works:
        fy = 70 if "SIMPLE" in cameras else 71
        assert records(tmp_path / "out")[0]["intrinsics"] == [70, fy, 39.5, 29.5, 80, 60]
    else:
        assert "one camera without distortion" in said and "Undistort first" in said


def test_name_of_the_set(tmp_path, monkeypatch):
    """data/<root's name>, or --name."""
    own_folder(tmp_path / "scans/kitchen")
    monkeypatch.chdir(tmp_path)
    for flags, name in (("scans/kitchen", ), "kitchen"), (("scans/kitchen", "--name", "a"), "a"):
        assert run("--dataset", "folder", "--root", *flags)[0] == 0
        assert len(records(f"data/{name}", "train")) == 3
    monkeypatch.chdir(tmp_path / "scans/kitchen")
    assert run("--dataset", "folder", "--root", ".")[0] == 0
    assert len(records("data/kitchen", "train")) == 3
