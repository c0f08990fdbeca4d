"""Records tests/train/health/clean_run.jsonl.gz: python -m tests.train.health.record_clean_run FOLDER

A real run of 2,000 steps of a tiny model in the empty folder FOLDER, of whose metrics the health rules' test needs a
few figures, rounded. Run it again when a rule comes to look at another figure.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from lumina.cli import main
from lumina.monitor import read_metrics
from tests.runs import arguments, write_conversations

STEPS = 2000


def compact(record: dict[str, Any]) -> dict[str, Any] | None:
    rounded = lambda value: float(f"{value:.5g}")
    if record["kind"] == "step":
        seconds = sum(record["seconds"].values())
        kept = {key: rounded(record[key]) for key in ("loss", "grad_norm", "tokens_per_s")}
        more = {"wait": rounded(record["seconds"]["data"]), "seconds": rounded(seconds), "memory": record["memory"]}
        return {"kind": "step", "step": record["step"], **kept, **more}
    if record["kind"] == "eval":
        return {"kind": "eval", "step": record["step"], "loss": rounded(record["loss"])}
    if record["kind"] == "layers":
        layers = {name: [rounded(value) for value in figures.values()] for name, figures in record["layers"].items()}
        return {"kind": "layers", "step": record["step"], "layers": layers}
    return None


def record(folder: Path) -> None:
    data = write_conversations(folder / "train.jsonl", 600, seed=1)
    held_out = write_conversations(folder / "eval.jsonl", 20, seed=2)
    settings = {"max_steps": STEPS, "eval_every_n_batches": 250, "save_every_n_batches": 5000, "layer_stats_every": 50}
    settings |= {"batch_size": 2, "global_batch_size": 2, "hidden_size": 16, "learning_rate": 1e-3, "precision": "fp32"}
    argv = [*arguments(folder / "run", data, whole_vocabulary=True, **settings), "--eval-data", str(held_out)]
    assert main(["train", *argv]) == 0
    found = [compact(one) for one in read_metrics(folder / "run" / "metrics.jsonl")]
    with gzip.GzipFile(Path(__file__).with_name("clean_run.jsonl.gz"), "wb", mtime=0) as file:
        for one in found:
            if one is not None:
                file.write((json.dumps(one) + "\n").encode())


if __name__ == "__main__":
    record(Path(sys.argv[1]))
