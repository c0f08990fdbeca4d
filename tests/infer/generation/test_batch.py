"""Sequences that share a batch say what each says alone, whoever comes and goes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from lumina.chat import ChatTokenizer, Conversation, Message, open_tokenizer
from lumina.infer import Answer, Sampling, generate
from lumina.infer.generation import batch
from lumina.infer.generation.batch import Sequence, SequenceBatch, Token
from lumina.infer.generation.sampling import forbidden_tokens
from lumina.model import Transformer
from lumina.model.decode import Decoder
from tests.infer.small_models import as_transformers, make_model
from tests.small_tokenizer import VOCABULARY, write_tokenizer

TEXTS = ("Hello", "My sister is happy.", "the old train " * 9, "No.", "a b c d e f")


class Small(NamedTuple):
    """A model with a small vocabulary, its tokenizer, and prompts for it."""

    model: Transformer
    tokenizer: ChatTokenizer
    prompts: list[list[int]]

    def generate(self, sampling: Sampling, prompts: list[list[int]] | None = None) -> list[Answer]:
        return generate(self.model, self.tokenizer, prompts or self.prompts, sampling)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    tokenizer = open_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer"))
    prompts = [tokenizer.prompt_ids(Conversation([Message("user", text)])) for text in TEXTS]
    return Small(make_model(vocab_size=VOCABULARY), tokenizer, prompts)


def settings(number: int) -> Sampling:
    """Greedy, sampled, penalised and cut off by length, in turn."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"temperature": 1.4, "top_k": None, "min_p": 0.05, "repetition_penalty": 0.8},
    ]
    return Sampling(**kinds[number % 4], seed=number, max_length=3 + 5 * number % 13)  # type: ignore[arg-type]


@pytest.mark.parametrize("static", [False, True])
def test_joining_and_leaving_change_nothing(small: Small, static: bool) -> None:
    """Twenty sequences over three rows, prefilled in pieces of any size; some are given up in the middle."""
    chance = random.Random(3)
    asked = [Sequence(small.prompts[n % 5], settings(n), logprobs=2 if n % 7 == 0 else None) for n in range(20)]
    alone = [small.generate(s.sampling, [s.prompt])[0].ids for s in asked]
    shared = SequenceBatch(small.model, small.tokenizer, 3, 128, static)
    waiting, filling = list(asked), list[Sequence]()
    given_up: set[Sequence] = set()
    while waiting or filling or shared.going:
        if waiting and shared.free and chance.random() < 0.6:
            shared.join(waiting[0])
            filling.append(waiting.pop(0))
        if filling and chance.random() < 0.7:
            shared.prefill(filling[:1], chance.randint(1, 30))
            filling = [s for s in filling if s.fed < len(s.prompt)]
        shared.step()
        for sequence in list(shared.going):
            if chance.random() < 0.02:
                shared.leave(sequence)
                shared.leave(sequence)  # twice is once
                given_up.add(sequence)
    assert shared.free == 3
    assert 0 < len(given_up) < 10
    for sequence, ids in zip(asked, alone, strict=True):
        said = [token for token in sequence.generated if token not in small.tokenizer.stop_ids]
        assert said == (ids[: len(said)] if sequence in given_up else ids)


def test_a_tie_is_settled_by_the_sequence_alone(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens whose logits differ by less than rounding moves them, and rounding made visible: noise of its size on the
    logits of every step. Without the rule the noise decides."""
    model = make_model(vocab_size=VOCABULARY, tie_word_embeddings=False)
    small, sampling = small._replace(model=model), Sampling(temperature=0, max_length=10)
    model.output.weight[1::2] = model.output.weight[::2] * (1 + 1e-7)
    calm = small.generate(sampling)
    largest, noise = Decoder.largest, torch.Generator().manual_seed(0)

    def shaken(self: Decoder, logits_RV: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        moved = 1 + 4e-6 * (torch.rand(logits_RV.shape, generator=noise) - 0.5)
        return largest(self, logits_RV * moved, k)

    monkeypatch.setattr(Decoder, "largest", shaken)
    assert small.generate(sampling) == calm
    monkeypatch.setattr(batch, "TIE", -1.0)
    assert small.generate(sampling) != calm


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_penalty_equals_transformers(small: Small, penalty: float) -> None:
    llama = as_transformers(small.model)
    suppressed = forbidden_tokens(small.tokenizer, VOCABULARY).nonzero()[:, 0].tolist()
    sampling = Sampling(temperature=0, repetition_penalty=penalty, max_length=12)
    for prompt, answer in zip(small.prompts, small.generate(sampling), strict=True):
        theirs = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            repetition_penalty=penalty,
            max_new_tokens=12,
            eos_token_id=sorted(small.tokenizer.stop_ids),
            pad_token_id=0,
            suppress_tokens=suppressed,
        )
        said = theirs[0, len(prompt) :].tolist()
        assert [token for token in said if token not in small.tokenizer.stop_ids] == answer.ids


def test_reported_probabilities_change_no_choice(small: Small) -> None:
    sampling = Sampling(temperature=0.9, seed=4, max_length=6)
    plain = small.generate(sampling, small.prompts[:1])[0].ids
    shared, told = SequenceBatch(small.model, small.tokenizer, 2, 128), list[Token]()
    reporting, silent = Sequence(small.prompts[0], sampling, logprobs=3), Sequence(small.prompts[1], sampling)
    for sequence in (reporting, silent):
        shared.join(sequence)
    tokens = shared.prefill([reporting, silent])
    while tokens:
        told += tokens
        tokens = shared.step()
    assert reporting.generated == plain
    assert all(len(t.top) == 3 and t.logprob is not None for t in told if t.sequence is reporting)
    assert all(t.top == () and t.logprob is None for t in told if t.sequence is silent)


def test_stop_texts_end_a_sequence_and_free_the_others(small: Small) -> None:
    whole = small.generate(Sampling(temperature=0, max_length=16))
    stop = whole[1].text[4:8]
    cut = small.generate(Sampling(temperature=0, max_length=16, stop=(stop,)))
    assert (cut[1].text, cut[1].finish) == (whole[1].text[: whole[1].text.index(stop)], "stop")
    for before, after in zip(whole, cut, strict=True):
        if stop not in before.text:
            assert after == before


@pytest.mark.parametrize(("dtype", "static"), [(torch.float64, False), (torch.bfloat16, False), (torch.float64, True)])
def test_the_host_asks_once_a_step(
    dtype: torch.dtype, static: bool, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever mix of samplings goes on: each question to a GPU is a wait for it."""
    asked: list[str] = []

    def counted(name: str) -> None:
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, **k: (asked.append(name), real(self, *a, **k))[1])

    shared = SequenceBatch(make_model(dtype=dtype, vocab_size=VOCABULARY), small.tokenizer, 4, 128, static)
    shared._decoder.compiled = shared._decoder._shortlists = False
    sequences = [Sequence(small.prompts[n], replace(settings(n), max_length=20)) for n in range(4)]
    for sequence in sequences:
        shared.join(sequence)
    shared.prefill(sequences)
    for name in ("tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        counted(name)
    assert len(shared.step()) == 4
    assert asked == ["tolist"]
