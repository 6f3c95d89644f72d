#!/usr/bin/env bash
# Finding 2 (Sec. 3.2, Fig. 3): (a) GRPO with four rewards, (b) SFT against GRPO by training samples and by seconds.
# All go on from one model that was stopped early in SFT with the think/answer prompt, with batch 32 and the same
# constant learning rate: App. A.4 makes the two alike, and each point of a curve is then a run that could have ended
# there. SFT gets four times the samples, for the comparison by seconds. Tables: rewards.md, curves.md.
cd "$(dirname "$0")/.." && . runs/finding.sh
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
more=$((samples / 10)) check="--val-every 10 --val-queries 1000 --val-batch 50"
sft="train_sft.py @runs/toy.args $size --data data/toy/train.jsonl --prompt release"
start start data/toy $sft --samples $((samples / 2)) --val-every 0
run_variants
for reward in l1 l2 absrel delta1; do
  variant $reward data/toy train_grpo.py @runs/toy_grpo.args --model "out/$name/start-0" --samples $more --reward $reward $check
done
variant sft data/toy $sft --model "out/$name/start-0" --samples $((4 * more)) --batch 32 --lr 3e-4 --schedule constant \
  --warmup 0 $check
run_variants
python runs/findings.py "out/$name/rewards" "Finding 2a: rewards of GRPO, $more prompts" l1 l2 absrel delta1 start
python runs/finding2.py "out/$name"
