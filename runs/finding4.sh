#!/usr/bin/env bash
# Finding 4 (Sec. 3.3, Fig. 5): images count for more than labels an image. The same number of samples: 1 point of each
# of 32,000 images, 10 of 3,200, 100 of 320. scratch: from nothing, in rooms with the lamp. pretrained: as in the paper
# from a model that can see and answer, trained in rooms with the lamp, in rooms that are new to it: in daylight. images:
# as scratch, but with all 100 points of 20, 80 and 320 images, again and again: how many images there must be.
# One point an image needs as many images, about two minutes for each world. --paper: 80K samples of Argoverse2.
cd "$(dirname "$0")/.." && . runs/finding.sh
if [ "$paper" ]; then
  for k in 1 10 100; do
    variant points-$k data/argoverse2 train_sft.py @runs/fig5.args $length --points-per-image $k
  done
  run_variants
  table points "Finding 4: points an image" points-1 points-10 points-100
  exit
fi
lamp=data/toy_$samples ambient=data/toy_ambient_$samples
world $lamp --images "$samples"
world $ambient --light ambient --seed 1 --images "$samples"
train="train_sft.py @runs/toy.args $size --val-every 0"
start start $lamp $train --data $lamp/train.jsonl --samples $((samples * 3 / 2))
for k in 1 10 100; do
  variant scratch-$k $lamp $train --data $lamp/train.jsonl --samples "$samples" --points-per-image $k
done
for n in 20 80 320; do  # spread over the file, for neighbours are views of one room
  [ "$list" ] || awk -v every=$((samples / n)) -v n=$n '(NR - 1) % (every ? every : 1) == 0 && k++ < n' \
    $lamp/train.jsonl > $lamp/of_$n.jsonl
  variant images-$n $lamp $train --data $lamp/of_$n.jsonl --samples "$samples"
done
run_variants
for k in 1 10 100; do
  variant pretrained-$k $ambient $train --data $ambient/train.jsonl --samples "$samples" --points-per-image $k \
    --model "out/$name/start-0" --lr 1e-3 --crop 112 112 112 112
done
run_variants
table scratch "Finding 4, scratch: points an image" scratch-1 scratch-10 scratch-100
table pretrained "Finding 4, pretrained: points an image" pretrained-1 pretrained-10 pretrained-100
table images "Finding 4, images: all points of so many" scratch-1 images-20 images-80 images-320
