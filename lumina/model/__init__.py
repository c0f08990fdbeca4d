"""The decoder, its operators, its losses and its adapters. Knows only torch, the kernels and the model's configuration.

`families`, `float8`, `lora` and `ops` are handed out as modules. Everything is loaded on first use, since the families
are wanted without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.model.attention import report_kernel as report_kernel
    from lumina.model.cache import CachedRow as CachedRow
    from lumina.model.cache import KVCache as KVCache
    from lumina.model.cpu import keep_heap as keep_heap
    from lumina.model.decode import Decoder as Decoder
    from lumina.model.loss import POSITION_BINS as POSITION_BINS
    from lumina.model.loss import position_bins as position_bins
    from lumina.model.memory.offload import HostCopies as HostCopies
    from lumina.model.parallel.sequence import SequenceGroup as SequenceGroup
    from lumina.model.parallel.sequence import sequence_group as sequence_group
    from lumina.model.preference import PREFERENCE_FIGURES as PREFERENCE_FIGURES
    from lumina.model.routing import ExpertBalance as ExpertBalance
    from lumina.model.routing import expert_balance as expert_balance
    from lumina.model.static import StaticDecoder as StaticDecoder
    from lumina.model.static import static_fits as static_fits
    from lumina.model.transformer import Transformer as Transformer

__all__ = [
    "POSITION_BINS",
    "PREFERENCE_FIGURES",
    "CachedRow",
    "Decoder",
    "ExpertBalance",
    "HostCopies",
    "KVCache",
    "SequenceGroup",
    "StaticDecoder",
    "Transformer",
    "expert_balance",
    "families",
    "float8",
    "keep_heap",
    "lora",
    "ops",
    "position_bins",
    "report_kernel",
    "sequence_group",
    "static_fits",
]

__getattr__ = names_of(
    __name__,
    {
        "CachedRow": "cache",
        "Decoder": "decode",
        "ExpertBalance": "routing",
        "HostCopies": "memory.offload",
        "KVCache": "cache",
        "POSITION_BINS": "loss",
        "PREFERENCE_FIGURES": "preference",
        "SequenceGroup": "parallel.sequence",
        "StaticDecoder": "static",
        "Transformer": "transformer",
        "expert_balance": "routing",
        "keep_heap": "cpu",
        "position_bins": "loss",
        "sequence_group": "parallel.sequence",
        "static_fits": "static",
        "report_kernel": "attention",
    },
)
