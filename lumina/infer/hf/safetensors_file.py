"""One safetensors file of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as transformers and peft read them, for all whom the umask lets read: the library by itself
    makes a file that its owner alone may read (0600), and a server under another account then finds no weights."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode & 0o777)
