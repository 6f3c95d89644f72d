"""evaluate.py: metrics, queries, answers equal to transformers' generate, resume, torchrun, the command line."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import render
from conftest import ROOT, make_world, noise, plain_inputs, run_script, stock, views_for, write_jsonl

CPU = torch.device("cpu")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(pred, true, **more) -> list[dict]:
    return [{"image": f"{k}.png", "pixel": [1, 1], "task": "distance", "true": t, "pred": p, "text": "", **more}
            for k, (p, t) in enumerate(zip(pred, true))]


def fails(capsys, *argv) -> str:
    """Run the script; it must end with code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(a) for a in argv])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


# ----------------------------------------------------------------------------------------------------------------------
# metrics


def test_metrics_by_hand():
    """Against numbers computed by hand. A negative answer is wrong (the released code scores -2 for 2 m as right), a
    missing one too; errors are over the positive parsed answers; a ratio of exactly 1.25 is outside."""
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


def test_no_answer_parsed():
    """All unparsed: delta 0, no errors to average, and a metrics.json that strict JSON parsers read."""
    result = evaluate.summarize(predictions([None] * 3, [1.0, 2.0, 3.0], dataset="nyuv2"))
    got = result["datasets"]["nyuv2"]
    assert got["delta1"] == got["delta3"] == 0 and got["unparsed"] == got["n"] == 3
    assert got["abs_rel"] is got["rmse"] is got["silog"] is None
    json.dumps(result, allow_nan=False)
    assert "nyuv2" in evaluate.table(result)


def test_interval_resamples_images():
    """Two images of 100 points, one all right, one all wrong, say no more than two coin tosses: the interval is [0, 1],
    where resampling points would give [0.43, 0.57]. With many images of one point it is the binomial one."""
    hits, images = np.repeat([True, False], 100), np.repeat(["a", "b"], 100)
    assert evaluate.interval(hits, images) == [0.0, 1.0]
    assert evaluate.interval(hits, np.repeat(["a"], 200)) is None
    hits = np.arange(400) % 4 == 0
    low, high = evaluate.interval(hits, np.arange(400))
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.01) and high == pytest.approx(0.25 + half, abs=0.01)
    assert evaluate.interval(hits, np.arange(400)) == [low, high]
    sizes = np.tile([9, 1], 40)  # images are drawn, but a point weighs as a point: the mean is 0.9, not 0.5
    low, high = evaluate.interval(np.repeat(np.tile([True, False], 40), sizes), np.repeat(np.arange(80), sizes))
    assert 0.7 < low < 0.9 < high < 1


def test_best_constant():
    """No constant is right more often (brute force over all that could be)."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40, 300):
        true = np.round(np.exp(rng.normal(1, 0.8, n)), 4)
        best = evaluate.best_constant(true)
        tries = np.concatenate([true * f for f in (1.2499999, 1 / 1.2499999, 1)])
        hits = [evaluate.within(np.full(n, c), true, 1.25).mean() for c in tries]
        assert evaluate.within(np.full(n, best), true, 1.25).mean() == max(hits)


def test_by_z():
    """By z both are divided by the ray: ratios stay, metres do not, and a constant answer becomes another one."""
    lines = predictions([2.0, 6.0], [2.0, 4.0])
    got = evaluate.score([{**line, "ray": ray} for line, ray in zip(lines, (1.0, 2.0))])
    assert got["by_z"]["delta1"] == got["delta1"] == 0.5 and got["by_z"]["abs_rel"] == got["abs_rel"] == 0.25
    assert got["rmse"] == pytest.approx(math.sqrt(2)) and got["by_z"]["rmse"] == pytest.approx(math.sqrt(0.5))
    assert got["always_2m"] == 0.5 and got["by_z"]["always_2m"] == 1.0
    assert "by_z" not in evaluate.score(lines)


def test_table():
    """The paper's order whatever the order of the answers, others behind; the average is over datasets, not points; the
    constant rows stand in it."""
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


@pytest.mark.parametrize("kind, delta1", [(None, 0.273125), ("z", 0.265625)])
def test_constant_on_ibims(shared, tmp_path, kind, delta1):
    """Real labels: always 2.0 m on 1,600 points of iBims-1 as the file says them, and as the Euclidean distances that
    they become when one says that the file holds z. By z it is the first number again."""
    data = shutil.copy(shared / "samples" / "ibims1" / "depthlm_ibims1_val.jsonl", tmp_path / "ibims1.jsonl")
    more = ["--label-type", kind] if kind else []
    evaluate.main(["--constant", "2.0", "--data", str(data), "--all", "--out", str(tmp_path / "out"), *more])
    got = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert got["datasets"]["ibims1"]["n"] == 1600 and got["datasets"]["ibims1"]["delta1"] == delta1
    assert got["average"]["delta1"] == got["datasets"]["ibims1"]["always_2m"] == delta1
    if kind == "z":
        assert got["datasets"]["ibims1"]["by_z"]["delta1"] == delta1  # a ratio of the same two numbers
        assert got["datasets"]["ibims1"]["by_z"]["always_2m"] == 0.273125


# ----------------------------------------------------------------------------------------------------------------------
# queries


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> render.Records:
    """60 records with 0 to 6 labels each: the released code takes the first image's number for all."""
    rng = np.random.default_rng(0)
    rows = [{"image": "a.png", "intrinsics": [70.0, 70.0, 39.5, 29.5, 80, 60], "depth": [1.0 + p for p in range(k % 7)],
             "pixel_coords": rng.integers(0, 60, (k % 7, 2)).tolist()} for k in range(60)]
    return render.Records(write_jsonl(tmp_path_factory.mktemp("uneven") / "val.jsonl", rows))


def points_of(records) -> list:
    return [(i, k) for i in range(len(records)) for k in range(len(records[i]["depth"]))]


@pytest.mark.parametrize("count", [1, 20, 50, 60, 100, 170])
def test_draw_queries(uneven, count):
    """Distinct, labelled points only, as many as asked for, the same for the same seed and others for another; both
    where records are more than queries and where they are fewer."""
    drawn, labelled = evaluate.draw_queries(uneven, count, 3), set(points_of(uneven))
    assert len(drawn) == len(set(drawn)) == count and set(drawn) <= labelled and drawn == sorted(drawn)
    assert drawn == evaluate.draw_queries(uneven, count, 3) and drawn != evaluate.draw_queries(uneven, count, 4)
    if count > 40:  # all over the file and over the points of a record
        assert len({i for i, _ in drawn}) > 20 and len({k for _, k in drawn}) > 4


def test_all_queries(uneven):
    """--all: each labelled point once; so too when more are asked for than there are."""
    assert evaluate.draw_queries(uneven, None) == evaluate.draw_queries(uneven, 10 ** 6) == points_of(uneven)
    assert len(points_of(uneven)) == 174


def test_few_labels_in_many_records(tmp_path):
    """More records than queries, but nearly none with a label: all there are, not an endless search."""
    row = {"image": "a.png", "intrinsics": [70.0, 70.0, 39.5, 29.5, 80, 60], "depth": [], "pixel_coords": []}
    rows = [row] * 30 + [{**row, "depth": [1.0, 2.0], "pixel_coords": [[1, 1], [2, 2]]}] + [row] * 9
    records = render.Records(write_jsonl(tmp_path / "val.jsonl", rows))
    assert evaluate.draw_queries(records, 5) == [(30, 0), (30, 1)]


# ----------------------------------------------------------------------------------------------------------------------
# greedy answers equal those of transformers' own generate


def generate(folder: Path, encoder, views: list, samples: list[dict], max_new_tokens: int) -> list[list[int]]:
    """transformers' greedy decoding with stock attention, one sample at a time, every sampling field set."""
    model, out = stock(folder), []
    for view, sample in zip(views, samples):
        inputs = plain_inputs(folder, encoder, sample, view)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=None,
                                top_p=None, top_k=None, repetition_penalty=1.0, eos_token_id=encoder.end_id,
                                pad_token_id=encoder.tokenizer.pad_token_id)
        out.append(tokens[0, len(sample["input_ids"]):].tolist())
    return out


def test_answers_equal_generate(family):
    """Whatever a random model says, images of several sizes and two images in one batch: token for token, with a
    template that is never said, with another, and with none, however few tokens are allowed."""
    encoder, model = render.load_encoder(family), evaluate.load_model(str(family), CPU, torch.float32)
    views = [views_for(encoder, layout, 10 * k) for k, layout in enumerate([[(5, 3)], [(2, 4), (5, 5)], [(1, 1)]])]
    samples = [render.encode(encoder, v, q) for v, q in zip(views, ("How far?", "Where is it, in meters?", "?"))]
    expected = generate(family, encoder, views, samples, 20)
    assert len(set(map(tuple, expected))) > 1
    for form, n in itertools.product((None, render.answer_form("distance", "paper"), "{x} m"), (1, 4, 20)):
        got, _ = evaluate.answer(model, encoder, samples, form, n)
        assert got == [tokens[:n] for tokens in expected]


LESSONS = [("How far?", "The point is around 2.35 meters away from the camera."),
           ("How far is this?", "The point is around 17.08 meters away from the camera."),
           ("And now?", "The point is near 2 m."),  # leaves the template before the number
           ("Here?", "The point is around 3.10 meters away, I think."),  # after it
           ("There?", "The point is around 40 feet."),
           ("Hm?", "The point is around meters away."),  # no number
           ("What?", "No idea.")]
FORM = "The point is around {x} meters away from the camera."


def fit(model, encoder, rows: list[dict], steps: int, enough: float = 0.0) -> None:
    """Train on the packed rows until the loss is small enough."""
    batch, optimizer = render.pack(rows), torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = render.model_inputs(batch, encoder)
    for _ in range(steps):
        logits = model(**inputs, use_cache=False, logits_to_keep=batch["predict_at"]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, batch["targets"])
        if loss < enough:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen3", "tiny_pixtral"])
def taught(request, tmp_path_factory):
    """A model that learnt LESSONS by heart, so that it says the template, and things that leave it half way."""
    source = request.getfixturevalue(request.param)
    encoder, model = render.load_encoder(source), evaluate.load_model(str(source), CPU, torch.float32)
    views = [views_for(encoder, [(1 + k % 3, 1 + k % 2)], k) for k in range(len(LESSONS))]
    rows = [render.encode(encoder, v, q, render.answer_tokens(encoder, a) + [encoder.end_id])
            for v, (q, a) in zip(views, LESSONS)]
    fit(model, encoder, rows, steps=150, enough=0.05)
    folder = shutil.copytree(source, tmp_path_factory.mktemp("taught") / request.param)
    model.save_pretrained(folder)
    samples = [render.encode(encoder, v, q) for v, (q, _) in zip(views, LESSONS)]
    model = evaluate.load_model(str(folder), CPU, torch.float32)
    return encoder, model, samples, generate(folder, encoder, views, samples, 64)


def test_forced_answers_equal_generate(taught):
    """The template's words are verified many at a time: rows that say it, leave it at any place, or end early keep to
    what plain greedy decoding says, whatever their neighbours do, also when cut off in the middle of the template."""
    encoder, model, samples, expected = taught
    assert [evaluate.decode_text(encoder, t) for t in expected] == [a for _, a in LESSONS]
    assert all(t[-1] == encoder.end_id for t in expected)
    for form in (FORM, None, "The point is near {x} m.", render.answer_form("distance", "release"), "{x}"):
        assert evaluate.answer(model, encoder, samples, form, 64)[0] == expected
    for n in (1, 3, 6, 7, 10):
        assert evaluate.answer(model, encoder, samples, FORM, n)[0] == [tokens[:n] for tokens in expected]
    for sample, tokens in zip(samples, expected):  # each alone, too
        assert evaluate.answer(model, encoder, [sample], FORM, 64)[0] == [tokens]


def test_forcing_saves_forward_passes(taught):
    """An answer in the template costs a pass for the prompt and its words, one per digit, one for the rest: 2.35 m in
    6, where plain decoding needs one a token."""
    encoder, model, samples, _ = taught
    said, plain = evaluate.answer(model, encoder, samples[:2], None)
    forced, few = evaluate.answer(model, encoder, samples[:2], FORM)
    assert said == forced and plain == max(map(len, said)) >= 15
    assert few <= len("17.08") + 3 < plain


# ----------------------------------------------------------------------------------------------------------------------
# the distribution over numbers


@pytest.fixture(scope="module")
def unsure(tiny):
    """A model that learnt several distances for the same picture, and a question to which it never says the template."""
    encoder, model = render.load_encoder(tiny), evaluate.load_model(str(tiny), CPU, torch.float32)
    views = [views_for(encoder, [(2, 2)], 3), views_for(encoder, [(3, 1)], 4)]
    lessons = [(0, "How far?", FORM.format(x=x)) for x in ("2.35", "2.81", "12.71", "0.05", "7", "2.35")]
    lessons += [(1, "Here?", "I would not know."), (1, "How far?", FORM.format(x="107.90"))] * 2
    rows = [render.encode(encoder, views[v], q, render.answer_tokens(encoder, a) + [encoder.end_id]) for v, q, a in lessons]
    fit(model, encoder, rows, steps=60)
    samples = [render.encode(encoder, views[v], q) for v, q in ((0, "How far?"), (1, "Here?"), (1, "How far?"))]
    return encoder, model, samples


def said_with(model, encoder, sample, number: str) -> float:
    """Probability of the number and of something else than a digit behind it, after the template: by teacher forcing."""
    forced, numbers = evaluate.template_tokens(encoder.folder, FORM)
    tail = render.answer_tokens(encoder, FORM.format(x=number))[len(forced):]
    digits = [t for t in tail if t in numbers][:len(number)]
    row = evaluate.append_tokens(sample, [*forced, *digits])
    with torch.no_grad():
        logits = model(**render.model_inputs(render.pack([row]), encoder), use_cache=False).logits[0].double()
    p = logits[len(sample["input_ids"]) + len(forced) - 1:].softmax(-1)
    return float(np.prod([p[k, t] for k, t in enumerate(digits)]) * (1 - p[len(digits), list(numbers)].sum()))


def test_numbers_have_the_probabilities_of_teacher_forcing(unsure, monkeypatch):
    """With every prefix followed, each number's probability is the product over its tokens; nothing is lost or doubled."""
    encoder, model, samples = unsure
    evaluate.median_answer(model, encoder, samples[:1], FORM)  # registers the encoder
    monkeypatch.setattr(evaluate, "EPSILON", 1e-5)
    monkeypatch.setattr(evaluate, "RELATIVE", 0.0)
    forced, numbers = evaluate.template_tokens(encoder.folder, FORM)
    with torch.no_grad():
        prefix = evaluate.prefill(model, encoder, samples, forced)
        leaves, _ = evaluate.number_leaves(model, encoder, prefix, numbers)
    for sample, row in ((samples[0], leaves[0]), (samples[2], leaves[2])):
        assert 0.95 < sum(p for *_, p in row) <= 1 + 1e-9
        whole = {}
        for low, high, p in row:
            if low == high:
                whole[low] = whole.get(low, 0) + p
        for number in ("2.35", "12.71", "0.05", "7", "107.90"):
            expected = said_with(model, encoder, sample, number)
            if expected > 5e-3:  # "2.3" and "2.30" are one value, two spellings
                assert whole[float(number)] == pytest.approx(expected, rel=0.05)
    assert said_with(model, encoder, samples[0], "2.35") > 0.05  # or nothing was tested


def test_intervals_stand_for_what_is_not_expanded(unsure, monkeypatch):
    """Few wide passes give the quantiles of the full expansion; greedy would need one pass a digit."""
    encoder, model, samples = unsure
    quick, passes = evaluate.median_answer(model, encoder, samples[:1], FORM)
    monkeypatch.setattr(evaluate, "EPSILON", 1e-6)
    monkeypatch.setattr(evaluate, "RELATIVE", 0.0)
    exact, more = evaluate.median_answer(model, encoder, samples[:1], FORM)
    assert passes < more and passes <= 6
    values = [{**a, "median": render.parse_answer(a["text"])} for a in (quick[0], exact[0])]
    for key in ("median", "q10", "q90"):
        assert abs(np.log(values[0][key] / values[1][key])) < 0.08, key
    assert quick[0]["q10"] <= values[0]["median"] <= quick[0]["q90"] and 0 <= quick[0]["lost"] < 0.1
    assert quick[0]["confidence"] == pytest.approx(exact[0]["confidence"], abs=0.08)


def test_rows_outside_of_the_template_are_answered_greedily(unsure):
    """And neighbours, batch size and order change nothing."""
    encoder, model, samples = unsure
    together, _ = evaluate.median_answer(model, encoder, samples, FORM)
    alone = [evaluate.median_answer(model, encoder, [s], FORM)[0][0] for s in samples]
    greedy = [evaluate.decode_text(encoder, t) for t in evaluate.answer(model, encoder, samples, None)[0]]
    assert together == alone and together[1] == {"text": greedy[1]} and not greedy[1].startswith("The point")
    assert set(together[0]) == {"text", "q10", "q90", "confidence", "lost"}
    assert together[2]["confidence"] > together[0]["confidence"]  # one lesson against many


# ----------------------------------------------------------------------------------------------------------------------
# the whole evaluation


def run(model, data, out, *more) -> dict:
    evaluate.main([str(model), "--data", str(data), "--out", str(out), "--all", "--focal", "100",
                   "--max-new-tokens", "8", "--batch-size", "5", "--workers", "0", *map(str, more)])
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def speaker(tiny, world, tmp_path_factory) -> Path:
    """A tiny model that answers the world's questions with numbers, right and wrong ones."""
    encoder, model = render.load_encoder(tiny), evaluate.load_model(str(tiny), CPU, torch.float32)
    records, settings = render.Records(world), {**render.DEFAULTS, "focal": 100}
    rows = []
    for i in range(len(records)):
        views, question, text = render.render(render.ask_distance(records, i, None, 0), settings, encoder.grid)
        text = text if i % 3 else "no idea"
        rows.append(render.encode(encoder, views, question, render.answer_tokens(encoder, text) + [encoder.end_id]))
    fit(model, encoder, rows, steps=60)
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "speaker")
    model.save_pretrained(folder)
    (folder / "depthlm.json").write_text(json.dumps(settings))
    return folder


# the tasks (Sec. 3.4)


def test_task_table():
    """Table 6: tasks as rows, datasets as columns, a dash where a dataset lacks the task; Table 3: the average of a
    task is over its datasets, the last one over tasks; constants of each task's own truths."""
    lines = predictions([1.0, 1.0], [1.0, 2.0], dataset="nyuv2") + predictions([2.0], [2.0], dataset="ddad")
    lines += [{**line, "task": "motion"} for line in predictions([5.0, None], [5.0, 2.1], dataset="ddad")]
    result = evaluate.summarize(lines)
    assert result["tasks"]["distance"]["delta1"] == 0.75 and result["tasks"]["motion"]["delta1"] == 0.5
    assert result["average"]["delta1"] == 0.625 and list(result["datasets"]) == ["ddad", "nyuv2", "ddad/motion"]
    rows = [line.split() for line in evaluate.table(result).splitlines()]
    assert rows[0] == ["delta1", "ddad", "nyuv2", "average"]
    assert rows[1:3] == [["distance", "1.000", "0.500", "0.750"], ["always", "2.0", "1.000", "0.500", "0.750"]]
    assert rows[3][:3] == ["best", "constant", "1.000"] and rows[4] == ["motion", "0.500", "-", "0.500"]
    assert rows[5] == ["always", "2.0", "0.500", "-", "0.500"] and rows[6][:2] == ["best", "constant"]
    assert rows[7] == ["average", "of", "tasks", "0.625"] and "ddad/motion 2 (1)" in evaluate.table(result)


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("data") / "moving", poses=True)


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen3", "tiny_pixtral"])
def allrounder(request, moving, tmp_path_factory) -> Path:
    """A model of each family that learnt one answer to each task by heart."""
    source = request.getfixturevalue(request.param)
    encoder, model = render.load_encoder(source), evaluate.load_model(str(source), CPU, torch.float32)
    settings, records, rows = {**render.DEFAULTS, "focal": 100, "tasks": list(render.TASKS)}, render.Records(moving), []
    for task in render.TASKS:
        query = evaluate.make_query(records, task, (1, 0))
        views, question, text = render.render(query, settings, encoder.grid)
        rows.append(render.encode(encoder, views, question, render.answer_tokens(encoder, text) + [encoder.end_id]))
    fit(model, encoder, rows, steps=200, enough=0.02)
    folder = shutil.copytree(source, tmp_path_factory.mktemp("models") / request.param)
    model.save_pretrained(folder)
    (folder / "depthlm.json").write_text(json.dumps(settings))
    return folder


def test_every_task(allrounder, moving, tmp_path, capsys):
    """All that the checkpoint was trained on is asked without a flag, of every family, two images and two markers among
    it; the template of each task is verified in few passes; the median says the same; numbers and images are kept."""
    evaluate.main([str(allrounder), "--data", str(moving), "--all", "--out", str(tmp_path / "eval"), "--workers", "0"])
    shown = capsys.readouterr().out
    lines = lines_of(tmp_path / "eval" / "predictions.jsonl")
    assert [line["task"] for line in lines] == ["distance"] * 48 + ["axis"] * 48 + ["speed"] * 48 + ["time"] * 48 + (
        ["two_point"] * 48 + ["motion"] * 6)
    encoder, model = render.load_encoder(allrounder), evaluate.load_model(str(allrounder), CPU, torch.float32)
    records, settings = render.Records(moving), render.load_settings(allrounder)
    for task in render.TASKS:
        (queries, answers, passes), = evaluate.ask(model, encoder, settings, records, [(1, 0)], task)
        said = render.answer_form(task, "paper").format(x=f"{queries[0].value:.2f}")
        assert passes <= 8 and answers == [{"text": said}]
        (_, (median,), passes), = evaluate.ask(model, encoder, settings, records, [(1, 0)], task, decode="median")
        assert passes <= 6 and render.parse_answer(median["text"], task) == pytest.approx(queries[0].value, rel=0.1)
        line = evaluate.prediction(queries[0], answers[0])
        assert line["pred"] == pytest.approx(line["true"], abs=0.0051)
        assert ("given" in line, "pixel2" in line, "image2" in line) == (
            task in ("speed", "time"), task == "two_point", task == "motion")
    result = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert list(result["tasks"]) == list(render.TASKS) and "average of tasks" in shown


def test_two_points_by_geometry(speaker, world, monkeypatch):
    """Two exact distances give the exact length between the points; one that is no number gives none."""
    encoder, settings = render.load_encoder(speaker), {**render.DEFAULTS, "focal": 100}
    records, pairs = render.Records(world), [(k, 0) for k in range(6)]
    truth = []
    for query in (evaluate.make_query(records, "two_point", pair) for pair in pairs):
        xy = query.records[0]["pixel_coords"].tolist()
        truth += [query.records[0]["depth"][xy.index(list(p))] for p in query.points]
    texts = [f"The point is around {t:.4f} meters away from the camera." for t in truth[:-1]] + ["no idea"]

    def exact(model, encoder, samples, form, n):
        assert form == render.answer_form("distance", "paper")
        return [[k] for k in range(len(samples))], 1

    monkeypatch.setattr(evaluate, "answer", exact)
    monkeypatch.setattr(evaluate, "decode_text", lambda encoder, tokens: texts[tokens[0]])
    (queries, answers, _), = evaluate.ask(None, encoder, settings, records, pairs, "two_point", geometry=True)
    lines = [evaluate.prediction(q, a) for q, a in zip(queries, answers)]
    assert all(line["pred"] == pytest.approx(line["true"], abs=0.011) for line in lines[:-1])
    assert lines[-1]["pred"] is None and lines[-1]["texts"][1] == "no idea" and lines[0]["task"] == "two_point"


def test_sets_without_poses(world, moving, tmp_path, capsys):
    """They show a dash for motion; alone they are refused."""
    argv = ["--constant", "0.5", "--out", tmp_path / "eval", "--tasks", "distance", "motion", "--all"]
    evaluate.main([str(a) for a in (*argv, "--data", world, moving)])
    out = capsys.readouterr()
    row, = (line.split() for line in out.out.splitlines() if line.startswith("motion"))
    assert row[1:] == [row[1], "-", row[1]] and "world, motion: asked about 0 of 6" in out.err
    assert "pose" in fails(capsys, "--constant", "0.5", "--out", tmp_path / "e", "--tasks", "motion", "--data", world)


def test_difference_on_the_same_queries(tmp_path, capsys):
    """By hand: 6 of 8 against 4 of 8. Image by image the gain is always a quarter, so its interval has no width, though
    those of the two are wide. Lines may come in another order; other queries are refused."""
    true = [1.0, 1.0, 1.0, 1.0] * 2
    ours, theirs = ([{**line, "image": f"{k // 4}.png", "pixel": [k % 4, 0]} for k, line in enumerate(predictions(pred, true))]
                    for pred in ([1.0, 1.1, 0.9, 3.0] * 2, [1.0, 0.9, 2.0, None] * 2))
    found = evaluate.compare(ours, theirs[::-1])
    assert found == {"delta1": [0.75, 0.5], "difference": 0.25, "ci": [0.25, 0.25], "n": 8}
    with pytest.raises(ValueError, match="1 of them not the same"):
        evaluate.compare(ours, [*theirs[:7], {**theirs[7], "pixel": [9, 9]}])
    for name, lines in (("a", ours), ("b", theirs)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["--predictions", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert "delta1 0.750" in capsys.readouterr().out.splitlines()[-2]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["against"]["data"] == found
    assert "--predictions" in fails(capsys, "--constant", 2, "--against", tmp_path / "b")


def test_table_of_a_finding(tmp_path):
    """Three seeds by hand: mean 0.6, standard error 0.1 / sqrt(3), t of two degrees of freedom."""
    def write(label, seed, delta1):
        folder = tmp_path / f"{label}-{seed}" / "eval"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"datasets": {"toy": {
            "delta1": delta1, "delta1_ci": [0.1, 0.9], "best_constant": {"delta1": 0.4}}}}))

    for seed, delta1 in enumerate((0.5, 0.6, 0.7)):
        write("a", seed, delta1)
        write("b", seed, delta1 - 0.1)
        write("a-wide", seed, 0.9)
    command = [sys.executable, ROOT / "runs" / "findings.py", tmp_path / "table", "Finding 0", "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    half = 4.303 * 0.1 / 3 ** 0.5
    rows = [[cell.strip() for cell in line.split("|")] for line in (tmp_path / "table.md").read_text().splitlines() if "|" in line]
    assert rows[2][1:5] == ["a", "0.600", f"{0.6 - half:.3f}-{0.6 + half:.3f}", "0.500 0.600 0.700"]
    assert rows[3][2] == "0.500" and rows[3][5] == "+0.100 (+0.100 to +0.100)" and rows[4][2] == "0.400"
    assert Image.open(tmp_path / "table.png").size[0] > 500
    shutil.rmtree(tmp_path / "b-2")  # a variant that did not end must not look like one with fewer seeds
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "same seeds" in done.stderr


@pytest.fixture(scope="module")
def reference(speaker, world, tmp_path_factory):
    """The uninterrupted evaluation in one process -> out folder, metrics."""
    out = tmp_path_factory.mktemp("reference") / "eval"
    return out, run(speaker, world, out, "--max-new-tokens", 20)


def test_evaluation(reference, speaker, world):
    """metrics.json and predictions.jsonl say what was asked and answered: each labelled point once, the truth of the
    file, the text as said and the number in it, some parsed and some not."""
    out, result = reference
    lines, records = lines_of(out / "predictions.jsonl"), render.Records(world)
    assert len(lines) == result["datasets"]["world"]["n"] == 48 and not list(out.glob("predictions.part-*"))
    for line, (i, k) in zip(lines, points_of(records)):
        record = records[i]
        assert line["image"] == record["image"] and line["pixel"] == record["pixel_coords"][k].tolist()
        assert line["true"] == pytest.approx(record["depth"][k], abs=1e-4) and line["task"] == "distance"
        assert line["pred"] == render.parse_answer(line["text"]) and line["dataset"] == "world"
        assert line["ray"] == pytest.approx(float(render.ray_length(*line["pixel"], record["intrinsics"])), abs=1e-5)
    parsed = [line["pred"] for line in lines if line["pred"] is not None]
    assert len(set(parsed)) > 3 and result["datasets"]["world"]["unparsed"] == 48 - len(parsed) > 0
    assert result["datasets"]["world"]["delta1"] > 0 and set(result) == {"datasets", "average"}


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 48), ("--workers", 2)])
def test_batch_and_workers_change_nothing(reference, speaker, world, tmp_path, more):
    out, result = reference
    assert run(speaker, world, tmp_path / "eval", "--max-new-tokens", 20, *more) == result
    assert (tmp_path / "eval" / "predictions.jsonl").read_bytes() == (out / "predictions.jsonl").read_bytes()


def interrupt(monkeypatch, after: int) -> None:
    """Ctrl-C behind so many batches."""
    ask = evaluate.ask

    def stopped(*args, **kwargs):
        for k, item in enumerate(ask(*args, **kwargs)):
            if k == after:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(evaluate, "ask", stopped)


def test_resume(reference, speaker, world, tmp_path, monkeypatch):
    """Interrupted after 15 answers, the last line cut off as by a kill: the next run asks the other 34 and ends with
    the same files."""
    out, asked = tmp_path / "eval", []
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(speaker, world, out, "--max-new-tokens", 20)
    part, = out.glob("predictions.part-*")
    assert len(lines_of(part)) == 15 and not (out / "metrics.json").exists()
    part.write_bytes(part.read_bytes()[:-20])
    answer = evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *a, **k: asked.append(len(a[2])) or answer(*a, **k))
    assert run(speaker, world, out, "--max-new-tokens", 20) == reference[1] and sum(asked) == 34
    assert (out / "predictions.jsonl").read_bytes() == (reference[0] / "predictions.jsonl").read_bytes()
    assert not list(out.glob("predictions.part-*"))
    asked.clear()
    assert run(speaker, world, out, "--max-new-tokens", 20) == reference[1] and not asked  # finished: read, not asked


def test_finished_evaluation_is_kept(speaker, tmp_path, capsys):
    """Another question into the same folder would lose the answers that are there: only with --overwrite."""
    out, data = tmp_path / "eval", make_world(tmp_path / "world", 4, 3)
    first = run(speaker, data, out, "--max-new-tokens", 8)
    kept = (out / "predictions.jsonl").read_bytes()
    other = [speaker, "--data", data, "--out", out, "--all", "--focal", 120, "--max-new-tokens", 8, "--workers", 0]
    assert "another settings" in fails(capsys, *other) and (out / "predictions.jsonl").read_bytes() == kept
    evaluate.main([*map(str, other), "--overwrite"])
    assert json.loads((out / "run.json").read_text())["settings"]["focal"] == 120
    assert (out / "predictions.jsonl").read_bytes() != kept and not list(out.glob("predictions.part-*"))
    assert run(speaker, data, out, "--max-new-tokens", 8, "--overwrite") == first
    again = ["--all", "--focal", 100, "--max-new-tokens", 8, "--workers", 0]
    os.utime(data, (1e9, 1e9))  # the same labels, written anew, are the same
    assert run(speaker, data, out, "--max-new-tokens", 8) == first
    records = lines_of(data)
    records[0]["depth"][0] += 1
    write_jsonl(data, records)
    assert "another data" in fails(capsys, speaker, "--data", data, "--out", out, *again)


def test_other_parts_are_refused(speaker, world, tmp_path, monkeypatch, capsys):
    """The beginning of an evaluation with another seed, focal length, checkpoint or data is not continued with
    these."""
    out = tmp_path / "eval"
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(speaker, world, out)
    part, = out.glob("predictions.part-*")
    changed = shutil.copytree(speaker, tmp_path / "other")
    common = ["--out", out, "--all", "--focal", 100, "--max-new-tokens", 8, "--workers", 0]
    for argv in ([speaker, "--data", world, *common, "--focal", 120], [speaker, "--data", world, *common, "--seed", 1],
                 [changed, "--data", world, *common],
                 [speaker, "--data", make_world(tmp_path / "more", 2), *common]):
        assert "another evaluation" in fails(capsys, *argv) and part.exists()


def test_retrained_checkpoint_is_another(speaker, world, tmp_path, monkeypatch, capsys):
    """The same folder with newer weights: half an evaluation of the old ones does not count."""
    folder, out = shutil.copytree(speaker, tmp_path / "m"), tmp_path / "eval"
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(folder, world, out)
    (folder / "model.safetensors").touch()
    assert "another evaluation" in fails(capsys, folder, "--data", world, "--out", out, "--all", "--focal", 100,
                                         "--max-new-tokens", 8, "--workers", 0)


def test_torchrun(reference, speaker, world, tmp_path):
    """Two processes share the queries and give the files of one."""
    done = run_script("evaluate.py", speaker, "--data", world, "--out", tmp_path / "eval", "--all", "--focal", 100,
                      "--max-new-tokens", 20, "--batch-size", 5, "--workers", 0, processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == reference[1]
    assert (tmp_path / "eval" / "predictions.jsonl").read_bytes() == (reference[0] / "predictions.jsonl").read_bytes()


def test_late_rank_zero(speaker, world, tmp_path, monkeypatch):
    """A rank that is ready before rank 0 waits for its word, instead of leaving parts which rank 0 would then
    refuse."""
    import threading
    import time
    out, args = tmp_path / "eval", evaluate.parse_args([str(speaker), "--data", str(world), "--all", "--workers", "0"])
    out.mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(evaluate, "ask", lambda *a, **k: iter(()))
    monkeypatch.setattr(evaluate, "load_model", lambda *a: None)  # these ranks are threads, which transformers does not bear
    groups = evaluate.list_queries(args, ["distance"])
    thread = threading.Thread(target=evaluate.run_model, args=(args, out, groups), daemon=True)
    thread.start()
    time.sleep(2)
    assert not list(out.glob("predictions.part-*")) and thread.is_alive()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(evaluate, "read_parts", lambda out: {n: {} for n in range(48)})
    evaluate.run_model(args, out, groups)
    thread.join(20)
    assert not thread.is_alive()


def test_settings_come_from_the_checkpoint(speaker, world, tmp_path, monkeypatch):
    """depthlm.json's focal is used without a flag (the released evaluation has 750 written into it, whatever was
    trained), a flag overrides it."""
    seen = []
    monkeypatch.setattr(evaluate, "ask", lambda model, encoder, given, *a: seen.append(given["focal"]) or iter(()))
    monkeypatch.setattr(evaluate, "read_parts", lambda out: {n: predictions([1.0], [1.0])[0] for n in range(48)})
    for flags in ((), ("--focal", "123")):
        evaluate.main([str(speaker), "--data", str(world), "--all", "--out", str(tmp_path / "-".join(("eval", *flags))), *flags])
    assert seen == [100, 123]


# ----------------------------------------------------------------------------------------------------------------------
# without a model


def test_constant(world, tmp_path, monkeypatch):
    """--constant needs no model, and without --data it takes every data/*/val.jsonl; the default out folder is its
    own."""
    for name in ("nyuv2", "ddad", "toy"):
        shutil.copytree(world.parent, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--constant", "2.5", "--queries", "7"])
    got = json.loads((tmp_path / "out" / "constant" / "metrics.json").read_text())
    lines = lines_of(tmp_path / "out" / "constant" / "predictions.jsonl")
    assert list(got["datasets"]) == ["ddad", "nyuv2", "toy"] and len(lines) == 21
    assert {line["pred"] for line in lines} == {2.5}
    hits = [max(2.5 / line["true"], line["true"] / 2.5) < 1.25 for line in lines if line["dataset"] == "toy"]
    assert got["datasets"]["toy"]["delta1"] == pytest.approx(np.mean(hits))


def test_predictions(reference, tmp_path):
    """Anyone's answers on our points: our own file scores as before; answers as text are parsed as ours are."""
    out, result = reference
    evaluate.main(["--predictions", str(out / "predictions.jsonl"), "--out", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == result
    texts = [{k: line[k] for k in line if k not in ("text", "task")} | {"pred": line["text"]}
             for line in lines_of(out / "predictions.jsonl")]
    (tmp_path / "theirs.jsonl").write_text("\n\n".join(json.dumps(t, ensure_ascii=False) for t in texts))
    evaluate.main(["--predictions", str(tmp_path / "theirs.jsonl"), "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == result


def test_predictions_of_any_kind(tmp_path):
    """NaN, infinities and null are unparsed, negative ones wrong; a line separator within a text ends no line."""
    true = [2.0] * 6
    lines = predictions([2.0, float("nan"), float("inf"), None, -2.0, "2.0 m\u2028\x85 or so"], true)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    evaluate.main(["--predictions", str(path), "--out", str(tmp_path / "out")])
    got = json.loads((tmp_path / "out" / "metrics.json").read_text())["datasets"]["data"]
    assert (got["n"], got["unparsed"], got["nonpositive"]) == (6, 3, 1) and got["delta1"] == 2 / 6


@pytest.mark.parametrize("line", [
    '{"image": "a", "true": 2.0', '{"image": "a", "true": 2.0}', '{"true": 1, "pred": 1}', "[1]", "3",
    '{"image": "a", "true": 0, "pred": 1}', '{"image": "a", "true": -1, "pred": 1}',
    '{"image": "a", "true": NaN, "pred": 1}', '{"image": "a", "true": "far", "pred": 1}',
    '{"image": "a", "true": 1, "pred": [1]}', '{"image": "a", "true": 1, "pred": {}}'])
def test_malformed_predictions(tmp_path, capsys, line):
    """Named by file and line; nothing is written."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(predictions([1.0], [1.0])[0]) + "\n" + line + "\n")
    assert "p.jsonl, line 2" in fails(capsys, "--predictions", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# other systems


def test_untuned_model(tiny, world, tmp_path, capsys):
    """A base model as it was published: the family's defaults, said aloud, the paper's question, a free answer of up to
    --max-new-tokens tokens."""
    evaluate.main([str(tiny), "--data", str(world), "--queries", "4", "--focal", "100", "--out", str(tmp_path / "eval"),
                   "--workers", "0", "--max-new-tokens", "30"])
    assert "prompt paper" in capsys.readouterr().err
    encoder = render.load_encoder(tiny)
    lines = lines_of(tmp_path / "eval" / "predictions.jsonl")
    lengths = [len(render.answer_tokens(encoder, line["text"])) for line in lines]
    assert len(lengths) == 4 and max(lengths) > 16


@pytest.mark.parametrize("task", ["distance", "motion"])
def test_unknown_family(tiny_foreign, moving, tmp_path, task):
    """Its own processor and generate, an image or two at a time, our rendering and metrics."""
    evaluate.main([str(tiny_foreign), "--data", str(moving), "--queries", "3", "--focal", "100", "--tasks", task,
                   "--out", str(tmp_path / "eval"), "--workers", "0", "--max-new-tokens", "8"])
    lines = lines_of(tmp_path / "eval" / "predictions.jsonl")
    assert len(lines) == 3 and all(line["text"] for line in lines)
    from transformers import AutoModelForImageTextToText, AutoProcessor
    processor = AutoProcessor.from_pretrained(tiny_foreign)
    model = AutoModelForImageTextToText.from_pretrained(tiny_foreign)
    query = evaluate.make_query(render.Records(moving), task, evaluate.draw_queries(render.Records(moving), 3)[0])
    views, question, _ = render.render(query, {**render.DEFAULTS, "focal": 100}, 1)
    text = "user:" + "<image>" * len(views) + question + "<end_of_utterance>\nassistant:"
    inputs = processor(text=text, images=[Image.fromarray(v.pixels) for v in views], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    assert lines[0]["text"] == processor.decode(out[0], skip_special_tokens=True)


def test_families_that_cannot_run(tiny_foreign, tmp_path, world, capsys):
    """A fixed image size, a processor that needs torchvision, a model that is no image-text model: one line, and the
    way round."""
    for name, config, processor, say in (
            ("fixed", {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}},
             {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
              "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, "336"),
            ("vision", {"model_type": "mistral3"}, {"processor_class": "PixtralProcessor"}, "Torchvision"),
            ("text", {"model_type": "gpt2"}, {}, "gpt2")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_foreign / file, folder)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        message = fails(capsys, folder, "--data", world, "--focal", 100, "--out", tmp_path / "eval")
        assert say in message and "--export-queries" in message and name in message, message


def test_exported_queries(world, moving, tiny_pixtral, tmp_path, capsys):
    """Images and questions as files; answers by hand, as numbers and as sentences, are scored on the very points. With
    a checkpoint the images are those that it would see."""
    out = tmp_path / "export"
    argv = ["--data", world, moving, "--queries", 5, "--tasks", "distance", "two_point", "motion", "--focal", 100]
    evaluate.main([str(a) for a in ("--export-queries", out, *argv)])
    lines = lines_of(out / "queries.jsonl")
    assert len(lines) == 25 and {len(line["images"]) for line in lines if line["task"] == "motion"} == {2}
    query = evaluate.make_query(render.Records(world), "distance", evaluate.draw_queries(render.Records(world), 5)[0])
    (view,), question, _ = render.render(query, {**render.DEFAULTS, "focal": 100}, 1)
    assert (np.asarray(Image.open(out / lines[0]["images"][0])) == view.pixels).all()
    assert lines[0]["question"] == question and not {"pred", "text"} & set(lines[0])
    assert lines[0]["true"] == pytest.approx(query.value, abs=1e-4)
    for k, line in enumerate(lines):
        line["pred"] = (line["true"], f"I think {100 * line['true']:.1f} cm", "no idea", 3 * line["true"])[k % 4]
    answers = write_jsonl(tmp_path / "answers.jsonl", lines)
    evaluate.main(["--predictions", str(answers), "--out", str(tmp_path / "scored")])
    result = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert set(result["tasks"]) == {"distance", "two_point", "motion"} and result["tasks"]["motion"]["delta1"] == 0.6
    assert "exported queries already" in fails(capsys, "--export-queries", out, *argv)
    assert "give one of" in fails(capsys, "--export-queries", tmp_path / "x", "--constant", 2, *argv)
    theirs = tmp_path / "theirs"
    evaluate.main([str(tiny_pixtral), "--export-queries", str(theirs), "--data", str(world), "--queries", "1"])
    (line,) = lines_of(theirs / "queries.jsonl")
    assert all(side % 16 == 0 and side > 400 for side in Image.open(theirs / line["images"][0]).size)


def test_probe(tiny, speaker, tmp_path, capsys, world):
    """Plain text and image questions: the base model agrees with itself, another does not, and its loss on the former
    answers is that of transformers."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"question": "Who are you?"}, {"question": "What is on this image?",
                                                    "image": str(world.parent / "000.png")}])
    former = tmp_path / "0" / "probe.jsonl"
    for k, (model, file) in enumerate(((tiny, chats), (tiny, former), (speaker, former))):
        evaluate.main([str(model), "--probe", str(file), "--out", str(tmp_path / str(k)), "--max-new-tokens", "12"])
    said = [line for line in capsys.readouterr().out.splitlines() if "questions" in line]
    assert "written over" in fails(capsys, tiny, "--probe", former, "--out", former.parent)
    assert "own answers" in said[0] and "1.000 answered as before, 1.000" in said[1] and "0.000 answered" in said[2]
    base, again, tuned = (lines_of(tmp_path / str(k) / "probe.jsonl") for k in range(3))
    assert [a["loss"] for a in base] == [a["loss"] for a in again] and "before" not in base[0]
    assert all(t["before"] == b["answer"] != t["answer"] and t["loss"] > b["loss"] for t, b in zip(tuned, base))
    encoder = render.load_encoder(tiny)
    tokens = render.answer_tokens(encoder, base[0]["answer"])
    ids = torch.tensor(render.encode(encoder, [], "Who are you?", tokens)["input_ids"])[None]
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - len(tokens), -100, ids)
    assert tuned[0]["loss"] == pytest.approx(stock(speaker)(input_ids=ids, labels=labels).loss.item(), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# bad input


def test_bad_calls(tmp_path, world, tiny, capsys, monkeypatch):
    """One line that says what is wrong and what helps: no checkpoint, one that is none, no data, empty data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny / "config.json", tmp_path / "bare")
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "no_label.jsonl").write_text(json.dumps(
        {"image": "a.png", "intrinsics": [9, 9, 9, 9, 20, 20], "pixel_coords": [], "depth": []}) + "\n")
    (tmp_path / "predictions.jsonl").write_text("")
    for say, argv in ((("give one of",), ()), (("give one of",), (tiny, "--constant", "2")),
                      (("no such", "missing"), ("./missing", "--data", world)),
                      (("config.json", "empty"), (tmp_path / "empty", "--data", world)),
                      (("gpt2", "qwen2_5_vl"), (tmp_path / "other", "--data", world)),
                      (("chats.jsonl",), (tiny, "--probe", "chats.jsonl")),
                      (("bare",), (tmp_path / "bare", "--data", world)),
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
    """A score over fewer points than it claims would be wrong: the run stops, names the image in one line, also from a
    loader process, and goes on once the image is there."""
    data, out = make_world(tmp_path / "w", 4, 3), tmp_path / "eval"
    (tmp_path / "w" / "002.png").write_bytes(b"no image")
    argv = [speaker, "--data", data, "--out", out, "--all", "--batch-size", 3, "--max-new-tokens", 4]
    argv += ["--workers", workers]
    assert "002.png" in fails(capsys, *argv)
    answered = sum(len(lines_of(part)) for part in out.glob("predictions.part-*"))
    assert not (out / "metrics.json").exists() and 0 < answered <= 6
    make_world(tmp_path / "w", 4, 3)
    evaluate.main([str(a) for a in argv])
    assert len(lines_of(out / "predictions.jsonl")) == 12


def test_out_cannot_be_written(world, tmp_path, capsys):
    """An --out that is a file: said, and the file is left alone."""
    (tmp_path / "taken").write_text("mine")
    assert "taken" in fails(capsys, "--constant", "2", "--data", world, "--out", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
