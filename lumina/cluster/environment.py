"""Environment variables: the numbers among them, and those that are forwarded to the other nodes, with any value."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from lumina.config import VISIBLE, UserError, visible_names

# Of families whose names a launcher also uses for a rank's own place (TORCHELASTIC_, OMPI_, PMI_, SLURM_) none is here.
_NETWORK = ("NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "NVSHMEM_")
_TORCH = ("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "DEEPSPEED_", "DS_", "LUMINA_")
_LIBRARIES = ("CUDA_", "CUBLAS_", "CUDNN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "NUMEXPR_")
_DATA = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TIKTOKEN_", "WANDB_", "MLFLOW_")
FAMILIES = (*_NETWORK, *_TORCH, *_LIBRARIES, *_DATA)
NAMES = (
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "NO_PROXY",
    "NVIDIA_TF32_OVERRIDE",
    "PATH",
    "PYTHONFAULTHANDLER",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONWARNINGS",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


def _of_this_machine(environment: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES means nothing elsewhere: UUIDs, or what Slurm gave to this node of an allocation."""
    by_slurm = "SLURM_JOB_ID" in environment
    return by_slurm or any(not name.isdecimal() for name in visible_names(environment) or ())


def forwarded(exports: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that reach every rank: those of NAMES and FAMILIES that are set, and `exports`, each NAME or
    NAME=VALUE. CUDA_VISIBLE_DEVICES stays here where it names this machine's own GPUs. Raises UserError for an export
    that is not set here."""
    chosen = {n: v for n, v in environment.items() if n in NAMES or n.startswith(FAMILIES)}
    if _of_this_machine(environment):
        chosen.pop(VISIBLE, None)
    for export in exports:
        name, given, value = export.partition("=")
        if not given and name not in environment:
            raise UserError(f"--export {name}: there is no such variable here", f"Give --export {name}=VALUE.")
        chosen[name] = value if given else environment[name]
    return chosen


def number(name: str, environment: Mapping[str, str] = os.environ, default: int | None = None) -> int:
    """A variable that holds a number, 0 or more. Raises UserError where it holds anything else, or is not set and has
    no default."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 9:
        said = "is not set" if text is None else f"is {text!r}, which is no whole number"
        raise UserError(f"{name} {said}", f"Set {name} as its launcher does, or unset it.")
    return int(text)
