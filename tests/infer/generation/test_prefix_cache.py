"""Prompts that go on from what others have left say what they say alone; what is kept stays within its bounds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lumina.chat import ChatTokenizer, open_tokenizer
from lumina.config import UserError
from lumina.infer import Sampling
from lumina.infer.generation.batch import Sequence, SequenceBatch, Token
from lumina.infer.generation.prefix_cache import LEAST, PrefixCache
from lumina.model import CachedRow, Transformer
from tests.infer.small_models import make_model
from tests.small_tokenizer import VOCABULARY, write_tokenizer

ROOM = 128


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return open_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer"))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(vocab_size=VOCABULARY)


def ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(20, VOCABULARY), k=length)


def greedy(most: int = 8) -> Sampling:
    return Sampling(temperature=0, max_length=most)


def run(batch: SequenceBatch, *sequences: Sequence, chunk: int | None = None) -> dict[Sequence, list[Token]]:
    """Let sequences join and run to their ends, prefilled one at a time."""
    told: dict[Sequence, list[Token]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        batch.join(sequence)
        while sequence.fed < len(sequence.prompt):
            for token in batch.prefill([sequence], chunk):
                told[token.sequence].append(token)
    while tokens := batch.step():
        for token in tokens:
            told[token.sequence].append(token)
    return told


def alone(model: Transformer, tokenizer: ChatTokenizer, prompt: list[int], most: int = 8) -> list[Token]:
    sequence = Sequence(list(prompt), greedy(most), logprobs=1)
    return run(SequenceBatch(model, tokenizer, 1, ROOM), sequence)[sequence]


WINDOWS = {"family": "gemma3_text", "sliding_window": 7, "sliding_layers": [0], "sliding_rope_theta": 50.0}


@pytest.mark.parametrize("shape", [{}, WINDOWS], ids=["llama", "windows"])
@pytest.mark.parametrize("static", [False, True])
def test_turns_of_conversations_say_what_they_say_alone(
    tokenizer: ChatTokenizer, shape: dict[str, Any], static: bool
) -> None:
    """Two conversations with one opening, over three turns, some given up in the middle of a prompt or an answer."""
    model = make_model(vocab_size=VOCABULARY, **shape)
    batch = SequenceBatch(model, tokenizer, 3, ROOM, static, PrefixCache(3, 1 << 24))
    opening, chance, reused = ids(24, 0), random.Random(1), 0
    spoken = {0: list(opening), 1: list(opening)}
    for turn in range(3):
        for which, before in spoken.items():
            before += ids(5 + which, 10 * turn + which)
        given_up = Sequence([*opening, *ids(30, 90 + turn)], greedy(), logprobs=1)
        batch.join(given_up)
        batch.prefill([given_up], chance.choice([7, 30, 60]))
        if turn == 1:
            batch.step()
        sequences = {which: Sequence(list(before), greedy(), logprobs=1) for which, before in spoken.items()}
        for sequence in sequences.values():
            batch.join(sequence)
        found: dict[int, list[Token]] = {0: [], 1: []}
        for which, sequence in sequences.items():
            found[which] += batch.prefill([sequence])
            batch.leave(given_up)
        while tokens := batch.step():
            for token in tokens:
                next(said for which, said in found.items() if sequences[which] is token.sequence).append(token)
        for which, sequence in sequences.items():
            wanted = alone(model, tokenizer, spoken[which])
            assert [token.id for token in found[which]] == [token.id for token in wanted]
            told = [token.logprob for token in found[which]]
            assert told == pytest.approx([token.logprob for token in wanted], abs=1e-4)
            assert sequence.reused >= (0, 24, 30)[turn]
            assert sequence.reused < len(sequence.prompt)
            reused += sequence.reused
            spoken[which] += sequence.generated
    assert reused > 150


def test_the_whole_past_of_a_conversation_is_reused(model: Transformer, tokenizer: ChatTokenizer) -> None:
    batch = SequenceBatch(model, tokenizer, 2, ROOM, prefixes=PrefixCache(2, 1 << 24))
    first = Sequence(ids(40, 1), greedy())
    run(batch, first, chunk=16)
    assert first.reused == 0
    past = [*first.prompt, *first.generated]
    second = Sequence([*past, *ids(3, 2)], greedy())
    told = run(batch, second)[second]
    assert second.reused == len(past) - 1  # the last token was never fed
    assert [token.id for token in told] == [token.id for token in alone(model, tokenizer, second.prompt)]
    again = Sequence(list(second.prompt), greedy())  # word for word: one token is fed
    assert [token.id for token in run(batch, again)[again]] == [token.id for token in told]
    assert again.reused == len(again.prompt) - 1


def test_several_answers_to_a_prompt_share_it(model: Transformer, tokenizer: ChatTokenizer) -> None:
    batch = SequenceBatch(model, tokenizer, 2, ROOM, prefixes=PrefixCache(2, 1 << 24))
    sequences = [Sequence(ids(30, 1), Sampling(seed=3, max_length=9), number) for number in range(2)]
    run(batch, *sequences)
    assert [sequence.reused for sequence in sequences] == [0, 29]
    plain = [Sequence(ids(30, 1), Sampling(seed=3, max_length=9), number) for number in range(2)]
    run(SequenceBatch(model, tokenizer, 2, ROOM), *plain)
    assert [sequence.generated for sequence in sequences] == [sequence.generated for sequence in plain]


def test_a_failed_pass_leaves_nothing_behind(tokenizer: ChatTokenizer) -> None:
    model = make_model(vocab_size=VOCABULARY)
    prefixes = PrefixCache(2, 1 << 24)
    batch = SequenceBatch(model, tokenizer, 2, ROOM, prefixes=prefixes)
    poisoned = Sequence(ids(40, 1), greedy())
    weight = model.output.weight.clone()
    model.output.weight.fill_(torch.nan)
    batch.join(poisoned)
    with pytest.raises(UserError, match="not finite"):
        batch.prefill([poisoned])
    batch.leave(poisoned, keep=False)
    model.output.weight.copy_(weight)
    assert len(prefixes) == 0
    sound = Sequence(ids(40, 1), greedy())
    assert [t.id for t in run(batch, sound)[sound]] == [t.id for t in alone(model, tokenizer, sound.prompt)]
    assert sound.reused == 0


def row(tokens: int) -> CachedRow:
    return CachedRow(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2))


def test_bounds_and_the_least_recently_used() -> None:
    cache = PrefixCache(most=3, most_bytes=100 * 16)
    texts = [[n] * 30 for n in range(5)]

    def add(tokens: list[int]) -> bool:
        wanted = cache.wants(tokens, 16 * len(tokens))
        if wanted:
            cache.add(tokens, row(len(tokens)))
        return wanted

    def held() -> list[int]:
        return [n for n, text in enumerate(texts) if cache.longest([*text[:20], -1]) is not None]

    assert [add(text) for text in texts[:3]] == [True] * 3
    assert (len(cache), cache.bytes) == (3, 90 * 16)
    assert cache.longest([*texts[0][:20], 9]) is not None  # used: it is the newest now
    assert add(texts[3])
    assert held() == [0, 2, 3]  # by count
    assert add([4] * 60)
    assert held() == [3, 4]  # by bytes: 30 + 60
    assert cache.bytes == 90 * 16
    assert not add([4] * 50)  # a part of what is held
    assert not add([5] * 101)  # more than all may take
    assert not add([6] * (LEAST - 1))
    assert add([4] * 70)  # it replaces what it goes on from
    assert (len(cache), cache.bytes) == (2, 100 * 16)
    found = cache.longest([4] * 65)
    assert found is not None
    assert found.length == 64
    assert cache.longest([4] * LEAST) is None
    assert not PrefixCache(0, 1 << 20).wants([1] * 30, 10)
