#!/usr/bin/env bash
# The README's runs of a pretrained model, on files with SVAMP's fields:
#     bash tests/tools/svamp.sh MODEL TRAIN.jsonl VALIDATION.jsonl TEST.jsonl
set -euo pipefail
model=$1 train=$2 validation=$3 test=$4
cd "$(dirname "$0")/../.."

warmup() {
  python warmup.py --model "$model" --task svamp --prompt-style reft --max-new-tokens 64 \
    --data "$train" --test-data "$validation" --batch 16 --lr 1e-4 --resume "$@"
}
rl() {
  python rl.py --model runs/svamp/cheap --rollout-batch 64 --minibatch 32 --micro-batch 64 \
    --steps 60 --resume "$@"
}

nested="--layer-dropout 0.5 --skip-ratio 0.07"
warmup --steps 150 --eval-every 25 --out runs/svamp/plain
warmup --steps 150 --eval-every 25 $nested --out runs/svamp/cheap
warmup --steps 150 --eval-every 25 $nested --skip-layers inner --out runs/svamp/inner
warmup --steps 1500 --eval-every 100 $nested --out runs/svamp/long
for run in plain cheap; do
  python tests/tools/layers.py --model runs/svamp/$run --skip-ratio 0.07
done

for lr in 3e-6 1e-5 3e-5; do
  rl --lr $lr --out runs/svamp/lr-$lr
done
final="--lr 3e-6 --test-data $test"
for s in 0 1 2; do
  rl $final --seed $s --out runs/svamp/reft-$s
  rl $final --seed $s --skip-ratio 0.07 --out runs/svamp/nested-$s
  rl $final --seed $s --skip-ratio 0.07 --target-kl-behav 0.05 --out runs/svamp/target-$s
done
rl $final --skip-ratio 0.134 --out runs/svamp/nested-4
rl $final --skip-ratio 0.07 --skip-layers inner --out runs/svamp/nested-inner
groups=$(echo runs/svamp/{reft,nested,target}-{0,1,2})
python evaluate.py runs/svamp/cheap $groups --test-data "$test"
python tests/tools/study.py $groups --out runs/svamp
