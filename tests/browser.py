"""A look at an HTML page through a real browser: its picture, what it complains of, what it asks the network for.

Playwright (1.65.2 looked at) is not used: 53 MB with a Node of its own, tested by its makers with the browsers that it
downloads and not with a distribution's Chromium, for the dozen calls below. It would have to be in every installation
that runs the tests, while what is here skips by itself where no browser is.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

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
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.stdout, complaints(done.stderr)


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


class Browser:
    """A headless Chromium with one page, driven over the DevTools protocol through a pair of pipes (file descriptors 3
    and 4, messages end with a zero byte), so that no WebSocket client is needed. A context manager.

    `complaints` holds what the console said, `requests` what the page asked the network for.
    """

    def __init__(self, folder: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._last, self._answers, self._read = 0, dict[int, Any](), b""
        self._session: str | None = None
        to_child, self._to = os.pipe()
        self._from, from_child = os.pipe()
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_child, from_child)]  # clear of 3 and 4
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                 "--disable-component-update", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]  # fmt: skip
        redirected = f'exec "$0" "$@" 3<&{ours[0]} 4>&{ours[1]}'
        self._log = (folder / "chromium.log").open("wb")
        self._child = subprocess.Popen(
            ["bash", "-c", redirected, str(CHROMIUM), *flags], pass_fds=ours, stdout=self._log, stderr=self._log
        )
        for fd in (to_child, from_child, *ours):
            os.close(fd)

    def __enter__(self) -> Browser:
        pages = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        for fd in (self._to, self._from):
            os.close(fd)
        self._log.close()

    def call(self, method: str, **params: Any) -> Any:
        """One command and its result."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        message = orjson.dumps({"id": self._last, "method": method, "params": params, **session}) + b"\0"
        while message:
            message = message[os.write(self._to, message) :]
        end = time.monotonic() + 120
        while self._last not in self._answers:
            assert time.monotonic() < end, f"{method}: no answer"
            self._receive(1.0)
        answer = self._answers.pop(self._last)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _receive(self, seconds: float) -> None:
        if not select.select([self._from], [], [], seconds)[0]:
            return
        new = os.read(self._from, 1 << 16)
        assert new, "the browser has ended"
        *messages, self._read = (self._read + new).split(b"\0")
        for message in map(orjson.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str([argument.get("value") for argument in params["args"]]))

    def open(self, url: str, width: int = 1000, height: int = 800, dark: bool = False, phone: bool = False) -> None:
        """A page, for a screen of this size, with nothing left of earlier ones."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.call("Storage.clearDataForOrigin", origin=url, storageTypes="all")
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, (script, done)
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 120.0) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """The middle of the last element that a CSS selector finds."""
        found = f"[...document.querySelectorAll({selector!r})].at(-1)"
        x, y = self.ask(
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
