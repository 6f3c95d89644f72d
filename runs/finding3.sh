#!/usr/bin/env bash
# Finding 3 (Sec. 3.3, Fig. 4a, b): cameras of several focal lengths are told apart best by unifying the focal length in
# the image; and how long that should be. Daylight, so that only geometry tells a distance, and four fields of view in
# images of one size, so that the size of an image does not give its camera away; whole images, for a crop of so few
# pixels hides the geometry. As in the paper all go on from a model that can see and answer: it was trained in rooms with
# the lamp, where brightness tells the distance, on images of four focal lengths as they are, so it favours no strategy.
cd "$(dirname "$0")/.." && . runs/finding.sh
data=data/toy_lenses
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
[ -f "$data/val.jsonl" ] || python prepare.py --dataset toy --light ambient --lenses four --seed 1 --out "$data"
train="train_sft.py @runs/toy.args $size --samples $samples --val-every 0"
start start data/toy $train --data data/toy/train.jsonl --camera none
run_variants
train="$train --data $data/train.jsonl --model out/$name/start-0 --lr 1e-3 --crop 280 280 280 280"
for camera in unify none prompt ray; do
  variant $camera $data $train --camera $camera
done
for focal in 50 150; do
  variant focal-$focal $data $train --camera unify --focal $focal
done
run_variants
python runs/findings.py "out/$name/strategies" "Finding 3a: camera strategies" unify none prompt ray
for seed in $(seq "$seeds"); do ln -sfn "unify-$seed" "out/$name/focal-100-$seed"; done
python runs/findings.py "out/$name/focal" "Finding 3b: unified focal length" focal-100 focal-50 focal-150
