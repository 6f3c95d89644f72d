#!/usr/bin/env bash
# Finding 1 (Sec. 3.1, Fig. 2): models understand a marker on the image better than coordinates in the text.
cd "$(dirname "$0")/.." && . runs/finding.sh
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
variant arrow data/toy --marker arrow
variant cross data/toy --marker cross
variant dot data/toy --marker dot
variant text data/toy --prompt text
python runs/findings.py "out/$name" "Finding 1: how the pixel is named" arrow cross dot text
