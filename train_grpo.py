"""
Group relative policy optimization on distances as text (Sec. 3.2, App. A.4): jsonl files + model -> ckpt/<run>/

    bash runs/toy_grpo.sh                                          # CPU: from an early toy checkpoint, with its scores
    python train_grpo.py @runs/grpo_3b.args --micro-batch 1        # one GPU
    torchrun --nproc-per-node 8 train_grpo.py @runs/grpo_3b.args   # the paper's recipe

Reads jsonl files and a model folder (or hub name). Writes run.json, log.jsonl, the model, depthlm.json and resume/.
Each step: rollout -> rewards -> advantages -> loss -> optimizer step. What is decided where the paper leaves it open:

1. One update per rollout and beta 0, so there is no ratio to clip and no reference model: at ratio 1 the gradient of
   GRPO's objective is advantage * gradient of log p. --kl-coef > 0 adds the k3 estimate against the starting model.
2. Each answer token weighs the same: the sum over the tokens of all ranks and micro-batches, divided by their number.
3. An answer is scored under exactly the distribution that it was drawn from: temperature in both, image and video
   tokens banned in both, no top-k, top-p or repetition penalty, whatever generation_config says. Its end token counts.
4. A group shares its prompt. Rollout: one prefill a prompt, then its answers grow as leaves behind the same keys and
   values. Update: one row [prompt | answer 1 | ... | answer G] under a tree mask. Each encodes the image once.
5. Batch 32 counts prompts: App. A.4 gives SFT the same 32 to compare them, and Fig. 3b counts training samples in both.
   --batch-of answers is the other reading (32 answers are 4 groups of 8).
6. An error is rewarded down to WORST times the true value; an answer without a number gets that lowest reward.

Prompt i and its random numbers are functions of (seed, i): resume needs the step alone, and the number of processes and
the micro-batch change nothing.
"""
import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import render
import train_sft
from render import Encoder, fail
from train_sft import log_line

REWARDS = ("delta1", "absrel", "l1", "l2")  # Fig. 3a
WORST = 2.0  # an error counts up to this many true values: one answer of 1e9 m must not drown its group's differences
SMALLEST = 0.01  # true values count as at least this much, the last digit of an answer
ROLLOUT = 1000  # third number of the seed; train_sft.Samples uses 0..19 for the data
THOUGHT = r"<think>(?:(?!</?think>|</?answer>).)*</think>\s*,?\s*<answer>\s*\d+(?:\.\d+)?\s*</answer>"


# ----------------------------------------------------------------------------------------------------------------------
# rollout: prompts -> groups of sampled answers


def banned_tokens(model, encoder: Encoder) -> torch.Tensor:
    """Ids that an answer never holds: the update's forward pass would look for an image behind them."""
    ids = {encoder.image_id, getattr(model.config, "video_token_id", None)}
    return torch.tensor(sorted(i for i in ids if i is not None), device=model.device)


def log_policy(logits: torch.Tensor, temperature: float, banned: torch.Tensor) -> torch.Tensor:
    """The distribution that answers are drawn from and scored under: (..., V) logits -> log probabilities, float32."""
    return (logits.float() / temperature).index_fill(-1, banned, -math.inf).log_softmax(-1)


def uniforms(seed: int, prompt: int, group_size: int, max_new_tokens: int) -> np.ndarray:
    """The random numbers of a prompt's answers, (T, G) in [0, 1). `prompt` counts all prompts of the run."""
    return np.random.default_rng((seed, prompt, ROLLOUT)).random((max_new_tokens, group_size))


def draw_tokens(logps: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token for each number in [0, 1): log probabilities (..., V) -> ids (...), never one of probability 0."""
    cumulative = logps.double().exp().cumsum(-1)  # float32 would lose the rare ones of 150,000 tokens
    return torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]


@torch.no_grad()
def rollout(model, encoder: Encoder, samples: list[dict], uniform: torch.Tensor, temperature: float):
    """Sample G answers to each of B prompts. uniform (B, T, G) -> tokens, mask, logps, each (B, G, T).

    mask: the tokens of an answer, its end token included; what is behind it does not count. All ranks run the same
    number of forward passes: until no answer of any rank goes on."""
    (rows, limit, group_size), end = uniform.shape, encoder.end_id
    prefix, banned = evaluate.prefill(model, encoder, samples), banned_tokens(model, encoder)
    logits = prefix.logits.expand(rows, group_size, -1)
    seen = prefix.seen[:, None].expand(rows, group_size, -1)  # a leaf sees its prompt ...
    own = torch.eye(group_size, dtype=torch.bool, device=seen.device).expand(rows, -1, -1)  # ... and its own tokens
    live = torch.ones(rows, group_size, dtype=torch.bool, device=seen.device)
    tokens, mask, logps = [], [], []
    for t in range(limit):
        policy = log_policy(logits, temperature, banned)
        token = torch.where(live, draw_tokens(policy, uniform[:, t]), end)
        tokens.append(token)
        mask.append(live)
        logps.append(policy.gather(-1, token[..., None])[..., 0])
        live = live & ~ends_answer(encoder, token)
        going = live.sum()
        dist.all_reduce(going)  # and so all ranks stop together
        if t + 1 == limit or not going:
            break
        seen = torch.cat([seen, own], 2)
        position = (prefix.position[:, None] + t).expand(rows, group_size)
        logits = evaluate.step(model, encoder, prefix, token, position, seen)
    tokens, mask, logps = (torch.stack(x, 2) for x in (tokens, mask, logps))
    rest = (0, limit - tokens.shape[2])
    return F.pad(tokens, rest, value=end), F.pad(mask, rest), F.pad(logps, rest)


def ends_answer(encoder: Encoder, tokens: torch.Tensor) -> torch.Tensor:
    return torch.isin(tokens, torch.tensor(sorted(encoder.stop_ids), device=tokens.device))


def decode_answers(encoder: Encoder, tokens: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
    """(B, G, T) tokens -> texts, without the end token."""
    return [[evaluate.decode_text(encoder, a[:n]) for a, n in zip(*group)]
            for group in zip(tokens.tolist(), mask.sum(2).tolist())]


# ----------------------------------------------------------------------------------------------------------------------
# rewards and advantages


def error_reward(kind: str, pred: float | None, true: float) -> float:
    """delta1: 0 or 1. absrel, l1, l2: minus the error, at most WORST true values of it, in 1, m, m^2 (Sec. 3.2).
    pred None, an answer without a number: the lowest of the range."""
    if kind == "delta1":
        return float(pred is not None and bool(evaluate.within(np.array(pred), np.array(true), 1.25)))
    unit = max(abs(true), SMALLEST)
    error = WORST * unit if pred is None else min(abs(pred - true), WORST * unit)
    return -{"absrel": error / unit, "l1": error, "l2": error ** 2}[kind]


def format_reward(text: str, task: str, prompt: str) -> float:
    """1 if the whole answer has the form that the prompt asks for, with a plain number, else 0 (App. A.4)."""
    form = re.escape(render.answer_form(task, prompt)).replace(re.escape("{x}"), r"\d+(?:\.\d+)?")
    return float(re.fullmatch(THOUGHT if prompt == "release" else form, text.strip(), re.S) is not None)


def score_answers(texts: list[list[str]], samples: list[dict], reward: str, format_weight: float, prompt: str) -> dict:
    """Answers of B prompts, G each -> (B, G) float64 each: the "reward" to learn from, its parts, more for the log."""
    scores = []
    for sample, group in zip(samples, texts):
        for text in group:
            pred, true = render.parse_answer(text, sample["task"]), sample["value"]
            error, form = error_reward(reward, pred, true), format_reward(text, sample["task"], prompt)
            scores.append({"reward": error + format_weight * form, f"reward_{reward}": error, "reward_format": form,
                           "parsed": float(pred is not None), "sampled_delta1": error_reward("delta1", pred, true)})
    return {k: torch.tensor([s[k] for s in scores], dtype=torch.float64).view(len(samples), -1) for k in scores[0]}


def no_variance(rewards: torch.Tensor) -> torch.Tensor:
    """(B, G) -> (B,) bool. Compared, not computed: the mean of equal numbers may differ from them by rounding."""
    return (rewards == rewards[:, :1]).all(1)


def group_advantages(rewards: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """(B, G) rewards -> advantages: minus the group's mean; "std": also over the group's standard deviation (of G, not
    G - 1), "mean": as it is (Dr. GRPO). A group of equal rewards says nothing: exactly 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "std":
        centred = centred / rewards.std(1, correction=0, keepdim=True)
    return torch.where(no_variance(rewards)[:, None], 0.0, centred)


# ----------------------------------------------------------------------------------------------------------------------
# loss and update: a group is one row [padding | prompt | answer 1 | ... | answer G]


def tree_mask(padding: torch.Tensor, prompt: int, group_size: int, length: int) -> torch.Tensor:
    """padding (B,): how many of the first `prompt` columns are padding -> (B, 1, S, S) bool, S = prompt + group_size *
    length: a token sees the prompt and its own answer up to itself, never another answer, never padding."""
    device = padding.device
    branch = torch.cat([torch.zeros(prompt, device=device),
                        torch.arange(1, group_size + 1, device=device).repeat_interleave(length)])
    tree = ((branch[:, None] == branch) | (branch == 0)).tril()
    real = torch.arange(len(branch), device=device) >= padding[:, None]  # (B, S)
    itself = torch.eye(len(branch), dtype=torch.bool, device=device)  # for padding: a softmax over nothing is NaN
    return (tree & real[:, None] | itself)[:, None]


def tree_rows(encoder: Encoder, samples: list[dict], tokens: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """B prompts and their answers (B, G, L) -> arguments of the model, and the columns (G * L,) that predict the
    answers' tokens: the same in every row, since the padding is on the left. The last token of an answer predicts
    nothing and is not fed."""
    rows, group_size, length = tokens.shape
    inputs = render.model_inputs(render.pack(samples), encoder, tokens.device)
    del inputs["segments"]  # rows, not packed
    lengths = [len(s["input_ids"]) for s in samples]
    prompt, axes = max(lengths), len(samples[0]["position_ids"])
    ids, positions = np.full((rows, prompt), encoder.end_id), np.zeros((axes, rows, prompt), int)
    for b, (sample, n) in enumerate(zip(samples, lengths)):
        ids[b, prompt - n:], positions[:, b, prompt - n:] = sample["input_ids"], sample["position_ids"]
    behind = positions.max((0, 2))[:, None] + 1 + np.tile(np.arange(length - 1), group_size)  # all from the same place
    positions = np.concatenate([positions, np.broadcast_to(behind, (axes, *behind.shape))], 2)
    positions = torch.from_numpy(positions if render.FAMILIES[encoder.family]["mrope"] else positions[0])
    columns = prompt - 1 + (length - 1) * torch.arange(group_size)[:, None] + torch.arange(length)
    columns[:, 0] = prompt - 1  # the first token of each is predicted by the prompt's last
    padding = torch.tensor([prompt - n for n in lengths], device=tokens.device)
    rows = {"input_ids": torch.cat([torch.from_numpy(ids).to(tokens), tokens[:, :, :-1].flatten(1)], 1),
            "position_ids": positions.to(tokens.device),
            "attention_mask": tree_mask(padding, prompt, group_size, length - 1)}
    return {**inputs, **rows}, columns.flatten().to(tokens.device)


def answer_logps(model, encoder: Encoder, samples: list[dict], tokens: torch.Tensor, temperature: float):
    """Log probabilities (B, G, L) of the answers' tokens, with gradient: one forward, each image encoded once."""
    inputs, columns = tree_rows(encoder, samples, tokens)
    logits = model(**evaluate.cast(inputs, model), use_cache=False, logits_to_keep=columns).logits
    policy = log_policy(logits.unflatten(1, tokens.shape[1:]), temperature, banned_tokens(model, encoder))
    return policy.gather(-1, tokens[..., None])[..., 0]


def grpo_loss(logps, mask, advantages, reference=None, kl_coef: float = 0.0):
    """Sum over the answers' tokens of  - A log p + kl_coef (q/p - log(q/p) - 1),  q: the reference model's probability.
    logps, mask, reference (B, G, L), advantages (B, G). -> loss, and the sum of the bracket (k3) alone."""
    loss, k3 = -(advantages[..., None] * logps * mask).sum(), torch.zeros_like(logps[0, 0, 0])
    if reference is not None:
        log_ratio = (reference - logps) * mask
        k3 = (log_ratio.exp() - log_ratio - 1).sum()
    return loss + kl_coef * k3, k3.detach()


def update(model, optimizer, encoder: Encoder, samples: list[dict], rollouts: tuple, advantages: torch.Tensor,
           micro_batch: int, temperature: float, clip: float, reference=None, kl_coef: float = 0.0) -> dict:
    """One optimizer step on this rank's groups, `micro_batch` prompts a forward pass; rollouts: tokens, mask, logps as
    `rollout` returns them. -> grad norm, and means over all ranks' tokens: nll of the sampled tokens, kl, and logp_gap,
    |log p in the rollout - log p in the update|, which is rounding, or something is wrong."""
    tokens, mask, sampled = rollouts
    advantages = advantages.to(tokens.device, torch.float32)
    count = mask.sum()
    dist.all_reduce(count)  # before any backward: each token weighs the same however the prompts are split
    sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)

    def losses():
        for k in range(0, len(samples), micro_batch):
            part = slice(k, k + micro_batch)
            longest = int(mask[part].sum(2).max())
            said, real = tokens[part, :, :longest], mask[part, :, :longest]
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref = answer_logps(reference, encoder, samples[part], said, temperature)
            logps = answer_logps(model, encoder, samples[part], said, temperature)
            loss, k3 = grpo_loss(logps, real, advantages[part], ref, kl_coef)
            gap = (logps.detach() - sampled[part, :, :longest]).abs()
            sums.add_(torch.stack([-(logps.detach() * real).sum(), k3, (gap * real).sum()]))
            yield loss

    micro_steps = -(-len(samples) // micro_batch)
    loss, norm = train_sft.descend(model, optimizer, losses(), micro_steps, count.item(), clip)
    dist.all_reduce(sums)
    nll, kl, gap = (sums / count).tolist()
    return {"loss": loss, "grad_norm": norm, "nll": nll, "kl": kl, "logp_gap": gap, "tokens": count.item()}


# ----------------------------------------------------------------------------------------------------------------------


def figures(encoder: Encoder, scores: dict, tokens: torch.Tensor, mask: torch.Tensor) -> dict:
    """Means over the answers of all ranks, for the log. reward_std: within a group, the average."""
    rewards = scores["reward"]
    values = {**scores, "reward_std": rewards.std(1, correction=0), "no_variance": no_variance(rewards),
              "length": mask.sum(2), "truncated": ~(ends_answer(encoder, tokens) & mask).any(2)}
    means = torch.stack([v.double().mean().to(tokens.device) for v in values.values()])
    dist.all_reduce(means)  # each rank has the same number of prompts
    return dict(zip(values, (means / dist.get_world_size()).tolist()))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")
    flag, on_off = parser.add_argument, argparse.BooleanOptionalAction
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    # I/O
    flag("--out", default="ckpt/grpo_3b", help="folder of the run")
    flag("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name to start from (App. A.4)")
    flag("--resume", action=on_off, default=False, help="go on from the out folder's last state, if it has one")
    flag("--seed", type=int, default=0)
    # data
    flag("--data", nargs="+", metavar="JSONL[:WEIGHT]", help="training files; default: the paper's mixture in data/")
    flag("--image-root", help="folder of the images, if not each jsonl's own")
    flag("--label-type", choices=("euclidean", "z"), help="what the files hold, whatever their records say")
    flag("--tasks", nargs="+", default=["distance:1"], metavar="TASK[:WEIGHT]", help="Sec. 3.4: equal weights")
    flag("--crop", type=int, nargs=4, default=[1000, 1400, 700, 1200], metavar=("W0", "W1", "H0", "H1"),
         help="random crop, px (Sec. 4)")
    flag("--workers", type=int, default=4, help="processes that load images, per rank")
    # what the model sees
    render.add_settings_flags(parser)
    # rewards, rollout
    flag("--reward", choices=REWARDS, default="l1", help="Sec. 3.2, Fig. 3a: minus the L1 error is the best")
    flag("--format-weight", type=float, default=1.0, help="of the format reward, 0 or 1 (App. A.4)")
    flag("--group", type=int, default=8, help="answers a prompt (App. A.4)")
    flag("--temperature", type=float, default=1.0, help="of sampling and of scoring")
    flag("--max-new-tokens", type=int, default=128, help="tokens an answer may have")
    flag("--rollout-batch", type=int, default=16, help="prompts that are answered together on one rank")
    # optimization (App. A.4, Table 5, column 3b GRPO)
    flag("--samples", type=float, default=8e3, help="training prompts, all ranks together (Fig. 3a)")
    flag("--batch", type=int, default=32, help="an optimizer step, all ranks together")
    flag("--batch-of", choices=("prompts", "answers"), default="prompts", help="what --batch counts")
    flag("--micro-batch", type=int, default=2, help="prompts, with their answers, in one forward pass of the update")
    flag("--lr", type=float, default=1e-5)
    flag("--schedule", choices=("cosine", "constant"), default="constant")
    flag("--warmup", type=float, default=0.0, help="share of the steps")
    flag("--clip", type=float, default=1.0, help="gradient norm")
    flag("--advantage", choices=("std", "mean"), default="std", help="divide by the group's std, or not (Dr. GRPO)")
    flag("--kl-coef", type=float, default=0.0, help="beta (App. A.4: 0, more makes the model underfit)")
    flag("--betas", type=float, nargs=2, default=[0.9, 0.999], help="AdamW")
    flag("--weight-decay", type=float, default=0.0)
    # system
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="compute; auto: bfloat16 on a GPU")
    flag("--checkpointing", action=on_off, default=True, help="activation checkpointing: less memory, more compute")
    flag("--reshard", action=on_off, default=False, help="free gathered weights after each forward of the update")
    # logging
    flag("--log-every", type=int, default=1, help="steps between printed lines; log.jsonl has every step")
    flag("--save-every", type=int, default=50, help="steps between resume states")
    flag("--stop-after", type=int, help="save and stop after this step, without changing the schedule")
    flag("--val", nargs="*", metavar="JSONL", help="validation files; default: val.jsonl beside each training file")
    flag("--val-every", type=int, default=50, help="steps; 0: never")
    flag("--val-queries", type=int, default=256, help="of each file")
    flag("--val-batch", type=int, default=16)
    return parser.parse_args(argv)


def prompts_a_step(args: argparse.Namespace, world: int) -> int:
    """--batch in prompts; raises ValueError where the numbers do not fit together."""
    for name, least in (("group", 2), ("max_new_tokens", 1), ("rollout_batch", 1), ("micro_batch", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: needs at least {least}"
                             + (", advantages compare answers." if name == "group" else "."))
    if not args.temperature > 0:
        raise ValueError(f"--temperature {args.temperature}: needs a positive number; at 0 all answers are the same.")
    if args.batch_of == "answers" and args.batch % args.group:
        raise ValueError(f"--batch {args.batch} answers are no whole number of groups of {args.group}.")
    prompts = args.batch // args.group if args.batch_of == "answers" else args.batch
    if prompts % world or not prompts:
        raise ValueError(f"--batch {args.batch} {args.batch_of}: {prompts} prompts do not fit {world} processes.")
    if args.samples < prompts:
        raise ValueError(f"--samples {args.samples:g} is less than one batch of {prompts} prompts.")
    return prompts


def load_settings(source: str, given: dict, quiet: bool) -> dict:
    """What a checkpoint of ours was trained to see; any other is asked to think and answer (Sec. 3.2). Flags win."""
    if given["prompt"] is None and not (Path(source) / "depthlm.json").is_file():
        given = {**given, "prompt": "release"}
    return render.load_settings(source, given, quiet)


def run(args: argparse.Namespace) -> None:
    rank, world, device = train_sft.setup_distributed()
    dtype = evaluate.pick_dtype(args.dtype, device)

    # -------------------------------------------------------------------------------------------------- setup
    batch, out = prompts_a_step(args, world), Path(args.out)
    steps, share = int(args.samples // batch), batch // world
    specs, tasks = args.data or train_sft.default_data(), train_sft.parse_weights(args.tasks)
    datasets, sets = train_sft.open_datasets(specs, args.image_root, args.label_type), []
    if args.val_every:
        sets = train_sft.open_validation(specs, args.val, args.val_queries, args.image_root, args.label_type)
    source = render.find_checkpoint(args.model)
    settings = load_settings(source, {**render.given_settings(args), "tasks": list(tasks)}, quiet=rank > 0)
    encoder = render.load_encoder(source)
    if rank == 0:
        train_sft.open_run(out, args, args.resume)
    dist.barrier()

    # -------------------------------------------------------------------------------------------------- model
    model = train_sft.shard_model(source, device, dtype, args.reshard, args.checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.betas),
                                  weight_decay=args.weight_decay, fused=True)
    model.train()
    reference = None
    if args.kl_coef > 0:  # always the model that the run started from, also when it is resumed
        reference = train_sft.shard_model(source, device, dtype, True).eval().requires_grad_(False)
    first, bad = 0, 0
    if args.resume and (found := train_sft.load_resume(model, optimizer, out)):
        first, bad = found["step"], found["bad"]
    if rank == 0:
        train_sft.trim_log(out / "log.jsonl", first or -1)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.2f} M parameters, {world} x {device.type} {str(dtype).removeprefix('torch.')}, "
              f"{steps} steps of {batch} prompts x {args.group} answers, {len(datasets)} file(s) with "
              f"{sum(len(r) for r, _ in datasets)} images, from step {first}", flush=True)

    # -------------------------------------------------------------------------------------------------- data
    last = min(steps, args.stop_after or steps)
    indices = train_sft.batch_indices(first, last, batch, share, rank, world)
    prompts = train_sft.Samples(datasets, tasks, settings, encoder, args.crop, args.seed, answers=False)
    loader = torch.utils.data.DataLoader(prompts, batch_sampler=indices, num_workers=args.workers, collate_fn=list)
    loader = iter(loader)

    def check(step):
        scores = train_sft.validate(model, encoder, settings, sets, tasks, args.val_batch, args.reshard)
        log_line(out / "log.jsonl", step=step, val=scores)
        if rank == 0:
            shown = (f"{name} delta1 {s['delta1']:.3f}" for name, s in scores.items())
            tqdm.write(f"step {step}/{steps}  " + "  ".join(shown))

    # -------------------------------------------------------------------------------------------------- loop
    bar = tqdm(total=steps, initial=first, disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
    if sets and first == 0:
        check(0)
    for step in range(first, last):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = train_sft.get_lr(step, steps, args.lr, args.warmup, args.schedule)
        samples = next(loader)
        unread = torch.tensor(sum(len(s["bad"]) for s in samples), device=device)
        dist.all_reduce(unread)
        bad += unread.item()
        train_sft.report_bad([m for s in samples for m in s["bad"]], bad, (step + 1) * batch)
        ready = time.time()

        at = step * batch + rank * share
        numbers = [uniforms(args.seed, at + k, args.group, args.max_new_tokens) for k in range(share)]
        numbers = torch.from_numpy(np.stack(numbers)).to(device)
        with train_sft.gathered(model, args.reshard):
            parts = [rollout(model, encoder, samples[k:k + args.rollout_batch], numbers[k:k + args.rollout_batch],
                             args.temperature) for k in range(0, share, args.rollout_batch)]
        rollouts = tuple(torch.cat(p) for p in zip(*parts))  # tokens, mask, logps
        texts = decode_answers(encoder, *rollouts[:2])
        scores = score_answers(texts, samples, args.reward, args.format_weight, settings["prompt"])
        rolled = time.time()

        advantages = group_advantages(scores["reward"], args.advantage)
        result = update(model, optimizer, encoder, samples, rollouts, advantages, args.micro_batch, args.temperature,
                        args.clip, reference, args.kl_coef)
        done = time.time()

        means = figures(encoder, scores, *rollouts[:2])
        log_line(out / "log.jsonl", step=step + 1, **means, **result, lr=optimizer.param_groups[0]["lr"], bad=bad,
                 rollout_s=rolled - ready, update_s=done - rolled, wait_s=ready - start,
                 prompts_per_s=batch / (done - start))
        if rank == 0 and (step + 1) % args.log_every == 0:
            tqdm.write(f"step {step + 1}/{steps}  reward {means['reward']:.3f} +- {means['reward_std']:.3f}  "
                       f"sampled delta1 {means['sampled_delta1']:.3f}  parsed {means['parsed']:.0%}  "
                       f"length {means['length']:.1f}  norm {result['grad_norm']:.2f}  "
                       f"rollout {rolled - ready:.2f} s  update {done - rolled:.2f} s")
        bar.update()
        final = step + 1 == last
        if sets and (final or (step + 1) % args.val_every == 0):
            check(step + 1)
        if final or (step + 1) % args.save_every == 0:
            train_sft.save_resume(model, optimizer, out, step + 1, {"bad": bad})
            train_sft.save_model(model, source, out, settings, dtype)

    # -------------------------------------------------------------------------------------------------- finish
    bar.close()
    if rank == 0:
        print(f"{out}: step {last} of {steps}. Score it: python evaluate.py {out}")


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as e:
        fail(e)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
