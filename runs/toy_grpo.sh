#!/usr/bin/env bash
# GRPO on a CPU in about five minutes: a tiny model whose SFT was stopped early, its greedy score on
# unseen rooms before and after, and the difference on the same points with its interval. An
# interrupted run resumes when the command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
python runs/toy_model.py out/tiny
torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --prompt release \
    --samples 16e3 --val-every 0 --out ckpt/toy_early
torchrun --standalone --nproc-per-node 2 train_grpo.py @runs/toy_grpo.args
for run in toy_early toy_grpo; do
    python evaluate.py ckpt/$run --data data/toy/val.jsonl --queries 2000
done
python runs/compare.py ckpt/toy_grpo/eval/predictions.jsonl ckpt/toy_early/eval/predictions.jsonl
