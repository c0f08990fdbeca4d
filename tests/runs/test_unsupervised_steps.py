"""A step in which nothing is supervised is no update: no weight, no moment, no decay, on any rank; and it says so.

Data that is prepared now has no sample without a supervised token; a cache of an earlier version may, so one is made.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import tests.runs as real
from lumina import checkpoint
from lumina.chat import open_tokenizer
from lumina.config import load
from lumina.data import GlobalOrder, PackedDataset, prepare_splits
from tests.runs import Runs, arguments, differing, state, steps

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

SAMPLES, BATCH = 8, 4  # two steps an epoch


def rewrite(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Another Arrow file of one record batch in the place of this one, with these columns' values."""
    with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as reader:
        table = reader.read_all().combine_chunks()
    for name, values in columns.items():
        number = table.schema.get_field_index(name)
        field = table.schema.field(number)
        column = (
            pa.array(values, field.type)
            if not pa.types.is_list(field.type)
            else pa.ListArray.from_arrays(
                table.column(name).combine_chunks().offsets, pa.array(values, field.type.value_type)
            )
        )
        table = table.set_column(number, field, column)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def silence(dataset: PackedDataset, samples: np.ndarray) -> None:
    """Rewrites a cache of one file, one chunk a sample: nothing of these samples is supervised."""
    masks = [dataset.chunks_of(number)[0].mask * (number not in samples) for number in range(dataset.num_samples)]
    supervised = np.where(np.isin(np.arange(dataset.num_samples), samples), 0, dataset.supervised_per_sample)
    shards = [dataset.folder / shard["file"] for shard in dataset.meta["shards"]]
    (chunks,) = shards
    rewrite(chunks, {"mask": np.concatenate(masks), "supervised": supervised})
    rewrite(dataset.folder / "plan.arrow", {"supervised": supervised})
    dataset.meta["sizes"] = {name: (dataset.folder / name).stat().st_size for name in dataset.meta["sizes"]}
    (dataset.folder / "meta.json").write_text(json.dumps(dataset.meta))


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        pytest.param(1, "bf16", marks=pytest.mark.long),
        pytest.param(2, "fp32", marks=pytest.mark.long),
        (3, "bf16"),
    ],
)
def test_it_moves_nothing(stage: int, precision: str, runs: Runs, place: Path) -> None:
    data = real.write_conversations(place / "few.jsonl", SAMPLES, seed=3, turns=1)
    run = place / "run"
    settings = {"precision": precision, "batch_size": 1, "global_batch_size": BATCH, "max_steps": 3, "packing": False}
    settings |= {"cache_dir": place / "cache", "save_every_n_batches": 1, "save_async": False, "keep_last": 99}
    settings |= {
        "weight_decay": 0.5,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "lr_scheduler": "linear",
        "live_view": False,
    }
    argv = arguments(run, data, stage=stage, **settings)
    config = load(
        "nano",
        {"train_data": [str(data)]},
        [word for flag, word in pairwise(argv) if flag == "--set"],
    )
    dataset, _ = prepare_splits(config, open_tokenizer(config.tokenizer))
    assert dataset.num_samples == SAMPLES
    silence(dataset, GlobalOrder(SAMPLES, BATCH, config.seed, dataset.fingerprint).indices(1))

    job = runs.train(argv, 2)
    saved = [state(run / "checkpoints" / checkpoint.name_of(step)) for step in (1, 2, 3)]
    assert differing(saved[0], saved[1]) == []
    assert len(differing(saved[1], saved[2])) > len(saved[1]) // 2
    records = steps(run)
    assert [(r["supervised_tokens"] > 0, r["loss"] is not None, r["applied"]) for r in records] == [
        (True, True, True),
        (False, False, False),
        (True, True, True),
    ]
    assert [r["lr"] for r in records] == pytest.approx(sorted((r["lr"] for r in records), reverse=True))
    assert len({r["lr"] for r in records}) == 3
    assert all(math.isfinite(r["loss"]) for r in (records[0], records[2]))
    assert [r["health"] for r in records] == ["OK"] * 3
    assert "0.000000" not in job.stdout()
