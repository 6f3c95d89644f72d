#!/usr/bin/env bash
# Finding 2 (Sec. 3.2, Fig. 3): (a) GRPO with four rewards, (b) SFT against GRPO by training samples and by seconds.
# All go on from one model that was stopped early in SFT with the think/answer prompt, with batch 32 and the same
# constant learning rate: App. A.4 makes the two alike, and each point of a curve is then a run that could have ended
# there. SFT gets four times the samples, for the comparison by seconds. Beside finding.sh's files: curves.md, curves.png.
cd "$(dirname "$0")/.." && . runs/finding.sh
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
more=$((samples / 10)) start=out/$name/start-0
check=(--val-every 10 --val-queries 1000 --val-batch 50)

finish() {  # script, folder, flags: train, then score
  local script=$1 out=$2
  shift 2
  if [ ! -f "$out/eval/metrics.json" ]; then
    echo "== $out: $script $*"
    "${launch[@]}" "$script" "$@" --out "$out" --resume
    python evaluate.py "$out" --data data/toy/val.jsonl --queries 2000
  fi
}

finish train_sft.py "$start" @runs/toy.args "${size[@]}" --prompt release --samples $((samples / 2)) --val-every 0
for seed in $(seq 0 $((seeds - 1))); do
  for reward in l1 l2 absrel delta1; do
    finish train_grpo.py "out/$name/$reward-$seed" @runs/toy_grpo.args --model "$start" --samples $more \
      --reward $reward "${check[@]}" --seed $((seed + 1))
  done
  finish train_sft.py "out/$name/sft-$seed" @runs/toy.args --model "$start" --prompt release --samples $((4 * more)) \
    --batch 32 --lr 3e-4 --schedule constant --warmup 0 "${check[@]}" --seed $((seed + 1))
done
python runs/findings.py "out/$name" "Finding 2a: rewards of GRPO, $more prompts" start l1 l2 absrel delta1
python runs/finding2.py "out/$name"
