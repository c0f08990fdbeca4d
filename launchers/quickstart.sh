#!/usr/bin/env bash
# Train the nano preset on real conversations with DeepSpeed ZeRO-2, compare it with guessing by word frequency, and ask
# it three things. `make quickstart` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."

run=experiments/quickstart
python -m lumina.data.chitchat data # -> data/chitchat.train.jsonl, data/chitchat.eval.jsonl, split by dialogue

# A second call trains anew: the run of the first is moved aside, not overwritten.
[ ! -d "$run" ] || mv "$run" "$run-before-$(date +%Y%m%d-%H%M%S)"
deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json --config nano \
    --train-data data/chitchat.train.jsonl --eval-data data/chitchat.eval.jsonl \
    --experiment-name quickstart --batch-size 2 --grad-accum 1 --lr 2e-3 --max-steps "${QUICKSTART_STEPS:-100}"

echo
python -m lumina.train.summary "$run"

for prompt in "Hello, how are you?" "What do you like to do on weekends?" "Do you have any pets?"; do
    printf '\n> %s\n' "$prompt"
    lumina generate --resume "$run" --prompt "$prompt" --max-length 60 --temperature 0.7 --top-k 40 --seed 1
done
