"""A chat tokenizer from a Hugging Face folder: the vocabulary and Jinja chat template that an imported model has.

A folder holds tokenizer.json, tokenizer_config.json, a Jinja chat template (chat_template.jinja, or in
tokenizer_config.json) and stops.json, as `lumina import` leaves them; a model's own Hugging Face folder will do too.

What is supervised follows from the template alone. With a ChatML template, a user's "hi" and an assistant's "hello":

    before the answer   <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n     (add_generation_prompt)
    up to the answer    <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n
    the answer          hello<|im_end|>\n        what the second adds to the first
    supervised          hello<|im_end|>          up to its first stop token; what comes after is the template's

Both renderings must be prefixes of the whole conversation's: a template that rewrites earlier turns is not trained on.
Text is split where an answer begins before it is encoded (above, between "assistant\n" and "hello"), as it is when the
model is asked, so that a prompt's ids are always a prefix of what was trained on. A vocabulary that puts a space before
every text cannot be split so; there, a conversation in which a token lies across that place is refused.

Shapes as in protocol.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat import conversation as rule
from lumina.chat.conversation import ROLES, SUPERVISED_ROLES, TEXT_ROLE, Conversation, Message, is_supervised, loss_mask
from lumina.chat.hf import files as hf_files
from lumina.chat.hf.decoding import PrefixDecoder
from lumina.chat.hf.escaping import Encoded, EscapingEncoder, boundaries, clean, is_failure
from lumina.chat.hf.jinja import JinjaTemplate, RefusalError
from lumina.chat.protocol import AnswerReader, ContentReader, IncrementalDecoder, MessageSpan, RenderedBlock
from lumina.config import UserError, install_command

REWRITES = "the chat template rewrites earlier turns"
ENDLESS = "the chat template does not end an answer with a stop token"
SPANS = "spans of its text are masked (train_detail), which only Lumina's own template keeps"
FOLDED = "the chat template leaves a message out"
_PROBE = "\ufdd0"  # stands for a content where only what is around it is wanted


class TokenizedConversation(NamedTuple):
    """One conversation: ids_T int32, mask_T uint8, offsets[M+1] of its messages, head[M] tokens before a content, and
    ends[M], where the content with its stop token ends. Head and end are known for assistants' messages and texts; the
    others' are those of the whole message."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: list[int]
    head: list[int]
    ends: list[int]


def _tokenized(
    messages: Sequence[Message], ids: NDArray[np.int32], offsets: list[int], head: list[int], ends: list[int]
) -> TokenizedConversation:
    starts_M = np.array(offsets[:-1], np.int64) + np.array(head, np.int64)
    supervised_M = np.array([is_supervised(message) for message in messages], np.bool_)
    mask_T = loss_mask(supervised_M, starts_M, np.array(ends, np.int64), len(ids))
    return TokenizedConversation(ids, mask_T, offsets, head, ends)


class HFTokenizer:
    """Text to ids and back, and conversations to ids and loss masks (a ChatTokenizer; its docstrings say more)."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError, by name, when a file is missing or damaged or tokenizers and jinja2 are not installed."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("an imported model's tokenizer needs tokenizers", install_command("hf")) from None
        self.folder: Path | None = folder
        self.chat_template: str | None = None
        raw, spec = hf_files.read_json(folder / "tokenizer.json")
        settings = hf_files.read_settings(folder)
        try:
            self._tokenizer: Any = Tokenizer.from_str(raw)
            self._escaping = EscapingEncoder(spec)
            self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
            self._special = {int(t["id"]) for t in spec.get("added_tokens") or [] if t.get("special")}
        except BaseException as error:
            if not is_failure(error):
                raise
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        names = hf_files.special_names(settings)
        self._end_id = self._id_of(names.get("eos_token"))
        text = hf_files.template_text(folder, settings)
        self._template = None if text is None else JinjaTemplate(text, names, str(folder))
        self.stop_ids: frozenset[int] = hf_files.find_stops(folder, self._end_id) | self._turn_end()
        if max(self.stop_ids) >= self.vocab_size:
            raise UserError(f"{folder}: stop id {max(self.stop_ids)} is not in the vocabulary of {self.vocab_size}")
        begins = [self._id_of(names.get("bos_token")), self._end_id, min(self.stop_ids)]
        self.begin_id: int = next(token for token in begins if token is not None)
        """What stands before a text when something must: its beginning, else the end of the one before."""
        pad = self._id_of(names.get("pad_token"))
        self.pad_id: int = min(self.stop_ids) if pad is None else pad
        vocabulary = hashlib.sha256(raw.encode()).hexdigest()
        rendering = "jinja:" + _digest([text, names])
        self.template_version: str = rendering + rule.SUPERVISION_VERSION
        self.fingerprint: str = _digest([vocabulary, rendering, sorted(self.stop_ids)])

    def _id_of(self, name: str | None) -> int | None:
        found: int | None = None if name is None else self._tokenizer.token_to_id(name)
        return found

    def _turn_end(self) -> frozenset[int]:
        """The special token that the template writes after an answer. Base models' files often name another one, since
        they end documents and not turns."""
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
            after = self._render(turns, opening=False).partition(_PROBE)[2]
        except RefusalError:
            return frozenset()
        return frozenset(self._escaping.special_tokens_in(after)[:1])

    # --- Text ---

    def encode(self, text: str) -> list[int]:
        """Text as text: no special token comes out of it. Raises RefusalError where the vocabulary makes one anyway."""
        return [int(token) for token in self._escaping.encode(clean(text)).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, special tokens by name. Raises UserError when the tokenizer fails, as a damaged one may."""
        return self._decode(ids, without_special=False)

    def decode_text(self, ids: Iterable[int]) -> str:
        """Ids to text without the special tokens."""
        return self._decode(ids, without_special=True)

    def _decode(self, ids: Iterable[int], without_special: bool) -> str:
        try:
            return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=without_special))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise UserError(f"{self.folder}: the tokenizer fails on its own ids: {error}") from None

    def token_bytes(self, token: int) -> bytes:
        """The text of one id in UTF-8; a part of a character is U+FFFD."""
        return self.decode([token]).encode()

    def incremental_decoder(self) -> IncrementalDecoder:
        return PrefixDecoder(self.decode_text)

    def answer_reader(self, prompt: Sequence[int] = ()) -> AnswerReader:
        return ContentReader(self.incremental_decoder())

    def is_special(self, token: int) -> bool:
        return token in self._special or token >= self.vocab_size

    def allowed_tokens(self, vocab_size: int) -> NDArray[np.bool_]:
        """bool (V): text and the stop tokens, which alone the model may say."""
        allowed_V = np.arange(vocab_size) < self.vocab_size
        allowed_V[[token for token in self._special - self.stop_ids if token < vocab_size]] = False
        return allowed_V

    def warm_up(self) -> None:
        """Does nothing: the vocabulary is read when the tokenizer is made."""

    # --- Conversations ---

    def prompt_ids(self, conversation: Conversation, thinking: bool | None = None) -> list[int]:
        """The ids to generate from. Raises UserError when the template does not take the conversation."""
        try:
            character, turns = self._escaped(conversation.messages)
            text, cuts = self._render(turns, opening=True), list[int]()
            for at, turn in enumerate(turns):
                if turn["role"] == "assistant" and text.startswith(found := self._render(turns[:at], True)):
                    cuts.append(len(found))
            return [int(token) for token in self._encode(text, character, cuts, []).ids]
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain text to go on with, after what begins a text for this vocabulary. Raises UserError."""
        try:
            return [*self._leading, *self.encode(text)]
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None

    def tokenize(self, conversation: Conversation) -> TokenizedConversation:
        """A conversation's ids, loss mask and messages. Raises RefusalError."""
        messages = conversation.messages
        roles = {message.role for message in messages}
        if TEXT_ROLE in roles:
            if roles != {TEXT_ROLE}:
                raise RefusalError("it mixes plain text with turns, which an imported model's template cannot")
            return self._texts(messages)
        if any(message.masked for message in messages):
            raise RefusalError(SPANS)
        character, turns = self._escaped(messages)
        text = self._render(turns, opening=False)
        edges, contents = self._edges(text, turns)
        tokens = self._encode(text, character, list(contents.values()), edges)
        offsets, head, ends = tokens.edges, [0] * len(messages), tokens.edges[1:]
        answers = (at for at, message in enumerate(messages) if message.role == "assistant")
        for at, start in zip(answers, tokens.contents, strict=True):
            head[at] = start - offsets[at]
            stop = next((i for i in range(start, offsets[at + 1]) if int(tokens.ids[i]) in self.stop_ids), None)
            if stop is None:
                raise RefusalError(ENDLESS)
            ends[at] = stop + 1
        return _tokenized(messages, tokens.ids, offsets, head, ends)

    def message_spans(self, conversation: Conversation) -> tuple[list[int], list[MessageSpan]]:
        """Of the assistant's messages and texts: what the other messages hold besides is the template's."""
        try:
            whole = self.tokenize(conversation)
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None
        starts = [offset + head for offset, head in zip(whole.offsets, whole.head, strict=False)]
        places = zip(conversation.messages, starts, whole.ends, strict=True)
        spans = [MessageSpan(i, a, b) for i, (m, a, b) in enumerate(places) if m.role in SUPERVISED_ROLES]
        return whole.ids.tolist(), spans

    def render_valid(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        """The conversations that the template takes, and why it does not take the others, by number."""
        whole, refused, messages = list[TokenizedConversation](), dict[int, str](), list[Message]()
        counts = [0]
        for number, conversation in enumerate(conversations):
            try:
                whole.append(self.tokenize(conversation))
            except RefusalError as refusal:
                refused[number] = str(refusal)
                continue
            messages += conversation.messages
            counts.append(len(messages))
        starts = [0, *accumulate(len(one.ids) for one in whole)]
        offsets = [[start + at for at in one.offsets[:-1]] for start, one in zip(starts, whole, strict=False)]
        block = RenderedBlock(
            np.concatenate([np.empty(0, np.int32), *(one.ids for one in whole)]),
            np.concatenate([np.empty(0, np.uint8), *(one.mask for one in whole)]),
            np.array([*(at for own in offsets for at in own), starts[-1]], dtype=np.int64),
            np.array(counts, dtype=np.int64),
            np.array([is_supervised(message) for message in messages], dtype=np.bool_),
            np.array([head for one in whole for head in one.head], dtype=np.int64),
            np.array([number for number in range(len(conversations)) if number not in refused], dtype=np.int64),
            np.zeros(len(messages), dtype=np.bool_),
            np.array([ROLES.index(message.role) for message in messages], dtype=np.int8),
        )
        return block, refused

    def check_trainable(self) -> None:
        """Raise UserError, by name, when no conversation of several turns could be trained on."""
        if self._template is None:
            raise UserError(f"{self.folder} has no chat template: it is a base model that was not taught to chat")
        turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
        try:
            self.tokenize(Conversation(turns))
        except RefusalError as refusal:
            raise UserError(f"{self.folder} cannot be trained with: {refusal}") from None

    # --- Rendering ---

    def _escaped(self, messages: Sequence[Message]) -> tuple[str, list[dict[str, str]]]:
        """The escape character, and the turns with the names of special tokens in their contents escaped by it."""
        contents = [clean(message.content) for message in messages]
        character = self._escaping.choose_escape(contents)
        turns = [
            {
                "role": message.role,
                "content": self._escaping.escape(content, character, declared_only=message.role == "assistant"),
            }
            for message, content in zip(messages, contents, strict=True)
        ]
        return character, turns

    def _render(self, turns: Sequence[dict[str, str]], opening: bool) -> str:
        if self._template is None:
            raise RefusalError(
                "this imported model has no chat template: it is a base model that was not taught to chat"
            )
        return self._template.render(turns, opening)

    def _edges(self, text: str, turns: list[dict[str, str]]) -> tuple[list[int | None], dict[int, int]]:
        """In characters: where each message ends (None where the template does not say), and where each answer's
        content begins, by message. Raises RefusalError when an answer cannot be placed."""
        ends: list[int | None] = []
        contents: dict[int, int] = {}
        for at, turn in enumerate(turns):
            answer = turn["role"] == "assistant"
            try:
                after = text if at + 1 == len(turns) else self._render(turns[: at + 1], opening=False)
                before = self._render(turns[:at], opening=True) if answer else ""
            except RefusalError:
                if answer:
                    raise
                ends.append(None)  # a template may insist on more turns than a system message
                continue
            if answer:
                if not (text.startswith(after) and after.startswith(before) and len(before) < len(after)):
                    raise RefusalError(REWRITES)
                contents[at] = len(before) + self._lead(turns[:at], before, after, turn["content"])
            last = max((end for end in ends if end is not None), default=0)
            if len(after) <= last and turn["content"].strip() not in text[last:]:
                raise RefusalError(FOLDED)
            ends.append(len(after) if text.startswith(after) and len(after) > last else None)
        return [*ends[:-1], len(text)], contents

    def _lead(self, turns: Sequence[dict[str, str]], before: str, after: str, content: str) -> int:
        """How many characters the template puts between the opening of an answer and its content, such as an empty
        <think> block. White space there goes with the content: templates set it off and trim it as they like."""
        own = after[len(before) :]
        if own.lstrip().startswith(content.strip()):
            return 0
        probe = self._render([*turns, {"role": "assistant", "content": _PROBE}], opening=False)
        lead, found, _ = probe[len(before) :].partition(_PROBE)
        return len(lead) if found and probe.startswith(before) and own.startswith(lead) else 0

    def _texts(self, messages: Sequence[Message]) -> TokenizedConversation:
        """Plain texts, each between what begins and what ends a document for this vocabulary."""
        end = min(self.stop_ids) if self._end_id is None else self._end_id
        begin = [token for token in self._leading if token != end] or [end]
        ids, offsets = list[int](), [0]
        for message in messages:
            ids += [*begin, *self.encode(message.content), end]
            offsets.append(len(ids))
        return _tokenized(messages, np.array(ids, np.int32), offsets, [len(begin)] * len(messages), offsets[1:])

    # --- Encoding ---

    @cached_property
    def _leading(self) -> list[int]:
        """What this vocabulary puts before a text, often a token for its beginning."""
        return [int(token) for token in self._tokenizer.encode("", add_special_tokens=True).ids]

    @cached_property
    def _joins(self) -> bool:
        """Whether texts can be encoded segment by segment: nothing is put before each of them."""
        whole, parts = self.encode("a\nb"), [*self.encode("a\n"), *self.encode("b")]
        return whole == parts

    def _encode(self, text: str, character: str, contents: Sequence[int], edges: Sequence[int | None]) -> _Tokens:
        """Rendered text to ids; `contents` and `edges`, in characters, become tokens."""
        known = [edge for edge in edges if edge is not None]
        places = sorted({0, len(text), *contents, *known})
        segments = [self._escaping.to_placeholders(text[a:b], character) for a, b in pairwise(places)]
        moved = dict(zip(places, [0, *accumulate(map(len, segments))], strict=True))
        named, cuts = "".join(segments), [moved[at] for at in contents]
        encoded = self._joined(named, cuts) if self._joins else self._escaping.encode(named)
        starts = boundaries(encoded, cuts)
        if min(starts, default=0) < 0:
            raise RefusalError("its tokens run across the beginning of an answer")
        ends = boundaries(encoded, [moved[edge] for edge in known])
        found = iter([at if at >= 0 else -1 - at for at in ends])
        return _Tokens(encoded.ids, starts, _complete([None if edge is None else next(found) for edge in edges]))

    def _joined(self, named: str, cuts: Sequence[int]) -> Encoded:
        """Segment by segment between the cuts, with the characters of the whole."""
        places = sorted({0, len(named), *cuts})
        segments = [(start, self._escaping.encode(named[start:end])) for start, end in pairwise(places)]
        return Encoded(
            np.concatenate([np.empty(0, np.int32), *(segment.ids for _, segment in segments)]),
            np.concatenate([np.empty(0, np.int64), *(start + segment.starts for start, segment in segments)]),
            np.concatenate([np.empty(0, np.int64), *(start + segment.ends for start, segment in segments)]),
        )


class _Tokens(NamedTuple):
    """ids_T; where contents begin; the messages' offsets, from 0."""

    ids: NDArray[np.int32]
    contents: list[int]
    edges: list[int]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _complete(ends: list[int | None]) -> list[int]:
    """The messages' offsets from 0. A message that the template folds into the next one, as Llama 2's does with the
    system message, counts one token of it. Raises RefusalError when a message has no token at all."""
    offsets = [0]
    for end in ends:
        offsets.append(offsets[-1] + 1 if end is None else end)
        if offsets[-1] <= offsets[-2]:
            raise RefusalError(FOLDED)
    return offsets
