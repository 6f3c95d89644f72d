"""train_grpo.py: rewards, sampling, the shared prefix against plain copies, the gradient, whole runs."""
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
from conftest import ROOT, plain_inputs, run_script, stock, views_for
from safetensors.torch import load_file

import evaluate
import render
import train_grpo
import train_sft

QUESTION = render.QUESTIONS["distance"]["release"]
GROUP, LENGTH, TEMPERATURE = 3, 6, 0.7
FLAGS = ["--focal", 100, "--crop", 56, 112, 56, 112, "--prompt", "paper", "--batch", 4, "--samples", 16, "--group", 4,
         "--max-new-tokens", 20, "--micro-batch", 3, "--rollout-batch", 2, "--lr", 2e-3, "--workers", 0,
         "--val-every", 0, "--dtype", "float32", "--temperature", 0.9, "--reward", "absrel"]


@pytest.fixture
def one_process():
    train_sft.setup_distributed()
    yield
    dist.destroy_process_group()


def prompts_of(folder, sizes=((2, 2), (4, 3), (3, 5))):
    """Encoder, samples of different image sizes with values, and their views."""
    encoder, samples, views = render.load_encoder(str(folder)), [], []
    for k, size in enumerate(sizes):
        views.append(views_for(encoder, [size], seed=k))
        question = QUESTION if k % 2 else render.QUESTIONS["distance"]["paper"]
        samples.append({**render.encode(encoder, views[-1], question), "task": "distance", "value": 1.0 + k, "bad": []})
    return encoder, samples, views


def fixed_answers(encoder, samples, group=GROUP, length=LENGTH, seed=0):
    """Random tokens with end tokens at different places: tokens, mask (B, G, T)."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(60, 120, (len(samples), group, length)))
    ends = torch.from_numpy(rng.integers(0, length + 2, (len(samples), group)))
    ends[0, 0], ends[0, 1], ends[-1, -1] = 0, length - 1, length + 1  # at once, at the very last, never
    column = torch.arange(length)
    tokens = torch.where(column >= ends[..., None], encoder.end_id, tokens)
    return tokens, column <= ends[..., None]


def naive_logps(model, folder, encoder, sample, views, tokens, mask):
    """One prompt, its answers (G, T): a padded batch of G copies of image and prompt in transformers' own model."""
    group, (plain, n) = len(tokens), (plain_inputs(folder, encoder, sample, views), len(sample["input_ids"]))
    inputs = {k: torch.cat([v] * group) for k, v in plain.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    if "mm_token_type_ids" in inputs:
        text = torch.zeros_like(tokens, dtype=torch.int32)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], 1)
    attention = torch.cat([torch.ones(group, n, dtype=torch.long), mask.long()], 1)
    logits = model(**inputs, attention_mask=attention).logits[:, n - 1:-1] / TEMPERATURE
    video = getattr(model.config, "video_token_id", None)
    logits[..., [encoder.image_id] if video is None else [encoder.image_id, video]] = -math.inf
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def uniform_for(rows, group=GROUP, length=LENGTH, seed=0):
    return torch.from_numpy(np.stack([train_grpo.uniforms(seed, i, group, length) for i in range(rows)]))


# ----------------------------------------------------------------------------------------------------------------------
# rewards


def test_rewards_by_hand():
    worst = train_grpo.WORST
    for kind, pred, true, expected in (
            ("delta1", 2.4, 2.0, 1), ("delta1", 2.5, 2.0, 0), ("delta1", 1.61, 2.0, 1), ("delta1", -2.0, 2.0, 0),
            ("delta1", None, 2.0, 0), ("absrel", 2.5, 2.0, -0.25), ("l1", 2.5, 2.0, -0.5), ("l2", 2.5, 2.0, -0.25),
            ("l1", 0.0, 2.0, -2.0), ("l1", 1e300, 2.0, -2 * worst), ("l2", 1e300, 2.0, -(2 * worst) ** 2),
            ("absrel", -1e308, 2.0, -worst), ("l1", None, 3.0, -3 * worst), ("l2", None, 3.0, -(3 * worst) ** 2),
            ("absrel", None, 80.0, -worst), ("absrel", 0.5, 0.0, -worst), ("l1", None, 0.0, -0.01 * worst)):
        assert train_grpo.error_reward(kind, pred, true) == pytest.approx(expected), (kind, pred, true)


@pytest.mark.parametrize("reward", train_grpo.REWARDS)
def test_no_answer_raises_and_none_is_worse_than_one_without_a_number(reward):
    texts = ["", " ", "<answer>", "<answer> </answer>", "no idea", "1 or 2 or 3", "9" * 400, "1e999", "-3", "nan",
             "<answer> 2.0 </answer>", "<think> x </think> <answer> 1e308 </answer>", "\ufffd\ud83d", "2.3.4.5", "0"]
    sample = {"task": "distance", "value": 2.0}
    scores = train_grpo.score_answers([texts], [sample], reward, 0.0, "release")
    assert scores["reward"].isfinite().all() and scores["reward"].shape == (1, len(texts))
    lowest = train_grpo.error_reward(reward, None, 2.0)
    assert (scores["reward"] >= lowest).all() and (scores["reward"][scores["parsed"] == 0] == lowest).all()
    assert scores["reward"].argmax() == texts.index("<answer> 2.0 </answer>")


def test_format_reward():
    good = ["<think> The point is around 2.35 meters away from the camera. </think>\n\n<answer> 2.35 </answer>",
            "<think> The point is located about 3 meters from the camera. </think>, <answer> 3 </answer>",
            " <think></think><answer>0.5</answer>\n", "<think> a\nb < c </think> <answer> 12 </answer>"]
    think = "<think> x </think> "
    bad = ["", "2.35", "<answer> 2 </answer>", think + "<answer> 2 m </answer>", think + "<answer> -2 </answer>",
           think + "<answer> </answer>", "<think> x <answer> 2 </answer>", think + "<answer> 2",
           think + "<answer> 2 </answer> and more", "so " + think + "<answer> 2 </answer>",
           think + think + "<answer> 2 </answer>", think + "<answer> 2 </answer> <answer> 3 </answer>"]
    found = [train_grpo.format_reward(t, "distance", "release") for t in good + bad]
    assert found == [1.0] * len(good) + [0.0] * len(bad)
    for task in render.TASKS:  # what SFT teaches has the form, with every prompt
        for prompt in render.QUESTIONS[task]:
            text = render.answer_form(task, prompt).format(x="2.35")
            assert train_grpo.format_reward(text, task, prompt) == 1.0, (task, prompt)
            assert train_grpo.format_reward(text + " So.", task, prompt) == 0.0
            assert render.parse_answer(text, task) == 2.35


def test_format_weight():
    sample = {"task": "distance", "value": 2.0}
    texts = [["<think> x </think> <answer> 2.5 </answer>", "2.5"]]
    for weight in (0.0, 0.5):
        scores = train_grpo.score_answers(texts, [sample], "l1", weight, "release")
        assert scores["reward"].tolist() == [[-0.5 + weight, -0.5]] and scores["reward_l1"].tolist() == [[-0.5, -0.5]]
        assert scores["reward_format"].tolist() == [[1, 0]] and scores["sampled_delta1"].tolist() == [[0, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# advantages


def test_advantages():
    rewards = torch.tensor([[1.0, 2, 3, 6], [-5, -5, -5, 7]], dtype=torch.float64)
    before = rewards.clone()
    std, mean = (train_grpo.group_advantages(rewards, kind) for kind in ("std", "mean"))
    assert torch.equal(rewards, before)
    assert torch.allclose(mean, torch.tensor([[-2.0, -1, 0, 3], [-3, -3, -3, 9]], dtype=torch.float64))
    assert torch.allclose(std, mean / torch.tensor([[3.5 ** 0.5], [27 ** 0.5]]).double())
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(train_grpo.group_advantages(rewards[:, order]), std[:, order])
    assert torch.allclose(train_grpo.group_advantages(100 * rewards - 7), std)  # a reward's unit does not matter


@pytest.mark.parametrize("kind", ["std", "mean"])
def test_group_without_variance_gives_exactly_zero(kind):
    rewards = torch.tensor([[0.1] * 7, [-1 / 3] * 7, [1e-9, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    advantages = train_grpo.group_advantages(rewards, kind)
    assert (advantages[:2] == 0).all() and advantages.isfinite().all() and advantages[2, 0] > 0
    assert train_grpo.no_variance(rewards).tolist() == [True, True, False]


def test_equal_prompts_stay_groups_of_their_own():
    sample = {"task": "distance", "value": 2.0}
    scores = train_grpo.score_answers([["2", "2"], ["1", "3.5"]], [sample, sample], "l1", 0.0, "release")
    assert train_grpo.group_advantages(scores["reward"]).tolist() == [[0, 0], [1, -1]]


# ----------------------------------------------------------------------------------------------------------------------
# sampling


def test_tokens_are_drawn_from_the_whole_distribution():
    torch.manual_seed(0)
    logits = torch.randn(200)
    logps = train_grpo.log_policy(logits, 1.0, torch.tensor([7, 8]))
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    drawn = train_grpo.draw_tokens(logps.expand(len(uniform), -1), uniform)
    counts, expected = torch.bincount(drawn, minlength=200).double(), logps.double().exp() * len(drawn)
    keep = torch.tensor([i not in (7, 8) for i in range(200)])
    assert counts[~keep].sum() == 0 and (counts[keep] > 0).all()  # no top-k
    assert ((counts - expected)[keep] ** 2 / expected[keep]).sum() < 270  # chi^2 of 197 degrees: p = 0.0005


def test_edges_of_the_random_number_give_possible_tokens():
    logps = torch.tensor([-math.inf, math.log(0.25), -math.inf, math.log(0.75), -math.inf])
    for uniform, token in ((0.0, 1), (0.2499999, 1), (0.2500001, 3), (1 - 2 ** -53, 3)):
        assert train_grpo.draw_tokens(logps, torch.tensor(uniform, dtype=torch.float64)) == token
    tiny = torch.full((150_000,), math.log(1 / 150_000))  # float32 sums would end above or below 1
    assert train_grpo.draw_tokens(tiny, torch.tensor(1 - 2 ** -53, dtype=torch.float64)) == 149_999


def test_prompt_of_the_checkpoint_is_kept(tiny, tmp_path):
    """One that was trained for another prompt is not asked to think; a base model is, as in Sec. 3.2; a flag wins."""
    ours = shutil.copytree(tiny, tmp_path / "ours")
    (ours / "depthlm.json").write_text(json.dumps({**render.DEFAULTS, "prompt": "text"}))
    (base := shutil.copytree(tiny, tmp_path / "base")).joinpath("depthlm.json").unlink(missing_ok=True)
    flags = render.given_settings(train_grpo.parse_args([]))
    asked = [train_grpo.load_settings(str(folder), {**flags, **more}, quiet=True)["prompt"]
             for folder, more in ((ours, {}), (base, {}), (ours, {"prompt": "paper"}), (base, {"prompt": "paper"}))]
    assert asked == ["text", "release", "paper", "paper"]


def test_random_numbers_are_a_pure_function_of_seed_and_prompt():
    first = train_grpo.uniforms(0, 5, 8, 4)
    assert np.array_equal(first, train_grpo.uniforms(0, 5, 8, 4)) and first.shape == (4, 8)
    assert np.array_equal(first, train_grpo.uniforms(0, 5, 8, 9)[:4])  # the limit of tokens changes nothing before it
    assert not np.array_equal(first, train_grpo.uniforms(0, 6, 8, 4)) and len(np.unique(first)) == first.size
    assert not np.array_equal(first, train_grpo.uniforms(1, 5, 8, 4))


def test_image_tokens_are_banned_in_both(tiny, one_process):
    """Even where the model wants nothing else, for such an answer would crash the update."""
    encoder, samples, _ = prompts_of(tiny)
    model = evaluate.load_model(str(tiny), torch.device("cpu"), torch.float32)
    banned = train_grpo.banned_tokens(model, encoder)
    assert banned.tolist() == [encoder.image_id, model.config.video_token_id]
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, banned, 50.0))
    tokens, mask, logps = train_grpo.rollout(model, encoder, samples, uniform_for(3), 1.0)
    assert not torch.isin(tokens, banned).any() and (logps[mask] > -20).all()
    again = train_grpo.answer_logps(model, encoder, samples, tokens, 1.0)
    assert torch.allclose(again[mask], logps[mask], atol=1e-5)


def test_generation_config_changes_nothing(tiny, tmp_path, one_process):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "do_sample": True, "top_k": 1, "top_p": 0.1,
                                                               "temperature": 0.1, "repetition_penalty": 5.0}))
    encoder, samples, _ = prompts_of(tiny)
    rollouts = [train_grpo.rollout(evaluate.load_model(str(f), torch.device("cpu"), torch.float32), encoder, samples,
                                   uniform_for(3), TEMPERATURE) for f in (tiny, folder)]
    assert all(torch.equal(a, b) for a, b in zip(*rollouts)) and len(rollouts[0][0].unique()) > 10


def test_an_answer_ends_where_evaluation_ends_it(tiny, one_process):
    """At each of the checkpoint's end tokens, not only at the tokenizer's."""
    encoder, samples, _ = prompts_of(tiny)
    model = evaluate.load_model(str(tiny), torch.device("cpu"), torch.float32)
    free = train_grpo.rollout(model, encoder, samples, uniform_for(3), TEMPERATURE)[0]
    other = int(free[1, 2, 3])
    encoder.stop_ids = encoder.stop_ids | {other}
    tokens, mask, _ = train_grpo.rollout(model, encoder, samples, uniform_for(3), TEMPERATURE)
    assert int(mask[1, 2].sum()) <= 4 and torch.equal(tokens[mask], free[mask]) and encoder.end_id != other
    assert train_grpo.ends_answer(encoder, tokens[1, 2, mask[1, 2]]).tolist()[-1]
    assert mask.sum() < mask.numel() and (tokens[~mask] == encoder.end_id).all()


def test_mask_holds_the_end_token_and_nothing_behind(tiny, one_process, monkeypatch):
    encoder, samples, _ = prompts_of(tiny)
    model, end = evaluate.load_model(str(tiny), torch.device("cpu"), torch.float32), encoder.end_id
    script = iter([[[60, end, 62], [60, 61, end], [60, 61, 62]], [[63, 64, 65], [63, end, 65], [end, 64, 65]],
                   [[end, 67, end], [end, 67, 68], [66, end, end]]])
    monkeypatch.setattr(train_grpo, "draw_tokens", lambda logps, uniform: torch.tensor(next(script)))
    tokens, mask, _ = train_grpo.rollout(model, encoder, samples, uniform_for(3), 1.0)  # 6 numbers, 3 needed: it stops
    assert tokens.shape == mask.shape == (3, GROUP, LENGTH)
    assert mask.sum(2).tolist() == [[3, 1, 3], [3, 2, 1], [2, 3, 3]]
    answers = [[t[m].tolist() for t, m in zip(*g)] for g in zip(tokens, mask)]
    assert answers == [[[60, 63, end], [end], [62, 65, end]], [[60, 63, end], [61, end], [end]],
                       [[60, end], [61, 64, end], [62, 65, end]]]
    texts = train_grpo.decode_answers(encoder, tokens, mask)
    assert texts[0][1] == "" and texts[1][1] == encoder.tokenizer.decode([61])
    scores = train_grpo.score_answers(texts, samples, "l1", 1.0, "release")
    means = train_grpo.figures(encoder, scores, tokens, mask)
    assert means["length"] == pytest.approx(21 / 9) and means["truncated"] == 0
    mask[0, 0, 2] = False  # as if the limit had come first
    assert train_grpo.figures(encoder, scores, tokens, mask)["truncated"] == pytest.approx(1 / 9)


# ----------------------------------------------------------------------------------------------------------------------
# the shared prefix


def test_log_probs_of_rollout_update_and_plain_copies_agree(family, one_process):
    """Prompts of different sizes in one batch, after the model has seen another prompt: leaves behind one prefill, the
    tree row, and transformers' own model with a copy of the image for each answer."""
    encoder, samples, views = prompts_of(family)
    model = evaluate.load_model(str(family), torch.device("cpu"), torch.float32)
    evaluate.prefill(model, encoder, prompts_of(family, [(6, 2)])[1])
    tokens, mask, sampled = train_grpo.rollout(model, encoder, samples, uniform_for(3), TEMPERATURE)
    assert len(tokens.unique()) > 10
    updated = train_grpo.answer_logps(model.train(), encoder, samples, tokens, TEMPERATURE)
    with torch.no_grad():
        plain = torch.stack([naive_logps(stock(family), family, encoder, s, v, t, m)
                             for s, v, t, m in zip(samples, views, tokens, mask)])
    assert (sampled - updated)[mask].abs().max() < 1e-5 and (plain - updated)[mask].abs().max() < 1e-5


def test_gradient_equals_plain_copies(family, one_process):
    """Loss and gradient of all parameters against G copies of each prompt, answers of different lengths."""
    encoder, samples, views = prompts_of(family)
    tokens, mask = fixed_answers(encoder, samples)
    advantages = torch.randn(3, GROUP, generator=torch.Generator().manual_seed(0))
    model, plain = evaluate.load_model(str(family), torch.device("cpu"), torch.float32).train(), stock(family)
    logps = train_grpo.answer_logps(model, encoder, samples, tokens, TEMPERATURE)
    train_grpo.grpo_loss(logps, mask, advantages)[0].backward()
    for s, v, t, m, a in zip(samples, views, tokens, mask, advantages):
        (-(a[:, None] * naive_logps(plain, family, encoder, s, v, t, m))[m].sum()).backward()
    ours, theirs = ({n: p.grad for n, p in x.named_parameters() if p.grad is not None} for x in (model, plain))
    assert ours.keys() == theirs.keys() and any("vis" in n for n in ours)
    error = sum((ours[n] - g).square().sum() for n, g in theirs.items()).sqrt()
    assert error / sum(g.square().sum() for g in theirs.values()).sqrt() < 1e-5


def test_each_image_is_encoded_once_and_no_prompt_is_copied(tiny, one_process):
    encoder, samples, _ = prompts_of(tiny)
    model, seen = evaluate.load_model(str(tiny), torch.device("cpu"), torch.float32), []
    model.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    first = model.model.language_model.layers[0]
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:2]))
    patches, tokens = sum(len(s["pixels"][0]) for s in samples), sum(len(s["input_ids"]) for s in samples)
    answers, mask, _ = train_grpo.rollout(model, encoder, samples, uniform_for(3), 1.0)
    assert seen == [patches, (1, tokens)] + [(3, GROUP)] * (int(mask.sum(2).max()) - 1)
    seen.clear()
    train_grpo.answer_logps(model, encoder, samples, answers, 1.0)
    assert seen == [patches, (3, max(len(s["input_ids"]) for s in samples) + GROUP * (LENGTH - 1))]


def test_tree_mask_by_hand():
    mask = train_grpo.tree_mask(torch.tensor([0, 1]), 2, 2, 2)
    assert mask.shape == (2, 1, 6, 6)
    rows = ["100000", "110000", "111000", "111100", "110010", "110011"]  # prompt prompt a a b b
    assert ["".join(str(int(x)) for x in row) for row in mask[0, 0]] == rows
    rows = ["100000", "010000", "011000", "011100", "010010", "010011"]  # padding sees itself, nobody sees it
    assert ["".join(str(int(x)) for x in row) for row in mask[1, 0]] == rows


# ----------------------------------------------------------------------------------------------------------------------
# the update


class Keep:
    """An optimizer that only looks."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradients = {n: p.grad.full_tensor().clone() for n, p in self.model.named_parameters()}

    def zero_grad(self, set_to_none):
        self.model.zero_grad()


def update_of(folder, micro_batch, checkpointing=False, scale=1.0, **more):
    encoder, samples, _ = prompts_of(folder)
    tokens, mask = fixed_answers(encoder, samples)
    advantages = scale * torch.randn(3, GROUP, generator=torch.Generator().manual_seed(0)).double()
    model = train_sft.shard_model(str(folder), torch.device("cpu"), torch.float32, True, checkpointing).train()
    given = [tokens, mask, torch.zeros(tokens.shape), advantages, *(s["input_ids"] for s in samples)]
    before = [x.copy() if isinstance(x, np.ndarray) else x.clone() for x in given]
    keep = Keep(model)
    result = train_grpo.update(model, keep, encoder, samples, tuple(given[:3]), advantages, micro_batch,
                               TEMPERATURE, 1e9, **more)
    assert all(np.array_equal(a, b) for a, b in zip(before, given))  # nothing given is changed
    return result, keep.gradients, mask


def test_gradient_does_not_depend_on_the_micro_batch_or_on_checkpointing(tiny, one_process):
    (result, gradients, mask), *others = [update_of(tiny, *case) for case in ((3,), (1,), (2,), (2, True))]
    assert result["tokens"] == mask.sum() < mask.numel() and result["grad_norm"] > 1e-3
    for other, theirs, _ in others:
        assert all(torch.allclose(g, theirs[n], rtol=1e-4, atol=1e-7) for n, g in gradients.items())
        assert other == pytest.approx(result, rel=1e-5)  # the log is no mean of means, and not the last micro-batch's
    logps, real = -result["nll"] * result["tokens"], int(mask.sum())
    assert result["tokens"] == real and result["logp_gap"] == pytest.approx(-logps / real)  # rollout log p given as 0


def test_no_advantage_no_gradient(tiny, one_process):
    result, gradients, _ = update_of(tiny, 2, scale=0.0)
    assert result["grad_norm"] == 0 and all((g == 0).all() for g in gradients.values()) and result["loss"] == 0


def test_kl_estimate():
    logps = torch.log(torch.tensor([[[0.5, 0.25, 0.1]]])).requires_grad_()
    reference = torch.log(torch.tensor([[[0.5, 0.5, 0.9]]]))
    mask, zero = torch.tensor([[[True, True, False]]]), torch.zeros(1, 1)
    loss, k3 = train_grpo.grpo_loss(logps, mask, zero, reference, 0.1)
    assert k3.item() == pytest.approx(2 - math.log(2) - 1) and loss.item() == pytest.approx(0.1 * k3.item())
    loss.backward()
    assert logps.grad[0, 0].tolist() == pytest.approx([0, -0.1, 0])  # d k3 / d log p = 1 - q/p
    assert train_grpo.grpo_loss(logps, mask, zero)[1] == 0


def test_kl_is_that_to_the_reference_model(tiny, one_process):
    """No divergence from itself, and a gradient back to it once the model has moved."""
    reference = train_sft.shard_model(str(tiny), torch.device("cpu"), torch.float32).eval().requires_grad_(False)
    result, gradients, _ = update_of(tiny, 2, scale=0.0, reference=reference, kl_coef=1.0)
    assert abs(result["kl"]) < 1e-6 and max(g.abs().max() for g in gradients.values()) < 1e-4
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    result, gradients, _ = update_of(tiny, 2, scale=0.0, reference=reference, kl_coef=1.0)
    assert result["kl"] > 1e-3 and result["grad_norm"] > 1e-3
    assert all(p.grad is None for p in reference.parameters())


def test_not_finite_stops(tiny, one_process):
    with pytest.raises(ValueError, match="not finite"):
        update_of(tiny, 2, scale=float("nan"))


def test_it_learns_which_token_pays(tiny, one_process):
    """A bandit: one token an answer, the first half of the vocabulary pays."""
    encoder, samples, _ = prompts_of(tiny, [(2, 2), (3, 2)])
    model = train_sft.shard_model(str(tiny), torch.device("cpu"), torch.float32)
    optimizer, paid = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), []
    for step in range(15):
        numbers = torch.from_numpy(np.stack([train_grpo.uniforms(0, 2 * step + k, 16, 1) for k in range(2)]))
        with train_sft.gathered(model, True):
            rollouts = train_grpo.rollout(model, encoder, samples, numbers, 1.0)
        rewards = (rollouts[0][..., 0] < 256).double()
        paid.append(rewards.mean().item())
        advantages = train_grpo.group_advantages(rewards)
        train_grpo.update(model, optimizer, encoder, samples, rollouts, advantages, 2, 1.0, 1.0)
    assert np.mean(paid[:2]) < 0.7 and np.mean(paid[-2:]) > 0.85


def test_rollout_sees_the_weights_after_the_step(tiny, tmp_path, one_process):
    """Gathered weights could be stale. The reference is the model as it was saved."""
    encoder, samples, _ = prompts_of(tiny)
    model = train_sft.shard_model(str(tiny), torch.device("cpu"), torch.float32, False, True).train()
    optimizer, gaps = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(2):
        with train_sft.gathered(model, False):
            rollouts = train_grpo.rollout(model, encoder, samples, uniform_for(3, seed=step), TEMPERATURE)
        advantages = torch.randn(3, GROUP)
        result = train_grpo.update(model, optimizer, encoder, samples, rollouts, advantages, 2, TEMPERATURE, 1.0)
        gaps.append(result["logp_gap"])
    with train_sft.gathered(model, False):
        tokens, mask, logps = train_grpo.rollout(model, encoder, samples, uniform_for(3, seed=9), TEMPERATURE)
    tmp_path.joinpath("saved").mkdir()
    train_sft.save_model(model, str(tiny), tmp_path / "saved", {}, torch.float32)
    saved = evaluate.load_model(str(tmp_path / "saved"), torch.device("cpu"), torch.float32)
    again = train_grpo.answer_logps(saved, encoder, samples, tokens, TEMPERATURE)
    assert max(gaps) < 1e-5 and (again - logps)[mask].abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


def moved_apart(one: Path, two: Path, start: Path) -> float:
    """How far two runs are from each other over how far they went. Not 1e-7: Adam makes steps of rounding, where a
    gradient is nearly 0."""
    a, b, s = weights(one), weights(two), weights(start)
    apart, went = (sum((x[n] - y[n]).square().sum() for n in a).sqrt() for x, y in ((a, b), (a, s)))
    assert went > 0.1
    return float(apart / went)


def command(model, world, out, *more) -> list[str]:
    return list(map(str, ["--model", model, "--data", world, "--out", out, *FLAGS, *more]))


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory) -> Path:
    """A tiny model that says the sentence with one number or another, so that answers of a group differ in reward."""
    out = tmp_path_factory.mktemp("grpo") / "taught"
    flags = ["--out", out, "--data", world, "--model", "tiny", "--tiny", "hidden=48", "--focal", 100,
             "--crop", 56, 112, 56, 112, "--batch", 16, "--micro-batch", 16, "--samples", 640, "--lr", 5e-3,
             "--workers", 0, "--val-every", 0, "--no-checkpointing"]
    train_sft.main(list(map(str, flags)))
    return out


@pytest.fixture(scope="module")
def reference(taught, world, tmp_path_factory) -> Path:
    """Four steps of one process, with validation."""
    out = tmp_path_factory.mktemp("grpo") / "reference"
    train_grpo.main(command(taught, world, out, "--val", world, "--val-every", 2, "--val-queries", 12))
    return out


def test_log(reference, taught, world):
    lines = log_of(reference)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    steps, checks = [line for line in lines if "reward" in line], [line["val"] for line in lines if "val" in line]
    assert len(steps) == 4 and len(checks) == 3
    for line in steps:
        assert {"reward", "reward_std", "reward_absrel", "reward_format", "parsed", "sampled_delta1", "no_variance",
                "length", "truncated", "grad_norm", "lr", "tokens", "nll", "kl", "logp_gap", "rollout_s",
                "update_s"} <= line.keys()
        assert line["lr"] == 2e-3 and line["logp_gap"] < 1e-5 and 8 <= line["length"] <= 20
        assert line["no_variance"] < 1 and line["reward_std"] > 0 and line["grad_norm"] > 0 and line["parsed"] > 0
        assert line["tokens"] == pytest.approx(line["length"] * 16) and 0 <= line["truncated"] <= 1
        assert line["reward"] == pytest.approx(line["reward_absrel"] + line["reward_format"], abs=1e-5)
    run = json.loads((reference / "run.json").read_text())
    assert run["flags"]["lr"] == 2e-3 and run["flags"]["group"] == 4 and run["flags"]["reward"] == "absrel"
    assert json.loads((reference / "depthlm.json").read_text())["prompt"] == "paper"
    # the validation is evaluate.py's own
    evaluate.main(list(map(str, [reference, "--data", world, "--queries", 12, "--workers", 0])))
    found = json.loads((reference / "eval" / "metrics.json").read_text())["datasets"]["world"]
    assert checks[-1]["world"]["delta1"] == pytest.approx(found["delta1"], abs=1e-6)
    assert checks[-1]["world"]["unparsed"] == found["unparsed"] and checks[-1]["world"]["n"] == 12


def test_stopped_and_resumed_is_bit_equal(reference, taught, world, tmp_path):
    out = tmp_path / "run"
    train_grpo.main(command(taught, world, out, "--stop-after", 3))
    train_grpo.main(command(taught, world, out, "--resume"))
    assert all(torch.equal(weights(out)[n], w) for n, w in weights(reference).items())
    assert any(not torch.equal(w, weights(taught)[n]) for n, w in weights(out).items())
    clocks = {"rollout_s", "update_s", "wait_s", "prompts_per_s"}
    ours, theirs = ([{k: v for k, v in line.items() if k not in clocks} for line in log_of(f) if "reward" in line]
                    for f in (out, reference))
    assert ours == theirs


def test_each_prompt_of_a_run_has_random_numbers_of_its_own(taught, world, tmp_path, monkeypatch):
    asked, draw = [], train_grpo.uniforms
    monkeypatch.setattr(train_grpo, "uniforms", lambda *a: asked.append(a) or draw(*a))
    train_grpo.main(command(taught, world, tmp_path / "run", "--samples", 8))
    assert asked == [(0, k, 4, 20) for k in range(8)]


def test_batch_of_answers_and_rollout_batch(reference, taught, world, tmp_path):
    """16 answers are 4 prompts; how many are answered together changes nothing."""
    out = tmp_path / "run"
    more = ("--batch", 16, "--batch-of", "answers", "--rollout-batch", 4, "--micro-batch", 1)
    train_grpo.main(command(taught, world, out, *more))
    counts = [[line["tokens"] for line in log_of(f) if "tokens" in line] for f in (out, reference)]
    assert counts[0] == counts[1]
    assert moved_apart(out, reference, taught) < 1e-3


MORE = ["--reshard", "--checkpointing", "--kl-coef", "0.1"]
TWO = """
import json, sys, torch, torch.distributed as dist
root, folder, *runs = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import evaluate, train_grpo, train_sft
from test_train_grpo import prompts_of, uniform_for
rank, world, device = opened = train_sft.setup_distributed()

# answers of 3 tokens on rank 0, of 6 on rank 1: how many forward passes?
encoder, samples, _ = prompts_of(folder, [(2, 2), (4, 3)] if rank else [(3, 3), (2, 5)])
model, passes, drawn, draw = train_sft.shard_model(folder, device, torch.float32, True), [], [], train_grpo.draw_tokens
model.register_forward_hook(lambda *a: passes.append(1))
def script(logps, uniform):
    drawn.append(1)
    return torch.full(logps.shape[:2], encoder.end_id if len(drawn) > (2, 5)[rank] else 60 + len(drawn))
train_grpo.draw_tokens = script
with train_sft.gathered(model, True):
    tokens, mask, logps = train_grpo.rollout(model, encoder, samples, uniform_for(2, length=20), 1.0)
train_grpo.draw_tokens, counted = draw, len(passes)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rollouts = tokens, mask, logps
result = train_grpo.update(model, optimizer, encoder, samples, rollouts, torch.randn(2, 3), 1, 1.0, 1.0)
found = [None, None]
dist.all_gather_object(found, [mask.sum(2).unique().tolist(), counted, result["logp_gap"] < 1e-5])
if rank == 0:
    print("found", json.dumps(found), flush=True)

train_sft.setup_distributed = lambda: opened  # one start for all runs
for run in runs:
    train_grpo.run(train_grpo.parse_args(json.loads(run)))
dist.destroy_process_group()
"""


def test_two_processes_equal_one(reference, taught, world, tmp_path):
    """The runs of `reference` and with MORE; before them, that both ranks run the same number of forward passes."""
    (tmp_path / "two.py").write_text(TWO)
    train_grpo.main(command(taught, world, tmp_path / "one", *MORE))
    cases = ((reference, tmp_path / "plain", []), (tmp_path / "one", tmp_path / "more", MORE))
    runs = [json.dumps(command(taught, world, two, *more)) for _, two, more in cases]
    done = run_script(tmp_path / "two.py", ROOT, taught, *runs, processes=2)  # one start for all, it is the slow part
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("found", 1)[1].splitlines()[0])
    assert found == [[[3], 6, True], [[6], 6, True]]  # lengths, forward passes, log probs agree
    for one, two, more in cases:
        pairs = [[line for line in log_of(f) if "reward" in line] for f in (one, two)]
        for a, b in zip(*pairs, strict=True):
            same = ("reward", "reward_std", "tokens", "length", "parsed", "nll", "grad_norm", "loss", "kl")
            assert {k: a[k] for k in same} == pytest.approx({k: b[k] for k in same}, rel=1e-4, abs=2e-6)
        assert moved_apart(one, two, taught) < 1e-3
        assert (pairs[1][-1]["kl"] > 0) == bool(more)


def test_killed_at_any_moment_it_can_be_resumed(reference, taught, world, tmp_path):
    """kill -9 while a state is being written; the result is that of one run."""
    out = tmp_path / "run"
    run = [sys.executable, str(ROOT / "train_grpo.py"), *command(taught, world, out, "--save-every", 1)]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = out / "resume" / "state.json"
    while process.poll() is None and not (state.is_file() and list(out.glob("resume/.step_*"))):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train_grpo.main(command(taught, world, out, "--resume"))
    assert all(torch.equal(weights(out)[n], w) for n, w in weights(reference).items())
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert sorted(os.listdir(out / "resume")) == ["state.json", "step_00000004"]


# ----------------------------------------------------------------------------------------------------------------------
# recipe and errors


def test_recipe_is_table_5():
    args = train_grpo.parse_args([f"@{ROOT / 'runs' / 'grpo_3b.args'}"])
    assert (args.model, args.focal, args.lr, args.schedule) == ("Qwen/Qwen2.5-VL-3B-Instruct", 1000, 1e-5, "constant")
    assert (args.batch, args.group, args.clip, args.kl_coef, args.warmup) == (32, 8, 1.0, 0.0, 0.0)
    assert (args.checkpointing, args.prompt, args.reward, args.samples) == (True, "release", "l1", 8e3)
    default = train_grpo.parse_args([])
    # focal and prompt are none by default: a base model then gets these values, too (test_prompt_of_the_checkpoint_is_kept)
    assert {k: v for k, v in vars(args).items() if v != vars(default)[k]}.keys() <= {"focal", "data", "prompt"}


@pytest.mark.parametrize("flags, message", [
    (["--group", 1], "--group 1: needs at least 2"), (["--temperature", 0], "--temperature 0.0: needs a positive"),
    (["--batch", 6, "--batch-of", "answers"], "--batch 6 answers are no whole number of groups of 4"),
    (["--batch", 0], "0 prompts do not fit"), (["--samples", 3], "--samples 3 is less than one batch of 4"),
    (["--micro-batch", 0], "--micro-batch 0: needs at least 1"), (["--max-new-tokens", 0], "--max-new-tokens 0"),
    (["--model", "/nowhere/model"], "/nowhere/model"), (["--data", "/nowhere/a.jsonl"], "/nowhere/a.jsonl"),
    (["--tasks", "smell"], "task 'smell' is unknown")])
def test_errors_are_one_line(taught, world, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train_grpo.main(command(taught, world, tmp_path / "run", *flags))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and len(text.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_other_numbers_cannot_be_resumed_and_a_used_folder_is_left_alone(reference, taught, world, capsys):
    for more, message in ((("--resume", "--group", 8), "--group 4"), (("--resume", "--batch", 8), "--batch 4"),
                          (("--resume", "--seed", 1), "--seed 0"), ((), "exists and is not empty")):
        with pytest.raises(SystemExit):
            train_grpo.main(command(taught, world, reference, *more))
        assert message in capsys.readouterr().err


def test_unreadable_images_are_replaced_and_many_end_the_run(taught, world, tmp_path, capsys):
    folder = shutil.copytree(world.parent, tmp_path / "broken")
    for image in ("001.png", "004.png"):
        (folder / image).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        train_grpo.main(command(taught, folder / "val.jsonl", tmp_path / "run", "--samples", 400, "--batch", 20))
    text = capsys.readouterr().err
    assert "001.png" in text and "could not be read, more than 1%: stopped" in text
    assert log_of(tmp_path / "run")[0]["bad"] > 0
