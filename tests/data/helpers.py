"""What the data tests share: settings, files of conversations, and the slow way to read a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lumina.chat import NEWEST_TEMPLATE, Tokenizer
from lumina.config import Config, load
from lumina.data import PackedDataset

TOKENIZER = Tokenizer.load()
AGENT_TOKENIZER = Tokenizer.load(NEWEST_TEMPLATE)  # whose template has a form for tools, calls and reasoning


@dataclass(frozen=True)
class Source:
    """A weighted training file."""

    path: str
    weight: float = 1.0
    format: str | None = None
    columns: dict[str, str] | None = None


@dataclass(frozen=True)
class Settings:
    """The part of the configuration that the data room reads."""

    seq_length: int = 64
    packing: bool = True
    overlong: str = "split"
    overlong_context: float = 0.25
    cache_dir: str | None = None
    num_workers: int | None = 1
    train_data: tuple[str, ...] = ()
    data: tuple[Source, ...] = ()
    eval_data: tuple[str, ...] = ()
    eval_fraction: float = 0.0
    dedup: str = "none"
    tokenizer: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def config_of(**changes: Any) -> Config:
    """A whole configuration, for the commands."""
    return load("nano", {"seq_length": 64, "num_workers": 1, **changes})


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Writes records as JSON lines; bytes go in as they are."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else orjson.dumps(r)) + b"\n" for r in records))
    return path


def chat(*turns: str, first: str = "user") -> dict[str, Any]:
    """Alternating turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def supervised_targets(dataset: PackedDataset) -> Counter[int]:
    """How often each id is a target of weight 1 over the whole set, sample by sample."""
    counts: Counter[int] = Counter()
    for sample in range(dataset.num_samples):
        batch = dataset.batch([sample])
        counts.update(batch.targets_T[batch.weights_T == 1].tolist())
    return counts


def expected_targets(records: list[dict[str, Any]]) -> Counter[int]:
    """The tokens of every assistant content and a stop token each: what must be supervised, straight from the input."""
    counts: Counter[int] = Counter()
    for record in records:
        for message in record["messages"]:
            if message["role"] in ("assistant", "ai", "bot"):
                counts.update([*TOKENIZER.encode(message["content"]), TOKENIZER.stop_id])
    return counts
