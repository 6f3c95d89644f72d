"""train_grpo.py: rewards, sampling, the shared prefix against plain copies, the gradient, whole
runs."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, plain_inputs, run_script, stock, views_for
from safetensors.torch import load_file

import evaluate
import render
import train_grpo
import train_sft

CPU = torch.device("cpu")
PAPER = dict(render.DEFAULTS)
RELEASE = {**render.DEFAULTS, "prompt": "release"}
GROUP, LENGTH, TEMPERATURE = 3, 6, 0.7
CROP = (56, 112, 56, 112)
# four steps of 4 prompts
FLAGS = ["--focal", 100, "--crop", *CROP, "--prompt", "paper", "--batch", 4, "--samples", 16,
         "--group", 4, "--max-new-tokens", 20, "--micro-batch", 3, "--rollout-batch", 2,
         "--lr", 2e-3, "--workers", 0, "--val-every", 0, "--dtype", "float32",
         "--temperature", 0.9, "--reward", "absrel", "--seed", 1]


@pytest.fixture
def one_process():
    evaluate.setup_distributed()
    yield
    dist.destroy_process_group()


def load(folder):
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    return evaluate.load_model(checkpoint, CPU, torch.float32)


def prompts_of(folder, sizes=((2, 2), (4, 3), (3, 5))):
    """Checkpoint, samples of different image sizes with values, and their views."""
    checkpoint, samples, views = render.open_checkpoint(str(folder), quiet=True), [], []
    for k, size in enumerate(sizes):
        views.append(views_for(checkpoint, [size], seed=k))
        question, _ = render.wording("distance", RELEASE if k % 2 else PAPER)
        sample = render.encode(checkpoint, views[-1], question)
        samples.append({**sample, "task": "distance", "value": 1.0 + k, "bad": []})
    return checkpoint, samples, views


def fixed_answers(checkpoint, samples, group=GROUP, length=LENGTH, seed=0):
    """Random tokens with end tokens at different places: tokens, mask (B, G, T)."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(60, 120, (len(samples), group, length)))
    ends = torch.from_numpy(rng.integers(0, length + 2, (len(samples), group)))
    # at once, at the very last, never
    ends[0, 0], ends[0, 1], ends[-1, -1] = 0, length - 1, length + 1
    column = torch.arange(length)
    tokens = torch.where(column >= ends[..., None], checkpoint.end_id, tokens)
    return tokens, column <= ends[..., None]


def naive_logps(model, folder, checkpoint, sample, views, tokens, mask):
    """One prompt, its answers (G, T): a padded batch of G copies of image and prompt in
    transformers' own model."""
    group, n = len(tokens), len(sample["input_ids"])
    plain = plain_inputs(folder, checkpoint, sample, views)
    inputs = {key: torch.cat([value] * group) for key, value in plain.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    if "mm_token_type_ids" in inputs:
        text = torch.zeros_like(tokens, dtype=torch.int32)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], 1)
    attention = torch.cat([torch.ones(group, n, dtype=torch.long), mask.long()], 1)
    logits = model(**inputs, attention_mask=attention).logits[:, n - 1:-1] / TEMPERATURE
    video = getattr(model.config, "video_token_id", None)
    banned = [checkpoint.image_id] if video is None else [checkpoint.image_id, video]
    logits[..., banned] = -math.inf
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def answers_of(groups: list[list[str]], **more) -> list[list[dict]]:
    """Texts as answers that ended by themselves, or of which `more` is true."""
    return [[{"text": text, **more} for text in group] for group in groups]


def uniform_for(rows, group=GROUP, length=LENGTH, seed=0):
    return torch.from_numpy(np.stack([train_grpo.uniforms(seed, i, group, length)
                                      for i in range(rows)]))


# --------------------------------------------------------------------------------------------------
# rewards


def test_rewards_by_hand():
    worst = train_grpo.WORST
    for kind, pred, true, expected in (
            ("delta1", 2.4, 2.0, 1), ("delta1", 2.5, 2.0, 0), ("delta1", 1.61, 2.0, 1),
            ("delta1", -2.0, 2.0, 0), ("delta1", None, 2.0, 0),
            ("absrel", 2.5, 2.0, -0.25), ("l1", 2.5, 2.0, -0.5), ("l2", 2.5, 2.0, -0.25),
            ("l1", 0.0, 2.0, -2.0), ("l1", 1e300, 2.0, -2 * worst),
            ("l2", 1e300, 2.0, -(2 * worst) ** 2), ("absrel", -1e308, 2.0, -worst),
            ("l1", None, 3.0, -3 * worst), ("l2", None, 3.0, -(3 * worst) ** 2),
            ("absrel", None, 80.0, -worst), ("absrel", 0.5, 0.0, -worst),
            ("l1", None, 0.0, -0.01 * worst)):
        found = train_grpo.REWARDS[kind](pred, true)
        assert found == pytest.approx(expected), (kind, pred, true)


@pytest.mark.parametrize("reward", train_grpo.REWARDS)
def test_no_answer_raises_and_none_is_worse_than_one_without_a_number(reward):
    texts = ["", " ", "<answer>", "<answer> </answer>", "no idea", "1 or 2 or 3", "9" * 400,
             "1e999", "-3", "nan", "<answer> 2.0 </answer>",
             "<think> x </think> <answer> 1e308 </answer>", "\ufffd\ud83d", "2.3.4.5", "0"]
    sample = {"task": "distance", "value": 2.0}
    scores = train_grpo.score_answers(answers_of([texts]), [sample], reward, 0.0, RELEASE)
    assert scores["reward"].isfinite().all() and scores["reward"].shape == (1, len(texts))
    lowest = train_grpo.REWARDS[reward](None, 2.0)
    assert (scores["reward"] >= lowest).all()
    assert (scores["reward"][scores["parsed"] == 0] == lowest).all()
    assert scores["reward"].argmax() == texts.index("<answer> 2.0 </answer>")


def test_format_reward():
    good = ["<think> The point is around 2.35 meters away from the camera. </think>\n\n"
            "<answer> 2.35 </answer>",
            "<think> The point is located about 3 meters from the camera. </think>, "
            "<answer> 3 </answer>",
            " <think></think><answer>0.5</answer>\n",
            "<think> a\nb < c </think> <answer> 12 </answer>"]
    think = "<think> x </think> "
    bad = ["", "2.35", "<answer> 2 </answer>", think + "<answer> 2 m </answer>",
           think + "<answer> -2 </answer>", think + "<answer> </answer>",
           "<think> x <answer> 2 </answer>", think + "<answer> 2",
           think + "<answer> 2 </answer> and more", "so " + think + "<answer> 2 </answer>",
           think + think + "<answer> 2 </answer>",
           think + "<answer> 2 </answer> <answer> 3 </answer>"]
    found = [render.has_form(text, "distance", RELEASE) for text in good + bad]
    assert found == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize("task", render.TASKS)
def test_what_sft_teaches_has_the_form(task):
    """With every prompt and camera strategy that a task has a wording for."""
    ways = [{"prompt": prompt} for prompt in render.PROMPTS]
    ways += [{"camera": camera} for camera in render.CAMERAS]
    more = {"right": "12", "side": "left", "up": "3", "updown": "below"}
    for way in ways:
        settings = {**render.DEFAULTS, **way}
        try:
            _, answer = render.wording(task, settings)
        except ValueError:
            assert task != "distance"
            continue
        text = answer.format(x="2.35", **more)
        assert render.has_form(text, task, settings), (task, way)
        assert not render.has_form(text + " So.", task, settings)
        assert not render.has_form(answer.format(x="few", **more), task, settings)
        assert render.parse_answer(text, task) == 2.35


def test_format_reward_of_an_answer_with_more_than_its_number():
    """--camera ray: the direction is any word, the distance a plain number."""
    ray = {**render.DEFAULTS, "camera": "ray"}
    form = "The point is around {} degrees to the {}, {} degrees {} and {} meters away from the " \
           "camera."
    good = [form.format("12", "left", "3", "above", "2.35"),
            form.format("0", "right", "45", "below", "10")]
    bad = [form.format("12", "left", "3", "above", "some"),
           form.format("12", "left", "3", "above", "-2"),
           form.format("12", "left", "", "above", "2.35"),
           form.format("12", "far left", "3", "above", "2.35"),
           render.wording("distance", PAPER)[1].format(x="2.35")]
    found = [render.has_form(text, "distance", ray) for text in good + bad]
    assert found == [True] * len(good) + [False] * len(bad)


def test_format_weight():
    sample = {"task": "distance", "value": 2.0}
    texts = [["<think> x </think> <answer> 2.5 </answer>", "2.5"]]
    for weight in (0.0, 0.5):
        scores = train_grpo.score_answers(answers_of(texts), [sample], "l1", weight, RELEASE)
        assert scores["reward"].tolist() == [[-0.5 + weight, -0.5]]
        assert scores["reward_l1"].tolist() == [[-0.5, -0.5]]
        assert scores["reward_format"].tolist() == [[1, 0]]
        assert scores["sampled_delta1"].tolist() == [[0, 0]]


@pytest.mark.parametrize("reward", train_grpo.REWARDS)
def test_a_cut_number_earns_nothing(reward):
    """A number that the token limit may have cut is no number: reward, parsed and sampled_delta1
    are those of an answer without one; behind the number the limit may come."""
    sample = {"task": "distance", "value": 2.0}
    cut = ["The point is around 2", "The point is around 2.", "The point is around 2.00",
           "The point is around 2.00 m", "<think> x </think> <answer> 2.0", "<think> 2.0 m, then",
           "<think> x </think> <answer> 2.0 </ans"]
    whole = ["The point is around 2.00 meters away", "<think> x </think> <answer> 2.0 </answer>"]
    scores = train_grpo.score_answers(answers_of([cut + whole], truncated=True), [sample], reward,
                                      0.0, RELEASE)
    lowest, best = (train_grpo.REWARDS[reward](pred, 2.0) for pred in (None, 2.0))
    assert scores["reward"].tolist() == [[lowest] * len(cut) + [best] * 2]
    for key in ("parsed", "sampled_delta1"):
        assert scores[key].tolist() == [[0.0] * len(cut) + [1.0] * 2]
    assert (scores["truncated"] == 1).all()
    ended = train_grpo.score_answers(answers_of([cut[:3]]), [sample], reward, 0.0, RELEASE)
    assert (ended["reward"] == best).all() and (ended["truncated"] == 0).all()


# --------------------------------------------------------------------------------------------------
# advantages


def test_advantages():
    rewards = torch.tensor([[1.0, 2, 3, 6], [-5, -5, -5, 7]], dtype=torch.float64)
    before = rewards.clone()
    std, mean = (train_grpo.group_advantages(rewards, kind) for kind in ("std", "mean"))
    assert torch.equal(rewards, before)
    assert mean.tolist() == [[-2, -1, 0, 3], [-3, -3, -3, 9]]
    assert torch.allclose(std, mean / torch.tensor([[3.5 ** 0.5], [27 ** 0.5]]).double())
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(train_grpo.group_advantages(rewards[:, order]), std[:, order])
    # a reward's unit does not matter
    assert torch.allclose(train_grpo.group_advantages(100 * rewards - 7), std)


@pytest.mark.parametrize("kind", ["std", "mean"])
def test_group_without_variance_gives_exactly_zero(kind):
    rewards = torch.tensor([[0.1] * 7, [-1 / 3] * 7, [1e-9, 0, 0, 0, 0, 0, 0]],
                           dtype=torch.float64)
    advantages = train_grpo.group_advantages(rewards, kind)
    assert (advantages[:2] == 0).all() and advantages.isfinite().all() and advantages[2, 0] > 0
    assert train_grpo.no_variance(rewards).tolist() == [True, True, False]


def test_equal_prompts_stay_groups_of_their_own():
    sample = {"task": "distance", "value": 2.0}
    texts = [["2", "2"], ["1", "3.5"]]
    scores = train_grpo.score_answers(answers_of(texts), [sample, sample], "l1", 0.0,
                                      RELEASE)
    assert train_grpo.group_advantages(scores["reward"]).tolist() == [[0, 0], [1, -1]]


# --------------------------------------------------------------------------------------------------
# sampling


def test_tokens_are_drawn_from_the_whole_distribution():
    torch.manual_seed(0)
    logps = train_grpo.log_policy(torch.randn(200), 1.0, torch.tensor([7, 8]))
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    drawn = train_grpo.draw_tokens(logps.expand(len(uniform), -1), uniform)
    counts = torch.bincount(drawn, minlength=200).double()
    expected = logps.double().exp() * len(drawn)
    keep = torch.tensor([i not in (7, 8) for i in range(200)])
    assert counts[~keep].sum() == 0 and (counts[keep] > 0).all()  # no top-k
    chi_square = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi_square < 270  # of 197 degrees: p = 0.0005


def test_edges_of_the_random_number_give_possible_tokens():
    logps = torch.tensor([-math.inf, math.log(0.25), -math.inf, math.log(0.75), -math.inf])
    below_one = 1 - 2 ** -53
    for uniform, token in ((0.0, 1), (0.2499999, 1), (0.2500001, 3), (below_one, 3)):
        uniform = torch.tensor(uniform, dtype=torch.float64)
        assert train_grpo.draw_tokens(logps, uniform) == token
    # float32 sums would end above or below 1
    even = torch.full((150_000,), math.log(1 / 150_000))
    uniform = torch.tensor(below_one, dtype=torch.float64)
    assert train_grpo.draw_tokens(even, uniform) == 149_999


def test_random_numbers_are_a_pure_function_of_seed_and_prompt():
    first = train_grpo.uniforms(0, 5, 8, 4)
    assert np.array_equal(first, train_grpo.uniforms(0, 5, 8, 4)) and first.shape == (4, 8)
    # the limit of tokens changes nothing before it
    assert np.array_equal(first, train_grpo.uniforms(0, 5, 8, 9)[:4])
    assert len(np.unique(first)) == first.size
    assert not np.array_equal(first, train_grpo.uniforms(0, 6, 8, 4))
    assert not np.array_equal(first, train_grpo.uniforms(1, 5, 8, 4))


def test_image_tokens_are_banned_in_both(tiny, one_process):
    """Even where the model wants nothing else, for such an answer would crash the update."""
    checkpoint, samples, _ = prompts_of(tiny)
    model = load(tiny)
    banned = train_grpo.banned_tokens(model, checkpoint)
    assert banned.tolist() == [checkpoint.image_id, model.config.video_token_id]
    model.lm_head.register_forward_hook(lambda module, inputs, logits:
                                        logits.index_fill(-1, banned, 50.0))
    rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform_for(3), 1.0)
    mask = rollout.mask
    assert not torch.isin(rollout.tokens, banned).any() and (rollout.logps[mask] > -20).all()
    again = train_grpo.answer_logps(model, checkpoint, samples, rollout.tokens, 1.0)
    assert torch.allclose(again[mask], rollout.logps[mask], atol=1e-5)


def test_generation_config_changes_nothing(tiny, tmp_path, one_process):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.1,
               "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    rollouts = []
    for path in (tiny, folder):
        checkpoint, samples, _ = prompts_of(path)
        rollouts.append(train_grpo.sample_answers(load(path), checkpoint, samples, uniform_for(3),
                                                  TEMPERATURE))
    one, two = rollouts
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.logps, two.logps)
    assert len(one.tokens.unique()) > 10


def test_an_answer_ends_where_evaluation_ends_it(tiny, one_process):
    """At each of the checkpoint's end tokens, not only at the tokenizer's."""
    checkpoint, samples, _ = prompts_of(tiny)
    model = load(tiny)
    free = train_grpo.sample_answers(model, checkpoint, samples, uniform_for(3), TEMPERATURE)
    other = int(free.tokens[1, 2, 3])
    checkpoint.stop_ids = checkpoint.stop_ids | {other}
    rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform_for(3), TEMPERATURE)
    tokens, mask = rollout.tokens, rollout.mask
    assert checkpoint.end_id != other and int(mask[1, 2].sum()) <= 4
    assert torch.equal(tokens[mask], free.tokens[mask])
    assert train_grpo.ends_answer(checkpoint, tokens[1, 2, mask[1, 2]]).tolist()[-1]
    assert mask.sum() < mask.numel() and (tokens[~mask] == checkpoint.end_id).all()


def test_mask_holds_the_end_token_and_nothing_behind(tiny, one_process, monkeypatch):
    checkpoint, samples, _ = prompts_of(tiny)
    end = checkpoint.end_id
    script = iter([[[60, end, 62], [60, 61, end], [60, 61, 62]],
                   [[63, 64, 65], [63, end, 65], [end, 64, 65]],
                   [[end, 67, end], [end, 67, 68], [66, end, end]]])
    monkeypatch.setattr(train_grpo, "draw_tokens",
                        lambda logps, uniform: torch.tensor(next(script)))
    # 6 numbers, 3 needed: it stops
    rollout = train_grpo.sample_answers(load(tiny), checkpoint, samples, uniform_for(3), 1.0)
    tokens, mask = rollout.tokens, rollout.mask
    assert tokens.shape == mask.shape == rollout.logps.shape == (3, GROUP, LENGTH)
    assert mask.sum(2).tolist() == [[3, 1, 3], [3, 2, 1], [2, 3, 3]]
    answers = [[t[m].tolist() for t, m in zip(*group)] for group in zip(tokens, mask)]
    assert answers == [[[60, 63, end], [end], [62, 65, end]],
                       [[60, 63, end], [61, end], [end]],
                       [[60, end], [61, 64, end], [62, 65, end]]]
    found = train_grpo.rollout_answers(checkpoint, rollout)
    assert found[0][1] == {"text": ""}
    assert found[1][1] == {"text": checkpoint.tokenizer.decode([61])}

    scores = train_grpo.score_answers(found, samples, "l1", 1.0, RELEASE)
    means = train_grpo.log_means(rollout, scores)
    assert means["length"] == pytest.approx(21 / 9) and means["truncated"] == 0
    mask[0, 0, 2] = False  # as if the limit had come first
    found = train_grpo.rollout_answers(checkpoint, rollout)
    assert found[0][0] == {"text": checkpoint.tokenizer.decode([60, 63]), "truncated": True}
    scores = train_grpo.score_answers(found, samples, "l1", 1.0, RELEASE)
    assert train_grpo.log_means(rollout, scores)["truncated"] == pytest.approx(1 / 9)


def test_parts_of_a_rollout():
    """A part is as wide as its longest answer; parts are joined in order."""
    lengths = torch.tensor([[2, 1], [1, 1], [4, 3]])
    mask = torch.arange(5) < lengths[..., None]
    tokens = torch.arange(30).view(3, 2, 5)
    whole = train_grpo.Rollout(tokens, mask, -0.5 * tokens)
    for rows, width in ((slice(0, 1), 2), (slice(1, 2), 1), (slice(0, 2), 2), (slice(2, 3), 4),
                        (slice(1, 9), 4)):
        part = whole.part(rows)
        for name in ("tokens", "mask", "logps"):
            expected = getattr(whole, name)[rows, :, :width]
            assert torch.equal(getattr(part, name), expected), (rows, name)
        assert part.mask.sum() == mask[rows].sum()  # no token is lost
    halves = [train_grpo.Rollout(tokens[rows], mask[rows], -0.5 * tokens[rows])
              for rows in (slice(0, 1), slice(1, 3))]
    joined = train_grpo.Rollout.join(halves)
    for name in ("tokens", "mask", "logps"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


# --------------------------------------------------------------------------------------------------
# the shared prefix


def test_log_probs_of_rollout_update_and_plain_copies_agree(family, one_process):
    """Prompts of different sizes in one batch, after the model has seen another prompt: leaves
    behind one prefill, the tree row, and transformers' own model with a copy of the image for each
    answer."""
    checkpoint, samples, views = prompts_of(family)
    model = load(family)
    other = evaluate.pack_prompts(checkpoint, prompts_of(family, [(6, 2)])[1])
    evaluate.prefill(model, checkpoint, other)
    rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform_for(3), TEMPERATURE)
    tokens, mask = rollout.tokens, rollout.mask
    assert len(tokens.unique()) > 10
    updated = train_grpo.answer_logps(model.train(), checkpoint, samples, tokens, TEMPERATURE)
    with torch.no_grad():
        plain = torch.stack([naive_logps(stock(family), family, checkpoint, *rest)
                             for rest in zip(samples, views, tokens, mask)])
    assert (rollout.logps - updated)[mask].abs().max() < 1e-5
    assert (plain - updated)[mask].abs().max() < 1e-5


def test_gradient_equals_plain_copies(family, one_process):
    """Loss and gradient of all parameters against G copies of each prompt, answers of different
    lengths."""
    checkpoint, samples, views = prompts_of(family)
    tokens, mask = fixed_answers(checkpoint, samples)
    advantages = torch.randn(3, GROUP, generator=torch.Generator().manual_seed(0))
    model, plain = load(family).train(), stock(family)
    logps = train_grpo.answer_logps(model, checkpoint, samples, tokens, TEMPERATURE)
    train_grpo.grpo_loss(logps, mask, advantages)[0].backward()
    for sample, view, t, m, a in zip(samples, views, tokens, mask, advantages):
        logps = naive_logps(plain, family, checkpoint, sample, view, t, m)
        (-(a[:, None] * logps)[m].sum()).backward()
    ours, theirs = ({n: p.grad for n, p in x.named_parameters() if p.grad is not None}
                    for x in (model, plain))
    assert ours.keys() == theirs.keys() and any("vis" in name for name in ours)
    error = sum((ours[name] - grad).square().sum() for name, grad in theirs.items()).sqrt()
    assert error / sum(grad.square().sum() for grad in theirs.values()).sqrt() < 1e-5


def test_each_image_is_encoded_once_and_no_prompt_is_copied(tiny, one_process):
    checkpoint, samples, _ = prompts_of(tiny)
    model, seen = load(tiny), []
    model.model.visual.register_forward_hook(lambda module, inputs, output:
                                             seen.append(len(inputs[0])))
    model.model.language_model.layers[0].register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[:2]))
    patches = sum(len(sample["pixels"][0]) for sample in samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform_for(3), 1.0)
    steps = int(rollout.mask.sum(2).max()) - 1
    assert seen == [patches, (1, sum(lengths))] + [(3, GROUP)] * steps
    seen.clear()
    train_grpo.answer_logps(model, checkpoint, samples, rollout.tokens, 1.0)
    assert seen == [patches, (3, max(lengths) + GROUP * (LENGTH - 1))]


def test_tree_mask_by_hand():
    mask = train_grpo.tree_mask(torch.tensor([0, 1]), 2, 2, 2)
    assert mask.shape == (2, 6, 6)
    # prompt prompt a a b b
    rows = ["100000", "110000", "111000", "111100", "110010", "110011"]
    assert ["".join(str(int(x)) for x in row) for row in mask[0]] == rows
    # padding sees itself, nobody sees it
    rows = ["100000", "010000", "011000", "011100", "010010", "010011"]
    assert ["".join(str(int(x)) for x in row) for row in mask[1]] == rows


# --------------------------------------------------------------------------------------------------
# the update, as the loop makes it


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def command(model, world, out, *more) -> list[str]:
    return list(map(str, ["--model", model, "--data", world, "--out", out, *FLAGS, *more]))


class Watched(torch.optim.AdamW):
    """AdamW that keeps the gradients of its steps."""
    seen = []

    def step(self):
        self.seen.append([p.grad.full_tensor().clone() for p in self.param_groups[0]["params"]])
        super().step()


@pytest.fixture
def update(tiny, world, tmp_path, monkeypatch):
    """-> a function: one step of a run on fixed prompts, answers and advantages (times `scale`) ->
    its line of the log, and the gradients."""
    checkpoint, samples, _ = prompts_of(tiny)
    tokens, mask = fixed_answers(checkpoint, samples)
    advantages = torch.randn(3, GROUP, generator=torch.Generator().manual_seed(0)).double()
    given = [tokens, mask, torch.zeros(tokens.shape)]
    before = [x.clone() for x in given]
    monkeypatch.setattr(train_sft, "Samples", lambda *a, **k: samples)
    monkeypatch.setattr(train_grpo, "sample_answers", lambda *a: train_grpo.Rollout(*given))
    monkeypatch.setattr(torch.optim, "AdamW", Watched)

    def run(*more, scale=1.0):
        Watched.seen = []
        monkeypatch.setattr(train_grpo, "group_advantages", lambda *a: scale * advantages)
        out = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        train_grpo.main(command(tiny, world, out, "--batch", 3, "--samples", 3, "--group", GROUP,
                                "--max-new-tokens", LENGTH, "--temperature", TEMPERATURE,
                                "--rollout-batch", 3, "--clip", 1e9, *more))
        assert all(torch.equal(a, b) for a, b in zip(before, given))  # nothing given is changed
        return log_of(out)[-1], Watched.seen[0]

    run.mask = mask
    return run


UPDATE = ("loss", "grad_norm", "nll", "kl", "logp_gap", "tokens")


def test_gradient_does_not_depend_on_the_micro_batch_or_on_checkpointing(update):
    line, gradients = update("--micro-batch", 3, "--no-checkpointing")
    assert line["tokens"] == update.mask.sum() < update.mask.numel() and line["grad_norm"] > 1e-3
    assert line["logp_gap"] == pytest.approx(line["nll"])  # log p of the rollout is given as 0
    for more in (["--micro-batch", 1], ["--micro-batch", 2], ["--micro-batch", 2, "--reshard"],
                 ["--micro-batch", 2, "--checkpointing"]):
        other, theirs = update("--no-checkpointing", *more)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(gradients, theirs))
        # the log is no mean of means, and not the last micro-batch's
        assert {key: other[key] for key in UPDATE} == pytest.approx(
            {key: line[key] for key in UPDATE}, rel=1e-5, abs=2e-6)


def test_no_advantage_no_gradient(update):
    line, gradients = update(scale=0.0)
    assert line["grad_norm"] == 0 and line["loss"] == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_kl_by_hand():
    """q/p - log(q/p) - 1 of each token of an answer, q the reference's probability."""
    logps, reference = torch.tensor([[[0.5, 0.25, 0.9]]]).log(), torch.tensor([[[0.25] * 3]]).log()
    mask, advantages = torch.tensor([[[True, True, False]]]), torch.tensor([[2.0]])
    loss, k3 = train_grpo.grpo_loss(logps, mask, advantages, reference, 0.1)
    assert k3.item() == pytest.approx(0.5 - math.log(0.5) - 1)
    assert loss.item() == pytest.approx(-2 * math.log(0.5 * 0.25) + 0.1 * k3.item())


def test_kl_to_the_reference_model(update, monkeypatch):
    """No divergence from itself, and a gradient back to it once it differs."""
    models, shard_model, factor = [], train_sft.shard_model, [1.0]

    def shard_and_scale(*args, **options):
        models.append(shard_model(*args, **options))
        if len(models) % 2 == 0:  # the reference comes second
            with torch.no_grad():
                for p in models[-1].parameters():
                    p.mul_(factor[0])
        return models[-1]

    monkeypatch.setattr(train_sft, "shard_model", shard_and_scale)
    line, gradients = update("--kl-coef", 1.0, scale=0.0)
    assert abs(line["kl"]) < 1e-6 and max(g.abs().max() for g in gradients) < 1e-4
    factor[0] = 1.05
    line, _ = update("--kl-coef", 1.0, scale=0.0)
    assert line["kl"] > 1e-3 and line["grad_norm"] > 1e-3
    assert line["loss"] == pytest.approx(line["kl"])
    assert all(p.grad is None for p in models[-1].parameters())

    # with adapters it is the model without them: one model, which differs once they do
    adapters, reset = ("--lora", 2, "--freeze", "vision"), train_sft.reset_adapters
    for spread in (0.0, 0.05):
        models.clear()
        monkeypatch.setattr(train_sft, "reset_adapters", lambda model: spread_adapters(
            model, reset, spread))
        line, _ = update("--kl-coef", 1.0, *adapters, scale=0.0)
        assert len(models) == 1 and (line["kl"] > 1e-3) == (spread > 0)


def spread_adapters(model, reset, spread: float) -> None:
    reset(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.fill_(spread)


def test_not_finite_stops(update, capsys):
    with pytest.raises(SystemExit):
        update(scale=math.nan)
    assert "not finite" in capsys.readouterr().err and not Watched.seen


class Endless:
    """Two prompts over and over."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, i):
        return self.samples[i % len(self.samples)]


def test_it_learns_which_token_pays(tiny, world, tmp_path, monkeypatch):
    """A bandit: one token an answer, the first half of the vocabulary pays."""
    _, samples, _ = prompts_of(tiny, [(2, 2), (3, 2)])
    monkeypatch.setattr(train_sft, "Samples", lambda *a, **k: Endless(samples))
    monkeypatch.setattr(train_grpo, "rollout_answers", lambda checkpoint, rollout: answers_of(
        [[str(token) for token, in group] for group in rollout.tokens.tolist()]))
    monkeypatch.setitem(train_grpo.REWARDS, "low", lambda pred, true: float(pred < 256))
    out = tmp_path / "run"
    train_grpo.main(command(tiny, world, out, "--batch", 2, "--samples", 30, "--group", 16,
                            "--max-new-tokens", 1, "--temperature", 1.0, "--reward", "low",
                            "--format-weight", 0, "--lr", 1e-2))
    paid = [line["reward_low"] for line in log_of(out)]
    assert len(paid) == 15 and np.mean(paid[:2]) < 0.7 and np.mean(paid[-2:]) > 0.85


@pytest.mark.parametrize("reshard", ["--reshard", "--no-reshard"])
def test_rollout_sees_the_weights_after_the_step(tiny, world, tmp_path, monkeypatch, reshard):
    """Gathered weights could be stale. The reference is the model as it was saved."""
    out, sample_answers, gaps = tmp_path / "run", train_grpo.sample_answers, []

    def sample_and_compare(model, checkpoint, samples, *args):
        rollout = sample_answers(model, checkpoint, samples, *args)
        if (out / "model.safetensors").is_file():
            again = train_grpo.answer_logps(load(out), checkpoint, samples, rollout.tokens, 0.9)
            gaps.append((again - rollout.logps)[rollout.mask].abs().max().item())
        return rollout

    monkeypatch.setattr(train_grpo, "sample_answers", sample_and_compare)
    train_grpo.main(command(tiny, world, out, "--samples", 12, "--save-every", 1, "--lr", 1e-2,
                            reshard, "--checkpointing"))
    assert len(gaps) == 4 and max(gaps) < 1e-5  # two parts of a rollout, in the steps 2 and 3
    assert max(line["logp_gap"] for line in log_of(out)) < 1e-5


# --------------------------------------------------------------------------------------------------
# whole runs


def moved_apart(one: Path, two: Path, start: Path) -> float:
    """How far two runs are from each other over how far they went. Not 1e-7: Adam makes steps of
    rounding, where a gradient is nearly 0."""
    a, b, s = weights(one), weights(two), weights(start)
    apart, went = (sum((x[name] - y[name]).square().sum() for name in a).sqrt()
                   for x, y in ((a, b), (a, s)))
    assert went > 0.1
    return float(apart / went)


@pytest.fixture(scope="module")
def taught(tiny, world, tmp_path_factory) -> Path:
    """A tiny model that says the sentence with one number or another, so that answers of a group
    differ in reward."""
    out = tmp_path_factory.mktemp("grpo") / "taught"
    flags = ["--out", out, "--data", world, "--model", tiny, "--focal", 100, "--crop", *CROP,
             "--batch", 16, "--micro-batch", 16, "--samples", 640, "--lr", 5e-3, "--workers", 0,
             "--val-every", 0, "--no-checkpointing"]
    train_sft.main(list(map(str, flags)))
    return out


@pytest.fixture(scope="module")
def reference(taught, world, tmp_path_factory) -> Path:
    """Four steps of one process, with validation."""
    out = tmp_path_factory.mktemp("grpo") / "reference"
    train_grpo.main(command(taught, world, out, "--val", world, "--val-every", 2,
                            "--val-queries", 12))
    return out


def test_log(reference, world):
    lines = log_of(reference)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    steps = [line for line in lines if "reward" in line]
    checks = [line["val"] for line in lines if "val" in line]
    assert len(steps) == 4 and len(checks) == 3
    for line in steps:
        assert {"reward", "reward_std", "reward_absrel", "reward_format", "parsed",
                "sampled_delta1", "no_variance", "length", "truncated", "loss", "grad_norm", "lr",
                "tokens", "nll", "kl", "logp_gap", "bad", "rollout_s", "update_s", "wait_s",
                "prompts_per_s", "answer"} <= line.keys()
        assert line["lr"] == 2e-3 and line["logp_gap"] < 1e-5 and 8 <= line["length"] <= 20
        assert line["no_variance"] < 1 and line["reward_std"] > 0 and line["grad_norm"] > 0
        assert line["parsed"] > 0 and 0 <= line["truncated"] <= 1
        assert line["tokens"] == pytest.approx(line["length"] * 16)
        parts = line["reward_absrel"] + line["reward_format"]
        assert line["reward"] == pytest.approx(parts, abs=1e-5)
    flags = json.loads((reference / "run.json").read_text())["flags"]
    assert (flags["lr"], flags["group"], flags["reward"]) == (2e-3, 4, "absrel")
    assert json.loads((reference / "depthlm.json").read_text())["prompt"] == "paper"

    # the validation is evaluate.py's own
    evaluate.main(list(map(str, [reference, "--data", world, "--queries", 12, "--workers", 0])))
    metrics = json.loads((reference / "eval" / "metrics.json").read_text())
    found = metrics["datasets"]["world"]
    assert checks[-1]["world"]["delta1"] == pytest.approx(found["delta1"], abs=1e-6)
    assert checks[-1]["world"]["unparsed"] == found["unparsed"]
    assert checks[-1]["world"]["n"] == found["n"] == 12


def test_an_answer_to_read(taught, world, tmp_path, monkeypatch, capsys):
    """Each --log-every steps the log and the console have an answer of the first prompt, with its
    reward; and the console the shares of answers that were parsed, in form, cut off."""
    told, score, advantages_of = [], train_grpo.score_answers, train_grpo.group_advantages

    def look(answers, samples, *args):
        scores = score(answers, samples, *args)
        told.append((answers[0], samples[0]["value"], scores["reward"][0].tolist(),
                     advantages_of(scores["reward"])[0].tolist()))
        return scores

    monkeypatch.setattr(train_grpo, "score_answers", look)
    out = tmp_path / "run"
    capsys.readouterr()
    train_grpo.main(command(taught, world, out, "--log-every", 2, "--max-new-tokens", 15))
    printed = capsys.readouterr().out
    lines = log_of(out)
    assert [line["step"] for line in lines if "answer" in line] == [2, 4]
    assert len({json.dumps(line["answer"]) for line in lines if "answer" in line}) == 2
    for line, (answers, true, rewards, advantages) in list(zip(lines, told))[1::2]:
        answer = line["answer"]
        assert set(answer) - {"truncated"} == {"text", "true", "reward", "advantage"}
        found = [k for k in range(4) if answers[k].items() <= answer.items()
                 and abs(rewards[k] - answer["reward"]) < 1e-4
                 and abs(advantages[k] - answer["advantage"]) < 1e-3]
        assert found and answer["true"] == pytest.approx(true, abs=1e-4)
        shown = printed.split(f"step {line['step']}/4  ")[1].split("\nstep")[0]
        assert repr(answer["text"]) in shown and f"true {answer['true']:g}" in shown
        shares = re.search(r"parsed (\d+)%  format (\d+)%  truncated (\d+)%", shown).groups()
        for share, key in zip(shares, ("parsed", "reward_format", "truncated")):
            assert int(share) == pytest.approx(100 * line[key], abs=0.51)
    assert "step 1/4" not in printed and "step 3/4" not in printed
    assert 0 < lines[1]["truncated"]  # 15 tokens are too few for some


def test_answers_longer_than_the_limit(taught, world, tmp_path, capsys):
    """All answers are cut inside of their numbers: the log and the console say that none of them is
    parsed; nothing is learnt."""
    out = tmp_path / "run"
    train_grpo.main(command(taught, world, out, "--samples", 4, "--max-new-tokens", 6,
                            "--val", world, "--val-every", 1, "--val-queries", 4))
    steps = [line for line in log_of(out) if "reward" in line]
    assert [line["truncated"] for line in steps] == [1.0]
    assert all(line["parsed"] == line["sampled_delta1"] == 0 for line in steps)
    assert all(line["no_variance"] == 1 and line["loss"] == 0 for line in steps)
    printed = capsys.readouterr().out
    assert "truncated 100%" in printed and "(4 of 4 truncated)" in printed
    checks = [line["val"]["world"] for line in log_of(out) if "val" in line]
    assert all(check["unparsed"] == check["truncated"] == check["n"] == 4 for check in checks)


def limits_seen(monkeypatch) -> list[int]:
    """How many tokens evaluate.py's greedy answers may have, in each call from now on."""
    limits, greedy = [], evaluate.greedy_answers

    def look(model, checkpoint, batch, max_new_tokens):
        limits.append(max_new_tokens)
        return greedy(model, checkpoint, batch, max_new_tokens)

    monkeypatch.setattr(evaluate, "greedy_answers", look)
    return limits


def test_token_limit_is_one_for_rollout_validation_and_evaluation(taught, world, tmp_path,
                                                                  monkeypatch):
    """--max-new-tokens; without it that of the checkpoint; the result keeps it."""
    drawn, uniforms = [], train_grpo.uniforms

    def look(seed, prompt, group_size, max_new_tokens):
        drawn.append(max_new_tokens)
        return uniforms(seed, prompt, group_size, max_new_tokens)

    monkeypatch.setattr(train_grpo, "uniforms", look)
    limits = limits_seen(monkeypatch)
    out, again = tmp_path / "run", tmp_path / "again"
    more = ["--samples", 4, "--val", world, "--val-every", 1, "--val-queries", 4]
    train_grpo.main(command(taught, world, out, *more, "--max-new-tokens", 7))
    assert set(drawn) == {7} and set(limits) == {7} and len(limits) == 2
    assert json.loads((out / "depthlm.json").read_text())["max_new_tokens"] == 7

    limits.clear()
    evaluate.main(list(map(str, [out, "--data", world, "--queries", 4, "--workers", 0])))
    assert set(limits) == {7}

    drawn.clear(), limits.clear()
    argv = command(out, world, again, *more)
    at = argv.index("--max-new-tokens")
    train_grpo.main(argv[:at] + argv[at + 2:])
    assert set(drawn) == {7} and set(limits) == {7}
    assert json.loads((again / "depthlm.json").read_text())["max_new_tokens"] == 7


def test_prompt_of_the_checkpoint_is_kept(tiny, world, tmp_path):
    """One that was trained for another prompt is not made to think; a base model is, as in Sec.
    3.2; a flag wins."""
    ours = shutil.copytree(tiny, tmp_path / "ours")
    (ours / "depthlm.json").write_text(json.dumps({**render.DEFAULTS, "prompt": "text"}))
    cases = ((ours, [], "text"), (tiny, [], "release"), (ours, ["--prompt", "paper"], "paper"),
             (tiny, ["--prompt", "paper"], "paper"))
    for k, (model, more, prompt) in enumerate(cases):
        out = tmp_path / str(k)
        argv = command(model, world, out, "--samples", 1, "--batch", 1, "--group", 2,
                       "--max-new-tokens", 2)
        at = argv.index("--prompt")
        train_grpo.main(argv[:at] + argv[at + 2:] + more)
        assert json.loads((out / "depthlm.json").read_text())["prompt"] == prompt


def test_a_reward_is_one_entry(taught, world, tmp_path, monkeypatch, capsys):
    """A new entry of REWARDS is a reward that --reward knows and that is trained on."""
    def log_ratio(pred, true):
        return -abs(math.log(pred / true)) if pred is not None and pred > 0 else -3.0

    out = tmp_path / "run"
    argv = command(taught, world, out, "--reward", "log")
    with pytest.raises(SystemExit) as stop:
        train_grpo.main(argv)
    assert stop.value.code == 2 and "--reward: invalid choice: 'log'" in capsys.readouterr().err

    monkeypatch.setitem(train_grpo.REWARDS, "log", log_ratio)
    train_grpo.main(argv)
    lines = log_of(out)
    assert len(lines) == 4
    for line in lines:
        parts = line["reward_log"] + line["reward_format"]
        assert -3 <= line["reward_log"] < 0 and line["reward"] == pytest.approx(parts, abs=1e-5)
        assert line["grad_norm"] > 0
    assert not equal(weights(out), weights(taught))


def double(records, i, rng, point=None):
    """A new task: there and back [m]."""
    query = render.distance(records, i, rng, point)
    return render.replace(query, task="double", value=2 * query.value)


def test_a_task_is_one_row(taught, world, tmp_path, monkeypatch):
    """A new row of TASKS is rewarded, validated and scored; its answers need the form of its own
    wording."""
    monkeypatch.setitem(render.TASKS, "double", render.Task(double, {
        "paper": ("How many meters is it to this point and back?",
                  "The point is around {x} meters away from the camera.")}, render.METERS))
    values, score = [], train_grpo.score_answers

    def look(texts, samples, *args):
        values.extend(sample["value"] for sample in samples)
        assert {sample["task"] for sample in samples} == {"double"}
        return score(texts, samples, *args)

    monkeypatch.setattr(train_grpo, "score_answers", look)
    out = tmp_path / "run"
    train_grpo.main(command(taught, world, out, "--tasks", "double", "--val", world,
                            "--val-every", 4, "--val-queries", 5))
    records = render.Records(world)
    known = {round(2 * depth, 6) for i in range(len(records)) for depth in records[i]["depth"]}
    assert len(values) == 16 and {round(value, 6) for value in values} <= known
    log = log_of(out)
    assert log[1]["reward_format"] > 0  # the model was taught this sentence
    assert log[0]["val"]["world"]["n"] == log[-1]["val"]["world"]["n"] == 5
    evaluate.main(list(map(str, [out, "--data", world, "--queries", 5, "--workers", 0])))
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    assert list(metrics["datasets"]) == ["world/double"]


def test_stopped_and_resumed_is_bit_equal(reference, taught, world, tmp_path):
    out = tmp_path / "run"
    train_grpo.main(command(taught, world, out, "--stop-after", 3))
    train_grpo.main(command(taught, world, out))
    assert equal(weights(out), weights(reference)) and not equal(weights(out), weights(taught))
    clocks = {"rollout_s", "update_s", "wait_s", "prompts_per_s"}
    ours, theirs = ([{key: value for key, value in line.items() if key not in clocks}
                     for line in log_of(folder) if "reward" in line]
                    for folder in (out, reference))
    assert ours == theirs


def test_each_prompt_of_a_run_has_random_numbers_of_its_own(taught, world, tmp_path, monkeypatch):
    drawn, uniforms = [], train_grpo.uniforms

    def look(*args):
        drawn.append(args)
        return uniforms(*args)

    monkeypatch.setattr(train_grpo, "uniforms", look)
    train_grpo.main(command(taught, world, tmp_path / "run", "--samples", 8))
    assert drawn == [(1, k, 4, 20) for k in range(8)]


def test_batch_of_answers_and_rollout_batch(reference, taught, world, tmp_path):
    """16 answers are 4 prompts; how many are answered together changes nothing."""
    out = tmp_path / "run"
    train_grpo.main(command(taught, world, out, "--batch", 16, "--batch-of", "answers",
                            "--rollout-batch", 4, "--micro-batch", 1))
    counts = [[line["tokens"] for line in log_of(folder) if "tokens" in line]
              for folder in (out, reference)]
    assert counts[0] == counts[1]
    assert moved_apart(out, reference, taught) < 1e-3


MORE = ["--reshard", "--checkpointing", "--kl-coef", "0.1"]
LORA = [*MORE, "--lora", "2", "--freeze", "vision", "--offload"]
TWO = """
import json, sys, torch, torch.distributed as dist
root, folder, *runs = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import evaluate, train_grpo, train_sft
from test_train_grpo import prompts_of, uniform_for
rank, world, device = opened = evaluate.setup_distributed()

# answers of 3 tokens on rank 0, of 6 on rank 1: how many forward passes?
checkpoint, samples, _ = prompts_of(folder, [(2, 2), (4, 3)] if rank else [(3, 3), (2, 5)])
model = train_sft.shard_model(checkpoint.folder, device, torch.float32)
passes, drawn, draw = [], [], train_grpo.draw_tokens
model.register_forward_hook(lambda *a: passes.append(1))
def script(logps, uniform):
    drawn.append(1)
    token = checkpoint.end_id if len(drawn) > (2, 5)[rank] else 60 + len(drawn)
    return torch.full(logps.shape[:2], token)
train_grpo.draw_tokens = script
with train_sft.gathered(model, True):
    rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform_for(2, length=20), 1.0)
train_grpo.draw_tokens, counted, gap = draw, len(passes), 0.0
for k in range(2):
    part = rollout.part(slice(k, k + 1))
    logps = train_grpo.answer_logps(model, checkpoint, samples[k:k + 1], part.tokens, 1.0)
    (logps * part.mask).sum().backward()
    gap = max(gap, ((logps - part.logps) * part.mask).abs().max().item())
found = [None, None]
lengths = rollout.mask.sum(2).unique().tolist()
dist.all_gather_object(found, [lengths, counted, gap < 1e-5])
if rank == 0:
    print("found", json.dumps(found), flush=True)

# one start for all runs
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
evaluate.setup_distributed = lambda: opened
for run in runs:
    train_grpo.main(json.loads(run))
destroy()
"""


def test_two_processes_equal_one(reference, taught, world, tmp_path):
    """The runs of `reference`, with MORE and with LORA; before them, that both ranks run the same
    number of forward passes."""
    (tmp_path / "two.py").write_text(TWO)
    cases = [(reference, tmp_path / "plain", [])]
    for name, more in (("more", MORE), ("lora", LORA)):
        train_grpo.main(command(taught, world, tmp_path / name, *more))
        cases.append((tmp_path / name, tmp_path / f"{name}_two", more))
    runs = [json.dumps(command(taught, world, two, *more)) for _, two, more in cases]
    done = run_script(tmp_path / "two.py", ROOT, taught, *runs, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("found", 1)[1].splitlines()[0])
    assert found == [[[3], 6, True], [[6], 6, True]]  # lengths, forward passes, log probs agree
    for one, two, more in cases:
        pairs = [[line for line in log_of(folder) if "reward" in line] for folder in (one, two)]
        for a, b in zip(*pairs, strict=True):
            same = ("reward", "reward_std", "tokens", "length", "parsed", "nll", "grad_norm",
                    "loss", "kl")
            assert {key: a[key] for key in same} == pytest.approx(
                {key: b[key] for key in same}, rel=1e-4, abs=2e-6)
        assert moved_apart(one, two, taught) < 1e-3
        assert (pairs[1][-1]["kl"] > 0) == bool(more)


@pytest.mark.slow
def test_killed_at_any_moment_it_can_be_resumed(reference, taught, world, tmp_path):
    """kill -9 while a state is being written; the result is that of one run."""
    out = tmp_path / "run"
    run = [sys.executable, str(ROOT / "train_grpo.py"),
           *command(taught, world, out, "--save-every", 1)]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = out / "resume" / "state.json"
    while process.poll() is None and not (state.is_file() and list(out.glob("resume/.step_*"))):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train_grpo.main(command(taught, world, out))
    assert equal(weights(out), weights(reference))
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert sorted(os.listdir(out / "resume")) == ["state.json", "step_00000004"]


def test_a_second_run_in_the_same_folder_is_refused(reference, taught, world, capsys):
    with render.lock_folder(reference), pytest.raises(SystemExit) as stop:
        train_grpo.main(command(taught, world, reference))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"{reference}: another run is at work in it" in line


# --------------------------------------------------------------------------------------------------
# recipe and errors


def test_recipe_is_table_5():
    args = train_grpo.parse_args([f"@{ROOT / 'runs' / 'grpo_3b.args'}"])
    assert (args.model, args.focal) == ("Qwen/Qwen2.5-VL-3B-Instruct", 1000)
    assert (args.lr, args.schedule, args.warmup, args.clip) == (1e-5, "constant", 0.0, 1.0)
    assert (args.batch, args.group, args.kl_coef, args.samples) == (32, 8, 0.0, 8e3)
    assert (args.checkpointing, args.prompt, args.reward) == (True, "release", "l1")
    default = vars(train_grpo.parse_args([]))
    changed = {key for key, value in vars(args).items() if value != default[key]}
    # focal and prompt are None by default: a base model then gets these values, too
    # (test_prompt_of_the_checkpoint_is_kept)
    assert changed <= {"focal", "data", "prompt"}


@pytest.mark.parametrize("flag, value, message", [
    ("--group", 1, "1 is not 2 or more"), ("--temperature", 0, "0 is not greater than 0"),
    ("--max-new-tokens", 0, "0 is not 1 or more"), ("--rollout-batch", 0, "0 is not 1 or more"),
    ("--format-weight", -1, "-1 is not 0 or more"), ("--kl-coef", "nan", "nan is not 0 or more"),
    ("--batch", 0, "0 is not 1 or more"), ("--samples", 0, "0 is not 1 or more"),
    ("--micro-batch", 0, "0 is not 1 or more"), ("--lr", "nan", "nan is not greater than 0"),
    ("--warmup", 2, "2 is not 0 or more and at most 1"), ("--clip", -1, "-1 is not greater than 0"),
    ("--seed", -1, "-1 is not 0 or more"), ("--stop-after", 0, "0 is not 1 or more"),
    ("--out", "", "is an empty path"), ("--tasks", "smell", "smell is no task; there are dist")])
def test_bad_flags(taught, world, tmp_path, capsys, flag, value, message):
    """One line with the flag's name, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_grpo.main(command(taught, world, tmp_path / "run", flag, value))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"error: argument {flag}: {message}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--batch", 6, "--batch-of", "answers"],
     "--batch 6 answers are no whole number of groups of 4"),
    (["--batch", 2, "--batch-of", "answers"],
     "--batch 2 answers are no whole number of groups of 4"),
    (["--samples", 3], "--samples 3: less than one batch of 4"),
    (["--model", "/nowhere/model"], "/nowhere/model"),
    (["--data", "/nowhere/a.jsonl"], "/nowhere/a.jsonl"), (["--tasks", "motion"], "'pose'")])
def test_errors_are_one_line(taught, world, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_grpo.main(command(taught, world, out, *flags))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and len(text.strip().splitlines()) == 1
    assert not (out / "log.jsonl").exists() or not log_of(out)  # nothing begun


def test_other_numbers_cannot_be_resumed_and_a_used_folder_is_left_alone(reference, taught, world,
                                                                         capsys):
    for more, message in ((("--group", 8), "--group 4"),
                          (("--batch", 8), "--batch 4"),
                          (("--seed", 2), "--seed 1")):
        with pytest.raises(SystemExit):
            train_grpo.main(command(taught, world, reference, *more))
        assert message in capsys.readouterr().err


def test_unreadable_images_are_replaced_and_many_end_the_run(taught, world, tmp_path, capsys):
    folder = shutil.copytree(world.parent, tmp_path / "broken")
    for image in ("001.png", "004.png"):
        (folder / image).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        train_grpo.main(command(taught, folder / "val.jsonl", tmp_path / "run",
                                "--samples", 400, "--batch", 20))
    text = capsys.readouterr().err
    assert "001.png" in text and "could not be read, more than 1%" in text
    assert log_of(tmp_path / "run")[0]["bad"] > 0
