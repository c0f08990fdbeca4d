#!/usr/bin/env bash
# Train the nano preset on real conversations with DeepSpeed ZeRO-2, then ask it three things. `make quickstart` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."

run=experiments/quickstart
python -m lumina.data.chitchat data # -> data/chitchat.train.jsonl, data/chitchat.eval.jsonl, split by dialogue

deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero2.json --config nano \
    --train-data data/chitchat.train.jsonl --eval-data data/chitchat.eval.jsonl \
    --experiment-name quickstart --epochs 1 --max-steps 150 --lr 1e-3

for prompt in "Hello, how are you?" "What do you like to do on weekends?" "Do you have any pets?"; do
    printf '\n> %s\n' "$prompt"
    lumina generate --resume "$run" --prompt "$prompt" --max-length 60 --seed 1
done
