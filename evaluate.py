"""
Score a checkpoint: jsonl files of labelled points -> predictions.jsonl, metrics.json, one table.

    python evaluate.py ckpt/toy --data data/toy/val.jsonl              # CPU or one GPU
    torchrun --nproc-per-node 8 evaluate.py ckpt/sft_3b                # every data/*/val.jsonl, 8,192 queries a set
    python evaluate.py ckpt/toy --data data/toy/val.jsonl --all        # each labelled point once
    python evaluate.py --constant 2.0 --data data/nyuv2/val.jsonl      # a baseline that needs no model
    python evaluate.py --predictions theirs.jsonl                      # anyone's answers, on the very same points

Also the home of everything that runs a trained model: loading, packed attention, the prefill, decoding. train_sft.py,
train_grpo.py and pointcloud.py call these functions. Paper: Sec. 3 (protocol: delta1, 8,192 random samples), Tables 1, 6.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import render
from render import Encoder, Query, Records, fail

# Table 1: order of the sets, and the row "always output 2.0 m" as published
PAPER_ORDER = {"argoverse2": 0.006, "ddad": 0.010, "nuscenes": 0.010, "eth3d": 0.106, "scannetpp": 0.305,
               "sunrgbd": 0.384, "ibims1": 0.280, "nyuv2": 0.383}
NUM_QUERIES = 8192  # Sec. 3, random samples a set


# ----------------------------------------------------------------------------------------------------------------------
# the model: attention over packed rows


def attend(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, segments=None, **kwargs):
    """Attention of all layers, text and vision. query (B, heads, T, d) -> (B, T, heads, d), None.

    Packed (B = 1): tokens see their own segment only; the vision tower gives `cu_seq_lens_q`, the text `segments`, both
    (n + 1,) starts. Otherwise: a bool `attention_mask` (B, 1, T, K), as decoding and GRPO's tree rows have."""
    starts = segments if cu_seq_lens_q is None else cu_seq_lens_q
    places = kwargs.get("position_ids")
    if starts is None and attention_mask is None and places is not None and places.shape[-1] == 2:
        # Pixtral's tower in older transformers gives (row, column) of each patch instead: an image begins at (0, 0)
        starts = F.pad((places == 0).all(-1).nonzero()[:, 0], (0, 1), value=len(places))
    if starts is None:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, d)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and varlen_attn is not None:
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        longest, starts = int((starts[1:] - starts[:-1]).max()), starts.to(torch.int32)
        how = {"scale": scaling} if "scale" in VARLEN_FLAGS else {}  # else 1 / sqrt(d), which is what all families use
        if module.is_causal:
            how.update({"window_size": (-1, 0)} if "window_size" in VARLEN_FLAGS else {"is_causal": True})
        return varlen_attn(q, k, v, starts, starts, longest, longest, **how)[None], None
    # elsewhere: segments of equal length are one batch, which is most of them (the windows of Qwen2.5-VL's vision tower)
    starts = starts.tolist()
    groups: dict[int, list[int]] = {}
    for a, b in zip(starts, starts[1:]):
        groups.setdefault(b - a, []).append(a)
    outs, order = [], []
    for length, firsts in groups.items():
        index = (torch.tensor(firsts)[:, None] + torch.arange(length)).to(q.device)  # (n, length)
        parts = (x[index].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=module.is_causal, scale=scaling, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        order.append(index.flatten())
    return torch.cat(outs)[torch.argsort(torch.cat(order))][None], None


try:  # FlashAttention as it comes with torch; its arguments changed between versions
    import inspect

    from torch.nn.attention.varlen import varlen_attn
    VARLEN_FLAGS = inspect.signature(varlen_attn).parameters
except ImportError:
    varlen_attn, VARLEN_FLAGS = None, {}


def pack_attention(model):
    """Make a transformers model run `attend`. The name holds "flash" because that is how the vision towers decide to hand
    over segment starts instead of looping over windows in Python; it is set after construction because transformers
    would look up such a name on the hub."""
    from transformers import AttentionInterface
    AttentionInterface.register("packed_flash", attend)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation_internal = "packed_flash"
    return model


def pick_device(device: str = "auto") -> torch.device:
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return names[dtype] if dtype in names else torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(path: str, device: torch.device, dtype: torch.dtype):
    """A checkpoint folder or hub repository, ready for the functions below."""
    import transformers
    folder = render.find_checkpoint(path)
    render.model_type(folder)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    except OSError as e:
        raise ValueError(f"{path}: cannot be loaded ({str(e).splitlines()[0]}).") from None
    return pack_attention(model).to(device).eval()


def load_plain(path: str, device: torch.device, dtype: torch.dtype):
    """A model of a family that render.py does not know, and transformers' own processor: a baseline, as in Table 1.
    Raises ValueError where it cannot be, or where all images get one size, so that no focal length can be unified."""
    import transformers
    folder = render.find_checkpoint(path)
    instead = "Ask it elsewhere: evaluate.py --export-queries DIR, then --predictions FILE."
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        images = processor.image_processor
        shapes = {tuple(images(Image.new("RGB", (side, side)), return_tensors="pt")["pixel_values"].shape) for side in (280, 560)}
        if len(shapes) == 1:
            raise ValueError(f"its images all become {' x '.join(map(str, shapes.pop()))} values")
        if not getattr(processor, "chat_template", None):
            raise ValueError("it has no chat template")
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    except (ImportError, OSError, ValueError, AttributeError, KeyError) as e:
        reason = next(line for line in str(e).splitlines() if line.strip())
        raise ValueError(f"{path}: model_type '{render.read_family(folder)}' is none of {', '.join(render.FAMILIES)}, "
                         f"and does not run as it is ({reason.strip().rstrip('.')}). {instead}") from None
    return model.to(device).eval(), processor


@torch.no_grad()
def plain_answer(model, processor, views: list, question: str, max_new_tokens: int) -> str:
    """Greedy, with transformers' own generate."""
    content = [{"type": "image", "image": Image.fromarray(view.pixels)} for view in views]
    content.append({"type": "text", "text": question})
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    inputs = cast(inputs.to(model.device), model)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0]


# ----------------------------------------------------------------------------------------------------------------------
# the model: a prefill, and steps of branches behind it


@dataclass
class Prefix:
    """Rows after their prefill. cache: keys and values (B, heads, P, d) a layer; seen (B, P) bool: which of them count;
    position (B,): the next token's; logits (B, F + 1, V): after the prompt, and after each forced token."""
    cache: object
    seen: torch.Tensor
    position: torch.Tensor
    logits: torch.Tensor


def prefill(model, encoder: Encoder, samples: list[dict], forced: list[int] = ()) -> Prefix:
    """Prompts of any sizes and the `forced` tokens behind each, in one packed forward, nothing padded; their keys and
    values are laid out as rows afterwards. samples: of render.encode without an answer."""
    from transformers import DynamicCache
    rows = [append_tokens(s, forced) for s in samples]
    inputs = render.model_inputs(render.pack(rows), encoder, model.device)
    starts = inputs["segments"].long()
    ends, lengths = starts[1:], starts[1:] - starts[:-1]
    keep = (ends[:, None] - 1 + torch.arange(-len(forced), 1, device=ends.device)).flatten()
    packed = DynamicCache()
    logits = model(**cast(inputs, model), past_key_values=packed, use_cache=True, logits_to_keep=keep).logits[0]
    column = torch.arange(int(lengths.max()), device=ends.device)
    seen = column < lengths[:, None]
    index = (starts[:-1, None] + column).clamp(max=int(starts[-1]) - 1)
    cache = DynamicCache()
    for i, layer in enumerate(packed.layers):
        cache.update(layer.keys[0][:, index].transpose(0, 1), layer.values[0][:, index].transpose(0, 1), i)
    position = torch.tensor([int(r["position_ids"].max()) + 1 for r in rows], device=ends.device)
    return Prefix(cache, seen, position, logits.view(len(rows), len(forced) + 1, -1))


def append_tokens(sample: dict, tokens: list[int]) -> dict:
    """The sample with tokens behind it, at the positions that follow."""
    positions = sample["position_ids"]
    tail = np.broadcast_to(positions.max() + 1 + np.arange(len(tokens)), (len(positions), len(tokens)))
    return {**sample, "input_ids": np.concatenate([sample["input_ids"], np.asarray(tokens, int)]),
            "position_ids": np.concatenate([positions, tail], 1)}


def cast(inputs: dict, model) -> dict:
    """pixel_values in the model's dtype (they leave the table in float32)."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def step(model, encoder: Encoder, prefix: Prefix, tokens, position, seen) -> torch.Tensor:
    """Feed tokens (B, N) at positions (B, N); token n sees the cached columns and new tokens marked in seen (B, N, K + N).
    The new keys and values are appended to the cache. -> logits (B, N, V)."""
    if render.FAMILIES[encoder.family]["mrope"]:
        position = position.expand(3, -1, -1)
    return model(input_ids=tokens, attention_mask=seen[:, None], position_ids=position, past_key_values=prefix.cache,
                 use_cache=True).logits


# ----------------------------------------------------------------------------------------------------------------------
# greedy answers, with the fixed words of the template verified instead of decoded


@lru_cache(maxsize=64)
def template_tokens(encoder_key, form: str) -> tuple[list[int], dict[int, str]]:
    """The tokens before the number of an answer template, the same whatever the number, and all that spell numbers."""
    encoder = ENCODERS[encoder_key]
    variants = [render.answer_tokens(encoder, form.format(x=x)) for x in ("2.35", "12.71", "0.05", "107.90")]
    forced = []
    for column in zip(*variants):
        if len(set(column)) > 1:
            break
        forced.append(column[0])
    spelled = {i: encoder.tokenizer.decode([i]) for i in range(len(encoder.tokenizer))}
    return forced, {i: text for i, text in spelled.items() if re.fullmatch(r" ?[0-9.]+", text)}


ENCODERS: dict[str, Encoder] = {}  # template_tokens needs a hashable name for an encoder


@torch.no_grad()
def answer(model, encoder: Encoder, samples: list[dict], form: str | None, max_new_tokens: int = 64):
    """Greedy answers, token for token those of plain greedy decoding. -> token lists (with the end token, if reached),
    number of forward passes.

    `form` (render.answer_form) is only a guess of what will be said: its fixed words go through the model many at a time
    and every one is compared with the argmax before it counts; after the first difference decoding goes on freely."""
    forced, numbers, end = [], {}, encoder.end_id
    if form is not None:
        ENCODERS[encoder.folder] = encoder
        forced, numbers = template_tokens(encoder.folder, form)
    prefix = prefill(model, encoder, samples, forced)
    forwards, device, rows = 1, prefix.logits.device, range(len(samples))
    best = prefix.logits.argmax(-1).tolist()
    out, seen, position = [], prefix.seen, prefix.position.clone()
    for b in rows:  # forced words that the model would not have said stay in the cache as holes
        k = next((j for j, t in enumerate(forced) if best[b][j] != t), len(forced))
        out.append((list(forced[:k]) + [best[b][k]])[:max_new_tokens])
        first = int(seen[b].sum()) - len(forced)
        seen[b, first + k:first + len(forced)] = False
        position[b] -= len(forced) - k
    guessed = [False] * len(samples)

    def finish(b):  # the rest of the template, once the row's number is complete
        if guessed[b] or len(out[b]) <= len(forced) or out[b][:len(forced)] != list(forced) or out[b][-1] in numbers:
            return []
        guessed[b] = True
        number = encoder.tokenizer.decode(out[b][len(forced):-1])
        whole = render.answer_tokens(encoder, form.format(x=number)) + [end]
        return whole[len(out[b]):] if whole[:len(out[b])] == out[b] else []

    def live(b):
        return out[b][-1] not in encoder.stop_ids and len(out[b]) < max_new_tokens

    while any(live(b) for b in rows):
        feed = [[out[b][-1]] + (finish(b) if form else []) if live(b) else [] for b in rows]
        width = max(map(len, feed))
        tokens = torch.tensor([f + [end] * (width - len(f)) for f in feed], device=device)
        real = torch.tensor([[True] * len(f) + [False] * (width - len(f)) for f in feed], device=device)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        see = torch.cat([seen[:, None].expand(-1, width, -1), causal.expand(len(feed), -1, -1)], 2)
        where = position[:, None] + torch.arange(width, device=device)
        best = step(model, encoder, prefix, tokens, where, see).argmax(-1).tolist()
        forwards += 1
        kept = [0] * len(feed)
        for b in rows:
            for j in range(len(feed[b])):  # the fed token j holds if the model said it after token j - 1
                if j and feed[b][j] != best[b][j - 1]:
                    break
                kept[b] = j + 1
            if kept[b]:
                out[b] += feed[b][1:kept[b]]
                if out[b][-1] not in encoder.stop_ids:
                    out[b].append(best[b][kept[b] - 1])
                out[b] = out[b][:max_new_tokens]
        holds = torch.arange(width, device=device) < torch.tensor(kept, device=device)[:, None]
        seen = torch.cat([seen, holds & real], 1)
        position = position + torch.tensor(kept, device=device)
    return out, forwards


def decode_text(encoder: Encoder, tokens: list[int]) -> str:
    return encoder.tokenizer.decode([t for t in tokens if t not in encoder.stop_ids])


# ----------------------------------------------------------------------------------------------------------------------
# the distribution over the numbers that the model could have said

EPSILON, RELATIVE = 1e-2, 0.05  # prefixes less probable than this, or intervals narrower than this share, are not split


@torch.no_grad()
def median_answer(model, encoder: Encoder, samples: list[dict], form: str, max_new_tokens: int = 64):
    """The median of the model's own distribution over numbers, instead of the likeliest digit after the likeliest digit.
    -> answers {"text", "q10", "q90", "confidence", "lost"}, number of forward passes (four; greedy needs six).

    q10 and q90: the model puts 10 % of its probability below and above. confidence: what it puts within 25 % of the
    median. lost: what was not followed. A row that would not say the template is answered greedily, "text" alone."""
    ENCODERS[encoder.folder] = encoder
    forced, numbers = template_tokens(encoder.folder, form)
    prefix = prefill(model, encoder, samples, forced)
    agrees = (prefix.logits[:, :-1].argmax(-1) == torch.tensor(forced, device=prefix.logits.device)).all(1).tolist()
    leaves, forwards = number_leaves(model, encoder, prefix, numbers)
    answers: list[dict | None] = []
    for row, agreed in zip(leaves, agrees):
        low, high, mass = np.array(row).T if row else np.zeros((3, 0))
        if not agreed or mass.sum() < 0.5:
            answers.append(None)
            continue
        inside = (np.arange(16) + 0.5) / 16  # each interval as 16 points
        values = (low[:, None] + (high - low)[:, None] * inside).ravel()
        order = np.argsort(values)
        values, weights = values[order], np.repeat(mass / 16, 16)[order]
        below = np.cumsum(weights) - weights / 2
        q10, median, q90 = np.interp(np.array([0.1, 0.5, 0.9]) * mass.sum(), below, values)
        near = (values > median / 1.25) & (values < median * 1.25)
        answers.append({"text": form.format(x=f"{median:.2f}"), "q10": round(float(q10), 4), "q90": round(float(q90), 4),
                        "confidence": round(float(weights[near].sum()), 4), "lost": round(float(1 - mass.sum()), 4)})
    rest = [b for b, a in enumerate(answers) if a is None]
    if rest:
        tokens, more = answer(model, encoder, [samples[b] for b in rest], form, max_new_tokens)
        forwards += more
        for b, t in zip(rest, tokens):
            answers[b] = {"text": decode_text(encoder, t)}
    return answers, forwards


def number_leaves(model, encoder: Encoder, prefix: Prefix, numbers: dict[int, str]):
    """Expand the numbers that may follow a prefill, all rows and prefixes of a length in one forward pass: a tree whose
    nodes see their own digits only. -> per row leaves (low, high, probability), number of forward passes.

    A prefix with a decimal point stands for an interval: "2.3" for [2.3, 2.4). It is a leaf when it is narrow or
    improbable; so the probability of its many endings is kept without asking for them."""
    ids, spelled = list(numbers), list(numbers.values())
    rows = range(len(prefix.seen))
    nodes = [[("", 1.0)] for _ in rows]  # number so far, its probability
    leaves: list[list] = [[] for _ in rows]
    seen, logits, device = prefix.seen[:, None], prefix.logits[:, -1:], prefix.logits.device
    for depth in range(9):
        chances = logits.double().softmax(-1)[..., ids].tolist()  # (B, N, numbers)
        grown: list[list] = [[] for _ in rows]
        for b in rows:
            for n, (text, weight) in enumerate(nodes[b]):
                if text.strip("."):  # here the number may end
                    leaves[b].append((float(text), float(text), weight * max(0.0, 1 - sum(chances[b][n]))))
                for j, chance in enumerate(chances[b][n]):
                    longer, share = text + (spelled[j] if text else spelled[j].strip()), weight * chance
                    if " " in longer or longer.count(".") > 1:
                        continue
                    decimals = len(longer.partition(".")[2])
                    low = float(longer) if longer != "." else 0.0
                    width = 10.0 ** -decimals
                    if "." in longer and (share <= EPSILON or width <= RELATIVE * low):
                        leaves[b].append((low, low + width, share))
                    elif share > EPSILON:
                        grown[b].append((n, ids[j], longer, share))
        most = max(map(len, grown))
        if not most or depth == 8:
            return leaves, 1 + depth
        padded = [row + [(0, ids[0], "", 0.0)] * (most - len(row)) for row in grown]
        parent = torch.tensor([[node[0] for node in row] for row in padded], device=device)
        tokens = torch.tensor([[node[1] for node in row] for row in padded], device=device)
        nodes = [[node[2:] for node in row] for row in grown]
        seen = seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))
        seen = torch.cat([seen, torch.eye(most, dtype=torch.bool, device=device).expand(len(rows), -1, -1)], 2)
        position = (prefix.position + depth)[:, None].expand(-1, most)
        logits = step(model, encoder, prefix, tokens, position, seen)


# ----------------------------------------------------------------------------------------------------------------------
# queries


def draw_queries(records: Records, count: int | None, seed: int = 0) -> list[tuple[int, int]]:
    """(record, point) pairs to ask. count None: each labelled point once. Else `count` random points (Sec. 3: 8,192), each
    at most once, sorted so that an image is opened once; all of them when there are fewer."""
    if count is None or len(records) <= count:
        pairs = [(i, k) for i in range(len(records)) for k in range(len(records[i]["depth"]))]
        if count is None or len(pairs) <= count:
            return pairs
        chosen = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
        return [pairs[j] for j in sorted(chosen)]
    rng, pairs, empty = np.random.default_rng(seed), set(), set()
    while len(pairs) < count:
        i = int(rng.integers(len(records)))
        points = len(records[i]["depth"])
        if points:
            pairs.add((i, int(rng.integers(points))))
        else:
            empty.add(i)
        if len(empty) + count > len(records):  # hardly any record has a label: there may not be `count` of them
            pairs = draw_queries(records, None)
            chosen = rng.choice(len(pairs), min(count, len(pairs)), replace=False)
            return [pairs[j] for j in sorted(chosen)]
    return sorted(pairs)


def make_query(records: Records, task: str, pair: tuple[int, int], seed: int = 0) -> Query:
    """The query of a (record, point) pair; what a task draws (a speed, a second point) is a function of the pair."""
    return render.TASKS[task](records, pair[0], np.random.default_rng((seed, *pair)), pair[1])


def fitting_pairs(records: Records, task: str, pairs: list, seed: int = 0) -> list:
    """The pairs that a task can be asked about: for motion, only records with a pose that moved."""
    def fits(pair):
        try:
            make_query(records, task, pair, seed)
        except render.Unfit:
            return False
        return True
    return [pair for pair in pairs if fits(pair)] if task in ("two_point", "motion") else pairs


class QueryBatches(torch.utils.data.Dataset):
    """Rendered and encoded queries, a batch an item, so that loader workers can prepare them. An unreadable image stops
    the evaluation: a score over fewer points than it claims would be wrong. singly: a distance sample for each of a
    query's points. encoder None: (views, question) instead of a sample, as plain models take it."""

    def __init__(self, records: Records, task: str, pairs: list, batch_size: int, settings: dict,
                 encoder: Encoder | None, seed: int, singly: bool = False):
        self.records, self.task, self.pairs, self.batch_size = records, task, pairs, batch_size
        self.settings, self.encoder, self.seed, self.singly = settings, encoder, seed, singly

    def __len__(self):
        return math.ceil(len(self.pairs) / self.batch_size)

    def __getitem__(self, b):
        queries, samples = [], []
        for pair in self.pairs[b * self.batch_size:(b + 1) * self.batch_size]:
            try:
                query = make_query(self.records, self.task, pair, self.seed)
                parts = [replace(query, task="distance", points=[p]) for p in query.points] if self.singly else [query]
                for part in parts:
                    views, question, _ = render.render(part, self.settings, self.encoder.grid if self.encoder else 1)
                    samples.append(render.encode(self.encoder, views, question) if self.encoder else (views, question))
            except ValueError as e:  # raised by `ask`: a worker would send its whole traceback
                return None, str(e)
            queries.append(query)
        return queries, samples


def ask(model, encoder: Encoder, settings: dict, records: Records, pairs: list, task: str = "distance", batch_size: int = 32,
        workers: int = 0, max_new_tokens: int = 64, seed: int = 0, decode: str = "greedy", geometry: bool = False):
    """Ask the model each query -> yields (queries, answers, forward passes) batch by batch; an answer is {"text"}, with
    decode "median" also its interval (median_answer). geometry: two points by their two distances (measure). A plain
    model comes with its processor in the encoder's place."""
    singly, plain = geometry and task == "two_point", not isinstance(encoder, Encoder)
    dataset = QueryBatches(records, task, pairs, batch_size, settings, None if plain else encoder, seed, singly)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=lambda x: x)
    form = render.answer_form("distance" if singly else task, settings["prompt"])
    form = None if settings["camera"] == "ray" else form
    if decode == "median" and (form is None or plain):
        raise ValueError("--decode median: camera 'ray' says more than one number, and models of unknown families are "
                         "asked as they are; only greedy answers.")
    for queries, samples in loader:
        if queries is None:
            raise ValueError(samples)
        if plain:
            answers, forwards = [{"text": plain_answer(model, encoder, *s, max_new_tokens)} for s in samples], 0
        elif decode == "median":
            answers, forwards = median_answer(model, encoder, samples, form, max_new_tokens)
        else:
            tokens, forwards = answer(model, encoder, samples, form, max_new_tokens)
            answers = [{"text": decode_text(encoder, t)} for t in tokens]
        if singly:
            answers = [measure(q, a["text"], b["text"]) for q, a, b in zip(queries, answers[::2], answers[1::2])]
        yield queries, answers, forwards


def measure(query: Query, *texts: str) -> dict:
    """The distance between two points by geometry: both answers on their pixels' rays, and the length between them."""
    depth_m = [render.parse_answer(text) for text in texts]
    if None in depth_m:
        return {"text": "", "texts": texts}
    xyz = render.unproject(np.array(query.points), np.array(depth_m), query.records[0]["intrinsics"])
    return {"text": f"{np.linalg.norm(xyz[0] - xyz[1]):.2f} meters", "texts": texts}


def prediction(query: Query, answer: dict, **more) -> dict:
    """One line of predictions.jsonl. answer: {"text", ...}, the rest is kept."""
    record, (x, y) = query.records[0], query.points[0] if query.points else (None, None)
    line = {"image": record["image"], "pixel": [x, y], "task": query.task, "true": round(query.value, 4),
            "pred": render.parse_answer(answer["text"], query.task), **answer}
    if query.task == "distance":  # true / ray is z
        line["ray"] = round(float(render.ray_length(x, y, record["intrinsics"])), 6)
    line |= {"given": query.given} if query.given else {}
    line |= {"pixel2": list(query.points[1])} if len(query.points) > 1 else {}
    line |= {"image2": query.records[1]["image"]} if len(query.records) > 1 else {}
    return {**line, **more}


def export_queries(groups: list, settings: dict, grid: int, seed: int, folder: Path) -> None:
    """What a model would see, as files: <folder>/images/*.png and queries.jsonl, one query a line. Any system can
    answer them; its answers, a number or the text, go into each line as "pred", and --predictions scores that file."""
    if (folder / "images").exists():
        raise ValueError(f"{folder}: holds exported queries already, or the beginning of some. Give another folder.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    asked = [(name, records, task, pair) for name, records, task, pairs in groups for pair in pairs]
    lines = []
    for number, (name, records, task, pair) in enumerate(tqdm(asked, desc="queries", disable=None, dynamic_ncols=True)):
        query = make_query(records, task, pair, seed)
        views, question, _ = render.render(query, settings, grid)
        images = [f"images/{number:06d}{'ab'[k] if len(views) > 1 else ''}.png" for k in range(len(views))]
        for path, view in zip(images, views):
            Image.fromarray(view.pixels).save(folder / path)
        known = {k: v for k, v in prediction(query, {"text": ""}).items() if k not in ("pred", "text")}
        lines.append({"id": number, "dataset": name, "images": images, "question": question, **known})
    write_text(folder / "queries.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{folder}/queries.jsonl: {len(lines)} queries. Add \"pred\" to each line, a number or the answer's text, "
          "then: python evaluate.py --predictions FILE")


# ----------------------------------------------------------------------------------------------------------------------
# what is left of other abilities: plain questions, before and after fine-tuning


@torch.no_grad()
def probe(model, encoder: Encoder, chats: list[dict], max_new_tokens: int = 64) -> list[dict]:
    """Ask each question. -> the chats with the "answer" of this model, and its "loss" (nats a token) on the answer that
    was there, which is then in "before", or on its own."""
    lines = []
    for chat in tqdm(chats, desc="probe", disable=None, dynamic_ncols=True):
        views = render.chat_views(chat, encoder.grid)
        tokens = answer(model, encoder, [render.encode(encoder, views, chat["question"])], None, max_new_tokens)[0][0]
        text = decode_text(encoder, tokens)
        former = chat.get("answer", text)
        row = render.encode(encoder, views, chat["question"], render.answer_tokens(encoder, former) or [encoder.end_id])
        batch = render.pack([row])
        inputs = cast(render.model_inputs(batch, encoder, model.device), model)
        logits = model(**inputs, use_cache=False, logits_to_keep=batch["predict_at"].to(model.device)).logits[0]
        loss = F.cross_entropy(logits.float(), batch["targets"].to(model.device)).item()
        before = {"before": former} if "answer" in chat else {}
        lines.append({**chat, **before, "answer": text, "loss": round(loss, 4)})
    return lines


def probe_summary(lines: list[dict]) -> str:
    loss = sum(line["loss"] for line in lines) / len(lines)
    known = [line for line in lines if "before" in line]
    if not known:
        return f"{len(lines)} questions, loss on its own answers {loss:.3f} nats a token"
    pairs = [(line["answer"].split(), line["before"].split()) for line in known]
    same = sum(a == b for a, b in pairs) / len(pairs)
    words = sum(SequenceMatcher(None, a, b).ratio() for a, b in pairs) / len(pairs)
    return (f"{len(lines)} questions: {same:.3f} answered as before, {words:.3f} of the words in common, loss on the "
            f"former answers {loss:.3f} nats a token")


# ----------------------------------------------------------------------------------------------------------------------
# metrics: pred and true are (N,) arrays; pred is NaN where an answer could not be parsed


def within(pred: np.ndarray, true: np.ndarray, factor: float) -> np.ndarray:
    """(N,) bool: max(pred/true, true/pred) < factor. Unparsed and non-positive answers are wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (pred > 0) & (np.maximum(pred / true, true / pred) < factor)


def metrics(pred: np.ndarray, true: np.ndarray) -> dict:
    """delta1..3 over all answers; the errors over the positive parsed ones (`n - unparsed - nonpositive` of them)."""
    out = {f"delta{k}": float(within(pred, true, 1.25 ** k).mean()) for k in (1, 2, 3)}
    ok = pred > 0
    p, t = pred[ok], true[ok]
    log = np.log(p / t)
    errors = {"abs_rel": np.abs(p - t) / t, "rmse": (p - t) ** 2, "log10": np.abs(log) / math.log(10)}
    out.update({k: float(v.mean()) if len(p) else None for k, v in errors.items()})
    out["rmse"] = math.sqrt(out["rmse"]) if len(p) else None
    out["silog"] = float(100 * log.std()) if len(p) else None
    return {**out, "unparsed": int(np.isnan(pred).sum()), "nonpositive": int((pred <= 0).sum()), "n": len(true)}


def interval(hits: np.ndarray, images: np.ndarray, draws: int = 2000, seed: int = 0) -> list[float] | None:
    """95 % interval of the mean of hits by resampling images, not points: points of one image err together."""
    _, index = np.unique(images, return_inverse=True)
    count = np.bincount(index).astype(float)
    if len(count) < 2:
        return None
    total, rng = np.bincount(index, weights=hits), np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        pick = rng.integers(len(count), size=len(count))
        means.append(total[pick].sum() / count[pick].sum())
    return [float(q) for q in np.quantile(means, (0.025, 0.975))]


def best_constant(true: np.ndarray) -> float:
    """The one answer that is within 25 % of most labels: the densest window of width 2 log 1.25 on the log axis."""
    t = np.sort(np.log(true))
    width = 2 * math.log(1.25) - 1e-9
    counts = np.searchsorted(t, t + width, side="right") - np.arange(len(t))
    k = int(counts.argmax())
    return float(np.exp((t[k] + t[k + counts[k] - 1]) / 2))


def score(lines: list[dict]) -> dict:
    """Predictions of one dataset -> metrics, Euclidean and by z where the ray is known, and the constant rows."""
    true = np.array([line["true"] for line in lines], float)
    pred = np.array([np.nan if line["pred"] is None else line["pred"] for line in lines], float)
    images = np.array([line["image"] for line in lines])
    out = metrics(pred, true)
    out["delta1_ci"] = interval(within(pred, true, 1.25), images)
    best = best_constant(true)
    out["always_2m"] = float(within(np.full_like(true, 2.0), true, 1.25).mean())
    out["best_constant"] = {"value": round(best, 3), "delta1": float(within(np.full_like(true, best), true, 1.25).mean())}
    if any("q10" in line for line in lines):  # how often the truth is where the model puts 80 % of its probability
        known = [line for line in lines if "q10" in line]
        out["in_10_90"] = sum(line["q10"] <= line["true"] <= line["q90"] for line in known) / len(known)
        out["confidence"] = sum(line["confidence"] for line in known) / len(known)
        out["lost"] = sum(line["lost"] for line in known) / len(known)
    if all("ray" in line for line in lines):  # a ratio, so delta and AbsRel are the same by z; a constant's are not
        ray = np.array([line["ray"] for line in lines])
        by_z = metrics(pred / ray, true / ray)
        out["by_z"] = {k: by_z[k] for k in ("delta1", "abs_rel", "rmse", "log10", "silog")}
        out["by_z"]["always_2m"] = float(within(np.full_like(true, 2.0), true / ray, 1.25).mean())
    return out


def compare(lines: list[dict], others: list[dict]) -> dict:
    """Two predictions of the very same queries -> "delta1" of both, "difference" first minus second, and its 95 %
    interval "ci": far narrower than those of the two apart, since a point that is hard is hard for both. Raises
    ValueError if they answer other queries."""
    def key(line):
        return tuple(json.dumps(line.get(k)) for k in ("dataset", "task", "image", "image2", "pixel", "pixel2", "given"))

    index = {key(line): line for line in others}
    missing = sum(key(line) not in index for line in lines)
    if missing or len(others) != len(lines):
        raise ValueError(f"{len(lines)} and {len(others)} queries, {missing} of them not the same: only answers to the same "
                         "queries can be compared (the same --data, --queries, --seed).")
    true = np.array([line["true"] for line in lines], float)
    hits = [within(np.array([np.nan if line["pred"] is None else line["pred"] for line in group], float), true, 1.25)
            for group in (lines, [index[key(line)] for line in lines])]
    gain = hits[0].astype(float) - hits[1]
    return {"delta1": [float(h.mean()) for h in hits], "difference": float(gain.mean()),
            "ci": interval(gain, np.array([line["image"] for line in lines])), "n": len(lines)}


def summarize(lines: list[dict]) -> dict:
    """All predictions -> {"datasets": {name: metrics}, "average": {...}}, in the paper's order. Another task than distance
    is a column of its own, "name/task". Of several tasks: "tasks", the average of each, which "average" averages."""
    groups = by_column(lines)
    order = list(PAPER_ORDER)
    names = sorted(groups, key=lambda n: (order.index(n) if n in order else len(order), n))
    datasets = {name: score(groups[name]) for name in names}
    found = {line.get("task", "distance") for line in lines}
    tasks = [*(t for t in render.TASKS if t in found), *sorted(found - set(render.TASKS))]
    if len(tasks) == 1:
        return {"datasets": datasets, "average": average(datasets.values())}
    averages = {task: average(d for name, d in datasets.items() if groups[name][0].get("task", "distance") == task)
                for task in tasks}
    return {"datasets": datasets, "tasks": averages, "average": average(averages.values())}


def by_column(lines: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for line in lines:
        name = line.get("dataset", "data")
        groups.setdefault(name if line.get("task", "distance") == "distance" else f"{name}/{line['task']}", []).append(line)
    return groups


def average(scores) -> dict:
    scores, out = list(scores), {}
    for key in ("delta1", "delta2", "delta3", "abs_rel", "rmse", "log10", "silog", "always_2m"):
        values = [s[key] for s in scores]
        out[key] = None if any(v is None for v in values) else sum(values) / len(values)
    return out


def show(value) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def align(text: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left."""
    widths = [max(len(row[k]) for row in text) for k in range(len(text[0]))]
    return ["  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
            for row in text]


def task_table(result: dict) -> str:
    """delta1 of each task (row) and dataset (column), as in Table 6, with the constant rows of Table 3."""
    columns, endings = result["datasets"], [f"/{task}" for task in result["tasks"]]
    names = list(dict.fromkeys(next((n.removesuffix(e) for e in endings if n.endswith(e)), n) for n in columns))
    text = [["delta1", *names, "average"]]
    for task, mean in result["tasks"].items():
        cells = [columns.get(name if task == "distance" else f"{name}/{task}", {}) for name in names]
        text.append([task, *(show(c.get("delta1")) for c in cells), show(mean["delta1"])])
        text.append(["  always 2.0", *(show(c.get("always_2m")) for c in cells), show(mean["always_2m"])])
        best = [c.get("best_constant") for c in cells]
        found = [b["delta1"] for b in best if b]
        text.append(["  best constant", *(f"{b['delta1']:.3f} ({b['value']:g})" if b else "-" for b in best),
                     show(sum(found) / len(found))])
    text.append(["average of tasks", *([""] * len(names)), show(result["average"]["delta1"])])
    counts = ", ".join(f"{name} {d['n']} ({d['unparsed']})" for name, d in columns.items())
    return "\n".join(align(text) + [f"queries (unparsed): {counts}"])


def table(result: dict) -> str:
    """One column a dataset, as in Table 1, and the average; several tasks as in Table 6."""
    if "tasks" in result:
        return task_table(result)
    columns = {**result["datasets"], "average": result["average"]}
    text = [["", *columns]]
    for key in ("delta1", "delta2", "delta3", "abs_rel", "rmse", "log10", "silog", "unparsed", "n", "in_10_90", "confidence", "lost"):
        if any(key in c for c in columns.values()):
            text.append([key, *(show(c[key]) if key in c else "" for c in columns.values())])
    text[2:2] = [["  95 % interval", *(f"{c['delta1_ci'][0]:.3f}-{c['delta1_ci'][1]:.3f}" if c.get("delta1_ci") else ""
                                       for c in columns.values())]]
    text.append(["always 2.0 m: delta1", *(show(c["always_2m"]) for c in columns.values())])
    text.append(["best constant: delta1", *(f"{c['best_constant']['delta1']:.3f} ({c['best_constant']['value']:g} m)"
                                            if "best_constant" in c else "" for c in columns.values())])
    if any(name in PAPER_ORDER for name in columns):
        text.append(["paper, always 2.0 m", *(show(PAPER_ORDER.get(name)) if name in PAPER_ORDER else "" for name in columns)])
    z = "  ".join(f"{n} {c['by_z']['delta1']:.3f} (always 2.0 m {c['by_z']['always_2m']:.3f}, abs_rel {show(c['by_z']['abs_rel'])}, "
                  f"rmse {show(c['by_z']['rmse'])})" for n, c in columns.items() if "by_z" in c)
    return "\n".join(align(text) + ([f"by z instead of Euclidean, delta1: {z}"] if z else []))


# ----------------------------------------------------------------------------------------------------------------------
# files


def read_predictions(path: Path) -> list[dict]:
    """Lines of a predictions file; raises ValueError with file, line and value."""
    lines = []
    if not path.is_file():
        raise ValueError(f"{path}: no such file of predictions.")
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            true, pred = float(line["true"]), line["pred"]
            line["image"]
            if not (pred is None or isinstance(pred, (str, int, float))):
                raise TypeError(f"pred {pred}")
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number}: needs an object with image, pixel, true and pred ({e!r}).") from None
        if not (math.isfinite(true) and true > 0):
            raise ValueError(f"{path}, line {number}: true {true} is not a positive number.")
        if isinstance(pred, str):  # an answer as text is parsed as ours are
            line["pred"] = render.parse_answer(pred, line.get("task", "distance"))
        elif pred is not None and not math.isfinite(pred):
            line["pred"] = None
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: holds no predictions.")
    return lines


def read_parts(out: Path) -> dict[int, dict]:
    """Answers of an interrupted run, by query number; a last line that was cut off is dropped."""
    done = {}
    for path in sorted(out.glob("predictions.part-*.jsonl")):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            done[line["id"]] = line
    return done


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def default_data() -> list[str]:
    found = sorted(str(p) for p in Path("data").glob("*/val.jsonl"))
    if not found:
        raise ValueError("no data: there is no data/*/val.jsonl. Prepare a set (python prepare.py --dataset toy), or give "
                         "--data FILE.jsonl ...")
    return found


def dataset_name(path: str) -> str:
    """data/nyuv2/val.jsonl -> nyuv2; any other file by its own name."""
    path = Path(path)
    return path.parent.name if path.stem in ("train", "val") else path.stem


# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    flag = parser.add_argument
    # I/O
    flag("checkpoint", nargs="?", help="model folder or hub name")
    flag("--data", nargs="+", metavar="JSONL", help="default: every data/*/val.jsonl")
    flag("--image-root", help="folder of the images, if not each jsonl's own")
    flag("--label-type", choices=("euclidean", "z"), help="what the files hold, whatever their records say")
    flag("--out", help="folder for predictions.jsonl and metrics.json; default: <checkpoint>/eval, out/constant, "
         "out/predictions")
    flag("--overwrite", action="store_true", help="replace the evaluation that is in --out")
    # what is asked
    flag("--queries", type=int, default=NUM_QUERIES, help="random points a set (Sec. 3)")
    flag("--all", action="store_true", help="each labelled point once, instead")
    flag("--tasks", nargs="+", choices=list(render.TASKS), help="default: those that the checkpoint was trained on")
    flag("--two-point", choices=("answer", "geometry"), default="answer", help="one answer about both points, or the "
         "length between two answers about one point each")
    flag("--seed", type=int, default=0)
    render.add_settings_flags(parser)
    # instead of a model
    flag("--constant", type=float, metavar="NUMBER", help="always this answer (Tables 1 and 3: 2.0)")
    flag("--predictions", metavar="FILE", help="score these answers")
    flag("--against", metavar="FILE", help="with --predictions: the difference of delta1 to these other answers to the "
         "same queries, and its interval")
    flag("--export-queries", metavar="DIR", help="write images and questions, to be answered by any system and scored "
         "by --predictions")
    flag("--probe", metavar="FILE", help="ask these plain questions instead, and write probe.jsonl; with the "
         "probe.jsonl of another model: compare with its answers")
    # decoding, system
    flag("--decode", choices=("greedy", "median"), default="greedy", help="median of the distribution over numbers, with an "
         "interval; the paper is greedy")
    flag("--max-new-tokens", type=int, default=64)
    flag("--batch-size", type=int, default=32)
    flag("--workers", type=int, default=min(4, (os.cpu_count() or 2) - 1), help="processes that load images, per rank")
    flag("--device", default="auto")
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    return parser.parse_args(argv)


def list_queries(args, tasks: list[str]) -> list[tuple[str, Records, str, list]]:
    """-> (dataset name, records, task, (record, point) pairs) for each file and task that fits it."""
    groups, paths = [], args.data or default_data()
    names = [dataset_name(path) for path in paths]
    names = [path if names.count(name) > 1 else name for path, name in zip(paths, names)]  # two sets are two columns
    for path, name in zip(paths, names):
        records = Records(path, args.image_root, args.label_type)
        pairs = draw_queries(records, None if args.all else args.queries, args.seed)
        if not pairs:
            raise ValueError(f"{path}: has no labelled point.")
        for task in tasks:
            asked = list({i: (i, k) for i, k in pairs}.values()) if args.all and task == "motion" else pairs
            fitting = fitting_pairs(records, task, asked, args.seed)
            if len(fitting) < len(asked):
                print(f"{name}, {task}: asked about {len(fitting)} of {len(asked)}, the others do not fit this task",
                      file=sys.stderr)
            groups += [(name, records, task, fitting)] if fitting else []
    if not groups:
        raise ValueError(f"no record of {', '.join(paths)} fits the task {', '.join(tasks)} (motion needs 'pose').")
    return groups


def default_out(args) -> Path:
    """A checkpoint folder keeps its evaluation; other ways of answering than the paper's have folders of their own."""
    way = "_median" * (args.decode == "median") + "_geometry" * (args.two_point == "geometry")
    if args.checkpoint and Path(args.checkpoint).is_dir():
        return Path(args.checkpoint) / f"eval{way}"
    kind = args.checkpoint or ("constant" if args.constant is not None else "predictions")
    return Path("out") / (kind.replace("/", "--") + way)


def trained_tasks(checkpoint: str | None) -> list[str]:
    return render.load_settings(checkpoint, quiet=True)["tasks"] if checkpoint else ["distance"]


def claim(out: Path, asked: dict, rank: int, overwrite: bool) -> bool:
    """Make `out` the folder of the evaluation `asked` -> whether it is finished already. Raises ValueError if it holds
    another one, finished or not. The other ranks wait for rank 0's word, or it would take their parts for old ones."""
    run, finished = out / "run.json", out / "predictions.jsonl"

    def begun() -> dict:
        return json.loads(run.read_text()) if run.is_file() else {}

    if finished.exists() and begun() == asked and not overwrite:
        return True
    if rank == 0:
        parts = list(out.glob("predictions.part-*.jsonl"))
        if (parts or finished.exists()) and begun() != asked:
            other = ", ".join(k for k in asked if begun().get(k) != asked[k])
            if not overwrite:
                raise ValueError(f"{out}: holds another evaluation (another {other}). Give another --out, or --overwrite.")
            for path in parts:
                path.unlink()
        finished.unlink(missing_ok=True)
        write_text(run, json.dumps(asked, indent=2) + "\n")
    while begun() != asked:
        time.sleep(0.1)
    return False


def run_model(args, out: Path, groups: list) -> list[dict] | None:
    """Ask all queries, split over the ranks of torchrun; each rank appends to a file of its own, so an interrupted run
    goes on where it was. -> all lines on rank 0, else None."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    settings = render.load_settings(args.checkpoint, render.given_settings(args), quiet=rank > 0)
    folder, dtype = render.find_checkpoint(args.checkpoint), pick_dtype(args.dtype, device)
    weights = max((p.stat().st_mtime for p in Path(folder).glob("*.safetensors")), default=0)
    sums = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in {r.path for _, r, *_ in groups}}
    asked = {"checkpoint": args.checkpoint, "weights_time": weights, "settings": settings, "dtype": str(dtype),
             "seed": args.seed, "all": args.all, "queries": args.queries, "decode": args.decode, "two_point": args.two_point,
             "label_type": args.label_type, "image_root": args.image_root, "max_new_tokens": args.max_new_tokens,
             "data": [(r.path, sums[r.path], task, len(pairs)) for _, r, task, pairs in groups]}
    if claim(out, json.loads(json.dumps(asked)), rank, args.overwrite):
        if rank == 0:
            print(f"{out}: was asked before; its answers are scored again (--overwrite asks anew)")
        return read_predictions(out / "predictions.jsonl") if rank == 0 else None
    if render.read_family(folder) in render.FAMILIES:
        encoder, model = render.load_encoder(args.checkpoint), load_model(args.checkpoint, device, dtype)
    else:
        model, encoder = load_plain(args.checkpoint, device, dtype)
    done = read_parts(out)
    number, forwards, batches, asked_now = 0, 0, 0, 0
    total = sum(len(pairs) for *_, pairs in groups)
    mine = sum(len(range(rank, len(pairs), world)) for *_, pairs in groups)
    part = out / f"predictions.part-{rank}-of-{world}-{time.time_ns()}.jsonl"
    bar = tqdm(total=mine, disable=rank > 0 or not sys.stderr.isatty(), desc="queries", dynamic_ncols=True)
    with bar, open(part, "w") as file:
        for name, records, task, pairs in groups:
            numbered = [(number + k, pair) for k, pair in enumerate(pairs)][rank::world]
            number += len(pairs)
            todo = [(n, pair) for n, pair in numbered if n not in done]
            bar.update(len(numbered) - len(todo))
            at = 0
            for queries, answers, count in ask(model, encoder, settings, records, [p for _, p in todo], task, args.batch_size,
                                               args.workers, args.max_new_tokens, args.seed, args.decode,
                                               args.two_point == "geometry"):
                forwards, batches = forwards + count, batches + 1
                for query, reply in zip(queries, answers):
                    line = prediction(query, reply, dataset=name, id=todo[at][0])
                    file.write(json.dumps(line) + "\n")
                    at += 1
                file.flush()
                asked_now += len(queries)
                bar.update(len(queries))
    if forwards and rank == 0:
        print(f"{asked_now} queries, {forwards / batches:.1f} forward passes a batch")
    if rank == 0:  # ranks share a folder, so the others are done when all lines are there
        while len(done := read_parts(out)) < total:
            time.sleep(1)
        lines = [done[n] for n in range(total)]
        write_text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        for path in out.glob("predictions.part-*.jsonl"):
            path.unlink()
        return lines
    return None


def run_export(args, groups: list) -> None:
    settings, grid = {**render.DEFAULTS, **{k: v for k, v in render.given_settings(args).items() if v is not None}}, 1
    if args.checkpoint:  # exactly what it would see
        settings = render.load_settings(args.checkpoint, render.given_settings(args))
        known = render.read_family(render.find_checkpoint(args.checkpoint)) in render.FAMILIES
        grid = render.load_encoder(args.checkpoint).grid if known else 1
    export_queries(groups, settings, grid, args.seed, Path(args.export_queries))


def run_probe(args, out: Path) -> None:
    chats, device = render.read_chats(args.probe, answers=False), pick_device(args.device)
    if (out / "probe.jsonl").resolve() == Path(args.probe).resolve():
        raise ValueError(f"{args.probe}: would be written over by what it is compared with. Give another --out.")
    model = load_model(args.checkpoint, device, pick_dtype(args.dtype, device))
    lines = probe(model, render.load_encoder(args.checkpoint), chats, args.max_new_tokens)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "probe.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{args.checkpoint}: {probe_summary(lines)}\n{out}/probe.jsonl")


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        sources = [args.checkpoint, args.constant, args.predictions]
        given = sum(source is not None for source in sources)
        if given != 1 if not args.export_queries else sources[1:] != [None, None]:
            raise ValueError("give one of: a checkpoint, --constant NUMBER, --predictions FILE, --export-queries DIR.")
        if args.against and not args.predictions:
            raise ValueError("--against FILE: needs --predictions FILE, the answers that it is compared with.")
        out = Path(args.out or default_out(args))
        if args.checkpoint:
            render.find_checkpoint(args.checkpoint)
        if args.predictions:
            lines = read_predictions(Path(args.predictions))
        elif args.probe:
            return run_probe(args, out)
        else:
            groups = list_queries(args, args.tasks or trained_tasks(args.checkpoint))
            if args.export_queries:
                return run_export(args, groups)
            if args.constant is not None:
                text = {"text": f"{args.constant:g}"}
                lines = [prediction(make_query(records, task, pair, args.seed), text, dataset=name)
                         for name, records, task, pairs in groups for pair in pairs]
        out.mkdir(parents=True, exist_ok=True)
        if args.checkpoint:
            lines = run_model(args, out, groups)
        elif args.constant is not None:
            write_text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if lines is not None:
            result = summarize(lines)
            shown = table(result)
            if args.against:
                both, others = by_column(lines), by_column(read_predictions(Path(args.against)))
                both = {name: group for name, group in both.items() if name in others} or both
                result["against"] = {name: compare(group, others.get(name, [])) for name, group in both.items()}
                shown += "".join(
                    f"\n{name}: delta1 {c['delta1'][0]:.3f}, of {args.against} {c['delta1'][1]:.3f}: {c['difference']:+.3f}"
                    + (f", 95 % interval {c['ci'][0]:+.3f} to {c['ci'][1]:+.3f}" if c["ci"] else "")
                    for name, c in result["against"].items())
            write_text(out / "metrics.json", json.dumps(result, indent=2) + "\n")
            print(shown)
            print(f"{out}/metrics.json")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main()
