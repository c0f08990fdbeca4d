"""`deterministic: true`: what a GPU has to be told before CUDA starts, so that two runs are the same bit for bit.

Which parts of a training step may add in an order of their own on CUDA, and why each is fixed then:

- FlashAttention's backward sums dQ with atomics. torch's (2, and 3 and 4 where they are active) and flash-attn's take a
  fixed order instead while deterministic algorithms are on; cuDNN's attention is not chosen then; the memory-efficient
  kernel splits no keys. The price is memory for partial sums and time in the backward pass of attention.
- cuBLAS may sum a product over workspaces of several streams: CUBLAS_WORKSPACE_CONFIG gives each stream its own.
- The loss picks supervised rows by index_select, whose gradient index_add_ makes with atomics: torch sorts instead.
  What picks rows by indexing (weights, targets) has no gradient. The embedding's gradient is always made from sorted
  ids.
- Lumina's Triton kernels have no atomics and add partial sums in a fixed order; block shapes timed at first use
  (LUMINA_KERNELS_AUTOTUNE=1) could differ from start to start, so nothing is timed. torch.compile's search for fast
  configurations is switched off by torch itself.
- NCCL adds in the order of its rings and trees, the same while the machines are. In-switch sums (NVLS) promise no order
  and are left out, unless NCCL_ALGO already says something.

An operation without a deterministic form raises (`warn_only` is off): none in a step is on torch's list of those
(tests/train/test_determinism.py). TF32 is not touched: it rounds, always alike.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from lumina.config import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (":4096:8", ":16:8")  # the workspaces under which cuBLAS is deterministic, as torch checks them
_SETTINGS = {"NCCL_ALGO": "^NVLS,NVLSTree"}


def set_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Switch torch, cuBLAS, NCCL and the kernels to fixed orders, in every rank before it touches CUDA.

    Raises:
        UserError: the environment asks for what would undo it.
    """
    workspace = environment.setdefault(WORKSPACE, _FIXED[0])
    if workspace not in _FIXED:
        raise UserError(
            f"deterministic needs {WORKSPACE} {' or '.join(_FIXED)}, and it is {workspace}", f"Unset {WORKSPACE}."
        )
    if environment.get("LUMINA_KERNELS_AUTOTUNE") == "1":
        raise UserError(
            "LUMINA_KERNELS_AUTOTUNE=1 may choose other block shapes, and so other bits, at every start",
            "Unset it, or leave deterministic out.",
        )
    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # torch would fill every new tensor with NaN, to show who reads before writing: a pass over memory for each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
