"""
How fast it is: each number beside the one to compare it with, measured in one run. Not a test:
nothing here passes or fails.

    python tests/bench.py render                # one iBims-like sample at f = 1000, by stage
    python tests/bench.py train --size 3b       # samples/s, TFLOP/s, memory (on a GPU)
    python tests/bench.py evaluate --size toy   # queries/s: draft, plain steps, generate
    python tests/bench.py grpo --micro-batch 2  # seconds a prompt over SFT's a sample
    python tests/bench.py records               # a jsonl of a million records
    python tests/bench.py prepare               # images/s a core: depth maps, LiDAR

--size toy | 3b | 7b: random weights of that size. Medians of several runs; sizes and rules are
printed with the numbers.
"""
import contextlib
import gc
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

from toy_model import make_toy_model  # noqa: E402

import evaluate  # noqa: E402
import render  # noqa: E402
import train_grpo  # noqa: E402
import train_sft  # noqa: E402

# Qwen2.5-VL as published: text width, layers, heads, KV heads, MLP, vocabulary, tied head; the
# vision tower is the same
REAL = {"3b": (2048, 36, 16, 2, 11008, 151936, True),
        "7b": (3584, 28, 28, 4, 18944, 152064, False)}
QUESTION, FORM = render.TASKS["distance"].wordings["paper"]


def median_ms(function, runs: int = 9, warmup: int = 2, clock=time.perf_counter) -> float:
    times = []
    for k in range(runs + warmup):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = clock()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (clock() - start))
    return statistics.median(times[warmup:])


def make_model_folder(folder: Path, size: str) -> Path:
    """A folder as from the hub: the toy model, or its tokenizer with random bfloat16 weights of the
    real sizes."""
    make_toy_model(folder)
    if size == "toy":
        return folder
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    width, layers, heads, kv, mlp, vocabulary, tied = REAL[size]
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
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**config),
                                                                dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def noise_views(checkpoint, columns: int, rows: int, count: int) -> list:
    rng = np.random.default_rng(0)
    height, width = rows * checkpoint.grid, columns * checkpoint.grid
    camera = (1000, 1000, 0, 0, width, height)
    return [render.View(rng.integers(0, 256, (height, width, 3), np.uint8), camera, (1, 1), (0, 0))
            for _ in range(count)]


def training_batch(checkpoint, views: list, question: str, answer: list[int]) -> dict:
    samples = [render.encode(checkpoint, [view], question, answer) for view in views]
    return train_sft.collate([{**sample, "bad": []} for sample in samples])


def sft_step(model, optimizer, checkpoint, batches: list[dict], device) -> float:
    """What train_sft.py does in a step -> loss a token."""
    world, loss_sum = torch.distributed.get_world_size(), 0.0
    tokens = sum(len(batch["targets"]) for batch in batches)
    for micro_step, batch in enumerate(batches, 1):
        train_sft.accumulate_gradients(model, micro_step == len(batches))
        loss = train_sft.answer_loss(model, checkpoint, batch, device)
        (loss * (world / tokens)).backward()
        loss_sum += loss.detach()
    train_sft.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum.item() / tokens


def grpo_step(model, optimizer, checkpoint, samples: list[dict], rollout, advantages,
              micro_batch: int) -> None:
    """What train_grpo.py does in an update."""
    tokens = rollout.mask.sum()
    for k in range(0, len(samples), micro_batch):
        rows = slice(k, k + micro_batch)
        train_sft.accumulate_gradients(model, k + micro_batch >= len(samples))
        part = rollout.part(rows)
        logps = train_grpo.answer_logps(model, checkpoint, samples[rows], part.tokens, 1.0)
        loss, _ = train_grpo.grpo_loss(logps, part.mask, advantages[rows])
        (loss / tokens).backward()
    train_sft.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def image_tokens(size: str) -> tuple[int, int]:
    """Columns and rows of image tokens: 4 x 3, or 1204 x 896 px as in the paper's crops."""
    return (4, 3) if size == "toy" else (43, 32)


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
            model = train_sft.shard_model(folder, device, dtype, False, checkpointing).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            ms = median_ms(lambda: sft_step(model, optimizer, checkpoint, batches, device), 7)
            flops = train_sft.training_flops(model, batches[0]) * args.accumulate * world
            count = args.micro_batch * args.accumulate * world
            return f"{count / ms * 1e3:.2f} samples/s, {flops / ms / 1e9:.4g} TFLOP/s"

        for checkpointing in (False, True):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                result = measure(checkpointing)
            except torch.OutOfMemoryError:
                result = "out of memory"
            gc.collect()  # a sharded model is a reference cycle
            print(f"train {args.size}: {columns * rows} image tokens, micro-batch "
                  f"{args.micro_batch} x {args.accumulate}, checkpointing {checkpointing}: "
                  f"{result}, {peak_gib(device):.1f} GiB peak ({device.type} {dtype})")


def bench_evaluate(args) -> None:
    """Greedy answers of a model that says the template: drafted and verified, step by step, and
    transformers' generate. A random model is first taught one sentence, or the draft would never
    hold."""
    rank, world, device = evaluate.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = image_tokens(args.size)
    question, form = render.TASKS["distance"].wordings[args.prompt]
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_model_folder(Path(tmp), args.size)
        checkpoint = render.open_checkpoint(str(folder), {"prompt": args.prompt}, quiet=True)
        answer = checkpoint.tokens(form.format(x="2.35")) + [checkpoint.end_id]
        views = noise_views(checkpoint, columns, rows, args.batch)
        lesson = [training_batch(checkpoint, views[:2], question, answer)]
        model = train_sft.shard_model(folder, device, dtype).train()
        lr = 1e-3 if args.size == "toy" else 1e-5
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        for _ in range(300):
            if sft_step(model, optimizer, checkpoint, lesson, device) < 0.02:
                break
        taught = Path(tmp) / "taught"
        taught.mkdir()
        train_sft.save_model(model, checkpoint, taught, dtype)
        del model, optimizer

        checkpoint = render.open_checkpoint(str(taught))
        model = evaluate.load_model(checkpoint, device, dtype)
        samples = [render.encode(checkpoint, [view], question) for view in views]
        passes, rates = {}, {}
        for name, drafted in (("draft", form), ("plain steps", None)):
            batch = evaluate.pack_prompts(checkpoint, samples, drafted)

            def answer_all():
                passes[name] = evaluate.greedy_answers(model, checkpoint, batch, 64)[1]
            rates[name] = args.batch / median_ms(answer_all, 5, 1) * 1e3
        ms = median_ms(lambda: generate(taught, checkpoint, samples[:4], device, dtype), 3, 1)
        rates["transformers generate, one by one, sdpa"] = 4 / ms * 1e3
        for name, rate in rates.items():
            more = f", {passes[name]} forward passes" if name in passes else ""
            print(f"evaluate {args.size}, prompt {args.prompt}, {columns * rows} image tokens, "
                  f"batch {args.batch}: {name}: {rate:.2f} queries/s{more} "
                  f"({rate / list(rates.values())[-1]:.1f} x generate)")


STOCK = {}  # transformers' own model, loaded once


def generate(folder: Path, checkpoint, samples: list[dict], device, dtype) -> None:
    from transformers import AutoModelForImageTextToText
    if folder not in STOCK:
        stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype,
                                                            attn_implementation="sdpa")
        stock.generation_config.do_sample = False
        STOCK[folder] = stock.to(device).eval()
    for sample in samples:
        inputs = render.model_inputs(render.pack([sample]), checkpoint, device, dtype)
        del inputs["segments"], inputs["position_ids"]
        types = (inputs["input_ids"] == checkpoint.image_id).int()
        STOCK[folder].generate(**inputs, mm_token_type_ids=types, max_new_tokens=64)


def bench_grpo(args) -> None:
    """Seconds of GRPO for a prompt over seconds of SFT for a sample, same model, images and batch;
    and the plain way, a copy of the prompt for each answer, in rollout and update. No token ends an
    answer here, so all have the same length."""
    rank, world, device = evaluate.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = (26, 20) if args.size == "toy" else image_tokens(args.size)
    group, length, count = 8, 40, args.micro_batch
    question, form = render.TASKS["distance"].wordings["release"]
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        if args.size == "toy":  # large enough that arithmetic counts, not the number of calls
            make_toy_model(folder, hidden=256, vision_layers=4, text_layers=6, init_std=0.04)
        else:
            make_model_folder(folder, args.size)
        checkpoint = render.open_checkpoint(tmp, quiet=True)
        checkpoint.stop_ids = frozenset()
        views = noise_views(checkpoint, columns, rows, count)
        answer = checkpoint.tokens(form.format(x="2.35")) + [checkpoint.end_id] * length
        taught = [training_batch(checkpoint, views, question, answer[:length])]
        samples = [render.encode(checkpoint, [view], question) for view in views]
        copies = [sample for sample in samples for _ in range(group)]
        model = train_sft.shard_model(folder, device, dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        uniform = torch.rand(count, length, group, dtype=torch.float64, device=device)
        alone = uniform.permute(0, 2, 1).reshape(count * group, length, 1)
        advantages = torch.randn(count, group, device=device)

        def rollout(samples, uniform):
            with train_sft.gathered(model, False):
                return train_grpo.sample_answers(model, checkpoint, samples, uniform, 1.0)

        def update(samples, rollout, advantages, micro_batch):
            grpo_step(model, optimizer, checkpoint, samples, rollout, advantages, micro_batch)

        shared, plain = rollout(samples, uniform), rollout(copies, alone)
        runs, single = (3 if device.type == "cpu" else 5), advantages.view(-1, 1)
        ms = {
            "SFT, a sample": median_ms(
                lambda: sft_step(model, optimizer, checkpoint, taught, device), runs, 1),
            "GRPO rollout": median_ms(lambda: rollout(samples, uniform), runs, 1),
            "GRPO update": median_ms(lambda: update(samples, shared, advantages, count), runs, 1),
            "plain rollout": median_ms(lambda: rollout(copies, alone), 1, 0),
            "plain update": median_ms(lambda: update(copies, plain, single, group), 1, 0)}
        ms["GRPO, a prompt"] = ms["GRPO rollout"] + ms["GRPO update"]
        ms["plain, a prompt"] = ms["plain rollout"] + ms["plain update"]
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"grpo {args.size}: {size:.1f} M parameters, {columns * rows} image tokens, {count} "
              f"prompts x {group} answers x {length} tokens ({device.type} {dtype}); ms a prompt, "
              "and over SFT:")
        for name, value in ms.items():
            print(f"  {name:16} {value / count:9.1f} {value / ms['SFT, a sample']:7.2f}")


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
               "grpo": bench_grpo, "records": bench_records, "prepare": bench_prepare}
    parser = render.make_parser(__doc__)
    parser.add_argument("what", choices=list(benches), help="what is measured")
    flag = parser.add_argument
    flag("--size", choices=("toy", *REAL), default="toy", help="of the model")
    flag("--micro-batch", type=render.COUNT, default=4, help="samples a forward pass")
    flag("--accumulate", type=render.COUNT, default=1, help="micro-batches a step")
    flag("--batch", type=render.COUNT, default=32, help="queries a forward pass")
    flag("--prompt", choices=("paper", "release"), default="paper", help="that is answered")
    flag("--records", type=render.COUNT, default=1_000_000, help="of the jsonl")
    args = parser.parse_args(argv)
    benches[args.what](args)


if __name__ == "__main__":
    main()
