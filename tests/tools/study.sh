#!/usr/bin/env bash
# The toy study of tests/README.md: two runs at a time, one thread each.
# Killed at any moment, the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
runs() { xargs -P 2 -L 1 python "$@"; }
rl() { runs rl.py --eval-every 10 --save-every 10 --resume "$@"; }

for task in toy toy-long; do
  for s in 0 1 2 3 4; do
    echo "--task $task --seed $s --out runs/$task-warmup-$s"
  done
done | runs warmup.py --resume

for task in toy toy-long; do # the defaults
  for s in 0 1 2 3 4; do
    run="--task $task --seed $s --model runs/$task-warmup-$s"
    echo "$run --out runs/study/$task-reft-$s"
    echo "$run --skip-ratio 0.25 --out runs/study/$task-prefix-$s"
  done
done | rl

for s in 0 1 2; do # ReFT, corrections with the same lam and critic, and no critic: 60 batches
  run="--seed $s --model runs/toy-warmup-$s"
  echo "$run --out runs/study/toy-60-reft-$s"
  run="$run --skip-ratio 0.25"
  for c in prefix none ratio truncated retrace; do
    echo "$run --correction $c --out runs/study/toy-60-$c-$s"
  done
  echo "$run --advantage group --samples 8 --out runs/study/toy-60-group-$s"
done | rl --steps 60

for s in 0 1; do # the same on long completions, 30 batches; and more layers skipped
  run="--task toy-long --seed $s --model runs/toy-long-warmup-$s"
  for c in none ratio truncated retrace; do
    echo "$run --skip-ratio 0.25 --correction $c --out runs/study/toy-long-$c-$s"
  done
  echo "$run --skip-ratio 0.25 --advantage group --samples 8 --out runs/study/toy-long-group-$s"
  echo "$run --skip-ratio 0.375 --out runs/study/toy-long-375-$s"
done | rl --steps 30

python evaluate.py runs/study/*
python tests/tools/study.py runs/study/* --out runs
