"""The HTTP endpoints, one file each: path, request schema and response. A new file here is a new endpoint."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from lumina.infer.serve.endpoint import Endpoint


def all_endpoints() -> list[Endpoint]:
    """Those of every file of this folder."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [endpoint for name in names for endpoint in import_module(f"{__name__}.{name}").ENDPOINTS]
