#!/usr/bin/env bash
# The quick start, on two CPU cores in about three minutes: rooms, a tiny model trained from scratch in
# two of them, its score on unseen rooms, a point cloud. Two processes of one thread each are faster on two cores than one
# process of two. --gpu: one process a GPU, in bfloat16, in which packed attention is one kernel; not
# yet run. An interrupted run resumes when the command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=gpu more="--workers 4"
if [ "${1:-}" != --gpu ]; then
    processes=2 more=
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
fi
python prepare.py --dataset toy
python runs/toy_model.py out/tiny
torchrun --standalone --nproc-per-node $processes train_sft.py @runs/toy.args $more
python evaluate.py ckpt/toy --data data/toy/val.jsonl
python pointcloud.py ckpt/toy data/toy/val.jsonl --record 17 --out out/toy
