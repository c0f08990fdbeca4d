"""torch's key-value stores over TCP, by the names that torch.distributed hands out.

torch documents them there; its stubs do not say so, hence the comments for mypy. The one import of them in this room.
"""

from __future__ import annotations

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

__all__ = ["PrefixStore", "Store", "TCPStore"]
