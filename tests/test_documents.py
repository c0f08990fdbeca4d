"""Every `lumina …` line in a command block of README and docs/ is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lumina import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = ("", "bash", "sh")
ENDS = {"|", ";", "&&", "||", "&", ">", ">>", "<", "2>"}


def commands(text: str) -> list[list[str]]:
    """The words of each `lumina` command of a document's blocks, up to what the shell takes for itself."""
    found = []
    for language, block in BLOCK.findall(text):
        if language not in SHELL:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # a quote that goes on in the next line
                continue
            starts = [at for at, word in enumerate(words) if word == "lumina" and (at == 0 or _begins(words[at - 1]))]
            for start in starts:
                end = next((at for at in range(start, len(words)) if words[at] in ENDS), len(words))
                found.append(words[start + 1 : end])
    return found


def _begins(before: str) -> bool:
    return before in ENDS or before in ("until", "while", "do", "then", "time") or "=" in before


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_command_line_takes_what_documents_say(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(document.read_text()):
        if "…" in " ".join(words):
            continue
        assert exit_code(words) == 0, f"lumina {shlex.join(words)}: {capsys.readouterr().err}"


def exit_code(words: list[str]) -> int:
    """Of reading a command line: 0 where it is taken."""
    try:
        cli.parse(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_commands_are_found() -> None:
    text = (
        "```bash\nA=1 lumina train --config nano \\\n  --lr 1 | tee x   # remark\nlumina runs && lumina chat x\n```\n"
    )
    assert commands(text) == [["train", "--config", "nano", "--lr", "1"], ["runs"], ["chat", "x"]]
    assert sum(len(commands(document.read_text())) for document in DOCUMENTS) > 20
