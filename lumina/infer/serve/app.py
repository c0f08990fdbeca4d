"""The ASGI application: the endpoints, errors in OpenAI's format, and the checks before every request."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from lumina.infer.serve.endpoints import all_endpoints
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.middleware import RequestChecks, Rules
from lumina.infer.serve.service import Service

log = logging.getLogger("lumina")


async def _refused(request: Request, error: Exception) -> Response:
    """Every failure as OpenAI's error object."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    assert isinstance(error, ApiError)
    return error.response()


async def _crashed(request: Request, error: Exception) -> Response:
    # The ASGI server writes the traceback, and not which request it belongs to.
    log.error("%s %s failed: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return ApiError(500, "The server failed on this request.", "internal_error").response()


def make_app(service: Service, rules: Rules) -> ASGIApp:
    """The application, with the checks around it."""
    app = FastAPI(title="Lumina", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    endpoints = all_endpoints()
    for endpoint in endpoints:
        app.add_api_route(endpoint.path, endpoint.handler, methods=[endpoint.method])
    for kind in (ApiError, HTTPException):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(Exception, _crashed)
    return RequestChecks(app, rules, service.metrics, endpoints)
