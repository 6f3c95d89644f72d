"""
The table and the picture of a finding: out/<finding>/<variant>-<seed>/eval/ of each variant
-> <name>.md, <name>.png.

    python runs/findings.py out/finding1/table "Finding 1" arrow cross dot text

The first variant is compared with each of the others. With several seeds the intervals are over
seeds (Student's t, and the difference seed by seed); with one they are over images, of this one
training run, and there is none for the average of several datasets.
"""
import math
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import compare  # noqa: E402

import evaluate  # noqa: E402
import render  # noqa: E402

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}  # Student's t, by the number of
# seeds; more: 2.365


def read_variant(out: Path, label: str) -> list[Path]:
    """Folders of all finished seeds of a variant, in their order."""
    found = sorted(path.parent for path in out.glob(f"{label}-*/eval/metrics.json")
                   if path.parent.parent.name.removeprefix(f"{label}-").isdigit())
    if not found:
        raise ValueError(f"{out}/{label}-*/eval/metrics.json: there is none. Run the finding's "
                         "shell script.")
    return found


def score(folder: Path, only: str | None) -> dict:
    """Of one dataset, or the average of several -> "delta1", "constant", and of one also its
    interval "ci"."""
    found = render.read_json(folder / "metrics.json")["datasets"]
    datasets = [scores for name, scores in found.items() if only in (None, name)]
    if not datasets:
        raise ValueError(f"{folder}/metrics.json: has no dataset {only}, but {', '.join(found)}.")
    means = {"delta1": statistics.mean(d["delta1"] for d in datasets),
             "constant": statistics.mean(d["best_constant"]["delta1"] for d in datasets)}
    return {**means, "ci": datasets[0].get("delta1_ci") if len(datasets) == 1 else None}


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """-> mean, ends of its 95 % interval."""
    mean = statistics.mean(values)
    half = T95.get(len(values), 2.365) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def over_images(first: Path, second: Path, only: str | None) -> tuple[float, float, float] | None:
    """-> how far the first evaluation is above the second one, ends of the 95 % interval; None
    where one training cannot say."""
    if not all(score(folder, only)["ci"] for folder in (first, second)):
        return None
    lines = [evaluate.read_predictions(folder / "predictions.jsonl") for folder in (first, second)]
    if only:
        lines = [[line for line in group if line["dataset"] == only] for group in lines]
    found = compare(*lines)
    return found["difference"], *found["ci"]


def summarize(out: Path, labels: list[str], only: str | None = None) -> dict[str, dict]:
    """-> label -> delta1 of each seed, its mean, the interval "ci", and "less": (the first variant
    minus it, low, high)."""
    folders, rows = {label: read_variant(out, label) for label in labels}, {}
    number = max(len(seeds) for seeds in folders.values())
    first = folders[labels[0]]
    for label, seeds in folders.items():
        if [seed.parent.name for seed in seeds] == [f"{label}-0"]:  # what the others went on from
            seeds = seeds * number
        if len(seeds) != number:
            raise ValueError(f"{out}: not all variants have the same seeds. Give the finding's "
                             "command again.")
        scores = [score(folder, only) for folder in seeds]
        delta1 = [s["delta1"] for s in scores]
        mean, ci = delta1[0], scores[0]["ci"]
        if len(seeds) > 1:
            mean, *ci = over_seeds(delta1)
            less = over_seeds([score(a, only)["delta1"] - d for a, d in zip(first, delta1)])
        else:
            less = over_images(first[0], seeds[0], only)
        rows[label] = {"delta1": delta1, "mean": mean, "ci": ci,
                       "less": None if label == labels[0] else less,
                       "constant": scores[0]["constant"]}
    return rows


def table(rows: dict[str, dict]) -> str:
    first, row = next(iter(rows.items()))
    over = f"{len(row['delta1'])} seeds" if len(row["delta1"]) > 1 else "images"
    lines = [["variant", "delta1", f"95 % interval over {over}", "each seed", f"{first} minus it"],
             ["---"] * 5]
    for label, row in rows.items():
        seeds, between, less = " ".join(f"{d:.3f}" for d in row["delta1"]), "", ""
        if row["ci"] and row["ci"][0] < row["ci"][1]:  # one model that all seeds start from: none
            between = "{:.3f}-{:.3f}".format(*row["ci"])
        if row["less"]:
            less = "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["less"])
        lines.append([label, f"{row['mean']:.3f}", between, seeds, less])
    lines.append(["best constant", f"{row['constant']:.3f}", "", "", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(title: str, rows: dict[str, dict]) -> Image.Image:
    """Bars of the mean, the interval as a line, each seed as a dot."""
    left, width, gap = 130, 480, 30
    image = Image.new("RGB", (left + width + 60, 40 + gap * len(rows) + 30), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), f"{title}: delta1", "black")
    for k, (label, row) in enumerate(rows.items()):
        y, mean = 36 + gap * k, row["mean"]
        low, high = row["ci"] or (mean, mean)
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


@render.command
def main(argv=None) -> None:
    parser = render.make_parser(__doc__)
    flag = parser.add_argument
    flag("name", type=render.file_path, help="of the table and the picture, without an ending, in "
         "the finding's folder")
    flag("title", help="of both")
    flag("variants", nargs="+", help="what is before -<seed> in the names of their folders")
    flag("--dataset", metavar="NAME", help="of this dataset alone; default: the average of all")
    args = parser.parse_args(argv)
    rows = summarize(Path(args.name).parent, args.variants, args.dataset)
    text = f"{args.title}\n\n{table(rows)}\n"
    render.write_text(f"{args.name}.md", text)
    with render.replacing(f"{args.name}.png") as temporary:
        picture(args.title, rows).save(temporary, "PNG")
    print(f"\n{text}\n{args.name}.md, {args.name}.png")


if __name__ == "__main__":
    main()
