#!/usr/bin/env bash
# Finding 3 (Sec. 3.3, Fig. 4a, b): cameras of several focal lengths are told apart best by unifying the focal length in
# the image; and how long that should be. Daylight, so that only geometry tells a distance, and images of one size, so that
# the size of an image does not give its camera away; whole images, for a crop of so few pixels hides the geometry. As in
# the paper all go on from a model that can see and answer: it was trained in rooms with the lamp, where brightness tells
# the distance, on images of many focal lengths as they are, so it favours no strategy. (a) four focal lengths, (b) three
# unified ones, (c) 41 focal lengths in training and 40 others in evaluation. finding3_lenses.sh has more cameras.
# --paper: 500K samples of the mixture, all sets in evaluation.
cd "$(dirname "$0")/.." && . runs/finding.sh
if [ "$paper" ]; then
  sets=$(printf 'data/%s,' argoverse2 ddad nuscenes eth3d scannetpp sunrgbd ibims1 nyuv2)
  for camera in unify none prompt ray; do
    variant $camera "${sets%,}" train_sft.py @runs/fig4.args $length --camera $camera
  done
  for focal in 500 750 1250 1500; do  # paper: Fig. 4b's are in the picture alone
    variant focal-$focal "${sets%,}" train_sft.py @runs/fig4.args $length --focal $focal
  done
  for seed in $(seq "$seeds"); do [ "$list" ] || ln -sfn "unify-$seed" "out/$name/focal-1000-$seed"; done
  run_variants
  table strategies "Finding 3a: camera strategies" unify none prompt ray
  table focal "Finding 3b: unified focal length" focal-1000 focal-500 focal-750 focal-1250 focal-1500
  exit
fi
few=data/toy_focals_few many=data/toy_focals_many
world data/toy
world $few --light ambient --seed 1 --focals 80 100 133.3333 200
[ -f $many/train.jsonl ] || world $many --light ambient --seed 1 --split train --focals $(seq 80 3 200)
world $many --light ambient --seed 1 --split val --focals $(seq 81 3 199)
train="train_sft.py @runs/toy.args $size $length --val-every 0"
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
table strategies "Finding 3a: camera strategies" unify none prompt ray
for seed in $(seq "$seeds"); do [ "$list" ] || ln -sfn "unify-$seed" "out/$name/focal-100-$seed"; done
table focal "Finding 3b: unified focal length" focal-100 focal-50 focal-150
table many "Finding 3c: 41 cameras, 40 others in evaluation" many-unify many-none many-prompt
