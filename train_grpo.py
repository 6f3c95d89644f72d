"""
Group relative policy optimization on distances as text (Sec. 3.2, App. A.4):
jsonl files + model -> ckpt/<run>/

    bash runs/toy_grpo.sh                                         # CPU, scores before and after
    python train_grpo.py @runs/grpo_3b.args --micro-batch 1       # one GPU
    torchrun --nproc-per-node 8 train_grpo.py @runs/grpo_3b.args  # the paper's recipe

Reads and writes what train_sft.py does. Each step: rollout -> rewards -> advantages -> loss ->
optimizer step. What is decided where the paper leaves it open:

1. One update per rollout and beta 0, so there is no ratio to clip and no reference model: at ratio
   1 the gradient of GRPO's objective is advantage * gradient of log p. --kl-coef > 0 adds the k3
   estimate against the starting model.
2. Each answer token weighs the same: the sum over the tokens of all ranks and micro-batches,
   divided by their number.
3. An answer is scored under exactly the distribution that it was drawn from: temperature in both,
   image and video tokens banned in both, no top-k, top-p or repetition penalty, whatever
   generation_config says. Its end token counts.
4. A group shares its prompt. Rollout: one prefill a prompt, then its answers grow as leaves behind
   the same keys and values. Update: one row [prompt | answer 1 | ... | answer G] under a tree mask.
   Each encodes the image once.
5. Batch 32 counts prompts: App. A.4 gives SFT the same 32 to compare them, and Fig. 3b counts
   training samples in both. --batch-of answers is the other reading (4 groups of 8).
6. Errors beyond WORST times the true value get no lower reward than that, which is also the reward
   of an answer without a number.

Prompt i and its random numbers are functions of (seed, i): resuming needs the step alone, and the
number of processes and the micro-batch change nothing (on a GPU: nothing but rounding).
"""
import argparse
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import render
import train_sft
from render import COUNT, POSITIVE, Checkpoint, number

# paper: it names no bound; one answer of 1e9 m would drown the differences of its group
WORST = 2.0  # an error counts up to this multiple of the true value
SMALLEST = 0.01  # true values count as at least this much, the last digit of an answer
ROLLOUT = 1000  # third number of the seed; train_sft.Samples uses 0..99 for the data


# --------------------------------------------------------------------------------------------------
# rollout: prompts -> groups of sampled answers


@dataclass
class Rollout:
    """G sampled answers to each of B prompts, up to T tokens each. mask: the tokens of an answer,
    its end token included; what is behind it does not count."""
    tokens: torch.Tensor  # (B, G, T)
    mask: torch.Tensor  # (B, G, T) bool
    logps: torch.Tensor  # (B, G, T), of the sampled tokens

    def part(self, rows: slice) -> "Rollout":
        """Some of the prompts, as wide as their longest answer."""
        longest = int(self.mask[rows].sum(2).max())
        return Rollout(*(getattr(self, f.name)[rows, :, :longest] for f in fields(self)))

    @staticmethod
    def join(parts: list["Rollout"]) -> "Rollout":
        columns = ([getattr(part, f.name) for part in parts] for f in fields(Rollout))
        return Rollout(*map(torch.cat, columns))


def banned_tokens(model, checkpoint: Checkpoint) -> torch.Tensor:
    """Ids that an answer never holds: the update's forward would look for an image behind them."""
    ids = {checkpoint.image_id, getattr(model.config, "video_token_id", None)}
    return torch.tensor(sorted(i for i in ids if i is not None), device=model.compute_device)


def log_policy(logits: torch.Tensor, temperature: float, banned: torch.Tensor) -> torch.Tensor:
    """The distribution that answers are drawn from and scored under: (..., V) logits -> log
    probabilities, float32."""
    return (logits.float() / temperature).index_fill(-1, banned, -math.inf).log_softmax(-1)


def uniforms(seed: int, prompt: int, group_size: int, max_new_tokens: int) -> np.ndarray:
    """The random numbers of a prompt's answers, (T, G) in [0, 1). `prompt` counts all prompts of
    the run."""
    rng = np.random.default_rng((seed, prompt, ROLLOUT))
    return rng.random((max_new_tokens, group_size))


def draw_tokens(logps: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token for each number in [0, 1): log probabilities (..., V) -> ids (...), never one of
    probability 0."""
    cumulative = logps.double().exp().cumsum(-1)  # float32 would lose the rare ones of 150,000
    wanted = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[..., 0]


@torch.no_grad()
def sample_answers(model, checkpoint: Checkpoint, samples: list[dict], uniform: torch.Tensor,
                   temperature: float) -> Rollout:
    """Answers to B prompts, one for each column of uniform (B, T, G). All ranks run the same number
    of forward passes: until no answer of any rank continues."""
    rows, limit, group_size = uniform.shape
    prefix = evaluate.prefill(model, checkpoint, evaluate.pack_prompts(checkpoint, samples))
    banned, device = banned_tokens(model, checkpoint), prefix.logits.device
    logits = prefix.logits.expand(rows, group_size, -1)
    seen = prefix.seen[:, None].expand(rows, group_size, -1)  # a leaf sees its prompt ...
    own = torch.eye(group_size, dtype=torch.bool, device=device)  # ... and its own tokens
    own = own.expand(rows, -1, -1)
    live = torch.ones(rows, group_size, dtype=torch.bool, device=device)
    tokens, mask, logps = [], [], []
    for t in range(limit):
        policy = log_policy(logits, temperature, banned)
        token = torch.where(live, draw_tokens(policy, uniform[:, t]), checkpoint.end_id)
        tokens.append(token)
        mask.append(live)
        logps.append(policy.gather(-1, token[..., None])[..., 0])
        live = live & ~ends_answer(checkpoint, token)
        going = live.sum()
        dist.all_reduce(going)  # and so all ranks stop together
        if t + 1 == limit or not going:
            break
        seen = torch.cat([seen, own], 2)
        position = (prefix.position[:, None] + t).expand(rows, group_size)
        logits = evaluate.decode_step(model, checkpoint, prefix, token, position, seen)

    rest = (0, limit - len(tokens))
    tokens, mask, logps = (torch.stack(x, 2) for x in (tokens, mask, logps))
    return Rollout(F.pad(tokens, rest, value=checkpoint.end_id), F.pad(mask, rest),
                   F.pad(logps, rest))


def ends_answer(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    return torch.isin(tokens, torch.tensor(sorted(checkpoint.stop_ids), device=tokens.device))


def rollout_answers(checkpoint: Checkpoint, rollout: Rollout) -> list[list[dict]]:
    lengths = rollout.mask.sum(2).tolist()
    return [[checkpoint.answer(tokens[:length]) for tokens, length in zip(*group)]
            for group in zip(rollout.tokens.tolist(), lengths)]


# --------------------------------------------------------------------------------------------------
# rewards and advantages


def bounded_error(pred: float | None, true: float) -> tuple[float, float]:
    """-> |pred - true|, at most WORST true values, and the true value that it is measured against.
    An answer without a number has the largest error."""
    unit = max(abs(true), SMALLEST)
    error = WORST * unit if pred is None else min(abs(pred - true), WORST * unit)
    return error, unit


def delta1_reward(pred: float | None, true: float) -> float:
    return float(pred is not None and bool(evaluate.within(np.array(pred), np.array(true), 1.25)))


def absrel_reward(pred: float | None, true: float) -> float:
    error, unit = bounded_error(pred, true)
    return -error / unit


def l1_reward(pred: float | None, true: float) -> float:
    return -bounded_error(pred, true)[0]


def l2_reward(pred: float | None, true: float) -> float:
    return -bounded_error(pred, true)[0] ** 2


REWARDS = {"delta1": delta1_reward, "absrel": absrel_reward, "l1": l1_reward, "l2": l2_reward}


def score_answers(answers: list[list[dict]], samples: list[dict], reward: str, format_weight: float,
                  settings: dict) -> dict[str, torch.Tensor]:
    """Answers of B prompts, G each -> (B, G) float64 each: the "reward" to learn from, its parts,
    more for the log."""
    scores = []
    for sample, group in zip(samples, answers):
        task, true = sample["task"], sample["value"]
        for answer in group:
            pred = render.read_answer(answer, task)
            error = REWARDS[reward](pred, true)
            form = float(render.has_form(answer["text"], task, settings))
            scores.append({"reward": error + format_weight * form, f"reward_{reward}": error,
                           "reward_format": form, "parsed": float(pred is not None),
                           "sampled_delta1": delta1_reward(pred, true),
                           "truncated": float("truncated" in answer)})
    return {key: torch.tensor([score[key] for score in scores],
                              dtype=torch.float64).view(len(samples), -1) for key in scores[0]}


def no_variance(rewards: torch.Tensor) -> torch.Tensor:
    """(B, G) -> (B,) bool. Compared, not computed: the mean of equal numbers may differ from them
    by rounding."""
    return (rewards == rewards[:, :1]).all(1)


def group_advantages(rewards: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """(B, G) rewards -> advantages: minus the group's mean; "std": also over the group's standard
    deviation (of G, not G - 1), "mean": as it is (Dr. GRPO). Of a group of equal rewards: 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "std":
        centred = centred / rewards.std(1, correction=0, keepdim=True)
    return torch.where(no_variance(rewards)[:, None], 0.0, centred)


# --------------------------------------------------------------------------------------------------
# loss: a group is one row [padding | prompt | answer 1 | ... | answer G]


def tree_mask(padding: torch.Tensor, prompt: int, group_size: int, length: int) -> torch.Tensor:
    """padding (B,): how many of the first `prompt` columns are padding -> (B, S, S) bool, S =
    prompt + group_size * length: a token sees the prompt and its own answer up to itself, never
    another answer, never padding."""
    device = padding.device
    branch = torch.arange(1, group_size + 1, device=device).repeat_interleave(length)
    branch = torch.cat([torch.zeros(prompt, device=device), branch])
    tree = ((branch[:, None] == branch) | (branch == 0)).tril()
    real = torch.arange(len(branch), device=device) >= padding[:, None]  # (B, S)
    # padding sees itself: a softmax over nothing is NaN
    itself = torch.eye(len(branch), dtype=torch.bool, device=device)
    return tree & real[:, None] | itself


def tree_rows(checkpoint: Checkpoint, samples: list[dict], tokens: torch.Tensor,
              dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """B prompts and their answers (B, G, L) -> arguments of the model, computing in `dtype`, and
    the columns (G * L,) that predict the answers' tokens: the same in every row, since the padding
    is on the left. The last token of an answer predicts nothing and is not fed."""
    rows, group_size, length = tokens.shape
    device, mrope = tokens.device, checkpoint.family.mrope
    lengths = [len(sample["input_ids"]) for sample in samples]
    prompt, axes = max(lengths), len(samples[0]["position_ids"])
    ids = np.full((rows, prompt), checkpoint.end_id)
    positions = np.zeros((axes, rows, prompt), int)
    for b, (sample, n) in enumerate(zip(samples, lengths)):
        ids[b, prompt - n:] = sample["input_ids"]
        positions[:, b, prompt - n:] = sample["position_ids"]
    # all answers begin at the same position
    behind = positions.max((0, 2))[:, None] + 1 + np.tile(np.arange(length - 1), group_size)
    behind = np.broadcast_to(behind, (axes, *behind.shape))
    positions = torch.from_numpy(np.concatenate([positions, behind], 2))

    columns = torch.arange(length) + (length - 1) * torch.arange(group_size)[:, None] + prompt - 1
    columns[:, 0] = prompt - 1  # the first token of each is predicted by the prompt's last
    padding = torch.tensor([prompt - n for n in lengths], device=device)
    inputs = render.model_inputs(render.pack(samples), checkpoint, device, dtype)
    del inputs["segments"], inputs["longest"]  # rows, not packed
    inputs["input_ids"] = torch.cat([torch.from_numpy(ids).to(tokens),
                                     tokens[:, :, :-1].flatten(1)], 1)
    inputs["position_ids"] = (positions if mrope else positions[0]).to(device)
    visible = tree_mask(padding, prompt, group_size, length - 1)
    inputs["attention_mask"] = evaluate.additive_mask(visible, dtype)
    return inputs, columns.flatten().to(device)


def answer_logps(model, checkpoint: Checkpoint, samples: list[dict], tokens: torch.Tensor,
                 temperature: float) -> torch.Tensor:
    """Log probabilities (B, G, L) of the answers' tokens, with gradient: one forward, each image
    encoded once."""
    inputs, columns = tree_rows(checkpoint, samples, tokens, model.compute_dtype)
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    policy = log_policy(logits.unflatten(1, tokens.shape[1:]), temperature,
                        banned_tokens(model, checkpoint))
    return policy.gather(-1, tokens[..., None])[..., 0]


def grpo_loss(logps, mask, advantages, reference=None,
              kl_coef: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the answers' tokens of  - A log p + kl_coef (q/p - log(q/p) - 1),  q: the reference
    model's probability. logps, mask, reference (B, G, L), advantages (B, G). -> loss, and the sum
    of the bracket (k3) alone."""
    loss = -(advantages[..., None] * logps * mask).sum()
    k3 = torch.zeros_like(loss)
    if reference is not None:
        log_ratio = (reference - logps) * mask
        k3 = (log_ratio.exp() - log_ratio - 1).sum()
    return loss + kl_coef * k3, k3.detach()


# --------------------------------------------------------------------------------------------------


def log_means(rollout: Rollout, scores: dict) -> dict[str, float]:
    """Means over the answers of all ranks. reward_std: within a group, the average."""
    rewards = scores["reward"]
    values = {**scores, "reward_std": rewards.std(1, correction=0),
              "no_variance": no_variance(rewards), "length": rollout.mask.sum(2)}
    means = [value.double().mean().item() for value in values.values()]
    means = train_sft.sum_over_ranks(means, rollout.tokens.device)
    world = dist.get_world_size()  # each rank has the same number of prompts
    return {key: mean / world for key, mean in zip(values, means)}


def one_answer(step: int, samples: list[dict], answers: list, scores: dict, advantages) -> dict:
    """Another answer of the first prompt each time, for people to read."""
    k = step % len(answers[0])
    return {**answers[0][k], "true": round(samples[0]["value"], 4),
            "reward": round(scores["reward"][0, k].item(), 4),
            "advantage": round(advantages[0, k].item(), 4)}


def parse_args(argv=None) -> argparse.Namespace:
    parser = render.make_parser(__doc__)
    train_sft.add_training_flags(parser)
    # App. A.4, Fig. 3a, and Table 5, column 3b GRPO
    parser.set_defaults(out="ckpt/grpo_3b", samples=8000, batch=32, micro_batch=2, lr=1e-5,
                        schedule="constant", warmup=0.0, clip=1.0, log_every=1, save_every=50,
                        val_every=50)
    flag = parser.add_argument_group("GRPO (samples and batches count prompts)").add_argument
    flag("--reward", choices=REWARDS, default="l1", help="minus the L1 error is the best (Fig. 3a)")
    flag("--format-weight", type=number(float, 0), default=1.0,
         help="of the format reward, which is 0 or 1 (App. A.4)")
    flag("--group", type=number(int, 2), default=8, help="answers a prompt (App. A.4)")
    flag("--batch-of", choices=("prompts", "answers"), default="prompts",
         help="what --batch counts")
    flag("--temperature", type=POSITIVE, default=1.0, help="of sampling and of scoring")
    flag("--max-new-tokens", type=COUNT,
         help="tokens an answer may have; default: as the checkpoint was trained, else 128")
    flag("--rollout-batch", type=COUNT, default=16, help="prompts answered together on one rank")
    flag("--advantage", choices=("std", "mean"), default="std",
         help="divide by the group's standard deviation, or not (Dr. GRPO)")
    flag("--kl-coef", type=number(float, 0), default=0.0,
         help="beta (App. A.4: 0, more makes the model underfit)")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    # ---------------------------------------------------------------------------------------- setup
    batch = args.batch  # prompts a step
    if args.batch_of == "answers":
        batch, rest = divmod(args.batch, args.group)
        if rest or not batch:
            raise ValueError(f"--batch {args.batch} answers are no whole number of groups of "
                             f"{args.group}.")
    # a model that is not ours is asked to think and answer (Sec. 3.2)
    run = train_sft.start_run(args, rank, world, device, batch,
                              f"prompts x {args.group} answers", {"prompt": "release"})
    model, optimizer, checkpoint = run.model, run.optimizer, run.checkpoint
    settings = checkpoint.settings
    reference = None
    if args.kl_coef > 0 and args.lora and args.freeze:
        reference = model  # without its adapters
    elif args.kl_coef > 0:  # always the model that the run started from, also when it is resumed
        reference = train_sft.shard_model(checkpoint.folder, device, run.dtype, master=run.dtype)
        reference.eval().requires_grad_(False)

    # ----------------------------------------------------------------------------------------- data
    share = batch // world
    streams = train_sft.make_streams(run.datasets, run.tasks)
    prompts = train_sft.Samples(streams, checkpoint, args.crop, args.seed, answers=False)
    loader = iter(torch.utils.data.DataLoader(
        prompts, num_workers=args.workers, collate_fn=list, worker_init_fn=render.start_worker,
        batch_sampler=train_sft.batch_indices(run.first, run.last, batch, share, rank, world)))
    micro_batches = [slice(k, k + args.micro_batch) for k in range(0, share, args.micro_batch)]

    # ----------------------------------------------------------------------------------------- loop
    bar = tqdm(total=run.steps, initial=run.first, dynamic_ncols=True,
               disable=rank > 0 or not sys.stderr.isatty())
    if run.validation and run.first == 0:
        train_sft.score_and_log(run, 0, args.val_batch, args.reshard)
    for step in range(run.first, run.last):
        start = time.time()
        lr = train_sft.get_lr(step, run.steps, args.lr, args.warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        samples = next(loader)
        messages = [message for sample in samples for message in sample["bad"]]
        run.bad += int(train_sft.sum_over_ranks([len(messages)], device)[0])
        train_sft.report_bad(messages, run.bad, (step + 1) * batch)
        loaded = time.time()

        # rollout: sampled answers
        first = step * batch + rank * share
        uniform = np.stack([uniforms(args.seed, first + k, args.group, settings["max_new_tokens"])
                            for k in range(share)])
        uniform, parts = torch.from_numpy(uniform).to(device), []
        with train_sft.gathered(model, args.reshard):
            for k in range(0, share, args.rollout_batch):
                rows = slice(k, k + args.rollout_batch)
                parts.append(sample_answers(model, checkpoint, samples[rows], uniform[rows],
                                            args.temperature))
        rollout = Rollout.join(parts)
        answers = rollout_answers(checkpoint, rollout)
        rolled = time.time()

        # rewards, advantages
        scores = score_answers(answers, samples, args.reward, args.format_weight, settings)
        advantages = group_advantages(scores["reward"], args.advantage)
        advantages = advantages.to(device, torch.float32)

        # loss: each token weighs the same however the prompts are split
        tokens, = train_sft.sum_over_ranks([rollout.mask.sum().item()], device)
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for micro_step, rows in enumerate(micro_batches, 1):
            train_sft.begin_micro_step(model, micro_step == len(micro_batches), args.reshard)
            part, prompts_of_part = rollout.part(rows), samples[rows]
            reference_logps = None
            if reference is not None:
                with torch.no_grad(), train_sft.without_adapters(reference):
                    reference_logps = answer_logps(reference, checkpoint, prompts_of_part,
                                                   part.tokens, args.temperature)
            logps = answer_logps(model, checkpoint, prompts_of_part, part.tokens, args.temperature)
            loss, kl = grpo_loss(logps, part.mask, advantages[rows], reference_logps, args.kl_coef)
            (loss * (world / tokens)).backward()  # FSDP averages the gradients of the ranks
            logps = logps.detach() * part.mask
            gap = (logps - part.logps * part.mask).abs().sum()
            sums += torch.stack([loss.detach(), -logps.sum(), kl, gap])
        dist.all_reduce(sums)
        loss, nll, kl, gap = (sums / tokens).tolist()
        norm = train_sft.clip_gradients(model, args.clip)
        train_sft.check_finite(loss=loss, grad_norm=norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = time.time()

        # |log p in the rollout - log p in the update| is rounding, or something is wrong
        if gap > 0.1:
            train_sft.print_line(run, step + 1, f"WARNING: logp_gap {gap:.2f}: the update scores "
                                 "answers under another distribution than they were drawn from")
        means = log_means(rollout, scores)
        shown = (step + 1) % args.log_every == 0
        answer = one_answer(step, samples, answers, scores, advantages) if shown else {}
        train_sft.log_line(run.out / "log.jsonl", step=step + 1, **means, loss=loss,
                           grad_norm=norm, nll=nll, kl=kl, logp_gap=gap, tokens=int(tokens), lr=lr,
                           bad=run.bad, rollout_s=rolled - loaded, update_s=done - rolled,
                           wait_s=loaded - start, prompts_per_s=batch / (done - start),
                           **({"answer": answer} if shown else {}))
        if shown:
            train_sft.print_line(
                run, step + 1, f"reward {means['reward']:.3f} +- {means['reward_std']:.3f}  "
                f"sampled delta1 {means['sampled_delta1']:.3f}  parsed {means['parsed']:.0%}  "
                f"format {means['reward_format']:.0%}  truncated {means['truncated']:.0%}  "
                f"length {means['length']:.1f}  norm {norm:.2f}  rollout {rolled - loaded:.2f} s  "
                f"update {done - rolled:.2f} s\n    {answer['text']!r}  true {answer['true']:g}  "
                f"reward {answer['reward']:.3f}  advantage {answer['advantage']:+.2f}")
        bar.update()

        final = step + 1 == run.last
        if run.validation and (final or (step + 1) % args.val_every == 0):
            train_sft.score_and_log(run, step + 1, args.val_batch, args.reshard)
        if final or (step + 1) % run.save_every == 0:
            train_sft.save_run(run, step + 1)

    # --------------------------------------------------------------------------------------- finish
    bar.close()
    train_sft.say_finished(run)


@render.command
def main(argv=None) -> None:
    args = parse_args(argv)
    with train_sft.claimed(Path(args.out)) as (rank, world, device):
        train(args, rank, world, device)


if __name__ == "__main__":
    main()
