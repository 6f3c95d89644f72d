#!/usr/bin/env bash
# Finding 4 (Sec. 3.3, Fig. 5): images count for more than labels an image. The same number of samples: 1 point of each
# of 32,000 images, 10 of 3,200, 100 of 320. scratch: from nothing, in rooms with the lamp. pretrained: as in the paper
# from a model that can see and answer, trained in rooms with the lamp, in rooms that are new to it: in daylight. few: the
# same with an eighth of the samples, so that 100 points an image leave only 40 images. One point an image needs as many
# images, about two minutes for each world.
cd "$(dirname "$0")/.." && . runs/finding.sh
lamp=data/toy_$samples ambient=data/toy_ambient_$samples
[ -f "$lamp/val.jsonl" ] || python prepare.py --dataset toy --images "$samples" --out "$lamp"
[ -f "$ambient/val.jsonl" ] || python prepare.py --dataset toy --light ambient --seed 1 --images "$samples" --out "$ambient"
train="train_sft.py @runs/toy.args $size --val-every 0"
start start $lamp $train --data $lamp/train.jsonl --samples $((samples * 3 / 2))
for k in 1 10 100; do
  variant scratch-$k $lamp $train --data $lamp/train.jsonl --samples "$samples" --points-per-image $k
done
run_variants
train="$train --data $ambient/train.jsonl --model out/$name/start-0 --lr 1e-3 --crop 112 112 112 112"
for k in 1 10 100; do
  variant pretrained-$k $ambient $train --samples "$samples" --points-per-image $k
  variant few-$k $ambient $train --samples $((samples / 8)) --points-per-image $k
done
run_variants
for way in scratch pretrained few; do
  python runs/findings.py "out/$name/$way" "Finding 4, $way: points an image" $way-1 $way-10 $way-100
done
