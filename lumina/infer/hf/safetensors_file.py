"""One safetensors file of an export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lumina.config import UserError


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as transformers and peft read them. Raises OSError and UserError where the disk does not take
    them. The library makes a file that its owner alone may read (0600); `atomic_folder`, in which exports are made,
    gives it the umask's mode."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        with path.open("ab") as file:  # which says what the disk does: the library tells it in words alone
            file.write(bytes(1 << 12))
            file.flush()
            os.fsync(file.fileno())
        raise UserError(f"{path} cannot be written: {error}") from None
