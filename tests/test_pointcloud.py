"""pointcloud.py: the grid, the geometry, the camera of a photo, the answers that outlive a run, the
files, the picture, bad input."""
import io
import json
import math
import shutil

import numpy as np
import pytest
import trimesh
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
        if len(pairs) == 1:  # a warm-up
            yield None, [{"text": "It is 1 meter."}], 1
            return
        pixels = [tuple(pixel) for pixel in record["pixel_coords"].tolist()]
        depth_m = plane(record["pixel_coords"], record["intrinsics"])
        for start in range(0, len(pairs), batch_size):
            if self.stop is not None and len(self.asked) >= self.stop:
                raise self.how
            if start and self.during:
                during, self.during = self.during, None
                during()
            answers = []
            for _, k in pairs[start:start + batch_size]:
                number = self.numbers.setdefault(pixels[k], len(self.numbers))
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
    (("--intrinsics", 1200, 1100.5, 40, 30), (1200, 1100.5, 40, 30), "--intrinsics"),
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
    (("--photo-focal", 1e5), "20 sides"), (("--intrinsics", 80, 20, 47.5, 35.5), "160 degrees"),
    (("--focal-35mm", 1), "do not fit"), (("--focal-35mm", 5000), "20 sides")])
def test_cameras_that_there_cannot_be(tmp_path, tiny, photo, capsys, flags, words):
    """Before the model is loaded."""
    message = error_of(capsys, tmp_path / "no checkpoint", photo, *flags)
    assert words in message and "do not fit an image of 96 x 72 px" in message
    assert "about --fov 65" in message and message.endswith("or --focal-35mm MM.")


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
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
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


@pytest.mark.parametrize("function", ["make_cloud", "write_cloud", "label_error"])
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
    assert message.startswith(f"{out}: ") and f"(another {word})" in message
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
    assert "(another image)" in error_of(capsys, tiny, same, *common)
    (copy / "model.safetensors").write_bytes(b"retrained")
    assert "(another weights)" in error_of(capsys, copy, photo, *common)
    assert "(another weights, image)" in error_of(capsys, copy, same, *common)
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
    image = pointcloud.legend(200, 1, 4)
    bar = np.asarray(image)[6:193, 10]
    assert image.size == (80, 200)
    assert (bar[-1] == colors[1]).all() and (bar[0] == colors[3]).all()
    assert (np.asarray(image)[:, 31:] < 128).sum() > 100  # numbers


def test_nearer_points_hide_others():
    """Two squares one behind the other: the near one is seen from the front, both from the side."""
    line = np.linspace(-1, 1, 21)
    x, y = (values.ravel() for values in np.meshgrid(line, line))
    xyz = np.concatenate([np.stack([x, y, np.full_like(x, z)], 1) for z in (3.0, 2.0)])
    red_green = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    colors, side = np.repeat(red_green, len(x), 0), np.full(len(xyz), 0.15)

    def draw(yaw, pitch):
        return np.asarray(pointcloud.draw_cloud(xyz, colors, side, (120, 100), yaw, pitch))

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
    """Photo, depth, two views, the legend: none is empty."""
    photo = make_photo(tmp_path / "a.png", width, height)
    cloud(tiny, photo, "--fov", 60, "--points", 200, "--out", tmp_path / "out")
    image = Image.open(tmp_path / "out/picture.png")
    w, h = (max(round(n * 600 / max(width, height)), 160) for n in (width, height))
    assert image.size == (2 * w + 104, 2 * h + 72)
    pixels = np.asarray(image)
    shown = [pixels[20 + dy:20 + dy + h, 8 + dx:8 + dx + w]
             for dy in (0, h + 24) for dx in (0, w + 8)]
    assert all(len(np.unique(panel.reshape(-1, 3), axis=0)) > 20 for panel in shown)
    mean = np.asarray(Image.open(photo)).mean((0, 1))
    assert np.abs(shown[0].mean((0, 1)) - mean).max() < 4
    assert len(np.unique(pixels[30:h, 2 * w + 35].reshape(-1, 3), axis=0)) > 20


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
# bad input: one line that says what is wrong and what helps


@pytest.mark.parametrize("flags, words", [
    (("--photo-focal", 0), "argument --photo-focal: 0 is not greater than 0"),
    (("--photo-focal", -3), "argument --photo-focal: -3 is not greater than 0"),
    (("--photo-focal", "nan"), "argument --photo-focal: nan is not"),
    (("--photo-focal", "inf"), "argument --photo-focal: inf is not"),
    (("--intrinsics", 80, 80, 96, 10), "a principal point in the image"),
    (("--intrinsics", 80, 80, "nan", 10), "They need finite numbers of pixels"),
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
    (("--photo-focal", 80, "--serve"), "give photos, or --serve and none"),
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
                                   ("--intrinsics", 80, 80, 9, 9)])
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
    message = error_of(capsys, tiny, photo, "--photo-focal", 80, "--at", "1,1", "2,2")
    assert "none of its 2 answers is a distance" in message
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
