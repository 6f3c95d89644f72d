#!/usr/bin/env bash
# GRPO on a CPU in about five minutes: a tiny model that was stopped early in SFT, its greedy score on unseen rooms before
# and after, and the difference on the same points with its interval. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
[ -f data/toy/train.jsonl ] || python prepare.py --dataset toy
torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --prompt release --samples 16e3 \
    --val-every 0 --out ckpt/toy_early --resume
torchrun --standalone --nproc-per-node 2 train_grpo.py @runs/toy_grpo.args --resume
for run in toy_early toy_grpo; do
    python evaluate.py ckpt/$run --data data/toy/val.jsonl --queries 2000
done
python - <<'END'
import json
import numpy as np
import evaluate
lines = [[json.loads(t) for t in open(f"ckpt/{run}/eval/predictions.jsonl")] for run in ("toy_early", "toy_grpo")]
true = np.array([line["true"] for line in lines[0]])
before, after = (evaluate.within(np.array([np.nan if line["pred"] is None else line["pred"] for line in x]), true, 1.25)
                 for x in lines)
gain = after.astype(float) - before
low, high = evaluate.interval(gain, np.array([line["image"] for line in lines[0]]))
print(f"greedy delta1 {before.mean():.3f} -> {after.mean():.3f}: {gain.mean():+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
END
