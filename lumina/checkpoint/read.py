"""Reading ranges of named tensors from a checkpoint's rank files, whatever world size wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from lumina.checkpoint.format import MASTER


class WeightReader(Protocol):
    """Ranges of named float32 parameters."""

    def names(self) -> set[str]: ...

    def numel(self, name: str) -> int: ...

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None: ...


class CheckpointReader:
    """Reads ranges of parameters and moments from a checkpoint's rank files, whatever world size wrote them."""

    def __init__(self, checkpoint: Path) -> None:
        self._files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(checkpoint.glob("rank-*.safetensors"))
        ]
        self._homes: dict[str, list[tuple[int, int, Any]]] = {}
        self.keys: list[str] = []
        for file in self._files:
            metadata: dict[str, str] = file.metadata()
            for name, (start, numel) in json.loads(metadata["ranges"]).items():
                self._homes.setdefault(name, []).append((start, numel, file))
            stored: list[str] = file.keys()
            self.keys = sorted({*self.keys, *(key.split("/", 1)[0] for key in stored)} - {"rng", MASTER})

    @property
    def world(self) -> int:
        return len(self._files)

    def names(self) -> set[str]:
        return set(self._homes)

    def numel(self, name: str) -> int:
        return max(start + numel for start, numel, _ in self._homes[name])

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D) with elements [start, start + len(out)) of `key` (master or a moment) of a parameter."""
        end, done = start + out.numel(), 0
        for home, numel, file in self._homes[name]:
            low, high = max(start, home), min(end, home + numel)
            if low < high:
                out[low - start : high - start] = file.get_slice(f"{key}/{name}")[low - home : high - home]
                done += high - low
        assert done == out.numel(), f"the checkpoint covers {done} of {out.numel()} elements of {key}/{name}"

    def rng(self, rank: int) -> torch.Tensor:
        return self._files[rank].get_tensor("rng/cpu")  # type: ignore[no-any-return]
