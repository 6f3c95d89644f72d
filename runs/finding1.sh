#!/usr/bin/env bash
# Finding 1 (Sec. 3.1, Fig. 2): models understand a marker on the image better than coordinates in the text.
cd "$(dirname "$0")/.." && . runs/finding.sh
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
# whole images, as in evaluation: coordinates that no crop has would be new to it
train="train_sft.py @runs/toy.args $size --data data/toy/train.jsonl --samples $samples --val-every 0 --crop 112 112 112 112"
variant arrow data/toy $train --marker arrow
variant cross data/toy $train --marker cross
variant dot data/toy $train --marker dot
variant text data/toy $train --prompt text
run_variants
python runs/findings.py "out/$name/table" "Finding 1: how the pixel is named" arrow cross dot text
