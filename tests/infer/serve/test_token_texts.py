"""Probabilities of tokens with a SentencePiece vocabulary: their texts and offsets join to the answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lumina.chat import open_tokenizer
from lumina.infer import Loaded, Sampling, generate
from tests.infer.serve.running_server import Running, running
from tests.infer.small_models import make_model
from tests.small_tokenizer import CHATML, write_spaced_tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("runs") / "spaced"
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    tokenizer = open_tokenizer(write_spaced_tokenizer(folder / "tokenizer", CHATML))
    return Loaded(make_model(vocab_size=tokenizer.vocab_size, num_layers=1, seq_length=256), tokenizer, checkpoint, 1)


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    with running(loaded) as started:
        yield started


@pytest.mark.parametrize("prompt", ["hello", "hello there, how", " are you", "日本"])
@pytest.mark.parametrize("seed", range(4))
def test_texts_and_offsets_join(server: Running, loaded: Loaded, prompt: str, seed: int) -> None:
    """Drawn answers of a random model: half characters, spaces at the beginning and all."""
    client = server.client()
    asked = {"model": "spaced", "prompt": prompt, "temperature": 1.5, "seed": seed, "max_tokens": 24, "logprobs": 2}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    choice = whole.choices[0]
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert "".join(tokens) == choice.text
    assert offsets == [len("".join(tokens[:at])) for at in range(len(tokens))]
    assert whole.usage.prompt_tokens == len(loaded.tokenizer.text_ids(prompt))
    ids = loaded.tokenizer.text_ids(prompt)
    answer = generate(loaded.model, loaded.tokenizer, [ids], Sampling(1.5, seed=seed, max_length=24))[0]
    assert (choice.text, len(tokens)) == (answer.text, len(answer.ids))
    parts = [part.choices[0] for part in client.completions.create(**asked, stream=True)]  # type: ignore[call-overload]
    assert "".join(part.text for part in parts) == choice.text
    assert [text for part in parts for text in part.logprobs.tokens] == tokens
    assert [offset for part in parts for offset in part.logprobs.text_offset] == offsets


def test_a_model_by_its_name(server: Running) -> None:
    client = server.client()
    assert client.models.retrieve("spaced") == next(iter(client.models.list()))
    answer = server.post("/v1/completions", json={"model": "other", "prompt": "hello"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
