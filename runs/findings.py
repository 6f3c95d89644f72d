"""
The table and the picture of a finding: out/<finding>/<variant>-<seed>/eval/ of each variant
-> <name>.md, <name>.png.

    python runs/findings.py out/finding1/table "Finding 1" arrow cross dot text

The first variant is compared with each of the others. With several seeds the intervals are over
seeds (Student's t, and the difference seed by seed); with one they are over images, of this one
training run.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
from compare import compare  # noqa: E402

import evaluate  # noqa: E402

T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
}  # Student's t, by the number of seeds; more: 2.365


def read_variant(out: Path, label: str) -> list[Path]:
    """Folders of all finished seeds of a variant, in their order."""
    found = sorted(
        path.parent
        for path in out.glob(f"{label}-*/eval/metrics.json")
        if path.parent.parent.name.removeprefix(f"{label}-").isdigit()
    )
    if not found:
        raise SystemExit(
            f"error: {out}/{label}-*/eval/metrics.json: none; run the finding's shell script."
        )
    return found


def score(folder: Path) -> dict:
    return next(iter(json.loads((folder / "metrics.json").read_text())["datasets"].values()))


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """-> mean, ends of its 95 % interval."""
    mean = statistics.mean(values)
    half = T95.get(len(values), 2.365) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def summarize(out: Path, labels: tuple[str, ...]) -> dict[str, dict]:
    """-> label -> delta1 of each seed, (mean, low, high), and (the first variant minus it, low,
    high)."""
    folders, rows = {label: read_variant(out, label) for label in labels}, {}
    number = max(len(seeds) for seeds in folders.values())
    for label, seeds in folders.items():
        if [seed.parent.name for seed in seeds] == [f"{label}-0"]:  # what the others went on from
            seeds = seeds * number
        if len(seeds) != number:
            raise SystemExit(
                f"error: {out}: not all variants have the same seeds; give the finding's command "
                "again."
            )
        scores, first = [score(folder) for folder in seeds], folders[labels[0]]
        delta1 = [s["delta1"] for s in scores]
        if len(seeds) > 1:
            mean, less = (
                over_seeds(delta1),
                over_seeds([score(a)["delta1"] - d for a, d in zip(first, delta1)]),
            )
        else:
            mean = (delta1[0], *scores[0]["delta1_ci"])
            found = compare(
                *(evaluate.read_predictions(f[0] / "predictions.jsonl") for f in (first, seeds))
            )
            less = (found["difference"], *found["ci"])
        rows[label] = {
            "delta1": delta1,
            "mean": mean,
            "less": None if label == labels[0] else less,
            "constant": scores[0]["best_constant"]["delta1"],
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    first, row = next(iter(rows.items()))
    over = f"{len(row['delta1'])} seeds" if len(row["delta1"]) > 1 else "images"
    lines = [
        f"| variant | delta1 | 95 % interval over {over} | each seed | {first} minus it |",
        "|---" * 5 + "|",
    ]
    for label, row in rows.items():
        seeds, less = " ".join(f"{d:.3f}" for d in row["delta1"]), ""
        if row["less"]:
            less = "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["less"])
        mean, low, high = row["mean"]
        between = (
            f"{low:.3f}-{high:.3f}" if low < high else ""
        )  # one model that all seeds start from has none
        lines.append(f"| {label} | {mean:.3f} | {between} | {seeds} | {less} |")
    return "\n".join([*lines, f"| best constant | {row['constant']:.3f} | | | |"])


def picture(title: str, rows: dict[str, dict]) -> Image.Image:
    """Bars of the mean, the interval as a line, each seed as a dot."""
    left, width, gap = 130, 480, 30
    image = Image.new("RGB", (left + width + 60, 40 + gap * len(rows) + 30), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), f"{title}: delta1 on the toy world", "black")
    for k, (label, row) in enumerate(rows.items()):
        y, (mean, low, high) = 36 + gap * k, row["mean"]
        draw.text((8, y + 3), label, "black")
        draw.rectangle((left, y, left + width * mean, y + 16), fill=(120, 160, 220))
        draw.line((left + width * max(0, low), y + 8, left + width * min(1, high), y + 8), "black")
        for d in row["delta1"]:
            draw.ellipse((left + width * d - 2, y + 6, left + width * d + 2, y + 10), fill="black")
        draw.text((left + width + 8, y + 3), f"{mean:.3f}", "black")
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        draw.text((left + width * tick - 6, image.height - 26), f"{tick:g}", "black")
    x = left + width * next(iter(rows.values()))["constant"]
    draw.line((x, 34, x, image.height - 30), (200, 0, 0))
    draw.text((x - 40, image.height - 14), "best constant", (200, 0, 0))
    return image


def main(name: str, title: str, *labels: str) -> None:
    rows = summarize(Path(name).parent, labels)
    text = f"{title}\n\n{table(rows)}\n"
    Path(f"{name}.md").write_text(text)
    picture(title, rows).save(f"{name}.png")
    print(f"\n{text}\n{name}.md, {name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
