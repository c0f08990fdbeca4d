"""Free memory of a device, and how long the sequences of a batch may be so that their keys and values fit into it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lumina.config import UserError
from lumina.infer.loading import Loaded
from lumina.model import KVCache

log = logging.getLogger("lumina")

_LEAST = 512  # tokens of prompt and answer, below which a server is not worth starting
_STEP = 64  # a length that memory decides is a multiple of so many
_BY_ITSELF, _ASKED = 0.5, 0.95  # of the free memory: what is taken unasked leaves room for passes and others
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there: on a CPU what the kernel calls available, or the control group's rest
    where that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = (
            (_CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
        )
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())[
            "inactive_file"
        ]
    except (OSError, KeyError, ValueError):
        return free  # no control group of version 2, or none with a limit
    return free if limit == "max" else min(free, int(limit) - int(used) + int(cached))


def fitting_context(loaded: Loaded, slots: int, asked: int | None, free: int) -> int:
    """The context length of a server with so many slots: `asked`, or the model's, or what half of the `free` bytes
    holds. Raises UserError when that does not fit, or is too short to be of use."""
    longest, weight = loaded.config.seq_length, loaded.model.embedding.weight
    if asked is not None and not 2 <= asked <= longest:
        raise UserError(f"--context-length {asked} is not between 2 and the model's {longest}")
    each = KVCache.bytes_of(loaded.config, slots, 1, weight.element_size())
    wanted = longest if asked is None else asked
    fits = int(free * (_BY_ITSELF if asked is None else _ASKED)) // each
    if wanted <= fits:
        return wanted
    if asked is not None or fits < min(_LEAST, longest):
        raise UserError(
            f"keys and values of {slots} answers of {wanted if asked else min(_LEAST, longest)} tokens take "
            f"{each * (wanted if asked else min(_LEAST, longest)) / 2**30:.1f} GiB, and {free / 2**30:.1f} are free",
            "Use fewer --slots or a shorter --context-length.",
        )
    length = max(fits // _STEP * _STEP, min(_LEAST, longest))
    log.warning(
        "%d of the model's %d tokens of context are used: keys and values of %d answers take %.1f GiB, %.1f are free "
        "(--slots, --context-length)", length, longest, slots, each * length / 2**30, free / 2**30
    )  # fmt: skip
    return length
