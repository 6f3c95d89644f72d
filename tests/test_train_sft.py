"""train_sft.py: the loss, the schedule, sharding, resuming, the files, and what it says when something is wrong."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_world, plain_inputs, run_script, stock, write_jsonl
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import render
import train_sft

SETTINGS = {**render.DEFAULTS, "focal": 100, "tasks": ["distance"]}
FLAGS = ["--model", "tiny", "--tiny", "hidden=48", "--focal", 100, "--crop", 56, 112, 56, 112, "--batch", 8, "--micro-batch", 3,
         "--samples", 80, "--lr", 2e-3, "--workers", 0, "--log-every", 1, "--val-every", 0, "--save-every", 100,
         "--dtype", "float32"]


@pytest.fixture(scope="module")
def distances(tmp_path_factory) -> Path:
    """The small world with distances from 0.05 to 130 m, so that answers differ in length."""
    path = make_world(tmp_path_factory.mktemp("data") / "far")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rng = np.random.default_rng(0)
    for record in records:
        record["depth"] = np.exp(rng.uniform(np.log(0.05), np.log(130), len(record["depth"]))).round(4).tolist()
    return write_jsonl(path.with_name("train.jsonl"), records)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    train_sft.setup_distributed()
    yield
    dist.destroy_process_group()


def samples_of(tiny, path, seed=0):
    encoder = render.load_encoder(str(tiny))
    datasets = train_sft.open_datasets([str(path)])
    return encoder, train_sft.Samples(datasets, {"distance": 1.0}, SETTINGS, encoder, (56, 112, 56, 112), seed)


def sharded(tiny, **options):
    return train_sft.shard_model(str(tiny), torch.device("cpu"), torch.float32, **options)


def gradients(model) -> dict:
    return {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


def train(out, data, *more, processes=0):
    done = run_script("train_sft.py", "--out", out, "--data", data, *FLAGS, *more, processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


# ----------------------------------------------------------------------------------------------------------------------
# the loss


def test_loss_is_that_of_transformers_on_the_answer(tiny, distances):
    encoder, samples = samples_of(tiny, distances)
    batch = [samples[i] for i in range(6)]
    assert len({len(s["input_ids"]) - s["prompt_length"] for s in batch}) > 1  # answers of different lengths
    model = sharded(tiny)
    ours = train_sft.answer_loss(model, encoder, train_sft.collate(batch), torch.device("cpu")).item()
    theirs, tokens, plain = 0.0, 0, stock(tiny)
    for s in batch:
        views = [render.View(unpatch(p, size, encoder), (1,) * 6, (1, 1), (0, 0)) for p, size in zip(s["pixels"], s["sizes"])]
        inputs = plain_inputs(tiny, encoder, s, views)
        labels = inputs["input_ids"].clone()
        labels[:, :s["prompt_length"]] = -100
        count = int((labels != -100).sum())
        theirs += plain(**inputs, labels=labels).loss.item() * count
        tokens += count
        assert labels[0, -1] == encoder.end_id  # the end of the turn is learned too
    assert ours / tokens == pytest.approx(theirs / tokens, abs=1e-5)


def unpatch(patches, size, encoder):
    (h, w), p, m = size, encoder.patch, encoder.merge
    blocks = patches.reshape(h // m, w // m, m, m, 3, p, p).transpose(0, 2, 5, 1, 3, 6, 4)
    return blocks.reshape(h * p, w * p, 3)


def test_packed_equals_padded(tiny, distances):
    """The same samples in one packed row and in a left-padded batch of the plain model: same logits at the answers."""
    encoder, samples = samples_of(tiny, distances)
    batch = [samples[i] for i in range(5)]
    packed = train_sft.collate(batch)
    inputs = render.model_inputs(packed, encoder)
    model = evaluate.load_model(str(tiny), torch.device("cpu"), torch.float32)
    ours = model(**inputs, logits_to_keep=packed["predict_at"]).logits[0]
    longest = max(len(s["input_ids"]) for s in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros(3, len(batch), longest, dtype=torch.long)
    for b, s in enumerate(batch):
        n = len(s["input_ids"])
        ids[b, -n:], mask[b, -n:] = torch.tensor(s["input_ids"]), 1
        positions[:, b, -n:] = torch.tensor(s["position_ids"])
    logits = stock(tiny)(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=inputs["pixel_values"],
                         image_grid_thw=inputs["image_grid_thw"]).logits
    theirs = torch.cat([logits[b, longest - (len(s["input_ids"]) - s["prompt_length"]) - 1:longest - 1]
                        for b, s in enumerate(batch)])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_only_answers_get_logits(tiny, distances):
    encoder, samples = samples_of(tiny, distances)
    batch = train_sft.collate([samples[i] for i in range(4)])
    model, rows = sharded(tiny), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape))
    train_sft.answer_loss(model, encoder, batch, torch.device("cpu"))
    assert rows[0][1] == len(batch["targets"]) < batch["input_ids"].shape[1] / 2


def test_gradient_does_not_depend_on_the_micro_batch_or_on_checkpointing(tiny, distances):
    encoder, samples = samples_of(tiny, distances)
    all_samples, results = [samples[i] for i in range(6)], []
    for sizes, checkpointing in (([6], False), ([1, 2, 3], False), ([6], True)):
        model = sharded(tiny, checkpointing=checkpointing)
        model.train()
        parts = np.split(np.arange(6), np.cumsum(sizes)[:-1])
        batches = [train_sft.collate([all_samples[i] for i in part]) for part in parts]

        class Keep:  # an optimizer that only looks
            def step(self):
                results.append(gradients(model))

            def zero_grad(self, set_to_none):
                pass
        train_sft.train_step(model, Keep(), encoder, batches, 1e9, torch.device("cpu"))
    for other in results[1:]:
        assert all(torch.allclose(results[0][n], other[n], rtol=1e-4, atol=1e-6) for n in other)


def test_bfloat16_computes_over_float32_master_weights(tiny, distances):
    encoder, samples = samples_of(tiny, distances)
    model = train_sft.shard_model(str(tiny), torch.device("cpu"), torch.bfloat16)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append((module.weight.dtype, output.dtype)))
    loss = train_sft.answer_loss(model, encoder, train_sft.collate([samples[0]]), torch.device("cpu"))
    loss.backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] and loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {p.grad.dtype for p in model.parameters()}


# ----------------------------------------------------------------------------------------------------------------------
# schedule and sampling


def test_learning_rate():
    lr = [train_sft.get_lr(s, 100, 1.0, 0.1, "cosine") for s in range(100)]
    assert lr[0] == pytest.approx(1 / 11) and lr[10] == 1.0 and lr[55] == pytest.approx(0.5) and 0 < lr[99] < 1e-3
    assert all(a < b for a, b in zip(lr[:10], lr[1:11])) and all(a > b for a, b in zip(lr[10:], lr[11:]))
    assert train_sft.get_lr(0, 100, 1.0, 0.0, "cosine") == 1.0
    assert {train_sft.get_lr(s, 100, 1.0, 0.0, "constant") for s in range(100)} == {1.0}


def test_global_batch_is_the_same_for_any_number_of_processes():
    def of(world, micro, first=0):
        steps = [[] for _ in range(3)]
        for rank in range(world):
            flat = [i for part in train_sft.batch_indices(first, 3, 12, micro, rank, world) for i in part]
            for k in range(3 - first):
                steps[first + k] += flat[k * 12 // world:(k + 1) * 12 // world]
        return steps
    assert of(1, 5) == of(2, 4) == of(3, 12) == of(4, 1) == [list(range(12 * k, 12 * k + 12)) for k in range(3)]
    assert of(2, 4, first=2)[2] == of(1, 5)[2]  # a later start draws the same


def test_samples_are_a_pure_function_of_seed_and_number(tiny, distances):
    _, samples = samples_of(tiny, distances)
    for i in (7, 3, 7):
        assert all(np.array_equal(samples[i][k], samples_of(tiny, distances)[1][i][k]) for k in ("input_ids", "position_ids"))
    assert not all(np.array_equal(samples[i]["input_ids"], samples_of(tiny, distances, seed=1)[1][i]["input_ids"])
                   for i in range(4))


def density_of(tiny, path, images: int, samples: int) -> list[tuple]:
    """(record, point) of each sample when `images` images share them."""
    _, dataset = samples_of(tiny, path)
    dataset.images = images
    return [dataset.place(dataset.fitting["distance"], i, 0, None)[1:] for i in range(samples)]


def test_points_per_image(tiny, tmp_path):
    """Fig. 5: at the same number of samples 1 point of 24 images, 4 of 6, 8 of 3: each image just so often, its points
    all different, each image before any second point; a function of the seed and the number; the crops differ."""
    path = make_world(tmp_path, images=24, points=8)
    for k in (1, 4, 8):
        drawn = density_of(tiny, path, 24 // k, 24)
        assert len(set(drawn)) == 24 and drawn == density_of(tiny, path, 24 // k, 24)
        counts = {record: sum(r == record for r, _ in drawn) for record, _ in drawn}
        assert len(counts) == 24 // k and set(counts.values()) == {k}
        assert len({record for record, _ in drawn[:24 // k]}) == 24 // k
    _, dataset = samples_of(tiny, path)
    dataset.images = 3
    sizes = [dataset[i]["sizes"] for i in range(0, 30, 3)]  # of one image
    assert len(set(map(str, sizes))) > 1 and all(not dataset[i]["bad"] for i in range(24))


def test_points_per_image_need_images(distances):
    datasets = train_sft.open_datasets([str(distances)])
    assert train_sft.images_to_see(datasets, 60, 10) == 6
    for points, say in ((1, "has 6"), (100, "0 images"), (0, "0 images"), (-1, "0 images")):
        with pytest.raises(ValueError, match=say):
            train_sft.images_to_see(datasets, 60, points)


def test_tasks_by_weight_and_of_the_files_that_fit(tiny, distances, tmp_path):
    """Equal shares of the tasks; motion comes from the file with poses alone, and is no bad sample elsewhere; where no
    file has any it is refused at the start."""
    encoder = render.load_encoder(str(tiny))
    posed = make_world(tmp_path, poses=True)
    records = [json.loads(line) for line in posed.read_text().splitlines()]
    records[0]["pose"] = None  # neither is one frame without a pose
    write_jsonl(posed, records)
    datasets = train_sft.open_datasets([str(distances), str(posed)])
    tasks = dict.fromkeys(render.TASKS, 1.0)
    dataset = train_sft.Samples(datasets, tasks, SETTINGS, encoder, (56, 112, 56, 112), 0)
    drawn = [dataset[i] for i in range(240)]
    assert not any(s["bad"] for s in drawn)
    for task in tasks:
        mine = [s for s in drawn if s["task"] == task]
        assert 20 < len(mine) < 65 and all(len(s["sizes"]) == (2 if task == "motion" else 1) for s in mine)
    with pytest.raises(ValueError, match="motion.*pose"):
        train_sft.Samples(datasets[:1], tasks, SETTINGS, encoder, (56, 112, 56, 112), 0)


def test_dataset_weights(tiny, distances, world):
    datasets = train_sft.open_datasets([f"{distances}:1", f"{world}:0.1"])
    assert [w for _, w in datasets] == [1.0, 0.1]
    draws = [train_sft.draw(np.random.default_rng(i), [w for _, w in datasets]) for i in range(4000)]
    assert np.mean(draws) == pytest.approx(0.1 / 1.1, abs=0.015)
    for bad in ("0", "-1", "nan"):
        with pytest.raises(ValueError, match="weight"):
            train_sft.open_datasets([f"{distances}:{bad}"])


# ----------------------------------------------------------------------------------------------------------------------
# sharded, saved, opened


def test_sharded_model_is_the_plain_one(tiny):
    plain = evaluate.load_model(str(tiny), torch.device("cpu"), torch.float32)
    ours = sharded(tiny)
    for (name, a), (_, b) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), name
    for (name, a), (_, b) in zip(plain.named_buffers(), ours.named_buffers(), strict=True):
        assert torch.equal(a, b), name  # rotary frequencies, which are in no file
    assert ours.lm_head.weight is ours.model.language_model.embed_tokens.weight  # still tied


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen3", "tiny_pixtral"])
def test_saved_folder_opens_with_plain_transformers(family, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(family)
    monkeypatch.setattr(train_sft, "SHARD_BYTES", 100_000)  # several files
    model = sharded(folder)
    train_sft.save_model(model, str(folder), tmp_path, SETTINGS, torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 0
    again = stock(tmp_path)
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), name
    assert render.load_settings(str(tmp_path)) == SETTINGS
    assert render.load_encoder(str(tmp_path)).grid == render.load_encoder(str(folder)).grid
    monkeypatch.setattr(train_sft, "SHARD_BYTES", 4 << 30)
    train_sft.save_model(model, str(folder), tmp_path, SETTINGS, torch.bfloat16)  # over the old files: none is left behind
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert {v.dtype for v in weights(tmp_path).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_load_under_the_names_of_the_hub(tiny, tmp_path):
    """Published Qwen2.5-VL files call the tower visual.* and the text model.*."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    old = weights(tiny)
    names = {n: n.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for n in old}
    save_file({names[n]: v for n, v in old.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = sharded(tmp_path)
    assert torch.equal(ours.model.visual.merger.mlp[0].weight.full_tensor(),
                       next(v for n, v in old.items() if n.endswith("visual.merger.mlp.0.weight")))
    broken = {k: v for k, v in weights(tmp_path).items() if "merger.ln_q" not in k}
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="merger.ln_q.*download"):
        sharded(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory, distances):
    """An uninterrupted run of ten steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(out, distances)
    return out


def test_two_processes_give_the_same_losses_and_weights(reference, distances, tmp_path):
    train(tmp_path / "two", distances, "--reshard", "--workers", 1, "--checkpointing", processes=2)
    assert len(losses(reference)) == 10
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), abs=1e-5)
    two, one = weights(tmp_path / "two"), weights(reference)
    assert all(torch.allclose(two[n], one[n], atol=1e-5) for n in one)


def test_resumed_equals_uninterrupted(reference, distances, tmp_path):
    """Bit for bit with another number of workers; to rounding with another number of processes."""
    train(tmp_path / "run", distances, "--stop-after", 4)
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    train(tmp_path / "run", distances, "--resume", "--workers", 2)
    assert all(torch.equal(weights(tmp_path / "run")[n], w) for n, w in weights(reference).items())
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    logs = [[{k: json.loads(line)[k] for k in keys} for line in (out / "log.jsonl").read_text().splitlines()]
            for out in (tmp_path / "run", reference)]
    assert logs[0] == logs[1]
    train(tmp_path / "two", distances, "--resume", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), abs=1e-5)
    again = train(tmp_path / "run", distances, "--resume")  # a finished run: nothing to do, nothing harmed
    assert "from step 10" in again.stdout and len(losses(tmp_path / "run")) == 10


def test_a_resumed_run_keeps_its_flags(distances, tmp_path):
    """What would change what is learned is refused by name; what only changes how it runs is not."""
    out = tmp_path / "run"
    (out).mkdir()
    (out / "run.json").write_text("{}")  # a start that failed does not block its folder
    train(out, distances, "--stop-after", 1)
    for flag, value in (("--lr", "3"), ("--marker", "dot"), ("--samples", "160")):
        fails("--out", out, "--data", distances, *FLAGS, flag, value, "--resume", message=f"was begun with {flag}")
    assert json.loads((out / "depthlm.json").read_text())["marker"] == "arrow"
    train(out, distances, "--resume", "--micro-batch", 8, "--save-every", 5)


def test_killed_at_any_moment_it_can_be_resumed(reference, distances, tmp_path):
    """kill -9 three times: while a state is being written, and at two other moments; the result is that of one run."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_sft.py"), "--out", out, "--data", distances, *FLAGS, "--save-every", "1", "--resume"]
    for kill_in_save in (True, False, False):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while process.poll() is None:
            if kill_in_save and list(out.glob("resume/.step_*")):
                break
            if not kill_in_save and process.stdout.readline().startswith("step"):
                process.stdout.readline()
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    train(out, distances, "--resume", "--save-every", 1)
    assert all(torch.equal(weights(out)[n], w) for n, w in weights(reference).items())
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == list(range(1, 11))
    assert sorted(p.name for p in (out / "resume").iterdir()) == ["state.json", "step_00000010"]


def test_validation_is_evaluate(distances, tmp_path, world):
    out = tmp_path / "run"
    train(out, distances, "--samples", 16, "--val", world, "--val-every", 2, "--val-queries", 20, processes=2)
    logged = [json.loads(line)["val"] for line in (out / "log.jsonl").read_text().splitlines() if "val" in line]
    done = run_script("evaluate.py", out, "--data", world, "--queries", 20, "--out", tmp_path / "eval")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())["datasets"]["world"]
    assert logged[-1]["world"]["delta1"] == pytest.approx(found["delta1"], abs=1e-6)
    assert logged[-1]["world"]["unparsed"] == found["unparsed"] and found["n"] == 20


# ----------------------------------------------------------------------------------------------------------------------
# recipes and errors


def table5(path=None):
    args = train_sft.parse_args([f"@{ROOT / 'runs' / path}"] if path else [])
    return {k: getattr(args, k) for k in ("samples", "batch", "lr", "schedule", "warmup", "clip", "focal", "crop", "checkpointing")}


def test_all_tasks_train_and_are_scored(tmp_path):
    """Six tasks with equal weights, four points of each image, validated; the folder knows its tasks, and evaluate.py
    asks them without a flag."""
    data = make_world(tmp_path / "data" / "posed", 8, 8, poses=True)
    out = tmp_path / "run"
    train(out, data, "--tasks", *render.TASKS, "--val", data, "--val-every", 4, "--val-queries", 4, "--samples", 32,
          "--points-per-image", 4)
    assert json.loads((out / "depthlm.json").read_text())["tasks"] == list(render.TASKS)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["val"]["posed"]["n"] > 20 and not any(line.get("bad") for line in log)
    evaluate.main([str(out), "--data", str(data), "--queries", "6", "--workers", "0", "--max-new-tokens", "4"])
    assert list(json.loads((out / "eval" / "metrics.json").read_text())["tasks"]) == list(render.TASKS)


def test_chat_is_mixed_in(tiny, distances, tmp_path):
    """The share of --mix, text-only samples and images among them; without it not one draw changes."""
    chats = write_jsonl(tmp_path / "chat.jsonl", [
        {"question": "Who are you?", "answer": "A model."},
        {"question": "Which?", "answer": "That.", "image": str(distances.parent / "000.png")}])
    encoder, plain = samples_of(tiny, distances)
    assert train_sft.open_mix(f"{chats}:0.25")[1] == 0.25 and train_sft.open_mix(str(chats))[1] == train_sft.MIX_SHARE
    mixed = train_sft.Samples(plain.fitting["distance"], plain.tasks, SETTINGS, encoder, plain.crop, 0,
                              chats=train_sft.open_mix(f"{chats}:0.25"))
    drawn = [mixed[i] for i in range(200)]
    talk = [s for s in drawn if s["task"] == "chat"]
    assert 30 < len(talk) < 70 and {len(s["sizes"]) for s in talk} == {0, 1} and not any(s["bad"] for s in drawn)
    texts = {encoder.tokenizer.decode(s["input_ids"][s["prompt_length"]:]) for s in talk}
    assert texts == {"A model.<|im_end|>", "That.<|im_end|>"}
    for spec in (f"{chats}:0", f"{chats}:1", f"{chats}:x"):
        with pytest.raises(ValueError, match="share"):
            train_sft.open_mix(spec)
    for line, say in (("{", "line 1"), ('{"question": "Who?"}', "answer"), ("", "holds no")):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(ValueError, match=say):
            train_sft.open_mix(str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match="no such file"):
        train_sft.open_mix("nowhere.jsonl")


def test_text_only_micro_batches_on_two_processes(distances, tmp_path):
    """One process with images, the other with text alone: all of them run the vision tower, so nothing hangs; the image
    that is added for that says nothing."""
    chats = write_jsonl(tmp_path / "chat.jsonl", [{"question": "Who are you?", "answer": "A model."}])
    for processes in (0, 2):
        train(tmp_path / str(processes), distances, "--mix", f"{chats}:0.6", "--micro-batch", 1, "--samples", 24,
              processes=processes)
    one, two = (losses(tmp_path / str(n)) for n in (0, 2))
    assert one == pytest.approx(two, abs=2e-4)


SEEN = [{"camera": camera} for camera in ("unify", "none", "prompt", "ray")] + [
    {"prompt": "release"}, {"prompt": "text"}, {"marker": "cross", "marker_size": 9, "focal": 80.0}]


@pytest.mark.parametrize("change", SEEN, ids=lambda c: "-".join(map(str, c.values())))
def test_what_was_trained_is_what_is_asked(change, distances, tmp_path, monkeypatch):
    """Each camera strategy, prompt, marker and focal length goes into depthlm.json; evaluate.py and pointcloud.py show
    the model the same, pixel for pixel and word for word, without being told."""
    import pointcloud
    out, shown = tmp_path / "run", []
    flags = [word for key, value in change.items() for word in (f"--{key.replace('_', '-')}", value)]
    train(out, distances, *flags, "--samples", 8)
    stored = json.loads((out / "depthlm.json").read_text())
    assert {k: stored[k] for k in change} == change
    query = evaluate.make_query(render.Records(distances), "distance", (0, 0))
    views, question, _ = render.render(query, {**SETTINGS, **change}, 28)
    encode = render.encode
    monkeypatch.setattr(render, "encode", lambda e, v, q, *a: shown.append((v[0].pixels, q)) or encode(e, v, q, *a))
    evaluate.main([str(out), "--data", str(distances), "--all", "--workers", "0", "--max-new-tokens", "2"])
    fx, fy, cx, cy, *_ = query.records[0]["intrinsics"]
    x, y = query.points[0]
    with pytest.raises(SystemExit):  # hardly trained: it says no distance
        pointcloud.main([str(out), query.records[0]["image"], "--at", f"{x:g},{y:g}", "--focal", str(fx), str(fy),
                         "--center", str(cx), str(cy), "--max-new-tokens", "2"])
    for pixels, text in (shown[0], shown[-1]):
        assert (pixels == views[0].pixels).all() and text == question


def test_recipes_hold_the_values_of_table_5():
    shared = {"schedule": "cosine", "warmup": 0.1, "crop": [1000, 1400, 700, 1200], "checkpointing": True}
    assert table5("sft_3b.args") == {**shared, "samples": 35e6, "batch": 1280, "lr": 5.2e-5, "clip": 0.1, "focal": 1000}
    assert table5("sft_7b.args") == {**shared, "samples": 60e6, "batch": 1280, "lr": 1.0e-4, "clip": 0.5, "focal": 1000}
    assert table5("sft_pixtral_12b.args") == {**shared, "samples": 23e6, "batch": 384, "lr": 5.6e-5, "clip": 1.0, "focal": 750}
    assert table5() == {**table5("sft_3b.args"), "focal": None}  # None: the family's default, 1000
    overridden = train_sft.parse_args([f"@{ROOT / 'runs' / 'sft_3b.args'}", "--lr", "1e-4"])
    assert overridden.lr == 1e-4


def test_default_data_is_the_mixture_and_says_what_is_missing(tmp_path, monkeypatch, capsys, distances):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no training data"):
        train_sft.default_data()
    for name in ("waymo", "matterport3d"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(distances, tmp_path / "data" / name / "train.jsonl")
    capsys.readouterr()
    assert train_sft.default_data() == ["data/waymo/train.jsonl:1.0", "data/matterport3d/train.jsonl:0.1"]
    assert "argoverse2" in capsys.readouterr().err


def test_unreadable_images_are_replaced_and_counted_but_not_many(tiny, distances, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(distances.parent, folder)
    (folder / "002.png").write_bytes(b"not an image")
    encoder, samples = samples_of(tiny, folder / "train.jsonl")
    batch = train_sft.collate([samples[i] for i in range(30)])
    assert 0 < len(batch["bad"]) < 20 and "002.png" in batch["bad"][0] and len(batch["segments"]) == 31
    done = run_script("train_sft.py", "--out", tmp_path / "run", "--data", folder / "train.jsonl", *FLAGS)
    assert done.returncode == 2 and "more than 1%" in done.stderr and "002.png" in done.stderr and "Traceback" not in done.stderr


def fails(*command, message, cwd=None):
    done = run_script("train_sft.py", *command, cwd=cwd)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-1500:]


def test_errors_are_one_line(tmp_path, distances, reference):
    fails("--out", reference, "--data", distances, *FLAGS, message="--resume")
    fails("--out", tmp_path / "a", "--data", distances, *FLAGS, "--model", tmp_path / "nowhere", message="no such checkpoint")
    (tmp_path / "empty.jsonl").write_text("")
    fails("--out", tmp_path / "b", "--data", tmp_path / "empty.jsonl", *FLAGS, message="empty.jsonl: holds no record")
    assert not (tmp_path / "b").exists()  # nothing begun
    (tmp_path / "c" / "base").mkdir(parents=True)  # what a start that failed after make_tiny leaves is no obstacle
    (tmp_path / "c" / "run.json").write_text("{}")
    fails("--out", tmp_path / "c", "--data", distances, *FLAGS, "--tasks", "motion", message="motion")


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounts a small tmpfs")
def test_a_full_disk_leaves_the_last_state(distances, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        out = small / "run"
        train(out, distances, "--stop-after", 2)
        before = (out / "resume" / "state.json").read_text()
        filler = small / "filler"
        free = shutil.disk_usage(small).free
        filler.write_bytes(b"0" * max(0, free - 300_000))
        done = run_script("train_sft.py", "--out", out, "--data", distances, *FLAGS, "--resume")
        assert done.returncode == 2 and "MiB free" in done.stderr and "Traceback" not in done.stderr, done.stderr[-1500:]
        assert (out / "resume" / "state.json").read_text() == before
        filler.unlink()
        train(out, distances, "--resume")
        assert math.isfinite(losses(out)[-1]) and len(losses(out)) == 10
    finally:
        subprocess.run(["umount", small])
