# Sourced by finding1.sh, finding3.sh and finding4.sh: how a variant is trained and scored, and where.
#   bash runs/findingN.sh [--gpu] [--seeds 3] [--samples 16000]
# CPU: the toy recipe with 32,000 samples a variant. --gpu: a larger model and 400,000 samples on all GPUs. Given again, a
# command goes on where it was. Log, checkpoints, table.md and picture.png are in out/findingN (out/findingN-gpu).
set -euo pipefail
name=$(basename "$0" .sh) gpu= seeds=1 samples=
while (($#)); do
  case $1 in
    --gpu) gpu=1 ;;
    --seeds) seeds=$2; shift ;;
    --samples) samples=$2; shift ;;
    *) echo "usage: bash runs/$name.sh [--gpu] [--seeds N] [--samples N]" >&2; exit 2 ;;
  esac
  shift
done
if [ "$gpu" ]; then
  name=$name-gpu samples=${samples:-400000} launch=(torchrun --standalone --nproc-per-node gpu)
  size=(--samples "$samples" --tiny hidden=384 heads=6 vision_layers=4 text_layers=4 init_std=0.04
        --lr 1e-3 --batch 64 --workers 8)
else  # two processes of one thread are faster on two cores than one process of two
  export OMP_NUM_THREADS=1
  samples=${samples:-32000} launch=(torchrun --standalone --nproc-per-node 2) size=(--samples "$samples")
fi
mkdir -p "out/$name"
exec > >(tee -a "out/$name/log.txt") 2>&1

variant() {  # name, data folder, more flags of train_sft.py
  local label=$1 data=$2 seed out
  shift 2
  for seed in $(seq 0 $((seeds - 1))); do
    out=out/$name/$label-$seed
    if [ ! -f "$out/eval/metrics.json" ]; then
      echo "== $label, seed $seed: $*"
      "${launch[@]}" train_sft.py @runs/toy.args "${size[@]}" --data "$data/train.jsonl" --val-every 0 --seed "$seed" \
        "$@" --out "$out" --resume
      python evaluate.py "$out" --data "$data/val.jsonl" --queries 2000
    fi
  done
}
