#!/usr/bin/env bash
# Train a small chat model from nothing on everyday exchanges with DeepSpeed ZeRO-2, compare it with guessing by word
# frequency, and ask it three things. `make quickstart` runs it; launchers/quickstart.yaml says what is trained.
# QUICKSTART_STEPS ends it earlier.
set -euo pipefail
cd "$(dirname "$0")/.."

# Chosen before the first training run, and no message of the training text has them word for word
# (tests/launchers/test_quickstart.py). The criterion, chosen with them: each answer is about what was asked, and is
# grammatical English. The likeliest token is taken each time, so that no lucky draw decides.
prompts=(
    "Hello there! How are you today?"
    "Can you tell me a joke, please?"
    "My computer does not turn on. What should I do?"
)

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

data=data/everyday
python -m lumina.data.everyday "$data"
rm -rf "$data/tokenizer"
lumina train-tokenizer "$data/exchanges.jsonl" "$data/openings.train.jsonl" --out "$data/tokenizer" --vocab-size 2048

# A second call trains anew: the run of the first is moved aside, not overwritten.
[ ! -d "$run" ] || mv "$run" "$run-before-$(date +%Y%m%d-%H%M%S)"
deepspeed "${where[@]}" launchers/train.py --ds_config ds_configs/zero2.json --config launchers/quickstart.yaml \
    ${QUICKSTART_STEPS:+--max-steps "$QUICKSTART_STEPS"}

echo
status=0
python -m lumina.train.summary "$run" || status=$? # 1 where it is no better than guessing, as after very few steps
lumina report "$run"

for prompt in "${prompts[@]}"; do
    printf '\n> %s\n' "$prompt"
    lumina generate "$run" --prompt "$prompt" --max-length 60 --temperature 0
done

cat <<EOF

Now try
  .venv/bin/lumina chat $run        talk to it here
  .venv/bin/lumina serve $run       or in the browser (once: .venv/bin/pip install -e '.[serve]')
  $run/report.html                        what happened in the run, as a page
  .venv/bin/lumina train --config nano --train-data my.jsonl --eval-fraction 0.05     your own conversations
  docs/first-assistant.md                 an assistant on a model that has read more than two small files
EOF
exit "$status"
