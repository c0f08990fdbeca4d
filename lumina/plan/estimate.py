"""One configuration on one cluster with one data set: memory, speed, duration and cost together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lumina.config import Config, UserError
from lumina.config.deepspeed import resolve
from lumina.plan.costs.devices import Cluster
from lumina.plan.costs.memory import PeakMemory, peak_memory
from lumina.plan.costs.setup import Buffers, Data, Setup, read_setup
from lumina.plan.costs.speed import Speed, predict
from lumina.plan.stage import default_document

# Tokens per parameter where more parameters and more data are worth the same (Chinchilla, arXiv:2203.15556, table 3).
TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True)
class RunEstimate:
    """Everything that is said about one run on one cluster."""

    cluster: Cluster
    setup: Setup
    memory: PeakMemory
    speed: Speed
    global_batch: int
    steps: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.device <= self.cluster.device.memory

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.cluster.world_size / 3600

    @property
    def energy_kwh(self) -> float:
        """At the boards' full power; the hosts and the cooling come on top."""
        return self.gpu_hours * self.cluster.device.power / 1000


def assumed_data(config: Config, tokens: float | None, document_tokens: float | None, supervised: float) -> Data:
    """Where no file is given: so many tokens, or 20 per parameter in all (the epochs share them)."""
    if not 0 < supervised <= 1:
        raise UserError(f"--supervised {supervised:g} is not a share", "Give a number above 0 and at most 1.")
    if tokens is None:
        tokens = TOKENS_PER_PARAMETER * config.num_parameters(active=True) / config.epochs
        source = f"assumed: {TOKENS_PER_PARAMETER} tokens per parameter over all epochs"
    else:
        source = "given"
    return Data(tokens, document_tokens, supervised, 1.0, source)


def data_of_files(config: Config) -> Data:
    """Counted from the prepared training files (prepared now if they are not)."""
    import numpy as np

    from lumina.chat import open_tokenizer
    from lumina.data import prepare_splits

    dataset, _ = prepare_splits(config, open_tokenizer(config.tokenizer, config.chat_template))
    # A thousand samples say how long documents are. Their tokens are not read: of rows of a million they would be
    # tens of gigabytes.
    some = range(0, dataset.num_samples, max(1, dataset.num_samples // 1000))
    lengths = np.concatenate(list(map(dataset.document_lengths, some))).astype(np.float64)
    return Data(
        tokens=float(dataset.num_tokens),
        document_tokens=float((lengths**2).sum() / lengths.sum()),
        supervised=dataset.num_supervised / dataset.num_tokens,
        fill=dataset.num_tokens / (dataset.num_samples * config.seq_length),
        source="counted in the training files",
    )


def estimate_run(config: Config, cluster: Cluster, data: Data, document: dict[str, Any] | None = None) -> RunEstimate:
    """Estimate the run that this configuration describes. Its DeepSpeed JSON (or `document` in its place) is resolved
    as training would resolve it."""
    has_bf16 = "bf16" in cluster.device.peak
    if document is None:
        document = default_document(config, cluster.world_size, cluster.device.memory, bf16_supported=has_bf16)
    resolved = resolve(config, cluster.world_size, "cuda", bf16_supported=has_bf16, document=document)
    setup, buffers = read_setup(resolved.config, resolved.json, cluster.world_size, data)
    global_batch = resolved.config.global_batch_size
    assert global_batch is not None
    return estimate_setup(resolved.config, setup, buffers, cluster, data, global_batch)


def estimate_setup(
    config: Config, setup: Setup, buffers: Buffers, cluster: Cluster, data: Data, global_batch: int
) -> RunEstimate:
    """The same for a setup that was chosen, not read from a configuration."""
    speed = predict(config, setup, cluster).of_batch(global_batch, setup)
    steps = total_steps(config, data, global_batch)
    memory = peak_memory(config, setup, buffers, cluster.device.memory)
    return RunEstimate(cluster, setup, memory, speed, global_batch, steps, steps * speed.step)


def total_steps(config: Config, data: Data, global_batch: int) -> int:
    """Steps of the whole run, as training counts them: a short last batch is a step."""
    all_epochs = math.ceil(data.tokens / (config.seq_length * data.fill) / global_batch) * config.epochs
    return min(all_epochs, config.max_steps or all_epochs)
