# Sourced by finding1.sh to finding4.sh: how a variant is trained and scored, and where.
#   bash runs/findingN.sh [--gpu] [--seeds 3] [--samples 16000]
# CPU: the toy recipe, as many variants side by side as there are cores, one thread each. --gpu: a
# larger model and 400,000 samples, one variant after another on all GPUs. An interrupted finding
# resumes when its command is given again. Log, checkpoints, tables and pictures are in out/findingN
# (out/findingN-gpu).
set -euo pipefail
name=$(basename "$0" .sh) gpu= seeds=1 samples=
while (($#)); do
  case $1 in
    --gpu) gpu=1 ;;
    --seeds) seeds=${2:-}; shift ;;
    --samples) samples=${2:-none}; shift ;;
    *) seeds= ;;
  esac
  shift || break
done
if ! [[ $name =~ ^finding[1-4]$ && $seeds =~ ^[1-9][0-9]*$ && ${samples:-1} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash runs/finding{1,2,3,4}.sh [--gpu] [--seeds N] [--samples N]" >&2
  exit 2
fi
if [ "$gpu" ]; then
  name=$name-gpu samples=${samples:-400000} jobs=1
  export LAUNCH="torchrun --standalone --nproc-per-node gpu"
  tiny="--hidden 384 --heads 6 --vision-layers 4 --text-layers 4 --init-std 0.04"
  size="--lr 1e-3 --batch 64 --workers 8"
else
  samples=${samples:-32000} jobs=$(getconf _NPROCESSORS_ONLN) tiny= size=
  export LAUNCH=python OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
fi
mkdir -p "out/$name"
exec > >(tee -a "out/$name/log.txt") 2>&1

# Name, data folder, script, its recipe and further flags are written down, once for each seed from 1
# on. A variant without a --model of its own starts from a tiny model of its seed.
variant() {
  local label=$1 data=$2 script=$3 recipe=$4 seed
  shift 4
  for seed in ${only:-$(seq "$seeds")}; do
    [ -d "out/$name/tiny-$seed" ] || python runs/toy_model.py "out/$name/tiny-$seed" --seed "$seed" $tiny
    echo "out/$name/$label-$seed" "$data/val.jsonl" "$script" "$recipe" \
      --model "out/$name/tiny-$seed" "$@" --seed "$seed"
  done >> "out/$name/todo"
}

start() { only=0 variant "$@"; }  # what other variants start from: of one seed, which none of them has

run_variants() {  # all that are written down; in the log each line begins with its variant
  xargs -P "$jobs" -L 1 bash runs/variant.sh < "out/$name/todo"
  rm "out/$name/todo"
}
rm -f "out/$name/todo"
