#!/usr/bin/env bash
# One variant of a finding, for finding.sh: train it and score it. Given again, both resume, or say
# that the folder holds another command's result.
#   bash runs/variant.sh OUT VAL.jsonl[,VAL.jsonl ...] SCRIPT [FLAG ...]
set -euo pipefail
out=$1 val=${2//,/ }
shift 2
{
  echo "$*"
  $LAUNCH "$@" --out "$out"
  python evaluate.py "$out" --data $val $EVALUATE
} 2>&1 | while IFS= read -r line; do echo "$(basename "$out"): $line"; done
