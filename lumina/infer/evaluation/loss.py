"""`lumina evaluate`: loss, perplexity and bits per byte of a model on held-out conversations.

Every token of every message is predicted once: in its conversation when that fits the context length, else within the
window of that length that it falls into. Sums are kept per message and added up by role and, for assistants, by turn;
assistants' tokens also by position: how many tokens the model saw before each, between powers of two.

- loss: nats per token; a message's tokens are its content and the token that ends it. The headline is the assistants'.
- bits per byte: the same nats in bits, over the UTF-8 bytes of the content. It compares models of different tokenizers.

Shapes: T tokens laid end to end, V vocabulary, N supervised positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.chat import Conversation, MessageSpan, full_text
from lumina.config import UserError
from lumina.data import BLANK, Fault, Tree, convert, detect, expand, read_items
from lumina.infer.loading import Loaded
from lumina.model import Transformer, ops, position_bins

_TOKENS_AT_ONCE = 4096  # in a forward pass, unless one window is longer
_ROWS_AT_ONCE = 256  # of logits: 100k of them for each row


@dataclass
class Score:
    """Sums over messages."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    messages: int = 0

    def add(self, nats: float, tokens: int, size: int) -> None:
        self.nats += nats
        self.tokens += tokens
        self.bytes += size
        self.messages += 1

    def to_dict(self) -> dict[str, Any]:
        loss = self.nats / self.tokens if self.tokens else None
        return {
            "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "messages": self.messages,
        }


@dataclass
class TokenLoss:
    """Sums over tokens."""

    nats: float = 0.0
    tokens: int = 0


@dataclass
class Evaluation:
    """By role, and assistants' by turn (1 is the first answer of a conversation) and by position: under k, the loss of
    tokens that have 2**k up to 2**(k + 1) - 1 tokens before them in their window."""

    roles: dict[str, Score] = field(default_factory=dict)
    turns: dict[int, Score] = field(default_factory=dict)
    positions: dict[int, TokenLoss] = field(default_factory=dict)
    conversations: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # places where a conversation longer than the context had to be cut

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.roles.get("assistant", Score()).to_dict(),
            "conversations": self.conversations,
            "cuts_at_the_window": self.cut,
            "skipped": dict(self.skipped),
            "by_role": {role: score.to_dict() for role, score in sorted(self.roles.items())},
            "by_turn": {str(turn): score.to_dict() for turn, score in sorted(self.turns.items())},
            "by_position": [
                {"from": 2**k, "to": 2 ** (k + 1) - 1, "loss": one.nats / one.tokens, "tokens": one.tokens}
                for k, one in sorted(self.positions.items())
            ],
        }


def read_conversations(paths: Sequence[str], skipped: Counter[str]) -> Iterator[Conversation]:
    """The conversations of files in any format that training reads; bad records are counted by reason.

    Raises UserError when a file cannot be read.
    """
    for path in expand(paths):
        if not Path(path).is_file():
            raise UserError(f"no such file: {path}")
        try:
            for item in read_items(path, detect(path)):
                if item.record is BLANK:
                    continue
                found = convert(item.record)
                if isinstance(found, Fault):
                    skipped[found.reason] += 1
                elif isinstance(found, Tree):
                    skipped.update(found.discarded)
                    yield from found.conversations
                else:
                    yield found
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None


class ScoringWindow(NamedTuple):
    """One of the windows that a long text is scored in: its tokens from `first` (at least 1) on are predicted. The last
    one the model does not see."""

    ids: list[int]
    first: int = 1


class Predicted(NamedTuple):
    """What each predicted token cost, in nats (float32, on the CPU), and whether it was the likeliest."""

    nats_N: Tensor
    likeliest_N: Tensor


@torch.inference_mode()
def predict(model: Transformer, windows: Sequence[ScoringWindow], at_once: int | None = None) -> Iterator[Predicted]:
    """Score windows, laid end to end in passes of up to 4,096 tokens and `at_once` windows; each attends to itself."""
    for batch in _batches(windows, at_once or len(windows)):
        yield from _pass(model, batch)


def _batches(windows: Sequence[ScoringWindow], at_once: int) -> Iterator[list[ScoringWindow]]:
    batch: list[ScoringWindow] = []
    filled = 0
    for window in windows:
        if batch and (filled + len(window.ids) > _TOKENS_AT_ONCE or len(batch) == at_once):
            yield batch
            batch, filled = [], 0
        batch.append(window)
        filled += len(window.ids)
    if batch:
        yield batch


def _pass(model: Transformer, batch: list[ScoringWindow]) -> Iterator[Predicted]:
    device = model.embedding.weight.device
    lengths = [len(window.ids) - 1 for window in batch]
    starts = (0, *accumulate(lengths))
    ids_T = torch.tensor([token for window in batch for token in window.ids[:-1]], device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    bounds = torch.tensor(starts, dtype=torch.int32, device=device)
    hidden_TD = model.trunk(ids_T[None], positions_T[None], bounds, max(lengths), bounds=starts)[0]
    targets_N = torch.tensor([token for window in batch for token in window.ids[window.first :]], device=device)
    rows_N = torch.cat(
        [torch.arange(at + w.first - 1, at + len(w.ids) - 1) for w, at in zip(batch, starts[:-1], strict=True)]
    ).to(device)
    nats, likeliest = [], []
    for rows_n, ids_n in zip(torch.split(rows_N, _ROWS_AT_ONCE), torch.split(targets_N, _ROWS_AT_ONCE), strict=True):
        logits_nV = model.output(hidden_TD[rows_n])
        likeliest.append(logits_nV.argmax(-1) == ids_n)
        nats.append(ops.cross_entropy_(logits_nV, ids_n, torch.zeros_like(ids_n).float()))
    counts = [len(window.ids) - window.first for window in batch]
    parts = (torch.split(torch.cat(found).cpu(), counts) for found in (nats, likeliest))
    yield from map(Predicted, *parts)


@dataclass
class _TokenizedConversation:
    """A sample of a conversation, and once scored the loss of each token (nats; 0 for the first)."""

    conversation: Conversation
    ids: list[int]
    spans: list[MessageSpan]
    nats_T: Tensor
    first: bool  # of the conversation's samples

    @classmethod
    def of(cls, conversation: Conversation, loaded: Loaded) -> Iterator[_TokenizedConversation]:
        """Its samples: several where an imported model's template rewrites history."""
        for number, (ids, spans) in enumerate(loaded.tokenizer.message_spans(conversation)):
            yield cls(conversation, ids, spans, torch.zeros(len(ids), dtype=torch.float64), number == 0)

    def windows(self, size: int) -> list[tuple[int, int]]:
        """[start, end) of the windows in which it is scored. Each begins with the last token of the one before, so that
        every token but the first is predicted exactly once."""
        return [(start, min(start + size, len(self.ids))) for start in range(0, len(self.ids) - 1, size - 1)]


def evaluate(loaded: Loaded, conversations: Iterable[Conversation]) -> Evaluation:
    """Score conversations. Raises UserError when an imported model's template refuses one."""
    result = Evaluation()
    for group in _groups(one for given in conversations for one in _TokenizedConversation.of(given, loaded)):
        parts = [(tokenized, *span) for tokenized in group for span in tokenized.windows(loaded.context_length)]
        result.cut += len(parts) - len(group)
        windows = [ScoringWindow(tokenized.ids[start:end]) for tokenized, start, end in parts]
        for (tokenized, start, end), found in zip(parts, predict(loaded.model, windows), strict=True):
            tokenized.nats_T[start + 1 : end] = found.nats_N
        for tokenized in group:
            _tally(result, tokenized, loaded.context_length)
    return result


def _groups(conversations: Iterator[_TokenizedConversation]) -> Iterator[list[_TokenizedConversation]]:
    """Conversations in order, as many at a time as fill a few forward passes."""
    group: list[_TokenizedConversation] = []
    for tokenized in conversations:
        group.append(tokenized)
        if sum(len(t.ids) for t in group) >= 4 * _TOKENS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _tally(result: Evaluation, tokenized: _TokenizedConversation, context_length: int) -> None:
    messages = tokenized.conversation.messages
    result.conversations += tokenized.first
    turns = list(accumulate(message.role == "assistant" for message in messages))
    for index, start, end in tokenized.spans:
        message = messages[index]
        nats, size = float(tokenized.nats_T[start:end].sum()), len(full_text(message).encode("utf-8", "replace"))
        result.roles.setdefault(message.role, Score()).add(nats, end - start, size)
        if message.role == "assistant":
            result.turns.setdefault(turns[index], Score()).add(nats, end - start, size)
            _tally_positions(result, tokenized, max(1, start), end, context_length)


def _tally_positions(
    result: Evaluation, tokenized: _TokenizedConversation, start: int, end: int, context_length: int
) -> None:
    """Add the tokens [start, end), by how many come before each in its window."""
    before_N = (torch.arange(start, end) - 1) % (context_length - 1) + 1
    bins_N = position_bins(before_N)
    nats_K, tokens_K = torch.bincount(bins_N, tokenized.nats_T[start:end]), torch.bincount(bins_N)
    for k in tokens_K.nonzero().flatten().tolist():
        sums = result.positions.setdefault(k, TokenLoss())
        sums.nats += float(nats_K[k])
        sums.tokens += int(tokens_K[k])


def evaluation_table(evaluation: Evaluation) -> str:
    """For a reader."""
    rows = [(role, score) for role, score in sorted(evaluation.roles.items())]
    rows += [(f"answer {turn}", score) for turn, score in sorted(evaluation.turns.items())][:10]
    lines = [f"{'':12}{'loss':>9}{'ppl':>12}{'bits/byte':>11}{'tokens':>10}{'messages':>10}"]
    for name, score in rows:
        facts = score.to_dict()
        per_byte = "-" if facts["bits_per_byte"] is None else f"{facts['bits_per_byte']:.4f}"
        loss, ppl = facts["loss"] or 0.0, facts["perplexity"] or 1.0
        lines.append(f"{name:12}{loss:9.4f}{ppl:12.2f}{per_byte:>11}{score.tokens:10,}{score.messages:10,}")
    lines += ["", f"{'answers, by tokens before':28}{'loss':>9}{'tokens':>12}"]
    for one in evaluation.to_dict()["by_position"]:
        place = f"{one['from']:,} to {one['to']:,}"
        lines.append(f"{place:28}{one['loss']:9.4f}{one['tokens']:12,}")
    return "\n".join(lines)
