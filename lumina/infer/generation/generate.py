"""Generation with a KV cache: the prompts are prefilled in one pass, then each pass adds a token to each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lumina.chat import AnswerDelta, ChatTokenizer, Message, ToolCall
from lumina.config import UserError
from lumina.infer.generation import batch as batches
from lumina.infer.generation.batch import Finish, SequenceBatch, Token
from lumina.infer.generation.constraint import BannedTokens
from lumina.infer.generation.detokenizer import Detokenizer
from lumina.infer.generation.forms import reasoning_tokens
from lumina.infer.generation.sampling import Sampling
from lumina.model import Transformer


@dataclass
class Answer:
    """One generated answer: its tokens without the stop token, and what they say. `text` is the content up to the first
    stop text, whose tokens are among the ids."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: AnswerDelta) -> None:
        self.text += delta.content
        self.reasoning += delta.reasoning
        self.tool_calls += delta.tool_calls

    def message(self) -> Message:
        """The answer as a message of the conversation that it belongs to."""
        return Message("assistant", self.text, reasoning=self.reasoning, tool_calls=tuple(self.tool_calls))


def check_prompt(length: int, context_length: int) -> None:
    """Raise UserError when a prompt leaves no room for an answer."""
    if not 1 <= length < context_length:
        raise UserError(
            f"the prompt has {length} tokens, and the model's context length is {context_length}",
            "Shorten it: the prompt and the answer share the context length (seq_length).",
        )


def _begin(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    banned: Iterable[int] = (),
) -> tuple[SequenceBatch, list[Token]]:
    """A batch of just these prompts, and their first tokens; `banned` ones never come."""
    context_length = model.config.seq_length
    for prompt in prompts:
        check_prompt(len(prompt), context_length)
    capacity = max(min(len(prompt) + sampling.max_length, context_length) for prompt in prompts)
    batch = SequenceBatch(model, tokenizer, len(prompts), capacity)
    sequences = [batches.Sequence(list(prompt), sampling, number) for number, prompt in enumerate(prompts)]
    if banned:
        constraint = BannedTokens(banned, model.config.vocab_size)
        sequences = [replace(sequence, constraint=constraint) for sequence in sequences]
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
    `stream_answers`.

    Raises:
        UserError: a prompt that fills the context length; a model whose weights are not finite.
    """
    batch, tokens = _begin(model, tokenizer, prompts, sampling)
    while tokens:
        yield [(token.sequence.number, token.id) for token in tokens]
        tokens = batch.step()


def stream_answers(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    answers: Sequence[Answer],
    thinking: bool | None = None,
) -> Iterator[list[tuple[int, AnswerDelta]]]:
    """As `stream`, but yields (sequence, what its token added), and sequences end at stop texts too. Fills `answers` in
    on the way, so that a caller who stops reading still has what was generated. `thinking` is what the prompts were
    made with: where it is False, no reasoning begins."""
    detokenizers = [Detokenizer(tokenizer.answer_reader(prompt), sampling.stop) for prompt in prompts]
    banned = reasoning_tokens(tokenizer) if thinking is False else frozenset[int]()
    batch, tokens = _begin(model, tokenizer, prompts, sampling, banned)
    while tokens:
        new = []
        for token in tokens:
            number = token.sequence.number
            answer, detokenizer = answers[number], detokenizers[number]
            deltas, answer.finish = list[AnswerDelta](), token.finish
            if token.finish != "stop":
                answer.ids.append(token.id)
                deltas.append(detokenizer.push(token.id))
            if detokenizer.stopped:
                answer.finish = "stop"
                batch.leave(token.sequence)
            elif token.finish is not None:
                deltas.append(detokenizer.end())
            for delta in deltas:
                answer.add(delta)
                new.append((number, delta))
        yield new
        tokens = batch.step()


def generate(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[Answer]:
    """Answers to a batch of prompts. See `stream_answers`."""
    answers = [Answer() for _ in prompts]
    for _ in stream_answers(model, tokenizer, prompts, sampling, answers, thinking):
        pass
    return answers


def stream_answer(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompt: list[int],
    sampling: Sampling,
    answer: Answer,
    thinking: bool | None = None,
) -> Iterator[AnswerDelta]:
    """Answer one prompt, yielding what it says as it is there, and filling in `answer`. Raises UserError when the
    prompt fills the context length."""
    for new in stream_answers(model, tokenizer, [prompt], sampling, [answer], thinking):
        yield from (delta for _, delta in new)
