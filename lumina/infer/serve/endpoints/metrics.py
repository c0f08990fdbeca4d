"""GET /metrics: figures for Prometheus."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from lumina.infer.serve.endpoint import Endpoint, service_of


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


ENDPOINTS = (Endpoint("GET", "/metrics", metrics),)
