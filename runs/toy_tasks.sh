#!/usr/bin/env bash
# Six tasks in one model (Sec. 3.4, Tables 3 and 6) on a CPU in about eight minutes: the model of
# toy.sh is trained further on all of them in equal parts. Two-point distance also from its two
# single answers by geometry, and the difference on the same pairs. An interrupted run resumes when
# the command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
[ -f ckpt/toy/eval/metrics.json ] || bash runs/toy.sh
torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --model ckpt/toy \
    --out ckpt/toy_tasks --tasks distance axis speed time two_point motion --samples 128e3 \
    --lr 2e-3 --val-every 0 --resume
evaluate="python evaluate.py ckpt/toy_tasks --data data/toy/val.jsonl --queries 2000"
$evaluate
$evaluate --tasks two_point --two-point geometry
python runs/compare.py ckpt/toy_tasks/eval/predictions.jsonl \
    ckpt/toy_tasks/eval_geometry/predictions.jsonl
