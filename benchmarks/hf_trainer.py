"""The peer of benchmarks/train_step.py: LlamaForCausalLM of a preset's shape, trained by transformers' Trainer.

    python benchmarks/hf_trainer.py --preset 1b --batch 4 --seq 4096 [--liger] [--compile]

bf16 (autocast over float32 weights, as Trainer does it) on a GPU or a CPU, random tokens, every one supervised. The
defaults come from the environment that train_step.py sets: BS, SEQ, STEPS, PRESET, and DS for DeepSpeed's ZeRO-2. The
last line holds `tokens_per_s=` and `peak_gib=`; the first two steps are not counted.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lumina.config import load
from lumina.model.families import family_of

WARM = 2
ZERO_2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
}


class RandomTokens(torch.utils.data.Dataset):
    """Samples of `length` random ids, each its own label."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocabulary, (self.length,), generator=draw)
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Seconds from the end of step WARM to the end of the last, the device waited for at these two alone."""

    def __init__(self, steps: int) -> None:
        self.steps, self.begin, self.end = steps, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (WARM, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.begin, self.end = (now, 0.0) if state.global_step == WARM else (self.begin, now)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the command line says; prints and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ
    parser.add_argument("--preset", default=given.get("PRESET", "debug"))
    parser.add_argument("--batch", type=int, default=int(given.get("BS", 2)))
    parser.add_argument("--seq", type=int, default=int(given.get("SEQ", 512)))
    parser.add_argument("--steps", type=int, default=int(given.get("STEPS", 12)))
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    config = load(options.preset, {}, [*options.sets, f"seq_length={options.seq}"])
    if options.vocabulary is not None:
        config = config.replace(vocab_size=options.vocabulary)
    if torch.cuda.is_available():
        gc.collect()  # of a training before this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):  # drawing a billion weights on the host takes half a minute
        model = LlamaForCausalLM(LlamaConfig(**family_of(config).hf_config(config, "float32", 0, 0)))
    clock = Clock(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            bf16=True,
            use_cpu=not cuda,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_liger_kernel=options.liger,
            torch_compile=options.compile,
            deepspeed=ZERO_2 if given.get("DS") else None,
        )
        data = RandomTokens(config.vocab_size, options.seq)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    seconds = (clock.end - clock.begin) / (options.steps - WARM)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    world = int(given.get("WORLD_SIZE", 1))
    found = {
        "seconds": seconds,
        "tokens_per_second": options.batch * options.seq * world / seconds,
        "peak_gib": peak / 2**30,
    }
    if int(given.get("RANK", 0)) == 0:
        print(
            f"hf_trainer preset={options.preset} liger={options.liger} world={world} step_s={seconds:.4f} "
            f"peak_gib={found['peak_gib']:.2f} tokens_per_s={found['tokens_per_second']:.0f}"
        )
    return found


if __name__ == "__main__":
    main()
