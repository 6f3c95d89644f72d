"""
How fast it is: each number beside the one to compare it with, measured in one run. Not a test: nothing here passes or fails.

    python tests/bench.py render                 # one iBims-like sample at f = 1000, stage by stage
    python tests/bench.py train --size 3b        # random weights of the real size: samples/s, TFLOP/s, memory (a GPU)
    python tests/bench.py evaluate --size toy    # queries/s: forced template, plain steps, transformers' generate
    python tests/bench.py grpo --micro-batch 2   # GRPO's seconds a prompt over SFT's a sample, beside the plain way
    python tests/bench.py records                # a jsonl of a million records: opening, reading, memory
    python tests/bench.py prepare                # images/s a core: depth maps, LiDAR

--size toy | 3b | 7b: random weights. Medians of several runs; sizes and rules are printed with the numbers.
"""
import argparse
import contextlib
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
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import render  # noqa: E402
import train_grpo  # noqa: E402
import train_sft  # noqa: E402

# Qwen2.5-VL as published (text width, layers, heads, KV heads, MLP, vocabulary, tied head); the vision tower is the same
REAL = {"3b": (2048, 36, 16, 2, 11008, 151936, True), "7b": (3584, 28, 28, 4, 18944, 152064, False)}


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


def make_model_folder(folder: Path, size: str) -> str:
    """A folder as from the hub. toy: make_tiny. 3b, 7b: make_tiny's tokenizer and the real sizes, random bfloat16 weights."""
    train_sft.make_tiny(folder)
    if size == "toy":
        return str(folder)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    width, layers, heads, kv, mlp, vocabulary, tied = REAL[size]
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    config["text_config"].update(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                                 intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=tied, initializer_range=0.02,
                                 max_position_embeddings=128000, layer_types=["full_attention"] * layers,
                                 rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    config["vision_config"].update(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=width,
                                   fullatt_block_indexes=[7, 15, 23, 31], window_size=112, initializer_range=0.02)
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)


def noise_views(encoder, columns: int, rows: int, count: int) -> list:
    rng = np.random.default_rng(0)
    shape = (rows * encoder.grid, columns * encoder.grid, 3)
    return [render.View(rng.integers(0, 256, shape, np.uint8), (1000, 1000, 0, 0, shape[1], shape[0]), (1, 1), (0, 0))
            for _ in range(count)]


def image_tokens(size: str) -> tuple[int, int]:
    """Columns and rows of image tokens: 4 x 3, or 1204 x 896 px as in the paper's crops."""
    return (4, 3) if size == "toy" else (43, 32)


# ----------------------------------------------------------------------------------------------------------------------


def bench_render(args) -> None:
    """Load, unify, crop, marker, patchify of one 640 x 480 PNG (a real iBims-1 one where the local samples are)."""
    torch.set_num_threads(1)
    sample = ROOT.parent / "shared/samples/ibims1/ibims1_core_raw/rgb/corridor_01.png"
    with tempfile.TemporaryDirectory() as tmp:
        path = sample
        if not sample.is_file():
            path = Path(tmp) / "photo.png"
            ramp = np.linspace(0, 200, 640)[None, :, None] + np.linspace(0, 50, 480)[:, None, None]
            dots = np.random.default_rng(0).integers(0, 6, (480, 640, 3))
            Image.fromarray((ramp + dots).astype(np.uint8)).save(path)
        train_sft.make_tiny(Path(tmp) / "model")
        encoder = render.load_encoder(str(Path(tmp) / "model"))
        camera = (559.62, 558.14, 361.87, 241.99, 640, 480)
        image = render.open_image(str(path))
        rng = np.random.default_rng(0)
        crop = (1000, 1400, 700, 1200)
        view = render.unify_focal(image, camera, 1000, 28, crop, [(300, 200)], rng)
        whole = render.unify_focal(image, camera, 1000, 28)

        def all_stages():
            v = render.unify_focal(render.open_image(str(path)), camera, 1000, 28, crop, [(300, 200)], rng)
            render.draw_marker(v.pixels, *v.move(300, 200))
            render.patchify(v.pixels, encoder)
        print(f"one sample, {path.name} 640 x 480 -> {view.pixels.shape[1]} x {view.pixels.shape[0]} and the like, median ms of processor time")
        stages = {"load": lambda: render.open_image(str(path)),
                  "unify + crop": lambda: render.unify_focal(image, camera, 1000, 28, crop, [(300, 200)], rng),
                  "unify, no crop": lambda: render.unify_focal(image, camera, 1000, 28),
                  "marker": lambda: render.draw_marker(view.pixels, 300, 200),
                  "patchify": lambda: render.patchify(view.pixels, encoder), "all (with crop)": all_stages}
        for name, function in stages.items():
            print(f"  {name:16} {median_ms(function, 15, clock=time.process_time):7.2f}")
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 12845056})
        picture = Image.fromarray(whole.pixels)
        print(f"  {'for comparison: the image processor of transformers alone':58} "
              f"{median_ms(lambda: theirs([picture], return_tensors='pt'), 5, clock=time.process_time):7.2f}")


def bench_train(args) -> None:
    """Optimizer steps on packed samples of one size: samples/s, model TFLOP/s, peak memory, with and without
    checkpointing."""
    rank, world, device = train_sft.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = image_tokens(args.size)
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_model_folder(Path(tmp), args.size)
        encoder = render.load_encoder(folder)
        views = noise_views(encoder, columns, rows, args.micro_batch)
        answer = render.answer_tokens(encoder, render.answer_form("distance", "paper").format(x="2.35")) + [encoder.end_id]
        samples = [{**render.encode(encoder, [v], render.QUESTIONS["distance"]["paper"], answer), "bad": []} for v in views]
        batch = train_sft.collate(samples)
        for checkpointing in (False, True):
            model = train_sft.shard_model(folder, device, dtype, False, checkpointing)
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                ms = median_ms(lambda: train_sft.train_step(model, optimizer, encoder, [batch] * args.accumulate, 1.0, device), 7)
            except torch.OutOfMemoryError:
                print(f"train {args.size}, checkpointing {checkpointing}: out of memory at micro-batch {args.micro_batch}")
                continue
            flops = train_sft.training_flops(model, batch) * args.accumulate * world
            count = args.micro_batch * args.accumulate * world
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else \
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"train {args.size}: {columns * rows} image tokens, micro-batch {args.micro_batch} x {args.accumulate}, "
                  f"checkpointing {checkpointing}: {count / ms * 1e3:.2f} samples/s, {flops / ms / 1e9:.4g} TFLOP/s, "
                  f"{memory:.1f} GiB peak ({device.type} {dtype})")
            del model, optimizer


def bench_evaluate(args) -> None:
    """Greedy answers of a model that says the template: forced and verified, step by step, and transformers' generate.
    A random model is first taught one sentence, or the template would never hold."""
    rank, world, device = train_sft.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = image_tokens(args.size)
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_model_folder(Path(tmp), args.size)
        encoder = render.load_encoder(folder)
        form, question = render.answer_form("distance", args.prompt), render.QUESTIONS["distance"][args.prompt]
        answer = render.answer_tokens(encoder, form.format(x="2.35")) + [encoder.end_id]
        views = noise_views(encoder, columns, rows, args.batch)
        lesson = train_sft.collate([{**render.encode(encoder, [v], question, answer), "bad": []} for v in views[:2]])
        model = train_sft.shard_model(folder, device, dtype)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if args.size == "toy" else 1e-5, fused=True)
        for _ in range(300):
            if train_sft.train_step(model, optimizer, encoder, [lesson], 1.0, device)["loss"] < 0.02:
                break
        taught = Path(tmp) / "taught"
        taught.mkdir()
        train_sft.save_model(model, folder, taught, dict(render.DEFAULTS), dtype)
        del model, optimizer
        model = evaluate.load_model(str(taught), device, dtype)
        samples = [render.encode(encoder, [v], question) for v in views]
        counts = {}

        def ask(name, form):
            counts[name] = evaluate.answer(model, encoder, samples, form, 64)[1]
        with torch.no_grad():
            rates = {name: args.batch / median_ms(lambda: ask(name, f), 5, 1) * 1e3 for name, f in (("forced", form), ("plain steps", None))}
            inputs = [render.model_inputs(render.pack([s]), encoder, device) for s in samples[:4]]
            from transformers import AutoModelForImageTextToText
            stock = AutoModelForImageTextToText.from_pretrained(taught, dtype=dtype, attn_implementation="sdpa").to(device).eval()
            stock.generation_config.do_sample, stock.generation_config.repetition_penalty = False, 1.0

            def generate():
                for x in inputs:
                    x = {k: v for k, v in x.items() if k not in ("segments", "position_ids")}
                    stock.generate(**evaluate.cast(x, stock), mm_token_type_ids=(x["input_ids"] == encoder.image_id).int(),
                                   max_new_tokens=64)
            rates["transformers generate, one by one, sdpa"] = 4 / median_ms(generate, 3, 1) * 1e3
        for name, rate in rates.items():
            print(f"evaluate {args.size}, prompt {args.prompt}, {columns * rows} image tokens, batch {args.batch}: {name}: {rate:.2f} queries/s"
                  + (f", {counts[name]} forward passes" if name in counts else "")
                  + f" ({rate / rates['transformers generate, one by one, sdpa']:.1f} x generate)" * (len(rates) > 2))


def bench_grpo(args) -> None:
    """Seconds of GRPO for a prompt over seconds of SFT for a sample, same model, images and batch; and the plain way, a
    copy of the prompt for each answer, in rollout and update. No token ends an answer here, so all have the same length."""
    rank, world, device = train_sft.setup_distributed()
    dtype = evaluate.pick_dtype("auto", device)
    columns, rows = (26, 20) if args.size == "toy" else image_tokens(args.size)  # 520 image tokens
    group, length, count = 8, 40, args.micro_batch
    with tempfile.TemporaryDirectory() as tmp:
        if args.size == "toy":  # large enough that arithmetic counts, not the number of calls
            folder = tmp
            train_sft.make_tiny(Path(tmp), hidden=256, heads=4, vision_layers=4, text_layers=6, init_std=0.04)
        else:
            folder = make_model_folder(Path(tmp), args.size)
        encoder = render.load_encoder(folder)
        encoder.stop_ids = frozenset()
        views, question = noise_views(encoder, columns, rows, count), render.QUESTIONS["distance"]["release"]
        answer = (render.answer_tokens(encoder, render.answer_form("distance", "release").format(x="2.35"))
                  + [encoder.end_id] * length)[:length]
        samples = [{**render.encode(encoder, [v], question), "bad": []} for v in views]
        taught = train_sft.collate([{**render.encode(encoder, [v], question, answer), "bad": []} for v in views])
        copies = [s for s in samples for _ in range(group)]
        model = train_sft.shard_model(folder, device, dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        numbers = torch.rand(count, length, group, dtype=torch.float64, device=device)
        advantages = torch.randn(count, group)

        def rollout(samples, numbers):
            with train_sft.gathered(model, False):
                return train_grpo.rollout(model, encoder, samples, numbers, 1.0)

        def update(samples, rollouts, advantages, micro_batch):
            train_grpo.update(model, optimizer, encoder, samples, rollouts, advantages, micro_batch, 1.0, 1.0)

        alone = numbers.permute(0, 2, 1).reshape(count * group, length, 1)
        shared, plain = rollout(samples, numbers), rollout(copies, alone)
        runs = 3 if device.type == "cpu" else 5
        ms = {"SFT, a sample": median_ms(lambda: train_sft.train_step(model, optimizer, encoder, [taught], 1.0, device),
                                         runs, 1),
              "GRPO rollout": median_ms(lambda: rollout(samples, numbers), runs, 1),
              "GRPO update": median_ms(lambda: update(samples, shared, advantages, count), runs, 1),
              "plain rollout": median_ms(lambda: rollout(copies, alone), 1, 0),
              "plain update": median_ms(lambda: update(copies, plain, advantages.view(-1, 1), group), 1, 0)}
        one = ms["SFT, a sample"]
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"grpo {args.size}: {size:.1f} M parameters, {columns * rows} image tokens, {count} prompts x {group} answers "
              f"x {length} tokens ({device.type} {dtype}); ms a prompt, and over SFT:")
        ms["GRPO, a prompt"] = ms["GRPO rollout"] + ms["GRPO update"]
        ms["plain, a prompt"] = ms["plain rollout"] + ms["plain update"]
        for name, value in ms.items():
            print(f"  {name:16} {value / count:9.1f} {value / one:7.2f}")


def bench_records(args) -> None:
    """Opening and reading a large jsonl through its index."""
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "train.jsonl"
        rng, lines = np.random.default_rng(0), []
        for k in range(1000):
            xy = rng.integers(0, 480, (100, 2)).tolist()
            lines.append(json.dumps({"image": f"{k}.jpg", "intrinsics": [500, 500, 320, 240, 640, 480], "pixel_coords": xy,
                                     "depth": rng.uniform(0.5, 9, 100).round(4).tolist()}) + "\n")
        block = "".join(lines)
        with open(path, "w") as file:
            for _ in range(args.records // 1000):
                file.write(block)
        start = time.perf_counter()
        records = render.Records(path)
        built = time.perf_counter() - start
        opened = median_ms(lambda: render.Records(path))
        read = median_ms(lambda: records[int(rng.integers(len(records)))], 200)
        print(f"{len(records)} records, {path.stat().st_size / 2**30:.2f} GiB: index built in {built:.2f} s, opened with it in {opened:.2f} ms, "
              f"one random record {read:.3f} ms, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most")


def bench_prepare(args) -> None:
    """Images/s of one core through prepare's own readers, sampling and writing: 640 x 480 depth maps as of NYUv2, and a
    nuScenes-like set, 35,000 points a sweep, moved by the poses of two times. Files are in the cache, not on a slow disk."""
    from test_prepare_readers import own_folder, nuscenes_root

    import prepare
    cloud = np.random.default_rng(0).normal(0, 20, (35_000, 3))
    with tempfile.TemporaryDirectory() as tmp:
        own_folder(Path(tmp) / "folder", 200, [518.86, 519.47, 324.58, 252.74, 640, 480])
        nuscenes_root(Path(tmp) / "nuscenes", ("scene-0061",), samples=200, cloud=cloud)
        for name, title in (("folder", "NYU-like, 640 x 480 map"), ("nuscenes", "nuScenes-like, 35,000 points")):
            def run():
                prepare.nuscenes_tables.cache_clear()
                command = {"dataset": name, "split": "val", "root": f"{tmp}/{name}", "points": 100, "seed": 0, "limit": None,
                           "range": prepare.DATASETS[name]["range"], "occlusion": False, "paper_labels": False, "stride": 1,
                           "shard": None}
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    prepare.prepare(command, {}, f"{tmp}/out/{name}.jsonl", workers=1, overwrite=True, must_exist=True)
            rates = [200 / median_ms(run, 5, 1, clock) * 1e3 for clock in (time.perf_counter, time.process_time)]
            print(f"prepare, {title}: {rates[0]:.0f} images/s, {rates[1]:.0f} a second of CPU time (200 images, one process)")


def main(argv=None) -> None:
    benches = {"render": bench_render, "train": bench_train, "evaluate": bench_evaluate, "grpo": bench_grpo,
               "records": bench_records, "prepare": bench_prepare}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(benches))
    parser.add_argument("--size", choices=("toy", *REAL), default="toy")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", choices=("paper", "release"), default="paper")
    parser.add_argument("--records", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    benches[args.what](args)


if __name__ == "__main__":
    main()
