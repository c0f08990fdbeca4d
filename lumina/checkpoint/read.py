"""Reading ranges of named tensors from a checkpoint's rank files, whatever world size wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from lumina.checkpoint.format import MASTER
from lumina.checkpoint.integrity import ManifestError, rank_files
from lumina.config import UserError


class WeightReader(Protocol):
    """Ranges of named float32 parameters."""

    def names(self) -> set[str]: ...

    def numel(self, name: str) -> int: ...

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None: ...


class CheckpointReader:
    """Reads ranges of parameters and moments from a checkpoint's rank files, whatever world size wrote them."""

    def __init__(self, checkpoint: Path) -> None:
        """Opens the files that the manifest names, and no other. Raises UserError where they are no checkpoint."""
        self._checkpoint = checkpoint
        try:
            self._files: list[Any] = [safe_open(path, framework="pt") for path in rank_files(checkpoint)]
        except (ManifestError, OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from None
        self._homes: dict[str, list[tuple[int, int, Any]]] = {}
        self.keys: list[str] = []
        for file in self._files:
            for name, start, numel in self._ranges(file):
                self._homes.setdefault(name, []).append((start, numel, file))
            stored: list[str] = file.keys()
            self.keys = sorted({*self.keys, *(key.split("/", 1)[0] for key in stored)} - {"rng", MASTER})
        for name, homes in self._homes.items():
            homes.sort(key=lambda home: home[0])
            end = 0
            for start, numel, _ in homes:
                if start != end:
                    held = "not held" if start > end else "held twice"
                    raise self._damaged(f"element {min(start, end)} of {name} is {held}")
                end += numel

    def _ranges(self, file: Any) -> list[tuple[str, int, int]]:
        """(parameter, first element, how many) of what a rank's file holds."""
        try:
            ranges = json.loads(file.metadata()["ranges"])
            found = [(str(name), int(start), int(numel)) for name, (start, numel) in ranges.items()]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._damaged(f"a rank's file does not say what it holds: {error}") from None
        if any(start < 0 or numel < 1 for _, start, numel in found):
            raise self._damaged("a rank's file holds a range that is none")
        return found

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self._checkpoint} cannot be read: {why}", "Use an earlier checkpoint, or lumina checkpoints restore RUN."
        )

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
        try:
            for home, numel, file in self._homes.get(name, ()):
                low, high = max(start, home), min(end, home + numel)
                if low < high:
                    out[low - start : high - start] = file.get_slice(f"{key}/{name}")[low - home : high - home]
                    done += high - low
        except (SafetensorError, RuntimeError, ValueError, TypeError) as error:  # another shape or type than it says
            raise self._damaged(f"{key}/{name}: {error}") from None
        if done != out.numel():
            raise self._damaged(f"it covers {done} of {out.numel()} elements of {key}/{name}")

    def rng(self, rank: int) -> torch.Tensor:
        try:
            return self._files[rank].get_tensor("rng/cpu")  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise self._damaged(f"rng/cpu: {error}") from None
