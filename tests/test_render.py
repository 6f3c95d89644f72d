"""render.py: files, flags, geometry, crops, markers, prompts, tasks, parsed answers, records,
images, checkpoints, encoding, packed attention."""
import argparse
import importlib
import itertools
import json
import math
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    image_processor,
    make_world,
    noise,
    plain_inputs,
    stock,
    view_of,
    views_for,
    write_jsonl,
)
from PIL import Image

import evaluate
import render

SETTINGS = {**render.DEFAULTS, "focal": 100}
RED = (255, 0, 0)
CPU = torch.device("cpu")


def record(folder: Path, image: Image.Image | None = None, name: str = "a.png", **change) -> Path:
    """A jsonl of one record about an 80 x 60 image."""
    (image or Image.new("RGB", (80, 60), (90, 90, 90))).save(folder / name)
    return write_jsonl(folder / "one.jsonl", [
        {"image": name, "intrinsics": [70.0, 72.0, 39.5, 29.5, 80, 60],
         "pixel_coords": [[20, 30]], "depth": [2.0], **change}])


def red_pixels(pixels: np.ndarray) -> set:
    return {(int(x), int(y)) for y, x in np.argwhere((pixels == RED).all(2))}


def ask(path: Path, task: str, i: int = 0, point: int | None = None, seed: int = 0):
    records = render.Records(path)
    return render.make_query(task, records, i, np.random.default_rng(seed), point)


def shown(path: Path, settings: dict, grid: int = 1, task: str = "distance", **more):
    """The first query of a jsonl, rendered."""
    return render.render(ask(path, task, point=0), settings, grid, **more)


def question_of(task: str, prompt: str = "paper") -> str:
    return render.TASKS[task].wordings[prompt][0]


# --------------------------------------------------------------------------------------------------
# files


def test_replacing(tmp_path):
    """The new file at the end of the block, the old one until then, in a folder that is made; a
    failure leaves the old file as it was, and no temporary."""
    path = tmp_path / "new" / "a.txt"
    with render.replacing(path) as temporary:
        temporary.write_text("one")
        assert temporary.parent == path.parent and not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyError):
        with render.replacing(path) as temporary:
            temporary.write_text("half of tw")
            assert path.read_text() == "one"
            raise KeyError
    assert path.read_text() == "one"
    with pytest.raises(OSError):  # nothing was written
        with render.replacing(path):
            pass
    assert path.read_text() == "one" and os.listdir(path.parent) == ["a.txt"]


def test_interrupt_while_writing(tmp_path):
    """Ctrl-C is a failure like any other."""
    render.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        with render.replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("{")
            raise KeyboardInterrupt
    assert render.read_json(tmp_path / "a.json") == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_jsonl(tmp_path):
    """What was written is read, each object with its file and line; blank lines are skipped, but
    counted."""
    path = tmp_path / "a.jsonl"
    render.write_jsonl(path, ({"k": k, "text": "\u2028\x85"} for k in range(3)))
    assert [value["k"] for _, value in render.read_jsonl(path)] == [0, 1, 2]
    path.write_text('\n{"k": 1}\n  \n\n{"k": 2}')
    assert list(render.read_jsonl(path)) == [(f"{path}, line 2", {"k": 1}),
                                             (f"{path}, line 5", {"k": 2})]
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        list(render.read_jsonl(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("line", ['{"k": ', "[1]", "7", "null", "\xff\xfe"])
def test_damaged_jsonl(tmp_path, line):
    """Named by file and line, not before the good lines were read; the file of a run that may have
    been killed is read up to there."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"k": 1}\n\n{"k": 2}\n' + line.encode("latin-1") + b'\n{"k": 3}\n')
    lines = render.read_jsonl(path)
    assert [next(lines)[1]["k"], next(lines)[1]["k"]] == [1, 2]
    with pytest.raises(ValueError, match="a.jsonl, line 4: .*JSON object"):
        next(lines)
    found = [value["k"] for _, value in render.read_jsonl(path, interrupted=True)]
    assert found == [1, 2]


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    (tmp_path / "b.json").write_text("[1]")
    for name, say in (("a.json", "JSONDecodeError"), ("b.json", "needs a JSON object")):
        with pytest.raises(ValueError, match=f"{name}: {say}") as error:
            render.read_json(tmp_path / name)
        assert str(error.value).count(name) == 1


# --------------------------------------------------------------------------------------------------
# flags


@pytest.mark.parametrize("kind, text, value", [
    ("COUNT", "1", 1), ("COUNT", "35e6", 35_000_000), ("COUNT", "0", "1 or more"),
    ("COUNT", "-1", "1 or more"), ("COUNT", "nan", "1 or more"), ("COUNT", "inf", "1 or more"),
    ("COUNT", "1.5", "whole number"), ("COUNT", "x", None), ("COUNT", "", None),
    ("NATURAL", "0", 0), ("NATURAL", "-1", "0 or more"), ("NATURAL", "0.5", "whole number"),
    ("NATURAL", "nan", "0 or more"), ("NATURAL", "-inf", "0 or more"),
    ("POSITIVE", "1e-9", 1e-9), ("POSITIVE", "0", "greater than 0"),
    ("POSITIVE", "-2", "greater than 0"), ("POSITIVE", "nan", "greater than 0"),
    ("POSITIVE", "inf", "greater than 0"),
    ("SHARE", "0", 0.0), ("SHARE", "1", 1.0), ("SHARE", "1.01", "0 or more and at most 1"),
    ("SHARE", "-0.1", "at most 1"), ("SHARE", "nan", "at most 1")])
def test_numbers_of_flags(capsys, kind, text, value):
    """The number, of its type, or one line that says what is wanted (a word: that it is none)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=getattr(render, kind))
    if isinstance(value, (int, float)):
        found = parser.parse_args(["--n", text]).n
        assert found == value and type(found) is type(value)
        return
    with pytest.raises(SystemExit):
        parser.parse_args([f"--n={text}"])
    wanted = f"argument --n: {text} is not" if value else "invalid number value"
    message = capsys.readouterr().err.splitlines()[-1]
    assert wanted in message and (value or "") in message


@pytest.mark.parametrize("path", ["", "  "])
def test_empty_path(capsys, path):
    """A shell variable that is not set is no path: Path("") would be the current folder."""
    for argv in (["--out", path], ["--image-root", path]):
        with pytest.raises(SystemExit) as stop:
            render.main(["a.jsonl", *argv])
        assert stop.value.code == 2 and "empty path" in capsys.readouterr().err


SCRIPTS = ("render", "prepare", "evaluate", "train_sft", "train_grpo", "pointcloud",
           "toy_model", "probe", "compare")


class Parsed(Exception):
    """The parser that a script made."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(monkeypatch, name):
    """Each flag has a line of help, which says what holds without it; where it says "default" for
    all flags of a group, its title does. A switch is off, and what is required has none."""

    def stop(parser, *args, **kwargs):
        raise Parsed(parser)

    for how in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, how, stop)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(name).main([])
    parser, = caught.value.args
    formatter = parser._get_formatter()
    covered = [action for group in parser._action_groups if "default" in (group.title or "")
               for action in group._group_actions]
    flags = [action for action in parser._actions if action.dest != "help"]
    assert flags
    for action in flags:
        flag = "/".join(action.option_strings) or action.dest
        assert action.help and action.help.strip(), flag
        needed = action.required or not action.option_strings
        switch = action.nargs == 0 and action.default is False
        text = formatter._expand_help(action)
        assert needed or switch or action in covered or "default" in text, f"{flag}: {text}"
        assert "default: None" not in text, f"{flag}: {text}"


def test_flags_in_a_file(world, tmp_path, capsys):
    """@FILE, with comments and quotes; later flags override; a flag is not guessed from its
    beginning."""
    (tmp_path / "a.args").write_text("# of a sheet\n--n 2 --focal 77  # px\n--out 'a b.png'\n")
    args = render.parse_args([f"@{tmp_path}/a.args", str(world), "--n", "3"])
    assert (args.n, args.focal, args.out) == (3, 77.0, "a b.png")
    with pytest.raises(SystemExit):
        render.parse_args([str(world), "--foc", "77"])
    assert "--foc" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# exact focal


def random_camera(rng):
    w, h = int(rng.integers(40, 300)), int(rng.integers(40, 300))
    fx = float(rng.uniform(50, 400))
    fy = fx * float(rng.uniform(0.7, 1.4))
    cx, cy = w * float(rng.uniform(0.3, 0.7)), h * float(rng.uniform(0.3, 0.7))
    return fx, fy, cx, cy, w, h


@pytest.mark.parametrize("crop", [None, (60, 140, 50, 120)])
@pytest.mark.parametrize("grid", [16, 28, 32])
def test_exact_focal(grid, crop):
    """A 3-D point lands on the same pixel through the original camera and move() as through the
    view's own camera, whose focal is f on both axes, also where fx != fy: neither processor nor
    grid may rescale again."""
    rng = np.random.default_rng(grid)
    for _ in range(40):
        camera, focal = random_camera(rng), float(rng.uniform(60, 300))
        fx, fy, cx, cy, w, h = camera
        image, keep = Image.new("RGB", (w, h)), [(w // 2, h // 3)]
        view = render.unify_focal(image, camera, focal, grid, crop, keep, rng)
        assert view.intrinsics[:2] == pytest.approx((focal, focal), rel=1e-12)
        height, width = view.pixels.shape[:2]
        assert height % grid == width % grid == 0 < min(view.pixels.shape)
        for x, y, z in rng.uniform((-5, -5, 0.5), (5, 5, 20), (5, 3)):
            gfx, gfy, gcx, gcy = view.intrinsics[:4]
            moved = view.move(fx * x / z + cx, fy * y / z + cy)
            assert moved == pytest.approx((gfx * x / z + gcx, gfy * y / z + gcy), abs=1e-6)


@pytest.mark.parametrize("focal", [23.0, 61.3, 100.0, 250.0])
def test_evaluation_loses_no_labelled_pixel(focal):
    """Every pixel of the original has a pixel of its own rendered position to be marked at: padded,
    never cropped."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        camera = random_camera(rng)
        w, h = camera[4:]
        view = render.unify_focal(Image.new("RGB", (w, h)), camera, focal, 28)
        height, width = view.pixels.shape[:2]
        for x, y in ((0, 0), (w - 1, h - 1)):
            u, v = view.move(x, y)
            assert -0.5 <= u < width - 0.5 and -0.5 <= v < height - 0.5


@pytest.mark.parametrize("crop", [None, (60, 90, 50, 80)])
@pytest.mark.parametrize("focal", [100.0, 180.0, None])
def test_content_is_where_move_says(focal, crop):
    """The picture itself is resampled by the same map as the points: on a linear ramp the colour
    tells the position."""
    w, h, camera = 120, 90, (100.0, 140.0, 60.0, 45.0, 120, 90)
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    image = Image.fromarray(np.stack([2 * u, 2 * v, 0 * u], 2).astype(np.uint8))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        view = render.unify_focal(image, camera, focal, 4, crop, [(60, 40)], rng)
        for x, y in np.random.default_rng(seed).integers((3, 3), (w - 3, h - 3), (100, 2)):
            px, py = view.move(x, y)
            i, j = math.floor(px + 0.5), math.floor(py + 0.5)
            if 0 <= i < view.intrinsics[4] and 0 <= j < view.intrinsics[5]:
                sx, sy = view.scale
                expected = np.array([2 * x + 2 * (i - px) / sx, 2 * y + 2 * (j - py) / sy])
                assert np.abs(view.pixels[j, i, :2] - expected).max() < 1.1


def test_padding_repeats_the_edge():
    """The grid is filled with the border's own colours: a black bar would look like an object."""
    view = render.unify_focal(noise(30, 30), (50.0, 50.0, 15.0, 15.0, 30, 30), None, 28)
    assert view.pixels.shape == (56, 56, 3) and view.intrinsics[4:] == (30, 30)
    assert (view.pixels[:30, 30:] == view.pixels[:30, 29:30]).all()
    assert (view.pixels[30:] == view.pixels[29:30]).all()


def test_absurd_focal_length(tmp_path, capsys):
    """A focal length in metres or millimetres would ask for an image of terabytes: one line with
    file, line, the camera and the size, in training, evaluation and the sheet, and no MemoryError;
    so does a small one that is possible with a large --focal. A wide view of 150 degrees is still
    rendered."""
    absurd = record(tmp_path, intrinsics=[0.02, 0.02, 39.5, 29.5, 80, 60])
    small = record(tmp_path, intrinsics=[20.0, 20.0, 39.5, 29.5, 80, 60])
    for crop in ((60, 140, 50, 120), None):
        with pytest.raises(ValueError, match="one.jsonl, line 1: .*80 x 60 .* focal length 20 20"):
            shown(small, {**render.DEFAULTS, "focal": 1e6}, crop=crop,
                  rng=np.random.default_rng(0))
    absurd = record(tmp_path, intrinsics=[0.02, 0.02, 39.5, 29.5, 80, 60])
    with pytest.raises(ValueError, match="one.jsonl, line 1: intrinsics .*0.02.* 80 x 60"):
        shown(absurd, render.DEFAULTS)
    with pytest.raises(SystemExit) as stop:
        render.main([str(absurd), "--out", str(tmp_path / "a.png")])
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and "one.jsonl, line 1" in errors[0]
    wide = record(tmp_path, intrinsics=[10.72, 10.72, 39.5, 29.5, 80, 60])
    (view,), *_ = shown(wide, render.DEFAULTS, crop=(60, 140, 50, 120),
                        rng=np.random.default_rng(0))
    assert view.pixels.shape[1] <= 140


PHONE = (3029.0, 3029.0, 2015.5, 1511.5, 4032, 3024)


@pytest.mark.parametrize("wrong, cause, meant", [
    ((26, 26, 2015.5, 1511.5), "in mm of 35 mm film", (3029, 3029, 2015.5, 1511.5)),
    ((0.75, 0.75, 2015.5, 1511.5), "divided by the image's width", (3024, 3024, 2015.5, 1511.5)),
    ((0.75, 1.0, 0.5, 0.5), "divided by the image's sides", (3024, 3024, 2016, 1512)),
    ((27.04, 27.04, 18, 13.5), "of an image of 36 x 27 px", (3029, 3029, 2016, 1512)),
    ((4.81, 4.81, 3.2, 2.4), "of an image of 6.4 x 4.8 px", (3029, 3029, 2016, 1512)),
    ((0.189, 0.189, 0.126, 0.0945), "of an image of 0.252 x 0.189", (3024, 3024, 2016, 1512)),  # in
    ((757.25, 757.25, 503.5, 377.5), "of an image of 1007", (3029, 3029, 2015.5, 1511.5)),
    ((6058, 6058, 4031.5, 3023.5), "of an image of 8063", (3029, 3029, 2015.5, 1511.5)),
    ((3029, 3029, 1511.5, 2015.5), "cx and cy swapped", PHONE[:4]),
    ((3029, 2015.5, 3029, 1511.5), "order fx, cx, fy, cy", PHONE[:4]),
    ((2015.5, 1511.5, 3029, 3029), "order cx, cy, fx, fy", PHONE[:4]),
    ((3029, 3029, 0, 0), "needs|need", None), ((3029, 3029, 5000, 1511.5), "principal point", None),
    ((3029, 3029, 2015.5, -8), "principal point", None), ((3029, 7000, 2015.5, 1511.5), "fy", None),
    ((1e6, 1e6, 2015.5, 1511.5), "20 sides", None), ((300, 3029, 2015.5, 1511.5), "160", None),
    ((-3029, 3029, 2015.5, 1511.5), "positive", None), ((math.inf,) * 4, "finite", None),
    ((3029, 3029, math.nan, 1511.5), "finite", None)])
def test_cameras_of_other_images(wrong, cause, meant):
    """The message names the likely mistake, and the numbers that would be right, to 1 %."""
    fault = render.camera_fault((*wrong, 4032, 3024), doubt=True)
    assert re.search(cause, fault) and "4032 x 3024" in fault
    if meant:
        found = [float(word) for word in fault.split("Then ")[1].rstrip(".").split(", ")]
        assert found == pytest.approx(meant, rel=0.01)
        assert render.camera_fault((*found, 4032, 3024), doubt=True) is None


@pytest.mark.parametrize("camera", [
    PHONE, (518.86, 519.47, 324.58, 252.74, 640, 480), (550.39, 548.55, 355.44, 240.26, 640, 480),
    (2055.6, 2055.6, 939.7, 245.0, 1920, 886), (1776.0, 1776.0, 775.0, 1023.9, 1550, 2048),
    (809.2, 809.2, 829.2, 481.8, 1600, 900), (1076.2, 1077.2, 629.7, 514.3, 1280, 1024),
    (1427.4, 1428.6, 957.2, 719.4, 1920, 1440), (10.72, 10.72, 39.5, 29.5, 80, 60),
    (19 * 640, 19 * 640, 319.5, 239.5, 640, 480), (500, 980, 319.5, 239.5, 640, 480),
    (721.5, 721.5, 609.6, 172.9, 1242, 375), (500, 500, 20.0, 460.0, 640, 480),
    (500, 500, 630.0, 239.5, 640, 480), (2000, 2000, 1999.5, 31.5, 4000, 64)])
def test_right_cameras(camera):
    """The sets of the paper, wide and long lenses, pixels that are not square, crops far off the
    centre, strips."""
    assert render.camera_fault(camera) is None and render.camera_fault(camera, doubt=True) is None
    assert render.camera_fault((*(2 * v for v in camera),), doubt=True) is None


def test_swapped_or_off_centre(tmp_path):
    """A record alone may be an odd crop, so it is read; where a file is made or checked it is
    named."""
    path = record(tmp_path, intrinsics=[70, 70, 29.5, 39.5, 80, 60])
    raw = render.record_arrays(json.loads(path.read_text()))
    assert render.Records(path)[0]["depth"] == [2.0]
    assert not list(render.label_faults(raw))
    assert [kind for kind, _ in render.label_faults(raw, doubt=True)] == ["camera of another image"]


# --------------------------------------------------------------------------------------------------
# random crop


def test_random_crop():
    """Training crops: sides in range (on the grid), any place, the query always inside with room
    for its marker; a centre crop, or one glued to the query, would tell the model where to look."""
    image, camera = Image.new("RGB", (400, 300)), (100.0, 100.0, 200.0, 150.0, 400, 300)
    rng, grid, margin = np.random.default_rng(0), 4, render.MARGIN
    places, sizes, lefts = [], set(), []
    for _ in range(400):
        view = render.unify_focal(image, camera, 100.0, grid, (100, 200, 80, 160), [(210, 140)],
                                  rng)
        height, width = view.pixels.shape[:2]
        x, y = view.move(210, 140)
        assert 100 - grid < width <= 200 and 80 - grid < height <= 160
        assert view.intrinsics[4:] == (width, height)
        assert margin <= x <= width - 1 - margin and margin <= y <= height - 1 - margin
        places.append((x / width, y / height))
        sizes.add((width, height))
        lefts.append(view.offset[0])
    places = np.array(places)
    assert (places.min(0) < 0.15).all() and (places.max(0) > 0.85).all()
    assert (np.abs(places.mean(0) - 0.5) < 0.06).all()
    assert len(sizes) > 200 and len({w for w, _ in sizes}) > 20 and len(set(lefts)) > 80


def test_random_crop_near_borders_and_in_small_images():
    """A query in a corner is still inside, an image smaller than the crop is not cut, two points
    are both kept."""
    rng, window = np.random.default_rng(0), (80, 120, 60, 100)
    image, camera = Image.new("RGB", (300, 200)), (100.0, 100.0, 150.0, 100.0, 300, 200)
    for x, y in ((0, 0), (299, 0), (0, 199), (299, 199), (3, 100)):
        for _ in range(20):
            view = render.unify_focal(image, camera, 100.0, 28, window, [(x, y)], rng)
            u, v = view.move(x, y)
            assert 0 <= u <= view.pixels.shape[1] - 1 and 0 <= v <= view.pixels.shape[0] - 1
    points = [(20, 20), (250, 150)]
    view = render.unify_focal(image, camera, 100.0, 28, window, points, rng)
    height, width = view.pixels.shape[:2]
    assert all(0 <= u < width and 0 <= v < height for u, v in (view.move(*p) for p in points))
    small = (100.0, 100.0, 10.0, 25.0, 20, 50)
    view = render.unify_focal(Image.new("RGB", (20, 50)), small, 100.0, 28, window, [(3, 3)], rng)
    assert view.pixels.shape[1] == 28 and view.pixels.shape[0] % 28 == 0
    assert view.intrinsics[4] == 20


def test_small_images_are_shown_as_in_evaluation():
    """An image smaller than the crop is not cut to the grid: training would hide what evaluation
    shows. Nor does it lose a pixel because its intrinsics were rounded: 85 px at fx 75.8929 are 112
    at 100, and 83.99 are 84."""
    image, camera = noise(85, 64), (75.8929, 76.1991, 42.0, 32.0, 85, 64)
    seen = [render.unify_focal(image, camera, 100.0, 28, crop, [(40, 30)],
                               np.random.default_rng(0))
            for crop in (None, (112, 200, 112, 200))]
    assert seen[0].pixels.shape == (84, 112, 3) and seen[0].intrinsics[4:] == (112, 83)
    assert (seen[0].pixels == seen[1].pixels).all() and seen[0].intrinsics == seen[1].intrinsics


def test_crop_is_a_function_of_the_generator():
    """Resume and any number of workers give the same crop: nothing else than the generator
    decides."""
    image, camera = noise(200, 150), (90.0, 95.0, 100.0, 75.0, 200, 150)
    a, b, other = (render.unify_focal(image, camera, 120.0, 28, (60, 120, 60, 120), [(90, 80)], rng)
                   for rng in map(np.random.default_rng, (5, 5, 6)))
    assert a.offset == b.offset and (a.pixels == b.pixels).all() and a.offset != other.offset


# --------------------------------------------------------------------------------------------------
# markers


def test_arrow():
    """The arrow of App. A.1, pixel by pixel: a shaft of 5 to the left of the query, two strokes
    each way, and the query's own pixel left visible; on the right side where the left border is too
    near."""
    shape = {(-1, 0), (-2, 0), (-3, 0), (-4, 0), (-5, 0), (-2, -1), (-2, 1), (-3, -2), (-3, 2)}
    for x, side in ((20, 1), (5, 1), (4, -1), (0, -1), (39, 1)):
        pixels = np.zeros((30, 40, 3), np.uint8)
        render.draw_marker(pixels, x + 0.3, 9.6)
        assert red_pixels(pixels) == {(x + side * i, 10 + j) for i, j in shape}


@pytest.mark.parametrize("size", [1, 3, 5, 9, 20])
@pytest.mark.parametrize("shape", render.MARKERS)
def test_marker_anywhere(shape, size):
    """Every place and size, borders and corners too: something is drawn next to the query, nothing
    else is touched, and under arrow and cross the query's pixel keeps its colour (the paper's arrow
    covers it in no release)."""
    for x in (0, 1, 2, 8, 17, 18):
        for y in (0, 1, 7, 14, 15):
            pixels = np.full((16, 19, 3), 7, np.uint8)
            render.draw_marker(pixels, x, y, shape, size, (0, 0, 255))
            changed = {(int(i), int(j)) for j, i in np.argwhere((pixels != 7).any(2))}
            assert changed
            assert all(abs(i - x) <= size and abs(j - y) <= size for i, j in changed)
            assert all(tuple(pixels[j, i]) == (0, 0, 255) for i, j in changed)
            assert ((x, y) in changed) == (shape == "dot")
            assert min(abs(i - x) + abs(j - y) for i, j in changed) <= 1


@pytest.mark.parametrize("size", [5, 10, 15])
def test_arrow_and_cross_have_lines_of_one_width(size):
    """Twice the size is twice the width, for both: shapes are compared, not how much ink they have.
    Both leave the point itself visible."""
    for shape in ("arrow", "cross"):
        pixels = np.zeros((61, 61, 3), np.uint8)
        render.draw_marker(pixels, 30, 30, shape, size)
        drawn = pixels.any(-1)
        # the leftmost column: the end of the shaft, or of an arm
        end = drawn[:, drawn.any(0).argmax()]
        assert end.sum() == size // 5 and not drawn[30, 30] and drawn[30, 31 - size // 2]


def test_marker_out_of_the_image_is_moved_inside():
    """A point in the half pixel beyond the border marks the border pixel instead of raising."""
    pixels = np.zeros((20, 20, 3), np.uint8)
    render.draw_marker(pixels, 19.49, -0.5)
    assert (18, 0) in red_pixels(pixels)


@pytest.mark.parametrize("camera", ["unify", "none"])
def test_marker_is_at_the_query(tmp_path, camera):
    """Through the whole of render(): the tip is beside the pixel to which the labelled point moves;
    1 px of 1.8x rounding to the left and up was the released code's."""
    for x, y in ((20, 30), (61, 7), (79, 59), (0, 0)):
        path = record(tmp_path, pixel_coords=[[x, y]])
        (view,), _, _ = shown(path, {**SETTINGS, "focal": 180.0, "camera": camera}, 28)
        u, v = (math.floor(p + 0.5) for p in view.move(x, y))
        scale = (180 / 70, 180 / 72) if camera == "unify" else (1, 1)
        assert (u, v) == tuple(math.floor(s * (p + 0.5)) for s, p in zip(scale, (x, y)))
        side = 1 if u >= 5 else -1
        red = red_pixels(view.pixels)
        assert red >= {(u - side, v), (u - 5 * side, v)} and (u, v) not in red
        assert (view.pixels[v, u] == 90).all()


# --------------------------------------------------------------------------------------------------
# goldens: renders by the released code


def test_goldens(shared):
    """All 16 renders of the released code: the same pixels around the marker, the same marker, and
    with fx on both axes (as it does) a marker at most 2 px away (it truncates)."""
    goldens = json.loads((shared / "golden" / "renders.json").read_text())
    assert len(goldens) == 16
    folder = shared / "samples" / "ibims1"
    records = [json.loads(line) for line in open(folder / "depthlm_ibims1_val.jsonl")]
    records = {r["image"]: r for r in records}
    for g in goldens:
        image = render.open_image(folder / "ibims1_core_raw" / g["image"])
        x0, y0, x1, y1 = g["crop_box"]
        golden = np.asarray(render.open_image(shared / "golden" / g["crop"]))
        plain = np.asarray(image.resize(g["rendered_size"], Image.Resampling.BICUBIC))
        ours = plain.copy()
        render.draw_marker(ours, *g["rendered_pixel"])
        marker = (ours != plain).any(2)[y0:y1, x0:x1]
        assert (golden[~marker] == plain[y0:y1, x0:x1][~marker]).all()
        assert marker.sum() == 9 and (golden[marker] == RED).all()
        assert (golden == ours[y0:y1, x0:x1]).all()
        fx, _, cx, cy, w, h = records[g["image"]]["intrinsics"]
        view = render.unify_focal(image, (fx, fx, cx, cy, w, h), g["focal"], 1)
        moved = view.move(*records[g["image"]]["pixel_coords"][g["point"]])
        assert records[g["image"]]["pixel_coords"][g["point"]] == g["source_pixel"]
        assert np.abs(np.array(moved) - g["rendered_pixel"]).max() <= 2
        assert np.abs(np.array(view.pixels.shape[1::-1]) - g["rendered_size"]).max() <= 1


# --------------------------------------------------------------------------------------------------
# prompts and camera strategies


def test_prompts(tmp_path):
    """The paper's words (Sec. 3.1, 3.2, App. A.1), two decimals; the text prompt names the pixel as
    rendered and draws nothing."""
    path = record(tmp_path, depth=[12.346], pixel_coords=[[40, 12]])
    (view,), question, answer = shown(path, SETTINGS)
    assert question == "How many meters is this point from the camera?"
    assert answer == "The point is around 12.35 meters away from the camera."
    assert red_pixels(view.pixels)
    _, question, answer = shown(path, {**SETTINGS, "prompt": "release"})
    assert "<think> </think>" in question and "<answer> </answer>" in question
    assert answer == ("<think> The point is around 12.35 meters away from the camera. </think>\n\n"
                      "<answer> 12.35 </answer>")
    (view,), question, answer = shown(path, {**SETTINGS, "prompt": "text"}, 28)
    u, v = (math.floor(p + 0.5) for p in view.move(40, 12))
    w, h = view.intrinsics[4:]
    assert question == (f"Given this image of size (width = {w}, height = {h}), how far is the "
                        f"pixel at ({u}, {v}) from the camera?")
    assert not red_pixels(view.pixels) and (w, h) == (114, 83) and "12.35" in answer


def test_camera_strategies(tmp_path):
    """App. A.5: none shows the raw image, prompt names that image's intrinsics, ray says the
    direction first."""
    path = record(tmp_path, noise(80, 60), pixel_coords=[[60, 10]], depth=[3.0])
    (view,), question, _ = shown(path, {**SETTINGS, "camera": "none", "marker": "dot"}, 4)
    changed = (view.pixels != np.asarray(noise(80, 60))).any(2)
    assert view.pixels.shape == (60, 80, 3) and 1 <= changed.sum() <= 21
    assert view.move(60, 10) == (60, 10) and question == question_of("distance")
    _, question, _ = shown(path, {**SETTINGS, "camera": "prompt"}, 4)
    for part in ("width = 80", "height = 60", "fx = 70.00", "fy = 72.00", "cx = 39.50",
                 "cy = 29.50"):
        assert part in question
    _, _, answer = shown(path, {**SETTINGS, "camera": "ray"})
    tangents = ((60 - 39.5) / 70, (29.5 - 10) / 72)
    right, up = (round(math.degrees(math.atan(t))) for t in tangents)
    assert answer == (f"The point is around {right} degrees to the right, {up} degrees above and "
                      "3.00 meters away from the camera.")
    left = record(tmp_path, pixel_coords=[[10, 50]])
    _, _, answer = shown(left, {**SETTINGS, "camera": "ray"})
    assert "degrees to the left" in answer and "degrees below" in answer
    for camera, prompt in (("prompt", "release"), ("ray", "release"), ("ray", "text")):
        with pytest.raises(ValueError, match="no wording"):  # one of the two would be ignored
            render.check_settings({**SETTINGS, "camera": camera, "prompt": prompt})


def test_coordinates_and_intrinsics_as_text(tmp_path):
    """Seed1.5-VL's setup (Table 1): no marker, raw image, where and by which camera in words."""
    path = record(tmp_path)
    settings = render.check_settings({**SETTINGS, "camera": "prompt", "prompt": "text"})
    views, question, answer = shown(path, settings)
    bare, _, _ = shown(path, {**SETTINGS, "camera": "none", "prompt": "text"})
    assert np.array_equal(views[0].pixels, bare[0].pixels)
    assert "(fx = 70.00, fy = 72.00, cx = 39.50, cy = 29.50)" in question
    assert "the pixel at (20, 30)" in question and "{" not in question
    assert answer == "The point is around 2.00 meters away from the camera."


def test_how_a_script_ends(monkeypatch, capsys):
    """Ctrl-C is one line of the first process, which all get; what the system says has its file."""
    def end(error, rank="0") -> tuple[int, str]:
        def main(argv):
            raise error

        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            render.command(main)([])
        return stop.value.code, capsys.readouterr().err

    said = "error: interrupted. Give the same command again to resume.\n"
    assert end(KeyboardInterrupt()) == (130, said) and end(KeyboardInterrupt(), "1") == (130, "")
    missing = FileNotFoundError(2, "No such file or directory", "a.png")
    assert end(missing) == (2, "error: a.png: No such file or directory.\n")


def test_transformers_of_another_major_version(tiny, monkeypatch):
    monkeypatch.setattr(render, "version", lambda name: "4.57.1")
    with pytest.raises(ValueError, match="transformers 4.57.1 is installed, 5 is needed: pip"):
        render.open_checkpoint(str(tiny), quiet=True)


def test_defaults_that_a_flag_overrides_are_not_shown(tiny, capsys):
    render.open_checkpoint(str(tiny), {"focal": 500, "marker": None})
    said = capsys.readouterr().err
    assert "marker arrow" in said and "focal" not in said and said.count("\n") == 1


def test_a_question_of_ones_own(tmp_path):
    path, own = record(tmp_path), "Pixel ({u}, {v}) of {w} x {h}, {{f}} {fx}?"
    settings = {**SETTINGS, "camera": "none", "question": own}
    views, question, answer = shown(path, render.check_settings(settings))
    height, width = views[0].pixels.shape[:2]
    assert question.startswith("Pixel (20, 30) of ") and question.endswith(", {f} 70.00?")
    assert answer == shown(path, {**settings, "question": ""})[2]
    for wrong in ("{x}", "{z}", "{}", "{w", "{w:99999999}", "{w!r}", "{w.real}", 3, None):
        with pytest.raises(ValueError, match="question"):
            render.check_settings({**SETTINGS, "question": wrong})


def test_answer_forms():
    """A template of the number alone, and none where an answer says other numbers before it."""
    for task, prompt in itertools.product(render.TASKS, ("paper", "release")):
        form = render.answer_form(task, {**SETTINGS, "prompt": prompt})
        assert form.count("{x}") == 1 + (prompt == "release")
    assert render.answer_form("distance", {**SETTINGS, "camera": "ray"}) is None
    assert render.answer_form("distance", {**SETTINGS, "prompt": "text"}) is not None


# --------------------------------------------------------------------------------------------------
# checkpoints and their settings


def settings_of(folder, overrides=None) -> dict:
    return render.open_checkpoint(str(folder), overrides, quiet=True).settings


def test_settings(tmp_path, tiny, tiny_pixtral, capsys):
    """depthlm.json decides, a flag overrides it; without the file the defaults of the family of
    config.json, said aloud; wrong values are refused."""
    assert settings_of(tiny) == render.DEFAULTS and settings_of(tiny)["focal"] == 1000
    assert settings_of(tiny_pixtral) == {**render.DEFAULTS, "focal": 750}
    assert not capsys.readouterr().err
    render.open_checkpoint(str(tiny_pixtral))
    assert f"{tiny_pixtral}: no depthlm.json" in capsys.readouterr().err
    fallback = render.open_checkpoint(str(tiny), {"marker": "dot"}, {"focal": 99}, quiet=True)
    assert (fallback.settings["focal"], fallback.settings["marker"]) == (99, "dot")
    named = shutil.copytree(tiny, tmp_path / "m")
    (named / "depthlm.json").write_text(json.dumps({"focal": 432, "marker": "dot"}))
    assert settings_of(named) == {**render.DEFAULTS, "focal": 432, "marker": "dot"}
    assert settings_of(named, {"focal": 500, "marker": None})["focal"] == 500
    known = render.open_checkpoint(str(named), {}, {"focal": 99})
    assert known.settings["focal"] == 432 and not capsys.readouterr().err
    for wrong in ({"focal": -1}, {"focal": 0}, {"marker": "star"}, {"prompt": "haiku"},
                  {"camera": "obscura"}, {"marker_size": 10**9}):
        with pytest.raises(ValueError, match=str(*wrong)) as error:
            settings_of(named, wrong)
        assert "depthlm.json" not in str(error.value)  # the flag is at fault


@pytest.mark.parametrize("content", [
    {"focal": "750"}, {"focal": None}, {"focal": True}, {"focal": 0},
    {"focal": 1e9}, {"focal": [750]}, {"marker": 1}, {"marker": ["dot"]}, {"marker_size": 0},
    {"marker_size": 5.5}, {"marker_size": -3}, {"prompt": None}, {"camera": {}},
    {"tasks": "distance"}, {"tasks": []}, {"tasks": [1]}, {"max_new_tokens": 0},
    {"max_new_tokens": "128"}, {"max_new_tokens": 1e9}, {"camera": "ray", "prompt": "text"},
    [], "[1]", 5, "{", ""])
def test_settings_of_a_wrong_form(tiny, tmp_path, content):
    """Type and range of each key of depthlm.json: one line with the file and the key."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "depthlm.json").write_text(text)
    message = refused(folder)
    assert message.startswith(f"{folder}/depthlm.json: ")
    assert not isinstance(content, dict) or next(iter(content)) in message


def test_settings_that_nobody_knows(tiny, tmp_path):
    """Keys of another version are ignored; tasks of a fork are kept, to be named when queried."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    known = {"focal": 432.5, "tasks": ["distance", "shadow"]}
    (folder / "depthlm.json").write_text(json.dumps({**known, "lens": "wide", "trained": [1, 2]}))
    assert settings_of(folder) == {**render.DEFAULTS, **known}


def refused(folder) -> str:
    """The one line that says why a folder is no checkpoint: it begins with the folder."""
    with pytest.raises(ValueError) as error:
        render.open_checkpoint(str(folder), quiet=True)
    message = str(error.value)
    assert message.startswith(str(folder)) and message.count(str(folder)) == 1
    assert len(message.splitlines()) == 1 and len(message) < 500
    return message


def change(folder: Path, name: str, **values) -> None:
    """Set keys of a JSON file; None drops one."""
    content = {**json.loads((folder / name).read_text()), **values}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(content))


# some seconds: a thread cannot be stopped, and one without end would slow all tests after it
ENDLESS = "{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("name, content, words", [
    ("chat_template.jinja", "{{ raise_exception('no system role') }}", "no system role"),
    ("chat_template.jinja", "{% for m in messages %}", "chat template"),
    ("chat_template.jinja", "{{ messages[7].content.text }}", "chat template"),
    ("chat_template.jinja", "{{ messages[0]['content'][1]['text'] }}", "0 images"),
    ("chat_template.jinja", "<|image_pad|>", "0 questions"),
    ("chat_template.jinja", ENDLESS, "TimeoutError"),
    ("chat_template.json", '{"template": "x"}', "chat_template"),
    ("chat_template.json", '{"chat_template": [1]}', "chat template"),
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "tokenizer.json"),
    ("tokenizer.json", "{}", "tokenizer.json"), ("tokenizer.json", "", "tokenizer.json"),
    ("tokenizer_config.json", "[]", "tokenizer"),
    ("generation_config.json", '{"eos_token_id": "2"}', "generation_config.json: eos_token_id"),
    ("generation_config.json", '{"eos_token_id": [2, null]}', "generation_config.json"),
    ("generation_config.json", '{"eos_token_id": true}', "generation_config.json"),
    ("generation_config.json", "[", "generation_config.json"),
    ("preprocessor_config.json", '{"image_mean": [0.5]}', "preprocessor_config.json"),
    ("preprocessor_config.json", '{"image_mean": "grey"}', "preprocessor_config.json"),
    ("preprocessor_config.json", '{"image_std": [0, 1, 1]}', "preprocessor_config.json"),
    ("preprocessor_config.json", '{"rescale_factor": NaN}', "preprocessor_config.json"),
    ("preprocessor_config.json", '{"rescale_factor": "1/255"}', "preprocessor_config.json"),
    ("preprocessor_config.json", '{"image_processor": 3}', "preprocessor_config.json"),
    ("config.json", "", "config.json"), ("config.json", "[]", "config.json: needs a JSON object")])
def test_small_files_of_a_wrong_form(tiny, tmp_path, monkeypatch, name, content, words):
    """Whatever a parser of others raises, a panic and a template without end too, is one line with
    the folder, the file and a remedy."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / name).write_text(content)
    monkeypatch.setattr(render, "TEMPLATE_SECONDS", 1)
    message = refused(folder)
    assert words in message and "copy or download" in message


@pytest.mark.parametrize("values, words", [
    ({"model_type": ["qwen2_5_vl"]}, "none of"), ({"vision_config": None}, "vision_config"),
    ({"vision_config": [1]}, "config.json"), ({"vision_config": {"patch_size": 0}}, "patches of 0"),
    ({"vision_config": {"patch_size": 10**6}}, "patches"),
    ({"vision_config": {"patch_size": "14"}}, "patches of '14'"),
    ({"vision_config": {"spatial_merge_size": -2}}, "-2 a token"),
    ({"text_config": {"vocab_size": 100}}, "the model of config.json has 100"),
    ({"text_config": 3}, "config")])
def test_configs_of_a_wrong_form(tiny, tmp_path, values, words):
    folder = shutil.copytree(tiny, tmp_path / "m")
    change(folder, "config.json", **values)
    assert words in refused(folder)


@pytest.mark.parametrize("missing", ["<|image_pad|>", "<|im_end|>", "[IMG_BREAK]", "[IMG_END]"])
def test_tokens_that_a_family_needs(tiny, tiny_pixtral, tmp_path, missing):
    """An image token that the tokenizer does not know would be spelled, and no image found."""
    folder = shutil.copytree(tiny if missing[0] == "<" else tiny_pixtral, tmp_path / "m")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace(missing, "<|other|>"))
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config.replace(missing, "<|other|>"))
    if missing == "<|im_end|>":
        change(folder, "tokenizer_config.json", eos_token=None)
        assert "no token that ends an answer" in refused(folder)
    else:
        assert missing in refused(folder)


def test_nobody_elses_code_is_run(tiny, tmp_path, monkeypatch):
    """A folder that brings code of its own is refused, not asked about."""
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        folder = shutil.copytree(tiny, tmp_path / key)
        (folder / "mine.py").write_text("raise SystemExit('ran')")
        change(folder, name, auto_map={key: "mine.Mine"}, tokenizer_class="Mine")
        change(folder, "config.json", model_type="qwen2_5_vl")
        with suppress(ValueError):
            checkpoint = open_quietly(folder)
            evaluate.build_model(checkpoint.folder, torch.float32, torch.float32)
    for path in (Path(render.__file__).parent).glob("*.py"):
        for call in re.findall(r"(?:from_pretrained|from_config)\([^()]*\)", path.read_text()):
            assert "trust_remote_code=False" in call, (path.name, call)


def test_small_files_at_random(tiny, tmp_path):
    """Bytes cut, changed or doubled and JSON values replaced, seeded: opened, or one line."""
    folder, rng = shutil.copytree(tiny, tmp_path / "m"), np.random.default_rng(0)
    names = [path.name for path in sorted(tiny.iterdir()) if "safetensors" not in path.name]
    refusals = 0
    for _ in range(60):
        name = names[rng.integers(len(names))]
        content = bytearray((tiny / name).read_bytes())
        start, end = sorted(rng.integers(len(content) + 1, size=2))
        kind = rng.integers(4)
        if kind == 0:
            del content[start:end]
        elif kind == 1:
            content[start:start] = content[start:end][:100]
        elif kind == 2:
            content[start:start + 1] = bytes(rng.integers(0, 256, 3).tolist())
        else:
            found = list(re.finditer(rb'(?<=: )(?:"[^"]*"|[\d.]+|true|false|null)', content))
            if found:
                value = found[rng.integers(len(found))]
                content[value.start():value.end()] = [b"-1", b"[]", b'"x"', b"null"][start % 4]
        (folder / name).write_bytes(content)
        try:
            checkpoint = open_quietly(folder)
            view = view_of(noise(2 * checkpoint.grid, 2 * checkpoint.grid))
            render.pack([render.encode(checkpoint, [view], "How far?")])
        except ValueError as e:
            refusals += 1
            assert str(e).startswith(str(folder)) and len(str(e).splitlines()) == 1, (name, e)
        shutil.copy(tiny / name, folder / name)
    assert 20 < refusals < 60


def test_names_of_folders_say_nothing(tmp_path, tiny, tiny_pixtral):
    """Family and settings come from the files of a folder, never from the spelling of its path:
    below .../nanoDepthLM/depthlm a Pixtral is a Pixtral, and asked in the paper's words."""
    named = shutil.copytree(tiny, tmp_path / "my-pixtral-model")
    assert settings_of(named)["focal"] == 1000
    assert render.open_checkpoint(str(named), quiet=True).family.mrope
    below = shutil.copytree(tiny_pixtral, tmp_path / "nanoDepthLM" / "depthlm" / "DepthLM")
    opened = render.open_checkpoint(str(below), quiet=True)
    assert opened.settings == {**render.DEFAULTS, "focal": 750} and not opened.family.mrope
    assert opened.settings["prompt"] == "paper"


def test_the_public_checkpoint(tiny_pixtral, monkeypatch):
    """facebook/DepthLM has no depthlm.json: by its name on the hub it is asked as it was trained,
    prompt "release" at focal 750; a flag overrides that, too."""
    monkeypatch.setattr(render, "find_checkpoint", lambda name: tiny_pixtral)
    public = settings_of("facebook/DepthLM")
    assert public == {**render.DEFAULTS, "prompt": "release", "focal": 750}
    assert settings_of("facebook/DepthLM", {"prompt": "paper"})["prompt"] == "paper"
    assert settings_of("someone/DepthLM")["prompt"] == "paper"


def test_no_checkpoint(tmp_path):
    """A wrong path, a folder without config and an unknown architecture are told apart, each with
    its path."""
    for name, config in (("empty", None), ("other", '{"model_type": "gpt2"}'),
                         ("broken", '{"model_type": ')):
        (tmp_path / name).mkdir()
        if config:
            (tmp_path / name / "config.json").write_text(config)
    for name, say in (("missing", "no such"), ("empty", "config.json"), ("other", "gpt2"),
                      ("broken", "config.json")):
        with pytest.raises(ValueError, match=say) as error:
            render.open_checkpoint(str(tmp_path / name))
        assert name in str(error.value)


@pytest.mark.parametrize("config", [
    {"model_type": "gpt2"}, {"model_type": "mistral3"}, {},
    {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}])
def test_unknown_family(tmp_path, config):
    """One line that names the folder, its family, the known ones, and the way round."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        render.open_checkpoint(str(tmp_path))
    message = str(error.value)
    for word in (str(tmp_path), f"'{config.get('model_type')}'", *render.FAMILIES,
                 "--export-queries", "--predictions"):
        assert word in message
    assert "\n" not in message


def test_no_chat_template(tiny, tiny_pixtral, tmp_path):
    """Pixtral is published without one, and gets its family's; elsewhere it is missed."""
    opened, plain = {}, "<|image_pad|>{{ messages[0].content[-1].text }}"
    for source in (tiny, tiny_pixtral):
        folder = shutil.copytree(source, tmp_path / source.name)
        (folder / "chat_template.jinja").unlink()
        if source is tiny:
            with pytest.raises(ValueError, match="chat_template.json"):
                render.open_checkpoint(str(folder), quiet=True)
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": plain}))
        opened[source] = render.open_checkpoint(str(folder), quiet=True).tokenizer.chat_template
    assert opened == {tiny: plain, tiny_pixtral: render.FAMILIES["llava"].chat_template}


def test_a_slip_is_no_repository(tmp_path, monkeypatch):
    """ckpt/tpyo beside ckpt/toy is looked for here alone; a name of which nothing is here is asked
    from the hub."""
    import huggingface_hub
    asked = []

    def download(name, **_):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt" / "toy").mkdir(parents=True)
    for slip in ("ckpt/tpyo", "ckpt/tpyo/", "./someone/model", "/someone/model", "~/model", "model",
                 "a/b/c"):
        with pytest.raises(ValueError, match=f"{slip}: no such checkpoint folder"):
            render.find_checkpoint(slip)
    assert render.find_checkpoint("someone/model") == tmp_path and asked == ["someone/model"]


# --------------------------------------------------------------------------------------------------
# tasks


def test_task_values(tmp_path):
    """Against geometry by hand: a point 3 m ahead and 4 m to the right at the height of the camera
    is 5 m away."""
    path = record(tmp_path, pixel_coords=[[39.5 + 30, 29.5], [39.5, 29.5]], depth=[5.0, 2.0],
                  intrinsics=[22.5, 22.5, 39.5, 29.5, 80, 60])
    assert ask(path, "distance", point=0).value == 5.0
    assert ask(path, "axis", point=0).value == pytest.approx(3.0)
    assert ask(path, "two_point", point=0).value == pytest.approx(math.hypot(4, 1))
    assert ask(path, "two_point", point=1).points == [(39.5, 29.5), (69.5, 29.5)]
    for task, (low, high) in (("speed", render.TIMES), ("time", render.SPEEDS)):
        given = np.array([ask(path, task, point=0, seed=k).given for k in range(300)])
        assert low <= given.min() < 1.2 * low and high / 1.2 < given.max() <= high
        assert (given == given.round(1)).all()
        assert np.mean(given < math.sqrt(low * high)) == pytest.approx(0.5, abs=0.15)
        query = ask(path, task, point=0)
        assert query.value * query.given == pytest.approx(5.0)
        assert str(query.given) in shown(path, SETTINGS, task=task)[1]


@pytest.mark.parametrize("value", [0.0, -1.5, math.nan, math.inf])
def test_values_are_positive(tmp_path, monkeypatch, value):
    """delta1 and the rewards are about ratios, so a task of other values (which side of the road?)
    is refused where it is made, not scored as wrong for ever. A record that it does not suit is
    another matter."""

    def side(records, i, rng, point=None):
        return render.Query("side", [records[i]], [], value)

    monkeypatch.setitem(render.TASKS, "side", render.Task(side, {"paper": ("?", "{x} m")}, {}))
    path = record(tmp_path)
    with pytest.raises(ValueError, match="task 'side': the true value .* not a positive") as error:
        ask(path, "side")
    assert not isinstance(error.value, render.Unfit)


def test_queries_are_a_function_of_the_generator(tmp_path):
    path = make_world(tmp_path, poses=True)
    for task in render.TASKS:
        a, b, c = (ask(path, task, 2, seed=seed) for seed in (3, 3, 4))
        first, again, other = ((q.value, q.points, q.given) for q in (a, b, c))
        assert first == again != other


@pytest.mark.parametrize("crop", [None, (40, 60, 40, 60)])
def test_two_markers(tmp_path, crop):
    """Red at the first point, blue at the second, both on the image in any crop, each where `move`
    says."""
    path = record(tmp_path, pixel_coords=[[4, 9], [72, 51]], depth=[2.0, 3.0])
    for seed in range(10):
        query = ask(path, "two_point", seed=seed)
        (view,), question, _ = render.render(query, {**SETTINGS, "marker": "dot"}, 4, crop,
                                             np.random.default_rng(seed))
        assert question.index("red") < question.index("blue")
        for point, color in zip(query.points, [(255, 0, 0), (0, 0, 255)]):
            y, x = np.argwhere((view.pixels == color).all(2)).mean(0)
            assert (x, y) == pytest.approx(view.move(*point), abs=0.51)


def test_motion(tmp_path):
    """Another frame of the same scene and camera in reach; the second image is that frame's."""
    path = make_world(tmp_path, poses=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[3]["camera"] = "b"
    records[4]["scene"] = "garden"
    records[5]["pose"] = None
    records[2]["pose"] = records[0]["pose"]  # the camera stood still between these
    write_jsonl(path, records)
    partners = {ask(path, "motion", 0, seed=k).records[1]["image"] for k in range(20)}
    assert partners == {str(path.with_name("001.png"))}
    query = ask(path, "motion", 1)
    assert query.value == pytest.approx(0.5) and query.points == []
    views, question, answer = render.render(query, SETTINGS, 28)
    assert len(views) == 2 and "0.50" in answer and "two images" in question
    assert all(v.intrinsics[:2] == pytest.approx((100, 100)) for v in views)
    for i, say in ((5, "has no 'pose'"), (3, "same scene and camera"), (4, "line 5")):
        with pytest.raises(render.Unfit, match=say):
            ask(path, "motion", i)
    assert render.task_fits("motion", render.Records(path))
    records[1]["pose"] = [1e9] * 16  # the only partner of the first
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(render.Unfit, match="line 1: none of the"):
        ask(path, "motion", 0)
    with pytest.raises(render.Unfit, match="line 2: its 'pose' is not 16 finite numbers"):
        ask(path, "motion", 1)
    assert ask(path, "distance", 1).value > 0


@pytest.mark.parametrize("fault", ["short", "text", "huge", "zero", "mirrored", "scaled", "sheared",
                                   "translation", "column-major"])
def test_pose_that_is_none(tmp_path, fault):
    """A pose whose numbers are not finite or hold no rotation suits no motion; the record's other
    tasks are what they were. One that is rounded is right."""
    pose = np.eye(4)
    pose[:3, :3] = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]) + 0.002
    assert (render.pose_matrix(pose.ravel().tolist()) == pose).all()
    assert render.pose_matrix(None) is None
    wrong = {"short": [1.0], "text": ["a"] * 16, "huge": [10 ** 400] * 16, "zero": [0] * 16,
             "mirrored": np.diag([1.0, 1, -1, 1]), "scaled": np.diag([2.0, 2, 2, 1]),
             "sheared": np.eye(4) + 0.1 * np.eye(4, k=1)}.get(fault)
    if fault == "translation":
        wrong = pose.copy()
        wrong[0, 3] = math.inf
    elif fault == "column-major":
        wrong = np.eye(4)
        wrong[3, :3] = 2.0
    assert render.pose_matrix(wrong) is None
    if fault in ("translation", "huge", "text"):
        return
    path = make_world(tmp_path, poses=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["pose"] = np.ravel(wrong).tolist()
    write_jsonl(path, records)
    with pytest.raises(render.Unfit, match="line 1: its 'pose' is not"):
        ask(path, "motion", 0)
    assert str(path.with_name("000.png")) not in {
        ask(path, "motion", 1, seed=k).records[1]["image"] for k in range(30)}
    assert ask(path, "distance", 0).value > 0
    assert not render.task_fits("motion", render.Records(record(tmp_path)))


def test_no_second_point(tmp_path):
    """One point, or a second one hardly beside it: said, with the file and line."""
    for points, depth in (([[20, 30]], [2.0]), ([[20, 30], [21, 30]], [2.0, 2.0])):
        with pytest.raises(render.Unfit, match="line 1: has no second point"):
            ask(record(tmp_path, pixel_coords=points, depth=depth), "two_point")


def test_markers_and_camera_strategies_of_other_tasks(tmp_path):
    """What the paper defines for the distance alone is refused for the others, not dropped
    silently: when a query is rendered, and before that when a checkpoint is opened."""
    path = record(tmp_path, pixel_coords=[[4, 9], [72, 51]], depth=[2.0, 3.0])
    for change in ({"prompt": "text"}, {"camera": "prompt"}, {"camera": "ray"}):
        with pytest.raises(ValueError, match="distance"):
            shown(path, {**SETTINGS, **change}, task="axis")
        with pytest.raises(ValueError, match="task 'time'.*distance"):
            render.check_settings({**SETTINGS, **change, "tasks": ["distance", "time"]})
    shown(path, {**SETTINGS, "camera": "none"}, task="axis")


# --------------------------------------------------------------------------------------------------
# parse_answer


ANSWERS = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))
RAY_FORM = render.TASKS["distance"].wordings["camera ray"][1].format(
    right="31", side="left", up="12", updown="below", x="{x}")
FORMS = [(task, render.answer_form(task, {**render.DEFAULTS, "prompt": prompt}))
         for task in render.TASKS for prompt in ("paper", "release")]


@pytest.mark.parametrize("task, form", [("distance", RAY_FORM), *FORMS])
def test_parse_answer_inverts_format(task, form):
    """Whatever value we write, we read."""
    cents = {*range(1, 1000), *range(1000, 100_000, 97), 99_999}
    for x in [*(k / 100 for k in cents), 1000.0, 12345.67]:
        text = f"{x:.2f}"
        assert render.parse_answer(form.format(x=text), task) == float(text)


@pytest.mark.parametrize("task, text, value", [
    ("speed", "2.5 m/s", 2.5), ("speed", "36 km/h", 10.0), ("speed", "10 mph", 4.4704),
    ("speed", "3 feet per second", 0.9144),
    ("speed", "To be there in 4.0 seconds, 1.5 meters per second.", 1.5), ("speed", "1.2", 1.2),
    ("speed", "120 m/min", 2.0), ("speed", "36 kilometers per hour", 10.0),
    ("time", "1.5 minutes", 90.0), ("time", "12 m at 2 m/s take 6 s", 6.0),
    ("time", "250 ms", 0.25), ("time", "2 hours", 7200.0), ("time", "3 or 4", None),
    ("speed", "5 m or 6 m", None), ("motion", "50 cm", 0.5), ("axis", "2 km", 2000.0),
    ("two_point", "3 feet apart", 0.9144)])
def test_units_of_tasks(task, text, value):
    assert render.parse_answer(text, task) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("text, value", [
    ("2.35", 2.35), ("2.35 m", 2.35), ("about 2.35m.", 2.35), ("3.", 3.0), (".5 meters", 0.5),
    ("5-meter", 5.0), ("1e1 m", 10.0), ("2.35 Meters", 2.35),
    ("-5.0 meters", -5.0), ("\u22122.5 meters", -2.5), ("10-15 meters", None),
    ("200 cm", 2.0), ("150 centimeters away", 1.5), ("100 mm", 0.1), ("2 km", 2000.0),
    ("6 feet", 1.8288), ("6 Feet", 1.8288), ("6 ft", 1.8288), ("12 inches", 0.3048),
    ("10 yards", 9.144),
    ("The point is 2.0 meters away, I am 90% sure.", 2.0), ("I am 90% sure: 2.0 meters", 2.0),
    ("2.5, I am 90 % sure", 2.5), ("90% sure", None), ("90.5%", None), ("90.5 percent", None),
    ("around 2.0 meters (5 steps)", 2.0), ("pixel (120, 40) is 3 m away", 3.0),
    ("3 and 4", None), ("2.5 or 3", None),
    ("1,234.5 m", 1234.5), ("1,234 meters", 1234.0), ("2,5 meters", 2.5),
    ("", None), ("   ", None), (None, None), ("no idea", None), ("two meters", None),
    ("meters", None), ("-", None), (".", None), ("nan", None), ("nan meters", None),
    ("inf meters", None), ("-inf", None), ("1e999 meters", None), ("9" * 400 + " m", None),
    ("<think> 2.00 meters </think>\n\n<answer> 3.00 </answer>", 3.0),
    ("<think> 2 m </think> <answer> -3.00 </answer>", -3.0),
    ("<think> 2.00 meters </think> <answer> 300 cm </answer>", 3.0),
    ("<answer> 2.5", 2.5), ("<answer> </answer>", None),
    ("<think> 2.00 meters </think> <answer> unknown </answer>", None),
    ("<think> 2.00 meters </think>", None), ("<answer>1</answer> no, <answer>4</answer>", 4.0),
    ("<answer> 2.5 meters, 90% sure </answer>", 2.5),
    ("\u05d0\x00\ufffd 2.5 m", 2.5), ("m" * 5000, None), ("(" * 5000 + "2 m", 2.0),
])
def test_parse_answer(text, value):
    """The number before the unit, converted; the answer tag before all; the sign is kept, so that
    -5 m is a wrong answer."""
    result = render.parse_answer(text)
    assert result == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_of_all_kinds(kind):
    """Languages, units, number formats, markup, ranges, thoughts, numbers of other things, answers
    that were cut off: converted, or null, never another number."""
    task = kind if kind in render.TASKS else "distance"
    wrong = []
    for text, value in ANSWERS[kind]:
        found = render.parse_answer(text, task, kind == "truncated")
        if found != (None if value is None else pytest.approx(value, rel=1e-6)):
            wrong.append((text, found, value))
    assert not wrong


@pytest.mark.parametrize("unit, meters", [
    ("m", 1), ("Meter", 1), ("mètres", 1), ("metros", 1), ("metri", 1), ("метра", 1), ("米", 1),
    ("メートル", 1), ("미터", 1), ("cm", 0.01), ("Zentimeter", 0.01), ("centímetros", 0.01),
    ("centimètre", 0.01), ("centimetri", 0.01), ("centimeter", 0.01), ("сантиметров", 0.01),
    ("厘米", 0.01), ("公分", 0.01), ("センチ", 0.01), ("센티미터", 0.01), ("km", 1000),
    ("Kilometer", 1000), ("kilomètres", 1000), ("kilómetros", 1000), ("quilômetros", 1000),
    ("chilometri", 1000), ("километра", 1000), ("公里", 1000), ("キロメートル", 1000),
    ("킬로미터", 1000), ("ft", 0.3048), ("inches", 0.0254), ("yards", 0.9144)])
@pytest.mark.parametrize("number, value", [
    ("2.5", 2.5), ("2,5", 2.5), ("1,234.5", 1234.5), ("1.234,5", 1234.5), ("1 234,5", 1234.5),
    ("1\u202f234.5", 1234.5), ("\uff12\uff0e\uff15", 2.5), ("\u0662\u066b\u0665", 2.5),
    ("12,345", 12345), ("0,345", 0.345), ("-2.5", -2.5), ("0", 0), ("2 1/2", 2.5), ("3/4", 0.75)])
def test_numbers_and_units(number, value, unit, meters):
    """Any number format before any unit, with and without a space, in a sentence, capital or not,
    cut off or not. 12,345 is ambiguous, and read as in English."""
    for form in (f"{number} {unit}", f"about {number}{unit} away", f"Chair 3 is {number} {unit}.",
                 f"**{number} {unit.upper()}**", f"<answer>{number} {unit}</answer>"):
        assert render.parse_answer(form) == pytest.approx(value * meters), form
    for other in ("time", "speed"):
        assert render.parse_answer(f"{number} {unit}", other) is None
    assert render.parse_answer(f"around {number} {unit}", "distance", truncated=True) is None
    assert render.parse_answer(f"{number} {unit} to 30 {unit}") is None


@pytest.mark.parametrize("task, form", FORMS)
def test_a_cut_answer_is_right_or_none(task, form):
    """Wherever the token limit ends an answer of ours."""
    for x in ("2.35", "12.71", "0.05", "107.90"):
        text = form.format(x=x)
        found = [render.parse_answer(text[:n], task, True) for n in range(len(text))]
        assert set(found) <= {None, float(x)}
        assert render.read_answer({"text": text, "truncated": True}, task) == float(x)
        assert render.read_answer({"text": text}, task) == float(x)


def test_parse_answer_is_quick_and_total():
    """Random junk of the alphabet of answers never raises, never gives nan or inf, and long runs of
    anything take no time; 10,000 answers a second."""
    rng = np.random.default_rng(0)
    letters = list("0123456789.,-+e%<>/\\{}()'\"mc ft\n\0\u00bd\u00b2\u7c73\u0662")
    for _ in range(1500):
        text = "".join(rng.choice(letters, rng.integers(1, 30)))
        value = render.parse_answer(text, "distance", bool(rng.integers(2)))
        assert value is None or math.isfinite(value)
    start = time.process_time()
    for text in ("1,", "1", "- ", "<answer>", "1e", "<think>", "</think>", "(1,", "\\boxed{",
                 "1 m ", "1/2 ", "1 and ", "1.000.", "\u00bd", "\u7c73", "a/", "<a", "{", "in ",
                 "1' "):
        for end in ("", "x", " m"):
            render.parse_answer(text * 5000 + end)
    assert time.process_time() - start < 15

    def seconds():
        start = time.process_time()
        for k in range(500):
            render.parse_answer(f"The point is around {k}.35 meters away from the camera.")
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.05


# --------------------------------------------------------------------------------------------------
# records


def refuse(path, match, i=0, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        render.Records(path, **kwargs)[i]
    return str(error.value)


@pytest.mark.parametrize("change, match", [
    ({"depth": [0.0]}, "depth 0.0 of point 0"), ({"depth": [-2.0]}, "-2.0"),
    ({"depth": [float("nan")]}, "nan"), ({"depth": [float("inf")]}, "inf"),
    ({"depth": [1.0, 2.0]}, "1 pixel_coords but 2 depths"),
    ({"depth": ["far"]}, "depth"), ({"depth": None}, "depth"),
    ({"pixel_coords": [[80, 30]]}, r"\[80.0, 30.0\].*outside.*80 x 60"),
    ({"pixel_coords": [[-1, 3]]}, "outside"), ({"pixel_coords": [[3, float("nan")]]}, "finite"),
    ({"depth": [1e9]}, "at most 10000"), ({"depth": [10 ** 400]}, "as numbers"),
    ({"pixel_coords": [[10 ** 400, 3]]}, "as numbers"), ({"orientation": "left"}, "'left'"),
    ({"pixel_coords": [[1, 2, 3]]}, "pixel_coords"),
    ({"intrinsics": [0, 70, 39.5, 29.5, 80, 60]}, "positive"),
    ({"intrinsics": [70, -70, 39.5, 29.5, 80, 60]}, "positive"),
    ({"intrinsics": [70, 70, 39.5, 29.5]}, "intrinsics"),
    ({"intrinsics": [70, 70, float("nan"), 29.5, 80, 60]}, "finite"),
    ({"intrinsics": [10 ** 400, 70, 39.5, 29.5, 80, 60]}, "as numbers"),
    ({"intrinsics": [70, 70, 39.5, 29.5, 0, 60]}, "0 x 60"),
    ({"intrinsics": [1e-3, 1e-3, 39.5, 29.5, 80, 60]}, "field of view"),
    ({"intrinsics": [1e6, 1e6, 39.5, 29.5, 80, 60]}, "20 sides"),
    ({"intrinsics": [70, 70, 80.5, 29.5, 80, 60]}, "principal point in the image"),
    ({"intrinsics": "70"}, "intrinsics"), ({"depth_type": "disparity"}, "disparity"),
    ({"image": 7}, "image"),
])
def test_bad_record(tmp_path, change, match):
    """Each fault of a record is named with its file and line."""
    good = json.loads(record(tmp_path).read_text())
    path = write_jsonl(tmp_path / "bad.jsonl", [good, {**good, **change}])
    assert render.Records(path)[0]["depth"] == [2.0]
    assert "bad.jsonl, line 2" in refuse(path, match, 1)


@pytest.mark.parametrize("key", ["image", "intrinsics", "pixel_coords", "depth"])
def test_missing_key(tmp_path, key):
    """Also the released Matterport3D file's `image_path`, with the remedy."""
    good = json.loads(record(tmp_path).read_text())
    value = good.pop(key)
    moved = {**good, "image_path": value} if key == "image" else good
    path = write_jsonl(tmp_path / "bad.jsonl", [moved])
    message = refuse(path, f"'{key}' is missing")
    assert "line 1" in message and (key != "image" or "rename 'image_path'" in message)


@pytest.mark.parametrize("line", [
    '{"image": "a.png", "intrin', "[1, 2]", "null", "\xff\xfe\x00", "7", "\x00",
    '{"depth": NaN}', '{"time": Infinity}', '{"pose": [-Infinity]}', '{"image": 1, "image": 2}',
    '{"scene": {"a": 1, "a": 1}}', '{"scene": "\\ud800"}', '{"\\udfff": 1}', '{"scene": "\x00"}',
    '{"depth": [' + "9" * 5000 + "]}", '{"scene": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_malformed_line(tmp_path, line):
    """Cut off, of another type, not text, no standard JSON, nested without end: named by file and
    line, and the good lines around it still open."""
    good = record(tmp_path).read_text()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good.encode() + line.encode("latin-1") + b"\n" + good.encode())
    assert "bad.jsonl, line 2" in refuse(path, "not a JSON object|needs a JSON object", 1)
    assert render.Records(path)[2]["depth"] == [2.0]


def test_text_of_any_language(tmp_path):
    """Whole surrogate pairs, escaped zeros and letters beyond ASCII are text."""
    good = json.loads(record(tmp_path).read_text())
    for scene in ("\U0001f600", "M\u00fcnchen", "a\x00b"):
        for ascii_only in (True, False):
            line = json.dumps({**good, "scene": scene}, ensure_ascii=ascii_only)
            (tmp_path / "one.jsonl").write_text(line, encoding="utf-8")
            assert render.Records(tmp_path / "one.jsonl")[0]["scene"] == scene


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_no_nan(tmp_path, value):
    """What would be no JSON is not written: the file stays as it was."""
    render.write_json(tmp_path / "a.json", {"a": 1})
    for write, content in ((render.write_json, {"a": [value]}),
                           (render.write_jsonl, [{"a": 1}, {"a": value}])):
        with pytest.raises(ValueError):
            write(tmp_path / "a.json", content)
    assert render.read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "b.json").write_text(json.dumps({"a": value}))
    with pytest.raises(ValueError, match="b.json: .* no finite number"):
        render.read_json(tmp_path / "b.json")


def test_blank_lines(tmp_path):
    """Blank lines anywhere, a byte order mark and the line ends of Windows are no records, and
    messages count lines as an editor does; an index as older versions made it is right."""
    good = json.loads(record(tmp_path).read_text())
    lines = [json.dumps({**good, "scene": str(k)}) for k in range(4)]
    path = tmp_path / "a.jsonl"
    for text in ("\ufeff" + "\n".join(lines), "\r\n".join(lines) + "\r\n\r\n",
                 "\n\n" + "\n \t\n\n".join(lines) + "\n\n\n", "\n".join(lines) + "\n" + " " * 40):
        path.write_bytes(text.encode())
        starts = [0] + [k + 1 for k, byte in enumerate(text.encode()) if byte == 10]
        old = np.array(starts + [len(text.encode())] * (starts[-1] < len(text.encode())))
        for index in (None, old):
            path.with_suffix(".idx").unlink(missing_ok=True)
            if index is not None:
                index.astype("<i8").tofile(path.with_suffix(".idx"))
            records = render.Records(path)
            assert [records[i]["scene"] for i in range(len(records))] == list("0123")
        assert (np.fromfile(path.with_suffix(".idx"), "<i8") == old).all()
    path.write_text(f"\n{lines[0]}\n\n" + lines[1].replace("[2.0]", "[-2.0]"))
    assert "a.jsonl, line 4: depth -2.0" in refuse(path, "depth", 1)
    path.write_text("\n \n\n")
    refuse(path, "holds no record")


@pytest.mark.parametrize("fault", ["lacks an offset", "decreases", "repeats", "starts late",
                                   "of another file", "inside of a line", "one too many"])
def test_wrong_index(tmp_path, fault):
    """An index of the right end that is as new as its file: made anew, or said where it matters;
    never another record than the line's, and none lost without a word."""
    good = json.loads(record(tmp_path).read_text())
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(path, [{**good, "scene": "x" * (k % 7), "time": k} for k in range(20)])
    write_jsonl(other, [{**good, "scene": "x" * ((k + 3) % 7), "time": k} for k in range(20)])
    right = render.open_index(path).copy()
    wrong = {"lacks an offset": np.delete(right, 5), "decreases": right[[0, 2, 1, *range(3, 21)]],
             "repeats": right[[0, 1, 1, *range(3, 21)]], "starts late": right[1:],
             "of another file": np.append(render.open_index(other)[:-1], right[-1]),
             "inside of a line": right + [0, 9, *[0] * 19],
             "one too many": np.sort(np.append(right, right[4] + 7))}[fault]
    wrong.astype("<i8").tofile(tmp_path / "a.idx")
    said, seen = 0, []
    for i in range(20):
        try:
            records = render.Records(path)
            seen += [records[i]["time"]] if i < len(records) else []
        except ValueError as e:
            assert "a.jsonl: its .idx is of another file. Delete that." in str(e)
            said += 1
    assert said or seen == list(range(20))
    assert len(set(seen)) == len(seen)
    (tmp_path / "a.idx").unlink()
    assert [render.Records(path)[i]["time"] for i in range(20)] == list(range(20))


def test_no_records(tmp_path):
    """Empty or missing file: said at once, not as an IndexError later."""
    (tmp_path / "empty.jsonl").write_text("")
    refuse(tmp_path / "empty.jsonl", "holds no record")
    refuse(tmp_path / "nowhere.jsonl", "no such file")


def test_index(tmp_path):
    """Made when missing, made anew when the jsonl is newer, of another size, or the index is no
    index; the last line may lack its line feed; a read-only folder works too."""
    path, index = tmp_path / "a.jsonl", tmp_path / "a.idx"
    good = json.loads(record(tmp_path).read_text())
    write_jsonl(path, [{**good, "scene": "x" * k} for k in range(50)])
    records = render.Records(path)
    assert len(records) == 50 and index.is_file()
    assert [len(records[i]["scene"]) for i in range(50)] == list(range(50))
    before = index.stat().st_mtime_ns
    assert len(render.Records(path)) == 50 and index.stat().st_mtime_ns == before
    text = path.read_text()
    path.write_text(text + text)  # longer, but as old as the index
    os.utime(path, ns=(before, before))
    assert len(render.Records(path)) == 100 and render.Records(path)[99]["scene"] == "x" * 49
    lines = text.splitlines(keepends=True)
    path.write_text("".join(reversed(lines)) + "".join(lines))  # as long, but newer
    os.utime(path, ns=(2 * before, 2 * before))
    assert render.Records(path)[0]["scene"] == "x" * 49
    path.write_text(text.rstrip("\n"))
    assert len(render.Records(path)) == 50 and render.Records(path)[49]["scene"] == "x" * 49
    for junk in (b"", b"abc", b"x" * 12, bytes(8)):
        index.write_bytes(junk)
        os.utime(index, ns=(9 * before, 9 * before))
        assert len(render.Records(path)) == 50 and render.Records(path)[3]["scene"] == "xxx"


def test_index_that_cannot_be_written(tmp_path, monkeypatch):
    """In a read-only folder the index stays in memory."""
    path = record(tmp_path)

    def read_only(*args):
        raise PermissionError

    monkeypatch.setattr(os, "replace", read_only)
    assert render.Records(path)[0]["depth"] == [2.0]
    assert sorted(os.listdir(tmp_path)) == ["a.png", "one.jsonl"]


def test_depth_type(tmp_path):
    """z becomes Euclidean by the ray's length, by the record's word or by label_type over it;
    without a word it is Euclidean. `--image-root` moves the images."""
    path = record(tmp_path, pixel_coords=[[75, 3]], depth=[4.0])
    ray = math.sqrt(1 + ((75 - 39.5) / 70) ** 2 + ((3 - 29.5) / 72) ** 2)
    assert render.Records(path)[0]["depth"] == [4.0]
    assert render.Records(path, label_type="z")[0]["depth"] == pytest.approx([4 * ray])
    path = record(tmp_path, pixel_coords=[[75, 3]], depth=[4.0], depth_type="z")
    assert render.Records(path)[0]["depth"] == pytest.approx([4 * ray])
    assert render.Records(path, label_type="euclidean")[0]["depth"] == [4.0]
    root = tmp_path / "elsewhere"
    assert render.Records(path, image_root=str(root))[0]["image"] == str(root / "a.png")


def test_one_label_a_record_is_enough(tmp_path):
    """Finding 4 is one label per image: point 0 is asked, and a record without any says so (not a
    neighbour's point)."""
    assert ask(record(tmp_path), "distance").value == 2.0
    with pytest.raises(ValueError, match="line 1.*no labelled point"):
        ask(record(tmp_path, pixel_coords=[], depth=[]), "distance")


# --------------------------------------------------------------------------------------------------
# images


def test_image_modes(tmp_path):
    """Any file becomes 8-bit RGB of the same picture: grey, 1 bit, palette, CMYK, alpha (on black),
    16 and 32 bits, float."""
    ramp = np.linspace(0, 255, 60 * 80).reshape(60, 80).round().astype(np.uint8)
    grey, colour = Image.fromarray(ramp), noise(80, 60)
    high = Image.fromarray((ramp.astype(np.uint16) * 257))
    alpha = colour.copy()
    left = np.where(np.arange(80) < 40, 255, 0).astype(np.uint8)[None].repeat(60, 0)
    alpha.putalpha(Image.fromarray(left))
    cases = {"grey.png": grey, "la.png": grey.convert("LA"), "rgb.png": colour,
             "palette.png": colour.quantize(200), "one.png": grey.convert("1"), "rgba.png": alpha,
             "sixteen.png": high, "thirty-two.tiff": high.convert("I"),
             "float.tiff": Image.fromarray(ramp.astype(np.float32)),
             "cmyk.jpg": colour.resize((8, 6)).resize((80, 60)).convert("CMYK")}
    for name, image in cases.items():
        image.save(tmp_path / name)
        got = render.open_image(tmp_path / name)
        assert got.mode == "RGB" and got.size == (80, 60), name
        pixels = np.asarray(got).astype(int)
        if name == "rgba.png":
            assert (pixels[:, :40] == np.asarray(colour)[:, :40]).all()
            assert (pixels[:, 40:] == 0).all()
        elif name in ("rgb.png", "palette.png", "one.png", "cmyk.jpg"):
            tolerance = 12 if name == "cmyk.jpg" else 0
            expected = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(pixels - expected).mean() <= tolerance, name
        else:  # the ramp, on all three channels
            assert np.abs(pixels - ramp[..., None]).max() <= 1, name


def test_transparent_palette(tmp_path):
    """A palette image with a transparent colour: that colour is laid on black like any alpha."""
    image = Image.new("P", (80, 60), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 4), 0)
    image.save(tmp_path / "p.png", transparency=1)
    pixels = np.asarray(render.open_image(tmp_path / "p.png"))
    assert tuple(pixels[4, 3]) == (10, 20, 30) and (pixels[0, 0] == 0).all()


# what makes the stored pixels of an EXIF orientation upright
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
           4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
           7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a)}
CONTAINERS = {"png": {}, "jpg": {"quality": 98, "subsampling": 0}, "tiff": {},
              "webp": {"lossless": True}, "mpo": {"quality": 98, "subsampling": 0}}


@pytest.mark.parametrize("container", [*CONTAINERS, "lzw.tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("size", [(80, 60), (64, 64)])
def test_exif_orientation(tmp_path, orientation, container, size):
    """A photo without labels is upright. Labels are of the pixels that their record names, whatever
    the container; if it names none, of those that have the size of the labels' image, and where
    that does not tell, of the stored ones. A mirrored, an upside down and a square image have one
    size in both."""
    smooth = noise(8, 6).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"phone.{container}"
    options = {"compression": "tiff_lzw"} if "lzw" in container else CONTAINERS[container]
    smooth.save(path, exif=exif, **options)
    stored, (w, h) = np.asarray(smooth).astype(int), size
    upright = UPRIGHT[orientation](stored)

    def shows(wanted, *labels):
        found = np.asarray(render.open_image(path, *labels)).astype(int)
        return found.shape == wanted.shape and np.abs(found - wanted).max() <= 12

    assert shows(upright)
    high, wide = upright.shape[:2]
    for labels, said, wanted in (((w, h), "stored", stored), ((wide, high), "upright", upright),
                                 ((w, h), None, stored), ((w / 2, h / 2), None, stored),
                                 ((wide, high), None, upright if wide != w else stored),
                                 ((wide * 2, high * 2), None, upright if wide != w else stored)):
        assert shows(wanted, labels, said), (labels, said)
    if orientation > 1:
        assert np.abs(stored - upright).max() > 24 if stored.shape == upright.shape else True


def test_orientation_of_a_record(tmp_path):
    """What is drawn and cropped follows the record's word: the marker is at the same content."""
    image, exif = noise(80, 60), Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.png", exif=exif)
    pixels = np.asarray(image)
    for said, wanted in ((None, pixels), ("stored", pixels), ("upright", pixels[::-1, ::-1])):
        more = {"orientation": said} if said else {}
        path = write_jsonl(tmp_path / "one.jsonl", [
            {"image": "a.png", "intrinsics": [70.0, 70.0, 39.5, 29.5, 80, 60],
             "pixel_coords": [[20, 30]], "depth": [2.0], **more}])
        (view,), *_ = shown(path, {**SETTINGS, "camera": "none"})
        same = (view.pixels == wanted).all(2)
        assert same[30, 20] and (~same).sum() <= 9  # but for the arrow


@pytest.mark.parametrize("blob", [
    b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01", b"Exif\x00\x00garbage!",
    b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\x0f",
    b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 30])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif(tmp_path, blob):
    """The pixels of an image are worth showing though its EXIF data are not worth reading."""
    noise(80, 60).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    segment = b"\xff\xe1" + (len(blob) + 2).to_bytes(2, "big") + blob
    (tmp_path / "a.jpg").write_bytes(data[:2] + segment + data[2:])
    assert render.open_image(tmp_path / "a.jpg").size == (80, 60)


def test_large_photos(tmp_path, monkeypatch):
    """The limit is on memory, whatever Pillow's is, and it is said: 200 megapixels are a phone's
    photo, a gigapixel is a bomb, and so is a third of it in 16 bits, which take four times as
    much."""
    assert 16320 * 12240 * 4 < render.MAX_MEMORY < 20_000 * 20_000 * 4
    Image.new("L", (3000, 2000)).save(tmp_path / "a.png")
    monkeypatch.setattr(render, "MAX_MEMORY", 24_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert render.open_image(tmp_path / "a.png").size == (3000, 2000)
    Image.new("L", (3001, 2000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png.*3001 x 2000 px take 0.0 GB of memory"):
        render.open_image(tmp_path / "a.png")
    Image.new("I;16", (1600, 1000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1600 x 1000 px"):
        render.open_image(tmp_path / "a.png")
    Image.new("L", (100_000, 1)).save(tmp_path / "thin.png")
    assert render.open_image(tmp_path / "thin.png").size == (100_000, 1)


def test_only_images_are_opened(tmp_path, monkeypatch):
    """A file of another kind is not given to whatever program can show it, whatever it is called;
    HEIC is told what to do."""
    noise(80, 60).save(tmp_path / "a.eps")
    noise(80, 60).save(tmp_path / "a.pdf")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a: pytest.fail("started"))
    monkeypatch.setattr(render, "image_formats", lambda: render.FORMATS)  # without pillow-heif
    head = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"
    (tmp_path / "a.heic").write_bytes(head + bytes(500))
    for name in ("a.eps", "a.pdf", "a.heic"):
        (tmp_path / name).rename(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a.png: is no image of .*HEIC: pip install pillow-h"):
            render.open_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(ValueError, match="fifo.png: no such image"):
        render.open_image(tmp_path / "fifo.png")


def test_heic_is_read_where_pillow_heif_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = noise(8, 6).resize((320, 240), Image.Resampling.BICUBIC)
    pillow_heif.from_pillow(image).save(tmp_path / "IMG_1.HEIC", quality=95)
    read = render.open_image(tmp_path / "IMG_1.HEIC")
    difference = np.abs(np.asarray(read, int) - np.asarray(image, int)).mean()
    assert read.size == (320, 240) and difference < 5


@pytest.mark.parametrize("fault", ["missing", "text", "cut", "empty", "folder"])
def test_bad_image(tmp_path, fault):
    """Named by its path, as a ValueError that training counts and evaluation stops at."""
    path = record(tmp_path, noise(80, 60))
    image = tmp_path / "a.png"
    data = image.read_bytes()
    image.unlink()
    if fault == "folder":
        image.mkdir()
    elif fault != "missing":
        faults = {"text": b"no image", "cut": data[:len(data) // 2], "empty": b""}
        image.write_bytes(faults[fault])
    with pytest.raises(ValueError, match="a.png"):
        shown(path, SETTINGS)


def test_resized_image(tmp_path):
    """Labels of 80 x 60 on an image stored at half size: intrinsics and points are scaled, so focal
    and marker stay right."""
    picture, settings = Image.new("RGB", (80, 60), (90, 90, 90)), {**SETTINGS, "focal": 140.0}
    path = record(tmp_path, picture, pixel_coords=[[61, 7]])
    (full,), *_ = shown(path, settings)
    path = record(tmp_path, picture.resize((40, 30)), pixel_coords=[[61, 7]])
    (half,), *_ = shown(path, settings)
    assert half.pixels.shape == full.pixels.shape
    assert half.intrinsics == pytest.approx(full.intrinsics)
    assert half.move(61, 7) == pytest.approx(full.move(61, 7))
    assert red_pixels(half.pixels) == red_pixels(full.pixels)


@pytest.mark.parametrize("size", [(60, 80), (80, 40), (40, 60)])
def test_image_of_another_shape(tmp_path, size):
    """Cropped or turned after labelling: refused, with both sizes and the line."""
    with pytest.raises(ValueError, match=rf"one.jsonl, line 1.*{size[0]} x {size[1]}.*80 x 60"):
        shown(record(tmp_path, noise(*size)), SETTINGS)


def test_whole_images_are_opened_once(tmp_path, monkeypatch):
    """All points of an image that are queried in a row share one reading of it, without a former
    point's marker; a file that changed is read anew."""
    path, opened = record(tmp_path, pixel_coords=[[20, 30], [60, 10]], depth=[2.0, 3.0]), []
    open_image = render.open_image

    def counted(*args):
        opened.append(args)
        return open_image(*args)

    monkeypatch.setattr(render, "open_image", counted)
    for point in (0, 1):
        (view,), *_ = render.render(ask(path, "distance", point=point), SETTINGS, 1)
        assert len(red_pixels(view.pixels)) == 9
    assert len(opened) == 1
    Image.new("RGB", (80, 60), (9, 9, 9)).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", (1e9, 1e9))
    (view,), *_ = shown(path, SETTINGS)
    assert (view.pixels[0, 0] == 9).all() and len(opened) == 2


# --------------------------------------------------------------------------------------------------
# encoding: equal to transformers' own processors


def one_image_inputs(checkpoint, views):
    sample = render.encode(checkpoint, views, "How far?")
    return render.model_inputs(render.pack([sample]), checkpoint)


def open_quietly(folder: Path) -> render.Checkpoint:
    return render.open_checkpoint(str(folder), quiet=True)


def load(folder: Path):
    return evaluate.load_model(open_quietly(folder), CPU, torch.float32)


def test_pixels_equal_the_processor(family):
    """Patches and normalisation, bit for bit, several images of different sizes in one go."""
    checkpoint = open_quietly(family)
    views = views_for(checkpoint, [(3, 2), (1, 1), (4, 5), (2, 7)])
    images = [Image.fromarray(v.pixels) for v in views]
    theirs = image_processor(family)(images, return_tensors="pt")
    ours = one_image_inputs(checkpoint, views)
    assert ours["pixel_values"].dtype == theirs["pixel_values"].dtype == torch.float32
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    grid = "image_grid_thw" if checkpoint.family.mrope else "image_sizes"
    assert ours[grid].tolist() == torch.as_tensor(theirs[grid]).tolist()


def test_pixels_in_another_dtype(family):
    """As transformers casts them: normalised in float32, then rounded."""
    checkpoint = open_quietly(family)
    batch = render.pack([render.encode(checkpoint, views_for(checkpoint, [(3, 2)]), "How far?")])
    full = render.model_inputs(batch, checkpoint)["pixel_values"]
    half = render.model_inputs(batch, checkpoint, dtype=torch.bfloat16)["pixel_values"]
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


def test_pixels_follow_the_folder(tiny_pixtral, tmp_path):
    """A checkpoint that was trained on unscaled 0-255 pixels (do_rescale false, as the released
    training does for Pixtral) is fed with such: the folder decides, not the family."""
    folder = shutil.copytree(tiny_pixtral, tmp_path / "m")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    unscaled = json.dumps({**config, "do_rescale": False})
    (folder / "preprocessor_config.json").write_text(unscaled)
    checkpoint = open_quietly(folder)
    views = views_for(checkpoint, [(3, 2)])
    images = [Image.fromarray(v.pixels) for v in views]
    theirs = image_processor(folder)(images, return_tensors="pt")["pixel_values"]
    assert theirs.max() > 100
    assert torch.equal(one_image_inputs(checkpoint, views)["pixel_values"], theirs)


def expanded_prompt(checkpoint, question: str, sizes) -> list[int]:
    """The chat template's text with the image token written out, as the processors of transformers
    do, then tokenised."""
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": question}]
    text = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    token = checkpoint.family.image_token
    parts = text.split(token)
    assert len(parts) == len(sizes) + 1
    for k, (columns, rows) in enumerate(sizes):
        block = token * (columns * rows)
        if not checkpoint.family.mrope:
            block = "[IMG_BREAK]".join([token * columns] * rows) + "[IMG_END]"
        parts[k] += block
    return checkpoint.tokenizer("".join(parts), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("sizes", [[(3, 2)], [(2, 4), (5, 3)]])
def test_tokens_equal_the_template(family, sizes):
    """Chat template, image tokens in place and number, the answer behind."""
    checkpoint = open_quietly(family)
    sample = render.encode(checkpoint, views_for(checkpoint, sizes), "How far?", [7, 8, 9])
    expected = expanded_prompt(checkpoint, "How far?", sizes)
    assert sample["input_ids"].tolist() == expected + [7, 8, 9]
    assert sample["prompt_length"] == len(expected)
    assert (sample["input_ids"] == checkpoint.image_id).sum() == sum(c * r for c, r in sizes)


@pytest.mark.parametrize("sizes", [[(3, 2)], [(2, 4), (5, 3)], [(1, 1), (1, 1)]])
@pytest.mark.parametrize("name", ["tiny", "tiny_qwen3"])
def test_positions_equal_get_rope_index(request, name, sizes):
    """mRoPE: our positions are those that the model computes for itself, one image and two."""
    folder = request.getfixturevalue(name)
    checkpoint, model = open_quietly(folder), stock(folder)
    views = views_for(checkpoint, sizes)
    sample = render.encode(checkpoint, views, "How far?", [7, 8, 9])
    inputs = plain_inputs(folder, checkpoint, sample, views)
    theirs, _ = model.model.get_rope_index(inputs["input_ids"],
                                           mm_token_type_ids=inputs["mm_token_type_ids"],
                                           image_grid_thw=inputs["image_grid_thw"])
    assert theirs[:, 0].tolist() == sample["position_ids"].tolist()


# --------------------------------------------------------------------------------------------------
# packed attention: equal to the plain model, sample by sample


@torch.no_grad()
def packed_logits(model, checkpoint, samples: list[dict]) -> list[torch.Tensor]:
    inputs = render.model_inputs(render.pack(samples), checkpoint)
    logits = model(**inputs, use_cache=False).logits[0]
    return list(logits.split([len(s["input_ids"]) for s in samples]))


def four_samples(checkpoint):
    """Images of several sizes (larger than a window of 4 x 4 patches), two images in one sample,
    answers of any length."""
    layouts = [[(5, 3)], [(2, 4), (5, 5)], [(1, 1)], [(4, 3)]]
    views = [views_for(checkpoint, layout, 10 * k) for k, layout in enumerate(layouts)]
    samples = [render.encode(checkpoint, v, "How far is it?"[:4 + 3 * k], list(range(20, 23 + k)))
               for k, v in enumerate(views)]
    return views, samples


def test_packed_equals_plain(family):
    """One packed forward of four samples gives the logits of the plain model run on each alone,
    with its own positions, masks and windows."""
    checkpoint, plain, packed = open_quietly(family), stock(family), load(family)
    views, samples = four_samples(checkpoint)
    for sample, view, logits in zip(samples, views, packed_logits(packed, checkpoint, samples)):
        with torch.no_grad():
            alone = plain(**plain_inputs(family, checkpoint, sample, view)).logits[0]
        assert alone.std() > 0.05 and torch.allclose(logits, alone, atol=1e-5, rtol=0)


def test_segments_do_not_leak(family):
    """Another neighbour in the pack changes nothing in the others, to the last digit that matters;
    another image does."""
    checkpoint, packed = open_quietly(family), load(family)
    _, samples = four_samples(checkpoint)
    before = packed_logits(packed, checkpoint, samples)
    other = render.encode(checkpoint, views_for(checkpoint, [(2, 4), (5, 5)], 99),
                          "Quite another question?", [40] * 9)
    after = packed_logits(packed, checkpoint, [samples[0], other, *samples[2:]])
    for k in (0, 2, 3):
        assert torch.allclose(before[k], after[k], atol=2e-6, rtol=0)
    changed = render.encode(checkpoint, views_for(checkpoint, [(5, 3)], 98), "How ", [20, 21, 22])
    assert changed["input_ids"].tolist() == samples[0]["input_ids"].tolist()
    logits = packed_logits(packed, checkpoint, [changed])[0]
    assert (logits[-1] - before[0][-1]).abs().max() > 1e-3


def test_windows_matter(tiny, tiny_windows):
    """The windowed fixture is another function than the one with full attention, so its equality
    above says something."""
    checkpoint = open_quietly(tiny)
    _, samples = four_samples(checkpoint)
    full, windows = (packed_logits(load(folder), checkpoint, samples)
                     for folder in (tiny, tiny_windows))
    assert (full[0] - windows[0]).abs().max() > 1e-3
    assert torch.allclose(full[2], windows[2], atol=1e-5)


# --------------------------------------------------------------------------------------------------
# the real Qwen2.5-VL folder: tokenizer, template, config


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory) -> Path:
    """The published folder with random weights: 2 narrow layers, 4 vision blocks of which one is
    full, real windows."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    source = shared / "models" / "qwen2_5_vl_3b"
    folder = tmp_path_factory.mktemp("models") / "real"
    config = AutoConfig.from_pretrained(source)
    config.text_config.update({
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.08,
        "layer_types": config.text_config.layer_types[:2], "max_window_layers": 2})
    config.text_config.rope_parameters.update(mrope_section=[2, 3, 3])
    config.vision_config.update({
        "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "depth": 4,
        "out_hidden_size": 32, "fullatt_block_indexes": [3], "initializer_range": 0.08})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in source.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    return folder


def test_real_folder(real):
    """Real template and vocabulary: the published prompt, digits one by one, the end-of-turn token;
    processor and plain model agree with ours over windows of 112 px."""
    checkpoint, plain = open_quietly(real), stock(real)
    assert (checkpoint.grid, checkpoint.image_id, checkpoint.end_id) == (28, 151655, 151645)
    views = views_for(checkpoint, [(9, 5)])
    question = question_of("distance")
    answer = "The point is around 12.35 meters away from the camera."
    tokens = checkpoint.tokens(answer)
    spelled = [checkpoint.tokenizer.decode([t]) for t in tokens[3:10]]
    assert spelled == [" around", " ", "1", "2", ".", "3", "5"]
    sample = render.encode(checkpoint, views, question, tokens + [checkpoint.end_id])
    assert checkpoint.tokenizer.decode(sample["input_ids"]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * 45 + f"<|vision_end|>{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>")
    inputs = plain_inputs(real, checkpoint, sample, views)
    pixels = one_image_inputs(checkpoint, views)["pixel_values"]
    assert torch.equal(pixels, inputs["pixel_values"])
    with torch.no_grad():
        alone = plain(**inputs).logits[0]
    ours = packed_logits(load(real), checkpoint, [sample, sample])
    template = evaluate.get_template(checkpoint, render.answer_form("distance", render.DEFAULTS))
    assert checkpoint.tokenizer.decode(template.start) == "The point is around "
    assert set(template.numbers) >= {*tokens[5:10]}
    assert torch.allclose(ours[0], alone, atol=1e-5, rtol=0)
    assert torch.allclose(ours[1], alone, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize("low, high, log, ticks", [
    (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 1500, False, [0, 500, 1000, 1500]),
    (0.73, 0.89, False, [0.7, 0.75, 0.8, 0.85, 0.9]), (-3, 5, False, [-4, -2, 0, 2, 4, 6]),
    (3, 3, False, [3, 3.1]), (0, 0, False, [0, 0.1]),
    (1.89, 4.15, True, [1.5, 2, 3, 4, 5]), (0.5, 9.3, True, [0.5, 1, 2, 5, 10]),
    (3.0, 3.01, True, [2, 3, 4, 5]), (0.002, 80, True, [0.001, 0.01, 0.1, 1, 10, 100])])
def test_round_ticks(low, high, log, ticks):
    """Round, around both ends; a flat wall at 3 m does not fill the scale."""
    found = render.round_ticks(low, high, log)
    assert found == pytest.approx(ticks) and found[0] <= low and found[-1] >= high


def test_axes_place_the_data():
    """The first tick is at the left and the bottom, the last at the right and the top, halfway on a
    logarithmic axis is the geometric mean; what is outside, 0 on such an axis too, is on the
    border."""
    axes = render.Axes("", (1, 100), (0, 10), (True, False), size=(266, 148))
    places = axes.place([1, 10, 100, 0, 1e9], [0, 5, 10, -3, 70])
    assert places.tolist() == [[48, 124], [148, 74], [248, 24], [48, 124], [248, 24]]
    axes.points([10], [5], (255, 0, 0), 3)
    axes.line([1, 100], [2, 2], (0, 0, 255), 1)
    pixels = np.asarray(axes.image).astype(int)
    red = np.argwhere((pixels == (255, 0, 0)).all(2))
    assert red.mean(0).tolist() == [74, 148] and np.ptp(red, 0).max() <= 6
    blue = np.argwhere((pixels == (0, 0, 255)).all(2))
    assert set(blue[:, 0]) == {104} and (blue[:, 1].min(), blue[:, 1].max()) == (48, 248)


def test_tiles_are_packed():
    """In rows as wide as they may be; upright tiles take no more room than they need."""
    tiles = [Image.new("RGB", (width, 30)) for width in (60, 60, 20, 20, 20, 100, 5)]
    picture = np.asarray(render.sheet(tiles, 150))
    assert picture.shape == (130, 150, 3)
    black = (picture == 0).all(2)
    rows = [np.flatnonzero(np.diff(np.pad(row, 1).astype(int))) for row in black[[25, 65, 105]]]
    assert [row.tolist() for row in rows] == [[10, 70, 80, 140], [10, 30, 40, 60, 70, 90],
                                              [10, 110, 120, 125]]


@pytest.mark.parametrize("x, y, corner", [(30, 40, (410, 0)), (900, 700, (0, 0))])
def test_marker_is_magnified(tmp_path, x, y, corner):
    """At f = 1000 an arrow of 5 px is 4 times as large in the corner that is away from it, its
    point in the middle; in an image that is magnified itself there is no such corner."""
    Image.new("RGB", (1200, 750), (90, 90, 90)).save(tmp_path / "a.png")
    record = {"image": tmp_path / "a.png", "where": "a", "pixel_coords": [[x, y]], "depth": [2.0],
              "intrinsics": (1000, 1000, 600, 375, 1200, 750)}
    query = render.Query("distance", [record], [(x, y)], 2.0)
    views, *_ = render.render(query, render.DEFAULTS, 1)
    tile = np.asarray(render.query_tile(query, views, "", 340)).astype(int)
    left, top = corner
    inset = (tile[top + 1:top + 133, left + 1:left + 133] == (255, 0, 0)).all(2)
    rows, columns = np.nonzero(inset)
    assert inset.sum() == 16 * len(render.arrow(5, -1))
    assert columns.max() < 64 and rows.mean() == pytest.approx(65.5)  # beside the point
    box = np.argwhere((tile == render.FRAME).all(2))
    scale = 340 / 750
    beside = [at for at in box if not (left <= at[1] <= left + 134 and at[0] <= 134)]
    assert np.mean(beside, 0) == pytest.approx([y * scale, x * scale], abs=2)
    small = render.View(views[0].pixels[:20, :30], (1.0,) * 6, (1.0, 1.0), (0, 0))
    assert not (np.asarray(render.query_tile(query, [small], "")) == render.FRAME).all(2).any()


def test_contact_sheet(world, tmp_path, monkeypatch):
    """`python render.py FILE` draws what the model sees: a tile a sample, under it its record and
    pixel, question and answer."""
    captions, captioned = [], render.captioned
    monkeypatch.setattr(render, "captioned", lambda image, caption: captions.append(caption)
                        or captioned(image, caption))
    out = tmp_path / "sheet.png"
    render.main([str(world), "--focal", "200", "--n", "6", "--out", str(out), "--grid", "16"])
    records, found = render.Records(world), []
    for caption in captions:
        head, question, answer = caption.split("\n")
        record, x, y = map(int, re.findall(r"\d+", head))
        found.append(record)
        depth_m = records[record]["depth"][records[record]["pixel_coords"].tolist().index([x, y])]
        assert f"{depth_m:.2f}" in answer and "How many meters" in question
    assert sorted(found) == list(range(6))
    sheet = np.asarray(Image.open(out)).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1:].max(2) < 90)
    assert red.any() and sheet.shape[1] <= 1500 + render.GAP


def test_contact_sheet_of_a_checkpoint(world, tiny_pixtral, tmp_path, capsys):
    """--checkpoint follows its focal and grid; a fault is one line and exit code 2."""
    render.main([str(world), "--checkpoint", str(tiny_pixtral), "--out", str(tmp_path / "a.png"),
                 "--n", "1", "--crop", "100", "200", "100", "200", "--prompt", "release"])
    assert (tmp_path / "a.png").is_file() and "focal 750 px" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        render.main([str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2 and not re.search("sheet", " ".join(os.listdir(tmp_path)))


# --------------------------------------------------------------------------------------------------
# crops


def test_crops_are_of_each_number_of_cells_alike():
    """Within the limits, both ends, none more likely; the recipe's 1000-1400 x 700-1200 px."""
    for limits, cells in (((1000, 1400), range(36, 51)), ((700, 1200), range(25, 43)),
                          ((84, 112), (3, 4)), ((100, 110), (3,)), ((10, 20), (1,))):
        rng, sizes = np.random.default_rng(0), []
        for _ in range(3000):
            start, size = render.crop_window(3000, [1500.0], limits, 28, rng)
            assert start <= 1500 - 6 and start + size > 1500 + 6
            sizes.append(size // 28)
        counts = np.array([sizes.count(n) for n in cells])
        assert counts.sum() == 3000 and counts.min() > 0.7 * 3000 / len(cells)


def test_two_images_of_a_motion_are_cropped_alike(tmp_path):
    path = make_world(tmp_path, poses=True)
    records = [record for _, record in render.read_jsonl(path)]
    same = {key: records[0][key] for key in ("image", "intrinsics", "pixel_coords", "depth")}
    write_jsonl(path, [{**record, **same} for record in records])
    settings = {**render.DEFAULTS, "focal": 100}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        query = render.make_query("motion", render.Records(path), 1, rng)
        views, _, _ = render.render(query, settings, 14, (56, 84, 42, 70), rng)
        assert views[0].offset == views[1].offset
        assert (views[0].pixels == views[1].pixels).all()
