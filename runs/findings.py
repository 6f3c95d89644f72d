"""
The table and the picture of a finding: out/<finding>/<variant>-<seed>/eval/metrics.json -> table.md, picture.png.

    python runs/findings.py out/finding1 "Finding 1: how the pixel is named" arrow cross dot text
"""
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw


def read_variant(out: Path, label: str) -> dict:
    """All seeds of a variant -> delta1 of each, the widest 95 % interval ends over images, best constant."""
    sets = [next(iter(json.loads(path.read_text())["datasets"].values()))
            for path in sorted(out.glob(f"{label}-*/eval/metrics.json"))]
    if not sets:
        raise SystemExit(f"error: {out}/{label}-*/eval/metrics.json: none; run the finding's shell script.")
    return {"delta1": [s["delta1"] for s in sets], "low": min(s["delta1_ci"][0] for s in sets),
            "high": max(s["delta1_ci"][1] for s in sets), "constant": sets[0]["best_constant"]["delta1"]}


def table(rows: dict[str, dict]) -> str:
    lines = ["| variant | delta1 (mean) | each seed | 95 % interval over images | best constant |", "|---" * 5 + "|"]
    for label, row in rows.items():
        mean = sum(row["delta1"]) / len(row["delta1"])
        seeds = " ".join(f"{d:.3f}" for d in row["delta1"])
        lines.append(f"| {label} | {mean:.3f} | {seeds} | {row['low']:.3f}-{row['high']:.3f} | {row['constant']:.3f} |")
    return "\n".join(lines)


def picture(title: str, rows: dict[str, dict]) -> Image.Image:
    """Bars of the mean, the interval as a line, each seed as a dot."""
    left, width, gap = 110, 480, 30
    image = Image.new("RGB", (left + width + 60, 40 + gap * len(rows) + 30), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), f"{title}: delta1 on the toy world", "black")
    for k, (label, row) in enumerate(rows.items()):
        y, mean = 36 + gap * k, sum(row["delta1"]) / len(row["delta1"])
        draw.text((8, y + 3), label, "black")
        draw.rectangle((left, y, left + width * mean, y + 16), fill=(120, 160, 220))
        draw.line((left + width * row["low"], y + 8, left + width * row["high"], y + 8), "black")
        for d in row["delta1"]:
            draw.ellipse((left + width * d - 2, y + 6, left + width * d + 2, y + 10), fill="black")
        draw.text((left + width + 8, y + 3), f"{mean:.3f}", "black")
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        draw.text((left + width * tick - 6, image.height - 26), f"{tick:g}", "black")
    x = left + width * next(iter(rows.values()))["constant"]
    draw.line((x, 34, x, image.height - 30), (200, 0, 0))
    draw.text((x - 40, image.height - 14), "best constant", (200, 0, 0))
    return image


def main(out: str, title: str, *labels: str) -> None:
    rows = {label: read_variant(Path(out), label) for label in labels}
    text = f"{title}\n\n{table(rows)}\n"
    (Path(out) / "table.md").write_text(text)
    picture(title, rows).save(Path(out) / "picture.png")
    print(f"\n{text}\n{out}/table.md, {out}/picture.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
