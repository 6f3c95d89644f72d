#!/usr/bin/env bash
# Finding 3 (Sec. 3.3, Fig. 4a, b): cameras of several focal lengths are told apart best by unifying the focal length in
# the image; and how long that should be. Daylight: without the lamp on the camera only geometry tells a distance.
cd "$(dirname "$0")/.." && . runs/finding.sh
data=data/toy_ambient
[ -f "$data/val.jsonl" ] || python prepare.py --dataset toy --light ambient --out "$data"
for camera in unify none prompt ray; do
  variant "$camera" "$data" --camera "$camera"
done
variant focal-60 "$data" --focal 60 --crop 50 67 50 67
variant focal-140 "$data" --focal 140 --crop 118 157 118 157
python runs/findings.py "out/$name" "Finding 3a: camera strategies" unify none prompt ray
mv "out/$name/table.md" "out/$name/table_a.md" && mv "out/$name/picture.png" "out/$name/picture_a.png"
for seed in $(seq 0 $((seeds - 1))); do
  ln -sfn "unify-$seed" "out/$name/focal-100-$seed"
done
python runs/findings.py "out/$name" "Finding 3b: unified focal length (focal-100 is unify)" focal-60 focal-100 focal-140
