"""GET /health: whether the model's thread runs."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from lumina.infer.serve.endpoint import Endpoint, json_response, service_of


async def health(request: Request) -> Response:
    """200 while the batcher runs."""
    service = service_of(request)
    return json_response(
        {"status": "ok" if service.batcher.alive else "stopped"}, 200 if service.batcher.alive else 503
    )


ENDPOINTS = (Endpoint("GET", "/health", health, needs_key=False),)
