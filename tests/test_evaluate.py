"""evaluate.py: metrics, queries, answers equal to transformers' generate, resume, torchrun, the
command line."""
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_world, plain_inputs, run_script, stock, views_for, write_jsonl
from PIL import Image

import evaluate
import render

CPU = torch.device("cpu")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(pred, true, **more) -> list[dict]:
    return [{"image": f"{k}.png", "pixel": [1, 1], "task": "distance", "true": t, "pred": p,
             "text": "", **more} for k, (p, t) in enumerate(zip(pred, true))]


def fails(capsys, *argv) -> str:
    """Run the script; it must end with code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in argv])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


def open_quietly(folder: Path) -> render.Checkpoint:
    return render.open_checkpoint(str(folder), quiet=True)


def greedy(model, checkpoint, samples, form, max_new_tokens):
    batch = evaluate.pack_prompts(checkpoint, samples, form)
    return evaluate.greedy_answers(model, checkpoint, batch, max_new_tokens)


def load(checkpoint: render.Checkpoint):
    return evaluate.load_model(checkpoint, CPU, torch.float32)


# --------------------------------------------------------------------------------------------------
# metrics


def test_metrics_by_hand():
    """Against numbers computed by hand. A negative answer is wrong (the released code scores -2 for
    2 m as right), a missing one too; errors are over the positive parsed answers; a ratio of
    exactly 1.25 is outside."""
    pred = np.array([1.0, 2.0, -2.0, np.nan, 2.6, 5.0, 0.0, 2.5])
    true = np.array([1.0, 2.4, 2.0, 3.0, 2.0, 2.0, 1.0, 2.0])
    got = evaluate.metrics(pred, true)
    ratios = [1.0, 1.2, 1.3, 2.5, 1.25]
    logs = np.log([1 / 1, 2 / 2.4, 2.6 / 2, 5 / 2, 2.5 / 2])
    assert got["delta1"] == 2 / 8 and got["delta2"] == 4 / 8 and got["delta3"] == 4 / 8
    assert got["abs_rel"] == pytest.approx((0 + 0.4 / 2.4 + 0.3 + 1.5 + 0.25) / 5)
    assert got["rmse"] == pytest.approx(math.sqrt((0 + 0.16 + 0.36 + 9 + 0.25) / 5))
    assert got["log10"] == pytest.approx(sum(map(math.log10, ratios)) / 5)
    assert got["silog"] == pytest.approx(100 * math.sqrt((logs ** 2).mean() - logs.mean() ** 2))
    assert (got["n"], got["unparsed"], got["nonpositive"]) == (8, 1, 2)


def test_half_is_as_wrong_as_twice():
    """The ratio counts both ways: 1 m for 2 m is as wrong as 2 m for 1 m."""
    pred, true = np.array([1.0, 2.0, 2.0, 2.4]), np.array([2.0, 1.0, 2.4, 2.0])
    assert evaluate.within(pred, true, 1.25).tolist() == [False, False, True, True]


def test_what_a_task_draws_is_of_the_pair(world):
    """Speeds and second points differ from query to query, whatever else is queried."""
    records = render.Records(world)
    pairs = [(i, k) for i in range(6) for k in range(8)]
    given = [evaluate.query_of(records, "speed", pair).given for pair in pairs]
    assert len({*given}) > 10
    assert given[::-1] == [evaluate.query_of(records, "speed", pair).given for pair in pairs[::-1]]
    assert given != [evaluate.query_of(records, "speed", pair, seed=1).given for pair in pairs]


def test_a_truth_that_is_not_positive():
    """Counts no answer right, whatever it is: 1 m for -1 m and 0 m for 0 m are no distances."""
    true = np.array([-1.0, -2.0, 0.0, 0.0, np.nan, 1.0])
    for pred in (1.0, 2.0, 1e9, 0.0, -1.0, np.nan):
        hits = evaluate.within(np.full(6, pred), true, 1.25)
        assert hits.tolist() == [False] * 5 + [pred == 1.0]


def test_bins():
    """By the true number, from a lower end on, those without a query left out; no AbsRel without an
    answer."""
    true, pred = [0.5, 1.0, 1.9, 2.0, 300.0], [0.5, 1.1, 3.8, None, 450.0]
    result = evaluate.summarize(predictions(pred, true))
    bins = result["datasets"]["data"]["bins"]
    assert {span: (b["delta1"], b["abs_rel"], b["n"]) for span, b in bins.items()} == {
        "0-1": (1.0, 0.0, 1), "1-2": (0.5, pytest.approx(0.55), 2), "2-5": (0.0, None, 1),
        "200-500": (0.0, 0.5, 1)}
    rows = [line.split() for line in evaluate.table(result).splitlines()]
    assert ["true", "1-2:", "delta1", "abs_rel", "0.500", "0.550"] in rows
    assert ["true", "2-5:", "delta1", "abs_rel", "0.000", "-"] in rows
    assert not any("5-10:" in row for row in rows)


def test_worst_queries():
    """By ratio, either way; none is worse than an answer without a number."""
    pred = [1.0, 2.1, None, 8.0, 0.2, 1.01, 0.0, *[1.02] * 20]
    lines = [{**line, "id": k} for k, line in enumerate(predictions(pred, [1.0] * len(pred)))]
    assert [line["id"] for line in evaluate.worst(lines)] == [2, 6, 3, 4, 1, 7, 8, 9, 10]


def test_charts(monkeypatch):
    """What is drawn where: true and predicted, a bar a bin, confidence and the share that is right,
    a colour for each dataset."""
    drawn = []
    for name in ("points", "line"):
        monkeypatch.setattr(render.Axes, name, lambda axes, x, y, color, *more, name=name:
                            drawn.append((name, list(x), list(y), color[:3])))
    near = predictions([1.0, None, 3.0], [1.0, 1.5, 3.0], dataset="a")
    far = predictions([30.0], [40.0], dataset="b")
    sure = {"q10": 2.5, "q90": 3.5, "lost": 0.0}
    near = [{**line, **sure, "confidence": p} for line, p in zip(near, (0.72, 0.78, 1.0))]
    first, second = render.HUES[:2]
    found = evaluate.charts({"a": near, "b": far}, evaluate.summarize(near + far)["datasets"])
    drawn = [(name, x, y, color) for name, x, y, color in drawn if color != render.PALE]
    assert len(found) == 4
    assert drawn[1:3] == [("points", [1.0, 3.0], [1.0, 3.0], first),
                          ("line", [1, 2], [0.5, 0.5], first)]
    assert ("line", [2, 5], [1, 1], first) in drawn and ("line", [2, 5], [0, 0], first) in drawn
    assert [spot for spot in drawn if spot[0] == "points"][1:] == [
        ("points", [0.75], [0.5], first), ("points", [1.0], [1.0], first),
        ("points", [40.0], [30.0], second)]
    assert ("line", [20, 50], [0.25, 0.25], second) in drawn
    assert ("line", [1.0, 40.0], [1.25, 50.0], render.INK) in drawn
    assert len(evaluate.charts({"b": far}, evaluate.summarize(far)["datasets"])) == 3


@pytest.mark.parametrize("source", ["constant", "predictions"])
def test_error_picture(world, tmp_path, monkeypatch, source):
    """errors.png is written with an evaluation: the worst queries first, with marker, number and
    place; from anyone's predictions by their images, and where there is none it says so."""
    argv = ["--constant", "1.3", "--data", world, "--all"]
    out = tmp_path / source
    evaluate.main(list(map(str, [*argv, "--out", tmp_path / "constant"])))
    lines = lines_of(tmp_path / "constant" / "predictions.jsonl")
    tiles, captioned = {}, render.captioned

    def caption_of(image, caption):
        tiles[caption] = np.asarray(image).astype(int)
        return captioned(image, caption)

    monkeypatch.setattr(render, "captioned", caption_of)
    if source == "predictions":
        lines[5]["pred"] = 99.0
        lines[6] |= {"pred": 70.0, "pixel": None}
        lines[7] |= {"pred": None, "text": "no idea", "image": "none.png"}
        argv = ["--predictions", write_jsonl(tmp_path / "p.jsonl", lines)]
    evaluate.main(list(map(str, [*argv, "--out", out])))
    found = list(tiles)
    assert len(found) == evaluate.WORST
    if source == "predictions":
        assert "'no idea'" in found[0] and "none.png: no such image" in found[0]
        assert "answered 99\n" in found[1] and lines[5]["image"] in found[1]
        assert str(lines[5]["pixel"]) in found[1]
        assert "answered 70\n" in found[2] and "NoneType" in found[2]
        del tiles[found[0]], tiles[found[2]]
    else:
        largest = max(abs(math.log(1.3 / line["true"])) for line in lines)
        true = float(found[0].split()[1].rstrip(","))
        assert abs(math.log(1.3 / true)) == pytest.approx(largest)
    for image in tiles.values():
        assert (image == (255, 0, 0)).all(2).sum() > 5
    before = (out / "errors.png").read_bytes()
    evaluate.main(list(map(str, [*argv, "--out", out])))
    assert (out / "errors.png").read_bytes() == before


def test_no_answer_parsed():
    """All unparsed: delta 0, no errors to average, and a metrics.json that strict JSON parsers
    read."""
    result = evaluate.summarize(predictions([None] * 3, [1.0, 2.0, 3.0], dataset="nyuv2"))
    got = result["datasets"]["nyuv2"]
    assert got["delta1"] == got["delta3"] == 0 and got["unparsed"] == got["n"] == 3
    assert got["abs_rel"] is got["rmse"] is got["silog"] is None
    json.dumps(result, allow_nan=False)
    assert "nyuv2" in evaluate.table(result)


def test_interval_resamples_images():
    """Two images of 100 points, one all right, one all wrong, say no more than two coin tosses: the
    interval is [0, 1], where resampling points would give [0.43, 0.57]. With many images of one
    point it is the binomial one."""
    hits, images = np.repeat([True, False], 100), np.repeat(["a", "b"], 100)
    assert evaluate.interval(hits, images) == [0.0, 1.0]
    assert evaluate.interval(hits, np.repeat(["a"], 200)) is None
    hits = np.arange(400) % 4 == 0
    low, high = evaluate.interval(hits, np.arange(400))
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.01)
    assert high == pytest.approx(0.25 + half, abs=0.01)
    assert evaluate.interval(hits, np.arange(400)) == [low, high]
    # images are drawn, but a point weighs as a point: the mean is 0.9, not 0.5
    sizes = np.tile([9, 1], 40)
    low, high = evaluate.interval(np.repeat(np.tile([True, False], 40), sizes),
                                  np.repeat(np.arange(80), sizes))
    assert 0.7 < low < 0.9 < high < 1


def test_best_constant():
    """No constant is right more often (brute force over all that could be)."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40, 300):
        true = np.round(np.exp(rng.normal(1, 0.8, n)), 4)
        best = evaluate.best_constant(true)
        tries = np.concatenate([true * f for f in (1.2499999, 1 / 1.2499999, 1)])
        hits = [evaluate.within(np.full(n, c), true, 1.25).mean() for c in tries]
        assert evaluate.constant_delta1(best, true) == max(hits)


def test_by_z():
    """By z both are divided by the ray: ratios stay, metres do not, and a constant answer becomes
    another one."""
    lines = predictions([2.0, 6.0], [2.0, 4.0])
    got = evaluate.score([{**line, "ray": ray} for line, ray in zip(lines, (1.0, 2.0))])
    assert got["by_z"]["delta1"] == got["delta1"] == 0.5
    assert got["by_z"]["abs_rel"] == got["abs_rel"] == 0.25
    assert got["rmse"] == pytest.approx(math.sqrt(2))
    assert got["by_z"]["rmse"] == pytest.approx(math.sqrt(0.5))
    assert got["always_2m"] == 0.5 and got["by_z"]["always_2m"] == 1.0
    assert "by_z" not in evaluate.score(lines)


def test_table():
    """The paper's order whatever the order of the answers, others behind; the average is over
    datasets, not points; the constant rows stand in it."""
    lines = []
    for name, n in (("toy", 1), ("nyuv2", 3), ("argoverse2", 1), ("ibims1", 1)):
        lines += predictions([1.0] * n, [1.0 if name == "nyuv2" else 2.0] * n, dataset=name)
    result = evaluate.summarize(lines)
    assert list(result["datasets"]) == ["argoverse2", "ibims1", "nyuv2", "toy"]
    assert result["average"]["delta1"] == pytest.approx((0 + 0 + 1 + 0) / 4)
    text = evaluate.table(result).splitlines()
    assert text[0].split() == ["argoverse2", "ibims1", "nyuv2", "toy", "average"]
    rows = {line.split("  ")[0]: line for line in text}
    assert rows["delta1"].split()[1:] == ["0.000", "0.000", "1.000", "0.000", "0.250"]
    assert rows["n"].split()[1:5] == list("1131") and rows["unparsed"].split()[1:5] == list("0000")
    assert "always 2.0 m: delta1" in rows and "best constant: delta1" in rows
    assert "0.280" in rows["paper, always 2.0 m"]


def test_one_dataset_is_one_column():
    """No average beside it; the paper's constants stand beside the paper's sets alone."""
    one = evaluate.summarize(predictions([1.0], [1.0], dataset="toy"))
    text = evaluate.table(one)
    assert text.splitlines()[0].split() == ["toy"] and "2.0" not in text
    timed = [{**line, "task": "time"} for line in predictions([1.0], [1.0], dataset="toy")]
    several = evaluate.summarize(predictions([1.0], [2.0], dataset="toy") + timed)
    text = evaluate.table(several)
    assert text.splitlines()[0].split() == ["delta1", "toy"] and "2.0" not in text
    assert re.search("average of tasks +0.500", text)


def test_published_rows():
    """Tables 1 and 2 beside these answers. The averages and the last column are those of the paper,
    as far as its own rounding goes, when the answers are as right as DepthLM's (7B)."""
    published = json.loads(evaluate.PAPER.read_text())
    scores = {name: {"delta1": value}
              for name, value in published["DepthLM (7B)"].items()}
    rows = {cells[0]: cells[1:] for cells in
            (re.split("  +", line) for line in evaluate.paper_table(
                {"datasets": {**scores, "toy": {"delta1": 1.0}}}).splitlines())}
    assert rows["ours"][-2] == "0.838" == rows["DepthLM (7B)"][-2]
    averages = {"Qwen2.5-VL (72B)": 0.219, "GPT-5": 0.370, "Seed1.5-VL (official setup)": 0.243,
                "DepthLM (3B)": 0.824, "DepthLM, Pixtral (12B)": 0.771, "always 2.0 m": 0.186}
    for name, mean in averages.items():
        assert float(rows[name][-2]) == pytest.approx(mean, abs=0.0011), name
    for name, versus in {"ZoeDepth": -42.8, "Depth Anything": -40.3, "Depth Anything V2": -48.5,
                         "Metric3D": -36.6, "UniDepth": -27.3, "Depth Pro": -29.1,
                         "Metric3Dv2": -3.8}.items():
        assert float(rows[name][-1].rstrip("%")) == pytest.approx(versus, abs=0.11), name
    assert rows["Metric3D"][:3] == ["-", "-", "0.723"]  # not on Argoverse2 and DDAD
    assert rows["ours"][-1] == "+0.0%" and len(rows) == 1 + 1 + len(published)
    few = {"datasets": {"nyuv2": {"delta1": 0.0}, "toy": {"delta1": 1.0}}}
    assert "ZoeDepth" not in evaluate.paper_table(few)  # not on NYUv2


@pytest.mark.parametrize("scale, ending, kind", [(1, "npy", "euclidean"), (3, "npy", "z"),
                                                 (0.5, "png", "z")])
def test_depth_maps(tmp_path, scale, ending, kind):
    """Maps of true depth, larger or smaller than the images, score 1; those that are a pixel off,
    by z instead of the distance, or in another unit do not."""
    data = make_world(tmp_path / "set", images=3, points=6)
    rng, maps = np.random.default_rng(0), tmp_path / "maps"
    records = lines_of(data)
    for record in records:
        fx, fy, cx, cy, w, h = record["intrinsics"]
        size = int(w * scale), int(h * scale)
        # blocks of 4 x 4 px of one depth: what half a pixel of the mapping is worth
        blocks = rng.uniform(1, 60, (h // 4 + 1, w // 4 + 1)).round(3)
        record["pixel_coords"] = [[4 * x + 2 * (k % 2), 4 * y + 3 * (k % 2)] for k, (x, y) in
                                  enumerate(rng.integers(0, (w // 4, h // 4), (6, 2)).tolist())]
        record["depth"] = [blocks[y // 4, x // 4] * (
            math.hypot(1, (x - cx) / fx, (y - cy) / fy) if kind == "z" else 1)
            for x, y in record["pixel_coords"]]
        column, row = ((np.arange(n) + 0.5) / scale for n in size)
        depth = blocks[(row[:, None] // 4).astype(int), (column // 4).astype(int)]
        record["image"] = f"set/{record['image']}"
        path = maps / record["image"].replace("png", ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "npy":
            np.save(path, depth[None])
        else:
            Image.fromarray((depth * 1000).astype(np.uint16)).save(path)
    data = write_jsonl(tmp_path / "val.jsonl", records)
    unit = ["--depth-scale", "1000"] if ending == "png" else []

    def scored(folder, *more) -> dict:
        evaluate.main(["--depth-maps", str(folder), "--data", str(data), "--all", "--out",
                       str(tmp_path / "out"), "--overwrite", *map(str, more)])
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["average"]

    right = scored(maps, *unit, "--depth-type", kind)
    assert right["delta1"] == 1 and right["abs_rel"] < 1e-3
    for path in (maps / "set").glob("*.*"):  # by the images' names
        path.rename(maps / path.name)
    assert scored(maps, "--depth-type", kind) == right  # integers are millimetres
    if kind == "z":
        assert scored(maps, *unit)["abs_rel"] > 0.01
    assert scored(maps, "--depth-scale", 2000, "--depth-type", kind)["delta1"] == 0


def test_answers_of_another_kind_are_said(tmp_path, capsys):
    """Above half of them: the prompt is not the model's."""
    line = {"image": "a.png", "pixel": [1, 2], "true": 2.0}
    for texts, warned in ((["7 chairs", "no", "2 m"], True), (["7 chairs", "2 m", "3 m"], False)):
        path = write_jsonl(tmp_path / "p.jsonl", [{**line, "pixel": [k, 2], "pred": text}
                                                  for k, text in enumerate(texts)])
        evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert ("2 of 3 answers say no number of the unit" in said) == warned


def test_depth_maps_that_do_not_fit(tmp_path, capsys):
    data, maps = make_world(tmp_path / "set", images=2), tmp_path / "maps"
    records = lines_of(data)
    maps.mkdir()

    def said(*more) -> str:
        with pytest.raises(SystemExit):
            evaluate.main(["--depth-maps", str(maps), "--data", str(data), "--all", "--out",
                           str(tmp_path / "out"), *more])
        return capsys.readouterr().err

    assert "000.png, such as 000.npy or .png" in said()
    np.save(maps / "000.npy", np.ones((90, 120, 3)))
    assert "000.npy: " in (line := said()) and "A map is (height, width)" in line
    shutil.copy(tmp_path / "set" / "000.png", maps)
    (maps / "000.npy").unlink()
    assert "in colour, a map has one channel" in said()
    np.save(maps / "000.npy", np.ones((120, 90)))
    assert "000.npy: the image is 90 x 120, its intrinsics say 120 x 90" in said()
    assert "answers the task distance alone" in said("--tasks", "axis")
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    # two images of one name, one map
    (tmp_path / "set" / "a").mkdir()
    shutil.copy(tmp_path / "set" / "000.png", tmp_path / "set" / "a" / "000.png")
    write_jsonl(data, [records[0], {**records[0], "image": "a/000.png"}])
    np.save(maps / "000.npy", np.ones((90, 120)))
    evaluate.read_map.cache_clear()
    assert "would be of" in said()


def test_a_task_that_a_model_never_saw_is_said(tiny, world, tmp_path, capsys):
    evaluate.main([str(tiny), "--data", str(world), "--queries", "1", "--focal", "100",
                   "--max-new-tokens", "2", "--workers", "0", "--out", str(tmp_path / "eval"),
                   "--tasks", "speed", "distance"])
    assert f"{tiny}: was not trained on speed, only on distance" in capsys.readouterr().err


@pytest.mark.parametrize("kind, delta1", [(None, 0.273125), ("z", 0.265625)])
def test_constant_on_ibims(shared, tmp_path, kind, delta1):
    """Real labels: always 2.0 m on 1,600 points of iBims-1 as the file says them, and as the
    Euclidean distances that they become when one says that the file holds z. By z it is the first
    number again."""
    source = shared / "samples" / "ibims1" / "depthlm_ibims1_val.jsonl"
    data = shutil.copy(source, tmp_path / "ibims1.jsonl")
    more = ["--label-type", kind] if kind else []
    evaluate.main(["--constant", "2.0", "--data", str(data), "--all", "--out",
                   str(tmp_path / "out"), *more])
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    got = result["datasets"]["ibims1"]
    assert got["n"] == 1600 and got["delta1"] == delta1
    assert result["average"]["delta1"] == got["always_2m"] == delta1
    if kind == "z":
        assert got["by_z"]["delta1"] == delta1  # a ratio of the same two numbers
        assert got["by_z"]["always_2m"] == 0.273125


# --------------------------------------------------------------------------------------------------
# queries


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> render.Records:
    """60 records with 0 to 6 labels each: the released code takes the first image's number for
    all."""
    rng = np.random.default_rng(0)
    rows = [{"image": "a.png", "intrinsics": [70.0, 70.0, 39.5, 29.5, 80, 60],
             "depth": [1.0 + p for p in range(k % 7)],
             "pixel_coords": rng.integers(0, 60, (k % 7, 2)).tolist()} for k in range(60)]
    return render.Records(write_jsonl(tmp_path_factory.mktemp("uneven") / "val.jsonl", rows))


def points_of(records) -> list:
    return [(i, k) for i in range(len(records)) for k in range(len(records[i]["depth"]))]


def records_of(counts) -> list:
    """Records of which only the number of points matters."""
    return [{"depth": range(n)} for n in counts]


@pytest.mark.parametrize("count", [1, 20, 50, 60, 100, 170])
def test_draw_queries(uneven, count):
    """Distinct, labelled points only, as many as asked for, the same for the same seed and others
    for another; both where records are more than queries and where they are fewer."""
    drawn, labelled = evaluate.draw_queries(uneven, count, 3), set(points_of(uneven))
    assert len(drawn) == len(set(drawn)) == count and set(drawn) <= labelled
    assert drawn == sorted(drawn) == evaluate.draw_queries(uneven, count, 3)
    assert drawn != evaluate.draw_queries(uneven, count, 4)
    if count > 40:  # all over the file and over the points of a record
        assert len({i for i, _ in drawn}) > 20 and len({k for _, k in drawn}) > 4


def test_all_queries(uneven):
    """--all: each labelled point once; so too when as many or more are asked for than there are."""
    everything = points_of(uneven)
    assert len(everything) == 174
    for count in (None, 174, 10 ** 6):
        assert evaluate.draw_queries(uneven, count) == everything


def test_few_labels_in_many_records(tmp_path):
    """More records than queries, but nearly none with a label: all there are, not an endless
    search."""
    row = {"image": "a.png", "intrinsics": [70.0, 70.0, 39.5, 29.5, 80, 60], "depth": [],
           "pixel_coords": []}
    full = {**row, "depth": [1.0, 2.0], "pixel_coords": [[1, 1], [2, 2]]}
    rows = [row] * 30 + [full] + [row] * 9
    records = render.Records(write_jsonl(tmp_path / "val.jsonl", rows))
    assert evaluate.draw_queries(records, 5) == [(30, 0), (30, 1)]
    assert evaluate.draw_queries(records_of([0] * 50), 5) == []


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_nested(seed):
    """The queries of a quick look are among those of the whole evaluation, so that the two can be
    compared; files of few large images and of many small ones."""
    rng = np.random.default_rng(seed)
    for counts in ([30_000, 7], rng.integers(0, 40, 700).tolist()):
        records = records_of(counts)
        nested = [set(evaluate.draw_queries(records, n, seed)) for n in (1, 500, 5000, 8192)]
        assert [len(drawn) for drawn in nested] == [1, 500, 5000, 8192]
        assert nested[0] < nested[1] < nested[2] < nested[3] <= set(points_of(records))


def test_images_are_drawn_evenly():
    """A random image, then one of its points (Sec. 3): an image of 5,000 points counts as one of
    200. Chi-square over 100 images at 10 draws each, of which 148 is the 99.9 % quantile; drawing
    points evenly gives thousands. The points of an image are drawn evenly, too."""
    counts = np.where(np.arange(100) % 2, 5000, 200)
    drawn = evaluate.draw_queries(records_of(counts), 1000)
    times = np.bincount([i for i, _ in drawn], minlength=100)
    assert ((times - 10) ** 2 / 10).sum() < 148
    places = [k / counts[i] for i, k in drawn]
    quarters = np.histogram(places, 4, (0, 1))[0]
    assert ((quarters - 250) ** 2 / 250).sum() < 16.3  # 99.9 %, 3 degrees of freedom


def test_names_of_datasets(world, tmp_path, capsys):
    """By the folder, or by the file where it is not train or val; two of one name by their paths,
    so that they are two columns."""
    names = evaluate.dataset_names
    assert names(["data/nyuv2/val.jsonl", "x/ibims1.jsonl"]) == ["nyuv2", "ibims1"]
    two = ["a/toy/val.jsonl", "b/toy/val.jsonl"]
    assert names([*two, "c/val.jsonl"]) == [*two, "c"]
    assert names(["a/toy/train.jsonl", "a/toy/val.jsonl"]) == ["a/toy/train.jsonl",
                                                              "a/toy/val.jsonl"]
    copy = shutil.copytree(world.parent, tmp_path / world.parent.name) / world.name
    evaluate.main(["--constant", "2", "--data", str(world), str(copy), "--queries", "5",
                   "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(result["datasets"]) == {str(world), str(copy)}
    assert [d["n"] for d in result["datasets"].values()] == [5, 5]


# --------------------------------------------------------------------------------------------------
# greedy answers, step by step, by hand

STOP, OTHER_STOP = 90, 91


@pytest.mark.parametrize("answer, fed, best, expected, kept", [
    ([], [None], [5], [5], 1),  # a prompt without a draft
    ([], [None], [STOP], [STOP], 1),
    ([], [None, 5, 6], [5, 6, 7], [5, 6, 7], 3),  # the whole draft holds, and what follows it
    ([], [None, 5, 6], [5, 8, 7], [5, 8], 2),  # the argmax takes the place of a refused token
    ([], [None, 5, 6], [8, 6, 7], [8], 1),  # what stands behind it counts no more
    ([], [None, 5, 6], [5, STOP, 7], [5, STOP], 2),  # ends within the draft
    ([1, 2], [2], [3], [1, 2, 3], 1),  # plain decoding
    ([1, 2], [2], [3, 0, 0], [1, 2, 3], 1),  # beside longer rows
    ([1, 2], [2, 3, STOP], [3, STOP, 7], [1, 2, 3, STOP], 3),  # nothing is said after the end
    ([1, 2], [2, 3, OTHER_STOP], [3, OTHER_STOP, 7], [1, 2, 3, OTHER_STOP], 3),
    ([1, 2], [2, 3, STOP], [3, 4, 7], [1, 2, 3, 4], 2),  # goes on where the draft ends
    ([1, 2], [2, 3, STOP], [STOP, STOP, 7], [1, 2, STOP], 1)])
def test_accept(answer, fed, best, expected, kept):
    """What of a draft holds: each token that is the argmax after the one before it."""
    stops = {STOP, OTHER_STOP}
    for limit in range(len(answer) + 1, 10):
        said = list(answer)
        assert evaluate.accept(said, fed, best, stops, limit) == kept
        assert said == expected[:limit]


def test_draft_end():
    """The rest of the template once the number is complete: not before it is, not for an answer
    that has left the template, and not where the number's own tokens would be others."""
    letters = SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens)))

    def tokens(text: str) -> list[int]:  # a letter each, but "77" is one token
        return list(map(ord, text.replace("77", "\x07")))

    checkpoint = SimpleNamespace(tokens=tokens, tokenizer=letters, end_id=STOP)
    numbers = {ord(c): c for c in "0123456789."}
    template = evaluate.Template("is {x} m away", tokens("is "), numbers)

    def rest(answer: str, form=template) -> str | None:
        draft = evaluate.draft_end(checkpoint, form, tokens(answer))
        assert not draft or draft[-1] == STOP
        return "".join(map(chr, draft[:-1])) if draft else None

    assert rest("is 2.35 ") == "m away" and rest("is 7 ") == "m away"
    assert rest("is 2.35 m") is None  # drafted before; "2.35 " is no number, nor is it one of two
    for unfinished in ("i", "is", "is ", "is 2", "is 2.", "is 2.35"):
        assert rest(unfinished) is None
    for other in ("it 2.35 ", "is 2.35,", "is  ", "s 2.35 ", "No."):
        assert rest(other) is None
    spelled = [*map(ord, "is 77 ")]  # digit by digit, where the tokenizer has a token
    assert evaluate.draft_end(checkpoint, template, spelled) == []
    assert rest("2.35 ", evaluate.Template("{x} m", [], numbers)) is None
    assert rest("2.35 ", evaluate.Template(None, [], {})) is None


def test_templates(tiny, tiny_pixtral):
    """The words before the number, whatever the number; every token that spells one."""
    for folder in (tiny, tiny_pixtral):
        checkpoint = open_quietly(folder)
        form = render.answer_form("distance", render.DEFAULTS)
        template = evaluate.get_template(checkpoint, form)
        assert checkpoint.tokenizer.decode(template.start) == "The point is around "
        assert set(template.numbers.values()) >= set("0123456789.")
        assert template is evaluate.get_template(checkpoint, form)
        assert evaluate.get_template(checkpoint, "{x} m").start == []
        assert evaluate.get_template(checkpoint, None) == evaluate.Template(None, [], {})


# --------------------------------------------------------------------------------------------------
# greedy answers equal those of transformers' own generate


def generate(folder: Path, checkpoint, views: list, samples: list[dict],
             max_new_tokens: int) -> list[list[int]]:
    """transformers' greedy decoding with stock attention, one sample at a time, every sampling
    field set."""
    model, out = stock(folder), []
    for view, sample in zip(views, samples):
        inputs = plain_inputs(folder, checkpoint, sample, view)
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            eos_token_id=checkpoint.end_id, pad_token_id=checkpoint.tokenizer.pad_token_id)
        out.append(tokens[0, len(sample["input_ids"]):].tolist())
    return out


def test_answers_equal_generate(family):
    """Whatever a random model says, images of several sizes and two images in one batch: token for
    token, with a template that is never said, with another, and with none, however few tokens are
    allowed."""
    checkpoint = open_quietly(family)
    model = load(checkpoint)
    layouts = [[(5, 3)], [(2, 4), (5, 5)], [(1, 1)]]
    views = [views_for(checkpoint, layout, 10 * k) for k, layout in enumerate(layouts)]
    questions = ("How far?", "Where is it, in meters?", "?")
    samples = [render.encode(checkpoint, v, q) for v, q in zip(views, questions)]
    expected = generate(family, checkpoint, views, samples, 20)
    assert len(set(map(tuple, expected))) > 1
    paper = render.answer_form("distance", render.DEFAULTS)
    for form, n in itertools.product((None, paper, "{x} m"), (1, 4, 20)):
        got, _ = greedy(model, checkpoint, samples, form, n)
        assert got == [tokens[:n] for tokens in expected]


LESSONS = [("How far?", "The point is around 2.35 meters away from the camera."),
           ("How far is this?", "The point is around 17.08 meters away from the camera."),
           ("And now?", "The point is near 2 m."),  # leaves the template before the number
           ("Here?", "The point is around 3.10 meters away, I think."),  # after it
           ("There?", "The point is around 40 feet."),
           ("Hm?", "The point is around meters away."),  # no number
           ("What?", "No idea.")]
FORM = "The point is around {x} meters away from the camera."


def fit(model, checkpoint, rows: list[dict], steps: int, enough: float = 0.0) -> None:
    """Train on the packed rows until the loss is small enough."""
    batch, optimizer = render.pack(rows), torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = render.model_inputs(batch, checkpoint)
    for _ in range(steps):
        logits = model(**inputs, use_cache=False, logits_to_keep=batch["predict_at"]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, batch["targets"])
        if loss < enough:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def lesson(checkpoint, views, question: str, answer: str) -> dict:
    tokens = checkpoint.tokens(answer) + [checkpoint.end_id]
    return render.encode(checkpoint, views, question, tokens)


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen3", "tiny_pixtral"])
def taught(request, tmp_path_factory):
    """A model that learnt LESSONS by heart, so that it says the template, and things that leave it
    half way."""
    source = request.getfixturevalue(request.param)
    checkpoint = open_quietly(source)
    model = load(checkpoint)
    views = [views_for(checkpoint, [(1 + k % 3, 1 + k % 2)], k) for k in range(len(LESSONS))]
    rows = [lesson(checkpoint, v, q, a) for v, (q, a) in zip(views, LESSONS)]
    fit(model, checkpoint, rows, steps=150, enough=0.05)
    folder = shutil.copytree(source, tmp_path_factory.mktemp("taught") / request.param)
    model.save_pretrained(folder)
    checkpoint = open_quietly(folder)
    samples = [render.encode(checkpoint, v, q) for v, (q, _) in zip(views, LESSONS)]
    expected = generate(folder, checkpoint, views, samples, 64)
    return checkpoint, load(checkpoint), samples, expected


def test_drafted_answers_equal_generate(taught):
    """The template's words are verified many at a time: rows that say it, leave it at any place, or
    end early keep to what plain greedy decoding says, whatever their neighbours do, also when cut
    off in the middle of the template."""
    checkpoint, model, samples, expected = taught
    assert [checkpoint.text(t) for t in expected] == [a for _, a in LESSONS]
    assert all(t[-1] == checkpoint.end_id for t in expected)
    release = render.answer_form("distance", {**render.DEFAULTS, "prompt": "release"})
    for form in (FORM, None, "The point is near {x} m.", release, "{x}"):
        assert greedy(model, checkpoint, samples, form, 64)[0] == expected
    for n in (1, 3, 6, 7, 10):
        got, _ = greedy(model, checkpoint, samples, FORM, n)
        assert got == [tokens[:n] for tokens in expected]
    for sample, tokens in zip(samples, expected):  # each alone, too
        assert greedy(model, checkpoint, [sample], FORM, 64)[0] == [tokens]


def test_drafts_save_forward_passes(taught):
    """An answer in the template costs a pass for the prompt and its words, one per digit, one for
    the rest: 2.35 m in 6, where plain decoding needs one a token."""
    checkpoint, model, samples, _ = taught
    said, plain = greedy(model, checkpoint, samples[:2], None, 64)
    drafted, few = greedy(model, checkpoint, samples[:2], FORM, 64)
    assert said == drafted and plain == max(map(len, said)) >= 15
    assert few <= len("17.08") + 3 < plain


# --------------------------------------------------------------------------------------------------
# the distribution over numbers


@pytest.fixture(scope="module")
def unsure(tiny):
    """A model that learnt several distances for the same picture, and a question to which it never
    says the template."""
    checkpoint = open_quietly(tiny)
    model = load(checkpoint)
    views = [views_for(checkpoint, [(2, 2)], 3), views_for(checkpoint, [(3, 1)], 4)]
    numbers = ("2.35", "2.81", "12.71", "0.05", "7", "2.35")
    lessons = [(0, "How far?", FORM.format(x=x)) for x in numbers]
    lessons += [(1, "Here?", "I would not know."), (1, "How far?", FORM.format(x="107.90"))] * 2
    rows = [lesson(checkpoint, views[v], q, a) for v, q, a in lessons]
    fit(model, checkpoint, rows, steps=60)
    samples = [render.encode(checkpoint, views[v], q)
               for v, q in ((0, "How far?"), (1, "Here?"), (1, "How far?"))]
    return checkpoint, model, samples


def medians(unsure, samples) -> tuple[list[dict], int]:
    checkpoint, model, _ = unsure
    batch = evaluate.pack_prompts(checkpoint, samples, FORM)
    return evaluate.median_answers(model, checkpoint, batch, 64)


def said_with(model, checkpoint, sample, number: str) -> float:
    """Probability of the number and of something else than a digit behind it, after the template:
    by teacher forcing."""
    template = evaluate.get_template(checkpoint, FORM)
    tail = checkpoint.tokens(FORM.format(x=number))[len(template.start):]
    digits = [t for t in tail if t in template.numbers][:len(number)]
    row = evaluate.append_tokens(sample, [*template.start, *digits])
    with torch.no_grad():
        inputs = render.model_inputs(render.pack([row]), checkpoint)
        logits = model(**inputs, use_cache=False).logits[0].double()
    p = logits[len(sample["input_ids"]) + len(template.start) - 1:].softmax(-1)
    spelled = np.prod([p[k, t] for k, t in enumerate(digits)])
    return float(spelled * (1 - p[len(digits), list(template.numbers)].sum()))


def test_numbers_have_the_probabilities_of_teacher_forcing(unsure, monkeypatch):
    """With every prefix followed, each number's probability is the product over its tokens; nothing
    is lost or doubled."""
    checkpoint, model, samples = unsure
    monkeypatch.setattr(evaluate, "SPLIT_ABOVE", 1e-5)
    monkeypatch.setattr(evaluate, "NARROW", 0.0)
    template = evaluate.get_template(checkpoint, FORM)
    with torch.no_grad():
        batch = evaluate.pack_prompts(checkpoint, samples, FORM)
        prefix = evaluate.prefill(model, checkpoint, batch)
        leaves, _ = evaluate.number_leaves(model, checkpoint, prefix, template.numbers)
    for sample, row in ((samples[0], leaves[0]), (samples[2], leaves[2])):
        assert 0.95 < sum(p for *_, p in row) <= 1 + 1e-9
        whole = {}
        for low, high, p in row:
            if low == high:
                whole[low] = whole.get(low, 0) + p
        for number in ("2.35", "12.71", "0.05", "7", "107.90"):
            expected = said_with(model, checkpoint, sample, number)
            if expected > 5e-3:  # "2.3" and "2.30" are one value, two spellings
                assert whole[float(number)] == pytest.approx(expected, rel=0.05)
    assert said_with(model, checkpoint, samples[0], "2.35") > 0.05  # or nothing was tested


def test_intervals_stand_for_what_is_not_expanded(unsure, monkeypatch):
    """Few wide passes give the quantiles of the full expansion; greedy would need one pass a
    digit."""
    _, _, samples = unsure
    quick, passes = medians(unsure, samples[:1])
    monkeypatch.setattr(evaluate, "SPLIT_ABOVE", 1e-6)
    monkeypatch.setattr(evaluate, "NARROW", 0.0)
    exact, more = medians(unsure, samples[:1])
    assert passes < more and passes <= 6
    values = [{**a, "median": render.parse_answer(a["text"])} for a in (quick[0], exact[0])]
    for key in ("median", "q10", "q90"):
        assert abs(np.log(values[0][key] / values[1][key])) < 0.08, key
    assert quick[0]["q10"] <= values[0]["median"] <= quick[0]["q90"]
    assert 0 <= quick[0]["lost"] < 0.1
    assert quick[0]["confidence"] == pytest.approx(exact[0]["confidence"], abs=0.08)


def test_rows_outside_of_the_template_are_answered_greedily(unsure):
    """And neighbours, batch size and order change nothing."""
    checkpoint, model, samples = unsure
    together, _ = medians(unsure, samples)
    alone = [medians(unsure, [sample])[0][0] for sample in samples]
    tokens, _ = greedy(model, checkpoint, samples, None, 64)
    texts = [checkpoint.text(t) for t in tokens]
    assert together == alone and together[1] == {"text": texts[1]}
    cut, _ = evaluate.median_answers(model, checkpoint, evaluate.pack_prompts(
        checkpoint, samples, FORM), 3)
    assert cut[1] == {"text": checkpoint.text(tokens[1][:3]), "truncated": True}
    assert cut[0] == together[0]  # a median has its number, however few tokens are allowed
    assert not texts[1].startswith("The point")
    assert set(together[0]) == {"text", "q10", "q90", "confidence", "lost"}
    assert together[2]["confidence"] > together[0]["confidence"]  # one lesson against many


# --------------------------------------------------------------------------------------------------
# the tasks (Sec. 3.4)


@pytest.fixture(scope="module")
def speaker(tiny, world, tmp_path_factory) -> Path:
    """A tiny model that answers the world's questions with numbers, right and wrong ones."""
    checkpoint = open_quietly(tiny)
    model = load(checkpoint)
    records, settings, rows = render.Records(world), {**render.DEFAULTS, "focal": 100}, []
    for i in range(len(records)):
        query = evaluate.query_of(records, "distance", (i, 0))
        views, question, text = render.render(query, settings, checkpoint.grid)
        rows.append(lesson(checkpoint, views, question, text if i % 3 else "no idea"))
    fit(model, checkpoint, rows, steps=60)
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "speaker")
    model.save_pretrained(folder)
    (folder / "depthlm.json").write_text(json.dumps(settings))
    return folder


def test_task_table():
    """Table 6: tasks as rows, datasets as columns, a dash where a dataset lacks the task; Table 3:
    the average of a task is over its datasets, the last one over tasks; constants of each task's
    own truths."""
    lines = predictions([1.0, 1.0], [1.0, 2.0], dataset="nyuv2")
    lines += predictions([2.0], [2.0], dataset="ddad")
    moved = predictions([5.0, None], [5.0, 2.1], dataset="ddad")
    lines += [{**line, "task": "motion"} for line in moved]
    result = evaluate.summarize(lines)
    assert result["tasks"]["distance"]["delta1"] == 0.75
    assert result["tasks"]["motion"]["delta1"] == 0.5
    assert result["average"]["delta1"] == 0.625
    assert list(result["datasets"]) == ["ddad", "nyuv2", "ddad/motion"]
    rows = [line.split() for line in evaluate.table(result).splitlines()]
    assert rows[0] == ["delta1", "ddad", "nyuv2", "average"]
    assert rows[1] == ["distance", "1.000", "0.500", "0.750"]
    assert rows[2] == ["always", "2.0", "1.000", "0.500", "0.750"]
    assert rows[3][:3] == ["best", "constant", "1.000"]
    assert rows[4] == ["motion", "0.500", "-", "0.500"]
    assert rows[5] == ["always", "2.0", "0.500", "-", "0.500"]
    assert rows[6][:2] == ["best", "constant"]
    assert rows[7] == ["average", "of", "tasks", "0.625"]
    assert "ddad/motion 2 (1)" in evaluate.table(result)


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("data") / "moving", poses=True)


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen3", "tiny_pixtral"])
def allrounder(request, moving, tmp_path_factory) -> Path:
    """A model of each family that learnt one answer to each task by heart."""
    source = request.getfixturevalue(request.param)
    checkpoint = open_quietly(source)
    model = load(checkpoint)
    settings = {**render.DEFAULTS, "focal": 100, "tasks": list(render.TASKS)}
    records, rows = render.Records(moving), []
    for task in render.TASKS:
        query = evaluate.query_of(records, task, (1, 0))
        rows.append(lesson(checkpoint, *render.render(query, settings, checkpoint.grid)))
    fit(model, checkpoint, rows, steps=200, enough=0.02)
    folder = shutil.copytree(source, tmp_path_factory.mktemp("models") / request.param)
    model.save_pretrained(folder)
    (folder / "depthlm.json").write_text(json.dumps(settings))
    return folder


def test_every_task(allrounder, moving, tmp_path, capsys):
    """All that the checkpoint was trained on is asked without a flag, of every family, two images
    and two markers among it; the template of each task is verified in few passes; the median says
    the same; numbers and images are kept."""
    evaluate.main([str(allrounder), "--data", str(moving), "--all", "--out",
                   str(tmp_path / "eval"), "--workers", "0"])
    shown = capsys.readouterr().out
    lines = lines_of(tmp_path / "eval" / "predictions.jsonl")
    assert [line["task"] for line in lines] == (
        ["distance"] * 48 + ["axis"] * 48 + ["speed"] * 48 + ["time"] * 48 + ["two_point"] * 48
        + ["motion"] * 6)
    checkpoint, records = open_quietly(allrounder), render.Records(moving)
    model = load(checkpoint)
    for task in render.TASKS:
        (queries, answers, passes), = evaluate.run_queries(model, checkpoint, records, [(1, 0)],
                                                           task)
        form = render.answer_form(task, checkpoint.settings)
        assert passes <= 8 and answers == [{"text": form.format(x=f"{queries[0].value:.2f}")}]
        (_, (median,), passes), = evaluate.run_queries(model, checkpoint, records, [(1, 0)], task,
                                                       decode="median")
        value = render.parse_answer(median["text"], task)
        assert passes <= 6 and value == pytest.approx(queries[0].value, rel=0.1)
        line = evaluate.prediction(queries[0], answers[0])
        assert line["pred"] == pytest.approx(line["true"], abs=0.0051)
        assert ("given" in line, "pixel2" in line, "image2" in line) == (
            task in ("speed", "time"), task == "two_point", task == "motion")
    result = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert list(result["tasks"]) == list(render.TASKS) and "average of tasks" in shown


def test_answers_of_a_kind(taught):
    """Cut off, and of another form than the prompt asked for: both are said, as they are true."""
    checkpoint, model, samples, expected = taught
    for limit in (6, 64):
        tokens, _ = greedy(model, checkpoint, samples, FORM, limit)
        answers = [checkpoint.answer(t) for t in tokens]
        assert [a["text"] for a in answers] == [checkpoint.text(t[:limit]) for t in expected]
        assert [a.get("truncated", False) for a in answers] == [len(t) > limit for t in expected]
    assert checkpoint.answer([]) == {"text": "", "truncated": True}
    for stop in checkpoint.stop_ids:
        assert checkpoint.answer([stop]) == {"text": ""}


def test_cut_numbers(speaker, world, tmp_path, capsys):
    """Wherever the token limit ends the answers, each has the number of the whole answer or none,
    and the shares of cut ones and of ones in another form are in the metrics and in the table."""
    whole, cut = run(speaker, world, tmp_path / "whole", "--max-new-tokens", 40), 0
    lines = lines_of(tmp_path / "whole" / "predictions.jsonl")
    assert whole["datasets"]["world"].get("truncated", 0) < 0.5
    for limit in (1, 4, 5, 6, 7, 8, 9):
        capsys.readouterr()
        out = tmp_path / str(limit)
        found = run(speaker, world, out, "--max-new-tokens", limit)["datasets"]["world"]
        shown = capsys.readouterr().out
        short = lines_of(out / "predictions.jsonl")
        for a, b in zip(short, lines):
            assert b["text"].startswith(a["text"].rstrip("\ufffd"))
            assert a["pred"] in (None, b["pred"]), (a, b)
            assert "truncated" in a or (a["text"] == b["text"] and "truncated" not in b)
            cut += a["pred"] != render.parse_answer(a["text"])
        truncated = sum("truncated" in a for a in short) / len(short)
        assert found["truncated"] == truncated > 0 and f"{truncated:.3f}" in shown
        off = sum("off_form" in a for a in short) / len(short)
        assert found["off_form"] == off > 0
        rows = [line.split() for line in shown.splitlines()]
        assert ["truncated", f"{truncated:.3f}"] in rows and ["off_form", f"{off:.3f}"] in rows
    assert cut > 20  # that would have been scored as if they were whole
    off = [not render.has_form(b["text"], "distance", render.DEFAULTS) for b in lines]
    assert off == ["off_form" in b for b in lines] and 0 < sum(off) < len(off)


def test_two_points_by_geometry(speaker, world, monkeypatch):
    """Two exact distances give the exact length between the points; one that is no number gives
    none."""
    checkpoint, records = open_quietly(speaker), render.Records(world)
    pairs, truth = [(k, 0) for k in range(6)], []
    for pair in pairs:
        query = evaluate.query_of(records, "two_point", pair)
        record = query.records[0]
        xy = record["pixel_coords"].tolist()
        truth += [record["depth"][xy.index(list(p))] for p in query.points]
    texts = [f"The point is around {t:.4f} meters away from the camera." for t in truth[:-1]]
    texts += ["no idea"]

    def exact(model, checkpoint, batch, max_new_tokens):
        assert batch["template"].form == render.answer_form("distance", render.DEFAULTS)
        return [[k] for k in range(len(batch["position"]))], 1

    model = SimpleNamespace(compute_device=CPU)
    monkeypatch.setattr(evaluate, "greedy_answers", exact)
    monkeypatch.setattr(render.Checkpoint, "text", lambda self, tokens: texts[tokens[0]])
    (queries, answers, _), = evaluate.run_queries(model, checkpoint, records, pairs, "two_point",
                                                  geometry=True)
    lines = [evaluate.prediction(q, a) for q, a in zip(queries, answers)]
    assert all(line["pred"] == pytest.approx(line["true"], abs=0.011) for line in lines[:-1])
    assert lines[-1]["pred"] is None and lines[-1]["texts"][1] == "no idea"
    assert lines[0]["task"] == "two_point"


def test_sets_without_poses(world, moving, tmp_path, capsys):
    """They show a dash for motion; alone they are refused."""
    argv = ["--constant", "0.5", "--out", tmp_path / "eval", "--tasks", "distance", "motion",
            "--all"]
    evaluate.main([str(a) for a in (*argv, "--data", world, moving)])
    out = capsys.readouterr()
    row, = (line.split() for line in out.out.splitlines() if line.startswith("motion"))
    assert row[1:] == [row[1], "-", row[1]] and "world, motion: 0 of 6 queries" in out.err
    assert "pose" in fails(capsys, "--constant", "0.5", "--out", tmp_path / "e",
                           "--tasks", "motion", "--data", world)


def test_a_marker_and_a_task_of_a_fork(tiny, world, tmp_path, monkeypatch, capsys):
    """Each is one entry of one table in render.py: it is drawn, asked with its own words and
    number, learnt, answered, parsed in its own unit, and has its row in the table."""

    def ring(size: int, side: int) -> list[tuple[int, int]]:
        return [(i, j) for i in (-size, 0, size) for j in (-size, 0, size) if i or j]

    def shadow(records, i, rng, point=None) -> render.Query:
        """Length of the shadow of a pole at a point: half of its height."""
        query = render.distance(records, i, rng, point)
        tall = round(float(rng.uniform(1, 9)), 1)
        return render.Query("shadow", query.records, query.points, tall / 2, tall)

    form = "Its shadow is around {x} feet long."
    words = {"paper": ("A pole of {given} feet stands here. How long is its shadow?", form)}
    task = render.Task(shadow, words, {"feet": 1.0, "cubits": 1.5})
    monkeypatch.setitem(render.MARKERS, "ring", ring)
    monkeypatch.setitem(render.TASKS, "shadow", task)
    assert render.parse_answer("It is 2 cubits long.", "shadow") == 3.0

    checkpoint = render.open_checkpoint(str(tiny), {"marker": "ring", "focal": 100}, quiet=True)
    model, records, rows = load(checkpoint), render.Records(world), []
    for i in range(len(records)):
        query = evaluate.query_of(records, "shadow", (i, 0))
        views, question, answer = render.render(query, checkpoint.settings, checkpoint.grid)
        red = np.argwhere((views[0].pixels == (255, 0, 0)).all(2))
        assert 1 <= len(red) <= 8 and f"{query.given} feet" in question
        assert answer == form.format(x=f"{query.given / 2:.2f}")
        rows.append(lesson(checkpoint, views, question, answer))
    fit(model, checkpoint, rows, steps=80, enough=0.05)
    folder = shutil.copytree(tiny, tmp_path / "m")
    model.save_pretrained(folder)
    settings = {"marker": "ring", "focal": 100, "tasks": ["distance", "shadow"]}
    (folder / "depthlm.json").write_text(json.dumps(settings))
    argv = [str(folder), "--data", str(world), "--queries", "12", "--workers", "0",
            "--out", str(tmp_path / "eval")]
    evaluate.main(argv)
    evaluate.main([*argv, "--marker", "ring", "--tasks", "distance", "shadow"])  # the same
    shown = capsys.readouterr().out
    assert "\nshadow " in shown and "\ndistance " in shown

    lines = lines_of(tmp_path / "eval" / "predictions.jsonl")
    lines = [line for line in lines if line["task"] == "shadow"]
    assert len(lines) == 12 and all(line["true"] > 0 and "given" in line for line in lines)
    parsed = [line for line in lines if line["pred"] is not None]
    assert parsed and all(line["pred"] > 0 and "feet" in line["text"] for line in parsed)
    result = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert list(result["tasks"]) == ["distance", "shadow"]
    assert result["datasets"]["world/shadow"]["n"] == 12


# --------------------------------------------------------------------------------------------------
# the whole evaluation


def arguments(model, data, out, *more) -> list[str]:
    argv = [model, "--data", data, "--out", out, "--all", "--focal", 100, "--max-new-tokens", 8,
            "--batch-size", 5, "--workers", 0, *more]
    return [str(a) for a in argv]


def run(model, data, out, *more) -> dict:
    evaluate.main(arguments(model, data, out, *more))
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reference(speaker, world, tmp_path_factory):
    """The uninterrupted evaluation in one process -> out folder, metrics."""
    out = tmp_path_factory.mktemp("reference") / "eval"
    return out, run(speaker, world, out, "--max-new-tokens", 20)


def test_evaluation(reference, speaker, world):
    """metrics.json and predictions.jsonl say what was asked and answered: each labelled point once,
    the truth of the file, the text as said and the number in it, some parsed and some not."""
    out, result = reference
    lines, records = lines_of(out / "predictions.jsonl"), render.Records(world)
    assert len(lines) == result["datasets"]["world"]["n"] == 48
    assert not list(out.glob("predictions.part-*"))
    for line, (i, k) in zip(lines, points_of(records)):
        record = records[i]
        assert line["image"] == record["image"]
        assert line["pixel"] == record["pixel_coords"][k].tolist()
        assert line["true"] == pytest.approx(record["depth"][k], abs=1e-4)
        assert line["task"] == "distance" and line["dataset"] == "world"
        assert line["pred"] == render.parse_answer(line["text"])
        ray = float(render.ray_length(*line["pixel"], record["intrinsics"]))
        assert line["ray"] == pytest.approx(ray, abs=1e-5)
    parsed = [line["pred"] for line in lines if line["pred"] is not None]
    got = result["datasets"]["world"]
    assert len(set(parsed)) > 3 and got["unparsed"] == 48 - len(parsed) > 0
    assert got["delta1"] > 0 and set(result) == {"datasets", "average"}
    run_json = json.loads((out / "run.json").read_text())
    assert run_json["flags"]["max_new_tokens"] == 20 and run_json["versions"]["torch"]


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 48), ("--workers", 2)])
def test_batch_and_workers_change_nothing(reference, speaker, world, tmp_path, more):
    out, result = reference
    assert run(speaker, world, tmp_path / "eval", "--max-new-tokens", 20, *more) == result
    assert same_answers(tmp_path / "eval", out)


def same_answers(out: Path, other: Path) -> bool:
    files = (folder / "predictions.jsonl" for folder in (out, other))
    return len({file.read_bytes() for file in files}) == 1


def interrupt(monkeypatch, after: int) -> None:
    """Ctrl-C behind that many batches."""
    run_queries = evaluate.run_queries

    def stopped(*args, **kwargs):
        for k, item in enumerate(run_queries(*args, **kwargs)):
            if k == after:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(evaluate, "run_queries", stopped)


def run_interrupted(after: int, *argv) -> Path:
    """-> the part that the run leaves; it ends with the usual code and a line about resuming."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(SystemExit) as stop:
            run(*argv)
    assert stop.value.code == 130
    part, = argv[2].glob("predictions.part-*")
    return part


def no_model(*args):
    raise AssertionError("the model was loaded")


def test_resume(reference, speaker, world, tmp_path, monkeypatch, capsys):
    """Interrupted after 15 answers, the last line cut off as by a kill: the next run asks the other
    34 and ends with the same files."""
    out, asked = tmp_path / "eval", []
    argv = (speaker, world, out, "--max-new-tokens", 20)
    part = run_interrupted(3, *argv)
    assert "resume" in capsys.readouterr().err
    assert len(lines_of(part)) == 15 and not (out / "metrics.json").exists()
    part.write_bytes(part.read_bytes()[:-20])
    greedy_answers = evaluate.greedy_answers

    def counted(*args):
        asked.append(len(args[2]["position"]))
        return greedy_answers(*args)

    monkeypatch.setattr(evaluate, "greedy_answers", counted)
    assert run(*argv) == reference[1] and sum(asked) == 34
    assert same_answers(out, reference[0])
    assert not list(out.glob("predictions.part-*"))
    asked.clear()
    monkeypatch.setattr(evaluate, "load_model", no_model)
    assert run(*argv) == reference[1] and not asked  # finished: read, not queried


def test_finished_evaluation_is_kept(speaker, world, tmp_path, monkeypatch, capsys):
    """By content: a copied folder, touched files, another spelling of a path, a copy of the labels
    in another place are the same evaluation, whose answers are read again without the model."""
    model = shutil.copytree(speaker, tmp_path / "m")
    data = shutil.copytree(world.parent, tmp_path / "world") / "val.jsonl"
    flags = ("--all", "--focal", "100", "--max-new-tokens", "8", "--workers", "0")
    evaluate.main([str(model), "--data", str(data), *flags])
    first = (model / "eval" / "metrics.json").read_bytes()
    answers = (model / "eval" / "predictions.jsonl").read_bytes()
    capsys.readouterr()

    monkeypatch.setattr(evaluate, "load_model", no_model)
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(model, tmp_path / "copy")
    moved = shutil.copytree(data.parent, tmp_path / "elsewhere" / "world") / "val.jsonl"
    for file in (*model.iterdir(), data):
        os.utime(file, (1e9, 1e9))
    for folder, labels in ((model, data), ("m", "world/val.jsonl"), ("./m/", data),
                           (f"{model}/", moved), (copy, data), ("copy", moved)):
        out = Path(folder) / "eval"
        (out / "metrics.json").unlink()
        evaluate.main([str(folder), "--data", str(labels), *flags])
        assert (out / "metrics.json").read_bytes() == first
        assert (out / "predictions.jsonl").read_bytes() == answers
        assert "was evaluated before" in capsys.readouterr().out
    evaluate.main(["m", "--data", "world/val.jsonl", *flags, "--batch-size", "7"])


def test_other_evaluations_are_refused(speaker, tmp_path, capsys):
    """Other answers into the same folder would lose those that are there: one line that names what
    differs, and the folder stays as it is. With --overwrite they take their place."""
    out, data = tmp_path / "eval", make_world(tmp_path / "world", 4, 3)
    model = shutil.copytree(speaker, tmp_path / "m")
    first = run(model, data, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    few = write_jsonl(data.with_name("few.jsonl"), lines_of(data)[:2])
    for other, flags in (("settings", ("--focal", 120)), ("settings", ("--max-new-tokens", 9)),
                         ("settings", ("--marker", "dot")), ("seed", ("--seed", 1)),
                         ("decode", ("--decode", "median")), ("dtype", ("--dtype", "bfloat16")),
                         ("two_point", ("--two-point", "geometry")),
                         ("label_type", ("--label-type", "z")), ("queries", ("--tasks", "axis")),
                         ("queries", ("--data", few))):
        message = fails(capsys, *arguments(model, data, out, *flags))
        assert f"different {other}" in message and "--overwrite" in message, message
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before

    run(model, data, out, "--focal", 120, "--overwrite")
    inputs = json.loads((out / "run.json").read_text())["inputs"]
    assert inputs["settings"]["focal"] == 120
    assert (out / "predictions.jsonl").read_bytes() != before["predictions.jsonl"]
    assert run(model, data, out, "--overwrite") == first
    assert (out / "predictions.jsonl").read_bytes() == before["predictions.jsonl"]

    text = data.read_text()
    records = lines_of(data)
    records[0]["depth"][0] += 1
    write_jsonl(data, records)
    assert "different queries" in fails(capsys, *arguments(model, data, out))
    data.write_text(text)
    assert run(model, data, out) == first


def test_overwrite(speaker, world, tmp_path, monkeypatch):
    """Drops the answers that are there, finished or not, and asks all again, also of the very same
    evaluation."""
    out = tmp_path / "eval"
    part = run_interrupted(2, speaker, world, out)
    lines = [{**line, "text": "old"} for line in lines_of(part)]
    write_jsonl(part, lines)
    write_jsonl(out / "predictions.jsonl", lines)
    result = run(speaker, world, out, "--overwrite")
    lines = lines_of(out / "predictions.jsonl")
    assert result["datasets"]["world"]["n"] == len(lines) == 48
    assert "old" not in {line["text"] for line in lines}
    assert not list(out.glob("predictions.part-*"))


def test_other_parts_are_refused(speaker, world, tmp_path, capsys):
    """The beginning of an evaluation with another seed, focal length or data is not continued with
    these; that of a copy of the checkpoint is."""
    out = tmp_path / "eval"
    part = run_interrupted(1, speaker, world, out)
    more = make_world(tmp_path / "more", 2)
    for argv in ((speaker, world, out, "--focal", 120), (speaker, world, out, "--seed", 1),
                 (speaker, more, out)):
        message = fails(capsys, *arguments(*argv))
        assert "holds a result" in message and part.exists()
    copy = shutil.copytree(speaker, tmp_path / "copy")
    assert run(copy, world, out)["datasets"]["world"]["n"] == 48


def change_one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[-1] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_retrained_checkpoint_is_another(speaker, world, tmp_path, capsys):
    """The same folder with other weights, be it one: neither an evaluation of the old ones nor half
    of one counts."""
    folder = shutil.copytree(speaker, tmp_path / "m")
    half, whole = tmp_path / "half", tmp_path / "whole"
    run_interrupted(1, folder, world, half)
    run(folder, world, whole)
    change_one_weight(folder)
    for out in (half, whole):
        message = fails(capsys, *arguments(folder, world, out))
        assert "different weights" in message and str(out) in message


def test_two_runs_at_once(reference, speaker, world, tmp_path, capsys):
    """The second one into a folder is refused in a line and touches nothing; it may go on once the
    first has ended, however that ended."""
    out = tmp_path / "eval"
    part = run_interrupted(1, speaker, world, out, "--max-new-tokens", 20)
    code = ("import render, sys\nwith render.lock_folder(sys.argv[1]):\n"
            "    print('held', flush=True)\n    sys.stdin.read()")
    argv = arguments(speaker, world, out, "--max-new-tokens", 20)
    with subprocess.Popen([sys.executable, "-c", code, out], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        for more in ((), ("--overwrite",)):
            message = fails(capsys, *argv, *more)
            assert "another run is at work" in message and str(out) in message
            assert len(lines_of(part)) == 5 and not (out / "predictions.jsonl").exists()
        first.kill()
    evaluate.main(argv)
    assert same_answers(out, reference[0])


def test_torchrun(reference, speaker, world, tmp_path):
    """Two processes share the queries and give the files of one."""
    out = tmp_path / "eval"
    argv = arguments(speaker, world, out, "--max-new-tokens", 20)
    done = run_script("evaluate.py", *argv, processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "metrics.json").read_text()) == reference[1]
    assert same_answers(out, reference[0])
    done = run_script("evaluate.py", *argv, "--seed", 1, processes=2)  # rank 0 alone says it
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(errors) == 1 and "different seed" in errors[0]


@pytest.mark.slow
def test_resume_with_other_ranks(reference, speaker, world, tmp_path):
    """What one process answered is kept by two, which are started again by one: marked answers of
    the first parts stand in the end where they stood."""
    out = tmp_path / "eval"
    argv = (speaker, world, out, "--max-new-tokens", 20)
    part = run_interrupted(3, *argv)
    lines = lines_of(part)
    write_jsonl(part, [{**line, "mark": 1} for line in lines])
    done = run_script("evaluate.py", *arguments(*argv), processes=2)
    assert done.returncode == 0, done.stderr
    kept = lines_of(out / "predictions.jsonl")
    assert [line["id"] for line in kept] == list(range(48))
    assert [line["id"] for line in kept if line.pop("mark", 0)] == [line["id"] for line in lines]
    assert kept == lines_of(reference[0] / "predictions.jsonl")
    assert not list(out.glob("predictions.part-*"))

    (out / "predictions.jsonl").unlink()
    for rank in (0, 1):  # as two ranks leave them, one killed while it wrote
        share = [{**line, "mark": 1} for line in kept[rank:30 - 10 * rank:2]]
        path = write_jsonl(out / f"predictions.part-{rank}-of-2-123.jsonl", share)
    path.write_text(path.read_text() + '{"id": 21, "ima')
    run(*argv)
    again = lines_of(out / "predictions.jsonl")
    marked = [line["id"] for line in again if line.pop("mark", 0)]
    assert marked == sorted([*range(0, 30, 2), *range(1, 20, 2)]) and again == kept


@pytest.mark.slow
def test_late_rank_zero(reference, speaker, world, tmp_path):
    """A rank that is ready before rank 0 waits for its word, instead of taking old answers for
    this evaluation's, or leaving parts which rank 0 would then refuse."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import evaluate
claim = evaluate.claim

def late(out, *args):
    time.sleep(3)
    assert len(list(out.glob("predictions.part-*"))) == 1
    claim(out, *args)
    (out / "claimed").write_text(os.environ["RANK"])

evaluate.claim = late
evaluate.main()
""")
    out = shutil.copytree(reference[0], tmp_path / "eval")
    old = [{**line, "text": "old"} for line in lines_of(out / "predictions.jsonl")]
    write_jsonl(out / "predictions.jsonl", old)
    write_jsonl(out / "predictions.part-0-of-1-123.jsonl", old[:20])
    argv = arguments(speaker, world, out, "--max-new-tokens", 20, "--overwrite")
    done = run_script(driver, *argv, processes=2)
    assert done.returncode == 0, done.stderr
    assert (out / "claimed").read_text() == "0" and same_answers(out, reference[0])


def test_missing_answers(tmp_path):
    """Ranks that do not share a folder (or a part that was removed): not a score over fewer points
    than it claims."""
    write_jsonl(tmp_path / "predictions.part-0-of-2-1.jsonl", [{"id": 0}, {"id": 2}])
    with pytest.raises(ValueError, match="2 of 4 answers.*--out"):
        evaluate.join_parts(tmp_path, 4)
    assert os.listdir(tmp_path) == ["predictions.part-0-of-2-1.jsonl"]
    write_jsonl(tmp_path / "predictions.part-1-of-2-1.jsonl", [{"id": 1}, {"id": 3}])
    evaluate.join_parts(tmp_path, 4)
    assert [line["id"] for line in lines_of(tmp_path / "predictions.jsonl")] == [0, 1, 2, 3]


def test_large_files_are_not_read_into_memory(tmp_path):
    """Labels of 16 million images are hashed piece by piece."""
    path = tmp_path / "labels.jsonl"
    content = os.urandom(1 << 20) * 40
    path.write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    tracemalloc.start()
    found = evaluate.file_hash(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == expected and peak < 4 << 20


def test_settings_come_from_the_checkpoint(speaker, world, tmp_path, monkeypatch):
    """depthlm.json's focal length and answer length are used without a flag (the released
    evaluation has 750 written into it, whatever was trained), a flag overrides each."""
    folder = shutil.copytree(speaker, tmp_path / "m")
    (folder / "depthlm.json").write_text(json.dumps({"focal": 100, "max_new_tokens": 7}))
    seen = []

    def spy(model, checkpoint, *args):
        seen.append((checkpoint.settings["focal"], checkpoint.settings["max_new_tokens"]))
        return iter(())

    answers = {n: {**predictions([1.0], [1.0])[0], "id": n} for n in range(48)}
    monkeypatch.setattr(evaluate, "run_queries", spy)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: None)
    monkeypatch.setattr(evaluate, "read_parts", lambda out: answers)
    for flags in ((), ("--focal", "123"), ("--max-new-tokens", "9")):
        out = tmp_path / "-".join(("eval", *flags))
        evaluate.main([str(folder), "--data", str(world), "--all", "--out", str(out), *flags])
    assert seen == [(100, 7), (123, 7), (100, 9)]


def test_answers_have_the_tokens_of_the_checkpoint(tiny, world, tmp_path):
    """An answer ends where depthlm.json says, else at 128 tokens; a random model never ends it."""
    folder, texts = shutil.copytree(tiny, tmp_path / "m"), []
    checkpoint = open_quietly(tiny)
    for k, (settings, flags) in enumerate((({"max_new_tokens": 5}, ()), ({}, ()),
                                           ({"max_new_tokens": 5}, ("--max-new-tokens", "9")))):
        (folder / "depthlm.json").write_text(json.dumps({**settings, "focal": 100}))
        evaluate.main([str(folder), "--data", str(world), "--queries", "1", "--workers", "0",
                       "--out", str(tmp_path / str(k)), *flags])
        line, = lines_of(tmp_path / str(k) / "predictions.jsonl")
        texts.append(line["text"])
    records = render.Records(world)
    _, batch = evaluate.query_batch(open_quietly(folder), records, "distance", 0, False, None,
                                    evaluate.draw_queries(records, 1))
    tokens, = evaluate.greedy_answers(load(checkpoint), checkpoint, batch, 128)[0]
    assert len(tokens) > 9
    assert texts == [checkpoint.text(tokens[:n]) for n in (5, 128, 9)]


# --------------------------------------------------------------------------------------------------
# without a model


def test_constant(world, tmp_path, monkeypatch):
    """--constant needs no model, and without --data it takes every data/*/val.jsonl; the default
    out folder is its own."""
    for name in ("nyuv2", "ddad", "toy"):
        shutil.copytree(world.parent, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--constant", "2.5", "--queries", "7"])
    got = json.loads((tmp_path / "out" / "constant" / "metrics.json").read_text())
    lines = lines_of(tmp_path / "out" / "constant" / "predictions.jsonl")
    assert list(got["datasets"]) == ["ddad", "nyuv2", "toy"] and len(lines) == 21
    assert {line["pred"] for line in lines} == {2.5}
    hits = [max(2.5 / line["true"], line["true"] / 2.5) < 1.25
            for line in lines if line["dataset"] == "toy"]
    assert got["datasets"]["toy"]["delta1"] == pytest.approx(np.mean(hits))


def test_constant_is_not_taken_for_a_model(speaker, world, tmp_path, capsys):
    """A baseline is not written over a model's answers unless that is said, nor read as them."""
    out = tmp_path / "eval"
    run(speaker, world, out)
    constant = ("--constant", 2, "--data", world, "--all", "--out", out)
    answers = (out / "predictions.jsonl").read_bytes()
    assert "constant" in fails(capsys, *constant)
    assert (out / "predictions.jsonl").read_bytes() == answers
    evaluate.main([*map(str, constant), "--overwrite"])
    assert json.loads((out / "run.json").read_text())["flags"]["constant"] == 2
    assert "another" in fails(capsys, *arguments(speaker, world, out))


def test_predictions(reference, tmp_path):
    """Anyone's answers on our points: our own file scores as before; answers as text are parsed as
    ours are."""
    out, result = reference
    evaluate.main(["--predictions", str(out / "predictions.jsonl"), "--out", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == result
    texts = []
    for line in lines_of(out / "predictions.jsonl"):
        line.pop("task")
        texts.append({**line, "pred": line.pop("text")})
    path = tmp_path / "theirs.jsonl"
    path.write_text("\n\n".join(json.dumps(t, ensure_ascii=False) for t in texts))
    evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == result


def test_predictions_of_any_kind(tmp_path):
    """NaN, infinities and null are unparsed, negative ones wrong; a line separator within a text
    ends no line."""
    pred = [2.0, float("nan"), float("inf"), None, -2.0, "2.0 m\u2028\x85 or so"]
    lines = predictions(pred, [2.0] * 6)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                    encoding="utf-8")
    evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    got = result["datasets"]["data"]
    assert (got["n"], got["unparsed"], got["nonpositive"]) == (6, 3, 1)
    assert got["delta1"] == 2 / 6


def test_where_predictions_go(tmp_path, monkeypatch, capsys):
    """Each file to a folder of its own, with a run.json that names it by content."""
    monkeypatch.chdir(tmp_path)
    for name, pred in (("theirs", 2.0), ("ours", 4.0)):
        write_jsonl(tmp_path / f"{name}.jsonl", predictions([pred], [2.0]))
        evaluate.main(["--predictions", f"{name}.jsonl"])
    out = tmp_path / "out" / "predictions"
    scores = [json.loads((out / name / "metrics.json").read_text()) for name in ("theirs", "ours")]
    assert [score["average"]["delta1"] for score in scores] == [1, 0]
    inputs = json.loads((out / "ours" / "run.json").read_text())["inputs"]
    assert inputs["predictions"] == evaluate.file_hash("ours.jsonl")

    message = fails(capsys, "--predictions", "ours.jsonl", "--paper-rows")
    assert message.startswith("error: --paper-rows: the paper's sets are argoverse2, ")


@pytest.mark.parametrize("task, unit", [
    ("distance", " m"), ("speed", " m/s"), ("time", " s"), ("width", "")])
def test_unit_of_the_best_constant(task, unit):
    """Of the task; of a task that is not ours there is none to name."""
    lines = predictions([2.0, 2.0], [2.0, 2.0], dataset="here")
    text = evaluate.table(evaluate.summarize([{**line, "task": task} for line in lines]))
    assert re.search(r"best constant: delta1 +1\.000 \([\d.]+(.*)\)", text)[1] == unit


def test_predictions_of_a_task_that_is_not_ours(tmp_path, capsys):
    """Anyone's task has its row; its answers as text are parsed as distances."""
    lines = [{**line, "task": "width"} for line in predictions(["200 cm", 5.0], [2.0, 2.0])]
    path = write_jsonl(tmp_path / "p.jsonl", [*lines, *predictions([2.0], [2.0])])
    evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(result["tasks"]) == ["distance", "width"]
    assert result["tasks"]["width"]["delta1"] == 0.5 and "\nwidth" in capsys.readouterr().out


def test_the_same_query_twice(reference, speaker, world, tmp_path, capsys):
    """A file that was joined from two runs would count its queries twice: both lines are named.
    Two labels of one pixel are two queries, which their ids tell apart, if all lines have one."""
    out, _ = reference
    lines = lines_of(out / "predictions.jsonl")
    again = [{**line, "pred": 1.0, "text": "1 m", "confidence": 0.5} for line in lines[5:7]]

    def scored(lines, name="p"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", lines)
        evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "out")])

    def twice(lines) -> str:
        path = write_jsonl(tmp_path / "twice.jsonl", lines)
        message = fails(capsys, "--predictions", path, "--out", tmp_path / "x")
        assert "same query" in message and not (tmp_path / "x").exists()
        return message

    message = twice([*lines, *again])
    assert "twice.jsonl, line 49:" in message and "twice.jsonl, line 6." in message
    without = [{k: v for k, v in line.items() if k != "id"} for line in [*lines[:8], *again]]
    assert "line 9:" in twice(without)
    assert "line 9:" in twice([*without[:8], {**again[0], "id": 77}])  # one id says nothing
    scored([*lines[:8], {**again[0], "id": 77}])
    for other in ({"task": "axis"}, {"dataset": "b"}, {"image": "b.png"}, {"pixel": [1, 2]},
                  {"given": 3.0}, {"image2": "c.png"}, {"pixel2": [4, 4]}):
        scored([*without[:8], {**without[5], **other}])
    # a constant has the same lines, of any task
    evaluate.main(["--constant", "2", "--data", str(world), "--all", "--out", str(tmp_path / "c"),
                   "--tasks", "distance", "two_point"])
    scored(lines_of(tmp_path / "c" / "predictions.jsonl"))


@pytest.mark.parametrize("way", ["lines", "flag"])
def test_predictions_of_z(reference, tmp_path, capsys, way):
    """Another system's depth along the axis is made a distance by the ray of its line: answering
    the true z is answering right. Numbers, texts, and their intervals; other tasks stay."""
    out, _ = reference
    lines = []
    for k, line in enumerate(lines_of(out / "predictions.jsonl")):
        z = line["true"] / line["ray"]
        answers = (z, f"{100 * z:.3f} cm", -z, None)
        lines.append({**line, "pred": answers[k % 4], "ray": line["ray"] * 2, "true": 2 * z
                      * line["ray"], "q10": 0.9 * z, "q90": 1.1 * z, "confidence": 1, "lost": 0})
    lines.append({**lines[0], "task": "axis", "pred": lines[0]["true"]})
    flags = ["--depth-type", "z"] if way == "flag" else []
    if way == "lines":
        lines = [{**line, "depth_type": "z"} for line in lines]
        lines.append({**lines[1], "id": 100, "depth_type": "euclidean", "pred": lines[1]["true"],
                      "q10": 1, "q90": 1})

    def score(lines, *more) -> dict:
        path = write_jsonl(tmp_path / "z.jsonl", lines)
        evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "z"), *more])
        return json.loads((tmp_path / "z" / "metrics.json").read_text())

    result = score(lines, *flags)
    got = result["datasets"]["world"]
    right = 25 if way == "lines" else 24
    assert got["delta1"] == right / (right + 24) and got["abs_rel"] < 1e-4
    assert (got["nonpositive"], got["unparsed"]) == (12, 12)
    assert got["in_10_90"] == 48 / (right + 24) and got["by_z"]["delta1"] == got["delta1"]
    assert result["datasets"]["world/axis"]["delta1"] == 1.0
    bare = {key: value for key, value in lines[0].items() if key not in ("depth_type", "ray")}
    wrong = ({**lines[0], "depth_type": "disparity"}, {**lines[0], "depth_type": ["z"]},
             {**lines[0], "ray": 0.5}, {**lines[0], "ray": None}, {**bare, "depth_type": "z"})
    for line in wrong:
        path = write_jsonl(tmp_path / "w.jsonl", [lines[1], line])
        message = fails(capsys, "--predictions", path, "--out", tmp_path / "w")
        assert "w.jsonl, line 2: " in message and "ray" in message


@pytest.mark.parametrize("line", [
    '{"image": "a", "true": 2.0', '{"image": "a", "true": 2.0}', '{"true": 1, "pred": 1}', "[1]",
    "3", '{"image": "a", "true": 0, "pred": 1}', '{"image": "a", "true": -1, "pred": 1}',
    '{"image": "a", "true": NaN, "pred": 1}', '{"image": "a", "true": "far", "pred": 1}',
    '{"image": "a", "true": 1, "pred": [1]}', '{"image": "a", "true": 1, "pred": {}}',
    '{"image": "a", "true": 1e999, "pred": 1}', '{"image": "a", "true": null, "pred": 1}',
    '{"image": "a", "true": 1' + "0" * 400 + ', "pred": 1}',
    '{"image": "a", "true": 1, "pred": 1' + "0" * 400 + '}',
    '{"image": "a", "true": [1], "pred": 1}', '{"image": ["a"], "true": 1, "pred": 1}',
    '{"image": "a", "true": 1, "pred": 1, "task": 3}',
    '{"image": "a", "true": 1, "pred": 1, "dataset": ["nyuv2"]}',
    '{"image": "a", "true": 1, "pred": 1, "ray": "long"}',
    '{"image": "a", "true": 1, "pred": 1, "ray": NaN}',
    '{"image": "a", "true": 1, "pred": 1, "q10": "x"}',
    '{"image": "a", "true": 1, "pred": 1, "confidence": []}'])
def test_malformed_predictions(tmp_path, capsys, line):
    """Named by file and line; nothing is written."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(predictions([1.0], [1.0])[0]) + "\n" + line + "\n")
    message = fails(capsys, "--predictions", path, "--out", tmp_path / "out")
    assert "p.jsonl, line 2" in message and len(message) < 900
    assert not (tmp_path / "out" / "metrics.json").exists()


# --------------------------------------------------------------------------------------------------
# other systems


def test_untuned_model(tiny, world, tmp_path, capsys):
    """A base model as it was published: the family's defaults, said aloud, the paper's question, a
    free answer of up to --max-new-tokens tokens."""
    evaluate.main([str(tiny), "--data", str(world), "--queries", "4", "--focal", "100",
                   "--out", str(tmp_path / "eval"), "--workers", "0", "--max-new-tokens", "30"])
    assert "prompt paper" in capsys.readouterr().err
    lines = lines_of(tmp_path / "eval" / "predictions.jsonl")
    lengths = [len(open_quietly(tiny).tokens(line["text"])) for line in lines]
    assert len(lengths) == 4 and max(lengths) > 16


def test_unknown_family(tmp_path, world, capsys):
    """One line with the folder, its family, and the way round; nothing is written."""
    for kind, config in (
            ("llava", {"model_type": "llava",
                       "vision_config": {"model_type": "clip_vision_model"}}),
            ("mistral3", {"model_type": "mistral3"}), ("gpt2", {"model_type": "gpt2"})):
        folder = tmp_path / f"a-{kind}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for more in ((), ("--export-queries", tmp_path / "export")):
            message = fails(capsys, folder, "--data", world, *more)
            for word in (str(folder), f"'{kind}'", "--export-queries", "--predictions"):
                assert word in message, message
        assert os.listdir(folder) == ["config.json"] and not (tmp_path / "export").exists()


def test_exported_queries(world, moving, tiny_pixtral, tmp_path, capsys):
    """Images and questions as files; answers by hand, as numbers and as sentences, are scored on
    the very points. With a checkpoint the images are those that it would see."""
    out = tmp_path / "export"
    argv = ["--data", world, moving, "--queries", 5, "--tasks", "distance", "two_point", "motion",
            "--focal", 100]
    evaluate.main([str(a) for a in ("--export-queries", out, *argv)])
    lines = lines_of(out / "queries.jsonl")
    assert len(lines) == 25
    assert {len(line["images"]) for line in lines if line["task"] == "motion"} == {2}
    records = render.Records(world)
    query = evaluate.query_of(records, "distance", evaluate.draw_queries(records, 5)[0])
    (view,), question, _ = render.render(query, {**render.DEFAULTS, "focal": 100}, 1)
    assert (np.asarray(Image.open(out / lines[0]["images"][0])) == view.pixels).all()
    assert lines[0]["question"] == question and not {"pred", "text"} & set(lines[0])
    assert lines[0]["true"] == pytest.approx(query.value, abs=1e-4)
    for k, line in enumerate(lines):
        true = line["true"]
        answers = (true, f"I think {100 * true:.1f} cm", "no idea", 3 * true)
        line["pred"] = answers[k % 4]
    answers = write_jsonl(tmp_path / "answers.jsonl", lines)
    evaluate.main(["--predictions", str(answers), "--out", str(tmp_path / "scored")])
    result = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert set(result["tasks"]) == {"distance", "two_point", "motion"}
    assert result["tasks"]["motion"]["delta1"] == 0.6
    images = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    (out / lines[3]["images"][0]).unlink()
    evaluate.main([str(a) for a in ("--export-queries", out, *argv)])  # resumes: one is missing
    again = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert sum(again[path] != images[path] for path in images) == 1
    assert "different seed" in fails(capsys, "--export-queries", out, *argv, "--seed", 1)
    assert "give one of" in fails(capsys, "--export-queries", tmp_path / "x", "--constant", 2,
                                  *argv)
    theirs = tmp_path / "theirs"
    evaluate.main([str(tiny_pixtral), "--export-queries", str(theirs), "--data", str(world),
                   "--queries", "1"])
    (line,) = lines_of(theirs / "queries.jsonl")
    size = Image.open(theirs / line["images"][0]).size
    assert all(side % 16 == 0 and side > 400 for side in size)


# --------------------------------------------------------------------------------------------------
# bad input


def test_bad_calls(tmp_path, world, tiny, capsys, monkeypatch):
    """One line that says what is wrong and what helps: no checkpoint, one that is none, no data,
    empty data."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "other", "bare"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(tiny / "config.json", tmp_path / "bare")
    weightless = shutil.copytree(tiny, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    forked = shutil.copytree(tiny, tmp_path / "forked")
    (forked / "depthlm.json").write_text('{"tasks": ["distance", "shadow"]}')
    (tmp_path / "none.jsonl").write_text("")
    unlabelled = {"image": "a.png", "intrinsics": [9, 9, 9, 9, 20, 20], "pixel_coords": [],
                  "depth": []}
    write_jsonl(tmp_path / "no_label.jsonl", [unlabelled])
    (tmp_path / "predictions.jsonl").write_text("")
    for say, argv in ((("give one of",), ()),
                      (("give one of",), (tiny, "--constant", "2")),
                      (("no such", "missing"), ("./missing", "--data", world)),
                      (("config.json", "empty"), (tmp_path / "empty", "--data", world)),
                      (("gpt2", "qwen2_5_vl"), (tmp_path / "other", "--data", world)),
                      (("bare",), (tmp_path / "bare", "--data", world)),
                      (("weightless", "holds no *.safetensors"), (weightless, "--data", world)),
                      (("'shadow'", "two_point", "--tasks"), (forked, "--data", world)),
                      (("--data", "prepare.py"), ("--constant", "2")),
                      (("holds no record",), (tiny, "--data", "none.jsonl")),
                      (("no such file",), (tiny, "--data", "nowhere.jsonl")),
                      (("no labelled point",), (tiny, "--data", "no_label.jsonl")),
                      (("no predictions",), ("--predictions", "predictions.jsonl")),
                      (("no such file",), ("--predictions", "nowhere.jsonl"))):
        message = fails(capsys, *argv)
        assert all(word in message for word in say), message


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_stops_the_evaluation(speaker, tmp_path, capsys, workers):
    """A score over fewer points than it claims would be wrong: the run stops, names the image in
    one line, also from a loader process, and goes on once the image is there."""
    data, out = make_world(tmp_path / "w", 4, 3), tmp_path / "eval"
    (tmp_path / "w" / "002.png").write_bytes(b"no image")
    argv = arguments(speaker, data, out, "--batch-size", 3, "--max-new-tokens", 4,
                     "--workers", workers)
    assert "002.png" in fails(capsys, *argv)
    answered = sum(len(lines_of(part)) for part in out.glob("predictions.part-*"))
    assert not (out / "metrics.json").exists() and 0 < answered <= 6
    make_world(tmp_path / "w", 4, 3)
    evaluate.main(argv)
    assert len(lines_of(out / "predictions.jsonl")) == 12


def test_out_cannot_be_written(world, tmp_path, capsys):
    """An --out that is a file: said, and the file is left alone."""
    (tmp_path / "taken").write_text("mine")
    assert "taken" in fails(capsys, "--constant", "2", "--data", world, "--out",
                            tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
