"""A chat tokenizer from a Hugging Face folder: the vocabulary and Jinja chat template that an imported model has.

A folder holds tokenizer.json, tokenizer_config.json, a Jinja chat template (chat_template.jinja, or in
tokenizer_config.json) and stops.json, as `lumina import` leaves them; a model's own Hugging Face folder will do too.

What is supervised follows from the template alone. With a ChatML template, a user's "hi" and an assistant's "hello":

    the prompt     <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n     (add_generation_prompt)
    the answer     hello<|im_end|>      what a rendering with the answer adds to it, up to its first stop token

rendering.py has how that is found, also of templates that rewrite history: of those a conversation becomes several
samples. Text is split where an answer begins before it is encoded (above, between "assistant\n" and "hello"), as it is
when the model is asked, so that a prompt's ids are always a prefix of what was trained on. A vocabulary that puts a
space before every text cannot be split so; there, a conversation in which a token lies across that place is refused.

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
from lumina.chat.conversation import ROLES, TEXT_ROLE, Conversation, Message, loss_mask
from lumina.chat.hf import files as hf_files
from lumina.chat.hf.answer_form import AnswerForm, find_form
from lumina.chat.hf.answers import FormReader
from lumina.chat.hf.decoding import PrefixDecoder
from lumina.chat.hf.escaping import Encoded, EscapingEncoder, boundaries, clean, is_failure
from lumina.chat.hf.jinja import JinjaTemplate, RefusalError
from lumina.chat.hf.messages import escape_conversation
from lumina.chat.hf.probing import ChatTemplate
from lumina.chat.hf.rendering import FOLDED, Rendering, Sample
from lumina.chat.protocol import AnswerReader, ContentReader, IncrementalDecoder, MessageSpan, RenderedBlock
from lumina.config import UserError, install_command

MIXED = "it mixes plain text with turns, which an imported model's template cannot"
NO_TEMPLATE = "this imported model has no chat template: it is a base model that was not taught to chat"


class TokenizedSample(NamedTuple):
    """The first messages of a conversation: ids_T int32; offsets[M+1] of the messages; head[M] tokens before a content;
    the messages supervised in it with the tokens [start, end) of each; tokens [start, end) of them that are masked."""

    ids: NDArray[np.int32]
    offsets: list[int]
    head: list[int]
    supervised: dict[int, tuple[int, int]]
    masked: Sequence[tuple[int, int]] = ()

    @property
    def mask(self) -> NDArray[np.uint8]:
        """mask_T (uint8): 1 on the supervised tokens."""
        places = np.array([*self.supervised.values()], np.int64).reshape(-1, 2)
        mask_T = loss_mask(np.ones(len(places), np.bool_), places[:, 0], places[:, 1], len(self.ids))
        for start, end in self.masked:
            mask_T[start:end] = 0
        return mask_T


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
        self._raw = raw
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
        day = hf_files.find_date(folder, text)
        known = hf_files.find_stops(folder, self._end_id)
        self._template: ChatTemplate | None = None
        self.stop_ids: frozenset[int] = known
        if text is not None:
            jinja = JinjaTemplate(text, names, str(folder), day)
            self._template = ChatTemplate(jinja, self._escaping, known, self._end_id)
            self.stop_ids = self._template.stop_ids
        if max(self.stop_ids) >= self.vocab_size:
            raise UserError(f"{folder}: stop id {max(self.stop_ids)} is not in the vocabulary of {self.vocab_size}")
        begins = [self._id_of(names.get("bos_token")), self._end_id, min(self.stop_ids)]
        self.begin_id: int = next(token for token in begins if token is not None)
        """What stands before a text when something must: its beginning, else the end of the one before."""
        pad = self._id_of(names.get("pad_token"))
        self.pad_id: int = min(self.stop_ids) if pad is None else pad
        vocabulary = hashlib.sha256(raw.encode()).hexdigest()
        rendering = "turns:" + _digest([text, names, None if day is None else day.isoformat()])
        self.template_version: str = rendering + rule.SUPERVISION_VERSION
        self.fingerprint: str = _digest([vocabulary, rendering, sorted(self.stop_ids)])
        # Up to 0.2.0: without tools, dates and the stop tokens of tool calls, and what a template writes before a
        # content was context.
        stops = known if self._template is None else known | self._template.first_after_answer
        rendering = "jinja:" + _digest([text, names])
        earlier = _digest([vocabulary, rendering, sorted(stops)])
        self.earlier: tuple[str, str] = (earlier, rendering + rule.SUPERVISION_VERSION)

    def _id_of(self, name: str | None) -> int | None:
        found: int | None = None if name is None else self._tokenizer.token_to_id(name)
        return found

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
        """`prompt`: the ids that the answer follows; some templates' end within reasoning."""
        form = self._answer_form
        if form is None or not (form.closing or form.calls or form.header):
            return ContentReader(self.incremental_decoder())
        end = form.begun.strip()
        begun = bool(end) and self.decode(prompt[-32:]).rstrip().endswith(end)
        return FormReader(form, PrefixDecoder(self.decode), self.stop_ids, begun)

    @cached_property
    def _answer_form(self) -> AnswerForm | None:
        return None if self._template is None else find_form(self._template)

    @cached_property
    def _spoken(self) -> frozenset[int]:
        return self.stop_ids if self._template is None else self._template.spoken_ids

    def facts(self) -> tuple[str, dict[str, Any]]:
        """The text of tokenizer.json, and all that ids to text needs besides, for another process."""
        gone = ("_raw", "_tokenizer", "_escaping", "_template", "_joins", "_leading")
        known = {"_answer_form": self._answer_form, "_spoken": self._spoken}
        return self._raw, known | {name: value for name, value in vars(self).items() if name not in gone}

    def close(self) -> None:
        """Does nothing: all of it is in this process."""

    def is_special(self, token: int) -> bool:
        return token in self._special or token >= self.vocab_size

    def allowed_tokens(self, vocab_size: int) -> NDArray[np.bool_]:
        """bool (V): text, the stop tokens, and those that the template writes into answers (around tool calls)."""
        allowed_V = np.arange(vocab_size) < self.vocab_size
        allowed_V[[token for token in self._special - self._spoken if token < vocab_size]] = False
        return allowed_V

    def warm_up(self) -> None:
        """Does nothing: the vocabulary is read when the tokenizer is made."""

    # --- Conversations ---

    def prompt_ids(self, conversation: Conversation, thinking: bool | None = None) -> list[int]:
        """The ids to generate from. Raises UserError when the template does not take the conversation."""
        try:
            rendering, character = self._rendering(conversation)
            count = len(conversation.messages)
            text = rendering.text(count, True, thinking)
            return [int(token) for token in self._encode(text, character, rendering.cuts(text, count), []).ids]
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain text to go on with, after what begins a text for this vocabulary. Raises UserError."""
        try:
            return [*self._leading, *self.encode(text)]
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None

    def tokenize(self, conversation: Conversation, every_answer: bool = False) -> list[TokenizedSample]:
        """A conversation's samples, in which each of its supervised messages is supervised once; with `every_answer`,
        each of the assistant's. Raises RefusalError."""
        messages = conversation.messages
        roles = {message.role for message in messages}
        if TEXT_ROLE in roles:
            if roles != {TEXT_ROLE}:
                raise RefusalError(MIXED)
            return [self._texts(messages, every_answer)]
        rendering, character = self._rendering(conversation)
        answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
        samples = rendering.samples([at for at in answers if every_answer or messages[at].supervise])
        rendering.check_context(samples)
        return [self._tokenized(rendering, sample, character, messages) for sample in samples]

    def _rendering(self, conversation: Conversation) -> tuple[Rendering, str]:
        """The conversation's renderings, and the character that escapes in them."""
        if self._template is None:
            raise RefusalError(NO_TEMPLATE)
        called = any(message.tool_calls or message.call_id for message in conversation.messages)
        escaped = escape_conversation(conversation, self._escaping, called and self._template.nine_ids)
        self._template.check_shape(escaped.messages, escaped.tools)
        return self._template.rendering(escaped.messages, escaped.tools), escaped.character

    def _tokenized(
        self, rendering: Rendering, sample: Sample, character: str, messages: Sequence[Message]
    ) -> TokenizedSample:
        places = sorted(sample.supervised.items())
        cuts = sorted({*rendering.cuts(sample.text, sample.messages), *(start for _, (start, _) in places)})
        edges = rendering.edges(sample)
        masked = [span for at, _ in places for span in rendering.masked_spans(sample, at, messages[at], character)]
        tokens = self._encode(sample.text, character, cuts, [*edges, *(end for _, (_, end) in places)], masked)
        offsets = _complete(tokens.edges[: len(edges)])
        starts, head, supervised = dict(zip(cuts, tokens.cuts, strict=True)), [0] * sample.messages, {}
        for (at, (start, _)), end in zip(places, tokens.edges[len(edges) :], strict=True):
            assert end is not None
            supervised[at] = (starts[start], end)
            head[at] = max(starts[start] - offsets[at], 0)
        return TokenizedSample(tokens.ids, offsets, head, supervised, tokens.spans)

    def message_spans(self, conversation: Conversation) -> list[tuple[list[int], list[MessageSpan]]]:
        """Of the assistant's messages and texts: what the other messages hold besides is the template's."""
        try:
            samples = self.tokenize(conversation, every_answer=True)
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None
        return [
            (sample.ids.tolist(), [MessageSpan(at, *place) for at, place in sorted(sample.supervised.items())])
            for sample in samples
        ]

    def render_valid(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        """The conversations that the template takes, and why it does not take the others, by number."""
        samples, refused = list[tuple[int, TokenizedSample, list[bool]]](), dict[int, str]()
        for number, conversation in enumerate(conversations):
            try:
                found = self.tokenize(conversation)
            except RefusalError as refusal:
                refused[number] = str(refusal)
                continue
            samples += [(number, *pair) for pair in zip(found, _repeated(found), strict=True)]
        whole = [sample for _, sample, _ in samples]
        starts = [0, *accumulate(len(one.ids) for one in whole)]
        offsets = [[start + at for at in one.offsets[:-1]] for start, one in zip(starts, whole, strict=False)]
        roles = [
            ROLES.index(message.role)
            for number, one, _ in samples
            for message in conversations[number].messages[: len(one.head)]
        ]
        block = RenderedBlock(
            np.concatenate([np.empty(0, np.int32), *(one.ids for one in whole)]),
            np.concatenate([np.empty(0, np.uint8), *(one.mask for one in whole)]),
            np.array([*(at for own in offsets for at in own), starts[-1]], dtype=np.int64),
            np.array([0, *accumulate(len(one.head) for one in whole)], dtype=np.int64),
            np.array([at in one.supervised for one in whole for at in range(len(one.head))], dtype=np.bool_),
            np.array([head for one in whole for head in one.head], dtype=np.int64),
            np.array([number for number, _, _ in samples], dtype=np.int64),
            np.array([one for _, _, own in samples for one in own], dtype=np.bool_),
            np.array(roles, dtype=np.int8),
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

    def _texts(self, messages: Sequence[Message], every: bool) -> TokenizedSample:
        """Plain texts, each between what begins and what ends a document for this vocabulary."""
        end = min(self.stop_ids) if self._end_id is None else self._end_id
        begin = [token for token in self._leading if token != end] or [end]
        ids, offsets, supervised = list[int](), [0], {}
        for at, message in enumerate(messages):
            ids += [*begin, *self.encode(message.content), end]
            if message.supervise or every:
                supervised[at] = (offsets[-1] + len(begin), len(ids))
            offsets.append(len(ids))
        return TokenizedSample(np.array(ids, np.int32), offsets, [len(begin)] * len(messages), supervised)

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

    def _encode(
        self,
        text: str,
        character: str,
        cuts: Sequence[int],
        edges: Sequence[int | None],
        spans: Sequence[tuple[int, int]] = (),
    ) -> _Tokens:
        """Rendered text to ids; `cuts` (ascending), `edges` and `spans`, in characters, become tokens."""
        known = [edge for edge in edges if edge is not None]
        places = sorted({0, len(text), *cuts, *known, *(at for span in spans for at in span)})
        segments = [self._escaping.to_placeholders(text[a:b], character) for a, b in pairwise(places)]
        moved = dict(zip(places, [0, *accumulate(map(len, segments))], strict=True))
        named, starts = "".join(segments), [moved[at] for at in cuts]
        encoded = self._joined(named, starts) if self._joins else self._escaping.encode(named)
        placed = boundaries(encoded, [*starts, *(moved[edge] for edge in known)])
        if min(placed[: len(cuts)], default=0) < 0:
            raise RefusalError("its tokens run across the beginning of an answer")
        found = iter([at if at >= 0 else -1 - at for at in placed[len(cuts) :]])
        ends = [None if edge is None else next(found) for edge in edges]
        within = [boundaries(encoded, [moved[start], moved[end]]) for start, end in spans]
        # A token that lies across an end of a span belongs to it.
        own = [(start if start >= 0 else -1 - start, end if end >= 0 else -end) for start, end in within]
        return _Tokens(encoded.ids, placed[: len(cuts)], ends, own)

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
    """ids_T; where answers begin; where messages end (None where the template does not say); the tokens [start, end)
    that have a character in each span."""

    ids: NDArray[np.int32]
    cuts: list[int]
    edges: list[int | None]
    spans: list[tuple[int, int]]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _repeated(samples: Sequence[TokenizedSample]) -> list[list[bool]]:
    """Of each sample's messages, which another sample accounts for: the one in which it is supervised, else the first
    that has it."""
    owner: dict[int, int] = {}
    for number, sample in enumerate(samples):
        for at in range(len(sample.head)):
            if at in sample.supervised or at not in owner:
                owner[at] = number
    return [[owner[at] != number for at in range(len(sample.head))] for number, sample in enumerate(samples)]


def _complete(ends: list[int | None]) -> list[int]:
    """The messages' offsets from 0. A message that the template folds into the next one, as Llama 2's does with the
    system message, counts one token of it. Raises RefusalError when a message has no token at all."""
    offsets = [0]
    for end in ends:
        offsets.append(offsets[-1] + 1 if end is None else end)
        if offsets[-1] <= offsets[-2]:
            raise RefusalError(FOLDED)
    return offsets
