"""Constraints: which tokens a sequence may not take next, whatever the model thinks of them.

A grammar's is made by the package llguidance (MIT, one wheel of 3 MB without dependencies): of the libraries that work
on logits it alone takes a vocabulary as a list of bytes and gives a mask for a token, so that it fits any loop.

Shapes: V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lumina.chat import ChatTokenizer, ClosedError, RefusalError, json_text
from lumina.config import UserError, install_command
from lumina.files import read_text

log = logging.getLogger("lumina")

# White space between the parts is bounded: a small model may otherwise fill its answer with it.
_OPTIONS = {"whitespace_pattern": "[ \\n]{0,8}"}


GRAMMARS = 32  # compiled ones that are kept; a schema is 64 KiB of text at most


class Constraint(Protocol):
    """Of one sequence."""

    def forbidden(self) -> Tensor:
        """bool (V): what may not come next. Never all that the model may say."""

    def push(self, token: int) -> None:
        """The sequence goes on with `token`."""


class BannedTokens:
    """These tokens never come (a Constraint)."""

    def __init__(self, tokens: Iterable[int], vocab_size: int) -> None:
        self._forbidden_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._forbidden_V[list(tokens)] = True

    def forbidden(self) -> Tensor:
        return self._forbidden_V

    def push(self, token: int) -> None:
        """Nothing changes."""


class AllOf:
    """What any of several constraints forbids (a Constraint)."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        self._constraints = constraints

    def forbidden(self) -> Tensor:
        return torch.stack([one.forbidden() for one in self._constraints]).any(0)

    def push(self, token: int) -> None:
        for one in self._constraints:
            one.push(token)


class CallTokens(NamedTuple):
    """How a template writes a tool call: a token of its own before and after it, and between them the JSON object
    `{"name": …, "arguments": …}` with `before` and `after` around it."""

    opening: int
    closing: int
    before: str
    after: str


class GrammarCompiler:
    """Makes constraints of JSON schemas for one vocabulary. May be used by several threads at once."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        """Cheap: the vocabulary is read with the first schema (a second for 100,000 tokens)."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._matchers: OrderedDict[str, Any] = OrderedDict()  # by grammar, the least recently used first

    def json(self, schema: dict[str, Any]) -> Callable[[], Constraint]:
        """Makes constraints to JSON texts of this schema; {} stands for any. Raises UserError: a schema with keywords
        that are not supported, or one that is too large; llguidance is not installed."""
        matcher = self._matcher(_llguidance().LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_OPTIONS))
        return lambda: _Grammar(matcher.deep_copy(), self._tokenizer.stop_ids, self._vocab_size)

    def calls(self, tokens: CallTokens, schemas: Mapping[str, dict[str, Any]]) -> Callable[[], Constraint]:
        """Makes constraints to answers of which each tool call is of one of these tools, with arguments of its schema;
        what stands outside calls is free. Raises UserError, as `json`."""
        rules = []
        for number, (name, schema) in enumerate(schemas.items()):
            opening = json.dumps(f'{tokens.before}{{"name": {json_text(name)}, "arguments": ')
            closing = json.dumps("}" + tokens.after)
            rules.append(f"call{number}: {opening} arguments{number} {closing}")
            # A grammar of its own for each schema: references in it are to its own root.
            rules.append(f"arguments{number}: %json {json.dumps(schema | {'x-guidance': _OPTIONS})}")
        start = " | ".join(f"call{number}" for number in range(len(schemas)))
        matcher = self._matcher(_llguidance().LLMatcher.grammar_from_lark("\n".join([f"start: {start}", *rules])))
        stops, size = self._tokenizer.stop_ids, self._vocab_size
        return lambda: _Calls(tokens, lambda: _Grammar(matcher.deep_copy(), stops, size), stops, size)

    def _matcher(self, grammar: str) -> Any:
        """The matcher of a grammar at its beginning, to be copied; compiled once as long as it is in use. Raises
        UserError: a grammar that llguidance cannot keep."""
        guidance = _llguidance()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, self._vocab_size)
            if (held := self._matchers.get(grammar)) is not None:
                self._matchers.move_to_end(grammar)
                return held
        matcher = guidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the schema cannot be kept: {' '.join(matcher.get_error().split())[:300]}")
        with self._lock:
            self._matchers[grammar] = matcher
            if len(self._matchers) > GRAMMARS:
                self._matchers.popitem(last=False)
        return matcher


def _llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError:
        raise UserError(
            "JSON schemas need llguidance, which is not installed", f"Install it: {install_command('serve')}"
        ) from None


class _Grammar:
    """A matcher's state (a Constraint)."""

    def __init__(self, matcher: Any, stops: Collection[int], vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._only_stops_V = torch.ones(vocab_size, dtype=torch.bool)
        self._only_stops_V[list(stops)] = False

    def forbidden(self) -> Tensor:
        if self._matcher.is_stopped():  # complete, or beyond the parser's limits
            return self._only_stops_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        return torch.from_numpy(~allowed_V) if allowed_V.any() else self._only_stops_V

    def push(self, token: int) -> None:
        self._matcher.consume_token(token)


class _Calls:
    """Holds each tool call of an answer to a grammar (a Constraint). Its closing token stands for the grammar's end."""

    def __init__(
        self, tokens: CallTokens, grammar: Callable[[], Constraint], stops: Collection[int], vocab_size: int
    ) -> None:
        self._tokens, self._new_grammar, self._stops = tokens, grammar, list(stops)
        self._free_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._grammar: Constraint | None = None  # within a call

    def forbidden(self) -> Tensor:
        if self._grammar is None:
            return self._free_V
        forbidden_V = self._grammar.forbidden().clone()
        incomplete = bool(forbidden_V[self._stops].all())
        forbidden_V[self._stops] = True
        forbidden_V[self._tokens.opening] = True
        forbidden_V[self._tokens.closing] = incomplete
        return forbidden_V

    def push(self, token: int) -> None:
        if token == self._tokens.closing:
            self._grammar = None
        elif self._grammar is not None:
            self._grammar.push(token)
        elif token == self._tokens.opening:
            self._grammar = self._new_grammar()


def _vocabulary(tokenizer: ChatTokenizer, vocab_size: int) -> Any:
    """llguidance's form of a vocabulary. Of an imported one it reads the bytes of each token from its own file, which
    says how tokens join. Texts are encoded by our tokenizer all the same: llguidance would run what the file holds,
    normalizer and expressions, in this process and without a bound."""
    guidance = _llguidance()
    stops = sorted(tokenizer.stop_ids)
    if tokenizer.folder is not None:
        text = read_text(tokenizer.folder / "tokenizer.json")
        file = guidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=stops)
        tokens = [bytes(file.decode_bytes([token])) for token in range(vocab_size)]
        own: Any = guidance.TokenizerWrapper(_Imported(tokenizer, tokens, file.greedy_tokenize))
    else:
        tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        own = guidance.TokenizerWrapper(_Bytes(tokenizer, tokens))
    return guidance.LLTokenizer(own, n_vocab=vocab_size, eos_token=stops)


class _Bytes:
    """What llguidance asks of a vocabulary that it cannot read by itself."""

    def __init__(self, tokenizer: ChatTokenizer, tokens: list[bytes]) -> None:
        self._tokenizer, self.tokens = tokenizer, tokens
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids), None
        self.special_token_ids = [token for token in range(len(tokens)) if tokenizer.is_special(token)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", errors="replace"))


_BEFORE = "\n"  # before a text within an answer: a vocabulary that puts a space before every text puts it before this


class _Imported(_Bytes):
    """The same of an imported vocabulary. A text that it does not encode within bounds, or whose tokens do not spell
    it, is split into the longest tokens instead: as valid, but not the split that the model was trained on."""

    def __init__(
        self, tokenizer: ChatTokenizer, tokens: list[bytes], longest_tokens: Callable[[str], list[int]]
    ) -> None:
        self._longest_tokens, self._works = longest_tokens, False
        super().__init__(tokenizer, tokens)
        with contextlib.suppress(UserError, RefusalError):
            self._skipped = len(tokenizer.encode(_BEFORE))
            self._works = True

    def __call__(self, text: bytes) -> list[int]:
        said = text.decode("utf-8", errors="replace")
        try:
            ids = self._tokenizer.encode(_BEFORE + said)[self._skipped :] if self._works else []
        except RefusalError:
            ids = []
        except ClosedError:  # whoever waits for this answer ends
            self._works, ids = False, []
        except Exception as error:  # its bounds: the next texts would take as long. In llguidance any would be a panic
            log.warning("%s", error.message if isinstance(error, UserError) else error)
            self._works, ids = False, []
        spelt = b"".join(self.tokens[token] for token in ids)
        return ids if spelt == text else self._longest_tokens(said)
