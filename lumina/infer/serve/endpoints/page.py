"""GET / and its files: the chat page for a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.responses import Response

from lumina.infer.serve.endpoint import Endpoint

ASSETS = Path(__file__).parents[1] / "assets"
_FILES = {"/": "chat.html"} | {f"/{name}": name for name in ("chat.js", "markdown.js", "chat.css", "icon.svg")}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def _page(file: str) -> Callable[[], Any]:
    content, kind = (ASSETS / file).read_bytes(), _TYPES[Path(file).suffix]

    async def page() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})

    return page


ENDPOINTS = tuple(Endpoint("GET", path, _page(file), needs_key=False) for path, file in _FILES.items())
