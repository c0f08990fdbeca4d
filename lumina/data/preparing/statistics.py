"""Data statistics: mergeable counts over conversations, gathered in the pass that training's reader makes.

Lengths are kept as exact histograms ({length: count}), so percentiles over any number of workers are exact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from operator import eq
from typing import Any

import numpy as np
import orjson
import pyarrow.compute as pc
from numpy.typing import NDArray

from lumina.chat import (
    SPECIAL_TOKENS,
    TOOL_ROLE,
    Conversation,
    MessageColumns,
    RenderedBlock,
    full_texts,
    is_supervised,
    message_columns,
)
from lumina.data.account import FIRST_LINES, add_counts
from lumina.data.cache import arrow
from lumina.data.cache.chunks import sums_between
from lumina.data.preparing.deduplication import conversation_hashes
from lumina.data.preparing.packing import pack
from lumina.data.records.fields import MOST_NAMES, OTHERS, shortened

SEQ_LENGTHS = (512, 1024, 2048, 4096, 8192)
SAMPLES_PER_TASK = 3
SAMPLE_CHARS = 4000

_NAMES = "|".join(re.escape(name[2:-2]) for name in SPECIAL_TOKENS)
PATTERNS: dict[str, re.Pattern[str]] = {
    "special-token text": re.compile(rf"<\|(?:{_NAMES}|endofprompt|fim_[a-z]+)\|>"),
    # C0 and C1 controls, zero-width and direction marks, private use, replacement character.
    "suspicious characters": re.compile(
        "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ue000-\uf8ff\ufeff\ufffd]"
    ),
    "email address": re.compile(
        r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b", re.ASCII
    ),
    "phone number": re.compile(r"(?<![\w.])\+?\d{1,3}[ .-]?\(?\d{2,4}\)?[ .-]\d{3,4}[ .-]?\d{3,4}(?![\w.])", re.ASCII),
    "secret key": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|xox[abprs]-[A-Za-z0-9-]{10,})"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    ),
}
# One pass of RE2 (linear, an order of magnitude faster than `re`) over a block finds the few messages worth a closer
# look: every message that a pattern above matches is among them.
_CANDIDATE = (
    r"<\||[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x{9f}\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2060}-\x{206f}"
    r"\x{e000}-\x{f8ff}\x{feff}\x{fffd}]|[A-Za-z0-9._%+-]@[A-Za-z0-9-]|[0-9][ .)-]{1,2}\(?[0-9]{2}"
    r"|sk-[A-Za-z0-9_-]{20}|AKIA|gh[pousr]_|xox[abprs]-|-----BEGIN"
)
_SCRIPTS = {
    "Latin": re.compile("[A-Za-z\u00c0-\u024f]"),
    "Cyrillic": re.compile("[\u0400-\u052f]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
    "Kana": re.compile("[\u3040-\u30ff]"),
    "Hangul": re.compile("[\uac00-\ud7af]"),
    "Han": re.compile("[\u4e00-\u9fff]"),
}


@dataclass
class Occurrences:
    """One kind of anomaly in the data: how many messages or conversations have it, and the first places."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Statistics:
    """Counts over conversations; histograms map a length (as text, for JSON) to a count."""

    formats: dict[str, int] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)  # the records' own `lang`
    scripts: dict[str, int] = field(default_factory=dict)  # of conversations, by the script most of a sample is in
    turns: dict[str, int] = field(default_factory=dict)
    message_tokens: dict[str, int] = field(default_factory=dict)
    conversation_tokens: dict[str, int] = field(default_factory=dict)
    supervised_tokens: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Occurrences] = field(default_factory=dict)
    hashes: list[int] = field(default_factory=list)  # 63 bits a conversation, for exact duplicates
    samples: list[dict[str, Any]] = field(default_factory=list)

    def find(self, what: str, line: int, count: int = 1) -> None:
        entry = self.findings.setdefault(what, Occurrences())
        entry.count += count
        if len(entry.first) < FIRST_LINES and (not entry.first or entry.first[-1] != str(line)):
            entry.first.append(str(line))

    def add_record(self, kind: str | None, record: Any, lines: int) -> None:
        """Enters a used record's format, and its language where it names one."""
        add_counts(self.formats, {kind or "": lines})
        if isinstance(record, dict) and isinstance(record.get("lang"), str):
            self._add_languages({shortened(record["lang"]): 1})

    def _add_languages(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            known = name in self.languages or len(self.languages) < MOST_NAMES
            add_counts(self.languages, {name if known else OTHERS: count})

    def add(self, conversations: Sequence[Conversation], lines: Sequence[int], block: RenderedBlock) -> None:
        """Enters conversations with the lines they come from, those of them that a block holds the rendering of. A
        conversation may be rendered several times: once for each of its answers."""
        taken, source = np.unique(block.source, return_inverse=True)
        conversations, lines = [conversations[i] for i in taken.tolist()], [lines[i] for i in taken.tolist()]
        bounds = block.message_offsets[block.conversation_offsets]
        supervised = np.zeros(len(conversations), dtype=np.int64)
        np.add.at(supervised, source, sums_between(block.mask, bounds))
        _tally(self.message_tokens, np.diff(block.message_offsets)[~block.repeated])
        _tally(self.conversation_tokens, np.diff(bounds))
        _tally(self.supervised_tokens, supervised)
        _tally(self.turns, np.array([len(conversation.messages) for conversation in conversations], dtype=np.int64))
        messages = [message for conversation in conversations for message in conversation.messages]
        columns = message_columns(messages)
        add_counts(self.roles, Counter(columns.role))
        add_counts(self.scripts, Counter(map(_script_of, conversations)))
        self.hashes += [found >> 1 for found in conversation_hashes(conversations, columns)]
        with_calls = TOOL_ROLE in columns.role or any(columns.tool_calls) or any(one.tools for one in conversations)
        for conversation, line, again in zip(conversations, lines, _roles_again(conversations, columns), strict=True):
            self._look(conversation, line, again, with_calls)
        line_of = [line for one, line in zip(conversations, lines, strict=True) for _ in one.messages]
        self._search(full_texts(messages, columns), line_of)
        if len(self.samples) < SAMPLES_PER_TASK:
            for n in range(min(len(conversations), SAMPLES_PER_TASK - len(self.samples))):
                self.samples.append(_sample(conversations[n], lines[n]))

    def _look(self, conversation: Conversation, line: int, again: bool, with_calls: bool) -> None:
        """One conversation's order of turns, in which a role comes `again` at once or not, and its calls."""
        messages = conversation.messages
        if again:
            self.find("roles that do not alternate", line)
            if any(map(eq, messages, messages[1:])):
                self.find("a turn repeated at once", line)
        if messages[-1].role in _ASKING:
            self.find(f"ends with an unanswered {messages[-1].role} turn", line)
        if with_calls:
            self._look_at_calls(conversation, line)

    def _look_at_calls(self, conversation: Conversation, line: int) -> None:
        """Tool calls without a declaration and results without a call: they are used as the file has them."""
        declared = {orjson.loads(tool)["function"]["name"] for tool in conversation.tools}
        called: set[str] = set()
        waiting = 0
        for message in conversation.messages:
            waiting += len(message.tool_calls)
            called |= {call.name for call in message.tool_calls}
            if message.role == "tool":
                if not waiting:
                    self.find("a tool's result without a call", line)
                waiting = max(0, waiting - 1)
        if called - declared:
            self.find("a call of a tool that is not declared", line, len(called - declared))

    def _search(self, texts: Sequence[str], lines: Sequence[int]) -> None:
        """Enters the messages that a pattern matches; `texts`: all that each says, `lines`: where each comes from."""
        found = pc.match_substring_regex(arrow.strings(texts), _CANDIDATE)
        candidates = np.flatnonzero(arrow.numpy(found))
        for message in candidates.tolist():
            for what, pattern in PATTERNS.items():
                if pattern.search(texts[message]):
                    self.find(what, lines[message])

    def merge(self, other: Statistics, source: str, line_base: int) -> None:
        """Adds a worker's statistics of part of `source`, whose first line is number `line_base` + 1."""
        for name in ("formats", "roles", "scripts", "turns", *LENGTHS):
            add_counts(getattr(self, name), getattr(other, name))
        self._add_languages(other.languages)
        for what, theirs in other.findings.items():
            entry = self.findings.setdefault(what, Occurrences())
            entry.count += theirs.count
            room = FIRST_LINES - len(entry.first)
            entry.first += [f"{source}:{int(line) + line_base}" for line in theirs.first[:room]]
        self.hashes += other.hashes
        self.samples += [{**sample, "line": f"{source}:{sample['line'] + line_base}"} for sample in other.samples]

    def duplicates(self) -> int:
        """Conversations equal to an earlier one, message for message."""
        return len(self.hashes) - len(np.unique(np.array(self.hashes, dtype=np.int64)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Statistics:
        findings = {what: Occurrences(**entry) for what, entry in data["findings"].items()}
        return cls(**{**data, "findings": findings})


LENGTHS = ("message_tokens", "conversation_tokens", "supervised_tokens")
_ASKING = ("user", TOOL_ROLE)


def _script_of(conversation: Conversation) -> str:
    """The script that most letters are in where the conversation begins."""
    head = conversation.messages[0].content[:200]
    return "Latin" if head.isascii() else max(_SCRIPTS, key=lambda name: len(_SCRIPTS[name].findall(head)))


def _roles_again(conversations: Sequence[Conversation], columns: MessageColumns) -> list[bool]:
    """Whether a role follows itself at once in each conversation; of a tool's, as of several results, that is usual."""
    if not conversations:
        return []
    sizes_N = np.fromiter((len(one.messages) for one in conversations), dtype=np.int64, count=len(conversations))
    stop_N = np.cumsum(sizes_N)
    follows = map(eq, columns.role, chain(islice(columns.role, 1, None), [""]))
    again_M = np.fromiter(follows, dtype=np.bool_, count=len(columns.role))
    again_M[stop_N - 1] = False
    if TOOL_ROLE in columns.role:
        again_M &= [role != TOOL_ROLE for role in columns.role]
    return list(np.logical_or.reduceat(again_M, stop_N - sizes_N).tolist())


def _tally(histogram: dict[str, int], values: NDArray[np.int64]) -> None:
    lengths, counts = np.unique(values, return_counts=True)
    add_counts(histogram, {str(int(k)): int(n) for k, n in zip(lengths, counts, strict=True)})


def _sample(conversation: Conversation, line: int) -> dict[str, Any]:
    """A conversation for the report, long messages truncated for display and marked so."""
    return {
        "line": line,
        "tools": [_shown(tool) for tool in conversation.tools[:12]],
        "messages": [
            {
                "role": message.role,
                "name": message.name,
                "reasoning": _shown(message.reasoning),
                "content": _shown(message.content),
                "tool_calls": [_shown(f"{call.name} {call.arguments}") for call in message.tool_calls],
                "supervised": is_supervised(message),
            }
            for message in conversation.messages[:12]
        ],
        "more": max(0, len(conversation.messages) - 12),
    }


def _shown(text: str) -> str:
    return text[:SAMPLE_CHARS] + ("…" if len(text) > SAMPLE_CHARS else "")


def expand_histogram(histogram: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(lengths ascending, counts), int64 each."""
    lengths = np.array(sorted(map(int, histogram)), dtype=np.int64)
    return lengths, np.array([histogram[str(length)] for length in lengths], dtype=np.int64)


def percentiles(histogram: dict[str, int]) -> dict[str, float]:
    """Minimum, 50, 90, 99 percent, maximum and mean of a histogram (nearest rank)."""
    lengths, counts = expand_histogram(histogram)
    if not len(lengths):
        return {}
    cumulated = np.cumsum(counts)
    total = int(cumulated[-1])
    at = {p: int(lengths[np.searchsorted(cumulated, -(-total * p // 100))]) for p in (50, 90, 99)}
    mean = float((lengths * counts).sum() / total)
    ends = {"min": int(lengths[0]), "max": int(lengths[-1])}
    return {"min": ends["min"], **{f"p{p}": v for p, v in at.items()}, "max": ends["max"], "mean": round(mean, 2)}


def context_lengths(histogram: dict[str, int]) -> list[dict[str, float]]:
    """For each context length (512 to 8,192, and in steps of four to what holds the longest): the share of
    conversations longer than it, the share of tokens that truncating there would lose, and about how full packed rows
    would be (conversations split every so many tokens, not at message boundaries)."""
    lengths, counts = expand_histogram(histogram)
    out = []
    seq_lengths = list(SEQ_LENGTHS)
    while len(lengths) and seq_lengths[-1] < lengths[-1]:
        seq_lengths.append(4 * seq_lengths[-1])
    for seq_length in seq_lengths:
        total = int((lengths * counts).sum())
        over = int(counts[lengths > seq_length].sum())
        lost = int((np.maximum(lengths - seq_length, 0) * counts).sum())
        rests = np.repeat(lengths % seq_length, counts)
        rests = rests[rests > 0]
        full = int((lengths // seq_length * counts).sum())
        rows = full + (int(pack(rests.astype(np.int32), seq_length).max()) + 1 if len(rests) else 0)
        out.append(
            {
                "seq_length": seq_length,
                "longer": round(over / max(1, int(counts.sum())), 6),
                "lost": round(lost / max(1, total), 6),
                "fill": round(total / max(1, rows * seq_length), 6),
            }
        )
    return out
