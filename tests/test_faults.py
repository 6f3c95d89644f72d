"""
Breaking it on purpose: kills, full disks, damaged files, Ctrl-C, spawn, pipes that never end.

A seeded short run by default. The long one, with its numbers and a table by kind of file:

    FAULTS=long pytest -n 1 -s tests/test_faults.py

A script runs in a fork of the test's process, so that nothing is imported twice; there a hook
counts the file operations below the output folder, and ends the process, or fills the disk, at one
of them.
"""
import builtins
import errno
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import make_world

LONG = os.environ.get("FAULTS") == "long"
KILLS, DISKS, MUTATIONS = (500, 76, 5000) if LONG else (10, 5, 80)
SCRIPTS = ("render", "prepare", "evaluate", "train_sft", "train_grpo", "pointcloud")
TIMES = {"samples_per_s", "tflops", "wait_s", "rollout_s", "update_s", "prompts_per_s"}

# --------------------------------------------------------------------------------------------------
# a script in a fork


class Outcome(NamedTuple):
    code: int | str  # of the exit; negative: a signal; "hang"
    said: str


def forked(script: str, argv, log: Path, before=None, seconds: float = 60) -> Outcome:
    """script.main(argv) in a fork of this process. before: what is done there first."""
    pid = os.fork()
    if not pid:
        run_in_fork(script, argv, log, before)
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Outcome(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return Outcome("hang", log.read_text(errors="replace"))


def run_in_fork(script: str, argv, log: Path, before) -> None:
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
        sys.argv = [script + ".py"]
        module = importlib.import_module(script)
        faults = before and before()
        code = module.main([str(word) for word in argv]) or 0
        print(f"operations {faults and faults.count}")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


class Faults:
    """Counts the file operations of this process below a folder: opening to write, each write,
    renaming, removing. At operation `at` the process is killed, in a write after half of it; or,
    kind "full", the disk is full from then on."""

    def __init__(self, folder: Path, at: int, kind: str):
        self.folder, self.at, self.kind, self.count = str(folder), at, kind, 0

    def install(self) -> None:
        sys.addaudithook(self.audit)
        for name in SCRIPTS:
            vars(importlib.import_module(name))["open"] = self.open
        io.open = self.open  # of pathlib
        train_sft = importlib.import_module("train_sft")
        save_file = train_sft.save_file

        def save(tensors, path, **options):  # written by another language, in one go
            try:
                self.event(path, lambda: Path(path).write_bytes(b"half"))
            except OSError as e:
                raise train_sft.SafetensorError(f"I/O error: {e}") from None
            save_file(tensors, path, **options)

        train_sft.save_file = save

    def event(self, path, half=None, grows: bool = True) -> None:
        self.count += 1
        if self.kind == "kill" and self.count == self.at:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full" and self.count >= self.at and grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def audit(self, name: str, args: tuple) -> None:
        if name == "open":
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, (str, os.PathLike)) and writes:
                if os.fspath(path).startswith(self.folder):
                    self.event(path, grows=bool(flags & os.O_CREAT))
        elif name in ("os.rename", "os.mkdir"):
            if os.fspath(args[0]).startswith(self.folder):
                self.event(args[0])
        elif name in ("os.remove", "os.rmdir"):
            relative = args[1] >= 0  # to an open folder: shutil.rmtree
            if relative or os.fspath(args[0]).startswith(self.folder):
                self.event(args[0], grows=False)

    def open(self, path, mode="r", *args, **options):
        file = builtins.open(path, mode, *args, **options)
        inside = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)
        return Counted(file, self) if inside and set(mode) & set("wax+") else file


class Counted:
    """A file whose writes are operations."""

    def __init__(self, file, faults: Faults):
        self.file, self.faults, self.writes = file, faults, 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

    def write(self, data):
        def half():
            self.file.write(data[:len(data) // 2])
            self.file.flush()

        self.writes += 1
        if self.writes & (self.writes - 1) == 0:  # the first, second, fourth, ...
            try:
                self.faults.event(self.file.name, half)
            except OSError:
                half()
                raise
        return self.file.write(data)


# --------------------------------------------------------------------------------------------------
# the runs that are broken


class Case(NamedTuple):
    script: str
    argv: list  # without --out
    before: object = None  # done in the fork first


RUNS = ("prepare", "evaluate", "evaluate median", "constant", "export", "pointcloud", "train_sft",
        "train_sft, files", "train_grpo")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny) -> tuple[Path, dict[str, Case]]:
    """-> a folder, and the runs by name. What they need is imported here, before the forks."""
    folder = tmp_path_factory.mktemp("faults")
    world = make_world(folder / "world", images=4, poses=True)
    model = shutil.copytree(tiny, folder / "model")
    settings = {"focal": 60, "max_new_tokens": 12}
    (model / "depthlm.json").write_text(json.dumps(settings))
    for name in SCRIPTS:
        importlib.import_module(name)
    train = ["--model", model, "--data", world, "--workers", 0, "--crop", 56, 84, 56, 84,
             "--batch", 2, "--micro-batch", 2, "--save-every", 1, "--val-every", 2,
             "--val", world, "--val-queries", 4, "--resume"]
    ask = ["--batch-size", 4, "--workers", 0]
    cloud = [model, world, "--record", 0, "--points", 12, *ask]
    toy = ["--dataset", "toy", "--images", 6, "--val-images", 2, "--points", 20, "--workers", 1]
    query = [model, "--data", world, "--queries", 12, *ask]
    cases = {
        "prepare": Case("prepare", toy, small_chunks),
        "evaluate": Case("evaluate", query),
        "evaluate median": Case("evaluate", [*query, "--decode", "median"]),
        "constant": Case("evaluate", ["--constant", 2, "--data", world, "--all"]),
        "export": Case("evaluate", ["--data", world, "--queries", 4]),
        "pointcloud": Case("pointcloud", cloud, any_answer),
        "train_sft": Case("train_sft", [*train, "--samples", 6]),
        "train_sft, files": Case("train_sft", [*train, "--samples", 4], small_files),
        "train_grpo": Case("train_grpo", [*train, "--samples", 4, "--group", 2,
                                          "--max-new-tokens", 3])}
    evaluate, render = map(importlib.import_module, ("evaluate", "render"))
    evaluate.load_model(render.open_checkpoint(str(model)), evaluate.torch.device("cpu"),
                        evaluate.torch.float32)
    warm = cases["train_sft"].argv
    importlib.import_module("train_sft").main([*map(str, warm), "--out", str(folder / "warm")])
    return folder, cases


def small_chunks() -> None:
    prepare = importlib.import_module("prepare")
    prepare.DATASETS["toy"] = prepare.DATASETS["toy"]._replace(chunk=2)


def small_files() -> None:
    importlib.import_module("train_sft").SHARD_BYTES = 400_000


def any_answer() -> None:
    """A random model's answers, each taken for a distance."""
    render = importlib.import_module("render")
    render.read_answer = lambda answer, task="distance": (
        1 + zlib.crc32(answer["text"].encode()) % 100 / 20)


def start(name: str, bench, faults: Faults | None = None) -> Outcome:
    """A run in its folder, always the same one: run.json and resume/ hold its path."""
    folder, cases = bench
    case = cases[name]

    def before():
        if case.before:
            case.before()
        if faults:
            faults.install()
        return faults

    place = "--export-queries" if name == "export" else "--out"
    argv = [*case.argv, place, folder / name]
    return forked(case.script, argv, folder / f"{name}.log", before)


def contents(out: Path) -> dict[str, bytes]:
    """All files of a run, hidden ones too, without what tells the time."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
            data = json.dumps(lines).encode()
        if path.name == ".metadata":  # torch numbers its states at random
            data = b""
        name = re.sub(r"model-\d{9,}-", "model-", str(path.relative_to(out)))
        found[name] = re.sub(rb"model-\d{9,}-", b"model-", data)
    return found


@pytest.fixture(scope="module")
def whole(bench):
    """-> of a run: what it leaves when nothing happens, and its number of operations."""
    @lru_cache
    def run(name):
        code, said = start(name, bench, Faults(bench[0] / name, 0, "count"))
        count = int(re.search(r"operations (\d+)", said)[1])
        assert code == 0 and count > 5, said
        found = contents(bench[0] / name), count
        shutil.rmtree(bench[0] / name)
        return found

    return run


def moments(name: str, count: int, total: int) -> list[int]:
    """Which of a run's operations are broken, of `total` in all runs: spread evenly, or random."""
    share = -(-total // len(RUNS))
    if LONG:
        return np.unique(np.linspace(1, count, share).astype(int)).tolist()
    return (np.random.default_rng(zlib.crc32(name.encode())).integers(1, count, share) + 1).tolist()


def complaints(name: str, bench, want: dict) -> list[str]:
    """What is wrong after the same command was given again."""
    code, said = start(name, bench)
    got = contents(bench[0] / name)
    shutil.rmtree(bench[0] / name)
    if code != 0:
        return [f"exit {code}: {said[-600:]}"]
    return [f"{file}: " + ("missing" if file not in got else
                           "left behind" if file not in want else "other bytes")
            for file in sorted(got.keys() | want.keys()) if got.get(file) != want.get(file)]


def broken(name: str, bench, whole, kind: str, total: int, first) -> None:
    """Break a run; first(code, said): whether something is wrong at once."""
    want, count = whole(name)
    hits, wrong, places = 0, [], moments(name, count, total)
    for at in places:
        code, said = start(name, bench, Faults(bench[0] / name, at, kind))
        hits += code != 0
        found = [f"exit {code}: {said[-600:]}"] if first(code, said) else []
        found += complaints(name, bench, want)
        wrong += [f"operation {at}: {found}"] * bool(found)
    if LONG:
        print(f"\n{name}, {kind}: {hits} of {len(places)} runs broken at one of {count} operations,"
              f" {len(places) - len(wrong)} right")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", RUNS)
def test_kills(bench, whole, name):
    """Killed at any file operation, the same command ends with the bytes of a run that nobody
    disturbed, and leaves no temporary file."""
    broken(name, bench, whole, "kill", KILLS, lambda code, _: code not in (0, -signal.SIGKILL))


@pytest.mark.parametrize("name", RUNS)
def test_full_disks(bench, whole, name):
    """A disk that is full from any file operation on: one line, exit code 2; with room again, the
    same command ends with the bytes of a run that nobody disturbed."""
    def unclear(code, said):
        return code not in (0, 2) or (code and (said.count("error:") != 1 or "Trace" in said))

    broken(name, bench, whole, "full", DISKS, unclear)
