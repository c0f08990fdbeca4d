"""The chat page in a real browser, in front of a real server.

What the model says is decided here, since these tests are about the page: `said` takes the place of the choice of a
token, and nothing else. Batching, streaming, stopping and the protocol are the server's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lumina.chat import Tokenizer
from lumina.infer import load
from lumina.infer.generation.batch import Sequence, SequenceBatch, Token
from tests.browser import Browser, needs_browser
from tests.infer.serve.running_server import Running, running, wait_for
from tests.infer.small_models import make_model, write_run

TOKENIZER = Tokenizer.load()
BUSY = "document.querySelector('[aria-busy]') !== null"
DONE = f"!({BUSY})"
LAST = "[...document.querySelectorAll('article.assistant .body')].at(-1)"

MARKED = """\
## A *list* & <b>more</b>

1. **bold**, `a < b` and ~~struck~~
2. [Lumina](https://example.org/a?b=1), not [this](javascript:alert(1)), [it](data:text/html,x) nor [that](/v1/models)
   - inside

> quoted <script>document.title = 'owned'</script>

```python
print("<script>alert(1)</script>")
```

| x | y |
|---|---|
| 1 | <img src=x onerror="document.title='owned'"> |

snake_case_name stays, 2 * 3 * 4 too; ![picture](https://example.org/i.png)
<script>document.title = 'owned'</script><iframe src="javascript:alert(1)"></iframe>"""

HARMLESS = """(() => {
  const log = document.getElementById("log");
  const bad = log.querySelectorAll("script, img, iframe, svg, object, style, form, input, link, meta");
  const attributes = [...log.querySelectorAll("*")].flatMap((node) => node.getAttributeNames());
  return [bad.length, attributes.filter((name) => name.startsWith("on")).length, document.title];
})()"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = make_model(num_layers=1, seq_length=512)
    loaded = load(write_run(tmp_path_factory.mktemp("runs") / "small", model), precision="fp32")
    with running(loaded) as started:
        yield started


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Decide what the model says from now on; an endless word when it is told nothing."""
    ids, pace = list[int](), [0.0]

    def choose(self: SequenceBatch, sequences: list[Sequence], kept: Tensor, _: Tensor, logprobs: Any) -> list[Token]:
        words = ids or TOKENIZER.encode(" on and on") * 200
        time.sleep(pace[0])
        tokens = [(words[len(s.generated)] if len(s.generated) < len(words) else TOKENIZER.stop_id) for s in sequences]
        return [self._add(s, row, tokens[row], logprobs) for row, s in enumerate(sequences)]

    monkeypatch.setattr(SequenceBatch, "_choose", choose)

    def say(text: str) -> None:
        ids[:] = TOKENIZER.encode(text)
        # An answer without a near end is looked at while it grows, by a browser that may be slow.
        pace[0] = 0.05 if not text or text.endswith(" on on") else 0.0

    return say


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def page(server: Running, browser: Browser, width: int = 1000, dark: bool = False) -> None:
    browser.open(server.address, width, 844, dark, phone=width < 500)
    browser.wait("document.getElementById('model').textContent === 'small'")
    assert browser.ask("document.activeElement.id") == "input"


def send(browser: Browser, text: str) -> None:
    browser.type(text)
    browser.press("Enter")


@needs_browser
def test_a_conversation(server: Running, said: Callable[[str], None], browser: Browser) -> None:
    """Send, stream, stop, regenerate, edit, parameters, errors: with the keyboard where there is a key for it."""
    page(server, browser)
    said("Hello yourself.")
    browser.type("Hello")
    browser.press("Enter", shift=True)
    send(browser, "there")
    browser.wait(f"{LAST}?.textContent === 'Hello yourself.' && {DONE}")
    assert browser.ask("document.querySelector('article.user .body').textContent") == "Hello\nthere"
    assert browser.ask("document.getElementById('status').textContent").strip() == "Hello yourself."

    said("")  # no end: the words come one by one until they are stopped
    send(browser, "Go on")
    lengths = []
    for _ in range(3):
        before = lengths[-1] if lengths else 0
        browser.wait(f"{LAST}.textContent.length > {before} && {BUSY}")
        lengths.append(browser.ask(f"{LAST}.textContent.length"))
    assert browser.ask("document.querySelectorAll('.actions button:not(:disabled)').length") == 0
    browser.press("Escape")
    browser.wait(DONE)
    assert browser.ask("[...document.querySelectorAll('.ending')].at(-1).textContent") == "Stopped."
    assert browser.ask(f"{LAST}.textContent.trim()").startswith("on and on")
    wait_for(server.idle)

    said("Once more.")
    browser.click("button[aria-label='Make this answer again']")
    browser.wait(f"{LAST}.textContent === 'Once more.' && {DONE}")
    assert browser.ask("document.querySelectorAll('article').length") == 4

    browser.click("article:nth-of-type(1) button[aria-label='Edit this message']")
    browser.wait("document.activeElement.getAttribute('aria-label') === 'Your message'")
    browser.ask("document.activeElement.select()")
    send(browser, "Another beginning")
    browser.wait(f"{DONE} && document.querySelectorAll('article').length === 2")
    assert browser.ask("document.activeElement.id") == "input"
    assert browser.ask("document.querySelector('article.user .body').textContent") == "Another beginning"

    browser.click("#open-settings")
    browser.ask("document.getElementById('max_tokens').value = 2; document.getElementById('temperature').value = 2.5")
    browser.press("Escape")
    assert browser.ask("document.activeElement.id") == "open-settings"
    browser.click("#input")
    send(browser, "With settings")
    browser.wait("!document.getElementById('alert').hidden")
    assert "temperature 2.5 is outside" in browser.ask("document.getElementById('alert').textContent")
    browser.ask("document.getElementById('temperature').value = 1")
    browser.click("button[aria-label='Ask for an answer again']")
    browser.wait(f"{LAST}.textContent === 'Once more' && {DONE}")
    assert "Cut off" in browser.ask("[...document.querySelectorAll('.ending')].at(-1).textContent")

    browser.click("#new")
    assert browser.ask("document.querySelectorAll('article').length") == 0
    assert all(url.startswith(server.address) for url in browser.requests)
    assert [text for text in browser.complaints if "400" not in text] == []


@needs_browser
@pytest.mark.parametrize(("width", "dark", "name"), [(1000, False, "light"), (390, True, "phone-dark")])
def test_an_answer_full_of_markup(
    server: Running, said: Callable[[str], None], browser: Browser, tmp_path: Path, width: int, dark: bool, name: str
) -> None:
    page(server, browser, width, dark)
    said(MARKED)
    send(browser, "Show me <script>document.title = 'owned'</script>")
    browser.wait(f"{DONE} && {LAST}?.querySelector('table') !== null")
    assert browser.ask(HARMLESS) == [0, 0, "small – Lumina"]
    told = browser.ask(f"{LAST}.textContent")
    for text in (
        "A list & <b>more</b>",
        "<script>document.title = 'owned'</script><iframe",
        "snake_case_name stays",
        "2 * 3 * 4 too",
        'print("<script>alert(1)</script>")',
        "<img src=x onerror",
        "[this](javascript:alert(1)), it (data:text/html,x) nor that (/v1/models)",
    ):
        assert text in told
    kinds = "h4 em|ol > li strong|ol code|ol del|ol ul li|blockquote p|pre code|thead th|tbody td"
    assert browser.ask(f"{kinds.split('|')}.filter((kind) => !{LAST}.querySelector(kind))") == []
    links = browser.ask(f"[...{LAST}.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.rel])")
    assert links == [
        ["https://example.org/a?b=1", "noopener noreferrer nofollow"],
        ["https://example.org/i.png", "noopener noreferrer nofollow"],
    ]
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    unnamed = "[...document.querySelectorAll('button, input, textarea')].filter((node) => !node.labels?.length && "
    assert browser.ask(unnamed + "!node.getAttribute('aria-label') && !node.textContent.trim()).length") == 0
    shade = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (shade == "rgb(20, 23, 27)") == dark
    picture = tmp_path / f"chat-page-{name}.png"
    browser.picture(picture)
    assert picture.stat().st_size > 10_000
    assert all(url.startswith(server.address) for url in browser.requests)
    assert browser.complaints == []


@needs_browser
def test_the_policy_stops_what_the_page_would_not_do(
    server: Running, said: Callable[[str], None], browser: Browser
) -> None:
    """Even a page that trusted the model could not run its markup: innerHTML and inline scripts are refused."""
    page(server, browser)
    attempt = "try { document.body.innerHTML = '<b>x</b>'; 'done' } catch (error) { error.name }"
    assert browser.ask(attempt) == "TypeError"
    browser.ask("(() => { const s = document.createElement('img'); s.src = 'https://example.org/i.png'; "
                "document.body.append(s); })()")  # fmt: skip
    browser.wait("true")
    assert any("Content Security Policy" in text for text in browser.complaints)


@needs_browser
def test_a_key_is_asked_for(server: Running, said: Callable[[str], None], browser: Browser) -> None:
    with running(server.service.loaded, key="secret") as locked:
        browser.open(locked.address)
        browser.wait("document.getElementById('alert').textContent.includes('API key')")
        browser.ask("document.getElementById('open-settings').click(); document.getElementById('key').value = 'secret'")
        browser.click("#close-settings")
        browser.wait("document.getElementById('model').textContent === 'small'")
        said("Come in.")
        browser.click("#input")
        send(browser, "Open")
        browser.wait(f"{LAST}?.textContent === 'Come in.' && {DONE}")
        assert "secret" not in browser.ask("JSON.stringify(localStorage)")


@needs_browser
def test_a_full_context_leaves_out_old_turns_and_says_so(
    server: Running, said: Callable[[str], None], browser: Browser
) -> None:
    page(server, browser)
    said("Yes.")
    for number in range(5):
        send(browser, "word " * 120)
        browser.wait(f"document.querySelectorAll('article').length === {2 * number + 2} && {DONE}")
    note = browser.ask("document.querySelector('.note').textContent")
    assert note.startswith("The context is full: the answer sees only the last")
    assert browser.ask("document.getElementById('alert').hidden")


@needs_browser
def test_the_caret_ends_the_last_line(server: Running, said: Callable[[str], None], browser: Browser) -> None:
    """While an answer grows, what blinks is in its last line: in paragraphs, lists and code alike."""
    page(server, browser)
    on, kinds = " on" * 150, {"One line": "p", "- first\n- second": "ul > li:last-child", "> quoted": "blockquote > p"}
    for text, inside in {**kinds, "```\ncode": "pre > code"}.items():
        said(text + on)
        send(browser, "Go on")
        browser.wait(f"{BUSY} && {LAST}.textContent.includes(' on on')")
        where = f"{LAST}.querySelector('.caret')?.matches({inside!r})"
        assert browser.ask(f"{BUSY} && {where}"), text
        assert browser.ask("document.querySelectorAll('.caret').length") == 1
        browser.press("Escape")
        browser.wait(DONE)
        assert browser.ask("document.querySelectorAll('.caret').length") == 0
        wait_for(server.idle)


@needs_browser
@pytest.mark.parametrize("width", [1000, 390])
def test_settings_stand_in_line_and_keep_their_bounds(server: Running, browser: Browser, width: int) -> None:
    page(server, browser, width)
    browser.click("#open-settings")
    boxes = browser.ask(
        "[...document.querySelectorAll('.pairs input')].map((one) => one.getBoundingClientRect().toJSON())"
    )
    rows: dict[int, list[int]] = {}
    for box in boxes:
        rows.setdefault(round(box["top"]), []).append(round(box["left"]))
    columns = max(map(len, rows.values()))
    assert columns == (3 if width == 1000 else 2 if 2 in map(len, rows.values()) else 1)
    assert sorted(map(len, rows.values()), reverse=True)[: len(boxes) // columns] == [columns] * (len(boxes) // columns)
    assert len({tuple(sorted(lefts)) for lefts in rows.values() if len(lefts) == columns}) == 1
    assert len({round(box["height"]) for box in boxes}) == 1
    assert browser.ask(
        "document.getElementById('settings').scrollWidth <= document.getElementById('settings').clientWidth"
    )
    # No answer is longer than the context, 512 tokens here, of the server's 2048.
    assert browser.ask("document.getElementById('max_tokens').max") == "512"
    assert "to 512" in browser.ask("document.getElementById('most').textContent")
    browser.ask("document.getElementById('max_tokens').value = 9999")
    browser.press("Escape")
    browser.wait("document.getElementById('max_tokens').value === '512'")


@needs_browser
def test_what_the_user_writes_is_rendered_too(server: Running, said: Callable[[str], None], browser: Browser) -> None:
    page(server, browser)
    said("Yes.")
    browser.type("Is this **right**?")
    for text in ("", "```", "if x:", "    <b>y</b>", "```"):
        browser.press("Enter", shift=True)
        browser.type(text)
    browser.press("Enter")
    browser.wait(f"{DONE} && {LAST}?.textContent === 'Yes.'")
    mine = "document.querySelector('article.user .body')"
    assert browser.ask(f"{mine}.querySelector('strong').textContent") == "right"
    assert browser.ask(f"{mine}.querySelector('pre code').textContent") == "if x:\n    <b>y</b>"
    assert browser.ask(HARMLESS)[:2] == [0, 0]
    browser.click("button[aria-label='Edit this message']")
    assert browser.ask("document.activeElement.value").startswith("Is this **right**?\n\n```")  # as it was written
