"""HTTP endpoint: a method, a path and its handler. Each file of endpoints/ lists its own under ENDPOINTS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response

from lumina.infer.serve.service import Service


class Endpoint(NamedTuple):
    """`needs_key` False: open to everyone, for what tells nothing and runs nothing."""

    method: str
    path: str
    handler: Callable[..., Any]
    needs_key: bool = True


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")
