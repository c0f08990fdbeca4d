"""`lumina serve`: OpenAI's HTTP interface and a chat page in front of one model.

One thread runs the model (batcher.py); everything else is asynchronous and never waits for it. Needs the extra `serve`.
"""

from lumina.infer.generation.prefix_cache import PrefixCache
from lumina.infer.serve.app import make_app
from lumina.infer.serve.batcher import ContinuousBatcher
from lumina.infer.serve.connections import STALL_SECONDS, Limits
from lumina.infer.serve.metrics import Metrics
from lumina.infer.serve.middleware import LOOPBACK, Rules
from lumina.infer.serve.server import make_server, make_service, serve
from lumina.infer.serve.service import Service

__all__ = [
    "LOOPBACK",
    "STALL_SECONDS",
    "ContinuousBatcher",
    "Limits",
    "Metrics",
    "PrefixCache",
    "Rules",
    "Service",
    "make_app",
    "make_server",
    "make_service",
    "serve",
]
