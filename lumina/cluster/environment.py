"""Which environment variables travel to the other nodes: named ones and families, nothing else, and any value."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from lumina.config import UserError

FAMILIES = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "DEEPSPEED_", "DS_", "LUMINA_", "WANDB_", "MLFLOW_", "HF_")
NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PATH",
    "PYTHONPATH",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TIKTOKEN_CACHE_DIR",
    "TOKENIZERS_PARALLELISM",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
)


def forwarded(exports: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that reach every rank: those of NAMES and FAMILIES that are set, and `exports`, each NAME or
    NAME=VALUE. Raises UserError for an export that is not set here."""
    chosen = {n: v for n, v in environment.items() if n in NAMES or n.startswith(FAMILIES)}
    for export in exports:
        name, given, value = export.partition("=")
        if not given and name not in environment:
            raise UserError(f"--export {name}: there is no such variable here", f"Give --export {name}=VALUE.")
        chosen[name] = value if given else environment[name]
    return chosen
