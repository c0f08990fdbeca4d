"""GET /v1/models and /v1/models/NAME: the one model, and what a client may ask of it."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import Response

from lumina.infer.serve.completion import check_model
from lumina.infer.serve.endpoint import Endpoint, json_response, service_of
from lumina.infer.serve.service import Service


def _model(service: Service) -> dict[str, Any]:
    created = int(service.loaded.checkpoint.stat().st_mtime)
    limits = {"max_model_len": service.context_length, "max_tokens": service.most_tokens}
    return {"id": service.name, "object": "model", "created": created, "owned_by": "lumina", **limits}


async def models(request: Request) -> Response:
    """The one model, and what a client may ask of it."""
    return json_response({"object": "list", "data": [_model(service_of(request))]})


async def model(name: str, request: Request) -> Response:
    """The same by its name."""
    service = service_of(request)
    check_model(service, name)
    return json_response(_model(service))


ENDPOINTS = (Endpoint("GET", "/v1/models", models), Endpoint("GET", "/v1/models/{name:path}", model))
