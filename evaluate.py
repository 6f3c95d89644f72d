"""
Score a checkpoint: jsonl files of labelled points -> predictions.jsonl, metrics.json, errors.png.

    python evaluate.py ckpt/toy --data data/toy/val.jsonl          # CPU or one GPU
    torchrun --nproc-per-node 8 evaluate.py ckpt/sft_3b            # every data/*/val.jsonl
    python evaluate.py ckpt/toy --data data/toy/val.jsonl --all    # each labelled point once
    python evaluate.py --constant 2.0 --data data/nyuv2/val.jsonl  # a baseline without a model
    python evaluate.py --predictions theirs.jsonl                  # anyone's answers, same points
    python evaluate.py --depth-maps maps --depth-type z            # dense depth of any model

Also the home of everything that runs a trained model: loading, packed attention, the prefill,
decoding. train_sft.py, train_grpo.py and pointcloud.py call these functions.
Paper: Sec. 3 (protocol: delta1, 8,192 random samples), Tables 1, 3 and 6.
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, lru_cache, partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import render
from render import (
    COUNT,
    NATURAL,
    PAPER_CONSTANT,
    POSITIVE,
    TASKS,
    Checkpoint,
    Query,
    Records,
    file_path,
)

NUM_QUERIES = 8192  # Sec. 3, random samples a set
ADAPTERS = (".lora_a", ".lora_b")  # endings of their names
BINS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 10_000)  # of true numbers; no label is larger
ODD = ("truncated", "off_form")  # flags of unusual answers
ERRORS = ("abs_rel", "rmse", "log10", "silog")
METRICS = ("delta1", "delta2", "delta3", *ERRORS)
SURE = ("q10", "q90", "confidence", "lost")  # of an answer by the median
FREE_FLAGS = {"checkpoint", "photo", "out", "overwrite", "paper_rows", "gif", "json", "compare",
              "at", "known", "edge_filter", "min_confidence", "workers", "batch_size",
              "device"}  # on which answers do not depend


# --------------------------------------------------------------------------------------------------
# the model: attention over packed rows

try:  # FlashAttention as it comes with torch; its arguments changed between versions
    from torch.nn.attention.varlen import varlen_attn
    VARLEN_FLAGS = inspect.signature(varlen_attn).parameters
except ImportError:
    varlen_attn, VARLEN_FLAGS = None, {}


def attend(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None,
           max_length_q=None, segments=None, longest=None, **kwargs):
    """Attention of all layers, text and vision. query (B, heads, T, d) -> (B, T, heads, d), None.

    Packed (B = 1): tokens see their own segment only; the vision tower gives `cu_seq_lens_q` and
    `max_length_q`, the text `segments` and `longest`: starts (n + 1,), and the longest length.
    Otherwise: an `attention_mask` (B, 1, T, K) of 0 and -inf, as decoding and tree rows have."""
    starts = segments
    if cu_seq_lens_q is not None:
        starts, longest = cu_seq_lens_q, max_length_q
    places = kwargs.get("position_ids")
    patches = attention_mask is None and places is not None and places.shape[-1] == 2
    if starts is None and patches:
        # Pixtral's tower in older transformers gives (row, column): an image begins at (0, 0)
        begins = (places == 0).all(-1).nonzero()[:, 0]
        starts = F.pad(begins, (0, 1), value=len(places))
    if starts is None:
        return masked_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, d)
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0
    if query.is_cuda and fits and varlen_attn is not None:
        return flash_segments(q, k, v, starts, longest, scaling, module.is_causal)[None], None
    return batched_segments(q, k, v, starts, scaling, module.is_causal)[None], None


def masked_attention(query, key, value, mask, scaling) -> torch.Tensor:
    """On a GPU without cuDNN, which spends half a second on planning for each new shape, and each
    decoding step has a new one. Heads are expanded: only then does a fused kernel take a mask."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling,
                                              enable_gqa=True)
    key, value = (expand_heads(x, query.shape[1], 1) for x in (key, value))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)


def expand_heads(x: torch.Tensor, heads: int, axis: int) -> torch.Tensor:
    """Grouped heads, each repeated for the queries that share it."""
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bool (B, N, K) -> (B, 1, N, K) of 0 and -inf, once for all layers. Its rows are aligned to 8
    numbers, or a fused kernel would copy it in each layer."""
    mask = visible.new_zeros((*visible.shape[:2], -(-visible.shape[2] // 8) * 8), dtype=dtype)
    mask = mask[:, None, :, :visible.shape[2]]
    return mask.masked_fill_(~visible[:, None], -math.inf)


def flash_segments(q, k, v, starts, longest: int | None, scaling, causal: bool) -> torch.Tensor:
    """(S, heads, d) each -> (S, heads, d), by the variable-length kernel."""
    k, v = (expand_heads(x, q.shape[1], 1) for x in (k, v))
    if longest is None:  # a synchronisation, in each layer
        longest = int((starts[1:] - starts[:-1]).max())
    starts = starts.to(torch.int32)
    flags = {}
    if "scale" in VARLEN_FLAGS:  # else 1 / sqrt(d), which is what all families use
        flags["scale"] = scaling
    if causal:
        windows = "window_size" in VARLEN_FLAGS
        flags |= {"window_size": (-1, 0)} if windows else {"is_causal": True}
    return varlen_attn(q, k, v, starts, starts, longest, longest, **flags)


def batched_segments(q, k, v, starts, scaling, causal: bool) -> torch.Tensor:
    """The same with plain attention: segments of equal length, as most windows of Qwen2.5-VL's
    vision tower are, form one batch."""
    out, lengths = torch.empty_like(q), starts.diff()
    for length in lengths.unique().tolist():
        firsts = starts[:-1][lengths == length]
        index = firsts[:, None] + torch.arange(length, device=q.device)  # (n, length)
        parts = (x[index].transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(*parts, is_causal=causal, scale=scaling,
                                               enable_gqa=True)
        out[index] = found.transpose(1, 2)
    return out


def prepare_model(model, dtype: torch.dtype):
    """Make a transformers model run `attend` and the equivalent but faster forwards below. The name
    holds "flash" because vision towers then hand over segment starts instead of looping over
    windows in Python; it is set after construction because transformers would look up such a name
    on the hub."""
    from transformers import AttentionInterface
    AttentionInterface.register("packed_flash", attend)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation_internal = "packed_flash"
    for module in model.modules():
        for ending, forward in FASTER.items():
            if type(module).__name__.endswith(ending):
                module.forward = forward.__get__(module)
    model.compute_dtype = dtype
    return model


def patch_product(self, patches):
    """A convolution whose kernel is as large as its input is one matrix product."""
    weight = self.proj.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def rms_norm(self, x):
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def aligned_mlp(self, x):
    """Qwen2.5-VL's vision MLP is 3,420 wide: no multiple of 8, so no fast matrix product on a GPU.
    Zeros make it 3,456."""
    pad = -self.gate_proj.out_features % 64
    if not pad or not x.is_cuda:
        return type(self).forward(self, x)
    gate, up = (F.linear(x, F.pad(p.weight, (0, 0, 0, pad)), F.pad(p.bias, (0, pad)))
                for p in (self.gate_proj, self.up_proj))
    down = self.down_proj
    return F.linear(self.act_fn(gate) * up, F.pad(down.weight, (0, pad)), down.bias)


# class names of transformers, in Qwen2.5-VL and Qwen3-VL, by their endings
FASTER = {"VisionPatchEmbed": patch_product, "RMSNorm": rms_norm, "2_5_VLMLP": aligned_mlp}


def pick_device(device: str = "auto") -> torch.device:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before any use
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device == "auto" and count == 0:  # MPS, Apple's GPUs: not run on any so far
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if device == "auto":
        if local_rank >= count:
            raise ValueError(f"process {local_rank} of this machine has no GPU of its own, there "
                             f"are {count}. Start one a GPU: torchrun --nproc-per-node gpu.")
        return torch.device(f"cuda:{local_rank}")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # unknown, or not on this machine
        raise ValueError(f"--device {device}: {render.first_line(e)}.") from None
    return device


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def setup_distributed(device: str = "auto", **options) -> tuple[int, int, torch.device]:
    """-> rank, world size, device. Without torchrun a world of one, so that there is one code path
    from one process to many nodes."""
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"  # FSDP has no MPS
    device = pick_device(device)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **options)
    return dist.get_rank(), dist.get_world_size(), device


# --------------------------------------------------------------------------------------------------
# the model: built without memory, then filled from the checkpoint's files


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
    """The checkpoint's model on one device, ready for the functions below."""
    model = build_model(checkpoint.folder, dtype, dtype)
    return fill_model(model, checkpoint.folder, device).eval()


def build_model(folder: Path, dtype: torch.dtype, master: torch.dtype):
    """The model of a folder's config.json, without memory: its parameters are `master`, it computes
    in `dtype`."""
    import transformers
    with render.blaming(f"{folder}/config.json"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        axes = text.rope_parameters.get("mrope_section", [width // 2])
        if 2 * sum(axes) != width:
            raise ValueError(f"mrope_section {axes} is no split of heads {width} wide")
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=master, trust_remote_code=False)
    return prepare_model(model, dtype)


def fill_model(model, folder: Path, device: torch.device, offload: bool = False):
    """Give a model of build_model, sharded or not, memory and weights. offload: its parameters stay
    in the memory of the CPU, and FSDP fetches them."""
    model.compute_device = device
    model.to_empty(device="cpu" if offload else device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if not isinstance(model, FSDPModule):  # there a tie survives
        model.tie_weights()
    for module in model.modules():  # rotary frequencies are in no file
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model, folder: Path) -> None:
    """Copy each parameter, or this rank's rows of it, from the safetensors files: no rank ever
    holds all of them. Raises ValueError if one is missing, of another shape, or not finite."""
    where, opened = weight_files(folder), cache(open_weights)
    unused = {name for name in where if not name.endswith(("lm_head.weight", "inv_freq"))}
    for own_name, parameter in model.named_parameters():
        if own_name.endswith(ADAPTERS):  # of train_sft.py; they begin anew
            continue
        name = next((n for n in file_names(model, own_name) if n in where), None)
        if name is None:
            raise ValueError(f"{folder}: the weight '{own_name}' is in none of its files; is the "
                             "download complete?")
        unused.discard(name)
        path = folder / where[name]
        stored = opened(path).get_slice(name)
        shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        if shape != parameter.shape or kind not in ("F32", "BF16", "F16"):
            raise ValueError(f"{path}: the weight '{name}' is {kind} {shape}, the model of "
                             f"config.json has numbers of {tuple(parameter.shape)}. They are not "
                             "of one model: download the folder again.")
        local, rows = local_rows(parameter)
        local.copy_(stored[rows])
        if not local.isfinite().all():
            raise ValueError(f"{path}: the weight '{name}' holds NaN or infinity; the training "
                             "that wrote it has failed. Take an earlier checkpoint.")
    if unused:
        raise ValueError(f"{folder}: its model has no place for {len(unused)} of its weights, such "
                         f"as '{min(unused)}'; config.json and weights are not of one model.")


def local_rows(parameter) -> tuple[torch.Tensor, slice]:
    """What this rank holds of a parameter, and which of its rows that is."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(None)
    share = -(-len(parameter) // dist.get_world_size())  # equal chunks of the first dimension
    first = min(dist.get_rank() * share, len(parameter))
    return parameter.to_local(), slice(first, min(first + share, len(parameter)))


def file_names(model, name: str) -> list[str]:
    """How a parameter may be called in a checkpoint file: as the family was published on the hub,
    or as its module."""
    published = render.FAMILIES[model.config.model_type].published
    names = [old + name[len(new):] for new, old in published if name.startswith(new)]
    return [*names, name]


def weight_files(folder: Path) -> dict[str, str]:
    """Weight name -> the safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with render.blaming(index):
            named = render.read_json(index)["weight_map"]
            return {name: Path(file).name for name, file in named.items()}
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder}: holds no *.safetensors weights; download the whole folder.")
    with open_weights(folder / "model.safetensors") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def open_weights(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: is damaged or missing ({render.first_line(e)}). Download it "
                         "again.") from None


# --------------------------------------------------------------------------------------------------
# the model: a prefill of prompts and drafts, and steps of branches behind it


@dataclass
class Template:
    """An answer form (render.answer_form) as tokens. start: what stands before the number, the same
    whatever the number; numbers: all tokens that spell numbers. Without a form both are empty."""
    form: str | None
    start: list[int]
    numbers: dict[int, str]


def get_template(checkpoint: Checkpoint, form: str | None) -> Template:
    if form is None:
        return Template(None, [], {})
    if form not in checkpoint.template_cache:
        examples = ("2.35", "12.71", "0.05", "107.90")
        variants = [checkpoint.tokens(form.format(x=x)) for x in examples]
        shared = takewhile(lambda column: len({*column}) == 1, zip(*variants))
        start = [column[0] for column in shared]
        spelled = {i: checkpoint.tokenizer.decode([i]) for i in range(len(checkpoint.tokenizer))}
        numbers = {i: text for i, text in spelled.items() if re.fullmatch(r" ?[0-9.]+", text)}
        checkpoint.template_cache[form] = Template(form, start, numbers)
    return checkpoint.template_cache[form]


@dataclass
class Prefix:
    """Rows after their prefill. cache: keys and values (B, heads, P, d) a layer; seen (B, P) bool:
    which of them count; position (B,): the next token's; logits (B, F + 1, V): after the prompt,
    and after each drafted token."""
    cache: object
    seen: torch.Tensor
    position: torch.Tensor
    logits: torch.Tensor


def pack_prompts(checkpoint: Checkpoint, samples: list[dict], form: str | None = None) -> dict:
    """Samples (render.encode without an answer), the template's start behind each, packed in one
    row; position (B,): the next token's. Made by loader workers."""
    template = get_template(checkpoint, form)
    rows = [append_tokens(sample, template.start) for sample in samples]
    position = [int(row["position_ids"].max()) + 1 for row in rows]
    return {**render.pack(rows), "position": torch.tensor(position), "template": template}


def prefill(model, checkpoint: Checkpoint, batch: dict) -> Prefix:
    """Packed prompts of any sizes in one forward, nothing padded; their keys and values are laid
    out as rows afterwards."""
    from transformers import DynamicCache
    inputs = render.model_inputs(batch, checkpoint, model.compute_device, model.compute_dtype)
    starts, drafted = inputs["segments"].long(), len(batch["template"].start)
    ends, lengths = starts[1:], starts[1:] - starts[:-1]
    keep = ends[:, None] - 1 + torch.arange(-drafted, 1, device=ends.device)
    packed = DynamicCache()
    logits = model(**inputs, past_key_values=packed, use_cache=True,
                   logits_to_keep=keep.flatten()).logits[0]

    column = torch.arange(batch["longest"], device=ends.device)
    seen = column < lengths[:, None]
    index = (starts[:-1, None] + column).clamp(max=batch["input_ids"].shape[1] - 1)
    cache = DynamicCache()
    for i, layer in enumerate(packed.layers):
        keys, values = (x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values))
        cache.update(keys, values, i)
    return Prefix(cache, seen, batch["position"].to(ends.device),
                  logits.view(len(lengths), drafted + 1, -1))


def append_tokens(sample: dict, tokens: list[int]) -> dict:
    """The sample, continued by tokens at the positions that follow."""
    positions = sample["position_ids"]
    places = np.tile(positions.max() + 1 + np.arange(len(tokens)), (len(positions), 1))
    ids = np.concatenate([sample["input_ids"], np.asarray(tokens, int)])
    return {**sample, "input_ids": ids, "position_ids": np.concatenate([positions, places], 1)}


def padded_rows(rows: list[list[int]]) -> torch.Tensor:
    """Rows of any lengths, with zeros behind; what is computed for them is not read."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


def decode_step(model, checkpoint: Checkpoint, prefix: Prefix, tokens, position,
                seen) -> torch.Tensor:
    """Feed tokens (B, N) at positions (B, N); token n sees the cached columns and new tokens marked
    in seen (B, N, K + N). The new keys and values join the cache. -> logits (B, N, V)."""
    if checkpoint.family.mrope:
        position = position.expand(3, -1, -1)
    return model(input_ids=tokens, attention_mask=additive_mask(seen, model.compute_dtype),
                 position_ids=position, past_key_values=prefix.cache, use_cache=True).logits


# --------------------------------------------------------------------------------------------------
# greedy answers: speculative decoding with the answer template as the draft


def draft_end(checkpoint: Checkpoint, template: Template, answer: list[int]) -> list[int]:
    """The rest of the template, once the answer's number is complete; else nothing."""
    start = template.start
    number, last = answer[len(start):-1], answer[-1]
    if not (number and start and answer[:len(start)] == start) or last in template.numbers:
        return []
    whole = checkpoint.tokens(template.form.format(x=checkpoint.tokenizer.decode(number)))
    whole.append(checkpoint.end_id)
    return whole[len(answer):] if whole[:len(answer)] == answer else []


def accept(answer: list[int], fed: list[int], best: list[int], stop_ids, limit: int) -> int:
    """Extend an answer, in place, by the drafted tokens that hold, and by the one after them.
    fed: a token that is part of the text already, then the draft; best: the argmax after each.
    -> how many of `fed` hold: a drafted one does if the model says it after the one before."""
    accepted = 1
    while accepted < len(fed) and fed[accepted] == best[accepted - 1]:
        accepted += 1
    answer += fed[1:accepted]
    if not answer or answer[-1] not in stop_ids:
        answer.append(best[accepted - 1])
    del answer[limit:]
    return accepted


@torch.no_grad()
def greedy_answers(model, checkpoint: Checkpoint, batch: dict,
                   max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Token for token those of plain greedy decoding. -> token lists (with the end token, if
    reached), number of forward passes.

    The template is only a draft: its words go through the model many at a time, and each counts
    only if the model's argmax agrees. After a mismatch nothing more is drafted."""
    prefix = prefill(model, checkpoint, batch)
    rows = range(len(batch["position"]))
    answers, steps = decode_rows(model, checkpoint, batch, prefix, rows, max_new_tokens)
    return answers, 1 + steps


def decode_rows(model, checkpoint: Checkpoint, batch: dict, prefix: Prefix, rows,
                max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Greedy answers of some rows after their prefill, [] for the others; number of steps."""
    template, stops = batch["template"], checkpoint.stop_ids
    device, steps = prefix.logits.device, 0
    best = prefix.logits.argmax(-1).tolist()
    answers: list[list[int]] = [[] for _ in best]
    accepted = [1 + len(template.start)] * len(best)
    for b in rows:  # None stands for the last token of the prompt
        accepted[b] = accept(answers[b], [None, *template.start], best[b], stops, max_new_tokens)
    seen, position = drop_rejected(prefix, len(template.start), accepted)

    def feed(answer: list[int]) -> list[int]:
        """What a row feeds next: its last token and a draft of the rest; nothing at its end."""
        if not answer or answer[-1] in stops or len(answer) >= max_new_tokens:
            return []
        return [answer[-1], *draft_end(checkpoint, template, answer)]

    while any(fed := [feed(answer) for answer in answers]):
        width = max(map(len, fed))
        tokens = padded_rows(fed).to(device)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        visible = torch.cat([seen[:, None].expand(-1, width, -1),
                             causal.expand(len(fed), -1, -1)], 2)
        places = position[:, None] + torch.arange(width, device=device)
        logits = decode_step(model, checkpoint, prefix, tokens, places, visible)
        steps += 1
        accepted = [accept(answer, f, b, stops, max_new_tokens) if f else 0
                    for answer, f, b in zip(answers, fed, logits.argmax(-1).tolist())]
        accepted = torch.tensor(accepted, device=device)
        holds = torch.arange(width, device=device) < accepted[:, None]
        seen, position = torch.cat([seen, holds], 1), position + accepted
    return answers, steps


def drop_rejected(prefix: Prefix, drafted: int,
                  accepted: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> seen, position after a prefill of whose drafted tokens the first `accepted` - 1 hold. The
    rejected ones stay in the cache, unseen, and so does whatever was fed since."""
    rejected = drafted + 1 - torch.tensor(accepted, device=prefix.seen.device)
    ends = prefix.seen.sum(1) - rejected
    column = torch.arange(prefix.seen.shape[1], device=ends.device)
    seen = F.pad(column < ends[:, None], (0, prefix.cache.get_seq_length() - len(column)))
    return seen, prefix.position - rejected


# --------------------------------------------------------------------------------------------------
# the distribution over the numbers that the model could have said

SPLIT_ABOVE = 1e-2  # less probable prefixes are not expanded
NARROW = 0.05  # nor are intervals narrower than this share of their number
POINTS = 16  # that represent an interval in the median


@torch.no_grad()
def median_answers(model, checkpoint: Checkpoint, batch: dict,
                   max_new_tokens: int) -> tuple[list[dict], int]:
    """The median of the model's own distribution over numbers, instead of the likeliest digit after
    the likeliest digit. -> answers {"text", "q10", "q90", "confidence", "lost"}, number of forward
    passes (four; greedy needs six).

    q10 and q90: the model puts 10 % of its probability below and above. confidence: what it puts
    within 25 % of the median. lost: what was not followed. A row that would not say the template is
    answered greedily, "text" alone."""
    template, prefix = batch["template"], prefill(model, checkpoint, batch)
    start = torch.tensor(template.start, device=prefix.logits.device)
    agrees = (prefix.logits[:, :-1].argmax(-1) == start).all(1).tolist()
    leaves, forwards = number_leaves(model, checkpoint, prefix, template.numbers)
    answers = [summarize_leaves(row, template.form) if agreed else None
               for row, agreed in zip(leaves, agrees)]
    rest = [b for b, answer in enumerate(answers) if answer is None]
    tokens, steps = decode_rows(model, checkpoint, batch, prefix, rest, max_new_tokens)
    for b in rest:
        answers[b] = checkpoint.answer(tokens[b])
    return answers, forwards + steps


def summarize_leaves(leaves: list[tuple], form: str) -> dict | None:
    """Intervals (low, high, probability) -> the answer with their median; None if they hold less
    than half of the probability."""
    low, high, mass = np.array(leaves).T if leaves else np.zeros((3, 0))
    if mass.sum() < 0.5:
        return None
    inside = (np.arange(POINTS) + 0.5) / POINTS
    values = (low[:, None] + (high - low)[:, None] * inside).ravel()
    order = np.argsort(values)
    values, weights = values[order], np.repeat(mass / POINTS, POINTS)[order]
    below = np.cumsum(weights) - weights / 2
    q10, median, q90 = np.interp(np.array([0.1, 0.5, 0.9]) * mass.sum(), below, values)
    near = (values > median / 1.25) & (values < median * 1.25)
    numbers = q10, q90, weights[near].sum(), 1 - mass.sum()
    rounded = (round(float(x), 4) for x in numbers)
    return {"text": form.format(x=f"{median:.2f}"), **dict(zip(SURE, rounded))}


def number_leaves(model, checkpoint: Checkpoint, prefix: Prefix,
                  numbers: dict[int, str]) -> tuple[list[list[tuple]], int]:
    """Expand the numbers that may follow a prefill, all rows and prefixes of a length in one
    forward pass: a tree whose nodes see their own digits only. -> per row leaves (low, high,
    probability), number of forward passes.

    A prefix with a decimal point stands for an interval: "2.3" for [2.3, 2.4). It is a leaf when it
    is narrow or improbable: the probability of its many endings is kept without following them."""
    ids, rows, device = list(numbers), len(prefix.seen), prefix.logits.device
    nodes = [[("", 1.0)] for _ in range(rows)]  # number so far, its probability
    leaves: list[list] = [[] for _ in range(rows)]
    seen, logits = prefix.seen[:, None], prefix.logits[:, -1:]
    for depth in range(9):
        chances = logits.float().softmax(-1)[..., ids].tolist()  # (B, N, numbers)
        grown = [grow(nodes[b], chances[b], numbers, leaves[b]) for b in range(rows)]
        most = max(map(len, grown))
        if not most or depth == 8:
            break
        parent = padded_rows([[node[0] for node in row] for row in grown]).to(device)
        tokens = padded_rows([[node[1] for node in row] for row in grown]).to(device)
        nodes = [[node[2:] for node in row] for row in grown]
        seen = seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))
        itself = torch.eye(most, dtype=torch.bool, device=device).expand(rows, -1, -1)
        seen = torch.cat([seen, itself], 2)
        position = (prefix.position + depth)[:, None].expand(-1, most)
        logits = decode_step(model, checkpoint, prefix, tokens, position, seen)
    return leaves, 1 + depth


def grow(nodes: list[tuple], chances: list[list], numbers: dict[int, str],
         leaves: list[tuple]) -> list[tuple]:
    """One more token after each node of a row. What ends here joins `leaves`; -> the new nodes:
    (index of the parent, token, number so far, probability)."""
    grown = []
    for n, (text, weight) in enumerate(nodes):
        if text.strip("."):  # here the number may end
            end = weight * max(0.0, 1 - sum(chances[n]))
            leaves.append((float(text), float(text), end))
        for (token, digits), chance in zip(numbers.items(), chances[n]):
            longer = text + (digits if text else digits.strip())
            share = weight * chance
            if " " in longer or longer.count(".") > 1:
                continue
            low = float("0" + longer)  # it may be "."
            width = 10.0 ** -len(longer.partition(".")[2])
            if "." in longer and (share <= SPLIT_ABOVE or width <= NARROW * low):
                leaves.append((low, low + width, share))
            elif share > SPLIT_ABOVE:
                grown.append((n, token, longer, share))
    return grown


# --------------------------------------------------------------------------------------------------
# queries


def draw_queries(records: Records, count: int | None, seed: int = 0) -> list[tuple[int, int]]:
    """(record, point) pairs. count None: each labelled point once. Else `count` different ones, a
    random point of a random image each (Sec. 3: 8,192); all where there are fewer. Sorted, so that
    an image is opened once. Those of a smaller count are among those of a larger one."""
    if count is None:
        return [(i, k) for i in range(len(records)) for k in range(len(records[i]["depth"]))]
    # paper: it draws with replacement; here no point counts twice
    rng = np.random.default_rng(seed)
    images, left = np.arange(len(records)), len(records)  # the first `left` have points left
    points, drawn, pairs = {}, Counter(), set()
    while len(pairs) < count and left:
        place = int(rng.integers(left))
        i = int(images[place])
        if i not in points:
            points[i] = len(records[i]["depth"])
        if drawn[i] == points[i]:
            left -= 1
            images[place] = images[left]
            continue
        pair = (i, int(rng.integers(points[i])))
        drawn[i] += pair not in pairs
        pairs.add(pair)
    return sorted(pairs)


def query_of(records: Records, task: str, pair: tuple[int, int], seed: int = 0) -> Query:
    """The query of a (record, point) pair; what a task draws (a speed, a second point) is a
    function of the pair."""
    return render.make_query(task, records, pair[0], np.random.default_rng((seed, *pair)), pair[1])


def fitting_pairs(records: Records, task: str, pairs: list, seed: int = 0) -> list:
    """The pairs that a task suits: for motion, those of records with a pose that moved."""
    if TASKS[task].needs is None:
        return pairs
    fitting = []
    for pair in pairs:
        with suppress(render.Unfit):
            query_of(records, task, pair, seed)
            fitting.append(pair)
    return fitting


def query_batch(checkpoint: Checkpoint, records: Records, task: str, seed: int, singly: bool,
                form: str | None, pairs: list) -> tuple[list[Query], dict]:
    """Queries, rendered, encoded and packed, by loader workers. singly: a distance sample for each
    of a query's points. An unreadable image ends the evaluation: a score over fewer points than it
    claims would be wrong."""
    queries = [query_of(records, task, pair, seed) for pair in pairs]
    parts = queries
    if singly:
        parts = [replace(query, task="distance", points=[point])
                 for query in queries for point in query.points]
    samples = []
    for part in parts:
        views, question, _ = render.render(part, checkpoint.settings, checkpoint.grid)
        samples.append(render.encode(checkpoint, views, question))
    return queries, pack_prompts(checkpoint, samples, form)


def run_queries(model, checkpoint: Checkpoint, records: Records, pairs: list,
                task: str = "distance", batch_size: int = 32, workers: int = 0, seed: int = 0,
                decode: str = "greedy", geometry: bool = False):
    """Query the model -> yields (queries, answers, forward passes) batch by batch. An answer is
    {"text"}, with decode "median" also its interval (median_answers); "truncated" if the token
    limit ended it, "off_form" if it lacks the requested form. geometry: two points by their two
    distances (measure)."""
    settings = checkpoint.settings
    singly = geometry and TASKS[task].markers == 2
    form = render.answer_form("distance" if singly else task, settings)
    if decode == "median" and form is None:
        raise ValueError(f"--decode median: an answer of camera '{settings['camera']}' holds more "
                         "than one number; decode it greedily.")
    get_template(checkpoint, form)  # once, and not in each worker
    loader = torch.utils.data.DataLoader(
        pairs, batch_size, num_workers=workers, worker_init_fn=render.start_worker,
        collate_fn=partial(query_batch, checkpoint, records, task, seed, singly, form),
        pin_memory=model.compute_device.type == "cuda")
    limit = settings["max_new_tokens"]
    for queries, batch in loader:
        if decode == "median":
            answers, forwards = median_answers(model, checkpoint, batch, limit)
        else:
            tokens, forwards = greedy_answers(model, checkpoint, batch, limit)
            answers = [checkpoint.answer(t) for t in tokens]
        if singly:
            answers = [measure(*three) for three in zip(queries, answers[::2], answers[1::2])]
        for answer in answers:
            if not (singly or render.has_form(answer["text"], task, settings)):
                answer["off_form"] = True
        yield queries, answers, forwards


def measure(query: Query, *answers: dict) -> dict:
    """The distance between two points by geometry: both answers on their pixels' rays, and the
    length between them."""
    depth_m, texts = zip(*((render.read_answer(a), a["text"]) for a in answers))
    if None in depth_m:
        return {"text": "", "texts": texts}
    points, intrinsics = np.array(query.points), query.records[0]["intrinsics"]
    first, second = render.unproject(points, np.array(depth_m), intrinsics)
    return {"text": f"{np.linalg.norm(first - second):.2f} meters", "texts": texts}


def prediction(query: Query, answer: dict, **more) -> dict:
    """One line of predictions.jsonl. answer: {"text", ...}, the rest is kept."""
    record = query.records[0]
    x, y = query.points[0] if query.points else (None, None)
    line = {"image": record["image"], "pixel": [x, y], "task": query.task,
            "true": round(query.value, 4),
            "pred": render.read_answer(answer, query.task), **answer}
    if query.task == "distance":  # true / ray is z
        line["ray"] = round(float(render.ray_length(x, y, record["intrinsics"])), 6)
    if query.given:
        line["given"] = query.given
    if len(query.points) > 1:
        line["pixel2"] = list(query.points[1])
    if len(query.records) > 1:
        line["image2"] = query.records[1]["image"]
    return {**line, **more}


def each_query(groups: list) -> list[tuple[str, Records, str, tuple[int, int]]]:
    """Groups of list_queries -> (dataset name, records, task, pair); its index is a query's id."""
    return [(*group, pair) for *group, pairs in groups for pair in pairs]


def export_queries(groups: list, settings: dict, grid: int, seed: int, folder: Path) -> None:
    """What a model would see, as files: <folder>/images/*.png and queries.jsonl, one query a line.
    Any system can answer them; its answers, a number or the text, go into each line as "pred", and
    --predictions scores that file. Existing images are kept."""
    lines = []
    bar = tqdm(each_query(groups), desc="queries", disable=None)
    for number, (name, records, task, pair) in enumerate(bar):
        query = query_of(records, task, pair, seed)
        views, question, _ = render.render(query, settings, grid)
        letters = "ab" if len(views) > 1 else [""]
        images = [f"images/{number:06d}{letter}.png" for letter in letters]
        for path, view in zip(images, views):
            if not (folder / path).exists():
                with render.replacing(folder / path) as temporary:
                    Image.fromarray(view.pixels).save(temporary, "PNG")
        known = prediction(query, {"text": ""})
        del known["pred"], known["text"]
        lines.append({"id": number, "dataset": name, "images": images, "question": question,
                      **known})
    render.write_jsonl(folder / "queries.jsonl", lines)
    print(f"{folder}/queries.jsonl: {len(lines)} queries. Add \"pred\" to each line, a number or "
          "the answer's text, then: python evaluate.py --predictions FILE")


# --------------------------------------------------------------------------------------------------
# metrics: pred and true are (N,) arrays; pred is NaN where an answer could not be parsed


def within(pred: np.ndarray | float, true: np.ndarray, factor: float) -> np.ndarray:
    """(N,) bool: max(pred/true, true/pred) < factor. Unparsed and non-positive answers are wrong,
    and so are all where the truth is not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (pred > 0) & (true > 0) & (np.maximum(pred / true, true / pred) < factor)


def metrics(pred: np.ndarray, true: np.ndarray) -> dict:
    """delta1..3 over all answers; the errors over the positive parsed ones (`n - unparsed -
    nonpositive` of them)."""
    out = {f"delta{k}": float(within(pred, true, 1.25 ** k).mean()) for k in (1, 2, 3)}
    out |= dict.fromkeys(ERRORS)
    p, t = pred[pred > 0], true[pred > 0]
    if len(p):
        log = np.log(p / t)
        out["abs_rel"] = float((np.abs(p - t) / t).mean())
        out["rmse"] = math.sqrt(((p - t) ** 2).mean())
        out["log10"] = float((np.abs(log) / math.log(10)).mean())
        out["silog"] = float(100 * log.std())
    out["unparsed"] = int(np.isnan(pred).sum())
    out["nonpositive"] = int((pred <= 0).sum())
    out["n"] = len(true)
    return out


def interval(hits: np.ndarray, images: np.ndarray, draws: int = 2000,
             seed: int = 0) -> list[float] | None:
    """95 % interval of the mean of hits by resampling images, not points: points of one image err
    together. None for fewer than two images."""
    _, index = np.unique(images, return_inverse=True)
    count = np.bincount(index).astype(float)
    if len(count) < 2:
        return None
    total, rng = np.bincount(index, weights=hits), np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        picked = rng.integers(len(count), size=len(count))
        means.append(total[picked].sum() / count[picked].sum())
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]


def best_constant(true: np.ndarray) -> float:
    """The one answer that is within 25 % of most labels: the densest window of width 2 log 1.25 on
    the log axis."""
    t = np.sort(np.log(true))
    width = 2 * math.log(1.25) - 1e-9
    counts = np.searchsorted(t, t + width, side="right") - np.arange(len(t))
    k = int(counts.argmax())
    return float(np.exp((t[k] + t[k + counts[k] - 1]) / 2))


def constant_delta1(value: float, true: np.ndarray) -> float:
    return float(within(value, true, 1.25).mean())


def arrays(lines: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """-> pred, true; None becomes NaN."""
    pred = [line["pred"] for line in lines]
    true = [line["true"] for line in lines]
    return np.array(pred, float), np.array(true, float)


def score(lines: list[dict]) -> dict:
    """Predictions of one dataset -> metrics, Euclidean and by z where the ray is known, and the
    constant rows."""
    pred, true = arrays(lines)
    images = np.array([line["image"] for line in lines])
    best = best_constant(true)
    out = metrics(pred, true)
    out["delta1_ci"] = interval(within(pred, true, 1.25), images)
    out["always_2m"] = constant_delta1(2.0, true)
    task = TASKS.get(lines[0].get("task", "distance"))
    out["best_constant"] = {"value": round(best, 3), "delta1": constant_delta1(best, true),
                            "unit": next(iter(task.unit)) if task else ""}

    out["bins"] = {f"{low}-{high}": metrics(pred[here], true[here])
                   for low, high in zip(BINS, BINS[1:])
                   if (here := (low <= true) & (true < high)).any()}
    shares = Counter(key for line in lines for key in ODD if line.get(key))
    out |= {key: count / len(lines) for key, count in shares.items()}
    known = [line for line in lines if {*SURE} <= line.keys()]
    if known:  # how often the truth lies where the model puts 80 % of its probability
        inside = [line["q10"] <= line["true"] <= line["q90"] for line in known]
        out["in_10_90"] = sum(inside) / len(known)
        for key in ("confidence", "lost"):
            out[key] = sum(line[key] for line in known) / len(known)
    if all("ray" in line for line in lines):
        # ratios (delta, AbsRel) are the same by z; those of a constant answer are not
        ray = np.array([line["ray"] for line in lines])
        by_z = metrics(pred / ray, true / ray)
        out["by_z"] = {key: by_z[key] for key in ("delta1", *ERRORS)}
        out["by_z"]["always_2m"] = constant_delta1(2.0, true / ray)
    return out


def in_order(names, known) -> list[str]:
    """As they stand in `known`; then the others, by name."""
    return sorted(names, key=lambda name: ([*known, name].index(name), name))


def columns_of(lines: list[dict]) -> dict[str, list[dict]]:
    """The predictions of each dataset, in the paper's order. Any task but distance has a column of
    its own, "name/task"."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        name, task = line.get("dataset", "data"), line.get("task", "distance")
        column = name if task == "distance" else f"{name}/{task}"
        groups.setdefault(column, []).append(line)
    return {name: groups[name] for name in in_order(groups, PAPER_CONSTANT)}


def summarize(lines: list[dict]) -> dict:
    """All predictions -> {"datasets": {column: metrics}, "average": {...}}. Of several tasks:
    "tasks", the average of each, which "average" averages."""
    groups = columns_of(lines)
    datasets = {name: score(group) for name, group in groups.items()}
    task_of = {name: group[0].get("task", "distance") for name, group in groups.items()}
    tasks = in_order({*task_of.values()}, TASKS)
    if len(tasks) == 1:
        return {"datasets": datasets, "average": average(datasets.values())}
    averages = {task: average(datasets[name] for name in groups if task_of[name] == task)
                for task in tasks}
    return {"datasets": datasets, "tasks": averages, "average": average(averages.values())}


def average(scores) -> dict:
    scores, out = list(scores), {}
    for key in (*METRICS, "always_2m"):
        values = [s[key] for s in scores]
        out[key] = None if None in values else sum(values) / len(values)
    return out


# --------------------------------------------------------------------------------------------------
# tables


def show(value) -> str:
    """A cell of a table; "" stays empty."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


def table(result: dict) -> str:
    """One column a dataset and their average, as in Table 1; several tasks as in Table 6."""
    datasets = result["datasets"].items()
    if "tasks" in result:
        counts = (f"{name} {d['n']} ({d['unparsed']})" for name, d in datasets)
        note = "queries (unparsed): " + ", ".join(counts)
        return f"{render.text_table(task_rows(result))}\n{note}"
    text = render.text_table(metric_rows(result))
    by_z = [f"{name} {z['delta1']:.3f} (abs_rel {show(z['abs_rel'])}, rmse {show(z['rmse'])})"
            for name, d in datasets if (z := d.get("by_z"))]
    if by_z:
        text += "\nby z instead of Euclidean, delta1: " + "  ".join(by_z)
    return text


def metric_rows(result: dict) -> list[list[str]]:
    columns = dict(result["datasets"])
    if len(columns) > 1:
        columns["average"] = result["average"]
    rows = [["", *columns]]

    def add(title: str, cell: Callable) -> None:
        """A row of cells, one of each column's metrics, unless all are empty."""
        cells = [cell(scores) for scores in columns.values()]
        if any(cells):
            rows.append([title, *cells])

    def interval_cell(scores: dict) -> str:
        ends = scores.get("delta1_ci")
        return f"{ends[0]:.3f}-{ends[1]:.3f}" if ends else ""

    def bin_cell(scores: dict) -> str:
        found = scores.get("bins", {}).get(span)
        return f"{show(found['delta1'])} {show(found['abs_rel'])}" if found else ""

    def constant_cell(scores: dict) -> str:
        best = scores.get("best_constant")
        if not best:
            return ""
        return f"{best['delta1']:.3f} ({best['value']:g} {best['unit']}".rstrip() + ")"

    for key in (*METRICS, "unparsed", *ODD, "n", "in_10_90", "confidence", "lost"):
        add(key, lambda scores: show(scores.get(key, "")))
        if key == "delta1":
            add("  95 % interval", interval_cell)
    for span in map("{}-{}".format, BINS, BINS[1:]):
        add(f"  true {span}: delta1 abs_rel", bin_cell)
    add("best constant: delta1", constant_cell)
    if {*columns} & {*PAPER_CONSTANT}:
        add("always 2.0 m: delta1", lambda scores: show(scores["always_2m"]))
        published = [PAPER_CONSTANT.get(name, "") for name in columns]
        rows.append(["paper, always 2.0 m", *map(show, published)])
    return rows


def task_rows(result: dict) -> list[list[str]]:
    """delta1 of each task (row) and dataset (column), as in Table 6, with the constant rows of
    Table 3."""
    columns, tasks = result["datasets"], result["tasks"]
    ending = "/(" + "|".join(map(re.escape, tasks)) + ")$"
    names = list(dict.fromkeys(re.sub(ending, "", column) for column in columns))
    rows = [["delta1", *names, "average"]]
    for task, mean in tasks.items():
        cells = [columns.get(name if task == "distance" else f"{name}/{task}", {})
                 for name in names]
        rows.append([task, *(show(c.get("delta1")) for c in cells), show(mean["delta1"])])
        if {*names} & {*PAPER_CONSTANT}:
            rows.append(["  always 2.0", *(show(c.get("always_2m")) for c in cells),
                         show(mean["always_2m"])])
        best = [c.get("best_constant") for c in cells]
        found = [b["delta1"] for b in best if b]
        rows.append(["  best constant",
                     *(f"{b['delta1']:.3f} ({b['value']:g})" if b else "-" for b in best),
                     show(sum(found) / len(found))])
    if len(names) == 1:
        rows = [row[:2] for row in rows]
    empty = [""] * (len(rows[0]) - 2)
    rows.append(["average of tasks", *empty, show(result["average"]["delta1"])])
    return rows


PAPER = Path(__file__).parent / "runs" / "paper.json"  # delta1 as published, of Tables 1 and 2


def paper_table(result: dict) -> str:
    """These answers above the published rows, on the paper's sets that are here. average: over
    those that a row has; vs ours: of that, relative to our average over the same sets (Table 2)."""
    ours = {name: scores["delta1"] for name, scores in result["datasets"].items()
            if name in PAPER_CONSTANT}
    if not ours:
        raise ValueError(f"--paper-rows: the paper's sets are {', '.join(PAPER_CONSTANT)}, and "
                         "none of them is here.")
    rows = [["delta1", *ours, "average", "vs ours"]]
    for method, theirs in {"ours": ours, **render.read_json(PAPER)}.items():
        both = [name for name in ours if name in theirs]
        if both:
            mean, mine = (sum(row[name] for name in both) / len(both) for row in (theirs, ours))
            rows.append([method, *(show(theirs.get(name)) for name in ours), show(mean),
                         f"{mean / max(mine, 1e-9) - 1:+.1%}"])
    return render.text_table(rows)


# --------------------------------------------------------------------------------------------------
# errors.png: charts with a colour for each dataset, and the worst queries

WORST = 9  # queries that are shown


def charts(groups: dict[str, list[dict]], datasets: dict[str, dict]) -> list[Image.Image]:
    """Predicted against true numbers, delta1 and AbsRel by them, and where there are intervals, how
    often an answer is right by the confidence in it (a dot's area: the share of the answers)."""
    _, true = arrays([line for lines in groups.values() for line in lines])
    ends = np.array([true.min(), true.max()])
    both = render.Axes("predicted by true; outer lines: 1.25 times", ends, ends, (True, True))
    binned = {key: render.Axes(f"{key} by true", ends, (0, 1), (True, False))
              for key in ("delta1", "abs_rel")}
    sure = render.Axes("delta1 by confidence; calibrated: the line", (0, 1), (0, 1))
    sure.line((0, 1), (0, 1), render.INK, 1)
    for k, (name, lines) in enumerate(groups.items()):
        hue, (pred, true) = render.hue(k), arrays(lines)
        both.name(k, name)
        both.points(true[pred > 0], pred[pred > 0], (*hue, 120), 1.5)
        for span, scores in datasets[name]["bins"].items():
            for key, axes in binned.items():
                if scores[key] is not None:
                    axes.line([*map(int, span.split("-"))], [scores[key]] * 2, hue, 4)
        confidence = np.array([line.get("confidence") for line in lines], float)
        hits, tenths = within(pred, true, 1.25), np.floor(confidence * 9.999)
        if "in_10_90" in datasets[name]:
            sure.name(k, f"{datasets[name]['in_10_90']:.0%} of truths in the 10-90 % intervals")
        for here in (tenths == k for k in range(10)):
            if here.any():
                sure.points([confidence[here].mean()], [hits[here].mean()], hue,
                            2 + 10 * math.sqrt(here.mean()))
    for factor in (1 / 1.25, 1, 1.25):
        both.line(ends, ends * factor, render.INK, 1)
    known = any("in_10_90" in scores for scores in datasets.values())
    return [axes.image for axes in (both, *binned.values(), *([sure] * known))]


def worst(lines: list[dict]) -> list[dict]:
    """The lines with the largest errors, by ratio; no error is larger than that of no number."""

    def off(line):
        pred = max(line["pred"] or 0, 0)
        return abs(math.log(pred / line["true"])) if pred else math.inf

    return sorted(lines, key=off, reverse=True)[:WORST]


def line_query(line: dict) -> Query:
    """The query of a line of predictions, as far as the line tells: its image is taken as it is."""
    size = render.open_image(line["image"]).size
    record = {"image": line["image"], "intrinsics": (1, 1, 0, 0, *size), "where": line["image"]}
    points = [line[key] for key in ("pixel", "pixel2") if None not in line.get(key, [None])]
    return Query("distance", [record], points, line["true"])


def error_picture(lines: list[dict], datasets: dict[str, dict], query: Callable) -> Image.Image:
    """Charts of all predictions, and the worst of them. query: line -> Query."""
    tiles = charts(columns_of(lines), datasets)
    width = len(tiles) * (tiles[0].width + render.GAP)
    for line in worst(lines):
        said = repr(line.get("text", "")) if line["pred"] is None else f"{line['pred']:g}"
        caption = (f"{line.get('task', 'distance')} {line['true']:g}, answered {said[:80]}\n"
                   f"{line['image']}, pixel {line.get('pixel')}")
        try:
            found = replace(query(line), task="distance")  # whatever was asked, it is not shown
            views, *_ = render.render(found, {**render.DEFAULTS, "camera": "none"}, 1)
            tiles.append(render.query_tile(found, views, caption, 220))
        except (ValueError, TypeError, OverflowError) as e:  # anyone's lines are drawn
            blank = Image.new("RGB", (300, 220), render.PALE)
            tiles.append(render.captioned(blank, f"{caption}\n{e}"))
    return render.sheet(tiles, width)


# --------------------------------------------------------------------------------------------------
# files


NUMBERS = ("true", "ray", *SURE)  # of a line of predictions
QUERY = ("dataset", "task", "image", "image2", "pixel", "pixel2", "given")


def read_predictions(path, depth_type: str = "euclidean") -> list[dict]:
    """Lines of a predictions file, in one form. depth_type: what pred is where a line does not say.
    Raises ValueError with file, line and value, also where a query is answered twice."""
    lines, found = list(render.read_jsonl(path, nan=True)), {}
    # two labels of one pixel are two queries, which only ids tell apart
    keys = [*QUERY, *(["id"] if all("id" in line for _, line in lines) else [])]
    for where, line in lines:
        with render.blaming(where, "A line needs image, pixel, pred, true (positive); depth_type z "
                            "also ray, true / z (README, \"File formats\")."):
            check_prediction(line, depth_type)
        query = json.dumps([line.get(key) for key in keys])
        if query in found:
            raise ValueError(f"{where}: answers the same query as {found[query]}. Drop one.")
        found[query] = where
    if not lines:
        raise ValueError(f"{path}: holds no predictions.")
    return [line for _, line in lines]


def check_prediction(line: dict, depth_type: str) -> None:
    """Bring a line to one form, in place: pred is None or a number, of a distance the Euclidean
    one. Raises what comes."""
    pred, task = line["pred"], line.get("task", "distance")
    if isinstance(pred, str):  # an answer as text is parsed as ours are
        pred = render.parse_answer(pred, task if task in TASKS else "distance",
                                   line.get("truncated", False))
    numbers = {key: float(line[key]) for key in NUMBERS if key in line}
    if pred is not None and math.isfinite(pred):
        numbers["pred"] = pred
    texts = [line["image"], line.get("dataset", ""), task, line.get("depth_type", depth_type),
             line.get("text", "")]
    if not all(isinstance(text, str) for text in texts) or texts[3] not in ("euclidean", "z"):
        raise ValueError(f"{texts} are no texts, or depth_type is neither euclidean nor z")
    finite = all(map(math.isfinite, numbers.values()))
    if not finite or numbers["true"] <= 0 or numbers.get("ray", 1.0) < 0.999:
        raise ValueError(f"{numbers} are not finite, true is not positive, or ray is below 1")
    if texts[3] == "z" and task == "distance":
        numbers |= {key: numbers[key] * numbers["ray"] for key in ("pred", "q10", "q90")
                    if key in numbers}
    line |= {"pred": None, **numbers}


def find_map(folder: Path, image: str, root: Path) -> Path:
    """The depth map of an image: at the image's path below its root, or by its name alone."""
    relative = Path(os.path.relpath(image, root))
    for place in (relative, relative.name):
        for ending in (".npy", ".png"):
            path = (folder / place).with_suffix(ending)
            if path.is_file():
                return path
    raise ValueError(f"{folder}: has no map for {image}, such as {relative.stem}.npy or .png.")


@lru_cache(maxsize=2)
def read_map(path: Path) -> tuple[Image.Image, bool]:
    """-> the map, whether it holds integers."""
    if path.suffix == ".npy":
        with render.blaming(path, "A map is (height, width)."):
            values = np.load(path).squeeze()
            return Image.fromarray(values.astype(np.float32)), values.dtype.kind in "iu"
    with render.image_file(path) as file:
        if len(file.getbands()) > 1:
            raise ValueError("in colour, a map has one channel")
        return file.copy(), file.mode != "F"


def mapped_depth(path: Path, pixels, intrinsics, scale: float | None,
                 depth_type: str) -> np.ndarray:
    """Euclidean distances [m] of pixels (N, 2) of an image by its depth map of any resolution: of
    the pixel of the map in which each lies, so that no value between two objects is made up."""
    depth, integers = read_map(path)
    scale = scale or (1000 if integers else 1)
    _, sx, sy = render.match_size(depth, intrinsics, path)
    places = (np.asarray(pixels) + 0.5) * (sx, sy)
    places = np.minimum(places, np.subtract(depth.size, 1)).astype(int)
    found = np.array([depth.getpixel(place) for place in map(tuple, places.tolist())], float)
    if depth_type == "z":
        found *= render.ray_length(*np.transpose(pixels), intrinsics)
    return found / scale


def default_data() -> list[str]:
    found = sorted(str(path) for path in Path("data").glob("*/val.jsonl"))
    if not found:
        raise ValueError("no data: there is no data/*/val.jsonl. Prepare a set (python prepare.py "
                         "--dataset toy), or give --data FILE.jsonl ...")
    return found


def dataset_names(paths: list[str]) -> list[str]:
    """data/nyuv2/val.jsonl -> nyuv2; any other file by its own name; two of one name by path."""
    names = []
    for path in map(Path, paths):
        names.append(path.parent.name if path.stem in ("train", "val") else path.stem)
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names)]


def list_queries(args, tasks: list[str]) -> list[tuple[str, Records, str, list]]:
    """-> (dataset name, records, task, (record, point) pairs) of each file and fitting task."""
    for task in tasks:
        if task not in TASKS:  # of a checkpoint that was trained with another render.py
            raise ValueError(f"task '{task}' is none of {', '.join(TASKS)}. Give --tasks.")
    groups, paths = [], args.data or default_data()
    for path, name in zip(paths, dataset_names(paths)):
        records = Records(path, args.image_root, args.label_type)
        pairs = draw_queries(records, None if args.all else args.queries, args.seed)
        if not pairs:
            raise ValueError(f"{path}: has no labelled point.")
        for task in tasks:
            wanted = pairs
            if args.all and not TASKS[task].markers:  # about an image, not about its points
                wanted = list({i: (i, k) for i, k in pairs}.values())
            fitting = fitting_pairs(records, task, wanted, args.seed)
            if len(fitting) < len(wanted):
                print(f"{name}, {task}: {len(fitting)} of {len(wanted)} queries, the others do not "
                      "fit this task", file=sys.stderr)
            if fitting:
                groups.append((name, records, task, fitting))
    if not groups:
        needs = "; ".join(f"{task} needs {TASKS[task].needs}" for task in tasks)
        raise ValueError(f"no record of {', '.join(paths)} fits: {needs}.")
    return groups


def file_hash(path) -> str:
    with render.blaming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(checkpoint: Checkpoint) -> list[str]:
    return [file_hash(path) for path in sorted(checkpoint.folder.glob("*.safetensors"))]


def identity(args, settings: dict, groups: list, **more) -> dict:
    """What an evaluation's answers depend on, by content: a copied folder or a touched file is the
    same evaluation, another label is another one."""
    labels = {records.path: file_hash(records.path) for _, records, *_ in groups}
    queries = [(name, labels[records.path], task, len(pairs))
               for name, records, task, pairs in groups]
    return {"settings": settings, "seed": args.seed, "all": args.all,
            "label_type": args.label_type, "queries": queries, **more}


def claim(out: Path, args, inputs: dict, products: tuple[str, ...]) -> None:
    """Make `out` the folder of what depends on `inputs`, of which `products` (patterns) may be
    there, in part or whole: they are kept. Raises ValueError if they depend on anything else."""
    inputs = json.loads(json.dumps(inputs))
    there = [path for pattern in products for path in out.glob(pattern)]
    info, saved = render.run_info(args, inputs=inputs), {}
    if (out / "run.json").is_file():
        saved = render.read_json(out / "run.json")
    before = saved.get("inputs") or {}
    if args.overwrite:
        for path in there:
            path.unlink()
    elif there and before != inputs:
        other = ", ".join(key for key in inputs if before.get(key) != inputs[key])
        said = render.other_flags(info, saved, FREE_FLAGS)
        raise ValueError(f"{out}: holds a result of different {other}"
                         f"{said and f' (it was made with {said})'}. Give another --out, or "
                         "--overwrite.")
    render.write_json(out / "run.json", info)


def read_parts(out: Path) -> dict[int, dict]:
    """Answers of an interrupted run, by query number."""
    done = {}
    for path in sorted(out.glob("predictions.part-*.jsonl")):
        with render.blaming(path):
            done |= {line["id"]: line for _, line in render.read_jsonl(path, interrupted=True)}
    return done


# --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = render.make_parser(__doc__)
    flag = parser.add_argument
    flag("checkpoint", nargs="?", help="model folder or hub name")

    flag = parser.add_argument_group("files").add_argument
    flag("--data", type=file_path, nargs="+", metavar="JSONL", help="default: data/*/val.jsonl")
    render.add_record_flags(flag)
    flag("--out", type=file_path, help="folder for predictions.jsonl and metrics.json; default: "
         "<checkpoint>/eval, out/constant, out/depth_maps, out/predictions/<name>")
    flag("--overwrite", action="store_true", help="drop the evaluation that is in --out")
    flag("--paper-rows", action="store_true", help="also print the published rows of Tables 1, 2")

    flag = parser.add_argument_group("queries").add_argument
    flag("--queries", type=COUNT, default=NUM_QUERIES, help="random points a set (Sec. 3)")
    flag("--all", action="store_true", help="each labelled point once, instead")
    flag("--tasks", nargs="+", choices=TASKS, help="default: those the checkpoint was trained on")
    flag("--two-point", choices=("answer", "geometry"), default="answer",
         help="one answer about both points, or the length between two answers about one each")
    flag("--seed", type=NATURAL, default=0, help="which points are drawn")
    render.add_settings_flags(parser)

    flag = parser.add_argument_group("instead of a model (default: a checkpoint)").add_argument
    flag("--constant", type=POSITIVE, metavar="NUMBER",
         help="always this answer (Tables 1 and 3: 2.0)")
    flag("--predictions", type=file_path, metavar="FILE", help="score these answers")
    flag("--depth-maps", type=file_path, metavar="DIR", help="score dense depth, a .npy or 16-bit "
         ".png an image, by its path or name (Table 2)")
    render.add_map_flags(flag)
    flag("--export-queries", type=file_path, metavar="DIR",
         help="write images and questions, for any system to answer and --predictions to score")

    flag = parser.add_argument_group("decoding, system").add_argument
    render.add_decoding_flags(flag)
    return parser.parse_args(argv)


def default_out(args) -> Path:
    """A checkpoint folder keeps its evaluation; other ways of answering than the paper's have
    folders of their own."""
    way = "_median" * (args.decode == "median") + "_geometry" * (args.two_point == "geometry")
    if args.checkpoint and Path(args.checkpoint).is_dir():
        return Path(args.checkpoint) / f"eval{way}"
    if args.predictions:
        return Path("out/predictions") / Path(args.predictions).stem
    others = ("constant", "depth_maps")
    kind = args.checkpoint or next(key for key in others if getattr(args, key) is not None)
    return Path("out") / (kind.replace("/", "--") + way)


def answer_queries(args, checkpoint: Checkpoint, groups: list, out: Path, rank: int, world: int,
                   device: torch.device) -> None:
    """Query the model about all points -> predictions.jsonl, or keep what was answered before."""
    dtype = pick_dtype(args.dtype, device)
    finished = out / "predictions.jsonl"
    if rank == 0:
        inputs = identity(args, checkpoint.settings, groups, weights=weights_hash(checkpoint),
                          dtype=str(dtype), decode=args.decode, two_point=args.two_point)
        claim(out, args, inputs, ("predictions*.jsonl",))
    dist.barrier()
    if finished.exists():
        if rank == 0:
            print(f"{out}: was evaluated before; its answers are scored again (--overwrite "
                  "queries the model anew)")
    else:
        query_model(args, checkpoint, groups, out, rank, world, device, dtype)
        dist.barrier()
        if rank == 0:
            join_parts(out, sum(len(pairs) for *_, pairs in groups))
    if rank == 0:
        for path in out.glob("predictions.part-*.jsonl"):
            path.unlink()


def join_parts(out: Path, total: int) -> None:
    """Make predictions.jsonl. Raises ValueError if an answer is missing."""
    done = read_parts(out)
    if done.keys() != {*range(total)}:
        raise ValueError(f"{out}: has {len(done)} of {total} answers, though all ranks have ended. "
                         "Give an --out that all of them share.")
    render.write_jsonl(out / "predictions.jsonl", [done[number] for number in sorted(done)])


def query_model(args, checkpoint: Checkpoint, groups: list, out: Path, rank: int, world: int,
                device: torch.device, dtype: torch.dtype) -> None:
    """This rank's share of the queries, appended to a file of its own: an interrupted run resumes,
    with any number of ranks."""
    model = load_model(checkpoint, device, dtype)
    done = read_parts(out)
    todo, first = [], 0
    for name, records, task, pairs in groups:
        mine = {first + k: pairs[k] for k in range(rank, len(pairs), world)
                if first + k not in done}
        todo.append((name, records, task, mine))
        first += len(pairs)
    left = sum(len(mine) for *_, mine in todo)
    passes = []
    bar = tqdm(total=left, desc="queries", dynamic_ncols=True, disable=rank > 0 or None)
    dist.barrier()  # all have read the parts before there are new ones
    part = out / f"predictions.part-{rank}-of-{world}-{time.time_ns()}.jsonl"
    with bar, open(part, "w") as file:
        for name, records, task, mine in todo:
            answered = run_queries(model, checkpoint, records, [*mine.values()], task,
                                   args.batch_size, args.workers, args.seed, args.decode,
                                   args.two_point == "geometry")
            ids = iter(mine)
            for queries, answers, count in answered:
                for query, answer in zip(queries, answers):
                    line = prediction(query, answer, dataset=name, id=next(ids))
                    file.write(render.json_text(line))
                file.flush()
                passes.append(count)
                bar.update(len(queries))
    if rank == 0 and passes:
        print(f"{left} queries, {np.mean(passes):.1f} forward passes a batch")


def answer_alone(args, groups: list, out: Path) -> None:
    """--constant, --depth-maps: answers without a model of ours -> predictions.jsonl."""
    source = {"constant": args.constant, "depth_maps": args.depth_maps,
              "depth_scale": args.depth_scale, "depth_type": args.depth_type}
    claim(out, args, identity(args, {}, groups, **source), ("predictions*.jsonl",))
    lines, images = [], {}
    for number, (name, records, task, pair) in enumerate(each_query(groups)):
        query, value = query_of(records, task, pair, args.seed), args.constant
        if args.depth_maps:
            image = query.records[0]["image"]
            path = find_map(Path(args.depth_maps), image, records.image_root)
            if images.setdefault(path, image) != image:
                raise ValueError(f"{path}: would be of {images[path]} and of {image}. Put the maps "
                                 "in folders like those of the images.")
            value, = mapped_depth(path, query.points, query.records[0]["intrinsics"],
                                  args.depth_scale, args.depth_type)
        lines.append(prediction(query, {"text": f"{value:g}"}, dataset=name, id=number))
    render.write_jsonl(out / "predictions.jsonl", lines)


def report(lines: list[dict], out: Path, published: bool, query: Callable) -> None:
    """query: line -> Query."""
    result = summarize(lines)
    render.write_json(out / "metrics.json", result)
    with render.replacing(out / "errors.png") as temporary:
        error_picture(lines, result["datasets"], query).save(temporary, "PNG")
    print(render.printable(table(result)))
    unparsed = [line for line in lines if line["pred"] is None]
    if 2 * len(unparsed) > len(lines):
        text = render.printable(repr(unparsed[0].get("text", ""))[:100])
        print(f"warning: {len(unparsed)} of {len(lines)} answers say no number of the unit, such "
              f"as {text}. Was the model trained for this prompt?", file=sys.stderr)
    if published:
        print(f"\n{paper_table(result)}")
    print(f"{out}/metrics.json, {out}/errors.png")


@render.command
def main(argv=None) -> None:
    args = parse_args(argv)
    model = None if args.export_queries else args.checkpoint
    sources = [model, args.constant, args.depth_maps, args.predictions, args.export_queries]
    if sources.count(None) != len(sources) - 1:
        raise ValueError("give one of: a checkpoint, --constant NUMBER, --depth-maps DIR, "
                         "--predictions FILE, --export-queries DIR.")
    if args.depth_maps and args.tasks not in (None, ["distance"]):
        raise ValueError("--depth-maps: answers the task distance alone.")
    out = Path(args.export_queries or args.out or default_out(args))
    if args.predictions:
        lines = read_predictions(args.predictions, args.depth_type)
        inputs = {"predictions": file_hash(args.predictions), "depth_type": args.depth_type}
        with render.lock_folder(out):
            render.write_json(out / "run.json", render.run_info(args, inputs=inputs))
            return report(lines, out, args.paper_rows, line_query)

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = render.settings_from_flags(args)
    settings, grid = render.DEFAULTS | {k: v for k, v in given.items() if v is not None}, 1
    if args.checkpoint:
        checkpoint = render.open_checkpoint(args.checkpoint, given, quiet=rank > 0)
        settings, grid = checkpoint.settings, checkpoint.grid
        unseen = [task for task in args.tasks or () if task not in settings["tasks"]]
        if unseen and rank == 0:
            print(f"{args.checkpoint}: was not trained on {', '.join(unseen)}, only on "
                  f"{', '.join(settings['tasks'])}", file=sys.stderr)
    tasks = args.tasks or settings["tasks"]
    if args.two_point == "geometry" and "two_point" not in tasks and rank == 0:
        print("--two-point geometry changes nothing without --tasks two_point", file=sys.stderr)
    groups = list_queries(args, tasks)
    try:
        with render.lock_folder(out, when=rank == 0):
            if args.export_queries:  # as the checkpoint would see them, if there is one
                inputs = identity(args, render.check_settings(settings), groups, grid=grid)
                claim(out, args, inputs, ("queries.jsonl", "images/*.png"))
                return export_queries(groups, settings, grid, args.seed, out)
            if args.checkpoint:
                *_, device = setup_distributed(args.device, timeout=timedelta(days=1))
                answer_queries(args, checkpoint, groups, out, rank, world, device)
            else:
                answer_alone(args, groups, out)
            if rank == 0:
                queries = each_query(groups)
                report(read_predictions(out / "predictions.jsonl"), out, args.paper_rows,
                       lambda line: query_of(*queries[line["id"]][1:], args.seed))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
