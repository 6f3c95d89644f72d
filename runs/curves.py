"""
Accuracy against training samples and seconds (Fig. 3b, 4c, 10), from the checks in each run's
log.jsonl -> NAME.md, NAME.png: a table and pictures for each validation set, and with several sets
for their average.

    python runs/curves.py out/fig4c "Fig. 4c" 3B=ckpt/sft_3b
    python runs/curves.py out/finding2/curves "SFT against GRPO" SFT=out/finding2/sft-1 \
        GRPO=out/finding2/l1-1
"""
import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import render  # noqa: E402

COLORS = [(40, 90, 200), (200, 60, 40), (40, 150, 70), (150, 80, 180), (120, 120, 120)]
WIDTH, HEIGHT, GAP, TOP = 360, 240, 60, 40  # of a picture, px

Point = tuple[float, float, float]  # training samples, seconds of training so far, delta1


def batch_size(run: Path) -> float:
    """Training samples (of GRPO: prompts) an optimizer step."""
    flags = render.read_json(run / "run.json")["flags"]
    if flags.get("batch_of") == "answers":
        return flags["batch"] / flags["group"]
    return flags["batch"]


def read_run(run: Path) -> dict[str, list[Point]]:
    """-> validation set -> its checks. Sets that are checked together also have an "average"."""
    batch, seconds = batch_size(run), 0.0
    curves: dict[str, list[Point]] = {}
    for _, line in render.read_jsonl(run / "log.jsonl", interrupted=True):
        if "val" in line:
            scores = {name: score["delta1"] for name, score in line["val"].items()}
            if len(scores) > 1:
                scores["average"] = sum(scores.values()) / len(scores)
            for name, delta1 in scores.items():
                curves.setdefault(name, []).append((line["step"] * batch, seconds, delta1))
        elif "rollout_s" in line:
            seconds += line["rollout_s"] + line["update_s"] + line["wait_s"]
        else:
            seconds += batch / line["samples_per_s"]
    if not curves:
        raise ValueError(f"{run}/log.jsonl: no accuracy was checked on the way. Train with "
                         "--val-every.")
    return curves


def same_start(curves: dict[str, list[Point]]) -> None:
    """GRPO checks the model before its first step; a run from the same model starts there, too."""
    starts = [points[0] for points in curves.values() if points[0][0] == 0]
    for points in curves.values():
        if starts and points[0][0] > 0:
            points.insert(0, starts[0])


def reached(points: list[Point], axis: int, value: float) -> str:
    """delta1 of the last check at or before that many samples (axis 0) or seconds (axis 1)."""
    before = [point for point in points if point[axis] <= value]
    return f"{before[-1][2]:.3f}" if before and points[-1][axis] >= value else "-"


def table(curves: dict[str, list[Point]]) -> str:
    """A line a run: what the same samples and the same seconds give, and all checks over the later
    half of the samples that all runs saw, since greedy answers come and go from check to check."""
    samples, seconds = (min(points[-1][axis] for points in curves.values()) for axis in (0, 1))
    marks = [(0, share * samples, f"{share * samples:.0f} samples") for share in (0.1, 0.2, 0.5, 1)]
    marks += [(1, share * seconds, f"{share * seconds:.0f} s") for share in (0.1, 0.2, 0.5, 1)]
    header = ["run", "ms a sample", *(f"delta1 at {text}" for *_, text in marks),
              f"mean (lowest-highest) at {samples / 2:.0f}-{samples:.0f} samples"]
    lines = [header, ["---"] * len(header)]
    for label, points in curves.items():
        late = [delta1 for at, _, delta1 in points if samples / 2 <= at <= samples]
        spread = f"{sum(late) / len(late):.3f} ({min(late):.3f}-{max(late):.3f})" if late else "-"
        cost = 1e3 * points[-1][1] / max(points[-1][0], 1)
        lines.append([label, f"{cost:.1f}",
                      *(reached(points, axis, value) for axis, value, _ in marks), spread])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(title: str, curves: dict[str, list[Point]]) -> Image.Image:
    """Two panels: delta1 by samples, delta1 by seconds."""
    image = Image.new("RGB", (2 * (WIDTH + GAP) + 20, HEIGHT + TOP + 50), "white")
    draw = ImageDraw.Draw(image)
    values = [delta1 for points in curves.values() for *_, delta1 in points]
    low, high = min(values) - 0.02, max(values) + 0.02
    for axis, axis_title in enumerate(("training samples", "seconds of training")):
        left = GAP + axis * (WIDTH + GAP)
        longest = max(points[-1][axis] for points in curves.values()) or 1
        draw.rectangle((left, TOP, left + WIDTH, TOP + HEIGHT), outline="black")
        draw.text((left + WIDTH // 3, TOP + HEIGHT + 28), axis_title, "black")
        for k in range(5):
            x, y = left + WIDTH * k // 4, TOP + HEIGHT - HEIGHT * k // 4
            draw.text((x - 8, TOP + HEIGHT + 6), f"{longest * k / 4:.0f}", "black")
            draw.text((left - 36, y - 6), f"{low + (high - low) * k / 4:.2f}", "black")
        for points, color in zip(curves.values(), color_of(curves)):
            draw.line([(left + WIDTH * point[axis] / longest,
                        TOP + HEIGHT * (high - point[2]) / (high - low)) for point in points],
                      color, 2)
    draw.text((8, 4), f"{title}: delta1", "black")
    for k, (label, color) in enumerate(zip(curves, color_of(curves))):
        draw.text((GAP + 110 * k, 20), label, color)
    return image


def color_of(labels) -> list[tuple]:
    """Seeds of one kind of run (SFT-1, SFT-2) have one colour."""
    kinds = list(dict.fromkeys(label.rpartition("-")[0] or label for label in labels))
    return [COLORS[kinds.index(label.rpartition("-")[0] or label) % len(COLORS)]
            for label in labels]


def labelled_run(text: str) -> tuple[str, Path]:
    """An argparse type: LABEL=FOLDER."""
    label, _, folder = text.partition("=")
    if not (label and folder):
        raise argparse.ArgumentTypeError(f"{text} is not LABEL=FOLDER")
    return label, Path(folder)


@render.command
def main(argv=None) -> None:
    parser = render.make_parser(__doc__)
    flag = parser.add_argument
    flag("name", type=render.file_path, help="of the table and the picture, without an ending")
    flag("title", help="of both")
    flag("runs", type=labelled_run, nargs="+", metavar="LABEL=RUN", help="folders of trainings")
    args = parser.parse_args(argv)

    found = {label: read_run(run) for label, run in args.runs}
    sets = [name for name in next(iter(found.values()))
            if all(name in curves for curves in found.values())]
    if not sets:
        raise ValueError(f"{args.runs[0][1]}: shares no validation set with the other runs. Give "
                         "all of them the same --val.")
    texts, pictures = [args.title], []
    for name in sets:
        curves = {label: curves[name] for label, curves in found.items()}
        same_start(curves)
        texts.append(f"{name}\n\n{table(curves)}")
        pictures.append(picture(f"{args.title}, {name}", curves))
    text = "\n\n".join(texts) + "\n"
    render.write_text(f"{args.name}.md", text)

    sheet = Image.new("RGB", (pictures[0].width, sum(image.height for image in pictures)))
    for k, image in enumerate(pictures):
        sheet.paste(image, (0, k * image.height))
    with render.replacing(f"{args.name}.png") as temporary:
        sheet.save(temporary, "PNG")
    print(f"\n{text}\n{args.name}.md, {args.name}.png")


if __name__ == "__main__":
    main()
