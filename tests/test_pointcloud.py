"""pointcloud.py: the grid, the geometry, the camera of a photo, the answers that outlive a run, the
files, the picture, bad input."""
import base64
import fcntl
import http.client
import io
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import trimesh
from conftest import ROOT
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

import evaluate
import pointcloud
import render

Exif = ExifTags.Base


def make_photo(path, width=96, height=72, shift=0, **tags):
    """A photo with a colour per pixel, and EXIF tags."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = [x * 255 // width, y * 255 // height, (x * 7 + y * 13 + shift) % 256]
    exif = Image.Exif()
    if orientation := tags.pop("Orientation", None):
        exif[Exif.Orientation] = orientation
    for name, value in tags.items():
        exif.get_ifd(ExifTags.IFD.Exif)[Exif[name]] = value
    Image.fromarray(np.stack(pixels, 2).astype(np.uint8)).save(path, exif=exif)
    return path


@pytest.fixture
def photo(tmp_path):
    return make_photo(tmp_path / "desk.png")


def plane(pixels, intrinsics):
    """Euclidean distances of the pixels (N, 2) to the plane z = 2 + x / 2, y any."""
    fx, _, cx, _ = intrinsics[:4]
    z = 2 / (1 - (pixels[:, 0] - cx) / fx / 2)
    return z * render.ray_length(*pixels.T, intrinsics)


class Exact:
    """Exact distances of a plane in place of a model's answers. instead: what to answer to a query,
    by its number on the grid; cut: of which the token limit ended the answer; asked: these numbers;
    stop: before which one to raise `how`; during: called once, before the second batch."""

    def __init__(self):
        self.instead, self.cut, self.asked, self.numbers = {}, set(), [], {}
        self.stop, self.how, self.during = None, KeyboardInterrupt(), None

    def run_queries(self, model, checkpoint, records, pairs, task, batch_size, workers, decode):
        record = records[0]
        pixels = [tuple(pixel) for pixel in record["pixel_coords"].tolist()]
        depth_m = plane(record["pixel_coords"], record["intrinsics"])
        for start in range(0, len(pairs), batch_size):
            if self.stop is not None and len(self.asked) >= self.stop and len(pairs) > 1:
                raise self.how
            if start and self.during:
                during, self.during = self.during, None
                during()
            answers = []
            for _, k in pairs[start:start + batch_size]:
                number = self.numbers.setdefault(pixels[k], len(self.numbers))
                if len(pairs) > 1:  # else it is for the estimate of the time
                    self.asked.append(number)
                text = self.instead.get(number, f"It is {depth_m[k]:.6f} meters.")
                answers.append({"text": text})
                if number in self.cut:
                    answers[-1]["truncated"] = True
                if decode == "median":
                    answers[-1] |= {"confidence": number % 10 / 10, "q10": 1.0, "q90": 2.0}
            yield None, answers, 1


@pytest.fixture
def exact(monkeypatch):
    found = Exact()
    monkeypatch.setattr(evaluate, "run_queries", found.run_queries)
    monkeypatch.setattr(evaluate, "load_model", lambda *a: None)
    return found


@pytest.fixture
def no_model(monkeypatch):
    """-> a function that makes any later query of the model fail."""
    def fail(*args):
        raise AssertionError("the model was loaded")

    return lambda: monkeypatch.setattr(evaluate, "load_model", fail)


def cloud(*argv):
    pointcloud.main([str(a) for a in argv])


def error_of(capsys, *argv, code=2) -> str:
    """The one line that a call ends with (behind the usage, where argparse says it)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cloud(*argv)
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert stop.value.code == code and "error: " in line
    return line.split("error: ", 1)[1]


def contents(folder) -> dict:
    """Of all files but run.json, which has the flags."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


# --------------------------------------------------------------------------------------------------
# geometry


@pytest.mark.parametrize("width, height, count", [
    (640, 480, 10_000), (480, 640, 10_000), (4000, 3000, 10_000), (1242, 375, 5000), (100, 100, 1),
    (31, 17, 7), (20, 5000, 1000)])
def test_even_grid(width, height, count):
    grid = pointcloud.pixel_grid(width, height, count)
    rows, columns = grid.shape[:2]
    assert (grid >= 0).all() and (grid < (width, height)).all()
    assert np.issubdtype(grid.dtype, np.integer)
    assert len(np.unique(grid.reshape(-1, 2), axis=0)) == rows * columns
    assert abs(rows * columns / count - 1) <= (0.01 if count >= 1000 else 0.3)
    for values, length, n in ((grid[0, :, 0], width, columns), (grid[:, 0, 1], height, rows)):
        cell = length / n
        assert np.abs(np.diff(values) - cell).max(initial=0) < 1  # even
        # no border is favoured
        assert abs(values[0] - (length - 1 - values[-1])) <= 1 and values[0] <= cell
    if count >= 5000:
        assert 0.95 < width / columns / (height / rows) < 1.05  # square cells
    assert (grid == pointcloud.pixel_grid(width, height, count)).all()


def test_more_points_than_pixels():
    grid = pointcloud.pixel_grid(30, 20, 10_000)
    assert grid.shape == (20, 30, 2)
    assert (grid == np.stack(np.meshgrid(np.arange(30), np.arange(20)), -1)).all()


def test_unproject_is_the_inverse_of_projecting():
    rng = np.random.default_rng(0)
    fx, fy, cx, cy = intrinsics = (812.5, 790.1, 301.2, 255.7)
    pixels, depth_m = rng.uniform(0, 600, (500, 2)), rng.uniform(0.05, 200, 500)
    xyz = render.unproject(pixels, depth_m, intrinsics)
    assert np.allclose(np.linalg.norm(xyz, axis=1), depth_m, rtol=1e-12)  # Euclidean, not z
    assert np.abs(fx * xyz[:, 0] / xyz[:, 2] + cx - pixels[:, 0]).max() < 1e-3
    assert np.abs(fy * xyz[:, 1] / xyz[:, 2] + cy - pixels[:, 1]).max() < 1e-3
    x, y, z = render.unproject(np.array([[600.0, 600.0]]), np.ones(1), intrinsics)[0]
    assert x > 0 and y > 0 and z > 0  # right, down, forward


def test_edge_filter():
    depth_m = np.full((5, 7), 2.0, np.float32)
    depth_m[:, 4:] = 6.0  # a step is no flying point: both sides have their own neighbours
    depth_m[2, 3], depth_m[0, 0], depth_m[4, 6] = 4.0, np.nan, 6.5
    keep = pointcloud.has_neighbour(depth_m, 0.1)
    assert not keep[2, 3] and not keep[0, 0] and keep[4, 6]
    assert keep.sum() == 33
    assert not pointcloud.has_neighbour(np.full((1, 1), 2.0), 0.1).any()


# --------------------------------------------------------------------------------------------------
# the camera


FILM_DIAGONAL = math.hypot(24, 36)


@pytest.mark.parametrize("flags, intrinsics, source", [
    (("--photo-focal", 1200), (1200, 1200, 47.5, 35.5), "--photo-focal"),
    (("--intrinsics", "1200,1100.5,40,30"), (1200, 1100.5, 40, 30), "--intrinsics"),
    (("--fov", 90), (48, 48, 47.5, 35.5), "--fov 90"),
    (("--focal-35mm", 28), (28 * 120 / FILM_DIAGONAL, 28 * 120 / FILM_DIAGONAL, 47.5, 35.5),
     "--focal-35mm 28")])
def test_focal_flags(tmp_path, tiny, photo, exact, capsys, flags, intrinsics, source):
    """In pixels, by the horizontal field of view, or by the diagonal of 35 mm film; the photo's
    diagonal is 120 px."""
    cloud(tiny, photo, *flags, "--points", 20, "--out", tmp_path / "out")
    assert f"({source})" in capsys.readouterr().out
    found = np.load(tmp_path / "out/points.npz")["intrinsics"]
    assert found == pytest.approx((*intrinsics, 96, 72))
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["inputs"]["intrinsics"] == pytest.approx((*intrinsics, 96, 72))


@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
def test_exif_35mm(tmp_path, orientation):
    path = make_photo(tmp_path / "a.jpg", FocalLengthIn35mmFilm=28, Orientation=orientation)
    fx, fy, source = pointcloud.exif_focal(path)
    assert fx == fy == pytest.approx(28 / FILM_DIAGONAL * 120) and "28 mm" in source


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_focal_plane(tmp_path, orientation):
    """5 mm on a sensor of 200 x 180 px/mm, given in px/cm; the sensor's x axis is y in a photo that
    was rotated."""
    path = make_photo(tmp_path / "a.jpg", FocalLength=5.0, FocalPlaneXResolution=2000.0,
                      FocalPlaneYResolution=1800.0, FocalPlaneResolutionUnit=3,
                      Orientation=orientation)
    fx, fy, _ = pointcloud.exif_focal(path)
    assert (fx, fy) == pytest.approx((1000, 900) if orientation == 1 else (900, 1000))


def test_exif_of_a_resized_photo(tmp_path):
    path = make_photo(tmp_path / "a.jpg", FocalLength=5.0, FocalPlaneXResolution=2540.0,
                      ExifImageWidth=960, ExifImageHeight=720)  # no unit: inches
    assert pointcloud.exif_focal(path)[:2] == pytest.approx((50, 50))


@pytest.mark.parametrize("tags, words", [
    ({}, "--photo-focal"), ({"FocalLength": 5.0}, "--fov"),
    ({"FocalLengthIn35mmFilm": 0}, "--focal-35mm"),
    ({"FocalLengthIn35mmFilm": 28, "ExifImageWidth": 128, "ExifImageHeight": 72}, "cropped")])
def test_exif_never_guesses(tmp_path, tags, words):
    path = make_photo(tmp_path / "a.jpg", **tags)
    with pytest.raises(ValueError, match=words):
        pointcloud.exif_focal(path)


def with_metadata(path, size=(96, 72), xmp="", **tags):
    """A photo of a phone with 28 mm, and metadata where its container has them."""
    about = {"Make": "a", **tags}
    about = {Exif[name]: about.pop(name) for name in ("Make", "Model", "ImageDescription")
             if name in about}
    taken = {Exif[name]: value for name, value in {"FocalLengthIn35mmFilm": 28, **tags}.items()
             if Exif[name] not in about}
    options = {"exif": Image.Exif(), "xmp": xmp.encode()}
    if path.suffix == ".tiff":
        options = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()}
        options["tiffinfo"].update(about | {700: xmp.encode(), ExifTags.IFD.Exif: taken})
    else:
        options["exif"].update(about)
        options["exif"].get_ifd(ExifTags.IFD.Exif).update(taken)
    if path.suffix == ".png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    Image.new("RGB", size, (90, 120, 60)).save(path, **options)
    return path


def packet(inner):
    return ('<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
            f'22-rdf-syntax-ns#"><rdf:Description {inner}</rdf:RDF></x:xmpmeta>')


GPANO = 'xmlns:{0}="http://ns.google.com/photos/1.0/panorama/"'
NO_PINHOLES = {
    "a phone's panorama": {"CustomRendered": 6},
    "attribute": {"xmp": packet('GPano:ProjectionType="equirectangular"/>')},
    "element": {"xmp": packet("><GPano:ProjectionType>cylindrical</GPano:ProjectionType>")},
    "another prefix": {"xmp": packet(GPANO.format("p") + ' p:FullPanoWidthPixels="5376"/>')},
    "capitals": {"xmp": packet('gpano:PROJECTIONTYPE="EQUIRECTANGULAR"/>')},
    "a viewer": {"xmp": packet('GPano:UsePanoramaViewer="True"/>')},
    "namespace alone": {"xmp": packet(GPANO.format("x") + ' x:PoseHeadingDegrees="3"/>')},
    "video's": {"xmp": packet('xmlns:G="http://ns.google.com/videos/1.0/spherical/" G:Spherical='
                              '"true"/>')},
    "Hugin": {"UserComment": b"ASCII\0\0\0Projection: Equirectangular (2)\nFOV: 360 x 180"},
    "fisheye": {"LensModel": "8mm F3.5 Fisheye"},
    "Theta": {"Make": "RICOH", "Model": "RICOH THETA Z1", "size": (144, 72)},
    "Insta360": {"Make": "Arashi Vision", "Model": "Insta360 X3", "size": (144, 72)},
    "a strip": {"size": (400, 72)}, "an upright strip": {"size": (72, 400)},
}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("case", NO_PINHOLES)
def test_exif_of_no_pinhole_picture(tmp_path, tiny, exact, case, kind):
    """A panorama, a spherical or a fisheye image has no focal length, whatever its EXIF data say,
    and in whatever container and spelling it says what it is. A flag is another matter."""
    path = with_metadata(tmp_path / f"a.{kind}", **NO_PINHOLES[case])
    with pytest.raises(ValueError, match="a.*is a panorama, or spherical.*--photo-focal"):
        pointcloud.exif_focal(path)
    assert pointcloud.open_photo(str(path), fov=60).source == "--fov 60"


@pytest.mark.parametrize("metadata", [
    {}, {"CustomRendered": 1}, {"CustomRendered": 2}, {"CustomRendered": 8},
    {"Make": "RICOH", "Model": "GR III"}, {"size": (144, 72)},
    {"Make": "Insta360", "Model": "Insta360 Ace"}, {"size": (128, 54)},
    {"xmp": packet('xmlns:GCamera="http://ns.google.com/photos/1.0/camera/" GCamera:MotionPhoto='
                   '"1" xmlns:GDepth="http://ns.google.com/photos/1.0/depthmap/" GDepth:Near="1"/>'
                   )},
    {"xmp": packet('xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" crs:Blacks="4"/>')},
    {"ImageDescription": "view from the hotel", "UserComment": b"ASCII\0\0\0a comment"}])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_exif_of_plain_photos(tmp_path, metadata, kind):
    """What phones and other cameras of those makers write into every photo hinders nothing."""
    path = with_metadata(tmp_path / f"a.{kind}", **metadata)
    width, height = metadata.get("size", (96, 72))
    focal = 28 / FILM_DIAGONAL * math.hypot(width, height)
    assert pointcloud.exif_focal(path)[:2] == pytest.approx((focal, focal))


SENSOR = {"FocalLength": 5.0, "FocalPlaneXResolution": 2000.0, "FocalPlaneYResolution": 1800.0,
          "FocalPlaneResolutionUnit": 3, "FocalLengthIn35mmFilm": 0}


@pytest.mark.parametrize("tags, focals", [
    ({}, (1000, 900)), ({"DigitalZoomRatio": 1.0}, (1000, 900)),
    ({"DigitalZoomRatio": 0.0}, (1000, 900)), ({"DigitalZoomRatio": 4.0}, (4000, 3600)),
    ({"DigitalZoomRatio": 4.0, "FocalLengthIn35mmFilm": 28}, (4000, 3600)),
    ({"DigitalZoomRatio": 4.0, "FocalLengthIn35mmFilm": 112}, (4000, 3600)),
    ({"DigitalZoomRatio": 2.0, "ExifImageWidth": 960, "ExifImageHeight": 720}, (200, 180))])
def test_exif_digital_zoom(tmp_path, tags, focals):
    """The sensor's data are about all of it, so a digital zoom lengthens the focal length in
    pixels, also of a resized photo."""
    path = with_metadata(tmp_path / "a.jpg", **SENSOR | tags)
    fx, fy, source = pointcloud.exif_focal(path)
    assert (fx, fy) == pytest.approx(focals)
    assert ("digital zoom" in source) == (tags.get("DigitalZoomRatio", 0) > 1)


def test_exif_digital_zoom_of_film(tmp_path):
    """Some makers count a digital zoom into the 35 mm equivalent, and some do not: without the
    sensor's data nothing tells, so it is not guessed. A ratio of 1.01 is none."""
    path = with_metadata(tmp_path / "a.jpg", DigitalZoomRatio=2.5)
    with pytest.raises(ValueError, match="zoom of 2.5.*--focal-35mm 28 or 70"):
        pointcloud.exif_focal(path)
    path = with_metadata(tmp_path / "a.jpg", DigitalZoomRatio=1.01)
    assert pointcloud.exif_focal(path)[0] == pytest.approx(28 / FILM_DIAGONAL * 120)


@pytest.mark.parametrize("flags, words", [
    (("--photo-focal", 0.75), "divided by the image's width? Then 72, 72"),
    (("--photo-focal", 1e5), "20 sides"), (("--intrinsics", "80,20,47.5,35.5"), "160 degrees"),
    (("--focal-35mm", 1), "do not fit"), (("--focal-35mm", 5000), "20 sides")])
def test_cameras_that_there_cannot_be(tmp_path, tiny, photo, capsys, flags, words):
    """Before the model is loaded."""
    message = error_of(capsys, tmp_path / "no checkpoint", photo, *flags)
    assert words in message and "do not fit an image of 96 x 72 px" in message
    assert "about --fov 65" in message and message.endswith("in Python fov, focal or focal_35mm.")


@pytest.mark.parametrize("said", [None, "stored", "upright"])
def test_orientation_of_a_record(tmp_path, tiny, exact, monkeypatch, said):
    """The cloud's colours are those of the pixels that the labels belong to, and the model is shown
    the same."""
    path = make_photo(tmp_path / "a.png", Orientation=3)
    more = {"orientation": said} if said else {}
    (tmp_path / "val.jsonl").write_text(json.dumps({
        "image": "a.png", "intrinsics": [80, 80, 47.5, 35.5, 96, 72], "pixel_coords": [[3, 4]],
        "depth": [2.0], **more}))
    asked = []

    def run_queries(model, checkpoint, records, *rest, **more):
        asked.append(records[0]["orientation"])
        return exact.run_queries(model, checkpoint, records, *rest, **more)

    monkeypatch.setattr(evaluate, "run_queries", run_queries)
    cloud(tiny, tmp_path / "val.jsonl", "--record", 0, "--points", 60, "--out", tmp_path / "out")
    points = np.load(tmp_path / "out/points.npz")
    x, y = points["pixels"].T
    shown = np.asarray(Image.open(path))
    shown = shown[::-1, ::-1] if said == "upright" else shown
    assert (points["colors"] == shown[y, x]).all() and set(asked) == {said}
    opened = pointcloud.open_photo(str(path), focal=80)
    assert (np.asarray(opened.image) == np.asarray(Image.open(path))[::-1, ::-1]).all()
    assert opened.orientation == "upright"


def test_rotated_photo_is_upright(tmp_path, tiny, exact, capsys):
    """A turned phone: pixels, size and camera are those of the photo as a viewer shows it."""
    path = make_photo(tmp_path / "a.png", FocalLengthIn35mmFilm=30, Orientation=6)
    cloud(tiny, path, "--out", tmp_path / "out", "--points", 60)
    assert "72 x 96 px, focal 83.2 83.2 px (EXIF: 30 mm" in capsys.readouterr().out
    points = np.load(tmp_path / "out/points.npz")
    upright = np.asarray(render.open_image(path))
    x, y = points["pixels"].T
    assert upright.shape[:2] == (96, 72) and (points["colors"] == upright[y, x]).all()
    rows, columns = np.load(tmp_path / "out/depth.npy").shape
    assert rows > columns


# --------------------------------------------------------------------------------------------------
# queries and the cloud


def test_plane(tmp_path, tiny, photo, exact, capsys):
    """Exact distances of a plane become a plane; every file holds the same points."""
    exact.instead = {3: "no idea", 4: "-2 meters", 5: "0 m", 6: "1e300 m", 7: "1e-60 m"}
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 500, "--out", out, "--batch-size", 64)
    said = capsys.readouterr()
    depth_m, points = np.load(out / "depth.npy"), np.load(out / "points.npz")
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "answers.jsonl", "cloud.glb", "cloud.html", "cloud.ply", "depth.npy", "depth.png",
        "picture.png", "points.npz", "run.json"]
    queries = depth_m.size
    assert depth_m.dtype == np.float32 and len(points["xyz"]) == queries - 5
    assert np.isnan(depth_m.ravel()[3:8]).all() and np.isfinite(depth_m).sum() == queries - 5
    xyz = points["xyz"]
    assert np.abs(xyz[:, 2] - 2 - xyz[:, 0] / 2).max() < 1e-3
    assert np.allclose(np.linalg.norm(xyz, axis=1), points["depth"], rtol=1e-5)

    read = trimesh.load(out / "cloud.ply")
    assert (np.asarray(read.vertices, np.float32) == xyz).all()
    assert (np.asarray(read.colors)[:, :3] == points["colors"]).all()
    x, y = points["pixels"].T
    assert (points["colors"] == np.asarray(Image.open(photo))[y, x]).all()

    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == queries
    assert [line["pred"] for line in lines[3:8]] == [None] * 5 and lines[4]["text"] == "-2 meters"
    run = json.loads((out / "run.json").read_text())
    assert run["inputs"]["grid"] == list(depth_m.shape) and run["flags"]["photo_focal"] == 80
    assert f"{queries - 5} points, 5 of {queries} answers were no distance" in said.out
    assert "s a query" in said.out


def test_cut_answers_are_no_points(tmp_path, tiny, photo, exact, capsys):
    """A number that the token limit may have cut is none; it is kept as text, marked, and counted
    in the note, also by a later run that queries nothing."""
    exact.instead = {3: "It is 1", 4: "It is 2.", 5: "It is 2 m", 6: "It is 2 m away from"}
    exact.cut = {3, 4, 5, 6}
    out = tmp_path / "out"
    for _ in range(2):
        cloud(tiny, photo, "--photo-focal", 80, "--points", 500, "--out", out, "--decode", "greedy")
        depth_m = np.load(out / "depth.npy").ravel()
        assert np.isnan(depth_m[3:6]).all() and depth_m[6] == 2 and np.isfinite(depth_m[7:]).all()
        said = capsys.readouterr().out
        assert f"3 of {len(depth_m)} answers were no distance, 4 cut by the token limit" in said
    lines = [*map(json.loads, (out / "answers.jsonl").read_text().splitlines())]
    assert lines[3] == {"pixel": lines[3]["pixel"], "pred": None, "text": "It is 1",
                        "truncated": True}
    assert [k for k, line in enumerate(lines) if "truncated" in line] == [3, 4, 5, 6]


def test_edge_filter_is_for_the_cloud_only(tmp_path, tiny, photo, exact):
    exact.instead = {45: "It is 90 meters."}
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 200, "--out", out, "--edge-filter", 0.2)
    depth_m, points = np.load(out / "depth.npy"), np.load(out / "points.npz")
    assert depth_m.ravel()[45] == 90 and points["depth"].max() < 30
    assert len(points["xyz"]) == depth_m.size - 1


def test_confidence_filters_and_is_kept(tmp_path, tiny, photo, exact):
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 200, "--out", out, "--decode", "median",
          "--min-confidence", 0.45)
    points = np.load(out / "points.npz")
    assert len(points["confidence"]) == len(points["xyz"]) and points["confidence"].min() >= 0.45
    assert 0.4 < len(points["xyz"]) / np.load(out / "depth.npy").size < 0.6
    header = (out / "cloud.ply").read_bytes().split(b"end_header")[0].decode()
    assert "property float confidence" in header and "property float q90" in header


def test_other_filters_query_nothing(tmp_path, tiny, photo, exact, no_model, capsys):
    """The answers outlive the run: the cloud is made anew from them, the model is not loaded."""
    exact.instead = {45: "It is 90 meters."}
    out = tmp_path / "out"
    common = (tiny, photo, "--photo-focal", 80, "--points", 200, "--decode", "median", "--out", out)
    cloud(*common)
    whole, answers, asked = contents(out), (out / "answers.jsonl").read_bytes(), len(exact.asked)
    no_model()
    sizes = []
    for more in (["--min-confidence", 0.45], ["--edge-filter", 0.2],
                 ["--min-confidence", 0.45, "--edge-filter", 0.2], []):
        capsys.readouterr()
        cloud(*common, *more)
        assert "answered before" in capsys.readouterr().out
        sizes.append(len(np.load(out / "points.npz")["xyz"]))
        assert (out / "answers.jsonl").read_bytes() == answers
    assert sizes[0] < sizes[1] == sizes[3] - 1 and sizes[2] <= sizes[0]
    assert contents(out) == whole and len(exact.asked) == asked
    # a filter that leaves nothing is an error that costs no answer
    assert "highest is 0.90" in error_of(capsys, *common, "--min-confidence", 0.95)
    assert contents(out) == whole


@pytest.mark.parametrize("how, code", [(KeyboardInterrupt(), 130), (ValueError("broken"), 2),
                                       (RuntimeError("a worker was killed"), None)])
def test_interrupted_run_resumes(tmp_path, tiny, photo, exact, capsys, how, code):
    """Stopped after some batches, with a line cut off: the rest is queried, once, and all files are
    the same, byte for byte."""
    common = (tiny, photo, "--photo-focal", 80, "--points", 300, "--batch-size", 16, "--out")
    cloud(*common, tmp_path / "whole")
    total = len(exact.asked)
    exact.asked, exact.stop, exact.how = [], 100, how
    if code == 130:
        assert "same command" in error_of(capsys, *common, tmp_path / "parts", code=code)
    else:
        with pytest.raises((SystemExit, RuntimeError)):
            cloud(*common, tmp_path / "parts")
    answers = tmp_path / "parts" / pointcloud.ANSWERS
    assert len(answers.read_text().splitlines()) == 112
    assert not (tmp_path / "parts/cloud.ply").exists()
    answers.write_text(answers.read_text()[:-20])  # killed while a line was written
    exact.asked, exact.stop = [], None
    capsys.readouterr()
    cloud(*common, tmp_path / "parts")
    assert "resumes after 96 answers" in capsys.readouterr().out
    assert exact.asked == list(range(96, total))
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


@pytest.mark.parametrize("function", ["make_cloud", "write_cloud", "print_label_error"])
def test_killed_after_its_last_answer(tmp_path, tiny, photo, exact, no_model, monkeypatch, capsys,
                                      function):
    """With the files not begun, or all there: the same command ends well and queries nothing."""
    common = (tiny, photo, "--photo-focal", 80, "--points", 100, "--out")
    cloud(*common, tmp_path / "whole")

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pointcloud, function, kill)
        error_of(capsys, *common, tmp_path / "parts", code=130)
    no_model()
    cloud(*common, tmp_path / "parts")
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_killed_between_two_files(tmp_path, tiny, photo, exact, no_model):
    common = (tiny, photo, "--photo-focal", 80, "--points", 100, "--out", tmp_path / "out")
    cloud(*common)
    whole = contents(tmp_path / "out")
    for name in ("cloud.ply", "picture.png"):
        (tmp_path / "out" / name).unlink()
    no_model()
    cloud(*common)
    assert contents(tmp_path / "out") == whole


OTHERS = {
    "another camera": (("--photo-focal", 81), "intrinsics"),
    "another grid": (("--points", 200), "grid"),
    "another prompt": (("--prompt", "release"), "settings"),
    "another token limit": (("--max-new-tokens", 5), "settings"),
    "another decoding": (("--decode", "greedy"), "decode"),
    "another precision": (("--dtype", "bfloat16"), "dtype")}


@pytest.mark.parametrize("finished", [False, True], ids=["interrupted", "finished"])
@pytest.mark.parametrize("other", OTHERS)
def test_answers_of_another_cloud(tmp_path, tiny, photo, exact, capsys, other, finished):
    """What was answered with other inputs is refused by their name, and left as it is; --overwrite
    queries anew."""
    out, (more, word) = tmp_path / "out", OTHERS[other]
    common = (tiny, photo, "--out", out, "--photo-focal", 80, "--points", 300)
    if finished:
        cloud(*common)
    else:
        exact.stop = 40
        error_of(capsys, *common, code=130)
        exact.stop = None
    before, exact.asked = contents(out), []
    message = error_of(capsys, *common, *more)
    assert message.startswith(f"{out}: ") and f"different {word}" in message
    assert "--overwrite" in message and contents(out) == before and not exact.asked
    cloud(*common, *more, "--overwrite")
    assert len(exact.asked) == np.load(out / "depth.npy").size


def test_answers_of_another_photo_or_checkpoint(tmp_path, tiny, photo, exact, capsys):
    """By content: a copy is the same one, whatever its name; a retrained model is another one."""
    out = tmp_path / "out"
    common = ("--photo-focal", 80, "--points", 50, "--out", out)
    cloud(tiny, photo, *common)
    before, exact.asked = contents(out), []
    copy, same = shutil.copytree(tiny, tmp_path / "copy"), shutil.copy(photo, tmp_path / "b.png")
    cloud(copy, same, *common)
    assert contents(out) == before and not exact.asked

    make_photo(same, shift=1)
    assert "different image. Give" in error_of(capsys, tiny, same, *common)
    (copy / "model.safetensors").write_bytes(b"retrained")
    assert "different weights. Give" in error_of(capsys, copy, photo, *common)
    assert "different weights, image. Give" in error_of(capsys, copy, same, *common)
    assert contents(out) == before and not exact.asked


def test_overwrite_queries_anew(tmp_path, tiny, photo, exact):
    common = (tiny, photo, "--photo-focal", 80, "--points", 50, "--out", tmp_path / "out")
    cloud(*common)
    (tmp_path / "out/notes.txt").write_text("mine")
    before, total, exact.asked = contents(tmp_path / "out"), len(exact.asked), []
    exact.instead = {1: "?"}
    cloud(*common, "--overwrite")
    after = contents(tmp_path / "out")
    assert exact.asked == list(range(total)) and after["notes.txt"] == b"mine"
    assert all(after[name] != before[name] for name in pointcloud.FILES if name != "cloud.gif")


def test_a_cloud_without_its_answers_is_not_replaced(tmp_path, tiny, photo, exact, capsys):
    """Nobody knows what it is of."""
    common = (tiny, photo, "--photo-focal", 80, "--points", 50, "--out", tmp_path / "out")
    cloud(*common)
    (tmp_path / "out/answers.jsonl").unlink()
    (tmp_path / "out/run.json").unlink()
    before = contents(tmp_path / "out")
    message = error_of(capsys, *common)
    assert "--overwrite" in message and "another" in message
    assert contents(tmp_path / "out") == before
    cloud(*common, "--overwrite")
    assert (tmp_path / "out/answers.jsonl").exists()


def test_two_clouds_at_once_into_one_folder(tmp_path, tiny, photo, exact, capsys):
    """The second is refused, with --overwrite, too; the first is unharmed."""
    common = (tiny, photo, "--photo-focal", 80, "--points", 100, "--batch-size", 16, "--out")
    cloud(*common, tmp_path / "whole")
    out, refused = tmp_path / "out", []

    def second():
        for more in ([], ["--overwrite"]):
            refused.append(error_of(capsys, *common, out, *more))

    exact.during = second
    cloud(*common, out)
    assert len(refused) == 2
    assert all(f"{out}: another run is at work in it" in message for message in refused)
    assert contents(out) == contents(tmp_path / "whole")


def test_at(tmp_path, tiny, photo, exact, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exact.instead = {2: "far away"}
    common = (tiny, photo, "--photo-focal", 80, "--at", "47.5,35.5", "95,71", "0,0")
    cloud(*common)
    assert "47.5,35.5: 2.00 m (1.00-2.00) from the camera" in capsys.readouterr().out
    cloud(*common, "--decode", "greedy")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0] == "47.5,35.5: 2.00 m from the camera, z 2.00 m"
    distance = plane(np.array([[95.0, 71.0]]), (80, 80, 47.5, 35.5))[0]
    z = 2 / (1 - 47.5 / 80 / 2)
    words = lines[1].removeprefix("95,71: ").replace(",", "").split()
    found = [float(word) for word in words if word[0].isdigit()]
    assert found == pytest.approx([distance, z], abs=0.03)
    assert lines[2] == "0,0: no distance in 'far away'"
    assert not (tmp_path / "out").exists()


def test_record(tmp_path, tiny, world, exact, capsys, monkeypatch):
    """A record of a jsonl in place of the photo: its own camera, and a comparison with its
    labels."""
    monkeypatch.chdir(tmp_path)
    cloud(tiny, world, "--record", 2, "--points", 100)
    said = capsys.readouterr().out
    record = render.Records(world)[2]
    assert "(the record)" in said and "median error" in said
    found = np.load(tmp_path / "out/world-2/points.npz")["intrinsics"]
    assert found == pytest.approx(record["intrinsics"])


@pytest.mark.parametrize("kind", [None, "euclidean", "z"])
def test_labels_are_compared_with_the_nearest_point(tmp_path, tiny, exact, capsys, kind):
    """Labels of 1.1 times the distances; by --label-type z they are farther away still."""
    make_photo(tmp_path / "a.png")
    xy = np.array([[5, 5], [90, 60], [50, 20]])
    depth_m = 1.1 * plane(xy, (80, 80, 47.5, 35.5))
    record = {"image": "a.png", "intrinsics": [80, 80, 47.5, 35.5, 96, 72],
              "pixel_coords": xy.tolist(), "depth": depth_m.tolist()}
    (tmp_path / "val.jsonl").write_text(json.dumps(record) + "\n")
    more = ["--label-type", kind] if kind else []
    cloud(tiny, tmp_path / "val.jsonl", "--record", 0, "--points", 96 * 72, "--out",
          tmp_path / "out", *more)
    found = float(capsys.readouterr().out.split("median error ")[1].split("%")[0])
    ray = render.ray_length(*xy.T, (80, 80, 47.5, 35.5)) if kind == "z" else np.ones(3)
    assert found == pytest.approx(100 * np.median(1 - 1 / (1.1 * ray)), abs=0.3)


# --------------------------------------------------------------------------------------------------
# files, the picture


def test_ply_header_and_more_columns():
    """Any other column goes in as a float, such as a confidence."""
    file = io.BytesIO()
    columns = {key: np.arange(3, dtype=np.float32) for key in "xyz"}
    pointcloud.write_ply(file, **columns, red=np.array([1, 2, 3], np.uint8),
                         confidence=np.array([0.5, 0.25, 1.0]))
    header, body = file.getvalue().split(b"end_header\n")
    assert b"format binary_little_endian 1.0" in header and b"element vertex 3" in header
    assert header.count(b"property float") == 4 and header.count(b"property uchar") == 1
    assert len(body) == 3 * (4 * 4 + 1)


def test_colours_and_legend():
    distances = np.array([[0.5, 1.0, 2.0, 4.0, 8.0, np.nan]])
    colors = pointcloud.colorize(distances, 1, 4)[0].astype(int)
    assert (colors[0] == colors[1]).all() and (colors[3] == colors[4]).all()
    assert (colors[5] == pointcloud.UNKNOWN).all()
    # near is red, far is blue
    assert colors[1][0] > colors[1][2] and colors[3][2] > colors[3][0]
    image = pointcloud.legend(200, [1, 2, 4], " m")
    bar = np.asarray(image)[6:193, 10]
    assert image.size == (80, 200)
    assert (bar[-1] == colors[1]).all() and (bar[0] == colors[3]).all()
    assert np.abs(bar[93] - colors[2]).max() <= 3
    ticks = np.flatnonzero((np.asarray(image)[:, 26] == 0).all(1))
    assert ticks.tolist() == [6, 99, 192]  # 2 m is halfway
    assert (np.asarray(image)[:, 31:] < 128).sum() > 100  # numbers


def test_nearer_points_hide_others():
    """Two squares one behind the other: the near one is seen from the front, both from the side."""
    line = np.linspace(-1, 1, 81)
    x, y = (values.ravel() for values in np.meshgrid(line, line))
    xyz = np.concatenate([np.stack([x, y, np.full_like(x, z)], 1) for z in (3.0, 2.0)])
    red_green = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    colors = np.repeat(red_green, len(x), 0)

    def draw(yaw, pitch):
        turned = pointcloud.seen_from(yaw, pitch, xyz)
        frame = pointcloud.frame_of(turned)
        return np.asarray(pointcloud.draw_cloud(turned, colors, (120, 100), frame))

    def share(yaw, pitch):
        pixels = draw(yaw, pitch).reshape(-1, 3)
        return [float((pixels == color).all(1).mean()) for color in red_green]

    def middle(image, axis):
        return (np.flatnonzero((image == color).all(2).any(axis)).mean() for color in red_green)

    assert share(0, 0)[0] == 0 and share(0, 0)[1] > 0.5
    assert min(share(45, 0)) > 0.1 and min(share(0, 60)) > 0.1
    red, green = middle(draw(0, 60), 1)
    assert red < green  # from above, what is farther away is further up
    red, green = middle(draw(45, 0), 0)
    assert green < red  # from the right, what is nearer is on the left


@pytest.mark.parametrize("width, height", [(96, 72), (40, 120), (400, 10)])
def test_picture(tmp_path, tiny, exact, width, height):
    """Photo, answers, two views, the legend: none is empty."""
    photo = make_photo(tmp_path / "a.png", width, height)
    cloud(tiny, photo, "--fov", 60, "--points", 200, "--out", tmp_path / "out")
    image = Image.open(tmp_path / "out/picture.png")
    w, h = (max(round(n * 480 / max(width, height)), 160) for n in (width, height))
    assert image.width == 2 * w + 80 + 6 * 10
    pixels = np.asarray(image)
    second = 20 + np.flatnonzero((pixels[20 + h:, 20] == pointcloud.BACKGROUND).all(1))[0] + h
    shown = [pixels[y:y + h, x:x + w] for y in (20, second) for x in (20, w + 30)]
    assert all(len(np.unique(panel.reshape(-1, 3), axis=0)) > 20 for panel in shown)
    mean = np.asarray(Image.open(photo)).mean((0, 1))
    assert np.abs(shown[0].mean((0, 1)) - mean).max() < 4
    assert len(np.unique(pixels[40:h, 2 * w + 55].reshape(-1, 3), axis=0)) > 20


def flat_cloud(photo: pointcloud.Photo, depth_m: np.ndarray) -> pointcloud.Cloud:
    rows, columns = depth_m.shape
    grid = pointcloud.pixel_grid(*photo.image.size, depth_m.size)
    assert grid.shape == (rows, columns, 2)
    lines = [{"pred": None if np.isnan(d) else float(d)} for d in depth_m.ravel()]
    return pointcloud.make_cloud(photo, grid, lines)


def test_truth_and_error_of_labels(monkeypatch):
    """A wall that is answered as 3.0 to 3.1 m does not fill the colours, which span 2:1 or more on
    round numbers; each label is a dot in the colour of its truth, and of answer / truth."""
    image = Image.new("RGB", (96, 72), (120, 120, 120))
    labels = np.array([[20.0, 30.0], [70.0, 50.0]]), np.array([2.5, 4.0])
    photo = pointcloud.Photo("a.png", image, (80, 80, 47.5, 35.5, 96, 72), "the record", labels)
    cloud = flat_cloud(photo, np.linspace(3.0, 3.1, 12).reshape(3, 4))
    tiles, captioned = {}, render.captioned
    monkeypatch.setattr(render, "captioned", lambda tile, caption: tiles.setdefault(
        caption.split(":")[0], tile) and captioned(tile, caption))
    pointcloud.draw_picture(photo, cloud, "note", {})
    pixels = {name: np.asarray(tile) for name, tile in tiles.items()}
    assert (pixels["Answers"][0, 0] == pointcloud.colorize(cloud.depth_m, 2, 5)[0, 0]).all()
    ratio = [3.0 + 0.1 * 4 / 11, 3.0 + 0.1 * 10 / 11] / labels[1]  # their cells are 4 and 10
    assert pointcloud.label_ratios(photo, cloud.depth_m) == pytest.approx(ratio)
    for name, values, ends in (("Truth at the labels", labels[1], (2, 5)),
                               ("Answer / truth", ratio, (0.5, 2))):
        for (x, y), color in zip(labels[0], pointcloud.colorize(values, *ends)):
            found = pixels[name][round((y + 0.5) * 5), round((x + 0.5) * 5)]
            assert (found == color).all()


def test_compare(tmp_path, tiny, exact, capsys, monkeypatch):
    """A map of z at half the size is the truth, another is twice as far: a row of pictures each, at
    the scale of ours, and their errors; what is no map of this photo is refused before a query."""
    data, camera = tmp_path / "val.jsonl", (80, 90, 47.5, 35.5, 96, 72)
    make_photo(tmp_path / "a.png")
    y, x = np.mgrid[:72, :96]
    true = plane(np.stack([x, y], -1).reshape(-1, 2), camera).reshape(72, 96)
    places = np.random.default_rng(0).integers(0, (96, 72), (40, 2))
    depth = true[places[:, 1], places[:, 0]].tolist()
    render.write_jsonl(data, [{"image": "a.png", "intrinsics": camera, "depth": depth,
                               "pixel_coords": places.tolist()}])
    z = (true / render.ray_length(x, y, camera)).reshape(36, 2, 48, 2).mean((1, 3))
    np.save(tmp_path / "truth.npy", z.astype(np.float32))
    Image.fromarray((2000 * z).round().astype(np.uint16)).save(tmp_path / "far.png")
    Image.new("I;16", (96, 72)).save(tmp_path / "empty.png")
    Image.new("I;16", (72, 96), 5000).save(tmp_path / "turned.png")
    common = (tiny, data, "--record", 0, "--points", 500, "--depth-type", "z")

    size = {}
    for name, flags in ("alone", ()), ("with", ("--compare", tmp_path / "truth.npy")):
        cloud(*common, *flags, "--out", tmp_path / name)
        size[name] = Image.open(tmp_path / name / "picture.png").size
    said = capsys.readouterr().out
    error = re.search(r"truth against the record's labels: median error ([\d.]+)% at 40", said)
    assert float(error[1]) < 3
    assert size["with"][1] > size["alone"][1] + 350
    cloud(*common, "--compare", tmp_path / "far.png", "--depth-scale", 1000, "--out",
          tmp_path / "with")
    error = re.search(r"far against the record's labels: median error ([\d.]+)%",
                      capsys.readouterr().out)
    assert float(error[1]) == pytest.approx(100, abs=3)

    exact.asked = []
    for name, words in (("empty.png", "has no distance"), ("turned.png", "is 72 x 96"),
                        ("none.npy", "No such file")):
        said = error_of(capsys, *common, "--compare", tmp_path / name, "--out", tmp_path / "x")
        assert words in said and name in said
    assert not exact.asked
    said = error_of(capsys, *common, "--compare", tmp_path / "truth.npy", "--at", "3,4")
    assert "--compare: is for the cloud of one photo" in said


def test_surface_between_points():
    """Drawn between neighbours that are near each other, hardly so across an edge, not at all where
    there is no answer, and in the photo's colours."""
    image = Image.fromarray(np.full((60, 80, 3), np.arange(80)[None, :, None] * 3, np.uint8))
    photo = pointcloud.Photo("a.png", image, (1e9, 1e9, 39.5, 29.5, 80, 60), "")
    depth_m = np.tile([1.0, 1.02, 2.0, np.nan], (3, 1))
    xyz, colors = pointcloud.fill_in(photo, flat_cloud(photo, depth_m), (160, 120))
    z = xyz[:, 2]
    between = z[(z > 1.0) & (z < 1.02)]
    assert len(np.unique(between)) > 10  # a slope
    assert not ((z > 1.13) & (z < 1.81)).any() and len(z) == 160 * 120 * 3 / 4
    assert (z > 1.8).mean() == pytest.approx(1 / 3, abs=0.1)
    assert np.ptp(colors, 0).min() > 150


def test_one_point(tmp_path, tiny, photo, exact):
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 1, "--out", out)
    assert np.load(out / "depth.npy").shape == (1, 1)
    assert len(np.load(out / "points.npz")["xyz"]) == 1 and (out / "picture.png").exists()


def test_disk_full(tmp_path, tiny, photo, exact, no_model, monkeypatch, capsys):
    """Each file is the old one or the new one; with room again, the answers are still there."""
    common = (tiny, photo, "--photo-focal", 80, "--points", 100, "--out", tmp_path / "out")
    cloud(*common)
    names, before = set(contents(tmp_path / "out")), (tmp_path / "out/cloud.ply").read_bytes()

    def write(file, **columns):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pointcloud, "write_ply", write)
        assert "No space left" in error_of(capsys, *common, "--edge-filter", 0.1)
    assert set(contents(tmp_path / "out")) == names
    assert (tmp_path / "out/cloud.ply").read_bytes() == before
    no_model()
    cloud(*common)


# --------------------------------------------------------------------------------------------------
# in Python: the Reader


def test_import_is_light_and_no_focal_length_is_said_before_torch(photo):
    code = f"""
import sys, pointcloud
try:
    pointcloud.main(["no checkpoint", {str(photo)!r}])
finally:
    assert not {{"torch", "transformers"}} & set(sys.modules), "slow to import"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "about --fov 65" in done.stderr, done.stderr


def test_reader(tmp_path, tiny, exact):
    """A path, a PIL image and an array are the same photo, the camera is found in each way, and
    what comes back is what the command line writes."""
    path = make_photo(tmp_path / "a.png", FocalLengthIn35mmFilm=30, Orientation=6)
    reader, at = pointcloud.Reader(tiny), [(3, 4), (60.5, 80)]
    focal = 30 / FILM_DIAGONAL * 120
    true = plane(np.array(at), (focal, focal, 35.5, 47.5))
    with Image.open(path) as opened:
        for image in (path, str(path), opened):  # 72 x 96 px when upright
            metres, q10, q90, confidence = reader(image, at)
            assert metres == pytest.approx(true, abs=1e-5)
            assert (q10 == 1).all() and (q90 == 2).all() and (confidence < 1).all()
    upright = np.asarray(render.open_image(path))
    for camera in ({"focal": focal}, {"focal_35mm": 30}, {"fov": 2 * math.degrees(
            math.atan(36 / focal))}, {"intrinsics": (focal, focal, 35.5, 47.5)}):
        assert reader(upright, at, **camera)[0] == pytest.approx(true, abs=1e-5)
    assert reader(upright, at[0], focal=focal)[0] == pytest.approx(true[:1], abs=1e-5)
    for array in (upright / 255, upright[..., 0], upright.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"give \(height, width, 3\) of uint8"):
            reader(array, at, focal=focal)
    with pytest.raises(ValueError, match="about --fov 65"):
        reader(upright, at)
    with pytest.raises(ValueError, match=r"point \[72.0, 3.0\] is outside"):
        reader(path, [(72, 3)])

    xyz, colors = reader.cloud(path, points=200, edge_filter=0.5)
    cloud(tiny, path, "--points", 200, "--edge-filter", 0.5, "--out", tmp_path / "out")
    points = np.load(tmp_path / "out/points.npz")
    assert (xyz == points["xyz"]).all() and (colors == points["colors"]).all()


def test_reader_without_intervals(tiny, photo, exact):
    exact.instead = {1: "no idea"}
    reader = pointcloud.Reader(tiny, decode="greedy")
    found = reader(photo, [(0, 0), (9, 9)], focal=80)
    assert np.isnan(found).tolist() == [[False, True]] + 3 * [[True, True]]
    exact.instead = {k: "no idea" for k in range(500)}
    with pytest.raises(ValueError, match="none of its 48 answers is a distance"):
        reader.cloud(photo, points=50, focal=80)


def test_four_lines_of_the_readme(tmp_path, tiny, photo, exact, monkeypatch):
    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len([line for line in lines.splitlines() if line]) == 4
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/toy").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    Image.open(photo).resize((640, 480)).save("photo.jpg")
    names = {}
    exec(lines, names)
    expected = plane(np.array([[320, 240]]), pointcloud.open_photo("photo.jpg", fov=65).intrinsics)
    assert names["metres"] == pytest.approx(expected, abs=1e-5)
    assert len(names["xyz"]) == len(names["colors"]) > 9000


# --------------------------------------------------------------------------------------------------
# several photos, known distances, machine-readable output


def test_several_photos(tmp_path, tiny, exact, capsys, monkeypatch):
    """A folder and a photo: one model, a folder each; what cannot be read is a line, at once, and
    the others are done."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.jpg", "a.jpg"):
        make_photo(folder / name, FocalLengthIn35mmFilm=28)
    make_photo(folder / "no_exif.png")
    (folder / "damaged.jpg").write_bytes(b"no image")
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "notes.txt").write_text("no photo")
    single, loaded = make_photo(tmp_path / "c.jpg", FocalLengthIn35mmFilm=28), []
    monkeypatch.setattr(evaluate, "load_model", lambda *a: loaded.append(a))
    with pytest.raises(SystemExit) as stop:
        cloud(tiny, "photos", single, "--points", 50)
    assert stop.value.code == 2 and len(loaded) == 1
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1].strip() for error in errors] == [
        "photos/IMG_1.HEIC", "photos/damaged.jpg", "photos/no_exif.png", "3 of 6 photos failed, "
        "each with a line above."]
    assert "HEIC" in errors[0] and "about --fov 65" in errors[2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c"]
    assert all((tmp_path / "out" / name / "cloud.ply").exists() for name in "abc")

    cloud(tiny, "photos/a.jpg", single, "--points", 50, "--out", "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["a", "c"]
    (tmp_path / "empty").mkdir()
    assert "empty: holds no photo" in error_of(capsys, tiny, "empty")


def test_two_photos_of_one_name(tmp_path, tiny, exact, no_model, capsys):
    """Their clouds would share a folder: the second is refused before the model is loaded, with
    --overwrite, too; distances are written nowhere, so --at takes both."""
    photos = []
    for shift, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        photos.append(make_photo(tmp_path / name / "desk.png", shift=shift))
    common = (tiny, *photos, "--photo-focal", 80, "--points", 20, "--out", tmp_path / "out")
    cloud(*common, "--at", "3,4")
    with pytest.raises(SystemExit):
        cloud(*common, "--overwrite")
    said = capsys.readouterr().err.splitlines()
    first, last = (line for line in said if line.startswith("error: "))
    assert first.startswith(f"error: {photos[1]}: ") and "another photo of that name" in first
    assert "1 of 2 photos failed" in last
    answers = (tmp_path / "out/desk/answers.jsonl").read_bytes()
    no_model()
    cloud(tiny, photos[0], *common[3:-1], tmp_path / "out/desk")
    assert (tmp_path / "out/desk/answers.jsonl").read_bytes() == answers


def test_flags_may_stand_between_photos():
    for words in ("c --fov 65 a.jpg b.jpg", "c a.jpg --fov 65 b.jpg", "--fov 65 c a.jpg b.jpg"):
        args = pointcloud.parse_args(words.split())
        assert (args.checkpoint, args.photo, args.fov) == ("c", ["a.jpg", "b.jpg"], 65)
    assert pointcloud.parse_args(["c", "--serve"]).serve == 8000


def test_known_distances_scale(tmp_path, tiny, photo, exact, no_model, capsys):
    """All numbers are those of the model times the median ratio; the answers on disk are the
    model's, and only the known pixels are queried anew."""
    at = [(10, 10), (80, 60), (40, 30)]
    true = plane(np.array(at), (80, 80, 47.5, 35.5))
    known = [f"{x},{y}={ratio * d}" for (x, y), d, ratio in zip(at, true, (1.5, 1.2, 1.1))]
    common = (tiny, photo, "--photo-focal", 80)
    cloud(*common, "--at", "10,10", "5,5", "--known", *known)
    said = capsys.readouterr().out
    assert "scaled by 1.200; of the known distances the answers now differ by -20.0%, +0.0%" in said
    assert f"10,10: {1.2 * true[0]:.2f} m (1.20-2.40) from the camera" in said

    out = tmp_path / "out"
    cloud(*common, "--points", 200, "--out", out)
    before, exact.asked = np.load(out / "points.npz"), []
    cloud(*common, "--points", 200, "--out", out, "--known", *known)
    after = np.load(out / "points.npz")
    for key in ("xyz", "depth", "q10", "q90"):
        assert after[key] == pytest.approx(1.2 * before[key], rel=1e-5)
    assert (after["confidence"] == before["confidence"]).all()
    assert len(exact.asked) < 3 + 32  # the last batch and the known ones
    exact.instead = {k: "no idea" for k in range(500)}
    assert "none of its 3 answers" in error_of(capsys, *common, "--at", "1,2", "--known", *known)


def test_json(tmp_path, tiny, photo, exact, capsys):
    """One object a photo on stdout, everything else on stderr."""
    other = make_photo(tmp_path / "b.png", shift=5)
    common = (tiny, photo, other, "--photo-focal", 80, "--json")
    cloud(*common, "--at", "47.5,35.5", "0,0")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["photo"] == str(photo) and second["photo"] == str(other)
    assert first["intrinsics"] == [80, 80, 47.5, 35.5, 96, 72]
    assert [line["pixel"] for line in first["at"]] == [[47.5, 35.5], [0, 0]]
    assert first["at"][0]["pred"] == 2 and {"q10", "q90", "confidence"} <= set(first["at"][0])
    assert first["length"]["q10"] < first["length"]["pred"]
    cloud(*common, "--points", 50, "--out", tmp_path / "out")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["points"] == 48 and first["out"] == str(tmp_path / "out/desk")
    assert all((tmp_path / "out/desk" / name).exists() for name in first["files"])


@pytest.mark.parametrize("sides", [(0.3, 0.1), (0.02, 0.2)])
def test_length_and_its_interval(photo, sides):
    """Two points on one ray: the length is the difference of their distances, and the interval that
    of a difference. Without intervals there is none."""
    photo = pointcloud.open_photo(str(photo), focal=80)
    near, far = ({"pixel": [30, 30], "pred": d, "q10": d - side, "q90": d + side}
                 for d, side in zip((2.0, 5.0), sides))
    found = pointcloud.length_between(photo, [near, far])
    assert found["pred"] == pytest.approx(3)
    side = math.hypot(*sides)
    assert (found["q10"], found["q90"]) == pytest.approx((3 - side, 3 + side), abs=0.1 * side)
    assert pointcloud.length_between(photo, [near, far]) == found  # the same each time
    near.pop("q10")
    assert set(pointcloud.length_between(photo, [near, far])) == {"pred"}
    assert pointcloud.length_between(photo, [near, far | {"pred": None}]) is None
    assert pointcloud.length_between(photo, [near]) is None
    across = [{"pixel": [x, 35.5], "pred": math.hypot(1, 1)} for x in (-32.5, 127.5)]
    assert pointcloud.length_between(photo, across)["pred"] == pytest.approx(2)  # at 45 degrees


# --------------------------------------------------------------------------------------------------
# the other files


def step(pixels, intrinsics):
    """z 2 m in the left half, 4 m in the right."""
    z = np.where(pixels[:, 0] < 48, 2.0, 4.0)
    return z * render.ray_length(*pixels.T, intrinsics)


def test_mesh_is_cut_and_y_is_up(tmp_path, tiny, photo, exact, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "plane", step)
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 432, "--out", out)
    points, (rows, columns) = np.load(out / "points.npz"), np.load(out / "depth.npy").shape
    mesh, = trimesh.load(out / "cloud.glb").geometry.values()
    assert np.asarray(mesh.vertices) == pytest.approx(points["xyz"] * (1, -1, -1), abs=1e-6)
    # two triangles a cell, none across the step
    assert len(mesh.faces) == 2 * (rows - 1) * (columns - 2)
    assert len(set(np.round(mesh.vertices[mesh.faces][:, :, 2]).ravel())) == 2
    assert (np.ptp(mesh.vertices[mesh.faces][:, :, 2], axis=1) < 1e-4).all()
    assert (mesh.face_normals[:, 2] > 0.99).all()  # they face the camera
    texture = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB")).astype(int)
    x, y = np.clip(mesh.visual.uv * (96, -72) + (0, 72), 0, (95, 71)).astype(int).T
    assert np.abs(texture[y, x] - points["colors"]).mean() < 25  # JPEG


def test_depth_png_is_z_in_millimetres(tmp_path, tiny, photo, exact, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "plane", step)
    exact.instead = {0: "no idea", 1: "It is 90 meters."}
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 432, "--out", out)
    image = Image.open(out / "depth.png")
    z = np.asarray(image)
    assert image.mode == "I;16" and z.shape == np.load(out / "depth.npy").shape
    assert z[0, 0] == 0 and z[0, 1] == 0  # unknown; beyond 16 bits
    assert set(z.ravel().tolist()) == {0, 2000, 4000}
    assert (z[1:, :z.shape[1] // 2] == 2000).all() and (z[1:, z.shape[1] // 2:] == 4000).all()


def test_html_holds_the_cloud(tmp_path, tiny, photo, exact):
    out = tmp_path / "out"
    cloud(tiny, photo, "--photo-focal", 80, "--points", 50, "--out", out)
    text, points = (out / "cloud.html").read_text(), np.load(out / "points.npz")
    inside = re.search(r'<script id="cloud" type="application/json">(.*?)</script>', text, re.S)[1]
    data = json.loads(inside)
    for key in ("xyz", "colors", "confidence", "q10", "q90"):
        kind = points[key].dtype
        assert (np.frombuffer(base64.b64decode(data[key]), kind) == points[key].ravel()).all()
    assert text.replace(inside, "null") == pointcloud.PAGE.read_text()
    assert not re.search(r"(?:src|href|url)\W{1,3}(?:https?:|//)", text)  # no network
    odd = "</script><script>alert(1)"
    assert odd not in pointcloud.page_text({"note": odd})


@pytest.mark.slow
def test_gif(tmp_path, tiny, photo, exact):
    common = (tiny, photo, "--photo-focal", 80, "--points", 50, "--out", tmp_path / "out")
    cloud(*common, "--gif")
    with Image.open(tmp_path / "out/cloud.gif") as image:
        assert image.n_frames == 36 and image.size == (480, 360)
        frames = []
        for k in (0, 9, 18, 27):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
    assert len({frame.tobytes() for frame in frames}) == 4
    assert all((frame != pointcloud.BACKGROUND).any(2).mean() > 0.1 for frame in frames)
    cloud(*common, "--edge-filter", 0.2)  # no picture of other filters stays
    assert not (tmp_path / "out/cloud.gif").exists()


# --------------------------------------------------------------------------------------------------
# the page


@pytest.fixture
def server(tiny, exact):
    """-> a function that posts to a server of our own: (status, JSON objects); its port."""
    with pointcloud.make_server(pointcloud.Reader(tiny), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def post(path, body=b"", method="POST", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            headers = {"X-nanoDepthLM": "1"} | {key.replace("_", "-"): value
                                                for key, value in headers.items()}
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            text = reply.read().decode()
            connection.close()
            lines = [json.loads(line) for line in text.splitlines()] if text[:1] == "{" else text
            return reply.status, lines

        post.port = server.server_port
        yield post
        server.shutdown()
        thread.join()


def test_page_for_this_machine_alone(server, photo):
    """Nothing for another Host, which is what a name of another site that resolves to 127.0.0.1
    sends, nor without the header, which a page of another site cannot set."""
    status, text = server("/", method="GET")
    assert status == 200 and text == pointcloud.PAGE.read_text()
    data, path = photo.read_bytes(), "/photo?focal=80"
    assert server(path, data)[0] == 200
    assert server(path, data, Host=f"localhost:{server.port}")[0] == 200
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "127.0.0.1:1"):
        assert server(path, data, Host=host)[0] == 403
        assert server("/", method="GET", Host=host)[0] == 404
    assert server(path, data, X_nanoDepthLM="0")[0] == 403
    assert server("/none", data)[0] == 403 and server("/viewer.html", method="GET")[0] == 404
    assert server(path, b"", Content_Length=str(1 << 27))[0] == 403
    assert server(path, b"", Content_Length="-1")[0] == 403
    assert server("/", b"", method="OPTIONS")[0] == 501


def test_what_the_page_posts(server, photo, exact):
    """Two photos in turn, each answered about its own; what is wrong is said, and the next request
    is answered."""
    data = photo.read_bytes()
    (first,), (second,) = (server(path, data)[1] for path in ("/photo?focal=80", "/photo?fov=60"))
    assert first["id"] == second["id"] and first["intrinsics"][:2] == [80, 80]
    path = f"/distance?id={first['id']}&focal="
    (found,), (other,) = (server(path + focal, b"[[3, 4], [80, 60]]")[1] for focal in ("80", "70"))
    true = plane(np.array([[3, 4], [80, 60]]), first["intrinsics"])
    assert [answer["pred"] for answer in found["answers"]] == pytest.approx(true, abs=1e-5)
    assert found["answers"][0]["pred"] != other["answers"][0]["pred"] and found["length"]["q90"]

    *steps, last = server(f"/cloud?points=200&focal=80&id={first['id']}")[1]
    total = steps[0]["total"]
    assert [step["done"] for step in steps][-1] == total and len(steps) == -(-total // 32)
    xyz = np.frombuffer(base64.b64decode(last["cloud"]["xyz"]), np.float32)
    assert len(xyz) == 3 * total and "points" in last["cloud"]["note"]

    for path, body, words in (
            ("/photo?", data, "about --fov 65"), ("/photo?fov=0", data, "it is 1 to 160"),
            ("/photo?fov=nan", data, "it is 1 to 160"), ("/photo?fov=x", data, "could not convert"),
            ("/photo?focal=80", b"no image", "is no image of"),
            ("/photo?whatever=1", data, "unexpected keyword"),
            ("/distance?id=../../etc/passwd", b"[]", "no such photo"),
            (f"/distance?focal=80&id={first['id']}", b"[[3, 72]]", "outside of the"),
            (f"/distance?focal=80&id={first['id']}", b"[[3", "Expecting"),
            (f"/cloud?focal=80&points=0&id={first['id']}", b"", "0 is not 1 or more")):
        status, (found,) = server(path, body)
        assert status == 200 and words in found["error"], found


def test_port_in_use(server, tiny, capsys):
    message = error_of(capsys, tiny, "--serve", server.port)
    assert message == f"--serve {server.port}: Address already in use. Give another port."


class Browser:
    """A headless Chromium, spoken to through two pipes: JSON messages that end with a zero byte."""

    def __init__(self, program, folder):
        (commands, self.send), (self.receive, replies) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (commands, replies)]
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run",
                 "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                 "--remote-debugging-pipe", "--window-size=1200,800",
                 f"--user-data-dir={folder}", "about:blank"]
        command = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # Chromium's numbers
        self.process = subprocess.Popen(["bash", "-c", command, "bash", program, *flags],
                                        pass_fds=ends, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        for end in (commands, replies, *ends):
            os.close(end)
        self.number, self.read, self.about, self.faults = 0, b"", {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.about = {"sessionId": session["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.about}
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.read:
                assert select.select([self.receive], [], [], 60)[0], f"no answer to {method}"
                self.read += os.read(self.receive, 1 << 20)
            line, _, self.read = self.read.partition(b"\0")
            found = json.loads(line)
            if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(found["params"])
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def value(self, script):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, words) -> str:
        """Until the page's last line says it."""
        for _ in range(600):
            said = self.value("document.getElementById('status').textContent")
            if words in said:
                return said
            time.sleep(0.05)
        raise AssertionError(f"{words!r} was not said, but {said!r}; {self.faults}")

    def open(self, url):
        self.call("Page.navigate", url=url)
        for _ in range(600):
            if self.value("document.readyState") == "complete" and url in self.value(
                    "location.href"):
                return
            time.sleep(0.05)

    def mouse(self, *steps):
        """(kind, x, y), such as ("mousePressed", 3, 4)."""
        for kind, x, y in steps:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1,
                      clickCount=1)

    def click(self, element, x, y):
        """At this share of an element's width and height."""
        left, top, width, height = self.value(f"""(() => {{
            const box = document.getElementById("{element}").getBoundingClientRect();
            return [box.left, box.top, box.width, box.height]; }})()""")
        place = left + x * width, top + y * height
        self.mouse(("mousePressed", *place), ("mouseReleased", *place))

    def picture(self) -> np.ndarray:
        data = self.call("Page.captureScreenshot")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.send)
        os.close(self.receive)


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Chromium (apt install chromium)")
    found = Browser(program, tmp_path / "browser")
    yield found
    found.close()


def test_page_in_a_browser(tmp_path, tiny, exact, server, browser):
    """Served: a photo without EXIF data, its focal length, two clicks, a cloud, all by hand; then
    the same cloud as a file: colours, turning, measuring."""
    photo = make_photo(tmp_path / "desk.png", 480, 360)
    browser.open(f"http://127.0.0.1:{server.port}/")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(photo)], nodeId=node)
    said = browser.wait("no focal length")
    assert said.startswith("desk.png: ") and "Choose it above" in said and "--" not in said
    browser.value("unit.value = 'focal'; unit.onchange(); value.value = 400; value.onchange()")
    assert "480 × 360 px, focal length 400.0 400.0 px" in browser.wait("Click a pixel")

    browser.click("photo", 0.25, 0.5)
    browser.wait("m (1.00–2.00)")
    browser.click("photo", 0.75, 0.5)
    said = browser.wait("between the two")
    xy = np.array([[float(v) for v in pair] for pair in re.findall(r"(\d+), (\d+): ", said)])
    assert np.abs(xy - [[120, 180], [360, 180]]).max() <= 1
    true = plane(xy, (400, 400, 239.5, 179.5))
    for distance in true:
        assert f": {distance:.2f} m (1.00–2.00)" in said
    ends = render.unproject(xy, true, (400, 400, 239.5, 179.5))
    assert f"between the two: {np.linalg.norm(ends[0] - ends[1]):.2f} m (" in said
    marked = browser.value("[...document.querySelectorAll('#marks text')].map(t => t.textContent)")
    assert marked == [f"{distance:.2f} m (1.00–2.00)" for distance in true]
    boxes = browser.value("[...document.querySelectorAll('#marks text')].map(t => {"
                          "const b = t.getBoundingClientRect(); return [b.top, b.bottom]; })")
    assert boxes[0][1] <= boxes[1][0] + 6  # both at one height, and each can be read

    background = (browser.picture() == pointcloud.BACKGROUND).all(2).mean()
    browser.value("count.value = 1000; make.click()")
    said = browser.wait("Drag to turn")
    assert "answers were no distance" in said and not browser.faults
    assert (browser.picture() == pointcloud.BACKGROUND).all(2).mean() < background - 0.05
    other = make_photo(tmp_path / "lamp.png", 480, 360, FocalLengthIn35mmFilm=30, Orientation=1)
    browser.call("DOM.setFileInputFiles", files=[str(other)], nodeId=node)
    assert "EXIF: 30 mm" in browser.wait("lamp.png: 480 × 360")  # not the focal length before
    assert browser.value("[$('gl').hidden, cloud === null]") == [True, True]

    cloud(tiny, photo, "--photo-focal", 400, "--points", 2000, "--out", tmp_path / "out")
    browser.open((tmp_path / "out/cloud.html").as_uri())
    browser.wait("Drag to turn")
    shown = [browser.picture()]
    for mode in (1, 2):
        browser.value(f"mode.value = {mode}; mode.onchange()")
        shown.append(browser.picture())
    browser.mouse(("mousePressed", 500, 300), ("mouseMoved", 600, 330), ("mouseReleased", 600, 330))
    shown.append(browser.picture())
    for k, picture in enumerate(shown):
        assert (picture != pointcloud.BACKGROUND).any(2).mean() > 0.15
        assert all((picture != other).any(2).mean() > 0.05 for other in shown[:k])
    browser.value("reset.click()")
    xyz, ends = np.load(tmp_path / "out/points.npz")["xyz"], []
    for k in (800, 1200):
        ends.append(xyz[browser.value(f"""(() => {{
            const [x, y] = project(cloud.position.subarray(3 * {k}, 3 * {k} + 3));
            pick(x, y); draw(); return picked.at(-1); }})()""")])
        length = np.linalg.norm(ends[0] - (ends[1] if k == 1200 else 0))
        assert browser.wait(f": {length:.2f} m").endswith(" m" if k == 1200 else " (1.00–2.00)")
    assert not browser.faults


# --------------------------------------------------------------------------------------------------
# bad input: one line that says what is wrong and what helps


@pytest.mark.parametrize("flags, words", [
    (("--photo-focal", 0), "argument --photo-focal: 0 is not greater than 0"),
    (("--photo-focal", -3), "argument --photo-focal: -3 is not greater than 0"),
    (("--photo-focal", "nan"), "argument --photo-focal: nan is not"),
    (("--photo-focal", "inf"), "argument --photo-focal: inf is not"),
    (("--intrinsics", "80,80,96,10"), "a principal point in the image"),
    (("--intrinsics", "80,80,nan,10"), "They need finite numbers of pixels"),
    (("--fov", 0), "argument --fov: 0 is not 1 or more and at most 160"),
    (("--fov", 161), "argument --fov: 161 is not 1 or more and at most 160"),
    (("--fov", "nan"), "argument --fov: nan is not"),
    (("--focal-35mm", 0), "argument --focal-35mm: 0 is not greater than 0"),
    (("--photo-focal", 80, "--fov", 60),
     "argument --fov: not allowed with argument --photo-focal"),
    (("--fov", 60, "--focal-35mm", 28), "argument --focal-35mm: not allowed with argument --fov"),
    (("--focal-35mm", 28, "--photo-focal", 80),
     "argument --photo-focal: not allowed with argument --focal-35mm"),
    ((), "the main camera of a phone has about --fov 65"),
    (("--photo-focal", 80, "--at", "1,1", "96,3"), "the pixel 96,3 is outside of it; x is 0 to 95"),
    (("--photo-focal", 80, "--at", "3,nan"), "the pixel 3,nan is outside of it"),
    (("--photo-focal", 80, "--known", "3,72=2"), "the pixel 3,72 is outside of it"),
    (("--photo-focal", 80, "--known", "3,72"), "argument --known: invalid X,Y=METRES value"),
    (("--photo-focal", 80, "--known", "3,7=0"), "argument --known: 0 is not greater than 0"),
    (("--photo-focal", 80, "--serve"), "was taken for it) and photos, or --serve without any"),
    (("--photo-focal", 80, "--points", 0), "argument --points: 0 is not 1 or more"),
    (("--photo-focal", 80, "--batch-size", 0), "argument --batch-size: 0 is not 1 or more"),
    (("--photo-focal", 80, "--edge-filter", -1), "argument --edge-filter: -1 is not greater"),
    (("--photo-focal", 80, "--decode", "greedy", "--min-confidence", 0.5),
     "--min-confidence: needs --decode median"),
    (("--photo-focal", 80, "--decode", "median", "--min-confidence", 2),
     "argument --min-confidence: 2 is not 0 or more and at most 1"),
    (("--photo-focal", 80, "--focal", -1), "argument --focal: -1 is not greater than 0"),
    (("--photo-focal", 80, "--at", "12"), "argument --at: invalid X,Y value: '12'"),
    (("--photo-focal", 80, "--at", "a,b"), "argument --at: invalid X,Y value: 'a,b'"),
    (("--photo-focal", 80, "--at", "1,2,3"), "argument --at: invalid X,Y value: '1,2,3'")])
def test_bad_flags(tmp_path, tiny, photo, capsys, flags, words):
    common = (tiny, photo, "--out", tmp_path / "out", "--points", 4)
    assert words in error_of(capsys, *common, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [("--photo-focal", 80), ("--fov", 60), ("--focal-35mm", 28),
                                   ("--intrinsics", "80,80,9,9")])
def test_a_record_has_its_own_camera(tmp_path, tiny, world, capsys, flags):
    message = error_of(capsys, tiny, world, "--record", 0, "--out", tmp_path / "out",
                       "--points", 4, *flags)
    assert message.startswith("--record brings its own camera")
    assert not (tmp_path / "out").exists()


def test_bad_photo(tmp_path, tiny, photo, world, capsys):
    focal = ("--photo-focal", 80)
    assert "no such photo" in error_of(capsys, tiny, tmp_path / "none.jpg", *focal)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:300])
    assert "cut.png" in error_of(capsys, tiny, tmp_path / "cut.png", *focal)
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg" in error_of(capsys, tiny, tmp_path / "text.jpg", *focal)
    assert "--record N" in error_of(capsys, tiny, world)
    assert "leave it out" in error_of(capsys, tiny, photo, "--record", 0)
    assert "0 to 5" in error_of(capsys, tiny, world, "--record", 6)
    assert "--record: -1 is not 0 or more" in error_of(capsys, tiny, world, "--record", -1)


def test_bad_checkpoint(tmp_path, photo, capsys):
    focal = ("--photo-focal", 80)
    message = error_of(capsys, tmp_path / "none", photo, *focal)
    assert "no such checkpoint folder" in message
    assert "config.json" in error_of(capsys, tmp_path, photo, *focal)


def test_no_answer_is_a_distance(tmp_path, tiny, photo, exact, capsys):
    """Such answers are dropped: the next prompt or checkpoint starts without --overwrite."""
    exact.instead = {k: "I cannot say." for k in range(500)}
    common = (tiny, photo, "--photo-focal", 80, "--points", 50, "--out", tmp_path / "out")
    message = error_of(capsys, *common)
    assert "'I cannot say.'" in message and "prompt 'paper'" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "run.json"]
    message = error_of(capsys, tiny, photo, "--photo-focal", 80, "--at", "1,1")
    assert "none of its 1 answers is a distance" in message
    exact.instead = {}
    cloud(*common, "--prompt", "release")


# --------------------------------------------------------------------------------------------------
# with a model


def test_end_to_end(tmp_path, tiny, photo, capsys):
    """A random model: all is run; most answers are no distance, which gives a cloud of few points
    or an error."""
    out = tmp_path / "out"
    try:
        cloud(tiny, photo, "--photo-focal", 80, "--focal", 60, "--max-new-tokens", 6, "--workers",
              1, "--device", "cpu", "--points", 12, "--batch-size", 5, "--out", out)
        known = np.isfinite(np.load(out / "depth.npy")).sum()
        assert known and len(trimesh.load(out / "cloud.ply").vertices) == known
    except SystemExit as stop:
        assert stop.code == 2 and "none of its 12 answers is a" in capsys.readouterr().err


def test_answers_are_those_of_evaluation(tiny, photo):
    reader = pointcloud.Reader(tiny, "cpu", decode="greedy", focal=60, max_new_tokens=8)
    opened = pointcloud.open_photo(str(photo), focal=80)
    pixels = pointcloud.pixel_grid(96, 72, 9).reshape(-1, 2)
    record = {"image": str(photo), "intrinsics": opened.intrinsics, "pixel_coords": pixels,
              "depth": np.ones(len(pixels))}
    pairs = [(0, k) for k in range(len(pixels))]
    records = [render.check_record(record, "x")]
    (_, answers, _), = evaluate.run_queries(reader.model, reader.checkpoint, records, pairs)
    lines = reader.lines(opened, pixels)
    assert [line["text"] for line in lines] == [answer["text"] for answer in answers]
    assert [line["pixel"] for line in lines] == pixels.tolist()
    assert any(answer["text"] for answer in answers)
