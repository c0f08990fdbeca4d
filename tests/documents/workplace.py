"""The folder in which documents' commands run: what a clone's root shows them, sample data, a base model, a run.

Its names are the documents' own: my.jsonl, HF_DIR, experiments/NAME. All of it is small, so that commands that name no
size take seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.documents.blocks import ROOT
from tests.documents.warm import ON_THE_CPU, WarmServer

COPIED = ("launchers", "ds_configs", "examples")  # commands may write beside these
LINKED = ("benchmarks",)

_TOPICS = ("tea", "rain", "trains", "music", "bread", "gardens", "chess", "maps")

MINE = """\
hidden_size: 32
num_layers: 2
num_heads: 2
num_kv_heads: 1
seq_length: 128
global_batch_size: 4
max_steps: 4
"""

# experiments/NAME: stopped at its second step of four, so that it can be resumed.
_HALF_A_RUN = """
from lumina import Callback, load_config, train

class Half(Callback):
    def after_step(self, context, result):
        if result.step == 2:
            context.stop("half of it")

train(load_config("mine.yaml", train_data=["my.jsonl"], experiment_name="NAME", live_view=False), callbacks=[Half()])
"""


# A small random model as transformers writes it, with a tokenizer and a chat template of its own.
_BASE_MODEL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.infer.hf_models import make_hf

make_hf(Path("HF_DIR"), "smollm2")
"""


def make(folder: Path, warm: WarmServer) -> Path:
    """Write the folder, which must not be there."""
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    for name, count in (("my", 24), ("my.eval", 6), ("conversations", 24), ("data/chats", 24)):
        _write(folder / f"{name}.jsonl", [_conversation(number) for number in range(count)])
    _write(folder / "trees.jsonl", [_tree(number) for number in range(8)])
    (folder / "mine.yaml").write_text(MINE)
    (folder / "hostfile").write_text("localhost slots=2\n")
    _run(folder, warm, _BASE_MODEL)
    _run(folder, warm, _HALF_A_RUN)
    return folder


def _run(folder: Path, warm: WarmServer, source: str) -> None:
    """Run Python in the folder."""
    script = folder / ".make.py"
    script.write_text(source)
    command, env = warm.python(script), environment(folder, warm)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source}\n---\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    script.unlink()


def environment(folder: Path, warm: WarmServer | None = None) -> dict[str, str]:
    """This process's environment without what a test or a user's shell set for Lumina, the folder's commands first, and
    without GPUs: what documents run is made small for a CPU."""
    gone = (
        "LUMINA_",
        "TRITON_",
        "RANK",
        "LOCAL_",
        "WORLD_SIZE",
        "MASTER_",
        "SLURM_",
        "PYTHONPATH",
        "DEEPSPEED_",
        "CUDA_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(gone)}
    bins = [*([warm.bin] if warm is not None else []), folder / ".venv" / "bin"]
    open_mpi = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # mpirun refuses root
    path = ":".join(map(str, bins))
    kept |= {"PATH": f"{path}:{kept.get('PATH', '')}", "TERM": "dumb"}
    return {"OMP_NUM_THREADS": "1", **kept, **open_mpi, **ON_THE_CPU}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _conversation(number: int) -> dict[str, Any]:
    topic = _TOPICS[number % len(_TOPICS)]
    question, answer = f"Tell me about {topic}, part {number}.", f"I like {topic} very much."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _tree(number: int) -> dict[str, Any]:
    """An OASST tree: a question and two ranked replies."""

    def message(name: str, role: str, text: str, **fields: Any) -> dict[str, Any]:
        fixed = {"lang": "en", "deleted": False, "synthetic": False, "review_result": True, "labels": {}, "replies": []}
        return {"message_id": f"{name}{number}", "role": role, "text": text, **fixed, **fields}

    topic = _TOPICS[number]
    replies = [
        message("A", "assistant", f"I like {topic} very much.", rank=0),
        message("B", "assistant", "No.", rank=1),
    ]
    prompt = message("P", "prompter", f"Tell me about {topic}.", rank=None, replies=replies)
    return {"message_tree_id": f"T{number}", "tree_state": "ready_for_export", "prompt": prompt}
