"""GET /v1/models: the one model, and what a client may ask of it."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from lumina.infer.serve.endpoint import Endpoint, json_response, service_of


async def models(request: Request) -> Response:
    """The one model, and what a client may ask of it."""
    service = service_of(request)
    created = int(service.loaded.checkpoint.stat().st_mtime)
    limits = {"max_model_len": service.loaded.config.seq_length, "max_tokens": service.most_tokens}
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "lumina", **limits}
    return json_response({"object": "list", "data": [model]})


ENDPOINTS = (Endpoint("GET", "/v1/models", models),)
