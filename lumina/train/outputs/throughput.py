"""Model FLOPs utilisation of a step: counted work over the device's published peak, or None where no peak is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumina.config import ModelConfig
from lumina.data import Batch
from lumina.plan import Device, attended_keys, layer_matrix_parameters, local_device


def step_flops(model: ModelConfig, batches: Sequence[Batch]) -> float:
    """Matrix-product FLOPs of one rank's part in its micro-batches, forward and backward (three times forward), without
    recomputation: attention over each document's own past, the output layer at supervised positions only."""
    tokens = sum(len(batch.ids_T) for batch in batches)
    supervised = sum(int((batch.weights_T > 0).sum()) for batch in batches)
    lengths = np.concatenate([np.diff(batch.cu_seqlens_D).astype(np.float64) for batch in batches])
    layers = 2.0 * model.num_layers * layer_matrix_parameters(model) * tokens
    attention = 4.0 * model.num_heads * model.head_dim * attended_keys(model, lengths)
    output = 2.0 * model.hidden_size * model.vocab_size * supervised
    return 3.0 * (layers + attention / batches[0].part.count + output)


class Utilisation:
    """MFU of a rank's device. An unknown device, or a CPU, has none (law 8)."""

    def __init__(self, precision: str, on_gpu: bool) -> None:
        device: Device | None = local_device() if on_gpu else None
        self._peak = None if device is None else device.peak.get(precision)

    def of(self, flops: float, seconds: float) -> float | None:
        return None if self._peak is None else flops / seconds / self._peak
