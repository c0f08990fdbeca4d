"""From a request's body to its schema: JSON and validation in a thread, with bounds on what either may cost.

A client gets one error, the first. So nothing goes on after it: unknown fields and entries of lists beyond it are not
looked at, and lists that are too long not at all (strict.py).
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests.strict import StrictModel

M = TypeVar("M", bound=StrictModel)

_FIELD = 200  # characters of a field's name in an error: names come from clients
_DIGITS = 20  # of an integer of 64 bits, its sign included


async def read_body(request: Request, kind: type[M]) -> M:
    """The body, which the middleware has read. Raises ApiError."""
    body = await request.body()
    return await run_in_threadpool(parse_body, kind, body)


def parse_body(kind: type[M], body: bytes) -> M:
    """Raises ApiError, which names the first field that is wrong."""
    refused: list[_Refused] = []

    def refuse(what: str) -> _Refused:
        refused.append(_Refused(what))
        return refused[-1]

    def integer(digits: str) -> int | _Refused:
        """What fits into 64 bits: others overflow wherever they come to."""
        value = int(digits) if len(digits) <= _DIGITS else 1 << 64
        if -(1 << 63) <= value < 1 << 64:
            return value
        return refuse(f"an integer of {len(digits.lstrip('-'))} digits does not fit into 64 bits")

    def number(text: str) -> float | _Refused:
        value = float(text)
        return value if math.isfinite(value) else refuse(f"{text[:_DIGITS]} does not fit into 64 bits")

    try:
        text = body.decode("utf-8-sig")
        values = json.loads(
            text, parse_int=integer, parse_float=number, parse_constant=lambda name: refuse(f"{name} is no JSON")
        )
        if refused:
            _check_numbers(values)
        if "\\u" in text:
            values = _whole(values)
        return kind.model_validate(values)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_input=False)[0]) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {str(error)[:_FIELD]}") from None


class _Refused(str):
    """Why a number is refused, in its place."""


def _check_numbers(values: Any) -> None:
    """Raise ApiError, which names the field, for the first number that is refused."""
    level: list[tuple[str, Any]] = [("", values)]
    while level:
        inner = []
        for where, value in level:
            if isinstance(value, dict):
                inner += [(f"{where}.{name}"[:_FIELD] if where else name[:_FIELD], one) for name, one in value.items()]
            elif isinstance(value, list):
                inner += [(where, one) for one in value]
            elif isinstance(value, _Refused):
                raise ApiError(400, f"{where or 'The body'}: {value}", param=where or None)
        level = inner


def _whole(value: Any) -> Any:
    """The value with U+FFFD for halves of characters (a lone "\\ud800"): UTF-8 has none, and orjson fails on them."""
    if isinstance(value, dict):
        return {_whole(name): _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def _invalid(first: Any) -> ApiError:
    """The first thing that is wrong with a body, as pydantic tells it."""
    names = [str(part) for part in first["loc"] if not str(part).isdigit()]
    if first["type"] == "refused":  # of a model: the field is in the error itself
        names.append(first["ctx"]["field"][:_FIELD])
    where = ".".join(names)[:_FIELD] or None
    unknown = first["type"] == "extra_forbidden"
    text = "is not a field that this server knows" if unknown else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where or 'The body'}: {text}", None, where)
