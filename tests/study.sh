#!/usr/bin/env bash
# The study of the README: two runs at a time, one thread each. Killed at any moment, the same line goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
runs() { xargs -P 2 -L 1 python "$@"; }

for task in toy toy-long; do
  for s in 0 1 2; do echo "--task $task --seed $s --out runs/$task-warmup-$s"; done
done | runs warmup.py --resume

for task in toy toy-long; do # the defaults, 60 batches
  for s in 0 1 2; do
    run="--task $task --seed $s --model runs/$task-warmup-$s"
    echo "$run --out runs/study/$task-reft-$s"
    echo "$run --skip-ratio 0.25 --out runs/study/$task-prefix-$s"
  done
done | runs rl.py --steps 60 --eval-every 10 --save-every 10 --resume

for s in 0 1 2; do # corrections at the same lam and critic, and no critic: toy, 60 batches
  run="--seed $s --model runs/toy-warmup-$s --skip-ratio 0.25"
  for c in none ratio truncated retrace; do echo "$run --correction $c --out runs/study/toy-$c-$s"; done
  echo "$run --advantage group --samples 8 --out runs/study/toy-group-$s"
done | runs rl.py --steps 60 --eval-every 10 --save-every 10 --resume

for s in 0 1; do # the same on long completions, 30 batches; and more layers skipped
  run="--task toy-long --seed $s --model runs/toy-long-warmup-$s --skip-ratio"
  for c in none ratio truncated retrace; do echo "$run 0.25 --correction $c --out runs/study/toy-long-$c-$s"; done
  echo "$run 0.25 --advantage group --samples 8 --out runs/study/toy-long-group-$s"
  echo "$run 0.375 --out runs/study/toy-long-375-$s"
done | runs rl.py --steps 30 --eval-every 10 --save-every 10 --resume

python evaluate.py runs/study/* --out runs
