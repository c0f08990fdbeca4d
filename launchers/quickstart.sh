#!/usr/bin/env bash
# Train the nano preset on real conversations with DeepSpeed ZeRO-2, compare it with guessing by word frequency, and ask
# it three things. `make quickstart` runs it. QUICKSTART_STEPS: 100 unless told otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

run=experiments/quickstart
# One process for each of two GPUs at most, and two on a CPU. DeepSpeed is told where there is no GPU: its launcher would
# look for one by itself, and warn.
gpus=$(python -c "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)")
version=$(python -c "import importlib.metadata as m; print(m.version('torch'))")
if [ "$gpus" -gt 0 ]; then
    processes=$((gpus > 2 ? 2 : gpus))
    where=(--num_gpus "$processes")
    # DeepSpeed's launcher ignores CUDA_VISIBLE_DEVICES beside --num_gpus: the devices are named instead.
    case "${CUDA_VISIBLE_DEVICES:-}" in
        [0-9]*) where=(--include "localhost:$(cut -d, -f1-"$processes" <<<"$CUDA_VISIBLE_DEVICES")") ;;
    esac
    echo "quickstart: torch $version sees $gpus GPU(s): $processes process(es), one on each"
else
    processes=2
    where=(--num_gpus 2)
    export DS_ACCELERATOR=cpu
    echo "quickstart: torch $version sees no GPU: 2 processes on the CPU"
fi

python -m lumina.data.chitchat data # -> data/chitchat.train.jsonl, data/chitchat.eval.jsonl, split by dialogue

# A second call trains anew: the run of the first is moved aside, not overwritten.
[ ! -d "$run" ] || mv "$run" "$run-before-$(date +%Y%m%d-%H%M%S)"
deepspeed "${where[@]}" launchers/train.py --ds_config ds_configs/zero2.json --config nano \
    --train-data data/chitchat.train.jsonl --eval-data data/chitchat.eval.jsonl \
    --experiment-name quickstart --batch-size 2 --grad-accum 1 --lr 2e-3 --max-steps "${QUICKSTART_STEPS:-100}"

echo
status=0
python -m lumina.train.summary "$run" || status=$? # 1 where it is no better than guessing, as after very few steps

for prompt in "Hello, how are you?" "What do you like to do on weekends?" "Do you have any pets?"; do
    printf '\n> %s\n' "$prompt"
    lumina generate --resume "$run" --prompt "$prompt" --max-length 60 --temperature 0.7 --top-k 40 --seed 1
done
exit "$status"
