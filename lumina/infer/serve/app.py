"""The ASGI application: the endpoints, errors in OpenAI's format, and the checks before every request."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from lumina.infer.serve.endpoints import all_endpoints
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.middleware import RequestChecks, Rules
from lumina.infer.serve.service import Service

log = logging.getLogger("lumina")

_FIELD = 200  # characters of a field's name in an error: names come from clients


def _invalid(first: Any) -> ApiError:
    """The first thing that is wrong with a body, as pydantic tells it."""
    names = [str(part) for part in first["loc"][1:] if not str(part).isdigit()]
    if first["type"] == "refused":  # of a model: the field is in the error itself
        names.append(first["ctx"]["field"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}")
    where = ".".join(names)[:_FIELD] or None
    unknown = first["type"] == "extra_forbidden"
    text = "is not a field that this server knows" if unknown else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where or 'The body'}: {text}", None, where)


async def _refused(request: Request, error: Exception) -> Response:
    """Every failure as OpenAI's error object."""
    if isinstance(error, RequestValidationError):
        error = _invalid(error.errors()[0])
    elif isinstance(error, HTTPException):
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
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(Exception, _crashed)
    return RequestChecks(app, rules, service.metrics, endpoints)
