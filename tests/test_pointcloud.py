"""pointcloud.py: the grid, the geometry, the camera of a photo, the files, resuming, the picture, bad input."""
import io
import json
import math

import numpy as np
import pytest
import torch
import trimesh
from PIL import ExifTags, Image

import evaluate
import pointcloud
import render

Exif = ExifTags.Base


def make_photo(path, width=96, height=72, **tags):
    """A photo with a colour per pixel, and EXIF tags."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 13) % 256], 2).astype(np.uint8))
    exif = Image.Exif()
    if orientation := tags.pop("Orientation", None):
        exif[Exif.Orientation] = orientation
    for name, value in tags.items():
        exif.get_ifd(ExifTags.IFD.Exif)[Exif[name]] = value
    image.save(path, exif=exif)
    return path


@pytest.fixture
def photo(tmp_path):
    return make_photo(tmp_path / "desk.png")


def plane(pixels, intrinsics):
    """Euclidean distances of the pixels (N, 2) to the plane z = 2 + x / 2, y any."""
    fx, _, cx, _ = intrinsics[:4]
    z = 2 / (1 - (pixels[:, 0] - cx) / fx / 2)
    return z * render.ray_length(*pixels.T, intrinsics)


@pytest.fixture
def exact(monkeypatch):
    """Exact distances of a plane in place of a model's answers; "instead": what to say to a query, by its number."""
    state = {"instead": {}, "asked": [], "stop": None, "how": KeyboardInterrupt()}

    def ask(model, encoder, settings, records, pairs, task, batch_size, workers, max_new_tokens, decode):
        record = records[0]
        depth = plane(record["pixel_coords"], record["intrinsics"])
        for at in range(0, len(pairs), batch_size):
            if state["stop"] is not None and len(state["asked"]) >= state["stop"]:
                raise state["how"]
            numbers = [k for _, k in pairs[at:at + batch_size]]
            state["asked"] += numbers
            answers = [{"text": state["instead"].get(k, f"It is {depth[k]:.6f} meters.")} for k in numbers]
            if decode == "median":
                answers = [{**a, "confidence": k % 10 / 10, "q10": 1.0, "q90": 2.0} for a, k in zip(answers, numbers)]
            yield None, answers, 1

    monkeypatch.setattr(evaluate, "ask", ask)
    monkeypatch.setattr(evaluate, "load_model", lambda *a: None)
    return state


def cloud(*argv):
    pointcloud.main([str(a) for a in argv])


def error_of(capsys, *argv) -> str:
    """The one line that a call ends with; it exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cloud(*argv)
    text = capsys.readouterr().err
    assert stop.value.code == 2
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and text.rstrip().endswith(lines[0])
    return lines[0]


# ---- geometry ----


@pytest.mark.parametrize("width, height, count", [(640, 480, 10_000), (480, 640, 10_000), (4000, 3000, 10_000),
                                                   (1242, 375, 5000), (100, 100, 1), (31, 17, 7), (20, 5000, 1000)])
def test_even_grid(width, height, count):
    grid = pointcloud.pixel_grid(width, height, count)
    rows, columns = grid.shape[:2]
    assert (grid >= 0).all() and (grid < (width, height)).all() and np.issubdtype(grid.dtype, np.integer)
    assert len(np.unique(grid.reshape(-1, 2), axis=0)) == rows * columns
    assert abs(rows * columns / count - 1) <= (0.01 if count >= 1000 else 0.3)
    for values, length, n in ((grid[0, :, 0], width, columns), (grid[:, 0, 1], height, rows)):
        cell = length / n
        assert np.abs(np.diff(values) - cell).max(initial=0) < 1  # even
        assert abs(values[0] - (length - 1 - values[-1])) <= 1 and values[0] <= cell  # no border is favoured
    if count >= 5000:
        assert 0.95 < width / columns / (height / rows) < 1.05  # square cells
    assert (grid == pointcloud.pixel_grid(width, height, count)).all()


def test_more_points_than_pixels():
    grid = pointcloud.pixel_grid(30, 20, 10_000)
    assert grid.shape == (20, 30, 2)
    assert (grid == np.stack(np.meshgrid(np.arange(30), np.arange(20)), -1)).all()


def test_unproject_is_the_inverse_of_projecting():
    rng = np.random.default_rng(0)
    intrinsics, pixels, depth = (812.5, 790.1, 301.2, 255.7), rng.uniform(0, 600, (500, 2)), rng.uniform(0.05, 200, 500)
    xyz = render.unproject(pixels, depth, intrinsics)
    assert np.allclose(np.linalg.norm(xyz, axis=1), depth, rtol=1e-12)  # Euclidean, not z
    fx, fy, cx, cy = intrinsics
    assert np.abs(fx * xyz[:, 0] / xyz[:, 2] + cx - pixels[:, 0]).max() < 1e-3
    assert np.abs(fy * xyz[:, 1] / xyz[:, 2] + cy - pixels[:, 1]).max() < 1e-3
    x, y, z = render.unproject(np.array([[600.0, 600.0]]), np.ones(1), intrinsics)[0]
    assert x > 0 and y > 0 and z > 0  # right, down, forward


def test_edge_filter():
    depth = np.full((5, 7), 2.0, np.float32)
    depth[:, 4:] = 6.0  # a step is no flying point: both sides have their own neighbours
    depth[2, 3], depth[0, 0], depth[4, 6] = 4.0, np.nan, 6.5
    keep = pointcloud.has_neighbour(depth, 0.1)
    assert not keep[2, 3] and not keep[0, 0] and keep[4, 6]
    assert keep.sum() == 33
    assert not pointcloud.has_neighbour(np.full((1, 1), 2.0), 0.1).any()


# ---- the camera ----


def test_focal_flags(photo):
    size = (96, 72)
    assert pointcloud.photo_camera(photo, size, [1200], None, None)[0] == (1200, 1200, 47.5, 35.5, 96, 72)
    assert pointcloud.photo_camera(photo, size, [1200, 1100.5], None, [40, 30])[0] == (1200, 1100.5, 40, 30, 96, 72)
    (fx, fy, *_), source = pointcloud.photo_camera(photo, size, None, 90, None)
    assert fx == fy == pytest.approx(48) and "90" in source


@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
def test_exif_35mm(tmp_path, orientation):
    path = make_photo(tmp_path / "a.jpg", FocalLengthIn35mmFilm=28, Orientation=orientation)
    fx, fy, source = pointcloud.exif_focal(path)
    assert fx == fy == pytest.approx(28 / math.hypot(24, 36) * math.hypot(96, 72)) and "28 mm" in source


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_focal_plane(tmp_path, orientation):
    """5 mm on a sensor of 200 x 180 px/mm, said in px/cm; the sensor's x axis is y in a photo that was rotated."""
    path = make_photo(tmp_path / "a.jpg", FocalLength=5.0, FocalPlaneXResolution=2000.0, FocalPlaneYResolution=1800.0,
                      FocalPlaneResolutionUnit=3, Orientation=orientation)
    fx, fy, _ = pointcloud.exif_focal(path)
    assert (fx, fy) == pytest.approx((1000, 900) if orientation == 1 else (900, 1000))


def test_exif_of_a_resized_photo(tmp_path):
    path = make_photo(tmp_path / "a.jpg", FocalLength=5.0, FocalPlaneXResolution=2540.0, ExifImageWidth=960,
                      ExifImageHeight=720)  # no unit: inches
    assert pointcloud.exif_focal(path)[:2] == pytest.approx((50, 50))


@pytest.mark.parametrize("tags, words", [
    ({}, "--focal"), ({"FocalLength": 5.0}, "--fov"), ({"FocalLengthIn35mmFilm": 0}, "--focal"),
    ({"FocalLengthIn35mmFilm": 28, "ExifImageWidth": 128, "ExifImageHeight": 72}, "cropped")])
def test_exif_never_guesses(tmp_path, tags, words):
    path = make_photo(tmp_path / "a.jpg", **tags)
    with pytest.raises(ValueError, match=words):
        pointcloud.exif_focal(path)


def test_rotated_photo_is_upright(tmp_path, tiny, exact, capsys):
    """A turned phone: pixels, size and camera are those of the photo as a viewer shows it."""
    path = make_photo(tmp_path / "a.png", FocalLengthIn35mmFilm=30, Orientation=6)
    cloud(tiny, path, "--out", tmp_path / "out", "--points", 60)
    assert "72 x 96 px, focal 83.2 83.2 px (EXIF: 30 mm" in capsys.readouterr().out
    points = np.load(tmp_path / "out/points.npz")
    upright = np.asarray(render.open_image(path))
    x, y = points["pixels"].T
    assert upright.shape[:2] == (96, 72) and (points["colors"] == upright[y, x]).all()
    depth = np.load(tmp_path / "out/depth.npy")
    assert depth.shape[0] > depth.shape[1]


# ---- asking ----


def test_plane(tmp_path, tiny, photo, exact, capsys):
    """Exact distances of a plane become a plane; every file holds the same points."""
    exact["instead"] = {3: "no idea", 4: "-2 meters", 5: "0 m", 6: "1e300 m", 7: "1e-60 m"}
    cloud(tiny, photo, "--focal", 80, "--points", 500, "--out", tmp_path / "out", "--batch-size", 64)
    said = capsys.readouterr()
    depth, points = np.load(tmp_path / "out/depth.npy"), np.load(tmp_path / "out/points.npz")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "cloud.ply", "depth.npy", "picture.png", "points.npz", "run.json"]
    rows, columns = depth.shape
    assert depth.dtype == np.float32 and len(points["xyz"]) == rows * columns - 5
    assert np.isnan(depth.ravel()[3:8]).all() and np.isfinite(depth).sum() == rows * columns - 5
    xyz = points["xyz"]
    assert np.abs(xyz[:, 2] - 2 - xyz[:, 0] / 2).max() < 1e-3
    assert np.allclose(np.linalg.norm(xyz, axis=1), points["depth"], rtol=1e-5)
    read = trimesh.load(tmp_path / "out/cloud.ply")
    assert (np.asarray(read.vertices, np.float32) == xyz).all()
    assert (np.asarray(read.colors)[:, :3] == points["colors"]).all()
    x, y = points["pixels"].T
    assert (points["colors"] == np.asarray(Image.open(photo))[y, x]).all()
    assert f"{rows * columns - 5} points, 5 of {rows * columns} answers were no distance" in said.out
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["unparsed"] == 5 and run["intrinsics"][:2] == [80, 80] and run["focal_source"] == "--focal"
    assert "s a query" in said.out + said.err


def test_edge_filter_is_for_the_cloud_only(tmp_path, tiny, photo, exact):
    exact["instead"] = {45: "It is 90 meters."}
    cloud(tiny, photo, "--focal", 80, "--points", 200, "--out", tmp_path / "out", "--edge-filter", 0.2)
    depth, points = np.load(tmp_path / "out/depth.npy"), np.load(tmp_path / "out/points.npz")
    assert depth.ravel()[45] == 90 and points["depth"].max() < 30 and len(points["xyz"]) == depth.size - 1


@pytest.mark.parametrize("how", [KeyboardInterrupt(), RuntimeError("DataLoader worker (pid 1) exited")])
def test_interrupted_run_goes_on(tmp_path, tiny, photo, exact, capsys, how):
    """Stopped after some batches, with a line cut off: the rest is asked, once, and all files are the same."""
    common = (tiny, photo, "--focal", 80, "--points", 300, "--batch-size", 16, "--out")
    cloud(*common, tmp_path / "whole")
    total = len(exact["asked"])
    exact.update(asked=[], stop=100, how=how)
    assert "same command" in error_of(capsys, *common, tmp_path / "parts")
    part = tmp_path / "parts" / pointcloud.PART
    assert len(part.read_text().splitlines()) == 1 + 112 and not (tmp_path / "parts/cloud.ply").exists()
    part.write_text(part.read_text()[:-20])  # killed while a line was written
    exact.update(asked=[], stop=None)
    cloud(*common, tmp_path / "parts")
    assert "goes on behind 96 answers" in capsys.readouterr().out
    assert exact["asked"] == list(range(96, total)) and not part.exists()
    for name in pointcloud.FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


@pytest.mark.parametrize("other, word", [(("--focal", 81), "intrinsics"), (("--focal", 80, "--points", 200), "grid"),
                                         (("--focal", 80, "--prompt", "release"), "settings")])
def test_part_of_another_run(tmp_path, tiny, photo, exact, capsys, other, word):
    common = (tiny, photo, "--out", tmp_path / "out", "--points", 300)
    exact["stop"] = 40
    error_of(capsys, *common, "--focal", 80)
    exact["stop"] = None
    message = error_of(capsys, *common, *other)
    assert word in message and "--overwrite" in message and pointcloud.PART in message
    cloud(*common, *other, "--overwrite")
    assert (tmp_path / "out/cloud.ply").exists()


def test_part_of_another_checkpoint_or_photo(tmp_path, tiny, photo):
    encoder, grid = render.load_encoder(str(tiny)), pointcloud.pixel_grid(96, 72, 50)
    asked = pointcloud.identity(str(photo), (80, 80, 1, 1, 96, 72), grid, {}, encoder.folder, "float32", 64, "greedy")
    (tmp_path / "model.safetensors").write_bytes(b"other")
    other = pointcloud.identity(str(photo), (80, 80, 1, 1, 96, 72), grid, {}, str(tmp_path), "float32", 64, "greedy")
    assert [k for k in asked if asked[k] != other[k]] == ["weights"]
    make_photo(photo, 96, 70)
    other = pointcloud.identity(str(photo), (80, 80, 1, 1, 96, 72), grid, {}, encoder.folder, "float32", 64, "greedy")
    assert [k for k in asked if asked[k] != other[k]] == ["image"]


def test_finished_folder_is_not_replaced(tmp_path, tiny, photo, exact, capsys):
    common = (tiny, photo, "--focal", 80, "--points", 50, "--out", tmp_path / "out")
    cloud(*common)
    (tmp_path / "out/notes.txt").write_text("mine")
    before = (tmp_path / "out/cloud.ply").read_bytes()
    message = error_of(capsys, *common)
    assert "--overwrite" in message and "cloud.ply" in message
    exact["instead"] = {1: "?"}
    cloud(*common, "--overwrite")
    assert (tmp_path / "out/cloud.ply").read_bytes() != before and (tmp_path / "out/notes.txt").read_text() == "mine"


def test_at(tmp_path, tiny, photo, exact, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exact["instead"] = {2: "far away"}
    cloud(tiny, photo, "--focal", 80, "--at", "47.5,35.5", "95,71", "0,0")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0] == "47.5,35.5: 2.00 m from the camera, z 2.00 m"
    distance, z = plane(np.array([[95.0, 71.0]]), (80, 80, 47.5, 35.5))[0], 2 / (1 - 47.5 / 80 / 2)
    found = [float(word) for word in lines[1].replace("95,71:", "").replace(",", "").split() if word[0].isdigit()]
    assert found == pytest.approx([distance, z], abs=0.03)
    assert lines[2] == "0,0: no distance in 'far away'"
    assert not (tmp_path / "out").exists()


def test_record(tmp_path, tiny, world, exact, capsys, monkeypatch):
    """A record of a jsonl in place of the photo: its own camera, and a comparison with its labels."""
    monkeypatch.chdir(tmp_path)
    cloud(tiny, world, "--record", 2, "--points", 100)
    said = capsys.readouterr().out
    record = render.Records(world)[2]
    assert "(the record)" in said and "median error" in said
    out = tmp_path / f"out/{evaluate.dataset_name(str(world))}-2"
    assert np.load(out / "points.npz")["intrinsics"][:4] == pytest.approx(record["intrinsics"][:4])


def test_labels_are_compared_with_the_nearest_point(tmp_path, tiny, exact, capsys):
    make_photo(tmp_path / "a.png")
    xy = np.array([[5, 5], [90, 60], [50, 20]])
    depth = 1.1 * plane(xy, (80, 80, 47.5, 35.5))
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "a.png", "intrinsics": [80, 80, 47.5, 35.5, 96, 72],
                                                    "pixel_coords": xy.tolist(), "depth": depth.tolist()}) + "\n")
    cloud(tiny, tmp_path / "val.jsonl", "--record", 0, "--points", 96 * 72, "--out", tmp_path / "out")
    error = float(capsys.readouterr().out.split("median error ")[1].split("%")[0])
    assert error == pytest.approx(9.1, abs=0.3)  # 1 - 1 / 1.1


# ---- files, the picture ----


def test_ply_header_and_more_columns():
    """Any other column goes in as a float, such as a confidence."""
    file = io.BytesIO()
    columns = {k: np.arange(3, dtype=np.float32) for k in "xyz"}
    pointcloud.write_ply(file, **columns, red=np.array([1, 2, 3], np.uint8), confidence=np.array([0.5, 0.25, 1.0]))
    header, body = file.getvalue().split(b"end_header\n")
    assert b"format binary_little_endian 1.0" in header and b"element vertex 3" in header
    assert header.count(b"property float") == 4 and header.count(b"property uchar") == 1
    assert len(body) == 3 * (4 * 4 + 1)


def test_colours_and_legend():
    colors = pointcloud.colorize(np.array([[0.5, 1.0, 2.0, 4.0, 8.0, np.nan]]), 1, 4)[0].astype(int)
    assert (colors[0] == colors[1]).all() and (colors[3] == colors[4]).all() and (colors[5] == pointcloud.UNKNOWN).all()
    assert colors[1][0] > colors[1][2] and colors[3][2] > colors[3][0]  # near is red, far is blue
    image = pointcloud.legend(200, 1, 4)
    bar = np.asarray(image)[6:193, 10]
    assert image.size == (80, 200)
    assert (bar[-1] == colors[1]).all() and (bar[0] == colors[3]).all()
    assert (np.asarray(image)[:, 31:] < 128).sum() > 100  # numbers


def test_nearer_points_hide_others():
    """Two squares one behind the other: the near one is seen from the front, both from the side."""
    x, y = (v.ravel() for v in np.meshgrid(np.linspace(-1, 1, 21), np.linspace(-1, 1, 21)))
    xyz = np.concatenate([np.stack([x, y, np.full_like(x, z)], 1) for z in (3.0, 2.0)])
    colors = np.repeat(np.array([[255, 0, 0], [0, 255, 0]], np.uint8), len(x), 0)
    side = np.full(len(xyz), 0.15)

    def share(yaw, pitch):
        pixels = np.asarray(pointcloud.draw_cloud(xyz, colors, side, (120, 100), yaw, pitch)).reshape(-1, 3)
        return [float((pixels == color).all(1).mean()) for color in ((255, 0, 0), (0, 255, 0))]

    assert share(0, 0)[0] == 0 and share(0, 0)[1] > 0.5
    assert min(share(45, 0)) > 0.1 and min(share(0, 60)) > 0.1
    image = np.asarray(pointcloud.draw_cloud(xyz, colors, side, (120, 100), 0, 60)).astype(int)
    red, green = (np.flatnonzero((image == color).all(2).any(1)).mean() for color in ((255, 0, 0), (0, 255, 0)))
    assert red < green  # from above, what is farther away is further up
    image = np.asarray(pointcloud.draw_cloud(xyz, colors, side, (120, 100), 45, 0)).astype(int)
    red, green = (np.flatnonzero((image == color).all(2).any(0)).mean() for color in ((255, 0, 0), (0, 255, 0)))
    assert green < red  # from the right, what is nearer is on the left


@pytest.mark.parametrize("width, height", [(96, 72), (40, 120), (400, 10)])
def test_picture(tmp_path, tiny, exact, width, height):
    photo = make_photo(tmp_path / "a.png", width, height)
    cloud(tiny, photo, "--fov", 60, "--points", 200, "--out", tmp_path / "out")
    image = Image.open(tmp_path / "out/picture.png")
    w, h = (max(round(n * 600 / max(width, height)), 160) for n in (width, height))
    assert image.size == (2 * w + 104, 2 * h + 72)
    pixels = np.asarray(image)
    shown = [pixels[20 + dy:20 + dy + h, 8 + dx:8 + dx + w] for dy in (0, h + 24) for dx in (0, w + 8)]
    assert all(len(np.unique(p.reshape(-1, 3), axis=0)) > 20 for p in shown)  # photo, depth, two views: none is empty
    assert np.abs(shown[0].mean((0, 1)) - np.asarray(Image.open(photo)).mean((0, 1))).max() < 4
    assert len(np.unique(pixels[30:h, 2 * w + 35].reshape(-1, 3), axis=0)) > 20  # the legend


def test_one_point(tmp_path, tiny, photo, exact):
    cloud(tiny, photo, "--focal", 80, "--points", 1, "--out", tmp_path / "out")
    assert np.load(tmp_path / "out/depth.npy").shape == (1, 1)
    assert len(np.load(tmp_path / "out/points.npz")["xyz"]) == 1 and (tmp_path / "out/picture.png").exists()


def test_disk_full(tmp_path, monkeypatch):
    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "cloud.ply").write_bytes(b"old")
    with pytest.raises(OSError):
        pointcloud.save(tmp_path / "cloud.ply", write)
    assert [p.name for p in tmp_path.iterdir()] == ["cloud.ply"] and (tmp_path / "cloud.ply").read_bytes() == b"old"


# ---- bad input: one line that says what is wrong and what helps ----


@pytest.mark.parametrize("flags, words", [
    (("--focal", 0), "--focal 0"), (("--focal", -3), "positive"), (("--focal", "nan"), "positive"),
    (("--focal", "inf"), "positive"), (("--focal", 1, 2, 3), "fx and fy"), (("--focal", 80, 0), "positive"),
    (("--fov", 0), "between 0 and 180"), (("--fov", 180), "between 0 and 180"), (("--fov", "nan"), "between 0 and 180"),
    (("--focal", 80, "--fov", 60), "not both"), ((), "--focal PIXELS or --fov DEGREES"),
    (("--focal", 80, "--center", 96, 10), "--center 96,10"), (("--focal", 80, "--at", "1,1", "96,3"), "--at 96,3"),
    (("--focal", 80, "--at", "3,nan"), "--at 3,nan"), (("--focal", 80, "--points", 0), "--points 0"),
    (("--focal", 80, "--batch-size", 0), "--batch-size 0"), (("--focal", 80, "--edge-filter", -1), "--edge-filter -1"),
    (("--record", 0, "--focal", 80), "--record"), (("--focal", 80, "--unified-focal", -1), "focal -1")])
def test_bad_flags(tmp_path, tiny, photo, capsys, flags, words):
    assert words in error_of(capsys, tiny, photo, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_bad_photo(tmp_path, tiny, photo, world, capsys):
    assert "no such photo" in error_of(capsys, tiny, tmp_path / "none.jpg", "--focal", 80)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:300])
    assert "cut.png" in error_of(capsys, tiny, tmp_path / "cut.png", "--focal", 80)
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg" in error_of(capsys, tiny, tmp_path / "text.jpg", "--focal", 80)
    assert "--record N" in error_of(capsys, tiny, world)
    assert "leave it out" in error_of(capsys, tiny, photo, "--record", 0)
    assert "0 to 5" in error_of(capsys, tiny, world, "--record", 6)
    assert "0 to 5" in error_of(capsys, tiny, world, "--record", -1)


def test_bad_checkpoint(tmp_path, photo, capsys):
    assert "no such checkpoint folder" in error_of(capsys, tmp_path / "none", photo, "--focal", 80)
    assert "config.json" in error_of(capsys, tmp_path, photo, "--focal", 80)


def test_pixels_have_a_form(tiny, photo, capsys):
    for text in ("12", "a,b", "1,2,3"):
        with pytest.raises(SystemExit) as stop:
            cloud(tiny, photo, "--focal", 80, "--at", text)
        assert stop.value.code == 2 and "give x,y" in capsys.readouterr().err


def test_no_answer_is_a_distance(tmp_path, tiny, photo, exact, capsys):
    exact["instead"] = {k: "I cannot say." for k in range(500)}
    message = error_of(capsys, tiny, photo, "--focal", 80, "--points", 50, "--out", tmp_path / "out")
    assert "'I cannot say.'" in message and "prompt 'paper'" in message
    assert list((tmp_path / "out").iterdir()) == []
    assert "none of its answers" in error_of(capsys, tiny, photo, "--focal", 80, "--at", "1,1")


# ---- with a model ----


def test_end_to_end(tmp_path, tiny, photo, capsys):
    """A random model: all is run; what it says is mostly no distance, which gives a cloud of few points or an error."""
    try:
        cloud(tiny, photo, "--focal", 80, "--unified-focal", 60, "--max-new-tokens", 6, "--workers", 1,
              "--device", "cpu", "--points", 12, "--batch-size", 5, "--out", tmp_path / "out")
        known = np.isfinite(np.load(tmp_path / "out/depth.npy")).sum()
        assert known and len(trimesh.load(tmp_path / "out/cloud.ply").vertices) == known
    except SystemExit as stop:
        assert stop.code == 2 and "of its 12 answers is a distance" in capsys.readouterr().err


def test_answers_are_those_of_evaluation(tiny, photo):
    settings, intrinsics = {**render.DEFAULTS, "focal": 60}, (80, 80, 47.5, 35.5, 96, 72)
    encoder, model = render.load_encoder(str(tiny)), evaluate.load_model(str(tiny), "cpu", torch.float32)
    pixels = pointcloud.pixel_grid(96, 72, 9).reshape(-1, 2)
    record = {"image": str(photo), "intrinsics": intrinsics, "pixel_coords": pixels, "depth": np.ones(len(pixels))}
    pairs = [(0, k) for k in range(len(pixels))]
    (_, answers, _), = evaluate.ask(model, encoder, settings, [render.check_record(record, "x")], pairs, max_new_tokens=8)
    lines, = pointcloud.ask_pixels(model, encoder, settings, str(photo), intrinsics, pixels, 32, 0, 8)
    assert [line["text"] for line in lines] == [a["text"] for a in answers] and any(a["text"] for a in answers)


def test_confidence_filters_and_is_kept(tmp_path, tiny, photo, exact, capsys):
    cloud(tiny, photo, "--focal", 80, "--points", 200, "--out", tmp_path / "out", "--decode", "median", "--min-confidence", 0.45)
    points = np.load(tmp_path / "out/points.npz")
    assert len(points["confidence"]) == len(points["xyz"]) and points["confidence"].min() >= 0.45
    assert 0.4 < len(points["xyz"]) / np.load(tmp_path / "out/depth.npy").size < 0.6
    header = (tmp_path / "out/cloud.ply").read_bytes().split(b"end_header")[0].decode()
    assert "property float confidence" in header and "property float q90" in header
    for more, message in ((["--min-confidence", 0.5], "--decode median"), (["--decode", "median", "--min-confidence", 2], "leaves no point")):
        with pytest.raises(SystemExit):
            cloud(tiny, photo, "--focal", 80, "--points", 200, "--out", tmp_path / message.split()[0], *more)
        assert message in capsys.readouterr().err
