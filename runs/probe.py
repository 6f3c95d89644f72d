"""
What fine-tuning leaves of other abilities: plain questions to a model, before and after.

    python runs/probe.py BASE --questions runs/probe.jsonl --out out/base
    python runs/probe.py ckpt/x --questions out/base/probe.jsonl         # against those answers

Reads chat lines {"question", "image" (optional), "answer" (optional)}, writes them with this
model's "answer" and "loss" to probe.jsonl; an answer that was there becomes "before".
"""
import sys
from difflib import SequenceMatcher
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import render  # noqa: E402
import train_sft  # noqa: E402


@torch.no_grad()
def probe(model, checkpoint: render.Checkpoint, chats: list[dict]) -> list[dict]:
    """-> the chats with the "answer" of this model, and its "loss" (nats a token) on the answer
    that was there, which is then in "before", or on its own."""
    limit = checkpoint.settings["max_new_tokens"]
    lines = []
    for chat in tqdm(chats, desc="probe", disable=None, dynamic_ncols=True):
        question, views = chat["question"], train_sft.chat_views(chat, checkpoint.grid)
        prompt = render.encode(checkpoint, views, question)
        tokens, _ = evaluate.greedy_answers(
            model, checkpoint, evaluate.pack_prompts(checkpoint, [prompt]), limit)
        answer = checkpoint.text(tokens[0])

        former = chat.get("answer", answer)
        targets = checkpoint.tokens(former) or [checkpoint.end_id]
        batch = render.pack([render.encode(checkpoint, views, question, targets)])
        loss = train_sft.answer_losses(model, checkpoint, batch, model.device).mean().item()

        before = {"before": former} if "answer" in chat else {}
        lines.append({**chat, **before, "answer": answer, "loss": round(loss, 4)})
    return lines


def summarize(lines: list[dict]) -> str:
    loss = sum(line["loss"] for line in lines) / len(lines)
    known = [line for line in lines if "before" in line]
    if not known:
        return f"{len(lines)} questions, loss on its own answers {loss:.3f} nats a token"
    pairs = [(line["answer"].split(), line["before"].split()) for line in known]
    same = sum(answer == before for answer, before in pairs) / len(pairs)
    shared = sum(SequenceMatcher(None, *pair).ratio() for pair in pairs) / len(pairs)
    return (f"{len(lines)} questions: {same:.3f} answered as before, {shared:.3f} of the words in "
            f"common, loss on the former answers {loss:.3f} nats a token")


def default_out(checkpoint: str) -> Path:
    folder = Path(checkpoint)
    return folder / "eval" if folder.is_dir() else Path("out") / checkpoint.replace("/", "--")


@render.command
def main(argv=None) -> None:
    parser = render.make_parser(__doc__)
    flag = parser.add_argument
    flag("checkpoint", help="model folder or hub name")
    flag("--questions", type=render.file_path, default="runs/probe.jsonl", metavar="FILE",
         help="chat lines, or the probe.jsonl of another model")
    flag("--out", type=render.file_path, metavar="DIR",
         help="folder for probe.jsonl; default: <checkpoint>/eval")
    flag("--max-new-tokens", type=render.COUNT,
         help="tokens an answer may have; default: as the checkpoint was trained, else 128")
    flag("--device", default="auto", help="such as cpu or cuda:1; auto: a GPU if there is one")
    flag("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
         help="auto: bfloat16 on a GPU, float32 elsewhere")
    args = parser.parse_args(argv)

    path = Path(args.out or default_out(args.checkpoint)) / "probe.jsonl"
    if path.resolve() == Path(args.questions).resolve():
        raise ValueError(f"{args.questions}: would be written over by what it is compared with. "
                         "Give another --out.")
    chats = train_sft.read_chats(args.questions, answers=False)
    checkpoint = render.open_checkpoint(args.checkpoint, {"max_new_tokens": args.max_new_tokens})
    device = evaluate.pick_device(args.device)
    model = evaluate.load_model(checkpoint, device, evaluate.pick_dtype(args.dtype, device))
    lines = probe(model, checkpoint, chats)
    render.write_jsonl(path, lines)
    print(f"{args.checkpoint}: {summarize(lines)}\n{path}")


if __name__ == "__main__":
    main()
