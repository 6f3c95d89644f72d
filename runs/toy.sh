#!/usr/bin/env bash
# The quick start, on a CPU in about five minutes: rooms, a tiny model trained from scratch, its score
# on unseen rooms, a point cloud. Two processes of one thread each are faster on two cores than one
# process of two. An interrupted run resumes when the command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
python prepare.py --dataset toy
python runs/toy_model.py out/tiny
torchrun --standalone --nproc-per-node 2 train_sft.py @runs/toy.args --resume
python evaluate.py ckpt/toy --data data/toy/val.jsonl
python pointcloud.py ckpt/toy data/toy/val.jsonl --record 17 --out out/toy
