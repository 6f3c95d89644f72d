#!/usr/bin/env bash
# Everything on a CPU in about five minutes: rooms, a tiny model from scratch, its score on unseen rooms, a point cloud.
# Two processes of one thread each are faster on two cores than one of two. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python prepare.py --dataset toy
torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --resume
python evaluate.py ckpt/toy --data data/toy/val.jsonl
python pointcloud.py ckpt/toy data/toy/val.jsonl --record 17 --out out/toy --overwrite
