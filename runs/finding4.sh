#!/usr/bin/env bash
# Finding 4 (Sec. 3.3, Fig. 5): images count for more than labels an image. The same number of samples: 1 point of each
# of 32,000 images, 10 of 3,200, 100 of 320. One point an image needs as many images, about 6 minutes of one core.
cd "$(dirname "$0")/.." && . runs/finding.sh
data=data/toy_$samples
[ -f "$data/val.jsonl" ] || python prepare.py --dataset toy --images "$samples" --out "$data"
for k in 1 10 100; do
  variant "points-$k" "$data" --points-per-image "$k"
done
python runs/findings.py "out/$name" "Finding 4: points an image at $samples samples" points-1 points-10 points-100
