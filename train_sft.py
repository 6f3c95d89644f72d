"""
Supervised fine-tuning of a VLM on distances as text (Sec. 3.4): jsonl files -> ckpt/<run>/, a Hugging Face model folder.

    python train_sft.py @runs/toy.args                                     # CPU, a tiny model from scratch
    python train_sft.py @runs/sft_3b.args --batch 64 --micro-batch 2       # one GPU
    torchrun --nproc-per-node 8 train_sft.py                               # the paper's 3B recipe, all data/*/train.jsonl
    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_sft.py @runs/sft_7b.args

Reads jsonl files and a model folder (or hub name). Writes run.json (flags, versions), log.jsonl, the model, depthlm.json and resume/.
One code path from one CPU process to many nodes: FSDP2, bf16 compute over fp32 master weights, packed samples, logits and
loss on the answer only. Sample i is a pure function of (seed, i), so a run resumes from its step number alone, and the
number of processes, loader workers and the micro-batch change nothing.  Flags in a file: one per line, @file; later wins.
"""
import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
import render
from render import Encoder, Records, fail

SHARD_BYTES = 4 << 30  # of one safetensors file; also all that rank 0 holds at once while saving
FREE_FLAGS = {"resume", "out", "workers", "micro_batch", "rollout_batch", "checkpointing", "reshard", "log_every", "save_every",
              "stop_after", "val", "val_every", "val_queries", "val_batch"}  # may change when a run is resumed
BAD_FRACTION = 0.01  # a run stops when more of its samples than this cannot be read
MATTERPORT_WEIGHT = 0.1  # Sec. 4
MIX_SHARE = 0.1  # of ordinary chat samples, if --mix does not say
TINY = {"hidden": 96, "heads": 4, "vision_layers": 2, "text_layers": 2, "init_std": 0.08}


# ----------------------------------------------------------------------------------------------------------------------
# data: which sample comes when


class Samples(torch.utils.data.Dataset):
    """Endless training samples: item i is a pure function of (seed, i). An unreadable image or record is replaced by
    another draw and reported in "bad". answers False: the prompts alone, as GRPO wants them. images: so many images in
    all, over and over, each time with another of their points (Fig. 5). chats: a share of ordinary chat samples."""

    def __init__(self, datasets: list[tuple[Records, float]], tasks: dict[str, float], settings: dict, encoder: Encoder,
                 crop: tuple, seed: int, answers: bool = True, images: int | None = None,
                 chats: tuple[list[dict], float] = ([], 0.0)):
        self.tasks, self.settings, self.encoder, self.crop = tasks, settings, encoder, crop
        self.seed, self.answers, self.images, self.chats = seed, answers, images, chats
        # motion needs poses, which not all datasets have: a task is asked of those that it fits
        self.fitting = {task: [d for d in datasets if render.can_ask(d[0], task)] for task in tasks}
        for task, fitting in self.fitting.items():
            if not fitting:
                raise ValueError(f"task '{task}': fits none of the records of {', '.join(r.path for r, _ in datasets)}."
                                 + (" Its records need 'pose', 'scene' and 'camera'." if task == "motion" else ""))

    def __getitem__(self, i: int) -> dict:
        bad, last = [], ""
        for attempt in range(20):
            rng = np.random.default_rng((self.seed, i, attempt))
            task, value = list(self.tasks)[draw(rng, list(self.tasks.values()))], math.nan
            try:
                if self.chats[1] > 0 and rng.random() < self.chats[1]:
                    task, chat = "chat", self.chats[0][rng.integers(len(self.chats[0]))]
                    views, question, text = render.chat_views(chat, self.encoder.grid), chat["question"], chat["answer"]
                else:
                    records, record, point = self.place(self.fitting[task], i, attempt, rng)
                    query = render.TASKS[task](records, record, rng, point)
                    views, question, text = render.render(query, self.settings, self.encoder.grid, self.crop, rng)
                    value = query.value
            except ValueError as e:
                last = str(e)
                bad += [] if isinstance(e, render.Unfit) else [last]
                continue
            tail = render.answer_tokens(self.encoder, text) + [self.encoder.end_id] if self.answers else []
            return {**render.encode(self.encoder, views, question, tail), "task": task, "value": value, "bad": bad}
        raise ValueError(f"20 samples in a row could not be read; the last: {last}")

    def place(self, datasets: list[tuple[Records, float]], i: int, attempt: int, rng) -> tuple[Records, int, int | None]:
        """-> records, which of them, which point (None: any). With self.images, sample i is point i // images of image
        i % images; these images are spread over the file, and differ if it has so many."""
        if not self.images:
            records = datasets[draw(rng, [w for _, w in datasets])][0]
            return records, int(rng.integers(len(records))), None
        turn, image = divmod(i, self.images)
        rng = np.random.default_rng((self.seed, image, attempt))  # the same for all points of an image
        records = datasets[draw(rng, [w for _, w in datasets])][0]
        stride = next(n for n in range(int(0.618 * len(records)) + 1, 2 * len(records) + 2) if math.gcd(n, len(records)) == 1)
        record = (image + attempt) * stride % len(records)
        points = rng.permutation(len(records[record]["depth"]))
        return records, record, int(points[turn % len(points)]) if len(points) else None


def draw(rng, weights: list[float]) -> int:
    return int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))


def batch_indices(first_step: int, steps: int, batch: int, micro_batch: int, rank: int, world: int):
    """The samples of each micro-batch of this rank, step after step. The global batch of a step is the same samples
    whatever the number of ranks."""
    share = batch // world
    for step in range(first_step, steps):
        start = step * batch + rank * share
        for k in range(start, start + share, micro_batch):
            yield list(range(k, min(k + micro_batch, start + share)))


def collate(samples: list[dict], filler: dict | None = None) -> dict:
    """filler: a sample with an image and no answer. It joins a micro-batch of nothing but text, because all ranks must
    run the vision tower when one of them does: its sharded weights are gathered together."""
    more = [filler] if filler and not any(s["pixels"] for s in samples) else []
    return {**render.pack(samples + more), "bad": [b for s in samples for b in s["bad"]], "count": len(samples)}


def blank_sample(encoder: Encoder) -> dict:
    view = render.View(np.zeros((encoder.grid, encoder.grid, 3), np.uint8), (1.0,) * 6, (1.0, 1.0), (0, 0))
    return render.encode(encoder, [view], "")


def open_mix(spec: str | None) -> tuple[list[dict], float]:
    """--mix 'chat.jsonl' or 'chat.jsonl:0.2' -> chat samples, their share of all samples."""
    if not spec:
        return [], 0.0
    path, _, share = spec.rpartition(":") if re.search(r":[^:/]*$", spec) else (spec, "", MIX_SHARE)
    try:
        share = float(share)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise ValueError(f"--mix {spec}: what follows ':' is the share of the samples, between 0 and 1.")
    return render.read_chats(path), share


def report_bad(messages: list[str], bad: int, seen: int) -> None:
    """Print a few of this step's unreadable samples; end the run when too many were met on all ranks so far."""
    for message in messages[:3]:
        print(f"skipped: {message}", file=sys.stderr, flush=True)
    if bad > max(10, BAD_FRACTION * seen):
        raise ValueError(f"{bad} of {seen} samples could not be read, more than {BAD_FRACTION:.0%}: stopped. The messages "
                         "above name the files; prepare the data again, or leave the dataset out.")


def open_datasets(specs: list[str], image_root: str | None = None, label_type: str | None = None) -> list[tuple[Records, float]]:
    """'a.jsonl' or 'a.jsonl:0.1' -> records and weights. Weights are relative."""
    datasets = []
    for spec in specs:
        path, _, weight = spec.rpartition(":") if ":" in spec else (spec, "", "1")
        try:
            weight = float(weight)
        except ValueError:
            path, weight = spec, 1.0
        if not weight > 0 or not math.isfinite(weight):
            raise ValueError(f"--data {spec}: the weight after ':' needs a positive number.")
        datasets.append((Records(path, image_root, label_type), weight))
    return datasets


# ----------------------------------------------------------------------------------------------------------------------
# the tiny model: the real architecture from scratch, for CPUs and tests


def make_tiny(folder: Path, seed: int = 0, **sizes) -> None:
    """Write a random Qwen2.5-VL of toy size and a tokenizer in which each digit is a token, as a Hugging Face folder."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    size = {**TINY, **sizes}
    transformers.utils.logging.disable_progress_bar()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    sentences = ["user\nassistant\n0123456789.", render.TEXT_QUESTION, render.CAMERA_QUESTION, render.RAY_ANSWER,
                 "left right above below"]
    for task, questions in render.QUESTIONS.items():
        sentences += [*questions.values(), *(render.answer_form(task, p) for p in render.PROMPTS)]
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sentences, trainer)
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
                "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|>"
                "<|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        chat_template=template)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start",
                                                                            "vision_end", "im_end", "endoftext")}
    head, wide = size["hidden"] // size["heads"], size["hidden"] * 8 // 3
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": size["hidden"],
                     "intermediate_size": wide, "num_hidden_layers": size["text_layers"],
                     "num_attention_heads": size["heads"], "num_key_value_heads": size["heads"],
                     "max_position_embeddings": 32768, "initializer_range": size["init_std"],
                     "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": ids["im_end"],
                     "pad_token_id": ids["endoftext"],
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                         "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6]}},
        vision_config={"depth": size["vision_layers"], "hidden_size": size["hidden"], "num_heads": size["heads"],
                       "intermediate_size": wide, "out_hidden_size": size["hidden"], "patch_size": 14,
                       "fullatt_block_indexes": list(range(size["vision_layers"])), "initializer_range": size["init_std"]},
        tie_word_embeddings=True, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"])
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    smooth_patch_filters(model.model.visual.patch_embed.proj.weight, size["init_std"])
    torch.set_rng_state(state)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids["im_end"], ids["endoftext"]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": 784, "max_pixels": 12845056})


@torch.no_grad()
def smooth_patch_filters(weight: torch.Tensor, std: float, frequencies: int = 3) -> None:
    """Start the patch filters (out, 3, 2, P, P) as random mixtures of low spatial frequencies, which is what trained vision
    towers have: a colour then looks alike wherever in a patch it stands. With white noise a tiny model needs several
    times as many samples until it finds the marker."""
    n = weight.shape[-1]
    waves = torch.cos(torch.pi * torch.arange(frequencies)[:, None] * (torch.arange(n) + 0.5) / n)  # (K, P)
    mix = torch.randn(*weight.shape[:2], 1, frequencies, frequencies)
    smooth = torch.einsum("octkl,ky,lx->octyx", mix, waves, waves).expand_as(weight)
    weight.copy_(smooth * (std / smooth.std()))


# ----------------------------------------------------------------------------------------------------------------------
# the model, sharded


def setup_distributed() -> tuple[int, int, torch.device]:
    """-> rank, world size, device. Without torchrun a world of one, so that there is one code path."""
    device = evaluate.pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def layers_of(model) -> tuple[list, list]:
    """-> vision blocks, decoder layers."""
    inner = model.model
    vision = inner.visual.blocks if hasattr(inner, "visual") else inner.vision_tower.transformer.layers
    return list(vision), list(inner.language_model.layers)


def shard_model(folder: str, device: torch.device, dtype: torch.dtype, reshard: bool = True, checkpointing: bool = False):
    """Build the model without memory, shard it (each vision block, each decoder layer, the root), and fill each rank's
    own slices from the safetensors files: no rank ever holds all of it. Parameters are fp32, compute is `dtype`."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    evaluate.pack_attention(model)
    if checkpointing:
        for layer in [*layers_of(model)[0], *layers_of(model)[1]]:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    vision, text = layers_of(model)
    for layer in vision + text:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)
    for module in model.modules():  # rotary frequencies are in no file
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    load_weights(model, folder)
    return model


def file_names(model_type: str, name: str) -> list[str]:
    """How a parameter may be called in a checkpoint file: as its module, or as the family was published on the hub."""
    published = {"qwen2_5_vl": (("model.visual.", "visual."), ("model.language_model.", "model.")),
                 "llava": (("model.vision_tower.", "vision_tower."), ("lm_head.", "language_model.lm_head."),
                           ("model.multi_modal_projector.", "multi_modal_projector."),
                           ("model.language_model.", "language_model.model."))}
    return [new + name[len(old):] for old, new in published.get(model_type, ()) if name.startswith(old)] + [name]


def load_weights(model, folder: str) -> None:
    """Copy each rank's rows of each parameter from the checkpoint files. Raises ValueError if one is missing."""
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        where = json.loads(index.read_text())["weight_map"]
    elif (Path(folder) / "model.safetensors").is_file():
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            where = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ValueError(f"{folder}: holds no *.safetensors weights; download the whole model folder.")
    files, rank, world = {}, dist.get_rank(), dist.get_world_size()
    for name, parameter in model.named_parameters():
        found = next((n for n in file_names(model.config.model_type, name) if n in where), None)
        if found is None:
            raise ValueError(f"{folder}: the weight '{name}' is in none of its files; is the download complete?")
        if where[found] not in files:
            files[where[found]] = safe_open(Path(folder) / where[found], "pt")
        rows = parameter.shape[0]
        share = -(-rows // world)  # FSDP2 shards the first dimension in equal chunks
        first, last = min(rank * share, rows), min((rank + 1) * share, rows)
        with torch.no_grad():
            parameter.to_local().copy_(files[where[found]].get_slice(found)[first:last])


@contextmanager
def gathered(model, reshard: bool):
    """Inference with sharded weights: they are gathered once and stay, so that ranks may run different numbers of forward
    passes; sharded again afterwards, or the next optimizer step would not be seen. All ranks must enter. model.eval()
    also switches activation checkpointing off, which would silently break the cache."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    model.eval()
    for m in modules:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in modules:
            m.reshard()
            m.set_reshard_after_forward(reshard and m is not model, recurse=False)
        model.train()


def train_step(model, optimizer, encoder, batches: list[dict], clip: float, device) -> dict:
    """One optimizer step over this rank's micro-batches. -> loss (nats a token), grad norm, counts over all ranks."""
    counts = torch.tensor([sum(len(b["targets"]) for b in batches), sum(len(b["bad"]) for b in batches)], device=device)
    dist.all_reduce(counts)  # all tokens are counted first, so that each weighs the same however samples are split
    tokens, bad = counts.tolist()
    losses = (answer_loss(model, encoder, batch, device) for batch in batches)
    loss, norm = descend(model, optimizer, losses, len(batches), tokens, clip)
    return {"loss": loss, "grad_norm": norm, "tokens": tokens, "bad": bad}


def descend(model, optimizer, losses, micro_steps: int, tokens: int, clip: float) -> tuple[float, float]:
    """The optimizer step of a loss sum over `tokens` tokens of all ranks; losses: this rank's part of the sum, one a
    micro-batch, each computed when it is asked for. -> loss a token, grad norm. FSDP averages over ranks, hence the
    factor world."""
    world, total = dist.get_world_size(), 0.0
    for k in range(micro_steps):
        last = k + 1 == micro_steps
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        loss = next(losses)
        (loss * (world / tokens)).backward()
        total = total + loss.detach()
    dist.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss, norm = total.item() / tokens, norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(f"loss {loss}, grad norm {norm}: not finite. Lower --lr, or resume from the last good state.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def answer_loss(model, encoder: Encoder, batch: dict, device) -> torch.Tensor:
    """Sum of the cross entropy of the answer tokens; only their positions get logits."""
    # paper: the released code also trains on the question; here only the answer and its end-of-turn token
    inputs = evaluate.cast(render.model_inputs(batch, encoder, device), model)
    logits = model(**inputs, use_cache=False, logits_to_keep=batch["predict_at"].to(device)).logits[0]
    return F.cross_entropy(logits.float(), batch["targets"].to(device), reduction="sum")


def get_lr(step: int, steps: int, lr: float, warmup: float, schedule: str) -> float:
    """Learning rate of a step: linear warm-up over the first `warmup` share, then cosine to 0, or constant."""
    if step < warmup * steps:
        return lr * (step + 1) / (warmup * steps + 1)
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup * steps) / max(1, steps - warmup * steps)))


def training_flops(model, batch: dict) -> float:
    """Model FLOPs of forward and backward over a packed batch: matrix products only, no recomputation counted."""
    config = model.config
    text, vision = config.text_config, config.vision_config
    blocks, layers = layers_of(model)
    weights = [sum(p.numel() for layer in group for p in layer.parameters() if p.ndim == 2) for group in (blocks, layers)]
    lengths = (batch["segments"][1:] - batch["segments"][:-1]).double()
    patches = torch.tensor([float(rows * columns) for rows, columns in batch["sizes"]])
    full = getattr(vision, "fullatt_block_indexes", None)
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    n_full = len(blocks) if full is None else len(full)
    forward = 2 * weights[0] * patches.sum() + 2 * weights[1] * lengths.sum()
    forward += 4 * vision.hidden_size * (n_full * (patches ** 2).sum() + (len(blocks) - n_full) * window * patches.sum())
    forward += 2 * text.hidden_size * len(layers) * (lengths ** 2).sum()  # causal: half of 4 h L^2
    forward += 2 * text.hidden_size * text.vocab_size * len(batch["targets"])
    return 3 * float(forward)


# ----------------------------------------------------------------------------------------------------------------------
# files: the model folder, and the state to resume from


def write_json(path: Path, content) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def save_model(model, source: str, out: Path, settings: dict, dtype: torch.dtype) -> None:
    """Write the model as a folder that plain from_pretrained opens: tensor after tensor is gathered, rank 0 holds one file's
    worth. A reader finds the old model or the new one at any moment: the index, or the only file, is renamed last."""
    rank, shard, size, done, weight_map = dist.get_rank(), {}, 0, [], {}

    def flush():
        if shard and rank == 0:
            name = f".part-{len(done) + 1}.safetensors"
            save_file(shard, out / name, metadata={"format": "pt"})
            done.append((name, list(shard)))
        shard.clear()

    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter  # all ranks take part
        if rank == 0:
            full = full.detach().to("cpu", dtype, copy=True).contiguous()
            if size + full.nbytes > SHARD_BYTES:
                flush()
                size = 0
            shard[file_names(model.config.model_type, name)[0]] = full
            size += full.nbytes
    flush()
    if rank == 0:
        for path in Path(source).iterdir():  # config, tokenizer, templates, licence
            if path.is_file() and path.suffix in (".json", ".txt", ".jinja", ".model", ".md") and "safetensors" not in path.name \
                    and path.name not in ("depthlm.json", "run.json", "README.md"):
                shutil.copyfile(path, out / path.name)
        model_config = json.loads((Path(source) / "config.json").read_text())
        model_config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(out / "config.json", model_config)
        write_json(out / "depthlm.json", settings)
        stale = set(out.glob("model*.safetensors"))
        if len(done) == 1:
            os.replace(out / done[0][0], out / "model.safetensors")
            stale -= {out / "model.safetensors"}
            (out / "model.safetensors.index.json").unlink(missing_ok=True)
        else:
            stamp = time.strftime("%Y%m%d%H%M%S")
            for k, (part, names) in enumerate(done):
                file = f"model-{stamp}-{k + 1:05d}-of-{len(done):05d}.safetensors"
                os.replace(out / part, out / file)
                weight_map.update(dict.fromkeys(names, file))
            stale -= {out / f for f in weight_map.values()}
            total = sum((out / f).stat().st_size for f in set(weight_map.values()))
            write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in stale:
            path.unlink()
    dist.barrier()


def save_resume(model, optimizer, out: Path, step: int, more: dict) -> None:
    """Master weights and AdamW moments, each rank its own part, into a temporary folder that is renamed when complete;
    then state.json names it, and only then the one before goes."""
    folder = out / "resume" / f"step_{step:08d}"
    temporary = folder.with_name(f".{folder.name}")
    if dist.get_rank() == 0:
        for leftover in (temporary, folder):  # of a run that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    state = {"model": dcp_state.get_model_state_dict(model), "optimizer": dcp_state.get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.save(state, checkpoint_id=temporary)
    except (CheckpointException, RuntimeError) as e:  # a full disk, above all
        free = shutil.disk_usage(out).free / 2**20
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"{temporary}: could not be written with {free:.0f} MiB free on the disk ({type(e).__name__}). The "
                         "state before is whole: make room and go on with --resume.") from None
    dist.barrier()
    if dist.get_rank() == 0:
        os.rename(temporary, folder)
        write_json(out / "resume" / "state.json", {"step": step, "folder": folder.name, **more})
        for old in (out / "resume").glob("*step_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load_resume(model, optimizer, out: Path) -> dict | None:
    """Load the last complete state, written by any number of processes -> state.json, or None if there is none."""
    path = out / "resume" / "state.json"
    if not path.is_file():
        return None
    named = json.loads(path.read_text())
    state = {"model": dcp_state.get_model_state_dict(model), "optimizer": dcp_state.get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=out / "resume" / named["folder"])
    dcp_state.set_model_state_dict(model, state["model"])
    dcp_state.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return named


def open_run(out: Path, args: argparse.Namespace, resume: bool) -> None:
    """Make the out folder and write flags and versions to run.json, or refuse a folder that is in use, and a resumed run
    whose flags would change what is learned."""
    path = out / "run.json"
    if not resume and out.exists() and {p.name for p in out.iterdir()} - {path.name, "base"}:  # these a failed start leaves
        raise ValueError(f"{out}: exists and is not empty. Go on with --resume, or choose another --out.")
    flags = json.loads(json.dumps(vars(args)))
    if (out / "resume" / "state.json").is_file() and path.is_file():
        before = json.loads(path.read_text())["flags"]
        changed = [k for k in flags if k not in FREE_FLAGS and k in before and before[k] != flags[k]]
        if changed:
            said = ", ".join(f"--{k.replace('_', '-')} {before[k]}" for k in changed)
            raise ValueError(f"{out}: was begun with {said}. Resume with the same, or choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    import transformers
    write_json(path, {"script": Path(sys.argv[0]).name, "flags": flags, "git": commit.stdout.strip() or None,
                      "torch": torch.__version__, "transformers": transformers.__version__,
                      "python": sys.version.split()[0], "world_size": dist.get_world_size()})


def trim_log(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in lines))
        os.replace(temporary, path)


def log_line(path: Path, **fields) -> None:
    if dist.get_rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) and k != "lr" else v for k, v in fields.items()}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# validation


def open_validation(specs: list[str], files: list[str] | None, queries: int, image_root: str | None,
                    label_type: str | None = None) -> list[tuple]:
    """-> (name, records, fixed queries) of each file; files None: val.jsonl beside each training file."""
    paths = sibling_val(specs) if files is None else files
    opened = [(evaluate.dataset_name(path), Records(path, image_root, label_type)) for path in paths]
    return [(name, records, evaluate.draw_queries(records, queries)) for name, records in opened]


def validate(model, encoder: Encoder, settings: dict, sets: list[tuple[str, Records, list]], tasks, batch_size: int,
             reshard: bool) -> dict:
    """delta1 of each set's fixed queries by evaluate.py's own greedy answers, split over the ranks."""
    scores = {}
    with gathered(model, reshard):
        for name, records, pairs in sets:
            sums = torch.zeros(3, dtype=torch.float64, device=model.device)
            for task in tasks:
                mine = evaluate.fitting_pairs(records, task, pairs)[dist.get_rank()::dist.get_world_size()]
                for queries, answers, _ in evaluate.ask(model, encoder, settings, records, mine, task, batch_size):
                    true = np.array([q.value for q in queries])
                    pred = np.array([render.parse_answer(a["text"], task) for a in answers], float)  # None: NaN
                    sums += torch.tensor([evaluate.within(pred, true, 1.25).sum(), np.isnan(pred).sum(), len(true)])
            dist.all_reduce(sums)
            hits, unparsed, count = sums.tolist()
            if count:  # a file without poses says nothing about motion
                scores[name] = {"delta1": hits / count, "unparsed": int(unparsed), "n": int(count)}
    return scores


# ----------------------------------------------------------------------------------------------------------------------


def default_data() -> list[str]:
    """The paper's mixture, as far as it has been prepared; says what is missing."""
    names = ("argoverse2", "waymo", "nuscenes", "scannetpp", "taskonomy", "hm3d", "matterport3d")
    paths = {name: Path("data") / name / "train.jsonl" for name in names}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        print(f"not prepared, so not trained on: {', '.join(missing)} (python prepare.py --dataset NAME)", file=sys.stderr)
    if len(missing) == len(names):
        raise ValueError("no training data: none of data/{" + ",".join(names) + "}/train.jsonl exists. Prepare them, or "
                         "give --data FILE.jsonl[:WEIGHT] ...")
    return [f"{path}:{MATTERPORT_WEIGHT if name == 'matterport3d' else 1.0}" for name, path in paths.items()
            if name not in missing]


def sibling_val(specs: list[str]) -> list[str]:
    """data/<name>/val.jsonl beside each training file, where there is one."""
    folders = dict.fromkeys(Path(spec.split(":")[0]).parent for spec in specs)
    return [str(f / "val.jsonl") for f in folders if (f / "val.jsonl").is_file()]


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")
    flag, on_off = parser.add_argument, argparse.BooleanOptionalAction
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    # I/O
    flag("--out", default="ckpt/sft_3b", help="folder of the run")
    flag("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="folder or hub name to start from, or 'tiny' (Sec. 4)")
    flag("--resume", action=on_off, default=False, help="go on from the out folder's last state, if it has one")
    flag("--seed", type=int, default=0)
    # data
    flag("--data", nargs="+", metavar="JSONL[:WEIGHT]", help="training files; default: the paper's mixture in data/")
    flag("--image-root", help="folder of the images, if not each jsonl's own")
    flag("--label-type", choices=("euclidean", "z"), help="what the files hold, whatever their records say")
    flag("--tasks", nargs="+", default=["distance:1"], metavar="TASK[:WEIGHT]", help=f"of {', '.join(render.TASKS)}; "
         "Sec. 4, Other Tasks: equal weights")
    flag("--mix", metavar="FILE[:SHARE]", help=f"ordinary chat samples among the others, so that the model keeps other "
         f"abilities; share of all samples, default {MIX_SHARE}. The paper mixes none in")
    flag("--points-per-image", type=int, metavar="K", help="see samples / K images only, K points of each (Fig. 5); default: "
         "any point of any image")
    flag("--crop", type=int, nargs=4, default=[1000, 1400, 700, 1200], metavar=("W0", "W1", "H0", "H1"),
         help="random crop, px (Sec. 4)")
    flag("--workers", type=int, default=4, help="processes that load images, per rank")
    # what the model sees
    render.add_settings_flags(parser)
    # optimization (App. A.6, Table 5, column 3b SFT)
    flag("--samples", type=float, default=35e6, help="training samples, all ranks together")
    flag("--batch", type=int, default=1280, help="samples an optimizer step, all ranks together")
    flag("--micro-batch", type=int, default=4, help="samples packed into one forward pass on one rank")
    flag("--lr", type=float, default=5.2e-5)
    flag("--schedule", choices=("cosine", "constant"), default="cosine")
    flag("--warmup", type=float, default=0.1, help="share of the steps")
    flag("--clip", type=float, default=0.1, help="gradient norm")
    flag("--betas", type=float, nargs=2, default=[0.9, 0.999], help="AdamW")
    flag("--weight-decay", type=float, default=0.0)
    # system
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="compute; auto: bfloat16 on a GPU")
    flag("--checkpointing", action=on_off, default=True, help="activation checkpointing: less memory, a third more compute")
    flag("--reshard", action=on_off, default=False, help="free gathered weights after each forward (larger models)")
    flag("--tiny", nargs="*", default=[], metavar="KEY=N", help=f"sizes of --model tiny; default {TINY}")
    # logging
    flag("--log-every", type=int, default=10, help="steps between printed lines; log.jsonl has every step")
    flag("--save-every", type=int, default=500, help="steps between resume states")
    flag("--stop-after", type=int, help="save and stop after this step, without changing the schedule")
    flag("--val", nargs="*", metavar="JSONL", help="validation files; default: val.jsonl beside each training file")
    flag("--val-every", type=int, default=1000, help="steps; 0: never")
    flag("--val-queries", type=int, default=256, help="of each file")
    flag("--val-batch", type=int, default=16)
    return parser.parse_args(argv)


def images_to_see(datasets: list[tuple[Records, float]], samples: int, points: int) -> int:
    """--points-per-image: how many images share the samples; each file must have so many, or some would repeat."""
    images = samples // points if points > 0 else 0
    for records, _ in datasets:
        if not 1 <= images <= len(records):
            raise ValueError(f"--points-per-image {points}: {samples} samples are {images} images, {records.path} has "
                             f"{len(records)}. Change --samples, or prepare more images.")
    return images


def parse_weights(specs: list[str]) -> dict[str, float]:
    """['distance:1', 'speed'] -> weights of tasks."""
    try:
        weights = {name: float(weight or 1) for name, _, weight in (s.partition(":") for s in specs)}
    except ValueError:
        raise ValueError(f"--tasks {' '.join(specs)}: needs TASK or TASK:WEIGHT, such as distance:1.") from None
    if not all(w > 0 and math.isfinite(w) for w in weights.values()):
        raise ValueError(f"--tasks {' '.join(specs)}: weights need positive numbers.")
    unknown = [name for name in weights if name not in render.TASKS]
    if unknown:
        raise ValueError(f"task '{unknown[0]}' is unknown; there are {', '.join(render.TASKS)}.")
    return weights


def run(args: argparse.Namespace) -> None:
    rank, world, device = setup_distributed()
    dtype = evaluate.pick_dtype(args.dtype, device)

    # -------------------------------------------------------------------------------------------------- setup
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} is not a multiple of the {world} processes.")
    steps, out = int(args.samples // args.batch), Path(args.out)
    if steps < 1:
        raise ValueError(f"--samples {args.samples:g} is less than one batch of {args.batch}.")
    specs, tasks = args.data or default_data(), parse_weights(args.tasks)
    datasets = open_datasets(specs, args.image_root, args.label_type)
    images = images_to_see(datasets, steps * args.batch, args.points_per_image) if args.points_per_image else None
    sets = []
    if args.val_every:
        sets = open_validation(specs, args.val, args.val_queries, args.image_root, args.label_type)
    if rank == 0:
        open_run(out, args, args.resume)
        if args.model == "tiny" and not (out / "resume" / "state.json").is_file():
            sizes = {k: float(v) if "." in v else int(v) for k, v in (s.split("=") for s in args.tiny)}
            make_tiny(out / "base", args.seed, **sizes)
    dist.barrier()
    source = str(out / "base") if args.model == "tiny" else render.find_checkpoint(args.model)
    given = {**render.given_settings(args), "tasks": list(tasks)}
    settings = render.load_settings(source, given, quiet=rank > 0 or args.model == "tiny")
    encoder = render.load_encoder(source)

    # -------------------------------------------------------------------------------------------------- model, optimizer
    model = shard_model(source, device, dtype, args.reshard, args.checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay,
                                  fused=True)
    model.train()
    first, bad = 0, 0
    if args.resume and (state := load_resume(model, optimizer, out)):
        first, bad = state["step"], state["bad"]
    if rank == 0:
        trim_log(out / "log.jsonl", first)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.2f} M parameters, {world} x {device.type} {str(dtype).removeprefix('torch.')}, {steps} steps of "
              f"{args.batch}, {len(datasets)} file(s) with {sum(len(r) for r, _ in datasets)} images, from step {first}", flush=True)

    # -------------------------------------------------------------------------------------------------- data
    last = min(steps, args.stop_after or steps)
    indices = batch_indices(first, last, args.batch, args.micro_batch, rank, world)
    chats = open_mix(args.mix)
    samples = Samples(datasets, tasks, settings, encoder, args.crop, args.seed, images=images, chats=chats)
    pack = partial(collate, filler=blank_sample(encoder) if chats[1] else None)
    loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=indices, num_workers=args.workers, collate_fn=pack,
                                              pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None))
    micro_steps = -(-(args.batch // world) // args.micro_batch)

    # -------------------------------------------------------------------------------------------------- loop
    bar = tqdm(total=steps, initial=first, disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
    for step in range(first, last):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, steps, args.lr, args.warmup, args.schedule)
        batches = [next(loader) for _ in range(micro_steps)]
        wait = time.time() - start
        result = train_step(model, optimizer, encoder, batches, args.clip, device)
        bad += result["bad"]
        report_bad([m for b in batches for m in b["bad"]], bad, (step + 1) * args.batch)
        seconds = time.time() - start
        flops = sum(training_flops(model, b) for b in batches) * world
        log_line(out / "log.jsonl", step=step + 1, loss=result["loss"], grad_norm=result["grad_norm"],
                 lr=optimizer.param_groups[0]["lr"], tokens=result["tokens"], bad=bad, samples_per_s=args.batch / seconds,
                 tflops=flops / seconds / 1e12, wait_s=wait)
        if rank == 0 and (step + 1) % args.log_every == 0:
            tqdm.write(f"step {step + 1}/{steps}  loss {result['loss']:.4f}  norm {result['grad_norm']:.2f}  "
                       f"lr {optimizer.param_groups[0]['lr']:.2e}  {args.batch / seconds:.1f} samples/s  "
                       f"{flops / seconds / 1e12:.3g} TFLOP/s  data wait {wait / seconds:.0%}")
        bar.update()
        final = step + 1 == last
        if sets and (final or (step + 1) % args.val_every == 0):
            scores = validate(model, encoder, settings, sets, tasks, args.val_batch, args.reshard)
            log_line(out / "log.jsonl", step=step + 1, val=scores)
            if rank == 0:
                tqdm.write(f"step {step + 1}/{steps}  " + "  ".join(f"{n} delta1 {s['delta1']:.3f}" for n, s in scores.items()))
        if final or (step + 1) % args.save_every == 0:
            save_resume(model, optimizer, out, step + 1, {"bad": bad})
            save_model(model, source, out, settings, dtype)

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
