"""Generation with a KV cache: the prompts are prefilled in one pass, then each pass adds a token to each sequence."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.infer.generation import batch as batches
from lumina.infer.generation.batch import Finish, SequenceBatch, Token
from lumina.infer.generation.detokenizer import Detokenizer
from lumina.infer.generation.sampling import Sampling
from lumina.model import Transformer


@dataclass
class Answer:
    """One generated answer: its tokens without the stop token, and its text up to the first stop text, whose tokens
    are among the ids."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


def check_prompt(length: int, context_length: int) -> None:
    """Raise UserError when a prompt leaves no room for an answer."""
    if not 1 <= length < context_length:
        raise UserError(
            f"the prompt has {length} tokens, and the model's context length is {context_length}",
            "Shorten it: the prompt and the answer share the context length (seq_length).",
        )


def _begin(
    model: Transformer, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[SequenceBatch, list[Token]]:
    """A batch of just these prompts, and their first tokens."""
    context_length = model.config.seq_length
    for prompt in prompts:
        check_prompt(len(prompt), context_length)
    capacity = max(min(len(prompt) + sampling.max_length, context_length) for prompt in prompts)
    batch = SequenceBatch(model, tokenizer, len(prompts), capacity)
    sequences = [batches.Sequence(list(prompt), sampling, number) for number, prompt in enumerate(prompts)]
    for sequence in sequences:
        batch.join(sequence)
    return batch, batch.prefill(sequences)


def stream(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[list[tuple[int, int]]]:
    """Generate for a batch of prompts of any lengths.

    Yields after every pass the new tokens as (sequence, id) pairs, the stop token included: a sequence ends with it, at
    max_length tokens, or when prompt and answer fill the context length. Stop texts are the caller's: see
    `stream_texts`.

    Raises:
        UserError: a prompt that fills the context length; a model whose weights are not finite.
    """
    batch, tokens = _begin(model, tokenizer, prompts, sampling)
    while tokens:
        yield [(token.sequence.number, token.id) for token in tokens]
        tokens = batch.step()


def stream_texts(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    answers: Sequence[Answer],
) -> Iterator[list[tuple[int, str]]]:
    """As `stream`, but yields (sequence, text), and sequences end at stop texts too. Fills `answers` in on the way, so
    that a caller who stops reading still has what was generated."""
    detokenizers = [Detokenizer(tokenizer.incremental_decoder(), sampling.stop) for _ in prompts]
    batch, tokens = _begin(model, tokenizer, prompts, sampling)
    while tokens:
        chunks = []
        for token in tokens:
            number = token.sequence.number
            answer, detokenizer = answers[number], detokenizers[number]
            text, answer.finish = "", token.finish
            if token.finish != "stop":
                answer.ids.append(token.id)
                text = detokenizer.push(token.id)
            if detokenizer.stopped:
                answer.finish = "stop"
                batch.leave(token.sequence)
            elif token.finish is not None:
                text += detokenizer.end()
            answer.text += text
            chunks.append((number, text))
        yield chunks
        tokens = batch.step()


def generate(
    model: Transformer, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[Answer]:
    """Answers to a batch of prompts. See `stream_texts`."""
    answers = [Answer() for _ in prompts]
    for _ in stream_texts(model, tokenizer, prompts, sampling, answers):
        pass
    return answers


def stream_text(
    model: Transformer, tokenizer: ChatTokenizer, prompt: list[int], sampling: Sampling, answer: Answer
) -> Iterator[str]:
    """Generate for one prompt, yielding text as it is there, and filling in `answer`. Raises UserError when the prompt
    fills the context length."""
    for chunks in stream_texts(model, tokenizer, [prompt], sampling, [answer]):
        yield from (text for _, text in chunks)


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than line feed and tab become U+FFFD."""
    safe = (c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
    return "".join(safe)
