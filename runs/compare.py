"""
Two evaluations of the same queries: the difference of delta1, and its interval.

    python runs/compare.py ckpt/a/eval/predictions.jsonl ckpt/b/eval/predictions.jsonl

The interval is far narrower than those of the two apart, since a point that is hard is hard for
both. Queries of a smaller evaluation are among those of a larger one with the same data and seed
(500 among 8,192): then the smaller set is compared.
"""
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import render  # noqa: E402


def tail(path: str) -> str:
    """The end of a path, the same for relative and absolute ones and wherever the data lies."""
    return "/".join(Path(os.path.abspath(path)).parts[-3:])


def column_of(line: dict) -> tuple[str, str]:
    """Dataset (a name, or the path of its file) and task."""
    name = line.get("dataset", "data")
    return tail(name) if "/" in name else name, line.get("task", "distance")


def query_key(line: dict) -> tuple:
    """What tells the queries of two evaluations apart."""
    pixels = [tuple(line.get(key) or ()) for key in ("pixel", "pixel2")]
    images = [tail(line[key]) for key in ("image", "image2") if key in line]
    return (*column_of(line), *pixels, *images, line.get("given"), line["true"])


def hits(lines: list[dict]) -> np.ndarray:
    """(N,) bool: within 25 % of the truth."""
    true = np.array([line["true"] for line in lines], float)
    pred = np.array([np.nan if line["pred"] is None else line["pred"] for line in lines], float)
    return evaluate.within(pred, true, 1.25)


def compare(lines: list[dict], others: list[dict]) -> dict:
    """-> "delta1" of both, "difference" first minus second, its 95 % interval "ci", and "n", the
    queries of the smaller set. Raises ValueError if the larger one does not hold them all."""
    smaller, larger = sorted((lines, others), key=len)
    index = {query_key(line): line for line in larger}
    missing = sum(query_key(line) not in index for line in smaller)
    if missing:
        raise ValueError(f"{len(lines)} and {len(others)} queries, {missing} of them not the same: "
                         "only answers to the same queries can be compared (the same --data and "
                         "--seed).")
    same = [index[query_key(line)] for line in smaller]
    first, second = (smaller, same) if smaller is lines else (same, smaller)
    gain = hits(first).astype(float) - hits(second)
    return {"delta1": [float(hits(group).mean()) for group in (first, second)],
            "difference": float(gain.mean()), "n": len(smaller),
            "ci": evaluate.interval(gain, np.array([line["image"] for line in smaller]))}


def by_column(lines: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(column_of(line), []).append(line)
    return groups


@render.command
def main(argv=None) -> None:
    parser = render.make_parser(__doc__)
    parser.add_argument("first", type=render.file_path, help="a predictions.jsonl")
    parser.add_argument("second", type=render.file_path, help="the one it is compared with")
    args = parser.parse_args(argv)

    ours, theirs = (by_column(evaluate.read_predictions(path))
                    for path in (args.first, args.second))
    common = [column for column in ours if column in theirs]
    if not common:
        raise ValueError(f"{args.first}, {args.second}: have no dataset and task in common.")
    for name, task in common:
        lines, others = ours[name, task], theirs[name, task]
        label = name if task == "distance" else f"{name}/{task}"
        try:
            found = compare(lines, others)
        except ValueError as e:
            raise ValueError(f"{args.first}, {args.second}: {label}: {e}") from None
        counts = f"{found['n']} queries"
        if len(lines) != len(others):
            counts += f" (the smaller of {len(lines)} and {len(others)})"
        first, second = found["delta1"]
        text = f"{label}: delta1 {first:.3f}, of {args.second} {second:.3f}, on {counts}: "
        text += f"{found['difference']:+.3f}"
        if found["ci"]:
            low, high = found["ci"]
            text += f", 95 % interval {low:+.3f} to {high:+.3f}"
        print(text)


if __name__ == "__main__":
    main()
