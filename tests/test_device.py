"""What a GPU changes, as far as a CPU can tell: the scripts on a pretended device (pretended.py),
bfloat16, and the forms that a model computes faster in."""
import gc
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import bench
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, make_world, run_script, stock, views_for
from pretended import slow_varlen
from test_evaluate import fit, generate, lesson
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import render
import train_grpo
import train_sft

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SFT = ["--focal", 100, "--crop", 56, 112, 56, 112, "--batch", 6, "--micro-batch", 2,
       "--workers", 0, "--log-every", 1, "--lr", 2e-3]
GRPO = [*SFT, "--group", 3, "--max-new-tokens", 6, "--val-every", 0, "--samples", 6]


@pytest.fixture(scope="module")
def poses(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("data") / "moving", poses=True)


@pytest.fixture(scope="module")
def speaker(tiny, poses, tmp_path_factory) -> Path:
    """A tiny model that has learnt one distance of each image by heart."""
    checkpoint = render.open_checkpoint(str(tiny), {"focal": 100}, quiet=True)
    model, records = evaluate.load_model(checkpoint, CPU, torch.float32), render.Records(poses)
    queries = [evaluate.query_of(records, "distance", (i, 0)) for i in range(len(records))]
    rows = [lesson(checkpoint, *render.render(query, checkpoint.settings, checkpoint.grid))
            for query in queries]
    fit(model, checkpoint, rows, steps=80, enough=0.02)
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "speaker")
    model.save_pretrained(folder)
    render.write_json(folder / "depthlm.json", {**checkpoint.settings, "max_new_tokens": 8})
    return folder


@pytest.fixture
def one_process():
    evaluate.setup_distributed()
    yield
    dist.destroy_process_group()


def words(*parts) -> list[str]:
    return [str(word) for part in parts for word in (part if isinstance(part, list) else [part])]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(out: Path, key: str) -> list[float]:
    return [line[key] for line in lines_of(out / "log.jsonl") if key in line]


# --------------------------------------------------------------------------------------------------
# the pretended device


def pretend(*commands) -> subprocess.CompletedProcess:
    return run_script("tests/pretended.py", *(" ".join(words(*command)) for command in commands))


def test_scripts_on_a_pretended_device(speaker, poses, tmp_path):
    """Each script from end to end, in float32 as the CPU computes it, in bfloat16 by the path of
    CUDA: a mistake of devices raises. What it writes is opened and compared on the CPU."""
    data = ["--data", poses, "--val", poses, "--val-queries", 3]
    tasks = ["--tasks", *render.TASKS, "--val-every", 1, "--samples", 12, "--dtype", "float32"]
    whole, bf16 = ["--max-new-tokens", 30, "--workers", 0], ["--dtype", "bfloat16"]
    sft = ["train_sft.py", "--model", speaker, *data, *SFT, *tasks, "--out"]
    grpo = ["train_grpo.py", "--model", speaker, *data, *GRPO, "--val-every", 1, "--kl-coef", 0.1,
            *bf16, "--out", tmp_path / "grpo"]
    greedy = ["evaluate.py", speaker, "--data", poses, "--all", *whole, "--tasks", "distance",
              "two_point", "--out"]
    median = ["--decode", "median", *bf16]
    cloud = ["pointcloud.py", speaker, poses, "--record", 1, "--points", 12, *whole, *bf16,
             "--out", tmp_path / "cloud"]
    sft_run = [*sft, tmp_path / "sft"]
    done = pretend([*sft_run, "--stop-after", 1], sft_run, grpo, [*greedy, tmp_path / "greedy"],
                   [*greedy, tmp_path / "median", *median], cloud)
    assert done.returncode == 0, done.stderr[-3000:]

    train_sft.main(words(sft[1:], tmp_path / "plain"))
    assert logged(tmp_path / "sft", "val") == logged(tmp_path / "plain", "val")
    assert logged(tmp_path / "sft", "loss") == pytest.approx(logged(tmp_path / "plain", "loss"))
    ours, plain = (stock(tmp_path / name).state_dict() for name in ("sft", "plain"))
    assert all(torch.allclose(ours[name], plain[name], atol=1e-4) for name in plain)

    evaluate.main(words(greedy[1:], tmp_path / "plain_greedy"))
    ours, plain = (lines_of(tmp_path / name / "predictions.jsonl")
                   for name in ("greedy", "plain_greedy"))
    assert ours == plain and sum(line["pred"] is not None for line in ours) > 40
    assert sum("q10" in line for line in lines_of(tmp_path / "median" / "predictions.jsonl")) > 40
    assert (tmp_path / "cloud" / "cloud.ply").stat().st_size > 100
    assert len(logged(tmp_path / "grpo", "logp_gap")) == 1

    # a synchronisation in each layer would be as slow as the layer
    layers = ("attend", "flash_segments", "masked_attention", "additive_mask", "aligned_mlp")
    assert "synchronised" in done.stdout
    assert not any(f"evaluate.{name}\n" in done.stdout for name in layers), done.stdout


def test_mixed_devices_raise():
    code = """
import torch, pretended
pretended.use_device()
with pretended.Factories(), pretended.Tensors():
    x = torch.arange(3.0, device='sim')
    x[torch.tensor([1])], x * 2, x + torch.tensor(1.0)
    print(x.to('cpu').sum().item(), torch.tensor([1], device='sim').device)
    x + torch.ones(3)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True,
                          text=True)
    assert done.stdout == "3.0 sim:0\n" and "all tensors to be on the same device" in done.stderr


# --------------------------------------------------------------------------------------------------
# bfloat16: the differences are those of rounding to 8 bits


def prompts_of(folder, sizes=((2, 2), (4, 3), (3, 5))):
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    views = [views_for(checkpoint, [size], k) for k, size in enumerate(sizes)]
    samples = [render.encode(checkpoint, view, f"How far is it? {k}", checkpoint.tokens("2.35"))
               for k, view in enumerate(views)]
    return checkpoint, samples


def answer_logits(model, checkpoint, samples) -> torch.Tensor:
    batch = render.pack(samples)
    inputs = render.model_inputs(batch, checkpoint, CPU, model.compute_dtype)
    with torch.no_grad():
        return model(**inputs, use_cache=False, logits_to_keep=batch["predict_at"]).logits[0]


def test_packed_equals_one_by_one_in_bfloat16(family):
    checkpoint, samples = prompts_of(family)
    model = evaluate.load_model(checkpoint, CPU, BF16)
    packed = answer_logits(model, checkpoint, samples)
    singly = torch.cat([answer_logits(model, checkpoint, [sample]) for sample in samples])
    exact = answer_logits(evaluate.load_model(checkpoint, CPU, torch.float32), checkpoint, samples)
    assert packed.dtype == BF16 and (packed - singly).float().norm() < 0.02 * singly.float().norm()
    assert (packed - exact).norm() < 0.1 * exact.norm()


def test_rollout_equals_update_in_bfloat16(family, one_process):
    checkpoint, samples = prompts_of(family)
    model = evaluate.load_model(checkpoint, CPU, BF16)
    prompts = [{**sample, "input_ids": sample["input_ids"][:sample["prompt_length"]],
                "position_ids": sample["position_ids"][:, :sample["prompt_length"]]}
               for sample in samples]
    uniform = torch.from_numpy(np.random.default_rng(0).random((3, 6, 4)))
    rollout = train_grpo.sample_answers(model, checkpoint, prompts, uniform, 1.0)
    with torch.no_grad():
        logps = train_grpo.answer_logps(model, checkpoint, prompts, rollout.tokens, 1.0)
    gap = (logps - rollout.logps)[rollout.mask].abs()
    assert 0 < gap.mean() < 0.03 and gap.max() < 0.2


def test_greedy_equals_generate_in_bfloat16(speaker, poses, monkeypatch):
    """Answers learnt by heart, whose tokens are far from any tie."""
    checkpoint = render.open_checkpoint(str(speaker), quiet=True)
    records, views, samples = render.Records(poses), [], []
    for i in range(len(records)):
        query = evaluate.query_of(records, "distance", (i, 0))
        view, question, _ = render.render(query, checkpoint.settings, checkpoint.grid)
        views.append(view)
        samples.append(render.encode(checkpoint, view, question))
    form = render.answer_form("distance", checkpoint.settings)
    batch = evaluate.pack_prompts(checkpoint, samples, form)
    model = evaluate.load_model(checkpoint, CPU, BF16)
    monkeypatch.setattr("test_evaluate.stock", partial(stock, dtype=BF16))
    expected = generate(speaker, checkpoint, views, samples, 30)
    assert evaluate.greedy_answers(model, checkpoint, batch, 30)[0] == expected


# --------------------------------------------------------------------------------------------------
# training and evaluation compute the same


@pytest.mark.parametrize("name", ["tiny_windows", "tiny_qwen3", "tiny_pixtral"])
def test_sharded_logits_are_those_of_evaluation(name, request, one_process):
    """Bit for bit: with FSDP's cast_forward_inputs the rotations of the vision tower would be
    rounded in training alone."""
    checkpoint, samples = prompts_of(request.getfixturevalue(name))
    sharded = train_sft.shard_model(checkpoint.folder, CPU, BF16).eval()
    plain = evaluate.load_model(checkpoint, CPU, BF16)
    assert torch.equal(*(answer_logits(m, checkpoint, samples) for m in (sharded, plain)))


# --------------------------------------------------------------------------------------------------
# attention


class Cuda(torch.Tensor):
    """A CPU tensor that takes the path of CUDA."""
    is_cuda = True


def on_cuda(*tensors) -> list:
    return [x.as_subclass(Cuda) for x in tensors]


def heads(*counts, tokens=11, width=16, rows=2, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, n, tokens, width, generator=generator).to(dtype) for n in counts]


def test_masked_attention_by_expanded_heads():
    q, k, v = heads(6, 2, 2)
    visible = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[:, :, 0] = True
    mask = evaluate.additive_mask(visible, torch.float32)
    assert mask.stride(-2) % 8 == 0 and mask.shape == (2, 1, 11, 11)
    grouped = evaluate.masked_attention(q, k, v, mask, 0.3)
    expanded = evaluate.masked_attention(*on_cuda(q, k, v), mask, 0.3)
    boolean = F.scaled_dot_product_attention(q, k, v, visible[:, None], scale=0.3, enable_gqa=True)
    assert torch.allclose(grouped, boolean, atol=1e-6)
    assert torch.allclose(expanded, boolean, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [16, 12])
def test_packed_attention(monkeypatch, causal, width):
    """By the variable-length kernel, which takes no head size that is no multiple of 8."""
    called = []

    def varlen(*args, **flags):
        called.append(flags)
        return slow_varlen(*args, **flags)

    monkeypatch.setattr(evaluate, "varlen_attn", varlen)
    monkeypatch.setattr(evaluate, "VARLEN_FLAGS", {"scale", "window_size"})
    q, k, v = heads(6, 2, 2, rows=1, width=width, dtype=BF16)
    module = torch.nn.Module()
    module.is_causal = causal
    starts = torch.tensor([0, 4, 8, 9, 11])
    given = {"attention_mask": None, "scaling": 0.3, "segments": starts, "longest": 4}
    fast = evaluate.attend(module, *on_cuda(q, k, v), **given)[0]
    plain = evaluate.attend(module, *(x.float() for x in (q, k, v)), **given)[0]
    assert (fast - plain).norm() < 0.01 * plain.norm() and len(called) == (width == 16)
    assert causal == any("window_size" in flags for flags in called) or width == 12


# --------------------------------------------------------------------------------------------------
# the faster forms


def gradients(module, run, x) -> list[torch.Tensor]:
    """Output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = run(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def modules(folder, ending: str) -> list:
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    model = evaluate.load_model(checkpoint, CPU, torch.float32)
    return [m for m in model.modules() if type(m).__name__.endswith(ending)]


@pytest.mark.parametrize("name, ending, width", [
    ("tiny", "2_5_VLMLP", 64), ("tiny", "RMSNorm", 64), ("tiny", "VisionPatchEmbed", 1176),
    ("tiny_qwen3", "VLTextRMSNorm", None), ("tiny_qwen3", "VisionPatchEmbed", 1536)])
def test_faster_forms(name, ending, width, request):
    """The same function, outputs and gradients, as transformers' own forward. The MLP with its
    padding, which no CPU needs: 170 wide, computed as 192."""
    for module in modules(request.getfixturevalue(name), ending):
        size = width or module.weight.shape[0]
        x = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
        slow = gradients(module, lambda x: type(module).forward(module, x), x)
        fast = gradients(module, lambda x: module.forward(x.as_subclass(Cuda)), x)
        for ours, theirs in zip(fast, slow):
            assert (ours - theirs).norm() < 2e-6 * theirs.norm()


def test_every_family_has_its_faster_forms(tiny, tiny_qwen3):
    assert modules(tiny, "2_5_VLMLP")[0].gate_proj.out_features % 64
    for folder in (tiny, tiny_qwen3):
        for ending in ("VisionPatchEmbed", "RMSNorm"):
            assert all("forward" in vars(m) for m in modules(folder, ending))


# --------------------------------------------------------------------------------------------------
# the loops


def test_reshard_changes_no_gradient(tiny, poses, tmp_path):
    """Two processes that reduce gradients and free weights in each of three micro-batches."""
    flags = ["--model", tiny, "--data", poses, *SFT, "--samples", 12, "--val-every", 0]
    train_sft.main(words(flags, "--out", tmp_path / "plain"))
    done = run_script("train_sft.py", *flags, "--micro-batch", 1, "--reshard", "--out",
                      tmp_path / "resharded", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for key in ("loss", "grad_norm"):
        ours, plain = (logged(tmp_path / name, key) for name in ("resharded", "plain"))
        assert ours == pytest.approx(plain, rel=1e-5)


class Communication(TorchDispatchMode):
    """Counts collective operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def eight_processes():
    """A world of which this is rank 0, and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def test_weights_are_gathered_once_a_step(tiny, eight_processes):
    """Whatever the number of micro-batches; with --reshard in each of them, and gradients reduced
    in each."""
    checkpoint, samples = prompts_of(tiny)
    batch = train_sft.collate([{**sample, "task": "distance", "bad": []} for sample in samples])

    def communication(micro_steps: int, reshard: bool) -> Counter:
        model = train_sft.shard_model(checkpoint.folder, CPU, torch.float32, reshard).train()
        with Communication() as seen:
            for micro_step in range(1, micro_steps + 1):
                train_sft.begin_micro_step(model, micro_step == micro_steps, reshard)
                train_sft.answer_losses(model, checkpoint, batch, CPU).sum().backward()
        return seen.counts

    once, thrice = (communication(n, False) for n in (1, 3))
    assert once == thrice and sum(once.values()) > 4
    once, thrice = (communication(n, True) for n in (1, 3))
    assert all(2 * once[op] < thrice[op] for op in once)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny, poses, tmp_path, monkeypatch, caplog):
    """In few graphs: inference between the steps, whose shapes never end, adds none to theirs."""
    def whole(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2), None

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **flags: compile_module(self, backend="eager", **flags))
    monkeypatch.setattr(evaluate, "attend", whole)  # the CPU's groups segments in Python
    flags = ["--model", tiny, "--data", poses, "--val", poses, "--val-queries", 2, "--val-every",
             1, *SFT, "--samples", 18]
    torch._dynamo.utils.counters.clear()
    train_sft.main(words(flags, "--compile", "--out", tmp_path / "compiled"))
    assert 1 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8
    assert "recompile_limit" not in caplog.text
    train_sft.main(words(flags, "--out", tmp_path / "plain"))
    ours, plain = (logged(tmp_path / name, "loss") for name in ("compiled", "plain"))
    assert ours == pytest.approx(plain, rel=1e-5)


def test_a_process_without_a_gpu_is_one_line(monkeypatch):
    assert evaluate.pick_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert evaluate.pick_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluate.pick_device("cpu") == CPU
    with pytest.raises(ValueError, match="process 1 .* there are 1. .* --nproc-per-node gpu"):
        evaluate.pick_device()


def test_out_of_memory_is_one_line(tiny, poses, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr(train_sft, "answer_losses", full)
    with pytest.raises(SystemExit) as stop:
        train_sft.main(words("--model", tiny, "--data", poses, SFT, "--samples", 6, "--out",
                             tmp_path / "sft"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "2.00 GiB" in last and "Lower --micro-batch" in last


def test_reference_has_the_dtype_of_the_compute(tiny, poses, tmp_path, monkeypatch):
    models, shard_model = [], train_sft.shard_model

    def shard(*args, **options):
        models.append(shard_model(*args, **options))
        return models[-1]

    monkeypatch.setattr(train_sft, "shard_model", shard)
    train_grpo.main(words("--model", tiny, "--data", poses, GRPO, "--kl-coef", 0.1, "--dtype",
                          "bfloat16", "--out", tmp_path / "grpo"))
    kinds = [{p.dtype for p in model.parameters()} for model in models]
    assert kinds == [{torch.float32}, {BF16}]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_gap_of_log_probs_is_a_warning(tiny, poses, tmp_path, monkeypatch, capsys, shift):
    sample_answers = train_grpo.sample_answers

    def shifted(*args):
        rollout = sample_answers(*args)
        rollout.logps += shift
        return rollout

    monkeypatch.setattr(train_grpo, "sample_answers", shifted)
    train_grpo.main(words("--model", tiny, "--data", poses, GRPO, "--out", tmp_path / "grpo"))
    assert ("WARNING: logp_gap 0.50" in capsys.readouterr().out) == (shift > 0.1)
    assert logged(tmp_path / "grpo", "logp_gap")[0] == pytest.approx(shift, abs=1e-4)


@pytest.mark.parametrize("micro_batch, workers, ahead", [(1, 2, 4), (2, 2, 3), (6, 4, 2),
                                                         (1, 0, None)])
def test_prefetch_follows_the_micro_batches(tiny, poses, tmp_path, monkeypatch, micro_batch,
                                            workers, ahead):
    """Of a step of 6 samples: what one step takes, and one more each worker."""
    loader, seen = torch.utils.data.DataLoader, {}

    def open_loader(*args, num_workers, prefetch_factor, **options):
        seen.update(workers=num_workers, ahead=prefetch_factor)
        return loader(*args, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", open_loader)
    train_sft.main(words("--model", tiny, "--data", poses, SFT, "--samples", 6, "--micro-batch",
                         micro_batch, "--workers", workers, "--val-every", 0, "--out",
                         tmp_path / "sft"))
    assert seen == {"workers": workers, "ahead": ahead}


# --------------------------------------------------------------------------------------------------
# memory


def allocated(run) -> int:
    """Peak of the CPU memory that a function takes, in bytes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events()
               if event.name() == "[memory]"]
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("checkpointing, trained", [
    (False, {}), (True, {}), (True, {"lora": 8, "freeze": "vision"})])
def test_simulated_memory_is_what_a_step_takes(checkpointing, trained, tmp_path):
    """bench.py memory against the allocations of real steps, by the path of the CPU."""
    folder = bench.make_model_folder(tmp_path, "toy")
    checkpoint = render.open_checkpoint(str(folder), quiet=True)
    answer = checkpoint.tokens(bench.FORM.format(x="2.35")) + [checkpoint.end_id]
    views = bench.noise_views(checkpoint, *bench.image_tokens("toy"), 6)
    batch = bench.training_batch(checkpoint, views, bench.QUESTION, answer)

    def run():
        evaluate.setup_distributed()
        model = train_sft.shard_model(folder, CPU, BF16, False, checkpointing, **trained).train()
        learnt = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, fused=True)
        for _ in range(2):  # the moments are made at the end of the first
            bench.sft_step(model, optimizer, checkpoint, [batch, batch], CPU)
        dist.destroy_process_group()

    peak = allocated(run)
    simulated = bench.simulate("toy", 1, 6, 2, checkpointing, False, gpu=False, **trained)
    assert simulated["peak"] * 2**30 == pytest.approx(peak, rel=0.05)


def test_memory_of_recipes(capsys):
    """Eight processes with --reshard take less than one; by the path of CUDA, with its kernels."""
    one = bench.simulate("toy", 1, 4, 2, True, False)
    eight = bench.simulate("toy", 8, 4, 2, True, True)
    assert eight["peak"] < 0.8 * one["peak"] and eight["moments"] < 0.2 * one["moments"]
    bench.main(["memory", "--size", "toy", "--micro-batch", "1", "--grpo"])
    assert "| toy, 1 | micro-batch 1 x 1, GRPO, 8 answers" in capsys.readouterr().out


def test_memory_of_offloaded_steps(capsys):
    """Weights and moments, and of gradients one layer's, are not on the GPU."""
    on_gpu, offloaded = (bench.simulate("toy", 1, 4, 2, True, True, offload=offload)
                         for offload in (False, True))
    assert max(offloaded["weights"], offloaded["moments"]) < 1e-6  # buffers, counts of steps
    resting = on_gpu["weights"] + on_gpu["moments"]
    assert 1.0 * resting < on_gpu["peak"] - offloaded["peak"] < 1.4 * resting
    bench.main(["memory", "--size", "toy", "--micro-batch", "1", "--lora", "4", "--offload"])
    assert "checkpointing, --lora 4, --offload | 0.0 (0.0 weights" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# the script for a GPU


@pytest.mark.parametrize("steps", ["world right", pytest.param(
    "world right speed toy larger", marks=pytest.mark.slow)])
def test_gpu_check_runs(tmp_path, steps):
    """With tiny sizes: each step ends, and nothing fails."""
    env = {**os.environ, "CHECK_TINY": "1", "OUT": str(tmp_path / "out"),
           "WORK": str(tmp_path / "work")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["bash", ROOT / "tests" / "gpu_check.sh", *steps.split()]
    done = subprocess.run(script, env={**env, "PATH": path},
                          capture_output=True, text=True, timeout=900)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 0 and done.stdout.endswith(summary)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "FAIL" not in summary and "NOTE" not in summary, summary + log[-3000:]
    wanted = ["HashStore", "against float64", "--reshard, against the CPU", "generate's",
              "plain copies", "SFT, resumed", "not the CPU's"]
    if "speed" in steps:
        wanted += ["without aligned_mlp", "no checkpointing", "profile", "ratio", "queries/s",
                   "toy: delta1", "--compile", "larger: {"]
    for found in wanted:
        assert found in summary, found
    assert len(list((tmp_path / "out").iterdir())) <= 8
