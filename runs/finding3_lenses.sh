#!/usr/bin/env bash
# Finding 3 where it can come out otherwise (Sec. 3.3): far more cameras than four, each room its own, with fx unlike fy and
# the centre off the middle, as in a crop; evaluated on new cameras within the range of focal lengths trained on, and beyond
# it. In daylight, on whole images of one size, as finding3.sh. From two models that can see and answer: one knows numbers
# only from its own answers, the other was also trained on chat about numbers (which is larger, what is half), so that
# numbers as text mean something to it before one names a camera. They get twice the samples of a variant. Tables: plain_within.md, plain_beyond.md, chat_within.md,
# chat_beyond.md.
cd "$(dirname "$0")/.." && . runs/finding.sh
[ -z "$paper" ] || { echo "error: $0 has no --paper: Fig. 4a is finding3.sh" >&2; exit 2; }
within=data/toy_lenses beyond=data/toy_lenses_beyond chat=out/$name/numbers.jsonl
world data/toy
world $within --light ambient --seed 1 --lenses 80 160
world $beyond --light ambient --seed 1 --split val --lenses 160 240
if ! [ "$list" ]; then
  awk 'BEGIN {
    srand(1)
    for (k = 0; k < 4000; k++) {
      a = 40 + 260 * rand(); b = 40 + 260 * rand(); larger = (a > b) ? a : b
      if (k % 2) printf("{\"question\": \"Which is larger, %.2f or %.2f?\", \"answer\": \"%.2f\"}\n", a, b, larger)
      else printf("{\"question\": \"What is half of %d.00?\", \"answer\": \"%.2f\"}\n", a, int(a) / 2)
    }
  }' > "$chat"
  head -n 3800 "$chat" > "$chat.train"
  tail -n 200 "$chat" > "$chat.unseen"
fi
train="train_sft.py @runs/toy.args $size $length --val-every 0"
start start-plain data/toy $train --samples $((2 * samples)) --data data/toy/train.jsonl --camera none
start start-chat data/toy $train --samples $((2 * samples)) --data data/toy/train.jsonl --camera none --mix "$chat.train:0.3"
run_variants
[ "$list" ] || python runs/probe.py "out/$name/start-chat-0" --questions "$chat.unseen"
for from in plain chat; do
  for camera in unify none prompt; do
    variant $from-$camera $within,$beyond $train --data $within/train.jsonl --camera $camera \
      --model "out/$name/start-$from-0" --lr 1e-3 --crop 280 280 280 280
  done
done
run_variants
for from in plain chat; do
  for range in within beyond; do
    set=toy_lenses
    [ $range = within ] || set=toy_lenses_beyond
    table ${from}_$range "Finding 3, lenses $range the range trained on, $from" \
      $from-unify $from-none $from-prompt --dataset $set
  done
done
