"""Memory that one update moves under ZeRO stage 0 in half precision, in bytes a parameter; no time is taken.

    python benchmarks/optimizer_traffic.py [--precision bf16] [--clip 1.0]

Counts what every operator reads and writes, from its arguments and its schema, over one update of a small model: first
by DeepSpeed's own wrapper (FP16_UnfusedOptimizer, its search for NaN included), then by Lumina's. An operator counts
each of its tensors once; views count nothing. The operators are the same ones on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, LAYERS = 512, 4  # the norms' few elements do not weigh, yet everything is quick
_OVERWRITES = ("copy_", "zero_", "fill_")  # do not read what they write to


class Traffic(TorchDispatchMode):
    """Bytes read and written within it, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.removeprefix("aten::")
        moved = 0
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            size = _size(given.get(argument.name))
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and name == "_fused_adamw_" and argument.name == "grads":
                writes = given.get("grad_scale") is not None  # only then does it keep the gradients that it has scaled
            moved += size * writes
            moved += size * (not writes or not name.endswith(_OVERWRITES))
        returns = [r for r in schema.returns if r.alias_info is None]
        moved += _size(result) if returns and not name.startswith(("empty", "new_empty")) else 0
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_reshape_alias")):
            self.bytes[name] += moved
        return result


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, torch.Tensor))


def update_traffic(own: bool, precision: str, clip: float) -> tuple[Counter[str], int]:
    """Bytes by operator of the second update, and the parameters it was of. own: by Lumina's wrapper."""
    from unittest.mock import patch

    from lumina.config import Config
    from lumina.config import deepspeed as ds_json
    from lumina.model import Transformer
    from lumina.train.deepspeed import engine, half_precision, startup

    startup.init_process_group()
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": 8,
        "num_kv_heads": 2,
        "vocab_size": 1024,
        "seq_length": 64,
    }
    shape |= {"precision": precision, "max_grad_norm": clip, "batch_size": 1}
    config = Config.create(shape, frozenset())
    document = ds_json.default_json(1)
    resolved = ds_json.resolve(config, 1, "cuda", bf16_supported=True, document=document)
    from deepspeed.accelerator import get_accelerator

    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    with (
        patch.object(get_accelerator(), "is_fp16_supported", lambda: True),
        patch.object(get_accelerator(), "supported_dtypes", lambda: dtypes),
        nullcontext() if own else patch.object(half_precision, "installed", nullcontext),
    ):
        made = engine.Engine(Transformer(config), resolved.config, resolved.json)
    wrapper, parameters = made.ds.optimizer, list(made.model.parameters())
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        with Traffic() as traffic:
            wrapper.step()
    return traffic.bytes, sum(p.numel() for p in parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--clip", type=float, default=1.0, help="max_grad_norm; 0 clips nothing")
    arguments = parser.parse_args()
    for name, own in (("DeepSpeed's wrapper", False), ("Lumina's", True)):
        moved, parameters = update_traffic(own, arguments.precision, arguments.clip)
        print(f"{name}: {sum(moved.values()) / parameters:.1f} bytes a parameter")
        for operator, count in moved.most_common(8):
            print(f"    {operator:28s} {count / parameters:6.2f}")


if __name__ == "__main__":
    main()
