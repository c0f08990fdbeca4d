"""An engine of a preset and a batch for it, for the benchmarks that need a real training step."""

from __future__ import annotations

from typing import Any


def debug_trainer(tokens: int, preset: str = "debug") -> tuple[Any, Any]:
    """(engine, one batch of `tokens` random tokens, all supervised)."""
    from lumina.model import keep_heap

    keep_heap()
    import numpy as np
    import torch

    from lumina.config import deepspeed as ds_json
    from lumina.config import load
    from lumina.data import Batch
    from lumina.model import Transformer
    from lumina.train.deepspeed import engine, startup

    ranks = startup.init_process_group()
    config = load(preset, {"batch_size": 1, "gradient_accumulation_steps": 1})
    settings, _, config = ds_json.resolve(config, ranks.world, "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    trainer = engine.Engine(Transformer(config), config, settings)
    ids = torch.randint(0, config.vocab_size, (tokens,)).numpy()
    ones, bounds = np.ones(tokens, dtype=np.float32), np.array([0, tokens], dtype=np.int32)
    return trainer, Batch(ids, np.roll(ids, -1), ones, np.arange(tokens), bounds, tokens).torch()
