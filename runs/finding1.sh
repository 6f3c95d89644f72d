#!/usr/bin/env bash
# Finding 1 (Sec. 3.1, Fig. 2): models understand a marker on the image better than coordinates in the text.
cd "$(dirname "$0")/.." && . runs/finding.sh
if [ "$paper" ]; then
  sets="argoverse2 scannetpp" train="train_sft.py @runs/fig2.args"
else
  # whole images, as in evaluation: coordinates that no crop has would be new to it
  sets=toy train="train_sft.py @runs/toy.args $size --val-every 0 --crop 112 112 112 112"
  world data/toy
fi
for set in $sets; do
  for marker in arrow cross dot; do
    variant $set-$marker data/$set $train --data data/$set/train.jsonl $length --marker $marker
  done
  variant $set-text data/$set $train --data data/$set/train.jsonl $length --prompt text
done
run_variants
for set in $sets; do
  table $set "Finding 1, $set: how the pixel is named" $set-arrow $set-cross $set-dot $set-text
done
