"""
Finding 2b: the validation curves of SFT and GRPO in out/finding2/{sft,l1}-<seed>/log.jsonl
-> curves.md, curves.png.

    python runs/finding2.py out/finding2
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {"SFT": (40, 90, 200), "GRPO": (200, 60, 40)}
BATCH = 32


def read_curve(path: Path) -> list[tuple[float, float, float]]:
    """log.jsonl -> (training samples, seconds of training so far, delta1) at each validation."""
    seconds, points = 0.0, []
    for line in map(json.loads, path.read_text().splitlines()):
        if "val" in line:
            points.append(
                (line["step"] * BATCH, seconds, next(iter(line["val"].values()))["delta1"])
            )
        elif "rollout_s" in line:
            seconds += line["rollout_s"] + line["update_s"] + line["wait_s"]
        else:
            seconds += BATCH / line["samples_per_s"]
    return points


def at(points: list, axis: int, value: float) -> float | None:
    """delta1 of the last validation at or before that many samples (axis 0) or seconds (axis 1)."""
    reached = [p for p in points if p[axis] <= value]
    return reached[-1][2] if reached and points[-1][axis] >= value else None


def table(curves: dict[str, list]) -> str:
    """One line a seed: what the same samples and the same seconds give, and all checks over the
    later half of the samples that all runs saw, since greedy answers come and go from check to
    check."""
    samples = min(points[-1][0] for points in curves.values())
    seconds = min(points[-1][1] for points in curves.values())
    marks = [(0, f * samples, f"{f * samples:.0f} samples") for f in (0.1, 0.2, 0.5, 1.0)]
    marks += [(1, f * seconds, f"{f * seconds:.0f} s") for f in (0.1, 0.2, 0.5, 1.0)]
    lines = [
        "| run | ms a sample | "
        + " | ".join(f"delta1 at {name}" for *_, name in marks)
        + f" | mean (lowest-highest) at {samples / 2:.0f}-{samples:.0f} samples |",
        "|---" * (3 + len(marks)) + "|",
    ]
    for label, points in curves.items():
        found = [at(points, axis, value) for axis, value, _ in marks]
        cells = ["-" if v is None else f"{v:.3f}" for v in found]
        late = [p[2] for p in points if samples / 2 <= p[0] <= samples]
        cells.append(
            f"{sum(late) / len(late):.3f} ({min(late):.3f}-{max(late):.3f})" if late else "-"
        )  # a very short run
        lines.append(
            f"| {label} | {1e3 * points[-1][1] / points[-1][0]:.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def picture(curves: dict[str, list]) -> Image.Image:
    """Two panels: delta1 by samples, delta1 by seconds."""
    width, height, gap, top = 360, 240, 60, 40
    image = Image.new("RGB", (2 * (width + gap) + 20, height + top + 50), "white")
    draw = ImageDraw.Draw(image)
    values = [p[2] for points in curves.values() for p in points]
    low, high = min(values) - 0.02, max(values) + 0.02
    for axis, name in enumerate(("training samples", "seconds of training")):
        left = gap + axis * (width + gap)
        longest = max(points[-1][axis] for points in curves.values())
        draw.rectangle((left, top, left + width, top + height), outline="black")
        draw.text((left + width // 3, top + height + 28), name, "black")
        for k in range(5):
            x, y = left + width * k // 4, top + height - height * k // 4
            draw.text((x - 8, top + height + 6), f"{longest * k / 4:.0f}", "black")
            draw.text((left - 36, y - 6), f"{low + (high - low) * k / 4:.2f}", "black")
        for label, points in curves.items():
            spots = [
                (left + width * p[axis] / longest, top + height * (high - p[2]) / (high - low))
                for p in points
            ]
            draw.line(spots, COLORS[label.split()[0]], 2)
    for k, (label, color) in enumerate(COLORS.items()):
        draw.text((gap + 140 * k, 12), f"{label}, delta1", color)
    return image


def main(folder: str) -> None:
    out, curves = Path(folder), {}
    for label, name in (("SFT", "sft"), ("GRPO", "l1")):
        for path in sorted(out.glob(f"{name}-*/log.jsonl")):
            points = read_curve(path)
            if points[0][
                0
            ]:  # all start from the same model; GRPO validates it before its first step
                same = out / path.parent.name.replace("sft", "l1")
                first = json.loads((same / "log.jsonl").read_text().splitlines()[0])
                points.insert(0, (0, 0.0, next(iter(first["val"].values()))["delta1"]))
            curves[f"{label} seed {path.parent.name.split('-')[1]}"] = points
    text = f"Finding 2b: SFT against GRPO from the same start, reward l1\n\n{table(curves)}\n"
    (out / "curves.md").write_text(text)
    picture(curves).save(out / "curves.png")
    print(f"\n{text}\n{out}/curves.md, {out}/curves.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
