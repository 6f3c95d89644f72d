"""The scripts of runs/: the toy world's model, plain questions, two evaluations compared, the
table and the curves of a finding, the paper's experiments."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import curves
import findings
import numpy as np
import probe
import pytest
import torch
import toy_model
from conftest import ROOT, make_world, run_script, stock, write_jsonl
from PIL import Image

import evaluate
import prepare
import render
import train_grpo
import train_sft

CPU = torch.device("cpu")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(pred, true, **more) -> list[dict]:
    """Four points an image."""
    return [{"image": f"data/toy/rgb/{k // 4}.png", "pixel": [k % 4, 0], "task": "distance",
             "true": t, "pred": p, "text": "", **more}
            for k, (p, t) in enumerate(zip(pred, true))]


def fails(capsys, script, *argv) -> str:
    """Run a script; it must end with code 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(a) for a in argv])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


# --------------------------------------------------------------------------------------------------
# toy_model.py


def test_toy_model(tmp_path, capsys):
    """A folder like any other, of the flags' size and seed; given again, it keeps what it has."""
    folder = tmp_path / "m"
    argv = [str(folder), "--hidden", "48", "--seed", "3"]
    toy_model.main(argv)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 48
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    assert checkpoint.tokens("2.35")[-2:] == [*checkpoint.tokens("3"), *checkpoint.tokens("5")]
    evaluate.load_model(checkpoint, CPU, torch.float32)

    before = (folder / "model.safetensors").read_bytes()
    toy_model.main([*argv[:-1], "4"])
    assert (folder / "model.safetensors").read_bytes() == before
    toy_model.make_toy_model(tmp_path / "same", seed=3, hidden=48)
    toy_model.make_toy_model(tmp_path / "other", seed=4, hidden=48)
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != before
    assert "argument --hidden: 0 is not 1 or more" in (
        run_script("runs/toy_model.py", tmp_path / "x", "--hidden", 0).stderr)


# --------------------------------------------------------------------------------------------------
# probe.py


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory) -> Path:
    """The tiny model after a few steps on one answer."""
    checkpoint = render.open_checkpoint(str(tiny), quiet=True)
    model = evaluate.load_model(checkpoint, CPU, torch.float32)
    answer = checkpoint.tokens("The point is near.") + [checkpoint.end_id]
    batch = render.pack([render.encode(checkpoint, [], "How far?", answer)])
    inputs = render.model_inputs(batch, checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        logits = model(**inputs, use_cache=False, logits_to_keep=batch["predict_at"]).logits[0]
        torch.nn.functional.cross_entropy(logits, batch["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "tuned")
    model.save_pretrained(folder)
    return folder


def test_probe(tiny, tuned, tmp_path, capsys, world):
    """Plain text and image questions: the base model agrees with itself, another does not, and its
    loss on the former answers is that of transformers."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [
        {"question": "Who are you?"},
        {"question": "What is on this image?", "image": str(world.parent / "000.png")}])
    former = tmp_path / "0" / "probe.jsonl"
    for k, (model, file) in enumerate(((tiny, chats), (tiny, former), (tuned, former))):
        probe.main([str(model), "--questions", str(file), "--out", str(tmp_path / str(k)),
                    "--max-new-tokens", "12"])
    said = [line for line in capsys.readouterr().out.splitlines() if "questions" in line]
    assert "written over" in fails(capsys, probe, tiny, "--questions", former,
                                   "--out", former.parent)
    assert "own answers" in said[0] and "1.000 answered as before, 1.000" in said[1]
    assert "0.000 answered" in said[2]

    base, again, other = (lines_of(tmp_path / str(k) / "probe.jsonl") for k in range(3))
    assert [a["loss"] for a in base] == [a["loss"] for a in again] and "before" not in base[0]
    for was, now in zip(base, other):
        assert now["before"] == was["answer"] != now["answer"] and now["loss"] > was["loss"]
    checkpoint = render.open_checkpoint(str(tiny), quiet=True)
    tokens = checkpoint.tokens(base[0]["answer"])
    ids = render.encode(checkpoint, [], "Who are you?", tokens)["input_ids"]
    ids = torch.tensor(ids)[None]
    answer = torch.arange(ids.shape[1]) >= ids.shape[1] - len(tokens)
    theirs = stock(tuned)(input_ids=ids, labels=torch.where(answer, ids, -100)).loss.item()
    assert other[0]["loss"] == pytest.approx(theirs, abs=1e-3)


def test_probe_sees_the_image(tiny, tmp_path, capsys):
    """As it is: at its own size, without a marker; another image, another loss."""
    answer = {"question": "What is on this image?", "answer": "The point is near."}
    losses = []
    for k, color in enumerate(("red", "white")):
        Image.new("RGB", (80, 60), color).save(tmp_path / "a.png")
        chats = write_jsonl(tmp_path / "chats.jsonl", [{**answer, "image": "a.png"}])
        probe.main([str(tiny), "--questions", str(chats), "--out", str(tmp_path / str(k)),
                    "--max-new-tokens", "2"])
        losses.append(lines_of(tmp_path / str(k) / "probe.jsonl")[0]["loss"])
    assert losses[0] != losses[1]


def test_answers_have_the_tokens_of_the_checkpoint(tiny, tmp_path, capsys):
    """depthlm.json says how many an answer may have; the flag overrides it, and the defaults are
    the folder's own place and 128."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"question": "Who are you?"}])
    lengths = []
    for settings, flags in (({"max_new_tokens": 5}, ()), ({"max_new_tokens": 5},
                            ("--max-new-tokens", "9")), ({}, ())):
        (folder / "depthlm.json").write_text(json.dumps(settings))
        probe.main([str(folder), "--questions", str(chats), *flags])
        answer = lines_of(folder / "eval" / "probe.jsonl")[0]["answer"]
        lengths.append(answer)
    assert len(set(lengths)) == 3
    assert lengths[1].startswith(lengths[0]) and lengths[2].startswith(lengths[1])


def test_bad_questions(tiny, tmp_path, capsys):
    """No file, no question, no image: named, and nothing is written."""
    for line, say in (("", "holds no chat"), ('{"answer": "a"}', "line 1"), ("{", "line 1"),
                      ('{"question": "?", "image": "none.png"}', "none.png")):
        (tmp_path / "q.jsonl").write_text(line)
        message = fails(capsys, probe, tiny, "--questions", tmp_path / "q.jsonl",
                        "--out", tmp_path / "out")
        assert say in message, message
    assert "chats.jsonl" in fails(capsys, probe, tiny, "--questions", "chats.jsonl")
    assert "no such checkpoint" in fails(capsys, probe, tmp_path / "none", "--questions",
                                         ROOT / "runs" / "probe.jsonl")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# compare.py


TRUE = [1.0, 1.0, 1.0, 1.0] * 2
OURS = predictions([1.0, 1.1, 0.9, 3.0] * 2, TRUE)  # 6 of 8 within 25 %
THEIRS = predictions([1.0, 0.9, 2.0, None] * 2, TRUE)  # 4 of 8


def test_difference_on_the_same_queries():
    """By hand: 6 of 8 against 4 of 8. Image by image the gain is always a quarter, so its interval
    has no width, though those of the two are wide. Lines may come in another order; other queries
    are refused."""
    expected = {"delta1": [0.75, 0.5], "difference": 0.25, "ci": [0.25, 0.25], "n": 8}
    assert compare.compare(OURS, THEIRS[::-1]) == expected
    back = compare.compare(THEIRS, OURS)
    assert (back["difference"], back["ci"]) == (-0.25, [-0.25, -0.25])
    for change in ({"pixel": [9, 9]}, {"task": "axis"}, {"dataset": "b"}, {"given": 2.0},
                   {"pixel2": [1, 1]}, {"true": 1.1}, {"image": "data/toy/rgb/9.png"},
                   {"image2": "data/toy/rgb/9.png"}):
        with pytest.raises(ValueError, match="1 of them not the same"):
            compare.compare(OURS, [*THEIRS[:7], {**THEIRS[7], **change}])


def test_one_image_has_no_interval():
    assert compare.compare(OURS[:4], THEIRS[:4])["ci"] is None


@pytest.mark.parametrize("folder", ["{cwd}/data", "/elsewhere/sets", "../x/data", "./data"])
def test_wherever_the_data_lies(tmp_path, monkeypatch, folder):
    """Relative or absolute paths, another machine's folder: the same queries; so too where two sets
    of one name go by the paths of their files. Images of one name in two scenes stay two."""
    monkeypatch.chdir(tmp_path)

    def there(line: dict) -> dict:
        image = line["image"].replace("data", folder.format(cwd=tmp_path), 1)
        return {**line, "image": image, "image2": image}

    ours = [{**line, "image2": line["image"]} for line in OURS]
    assert compare.compare(ours, [there(line) for line in THEIRS])["n"] == 8
    dataset = {"dataset": "data/toy/val.jsonl"}
    parent = os.path.dirname(folder.format(cwd=tmp_path))
    other = {"dataset": f"{parent}/data/toy/val.jsonl"}
    found = compare.compare([{**line, **dataset} for line in ours],
                            [{**there(line), **other} for line in THEIRS])
    assert found["difference"] == 0.25
    scenes = [{**line, "image": f"data/toy/{scene}/0.png"} for scene in "ab" for line in OURS[:4]]
    with pytest.raises(ValueError, match="4 of them not the same"):
        compare.compare(scenes, [{**line, "image": "data/toy/b/0.png"} for line in scenes])


def test_a_set_within_a_larger_one(tmp_path, capsys):
    """500 queries against 8,192: the smaller set decides, on whichever side it stands, and is
    counted; two that overlap are refused."""
    assert compare.compare(OURS, THEIRS[:4])["delta1"] == [0.75, 0.5]
    assert compare.compare(OURS[:2], THEIRS)["delta1"] == [1.0, 1.0]
    assert compare.compare(OURS[1:4], THEIRS)["difference"] == pytest.approx(1 / 3)
    for ours, theirs in ((OURS[:5], THEIRS[3:]), (OURS[:3], THEIRS[2:])):
        with pytest.raises(ValueError, match="not the same"):
            compare.compare(ours, theirs)
    a = write_jsonl(tmp_path / "a.jsonl", OURS)
    b = write_jsonl(tmp_path / "b.jsonl", THEIRS[2:6])
    compare.main([str(a), str(b)])
    assert capsys.readouterr().out.splitlines() == [
        f"data: delta1 0.750, of {b} 0.500, on 4 queries (the smaller of 8 and 4): +0.250, "
        "95 % interval +0.000 to +0.500"]


def test_compare_files(tmp_path, capsys):
    """A line for each dataset and task that both files have; none is an error, and so are other
    queries, with the files' names and the column's."""
    axis = [{**line, "task": "axis", "dataset": "nyuv2"} for line in OURS]
    a = write_jsonl(tmp_path / "a.jsonl", [*axis, *OURS, *({**line, "dataset": "c"}
                                                           for line in OURS)])
    b = write_jsonl(tmp_path / "b.jsonl", [*THEIRS, *axis])
    compare.main([str(a), str(b)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == (f"nyuv2/axis: delta1 0.750, of {b} 0.750, on 8 queries: +0.000, 95 % interval "
                     "+0.000 to +0.000")
    assert second == (f"data: delta1 0.750, of {b} 0.500, on 8 queries: +0.250, 95 % interval "
                      "+0.250 to +0.250")
    write_jsonl(b, axis[:1])
    compare.main([str(a), str(b)])
    assert capsys.readouterr().out.endswith("on 1 queries (the smaller of 8 and 1): +0.000\n")

    write_jsonl(b, [*axis[:7], {**axis[7], "pixel": [9, 9]}])
    message = fails(capsys, compare, a, b)
    assert all(word in message for word in ("a.jsonl", "b.jsonl", "nyuv2/axis", "8 and 8", "1 of"))
    write_jsonl(b, [{**line, "dataset": "other"} for line in THEIRS])
    assert "in common" in fails(capsys, compare, a, b)
    assert "no such file" in fails(capsys, compare, a, tmp_path / "none.jsonl")


def test_compare_evaluations(tmp_path, capsys):
    """Real files of evaluate.py: one of all six tasks, one of a few queries of the same world that
    was given by another path."""
    data = make_world(tmp_path / "data" / "w", poses=True)
    moved = shutil.copytree(data.parent, tmp_path / "moved" / "data" / "w") / "val.jsonl"
    tasks = ["--tasks", *render.TASKS]
    evaluate.main(["--constant", "2", "--data", str(data), "--queries", "40", *tasks,
                   "--out", str(tmp_path / "a")])
    evaluate.main(["--constant", "3", "--data", os.path.relpath(moved), "--queries", "15", *tasks,
                   "--out", str(tmp_path / "b")])
    capsys.readouterr()
    compare.main([str(tmp_path / name / "predictions.jsonl") for name in "ab"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "w", "w/axis", "w/speed", "w/time", "w/two_point", "w/motion"]
    assert all("the smaller of 40 and 15" in line for line in lines)
    few = lines_of(tmp_path / "b" / "predictions.jsonl")
    true = np.array([line["true"] for line in few if line["task"] == "time"])
    means = [evaluate.constant_delta1(value, true) for value in (2.0, 3.0)]
    assert f"delta1 {means[0]:.3f}" in lines[3] and f" {means[1]:.3f}, on 15" in lines[3]


# --------------------------------------------------------------------------------------------------
# findings.py


def test_table_of_a_finding(tmp_path, capsys):
    """Three seeds by hand: mean 0.6, standard error 0.1 / sqrt(3), t of two degrees of freedom."""

    def write(label, seed, delta1):
        folder = tmp_path / f"{label}-{seed}" / "eval"
        folder.mkdir(parents=True)
        scores = {"delta1": delta1, "delta1_ci": [0.1, 0.9], "best_constant": {"delta1": 0.4}}
        (folder / "metrics.json").write_text(json.dumps({"datasets": {"toy": scores}}))

    for seed, delta1 in enumerate((0.5, 0.6, 0.7)):
        write("a", seed, delta1)
        write("b", seed, delta1 - 0.1)
        write("a-wide", seed, 0.9)
    command = [str(tmp_path / "table"), "Finding 0", "a", "b"]
    findings.main(command)
    half = 4.303 * 0.1 / 3 ** 0.5
    rows = [[cell.strip() for cell in line.split("|")]
            for line in (tmp_path / "table.md").read_text().splitlines() if "|" in line]
    assert rows[2][1:5] == ["a", "0.600", f"{0.6 - half:.3f}-{0.6 + half:.3f}",
                            "0.500 0.600 0.700"]
    assert rows[3][2] == "0.500" and rows[3][5] == "+0.100 (+0.100 to +0.100)"
    assert rows[4][2] == "0.400"
    assert Image.open(tmp_path / "table.png").size[0] > 500
    shutil.rmtree(tmp_path / "b-2")  # a variant that did not end is not one with fewer seeds
    assert "same seeds" in fails(capsys, findings, *command)
    assert "shell script" in fails(capsys, findings, *command[:-1], "c")


def test_table_of_one_seed(tmp_path):
    """The interval of a difference is over images, on the same queries."""
    for label, lines in (("a", OURS), ("b", THEIRS)):
        path = write_jsonl(tmp_path / f"{label}-0" / "eval" / "predictions.jsonl", lines)
        result = evaluate.summarize(evaluate.read_predictions(path))
        (path.parent / "metrics.json").write_text(json.dumps(result))
    findings.main([str(tmp_path / "table"), "Finding 0", "a", "b"])
    assert "+0.250 (+0.250 to +0.250)" in (tmp_path / "table.md").read_text()


def test_table_over_datasets(tmp_path, capsys):
    """The average of several has no interval of one training; --dataset is one alone."""
    for label, pairs in (("a", (OURS, THEIRS)), ("b", (THEIRS, THEIRS))):
        lines = [{**line, "dataset": name} for name, group in zip("xy", pairs) for line in group]
        path = write_jsonl(tmp_path / f"{label}-1" / "eval" / "predictions.jsonl", lines)
        result = evaluate.summarize(evaluate.read_predictions(path))
        (path.parent / "metrics.json").write_text(json.dumps(result))
    for words, rows in (((), ["| a | 0.625 |  | 0.625 |  |", "| b | 0.500 |  | 0.500 |  |"]),
                        (("--dataset", "x"), ["+0.250 (+0.250 to +0.250) |"]),
                        (("--dataset", "y"), ["+0.000 (+0.000 to +0.000) |"])):
        findings.main([str(tmp_path / "table"), "Finding 0", "a", "b", *words])
        text = (tmp_path / "table.md").read_text()
        assert all(row in text for row in rows), text
    assert "has no dataset z, but x, y" in fails(capsys, findings, tmp_path / "table", "Finding 0",
                                                 "a", "b", "--dataset", "z")


# --------------------------------------------------------------------------------------------------
# curves.py


def make_run(folder: Path, batch: int, lines: list[dict], **flags) -> Path:
    folder.mkdir(parents=True)
    render.write_json(folder / "run.json", {"flags": {"batch": batch, **flags}})
    write_jsonl(folder / "log.jsonl", lines)
    return folder


def test_curves(tmp_path, capsys):
    """By hand: SFT of 0.5 s a step, GRPO of 2 s, 32 samples a step; the average over two sets. SFT
    starts where GRPO's first check was."""

    def check(step, a, b):
        return {"step": step, "val": {"a": {"delta1": a}, "b": {"delta1": b}}}

    step = {"samples_per_s": 64.0}
    sft = make_run(tmp_path / "sft", 32, [
        {"step": 1, **step}, {"step": 2, **step}, check(2, 0.4, 0.2),
        {"step": 3, **step}, {"step": 4, **step}, check(4, 0.6, 0.8)])
    slow = {"rollout_s": 1.0, "update_s": 0.5, "wait_s": 0.5}
    grpo = make_run(tmp_path / "grpo", 256, [
        check(0, 0.1, 0.3), {"step": 1, **slow}, {"step": 2, **slow}, check(2, 0.5, 0.7)],
        batch_of="answers", group=8)
    curves.main([str(tmp_path / "c"), "Fig. 0", f"SFT={sft}", f"GRPO={grpo}"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in (tmp_path / "c.md").read_text().splitlines() if line.startswith("|")]
    sets = {"a": rows[:4], "b": rows[4:8], "average": rows[8:]}
    assert sets["a"][0][2:6] == [f"delta1 at {n} samples" for n in (6, 13, 32, 64)]
    assert sets["a"][0][6:10] == [f"delta1 at {t} s" for t in (0, 0, 1, 2)]
    assert sets["a"][2][1:] == ["15.6", "0.100", "0.100", "0.100", "0.400", "0.100", "0.100",
                                "0.400", "0.600", "0.400 (0.400-0.400)"]
    assert sets["a"][3][:2] == ["GRPO", "62.5"] and sets["a"][3][5] == "0.500"
    assert sets["average"][3][5] == "0.600" and sets["average"][2][9] == "0.700"
    assert Image.open(tmp_path / "c.png").size[1] > 900

    quiet = make_run(tmp_path / "quiet", 32, [{"step": 1, **step}])
    assert "--val-every" in fails(capsys, curves, tmp_path / "d", "Fig. 0", f"SFT={quiet}")
    other = make_run(tmp_path / "other", 32, [{"step": 1, "val": {"x": {"delta1": 0.5}}}])
    assert "other" in fails(capsys, curves, tmp_path / "d", "0", f"X={other}", f"SFT={sft}")
    assert "LABEL=FOLDER" in run_script("runs/curves.py", tmp_path / "d", "0", sft).stderr


# --------------------------------------------------------------------------------------------------
# the paper's experiments


def paper_commands(number: int, *words) -> list[list[str]]:
    """What finding<number>.sh --paper would run, by its --list: [out, val files, script, flags]."""
    done = subprocess.run(["bash", ROOT / "runs" / f"finding{number}.sh", "--paper", "--list",
                           *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def parse_command(command: list[str]):
    """Its flags, as its script reads them. Recipes name each other from the root."""
    script = {"train_sft.py": train_sft, "train_grpo.py": train_grpo}[command[2]]
    return script.parse_args([*command[3:], "--out", command[0]])


def test_paper_recipes(monkeypatch):
    """The numbers of the paper, experiment by experiment."""
    monkeypatch.chdir(ROOT)
    found = {number: [parse_command(c) for c in paper_commands(number)] for number in (1, 2, 3, 4)}

    fig2 = found[1]
    assert [(a.data[0][0].split("/")[1], a.marker, a.prompt) for a in fig2] == [
        (name, marker, prompt) for name in ("argoverse2", "scannetpp")
        for marker, prompt in (("arrow", "paper"), ("cross", "paper"), ("dot", "paper"),
                               (None, "text"))]
    *grpo, sft = found[2]
    assert [a.reward for a in grpo] == ["l1", "l2", "absrel", "delta1"]
    assert {(a.samples, a.lr, a.batch, a.group) for a in grpo} == {(8000, 1e-5, 32, 8)}
    assert sft.batch == 32 and sft.lr == pytest.approx(5.2e-5 * (32 / 1280) ** 0.5, rel=0.01)
    assert {tuple(a.val) for a in found[2]} == {
        ("data/argoverse2/val.jsonl", "data/nuscenes/val.jsonl")}
    assert {a.data[0][0] for a in found[2]} == {"data/argoverse2/train.jsonl"}
    assert [a.camera for a in found[3][:4]] == ["unify", "none", "prompt", "ray"]
    assert {a.samples for a in found[3]} == {500_000} and {a.data for a in found[3]} == {None}
    assert 1000 not in [a.focal for a in found[3][4:]] and found[3][0].focal == 1000
    assert all(len(c[1].split(",")) == 8 for c in paper_commands(3))
    assert [(a.samples, a.points_per_image) for a in found[4]] == [
        (80_000, 1), (80_000, 10), (80_000, 100)]
    models = {a.model for args in found.values() for a in args}
    assert models == {"Qwen/Qwen2.5-VL-3B-Instruct"}

    tasks = train_sft.parse_args(["@runs/tasks_7b.args"])
    assert tasks.samples == 40_000_000 and "7B" in tasks.model and tasks.lr == 1e-4
    assert {name: weight for name, (weight, _) in tasks.tasks} == dict.fromkeys(render.TASKS, 1)
    assert [only for _, (_, only) in tasks.tasks] == [[], [], [], [], [], ["argoverse2"]]
    assert len(train_sft.parse_args(["@runs/fig4c.args"]).val) == 8
    seeds = paper_commands(4, "--seeds", "2", "--", "--lr", "1")
    assert [parse_command(c).seed for c in seeds] == [1, 2] * 3 and parse_command(seeds[0]).lr == 1


FINDINGS = {"finding1": 4, "finding2": 6, "finding3": 10, "finding3_lenses": 8, "finding4": 10,
            "finding4_exhausted": 3}  # trainings of one seed


@pytest.mark.parametrize("name, count", FINDINGS.items())
def test_toy_findings_run_their_variants(tmp_path, name, count):
    """From nothing on: python is a stub here that says a line, as all scripts do, and writes its
    command down."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("logs"))
    stub, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$1: a line"\necho "$*" >> {calls}\n')
    stub.chmod(0o755)
    for data in ("toy", "toy_daylight", "toy_64"):  # of which some take lines
        (tmp_path / "data" / data).mkdir(parents=True)
        for split in ("train", "val"):
            (tmp_path / "data" / data / f"{split}.jsonl").write_text("{}\n" * 3000)
    (tmp_path / "ckpt/toy/eval").mkdir(parents=True)
    (tmp_path / "ckpt/toy/eval/metrics.json").write_text("{}")
    done = subprocess.run(
        ["bash", "runs/" + f"{name}.sh", "--samples", "64", "--seeds", "2"], cwd=tmp_path,
        capture_output=True, text=True, timeout=100,
        env={**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split() for line in calls.read_text().splitlines()]
    trained = [words[words.index("--out") + 1] for words in said if words[0].startswith("train_")]
    starts = [out for out in trained if out.endswith("-0")]
    assert len(trained) == len({*trained}) == 2 * (count - len(starts)) + len(starts)
    assert sorted(trained) == sorted(words[1] for words in said if words[0] == "evaluate.py")
    assert any(words[0] == "runs/findings.py" for words in said)


@pytest.mark.slow
def test_paper_dry_run(tmp_path, tiny):
    """One of Fig. 5's variants as the script would run it, with a tiny model and small files."""
    for name in ("evaluate.py", "render.py", "train_sft.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("logs"))
    data = make_world(tmp_path / "data" / "argoverse2", images=8)
    shutil.copy(data, data.with_name("train.jsonl"))
    small = f"--model {tiny} --crop 28 56 28 56 --focal 40 --batch 4 --micro-batch 4 --workers 0"
    command = paper_commands(4, "--samples", "8", "--", *small.split())[0]
    done = subprocess.run(
        ["bash", "runs/variant.sh", *command], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "LAUNCH": sys.executable, "EVALUATE": "--workers 0",
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.startswith("points-1-1: ") for line in done.stdout.splitlines())
    out = tmp_path / "out" / "finding4-paper" / "points-1-1"
    flags = render.read_json(out / "run.json")["flags"]
    assert (flags["samples"], flags["points_per_image"], flags["lr"]) == (8, 1, 5.2e-5)
    assert render.read_json(out / "eval" / "metrics.json")["datasets"]["argoverse2"]["n"] == 64


# --------------------------------------------------------------------------------------------------
# the toy worlds that the recipes make


def toy_world(out: Path, *words) -> list[dict]:
    prepare.main(["--dataset", "toy", "--split", "val", "--val-images", "20", "--workers", "1",
                  "--out", str(out), *words])
    return lines_of(out / "val.jsonl")


def test_toy_drive(tmp_path, capsys):
    """The views of a room look along one line and lie on it, so that what is straight ahead comes
    nearer by as much as the cart has moved."""
    records = toy_world(tmp_path, "--drive")
    poses = np.array([record["pose"] for record in records]).reshape(4, 5, 4, 4)
    assert np.allclose(poses[:, :, :3, :3], poses[:, :1, :3, :3])
    moved = poses[:, :, :3, 3] - poses[:, :1, :3, 3]
    ahead = poses[:, 0, :3, 2]
    along = np.einsum("rvk,rk->rv", moved, ahead)
    assert np.allclose(moved, along[..., None] * ahead[:, None])
    steps = np.diff(along)
    assert (steps >= 0.3 - 1e-6).all() and (steps <= 1.2).all() and not poses[:, :, 2, 2].any()
    points, scores = render.Records(tmp_path / "val.jsonl"), []
    for i in range(20):
        query = render.make_query("motion", points, i, np.random.default_rng(i))
        scores.append(query.value)
    assert min(scores) > 0.29 and max(scores) > 1.2
    assert "no faults found" in capsys.readouterr().out


def test_toy_lenses(tmp_path, capsys):
    """A camera for each room: fx in the range, fy unlike it, the centre off the middle, and labels
    as right as with any other: box tops and floors are level."""
    records = toy_world(tmp_path, "--lenses", "80", "160", "--light", "ambient")
    cameras = np.array([record["intrinsics"] for record in records]).reshape(4, 5, 6)
    assert "0 cannot be read" in capsys.readouterr().out
    assert (cameras == cameras[:, :1]).all() and len(np.unique(cameras[..., 0])) == 4
    fx, fy, cx, cy, w, h = cameras[:, 0].T
    assert ((80 <= fx) & (fx <= 160)).all() and ((w == 112) & (h == 112)).all()
    assert (np.abs(fy / fx - 1) > 0.01).any() and ((0.75 <= fy / fx) & (fy / fx <= 1.33)).all()
    assert np.abs(np.stack([cx, cy]) / 112 - 0.5).max() > 0.05
    heights = []
    for record in records:
        xyz = render.unproject(np.array(record["pixel_coords"], float), np.array(record["depth"]),
                               record["intrinsics"])
        pose = np.array(record["pose"]).reshape(4, 4)
        heights += list((xyz @ pose[:3, :3].T + pose[:3, 3])[:, 2])
    heights = np.array(heights)
    assert heights.min() > -0.02 and (np.abs(heights) < 0.02).mean() > 0.1  # the floor
