"""Records a run of version 0.1.0 for test_run_0_1_0.py:

    python -m tests.runs.record_run_0_1_0 CHECKOUT FOLDER [WORLD]

CHECKOUT is a working tree of one of that version's commits, with its kernels/ linked as lumina/kernels; FOLDER is made.
Steps 12 to 14 are spoiled, so that the run goes back to its checkpoint of step 9 and passes their samples over: of this
`answers.json` tells, and a resume at step 9 has to heed it. The end that a resume must come to is the run's own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from tests.runs import clean_environment, free_port, write_conversations
from tests.small_tokenizer import small_vocabulary, write_tokenizer

STEP, STEPS = 9, 17
# Everything of the model small but its kinds of layers: a checkpoint of it is to be kept.
SETTINGS = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "tie_word_embeddings": True,
    "seq_length": 64,
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "num_workers": 1,
    "cache_dir": "cache",
    "epochs": 100,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "seed": 5,
    "save_every_n_batches": 3,
    "save_async": False,  # which checkpoint there is to go back to must not depend on the disk
    "keep_last": 9,
    "health_warmup": 4,
    "health_window": 16,
    "health_check_interval": 4,
    "health_off": "[plateau]",
}
# What is kept of it: not run.json, which is about the machine, and no checkpoint but the one to begin at and the end.
KEPT = (
    "train.jsonl",
    "cache/*/*",
    "end/*",
    "run/config.yaml",
    "run/answers.json",
    "run/*.jsonl",
    "run/.owner.json",
    "run/tokenizer/*",
    f"run/checkpoints/step-{STEP:08d}/*",
)
PROGRAM = """
import sys
from lumina.cli import main
from lumina.train import loop

original = loop._accumulate

def spoiled(run, data):
    whole = data.supervised_tokens
    if data.step + 1 in (12, 13, 14):
        data.supervised_tokens = whole / 20
    found = original(run, data)
    data.supervised_tokens = whole
    return found

loop._accumulate = spoiled
sys.exit(main(sys.argv[1:]))
"""


def this_machine() -> dict[str, str]:
    """What the bits of a sum depend on, with the plain torch operators of LUMINA_CPU_KERNELS=0 and one thread."""
    processors = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", processors)
    return {
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "machine": platform.machine(),
        "vendor": vendor[1] if vendor else "",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def record(checkout: Path, folder: Path, world: int) -> None:
    folder.mkdir(parents=True)
    vocabulary = small_vocabulary(write_tokenizer(folder / "tokenizer"))
    write_conversations(folder / "train.jsonl", 24, seed=11)
    # By relative paths, in the folder itself: nothing of the machine's own is in the files.
    argv = ["train", "--config", "nano", "--train-data", "train.jsonl", "--output-dir", ".", "--experiment-name", "run"]
    for name, value in {**SETTINGS, **vocabulary, "tokenizer": "tokenizer"}.items():
        argv += ["--set", f"{name}={value}"]
    port, ranks = free_port(), []
    for rank in range(world):
        environment = {**clean_environment(), "LUMINA_CPU_KERNELS": "0", "PYTHONPATH": str(checkout)}
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *argv], cwd=folder, env=environment))
    assert [rank.wait() for rank in ranks] == [0] * world
    shutil.move(folder / "run/checkpoints" / f"step-{STEPS:08d}", folder / "end")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if not any(path.relative_to(folder).match(kept) for kept in KEPT):
            path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    (folder / "machine.json").write_text(json.dumps(this_machine(), indent=1) + "\n")


if __name__ == "__main__":
    os.umask(0o022)
    record(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
