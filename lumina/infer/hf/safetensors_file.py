"""One safetensors file of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as transformers and peft read them. The library makes a file that its owner alone may read
    (0600); `atomic_folder`, in which exports are made, gives it the umask's mode."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
