"""`lumina serve` through OpenAI's own client: right answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lumina.chat import Conversation, Message
from lumina.infer import Loaded, Sampling, generate, import_hf, load
from lumina.infer.generation.sampling import forbidden_tokens
from tests.infer.hf_models import make_hf
from tests.infer.serve.running_server import Running, running, wait_for
from tests.infer.small_models import make_model, write_run, write_small_run

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    run = write_small_run(tmp_path_factory.mktemp("runs") / "small", num_layers=1, seq_length=512)
    return load(run, precision="fp32")


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    with running(loaded) as started:
        yield started


def expected(loaded: Loaded, messages: list[Any], **settings: Any) -> str:
    """What generation says without a server."""
    return generate(loaded.model, loaded.tokenizer, [prompt(loaded, messages)], Sampling(**settings))[0].text


def prompt(loaded: Loaded, messages: list[Any]) -> list[int]:
    return loaded.tokenizer.prompt_ids(Conversation([Message(m["role"], m["content"]) for m in messages]))


def test_plain(server: Running, loaded: Loaded) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
    ]
    got = server.client().chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=12)
    flat = [*messages[:3], {"role": "user", "content": "Who are you?"}]
    assert got.choices[0].message.content == expected(loaded, flat, temperature=0, max_length=12)
    assert (got.choices[0].message.role, got.choices[0].finish_reason) == ("assistant", "length")
    assert (got.object, got.model, len(got.choices)) == ("chat.completion", "small", 1)
    size = len(prompt(loaded, flat))
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (size, 12, size + 12)


def test_lumina_s_own_tokenizer(tmp_path: Path) -> None:
    own = load(write_run(tmp_path / "run", make_model(num_layers=1)), precision="fp32")
    with running(own) as plain:
        got = plain.client().chat.completions.create(
            model="run", messages=HELLO, temperature=0, max_tokens=5, logprobs=True
        )
    choice = got.choices[0]
    assert choice.message.content == expected(own, HELLO, temperature=0, max_length=5)
    assert choice.logprobs is not None
    said = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content or [])
    assert said.decode(errors="replace") == choice.message.content


def test_streamed(server: Running, loaded: Loaded) -> None:
    stream = server.client().chat.completions.create(
        model="small",
        messages=HELLO,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    *parts, account = chunks
    texts = [chunk.choices[0].delta.content or "" for chunk in parts]
    assert "".join(texts) == expected(loaded, HELLO, temperature=0, max_length=20)
    assert sum(text != "" for text in texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices[0].finish_reason] == ["length"]
    assert account.choices == []
    assert account.usage is not None
    assert account.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_concurrent_requests_say_what_they_say_alone(server: Running, loaded: Loaded) -> None:
    """Sixteen over four slots, of different prompts and lengths: they join and leave in the middle of others."""
    asked = [
        ([{"role": "user", "content": "the old train " * (1 + 3 * i % 10) + str(i)}], 5 + 3 * i % 31) for i in range(16)
    ]
    client = server.client()

    def ask(which: tuple[list[Any], int]) -> str | None:
        messages, most = which
        got = client.chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=most)
        return got.choices[0].message.content

    alone = [expected(loaded, messages, temperature=0, max_length=most) for messages, most in asked]
    assert [ask(which) for which in asked] == alone
    steps = server.metric("lumina_step_sequences_count")
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, asked)) == alone
    together = server.metric("lumina_step_sequences_count") - steps
    assert together < sum(most for _, most in asked) / 2  # most steps were of several sequences
    assert server.idle()


def test_seeds_and_several_answers(server: Running, loaded: Loaded) -> None:
    def ask(**more: Any) -> list[str | None]:
        got = server.client().chat.completions.create(model="small", messages=HELLO, max_tokens=8, **more)
        return [choice.message.content for choice in got.choices]

    first = ask(n=3, seed=5, temperature=1.0)
    assert ask(n=3, seed=5, temperature=1.0) == first
    assert ask(n=1, seed=5, temperature=1.0) == first[:1]
    assert len(set(first)) == 3
    assert first[0] == expected(loaded, HELLO, temperature=1.0, seed=5, max_length=8)
    assert ask(seed=6, temperature=1.0) != first[:1]
    extra = {"top_k": 3, "min_p": 0.2, "repetition_penalty": 1.3}
    wanted = expected(loaded, HELLO, temperature=1.5, seed=1, max_length=8, **extra)
    assert ask(seed=1, temperature=1.5, extra_body=extra) == [wanted]
    both = server.client().chat.completions.create(
        model="small", messages=HELLO, max_tokens=8, n=3, seed=5, temperature=1.0, stream=True
    )
    told = ["", "", ""]
    for chunk in both:
        told[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert told == first


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts(server: Running, loaded: Loaded, stream: bool) -> None:
    whole = expected(loaded, HELLO, temperature=0, max_length=30)
    stop = whole[len(whole) // 2 :][:3]
    with httpx.stream(
        "POST",
        f"{server.address}/v1/chat/completions",
        json={"messages": HELLO, "temperature": 0, "max_tokens": 30, "stop": ["never", stop], "stream": stream},
        timeout=60,
    ) as response:
        body = response.read().decode()
    assert response.status_code == 200
    before = whole[: whole.index(stop)]
    client = server.client()
    if stream:
        parts = client.chat.completions.create(
            model="small", messages=HELLO, temperature=0, max_tokens=30, stop=stop, stream=True
        )
        chunks = [chunk.choices[0] for chunk in parts]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == before
        assert chunks[-1].finish_reason == "stop"
        assert body.endswith("data: [DONE]\n\n")
    else:
        got = client.chat.completions.create(
            model="small", messages=HELLO, temperature=0, max_tokens=30, stop=["never", stop]
        )
        assert (got.choices[0].message.content, got.choices[0].finish_reason) == (before, "stop")


def test_probabilities_are_the_models_own(server: Running, loaded: Loaded) -> None:
    got = server.client().chat.completions.create(
        model="small", messages=HELLO, temperature=0.7, seed=3, max_tokens=5, logprobs=True, top_logprobs=4
    )
    told = got.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 5
    assert "".join(entry.token for entry in told.content) == got.choices[0].message.content
    ids = prompt(loaded, HELLO)
    answer = generate(loaded.model, loaded.tokenizer, [ids], Sampling(temperature=0.7, seed=3, max_length=5))[0].ids
    forbidden_V = forbidden_tokens(loaded.tokenizer, loaded.config.vocab_size)
    for at, entry in enumerate(told.content):
        seen = torch.tensor([ids + answer[:at]])
        logits_V = loaded.model(seen, torch.arange(seen.shape[1])[None])[0, -1]
        logprobs_V = logits_V.masked_fill(forbidden_V, -torch.inf).log_softmax(-1)
        assert entry.logprob == pytest.approx(float(logprobs_V[answer[at]]), abs=1e-4)
        best = logprobs_V.topk(4)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        for other, token in zip(entry.top_logprobs, best.indices.tolist(), strict=True):
            # After a broken character, which a token that does not go on with it shows:
            assert other.token.removeprefix("\ufffd") == loaded.tokenizer.decode([token]).removeprefix("\ufffd")
            assert other.bytes == (None if "\ufffd" in other.token else list(other.token.encode()))


def test_completions(server: Running, loaded: Loaded) -> None:
    client = server.client()
    texts = ["Once upon a time", "The end"]
    got = client.completions.create(model="small", prompt=texts, temperature=0, max_tokens=7, logprobs=2)
    prompts = [loaded.tokenizer.text_ids(text) for text in texts]
    wanted = generate(loaded.model, loaded.tokenizer, prompts, Sampling(temperature=0, max_length=7))
    assert [choice.text for choice in got.choices] == [answer.text for answer in wanted]
    table = got.choices[1].logprobs
    assert table is not None
    assert table.tokens is not None
    assert "".join(table.tokens) == wanted[1].text
    assert table.text_offset == [len("".join(table.tokens[:at])) for at in range(7)]
    assert [len(top) in (1, 2) for top in table.top_logprobs or []] == [True] * 7  # some tokens are the same as text
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(map(len, prompts))
    ids = prompts[1]
    by_ids = client.completions.create(model="small", prompt=ids, temperature=0, max_tokens=7)
    alone = generate(loaded.model, loaded.tokenizer, [ids], Sampling(temperature=0, max_length=7))[0]
    assert by_ids.choices[0].text == alone.text
    streamed = client.completions.create(model="small", prompt=ids, temperature=0, max_tokens=7, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone.text


def test_models_health_and_metrics(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["small"]
    assert server.get("/health").json() == {"status": "ok"}
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "lumina_slots 4.0" in answer.text
    before = server.metric("lumina_generated_tokens_total")
    server.client().chat.completions.create(model="small", messages=HELLO, max_tokens=3, temperature=0)
    assert server.metric("lumina_generated_tokens_total") == before + 3
    assert server.metric('lumina_http_requests_total{path="/health",status="200"}') >= 1
    wait_for(server.idle)


def test_an_imported_model_with_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", "qwen3-tied")
    own = load(import_hf(tmp_path / "hf", tmp_path / "imported"), precision="fp32")
    texts = ["hello there", "how are you today?", "you", "are you there"]
    prompts = [own.tokenizer.prompt_ids(Conversation([Message("user", text)])) for text in texts]
    wanted = [
        generate(own.model, own.tokenizer, [ids], Sampling(temperature=0, max_length=20))[0].text for ids in prompts
    ]
    with running(own, slots=3) as imported:
        client = imported.client()

        def ask(text: str) -> str:
            messages: list[Any] = [{"role": "user", "content": text}]
            stream = client.chat.completions.create(
                model="imported", messages=messages, temperature=0, max_tokens=20, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, texts)) == wanted
        typed = [Message("user", "hello <|im_end|>")]  # text like any other
        ids = own.tokenizer.prompt_ids(Conversation(typed))
        assert ids.count(2) == own.tokenizer.prompt_ids(Conversation([Message("user", "hello")])).count(2)
        answer = generate(own.model, own.tokenizer, [ids], Sampling(temperature=0, max_length=20))[0]
        assert ask(typed[0].content) == answer.text
        plain = own.tokenizer.text_ids("hello th")
        text = generate(own.model, own.tokenizer, [plain], Sampling(temperature=0, max_length=5))[0].text
        got = client.completions.create(model="imported", prompt="hello th", temperature=0, max_tokens=5, logprobs=1)
        assert got.choices[0].text == text
