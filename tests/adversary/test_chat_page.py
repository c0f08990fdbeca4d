"""Attacks with the text of an answer in the chat page: what its markdown may cost. (The page in a browser, and what it
makes of markup, is tested in tests/infer/serve/test_chat_page.py.)"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lumina.infer.serve.endpoints.page import ASSETS

# A document of nodes that do nothing, and a count of the characters that searches look at.
SCRIPT = """
import { readFileSync } from "node:fs";
class Node {
  constructor() { this.dataset = {}; this.childNodes = []; }
  append(...all) { this.childNodes.push(...all); }
}
globalThis.document = { createElement: () => new Node(), createTextNode: (text) => text };
const { render } = await import(process.argv[1]);
let looked = 0;
const search = String.prototype.indexOf;
String.prototype.indexOf = function (what, from = 0) {
  const found = search.call(this, what, from);
  looked += (found < 0 ? this.length : found) - from + 1;
  return found;
};
const counts = [];
for (const text of JSON.parse(readFileSync(0, "utf-8"))) { looked = 0; render(text); counts.push(looked); }
console.log(JSON.stringify(counts));
"""

TEXTS = {
    "words in one underscore": "_a " * 5000,
    "strong that never closes": "**a " * 5000,
    "every mark": "_a *b ~~c **d __e " * 1000,
    "marks that cross": "*a_ " * 5000,
    "code of two lengths": "`a ``b " * 2500,
    "code that never closes": "``" + "`a " * 1,
    "many ticks": "`a```b" * 2500,
    # A search that begins again at each space would take minutes for these: longer than the page's script may take.
    "a heading with a line separator": "# " + " " * 1_000_000 + "a\u2028b",
    "an item with a paragraph separator": "- " + " " * 1_000_000 + "a\u2029b",
    "a heading with next lines": "# " + "\x85 " * 100_000 + "a\x85b",
    "brackets": "[" * 20_000,
    "stars": "*" * 50_000,
    "ticks": "`" * 50_000,
    "more nodes than a call takes arguments": "`a` " * 150_000,
    "more lines than a call takes arguments": "- a\n" + "  b\n" * 150_000,
    "more rows than a call takes arguments": "a|b\n-|-\n" + "|\n" * 150_000,
    "quotes in lists": "- > " * 2000 + "_a " * 1000,
}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's script without a browser")
def test_the_work_grows_with_the_text_alone(tmp_path: Path) -> None:
    shutil.copyfile(ASSETS / "markdown.js", tmp_path / "markdown.mjs")
    command = [
        "node",
        "--input-type=module",
        "-e",
        SCRIPT,
        str(tmp_path / "markdown.mjs"),
    ]
    given = json.dumps([*TEXTS.values()])
    told = json.loads(
        subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=200).stdout
    )
    for (name, text), looked in zip(TEXTS.items(), told, strict=True):
        assert looked <= 20 * len(text), name
