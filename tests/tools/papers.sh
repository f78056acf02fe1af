#!/usr/bin/env bash
# The rows of ReFT's tables and the runs of Nested-ReFT, for 8 GPUs of 80 GB; written, not run.
# Settings: warmup.py and rl.py, PRETRAINED, where their sources stand. Data: the files of
# github.com/lqtrung1998/mwp_ReFT, folder data/ (commit a7fe19a), which --data reads as they are.
#
# Not here: a separate value model (the critic is a head of the policy), Codegen-350M (another
# architecture) and the choice of the best epoch on the test set (SFT: the last of 40 epochs).
set -euo pipefail
cd "$(dirname "$0")/../.."

# 7B on 80 GB. These flags change no result beyond rounding.
FIT="--gradient-checkpointing --micro-batch 4 --max-rows 32 --resume"
RL="$FIT --save-every 200 --lam 0.95"
run() { torchrun --nproc-per-node 8 "$@" </dev/null; }

# ---- ReFT, tables 2 and 3: task, engine, training problems and their number, warm-up epochs ------
# SVAMP's test set is all of SVAMP, its training problems are others: never train on SVAMP here.
# kl_coef of MathQA with numbers is .05 in the paper and .01 in its script.
ROWS="
gsm8k          nl     gsm8k_nl.json           7465  2
gsm8k          python gsm8k_python_sdp.json   7356  2
svamp          nl     svamp_nl.json           3076  2
svamp          python svamp_python_sdp.json   3043  2
mathqa         nl     mathqa_nl.json         14862  5
mathqa         python mathqa_python_sdp.json 15250  2
mathqa-numeric nl     mathqa-numeric_nl.json  8955 10 --kl-coef 0.01
"
for MODEL in codellama/CodeLlama-7b-hf facebook/galactica-6.7b; do
  while read -r TASK ENGINE DATA COUNT EPOCHS KL; do
    [ -n "$TASK" ] || continue
    NAME=runs/papers/$(basename "$MODEL")-$(basename "$DATA" .json)
    DATASET="--task $TASK --engine $ENGINE --data $DATA --test-data ${TASK}_test_set.json"
    STEPS=$((300 * COUNT / 32)) # 300 epochs, 32 completions a batch

    # supervised fine-tuning alone; the warm-up; ReFT; Nested-ReFT (ratio and correction are ours)
    run warmup.py --model "$MODEL" $DATASET --epochs 40 --out "$NAME-sft" $FIT
    run warmup.py --model "$MODEL" $DATASET --epochs "$EPOCHS" --out "$NAME-warmup" $FIT
    run rl.py --model "$NAME-warmup" --steps $STEPS $KL --out "$NAME-reft" $RL
    run rl.py --model "$NAME-warmup" --steps $STEPS $KL --skip-ratio 0.1 --out "$NAME-nested" $RL

    # offline self-training: annotated and right sampled answers, at most 10 of each problem
    run evaluate.py "$NAME-warmup" --samples 100 --keep-correct "$NAME-kept.jsonl"
    run warmup.py --model "$MODEL" $DATASET --data "$NAME-kept.jsonl" --epochs 20 \
      --out "$NAME-offline" $FIT

    # online self-training
    run rl.py --model "$NAME-warmup" --steps $STEPS --objective self-training \
      --out "$NAME-online" $RL

    # accuracy, and voting over 100 samples (maj@100)
    run evaluate.py "$NAME"-{sft,warmup,reft,nested,offline,online} --samples 100 --max-rows 32
  done <<<"$ROWS"
done

# ---- ReFT, reranking of 100 samples on GSM8K: a verifier a model and engine ----------------------
for MODEL in CodeLlama-7b-hf galactica-6.7b; do
  for DATA in gsm8k_nl gsm8k_python_sdp; do
    NAME=runs/papers/$MODEL-$DATA
    run evaluate.py "$NAME-warmup" --samples 100 --keep-correct "$NAME-labelled.jsonl" --labels
    run verifier.py --model "$NAME-warmup" --data "$NAME-labelled.jsonl" --out "$NAME-verifier" $FIT
    run evaluate.py "$NAME"-{sft,reft} --samples 100 --rerank "$NAME-verifier" --max-rows 32
  done
done

# ---- ReFT, ablations: CodeLlama, programs for GSM8K ----------------------------------------------
NAME=runs/papers/CodeLlama-7b-hf-gsm8k_python_sdp
STEPS=$((300 * 7356 / 32))
run rl.py --model "$NAME-warmup" --steps $STEPS --kl-coef 0 --out "$NAME-no-kl" $RL
run rl.py --model "$NAME-warmup" --steps $STEPS --partial-reward 0 --out "$NAME-no-partial" $RL
for EPOCHS in 1 3 5; do # of warm-up
  run warmup.py --model codellama/CodeLlama-7b-hf --task gsm8k --engine python \
    --data gsm8k_python_sdp.json --test-data gsm8k_test_set.json --epochs $EPOCHS \
    --out "$NAME-warmup-$EPOCHS" $FIT
  run rl.py --model "$NAME-warmup-$EPOCHS" --steps $STEPS --out "$NAME-reft-$EPOCHS" $RL
done
run evaluate.py "$NAME"-{no-kl,no-partial,reft-1,reft-3,reft-5} --max-rows 32

# ---- ReFT, the small model: programs, 700 epochs in batches of 256 completions -------------------
ROWS="
gsm8k   7356 10
svamp   3043 10
mathqa 15250 40
"
while read -r TASK COUNT EPOCHS; do
  [ -n "$TASK" ] || continue
  NAME=runs/papers/galactica-125m-$TASK
  run warmup.py --model facebook/galactica-125m --task "$TASK" --engine python \
    --data "${TASK}_python_sdp.json" --test-data "${TASK}_test_set.json" \
    --epochs "$EPOCHS" --lr 2e-5 --out "$NAME-warmup" --resume
  run rl.py --model "$NAME-warmup" --lr 3e-6 --rollout-batch 256 --minibatch 256 --kl-coef 0.01 \
    --steps $((700 * COUNT / 256)) --lam 0.95 --save-every 200 --out "$NAME-reft" --resume
  run evaluate.py "$NAME"-{warmup,reft} --samples 100
done <<<"$ROWS"

# ---- Nested-ReFT: Qwen2.5-Math-Instruct reads its own chat and needs no warm-up ------------------
for SIZE in 1.5B 7B; do
  for RATIO in 0 0.1; do
    run rl.py --model "Qwen/Qwen2.5-Math-$SIZE-Instruct" --task gsm8k --skip-ratio $RATIO \
      --out "runs/papers/qwen-$SIZE-$RATIO" $RL
  done
done
run evaluate.py runs/papers/qwen-{1.5B,7B}-{0,0.1} --samples 8 --max-rows 32
