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
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
import zlib
from collections import Counter
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import test_prepare_readers as readers
from conftest import ROOT, make_world

LONG = os.environ.get("FAULTS") == "long"
ALONE = LONG or os.environ.get("FAULTS") == "alone"
KILLS, DISKS, MUTATIONS = (500, 90, 5000) if LONG else (10, 9, 60)
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
             "--val", world, "--val-queries", 4]
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


def moments(name: str, whole, total: int) -> list[int]:
    """Which of a run's operations are broken, of `total` in all runs: spread evenly over those that
    it has, or the short run's random ones."""
    count = whole(name)[1]
    if LONG:
        counts = [whole(name)[1] for name in RUNS]
        share = next(n for n in range(1, total) if sum(min(n, c) for c in counts) >= total)
        return np.unique(np.linspace(1, count, share).astype(int)).tolist()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (rng.integers(1, count, total // len(RUNS)) + 1).tolist()


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
    hits, wrong, places = 0, [], moments(name, whole, total)
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


# what trains is forked from a process in which nothing has trained: its threads would be missed
apart = pytest.mark.skipif(not ALONE, reason="in test_training_alone")


def training_apart(names) -> list:
    return [pytest.param(name, marks=apart) if name.startswith("train") else name for name in names]


BROKEN = training_apart(RUNS)


@pytest.mark.skipif(ALONE, reason="it runs the others")
def test_training_alone():
    """Kills, full disks and spawned workers of training, in a process of their own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", __file__, "-n", "0", "-k",
                           "train and (kills or full or spawn) or pipes and state"],
                          env={**env, "FAULTS": "alone"},
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("name", BROKEN)
def test_kills(bench, whole, name):
    """Killed at any file operation, the same command ends with the bytes of a run that nobody
    disturbed, and leaves no temporary file."""
    broken(name, bench, whole, "kill", KILLS, lambda code, _: code not in (0, -signal.SIGKILL))


@pytest.mark.parametrize("name", BROKEN)
def test_full_disks(bench, whole, name):
    """A disk that is full from any file operation on: one line, exit code 2; with room again, the
    same command ends with the bytes of a run that nobody disturbed."""
    def unclear(code, said):
        return code not in (0, 2) or (code and (said.count("error:") != 1 or "Trace" in said))

    broken(name, bench, whole, "full", DISKS, unclear)


# --------------------------------------------------------------------------------------------------
# workers


WITH_WORKERS = ("prepare", "evaluate", "pointcloud", "train_sft", "train_grpo")


def with_workers(bench, name: str, out: Path, before, **options) -> Outcome:
    """A run with two workers. before: what is done first, in the fork."""
    case = bench[1][name]
    argv = [*case.argv, "--workers", 2, "--out", out]
    return forked(case.script, argv, out.with_suffix(".log"),
                  lambda: (case.before and case.before(), before())[1], **options)


def pickled() -> None:
    """What a process is started with is pickled, as spawn does it, before it is forked: the slow
    part of spawn, the imports, is left out."""
    process_class = multiprocessing.process.BaseProcess
    start_process = process_class.start

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):  # queues and locks are multiprocessing's own affair
            own = type(value).__module__.startswith(("multiprocessing", "_multi", "concurrent"))
            return (str, ()) if own and value is not self.process else NotImplemented

    def start(process):
        pickler = Pickler(io.BytesIO())
        pickler.process = process
        pickler.dump(process)
        print("pickled", flush=True)
        start_process(process)

    process_class.start = start


@pytest.mark.parametrize("name", training_apart(WITH_WORKERS))
def test_spawn(bench, tmp_path, name):
    """Where processes are spawned (macOS, Windows, Linux from Python 3.14), all that goes to a
    worker is pickled; in the long run they are spawned."""
    before = partial(multiprocessing.set_start_method, "spawn", force=True) if LONG else pickled
    code, said = with_workers(bench, name, tmp_path / name, before, seconds=200)
    assert code == 0 and (LONG or "pickled" in said), f"{code} {said}"


def hold(name: str, marker: Path) -> None:
    """Wait for ever in the middle of a run, when its workers are at work."""
    module = importlib.import_module({"pointcloud": "evaluate"}.get(name, name))
    place = {"train_sft": "answer_losses", "train_grpo": "sample_answers",
             "prepare": "write_json", "pointcloud": "median_answers"}.get(name, "greedy_answers")
    wrapped, calls = getattr(module, place), []

    def wait(*args):
        calls.append(1)
        if len(calls) < {"prepare": 2, "pointcloud": 3}.get(name, 1):  # before the workers start
            return wrapped(*args)
        marker.touch()
        time.sleep(60)

    setattr(module, place, wait)


def session(leader: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found += [int(stat.parent.name)] if int(of) == leader and state != "Z" else []
    return found


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["orphans", "ctrl-c"])
@pytest.mark.parametrize("name", WITH_WORKERS)
def test_workers_end(bench, tmp_path, name, sign):
    """A killed parent's workers end within 5 s. Ctrl-C, which reaches all of them, is one line
    that says how to resume."""
    marker = tmp_path / "held"
    at_end = []

    def strike():
        while not marker.exists():
            time.sleep(0.005)
        leader = int(marker.with_name("leader").read_text())
        at_end.append(leader)
        at_end.append(len(session(leader)))
        kill = os.kill if sign == signal.SIGKILL else os.killpg
        kill(leader, sign)

    def before():
        marker.with_name("leader").write_text(str(os.getpid()))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        hold(name, marker)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    code, said = with_workers(bench, name, tmp_path / "out", before, seconds=50)
    assert len(at_end) == 2 and at_end[1] >= 3, said
    deadline = time.time() + 5
    while session(at_end[0]) and time.time() < deadline:
        time.sleep(0.01)
    assert not session(at_end[0])
    if sign == signal.SIGKILL:
        assert code == -sign
    else:
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        assert code == 130 and "Traceback" not in said, said
        assert len(errors) == 1 and "interrupted" in errors[0] and "resume" in errors[0], said


def test_a_reader_that_has_enough(bench):
    """`| head -1` ends quietly."""
    world = bench[0] / "world" / "val.jsonl"
    for command in (["prepare.py", "--check", world],
                    ["render.py", world, "--focal", 60, "--out", bench[0] / "sheet.png"]):
        line = " ".join(map(str, [sys.executable, ROOT / command[0], *command[1:]]))
        done = subprocess.run(f"{line} | true", shell=True, capture_output=True, text=True)
        assert done.stderr == "" and done.returncode == 0


def test_unpacking(tmp_path, monkeypatch, capsys):
    """Nothing is unpacked that the disk has no room for, and no file is replaced."""
    prepare = importlib.import_module("prepare")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("depth/1.png", bytes(100_000))
        file.writestr("notes.txt", "theirs")
    (tmp_path / "notes.txt").write_text("mine")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=99_999))
        with pytest.raises(ValueError, match=r"a\.zip.* GB are free"):
            prepare.unpack(tmp_path / "a.zip", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "notes.txt"]
    prepare.unpack(tmp_path / "a.zip", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and "kept" in capsys.readouterr().out
    assert (tmp_path / "depth/1.png").stat().st_size == 100_000


# --------------------------------------------------------------------------------------------------
# damaged files


RAW = {  # what no JSON library writes by itself
    "NaN": "NaN", "Infinity": "-Infinity", "1e999": "1e999", "400 digits": "9" * 400,
    "nested": "[" * 30_000 + "]" * 30_000, "surrogate": '"\\ud800"', "twice": '1, "image": 1'}
VALUES = [None, "", "x", "\x1b[31m", "a\0b", "../" * 60, [], {}, [None], True, -1, 0, 1e9, -1e-9,
          1.5, *({"raw": name} for name in RAW)]
WORDS = ["nan", "inf", "-1", "0", "1e9", "abc", "9" * 400, "\x1b[31m", "--", "1,2", "\ufeff", "½"]


def mutate_bytes(data: bytes, rng) -> tuple[str, bytes]:
    """What a broken copy, a bad disk or the wrong download makes of a file."""
    at, end = sorted(rng.integers(0, len(data) + 1, 2))
    noise = rng.integers(0, 256, 8, np.uint8).tobytes()
    flipped = bytearray(data)
    for place in rng.integers(0, max(1, len(data)), 4):
        if data:
            flipped[place] ^= int(rng.integers(1, 256))
    made = {
        "cut": data[:at], "empty": b"", "flipped": bytes(flipped), "head lost": data[at:],
        "zeroed": data[:at] + b"\0" * (end - at) + data[end:], "part lost": data[:at] + data[end:],
        "part twice": data[:end] + data[at:], "noise inside": data[:at] + noise + data[at:],
        "noise behind": data + noise, "zeros": b"\0" * len(data),
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n",
        "a page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        "two bytes a letter": data.decode("latin-1").encode("utf-16"),
        "of another": b"\x89PNG\r\n\x1a\n" + noise}
    name = str(rng.choice(sorted(made)))
    return name, made[name]


def places(value) -> list:
    """(container, key) of all parts of a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def mutate_json(data: bytes, rng) -> tuple[str, bytes]:
    """A file of JSON with one value lost, renamed or of another kind: one of its lines, if it is a
    jsonl."""
    lines = data.splitlines() if data.count(b"\n") and data.lstrip()[:1] == b"{" else [data]
    try:
        values = [json.loads(line) for line in lines]
    except ValueError:
        lines, values = [data], [json.loads(data)]
    line = int(rng.integers(len(lines)))
    found = places(values[line])
    if not found:
        return mutate_bytes(data, rng)
    keys = sorted({str(key) for box, key in found if isinstance(box, dict)})
    if keys and rng.random() < 0.7:  # each key as often, however many numbers it has
        key = str(rng.choice(keys))
        found = [(box, k) for box, k in found if k == key]
    box, key = found[rng.integers(len(found))]
    what = VALUES[rng.integers(len(VALUES))]
    chance = rng.random()
    if chance < 0.12:
        del box[key]
        name = f"{key} lost"
    elif chance < 0.2 and isinstance(box, dict):
        box[key + "_"] = box.pop(key)
        name = f"{key} renamed"
    else:
        box[key] = what
        name = f"{key} = {what}"
    text = json.dumps(values[line])
    for raw, form in RAW.items():
        text = text.replace(json.dumps({"raw": raw}), form)
    lines[line] = text.encode()
    return name, b"\n".join(lines) + b"\n"


def mutate_words(data: bytes, rng) -> tuple[str, bytes]:
    """A text with one word lost, twice, or another."""
    words = re.split(r"(\s+)", data.decode("latin-1"))
    at = int(rng.integers(0, len(words), 1)[0]) // 2 * 2
    new = ["", words[at] + " " + words[at], *WORDS][rng.integers(len(WORDS) + 2)]
    name = f"word {at}: {words[at][:20]!r} -> {new[:20]!r}"
    return name, "".join([*words[:at], new, *words[at + 1:]]).encode()


def mutate_place(path: Path, rng) -> str:
    """Something else than a file of its own is there."""
    kind = str(rng.choice(["nothing", "folder", "loop", "itself", "pipe"]))
    if kind == "pipe" and path.suffix == ".args":  # of the shell: @<(command)
        kind = "nothing"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.parent)
    elif kind == "itself":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    return kind


def mutate(path: Path, rng) -> str:
    """Damage a file -> how."""
    data = path.read_bytes()
    if rng.random() < 0.08:
        return mutate_place(path, rng)
    change = mutate_bytes
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.75:
        change = mutate_json
    elif path.suffix in (".txt", ".args", ".csv", ".conf", ".jinja") and rng.random() < 0.7:
        change = mutate_words
    name, data = change(data, rng)
    path.write_bytes(data)
    return name


class Kind(NamedTuple):
    """A kind of file: what is mutated in a folder, and the runs that read it. strict: no mutation
    may change what comes out."""
    folder: Path
    files: str  # patterns
    runs: list[Case]
    strict: bool = False
    split: str = ""


IMAGES = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP", "gif": "GIF",
          "ppm": "PPM", "jp2": "JPEG2000", "avif": "AVIF", "mpo": "MPO"}


@pytest.fixture(scope="module")
def kinds(bench) -> dict[str, Kind]:
    """Each kind of file in a folder of its own. The word HERE in a run is a copy of that folder,
    OUT is another folder in it."""
    folder, cases = bench
    model, root = folder / "model", folder / "kinds"
    world = folder / "world" / "val.jsonl"
    made = {}

    def kind(name, files, *runs, **options):
        made[name] = Kind(root / name, files, list(runs), **options)

    sheet = Case("render", ["HERE/val.jsonl", "--n", 4, "--focal", 60, "--out", "OUT/sheet.png"])
    check = Case("prepare", ["--check", "HERE/val.jsonl"])
    constant = Case("evaluate", ["--constant", 2, "--all", "--data", "HERE/val.jsonl", "--out",
                                 "OUT"])
    tasks = Case("evaluate", [model, "--data", "HERE/val.jsonl", "--queries", 4, "--tasks",
                              "distance", "motion", "--workers", 0, "--out", "OUT"])
    shutil.copytree(world.parent, root / "jsonl")
    kind("jsonl", "val.jsonl", sheet, check, constant, tasks)
    shutil.copytree(world.parent, root / "idx")
    importlib.import_module("render").open_index(root / "idx" / "val.jsonl")
    kind("idx", "val.idx", sheet, check, constant, strict=True)
    for ending, form in islice(IMAGES.items(), None if LONG else 3):
        shutil.copytree(world.parent, root / ending)
        for path in (root / ending).glob("*.png"):
            with importlib.import_module("PIL.Image").open(path) as image:
                image = image.copy()
                image.save(path.with_suffix(f".{ending}"), form)
            if ending != "png":
                path.unlink()
        lines = world.read_text().replace(".png", f".{ending}")
        (root / ending / "val.jsonl").write_text(lines)
        kind(ending, f"*.{ending}", sheet, check, tasks)

    own = Case("prepare", ["--dataset", "folder", "--root", "HERE", "--workers", 1, "--points", 20,
                           "--out", "OUT"])
    for ending in ("png", "npy", "npz", "tif") if LONG else ("png", "npy"):
        rgbd_folder(root / f"depth {ending}", ending)
        kind(f"depth {ending}", f"depth/*.{ending}", own)
    for name, files in (("intrinsics.txt", "intrinsics.txt"), ("poses", "poses/*.txt")):
        rgbd_folder(root / name, "npy")
        kind(name, files, own)

    ask = Case("evaluate", ["HERE", "--data", world, "--queries", 4, "--workers", 0, "--out",
                            "OUT"])
    for path in sorted(model.iterdir()):
        if path.is_file():
            shutil.copytree(model, root / path.name)
            kind(path.name, path.name, ask)
    files = cases["train_sft, files"]
    start("train_sft, files", bench)
    shutil.copytree(folder / "train_sft, files", root / "index")
    shutil.rmtree(root / "index" / "resume")
    kind("index", "*.index.json", ask)
    begun = Case(files.script, [*files.argv, "--samples", 8, "--out", "HERE"], files.before)
    shutil.move(folder / "train_sft, files", root / "state")
    info = root / "state" / "run.json"
    info.write_text(info.read_text().replace('"samples": 4', '"samples": 8'))
    for name in ("state.json", "run.json", "log.jsonl") if LONG else ("state.json",):
        shutil.copytree(root / "state", root / f"run {name}")
        kind(f"run {name}", f"**/{name}", begun)
    if LONG:
        shutil.copytree(root / "state", root / "run resume")
        kind("run resume", "resume/step*/*", begun)

    forked("evaluate", [model, "--data", world, "--queries", 8, "--workers", 0, "--out",
                        root / "predictions"], folder / "log")
    kind("predictions", "predictions.jsonl", Case("evaluate", [
        "--predictions", "HERE/predictions.jsonl", "--out", "OUT"]))
    (root / "chats").mkdir()
    lines = [{"question": f"What is {k} + 1?", "answer": f"{k + 1}"} for k in range(6)]
    (root / "chats" / "chats.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    train = cases["train_sft"].argv
    kind("chats", "chats.jsonl", Case("train_sft", [
        *train, "--samples", 4, "--batch", 4, "--val-every", 0, "--mix", "HERE/chats.jsonl:0.5",
        "--out", "OUT"]))
    (root / "flags").mkdir()
    (root / "flags" / "run.args").write_text(
        f"--constant 2 --data {world}  # all of it\n--queries 8 --seed 3\n\n--batch-size 4\n")
    kind("flags", "run.args", Case("evaluate", ["@HERE/run.args", "--out", "OUT"]))

    half = root / "answers"
    forked("pointcloud", [*cases["pointcloud"].argv, "--out", half], folder / "log", any_answer)
    for path in half.iterdir():
        if path.name not in ("run.json", "answers.jsonl"):
            path.unlink()
    lines = (half / "answers.jsonl").read_text().splitlines(True)
    (half / "answers.jsonl").write_text("".join(lines[:8]))
    kind("answers", "answers.jsonl", Case("pointcloud", [
        *cases["pointcloud"].argv, "--out", "HERE"], any_answer))
    half = shutil.copytree(root / "predictions", root / "parts")
    (half / "metrics.json").unlink()
    lines = (half / "predictions.jsonl").read_text().splitlines(True)
    (half / "predictions.jsonl").unlink()
    (half / "predictions.part-0-of-1-1.jsonl").write_text("".join(lines[:4]))
    kind("parts", "*.part*", Case("evaluate", [
        model, "--data", world, "--queries", 8, "--workers", 0, "--out", "HERE"]))
    for name, (split, build) in islice(TREES.items(), None if LONG else 2):
        build(root / f"raw {name}")
        kind(f"raw {name}", "**/*", Case("prepare", [
            "--dataset", name, "--root", "HERE", "--split", split, "--points", 20, "--workers", 1,
            "--out", "OUT"]))
    return made


def scannetpp(root: Path) -> None:
    readers.scannetpp_scene(root, "aaa", (0, 10), width=640)
    readers.scannetpp_splits(root, [], ["aaa"])


def omnidata(root: Path, dataset: str) -> None:
    readers.omnidata_root(root, "omnitools", dataset, ("allensville", "ackermanville"),
                          ("depth_euclidean",), "point_info")


TREES = {
    "ddad": ("val", readers.ddad_root),
    "sunrgbd": ("val", lambda root: readers.sun_scene(root / "SUNRGBD/kv2/align_kv2/2014-12-18")),
    "argoverse2": ("val", lambda root: readers.argoverse_log(root / "val", "0a")),
    "waymo": ("train", readers.waymo_root),
    "nuscenes": ("val", readers.nuscenes_root),
    "scannetpp": ("val", scannetpp),
    "taskonomy": ("train", partial(omnidata, dataset="taskonomy")),
    "hm3d": ("train", partial(omnidata, dataset="hm3d")),
    "matterport3d": ("train", readers.matterport_house),
    "eth3d": ("val", readers.eth3d_root),
    "ibims1": ("val", readers.ibims_root)}


def rgbd_folder(folder: Path, ending: str) -> None:
    """Four frames as people have them."""
    image_of = importlib.import_module("PIL.Image").fromarray
    for part in ("rgb", "depth", "poses"):
        (folder / part).mkdir(parents=True)
    (folder / "intrinsics.txt").write_text("50 50 31.5 23.5\n")
    for k in range(4):
        y, x = np.mgrid[:48, :64]
        depth = (1.5 + 0.3 * k + x / 40 + y / 60).astype(np.float32)
        grey = (255 / (1 + depth)).astype(np.uint8)
        image_of(np.stack([grey] * 3, 2)).save(folder / f"rgb/{k}.png")
        np.savetxt(folder / f"poses/{k}.txt", np.eye(4))
        path = folder / f"depth/{k}.{ending}"
        if ending == "npy":
            np.save(path, depth)
        elif ending == "npz":
            np.savez(path, depth)
        else:
            image_of((1000 * depth).astype(np.uint16)).save(path)


def start_kind(run: Case, here: Path, seconds: float = 30) -> Outcome:
    argv = [str(word).replace("HERE", str(here)).replace("OUT", str(here / "out"))
            for word in run.argv]
    return forked(run.script, argv, here.with_suffix(".log"), run.before, seconds)


def trial(kind: Kind, run: Case, rng=None) -> tuple[str, Outcome, dict, set]:
    """Mutate one file of a copy of the folder, and run -> how it was mutated, the end, the files,
    what was said, without numbers."""
    here = kind.folder.with_name("here")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(kind.folder, here)
    mutated, name = "", ""
    if rng is not None:
        files = sorted(path for path in here.glob(kind.files) if path.is_file())
        path = files[rng.integers(len(files))]
        name = str(path.relative_to(here))
        mutated = f"{name}: {mutate(path, rng)}"
    outcome, out = start_kind(run, here), here / "out"
    said = {re.sub(r"[-\d.]+", "", line) for line in outcome.said.splitlines()}
    place = out if "OUT" in " ".join(map(str, run.argv)) else here
    files = {}
    if place.exists() and outcome.code == 0:
        files = {file: data for file, data in contents(place).items()
                 if file != name and "run.json" not in file}
    return mutated, outcome, files, said


def judge(kind: Kind, run: Case, base, rng) -> tuple[str, str]:
    """-> what became of a mutation, and how. base(): files and words without it."""
    mutated, (code, said), files, lines = trial(kind, run, rng)
    story = f"{run.script}, {mutated}: exit {code}: {said[-700 if code else -300:]}"
    ends = [line for line in said.splitlines() if "error: " in line]
    text = " ".join(data.decode("latin-1") for name, data in files.items() if "json" in name)
    unescaped = any(not (c.isprintable() or c in "\r\n\t") for c in said)
    if code not in (0, 1, 2) or "Traceback" in said or unescaped:
        return "WRONG", story
    if code == 2:
        named = re.search("here|argument|samples could not be read", ends[-1])
        named = named or str(run.argv[0]).startswith("@")
        return ("refused" if len(ends) == 1 and named and len(ends[0]) < 1500 else "WRONG"), story
    if run.argv[0] == "--check" and code == 1:
        return "reported", story
    if code == 1 or re.search(r"\bNaN\b|\bInfinity\b", text):
        return "WRONG", story
    if lines - base()[1]:
        return "reported", story
    if all(files.get(file, data) == data for file, data in base()[0].items()):
        return "harmless", story
    return ("WRONG" if kind.strict else "another value"), story


VERDICTS = "harmless", "refused", "reported", "another value", "WRONG"


def test_damaged_files(kinds):
    """A damaged file of any kind changes nothing, is refused in one line that names it, or is
    reported and left out: no traceback, no endless wait, no NaN. "another value": what comes out is
    different, because the file says something else that may be true."""
    table, wrong = {name: Counter() for name in kinds}, []

    @lru_cache
    def base(name, n):
        _, outcome, files, lines = trial(kinds[name], kinds[name].runs[n])
        assert outcome.code == 0, (name, outcome)
        return files, lines

    first = int(os.environ.get("FIRST", 0))  # the long run may be split
    names = os.environ.get("KINDS", ",".join(kinds)).split(",")
    for k in range(first, first + int(os.environ.get("NUMBER", MUTATIONS))):
        rng = np.random.default_rng((7, k))
        name = names[k % len(names)]
        n = int(rng.integers(len(kinds[name].runs)))
        verdict, story = judge(kinds[name], kinds[name].runs[n], partial(base, name, n), rng)
        table[name][verdict] += 1
        wrong += [f"{name}, mutation {k}: {story}"] * (verdict == "WRONG")
    if LONG:
        render = importlib.import_module("render")
        total = sum(table.values(), Counter())
        rows = [[name, *(str(row[verdict]) for verdict in VERDICTS)]
                for name, row in [*table.items(), ("all", total)]]
        print("\n" + render.text_table([["kind of file", *VERDICTS], *rows]))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["jsonl", "png", "depth npy", "intrinsics.txt", "config.json",
                                  "model.safetensors", "predictions", "run state.json"])
def test_pipes(kinds, name):
    """A pipe in place of a file, which nobody writes into, is waited for by nobody."""
    if name == "run state.json" and not ALONE:
        pytest.skip("in test_training_alone")
    kind = kinds[name]
    here = kind.folder.with_name("here")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(kind.folder, here)
    path = sorted(here.glob(kind.files))[0]
    path.unlink()
    os.mkfifo(path)
    code, said = start_kind(kind.runs[0], here, seconds=20)
    assert code in (0, 2) and "Traceback" not in said, (code, said)
    assert path.stem in said or name == "run state.json" or "weights" in said, said


# --------------------------------------------------------------------------------------------------
# memory


@pytest.mark.skipif(not LONG, reason="FAULTS=long")
@pytest.mark.parametrize("name, more, first, last", [
    ("evaluate", ["--all", "--batch-size", 32, "--max-new-tokens", 2, "--overwrite"], 2000, 20_000),
    ("train_sft", ["--samples", 4000, "--save-every", 10_000, "--val-every", 0], 200, 2000)])
def test_memory_is_flat(bench, tmp_path, name, more, first, last):
    """From the first queries or steps on, a process grows by less than 5 %."""
    evaluate, train_sft = map(importlib.import_module, ("evaluate", "train_sft"))
    data = make_world(tmp_path / "world", images=200, points=100)
    number = [0]

    def memory():
        number[0] += 1
        if number[0] in (first, last):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"memory {number[0]} {pages}", flush=True)

    def before():
        prediction, log_line = evaluate.prediction, train_sft.log_line
        evaluate.prediction = lambda *args, **more: (memory(), prediction(*args, **more))[1]
        train_sft.log_line = lambda *args, **more: (memory(), log_line(*args, **more))[1]

    case = bench[1][name]
    argv = [*case.argv, *more, "--data", data, "--out", tmp_path / "out"]
    code, said = forked(case.script, argv, tmp_path / "log", before, 3000)
    assert code == 0, said[-2000:]
    start, end = (int(m[1]) for m in re.finditer(r"memory \d+ (\d+)", said))
    print(f"\n{name}: {start * 4 // 1024} MiB after {first}, {end * 4 // 1024} MiB after {last}")
    assert end < 1.05 * start
