#!/usr/bin/env bash
# Finding 3 (Sec. 3.3, Fig. 4a, b): cameras of several focal lengths are told apart best by unifying the focal length in
# the image; and how long that should be. Daylight, so that only geometry tells a distance, and images of one size, so that
# the size of an image does not give its camera away; whole images, for a crop of so few pixels hides the geometry. As in
# the paper all go on from a model that can see and answer: it was trained in rooms with the lamp, where brightness tells
# the distance, on images of many focal lengths as they are, so it favours no strategy. (a) four focal lengths, (b) three
# unified ones, (c) 41 focal lengths in training and 40 others in evaluation.
cd "$(dirname "$0")/.." && . runs/finding.sh
few=data/toy_focals_few many=data/toy_focals_many prepare="python prepare.py --dataset toy --light ambient --seed 1"
[ -f data/toy/val.jsonl ] || python prepare.py --dataset toy
[ -f $few/val.jsonl ] || $prepare --focals 80 100 133.3333 200 --out $few
[ -f $many/train.jsonl ] || $prepare --split train --focals $(seq 80 3 200) --out $many
[ -f $many/val.jsonl ] || $prepare --split val --focals $(seq 81 3 199) --out $many
train="train_sft.py @runs/toy.args $size --samples $samples --val-every 0"
start start data/toy $train --data data/toy/train.jsonl --camera none
run_variants
train="$train --model out/$name/start-0 --lr 1e-3 --crop 280 280 280 280"
for camera in unify none prompt ray; do
  variant $camera $few $train --data $few/train.jsonl --camera $camera
done
for focal in 50 150; do
  variant focal-$focal $few $train --data $few/train.jsonl --camera unify --focal $focal
done
for camera in unify none prompt; do
  variant many-$camera $many $train --data $many/train.jsonl --camera $camera
done
run_variants
python runs/findings.py "out/$name/strategies" "Finding 3a: camera strategies" unify none prompt ray
for seed in $(seq "$seeds"); do ln -sfn "unify-$seed" "out/$name/focal-100-$seed"; done
python runs/findings.py "out/$name/focal" "Finding 3b: unified focal length" focal-100 focal-50 focal-150
python runs/findings.py "out/$name/many" "Finding 3c: 41 cameras, 40 others in evaluation" many-unify many-none many-prompt
