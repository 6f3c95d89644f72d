#!/usr/bin/env bash
# What a GPU makes of it, in one call of at most 8 minutes on one H100 or H200: is it right, how fast
# is it, and what does each measure bring. No downloads, no packages but the six.
#     bash tests/gpu_check.sh                  # everything, the most valuable first; results in $OUT
#     LIMIT=240 bash tests/gpu_check.sh speed  # some of: world right speed toy larger
#     CHECK_TINY=1 bash tests/gpu_check.sh     # the same with tiny sizes on a CPU
# Each step has a limit, and one that fails does not stop the next. The summary comes last.
set -u
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/out/gpu_check} WORK=${WORK:-$(mktemp -d)} LIMIT=${LIMIT:-470}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD/tests:$PWD"
toy= toy_flags="--workers 8" larger_flags="--workers 8" queries="--queries 2000" slower=1
if [ "${CHECK_TINY:-}" ]; then
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1
  LIMIT=900 slower=4 toy="--images 24 --val-images 8" queries="--queries 8 --max-new-tokens 9"
  toy_flags="--samples 64 --val-every 9 --val-queries 2 --workers 0 --dtype bfloat16"
  larger_flags="$toy_flags --batch 8 --micro-batch 8 --samples 16"
fi
mkdir -p "$OUT" "$WORK"
: > "$OUT/log.txt"
: > "$OUT/summary.txt"
say() { echo "[$SECONDS s] $*" | tee -a "$OUT/log.txt" "$OUT/summary.txt"; }

step() { # name, seconds that it may take, command
  local name=$1 most=$(($2 * slower)) left=$((LIMIT - SECONDS)) code
  shift 2
  [[ " $wanted " == *" $name "* ]] || return 0
  [ "$left" -lt 20 ] && { say "== $name: no time left"; return 0; }
  [ "$most" -gt "$left" ] && most=$left
  say "== $name, at most $most s"
  SECONDS_LEFT=$most timeout -k 5 "$most" "$@" > "$WORK/$name.log" 2>&1
  code=$?
  cat "$WORK/$name.log" >> "$OUT/log.txt"
  grep -aE '^(PASS|FAIL|NOTE|RESULT)' "$WORK/$name.log" | cut -c1-300 | tee -a "$OUT/summary.txt"
  if [ $code -ne 0 ]; then
    say "FAIL $name ended with code $code (124: out of time): $(tail -n 1 "$WORK/$name.log" | cut -c1-200)"
  fi
}

train() { # name, seconds that it leaves for what follows, flags
  local name=$1 most=$((SECONDS_LEFT - SECONDS - $2)) code
  shift 2
  timeout "$most" python train_sft.py @runs/toy.args --out "$WORK/$name" \
    --data "$WORK/data/train.jsonl" "$@"
  code=$?
  cp "$WORK/$name/log.jsonl" "$OUT/$name.jsonl" || return 1
  grep -h '"val"' "$OUT/$name.jsonl" | tail -n 3 | sed "s/^/RESULT $name: /"
  grep -h '"loss"' "$OUT/$name.jsonl" | tail -n 1 | sed "s/^/RESULT $name: /"
  [ $code -eq 0 ] || [ $code -eq 124 ] # its time was up
}

toy_world() {
  python prepare.py --dataset toy --out "$WORK/data" $toy
  python runs/toy_model.py "$WORK/tiny"
  train toy 25 --model "$WORK/tiny" $toy_flags || return
  python evaluate.py "$WORK/toy" --data "$WORK/data/val.jsonl" $queries --workers 0 |
    head -n 4 | sed 's/^/RESULT toy: /'
}

larger_toy() { # the model of runs/finding.sh --gpu
  python runs/toy_model.py "$WORK/larger_model" --hidden 384 --heads 6 --vision-layers 4 \
    --text-layers 4 --init-std 0.04
  train larger 8 --model "$WORK/larger_model" --lr 1e-3 --batch 64 --micro-batch 64 \
    --samples 400e3 --val-every 250 --save-every 100000 $larger_flags
}

wanted=${*:-world right speed toy larger}
export -f toy_world larger_toy train
export toy toy_flags larger_flags queries
step world 45 python tests/gpu_check.py world
# without it a world of one is started as torchrun would
[ -f "$WORK/no_hash_store" ] && export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
  MASTER_PORT=29511
step right 110 python tests/gpu_check.py right
step speed 200 python tests/gpu_check.py speed
step toy 100 bash -c toy_world
step larger 150 bash -c larger_toy
say "done"
echo
echo "---- summary"
cat "$OUT/summary.txt"
