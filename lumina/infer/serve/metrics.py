"""Prometheus metrics of a server, for `/metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's figures, in a registry of its own so that two servers of a process do not share them."""

    def __init__(self, slots: int) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lumina_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"lumina_{name}", text, registry=self._registry, buckets=buckets)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"lumina_{name}", text, registry=self._registry)

        self.requests = counter("http_requests", "HTTP requests answered, by path and status", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were prefilled")
        self.reused_tokens = counter("reused_prompt_tokens", "Tokens of prompts that the prefix cache spared")
        self.tokens = counter("generated_tokens", "Tokens generated")
        self.ended = counter(
            "sequences", "Sequences that ended: stop, length, window, cancelled, timeout, error", "how"
        )
        self.running = gauge("sequences_running", "Sequences in the batch")
        self.waiting = gauge("sequences_waiting", "Sequences that wait for a slot")
        self.kept_bytes = gauge("prefix_cache_bytes", "Bytes of keys and values that the prefix cache keeps")
        gauge("slots", "Sequences that fit into the batch").set(slots)
        self.queued = histogram("queue_seconds", "From a request's arrival to its place in the batch")
        self.first_token = histogram("first_token_seconds", "From a request's arrival to its first token")
        self.seconds = histogram("sequence_seconds", "From a request's arrival to its sequence's end")
        self.batch = histogram("step_sequences", "Sequences in a decoding step", _SEQUENCES)

    def text(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)
