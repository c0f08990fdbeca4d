"""Turns of conversations through the server: the answers are those without the prefix cache; what clients are told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lumina.infer import Loaded, load
from tests.infer.serve.running_server import Running, running, wait_for
from tests.infer.small_models import write_small_run

SYSTEM: Any = {"role": "system", "content": "the old train " * 8}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    run = write_small_run(tmp_path_factory.mktemp("runs") / "small", num_layers=1, seq_length=512)
    return load(run, precision="fp32")


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    with running(loaded, slots=2, kept=16) as started:
        yield started


def talk(server: Running, name: str, turns: int = 3) -> list[tuple[str, int, int]]:
    """Answers of a conversation, with the prompt's tokens and the cached ones among them."""
    messages, told = [SYSTEM], []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{name} says {turn}"})
        got = server.client().chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=12)
        text = got.choices[0].message.content or ""
        assert got.usage is not None
        assert got.usage.prompt_tokens_details is not None
        told.append((text, got.usage.prompt_tokens, got.usage.prompt_tokens_details.cached_tokens or 0))
        messages.append({"role": "assistant", "content": text})
    return told


def test_conversations_at_once_say_what_each_says_without_a_cache(server: Running, loaded: Loaded) -> None:
    names = ["Ann", "Bob", "Cem", "Dee"]
    with running(loaded, slots=2, kept=0) as plain:
        wanted = [talk(plain, name) for name in names]
    assert not any(cached for told in wanted for _, _, cached in told)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: talk(server, name), names))
    assert [[text for text, *_ in told] for told in found] == [[text for text, *_ in told] for told in wanted]
    for told in found:
        for (_, before, _), (_, size, cached) in itertools.pairwise(told):
            assert before - 2 <= cached < size  # all of the last prompt, or nearly: templates may end it otherwise
    assert server.metric("lumina_reused_prompt_tokens_total") > 500
    assert 0 < server.metric("lumina_prefix_cache_bytes") < 1 << 24


def test_streamed_usage_and_a_client_that_left(server: Running, loaded: Loaded) -> None:
    messages = [SYSTEM, {"role": "user", "content": "leaves early"}]
    client = server.client()
    asked: Any = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 12}
    stream = client.chat.completions.create(**asked | {"max_tokens": 300}, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(server.idle)
    whole = client.chat.completions.create(**asked, n=2)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    *_, account = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert account.usage is not None
    assert account.usage.prompt_tokens_details == whole.usage.prompt_tokens_details
    with running(loaded, slots=1, kept=0) as plain:
        alone = plain.client().chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == [alone.choices[0].message.content] * 2
