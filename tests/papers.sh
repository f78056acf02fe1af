#!/usr/bin/env bash
# The papers' runs and baselines, for 8 GPUs of 80 GB; written, not run. Sources of the settings: warmup.py and rl.py, PRETRAINED.
# Data: ReFT's files from github.com/lqtrung1998/mwp_ReFT, folder data/ (commit a7fe19a); --data, --test-data read them as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN="torchrun --nproc-per-node 8"
FIT="--gradient-checkpointing --micro-batch 4 --max-rows 32 --resume" # 7B on 80 GB; changes no result beyond rounding
RL="$FIT --save-every 200 --lam 0.95"                                           # --steps = 300 epochs x problems / 32

# ReFT, GSM8K in words: warm-up of 2 epochs, then PPO; Nested-ReFT from the same warm-up
for MODEL in codellama/CodeLlama-7b-hf facebook/galactica-6.7b; do
  NAME=runs/$(basename "$MODEL")
  $RUN warmup.py --model "$MODEL" --task gsm8k --data gsm8k_nl.json --out "$NAME-warmup" $FIT
  $RUN rl.py --model "$NAME-warmup" --task gsm8k --data gsm8k_nl.json --steps 69984 --out "$NAME-reft" $RL
  $RUN rl.py --model "$NAME-warmup" --task gsm8k --data gsm8k_nl.json --steps 69984 --out "$NAME-nested" --skip-ratio 0.1 $RL

  # SVAMP: in words, and as programs (kl_coef .01 by itself). The test set is all of SVAMP: never train on the hub's split here
  SVAMP="--task svamp --test-data svamp_test_set.json"
  $RUN warmup.py --model "$MODEL" $SVAMP --data svamp_nl.json --out "$NAME-svamp" $FIT
  $RUN rl.py --model "$NAME-svamp" $SVAMP --data svamp_nl.json --steps 28838 --out "$NAME-svamp-reft" $RL
  $RUN warmup.py --model "$MODEL" $SVAMP --engine python --data svamp_python_sdp.json --out "$NAME-svamp-py" $FIT

  # MathQA with letters (5 epochs), and with numbers (10 epochs; kl_coef: .05 in the paper, .01 in its script)
  LETTERS="--task mathqa --data mathqa_nl.json --test-data mathqa_test_set.json"
  $RUN warmup.py --model "$MODEL" $LETTERS --epochs 5 --out "$NAME-mathqa" $FIT
  $RUN rl.py --model "$NAME-mathqa" $LETTERS --steps 139331 --out "$NAME-mathqa-reft" $RL
  NUMBERS="--task mathqa-numeric --data mathqa-numeric_nl.json --test-data mathqa-numeric_test_set.json"
  $RUN warmup.py --model "$MODEL" $NUMBERS --epochs 10 --out "$NAME-numeric" $FIT
  $RUN rl.py --model "$NAME-numeric" $NUMBERS --kl-coef 0.01 --steps 83953 --out "$NAME-numeric-reft" $RL

  # what ReFT compares itself with: SFT (the paper takes the best epoch on the test set), offline and online self-training
  $RUN warmup.py --model "$MODEL" --task gsm8k --data gsm8k_nl.json --epochs 40 --out "$NAME-sft" $FIT
  python evaluate.py "$NAME-warmup" --task gsm8k --data gsm8k_nl.json --samples 100 --keep-correct "$NAME-kept.jsonl"
  python -c 'import json; [print(json.dumps(row)) for row in json.load(open("gsm8k_nl.json"))]' | cat - "$NAME-kept.jsonl" > both.jsonl
  $RUN warmup.py --model "$MODEL" --task gsm8k --data both.jsonl --epochs 20 --out "$NAME-offline" $FIT
  $RUN rl.py --model "$NAME-warmup" --task gsm8k --data gsm8k_nl.json --objective self-training --steps 69984 --out "$NAME-online" $RL
done

# Nested-ReFT: Qwen2.5-Math-Instruct reads its own chat and needs no warm-up; ratio and correction are our choice
for SIZE in 1.5B 7B; do
  for RATIO in 0 0.1; do
    $RUN rl.py --model "Qwen/Qwen2.5-Math-$SIZE-Instruct" --task gsm8k --skip-ratio $RATIO --out "runs/qwen-$SIZE-$RATIO" $RL
  done
done
$RUN evaluate.py runs/*-warmup runs/*-reft runs/*-nested runs/qwen-* --samples 8 --max-rows 32
