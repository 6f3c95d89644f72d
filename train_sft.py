"""
Supervised fine-tuning of a VLM on distances as text (Sec. 3.4): jsonl files + model -> ckpt/<run>/

    bash runs/toy.sh                                                  # CPU, a tiny model
    python train_sft.py @runs/sft_3b.args --batch 64 --micro-batch 2  # one GPU
    torchrun --nproc-per-node 8 train_sft.py                          # the paper's 3B recipe
    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        train_sft.py @runs/sft_7b.args

Reads jsonl files and a model folder (or hub name). Writes run.json (flags, versions), log.jsonl,
log.png, a Hugging Face model folder with depthlm.json (what it was trained to see), and resume/:
the same command resumes.

One code path from one CPU process to many nodes: FSDP2, bf16 compute over fp32 master weights,
packed samples, logits and loss on the answer only. Sample i is a pure function of (seed, i), so a
run resumes from its step number alone, and the number of processes, loader workers and the
micro-batch change nothing (on a GPU: nothing but rounding). Flags in a file are given as @file; a
later flag wins.
"""
import argparse
import math
import pickle
import shlex
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as run_checkpointed
from tqdm import tqdm

import evaluate
import render
from render import COUNT, FAMILIES, NATURAL, POSITIVE, TASKS, Checkpoint, Records, file_path

DATASETS = {"argoverse2": 1, "waymo": 1, "nuscenes": 1, "scannetpp": 1, "taskonomy": 1, "hm3d": 1,
            "matterport3d": 0.1}  # Sec. 4: the mixture and its weights
MIX_SHARE = 0.1  # of ordinary chat samples, if --mix does not say
BAD_SHARE = 0.01  # a run stops when more of its samples than this cannot be read
STATE_CLASSES = {"PosixPath", "WindowsPath", "Size", "float32", "bfloat16", "_StorageInfo",
                 "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                 "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
                 "_get_layout"}
SMALL_UNIT = 1_000_000  # parameters; a smaller layer is gathered with the root, in one message
CHAT_LENGTH = 20_000  # characters of a question or an answer
SHARD_BYTES = 4 << 30  # of one safetensors file; also all that rank 0 holds at once while saving
# what may differ when a run is resumed
FREE_FLAGS = {"resume", "out", "workers", "micro_batch", "rollout_batch", "checkpointing",
              "reshard", "offload", "compile", "log_every", "save_every", "stop_after", "val",
              "val_every", "val_queries", "val_batch"}


# --------------------------------------------------------------------------------------------------
# samples: which comes when

BLOCK = 4096  # samples in which each stream has its share


class Stream(NamedTuple):
    """A task over a dataset, or chat (records None), and its share of all samples."""
    task: str
    records: Records | None
    share: float


def make_streams(datasets: list[tuple[Records, float]], tasks: dict[str, tuple[float, list[str]]],
                 chat_share: float = 0.0) -> list[Stream]:
    """tasks: name -> weight, and the names of its datasets (none: all). Motion needs poses, which
    not all datasets have: a task goes over those that it fits."""
    names = evaluate.dataset_names([records.path for records, _ in datasets])
    streams = [Stream("chat", None, chat_share)] if chat_share else []
    total = sum(weight for weight, _ in tasks.values())
    for task, (weight, only) in tasks.items():
        if unknown := set(only) - set(names):
            raise ValueError(f"--tasks {task}@{min(unknown)}: the datasets are {', '.join(names)}.")
        fitting = [dataset for dataset, name in zip(datasets, names)
                   if (not only or name in only) and render.task_fits(task, dataset[0])]
        if not fitting:
            paths = ", ".join(records.path for records, _ in datasets)
            raise ValueError(f"task '{task}' fits none of the records of {paths}. It needs "
                             f"{TASKS[task].needs or 'labelled points'}.")
        share = (1 - chat_share) * weight / total / sum(w for _, w in fitting)
        streams += [Stream(task, records, share * w) for records, w in fitting]
    return streams


def permute(i: int, n: int, seed: int) -> int:
    """Where i goes in a random permutation of range(n), without the permutation in memory: a
    Feistel network over the next power of 4, walked until it ends below n."""
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = i >> bits, i & mask
        for turn in range(4):
            mixed = (right + 1) * 0x9E3779B97F4A7C15 + (seed * 4 + turn) * 0xD1B54A32D192ED03
            mixed = ((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
            left, right = right, left ^ (mixed >> 33 & mask)
        i = left << bits | right
        if i < n:
            return i


class Samples(torch.utils.data.Dataset):
    """Endless training samples: item i is a pure function of (seed, i). In each block of samples
    every stream has its share, and each stream sees all of its images once before one comes again
    (Sec. 3.4). An unreadable image or record is replaced by another and reported in "bad".

    answers False: the prompts alone, as GRPO wants them. images: this number of images in all, over
    and over, each time with another of their points (Fig. 5)."""

    def __init__(self, streams: list[Stream], checkpoint: Checkpoint, crop: tuple, seed: int,
                 answers: bool = True, images: int | None = None, chats: list[dict] = ()):
        self.streams, self.checkpoint, self.crop, self.seed = streams, checkpoint, crop, seed
        self.answers, self.images, self.chats = answers, images, chats
        # the streams of a block's samples in mixed order, and how many of each come before
        ends = np.round(np.cumsum([stream.share for stream in streams]) * BLOCK).astype(int)
        self.quota = np.diff(ends, prepend=0)
        if not self.quota.all():
            least = streams[int(self.quota.argmin())]
            raise ValueError(f"{least.task} of {least.records and least.records.path}: its share "
                             f"{least.share:.2g} is too small. Give it a larger weight.")
        self.order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(ends)),
                                                                       self.quota))
        self.before = np.empty(BLOCK, int)
        for s, count in enumerate(self.quota):
            self.before[self.order == s] = np.arange(count)

    def __getitem__(self, i: int) -> dict:
        block, slot = divmod(i, BLOCK)
        s = self.order[slot]
        stream, k = self.streams[s], int(block * self.quota[s] + self.before[slot])
        bad, last = [], ""
        for attempt in range(100):
            try:
                return {**self.draw(i, stream, k, attempt), "bad": bad}
            except ValueError as e:
                last = str(e)
                if not isinstance(e, render.Unfit):
                    bad.append(last)
                if len(bad) == 20:
                    break
        raise ValueError(f"{attempt + 1} samples in a row could not be used; the last: {last}")

    def draw(self, i: int, stream: Stream, k: int, attempt: int) -> dict:
        """Sample i as its `attempt`-th draw has it. Raises Unfit or another ValueError."""
        rng = np.random.default_rng((self.seed, i, attempt))
        grid, value = self.checkpoint.grid, math.nan
        if stream.records is None:
            chat = self.chats[permute(k % len(self.chats), len(self.chats), self.seed)]
            views, question, answer = chat_views(chat, grid), chat["question"], chat["answer"]
        else:
            record, point = self.pick(stream, k, attempt, rng)
            query = render.make_query(stream.task, stream.records, record, rng, point)
            views, question, answer = render.render(query, self.checkpoint.settings, grid,
                                                    self.crop, rng)
            value = query.value
        tail = []
        if self.answers:
            tail = self.checkpoint.tokens(answer) + [self.checkpoint.end_id]
        return {**render.encode(self.checkpoint, views, question, tail), "task": stream.task,
                "value": value}

    def pick(self, stream: Stream, k: int, attempt: int, rng) -> tuple[int, int | None]:
        """-> which record, which of its points (None: any)."""
        records, images = stream.records, len(stream.records)
        if self.images:
            images = max(1, round(self.images * stream.share))
        epoch, k = divmod(k, images)
        if not self.images:
            record = permute(k, images, self.seed + epoch)
            return (int(rng.integers(images)) if attempt else record), None
        rng = np.random.default_rng((self.seed, k))  # the same for all points of an image
        record = permute((k + attempt) % len(records), len(records), self.seed)
        points = rng.permutation(len(records[record]["depth"]))
        return record, int(points[epoch % len(points)]) if len(points) else None


def batch_indices(first_step: int, steps: int, batch: int, micro_batch: int, rank: int, world: int):
    """The samples of each micro-batch of this rank, step after step. The global batch of a step is
    the same samples whatever the number of ranks."""
    share = batch // world
    for step in range(first_step, steps):
        start = step * batch + rank * share
        for k in range(start, start + share, micro_batch):
            yield list(range(k, min(k + micro_batch, start + share)))


def collate(samples: list[dict], filler: dict | None = None) -> dict:
    """tasks: that of each answer token. filler: a sample with an image and no answer. It joins a
    micro-batch of nothing but text, because all ranks must run the vision tower when one of them
    does: its sharded weights are gathered together."""
    bad = [message for sample in samples for message in sample["bad"]]
    tasks = [sample["task"] for sample in samples
             for _ in sample["input_ids"][sample["prompt_length"]:]]
    if filler and not any(sample["pixels"] for sample in samples):
        samples = [*samples, filler]
    return {**render.pack(samples), "tasks": tasks, "bad": bad}


def blank_sample(checkpoint: Checkpoint) -> dict:
    black = np.zeros((checkpoint.grid, checkpoint.grid, 3), np.uint8)
    view = render.View(black, (1.0,) * 6, (1.0, 1.0), (0, 0))
    return render.encode(checkpoint, [view], "")


def read_chats(path: str, answers: bool = True) -> list[dict]:
    """Ordinary chat: {"question", "answer", "image" (optional)} a line -> all lines, images as
    absolute paths. Raises ValueError with file and line."""
    chats, needed = [], ("question", "answer") if answers else ("question",)
    for where, chat in render.read_jsonl(path):
        texts = [chat.get(key) or "none" for key in ("answer", "image")]
        texts += [chat.get(key) for key in needed]
        if not all(isinstance(text, str) and 0 < len(text) <= CHAT_LENGTH for text in texts):
            raise ValueError(f"{where}: needs the texts {' and '.join(needed)}, and image may be a "
                             f"path; each has 1 to {CHAT_LENGTH:,} characters.")
        if chat.get("image"):
            chat["image"] = str((Path(path).parent / chat["image"]).resolve())
        chats.append(chat)
    if not chats:
        raise ValueError(f"{path}: holds no chat sample.")
    return chats


def chat_views(chat: dict, grid: int, longest: int = 1024) -> list[render.View]:
    """The image of a chat sample, if it has one: no marker, its own focal length, at most `longest`
    px."""
    if not chat.get("image"):
        return []
    image = render.open_image(chat["image"])
    image.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return [render.unify_focal(image, (1.0, 1.0, 0.0, 0.0, *image.size), None, grid)]


def report_bad(messages: list[str], bad: int, seen: int) -> None:
    """Print a few of this step's unreadable samples; end the run when there were too many on all
    ranks so far."""
    for message in messages[:3]:
        print(f"skipped: {render.printable(message)}", file=sys.stderr, flush=True)
    if bad > max(10, BAD_SHARE * seen):
        raise ValueError(f"{bad} of {seen} samples could not be read, more than {BAD_SHARE:.0%}. "
                         "The messages above name the files; prepare the data again, or leave the "
                         "dataset out.")


# --------------------------------------------------------------------------------------------------
# the model, sharded


def layers_of(model) -> tuple[list, list]:
    """-> vision blocks, decoder layers."""
    family = FAMILIES[model.config.model_type]
    vision = model.get_submodule(family.vision_blocks)
    return list(vision), list(model.model.language_model.layers)


def shard_model(folder: Path, device: torch.device, dtype: torch.dtype, reshard: bool = True,
                checkpointing: bool = False, compile: bool = False,
                master: torch.dtype = torch.float32, lora: int | None = None,
                freeze: str | None = None, offload: bool = False):
    """Build the model without memory, shard it (each vision block, each decoder layer, the root),
    and fill each rank's own slices from the safetensors files: no rank ever holds all of it.
    Parameters are `master`, compute is `dtype`, and so is what is not trained."""
    model = evaluate.build_model(folder, dtype, master)
    if lora:
        add_adapters(model, lora)
    freeze_parameters(model, bool(lora), freeze == "vision", dtype)
    vision, text = layers_of(model)
    if checkpointing:
        for layer in vision + text:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(run_checkpointed, use_reentrant=False,
                                                         preserve_rng_state=False)
    if compile:
        for layer in vision + text:
            layer.compile(dynamic=True)

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # inputs stay as they are: the vision tower's rotations are fp32, as they are in evaluation
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
    if offload:
        shard = partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))
    for layer in vision + text:
        if sum(p.numel() for p in layer.parameters()) < SMALL_UNIT:
            continue
        shard(layer, reshard_after_forward=reshard)
    shard(model, reshard_after_forward=False)

    evaluate.fill_model(model, folder, device, offload)
    reset_adapters(model)
    return model


# --------------------------------------------------------------------------------------------------
# adapters (LoRA, Hu et al. 2021), frozen parts

LORA_SCALE = 2.0  # alpha / rank


def add_adapters(model, rank: int) -> None:
    """Beside each linear layer of the language model: W x + LORA_SCALE B A x with A (rank, in), B
    (out, rank). They are parameters of the layer itself, whose name and place stay."""
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            empty = module.weight.new_empty
            module.lora_a = torch.nn.Parameter(empty(rank, module.in_features))
            module.lora_b = torch.nn.Parameter(empty(module.out_features, rank))
            module.adapted = True
            module.forward = adapted_linear.__get__(module)


def adapted_linear(self, x):
    out = F.linear(x, self.weight, self.bias)
    if not self.adapted:
        return out
    return out + LORA_SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


@torch.no_grad()
def reset_adapters(model) -> None:
    """B is zero: the start is the model as it was. A is the same for any number of processes."""
    for k, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith(evaluate.ADAPTERS):
            full = torch.zeros(parameter.shape)
            if name.endswith(evaluate.ADAPTERS[0]):
                full.normal_(std=full.shape[1] ** -0.5, generator=torch.Generator().manual_seed(k))
            local, rows = evaluate.local_rows(parameter)
            local.copy_(full[rows])


def freeze_parameters(model, language: bool, vision: bool, dtype: torch.dtype) -> None:
    """Not trained: the language model but for its adapters, or all else. vision includes what maps
    its tokens to the language model's width."""
    for name, parameter in model.named_parameters():
        of_language = name.startswith(("model.language_model.", "lm_head."))
        frozen = language if of_language else vision
        if frozen and not name.endswith(evaluate.ADAPTERS):
            parameter.requires_grad = False
            parameter.data = parameter.data.to(dtype)


@contextmanager
def without_adapters(model):
    """The model as it was before its language model was adapted."""
    modules = [module for module in model.modules() if hasattr(module, "adapted")]
    for module in modules:
        module.adapted = False
    try:
        yield
    finally:
        for module in modules:
            module.adapted = True


def merged(model, name: str, parameter) -> torch.Tensor:
    """The whole of a weight, its adapter added. All ranks take part."""
    full, module = whole(parameter), model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and hasattr(module, "adapted"):
        full = full.float() + LORA_SCALE * whole(module.lora_b) @ whole(module.lora_a)
    return full


def whole(parameter) -> torch.Tensor:
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach()


# --------------------------------------------------------------------------------------------------
# inference with sharded weights


@contextmanager
def gathered(model, reshard: bool):
    """Inference with sharded weights: they are gathered once and stay, so that ranks may run
    different numbers of forward passes; sharded again afterwards, or the next optimizer step would
    not be seen. All ranks must enter. model.eval() also switches activation checkpointing off,
    which would silently break the cache."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.eval()
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # decoding has too many shapes
            yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(reshard and module is not model, recurse=False)
        model.train()


# --------------------------------------------------------------------------------------------------
# loss


def answer_losses(model, checkpoint: Checkpoint, batch: dict, device) -> torch.Tensor:
    """Cross entropy of each answer token (N,); only their positions get logits."""
    # paper: the released code also trains on the question; here the answer and its end of turn
    inputs = render.model_inputs(batch, checkpoint, device, model.compute_dtype)
    predict_at, targets = batch["predict_at"].to(device), batch["targets"].to(device)
    logits = model(**inputs, use_cache=False, logits_to_keep=predict_at).logits[0]
    return F.cross_entropy(logits.float(), targets, reduction="none")


def sum_over_ranks(values: list[float], device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def begin_micro_step(model, last: bool, reshard: bool) -> None:
    """Weights stay gathered and gradients unreduced until the last micro-step; with `reshard`, for
    models whose whole fp32 gradients would not fit, neither does."""
    model.set_requires_gradient_sync(last or reshard)
    model.set_reshard_after_backward(last or reshard)
    model.set_is_last_backward(last)


def clip_gradients(model, limit: float) -> float:
    """Scale the gradients of all ranks down to norm `limit` -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def check_finite(**values: float) -> None:
    """Raises ValueError before an optimizer step that would ruin the weights."""
    if not all(map(math.isfinite, values.values())):
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(f"{shown}: not finite. Lower --lr, or resume from the last good state.")


def get_lr(step: int, steps: int, lr: float, warmup: float, schedule: str) -> float:
    """Learning rate of a step: linear warm-up over the first `warmup` share, then cosine to 0, or
    constant."""
    if step < warmup * steps:
        return lr * (step + 1) / (warmup * steps + 1)
    if schedule == "constant":
        return lr
    done = (step - warmup * steps) / max(1, steps - warmup * steps)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


def training_flops(model, batch: dict) -> float:
    """Model FLOPs of forward and backward over a packed batch: matrix products only, no
    recomputation counted."""
    text, vision = model.config.text_config, model.config.vision_config
    blocks, layers = layers_of(model)
    in_blocks, in_layers = (sum(p.numel() for layer in group for p in layer.parameters()
                                if p.ndim == 2) for group in (blocks, layers))
    lengths = (batch["segments"][1:] - batch["segments"][:-1]).double()
    patches = torch.tensor([float(rows * columns) for rows, columns in batch["sizes"]])
    full = getattr(vision, "fullatt_block_indexes", None)
    in_full = len(blocks) if full is None else len(full)
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    pairs = in_full * (patches ** 2).sum() + (len(blocks) - in_full) * window * patches.sum()

    seen = 2 * in_blocks * patches.sum() + 4 * vision.hidden_size * pairs
    read = 2 * in_layers * lengths.sum()
    rest = 2 * text.hidden_size * len(layers) * (lengths ** 2).sum()  # causal: half of 4 h L^2
    rest += 2 * text.hidden_size * text.vocab_size * len(batch["targets"])
    # a frozen tower has no backward, a frozen language model no gradients of weights
    trained = [next(group[0].parameters()).requires_grad for group in (blocks, layers)]
    return float(seen * (3 if trained[0] else 1) + read * (3 if trained[1] else 2) + 3 * rest)


# --------------------------------------------------------------------------------------------------
# files: the model folder, and the state to resume from


def save_model(model, checkpoint: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    """Write the model as a folder that plain from_pretrained opens: tensor after tensor is
    gathered, rank 0 holds one file's worth. A reader finds the old model or the new one at any
    moment: the index, or the only file, is renamed last."""
    rank, size, shard = dist.get_rank(), 0, {}
    if rank == 0:
        copy_model_files(checkpoint, out, dtype)
        render.write_json(out / "depthlm.json", checkpoint.settings)
    parts: list[tuple[Path, list[str]]] = []  # files, and the weights in each

    def flush():
        if shard and rank == 0:
            path = out / f".part-{len(parts) + 1}.tmp"
            try:
                save_file(shard, path, metadata={"format": "pt"})
            except SafetensorError as e:
                path.unlink(missing_ok=True)
                raise save_failed(path, e) from None
            shutil.copymode(out / "config.json", path)  # as the umask says; here it is 600
            parts.append((path, list(shard)))
        shard.clear()

    for name, parameter in model.named_parameters():
        if name.endswith(evaluate.ADAPTERS):
            continue
        full = merged(model, name, parameter)
        if rank == 0:
            check_finite(**{name: full.abs().max().item()})
            full = full.to("cpu", dtype, copy=True).contiguous()
            if size + full.nbytes > SHARD_BYTES:
                flush()
                size = 0
            shard[evaluate.file_names(model, name)[0]] = full
            size += full.nbytes
    flush()
    if rank == 0:
        publish_weights(parts, out)
    dist.barrier()


def copy_model_files(checkpoint: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer, templates and licence of the model that the run started from; how plain
    generate decodes is of our own: greedily, without the base's penalties and forced tokens."""
    source = checkpoint.folder
    for path in source.iterdir():
        wanted = path.suffix in (".json", ".txt", ".jinja", ".model", ".md")
        ours = "safetensors" in path.name or path.name in ("depthlm.json", "run.json", "README.md")
        if path.is_file() and wanted and not ours and source.resolve() != out.resolve():
            with render.replacing(out / path.name) as temporary:
                shutil.copyfile(path, temporary)
    config = render.read_json(source / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")
    render.write_json(out / "config.json", config)
    render.write_json(out / "generation_config.json", {
        "do_sample": False, "max_new_tokens": checkpoint.settings["max_new_tokens"],
        "eos_token_id": sorted(checkpoint.stop_ids),
        "pad_token_id": checkpoint.tokenizer.pad_token_id})


def publish_weights(parts: list[tuple[Path, list[str]]], out: Path) -> None:
    """Give written files their names, then drop those of the model before."""
    index, current = out / "model.safetensors.index.json", []
    if len(parts) == 1:
        current.append(parts[0][0].replace(out / "model.safetensors"))
        index.unlink(missing_ok=True)
    else:
        weight_map, total = {}, 0
        stamp = time.time_ns()  # never a name of the model before
        for k, (part, names) in enumerate(parts, 1):
            name = f"model-{stamp}-{k:05d}-of-{len(parts):05d}.safetensors"
            current.append(part.replace(out / name))
            weight_map |= dict.fromkeys(names, name)
            total += current[-1].stat().st_size
        render.write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for path in out.glob("model*.safetensors"):
        if path not in current:
            path.unlink()


def save_failed(path: Path, error: Exception) -> ValueError:
    free = shutil.disk_usage(path.parent).free / 2**20
    return ValueError(f"{path}: could not be written with {free:.0f} MiB free on the disk "
                      f"({type(error).__name__}). What was saved before is whole: make room and "
                      "give the same command again.")


def training_state(model, optimizer) -> dict:
    """Of what is trained; tensors alone: anything else would be pickled. The optimizer's settings
    are flags."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = dcp_state.get_model_state_dict(model).items()
    return {"model": {name: weight for name, weight in weights if name in trained},
            "optimizer": dcp_state.get_optimizer_state_dict(model, optimizer)["state"]}


def save_resume(model, optimizer, out: Path, step: int, bad: int) -> None:
    """Master weights and AdamW moments, each rank its own part, into a temporary folder that is
    renamed when complete; then state.json names it, and only then the one before goes."""
    folder = out / "resume" / f"step_{step:08d}"
    temporary = folder.with_name(f".{folder.name}")
    if dist.get_rank() == 0:
        for leftover in (temporary, folder):  # of a run that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=temporary)
    except (CheckpointException, RuntimeError) as e:  # a full disk, above all
        shutil.rmtree(temporary, ignore_errors=True)
        raise save_failed(temporary, e) from None
    dist.barrier()
    if dist.get_rank() == 0:
        temporary.rename(folder)
        render.write_json(out / "resume" / "state.json",
                          {"step": step, "folder": folder.name, "bad": bad})
        drop_other_states(folder)
    dist.barrier()


def drop_other_states(folder: Path) -> None:
    for old in folder.parent.glob("*step_*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def load_resume(model, optimizer, out: Path) -> dict | None:
    """Load the last complete state, written by any number of processes -> state.json, or None if
    there is none."""
    path = out / "resume" / "state.json"
    if not path.is_file():
        return None
    named = render.read_json(path)
    with render.blaming(path, "Start again in another --out, or bring the folder back."):
        counts = {key: named[key] for key in ("step", "bad")}
        folder = out / "resume" / f"step_{counts['step']:08d}"
        whole = all(type(n) is int and n >= 0 for n in counts.values())
        if not whole or named["folder"] != folder.name:
            raise ValueError(f"{named} names no state")
        if not all(path.is_file() for path in folder.iterdir()):
            raise ValueError(f"{folder.name} holds something that is no file")
        with open(folder / ".metadata", "rb") as file:
            MetadataUnpickler(file).load()
        state = training_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
    if dist.get_rank() == 0:  # a kill may have come before
        drop_other_states(folder)
    dcp_state.set_model_state_dict(model, state["model"],
                                   options=dcp_state.StateDictOptions(strict=False))
    settings = dcp_state.get_optimizer_state_dict(model, optimizer)
    dcp_state.set_optimizer_state_dict(model, optimizer, settings | {"state": state["optimizer"]})
    return counts


class MetadataUnpickler(pickle.Unpickler):
    """torch reads the state's .metadata by pickle, which would run whatever code a stranger's file
    names. This reads it first, and refuses all but what torch writes for tensors."""

    def find_class(self, module, name):
        if name not in STATE_CLASSES or module.split(".")[0] not in ("torch", "pathlib"):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, no part of a training state")
        return super().find_class(module, name)


def open_run(args: argparse.Namespace, out: Path, world: int) -> None:
    """Write run.json, or refuse a folder that holds anything but the run of the same command, which
    is resumed: other flags would change what is learned."""
    path, info = out / "run.json", render.run_info(args, world_size=world)
    saved = {p.name for p in out.iterdir()} - {path.name, ".lock", "log.jsonl", "log.png"}
    if saved and not (path.is_file() and (out / "resume").is_dir()):
        raise ValueError(f"{out}: exists, is not empty, and has no run to resume. Choose another "
                         "--out.")
    if saved:
        if said := render.other_flags(info, render.read_json(path), FREE_FLAGS):
            raise ValueError(f"{out}: was begun with {said}. Give the same to resume it, or choose "
                             "another --out.")
    render.write_json(path, info)


def trim_log(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        with render.blaming(path):
            lines = [line for _, line in render.read_jsonl(path, interrupted=True)
                     if line["step"] <= step]
        render.write_jsonl(path, lines)


def log_line(path: Path, **fields) -> None:
    if dist.get_rank() == 0:
        rounded = {key: round(value, 6) if isinstance(value, float) and key != "lr" else value
                   for key, value in fields.items()}
        with open(path, "a") as file:
            file.write(render.json_text(rounded))


def draw_log(path: Path) -> None:
    """log.png beside a log.jsonl: loss, reward and delta1 by step, as far as they are logged."""
    curves = {"loss": {}, "reward": {}, "delta1": {}}  # -> series -> [(step, value)]
    for _, line in render.read_jsonl(path, interrupted=True):
        found = [(key, "", line[key]) for key in ("loss", "reward") if key in line]
        if len(line.get("losses", {})) > 1:
            found += [("loss", task, loss) for task, loss in line["losses"].items()]
        found += [("delta1", name, s["delta1"]) for name, s in line.get("val", {}).items()]
        for key, name, value in found:
            curves[key].setdefault(name, []).append((line["step"], value))

    charts = []
    for key, series in curves.items():
        values = [value for points in series.values() for _, value in points]
        if not values:
            continue
        log, span = key == "loss" and min(values) > 0, (0, 1) if key == "delta1" else values
        axes = render.Axes(f"{key} by step", (0, line["step"]), span, (False, log))
        for k, (name, points) in enumerate(series.items()):
            # at most 200 means, so that a long run is a line and no cloud
            parts = np.array_split(points, min(200, len(points)))
            places = np.array([part.mean(0) for part in parts]).T
            axes.line(*places, render.hue(k))
            axes.points(*places, render.hue(k), 2)
            axes.name(k, name)
        charts.append(axes.image)
    if charts:
        with render.replacing(path.with_name("log.png")) as temporary:
            render.sheet(charts).save(temporary, "PNG")


# --------------------------------------------------------------------------------------------------
# validation


def validate(model, checkpoint: Checkpoint, sets: list[tuple[str, Records, list]], tasks,
             batch_size: int, reshard: bool) -> dict:
    """delta1 of each set's fixed queries by evaluate.py's own greedy answers, split over the ranks.
    sets: (name, records, (record, point) pairs)."""
    scores, rank, world = {}, dist.get_rank(), dist.get_world_size()
    with gathered(model, reshard):
        for name, records, pairs in sets:
            sums = np.zeros(4)
            for task in tasks:
                mine = evaluate.fitting_pairs(records, task, pairs)[rank::world]
                answered = evaluate.run_queries(model, checkpoint, records, mine, task, batch_size)
                for queries, answers, _ in answered:
                    true = np.array([query.value for query in queries])
                    pred = [render.read_answer(answer, task) for answer in answers]
                    pred = np.array(pred, float)  # None becomes NaN
                    hits = evaluate.within(pred, true, 1.25)
                    cut = sum("truncated" in answer for answer in answers)
                    sums += hits.sum(), np.isnan(pred).sum(), cut, len(true)
            hits, *counts = sum_over_ranks(sums.tolist(), model.compute_device)
            unparsed, cut, count = map(int, counts)
            if count:  # a file without poses says nothing about motion
                scores[name] = {"delta1": hits / count, "unparsed": unparsed, "truncated": cut,
                                "n": count}
    return scores


# --------------------------------------------------------------------------------------------------
# flags and start that both trainers share


def weighted(default: float, high: float = math.inf):
    """An argparse type: NAME or NAME:WEIGHT -> (name, weight), the weight between 0 and `high`.
    Colons may be part of a file's name."""

    def parse(text: str) -> tuple[str, float]:
        name, _, weight = text.rpartition(":")
        try:
            weight = float(weight)
        except ValueError:
            return file_path(text), default
        if Path(text).is_file():
            return text, default
        if not 0 < weight < high:
            limit = f"between 0 and {high:g}" if high < math.inf else "positive and finite"
            raise argparse.ArgumentTypeError(f"{text}: what follows ':' has to be {limit}")
        return file_path(name), weight

    return parse


def weighted_task(text: str) -> tuple[str, tuple[float, list[str]]]:
    """An argparse type: TASK[:WEIGHT][@DATASET,...] -> (task, (weight, names of its datasets))."""
    text, _, only = text.partition("@")
    name, weight = weighted(1.0)(text)
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"{name} is no task; there are {', '.join(TASKS)}")
    return name, (weight, only.split(",") if only else [])


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    on_off = argparse.BooleanOptionalAction
    flag = parser.add_argument_group("files").add_argument
    flag("--out", type=file_path, default="ckpt/sft_3b", help="folder of the run")
    flag("--model", default="Qwen/Qwen2.5-VL-3B-Instruct",
         help="folder or hub name to start from (Sec. 4)")
    flag("--resume", action="store_true", help=argparse.SUPPRESS)  # of older recipes

    flag = parser.add_argument_group("data").add_argument
    flag("--data", type=weighted(1.0), nargs="+", metavar="JSONL[:WEIGHT]",
         help="training files; default: the paper's mixture, as far as it is in data/ (Sec. 4)")
    render.add_record_flags(flag)
    flag("--tasks", type=weighted_task, nargs="+", metavar="TASK[:WEIGHT][@SET,...]",
         help=f"default: distance; there are {', '.join(TASKS)} (Sec. 3.4: equal weights); @SET: "
         "over these datasets alone")
    flag("--crop", type=COUNT, nargs=4, default=[1000, 1400, 700, 1200],
         metavar=("W0", "W1", "H0", "H1"), help="random crop, px (Sec. 4)")
    flag("--seed", type=NATURAL, default=0, help="which samples, in which order")
    flag("--workers", type=NATURAL, default=render.WORKERS,
         help="processes that load images, per rank")
    render.add_settings_flags(parser)

    flag = parser.add_argument_group("optimization (App. A.6, Table 5)").add_argument
    flag("--samples", type=COUNT, default=35_000_000, help="training samples, all ranks together")
    flag("--batch", type=COUNT, default=1280, help="samples an optimizer step, all ranks together")
    flag("--micro-batch", type=COUNT, default=4, help="samples in one forward pass on one rank")
    flag("--lr", type=POSITIVE, default=5.2e-5, help="learning rate after the warm-up")
    flag("--schedule", choices=("cosine", "constant"), default="cosine", help="of the lr")
    flag("--warmup", type=render.SHARE, default=0.1, help="share of the steps")
    flag("--clip", type=POSITIVE, default=0.1, help="gradient norm")
    flag("--betas", type=render.number(float, 0, 1), nargs=2, default=[0.9, 0.999], help="of AdamW")
    flag("--weight-decay", type=render.number(float, 0), default=0.0, help="of AdamW")

    flag = parser.add_argument_group("what is trained (default: everything)").add_argument
    flag("--lora", type=COUNT, metavar="R",
         help="of the language model, adapters of rank R alone; merged in the saved model")
    flag("--freeze", choices=("vision",), help="leave the vision tower and its projector as it is")

    flag = parser.add_argument_group("system").add_argument
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
         help="of the compute; auto: bfloat16 on a GPU, float32 elsewhere")
    flag("--checkpointing", action=on_off, default=True,
         help="activation checkpointing: less memory, a third more compute")
    flag("--reshard", action=on_off, default=False,
         help="free gathered weights after each forward, reduce gradients in each micro-batch: "
         "less memory, more traffic")
    flag("--offload", action=on_off, default=False,
         help="keep weights, gradients and moments in the CPU's memory, with --reshard but for the "
         "layer at work; slow")
    flag("--compile", action=on_off, default=False,
         help="torch.compile each layer: minutes at the start, fewer and larger kernels")

    flag = parser.add_argument_group("logging, validation").add_argument
    flag("--log-every", type=COUNT, default=10, help="steps a printed line; log.jsonl has each")
    flag("--save-every", type=COUNT, help="steps between saved models and states; default: 500, or "
         "a tenth of a shorter run")
    flag("--stop-after", type=COUNT, metavar="STEP",
         help="save and stop early, on the same schedule; default: the last step")
    flag("--val", type=file_path, nargs="*", metavar="JSONL",
         help="validation files; default: val.jsonl beside each training file")
    flag("--val-every", type=NATURAL, default=1000, help="steps; 0: never")
    flag("--val-queries", type=COUNT, default=256, help="of each file")
    flag("--val-batch", type=COUNT, default=16, help="queries a forward pass on one rank")


def default_data() -> list[tuple[str, float]]:
    """The paper's mixture, as far as it has been prepared; says what is missing."""
    paths = {name: Path("data") / name / "train.jsonl" for name in DATASETS}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        print(f"not prepared, so not trained on: {', '.join(missing)} (python prepare.py --dataset "
              "NAME)", file=sys.stderr)
    if len(missing) == len(paths):
        raise ValueError(f"no training data: none of data/{{{','.join(paths)}}}/train.jsonl "
                         "exists. Prepare them, or give --data FILE.jsonl[:WEIGHT] ...")
    return [(str(path), DATASETS[name]) for name, path in paths.items() if name not in missing]


def open_validation(args: argparse.Namespace, data: list) -> list[tuple[str, Records, list]]:
    """-> (name, records, fixed queries) of each validation file."""
    if not args.val_every:
        return []
    paths = args.val
    if paths is None:
        folders = dict.fromkeys(Path(path).parent for path, _ in data)
        paths = [str(f / "val.jsonl") for f in folders if (f / "val.jsonl").is_file()]
    opened = [Records(path, args.image_root, args.label_type) for path in paths]
    return [(name, records, evaluate.draw_queries(records, args.val_queries))
            for name, records in zip(evaluate.dataset_names(paths), opened)]


@dataclass
class Run:
    """What a training run has from its start on."""
    out: Path
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint  # that it started from, with the settings that it trains
    datasets: list[tuple[Records, float]]
    tasks: dict[str, tuple[float, list[str]]]  # weight, names of datasets (none: all)
    validation: list[tuple[str, Records, list]]
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    steps: int  # of the schedule
    first: int  # steps done before
    last: int  # where it stops
    save_every: int  # steps
    bad: int  # samples that could not be read so far


def start_run(args: argparse.Namespace, rank: int, world: int, device: torch.device, batch: int,
              what: str = "samples", fallback: dict | None = None) -> Run:
    """Open everything, and resume if there is a state. batch: how many an optimizer step, and of
    what; fallback: settings for a model without a depthlm.json."""
    out = Path(args.out)
    steps, dtype = args.samples // batch, evaluate.pick_dtype(args.dtype, device)
    if batch % world:
        raise ValueError(f"--batch {args.batch}: {batch} do not divide among {world} processes.")
    if steps < 1:
        raise ValueError(f"--samples {args.samples}: less than one batch of {batch}.")
    data, tasks = args.data or default_data(), dict(args.tasks or [("distance", (1.0, []))])
    datasets = [(Records(path, args.image_root, args.label_type), weight) for path, weight in data]
    validation = open_validation(args, data)
    given = {**render.settings_from_flags(args), "tasks": list(tasks)}
    checkpoint = render.open_checkpoint(args.model, given, fallback, quiet=rank > 0)
    if rank == 0:
        open_run(args, out, world)
    dist.barrier()

    model = shard_model(checkpoint.folder, device, dtype, args.reshard, args.checkpointing,
                        args.compile, lora=args.lora, freeze=args.freeze, offload=args.offload)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=tuple(args.betas),
                                  weight_decay=args.weight_decay, fused=True)
    model.train()
    state = load_resume(model, optimizer, out)
    first, bad = (state["step"], state["bad"]) if state else (0, 0)
    last = max(first, min(steps, args.stop_after or steps))
    save_every = args.save_every or min(500, max(1, steps // 10))
    run = Run(out, rank, world, device, dtype, checkpoint, datasets, tasks, validation, model,
              optimizer, steps, first, last, save_every, bad)
    if rank == 0:
        trim_log(out / "log.jsonl", first or -1)
        parameters = sum(p.numel() for p in trained)
        images = sum(len(records) for records, _ in datasets)
        print(f"{parameters / 1e6:.2f} M trained parameters, {world} x {device.type} "
              f"{str(dtype).removeprefix('torch.')}, {steps} steps of {batch} {what}, "
              f"{len(datasets)} file(s) with {images} images, from step {first}", flush=True)
    if state and first >= last:  # its model may have been lost since
        save_model(model, checkpoint, out, dtype)
    return run


def print_line(run: Run, step: int, text: str) -> None:
    if run.rank == 0:
        tqdm.write(f"step {step}/{run.steps}  {text}")


def score_and_log(run: Run, step: int, batch_size: int, reshard: bool) -> None:
    scores = validate(run.model, run.checkpoint, run.validation, run.tasks, batch_size, reshard)
    log_line(run.out / "log.jsonl", step=step, val=scores)
    if run.rank == 0:
        draw_log(run.out / "log.jsonl")
    shown = []
    for name, score in scores.items():
        cut = f" ({score['truncated']} of {score['n']} truncated)" if score["truncated"] else ""
        shown.append(f"{name} delta1 {score['delta1']:.3f}{cut}")
    print_line(run, step, "  ".join(shown))


def save_run(run: Run, step: int) -> None:
    """The model, then the state: a kill between the two costs steps, but never leaves an older
    model beside a newer state."""
    if run.rank == 0:
        (run.out / "resume").mkdir(exist_ok=True)
    save_model(run.model, run.checkpoint, run.out, run.dtype)
    save_resume(run.model, run.optimizer, run.out, step, run.bad)
    if run.rank == 0:
        draw_log(run.out / "log.jsonl")


def say_finished(run: Run) -> None:
    if run.rank == 0:
        command = ["python", "evaluate.py", str(run.out)]
        if run.validation:
            command += ["--data", *(records.path for _, records, _ in run.validation)]
        print(f"{run.out}: step {run.last} of {run.steps}. Score it: {shlex.join(command)}")


@contextmanager
def claimed(out: Path):
    """-> rank, world, device of a run that is alone in its folder."""
    rank, world, device = evaluate.setup_distributed()
    try:
        with render.lock_folder(out, when=rank == 0):
            yield rank, world, device
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = render.make_parser(__doc__)
    add_training_flags(parser)
    flag = parser.add_argument_group("SFT").add_argument
    flag("--mix", type=weighted(MIX_SHARE, 1), default=(None, 0.0), metavar="FILE[:SHARE]",
         help=f"ordinary chat samples among the others, so that the model keeps other abilities; "
         f"SHARE of all samples is {MIX_SHARE} if not given; texts of up to {CHAT_LENGTH:,} "
         "characters; default: none, as in the paper")
    flag("--points-per-image", type=COUNT, metavar="K",
         help="see samples / K images only, K points of each (Fig. 5); default: any point of any "
         "image")
    return parser.parse_args(argv)


def images_to_see(datasets: list[tuple[Records, float]], samples: int, points: int) -> int:
    """--points-per-image: how many images share the samples; each file must have as many, or some
    would repeat."""
    images = samples // points
    for records, _ in datasets:
        if not 1 <= images <= len(records):
            raise ValueError(f"--points-per-image {points}: {samples} samples are {images} images, "
                             f"{records.path} has {len(records)}. Change --samples, or prepare "
                             "more images.")
    return images


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    # ---------------------------------------------------------------------------------------- setup
    run = start_run(args, rank, world, device, args.batch)
    model, optimizer, checkpoint, out = run.model, run.optimizer, run.checkpoint, run.out

    # ----------------------------------------------------------------------------------------- data
    images = None
    if args.points_per_image:
        images = images_to_see(run.datasets, run.steps * args.batch, args.points_per_image)
    chats, chat_share = args.mix
    chats = read_chats(chats) if chats else []
    streams = make_streams(run.datasets, run.tasks, chat_share)
    samples = Samples(streams, checkpoint, args.crop, args.seed, images=images, chats=chats)
    kinds = [*run.tasks, "chat"]  # whose losses are logged one by one
    micro_steps = -(-(args.batch // world) // args.micro_batch)
    ahead = 1 + -(-micro_steps // args.workers) if args.workers else None  # a step, and one each
    loader = iter(torch.utils.data.DataLoader(
        samples, num_workers=args.workers, prefetch_factor=ahead,
        worker_init_fn=render.start_worker,
        batch_sampler=batch_indices(run.first, run.last, args.batch, args.micro_batch, rank, world),
        collate_fn=partial(collate, filler=blank_sample(checkpoint) if chats else None),
        pin_memory=device.type == "cuda"))

    # ----------------------------------------------------------------------------------------- loop
    bar = tqdm(total=run.steps, initial=run.first, dynamic_ncols=True,
               disable=rank > 0 or not sys.stderr.isatty())
    if run.validation and run.first == 0:
        score_and_log(run, 0, args.val_batch, args.reshard)
    for step in range(run.first, run.last):
        start = time.time()
        lr = get_lr(step, run.steps, args.lr, args.warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [next(loader) for _ in range(micro_steps)]
        wait = time.time() - start

        # all tokens are counted first: each weighs the same however the samples are split
        tasks = [task for b in batches for task in b["tasks"]]
        *counts, bad = sum_over_ranks([*(tasks.count(kind) for kind in kinds),
                                       sum(len(b["bad"]) for b in batches)], device)
        tokens = sum(counts)
        run.bad += int(bad)
        report_bad([m for b in batches for m in b["bad"]], run.bad, (step + 1) * args.batch)
        loss_sums = torch.zeros(len(kinds), device=device)
        for micro_step, batch in enumerate(batches, 1):
            begin_micro_step(model, micro_step == micro_steps, args.reshard)
            losses = answer_losses(model, checkpoint, batch, device)
            # FSDP averages the gradients of the ranks
            (losses.sum() * (world / tokens)).backward()
            which = torch.tensor([kinds.index(task) for task in batch["tasks"]])
            loss_sums.index_add_(0, which.to(device), losses.detach())
        dist.all_reduce(loss_sums)
        loss = loss_sums.sum().item() / tokens
        norm = clip_gradients(model, args.clip)
        check_finite(loss=loss, grad_norm=norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.time() - start
        tflops = sum(training_flops(model, b) for b in batches) * world / seconds / 1e12
        by_task = {kind: round(loss_sum / count, 6) for kind, loss_sum, count
                   in zip(kinds, loss_sums.tolist(), counts) if count}
        log_line(out / "log.jsonl", step=step + 1, loss=loss, losses=by_task, grad_norm=norm, lr=lr,
                 tokens=int(tokens), bad=run.bad, samples_per_s=args.batch / seconds,
                 tflops=tflops, wait_s=wait)
        if (step + 1) % args.log_every == 0:
            print_line(run, step + 1, f"loss {loss:.4f}  norm {norm:.2f}  lr {lr:.2e}  "
                       f"{args.batch / seconds:.1f} samples/s  {tflops:.3g} TFLOP/s  "
                       f"data wait {wait / seconds:.0%}")
        bar.update()

        final = step + 1 == run.last
        if run.validation and (final or (step + 1) % args.val_every == 0):
            score_and_log(run, step + 1, args.val_batch, args.reshard)
        if final or (step + 1) % run.save_every == 0:
            save_run(run, step + 1)

    # --------------------------------------------------------------------------------------- finish
    bar.close()
    say_finished(run)


@render.command
def main(argv=None) -> None:
    args = parse_args(argv)
    with claimed(Path(args.out)) as (rank, world, device):
        train(args, rank, world, device)


if __name__ == "__main__":
    main()
