# Sourced by finding1.sh to finding4.sh: how a variant is trained and scored, and where.
#   bash runs/findingN.sh [--gpu | --paper] [--seeds N] [--samples N] [--list] [-- FLAG ...]
# CPU: the toy recipe, as many variants side by side as there are cores, one thread each. --gpu: a
# larger model and 400,000 samples, one variant after another on all GPUs. --paper: the paper's own
# experiment, its recipe and datasets (runs/PAPER.md). --list: print the commands and run nothing.
# FLAGs go to each training, behind its own. An interrupted finding resumes when its command is given
# again. Log, checkpoints, tables and pictures are in out/findingN (out/findingN-gpu, -paper).
# LAUNCH in the environment starts the trainings, in place of torchrun on all GPUs of this machine.
set -euo pipefail
name=$(basename "$0" .sh) gpu= paper= list= seeds=1 samples= extra=
while (($#)); do
  case $1 in
    --gpu) gpu=1 ;;
    --paper) paper=1 ;;
    --list) list=1 ;;
    --seeds) seeds=${2:-}; shift ;;
    --samples) samples=${2:-none}; shift ;;
    --) shift; extra=$*; break ;;
    *) seeds= ;;
  esac
  shift || break
done
if ! [[ $name =~ ^finding[1-4](_[a-z]+)?$ && $seeds =~ ^[1-9][0-9]*$ && ${samples:-1} =~ ^[1-9][0-9]*$ &&
        "$gpu$paper" != 11 ]]; then
  echo "usage: bash runs/findingN.sh [--gpu | --paper] [--seeds N] [--samples N] [--list] [-- FLAG ...]" >&2
  exit 2
fi

jobs=1 tiny= size= evaluate="--queries 2000 --workers 0"
torchrun="torchrun --standalone --nproc-per-node gpu"
if [ "$paper" ]; then
  name=$name-paper evaluate=
elif [ "$gpu" ]; then
  name=$name-gpu samples=${samples:-400000}
  tiny="--hidden 384 --heads 6 --vision-layers 4 --text-layers 4 --init-std 0.04"
  size="--lr 1e-3 --batch 64 --workers 8"
else
  samples=${samples:-32000} jobs=$(getconf _NPROCESSORS_ONLN) torchrun=python
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
fi
export LAUNCH=${LAUNCH:-$torchrun} EVALUATE=$evaluate
length=${samples:+--samples $samples}
mkdir -p "out/$name"
[ "$list" ] || exec > >(tee -a "out/$name/log.txt") 2>&1

# Name, data folders (a,b), script, its recipe and further flags are written down, once for each seed
# from 1 on. A toy variant without a --model of its own starts from a tiny model of its seed.
variant() {
  local label=$1 data=$2 script=$3 recipe=$4 seed model
  shift 4
  for seed in ${only:-$(seq "$seeds")}; do
    model="out/$name/tiny-$seed"
    if [ "$paper" ]; then
      model=
    elif ! [ -d "$model" ] && ! [ "$list" ]; then
      python runs/toy_model.py "$model" --seed "$seed" $tiny >&2  # not a variant
    fi
    echo "out/$name/$label-$seed" "${data//,//val.jsonl,}/val.jsonl" "$script" "$recipe" \
      ${model:+--model "$model"} "$@" $extra --seed "$seed"
  done >> "out/$name/todo"
}

start() { only=0 variant "$@"; }  # what other variants start from: of one seed, which none of them has

run_variants() {  # all that are written down; in the log each line begins with its variant
  if [ "$list" ]; then
    cat "out/$name/todo"
  else
    xargs -P "$jobs" -L 1 bash runs/variant.sh < "out/$name/todo"
  fi
  rm "out/$name/todo"
}

table() {  # file, title, variants: the first against each of the others
  local file=$1
  shift
  [ "$list" ] || python runs/findings.py "out/$name/$file" "$@"
}

world() {  # folder, flags: a toy world, unless it is there or only the commands are wanted
  local folder=$1
  shift
  [ -f "$folder/val.jsonl" ] || [ "$list" ] || python prepare.py --dataset toy --out "$folder" "$@"
}
rm -f "out/$name/todo"
