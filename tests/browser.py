"""A look at an HTML page through a real browser: its picture, what it complains of, what it asks the network for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import orjson
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


def _command(folder: Path, width: int, dark: bool) -> list[str]:
    return [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", "--enable-logging=stderr",
        f"--window-size={width},2400", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip


def browse(folder: Path, html: str, width: int, dark: bool) -> tuple[Path, list[str], list[str]]:
    """Opens a page; returns its picture, its console's messages, and what it asked the network for. The browser's own
    requests (updates, dictionaries) have no origin; they resolve to nothing here."""
    folder.mkdir()
    page, picture, network = folder / "page.html", folder / "page.png", folder / "net.json"
    page.write_text(html, encoding="utf-8")
    command = [*_command(folder, width, dark), f"--log-net-log={network}", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    events = orjson.loads(network.read_bytes())["events"]
    asked = [event["params"] for event in events if {"url", "initiator"} <= set(event.get("params", {}))]
    requests = [params["url"] for params in asked if params["initiator"] != "not an origin"]
    return picture, complaints(done.stderr), requests


def document_after(folder: Path, html: str, script: str, width: int = 1200) -> tuple[str, list[str]]:
    """The page's document once `script` has run at its end, and its console's messages."""
    folder.mkdir()
    page = folder / "page.html"
    page.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [*_command(folder, width, False), "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, complaints(done.stderr)


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "CONSOLE" in line]
