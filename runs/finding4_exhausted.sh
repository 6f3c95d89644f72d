#!/usr/bin/env bash
# Finding 4 where few images can be exhausted (Sec. 3.3, Fig. 5): in daylight, all 100 points of 20, 160 and 2,600
# images, again and again, for the same number of samples, from a model that can see and answer, which is that of toy.sh
# (--gpu: a larger one). Each is scored on new rooms, and on the very images that it was trained on: only where the second
# is far better than the first have the images been used up. Tables: unseen.md, trained.md.
cd "$(dirname "$0")/.." && . runs/finding.sh
[ -z "$paper" ] || { echo "error: $0 has no --paper: Fig. 5 is finding4.sh" >&2; exit 2; }
ambient=data/toy_daylight numbers="2600 160 20" from=ckpt/toy
world data/toy
world $ambient --light ambient --seed 1
train="train_sft.py @runs/toy.args $size --samples $samples --val-every 0"
if [ "$gpu" ]; then
  from=out/$name/start-0
  start start data/toy $train --data data/toy/train.jsonl
  run_variants
elif ! [ -f $from/eval/metrics.json ] && ! [ "$list" ]; then
  bash runs/toy.sh
fi
labels=
for n in $numbers; do
  few=data/toy_daylight_$n/trained labels="$labels images-$n"
  if ! [ "$list" ]; then  # spread over the file, for neighbours are views of one room
    mkdir -p $few
    awk -v every=$((2600 / n)) -v n=$n '(NR - 1) % every == 0 && k++ < n' $ambient/train.jsonl |
      sed 's|"rgb/|"../../toy_daylight/rgb/|' > $few/val.jsonl
  fi
  variant images-$n $ambient,$few $train --data $few/val.jsonl \
    --model "$from" --lr 1e-3 --crop 112 112 112 112
done
run_variants
table unseen "Finding 4, unseen rooms: all points of so many images" $labels --dataset toy_daylight
table trained "Finding 4, the images trained on" $labels --dataset trained
