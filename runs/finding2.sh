#!/usr/bin/env bash
# Finding 2 (Sec. 3.2, Fig. 3, App. A.3): (a) GRPO with four rewards, (b) SFT against GRPO by training samples and by
# seconds. On the toy world all go on from one model that was stopped early in SFT with the think/answer prompt, with
# batch 32 and the same constant learning rate: App. A.4 makes the two alike, and each point of a curve is then a run
# that could have ended there. SFT gets four times the samples, for the comparison by seconds. --paper: from the base
# model, on Argoverse2, checked on NuScenes, too (Fig. 10). Tables: rewards.md, curves.md.
cd "$(dirname "$0")/.." && . runs/finding.sh
rewards="l1 l2 absrel delta1"
if [ "$paper" ]; then
  both=data/argoverse2,data/nuscenes
  check="--val data/argoverse2/val.jsonl data/nuscenes/val.jsonl --val-every 50 --val-queries 1024"
  for reward in $rewards; do
    variant $reward $both train_grpo.py @runs/grpo_3b.args $length --reward $reward $check
  done
  variant sft $both train_sft.py @runs/fig3_sft.args $length $check
else
  world data/toy
  more=$((samples / 10)) check="--val-every 10 --val-queries 1000 --val-batch 50"
  sft="train_sft.py @runs/toy.args $size --data data/toy/train.jsonl --prompt release"
  start start data/toy $sft --samples $((samples / 2)) --val-every 0
  run_variants
  for reward in $rewards; do
    variant $reward data/toy train_grpo.py @runs/toy_grpo.args --model "out/$name/start-0" --samples $more --reward $reward $check
  done
  variant sft data/toy $sft --model "out/$name/start-0" --samples $((4 * more)) --batch 32 --lr 3e-4 --schedule constant \
    --warmup 0 $check
  rewards="$rewards start"
fi
run_variants
table rewards "Finding 2a: rewards of GRPO" $rewards
curves=
for seed in $(seq "$seeds"); do
  curves="$curves SFT-$seed=out/$name/sft-$seed GRPO-$seed=out/$name/l1-$seed"
done
[ "$list" ] || python runs/curves.py "out/$name/curves" "Finding 2b: SFT against GRPO, reward l1" $curves
