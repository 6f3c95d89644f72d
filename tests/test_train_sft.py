"""train_sft.py: samples, loss, schedule, sharding, the model folder, resuming after a kill at any
moment, flags, and what it says when something is wrong."""
import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ROOT, make_world, plain_inputs, run_script, stock, views_for, write_jsonl
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import render
import train_sft

CPU = torch.device("cpu")
CROP = (56, 112, 56, 112)
# ten steps of 8 samples
FLAGS = ["--focal", 100, "--crop", *CROP, "--batch", 8, "--micro-batch", 3, "--samples", 80,
         "--lr", 2e-3, "--workers", 0, "--log-every", 1, "--val-every", 0, "--save-every", 100,
         "--dtype", "float32"]


@pytest.fixture(scope="module")
def distances(tmp_path_factory) -> Path:
    """The small world with distances from 0.05 to 130 m, so that answers differ in length."""
    path = make_world(tmp_path_factory.mktemp("data") / "far")
    records = lines_of(path)
    rng = np.random.default_rng(0)
    for record in records:
        logs = rng.uniform(np.log(0.05), np.log(130), len(record["depth"]))
        record["depth"] = np.exp(logs).round(4).tolist()
    return write_jsonl(path.with_name("train.jsonl"), records)


@pytest.fixture
def one_process():
    evaluate.setup_distributed()
    yield
    dist.destroy_process_group()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(out: Path) -> list[dict]:
    return lines_of(out / "log.jsonl")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


def weights(folder: Path) -> dict:
    """Those that a reader of the folder finds, in one file or in several."""
    tensors = {}
    for name, file in evaluate.weight_files(folder).items():
        with safe_open(folder / file, "pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def command(model, data, out, *more) -> list[str]:
    return list(map(str, ["--model", model, "--data", data, "--out", out, *FLAGS, *more]))


def train(model, data, out, *more, processes=0) -> None:
    argv = command(model, data, out, *more)
    if not processes:
        return train_sft.main(argv)
    done = run_script("train_sft.py", *argv, processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]


def refused(capsys, argv) -> str:
    """The last line of a call that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_sft.main(list(map(str, argv)))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def samples_of(tiny, path, seed=0):
    checkpoint = render.open_checkpoint(str(tiny), {"focal": 100}, quiet=True)
    datasets = [(render.Records(path), 1.0)]
    streams = train_sft.make_streams(datasets, {"distance": (1.0, [])})
    return checkpoint, train_sft.Samples(streams, checkpoint, CROP, seed)


def sharded(folder, dtype=torch.float32, **options):
    return train_sft.shard_model(folder, CPU, dtype, **options)


# --------------------------------------------------------------------------------------------------
# the loss


def test_loss_is_that_of_transformers_on_the_answer(tiny, distances, one_process):
    checkpoint, samples = samples_of(tiny, distances)
    batch = [samples[i] for i in range(6)]
    assert len({len(s["input_ids"]) - s["prompt_length"] for s in batch}) > 1  # of several lengths
    model = sharded(tiny)
    ours = train_sft.answer_losses(model, checkpoint, train_sft.collate(batch), CPU).sum().item()

    theirs, tokens, plain = 0.0, 0, stock(tiny)
    for sample in batch:
        images = [unpatch(p, size, checkpoint)
                  for p, size in zip(sample["pixels"], sample["sizes"])]
        views = [render.View(image, (1,) * 6, (1, 1), (0, 0)) for image in images]
        inputs = plain_inputs(tiny, checkpoint, sample, views)
        labels = inputs["input_ids"].clone()
        labels[:, :sample["prompt_length"]] = -100
        count = int((labels != -100).sum())
        theirs += plain(**inputs, labels=labels).loss.item() * count
        tokens += count
        assert labels[0, -1] == checkpoint.end_id  # the end of the turn is learned too
    assert ours / tokens == pytest.approx(theirs / tokens, abs=1e-5)


def unpatch(patches, size, checkpoint):
    (h, w), p, m = size, checkpoint.patch, checkpoint.merge
    blocks = patches.reshape(h // m, w // m, m, m, 3, p, p).transpose(0, 2, 5, 1, 3, 6, 4)
    return blocks.reshape(h * p, w * p, 3)


def test_packed_equals_padded(tiny, distances):
    """The same samples in one packed row and in a left-padded batch of the plain model: same logits
    at the answers."""
    checkpoint, samples = samples_of(tiny, distances)
    batch = [samples[i] for i in range(5)]
    packed = train_sft.collate(batch)
    inputs = render.model_inputs(packed, checkpoint)
    model = evaluate.load_model(checkpoint, CPU, torch.float32)
    ours = model(**inputs, logits_to_keep=packed["predict_at"]).logits[0]

    longest = max(len(s["input_ids"]) for s in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    positions = torch.zeros(3, len(batch), longest, dtype=torch.long)
    for b, sample in enumerate(batch):
        n = len(sample["input_ids"])
        ids[b, -n:] = torch.tensor(sample["input_ids"])
        mask[b, -n:] = 1
        positions[:, b, -n:] = torch.tensor(sample["position_ids"])
    logits = stock(tiny)(input_ids=ids, attention_mask=mask, position_ids=positions,
                         pixel_values=inputs["pixel_values"],
                         image_grid_thw=inputs["image_grid_thw"]).logits
    theirs = []
    for b, sample in enumerate(batch):
        answer = len(sample["input_ids"]) - sample["prompt_length"]
        theirs.append(logits[b, longest - answer - 1:longest - 1])
    assert torch.allclose(ours, torch.cat(theirs), atol=1e-5)


def test_only_answers_get_logits(tiny, distances, one_process):
    checkpoint, samples = samples_of(tiny, distances)
    batch = train_sft.collate([samples[i] for i in range(4)])
    model, rows = sharded(tiny), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape))
    train_sft.answer_losses(model, checkpoint, batch, CPU)
    assert rows[0][1] == len(batch["targets"]) < batch["input_ids"].shape[1] / 2


def gradients_of_a_step(monkeypatch, *argv) -> list[torch.Tensor]:
    """Those that the optimizer gets in the first step of a run, gathered."""
    found = []

    class Watched(torch.optim.AdamW):
        def step(self):
            found.append([p.grad.full_tensor().clone() for p in self.param_groups[0]["params"]])
            super().step()

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        train(*argv, "--samples", 8, "--clip", 1e9)
    return found[0]


def test_gradient_does_not_depend_on_the_micro_batch_or_on_checkpointing(tiny, distances, tmp_path,
                                                                         monkeypatch):
    plain = ["--micro-batch", 8, "--no-checkpointing"]
    one = gradients_of_a_step(monkeypatch, tiny, distances, tmp_path / "one", *plain)
    assert max(gradient.abs().max() for gradient in one) > 1e-3
    for k, more in enumerate((["--micro-batch", 3], ["--micro-batch", 1], ["--checkpointing"])):
        out = tmp_path / str(k)
        other = gradients_of_a_step(monkeypatch, tiny, distances, out, *plain, *more)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, other))
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_bfloat16_computes_over_float32_master_weights(tiny, distances, one_process):
    checkpoint, samples = samples_of(tiny, distances)
    model, seen = sharded(tiny, torch.bfloat16), []

    def look(module, inputs, output):
        seen.append((module.weight.dtype, output.dtype))

    model.lm_head.register_forward_hook(look)
    loss = train_sft.answer_losses(model, checkpoint, train_sft.collate([samples[0]]), CPU).sum()
    loss.backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] and loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# schedule and sampling


def test_learning_rate():
    lr = [train_sft.get_lr(s, 100, 1.0, 0.1, "cosine") for s in range(100)]
    assert lr[0] == pytest.approx(1 / 11) and lr[10] == 1.0
    assert lr[55] == pytest.approx(0.5) and 0 < lr[99] < 1e-3
    assert all(a < b for a, b in zip(lr[:10], lr[1:11]))
    assert all(a > b for a, b in zip(lr[10:], lr[11:]))
    assert train_sft.get_lr(0, 100, 1.0, 0.0, "cosine") == 1.0
    assert {train_sft.get_lr(s, 100, 1.0, 0.0, "constant") for s in range(100)} == {1.0}


def test_global_batch_is_the_same_for_any_number_of_processes():
    def of(world, micro, first=0):
        steps = [[] for _ in range(3)]
        for rank in range(world):
            parts = train_sft.batch_indices(first, 3, 12, micro, rank, world)
            flat = [i for part in parts for i in part]
            for k in range(3 - first):
                steps[first + k] += flat[k * 12 // world:(k + 1) * 12 // world]
        return steps

    whole = [list(range(12 * k, 12 * k + 12)) for k in range(3)]
    assert of(1, 5) == of(2, 4) == of(3, 12) == of(4, 1) == whole
    assert of(2, 4, first=2)[2] == of(1, 5)[2]  # a later start draws the same


def test_samples_are_a_pure_function_of_seed_and_number(tiny, distances):
    _, samples = samples_of(tiny, distances)
    for i in (7, 3, 7):
        again = samples_of(tiny, distances)[1][i]
        assert all(np.array_equal(samples[i][key], again[key])
                   for key in ("input_ids", "position_ids"))
    _, others = samples_of(tiny, distances, seed=1)
    assert not all(np.array_equal(samples[i]["input_ids"], others[i]["input_ids"])
                   for i in range(4))


def test_an_answer_is_trained_with_its_end(tiny, distances):
    checkpoint, samples = samples_of(tiny, distances)
    for i in range(4):
        *answer, end = samples[i]["input_ids"][samples[i]["prompt_length"]:].tolist()
        assert end == checkpoint.end_id
        assert render.parse_answer(checkpoint.text(answer)) == pytest.approx(
            samples[i]["value"], abs=0.0051)


def test_the_seed_decides_on_points_and_crops(tiny, tmp_path):
    """Of one image, whose turn it always is."""
    path = make_world(tmp_path, images=1)
    answers = [[samples_of(tiny, path, seed)[1][i]["value"] for i in range(12)]
               for seed in (0, 1)]
    assert answers[0] != answers[1] and {*answers[0]} | {*answers[1]} <= {
        *render.Records(path)[0]["depth"]}


def test_gradients_are_clipped_to_their_norm():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert train_sft.clip_gradients(model, 0.1) == pytest.approx(5)
    assert model.weight.grad.tolist() == [pytest.approx([0.06, 0.08], rel=1e-4)]
    assert train_sft.clip_gradients(model, 7.0) == pytest.approx(0.1, rel=1e-4)
    assert model.weight.grad.tolist() == [pytest.approx([0.06, 0.08], rel=1e-4)]


def test_flags_of_the_optimizer_reach_the_update(tiny, distances, tmp_path):
    """One step of each: another learning rate, warm-up or decay gives other weights."""
    found = []
    for k, more in enumerate(([], ["--lr", 1e-4], ["--warmup", 0.9], ["--weight-decay", 10])):
        train(tiny, distances, tmp_path / str(k), "--samples", 8, "--val-every", 0, "--warmup", 0,
              *more)
        found.append(weights(tmp_path / str(k)))
    assert not any(equal(one, other) for one, other in itertools.combinations(found, 2))


def places(tiny, path, images: int, samples: int) -> list[tuple]:
    """(record, point) of each sample when `images` images share them."""
    _, dataset = samples_of(tiny, path)
    dataset.images = images
    return [dataset.pick(dataset.streams[0], k, 0, None) for k in range(samples)]


def test_points_per_image(tiny, tmp_path):
    """Fig. 5: at the same number of samples 1 point of 24 images, 4 of 6, 8 of 3: each image the
    same number of times, its points all different, each image before any second point; a function
    of the seed and the number; the crops differ."""
    path = make_world(tmp_path, images=24, points=8)
    for k in (1, 4, 8):
        drawn = places(tiny, path, 24 // k, 24)
        assert len(set(drawn)) == 24 and drawn == places(tiny, path, 24 // k, 24)
        counts = {record: sum(r == record for r, _ in drawn) for record, _ in drawn}
        assert len(counts) == 24 // k and set(counts.values()) == {k}
        assert len({record for record, _ in drawn[:24 // k]}) == 24 // k
    _, dataset = samples_of(tiny, path)
    dataset.images = 3
    sizes = [dataset[i]["sizes"] for i in range(0, 30, 3)]  # of one image
    assert len(set(map(str, sizes))) > 1 and all(not dataset[i]["bad"] for i in range(24))


def test_points_per_image_need_images(tiny, distances, tmp_path, capsys):
    datasets = [(render.Records(distances), 1.0)]
    assert train_sft.images_to_see(datasets, 60, 10) == 6
    for points, say in ((1, "has 6"), (100, "0 images")):
        with pytest.raises(ValueError, match=say):
            train_sft.images_to_see(datasets, 60, points)
    argv = command(tiny, distances, tmp_path / "run", "--points-per-image")
    assert "--points-per-image 1: 80 samples are 80 images" in refused(capsys, [*argv, 1])
    for number in (0, -1):
        assert f"--points-per-image: {number} is not 1 or more" in refused(capsys, [*argv, number])


def test_tasks_by_weight_and_of_the_files_that_fit(tiny, distances, tmp_path):
    """Equal shares of the tasks; motion comes from the file with poses alone, and is no bad sample
    elsewhere; where no file has any it is refused at the start."""
    checkpoint, _ = samples_of(tiny, distances)
    posed = make_world(tmp_path / "posed", poses=True)
    records = lines_of(posed)
    records[0]["pose"] = None  # neither is one frame without a pose
    write_jsonl(posed, records)
    datasets = [(render.Records(path), 1.0) for path in (distances, posed)]
    tasks = dict.fromkeys(render.TASKS, (1.0, []))
    dataset = train_sft.Samples(train_sft.make_streams(datasets, tasks), checkpoint, CROP, 0)
    drawn = [dataset[i] for i in range(240)]
    assert not any(sample["bad"] for sample in drawn)
    for task in tasks:
        images = [len(sample["sizes"]) for sample in drawn if sample["task"] == task]
        assert 25 < len(images) < 56 and set(images) == {2 if task == "motion" else 1}
    with pytest.raises(ValueError, match="motion.*pose"):
        train_sft.make_streams(datasets[:1], tasks)
    streams = train_sft.make_streams(datasets, {"distance": (1.0, []), "axis": (3.0, ["posed"])})
    assert [(s.task, s.records.path == str(posed), s.share) for s in streams] == [
        ("distance", False, 0.125), ("distance", True, 0.125), ("axis", True, 0.75)]
    with pytest.raises(ValueError, match="axis@nowhere.*posed"):
        train_sft.make_streams(datasets, {"axis": (1.0, ["nowhere"])})


def order_of(dataset, count: int) -> list[tuple]:
    """(stream, record) of the first samples."""
    found = []
    for i in range(count):
        block, slot = divmod(i, train_sft.BLOCK)
        s = dataset.order[slot]
        k = int(block * dataset.quota[s] + dataset.before[slot])
        found.append((s, dataset.pick(dataset.streams[s], k, 0, None)[0]))
    return found


def test_each_stream_sees_its_images_once_an_epoch(tiny, tmp_path):
    """Without replacement, in another order each time, with shares that are exact in each block."""
    paths = [make_world(tmp_path / name, images=n) for name, n in (("a", 30), ("b", 17))]
    checkpoint, _ = samples_of(tiny, paths[0])
    datasets = [(render.Records(paths[0]), 1.0), (render.Records(paths[1]), 0.1)]
    streams = train_sft.make_streams(datasets, {"distance": (1.0, [])})
    dataset = train_sft.Samples(streams, checkpoint, CROP, 3)
    count = 2 * train_sft.BLOCK
    drawn = order_of(dataset, count)
    shares = [sum(s == k for s, _ in drawn) / count for k in (0, 1)]
    assert shares == pytest.approx([1 / 1.1, 0.1 / 1.1], abs=1 / train_sft.BLOCK)
    for k, images in ((0, 30), (1, 17)):
        records = [record for s, record in drawn if s == k]
        epochs = [records[n:n + images] for n in range(0, len(records) - images, images)]
        assert all(sorted(epoch) == list(range(images)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > len(epochs) / 2
    with pytest.raises(ValueError, match="too small"):
        tasks = {"distance": (1.0, []), "axis": (1e-6, [])}
        train_sft.Samples(train_sft.make_streams(datasets, tasks), checkpoint, CROP, 0)


def test_permute():
    for n in (1, 2, 3, 5, 64, 100, 4096, 5000):
        for seed in (0, 1, 12345):
            assert sorted(train_sft.permute(i, n, seed) for i in range(n)) == list(range(n))
    places = np.array([train_sft.permute(i, 5000, 7) for i in range(5000)])
    assert abs(np.corrcoef(places, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05


def test_a_task_that_does_not_suit_a_record_keeps_its_share(tiny, tmp_path):
    """Another record is drawn, not another task."""
    path = make_world(tmp_path, images=24, points=2, poses=True)
    records = lines_of(path)
    for record in records[6:]:
        del record["time"]  # no motion
    write_jsonl(path, records)
    checkpoint, _ = samples_of(tiny, path)
    tasks = {"distance": (1.0, []), "motion": (1.0, [])}
    streams = train_sft.make_streams([(render.Records(path), 1.0)], tasks)
    dataset = train_sft.Samples(streams, checkpoint, CROP, 0)
    drawn = [dataset[i]["task"] for i in range(60)]
    assert abs(drawn.count("motion") - 30) < 9


# --------------------------------------------------------------------------------------------------
# sharded, saved, opened


def test_sharded_model_is_the_plain_one(tiny, one_process):
    checkpoint = render.open_checkpoint(str(tiny), quiet=True)
    plain = evaluate.load_model(checkpoint, CPU, torch.float32)
    ours = sharded(tiny)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), name
    for (name, a), b in zip(plain.named_buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b), name  # rotary frequencies, which are in no file
    assert ours.lm_head.weight is ours.model.language_model.embed_tokens.weight  # still tied


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen3", "tiny_pixtral"])
def test_adapters(name, request, tmp_path, one_process):
    """A start equal to the model, all else frozen in the dtype of the compute; the saved folder has
    the names of the start, and is the adapted model."""
    folder = request.getfixturevalue(name)
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    sample = render.encode(checkpoint, views_for(checkpoint, [(3, 2)]), "How far?")
    prompts = evaluate.pack_prompts(checkpoint, [sample])

    def logits(model):
        with torch.no_grad():
            return evaluate.prefill(model.eval(), checkpoint, prompts).logits

    def logits_of(folder):
        checkpoint = render.open_checkpoint(str(folder), quiet=True)
        return logits(evaluate.load_model(checkpoint, CPU, torch.float32))

    for dtype in (torch.bfloat16, torch.float32):
        model = sharded(folder, dtype, lora=2, freeze="vision")
        kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
        assert kinds == {(True, torch.float32), (False, dtype)}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 14 * len(model.model.language_model.layers)
    start = logits_of(folder)
    assert torch.equal(logits(model), start)
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(0.05)
    adapted = logits(model)
    assert (adapted - start).abs().max() > 0.1
    with train_sft.without_adapters(model):
        assert torch.equal(logits(model), start)
    train_sft.save_model(model, checkpoint, tmp_path, torch.float32)
    assert torch.allclose(logits_of(tmp_path), adapted, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen3", "tiny_pixtral"])
def test_saved_folder_opens_with_plain_transformers(name, request, tmp_path, monkeypatch,
                                                    one_process):
    folder = request.getfixturevalue(name)
    started = render.open_checkpoint(str(folder), {"focal": 100}, quiet=True)
    settings = {**render.DEFAULTS, "focal": 100}
    monkeypatch.setattr(train_sft, "SHARD_BYTES", 100_000)  # several files
    model = sharded(folder)
    train_sft.save_model(model, started, tmp_path, torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 0
    for (name, a), b in zip(stock(tmp_path).named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), name
    opened = render.open_checkpoint(str(tmp_path), quiet=True)
    assert opened.settings == settings
    assert opened.grid == render.open_checkpoint(str(folder), quiet=True).grid

    monkeypatch.setattr(train_sft, "SHARD_BYTES", 4 << 30)
    # over the old files: none is left
    train_sft.save_model(model, started, tmp_path, torch.bfloat16)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert {v.dtype for v in weights(tmp_path).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


# what generation_config.json of a base may say: each changes what plain generate answers
DECODING = {"do_sample": True, "temperature": 3.0, "top_k": 40, "top_p": 0.9,
            "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 2,
            "forced_eos_token_id": 7, "suppress_tokens": [*range(20, 300)], "max_new_tokens": 3}


@pytest.mark.parametrize("name", ["tiny", "tiny_pixtral"])
def test_plain_generate_of_a_saved_folder_gives_our_answers(name, request, tmp_path, one_process):
    """Token for token, without an argument, whatever the base's generation_config said; evaluate's
    answers do not depend on it."""
    base = shutil.copytree(request.getfixturevalue(name), tmp_path / "base")
    said = json.loads((base / "generation_config.json").read_text())
    stops = [said["eos_token_id"], 70]  # a second token that ends an answer
    (base / "generation_config.json").write_text(json.dumps({**said, **DECODING,
                                                             "eos_token_id": stops}))
    checkpoint = render.open_checkpoint(str(base), {"max_new_tokens": 9}, quiet=True)
    (tmp_path / "out").mkdir()
    train_sft.save_model(sharded(base), checkpoint, tmp_path / "out", torch.float32)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(written) == {"do_sample", "max_new_tokens", "eos_token_id", "pad_token_id"}
    assert set(written["eos_token_id"]) == set(stops) and written["max_new_tokens"] == 9

    ours = {}
    for folder in (base, tmp_path / "out"):
        opened = render.open_checkpoint(str(folder), quiet=True)
        model = evaluate.load_model(opened, CPU, torch.float32)
        views = [views_for(opened, [(2 + k, 3)], k) for k in range(4)]
        samples = [render.encode(opened, v, f"How far, number {k}?") for k, v in enumerate(views)]
        batch = evaluate.pack_prompts(opened, samples)
        ours[folder], _ = evaluate.greedy_answers(model, opened, batch, 9)
    assert opened.stop_ids == checkpoint.stop_ids and opened.settings["max_new_tokens"] == 9
    assert ours[base] == ours[tmp_path / "out"] and {*map(len, ours[base])} != {3}

    def generated(folder) -> list[list[int]]:
        plain = stock(folder)
        inputs = [plain_inputs(folder, opened, s, v) for s, v in zip(samples, views)]
        return [plain.generate(**one)[0, one["input_ids"].shape[1]:].tolist() for one in inputs]

    assert generated(tmp_path / "out") == ours[base] != generated(base)


def test_weights_load_under_the_names_of_the_hub(tiny, tmp_path, one_process):
    """Published Qwen2.5-VL files call the tower visual.* and the text model.*."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    found = {}
    for name, value in weights(tiny).items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        found[name] = value
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = sharded(tmp_path)
    assert torch.equal(ours.model.visual.merger.mlp[0].weight.full_tensor(),
                       found["visual.merger.mlp.0.weight"])
    broken = {name: value for name, value in found.items() if "merger.ln_q" not in name}
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="merger.ln_q.*download"):
        sharded(tmp_path)


def test_a_download_that_was_cut_off_is_one_line(tiny, distances, tmp_path, capsys):
    base = shutil.copytree(tiny, tmp_path / "base")
    os.truncate(base / "model.safetensors", 700_000)
    line = refused(capsys, command(base, distances, tmp_path / "run"))
    assert line.startswith(f"error: {base}/model.safetensors: is damaged")


# --------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def reference(tiny, distances, tmp_path_factory) -> Path:
    """An uninterrupted run of ten steps; beside it step_4, step_8 and step_10.safetensors."""
    out, save_run = tmp_path_factory.mktemp("runs") / "whole", train_sft.save_run

    def save_and_copy(run, step):
        save_run(run, step)
        shutil.copy(out / "model.safetensors", out.with_name(f"step_{step}.safetensors"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "save_run", save_and_copy)
        train(tiny, distances, out, "--save-every", 4)
    return out


def weights_at(reference: Path, step: int) -> dict:
    return load_file(reference.with_name(f"step_{step}.safetensors"))


def test_two_processes_give_the_same_losses_and_weights(tiny, reference, distances, tmp_path):
    out = tmp_path / "two"
    train(tiny, distances, out, "--reshard", "--workers", 1, "--checkpointing", "--offload",
          processes=2)
    assert len(losses(reference)) == 10
    assert losses(out) == pytest.approx(losses(reference), abs=1e-5)
    # AdamW hides a wrong scale of the gradients
    norms = [[line["grad_norm"] for line in log_of(folder) if "grad_norm" in line]
             for folder in (out, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    two, one = weights(out), weights(reference)
    assert all(torch.allclose(two[name], one[name], atol=1e-5) for name in one)


def test_resumed_equals_uninterrupted(tiny, reference, distances, tmp_path, capsys):
    """Bit for bit with another number of workers; to rounding with another number of processes."""
    out = tmp_path / "run"
    train(tiny, distances, out, "--stop-after", 4)
    shutil.copytree(out, tmp_path / "two")
    train(tiny, distances, out, "--workers", 2)
    assert equal(weights(out), weights(reference))
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    ours, theirs = ([{key: line[key] for key in keys} for line in log_of(folder)]
                    for folder in (out, reference))
    assert ours == theirs
    train(tiny, distances, tmp_path / "two", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), abs=1e-5)

    # a finished run: nothing to do, nothing harmed
    capsys.readouterr()
    train(tiny, distances, out)
    assert "from step 10" in capsys.readouterr().out and len(losses(out)) == 10


def test_adapters_are_resumed(tiny, distances, tmp_path):
    """Begun by two processes with everything in the CPU's memory, ended by one without: the run of
    one; the state holds what is trained. The rest of the model is as it was, bit for bit."""
    some = ["--lora", 2, "--freeze", "vision", "--samples", 32]
    train(tiny, distances, tmp_path / "one", *some)
    train(tiny, distances, tmp_path / "two", *some, "--stop-after", 2, "--offload", "--reshard",
          "--checkpointing", processes=2)
    state = dcp.FileSystemReader(tmp_path / "two/resume/step_00000002").read_metadata()
    assert len(state.state_dict_metadata) == 14 * 2 * (1 + 3)  # step and moments of each
    train(tiny, distances, tmp_path / "two", *some)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    before, after, two = (weights(folder) for folder in (tiny, tmp_path / "one", tmp_path / "two"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) == 14
    assert all("proj.weight" in name and "visual" not in name for name in changed)
    assert all(torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-3) <= 2 for n in changed)
    assert all(torch.allclose(after[name], two[name], atol=1e-5) for name in after)


@pytest.mark.parametrize("state", [
    "", "{", "[]", "4", {}, {"step": 4, "bad": 0}, {"step": "4"}, {"step": None}, {"step": -1},
    {"step": 4.5}, {"step": True}, {"bad": None}, {"bad": -3}, {"folder": 3},
    {"folder": "step_00000099"}, {"folder": ""}, {"folder": ".."}, {"folder": None}])
def test_a_state_of_a_wrong_form(tiny, reference, distances, tmp_path, capsys, state):
    """state.json is refused in a line with its name; nothing of the run is touched."""
    out = shutil.copytree(reference, tmp_path / "run")
    path = out / "resume" / "state.json"
    if isinstance(state, dict) and len(state) == 1:
        state = {**json.loads(path.read_text()), **state}
    path.write_text(state if isinstance(state, str) else json.dumps(state))
    message = refused(capsys, command(tiny, distances, out))
    assert str(path) in message and message.count("state.json") == 1
    assert equal(weights(out), weights(reference)) and log_of(out) == log_of(reference)


def test_a_finished_run_has_its_model(tiny, reference, distances, tmp_path, capsys):
    """It is written again when it was lost; an earlier --stop-after does not call it younger."""
    out = shutil.copytree(reference, tmp_path / "run")
    (out / "model.safetensors").unlink()
    train(tiny, distances, out)
    assert equal(weights(out), weights(reference))
    capsys.readouterr()
    train(tiny, distances, out, "--stop-after", 2)
    assert equal(weights(out), weights(reference)) and len(losses(out)) == 10
    assert "step 10 of 10" in capsys.readouterr().out


# a run that ends at once, with nothing cleaned up, before a call of a function with a word in its
# arguments: the `count`-th such call
KILL = """
import os, sys
root, shard_bytes, function, word, count, *argv = sys.argv[1:]
sys.path.insert(0, root)
import train_sft
train_sft.SHARD_BYTES = int(shard_bytes)
*path, name = function.split(".")
owner, calls = train_sft, []
for part in path:
    owner = getattr(owner, part)
function = getattr(owner, name)
def deadly(*args, **kwargs):
    calls.extend([1] * (word in str(args)))
    if len(calls) == int(count):
        os._exit(9)
    return function(*args, **kwargs)
setattr(owner, name, deadly)
train_sft.main(argv)
"""
SEVERAL_FILES = 100_000  # bytes a file
KILLS = {
    # before call number ... of function, with a word in its arguments -> steps of model and state
    "before the model": ("save_model", "", 2, 4, 4),
    "its files are written, not named": ("publish_weights", "", 2, 4, 4),
    "one of its files is named": ("render.write_json", "index.json", 2, 4, 4),
    "between model and state": ("save_resume", "", 2, 8, 4),
    "within the state": ("dcp.save", "", 2, 8, 4),
    "before state.json names it": ("render.write_json", "state.json", 2, 8, 4),
    "while the old state is deleted": ("shutil.rmtree", "step_00000004'", 3, 8, 8),
    "in the last save": ("save_resume", "", 3, 10, 8)}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_while_saving(tiny, reference, distances, tmp_path, capsys, moment):
    """At each moment the folder holds a whole model, none older than the state; resumed, it ends in
    the model of the uninterrupted run, bit for bit, and leaves nothing else behind."""
    function, word, count, model_step, state_step = KILLS[moment]
    out = tmp_path / "run"
    shard_bytes = SEVERAL_FILES if "files" in moment else 4 << 30
    argv = command(tiny, distances, out, "--save-every", 4)
    script = [sys.executable, "-c", KILL, ROOT, shard_bytes, function, word, count, *argv]
    killed = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=300)
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert equal(weights(out), weights_at(reference, model_step))
    state = json.loads((out / "resume" / "state.json").read_text())
    assert state["step"] == state_step and (out / "resume" / state["folder"]).is_dir()

    capsys.readouterr()
    train(tiny, distances, out, "--save-every", 4)
    said = capsys.readouterr().out
    assert f"from step {state_step}" in said and "step 10 of 10" in said
    assert equal(weights(out), weights(reference))
    assert [line["step"] for line in log_of(out)] == list(range(1, 11))
    assert sorted(p.name for p in (out / "resume").iterdir()) == ["state.json", "step_00000010"]
    assert sorted(p.name for p in out.glob("*safetensors*")) == ["model.safetensors"]


@pytest.mark.slow
def test_killed_at_any_moment_it_can_be_resumed(tiny, reference, distances, tmp_path):
    """kill -9 three times, once while a state is being written; the result is that of one run."""
    out = tmp_path / "run"
    script = [sys.executable, ROOT / "train_sft.py",
              *command(tiny, distances, out, "--save-every", 1)]
    for kill_in_save in (True, False, False):
        process = subprocess.Popen(list(map(str, script)), stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        while process.poll() is None:
            if kill_in_save and list(out.glob("resume/.step_*")):
                break
            if not kill_in_save and process.stdout.readline().startswith("step"):
                process.stdout.readline()
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    train(tiny, distances, out, "--save-every", 1)
    assert equal(weights(out), weights(reference))
    assert [line["step"] for line in log_of(out)] == list(range(1, 11))
    assert sorted(p.name for p in (out / "resume").iterdir()) == ["state.json", "step_00000010"]


def test_a_second_run_in_the_same_folder_is_refused(tiny, reference, distances, tmp_path, capsys):
    """The first is unharmed."""
    out = tmp_path / "run"
    script = [sys.executable, ROOT / "train_sft.py", *command(tiny, distances, out)]
    first = subprocess.Popen(list(map(str, script)), stdout=subprocess.PIPE, text=True)
    while not first.stdout.readline().startswith("step 1/"):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    try:
        message = refused(capsys, command(tiny, distances, out))
        assert message.startswith(f"error: {out}: another run is at work in it")
    finally:
        first.send_signal(signal.SIGCONT)
    first.communicate(timeout=300)
    assert first.returncode == 0 and equal(weights(out), weights(reference))
    assert losses(out) == losses(reference)


def test_a_resumed_run_keeps_its_flags(tiny, distances, tmp_path, capsys):
    """What would change what is learned is refused by name; what only changes how it runs is
    not."""
    out = tmp_path / "run"
    train(tiny, distances, out, "--stop-after", 1)
    for flag, value in (("--lr", "3"), ("--marker", "dot"), ("--samples", "160")):
        argv = command(tiny, distances, out, flag, value)
        assert f"was begun with {flag}" in refused(capsys, argv)
    assert json.loads((out / "depthlm.json").read_text())["marker"] == "arrow"
    train(tiny, distances, out, "--micro-batch", 8, "--save-every", 5)


def test_a_start_that_failed_does_not_block_its_folder(tiny, distances, tmp_path, capsys):
    out = tmp_path / "run"
    assert "motion" in refused(capsys, command(tiny, distances, out, "--tasks", "motion"))
    assert sorted(p.name for p in out.iterdir()) == [".lock", "run.json"]
    train(tiny, distances, out, "--samples", 8)
    assert len(losses(out)) == 1


# --------------------------------------------------------------------------------------------------
# validation, tasks, chats


def test_log_is_drawn(tmp_path, monkeypatch):
    """Loss, reward and delta1 by step, at most 200 points a curve; a validation set that came later
    has a curve of its own; what a kill left of a line does not matter."""
    drawn = []
    monkeypatch.setattr(render.Axes, "line", lambda axes, x, y, color, width=2: drawn.append(
        (list(x), list(y), color)))
    path = tmp_path / "log.jsonl"
    lines = [{"step": k, "loss": 1 / k, "reward": k - 600.0} for k in range(1, 601)]
    lines.insert(0, {"step": 0, "val": {"a": {"delta1": 0.25}}})
    lines.append({"step": 600, "val": {"a": {"delta1": 0.75}, "b": {"delta1": 0.5}}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 601, "lo')
    train_sft.draw_log(path)
    drawn = [curve for curve in drawn if curve[2] != render.PALE]  # without the grid
    (steps, loss, _), (_, reward, _), *scores = drawn
    assert steps == list(range(2, 600, 3)) and reward == [k - 600 for k in steps]
    assert loss[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert scores == [([0, 600], [0.25, 0.75], render.HUES[0]), ([600], [0.5], render.HUES[1])]
    assert Image.open(tmp_path / "log.png").width > 3 * 380
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "log.png"]
    write_jsonl(path, [{"step": 0, "val": {}}])
    (tmp_path / "log.png").unlink()
    train_sft.draw_log(path)
    assert not (tmp_path / "log.png").exists()


def test_validation_is_evaluate(tiny, distances, tmp_path, world):
    out = tmp_path / "run"
    train(tiny, distances, out, "--samples", 16, "--val", world, "--val-every", 2,
          "--val-queries", 20, processes=2)
    scored = [line for line in log_of(out) if "val" in line]
    assert [line["step"] for line in scored] == [0, 2]  # before and after
    assert Image.open(out / "log.png").width > 2 * 380
    logged = scored[-1]["val"]["world"]
    evaluate.main(list(map(str, [out, "--data", world, "--queries", 20, "--workers", 0])))
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    found = metrics["datasets"]["world"]
    assert logged["delta1"] == pytest.approx(found["delta1"], abs=1e-6)
    assert logged["unparsed"] == found["unparsed"] and logged["n"] == found["n"] == 20


def test_validation_files_beside_the_training_files(world, tmp_path):
    """Where a folder's name has a colon, too, with a weight or without; each folder once."""
    colon, plain = (shutil.copytree(world.parent, tmp_path / name / "room")
                    for name in ("col:on", "plain"))
    for folder in (colon, plain):
        shutil.copy(folder / "val.jsonl", folder / "train.jsonl")
    shutil.copy(plain / "val.jsonl", plain / "more.jsonl")
    args = train_sft.parse_args(["--data", f"{colon}/train.jsonl", f"{plain}/train.jsonl:0.5",
                                 f"{plain}/more.jsonl"])
    assert [weight for _, weight in args.data] == [1.0, 0.5, 1.0]
    opened = train_sft.open_validation(args, args.data)
    assert [records.path for _, records, _ in opened] == [f"{colon}/val.jsonl",
                                                          f"{plain}/val.jsonl"]
    for more, found in ((["--val"], 0), (["--val-every", "0"], 0), (["--val", str(world)], 1)):
        args = train_sft.parse_args(["--data", f"{plain}/train.jsonl", *more])
        assert len(train_sft.open_validation(args, args.data)) == found


def test_two_validation_sets_of_one_name_are_both_logged(tiny, distances, tmp_path):
    near = make_world(tmp_path / "near" / "room", images=2)
    far = make_world(tmp_path / "far" / "room", images=3)
    out = tmp_path / "run"
    train(tiny, distances, out, "--samples", 8, "--val", near, far, "--val-every", 1)
    scores = log_of(out)[-1]["val"]
    assert {name: score["n"] for name, score in scores.items()} == {str(near): 16, str(far): 24}


def test_all_tasks_train_and_are_scored(tiny, tmp_path):
    """Six tasks with equal weights, four points of each image, validated; the folder knows its
    tasks, and evaluate.py queries them without a flag."""
    data = make_world(tmp_path / "data" / "posed", 8, 8, poses=True)
    out = tmp_path / "run"
    train(tiny, data, out, "--tasks", *render.TASKS, "--val", data, "--val-every", 4,
          "--val-queries", 4, "--samples", 32, "--points-per-image", 4)
    assert json.loads((out / "depthlm.json").read_text())["tasks"] == list(render.TASKS)
    log = log_of(out)
    assert log[-1]["val"]["posed"]["n"] > 20 and not any(line.get("bad") for line in log)
    evaluate.main([str(out), "--data", str(data), "--queries", "6", "--workers", "0",
                   "--max-new-tokens", "4"])
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    assert list(metrics["tasks"]) == list(render.TASKS)


def test_short_runs_are_saved_ten_times(tiny, distances, tmp_path, monkeypatch):
    argv, steps = command(tiny, distances, tmp_path / "run", "--samples", 200), []
    at = argv.index("--save-every")
    del argv[at:at + 2]
    monkeypatch.setattr(train_sft, "save_run", lambda run, step: steps.append(step))
    train_sft.main(argv)
    assert steps == [*range(2, 26, 2), 25]


def test_loss_of_each_task_is_logged(tiny, distances, tmp_path, one_process):
    """Over all micro-batches and processes; the mean over all tokens is the loss."""
    chats = tmp_path / "chat.jsonl"
    render.write_jsonl(chats, [{"question": "Who?", "answer": "Me."}] * 3)
    out = tmp_path / "run"
    train(tiny, distances, out, "--tasks", "distance", "axis", "--mix", f"{chats}:0.4", "--batch",
          16, "--samples", 16, "--micro-batch", 3, processes=2)
    first = log_of(out)[0]

    checkpoint = render.open_checkpoint(str(tiny), {"focal": 100}, quiet=True)
    tasks = dict.fromkeys(("distance", "axis"), (1.0, []))
    streams = train_sft.make_streams([(render.Records(distances), 1.0)], tasks, 0.4)
    samples = train_sft.Samples(streams, checkpoint, CROP, 0, chats=train_sft.read_chats(chats))
    batch, found = train_sft.collate([samples[i] for i in range(16)]), {}
    loss = train_sft.answer_losses(sharded(tiny), checkpoint, batch, CPU).tolist()
    for task, value in zip(batch["tasks"], loss):
        found.setdefault(task, []).append(value)
    assert set(found) == {"distance", "axis", "chat"}
    means = {task: np.mean(values) for task, values in found.items()}
    assert first["losses"] == pytest.approx(means, abs=1e-4)
    assert first["loss"] == pytest.approx(np.mean(loss), abs=1e-4)


def height(records, i, rng, point=None):
    """A new task: how far a point is from the camera's horizontal plane [m]."""
    query = render.distance(records, i, rng, point)
    record = query.records[0]
    xyz = render.unproject(np.array(query.points[0]), query.value, record["intrinsics"])
    return render.replace(query, task="height", value=0.01 + abs(float(xyz[1])))


HEIGHT = render.Task(height, {"paper": (
    "How many meters is this point above or below the camera?",
    "The point is around {x} meters off the height of the camera.")}, render.METERS)


def test_a_task_is_one_row(tiny, distances, world, tmp_path, monkeypatch, capsys):
    """A new row of TASKS is a task that --tasks knows, that is trained, validated and scored."""
    out = tmp_path / "run"
    more = ["--tasks", "height", "distance:0.5", "--val", world, "--val-every", 10,
            "--val-queries", 4]
    argv = command(tiny, distances, out, *more)
    assert "height is no task" in refused(capsys, argv)

    monkeypatch.setitem(render.TASKS, "height", HEIGHT)
    train_sft.main(argv)
    log = log_of(out)
    assert log[-1]["val"]["world"]["n"] == 8 and log[9]["loss"] < log[1]["loss"]
    assert json.loads((out / "depthlm.json").read_text())["tasks"] == ["height", "distance"]
    evaluate.main(list(map(str, [out, "--data", world, "--queries", 5, "--workers", 0])))
    lines = lines_of(out / "eval" / "predictions.jsonl")
    assert {line["task"] for line in lines} == {"height", "distance"}
    records = render.Records(world)
    for line in lines:
        if line["task"] == "height":
            i = int(Path(line["image"]).stem)
            true = height(records, i, None, point_of(records[i], line["pixel"])).value
            assert line["true"] == pytest.approx(true, abs=1e-4)


def point_of(record: dict, pixel: list) -> int:
    return record["pixel_coords"].tolist().index(pixel)


def test_a_task_needs_positive_values(tiny, distances, tmp_path, monkeypatch, capsys):
    """delta1 and the rewards are about ratios: a signed task ends the run, with the reason."""
    def signed(records, i, rng, point=None):
        query = height(records, i, rng, point)
        return render.replace(query, value=-query.value)

    monkeypatch.setitem(render.TASKS, "height", render.replace(HEIGHT, make=signed))
    argv = command(tiny, distances, tmp_path / "run", "--tasks", "height")
    message = refused(capsys, argv)
    assert "task 'height': the true value -" in message and "not a positive number" in message


def test_an_optimizer_is_one_line(tiny, distances, tmp_path, monkeypatch):
    """Another one in place of AdamW trains, and resumes bit for bit."""
    def sgd(params, lr, **options):
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    for out, parts in (("whole", [[]]), ("parts", [["--stop-after", 4], []])):
        for more in parts:
            train(tiny, distances, tmp_path / out, "--lr", 0.1, *more)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == parts and whole[-1] < whole[0]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_chat_is_mixed_in(tiny, distances, tmp_path):
    """The share of --mix, text-only samples and images among them."""
    path = write_jsonl(tmp_path / "chat.jsonl", [
        {"question": "Who are you?", "answer": "A model."},
        {"question": "Which?", "answer": "That.", "image": str(distances.parent / "000.png")}])
    args = train_sft.parse_args(["--mix", f"{path}:0.25"])
    assert args.mix == (str(path), 0.25)
    assert train_sft.parse_args(["--mix", str(path)]).mix == (str(path), train_sft.MIX_SHARE)
    assert train_sft.parse_args([]).mix == (None, 0.0)

    checkpoint, plain = samples_of(tiny, distances)
    datasets = [(plain.streams[0].records, 1.0)]
    streams = train_sft.make_streams(datasets, {"distance": (1.0, [])}, 0.25)
    mixed = train_sft.Samples(streams, checkpoint, plain.crop, 0,
                              chats=train_sft.read_chats(str(path)))
    drawn = [mixed[i] for i in range(200)]
    talk = [sample for sample in drawn if sample["task"] == "chat"]
    assert 30 < len(talk) < 70 and not any(sample["bad"] for sample in drawn)
    assert {len(sample["sizes"]) for sample in talk} == {0, 1}
    texts = {checkpoint.tokenizer.decode(sample["input_ids"][sample["prompt_length"]:])
             for sample in talk}
    assert texts == {"A model.<|im_end|>", "That.<|im_end|>"}


@pytest.mark.parametrize("name", ["tiny", "tiny_pixtral"])
def test_control_tokens_in_a_text_are_text(name, request, tmp_path):
    """What a user writes ends no turn and is no image: its tokens spell it, letter by letter."""
    checkpoint = render.open_checkpoint(str(request.getfixturevalue(name)), quiet=True)
    special = checkpoint.tokenizer.added_tokens_encoder
    assert {checkpoint.family.image_token, checkpoint.tokenizer.eos_token} < special.keys()
    black = [render.View(np.zeros((checkpoint.grid,) * 2 + (3,), np.uint8), (1.0,) * 6, (1.0, 1.0),
                         (0, 0))]
    for token in special:
        text = f"What is {token} for, {token}{token}?"
        tokens = checkpoint.tokens(text)
        assert not {*tokens} & {*special.values()}
        assert checkpoint.tokenizer.decode(tokens) == text
        for views in ([], black):
            whole, plain = (render.encode(checkpoint, views, question)["input_ids"].tolist()
                            for question in (text, "@"))
            inside = checkpoint.tokens("@")
            at = next(k for k in range(len(plain)) if plain[k:k + len(inside)] == inside)
            assert whole == plain[:at] + tokens + plain[at + len(inside):]
            assert whole.count(checkpoint.image_id) == len(views)

    chats = write_jsonl(tmp_path / "chat.jsonl", [
        {"question": f"And {token}?", "answer": f"{token} is a token."} for token in special])
    samples = train_sft.Samples([train_sft.Stream("chat", None, 1.0)], checkpoint, CROP, 0,
                                chats=train_sft.read_chats(str(chats)))
    for i in range(20):
        sample = samples[i]
        answer = sample["input_ids"][sample["prompt_length"]:].tolist()
        assert answer[-1] == checkpoint.end_id
        assert not {*answer[:-1]} & {*special.values()}
        assert sample["sizes"] == [] and not sample["bad"]
        render.pack([sample])


@pytest.mark.parametrize("line", [
    {"question": 5, "answer": "a"}, {"question": "", "answer": "a"}, {"answer": "a"},
    {"question": ["q"], "answer": "a"}, {"question": "q", "answer": {"a": 1}},
    {"question": "q" * 30_000, "answer": "a"}, {"question": "q", "answer": "a" * 30_000},
    {"question": "q", "answer": "a", "image": 3}, {"question": "q", "answer": "a", "image": ["b"]}])
def test_chats_of_a_wrong_form(tmp_path, line):
    """A text that is none, or longer than the limit, is a line with file, number and remedy; for a
    probe, which needs no answer, too."""
    good = {"question": "q" * 20_000, "answer": "a", "image": None}
    path = write_jsonl(tmp_path / "chat.jsonl", [good, line])
    for answers in (True, False):
        with pytest.raises(ValueError, match="chat.jsonl, line 2: .* 20,000 characters") as error:
            train_sft.read_chats(str(path), answers)
        assert len(str(error.value)) < 300
    write_jsonl(path, [good])
    assert train_sft.read_chats(str(path)) == [good]


def test_bad_chats(tmp_path):
    path = tmp_path / "chat.jsonl"
    for share in ("0", "1", "nan", "-0.1"):
        with pytest.raises(argparse.ArgumentTypeError, match="between 0 and 1"):
            train_sft.weighted(train_sft.MIX_SHARE, 1)(f"{path}:{share}")
    for line, say in (("{", "line 1"), ('{"question": "Who?"}', "answer"), ("", "holds no")):
        path.write_text(line)
        with pytest.raises(ValueError, match=say):
            train_sft.read_chats(str(path))
    with pytest.raises(ValueError, match="no such file"):
        train_sft.read_chats("nowhere.jsonl")


def test_text_only_micro_batches_on_two_processes(tiny, distances, tmp_path):
    """One process with images, the other with text alone: all of them run the vision tower, so
    nothing hangs; the image that is added for that changes nothing."""
    chats = write_jsonl(tmp_path / "chat.jsonl", [{"question": "Who are you?",
                                                   "answer": "A model."}])
    for processes in (0, 2):
        train(tiny, distances, tmp_path / str(processes), "--mix", f"{chats}:0.6",
              "--micro-batch", 1, "--samples", 24, processes=processes)
    one, two = (losses(tmp_path / str(n)) for n in (0, 2))
    assert one == pytest.approx(two, abs=2e-4)


SEEN = [*({"camera": camera} for camera in render.CAMERAS), {"prompt": "release"},
        {"prompt": "text"}, {"marker": "cross", "marker_size": 9, "focal": 80.0}]


@pytest.mark.parametrize("change", SEEN, ids=lambda c: "-".join(map(str, c.values())))
def test_what_was_trained_is_what_is_queried(change, tiny, distances, tmp_path, monkeypatch):
    """Each camera strategy, prompt, marker and focal length goes into depthlm.json; evaluate.py and
    pointcloud.py show the model the same, pixel for pixel and word for word, without being told."""
    import pointcloud
    out, shown, encode = tmp_path / "run", [], render.encode
    flags = [word for key, value in change.items()
             for word in (f"--{key.replace('_', '-')}", value)]
    train(tiny, distances, out, *flags, "--samples", 8)
    stored = json.loads((out / "depthlm.json").read_text())
    assert {key: stored[key] for key in change} == change
    query = evaluate.query_of(render.Records(distances), "distance", (0, 0))
    settings = {**render.DEFAULTS, "focal": 100, **change}
    views, question, _ = render.render(query, settings, 28)

    def look(checkpoint, views, question, *answer):
        shown.append((views[0].pixels, question))
        return encode(checkpoint, views, question, *answer)

    monkeypatch.setattr(render, "encode", look)
    evaluate.main([str(out), "--data", str(distances), "--all", "--workers", "0",
                   "--max-new-tokens", "2"])
    fx, fy, cx, cy, *_ = query.records[0]["intrinsics"]
    x, y = query.points[0]
    with pytest.raises(SystemExit):  # hardly trained: it says no distance
        pointcloud.main([str(out), query.records[0]["image"], "--at", f"{x:g},{y:g}",
                         "--intrinsics", f"{fx},{fy},{cx},{cy}", "--decode", "greedy",
                         "--max-new-tokens", "2"])
    for pixels, text in (shown[0], shown[-1]):
        assert (pixels == views[0].pixels).all() and text == question


# --------------------------------------------------------------------------------------------------
# recipes, flags and errors


def table5(recipe=None):
    args = train_sft.parse_args([f"@{ROOT / 'runs' / recipe}"] if recipe else [])
    return {key: getattr(args, key) for key in (
        "samples", "batch", "lr", "schedule", "warmup", "clip", "focal", "crop", "checkpointing")}


def test_recipes_hold_the_values_of_table_5():
    shared = {"schedule": "cosine", "warmup": 0.1, "crop": [1000, 1400, 700, 1200],
              "checkpointing": True}
    assert table5("sft_3b.args") == {**shared, "samples": 35e6, "batch": 1280, "lr": 5.2e-5,
                                     "clip": 0.1, "focal": 1000}
    assert table5("sft_7b.args") == {**shared, "samples": 60e6, "batch": 1280, "lr": 1.0e-4,
                                     "clip": 0.5, "focal": 1000}
    assert table5("sft_pixtral_12b.args") == {**shared, "samples": 23e6, "batch": 384,
                                              "lr": 5.6e-5, "clip": 1.0, "focal": 750}
    # None: the family's default, 1000
    assert table5() == {**table5("sft_3b.args"), "focal": None}
    overridden = train_sft.parse_args([f"@{ROOT / 'runs' / 'sft_3b.args'}", "--lr", "1e-4"])
    assert overridden.lr == 1e-4


def test_default_data_is_the_mixture_and_says_what_is_missing(tmp_path, monkeypatch, capsys,
                                                              distances):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no training data"):
        train_sft.default_data()
    for name in ("waymo", "matterport3d"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(distances, tmp_path / "data" / name / "train.jsonl")
    capsys.readouterr()
    assert train_sft.default_data() == [("data/waymo/train.jsonl", 1),
                                        ("data/matterport3d/train.jsonl", 0.1)]
    assert "argoverse2" in capsys.readouterr().err


@pytest.mark.parametrize("text, expected", [
    ("a.jsonl", ("a.jsonl", 1.0)), ("a.jsonl:0.1", ("a.jsonl", 0.1)),
    ("C:/x/train.jsonl", ("C:/x/train.jsonl", 1.0)),
    ("C:/x/train.jsonl:0.5", ("C:/x/train.jsonl", 0.5)),
    ("col:on/room/train.jsonl", ("col:on/room/train.jsonl", 1.0)),
    ("col:on/room/train.jsonl:2", ("col:on/room/train.jsonl", 2.0)),
    ("there:0.5", ("there:0.5", 1.0)), ("there:0.5:0.1", ("there:0.5", 0.1)),
    ("absent:0.5", ("absent", 0.5))])
def test_weights_of_files(text, expected, tmp_path, monkeypatch):
    """What is behind the last colon is a weight if it is a number, and no file is called so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:0.5").touch()
    assert train_sft.weighted(1.0)(text) == expected


@pytest.mark.parametrize("text", ["a.jsonl:0", "a.jsonl:-1", "a.jsonl:nan", "a.jsonl:inf", "",
                                  " ", ":1"])
def test_bad_weights_of_files(text):
    with pytest.raises(argparse.ArgumentTypeError, match="positive and finite|empty path"):
        train_sft.weighted(1.0)(text)


def test_weights_of_tasks():
    args = train_sft.parse_args(["--tasks", "distance", "speed:0.5"])
    assert args.tasks == [("distance", (1.0, [])), ("speed", (0.5, []))]
    args = train_sft.parse_args(["--tasks", "motion:1@argoverse2", "axis@nyuv2,toy"])
    assert args.tasks == [("motion", (1.0, ["argoverse2"])), ("axis", (1.0, ["nyuv2", "toy"]))]


@pytest.mark.parametrize("flag, value, message", [
    ("--batch", 0, "0 is not 1 or more"), ("--batch", 1.5, "1.5 is not a whole number"),
    ("--samples", 0, "0 is not 1 or more"), ("--samples", "many", "invalid number value: 'many'"),
    ("--micro-batch", 0, "0 is not 1 or more"), ("--lr", "nan", "nan is not greater than 0"),
    ("--lr", "inf", "inf is not greater than 0"), ("--lr", 0, "0 is not greater than 0"),
    ("--warmup", 2, "2 is not 0 or more and at most 1"), ("--clip", -1, "-1 is not greater than 0"),
    ("--seed", -1, "-1 is not 0 or more"), ("--stop-after", 0, "0 is not 1 or more"),
    ("--save-every", 0, "0 is not 1 or more"), ("--log-every", 0, "0 is not 1 or more"),
    ("--val-every", -1, "-1 is not 0 or more"), ("--workers", -1, "-1 is not 0 or more"),
    ("--focal", 0, "0 is not greater than 0"), ("--out", "", "is an empty path"),
    ("--data", "a.jsonl:0", "a.jsonl:0: what follows ':' has to be positive and finite"),
    ("--data", "", "is an empty path"), ("--tasks", "smell", "smell is no task; there are dist"),
    ("--tasks", "distance:0", "distance:0: what follows ':' has to be positive and finite"),
    ("--mix", "chat.jsonl:2", "chat.jsonl:2: what follows ':' has to be between 0 and 1")])
def test_bad_flags(capsys, flag, value, message):
    """One line with the flag's name, and exit code 2."""
    line = refused(capsys, ["--data", "a.jsonl", flag, value])
    assert f"error: argument {flag}: {message}" in line


def test_usage_errors_stand_alone(capsys):
    for words, message in ((["--focal", "0"], "argument --focal: 0 is not greater than 0"),
                           (["@nope.args"], "No such file or directory: 'nope.args'"),
                           (["--tpyo", "3"], "unrecognized arguments: --tpyo 3")):
        with pytest.raises(SystemExit) as stop:
            train_sft.main(words)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and message in said
        assert said.endswith(". See --help.\n") and said.count("\n") == 1


@pytest.mark.parametrize("processes", [0, 2])
def test_interrupted_is_one_line(tiny, distances, tmp_path, processes):
    """Ctrl-C: one line of ours, however many processes (torchrun adds its own); the same command
    resumes."""
    argv = command(tiny, distances, tmp_path / "run", "--save-every", 1, "--samples", 80_000)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [sys.executable, *launch[:4 * bool(processes)], ROOT / "train_sft.py", *argv]
    run = subprocess.Popen(list(map(str, script)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
    while not run.stdout.readline().startswith("step 2/"):
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=120)
    ours = [line for line in said.splitlines() if "error: " in line]
    assert ours == ["error: interrupted. Give the same command again to resume."]
    assert processes or (run.returncode == 130 and "Traceback" not in said)
    assert json.loads((tmp_path / "run/resume/state.json").read_text())["step"] >= 1


def test_interrupted_before_the_first_save(tiny, distances, tmp_path, capsys):
    """What a run writes before it saves, the scores of step 0 among it, is no other run."""
    out = tmp_path / "run"
    flags = ["--val", distances, "--val-queries", 2, "--save-every", 10, "--samples", 16]
    train(tiny, distances, out, *flags, "--stop-after", 1)
    for path in out.iterdir():
        if path.name not in ("run.json", "log.jsonl", "log.png"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (out / "log.png").exists()
    train(tiny, distances, out, *flags)
    assert [line["step"] for line in log_of(out) if "loss" in line] == [1, 2]


def test_errors_are_one_line(tiny, distances, reference, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    (tmp_path / "other" / "run.json").write_text("{}")
    line = refused(capsys, command(tiny, distances, tmp_path / "other"))
    assert "exists, is not empty, and has no run to resume" in line
    for more, message in (
            (["--model", tmp_path / "nowhere"], "no such checkpoint"),
            (["--data", tmp_path / "empty.jsonl"], "empty.jsonl: holds no record"),
            (["--data", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
            (["--samples", 7], "--samples 7: less than one batch of 8"),
            (["--val", tmp_path / "none.jsonl", "--val-every", 1], "none.jsonl: no such file")):
        (tmp_path / "empty.jsonl").write_text("")
        line = refused(capsys, command(tiny, distances, tmp_path / "run", *more))
        assert line.startswith("error: ") and message in line
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]  # nothing begun


def test_batch_divides_among_the_processes(tiny, distances, tmp_path):
    argv = command(tiny, distances, tmp_path / "run", "--batch", 5)
    done = run_script("train_sft.py", *argv, processes=2)
    assert done.returncode and "--batch 5: 5 do not divide among 2 processes" in done.stderr


def test_not_finite_stops_before_the_weights_are_ruined(tiny, distances, tmp_path, capsys):
    out = tmp_path / "run"
    line = refused(capsys, command(tiny, distances, out, "--lr", 1e30, "--schedule", "constant",
                                   "--warmup", 0, "--save-every", 1))
    assert "not finite" in line and "--lr" in line
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_unreadable_images_are_replaced_and_counted_but_not_many(tiny, distances, tmp_path,
                                                                 capsys):
    folder = shutil.copytree(distances.parent, tmp_path / "data")
    (folder / "002.png").write_bytes(b"not an image")
    _, samples = samples_of(tiny, folder / "train.jsonl")
    batch = train_sft.collate([samples[i] for i in range(30)])
    assert 0 < len(batch["bad"]) < 20 and "002.png" in batch["bad"][0]
    assert len(batch["segments"]) == 31
    argv = command(tiny, folder / "train.jsonl", tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_sft.main(argv)
    skipped, line = capsys.readouterr().err.strip().splitlines()[-2:]
    assert stop.value.code == 2 and "more than 1%" in line
    assert skipped.startswith("skipped: ") and "002.png" in skipped


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"),
                    reason="mounts a small tmpfs")
@pytest.mark.parametrize("free", [300_000, 3_000_000], ids=["model", "state"])
def test_a_full_disk_leaves_the_last_state(tiny, distances, tmp_path, capsys, free):
    """The model does not fit, or the model does and the state does not."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        out = small / "run"
        train(tiny, distances, out, "--stop-after", 2)
        before = (out / "resume" / "state.json").read_text()
        filler = small / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small).free - free))
        line = refused(capsys, command(tiny, distances, out))
        assert line.startswith("error: ") and "MiB free" in line
        assert (out / "resume" / "state.json").read_text() == before
        assert weights(out)  # a whole model
        filler.unlink()
        train(tiny, distances, out)
        assert math.isfinite(losses(out)[-1]) and len(losses(out)) == 10
        assert sorted(p.name for p in out.glob("*safetensors*")) == ["model.safetensors"]
    finally:
        subprocess.run(["umount", small])
