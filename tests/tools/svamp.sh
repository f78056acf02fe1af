#!/usr/bin/env bash
# The study of a pretrained model in tests/README.md, on files with SVAMP's fields:
#     bash tests/tools/svamp.sh MODEL TRAIN.jsonl VALIDATION.jsonl TEST.jsonl
set -euo pipefail
model=$1 train=$2 validation=$3 test=$4
cd "$(dirname "$0")/../.."
runs=runs/svamp

warmup() {
  python warmup.py --model "$model" --task svamp --prompt-style reft --max-new-tokens 64 \
    --data "$train" --test-data "$validation" --batch 16 --lr 1e-4 --steps 150 \
    --dtype bfloat16 --resume "$@"
}
layers() {
  python tests/tools/layers.py --test-data "$test" --test-limit 64 --masks 8 --dtype bfloat16 "$@"
}
rl() {
  python rl.py --model $runs/plain --test-data "$test" --rollout-batch 32 --minibatch 32 \
    --micro-batch 32 --steps 60 --lr 3e-6 --dtype bfloat16 --resume "$@"
}

dropout="--layer-dropout 0.5"
warmup --out $runs/plain
warmup $dropout --skip-ratio 0.134 --skip-with identity --out $runs/dropout-identity
warmup $dropout --skip-ratio 0.267 --skip-with linear --out $runs/dropout-linear
for ratio in 0.067 0.134 0.267; do # 2, 4 and 8 of 30 layers
  for kind in identity linear; do
    layers --model $runs/plain --skip-ratio $ratio --skip-with $kind
    layers --model $runs/dropout-$kind --skip-ratio $ratio
  done
done
for seed in 0 1 2; do
  rl --seed $seed --out $runs/reft-$seed
  rl --seed $seed --skip-ratio 0.134 --out $runs/nested-4-$seed
  rl --seed $seed --skip-ratio 0.267 --out $runs/nested-8-$seed
done
groups=$(echo $runs/{reft,nested-4,nested-8}-{0,1,2})
python evaluate.py $runs/plain $groups --test-data "$test"
python tests/tools/study.py $groups --out $runs
