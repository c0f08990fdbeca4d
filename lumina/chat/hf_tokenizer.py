"""The tokenizer and chat template that an imported model was trained with, behind the questions that ours answers.

A folder holds tokenizer.json, tokenizer_config.json, a Jinja chat template (chat_template.jinja, or in
tokenizer_config.json) and stops.json, as `lumina import` leaves them; a model's own Hugging Face folder will do too.

What is learned follows from the template alone. An answer is what rendering the turns up to it adds to rendering the
turns before it with the opening of the assistant's turn; it is learned from its first token to its first stop token.
Both renderings must be prefixes of the whole conversation's: a template that rewrites earlier turns is not trained on.
Text is cut where an answer begins before it is encoded, as it is when the model is asked, so that a prompt's ids are
always a prefix of what was learned. A vocabulary that puts a space before every text cannot be cut; there, a
conversation in which a token lies across the cut is refused.

Shapes as in template.py.
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

from lumina.chat import hf_files
from lumina.chat.escaping import Encoded, SealedEncoder, boundaries, clean, is_failure
from lumina.chat.jinja import INSTALL, JinjaTemplate, RefusalError
from lumina.chat.template import TEXT_ROLE, Conversation, Message, RenderedBlock, is_learned
from lumina.config import UserError

REWRITES = "the chat template rewrites earlier turns"
ENDLESS = "the chat template does not end an answer with a stop token"
SPANS = "spans of its text are masked (train_detail), which only Lumina's own template keeps"
FOLDED = "the chat template leaves a message out"
_PLACE = "\ufdd0"  # stands for a content where only what is around it is wanted


class Layout(NamedTuple):
    """One conversation: ids_T int32, mask_T uint8, offsets[M+1] of its messages, head[M] tokens before a content."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: list[int]
    head: list[int]


class ForeignTokenizer:
    """Text to ids and back, and conversations to ids and masks, as an imported model knows them."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError, by name, when a file is missing or damaged or tokenizers and jinja2 are not installed."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("an imported model's tokenizer needs tokenizers", INSTALL) from None
        self.folder = folder
        raw, spec = hf_files.read_json(folder / "tokenizer.json")
        settings = hf_files.read_settings(folder)
        try:
            self._tokenizer: Any = Tokenizer.from_str(raw)
            self._sealed = SealedEncoder(spec)
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
        self.stop_ids = hf_files.find_stops(folder, self._end_id) | self._turn_end()
        if max(self.stop_ids) >= self.vocab_size:
            raise UserError(f"{folder}: stop id {max(self.stop_ids)} is not in the vocabulary of {self.vocab_size}")
        begins = [self._id_of(names.get("bos_token")), self._end_id, min(self.stop_ids)]
        self.begin_id: int = next(token for token in begins if token is not None)
        """What stands before a text when something must: its beginning, else the end of the one before."""
        pad = self._id_of(names.get("pad_token"))
        self.pad_id: int = min(self.stop_ids) if pad is None else pad
        vocabulary = hashlib.sha256(raw.encode()).hexdigest()
        self.template_version = "jinja:" + _digest([text, names])
        self.fingerprint: str = _digest([vocabulary, self.template_version, sorted(self.stop_ids)])

    def _id_of(self, name: str | None) -> int | None:
        found: int | None = None if name is None else self._tokenizer.token_to_id(name)
        return found

    def _turn_end(self) -> frozenset[int]:
        """The control token that the template writes after an answer. Base models' files often name another one, since
        they end documents and not turns."""
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PLACE}]
            after = self._render(turns, opening=False).partition(_PLACE)[2]
        except RefusalError:
            return frozenset()
        return frozenset(self._sealed.controls_in(after)[:1])

    # --- Text ---

    def encode(self, text: str) -> list[int]:
        """Text as text: no control token comes out of it. Raises RefusalError where the vocabulary makes one anyway."""
        return [int(token) for token in self._sealed.encode(clean(text)).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, control tokens by name. Raises UserError when the tokenizer fails, as a damaged one may."""
        return self._decode(ids, without_controls=False)

    def decode_text(self, ids: Iterable[int]) -> str:
        """Ids to text without the control tokens."""
        return self._decode(ids, without_controls=True)

    def _decode(self, ids: Iterable[int], without_controls: bool) -> str:
        try:
            return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=without_controls))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise UserError(f"{self.folder}: the tokenizer fails on its own ids: {error}") from None

    def token_bytes(self, token: int) -> bytes:
        """The text of one id in UTF-8; a part of a character is U+FFFD."""
        return self.decode([token]).encode()

    def is_control(self, token: int) -> bool:
        return token in self._special or token >= self.vocab_size

    def sayable(self, vocab_size: int) -> NDArray[np.bool_]:
        """bool (V): text and the stop tokens, which alone the model may say."""
        sayable_V = np.arange(vocab_size) < self.vocab_size
        sayable_V[[token for token in self._special - self.stop_ids if token < vocab_size]] = False
        return sayable_V

    # --- Conversations ---

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids to generate from. Raises UserError when the template does not take the conversation."""
        try:
            mark, guarded = self._guarded(conversation.messages)
            text, cuts = self._render(guarded, opening=True), list[int]()
            for at, message in enumerate(guarded):
                if message["role"] == "assistant" and text.startswith(found := self._render(guarded[:at], True)):
                    cuts.append(len(found))
            return [int(token) for token in self._encode(text, mark, cuts, []).ids]
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain text to go on with, after what begins a text for this vocabulary. Raises UserError."""
        try:
            return [*self._leading, *self.encode(text)]
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None

    def lay_out(self, conversation: Conversation) -> Layout:
        """A conversation's ids, mask and messages. Raises RefusalError."""
        messages = conversation.messages
        roles = {message.role for message in messages}
        if TEXT_ROLE in roles:
            if roles != {TEXT_ROLE}:
                raise RefusalError("it mixes plain text with turns, which an imported model's template cannot")
            return self._texts(messages)
        if any(message.masked for message in messages):
            raise RefusalError(SPANS)
        mark, guarded = self._guarded(messages)
        text = self._render(guarded, opening=False)
        edges, contents = self._edges(text, guarded)
        tokens = self._encode(text, mark, list(contents.values()), edges)
        mask_T = np.zeros(len(tokens.ids), dtype=np.uint8)
        offsets, head = tokens.edges, [0] * len(messages)
        for (at, message), start in zip(
            ((i, m) for i, m in enumerate(messages) if m.role == "assistant"), tokens.contents, strict=True
        ):
            head[at] = start - offsets[at]
            stop = next((i for i in range(start, offsets[at + 1]) if int(tokens.ids[i]) in self.stop_ids), None)
            if stop is None:
                raise RefusalError(ENDLESS)
            if is_learned(message):
                mask_T[start : stop + 1] = 1
        return Layout(tokens.ids, mask_T, offsets, head)

    def spans(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int, int]]]:
        """A conversation's ids, and (message, start, end) of every answer with its stop token. Raises UserError."""
        whole = [message._replace(learn=True) for message in conversation.messages]
        try:
            layout = self.lay_out(Conversation(whole))
        except RefusalError as refusal:
            raise UserError(f"{self.folder}: {refusal}") from None
        found = []
        for at, (start, end) in enumerate(pairwise(layout.offsets)):
            learned = np.flatnonzero(layout.mask[start:end])
            if len(learned):
                found.append((at, start + int(learned[0]), start + int(learned[-1]) + 1))
        return layout.ids.tolist(), found

    def render_sound(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        """The conversations that the template takes, and why it does not take the others, by number."""
        layouts, refused, messages = list[Layout](), dict[int, str](), list[Message]()
        counts = [0]
        for number, conversation in enumerate(conversations):
            try:
                layouts.append(self.lay_out(conversation))
            except RefusalError as refusal:
                refused[number] = str(refusal)
                continue
            messages += conversation.messages
            counts.append(len(messages))
        starts = [0, *accumulate(len(layout.ids) for layout in layouts)]
        offsets = [[start + at for at in layout.offsets[:-1]] for start, layout in zip(starts, layouts, strict=False)]
        block = RenderedBlock(
            np.concatenate([np.empty(0, np.int32), *(layout.ids for layout in layouts)]),
            np.concatenate([np.empty(0, np.uint8), *(layout.mask for layout in layouts)]),
            np.array([*(at for own in offsets for at in own), starts[-1]], dtype=np.int64),
            np.array(counts, dtype=np.int64),
            np.array([is_learned(message) for message in messages], dtype=np.bool_),
            np.array([head for layout in layouts for head in layout.head], dtype=np.int64),
        )
        return block, refused

    def check_trainable(self) -> None:
        """Raise UserError, by name, when no conversation of several turns could be learned from."""
        if self._template is None:
            raise UserError(f"{self.folder} has no chat template: it is a base model that was not taught to chat")
        turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
        try:
            self.lay_out(Conversation(turns))
        except RefusalError as refusal:
            raise UserError(f"{self.folder} cannot be trained with: {refusal}") from None

    # --- Rendering ---

    def _guarded(self, messages: Sequence[Message]) -> tuple[str, list[dict[str, str]]]:
        """The mark, and the turns with the names of control tokens in their contents broken by it."""
        contents = [clean(message.content) for message in messages]
        mark = self._sealed.choose_mark(contents)
        turns = [
            {
                "role": message.role,
                "content": self._sealed.break_names(content, mark, special_only=message.role == "assistant"),
            }
            for message, content in zip(messages, contents, strict=True)
        ]
        return mark, turns

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
        probe = self._render([*turns, {"role": "assistant", "content": _PLACE}], opening=False)
        lead, found, _ = probe[len(before) :].partition(_PLACE)
        return len(lead) if found and probe.startswith(before) and own.startswith(lead) else 0

    def _texts(self, messages: Sequence[Message]) -> Layout:
        """Plain texts, each between what begins and what ends a document for this vocabulary; learned but for the
        beginning."""
        end = min(self.stop_ids) if self._end_id is None else self._end_id
        begin = [token for token in self._leading if token != end] or [end]
        ids, mask, offsets = list[int](), list[int](), [0]
        for message in messages:
            own = self.encode(message.content)
            ids += [*begin, *own, end]
            mask += [0] * len(begin) + [int(is_learned(message))] * (len(own) + 1)
            offsets.append(len(ids))
        return Layout(np.array(ids, np.int32), np.array(mask, np.uint8), offsets, [len(begin)] * len(messages))

    # --- Encoding ---

    @cached_property
    def _leading(self) -> list[int]:
        """What this vocabulary puts before a text, often a token for its beginning."""
        return [int(token) for token in self._tokenizer.encode("", add_special_tokens=True).ids]

    @cached_property
    def _joins(self) -> bool:
        """Whether texts can be encoded piece by piece: nothing is put before each of them."""
        whole, parts = self.encode("a\nb"), [*self.encode("a\n"), *self.encode("b")]
        return whole == parts

    def _encode(self, text: str, mark: str, contents: Sequence[int], edges: Sequence[int | None]) -> _Tokens:
        """Rendered text to ids; `contents` and `edges`, in characters, become tokens."""
        known = [edge for edge in edges if edge is not None]
        places = sorted({0, len(text), *contents, *known})
        pieces = [self._sealed.seal(text[a:b], mark) for a, b in pairwise(places)]
        moved = dict(zip(places, [0, *accumulate(map(len, pieces))], strict=True))
        sealed, cuts = "".join(pieces), [moved[at] for at in contents]
        encoded = self._joined(sealed, cuts) if self._joins else self._sealed.encode(sealed)
        starts = boundaries(encoded, cuts)
        if min(starts, default=0) < 0:
            raise RefusalError("its tokens run across the beginning of an answer")
        ends = boundaries(encoded, [moved[edge] for edge in known])
        found = iter([at if at >= 0 else -1 - at for at in ends])
        return _Tokens(encoded.ids, starts, _complete([None if edge is None else next(found) for edge in edges]))

    def _joined(self, sealed: str, cuts: Sequence[int]) -> Encoded:
        """Piece by piece between the cuts, with the characters of the whole."""
        places = sorted({0, len(sealed), *cuts})
        pieces = [(start, self._sealed.encode(sealed[start:end])) for start, end in pairwise(places)]
        return Encoded(
            np.concatenate([np.empty(0, np.int32), *(piece.ids for _, piece in pieces)]),
            np.concatenate([np.empty(0, np.int64), *(start + piece.starts for start, piece in pieces)]),
            np.concatenate([np.empty(0, np.int64), *(start + piece.ends for start, piece in pieces)]),
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
