#!/usr/bin/env bash
# What fine-tuning leaves of other abilities, on a CPU in about five minutes: a tiny model learns
# sums beside distances (runs/toy_chat.jsonl), then distances in another light, once alone and once
# with a tenth of sums mixed in. Queried before and after: how many answers stay the same, and the
# loss on those given before. An interrupted run resumes when the command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
out=out/toy_probe new=data/toy_ambient
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
[ -f $new/val.jsonl ] || python prepare.py --dataset toy --light ambient --out $new
python runs/toy_model.py out/tiny
train="torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --val-every 0"
$train --mix runs/toy_chat.jsonl:0.3 --samples 32e3 --out $out/before
more="--model $out/before --data $new/train.jsonl --samples 9600 --lr 1e-3"
$train $more --out $out/alone
$train $more --mix runs/toy_chat.jsonl:0.1 --out $out/mixed
python runs/probe.py $out/before --questions runs/toy_chat.jsonl
for run in alone mixed; do
    python runs/probe.py $out/$run --questions $out/before/eval/probe.jsonl
done
for run in before alone mixed; do
    python evaluate.py $out/$run --data $new/val.jsonl --queries 2000 --out $out/$run/eval_new
done
