"""
How fast it is: each number beside the one to compare it with, measured in one run. Not a test:
nothing here passes or fails.

    python tests/bench.py render                # one iBims-like sample at f = 1000, by stage
    python tests/bench.py train --size 3b       # samples/s, TFLOP/s, memory (on a GPU)
    python tests/bench.py evaluate --size toy   # queries/s: draft, plain steps
    python tests/bench.py reader                # queries/s through pointcloud.Reader, of ckpt/toy
    python tests/bench.py grpo --micro-batch 2  # seconds a prompt over SFT's a sample
    python tests/bench.py peer                  # the same through a loop of stock transformers
    python tests/bench.py memory --size 7b --world 8 --reshard   # GiB a GPU, without a GPU
    python tests/bench.py memory --table        # of all recipes
    python tests/bench.py records               # a jsonl of a million records
    python tests/bench.py prepare               # images/s a core: depth maps, LiDAR

--size: random weights of that size. Medians of several runs; sizes and rules are printed with the
numbers.
"""
import argparse
import contextlib
import gc
import io
import json
import resource
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

from toy_model import make_tokenizer, make_toy_model  # noqa: E402

import evaluate  # noqa: E402
import render  # noqa: E402
import train_grpo  # noqa: E402
import train_sft  # noqa: E402

# as published: text width, layers, heads, KV heads, MLP, vocabulary, tied head; the vision tower is
# the same in both
REAL = {"3b": (2048, 36, 16, 2, 11008, 151936, True),
        "7b": (3584, 28, 28, 4, 18944, 152064, False)}
PIXTRAL = {
    "model_type": "llava", "projector_hidden_act": "gelu", "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "image_seq_length": 1, "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 14336, "vocab_size": 131072, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024000, "rope_theta": 1e9, "sliding_window": None},
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "head_dim": 64, "intermediate_size": 4096, "patch_size": 16,
        "image_size": 1024, "rope_theta": 10000.0}}
QUESTION, FORM = render.TASKS["distance"].wordings["paper"]


def time_ms(function, clock=time.perf_counter) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def median_ms(function, runs: int = 9, warmup: int = 2, clock=time.perf_counter) -> float:
    return statistics.median([time_ms(function, clock) for _ in range(runs + warmup)][warmup:])


def make_model_folder(folder: Path, size: str, weights: bool = True) -> Path:
    """A folder as from the hub: the toy model, or its tokenizer with the config of the real sizes
    and random bfloat16 weights."""
    if size == "pixtral":
        write_pixtral_folder(folder)
    else:
        make_toy_model(folder)
    if size in REAL:
        render.write_json(folder / "config.json", real_config(folder, *REAL[size]))
    if size != "toy" and weights:
        from transformers import AutoConfig, AutoModelForImageTextToText
        config = AutoConfig.from_pretrained(folder)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def real_config(folder: Path, width: int, layers: int, heads: int, kv: int, mlp: int,
                vocabulary: int, tied: bool) -> dict:
    config = render.read_json(folder / "config.json")
    config["tie_word_embeddings"] = tied
    config["text_config"] |= {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": mlp, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "initializer_range": 0.02, "max_position_embeddings": 128000,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [16, 24, 24]}}
    config["vision_config"] |= {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
        "out_hidden_size": width, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
        "initializer_range": 0.02}
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    return config


def write_pixtral_folder(folder: Path) -> None:
    family = render.FAMILIES["llava"]
    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = make_tokenizer(special, "</s>", family.chat_template)
    tokenizer.save_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    render.write_json(folder / "config.json", {**PIXTRAL, "image_token_index": image})
    render.write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 16, "width": 16},
        "image_mean": list(family.mean), "image_std": list(family.std)})


def noise_views(checkpoint, columns: int, rows: int, count: int) -> list:
    rng = np.random.default_rng(0)
    height, width = rows * checkpoint.grid, columns * checkpoint.grid
    camera = (1000, 1000, 0, 0, width, height)
    return [render.View(rng.integers(0, 256, (height, width, 3), np.uint8), camera, (1, 1), (0, 0))
            for _ in range(count)]


def training_batch(checkpoint, views: list, question: str, answer: list[int]) -> dict:
    samples = [render.encode(checkpoint, [view], question, answer) for view in views]
    return train_sft.collate([{**sample, "task": "distance", "bad": []} for sample in samples])


def sft_step(model, optimizer, checkpoint, batches: list[dict], device,
             reshard: bool = False) -> float:
    """What train_sft.py does in a step -> loss a token."""
    world, loss_sum = torch.distributed.get_world_size(), 0.0
    tokens = sum(len(batch["targets"]) for batch in batches)
    for micro_step, batch in enumerate(batches, 1):
        train_sft.begin_micro_step(model, micro_step == len(batches), reshard)
        loss = train_sft.answer_losses(model, checkpoint, batch, device).sum()
        (loss * (world / tokens)).backward()
        loss_sum += loss.detach()
    train_sft.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum.item() / tokens


def grpo_step(model, optimizer, checkpoint, samples: list[dict], rollout, advantages,
              micro_batch: int, reshard: bool = False) -> None:
    """What train_grpo.py does in an update."""
    tokens = rollout.mask.sum()
    for k in range(0, len(samples), micro_batch):
        rows = slice(k, k + micro_batch)
        train_sft.begin_micro_step(model, k + micro_batch >= len(samples), reshard)
        part = rollout.part(rows)
        logps = train_grpo.answer_logps(model, checkpoint, samples[rows], part.tokens, 1.0)
        loss, _ = train_grpo.grpo_loss(logps, part.mask, advantages[rows])
        (loss / tokens).backward()
    train_sft.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def image_tokens(size: str) -> tuple[int, int]:
    """Columns and rows of image tokens: 4 x 3, or 1200 x 900 px or so as in the paper's crops."""
    return {"toy": (4, 3), "pixtral": (75, 56)}.get(size, (43, 32))


def peak_gib(device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------


def bench_render(args) -> None:
    """Load, unify, crop, marker, patchify of one 640 x 480 PNG (a real iBims-1 one where the local
    samples are)."""
    torch.set_num_threads(1)
    path = ROOT.parent / "shared/samples/ibims1/ibims1_core_raw/rgb/corridor_01.png"
    with tempfile.TemporaryDirectory() as tmp:
        if not path.is_file():
            path = Path(tmp) / "photo.png"
            ramp = np.linspace(0, 200, 640)[:, None] + np.linspace(0, 50, 480)[:, None, None]
            dots = np.random.default_rng(0).integers(0, 6, (480, 640, 3))
            Image.fromarray((ramp + dots).astype(np.uint8)).save(path)
        make_toy_model(Path(tmp) / "model")
        checkpoint = render.open_checkpoint(str(Path(tmp) / "model"), quiet=True)
        camera, crop = (559.62, 558.14, 361.87, 241.99, 640, 480), (1000, 1400, 700, 1200)
        image, rng = render.open_image(path), np.random.default_rng(0)

        def crop_of(image):
            return render.unify_focal(image, camera, 1000, 28, crop, [(300, 200)], rng)

        view, whole = crop_of(image), render.unify_focal(image, camera, 1000, 28)

        def all_stages():
            view = crop_of(render.open_image(path))
            render.draw_marker(view.pixels, *view.move(300, 200))
            render.patchify(view.pixels, checkpoint)

        stages = {"load": lambda: render.open_image(path),
                  "unify + crop": lambda: crop_of(image),
                  "unify, no crop": lambda: render.unify_focal(image, camera, 1000, 28),
                  "marker": lambda: render.draw_marker(view.pixels, 300, 200),
                  "patchify": lambda: render.patchify(view.pixels, checkpoint),
                  "all (with crop)": all_stages}
        print(f"one sample, {path.name} 640 x 480 -> {view.pixels.shape[1]} x "
              f"{view.pixels.shape[0]} and the like, median ms of processor time")
        for name, function in stages.items():
            print(f"  {name:16} {median_ms(function, 15, clock=time.process_time):7.2f}")
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )
        theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 12845056})
        picture = Image.fromarray(whole.pixels)
        ms = median_ms(lambda: theirs([picture], return_tensors="pt"), 5, clock=time.process_time)
        print(f"  for comparison: the image processor of transformers alone {ms:7.2f}")


def bench_train(args) -> None:
    """Optimizer steps on packed samples of one size: samples/s, model TFLOP/s, peak memory, with
    and without checkpointing."""
    rank, world, device = evaluate.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = image_tokens(args.size)
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_model_folder(Path(tmp), args.size)
        checkpoint = render.open_checkpoint(str(folder), quiet=True)
        answer = checkpoint.tokens(FORM.format(x="2.35")) + [checkpoint.end_id]
        views = noise_views(checkpoint, columns, rows, args.micro_batch)
        batches = [training_batch(checkpoint, views, QUESTION, answer)] * args.accumulate

        def measure(checkpointing: bool) -> str:
            model = train_sft.shard_model(folder, device, dtype, args.reshard, checkpointing)
            optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)
            ms = median_ms(lambda: sft_step(model, optimizer, checkpoint, batches, device,
                                            args.reshard), 7)
            flops = train_sft.training_flops(model, batches[0]) * args.accumulate * world
            count = args.micro_batch * args.accumulate * world
            return f"{count / ms * 1e3:.2f} samples/s, {flops / ms / 1e9:.4g} TFLOP/s"

        for checkpointing in (False, True):
            free_memory()
            try:
                result = measure(checkpointing)
            except torch.OutOfMemoryError:
                result = "out of memory"
            print(f"train {args.size}: {columns * rows} image tokens, micro-batch "
                  f"{args.micro_batch} x {args.accumulate}, checkpointing {checkpointing}: "
                  f"{result}, {peak_gib(device):.1f} GiB peak ({device.type} {dtype})")


def free_memory() -> None:
    """Of models before: a sharded one is a reference cycle."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def say(model, answer: list[int], first: torch.Tensor) -> None:
    """Make a random model say `answer` in evaluation, whose first token has position first (B,): a
    draft would never hold otherwise. It computes what any model does."""
    script, first = torch.tensor(answer, device=model.device), first.to(model.device)

    def put(module, args, kwargs, output):
        if module.training:
            return
        places = kwargs["position_ids"]
        if places.ndim == 3:
            places = places[0]
        behind = first[:, None]
        if "segments" in kwargs:  # packed prompts
            keep = kwargs["logits_to_keep"]
            row = torch.searchsorted(kwargs["segments"].long(), keep, right=True) - 1
            places, behind = places[:, keep], first[row]
        token = script[(places + 1 - behind).clamp(0, len(script) - 1)]
        output.logits.scatter_(-1, token[..., None], 1e4)

    model.register_forward_hook(put, with_kwargs=True)


def bench_evaluate(args) -> None:
    """Greedy answers of a model that says the template: drafted and verified, and step by step."""
    rank, world, device = evaluate.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = image_tokens(args.size)
    question, form = render.TASKS["distance"].wordings[args.prompt]
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_model_folder(Path(tmp), args.size)
        checkpoint = render.open_checkpoint(str(folder), {"prompt": args.prompt}, quiet=True)
        answer = checkpoint.tokens(form.format(x="2.35")) + [checkpoint.end_id]
        model = evaluate.load_model(checkpoint, device, dtype)
        views = noise_views(checkpoint, columns, rows, args.batch)
        samples = [render.encode(checkpoint, [view], question) for view in views]
        say(model, answer, evaluate.pack_prompts(checkpoint, samples)["position"])
        for name, drafted in (("draft", form), ("plain steps", None)):
            batch, passes = evaluate.pack_prompts(checkpoint, samples, drafted), []

            def answer_all():
                passes.append(evaluate.greedy_answers(model, checkpoint, batch, 64)[1])

            rate = args.batch / median_ms(answer_all, 5, 1) * 1e3
            print(f"evaluate {args.size}, prompt {args.prompt}, {columns * rows} image tokens, "
                  f"batch {args.batch}: {name}: {rate:.2f} queries/s, {passes[0]} forward passes, "
                  f"{peak_gib(device):.1f} GiB peak")


def bench_reader(args) -> None:
    """A trained model's answers about one photo, through the class and by evaluate.py's loop."""
    import pointcloud
    reader = pointcloud.Reader(args.checkpoint, batch_size=args.batch)
    model, checkpoint = reader.model, reader.checkpoint
    side = round(1.12 * checkpoint.settings["focal"]), round(0.84 * checkpoint.settings["focal"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 90, (*side[::-1], 3), np.uint8))
    grid = pointcloud.pixel_grid(*image.size, 480).reshape(-1, 2)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "photo.png"
        image.save(path)
        photo = pointcloud.open_photo(str(path), fov=58)
        record = {"image": photo.path, "intrinsics": photo.intrinsics, "pixel_coords": grid,
                  "depth": np.ones(len(grid))}
        records = [render.check_record(record, "photo")]

        def by_loop():
            pairs = [(0, k) for k in range(len(grid))]
            for _ in evaluate.run_queries(model, checkpoint, records, pairs, "distance", args.batch,
                                          decode="median"):
                pass

        for name, run, count in (
                ("Reader, an array", lambda: reader(np.asarray(image), grid, fov=58), len(grid)),
                ("Reader, a path", lambda: reader(path, grid, fov=58), len(grid)),
                ("Reader, one point a call", lambda: reader(path, grid[:1], fov=58), 1),
                ("evaluate.run_queries", by_loop, len(grid))):
            rate = count / median_ms(run, 5, 1) * 1e3
            print(f"{args.checkpoint}, {side[0]} x {side[1]} px, median, batch {args.batch}, "
                  f"{model.compute_device}: {name}: {rate:.0f} queries/s")


def larger_toy(folder: Path) -> Path:
    """Large enough that arithmetic counts, not the number of calls."""
    make_toy_model(folder, hidden=256, vision_layers=4, text_layers=6, init_std=0.04)
    return folder


def bench_grpo(args) -> None:
    """Seconds of GRPO for a prompt over seconds of SFT for a sample, same model, images and batch.
    No token ends an answer here, so all have the same length."""
    rank, world, device = evaluate.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    toy = args.size == "toy"
    columns, rows = (26, 20) if toy else image_tokens(args.size)
    group, length, count = 8, 40, args.micro_batch
    question, form = render.TASKS["distance"].wordings["release"]
    with tempfile.TemporaryDirectory() as tmp:
        folder = larger_toy(Path(tmp)) if toy else make_model_folder(Path(tmp), args.size)
        checkpoint = render.open_checkpoint(tmp, quiet=True)
        checkpoint.stop_ids = frozenset()
        views = noise_views(checkpoint, columns, rows, count)
        answer = checkpoint.tokens(form.format(x="2.35")) + [checkpoint.end_id] * length
        batches = [training_batch(checkpoint, views, question, answer[:length])]
        samples = [render.encode(checkpoint, [view], question) for view in views]
        model = train_sft.shard_model(folder, device, dtype, args.reshard, not toy).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        uniform = torch.rand(count, length, group, dtype=torch.float64, device=device)
        advantages = torch.randn(count, group, device=device)

        def roll():
            with train_sft.gathered(model, args.reshard):
                return train_grpo.sample_answers(model, checkpoint, samples, uniform, 1.0)

        rollout = roll()
        ms = {"SFT, a sample": median_ms(
                  lambda: sft_step(model, optimizer, checkpoint, batches, device), 5, 1),
              "rollout": median_ms(roll, 5, 1),
              "update": median_ms(lambda: grpo_step(model, optimizer, checkpoint, samples, rollout,
                                                    advantages, count), 5, 1)}
        ms["GRPO, a prompt"] = ms["rollout"] + ms["update"]
        print(f"grpo {args.size}: {columns * rows} image tokens, {count} prompts x {group} answers "
              f"x {length} tokens, {peak_gib(device):.1f} GiB peak ({device.type} {dtype}); ms a "
              "prompt, and over SFT:")
        for name, value in ms.items():
            print(f"  {name:16} {value / count:9.1f} {value / ms['SFT, a sample']:7.2f}")


# --------------------------------------------------------------------------------------------------
# peer: the same work through stock transformers


def padded(checkpoint, views: list, rows: list[list[int]], left: bool, device) -> dict:
    """Inputs as a processor of transformers makes them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    family = checkpoint.family
    processor = Qwen2VLImageProcessorPil(do_resize=False, image_mean=list(family.mean),
                                         image_std=list(family.std))
    images = processor([Image.fromarray(view.pixels) for view in views], return_tensors="pt")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), checkpoint.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        columns = slice(width - len(row), None) if left else slice(len(row))
        ids[b, columns], mask[b, columns] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask, **images,
              "mm_token_type_ids": (ids == checkpoint.image_id).int()}
    return {key: value.to(device) for key, value in inputs.items()}


def stock_side(folder, checkpoint, views, question, answer, group, device, dtype) -> tuple:
    """-> a training step, answers to all, a GRPO step, as transformers' Trainer and generate, and
    a plain GRPO with a copy of the prompt for each answer, do them."""
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype,
                                                        attn_implementation="sdpa").to(device)
    model.generation_config.eos_token_id = None  # all answers have the same length
    banned = train_grpo.banned_tokens(model, checkpoint)  # or a random model says images
    model.generation_config.suppress_tokens = banned.tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    prompts = [render.encode(checkpoint, [view], question)["input_ids"].tolist() for view in views]
    advantages, length = torch.randn(len(views), group, device=device), len(answer)

    def finish_step():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def train():
        inputs = padded(checkpoint, views, [prompt + answer for prompt in prompts], False, device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, prompts):
            row[:len(prompt)] = -100
        model.train()(**inputs, labels=labels).loss.backward()
        finish_step()

    def generate(views, prompts, **how):
        inputs = padded(checkpoint, views, prompts, True, device)
        out = model.eval().generate(**inputs, max_new_tokens=length, **how)
        return out[:, -length:]

    def grpo():
        for view, prompt, advantage in zip(views, prompts, advantages):
            answers = generate([view] * group, [prompt] * group, do_sample=True, top_k=0)
            rows = [prompt + tokens for tokens in answers.tolist()]
            inputs = padded(checkpoint, [view] * group, rows, True, device)
            logits = model.train()(**inputs, logits_to_keep=length + 1).logits[:, :-1]
            logps = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
            (-(advantage[:, None] * logps).mean()).backward()
        finish_step()

    return train, lambda: generate(views, prompts, do_sample=False), grpo


def our_side(folder, checkpoint, views, question, answer, group, device, dtype) -> tuple:
    """The same by ours."""
    model = train_sft.shard_model(folder, device, dtype)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6, fused=True)
    shape = (len(views), len(answer), group)
    uniform = torch.rand(shape, dtype=torch.float64, device=device)
    advantages = torch.randn(len(views), group, device=device)

    def encode():
        return [render.encode(checkpoint, [view], question) for view in views]

    def train():
        batch = training_batch(checkpoint, views, question, answer)
        sft_step(model, optimizer, checkpoint, [batch], device)

    def answer_all():
        batch = evaluate.pack_prompts(checkpoint, encode(), FORM)
        with train_sft.gathered(model, False):
            answers, _ = evaluate.greedy_answers(model, checkpoint, batch, len(answer))
        assert answers == [answer] * len(views)

    def grpo():
        samples = encode()
        with train_sft.gathered(model, False):
            rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform, 1.0)
        grpo_step(model, optimizer, checkpoint, samples, rollout, advantages, 2)

    say(model, answer, evaluate.pack_prompts(checkpoint, encode())["position"])
    return train, answer_all, grpo


def bench_peer(args) -> None:
    """The same random model, images of several sizes, answers and optimizer: a Trainer-like loop
    of stock transformers (padded batch, all logits, its own image processor), its generate, plain
    GRPO with copies; and ours. Both from decoded images on. On a CPU processor time of one thread,
    taken in turns; on a GPU seconds, one after the other."""
    torch.set_num_threads(1)
    rank, world, device = evaluate.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    toy, gpu, group = args.size == "toy", device.type == "cuda", 8
    scale = 2 if toy else 1  # of the paper's crops, 1000 to 1400 x 700 to 1200 px
    sizes = [(48 // scale, 30 // scale), (36 // scale, 42 // scale), (43 // scale, 26 // scale),
             (50 // scale, 34 // scale)]
    with tempfile.TemporaryDirectory() as tmp:
        folder = larger_toy(Path(tmp)) if toy else make_model_folder(Path(tmp), args.size)
        checkpoint = render.open_checkpoint(tmp, quiet=True)
        answer = checkpoint.tokens(FORM.format(x="2.35")) + [checkpoint.end_id]
        views = [noise_views(checkpoint, columns, rows, 1)[0] for columns, rows in sizes]

        def measure(*sides) -> list[list[float]]:
            """Medians of three runs of each side's work."""
            works = [side(folder, checkpoint, views, QUESTION, answer, group, device, dtype)
                     for side in sides]
            rounds = [[[time_ms(work[k], time.perf_counter if gpu else time.process_time)
                        for work in works] for k in range(3)] for _ in range(4)]
            return np.median(rounds[1:], 0).T.tolist()  # the first warms up

        if gpu:
            (stock,), _, (ours,) = measure(stock_side), free_memory(), measure(our_side)
        else:
            stock, ours = measure(stock_side, our_side)
    print(f"peer {args.size}: images of {sizes} tokens, answers of {len(answer)}, groups of "
          f"{group} ({device.type} {dtype}); ms an image\n"
          f"  {'':16} transformers      ours  ratio")
    names = ("training step", "greedy answers", "GRPO step")
    for name, their_ms, our_ms in zip(names, stock, ours):
        print(f"  {name:16} {their_ms / len(views):12.1f} {our_ms / len(views):9.1f} "
              f"{their_ms / our_ms:6.2f}")


# --------------------------------------------------------------------------------------------------
# memory: a training step at its real size, on tensors without data


class Simulated(TorchDispatchMode):
    """Above a FakeTensorMode: counts the bytes that are alive, and their peak. Whole numbers stay
    real, so that segment starts, grids and whatever Python decides by them are."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.records = WeakIdKeyDictionary()  # storage -> [bytes]
        self.on_host = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come here
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fake = any(isinstance(x, FakeTensor) for x in tensors)
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = None
        if not any(map(without_data, tensors)) and "c10d" not in str(func):
            if not tensors:  # it makes one: of whole numbers?
                out = func(*args, **kwargs)
            if not any(map(without_data, tree_leaves(out))):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        out = func(*args, **kwargs) if out is None else out
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and x.device.type != "meta":
                self.count(x.untyped_storage())
        return out

    def count(self, storage) -> None:
        if storage not in self.records:
            self.records[storage] = [0]
            weakref.finalize(storage, self.change, self.records[storage], 0)
        if storage not in self.on_host:
            self.change(self.records[storage], storage.nbytes())

    def to_host(self, tensor: torch.Tensor) -> None:
        """It lies in the memory of the CPU, for --offload."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        self.on_host[storage] = True
        self.change(self.records[storage], 0)

    def change(self, record: list[int], size: int) -> None:
        self.live += size - record[0]
        record[0] = size
        self.peak = max(self.peak, self.live)


def without_data(x) -> bool:
    return isinstance(x, FakeTensor) and x.is_floating_point() or (
        isinstance(x, torch.Tensor) and (x.is_floating_point() or x.device.type == "meta"))


@contextlib.contextmanager
def simulated(world: int, gpu: bool, offload: bool = False):
    """-> the Simulated of a block that runs as rank 0 of `world` processes. gpu: by the path of
    CUDA; offload: what FSDP leaves in the CPU's memory is not counted, nor was it ever there."""
    counted, resize = Simulated(), torch.UntypedStorage.resize_
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def resize_counted(storage, size):  # FSDP frees and refills storages
        resize(storage, size)
        if storage in counted.records:
            counted.change(counted.records[storage], size)
        return storage

    def propagate_uncounted(*args):  # shapes of whole tensors, which no GPU holds
        with _disable_current_modes():
            return propagate(*args)

    shards, fetch = FSDPParam.to_sharded_dtensor, FSDPParam.all_gather_inputs.fget

    def shard_on_host(self, tensor):  # of a reduced gradient, which goes there at once
        if offload and not tensor.is_meta and tensor.untyped_storage() in counted.records:
            counted.to_host(tensor)
        return shards(self, tensor)

    def fetched(self):  # what has to be cast is a copy anyway
        return [x.clone() if offload and x.dtype == self.orig_dtype else x for x in fetch(self)]

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with contextlib.ExitStack() as stack:
        for place, name, value in (
                (torch.UntypedStorage, "resize_", resize_counted),
                (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_uncounted),
                (evaluate, "load_weights", lambda *args: None),
                (FSDPParam, "to_sharded_dtensor", shard_on_host),
                (FSDPParam, "all_gather_inputs", property(fetched)),
                # CUDA's kernels for a mask need as much as the CPU's: no matrix of scores
                (evaluate, "sdpa_kernel", lambda kinds: contextlib.nullcontext()),
                (FakeTensor, "is_cuda", gpu)):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.callback(torch.distributed.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(counted)


def simulate(size: str, world: int, micro_batch: int, accumulate: int, checkpointing: bool,
             reshard: bool, grpo: bool = False, gpu: bool = True,
             **trained) -> dict[str, float]:
    """Peak memory of a training step, in GiB a GPU: weights, moments, everything. trained: lora,
    freeze, offload of train_sft.shard_model."""
    offload = trained.get("offload", False)
    columns, rows = image_tokens(size)
    prompt = "release" if grpo else "paper"
    question, form = render.TASKS["distance"].wordings[prompt]
    count = micro_batch * accumulate
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_model_folder(Path(tmp), size, weights=False)
        checkpoint = render.open_checkpoint(tmp, quiet=True)
        answer = checkpoint.tokens(form.format(x="2.35")) + [checkpoint.end_id]
        views = noise_views(checkpoint, columns, rows, count)
        samples = [render.encode(checkpoint, [view], question) for view in views]
        batch = training_batch(checkpoint, views[:micro_batch], question, answer)
        with simulated(world, gpu, offload) as counted:
            device = torch.device("cpu")
            model = train_sft.shard_model(folder, device, torch.bfloat16, reshard, checkpointing,
                                          **trained)
            learnt = [p for p in model.train().parameters() if p.requires_grad]
            if offload:
                for parameter in model.parameters():
                    counted.to_host(parameter)
            weights = counted.live
            optimizer = torch.optim.AdamW(learnt, lr=1e-5, fused=True)
            for parameter in learnt:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes the moments
            optimizer.zero_grad(set_to_none=True)
            for state in optimizer.state.values() if offload else ():
                counted.to_host(state["exp_avg"])
                counted.to_host(state["exp_avg_sq"])
            moments, counted.peak = counted.live - weights, counted.live
            if grpo:
                simulate_grpo(model, optimizer, checkpoint, samples, micro_batch, reshard)
            else:
                sft_step(model, optimizer, checkpoint, [batch] * accumulate, device, reshard)
            peak = counted.peak
            del model, optimizer
    gc.collect()
    return {"weights": weights / 2**30, "moments": moments / 2**30, "peak": peak / 2**30}


def simulate_grpo(model, optimizer, checkpoint, samples: list[dict], micro_batch: int,
                  reshard: bool, group: int = 8, length: int = 128) -> None:
    """Some steps of a rollout, then the update by answers of full length."""
    few = torch.rand(len(samples), 3, group, dtype=torch.float64)
    with train_sft.gathered(model, reshard):
        train_grpo.sample_answers(model, checkpoint, samples, few, 1.0)
    shape = (len(samples), group, length)
    tokens = torch.full(shape, checkpoint.end_id)
    rollout = train_grpo.Rollout(tokens, torch.ones(shape, dtype=torch.bool), torch.zeros(shape))
    advantages = torch.randn(shape[:2])
    grpo_step(model, optimizer, checkpoint, samples, rollout, advantages, micro_batch, reshard)


# size, world, micro-batch, how many of them, checkpointing, --reshard, GRPO
RECIPES = [("3b", 1, 2, 2, True, False, False), ("3b", 1, 4, 2, True, False, False),
           ("3b", 1, 1, 1, False, False, False), ("3b", 1, 2, 1, False, False, False),
           ("3b", 1, 1, 16, True, False, True), ("3b", 8, 2, 2, True, False, True),
           ("3b", 8, 4, 2, True, False, False), ("3b", 8, 2, 2, False, False, False),
           ("3b", 128, 2, 2, False, False, False),
           ("7b", 2, 1, 2, True, True, False), ("7b", 8, 4, 2, True, False, False),
           ("7b", 8, 4, 2, True, True, False), ("7b", 8, 1, 2, False, True, False),
           ("7b", 128, 4, 2, True, False, False), ("7b", 128, 1, 2, False, False, False),
           ("pixtral", 4, 1, 2, True, True, False), ("pixtral", 8, 4, 2, True, True, False),
           ("pixtral", 8, 1, 2, False, True, False), ("pixtral", 128, 3, 1, True, True, False),
           ("pixtral", 128, 1, 2, False, True, False)]
ADAPTERS = {"lora": 16, "freeze": "vision"}
OFFLOADED = {**ADAPTERS, "offload": True}
# on one GPU, what else is given to train_sft.py; checkpointing
ONE_GPU = [(size, 1, 1, 2, checkpoints, True, False, trained) for size, trained, checkpoints in (
    ("3b", ADAPTERS, True), ("3b", ADAPTERS, False), ("3b", {"offload": True}, True),
    ("7b", OFFLOADED, True), ("7b", ADAPTERS, True), ("7b", ADAPTERS, False),
    ("7b", {"offload": True}, True), ("7b", {"freeze": "vision"}, True),
    ("pixtral", OFFLOADED, True), ("pixtral", ADAPTERS, True))]
# GB as cards are called: GiB, less 2 for context, NCCL and workspaces
CARDS = {16: 13.6, 24: 21.5, 48: 42.4, 80: 77.1, 141: 137.8}


def bench_memory(args) -> None:
    """Peak memory of a training step on any number of GPUs, without one: the project's own step at
    its real size, on tensors without data. Add about 2 GiB for context, NCCL and workspaces."""
    rows = [*RECIPES, *ONE_GPU]
    if not args.table:
        trained = {"lora": args.lora, "freeze": args.freeze, "offload": args.offload}
        rows = [(args.size, args.world, args.micro_batch, args.accumulate, args.checkpointing,
                 args.reshard, args.grpo, {key: value for key, value in trained.items() if value})]
    print("| model, GPUs | setting | GiB a GPU | smallest card, GB |\n|---|---|---|---|")
    for size, world, micro_batch, accumulate, checkpointing, reshard, grpo, *rest in rows:
        trained = dict(*rest)
        gib = simulate(size, world, micro_batch, accumulate, checkpointing, reshard, grpo,
                       **trained)
        setting = [f"micro-batch {micro_batch} x {accumulate}"]
        setting += ["GRPO, 8 answers of 128 tokens"] * grpo
        setting += ["checkpointing" if checkpointing else "no checkpointing"]
        setting += ["--reshard"] * reshard
        setting += [f"--{key}" if value is True else f"--{key} {value}"
                    for key, value in trained.items()]
        card = next((card for card, usable in CARDS.items() if gib["peak"] < usable), "none")
        rest = gib["peak"] - gib["weights"] - gib["moments"]
        print(f"| {size}, {world} | {', '.join(setting)} | {gib['peak']:.1f} ({gib['weights']:.1f} "
              f"weights, {gib['moments']:.1f} moments, {rest:.1f} bf16 weights, gradients, "
              f"activations) | {card} |", flush=True)


# --------------------------------------------------------------------------------------------------
# records, prepare


def bench_records(args) -> None:
    """Opening and reading a large jsonl through its index."""
    rng, lines = np.random.default_rng(0), []
    for k in range(1000):
        lines.append({"image": f"{k}.jpg", "intrinsics": [500, 500, 320, 240, 640, 480],
                      "pixel_coords": rng.integers(0, 480, (100, 2)).tolist(),
                      "depth": rng.uniform(0.5, 9, 100).round(4).tolist()})
    block = "".join(json.dumps(line) + "\n" for line in lines)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "train.jsonl"
        with open(path, "w") as file:
            for _ in range(args.records // 1000):
                file.write(block)
        start = time.perf_counter()
        records = render.Records(path)
        built = time.perf_counter() - start
        opened = median_ms(lambda: render.Records(path))
        read = median_ms(lambda: records[int(rng.integers(len(records)))], 200)
        print(f"{len(records)} records, {path.stat().st_size / 2**30:.2f} GiB: index built in "
              f"{built:.2f} s, opened with it in {opened:.2f} ms, one random record {read:.3f} ms, "
              f"{peak_gib(torch.device('cpu')):.2f} GiB of memory at most")


def bench_prepare(args) -> None:
    """Images/s of one core through prepare's own readers, sampling and writing: 640 x 480 depth
    maps as of NYUv2, and a nuScenes-like set, 35,000 points a sweep, moved by the poses of two
    times. Files are in the cache, not on a slow disk."""
    from test_prepare_readers import nuscenes_root, own_folder

    import prepare
    cloud = np.random.default_rng(0).normal(0, 20, (35_000, 3))
    titles = {"folder": "NYU-like, 640 x 480 map", "nuscenes": "nuScenes-like, 35,000 points"}
    with tempfile.TemporaryDirectory() as tmp:
        own_folder(Path(tmp) / "folder", 200, [518.86, 519.47, 324.58, 252.74, 640, 480])
        nuscenes_root(Path(tmp) / "nuscenes", ("scene-0061",), samples=200, cloud=cloud)
        for name, title in titles.items():
            words = ["--dataset", name, "--split", "val", "--root", f"{tmp}/{name}", "--workers",
                     "1", "--out", f"{tmp}/out/{name}", "--overwrite"]

            def run():
                prepare.nuscenes_tables.cache_clear()
                with contextlib.redirect_stdout(io.StringIO()):
                    with contextlib.redirect_stderr(io.StringIO()):
                        prepare.main(words)

            wall, cpu = (200 / median_ms(run, 5, 1, clock) * 1e3
                         for clock in (time.perf_counter, time.process_time))
            print(f"prepare, {title}: {wall:.0f} images/s, {cpu:.0f} a second of CPU time (200 "
                  "images, one process, with the self-check)")


def main(argv=None) -> None:
    benches = {"render": bench_render, "train": bench_train, "evaluate": bench_evaluate,
               "reader": bench_reader, "grpo": bench_grpo, "peer": bench_peer,
               "memory": bench_memory, "records": bench_records, "prepare": bench_prepare}
    parser = render.make_parser(__doc__)
    parser.add_argument("what", choices=list(benches), help="what is measured")
    flag = parser.add_argument
    flag("--size", choices=("toy", *REAL, "pixtral"), default="toy", help="of the model")
    flag("--micro-batch", type=render.COUNT, default=4, help="samples a forward pass")
    flag("--accumulate", type=render.COUNT, default=1, help="micro-batches a step")
    flag("--batch", type=render.COUNT, default=32, help="queries a forward pass")
    flag("--checkpoint", default="ckpt/toy", help="of reader")
    flag("--prompt", choices=("paper", "release"), default="paper", help="that is answered")
    flag("--records", type=render.COUNT, default=1_000_000, help="of the jsonl")
    flag = parser.add_argument_group("memory").add_argument
    flag("--world", type=render.COUNT, default=1, help="number of GPUs")
    flag("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
         help="activation checkpointing")
    flag("--reshard", action="store_true", help="as in train_sft.py")
    flag("--grpo", action="store_true", help="a step of train_grpo.py")
    flag("--lora", type=render.COUNT, help="as in train_sft.py; default: none")
    flag("--freeze", choices=("vision",), help="as in train_sft.py; default: nothing")
    flag("--offload", action="store_true", help="as in train_sft.py")
    flag("--table", action="store_true", help="of all recipes, instead")
    args = parser.parse_args(argv)
    benches[args.what](args)


if __name__ == "__main__":
    main()
