#!/usr/bin/env bash
# Six tasks in one model (Sec. 3.4, Tables 3 and 6) on two CPU cores in seventeen minutes: the
# model of toy.sh goes on to all of them, in rooms in which a cart drives straight ahead. Whole
# images: a second point, or the second image, is hidden by a crop of so few pixels. Two-point
# distance is the hardest: little of it is learned in the first 50,000 of its samples (FINDINGS.md).
# It is also answered from its two single answers by geometry, and the difference given on the same
# pairs. An interrupted run resumes when the command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
[ -f ckpt/toy/eval/metrics.json ] || bash runs/toy.sh
[ -f data/toy_drive/val.jsonl ] || python prepare.py --dataset toy --drive --out data/toy_drive
torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --model ckpt/toy \
    --out ckpt/toy_tasks --data data/toy_drive/train.jsonl --crop 112 112 112 112 \
    --tasks distance:0.3 axis:0.3 speed:0.5 time:0.5 two_point:4 motion:1 \
    --samples 160e3 --batch 64 --lr 2e-3 --val-every 0
evaluate="python evaluate.py ckpt/toy_tasks --data data/toy_drive/val.jsonl --queries 2000"
$evaluate
$evaluate --tasks two_point --two-point geometry
python runs/compare.py ckpt/toy_tasks/eval/predictions.jsonl \
    ckpt/toy_tasks/eval_geometry/predictions.jsonl
