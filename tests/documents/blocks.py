"""Command blocks of a Markdown document, and the marks above them that say what of a block is not run, and why.

A block is fenced with its language: `bash` and `python` are commands, any other is not; none is refused. A mark is an
HTML comment on the lines right above the fence:

    <!-- not run: REASON -->                      the block
    <!-- not run (pip install): REASON -->        its commands that begin with these words
    <!-- run with NEW for OLD: REASON -->         this text in place of that one, wherever it stands in the block
    <!-- serves ADDRESS -->                       it goes on beside the document's later blocks once ADDRESS answers
    <!-- goes on -->                              a Python block that follows from the document's Python block before it
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ("bash", "python")

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_MARK = re.compile(r"^<!--\s*(.*?)\s*-->$")
_FORMS = {
    "skipped": re.compile(r"not run: (?P<reason>.+)"),
    "omitted": re.compile(r"not run \((?P<words>.+?)\): (?P<reason>.+)"),
    "replaced": re.compile(r"run with (?P<new>.+?) for (?P<old>.+?): (?P<reason>.+)"),
    "serves": re.compile(r"serves (?P<address>http://\S+)"),
    "goes_on": re.compile(r"goes on"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is the fence's own, counted from 1, so that its first command stands at `line` + 1."""

    document: Path
    line: int
    language: str
    text: str
    skipped: str = ""  # the reason
    omitted: dict[str, str] = field(default_factory=dict)  # the words that a command begins with -> the reason
    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)  # old -> new, the reason
    serves: str = ""
    goes_on: bool = False

    @property
    def place(self) -> str:
        path = self.document.relative_to(ROOT) if self.document.is_relative_to(ROOT) else self.document
        return f"{path}:{self.line}"

    def script(self) -> str:
        """What is run, line by line where the document has it: omitted commands are comments. Raises ValueError for a
        mark that changes nothing: what it was for has gone."""
        text = self.text
        for old, (new, _) in self.replaced.items():
            if old not in text:
                raise ValueError(f"{self.place}: the mark's `{old}` is not in the block")
            text = text.replace(old, new)
        for words in self.omitted:
            pattern = re.compile(rf"^{re.escape(words)}\b(?:.*\\\n)*.*$", re.MULTILINE)
            if not pattern.search(text):
                raise ValueError(f"{self.place}: no command of the block begins with the mark's `{words}`")
            text = pattern.sub(lambda found: re.sub("^", "# ", found[0], flags=re.MULTILINE), text)
        return text

    def notes(self) -> list[str]:
        """What is not run as it stands, for the log."""
        said = [f"not run: {self.skipped}"] if self.skipped else []
        said += [f"not run: {words} …: {reason}" for words, reason in self.omitted.items()]
        return said + [f"run with {new} for {old}: {reason}" for old, (new, reason) in self.replaced.items()]


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path) -> list[Block]:
    """The document's blocks of commands, in its order. Raises ValueError for a fence without a language, one that is
    not closed, commands that are indented rather than fenced, and a mark of no known form or above no fence."""
    lines = document.read_text(encoding="utf-8").splitlines()
    _refuse_loose_marks(document, lines)
    found: list[Block] = []
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if opened is None:
            if re.match(r"(?: {4}|\t)(lumina|python|pip|make|pytest) ", lines[number]):
                raise ValueError(f"{document}:{number + 1}: a command that no fence opens: begin it with ```bash")
            number += 1
            continue
        close = next((at for at in range(number + 1, len(lines)) if lines[at].strip() == opened[2]), None)
        if close is None:
            raise ValueError(f"{document}:{number + 1}: this block is not closed")
        language = opened[3].strip()
        if not language:
            raise ValueError(f"{document}:{number + 1}: a block without a language: bash, python, text, …")
        if language in COMMANDS:
            text = "\n".join(line.removeprefix(opened[1]) for line in lines[number + 1 : close]) + "\n"
            found.append(_marked(document, number, language, text, lines))
        number = close + 1
    return found


def _refuse_loose_marks(document: Path, lines: list[str]) -> None:
    """ValueError for a mark with something else than a fence, or another mark, right below: it would mark nothing."""
    for number, (line, below) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        comment = _MARK.match(line)
        known = comment is not None and any(form.fullmatch(comment[1]) for form in _FORMS.values())
        if known and not (_FENCE.match(below) or _MARK.match(below)):
            raise ValueError(f"{document}:{number}: this mark has no block right below it")


def _marked(document: Path, fence: int, language: str, text: str, lines: list[str]) -> Block:
    """The block whose fence is lines[fence], with its marks."""
    marks: dict[str, object] = {}
    omitted: dict[str, str] = {}
    replaced: dict[str, tuple[str, str]] = {}
    above = fence - 1
    while above >= 0 and (comment := _MARK.match(lines[above])):
        form, said = next(
            ((name, found) for name, pattern in _FORMS.items() if (found := pattern.fullmatch(comment[1]))), ("", None)
        )
        if said is None:
            raise ValueError(f"{document}:{above + 1}: no mark of a block that tests/documents/blocks.py knows")
        if form == "omitted":
            omitted[said["words"]] = said["reason"]
        elif form == "replaced":
            replaced[said["old"]] = (said["new"], said["reason"])
        else:
            values = {"skipped": said.groupdict().get("reason"), "serves": said.groupdict().get("address")}
            marks[form] = values.get(form, True)
        above -= 1
    return Block(document, fence + 1, language, text, omitted=omitted, replaced=replaced, **marks)  # type: ignore[arg-type]
