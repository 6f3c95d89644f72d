"""prepare.py beyond the readers: sampling, workers, shards, resume, index, --check, --download, bad
input, toy."""

import http.server
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare_readers import (
    NUSC_CAMERA,
    OPENCV_IN_VEHICLE,
    ROOT,
    apply,
    argoverse_log,
    brown_conrady,
    ddad_root,
    eth3d_root,
    euclidean,
    ibims_root,
    is_pose,
    matterport_house,
    nuscenes_root,
    omnidata_root,
    own_folder,
    painted,
    prepare,
    prepared,
    ramp,
    records,
    rigid,
    run,
    save,
    save_depth,
    scannetpp_scene,
    scannetpp_splits,
    sun_scene,
    waymo_root,
    well_formed,
)

import render

SHARED = ROOT.parent / "shared"


# ---- sampling ----


def test_depth_limits_are_euclidean(tmp_path):
    """--min-depth and --max-depth cut the label, not z: in a corner the two differ."""
    own_folder(tmp_path / "raw", count=1, camera=[30.0, 30.0, 39.5, 29.5, 80, 60])
    (row,) = prepared(
        tmp_path,
        "folder",
        tmp_path / "raw",
        "--min-depth",
        4.2,
        "--max-depth",
        5,
        "--points",
        100000,
    )
    _, exact = own_folder(tmp_path / "again", count=1, camera=[30.0, 30.0, 39.5, 29.5, 80, 60])[0]
    inside = (exact >= 4.2) & (exact <= 5)
    assert len(row["depth"]) == inside.sum() > 100
    assert 4.2 <= min(row["depth"]) and max(row["depth"]) <= 5


def test_points_and_seed(tmp_path):
    """100 points by default, another seed draws others, the draw is spread over the image."""
    own_folder(tmp_path / "raw", count=1, hole=False)
    (row,) = prepared(tmp_path, "folder", tmp_path / "raw")
    (other,) = prepared(tmp_path, "folder", tmp_path / "raw", "--seed", 1, out="other")
    (few,) = prepared(tmp_path, "folder", tmp_path / "raw", "--points", 12, out="few")
    assert (
        len(row["depth"]) == len(other["depth"]) == 100
        and row["pixel_coords"] != other["pixel_coords"]
    )
    halves = np.array(row["pixel_coords"]) < [40, 30]
    assert (np.abs(halves.mean(0) - 0.5) < 0.2).all()  # 4 standard deviations of a fair draw
    assert len(few["depth"]) == 12


def test_few_valid_points(tmp_path):
    """40 valid pixels give 40 labels; 3 or none give no record; the run says so and goes on."""
    own_folder(tmp_path / "raw", count=4, hole=False)
    for n, keep in ((1, 40), (2, 3), (3, 0)):
        f = tmp_path / f"raw/depth/{n:04d}.png"
        raw = np.array(Image.open(f)).astype(np.uint16)
        raw.ravel()[keep:] = 0
        save_depth(raw, f)
    rows = prepared(tmp_path, "folder", tmp_path / "raw")
    assert [len(r["depth"]) for r in rows] == [100, 40]


def test_zero_valid_points_at_all(tmp_path, capfd):
    """A folder in which no picture has a valid depth ends in an error, not in an empty file."""
    own_folder(tmp_path / "raw", count=3)
    for f in (tmp_path / "raw/depth").iterdir():
        save_depth(np.zeros((60, 80)), f)
    code, message = run(
        "--dataset",
        "folder",
        "--root",
        tmp_path / "raw",
        "--split",
        "val",
        "--out",
        tmp_path / "out",
    )
    assert code != 0 and not (tmp_path / "out/val.jsonl").exists()
    assert "depth" in (message + capfd.readouterr().err).lower()


def test_the_nearest_point_of_a_pixel():
    """Of several points at one pixel the nearest is the label, whatever their order."""
    near, far, other = [3.2, 4.1, 5.0, 4.9], [2.9, 3.8, 9.0, 8.9], [7.0, 1.0, 6.0, 5.5]
    for cloud in ([near, far, other], [far, other, near]):
        x, y, euclidean, z = prepare.cloud_labels(np.array(cloud), False, (9, 9, 4, 3, 9, 7))
        found = sorted(zip(x.tolist(), y.tolist(), euclidean.tolist(), z.tolist()))
        assert found == [(3, 4, 5.0, 4.9), (7, 1, 6.0, 5.5)]


def test_occlusion(tmp_path):
    """Points 25 m behind a near patch go with --occlusion; the patch itself and the far points
    beside it stay."""
    fx, fy, cx, cy, w, h = NUSC_CAMERA

    def at(u, v, z):
        return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], 1) * z

    u, v = (
        a.ravel().astype(float) for a in np.meshgrid(np.arange(100, 200, 2), np.arange(60, 160, 2))
    )
    hidden_u, hidden_v = (
        a.ravel() + 0.0 for a in np.meshgrid(np.arange(111, 190, 6), np.arange(71, 150, 6))
    )
    free_u, free_v = (
        a.ravel() + 0.0 for a in np.meshgrid(np.arange(250, 380, 6), np.arange(20, 200, 6))
    )
    near, hidden, free = at(u, v, 5.0), at(hidden_u, hidden_v, 30.0), at(free_u, free_v, 30.0)
    nuscenes_root(tmp_path / "raw", ("scene-0103",), cloud=np.concatenate([near, hidden, free]))
    (row,) = prepared(tmp_path, "nuscenes", tmp_path / "raw", "--points", 100000)
    assert len(row["depth"]) == len(near) + len(hidden) + len(free)
    (row,) = prepared(
        tmp_path, "nuscenes", tmp_path / "raw", "--points", 100000, "--occlusion", out="open"
    )
    xy, d = np.array(row["pixel_coords"]), np.array(row["depth"])
    assert (
        (d < 8).sum() == len(near) and (d > 20).sum() == len(free) and (xy[d > 20, 0] > 220).all()
    )


def test_stride_and_limit(tmp_path):
    """--stride takes every k-th frame, --limit stops after so many."""
    own_folder(tmp_path / "raw", count=9)
    rows = prepared(tmp_path, "folder", tmp_path / "raw", "--stride", 4)
    assert [Path(r["image"]).stem for r in rows] == ["0000", "0004", "0008"]
    assert len(prepared(tmp_path, "folder", tmp_path / "raw", "--limit", 2, out="two")) == 2


# ---- bytes: workers, index ----


def folder_flags(raw, out):
    """The command that prepares an RGB-D folder as val."""
    return ("--dataset", "folder", "--root", raw, "--split", "val", "--out", out)


def in_process(*args, cwd):
    """`python prepare.py ...` in a process of its own."""
    command = [sys.executable, ROOT / "prepare.py", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_same_bytes_for_any_number_of_workers(tmp_path):
    """Sampling is a function of (seed, image), so workers cannot change the file."""
    own_folder(tmp_path / "raw", count=70)
    for workers in (1, 2):
        prepared(tmp_path, "folder", tmp_path / "raw", "--workers", workers, out=f"out{workers}")
    assert (tmp_path / "out1/val.jsonl").read_bytes() == (tmp_path / "out2/val.jsonl").read_bytes()


def test_index(tmp_path):
    """.idx: int64 start of each line and the file size at the end."""
    own_folder(tmp_path / "raw", count=5)
    rows = prepared(tmp_path, "folder", tmp_path / "raw")
    data = (tmp_path / "out/val.jsonl").read_bytes()
    offsets = np.fromfile(tmp_path / "out/val.idx", np.int64)
    assert len(offsets) == 6 and offsets[-1] == len(data)
    assert [json.loads(data[a:b]) for a, b in zip(offsets, offsets[1:])] == rows


@pytest.mark.parametrize("count", [2, 3])
def test_shards_joined_are_the_whole(tmp_path, count):
    """The parts, joined in order, are the bytes of the unsharded run."""
    own_folder(tmp_path / "raw", count=23)
    flags = ("--dataset", "folder", "--root", tmp_path / "raw", "--split", "val", "--workers", 1)
    assert run(*flags, "--out", tmp_path / "out")[0] == 0
    first = 0 if run(*flags, "--out", tmp_path / "parts", "--shard", f"0/{count}")[0] == 0 else 1
    for i in range(first, first + count):
        assert run(*flags, "--out", tmp_path / "parts", "--shard", f"{i}/{count}")[0] == 0
    parts = sorted((tmp_path / "parts").glob("val*.jsonl"))
    assert len(parts) == count and all(p.stat().st_size for p in parts)
    assert b"".join(p.read_bytes() for p in parts) == (tmp_path / "out/val.jsonl").read_bytes()
    for beyond in (first + count, -1):
        assert run(*flags, "--out", tmp_path / "beyond", "--shard", f"{beyond}/{count}")[0] != 0


def test_other_flags_do_not_overwrite(tmp_path, capfd):
    """The same command again keeps the file; another one into the same folder is refused, with the
    remedy."""
    own_folder(tmp_path / "raw", count=3)
    flags = folder_flags(tmp_path / "raw", tmp_path / "out")
    assert run(*flags)[0] == 0
    before = (tmp_path / "out/val.jsonl").read_bytes()
    assert run(*flags)[0] == 0 and (tmp_path / "out/val.jsonl").read_bytes() == before
    code, said = outcome(capfd, *flags, "--points", 30)
    assert code != 0 and "--o" in said and (tmp_path / "out/val.jsonl").read_bytes() == before


def test_command_line_equals_main(tmp_path):
    """`python prepare.py ...` writes what prepare.main([...]) writes."""
    own_folder(tmp_path / "raw", count=2)
    prepared(tmp_path, "folder", tmp_path / "raw")
    done = in_process(*folder_flags(tmp_path / "raw", tmp_path / "cli"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "out/val.jsonl").read_bytes()
    assert (tmp_path / "cli/val.jsonl").read_bytes() == whole


def test_run_json(tmp_path):
    """One schema for all scripts (script, flags, git, versions), what decides the content, and how
    far it got."""
    own_folder(tmp_path / "raw", count=4, hole=False)
    save_depth(np.zeros((60, 80)), tmp_path / "raw/depth/0001.png")
    (tmp_path / "raw/rgb/0002.png").unlink()
    flags = folder_flags(tmp_path / "raw", tmp_path / "out")
    done = in_process(*flags, "--points", 30, "--depth-scale", 500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "out/val.run.json").read_text())
    assert info["script"] == "prepare.py"
    assert info["flags"]["points"] == 30 and info["flags"]["workers"] >= 1
    assert set(info["versions"]) == {"torch", "transformers", "numpy", "pillow", "python"}
    assert info["git"] is None or re.fullmatch("[0-9a-f]{40}", info["git"])
    assert info["inputs"] == {
        "dataset": "folder",
        "split": "val",
        "root": str(tmp_path / "raw"),
        "limits": [0.1, 200],
        "points": 30,
        "seed": 0,
        "occlusion": False,
        "paper_labels": False,
        "stride": None,
        "limit": None,
        "shard": [1, 1],
        "intrinsics": None,
        "depth_scale": 500.0,
        "depth_type": "z",
    }
    size = (tmp_path / "out/val.jsonl").stat().st_size
    progress = {"finished": True, "frames": 4, "records": 2, "bad": 1, "bytes": size}
    assert {key: info[key] for key in progress} == progress
    assert len(info["bad_examples"]) == 1 and "0002" in info["bad_examples"][0]
    assert not (tmp_path / "out/val.jsonl.partial").exists()


def test_table_names_flags_that_exist():
    """A row's flags are flags of the command line and arguments of its reader; --dataset offers the
    rows."""
    args = vars(prepare.parse_args(["--dataset", "toy"]))
    for name, row in prepare.DATASETS.items():
        wanted = list(inspect.signature(row.reader).parameters)
        assert wanted == ["root", "split", *row.flags.split()], name
        assert set(row.flags.split()) <= set(args), name
        assert name == "toy" or ("http" in row.get) == (name != "folder")


def counting_reader(monkeypatch, calls, loads):
    """The folder dataset in chunks of 4; calls and loads collect what is listed and what is
    loaded."""
    row = prepare.DATASETS["folder"]

    def load(frame, inner):
        loads.append(frame.id)
        return inner(frame)

    def reader(root, split, **flags):
        calls.append(split)
        for frame in row.reader(root, split, **flags):
            yield frame._replace(load=lambda f, inner=frame.load: load(f, inner))

    monkeypatch.setitem(prepare.DATASETS, "folder", row._replace(reader=reader, chunk=4))


def test_dataset_is_listed_once(tmp_path, monkeypatch):
    """Listing takes minutes for a large dataset: once a run, whether it starts, resumes or makes a
    shard, and never if the file is finished. A resumed run loads the rest only."""
    own_folder(tmp_path / "raw", count=11)
    prepared(tmp_path, "folder", tmp_path / "raw", out="whole")
    calls, loads = [], []
    counting_reader(monkeypatch, calls, loads)
    flags = folder_flags(tmp_path / "raw", tmp_path / "out")

    def interrupted(frames, make):
        if frames[0].id == "0008":
            raise KeyboardInterrupt
        return make_chunk(frames, make=make)

    make_chunk = prepare.make_chunk
    monkeypatch.setattr(prepare, "make_chunk", interrupted)
    assert run(*flags)[0] == 130 and len(calls) == 1 and len(loads) == 8
    state = json.loads((tmp_path / "out/val.run.json").read_text())
    assert (state["finished"], state["frames"], state["records"]) == (False, 8, 8)

    monkeypatch.setattr(prepare, "make_chunk", make_chunk)
    assert run(*flags)[0] == 0 and len(calls) == 2
    assert loads[8:] == ["0008", "0009", "0010"]
    whole = (tmp_path / "whole/val.jsonl").read_bytes()
    assert (tmp_path / "out/val.jsonl").read_bytes() == whole
    assert run(*flags)[0] == 0 and len(calls) == 2
    assert run(*flags, "--shard", "2/3")[0] == 0 and len(calls) == 3
    assert loads[11:] == ["0003", "0004", "0005", "0006"]


HELD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import prepare
list_frames = prepare.list_frames
def held(inputs):
    Path({out!r}, "started").touch()
    while not Path({out!r}, "go").exists():
        time.sleep(0.01)
    return list_frames(inputs)
prepare.list_frames = held
prepare.main({flags!r})
"""


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--points", 20]])
def test_two_runs_of_one_file(tmp_path, more):
    """While a run works (here it is held while it lists), a second one of the same file ends in one
    line, before it has read or written anything; a run of the other split is free to work beside
    it. The file is that of a single run."""
    own_folder(tmp_path / "raw", count=5)
    prepared(tmp_path, "folder", tmp_path / "raw", out="whole")
    out = tmp_path / "out"
    out.mkdir()
    flags = [str(word) for word in folder_flags(tmp_path / "raw", out)]
    code = HELD.format(root=str(ROOT), out=str(out), flags=flags)
    first = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        while not (out / "started").exists():
            assert first.poll() is None
            time.sleep(0.01)
        before = contents(out)
        second = in_process(*flags, *more, cwd=tmp_path)
        assert second.returncode == 2 and contents(out) == before
        assert len(second.stderr.splitlines()) == 1, second.stderr
        assert "another run" in second.stderr and str(out) in second.stderr
        assert run(*flags, "--split", "train")[0] == 0
    finally:
        (out / "go").touch()
    assert first.wait(60) == 0
    for name in ("val.jsonl", "val.idx"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert records(out, "train") == records(out)
    assert run(*flags)[0] == 0  # nobody is in it any more


def contents(folder):
    """All files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- toy rooms ----


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    code, message = run(
        "--dataset", "toy", "--out", out, "--images", 40, "--val-images", 40, "--workers", 1
    )
    assert code == 0, message
    return out


def world(row):
    """World points of a record's labels: pinhole ray of length `depth`, through the pose."""
    fx, fy, cx, cy = row["intrinsics"][:4]
    x, y = np.array(row["pixel_coords"], float).T
    r = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones_like(x)], 1)
    m = np.array(row["pose"]).reshape(4, 4)
    return (r / np.linalg.norm(r, axis=1, keepdims=True) * np.array(row["depth"])[:, None]) @ m[
        :3, :3
    ].T + m[:3, 3]


def test_toy_is_deterministic(tmp_path, toy):
    """The same seed gives the same labels and pictures, another one other rooms."""
    flags = ("--dataset", "toy", "--split", "val", "--val-images", 10, "--workers", 1)
    assert (
        run(*flags, "--out", tmp_path / "a")[0]
        == run(*flags, "--out", tmp_path / "b", "--seed", 5)[0]
        == 0
    )
    a, whole, b = records(tmp_path / "a"), records(toy), records(tmp_path / "b")
    assert a == whole[:10] and a != b
    for row in a:
        assert (tmp_path / "a" / row["image"]).read_bytes() == (toy / row["image"]).read_bytes()


def test_toy_records(toy):
    """Well formed; train and val share no room; at least 3 focal lengths and 3 sizes; several views
    a room."""
    train, val = records(toy, "train"), records(toy, "val")
    assert len(train) == len(val) == 40
    for row in train + val:
        well_formed(toy, row)
    rooms = [{r["scene"] for r in rows} for rows in (train, val)]
    assert not rooms[0] & rooms[1] and len(rooms[0]) <= 20
    assert len({round(r["intrinsics"][0]) for r in train}) >= 3
    assert len({tuple(r["intrinsics"][4:]) for r in train}) >= 3


def test_toy_lamp(toy):
    """The lamp is on the camera: brightness falls with distance, in all rooms alike (a metric
    cue)."""
    light, depth = [], []
    for row in records(toy, "train"):
        xy = np.array(row["pixel_coords"])
        light.append(
            np.asarray(Image.open(toy / row["image"]).convert("RGB")).max(-1)[xy[:, 1], xy[:, 0]]
        )
        depth.append(np.log(row["depth"]))
    assert np.corrcoef(np.concatenate(light), np.concatenate(depth))[0, 1] < -0.8


def test_toy_labels_lie_on_the_walls(toy):
    """Back-projected labels of all views of a room lie on few axis-parallel planes; z in their
    place would not."""

    def on_planes(points):
        hit = np.zeros(len(points), bool)
        for axis in range(3):
            c = points[:, axis]
            hit |= (np.abs(c[:, None] - c[None]) < 2e-3).sum(1) > 0.015 * len(c)
        return hit.mean()

    rows = records(toy, "train")
    for scene in sorted({r["scene"] for r in rows})[:5]:
        views = [r for r in rows if r["scene"] == scene]
        right = on_planes(np.concatenate([world(r) for r in views]))
        wrong = on_planes(np.concatenate([world({**r, "depth": as_z(r)}) for r in views]))
        assert right > 0.97 and wrong < 0.8


def test_toy_views_agree(toy):
    """Most points of a view lie on planes on which the other views of the room have points too: the
    poses are right."""
    rows = records(toy, "val")
    for scene in sorted({r["scene"] for r in rows})[:6]:
        clouds = [world(r) for r in rows if r["scene"] == scene]
        eyes = np.array([r["pose"] for r in rows if r["scene"] == scene]).reshape(-1, 4, 4)[
            :, :3, 3
        ]
        assert len(clouds) >= 3 and np.ptp(eyes, axis=0).max() > 0.1
        for k, cloud in enumerate(clouds):
            others = np.concatenate(clouds[:k] + clouds[k + 1 :])
            shared = (np.abs(cloud[:, None] - others[None]) < 2e-3).sum(
                1
            ) >= 5  # (points, 3): a plane per axis
            assert shared.any(1).mean() > 0.6


def test_toy_lenses_in_daylight(tmp_path):
    """Images of one size and of all four focal lengths; the floor is 1.5 m below each camera, and
    brightness tells no distance."""
    flags = "--dataset toy --images 60 --val-images 5 --light ambient".split()
    flags += ["--focals", 80, 100, 133.3333, 200, "--out", tmp_path]
    code, message = run(*flags)
    assert code == 0, message
    assert run("--dataset", "toy", "--focals", 80, -1)[0] == 2
    rows = records(tmp_path, "train")
    assert {tuple(r["intrinsics"][4:]) for r in rows} == {(112, 112)}
    assert {(round(r["intrinsics"][0]), round(r["intrinsics"][1])) for r in rows} == {
        (f, f) for f in (80, 100, 133, 200)
    }
    assert all(r["pose"][11] == 1.5 and abs(min(0, world(r)[:, 2].min())) < 2e-3 for r in rows)
    assert min(world(r)[:, 2].min() for r in rows) == pytest.approx(0, abs=2e-3)
    light, depth = zip(
        *(
            (
                np.asarray(Image.open(tmp_path / r["image"]).convert("RGB")).max(-1)[
                    tuple(np.array(r["pixel_coords"]).T[::-1])
                ],
                np.log(r["depth"]),
            )
            for r in rows
        )
    )
    assert abs(np.corrcoef(np.concatenate(light), np.concatenate(depth))[0, 1]) < 0.5


# ---- resume after a kill, Ctrl-C ----


def start(*args, cwd, stderr=subprocess.DEVNULL, **options):
    command = [sys.executable, str(ROOT / "prepare.py"), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=stderr, **options)


def alive(group):
    """Processes of a group that still run (zombies do not), where /proc can tell."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found += [stat.parent.name] if int(pgrp) == group and state != "Z" else []
    return found


def many_images(raw):
    """An RGB-D folder of 500 images, most of them links."""
    own_folder(raw, count=8)
    for n in range(8, 500):
        for kind in ("rgb", "depth"):
            os.link(raw / f"{kind}/{n % 8:04d}.png", raw / f"{kind}/{n:04d}.png")
    return raw


def until_labels(out, job):
    """Wait until the first labels of a job are on the disk."""
    part, deadline = out / "val.jsonl.partial", time.time() + 20
    while time.time() < deadline and job.poll() is None:
        if part.exists() and part.stat().st_size:
            return
        time.sleep(0.005)
    pytest.fail("the run ended before it could be stopped")


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_after_ctrl_c(tmp_path, workers):
    """Ctrl-C reaches all processes: one line, exit code 130, no process is left; the same command
    resumes."""
    raw, out = many_images(tmp_path / "raw"), tmp_path / "out"
    flags = (*folder_flags(raw, out), "--points", 20, "--workers", workers)
    job = start(*flags, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until_labels(out, job)
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=20)
    said = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    said = [line for line in said if "images/s" not in line]
    assert job.returncode == 130 and not (out / "val.jsonl").exists()
    assert len(said) == 1 and "interrupted" in said[0] and "resume" in said[0], said
    deadline = time.time() + 10
    while alive(job.pid) and time.time() < deadline:
        time.sleep(0.02)
    assert not alive(job.pid)
    assert run(*flags)[0] == 0
    assert [Path(r["image"]).stem for r in records(out)] == [f"{n:04d}" for n in range(500)]


def test_resume_after_kill(tmp_path):
    """SIGKILL in the middle, then the same command: the bytes of an uninterrupted run, nothing
    twice."""
    raw = many_images(tmp_path / "raw")
    assert run(*folder_flags(raw, tmp_path / "whole"), "--points", 20)[0] == 0
    cut = tmp_path / "cut"
    flags = (*folder_flags(raw, cut), "--points", 20)
    job = start(*flags, "--workers", 2, cwd=tmp_path)
    until_labels(cut, job)
    os.kill(job.pid, signal.SIGKILL)  # the parent alone, as a scheduler does it
    assert job.wait() == -signal.SIGKILL and not (cut / "val.jsonl").exists(), (
        "the run ended before it was killed"
    )
    deadline = time.time() + 10
    while alive(job.pid) and time.time() < deadline:
        time.sleep(0.02)
    if alive(job.pid):
        os.killpg(job.pid, signal.SIGKILL)
        pytest.fail("workers outlived their parent by 10 s")
    with open(cut / "val.jsonl.partial", "ab") as f:  # a write that was cut in the middle of a line
        f.write(b'{"image": "../raw/rgb/00')
    assert run(*flags)[0] == 0
    for name in ("val.jsonl", "val.idx"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    names = [
        {f.relative_to(d) for f in d.rglob("*") if f.suffix != ".tmp"}
        for d in (cut, tmp_path / "whole")
    ]
    assert names[0] == names[1]


# ---- bad input ----


def outcome(capfd, *args):
    """(exit code, all that was said) of a run."""
    code, message = run(*args)
    said = capfd.readouterr()
    return code, message + said.out + said.err


def attempt(capfd, tmp_path, dataset, *flags, split="val", root="raw"):
    return outcome(
        capfd,
        "--dataset",
        dataset,
        "--root",
        tmp_path / root,
        "--split",
        split,
        "--out",
        tmp_path / "out",
        *flags,
    )


def survives(tmp_path, capfd, dataset, raw, named, good, split="val"):
    """A bad file is named; then either the other frames are prepared, or the run ends in an error
    with no half file."""
    code, said = outcome(
        capfd, "--dataset", dataset, "--root", raw, "--split", split, "--out", tmp_path / "out"
    )
    assert named in said and "Traceback" not in said
    if code == 0:
        assert len(records(tmp_path / "out", split)) == good
    else:
        assert not (tmp_path / "out" / f"{split}.jsonl").exists()


def cut_file(path, share=0.5):
    data = Path(path).read_bytes()
    Path(path).write_bytes(
        data[: int(len(data) * share) | 1]
    )  # an odd size: in the middle of a number


@pytest.mark.parametrize("part", ["rgb", "depth"])
def test_corrupt_frame(tmp_path, capfd, part):
    """A truncated picture or depth map (a copy that stopped) is named: which of the two is to be
    fetched again?"""
    own_folder(tmp_path / "raw", count=4)
    cut_file(tmp_path / f"raw/{part}/0002.png")
    survives(tmp_path, capfd, "folder", tmp_path / "raw", f"{part}/0002.png", good=3)


def test_depth_of_another_size(tmp_path, capfd):
    """A depth map of another shape than its picture is named, never stretched in silence."""
    own_folder(tmp_path / "raw", count=4)
    save_depth(np.full((60, 40), 2000), tmp_path / "raw/depth/0002.png")
    survives(tmp_path, capfd, "folder", tmp_path / "raw", "0002", good=3)


def dangle(raw, table, key, channel="LIDAR"):
    """Break one reference of the first key frame (of a channel) in a nuScenes table."""
    path = raw / f"v1.0-trainval/{table}.json"
    rows = json.loads(path.read_text())
    next(r for r in rows if r.get("is_key_frame", True) and channel in r.get("filename", channel))[
        key
    ] = "feedbeef00"
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "table, key",
    [
        ("sample_data", "calibrated_sensor_token"),
        ("sample_data", "ego_pose_token"),
        ("sample_data", "sample_token"),
        ("sample", "scene_token"),
    ],
)
@pytest.mark.parametrize("channel", ["LIDAR", "CAM"])
def test_dangling_token(tmp_path, capfd, table, key, channel):
    """A token that no table holds is named, or the picture that is lost by it."""
    nuscenes_root(tmp_path / "raw", ("scene-0103",), samples=2)
    dangle(tmp_path / "raw", table, key, channel)
    lost = min(f.name for f in (tmp_path / "raw/samples/CAM_FRONT").iterdir())
    code, said = attempt(capfd, tmp_path, "nuscenes")
    assert ("feedbeef00" in said or lost in said) and "Traceback" not in said
    assert code != 0 or len(records(tmp_path / "out")) == 1


def test_sample_of_no_scene_is_not_trained_on(tmp_path, capfd):
    """A sample whose scene is unknown may be one of the held-out scenes: it must not slip into
    train."""
    nuscenes_root(tmp_path / "raw", ("scene-0103", "scene-0001"))
    dangle(tmp_path / "raw", "sample", "scene_token")  # the first sample is scene-0103's
    code, _ = attempt(capfd, tmp_path, "nuscenes", split="train")
    assert code != 0 or [r["scene"] for r in records(tmp_path / "out", "train")] == ["scene-0001"]


def test_half_extracted_archive(tmp_path, capfd):
    """The LiDAR file of a sample is not there (an archive of ten was not extracted): it is
    named."""
    nuscenes_root(tmp_path / "raw", ("scene-0103",), samples=2)
    gone = sorted((tmp_path / "raw/samples/LIDAR_TOP").iterdir())[0]
    gone.unlink()
    survives(tmp_path, capfd, "nuscenes", tmp_path / "raw", gone.name, good=1)


def test_truncated_json_table(tmp_path, capfd):
    """A JSON table that ends in the middle: the file is named, no traceback."""
    nuscenes_root(tmp_path / "raw", ("scene-0103",))
    cut_file(tmp_path / "raw/v1.0-trainval/sample_data.json", 0.7)
    code, said = attempt(capfd, tmp_path, "nuscenes")
    assert code != 0 and "sample_data.json" in said and "Traceback" not in said


def eth_depth_of_wrong_size(raw):
    eth3d_root(raw)
    path = raw / "courtyard/ground_truth_depth/dslr_images/DSC_0307.JPG"
    cut_file(path, 0.75)
    return "DSC_0307.JPG"


def test_eth3d_depth_of_wrong_size(tmp_path, capfd):
    """The raw float file must have W x H of its image's camera."""
    survives(
        tmp_path,
        capfd,
        "eth3d",
        tmp_path / "raw",
        eth_depth_of_wrong_size(tmp_path / "raw"),
        good=3,
    )


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_depth_png_that_is_no_16_bit_map(tmp_path, capfd, mode):
    """An 8-bit picture of depth holds no metres: it is named, not divided by 1000."""
    own_folder(tmp_path / "raw", count=4)
    Image.new("RGB", (80, 60), (200, 150, 220)).convert(mode).save(tmp_path / "raw/depth/0002.png")
    survives(tmp_path, capfd, "folder", tmp_path / "raw", "depth/0002.png", good=3)


def omnidata(component, scene, domain):
    return lambda raw: omnidata_root(
        raw, "omnitools", component, (scene,), (domain,), "fixatedpose"
    )


def scannetpp_root(raw):
    scannetpp_scene(raw, "aaa", (0, 10))
    scannetpp_splits(raw, [], ["aaa"])


# dataset: split, how to build it, a folder of it that a user may name by mistake
RAW = {
    "argoverse2": ("val", lambda raw: argoverse_log(raw / "val", "0a"), "val"),
    "waymo": ("train", waymo_root, "training"),
    "nuscenes": ("val", nuscenes_root, "samples"),
    "scannetpp": ("val", scannetpp_root, "data"),
    "taskonomy": ("train", omnidata("taskonomy", "allensville", "depth_euclidean"), "rgb"),
    "hm3d": ("train", omnidata("hm3d", "00000-kfPV7w3FaU5", "depth_zbuffer"), "rgb"),
    "matterport3d": ("train", matterport_house, "v1"),
    "ddad": ("val", ddad_root, "ddad_train_val"),
    "eth3d": ("val", eth3d_root, "courtyard"),
    "sunrgbd": ("val", lambda raw: sun_scene(raw / "SUNRGBD/kv2/align_kv2/a1"), "SUNRGBD"),
    "nyuv2": ("val", lambda raw: sun_scene(raw / "SUNRGBD/kv1/NYUdata/NYU0001"), "SUNRGBD/kv1"),
    "ibims1": ("val", ibims_root, "ibims1_core_raw"),
}


@pytest.mark.parametrize("dataset", RAW)
def test_wrong_root(tmp_path, capfd, dataset):
    """A folder above or below the right one is used (same labels), or the error names the right
    one."""
    split, build, below = RAW[dataset]
    raw = tmp_path / "disk" / "raw"
    build(raw)
    right = prepared(tmp_path, dataset, raw, "--points", 20, split=split)
    code, said = checked(capfd, tmp_path / f"out/{split}.jsonl")
    assert code == 0, said  # few and right records: nothing to complain about
    for n, root in enumerate((raw.parent, raw / below)):
        out = tmp_path / f"out{n}"
        code, said = outcome(
            capfd,
            "--dataset",
            dataset,
            "--root",
            root,
            "--split",
            split,
            "--out",
            out,
            "--points",
            20,
        )
        assert "Traceback" not in said
        if code == 0:
            rows = records(out, split)
            assert {Path(r["image"]).name for r in rows} <= {Path(r["image"]).name for r in right}
            assert (
                len(rows) == len(right) or dataset == "eth3d"
            )  # one scene of ETH3D is a fair answer
        else:
            assert str(raw) in said, said


@pytest.mark.parametrize(
    "dataset, pattern",
    [
        ("argoverse2", "city_SE3_egovehicle.feather"),
        ("argoverse2", "lidar/*.feather"),
        ("waymo", "lidar/*.parquet"),
        ("waymo", "camera_image/*.parquet"),
        ("nuscenes", "LIDAR_TOP/scene-0103*.pcd.bin"),
        ("nuscenes", "ego_pose.json"),
        ("scannetpp", "pose_intrinsic_imu.json"),
        ("taskonomy", "point_info/**/*.json"),
        ("matterport3d", "*.conf"),
        ("ddad", "000001/**/*.npz"),
        ("ddad", "000001/scene_*.json"),
        ("sunrgbd", "intrinsics.txt"),
        ("ibims1", "calib/*.txt"),
        ("ibims1", "mask_transp/*.png"),
    ],
)
def test_cut_file_is_named(tmp_path, capfd, dataset, pattern):
    """Of the many files behind a record, the message names the one that is cut, so that one can
    fetch it again."""
    split, build, _ = RAW[dataset]
    build(tmp_path / "raw")
    path = sorted((tmp_path / "raw").rglob(pattern))[0]
    cut_file(path, 0.6)
    code, said = attempt(capfd, tmp_path, dataset, split=split)
    name = (
        path.name
        if len(list((tmp_path / "raw").rglob(path.name))) == 1
        else f"{path.parent.name}/{path.name}"
    )
    assert name in said and "Traceback" not in said, said
    assert code == 0 or not list(tmp_path.glob("out/*.jsonl"))


@pytest.mark.parametrize("dataset", RAW)
def test_missing_raw_files(tmp_path, capfd, dataset):
    """Exit code 2 and what to get, from where, how large, under which terms, into which folder."""
    (tmp_path / "nothing").mkdir()
    code, said = outcome(
        capfd,
        "--dataset",
        dataset,
        "--root",
        tmp_path / "nothing",
        "--split",
        RAW[dataset][0],
        "--out",
        tmp_path / "out",
    )
    assert code == 2 and str(tmp_path / "nothing") in said
    assert "http" in said and "GB" in said.replace("TB", "GB").replace("MB", "GB")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("dataset", ["hm3d", "taskonomy", "eth3d"])
def test_empty_root_beside_another_dataset(tmp_path, capfd, dataset):
    """data/raw/hm3d is empty and data/raw/house/rgb is something else: not a wrong root, the files
    are missing."""
    other = omnidata_root(
        tmp_path / "raw/house", "by_building", "", ("allensville",), ("depth_euclidean",), "info"
    )
    eth3d_root(tmp_path / "raw/laser")
    (tmp_path / "raw/empty").mkdir()
    code, said = outcome(
        capfd, "--dataset", dataset, "--root", tmp_path / "raw/empty", "--out", tmp_path / "out"
    )
    assert other and code == 2 and "http" in said
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_missing_root_folder(tmp_path, capfd):
    """A root that does not exist is the same case."""
    code, said = attempt(capfd, tmp_path, "ibims1", root="gone")
    assert code == 2 and "http" in said and str(tmp_path / "gone") in said


# ---- what an RGB-D folder may have ----


OTHER_CAMERA = "camera of another image"
A, B, C, D = (lambda k: lambda *v: v[k])(0), *((lambda k: lambda *v: v[k])(k) for k in (1, 2, 3))
CAMERA_FAULTS = {  # fx, fy, cx, cy as functions of fx, fy, cx, cy, w, h
    "cx and cy swapped": (A, B, D, C),
    "fx, cx, fy, cy": (A, C, B, D),
    "cx, cy, fx, fy": (C, D, A, B),
    "divided by the image's sides": (lambda *v: v[0] / v[4], lambda *v: v[1] / v[5],
                                     lambda *v: v[2] / v[4], lambda *v: v[3] / v[5]),
    "of an image of 0.9": tuple(lambda *v, k=k: v[k] / v[4] for k in range(4)),  # by the width
    "of an image of": tuple(lambda *v, k=k: v[k] / 2 for k in range(4)),
    "of an image of ": tuple(lambda *v, k=k: v[k] * 3 for k in range(4)),
    "of an image of  ": tuple(lambda *v, k=k: v[k] * 6.4 / v[4] for k in range(4)),  # mm, sensor
    "divided by the image's width": (lambda *v: v[0] / v[4], lambda *v: v[1] / v[4], C, D),
    "field of view": (lambda *v: 1e-3, lambda *v: 1e-3, C, D),
    "20 sides": (lambda *v: 1e6, lambda *v: 1e6, C, D),
    "principal point in the image": (A, B, lambda *v: v[4] + 3, D),
    "a principal point": (A, B, lambda *v: 0, lambda *v: 0),
    "positive fx and fy": (A, lambda *v: 3 * v[1], C, D),
}


CAMERA_80 = [70.0, 71.0, 39.5, 29.5, 80, 60]
CUT = ["png", "jpg", "mpo.jpg", "webp", "tiff", "lzw.tiff", "bmp", "gif", "avif", "jp2", "ppm"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.3, 0.7, 0.93])
@pytest.mark.parametrize("container", CUT)
def test_cut_image_of_any_container(tmp_path, capfd, container, share):
    """A copy that stopped is named when it is prepared, not found in training, wherever it was cut,
    in the second picture of a phone's file, too. The whole file is right."""
    own_folder(tmp_path / "raw", count=3)
    image = Image.open(tmp_path / "raw/rgb/0001.png")
    (tmp_path / "raw/rgb/0001.png").unlink()
    path = tmp_path / f"raw/rgb/0001.{container.split('.')[-1]}"
    if container == "lzw.tiff":
        image.save(path, compression="tiff_lzw")
    else:
        save_as(image, path.with_name(f"0001.{container}"))
        path.with_name(f"0001.{container}").rename(path)
    assert len(prepared(tmp_path, "folder", tmp_path / "raw")) == 3
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    code, said = attempt(capfd, tmp_path, "folder", "--overwrite")
    assert code == 0 and len(records(tmp_path / "out")) == 2, said
    assert f"left out: {path}: " in said or f"left out: 0001: {path}: " in said, said


def test_jpeg_that_is_cut_behind_its_thumbnail(tmp_path, capfd):
    """The end of the small picture in the head is not the end of the file; what phones append
    behind the end is no cut."""
    own_folder(tmp_path / "raw", count=3)
    image = Image.open(tmp_path / "raw/rgb/0001.png")
    path = tmp_path / "raw/rgb/0001.jpg"
    (tmp_path / "raw/rgb/0001.png").unlink()
    small = io.BytesIO()
    image.resize((16, 12)).save(small, "JPEG")
    image.save(path, comment=small.getvalue())
    data = path.read_bytes()
    path.write_bytes(data + b"SEFT" * 500)
    assert len(prepared(tmp_path, "folder", tmp_path / "raw")) == 3
    path.write_bytes(data[: data.index(b"\xff\xd9") + 2 + 100])
    assert len(prepared(tmp_path, "folder", tmp_path / "raw", "--overwrite")) == 2


def turned_folder(raw, orientation, container, upright, size=(80, 60), count=3):
    """An own folder whose photos have an EXIF orientation. The depth map is of the upright photo,
    or of the stored pixels -> what the labels' own image looks like, in the order of names."""
    w, h = size
    turn = render.TURNS.get(orientation)
    own = size[::-1] if upright and orientation >= 5 else size
    fx, fy, cx, cy = 70.0, 71.0, (own[0] - 1) / 2, (own[1] - 1) / 2
    shown = []
    for n in range(count):
        z = ramp(w, h, base=2 + 0.7 * n)  # as stored
        image = painted(z)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = raw / f"rgb/{n:04d}.{container}"
        path.parent.mkdir(parents=True, exist_ok=True)
        lossless = {"lossless": True} if container == "webp" else {}
        lossless |= {"quality": 98, "subsampling": 0} if container == "jpg" else {}
        image.save(path, exif=exif, **lossless)
        millimetres = Image.fromarray(np.round(z * 1000).astype(np.uint16))
        if upright and turn is not None:
            image, millimetres = image.transpose(turn), millimetres.transpose(turn)
        (raw / "depth").mkdir(exist_ok=True)
        millimetres.save(raw / f"depth/{n:04d}.png")
        shown.append(np.asarray(image)[..., 0].astype(float))
    (raw / "intrinsics.txt").write_text(f"{fx} {fy} {cx} {cy}")
    return shown, own


@pytest.mark.parametrize("upright", [False, True], ids=["stored", "upright"])
@pytest.mark.parametrize("container", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, capfd, orientation, container, upright):
    """The depth map's shape says to which pixels of a turned photo it belongs; where it does not,
    it is the stored ones, and that is said. The record keeps it, and what is shown is the pixel
    that was labelled."""
    if upright and orientation in (2, 3, 4):
        pytest.skip("nothing tells: taken as of the stored pixels, and said")
    shown, size = turned_folder(tmp_path / "raw", orientation, container, upright)
    code, said = attempt(capfd, tmp_path, "folder")
    assert code == 0 and "no faults found" in said, said
    assert ("taken as of the stored pixels" in said) == (orientation in (2, 3, 4)), said
    opened = render.Records(str(tmp_path / "out/val.jsonl"))
    assert len(opened) == 3
    for n in range(3):
        row = opened[n]
        assert row.get("orientation") == (None if orientation == 1 else
                                          "upright" if upright else "stored")
        assert row["intrinsics"][4:] == size
        image = render.open_image(row["image"], row["intrinsics"][4:], row.get("orientation"))
        assert np.abs(np.asarray(image)[..., 0] - shown[n]).max() <= 6
        z = row["depth"] / render.ray_length(*row["pixel_coords"].T, row["intrinsics"])
        x, y = row["pixel_coords"].astype(int).T
        red = np.asarray(image)[..., 0].astype(float)[y, x]
        assert np.abs(red - (z - 1) * 25).max() <= 6


def test_orientation_that_does_not_show(tmp_path, capfd):
    """A square photo, and one upside down: the note counts them, once."""
    turned_folder(tmp_path / "raw", 6, "png", upright=False, size=(64, 64))
    turned_folder(tmp_path / "raw", 3, "tiff", upright=False, size=(64, 64), count=2)
    for n in range(2):
        (tmp_path / f"raw/rgb/{n:04d}.png").unlink()
    code, said = attempt(capfd, tmp_path, "folder")
    assert code == 0 and said.count("taken as of the stored pixels") == 1, said
    assert "3 images are turned or mirrored by EXIF" in said
    assert [row["orientation"] for row in records(tmp_path / "out")] == ["stored"] * 3


@pytest.mark.parametrize("name", CAMERA_FAULTS)
def test_camera_of_another_image(tmp_path, capfd, name):
    """Refused at the first image, with the likely cause, in one line; nothing is left behind, so
    that the corrected command needs no --overwrite."""
    own_folder(tmp_path / "raw", count=40)
    numbers = [f(*CAMERA_80) for f in CAMERA_FAULTS[name]]
    words = ",".join(map(str, numbers))
    code, said = attempt(capfd, tmp_path, "folder", "--intrinsics", words)
    assert code == 2 and name.strip() in said and "do not fit an image of 80 x 60 px" in said, said
    errors = [line for line in said.replace("\r", "\n").splitlines() if "images/s" not in line]
    assert len([line for line in errors if line.strip()]) == 1, said
    assert not list((tmp_path / "out").glob("val*"))
    own_folder(tmp_path / "raw", count=2)
    (tmp_path / "raw/intrinsics.txt").write_text(" ".join(map(str, numbers)))
    assert attempt(capfd, tmp_path, "folder")[0] == 2
    right = ("--intrinsics", "70,71,39.5,29.5")
    assert len(prepared(tmp_path, "folder", tmp_path / "raw", *right)) == 40


@pytest.mark.parametrize("text", ["70 0 39.5\n0 71 29.5\n0 0 1\n", "70, 71, 39.5, 29.5",
                                  "70 0 0 0 71 0 39.5 29.5 1", "70,0,0\n0,71,0\n39.5,29.5,1"])
def test_forms_of_intrinsics(tmp_path, text):
    """Row by row, column by column, or the four numbers."""
    own_folder(tmp_path / "raw", count=1)
    (tmp_path / "raw/intrinsics.txt").write_text(text)
    (row,) = prepared(tmp_path, "folder", tmp_path / "raw")
    assert row["intrinsics"] == CAMERA_80


@pytest.mark.parametrize("numbers", [
    [8, 8, 39.5, 29.5], [1500, 1500, 39.5, 29.5], [70, 36, 39.5, 29.5], [36, 70, 39.5, 29.5],
    [70, 70, 3, 55], [70, 70, 79, 3], [70, 70, 39.5, 10], [70, 70, 55, 29.5], [70, 70, 31, 45]])
def test_odd_cameras_are_right(tmp_path, capfd, numbers):
    """Wide, tele, fx unlike fy, cropped off the centre."""
    own_folder(tmp_path / "raw", count=2)
    code, said = attempt(capfd, tmp_path, "folder", "--intrinsics", ",".join(map(str, numbers)))
    assert code == 0 and "do not fit" not in said and "FAULT" not in said, said


def test_one_odd_camera_costs_its_images(tmp_path, capfd):
    """In a set of many cameras one that is wrong is named, and the others are prepared."""
    for n in range(4):
        own_folder(tmp_path / f"raw/room{n}", count=2)
    (tmp_path / "raw/room0/intrinsics.txt").write_text("0.7 0.7 39.5 29.5")
    code, said = attempt(capfd, tmp_path, "folder")
    assert code == 0 and len(records(tmp_path / "out")) == 6, said
    assert "left out: room0/0000: intrinsics [0.7, 0.7, 39.5, 29.5] do not fit" in said


BAD_POSES = {
    "inf": np.full((4, 4), -np.inf), "nan": np.full((4, 4), np.nan), "zero": np.zeros((4, 4)),
    "scaled": np.diag([3.0, 3, 3, 1]), "mirrored": np.diag([1.0, 1, -1, 1]),
    "shift": np.array([[1.0, 0, 0, np.inf], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])}


@pytest.mark.parametrize("kind", BAD_POSES)
def test_poses_that_are_none(tmp_path, capfd, kind):
    """ScanNet's frames that could not be tracked: the image stays, its pose does not, and the run
    counts them."""
    own_folder(tmp_path / "raw", count=6)
    (tmp_path / "raw/poses").mkdir()
    for n in range(6):
        pose = np.eye(4) if n % 3 else BAD_POSES[kind]
        np.savetxt(tmp_path / f"raw/poses/{n:04d}.txt", pose)
    code, said = attempt(capfd, tmp_path, "folder")
    rows = records(tmp_path / "out")
    assert code == 0 and "2 poses are not finite, or no rotation: left out" in said, said
    assert ["pose" in row for row in rows] == [False, True, True] * 2
    for name in ("val.run.json", "val.jsonl"):
        for line in [(tmp_path / "out" / name).read_text()] if "run" in name else open(
                tmp_path / "out" / name):
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} in {name}"))


def test_notes_outlive_an_interruption(tmp_path, monkeypatch, capfd):
    """What was counted before a run was killed is in the count after it; a run.json of an older
    version has none."""
    own_folder(tmp_path / "raw", count=11)
    counting_reader(monkeypatch, [], [])
    make_chunk = prepare.make_chunk

    def interrupted(frames, make):
        if frames[0].id == "0008":
            raise KeyboardInterrupt
        return make_chunk(frames, make=make)

    for older in (False, True):
        flags = folder_flags(tmp_path / "raw", tmp_path / f"out{older}")
        monkeypatch.setattr(prepare, "make_chunk", interrupted)
        assert run(*flags)[0] == 130
        path = tmp_path / f"out{older}/val.run.json"
        state = json.loads(path.read_text())
        assert 8 in state["notes"].values()
        if older:
            del state["notes"]
            path.write_text(json.dumps(state))
        monkeypatch.setattr(prepare, "make_chunk", make_chunk)
        code, said = outcome(capfd, *flags)
        assert code == 0 and f"{3 if older else 11} depth files of uint16" in said, said


def litter(root):
    """What macOS, Windows, Linux, a NAS, editors and phones leave in every folder, much of it with
    the names of the files."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        files = [path.name for path in folder.iterdir()]
        for name in (".DS_Store", "Thumbs.db", "thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r",
                     ".directory", ".nfs0000001", ".~lock.a#", ".localized", ".fuse_hidden1",
                     ".gitkeep", "~temp", *(f"._{name}" for name in files),
                     *(f"{name}~" for name in files), *(f".{name}.swp" for name in files),
                     *(f"{name}:Zone.Identifier" for name in files)):
            (folder / name).write_bytes(b"\0\0\0\1Bud1")
        for name in ("@eaDir", "__MACOSX", ".Trashes", "$RECYCLE.BIN", "#recycle", "lost+found",
                     "System Volume Information", ".git", "@Recycle"):
            for below in ("", "image", "rgb", "depth", "iphone/rgb", "dslr_calibration_jpg"):
                (folder / name / below).mkdir(parents=True, exist_ok=True)
            for below in files:
                (folder / name / below).with_suffix(".png").touch()


@pytest.mark.parametrize("dataset", [*RAW, "folder"])
def test_system_files_are_no_data(tmp_path, capfd, dataset):
    """A dataset that went through other machines gives the same bytes, and nothing is left out."""
    split, build, _ = RAW.get(dataset, ("val", lambda raw: own_folder(raw / "room"), ""))
    build(tmp_path / "raw")
    prepared(tmp_path, dataset, tmp_path / "raw", split=split)
    before = (tmp_path / f"out/{split}.jsonl").read_bytes()
    litter(tmp_path / "raw")
    code, said = attempt(capfd, tmp_path, dataset, "--overwrite", split=split)
    assert code == 0 and "left out" not in said and " 0 cannot be read" in said, said
    assert (tmp_path / f"out/{split}.jsonl").read_bytes() == before


# ---- --check ----


def checked(capfd, *files):
    return outcome(capfd, "--check", *files)


def rewrite(toy, tmp_path, change, split="val"):
    """A copy of the toy file changed by change(rows); the pictures are linked."""
    if not (tmp_path / "rgb").exists():
        (tmp_path / "rgb").symlink_to(toy / "rgb")
    rows = records(toy, split)
    rows = change(rows) or rows
    path = tmp_path / f"{split}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def as_z(row):
    fx, fy, cx, cy = row["intrinsics"][:4]
    x, y = np.array(row["pixel_coords"]).T
    return np.round(
        np.array(row["depth"]) / np.sqrt(1 + ((x - cx) / fx) ** 2 + ((y - cy) / fy) ** 2), 4
    ).tolist()


def all_z(rows):
    for r in rows:
        r["depth"] = as_z(r)


def one_outside(rows):
    rows[7]["pixel_coords"][3] = [rows[7]["intrinsics"][4], 5]


def one_negative(rows):
    rows[7]["pixel_coords"][3] = [4, -1]


def one_size(rows):
    rows[5]["intrinsics"][4] *= 2


def one_fx(rows):
    rows[5]["intrinsics"][0] = 0


def one_fy(rows):
    rows[5]["intrinsics"][1] = -1


def twice(rows):
    rows[9]["image"] = rows[3]["image"]
    rows[9]["intrinsics"] = rows[3]["intrinsics"]


def test_check_is_silent_on_right_files(tmp_path, capfd, toy):
    """The toy files as they are: exit 0, with a table of counts, the depth range and the
    constant-2.0 row."""
    code, said = checked(capfd, toy / "train.jsonl", toy / "val.jsonl")
    d = np.concatenate([r["depth"] for r in records(toy)])
    assert code == 0, said
    constant = np.mean(np.maximum(d / 2, 2 / d) < 1.25)
    assert f"{constant:.3f}" in said and str(len(d)) in said.replace(",", "")
    for word in ("duplicate", "outside", "shared by", "shifted"):
        assert word not in said.lower(), said


def one_not_finite(rows):
    rows[7]["depth"][3] = float("nan")


def one_empty(rows):
    rows[7]["depth"], rows[7]["pixel_coords"] = [], []


def same_content(rows):
    folder = Path(rows[9]["image"]).parent
    rows[9] = {**rows[3], "image": str(folder / "again.png"), "scene": "another"}


def camera(*numbers):
    """All cameras of a file, made from fx, fy, cx, cy, w, h of each."""

    def change(rows):
        for row in rows:
            row["intrinsics"][:4] = [f(*row["intrinsics"]) for f in numbers]

    return change


def one_camera(*numbers):
    return lambda rows: camera(*numbers)(rows[5:6])


def labels(new, share=1.0):
    """A share of the labels of each record made from the old ones (N,)."""

    def change(rows):
        rng = np.random.default_rng(0)
        for row in rows:
            old = np.array(row["depth"])
            picked = rng.random(len(old)) < share
            row["depth"] = np.where(picked, new(old, row), old).tolist()

    return change


def ray(row):
    fx, fy, cx, cy = row["intrinsics"][:4]
    x, y = np.array(row["pixel_coords"]).T
    return np.sqrt(1 + ((x - cx) / fx) ** 2 + ((y - cy) / fy) ** 2)


def one(key, value):
    return lambda rows: rows[7].update({key: value(rows[7]) if callable(value) else value})


FAULTS = {
    "z": (all_z, "z sold as euclidean"),
    **{name: (camera(*numbers), OTHER_CAMERA) for name, numbers in CAMERA_FAULTS.items()},
    **{f"one {name}": (one_camera(*numbers), OTHER_CAMERA)
       for name, numbers in CAMERA_FAULTS.items()},
    "mm": (labels(lambda d, row: 1000 * d), "millimetres?"),
    "cm": (labels(lambda d, row: 100 * d), "centimetres?"),
    "km": (labels(lambda d, row: d / 1000), "metres"),
    "far": (one("depth", lambda row: [1e5] * len(row["depth"])), "depth not positive and finite"),
    "no return, z": (labels(lambda d, row: 65.535 * ray(row), 0.3), "at 65.535 m"),
    "no return": (labels(lambda d, row: 65.535, 0.01), "at 65.535 m"),
    "no return at 0.2 mm": (labels(lambda d, row: 13.107 * ray(row), 0.01), "at 13.107 m"),
    "end of range, z": (labels(lambda d, row: 10 * ray(row), 0.1), "many labels at one value"),
    "end of range": (labels(lambda d, row: np.full(len(d), 4.0), 0.2), "at 4 m"),
    "huge": (one("depth", lambda row: [10 ** 400] * len(row["depth"])), "malformed line"),
    "pose scaled": (one("pose", lambda row: (2 * np.array(row["pose"])).tolist()), "pose is none"),
    "pose short": (one("pose", [1.0]), "pose is none"),
    "pose huge": (one("pose", [10 ** 400] * 16), "pose is none"),
    "orientation": (one("orientation", "left"), "malformed line"),
    "depth_type": (one("depth_type", "disparity"), "malformed line"),
    "surrogate": (one("scene", "\ud800"), "malformed line"),
    "null": (one("pixel_coords", [[None, None]]), "malformed line"),
    "null image": (one("image", "a\0b.png"), "image not found"),
    "outside": (one_outside, "label outside of the image"),
    "negative": (one_negative, "label outside of the image"),
    "size": (one_size, "image size is not that of the intrinsics"),
    "fx": (one_fx, "fx or fy not positive"),
    "fy": (one_fy, "fx or fy not positive"),
    "nan": (one_not_finite, "malformed line"),
    "empty": (one_empty, "no labels"),
    "duplicate": (twice, "duplicate image"),
    "content": (same_content, "duplicate image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(tmp_path, capfd, toy, fault):
    """Each planted fault is named and the exit code is 1."""
    change, words = FAULTS[fault]
    if fault == "content":
        shutil.copytree(toy / "rgb", tmp_path / "rgb")
        for row in records(toy)[3], records(toy)[9]:
            folder = (tmp_path / row["image"]).parent
            shutil.copy(toy / records(toy)[3]["image"], folder / "again.png")
    code, said = checked(capfd, rewrite(toy, tmp_path, change))
    assert code == 1 and words in said.lower(), said


def lines_of(path, change):
    """A jsonl with the bytes of its lines changed."""
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(change(lines)) + b"\n")


@pytest.mark.parametrize("line", [
    b'{"image": 1, "image": 2}', b"\xff\xfe", b"[" * 100_000, b"null", b"\x00", b"{}", b"-",
    b'{"image": "a", "intrinsics": [], "pixel_coords": {}, "depth": "x"}',
    b'{"image": "", "intrinsics": [9, 9, 4, 4, 9, 9], "pixel_coords": [], "depth": []}'])
def test_check_never_raises(tmp_path, capfd, toy, line):
    """Whatever stands in a line is named with its number, and the others are checked."""
    path = rewrite(toy, tmp_path, lambda rows: None)
    lines_of(path, lambda lines: [*lines[:4], line, *lines[5:]])
    code, said = checked(capfd, path)
    assert code == 1 and "line 5: " in said and "Traceback" not in said, said
    assert "malformed line (1 x)" in said or "no labels (1 x)" in said


@pytest.mark.parametrize("change", [
    lambda lines: [b"", *lines[:3], b" \t ", b"", *lines[3:], b"", b""],
    lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]],
    lambda lines: [line + b"\r" for line in lines]], ids=["blank", "BOM", "CRLF"])
def test_check_is_silent_on_other_editors(tmp_path, capfd, toy, change):
    """Blank lines, a byte order mark, Windows' ends of lines."""
    path = rewrite(toy, tmp_path, lambda rows: None)
    lines_of(path, change)
    code, said = checked(capfd, path)
    assert code == 0 and " 40    4000 " in said, said


def test_check_makes_a_wrong_index_anew(tmp_path, capfd, toy):
    """Of an index that lacks a line only the file itself can tell."""
    path = rewrite(toy, tmp_path, lambda rows: None)
    right = render.open_index(path).copy()
    np.delete(right, 7).tofile(path.with_suffix(".idx"))
    code, said = checked(capfd, path)
    assert code == 0, said
    assert (np.fromfile(path.with_suffix(".idx"), np.int64) == right).all()


@pytest.mark.parametrize("container", ["png", "jpg", "mpo.jpg", "webp", "tiff", "bmp", "gif"])
def test_check_finds_cut_images(tmp_path, capfd, toy, container):
    """An image that is cut anywhere is named, though its header is there."""

    def cut_one(rows):
        image = Image.open(tmp_path / rows[9]["image"])
        rows[9]["image"] = f"cut.{container}"
        path = tmp_path / rows[9]["image"]
        save_as(image, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 4])

    code, said = checked(capfd, rewrite(toy, tmp_path, cut_one))
    assert code == 1 and "not found or not readable (1 x); line 10: " in said, said
    assert f"cut.{container}" in said


def save_as(image, path):
    """In the container that the name says; an MPO has a second image."""
    if path.name.endswith(".mpo.jpg"):
        image.save(path, "MPO", save_all=True, append_images=[image.rotate(180)])
    else:
        image.save(path)


def test_check_of_many_labels(tmp_path, capfd, toy):
    """Statistics look at some of an image's labels: the time is that of reading them."""
    seconds = []
    for times in (1, 60):
        def more(rows):
            for row in rows:
                row["depth"] = np.repeat(row["depth"], times).tolist()
                row["pixel_coords"] = np.repeat(row["pixel_coords"], times, 0).tolist()

        path = rewrite(toy, tmp_path, more)
        start = time.process_time()
        code, said = checked(capfd, path)
        seconds.append(time.process_time() - start)
        assert code == 0 and str(4000 * times) in said, said
    assert seconds[1] < 4 * seconds[0] + 20  # it was quadratic: minutes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("said", ["stored", "upright", None])
def test_check_of_turned_images(tmp_path, capfd, toy, orientation, said):
    """Labels on the upright photo, or on the stored pixels, are right either way, if the record
    says which, or its size does."""

    def turn(rows):
        for k, row in enumerate(rows):
            image = Image.open(tmp_path / row["image"])
            exif = Image.Exif()
            exif[0x0112] = orientation
            row["image"] = f"{k}.png"
            if said == "upright" or (said is None and orientation >= 5):  # shown as it was
                undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
                image = image.transpose(render.TURNS[undo]) if undo > 1 else image
            image.save(tmp_path / row["image"], exif=exif)
            if said:
                row["orientation"] = said

    path = rewrite(toy, tmp_path, turn)
    code, said_by_check = checked(capfd, path)
    assert code == 0, said_by_check


def test_check_z_with_depth_type_is_no_fault(tmp_path, capfd, toy):
    """The same z labels that say so (`depth_type`) are right."""

    def declared(rows):
        all_z(rows)
        for r in rows:
            r["depth_type"] = "z"

    code, said = checked(capfd, rewrite(toy, tmp_path, declared))
    assert code == 0, said


def test_check_finds_scenes_shared(tmp_path, capfd, toy):
    """A room of train that is also in val."""
    train = rewrite(toy, tmp_path, lambda rows: None, "train")
    scene = records(toy, "train")[0]["scene"]

    def leak(rows):
        rows[4]["scene"] = scene

    code, said = checked(capfd, train, rewrite(toy, tmp_path, leak))
    assert code != 0 and scene in said, said


def test_check_shows_the_paper_row(tmp_path, capfd, toy):
    """Beside the constant answer of these labels stands the paper's row for the dataset."""
    (tmp_path / "ibims1").mkdir()
    code, said = checked(capfd, rewrite(toy, tmp_path / "ibims1", lambda rows: None))
    assert code == 0 and "0.280" in said


def test_check_real_file_of_the_released_code(tmp_path, capfd):
    """The released iBims example: 16 images whose labels are z of a depth PNG and say nothing about
    it."""
    # copied, because an .idx is written beside it
    path = shutil.copy(sample("ibims1", "depthlm_ibims1_val.jsonl"), tmp_path)
    code, said = checked(capfd, path, "--image-root", sample("ibims1", "ibims1_core_raw"))
    assert code == 1 and "z sold as euclidean" in said.lower(), said


def test_check_without_pictures(tmp_path, capfd, toy):
    """A jsonl alone (pictures elsewhere) is still tabled; that they were not found is said, with
    the remedy, which helps."""
    path = tmp_path / "val.jsonl"
    path.write_text((toy / "val.jsonl").read_text())
    code, said = checked(capfd, path)
    assert code == 1 and str(40 * 100) in said and "image not found" in said
    assert "(40 x)" in said and "--image-root" in said
    assert checked(capfd, path, "--image-root", toy)[0] == 0


def test_check_empty_and_missing_files(tmp_path, capfd):
    """No record, or no file at all: one line, exit code 2."""
    (tmp_path / "val.jsonl").touch()
    for name in ("val.jsonl", "gone.jsonl"):
        code, said = checked(capfd, tmp_path / name)
        assert code == 2 and name in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("count", [1, 2, 11, 12])
def test_check_short_files(tmp_path, capfd, toy, count):
    """Too few lines for most of the statistics: a table without faults."""
    code, said = checked(capfd, rewrite(toy, tmp_path, lambda rows: rows[:count]))
    assert code == 0 and str(100 * count) in said, said


def test_check_broken_lines(tmp_path, capfd, toy):
    """A cut last line, a missing key and unequal lists are named by line, without a traceback."""
    path = rewrite(toy, tmp_path, lambda rows: None)
    lines = path.read_text().splitlines()
    short = json.loads(lines[4])
    short["depth"] = short["depth"][:-1]
    lines[2], lines[4] = lines[2].replace('"image"', '"image_path"'), json.dumps(short)
    path.write_text("\n".join(lines)[:-40])
    code, said = checked(capfd, path)
    assert code != 0 and "line 3" in said and "Traceback" not in said
    path.write_text("\n".join(lines[:2] + lines[3:])[:-40])
    code, said = checked(capfd, path)
    assert code != 0 and "line 4" in said and "Traceback" not in said


def cluttered(root, count, seed=0, shift=0, size=(96, 72), cue=True, kind="z"):
    """An RGB-D folder of unrelated cluttered views; shift: each picture gets the depth of the one
    `shift` later."""
    rng, views = np.random.default_rng(seed), []
    w, h = size
    for _ in range(count):
        z, look = (
            ramp(w, h, base=rng.uniform(4, 7), span=rng.uniform(-1, 2)),
            rng.uniform(0.2, 1, 3),
        )
        rgb = (
            np.repeat(((FAR_AWAY - z) / FAR_AWAY)[..., None], 3, -1) * look
            if cue
            else np.full((h, w, 3), 0.5)
        )
        for _ in range(7):
            x, y, a, b = (
                rng.integers(0, w - 15),
                rng.integers(0, h - 12),
                rng.integers(12, 40),
                rng.integers(10, 30),
            )
            near = rng.uniform(1.2, 3.8)
            z[y : y + b, x : x + a] = near
            rgb[y : y + b, x : x + a] = (
                rng.uniform(0.3, 1, 3) * (FAR_AWAY - near) / FAR_AWAY if cue else 0.5
            )
        if not cue:
            rgb = rng.uniform(0, 1, (h, w, 3))
        views.append((z, (rgb.clip(0, 1) * 255).astype(np.uint8)))
    camera = [w * 0.7, w * 0.7, w / 2 - 0.5, h / 2 - 0.5, w, h]
    for n in range(count):
        save(Image.fromarray(views[n][1]), root / f"rgb/{n:04d}.png")
        z = views[(n + shift) % count][0]
        save_depth(
            np.round((z if kind == "z" else euclidean(z, camera)) * 1000),
            root / f"depth/{n:04d}.png",
        )
    (root / "intrinsics.txt").write_text(f"{camera[0]} {camera[1]} {camera[2]} {camera[3]}\n")


FAR_AWAY = 9.0


@pytest.mark.parametrize("shift", [1, -1])
def test_check_finds_pairs_shifted_by_one(tmp_path, capfd, shift):
    """One missing file shifts all pairs: depth n belongs to picture n + 1. Only the pictures can
    tell."""
    cluttered(tmp_path / "raw", 40, shift=shift)
    prepared(tmp_path, "folder", tmp_path / "raw")
    code, said = checked(capfd, tmp_path / "out/val.jsonl")
    assert code != 0 and re.search("shift|wrong image|next|previous", said.lower()), said


@pytest.mark.parametrize("case", ["cluttered", "noise", "euclidean", "euclidean slopes", "slopes"])
def test_check_does_not_cry_wolf(tmp_path, capfd, case):
    """Right files with little to go by: cluttered views, pictures of noise, Euclidean depth PNGs,
    smooth surfaces."""
    kind = "euclidean" if "euclidean" in case else "z"
    if "slopes" in case:
        own_folder(
            tmp_path / "raw", count=21, kind=kind, bases=[1.5 + 0.31 * n % 7 for n in range(21)]
        )
    else:
        cluttered(tmp_path / "raw", 24, seed=3, cue=case != "noise", kind=kind)
    prepared(tmp_path, "folder", tmp_path / "raw", "--depth-type", kind)
    code, said = checked(capfd, tmp_path / "out/val.jsonl")
    assert code == 0, said


def test_check_rounded_labels(tmp_path, capfd, toy):
    """Right labels that somebody rounded to a millimetre are no z of a depth PNG: the walls of the
    room say so."""

    def to_millimetres(rows):
        for r in rows:
            r["depth"] = [round(d, 3) for d in r["depth"]]
            r.pop("depth_type", None)

    code, said = checked(capfd, rewrite(toy, tmp_path, to_millimetres))
    assert code == 0, said


@pytest.mark.parametrize("case", ["cluttered", "walls", "slopes"])
def test_check_finds_z_declared_euclidean(tmp_path, capfd, case):
    """z maps prepared with the wrong --depth-type: the depth PNG's steps, or flat walls, give it
    away."""
    if case == "walls":
        own_folder(tmp_path / "raw", count=20, hole=False)
        for n in range(20):  # slanted planes: 1 / z is linear in the pixel
            v, u = np.mgrid[:60, :80]
            save_depth(
                np.round(1000 / (0.2 + 0.0015 * (u - 40) + 0.001 * (n - 10) / 10 * (v - 30))),
                tmp_path / f"raw/depth/{n:04d}.png",
            )
    elif case == "slopes":  # curved: nothing but the steps of 1 mm
        own_folder(tmp_path / "raw", count=20)
    else:
        cluttered(tmp_path / "raw", 24, seed=4)
    prepared(tmp_path, "folder", tmp_path / "raw", "--depth-type", "euclidean")
    path = tmp_path / "out/val.jsonl"
    rows = records(tmp_path / "out")
    for r in rows:
        r.pop("depth_type", None)  # as the released code would write them: nothing is said
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said = checked(capfd, path)
    assert code != 0 and re.search(r"\bz\b.*euclid", said.lower()), said


# ---- --verify: wrong conventions, planted ----

VERIFIED = (100.0, 130.0, 63.5, 47.5, 128, 96)  # fx unlike fy


def toy_frames(count, light="ambient", focals=None, seed=0):
    return prepare.frames_toy("", "train", count, light, focals, seed)


@pytest.fixture(scope="module")
def rooms():
    """Toy rooms as a user's z maps would be: 20 frames of 4 rooms, in daylight."""
    views = toy_frames(20, seed=0)
    views = [v._replace(intrinsics=VERIFIED) for v in views]
    return [as_map(v.load(v)) for v in views]


def as_map(frame, kind="z"):
    rays = render.ray_length(*np.mgrid[:128, :96], VERIFIED).T
    depth = frame.depth / rays if (kind, frame.kind) == ("z", "euclidean") else frame.depth
    return frame._replace(load=lambda frame: frame, depth=depth, kind=kind)


def verified(capfd, frames):
    """-> {what: (verdict, why)}; the number of wrong ones is what is returned."""
    capfd.readouterr()
    wrong = prepare.verify(frames)
    lines = capfd.readouterr().out.splitlines()
    rows = {line[:22].strip(): (line[22:35].strip(), line[35:]) for line in lines}
    assert wrong == sum(verdict == "WRONG" for verdict, _ in rows.values())
    return rows


def moved_pose(change):
    return lambda frame: frame._replace(pose=change(frame.pose))


def farther(factor):
    def change(pose):
        return pose * np.where(np.arange(4) < 3, 1, np.array([[factor]] * 3 + [[1]]))

    return moved_pose(change)


OPENGL = np.diag([1.0, -1, -1, 1])
PLANTED = {
    "labels 2 px right": (lambda f: f._replace(depth=np.roll(f.depth, 2, 1)),
                          {"places of labels": "lie -2 px right of, +0 px below"}),
    "labels 4 px up": (lambda f: f._replace(depth=np.roll(f.depth, -4, 0)),
                       {"places of labels": "lie +0 px right of, +4 px below"}),
    "inverse poses": (moved_pose(np.linalg.inv), {"poses": "if poses are world-to-camera"}),
    "transposed poses": (moved_pose(np.transpose), {"poses": "if poses are transposed"}),
    "OpenGL": (moved_pose(lambda pose: pose @ OPENGL), {"poses": "if poses have OpenGL axes"}),
    "inverse OpenGL": (moved_pose(lambda pose: np.linalg.inv(pose @ OPENGL)),
                       {"poses": "if poses are world-to-camera with OpenGL axes"}),
    "poses in mm": (farther(1000), {"poses": "if depth is 0.001 x"}),
    "poses half": (farther(0.5), {"poses": "if depth is 2 x"}),
    "depth 0.8 x": (lambda f: f._replace(depth=0.8 * f.depth), {"poses": "if depth is 0.8 x"}),
    "depth in mm": (lambda f: f._replace(depth=1000 * f.depth),
                    {"unit": "millimetres? Give --depth-scale 1000", "poses": "depth is 1000 x"}),
    "fx, fy": (lambda f: f._replace(intrinsics=(130.0, 100.0, *VERIFIED[2:])),
               {"poses": "if fx and fy are swapped"}),
    "Euclidean as z": (lambda f: as_map(f._replace(kind=""), "z")._replace(
        depth=f.depth * render.ray_length(*np.mgrid[:128, :96], VERIFIED).T),
        {"z or Euclidean": "look like euclidean, and are read as z", "poses": "are confused"}),
    "z as Euclidean": (lambda f: f._replace(kind="euclidean"),
                       {"z or Euclidean": "look like z, and are read as eu", "poses": "confused"}),
    "cx of another image": (lambda f: f._replace(intrinsics=(100, 130, 6350, 47.5, 128, 96)),
                            {"files": "0 of 20 images read"}),
}


def test_verify_right_rooms(rooms, capfd):
    """Nothing is wrong, and all that there is can be told; Euclidean maps, too."""
    for frames in (rooms, [f._replace(kind="euclidean", depth=f.depth * render.ray_length(
            *np.mgrid[:128, :96], VERIFIED).T) for f in rooms]):
        rows = verified(capfd, frames)
        assert [verdict for verdict, _ in rows.values()] == ["right"] * 5 + ["cannot tell"], rows
        assert "+0 px right of, +0 px below" in rows["places of labels"][1]


@pytest.mark.parametrize("name", PLANTED)
def test_verify_finds(rooms, capfd, name):
    """Each wrong convention is found by the check that it concerns, by its name, and by no other.
    """
    change, expected = PLANTED[name]
    rows = verified(capfd, [change(frame) for frame in rooms])
    for what, (verdict, why) in rows.items():
        assert (verdict == "WRONG") == (what in expected), rows
        assert expected.get(what, "") in why, rows


def test_verify_poses_of_the_next_image(rooms, capfd):
    """Shifted by one: no convention mends it; it is not called right."""
    poses = [frame.pose for frame in rooms]
    frames = [f._replace(pose=pose) for f, pose in zip(rooms, poses[1:] + poses[:1])]
    assert verified(capfd, frames)["poses"][0] != "right"


@pytest.mark.parametrize("swap", [False, True])
def test_verify_stereo(rooms, capfd, swap):
    """Two cameras at one time, 0.4 m apart: right, and with left and right swapped wrong."""
    frames = []
    for number, view in enumerate(toy_frames(16, seed=1)):
        side = np.eye(4)
        side[0, 3] = 0.4
        poses = [view.pose, view.pose @ side]
        for n, camera in enumerate(("left", "right")):
            made = view._replace(pose=poses[n], camera=camera, intrinsics=VERIFIED)
            made = as_map(made.load(made))
            frames.append(made._replace(pose=poses[1 - n if swap else n], scene=str(number)))
    rows = verified(capfd, frames)
    assert rows["poses of two cameras"][0] == ("WRONG" if swap else "right"), rows
    assert rows["poses"][0] == "cannot tell" and rows["places of labels"][0] == "right"


def test_verify_small_depth_maps(rooms, capfd):
    """A phone: depth of a quarter of the photo's side, and the ScanNet++ mistake, labels half a
    depth pixel away: measured, and not called right."""
    camera = 400.0, 520.0, 255.5, 191.5, 512, 384
    views = [view._replace(intrinsics=camera)
             for view in toy_frames(20, seed=0)][:15]
    frames = [small._replace(pixels=view.load(view).pixels, intrinsics=camera)
              for small, view in zip(rooms, views)]
    rows = verified(capfd, frames)
    assert rows["places of labels"][0] == rows["poses"][0] == "right", rows
    rows = verified(capfd, [frame._replace(centre=0.0) for frame in frames])
    assert rows["places of labels"][0] != "right" and rows["poses"][0] == "right", rows
    assert "+2 px right of, +2 px below" in rows["places of labels"][1]


def test_verify_says_when_it_cannot_tell(capfd):
    """One image, one without poses, one that never moved: no verdict on poses, no wrong one."""
    views = [v.load(v) for v in toy_frames(10, seed=0)]
    views = [view._replace(load=lambda frame: frame) for view in views]
    for frames in (views[:1], [view._replace(pose=None) for view in views], views[:1] * 8):
        rows = verified(capfd, frames)
        assert "WRONG" not in [verdict for verdict, _ in rows.values()], rows
        assert rows["poses"][0] == "cannot tell"


def test_verify_command(tmp_path, capfd):
    """Through the reader, without writing anything; the exit code counts; a broken file is
    named."""
    cluttered(tmp_path / "raw", 12)
    flags = ("--dataset", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out")
    code, said = outcome(capfd, *flags, "--verify")
    assert code == 0 and re.search(r"places of labels\s+right", said), said
    shift_depth(tmp_path / "raw", 5)
    code, said = outcome(capfd, *flags, "--verify")
    assert code == 1 and "colour edges lie -5 px right of" in said, said
    cut_file(tmp_path / "raw/rgb/0003.png")
    code, said = outcome(capfd, *flags, "--verify", "--limit", 6)
    assert code == 1 and "5 of 6 images read" in said and "0003.png" in said, said
    assert not (tmp_path / "out").exists()
    code, said = outcome(capfd, "--dataset", "nuscenes", "--root", tmp_path / "raw", "--verify")
    assert code == 2 and "has no raw data of nuscenes" in said


def shift_depth(raw, columns):
    for path in (raw / "depth").iterdir():
        save_depth(np.roll(np.asarray(Image.open(path)), columns, 1), path)


def test_verify_real_nyuv2(capfd):
    """Three real frames: the maps look like z. Edges of a Kinect's depth are some px off; three
    images prove no shift."""
    root = sample("nyuv2", "metric3d_demo")
    code, said = outcome(capfd, "--dataset", "nyuv2", "--root", root, "--verify")
    assert code == 0 and re.search(r"z or Euclidean\s+right", said), said


def test_verify_real_ddad(capfd):
    """Three real cameras with a little overlap: labels find their colour in the other image."""
    code, said = outcome(capfd, "--dataset", "ddad", "--root", sample("ddad"), "--verify")
    assert code == 0 and re.search(r"poses of two cameras\s+right", said), said


# ---- the README's "Your own data", on a synthetic scan ----


def transforms_room(root, seed, count):
    """What a phone's app writes: photos, depth of half their side, transforms.json."""
    (root / "images").mkdir(parents=True)
    (root / "depth").mkdir()
    shots = []
    for n, view in enumerate(toy_frames(count, "lamp", [100.0], seed)):
        fx, fy, cx, cy, w, h = view.intrinsics
        small = view._replace(
            intrinsics=(fx / 2, fy / 2, cx / 2 - 0.25, cy / 2 - 0.25, w // 2, h // 2))
        view.load(view).pixels.save(root / f"images/{n:04d}.png")
        rays = render.ray_length(*np.mgrid[:w // 2, :h // 2], small.intrinsics).T
        save_depth(np.round(1000 * small.load(small).depth / rays), root / f"depth/{n:04d}.png")
        shots.append({
            "file_path": f"images/{n:04d}.png", "depth_file_path": f"depth/{n:04d}.png",
            "fl_x": fx, "fl_y": fy, "cx": cx + 0.5, "cy": cy + 0.5, "w": w, "h": h,
            "transform_matrix": (view.pose @ OPENGL).tolist()})
    (root / "transforms.json").write_text(json.dumps({"frames": shots}))


def readme_commands():
    """The commands of the README's section, line by line, and the flags for a CPU."""
    section = re.split(r"\n##+ ", (ROOT / "README.md").read_text().split("### Your own data")[1])[0]
    lines = section.split("```bash\n")[1].split("```")[0].splitlines()
    compare, cpu = re.findall(r"`(python runs/compare.py [^`]+|--model [^`]+)`", section)
    return [shlex.split(line, comments=True) for line in (*lines, compare)], shlex.split(cpu)


def test_readme_scan_fine_tune_compare(tmp_path, tiny, monkeypatch, capfd):
    """Five commands and the comparison, as they stand there with the flags for a CPU, from a tiny
    model that knows nothing: the loss falls, and the two evaluations are compared."""
    transforms_room(tmp_path / "scans/kitchen", 0, 40)
    transforms_room(tmp_path / "scans/office", 1, 10)
    monkeypatch.chdir(tmp_path)
    words, cpu = readme_commands()
    assert [word[1] for word in words] == [
        "prepare.py", "prepare.py", "evaluate.py", "train_sft.py", "evaluate.py",
        "runs/compare.py"]
    code, said = outcome(capfd, *words[0][2:], "--verify")
    assert code == 0 and re.search(r"poses\s+right", said), said

    for _, script, *flags in words:
        flags = [str(tiny) if word == "Qwen/Qwen2.5-VL-3B-Instruct" else word for word in flags]
        if script == "train_sft.py":
            flags += [*cpu, "--model", str(tiny), "--focal", "100", "--samples", "384"]
            flags += ["--log-every", "4"]
        if script == "evaluate.py":
            flags[flags.index("--all")] = "--queries=24"
            flags += ["--max-new-tokens", "12"]
        if script == "evaluate.py" and str(tiny) in flags:
            flags += ["--focal", "100"]
        flags += ["--workers", "0" if script != "prepare.py" else "1"] * ("runs" not in script)
        module = importlib.import_module(Path(script).stem)
        with suppress(SystemExit):
            assert not module.main(flags)
    said = capfd.readouterr().out
    assert "home" in said and re.search(r"delta1 \d\.\d+, of out/before", said), said
    lines = map(json.loads, open("ckpt/home/log.jsonl"))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


# ---- --download, from a server on loopback ----


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `data` with Range; `cut`: each of the next replies ends after this many bytes; `log`:
    the Range headers; quiet: no size, no tag."""

    data, cut, log, etag, ranges, status, lie = b"", [], [], '"one"', True, 200, 0
    quiet = False

    def do_GET(self):
        cls, begin, asked = type(self), 0, self.headers.get("Range")
        cls.log.append(asked)
        if cls.status != 200:
            self.send_error(cls.status)
            return
        if asked and cls.ranges and self.headers.get("If-Range", cls.etag) == cls.etag:
            begin = int(asked.split("=")[1].split("-")[0])
            if begin >= len(cls.data) + cls.lie:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(cls.data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header(
                "Content-Range",
                f"bytes {begin}-{len(cls.data) + cls.lie - 1}/{len(cls.data) + cls.lie}",
            )
        else:
            self.send_response(200)
        body = cls.data[begin:]
        if not cls.quiet:
            self.send_header("Content-Length", str(len(body) + cls.lie))
            self.send_header("ETag", cls.etag)
        self.end_headers()
        self.wfile.write(body[: cls.cut.pop(0)] if cls.cut else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running server whose data is an iBims archive; prepare waits only milliseconds between its
    attempts."""
    ibims_root(tmp_path / "src")
    handle = io.BytesIO()
    with zipfile.ZipFile(handle, "w") as z:
        for f in sorted((tmp_path / "src").rglob("*")):
            z.write(f, f.relative_to(tmp_path / "src"))
    handler = type("Handler", (Server,), {"data": handle.getvalue(), "cut": [], "log": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/ibims1_core_raw.zip"
    monkeypatch.setattr(prepare, "RETRY_WAIT", 0.002, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    httpd.shutdown()
    httpd.server_close()


def fetch(tmp_path, server, capfd):
    return attempt(capfd, tmp_path, "ibims1", "--download", "--url", server.url)


def right_labels(tmp_path, data):
    """The labels are those of the folder that was packed, and an archive that is kept is the
    server's file."""
    rows = prepared(tmp_path, "ibims1", tmp_path / "src", out="direct")
    got = records(tmp_path / "out")
    assert [r["depth"] for r in got] == [r["depth"] for r in rows] and len(got) == 2
    assert all(f.read_bytes() == data for f in (tmp_path / "raw").glob("*.zip"))


def test_download(tmp_path, server, capfd):
    """Fetched, unpacked, prepared; a second run asks the server nothing."""
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0, said
    right_labels(tmp_path, server.data)
    asked = len(server.log)
    assert fetch(tmp_path, server, capfd)[0] == 0 and len(server.log) == asked


def test_download_cut_connection(tmp_path, server, capfd):
    """The connection ends twice in the middle: Range goes on at the byte that was reached."""
    server.cut.extend([10_000, 5_000])
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0, said
    assert server.log == [None, "bytes=10000-", "bytes=15000-"]
    right_labels(tmp_path, server.data)


def test_download_restart(tmp_path, server, capfd):
    """The server goes away for good: an error, no archive. Later the same command fetches the rest
    only."""
    server.cut.extend([30_000] + [0] * 200)
    code, said = fetch(tmp_path, server, capfd)
    assert code != 0 and "Traceback" not in said and not (tmp_path / "out/val.jsonl").exists()
    server.cut.clear()
    server.log.clear()
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0 and server.log == ["bytes=30000-"], said
    right_labels(tmp_path, server.data)


def test_download_that_was_complete(tmp_path, server, capfd):
    """Killed after the last byte, before the archive had its name: nothing is fetched again."""
    server.cut.extend([30_000] + [0] * 200)
    assert fetch(tmp_path, server, capfd)[0] != 0
    next((tmp_path / "raw").glob("*.part")).write_bytes(server.data)
    server.cut.clear()
    server.log.clear()
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0 and server.log == [], said
    right_labels(tmp_path, server.data)
    assert [path.name for path in (tmp_path / "raw").glob("*.part*")] == []


def test_download_of_unknown_size(tmp_path, server, capfd):
    """A server that announces neither size nor tag: the end is the end, and a cut file is started
    anew."""
    server.quiet = True
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0, said
    right_labels(tmp_path, server.data)


def test_half_unpacked_archive_is_no_raw_data(tmp_path, server, capfd):
    """A run that was killed while it unpacked leaves a hidden folder: it is not taken for the
    dataset, but unpacked again."""
    hidden = tmp_path / "raw/.unpacking/ibims1_core_raw"
    shutil.copytree(tmp_path / "src/ibims1_core_raw/depth", hidden / "depth")
    assert attempt(capfd, tmp_path, "ibims1")[0] == 2
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0 and not hidden.exists(), said
    right_labels(tmp_path, server.data)


def test_download_wrong_size(tmp_path, server, capfd):
    """The server announces more than it sends: never taken for the whole file."""
    server.lie = 1000
    code, said = fetch(tmp_path, server, capfd)
    assert code != 0 and str(len(server.data) + 1000) in said and "Traceback" not in said
    assert not list((tmp_path / "raw").glob("*.zip")) and not (tmp_path / "out/val.jsonl").exists()


@pytest.mark.parametrize("case", ["no ranges", "another file"])
def test_download_starts_anew(tmp_path, server, capfd, case):
    """A server that ignores Range, or whose file changed meanwhile: from the first byte, nothing is
    glued together."""
    server.cut.append(20_000)
    if case == "no ranges":
        server.ranges = False
    else:
        fetched = server.data
        server.cut.extend([0] * 200)
        server.data, server.etag = bytes(len(fetched)), '"old"'
        assert fetch(tmp_path, server, capfd)[0] != 0
        server.cut.clear()
        server.data, server.etag = fetched, '"new"'
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0, said
    right_labels(tmp_path, server.data)


def test_download_refused(tmp_path, server, capfd):
    """404: one line with the address and where to put the file by hand."""
    server.status = 404
    code, said = fetch(tmp_path, server, capfd)
    assert (
        code != 0
        and server.url in said
        and str(tmp_path / "raw") in said
        and "Traceback" not in said
    )


def test_download_damaged_archive(tmp_path, server, capfd):
    """Right size, wrong content: named, not unpacked in halves into records."""
    server.data = server.data[: len(server.data) // 2] + bytes(len(server.data) // 2)
    code, said = fetch(tmp_path, server, capfd)
    assert (
        code != 0
        and ".zip" in said
        and "Traceback" not in said
        and not (tmp_path / "out/val.jsonl").exists()
    )


def test_download_checksum(tmp_path, server, capfd, monkeypatch):
    """Right size, but not the file whose checksum is known: thrown away."""
    download = (server.url, "ibims1_core_raw.zip", "0" * 32)
    entry = prepare.DATASETS["ibims1"]._replace(download=download)
    monkeypatch.setitem(prepare.DATASETS, "ibims1", entry)
    code, said = attempt(capfd, tmp_path, "ibims1", "--download")
    assert code != 0 and "checksum" in said.lower() and not list((tmp_path / "raw").glob("*.zip"))


def test_download_without_a_checksum(tmp_path, server, capfd):
    """Where none is known it says so."""
    code, said = fetch(tmp_path, server, capfd)
    assert code == 0 and "ibims1_core_raw.zip: there is no checksum" in said


def test_held_out_scenes_are_not_trained_on():
    """Not even one that stands in both of the authors' lists."""
    val = [f"v{k:02d}" for k in range(12)]
    train = prepare.with_10_for_val("train", ["t0", "v03", "t1"], val)
    assert prepare.with_10_for_val("val", ["t0"], val) == val[:10]
    assert train == ["t0", "t1", "v10", "v11"]


def test_download_closed_dataset(tmp_path, capfd):
    """A dataset behind a registration cannot be fetched: exit 2 and how to get it."""
    code, said = attempt(capfd, tmp_path, "nuscenes", "--download")
    assert code == 2 and "http" in said


# ---- real extracts, where they are at hand (they may not be redistributed) ----


def sample(*parts):
    path = SHARED.joinpath("samples", *parts)
    if not path.exists():
        pytest.skip("no real extract here")
    return path


def test_real_nuscenes(tmp_path):
    """First key frame of scene-0061: number of points a camera (z > 1 m), and all of them between 4
    and 103 m."""
    rows = prepared(tmp_path, "nuscenes", sample("nuscenes"), "--points", 100000)
    count = {
        "CAM_FRONT": 3056,
        "CAM_FRONT_RIGHT": 3076,
        "CAM_FRONT_LEFT": 3700,
        "CAM_BACK": 4822,
        "CAM_BACK_LEFT": 4091,
        "CAM_BACK_RIGHT": 3370,
    }
    assert {r["camera"] for r in rows} == set(count)
    for row in rows:  # a few share a pixel or lie on the border
        assert 0.97 * count[row["camera"]] <= len(row["depth"]) <= count[row["camera"]]
        assert 3 < min(row["depth"]) and max(row["depth"]) < 140


def test_real_check_of_nuscenes(tmp_path, capfd):
    """Six real street views: silent on the labels as they are, z in their place (the published
    ones) is found."""
    rows = prepared(tmp_path, "nuscenes", sample("nuscenes"))
    code, said = checked(capfd, tmp_path / "out/val.jsonl")
    assert code == 0, said
    all_z(rows)
    (tmp_path / "out/val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said = checked(capfd, tmp_path / "out/val.jsonl")
    assert code != 0 and re.search(r"\bz\b.*euclid", said.lower()), said


def test_real_argoverse2(tmp_path):
    """A real sweep; the pose row 2.41 ms before it serves as camera time (no pictures in the
    extract: grey here)."""
    feather = pytest.importorskip("pyarrow.feather")
    log = sample("argoverse2", "sensor", "val", "7fab2350-7eaf-3b7e-a39d-6937a4c1bede")
    raw = tmp_path / "raw/val" / log.name
    shutil.copytree(log, raw)
    sweep = 315966265259836000
    stamps = np.array(feather.read_table(raw / "city_SE3_egovehicle.feather")["timestamp_ns"])
    at = int(stamps[np.abs(stamps - (sweep - 2_410_000)).argmin()])
    count = {"ring_front_center": 11452, "ring_front_left": 17079, "ring_side_right": 18215}
    for name in count:
        size = (1550, 2048) if name == "ring_front_center" else (2048, 1550)
        save(Image.new("RGB", size, (90, 90, 90)), raw / f"sensors/cameras/{name}/{at}.jpg")
    rows = prepared(
        tmp_path, "argoverse2", tmp_path / "raw", "--points", 100000, "--max-depth", 400
    )
    assert {r["camera"] for r in rows} == set(count)
    for row in rows:
        assert 0.96 * count[row["camera"]] <= len(row["depth"]) <= count[row["camera"]]
        if row["camera"] == "ring_front_center":
            assert 4.3 < min(row["depth"]) < 5 and 205 < max(row["depth"]) < 215


def test_real_ddad(tmp_path):
    """The DGP test scene: points of the first sample a camera."""
    rows = prepared(tmp_path, "ddad", sample("ddad"), "--points", 100000, "--max-depth", 400)
    first = {}
    for row in rows:
        first.setdefault(row["camera"], len(row["depth"]))
    assert len(rows) == 9
    for name, count in {"CAMERA_01": 4819, "CAMERA_05": 10872, "CAMERA_06": 10354}.items():
        assert 0.95 * count <= first[name] <= count


def test_real_sunrgbd(tmp_path):
    """Two real frames: each label is the file's own z (bits rotated right by three) as Euclidean,
    never a hole."""
    root = sample("sunrgbd", "SUNRGBD")
    rows = {
        Path(r["image"]).stem: r
        for r in prepared(tmp_path, "sunrgbd", root.parent, "--points", 3000)
    }
    for name, lo, hi, holes in (
        ("0000144", 0.640, 3.783, 0.134),
        ("img_0063", 1.430, 2.525, 0.323),
    ):
        raw = np.asarray(Image.open(next(root.rglob(f"depth/{name}*.png")))).astype(np.uint16)
        z = ((raw >> 3) | (raw << 13)) / 1000
        assert [z[z > 0].min(), z.max(), (z == 0).mean()] == pytest.approx(
            [lo, hi, holes], abs=1e-3
        )
        row = rows[name]
        x, y = np.array(row["pixel_coords"]).T
        exact = euclidean(np.where(z > 0, z, np.nan), row["intrinsics"])[y, x]
        assert np.abs(exact - row["depth"]).max() < 1e-3
    assert rows["0000144"]["intrinsics"][:4] == pytest.approx([529.5, 529.5, 364, 264])


def test_real_nyuv2(tmp_path):
    """Three 640 x 480 pairs in millimetres: 1-based principal point, labels inside of the Eigen
    crop."""
    root = sample("nyuv2", "metric3d_demo")
    rows = prepared(tmp_path, "nyuv2", root, "--points", 1000)
    assert len(rows) == 3
    for row in rows:
        number = Path(row["image"]).stem.split("_")[1]
        z = np.asarray(Image.open(root / f"depth/sync_depth_{number}.png")).astype(float) / 1000
        assert row["intrinsics"] == pytest.approx(
            [518.8579, 519.4696, 324.5824, 252.7362, 640, 480], abs=1e-3
        )
        x, y = np.array(row["pixel_coords"]).T
        assert np.abs(euclidean(z, row["intrinsics"])[y, x] - row["depth"]).max() < 1e-3
        assert 41 <= x.min() and x.max() <= 600 and 45 <= y.min() and y.max() <= 470


def test_real_waymo_calibration(tmp_path):
    """The real frame (five pictures, calibration, poses) with a LiDAR sphere of 20 m made here: all
    five cameras, whose real distortion moves pixels by up to 28 px."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    raw = tmp_path / "raw"
    shutil.copytree(sample("waymo", "training"), raw / "training")
    segment = next((raw / "training/camera_image").iterdir()).stem

    def table(part):
        return pq.read_table(raw / f"training/{part}/{segment}.parquet").to_pylist()

    def m(row, name):
        return np.array(next(v for k, v in row.items() if k.endswith(name + ".transform"))).reshape(
            4, 4
        )

    world_vehicle = m(table("vehicle_pose")[0], "world_from_vehicle")
    stamp = table("vehicle_pose")[0]["key.frame_timestamp_micros"]
    front = next(r for r in table("lidar_calibration") if r["key.laser_name"] == 2)
    e, (rows, cols) = m(front, "extrinsic"), (60, 160)
    lo, hi = (front[f"[LiDARCalibrationComponent].beam_inclination.{k}"] for k in ("min", "max"))
    inc = lo + (np.arange(rows)[::-1, None] + 0.5) / rows * (hi - lo)
    az = (2 * (cols - np.arange(cols) - 0.5) / cols - 1) * np.pi - np.arctan2(e[1, 0], e[0, 0])
    beams = 20 * np.stack(
        [np.cos(az) * np.cos(inc), np.sin(az) * np.cos(inc), np.sin(inc) + 0 * az], -1
    )
    world = apply(world_vehicle @ e, beams.reshape(-1, 3))
    ids, expected = np.zeros((rows * cols, 6)), {}
    images = {r["key.camera_name"]: r for r in table("camera_image")}
    for c in table("camera_calibration"):
        k = [
            c[f"[CameraCalibrationComponent].intrinsic.{n}"]
            for n in ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
        ]
        if c["key.camera_name"] == 1:
            assert k[2:8] == pytest.approx(
                [949.575, 633.242, 0.04036, -0.33002, 0.00104, -0.00157], abs=6e-4
            )
        w, h = (c[f"[CameraCalibrationComponent].{n}"] for n in ("width", "height"))
        c2w = (
            m(images[c["key.camera_name"]], "pose")
            @ m(c, "extrinsic")
            @ rigid(OPENCV_IN_VEHICLE, [0, 0, 0])
        )
        x, y, z = apply(np.linalg.inv(c2w), world).T
        seen = (z > 2) & (np.abs(x / z) < 0.55) & (np.abs(y / z) < 0.55)
        a, b = brown_conrady(np.where(seen, x / z, 0), np.where(seen, y / z, 0), *k[4:])
        u, v = k[0] * a + k[2], k[1] * b + k[3]  # edge convention
        seen &= (u > 60) & (u < w - 60) & (v > 60) & (v < h - 60) & (ids[:, 0] == 0)
        ids[seen] = np.stack(
            [0 * u + c["key.camera_name"], np.floor(u), np.floor(v), 0 * u, 0 * u, 0 * u], -1
        )[seen]
        pinhole = np.stack(
            [
                k[0] * x / z + k[2] - 0.5,
                k[1] * y / z + k[3] - 0.5,
                u - 0.5,
                v - 0.5,
                np.sqrt(x * x + y * y + z * z),
            ],
            1,
        )[seen]
        expected[w, h, round(k[0])] = pinhole, c2w
    cells = np.zeros((rows, cols, 4))
    cells[..., 0] = 20
    for part, component, values in (
        ("lidar", "LiDARComponent", cells),
        ("lidar_pose", "LiDARPoseComponent", cells),
        ("lidar_camera_projection", "LiDARCameraProjectionComponent", ids.reshape(rows, cols, 6)),
    ):
        name = f"[{component}].range_image_return1"
        columns = pa.table(
            {
                "key.segment_context_name": [segment],
                "key.laser_name": pa.array([2], pa.int8()),
                "key.frame_timestamp_micros": pa.array([stamp], pa.int64()),
                f"{name}.values": pa.array([values.ravel().astype(np.float32)]),
                f"{name}.shape": pa.array([list(values.shape)], pa.list_(pa.int32())),
            }
        )
        (raw / "training" / part).mkdir()  # only TOP has poses: that table stays empty
        pq.write_table(
            columns.slice(0, part != "lidar_pose"), str(raw / f"training/{part}/{segment}.parquet")
        )
    found = prepared(tmp_path, "waymo", raw, split="train")
    assert len(found) == 5 == len(expected)
    for row in found:
        table, c2w = expected[
            row["intrinsics"][4], row["intrinsics"][5], round(row["intrinsics"][0])
        ]
        is_pose(row, c2w, atol=1e-4)
        xy, d = np.array(row["pixel_coords"]), np.array(row["depth"])
        near = np.abs(d[:, None] - table[None, :, 4]) <= 1e-3
        pinhole, stated = (
            (np.abs(xy[:, None] - table[None, :, k : k + 2]).max(-1) <= 1.6) & near for k in (0, 2)
        )
        assert pinhole.any(1).all() or stated.any(1).all()
    assert max(np.abs(t[:, :2] - t[:, 2:4]).max() for t, _ in expected.values()) > 8
