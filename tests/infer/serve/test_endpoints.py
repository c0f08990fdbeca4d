"""The table of endpoints: found by folder, and closed unless a file says otherwise."""

from __future__ import annotations

from pathlib import Path

from lumina.infer.serve import endpoints
from lumina.infer.serve.endpoints import all_endpoints

PAGE = {"/", "/chat.js", "/markdown.js", "/chat.css", "/icon.svg"}


def test_every_file_adds_endpoints_and_no_path_stands_twice() -> None:
    found = all_endpoints()
    files = {path.stem for path in Path(endpoints.__file__).parent.glob("*.py")} - {"__init__"}
    handled_by = {endpoint.handler.__module__.rsplit(".", 1)[1] for endpoint in found}
    assert handled_by == files
    assert len({(endpoint.method, endpoint.path) for endpoint in found}) == len(found)


def test_only_the_page_and_health_need_no_key() -> None:
    assert {endpoint.path for endpoint in all_endpoints() if not endpoint.needs_key} == PAGE | {"/health"}
