"""
The steps of gpu_check.sh that are Python: world | right | speed. Each line of output that begins
with PASS, FAIL, NOTE or RESULT is one finding, of its summary.
"""
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bench
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from toy_model import smooth_patch_filters

import evaluate
import pointcloud
import prepare
import render
import train_grpo
import train_sft

TINY = bool(os.environ.get("CHECK_TINY"))
START = time.time()
CUDA, CPU, BF16 = torch.cuda.is_available(), torch.device("cpu"), torch.bfloat16
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
SIZES = [(4, 3), (8, 6), (5, 9)] if TINY else [(21, 16), (43, 32), (17, 30)]  # columns, rows
NUMBERS = ["2.35", "12.71", "0.05"]
QUESTION, FORM = render.TASKS["distance"].wordings["paper"]


def seconds_left() -> float:
    return START + float(os.environ.get("SECONDS_LEFT", 600)) - time.time()


def run(check, *args) -> None:
    """One that fails does not stop the next."""
    try:
        check(*args)
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        print(f"FAIL {check.__name__}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
    bench.free_memory()
    print(f"   ({check.__name__}: {time.time() - START:.0f} s)", flush=True)


def verdict(what: str, value: float, limit: float) -> None:
    passed = "PASS" if value <= limit else "FAIL"  # and so is NaN
    print(f"{passed} {what}: {value:.3g} (limit {limit:g})", flush=True)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    x, exact = x.detach().double().cpu(), exact.detach().double().cpu()
    return float((x - exact).norm() / exact.norm())


# --------------------------------------------------------------------------------------------------
# world: one process, as the scripts start it


def world() -> None:
    import transformers
    print(f"RESULT torch {torch.__version__}, transformers {transformers.__version__}, "
          f"python {sys.version.split()[0]}, varlen_attn {list(evaluate.VARLEN_FLAGS)}")
    try:
        evaluate.setup_distributed()
        ones = torch.ones(3, device=DEVICE)
        dist.all_reduce(ones)
        gathered = torch.empty(3, device=DEVICE)
        dist.all_gather_into_tensor(gathered, ones)
        dist.barrier()
        print(f"PASS a world of one by HashStore: {gathered.tolist()}")
    except Exception as e:
        Path(os.environ["WORK"], "no_hash_store").touch()
        print(f"FAIL a world of one by HashStore: {' '.join(str(e).split())[:200]}")
    if not CUDA:
        return
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=BF16)
    ms = bench.median_ms(lambda: a @ b, 20)
    print(f"RESULT {torch.cuda.get_device_name()}, {total:.1f} GiB, NCCL "
          f"{torch.cuda.nccl.version()}, cuDNN {torch.backends.cudnn.version()}; bf16 product of "
          f"8192: {2 * 8192**3 / ms / 1e9:.0f} TFLOP/s")
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    print(f"RESULT expandable segments: {settings.get('expandable_segments')}")


# --------------------------------------------------------------------------------------------------
# right: what the GPU computes, against float64, the CPU, and stock transformers


def small_model(folder: Path) -> Path:
    """Real head sizes, windows and an MLP whose width is no multiple of 8, in a small model."""
    bench.make_toy_model(folder)
    vocabulary = render.read_json(folder / "config.json")["text_config"]["vocab_size"]
    config = bench.real_config(folder, 512, 4, 4, 2, 1024, vocabulary, True)
    config["vision_config"] |= {"depth": 4, "hidden_size": 160, "num_heads": 2,
                                "intermediate_size": 342, "fullatt_block_indexes": [1, 3]}
    for part in (config["text_config"], config["vision_config"]):
        part["initializer_range"] = 0.05
    render.write_json(folder / "config.json", config)
    from transformers import AutoConfig, AutoModelForImageTextToText
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder),
                                                    dtype=torch.float32)
    smooth_patch_filters(model.model.visual.patch_embed.proj.weight, 0.05)
    model.save_pretrained(folder)
    return folder


def small_samples(folder: Path, answers: bool = True) -> tuple:
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    views = [bench.noise_views(checkpoint, *size, 1)[0] for size in SIZES]
    for k, view in enumerate(views):
        view.pixels[:] = np.random.default_rng(k).integers(0, 256, view.pixels.shape, np.uint8)
    tails = [checkpoint.tokens(FORM.format(x=x)) + [checkpoint.end_id] if answers else []
             for x in NUMBERS]
    samples = [{**render.encode(checkpoint, [view], QUESTION, tail), "task": "distance", "bad": []}
               for view, tail in zip(views, tails)]
    return checkpoint, views, samples


def attention() -> None:
    """Packed and masked, outputs and gradients."""
    lengths = [64] * 3 + [37, 1] if TINY else [64] * 40 + [1472, 37, 1, 2048]
    total = sum(lengths)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    visible = torch.rand(1, 200, 200, device=DEVICE) < 0.5
    visible[..., 0] = True

    def outputs(x, run):
        x = [part.clone().requires_grad_() for part in x]
        out = run(*x)
        out.square().sum().backward()
        return [out, *(part.grad for part in x)]

    for heads, kv, width, causal in ((16, 16, 80, False), (16, 2, 128, True), (4, 4, 24, False),
                                     (4, 2, 20, True)):
        module = SimpleNamespace(is_causal=causal)
        x = [torch.randn(1, n, total, width, device=DEVICE, dtype=torch.float64).to(BF16)
             for n in (heads, kv, kv)]

        def packed(q, k, v):
            return evaluate.attend(module, q, k, v, None, width ** -0.5, segments=starts,
                                   longest=max(lengths))[0]

        def masked(q, k, v):
            q, k, v = (part[:, :, :200] for part in (q, k, v))
            mask = evaluate.additive_mask(visible, q.dtype)
            return evaluate.masked_attention(q, k, v, mask, width ** -0.5)

        for name, function in (("packed", packed), ("masked", masked)):
            exact = outputs([part.double() for part in x], function)
            for dtype, limit in ((BF16, 0.01), (torch.float32, 1e-3)):
                got = outputs([part.to(dtype) for part in x], function)
                verdict(f"{name} attention, {heads}/{kv} heads of {width}, causal {causal}, "
                        f"{dtype}, against float64", max(map(error, got, exact)), limit)


def faster_forms(folder: Path) -> None:
    """Our forward of patches, norms and the vision MLP against that of transformers, in float32."""
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    model = evaluate.load_model(checkpoint, DEVICE, torch.float32)
    worst: dict[str, float] = {}
    for module in model.modules():
        if "forward" not in vars(module):
            continue
        width = {"patch_product": 1176, "rms_norm": getattr(module, "weight", torch.ones(1)).shape,
                 "aligned_mlp": 160}[module.forward.__name__]
        x = torch.randn(50, *(width if isinstance(width, tuple) else (width,)), device=DEVICE)
        with torch.backends.cudnn.flags(allow_tf32=False):
            exact = type(module).forward(module, x)
        name = module.forward.__name__
        worst[name] = max(worst.get(name, 0), error(module.forward(x), exact))
    for name, value in worst.items():
        verdict(f"{name} against transformers' forward", value, 1e-5)


def losses(folder: Path) -> None:
    """Sharded training on the GPU against float32 on the CPU; the logits of evaluation."""
    checkpoint, _, samples = small_samples(folder)
    batch, results = train_sft.collate(samples), {}
    for name, device, dtype, reshard, checkpointing in (
            ("CPU, float32", CPU, torch.float32, False, False),
            ("float32", DEVICE, torch.float32, False, False),
            ("bfloat16", DEVICE, BF16, False, False),
            ("checkpointing", DEVICE, BF16, False, True),
            ("--reshard", DEVICE, BF16, True, False)):
        model = train_sft.shard_model(folder, device, dtype, reshard, checkpointing).train()
        loss = train_sft.answer_losses(model, checkpoint, batch, device).sum()
        loss.backward()
        gradient = torch.cat([p.grad.full_tensor().cpu().flatten() for p in model.parameters()])
        results[name] = loss.detach(), gradient
    exact_loss, exact_gradient = results.pop("CPU, float32")
    for name, (loss, gradient) in results.items():
        limit = 1e-3 if name == "float32" else 0.05
        verdict(f"loss, {name}, against the CPU", error(loss, exact_loss), limit / 10)
        verdict(f"gradient, {name}, against the CPU", error(gradient, exact_gradient), limit)

    inputs = render.model_inputs(batch, checkpoint, DEVICE, BF16)
    inputs["logits_to_keep"] = batch["predict_at"].to(DEVICE)
    with torch.no_grad():
        trained, evaluated = (
            model.eval()(**inputs, use_cache=False).logits for model in
            (train_sft.shard_model(folder, DEVICE, BF16),
             evaluate.load_model(checkpoint, DEVICE, BF16)))
    verdict("logits of the sharded model against those of evaluation", error(trained, evaluated), 0)


def taught_model(folder: Path) -> Path:
    """The small model after it has learnt three pictures by heart."""
    checkpoint, _, samples = small_samples(folder)
    model = train_sft.shard_model(folder, DEVICE, BF16 if CUDA else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(60 if TINY else 200):
        loss = bench.sft_step(model, optimizer, checkpoint, [train_sft.collate(samples)], DEVICE)
        if loss < 0.02:
            break
    out = folder.with_name("taught")
    out.mkdir()
    train_sft.save_model(model, checkpoint, out, torch.float32)
    print(f"   taught: loss {loss:.3f}")
    return out


def stock_model(folder: Path, dtype: torch.dtype):
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype,
                                                        attn_implementation="sdpa")
    return model.to(DEVICE).eval()


def answers(folder: Path) -> None:
    """Drafted answers, plain steps and transformers' generate, token for token."""
    checkpoint, views, samples = small_samples(folder, answers=False)
    for dtype in (torch.float32, BF16):
        model, stock, expected = evaluate.load_model(checkpoint, DEVICE, dtype), None, []
        stock = stock_model(folder, dtype)
        for view, sample in zip(views, samples):
            ids = sample["input_ids"].tolist()
            inputs = bench.padded(checkpoint, [view], [ids], True, DEVICE)
            out = stock.generate(**inputs, do_sample=False, max_new_tokens=30)
            expected.append(out[0, len(ids):].tolist())
        for form in (FORM, None):
            batch = evaluate.pack_prompts(checkpoint, samples, form)
            got, passes = evaluate.greedy_answers(model, checkpoint, batch, 30)
            wrong = sum(a != b for a, b in zip(got, expected))
            verdict(f"answers that are not generate's, {dtype}, {passes} forward passes, of "
                    f"{len(got)} (like {checkpoint.text(got[0])!r})", wrong, int(dtype == BF16))


def groups(folder: Path) -> None:
    """Log probabilities of sampled answers: rollout, tree row, and plain copies in stock."""
    checkpoint, views, samples = small_samples(folder, answers=False)
    uniform = torch.rand(len(samples), 12, 4, dtype=torch.float64, device=DEVICE)
    for dtype, limit in ((torch.float32, 1e-3), (BF16, 0.05)):
        model = evaluate.load_model(checkpoint, DEVICE, dtype)
        rollout = train_grpo.sample_answers(model, checkpoint, samples, uniform, 1.0)
        stock, plain = stock_model(folder, dtype), []
        with torch.no_grad():
            tree = train_grpo.answer_logps(model, checkpoint, samples, rollout.tokens, 1.0)
            for sample, view, group in zip(samples, views, rollout.tokens.tolist()):
                rows = [sample["input_ids"].tolist() + tokens for tokens in group]
                inputs = bench.padded(checkpoint, [view] * len(rows), rows, True, DEVICE)
                logits = stock(**inputs, logits_to_keep=13).logits[:, :-1]
                policy = train_grpo.log_policy(logits, 1.0,
                                               train_grpo.banned_tokens(model, checkpoint))
                chosen = torch.tensor(group, device=DEVICE)[..., None]
                plain.append(policy.gather(-1, chosen)[..., 0])
        for name, logps in (("tree row", tree), ("plain copies", torch.stack(plain))):
            gap = (logps - rollout.logps)[rollout.mask].abs().mean()
            verdict(f"log probabilities, rollout against {name}, {dtype}, mean gap", gap, limit)


def scripts(folder: Path) -> None:
    """Each script from end to end, and its answers against those of the CPU."""
    work = folder.parent
    data = work / "world"
    prepare.main(["--dataset", "toy", "--images", "8", "--val-images", "8", "--out", str(data),
                  "--workers", "1"])
    common = ["--model", folder, "--data", data / "train.jsonl", "--val", data / "val.jsonl",
              "--val-queries", 4, "--val-every", 1, "--crop", 56, 112, 56, 112, "--batch", 12,
              "--micro-batch", 4, "--workers", 0, "--log-every", 1]
    sft = [*common, "--samples", 24, "--focal", 100, "--tasks", *render.TASKS, "--out",
           work / "sft"]
    grpo = [*common, "--samples", 12, "--group", 4, "--max-new-tokens", 16, "--kl-coef", 0.1,
            "--out", work / "grpo"]
    score = [folder, "--data", data / "val.jsonl", "--queries", 40, "--workers", 0, "--focal", 100,
             "--max-new-tokens", 30, "--out"]
    fp32 = ["--dtype", "float32"]
    cloud = [folder, data / "val.jsonl", "--record", 1, "--points", 20, "--workers", 0, "--focal",
             100, "--out", work / "cloud"]
    for name, main, flags in (
            ("SFT, stopped", train_sft.main, [*sft, "--stop-after", 1]),
            ("SFT, resumed", train_sft.main, sft), ("GRPO with KL", train_grpo.main, grpo),
            ("greedy", evaluate.main, [*score, work / "gpu", *fp32]),
            ("greedy on the CPU", evaluate.main, [*score, work / "cpu", "--device", "cpu", *fp32]),
            ("median", evaluate.main, [*score, work / "median", "--decode", "median"]),
            ("a cloud", pointcloud.main, cloud)):
        main([str(flag) for flag in flags])
        print(f"PASS {name}", flush=True)
    gap = [json.loads(line).get("logp_gap", 0) for line in open(work / "grpo" / "log.jsonl")]
    verdict("logp_gap of GRPO", max(gap), 0.1)
    gpu, cpu = ([json.loads(line)["text"] for line in open(work / name / "predictions.jsonl")]
                for name in ("gpu", "cpu"))
    verdict("answers that are not the CPU's, of 40", sum(a != b for a, b in zip(gpu, cpu)), 0)


def right() -> None:
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as tmp:
        folder = small_model(Path(tmp) / "small")
        evaluate.setup_distributed()
        run(attention)
        run(faster_forms, folder)
        run(losses, folder)
        taught = taught_model(folder)
        run(answers, taught)
        run(groups, folder)
        dist.destroy_process_group()
        run(scripts, taught)


# --------------------------------------------------------------------------------------------------
# speed: the 3B with random weights, with and without each measure


def random_weights(model, folder: Path) -> None:
    """In place of evaluate.load_weights: no 7 GB are written and read."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local().detach()
        if parameter.ndim > 1:
            local.normal_(0, 0.02)
        else:
            local.fill_(float(name.endswith("weight")))


class Trial:
    """The sharded model, its optimizer, and batches of the paper's images."""

    def __init__(self, folder: Path, size: str, compile: bool = False):
        self.size, self.checkpoint = size, render.open_checkpoint(str(folder), quiet=True)
        self.model = train_sft.shard_model(folder, DEVICE, BF16, False, True, compile).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.layers = [layer for part in train_sft.layers_of(self.model) for layer in part]
        self.answer = self.checkpoint.tokens(FORM.format(x="2.35")) + [self.checkpoint.end_id]

    def views(self, count: int) -> list:
        return bench.noise_views(self.checkpoint, *bench.image_tokens(self.size), count)

    def prompts(self, count: int, question: str = QUESTION) -> list[dict]:
        return [render.encode(self.checkpoint, [view], question) for view in self.views(count)]

    def step(self, micro_batch: int):
        views = self.views(micro_batch)
        batch = bench.training_batch(self.checkpoint, views, QUESTION, self.answer)
        return batch, partial(bench.sft_step, self.model, self.optimizer, self.checkpoint, [batch],
                              DEVICE)

    def rate(self, what: str, micro_batch: int, runs: int = 3) -> None:
        bench.free_memory()
        batch, step = self.step(micro_batch)
        try:
            first = bench.time_ms(step)
            ms = bench.median_ms(step, runs, 0)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            print(f"RESULT train, micro-batch {micro_batch}, {what}: out of memory", flush=True)
            return
        tflops = train_sft.training_flops(self.model, batch) / ms / 1e9
        print(f"RESULT train, micro-batch {micro_batch}, {what}: {micro_batch / ms * 1e3:.2f} "
              f"samples/s, {tflops:.4g} TFLOP/s, {bench.peak_gib(DEVICE):.1f} GiB, first step "
              f"{first / 1e3:.1f} s", flush=True)


@contextlib.contextmanager
def without(model, form: str):
    """As transformers computes it."""
    modules = [module for module in model.modules()
               if getattr(vars(module).get("forward"), "__name__", "") == form]
    kept = [vars(module).pop("forward") for module in modules]
    yield
    for module, forward in zip(modules, kept):
        module.forward = forward


def training(trial: Trial) -> None:
    trial.rate("as it is", 2)
    for form in ("aligned_mlp", "rms_norm", "patch_product"):
        with without(trial.model, form):
            trial.rate(f"without {form}", 2)
    trial.rate("as it is", 1)
    trial.rate("as it is", 4)
    for layer in trial.layers:
        layer.gradient_checkpointing = False
    for micro_batch in (1, 2, 4):
        trial.rate("no checkpointing", micro_batch)
    for layer in trial.layers:
        layer.gradient_checkpointing = True


def kernels(trial: Trial) -> None:
    """The profile of one training step."""
    _, step = trial.step(2)
    step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with profile(activities=kinds) as profiler:
        ms = bench.time_ms(step)
    events, key = profiler.key_averages(), f"self_{'device' if CUDA else 'cpu'}_time_total"
    table = events.table(sort_by=key, row_limit=15, max_name_column_width=90)
    Path(os.environ["OUT"], "profile.txt").write_text(f"a step of {ms:.0f} ms\n{table}")
    total = sum(getattr(event, key) for event in events) / 1e3
    top = sorted(events, key=lambda event: -getattr(event, key))[:8]
    print(f"RESULT profile: a step of {ms:.0f} ms, {total:.0f} ms in kernels: " + ", ".join(
        f"{event.key[:40]} {getattr(event, key) / 1e3:.0f}" for event in top))
    waits = sum(event.count for event in events if event.key == "aten::_local_scalar_dense")
    print(f"RESULT profile: {waits} synchronisations by a value")


def plain_attention(query, key, value, mask, scaling):
    """As it would be without masked_attention's care."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)


def variants():
    yield "as it is", contextlib.nullcontext()
    yield "grouped heads, cuDNN allowed", mock.patch.object(evaluate, "masked_attention",
                                                            plain_attention)


def grpo(trial: Trial) -> None:
    """A prompt of GRPO over a sample of SFT."""
    count, group, length = 2, 8, 4 if TINY else 40
    checkpoint, model = trial.checkpoint, trial.model
    prompts = trial.prompts(count, render.TASKS["distance"].wordings["release"][0])
    uniform = torch.rand(count, length, group, dtype=torch.float64, device=DEVICE)
    advantages = torch.randn(count, group, device=DEVICE)
    sft = bench.median_ms(trial.step(count)[1], 3, 1)

    def roll():
        with train_sft.gathered(model, False):
            return train_grpo.sample_answers(model, checkpoint, prompts, uniform, 1.0)

    with mock.patch.object(checkpoint, "stop_ids", frozenset()):
        for name, variant in variants():
            with variant:
                first, rollout = bench.time_ms(roll), roll()
                again = bench.median_ms(roll, 3, 0)
                update = bench.median_ms(lambda: bench.grpo_step(
                    model, trial.optimizer, checkpoint, prompts, rollout, advantages, count), 3, 1)
            print(f"RESULT grpo, {count} prompts x {group} x {length} tokens, {name}: rollout "
                  f"{first:.0f} ms at first, then {again:.0f}; update {update:.0f} ms; SFT "
                  f"{sft:.0f} ms; ratio {(again + update) / sft:.2f}; "
                  f"{bench.peak_gib(DEVICE):.1f} GiB", flush=True)


def evaluation(trial: Trial) -> None:
    """Queries of a model that says the template: packed on the host, prefilled, decoded."""
    size, checkpoint, model = 4 if TINY else 32, trial.checkpoint, trial.model
    prompts = trial.prompts(size)
    bench.say(model, trial.answer, evaluate.pack_prompts(checkpoint, prompts)["position"])
    host = bench.median_ms(lambda: evaluate.pack_prompts(checkpoint, trial.prompts(size), FORM), 1)
    batch = evaluate.pack_prompts(checkpoint, prompts, FORM)

    @torch.no_grad()
    def prefill():
        evaluate.prefill(model, checkpoint, batch)

    def answer_all():
        return evaluate.greedy_answers(model, checkpoint, batch, 64)[1]

    with train_sft.gathered(model, False):
        for name, variant in variants():
            with variant:
                first, passes = bench.time_ms(answer_all), answer_all()
                ms, filled = bench.median_ms(answer_all, 3, 0), bench.median_ms(prefill, 3, 0)
            print(f"RESULT evaluate, batch {size}, {name}: {size / ms * 1e3:.1f} queries/s "
                  f"({first:.0f} ms at first, then {ms:.0f}); prefill {filled:.0f} ms, "
                  f"{passes - 1} steps of {(ms - filled) / (passes - 1):.0f} ms; "
                  f"{bench.peak_gib(DEVICE):.1f} GiB; on the host {host / size:.1f} ms a query",
                  flush=True)


def compiled(folder: Path, size: str) -> None:
    Trial(folder, size, compile=True).rate("--compile", 2)


def speed() -> None:
    size = "toy" if TINY else "3b"
    evaluate.load_weights = random_weights
    evaluate.setup_distributed()
    with tempfile.TemporaryDirectory() as tmp:
        folder = bench.make_model_folder(Path(tmp), size, weights=False)
        trial = Trial(folder, size)
        for check in (training, kernels, grpo, evaluation):
            if seconds_left() > 30:
                run(check, trial)
            else:
                print(f"NOTE no time left for {check.__name__}")
        del trial
        bench.free_memory()
        if seconds_left() > 60:
            run(compiled, folder, size)


def main() -> None:
    {"world": world, "right": right, "speed": speed}[sys.argv[1]]()


if __name__ == "__main__":
    main()
