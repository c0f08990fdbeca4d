"""Law 4: every message of every input line is supervised, context (masked), or dropped with a counted reason.

An `Account` is filled by whoever reads, splits and packs, merged over workers, checked (`check`: the sums add up) and
printed (`report`). It is plain data, kept in the cache's meta.json.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumina.data.records.fields import FieldTally

FIRST_LINES = 5  # how many line numbers are kept for each reason
MOST_SUBREASONS = 12  # of a reason; further ones are counted together
OTHER_SUBREASONS = "others"
_VARIES = re.compile(r"\d+|'[^']*'|\"[^\"]*\"")  # in what is said of a line: numbers and what is quoted from it
MOST_REASONS = 100  # for which lines are skipped, after which those that the data gives a name are counted together
MOST_FIELDS = 20  # names shown of a sort
# Reasons as every version has stored them in its caches, and how they are shown.
DROPPED_OVERLONG = "longer than the window (overlong: drop)"
DROPPED_TRUNCATED = "past the window (overlong: truncate)"
DROPPED_UNSUPERVISED = "in a chunk without a supervised token"
_SHOWN = {
    DROPPED_OVERLONG: "longer than seq_length (overlong: drop)",
    DROPPED_TRUNCATED: "past seq_length (overlong: truncate)",
}
# The names of these counts in caches and reports since version 0.1.0, which are read and written as they were.
_STORED = {
    "messages_supervised": "messages_trained",
    "tokens_supervised": "tokens_trained",
    "seq_length": "window",
    "chunks": "pieces",
}
_FIELDS = {stored: name for name, stored in _STORED.items()}
_NOT_ADDED = ("faults", "fields", "unknown_fields", "last_line", "overlong", "overlong_context", "seq_length")
_SKIPPED = "line skipped: "  # before a fault's reason, where messages are counted
MOST_WITHOUT_QUESTION = 0.01  # of the supervised messages: above it, the account warns
FIELD_SORTS = ("used", "harmless", "empty or repeated", "unknown", "set aside", "refused")


def add_counts(own: dict[str, int], more: Mapping[str, int]) -> None:
    """Adds counts by key."""
    for key, count in more.items():
        own[key] = own.get(key, 0) + count


def field_sums(fields: Mapping[str, Mapping[str, int]]) -> str:
    """How many fields there were of each sort (lumina.data.records.fields)."""
    return ", ".join(f"{sum(fields.get(sort, {}).values()):,} {sort}" for sort in FIELD_SORTS)


def field_details(fields: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each sort, the most frequent names first."""
    out = []
    for sort in FIELD_SORTS:
        names = sorted(fields.get(sort, {}).items(), key=lambda entry: (-entry[1], entry[0]))
        if names:
            more = ", …" if len(names) > MOST_FIELDS else ""
            out.append(f"  fields {sort}: {', '.join(f'{n} {count:,}' for n, count in names[:MOST_FIELDS])}{more}")
    return out


def subreason(detail: str) -> str:
    """What lines have in common of which this is said: it without numbers and without what is quoted from a line."""
    return _VARIES.sub("…", detail)[:120]


class AccountError(RuntimeError):
    """The account of a data set does not add up: something was lost, or counted twice, by a fault of this package."""


@dataclass
class SubreasonCount:
    """Lines skipped for one reason in one way: how many, and the first of them, where it is and what is wrong."""

    lines: int
    first: str
    example: str


@dataclass
class FaultCount:
    """Lines skipped for one reason: how many, how many messages they held, and where the first ones are."""

    lines: int = 0
    messages: int = 0
    first: list[str] = field(default_factory=list)  # "file:line", or the bare line number inside a worker's report
    example: str = ""  # what was wrong with the first of them
    subreasons: dict[str, SubreasonCount] = field(default_factory=dict)

    def add_subreason(self, name: str, lines: int, first: str, example: str) -> None:
        if name not in self.subreasons and len(self.subreasons) >= MOST_SUBREASONS:
            name = OTHER_SUBREASONS
        entry = self.subreasons.setdefault(name, SubreasonCount(0, first, example))
        entry.lines += lines

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FaultCount:
        subreasons = {name: SubreasonCount(**entry) for name, entry in data.get("subreasons", {}).items()}
        return cls(**{**data, "subreasons": subreasons})


@dataclass
class Account:
    """Counts in lines (records of any format), conversations, messages and tokens.

    `*_dropped` map a reason to a count. Tokens are those of the template's rendering, special tokens included;
    `tokens_repeated` are those that chunks have as context on top of that, since they are counted elsewhere.
    """

    lines: int = 0
    blank_lines: int = 0
    last_line: int = 0  # number of the last line read; lines of JSON may hold several records, each counted in `lines`
    records: int = 0  # lines used: a line each, but for flat OASST messages, where a tree takes several
    conversations: int = 0
    paths_discarded: dict[str, int] = field(default_factory=dict)  # of OASST trees
    faults: dict[str, FaultCount] = field(default_factory=dict)
    conversations_dropped: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    messages_supervised: int = 0
    messages_masked: int = 0
    messages_dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    tokens_supervised: int = 0
    tokens_masked: int = 0
    tokens_dropped: dict[str, int] = field(default_factory=dict)
    tokens_repeated: int = 0
    overlong: str = "split"
    seq_length: int = 0
    overlong_context: float = 0.0
    overlong_conversations: int = 0
    cut_messages: int = 0
    answers_without_question: int = 0  # that begin in a chunk without a token of their question
    answers_with_question_cut: int = 0  # … with the end of it alone
    chunks: int = 0
    samples: int = 0
    epoch_tokens: int = 0  # in the samples: with sources' weights, a conversation's tokens as often as it is taken
    notes: list[str] = field(default_factory=list)
    fields: dict[str, dict[str, int]] = field(default_factory=dict)  # by sort and name: lumina.data.records.fields
    unknown_fields: dict[str, str] = field(default_factory=dict)  # an example of each: where, and its value

    def fault(self, reason: str, line: int | str, messages: int = 0, detail: str = "", example: str = "") -> None:
        """Counts one skipped line and the messages it held; detail: what is wrong with it, example: the same with the
        beginning of the line."""
        reason = self._fault_reason(reason)
        entry = self.faults.setdefault(reason, FaultCount())
        entry.lines += 1
        entry.example = entry.example or example
        entry.messages += messages
        entry.add_subreason(subreason(detail), 1, str(line), example or detail)
        if len(entry.first) < FIRST_LINES:
            entry.first.append(str(line))
        if messages:
            self.messages += messages
            self.drop_messages(f"{_SKIPPED}{reason}", messages)

    def _fault_reason(self, reason: str) -> str:
        """The reason under which a fault is counted here: its own, or `kind: others` where a `kind: name`, such as that
        of a field, is one too many."""
        kind, named, _ = reason.partition(": ")
        counted = not named or reason in self.faults or len(self.faults) < MOST_REASONS
        return reason if counted else f"{kind}: {OTHER_SUBREASONS}"

    def add_fields(self, tally: FieldTally) -> None:
        """Enters the fields that a reader met, and the messages that it left out of the records it used."""
        for sort, names in tally.totals().items():
            add_counts(self.fields.setdefault(sort, {}), names)
        for name, (line, value) in tally.examples.items():
            self.unknown_fields.setdefault(name, f"{line}: {value}")
        for reason, count in tally.dropped.items():
            self.messages += count
            self.drop_messages(reason, count)

    def drop_messages(self, reason: str, count: int) -> None:
        if count:
            self.messages_dropped[reason] = self.messages_dropped.get(reason, 0) + count

    def drop_tokens(self, reason: str, count: int) -> None:
        if count:
            self.tokens_dropped[reason] = self.tokens_dropped.get(reason, 0) + count

    def drop_conversations(self, reason: str, count: int) -> None:
        if count:
            self.conversations_dropped[reason] = self.conversations_dropped.get(reason, 0) + count

    def merge(self, other: Account, source: str, line_base: int) -> None:
        """Adds a worker's report on part of `source`, whose first line is number `line_base` + 1."""
        renamed: dict[str, str] = {}
        for reason, theirs in other.faults.items():
            kept = self._fault_reason(reason)
            renamed[f"{_SKIPPED}{reason}"] = f"{_SKIPPED}{kept}"
            entry = self.faults.setdefault(kept, FaultCount())
            entry.lines += theirs.lines
            entry.messages += theirs.messages
            entry.example = entry.example or theirs.example
            room = FIRST_LINES - len(entry.first)
            entry.first += [f"{source}:{int(line) + line_base}" for line in theirs.first[:room]]
            for name, own in theirs.subreasons.items():
                entry.add_subreason(name, own.lines, f"{source}:{int(own.first) + line_base}", own.example)
        for sort, names in other.fields.items():
            add_counts(self.fields.setdefault(sort, {}), names)
        for name, example in other.unknown_fields.items():
            line, _, value = example.partition(": ")
            self.unknown_fields.setdefault(name, f"{source}:{int(line) + line_base}: {value}")
        for name, value in vars(other).items():
            if name in _NOT_ADDED:
                continue
            own = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, own + value)
            elif isinstance(value, list):
                own.extend(value)
            else:
                for key, count in value.items():
                    add_counts(own, {renamed.get(key, key): count})

    @property
    def bad_lines(self) -> int:
        return sum(entry.lines for entry in self.faults.values())

    @property
    def fill(self) -> float:
        """The share of the rows' room that holds tokens; 0 without rows."""
        return self.epoch_tokens / (self.samples * self.seq_length) if self.samples else 0.0

    def check(self) -> None:
        """Raises AccountError unless lines, messages and tokens add up (law 4)."""
        if self.lines != self.blank_lines + self.records + self.bad_lines:
            raise AccountError("lines do not add up")
        dropped = sum(self.messages_dropped.values())
        if self.messages != self.messages_supervised + self.messages_masked + dropped:
            raise AccountError("messages do not add up")
        dropped = sum(self.tokens_dropped.values())
        if self.tokens != self.tokens_supervised + self.tokens_masked + dropped:
            raise AccountError("tokens do not add up")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data under the stored names, with the derived `bad_lines` and `fill`."""
        counts = {_STORED.get(name, name): value for name, value in asdict(self).items()}
        return {**counts, "bad_lines": self.bad_lines, "fill": round(self.fill, 6)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Account:
        """From `to_dict`, of this version or an earlier one."""
        named = {_FIELDS.get(name, name): value for name, value in data.items()}
        fields = {name: value for name, value in named.items() if name in cls.__dataclass_fields__}
        faults = {reason: FaultCount.from_dict(entry) for reason, entry in data["faults"].items()}
        return cls(**{**fields, "faults": faults})

    def report(self, without: Collection[str] = ()) -> list[str]:
        """The account as lines of text, every drop with its reason; `without` the sums of these names."""
        return [*(line for name, line in self.sums().items() if name not in without), *self.details()]

    def sums(self) -> dict[str, str]:
        """A line of text each: what adds up (lines, messages, tokens), fields, how it was split and packed."""
        dropped_messages = sum(self.messages_dropped.values())
        dropped_tokens = sum(self.tokens_dropped.values())
        lines = f"{self.lines:,} = {self.records:,} used + {self.bad_lines:,} bad + {self.blank_lines:,} blank"
        messages = f"{self.messages:,} = {self.messages_supervised:,} supervised + {self.messages_masked:,} masked"
        tokens = f"{self.tokens:,} = {self.tokens_supervised:,} supervised + {self.tokens_masked:,} masked"
        overlong = f"{self.overlong_conversations:,} conversations ({self.overlong})"
        questions = (
            f"{self.answers_without_question:,} answers begun without their question"
            f" and {self.answers_with_question_cut:,} with its end alone"
        )
        return {
            "lines": f"lines          {lines}; {self.conversations:,} conversations",
            "messages": f"messages       {messages} + {dropped_messages:,} dropped",
            "tokens": f"tokens         {tokens} + {dropped_tokens:,} dropped",
            "splitting": f"over {self.seq_length:,} tokens {overlong}, {self.cut_messages:,} messages cut,"
            f" {self.tokens_repeated:,} context tokens repeated, {questions}",
            "fields": f"fields         {field_sums(self.fields)}",
            "packing": f"samples        {self.samples:,} from {self.chunks:,} chunks, {100 * self.fill:.2f}% full",
        }

    def details(self) -> list[str]:
        """Every reason for which something was left out, the fields by name, and notes."""
        out: list[str] = []
        for reason, entry in sorted(self.faults.items()):
            more = ", …" if entry.lines > len(entry.first) else ""
            example = f": {entry.example}" if entry.example else ""
            out.append(f"  bad: {reason}: {entry.lines:,} ({', '.join(entry.first)}{more}){example}")
            if len(entry.subreasons) > 1:
                kinds = sorted(entry.subreasons.items(), key=lambda kind: -kind[1].lines)
                out += [f"    {name}: {kind.lines:,} ({kind.first})" for name, kind in kinds]
        for what, counts in (
            ("OASST paths", self.paths_discarded),
            ("conversations", self.conversations_dropped),
            ("messages", self.messages_dropped),
            ("tokens", self.tokens_dropped),
        ):
            out += [
                f"  dropped {what}: {_SHOWN.get(reason, reason)}: {count:,}" for reason, count in sorted(counts.items())
            ]
        out += field_details(self.fields)
        out += [f"  unknown field {name}: {text}" for name, text in sorted(self.unknown_fields.items())[:MOST_FIELDS]]
        out += [f"  note: {note}" for note in self.notes]
        return out + [f"  warning: {warning}" for warning in self.warnings()]

    def warnings(self) -> list[str]:
        """What the user should know before training on it, each with its remedy."""
        answers = self.answers_without_question
        if answers <= MOST_WITHOUT_QUESTION * self.messages_supervised:
            return []
        remedy = "Raise seq_length"
        if not self.overlong_context:
            remedy += ", or set overlong_context (0.25) so that chunks begin with the end of the question"
        return [
            f"{answers:,} of {self.messages_supervised:,} answers begin without their question, which lies in another"
            f" chunk. {remedy}."
        ]
