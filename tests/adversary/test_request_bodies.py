"""Attacks with the body of a request: (body, the field that the one error names). The server goes on answering."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lumina.infer import load
from lumina.infer.serve.endpoints.chat_completions import ChatRequest
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests import parse_body
from tests.infer.serve.running_server import Running, running
from tests.infer.small_models import write_small_run

SAYS = b'{"messages":[{"role":"user","content":"hi"}],'
DIGITS = b"1" + b"0" * 400


def many(of: bytes, count: int = 200_000) -> bytes:
    return b"[" + of + (b"," + of) * (count - 1) + b"]"


LONG: dict[str, tuple[bytes, str | None]] = {
    "messages that are none": (b'{"messages":' + many(b"0") + b"}", "messages"),
    "messages without a role": (b'{"messages":' + many(b"{}", 4000) + b"}", "messages.role"),
    "tools that are none": (SAYS + b'"tools":' + many(b"0") + b"}", "tools"),
    "calls that are none": (b'{"messages":[{"role":"assistant","tool_calls":' + many(b"0") + b"}]}",
                            "messages.tool_calls"),
    "parts": (b'{"messages":[{"role":"user","content":' + many(b'""') + b"}]}", "messages.content"),
    "stops": (SAYS + b'"stop":' + many(b'"a"') + b"}", "stop"),
    "unknown fields": (SAYS + b",".join(b'"f%d":1' % i for i in range(80_000)) + b"}", "f0"),
    "a field's name of 1 MB": (SAYS + b'"' + b"f" * 1_000_000 + b'":1}', "f" * 200),
    "half a character as a field's name": (SAYS + b'"\\ud800":1}', "\ufffd"),
    "half a character as another's": (b'{"messages":[{"role":"user","\\udfff":1}]}', "messages.\ufffd"),
    "half a character as a role": (b'{"messages":[{"role":"\\ud800"}]}', "messages.role"),
    "half a character as a tool": (SAYS + b'"tool_choice":"\\ud800"}', "tool_choice"),
    "nesting": (b"[" * 500_000, None),
    "nesting in a tool": (
        SAYS + b'"tools":[{"type":"function","function":{"name":"f","parameters":' + b'{"a":' * 500 + b"{}"
        + b"}" * 502 + b"]}", "tools"),
}  # fmt: skip

NUMBERS: dict[str, tuple[bytes, str | None]] = {
    f"{name} of {len(digits)} digits": (SAYS + b'"%s":%s}' % (name.encode(), digits), name)
    for name in ("max_tokens", "top_k", "seed", "n", "temperature", "min_p", "top_logprobs")
    for digits in (DIGITS, b"-" + DIGITS, b"1" * 5000)
} | {
    "a schema's number": (
        SAYS + b'"response_format":{"type":"json_schema","json_schema":{"schema":{"minLength":' + DIGITS + b"}}}}",
        "response_format.json_schema.schema.minLength",
    ),
    "a tool's number": (
        SAYS + b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a":' + DIGITS + b"}}}]}",
        "tools.function.parameters.a"),
    "an exponent": (SAYS + b'"temperature":1e999}', "temperature"),
    "no number": (SAYS + b'"temperature":NaN}', "temperature"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run = write_small_run(tmp_path_factory.mktemp("runs") / "small", num_layers=1, seq_length=512)
    with running(load(run, precision="fp32"), max_body=1 << 21) as started:
        yield started


@pytest.mark.parametrize(("body", "param"), (LONG | NUMBERS).values(), ids=(LONG | NUMBERS).keys())
def test_one_error_that_names_the_field(server: Running, body: bytes, param: str | None) -> None:
    answer = server.post(content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert 0 < len(error["message"]) < 500


@pytest.mark.parametrize("number", [b"9223372036854775807", b"18446744073709551615", b"-9223372036854775808"])
@pytest.mark.parametrize("name", [b"max_tokens", b"top_k", b"seed", b"n"])
def test_the_largest_numbers_are_answered_or_refused(server: Running, name: bytes, number: bytes) -> None:
    fields = [b'"max_tokens":1'] if name != b"max_tokens" else []
    content = SAYS + b",".join([*fields, b'"%s":%s' % (name, number)]) + b"}"
    answer = server.post(content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400)


HALF = b'"\\ud800 \xf0\x9f\x99\x82 \\ud83d\\ude42"'
HALVES = {  # what a client may send that cuts a text in the middle of a character
    "content": b'{"messages":[{"role":"user","content":%s}],"max_tokens":1}' % HALF,
    "raw bytes": b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}],"max_tokens":1}',
    "a schema": SAYS + b'"max_tokens":1,"response_format":{"type":"json_schema","json_schema":{"schema":{"title":%s}}}}'
    % HALF,
    "a tool": SAYS
    + b'"max_tokens":1,"tools":[{"type":"function","function":{"name":"f","strict":true,"description":%s,'
    b'"parameters":{"type":"object","title":%s}}}]}' % (HALF, HALF),
    "a call": b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"function":{"name":"f",'
    b'"arguments":{"a":%s}}}]},{"role":"tool","content":"b"}],"max_tokens":1}' % HALF,
    "a stop": SAYS + b'"max_tokens":1,"stop":[%s]}' % HALF,
    "a model": SAYS + b'"model":%s}' % HALF,
}  # fmt: skip


@pytest.mark.parametrize("body", HALVES.values(), ids=HALVES.keys())
def test_half_a_character_fails_nothing(server: Running, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    answer = server.post(content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    assert [record.message for record in caplog.records if record.exc_info] == []


def test_half_a_character_is_replaced() -> None:
    read = parse_body(ChatRequest, HALVES["content"])
    assert read.messages[0].content == "\ufffd \U0001f642 \U0001f642"


class Counted(dict[str, object]):
    """An entry that counts how often it is looked at."""

    looks = 0

    def items(self):  # type: ignore[no-untyped-def]
        Counted.looks += 1
        return super().items()


def test_nothing_is_looked_at_after_the_first_error() -> None:
    from pydantic import ValidationError

    for count, most in ((4000, 1), (100_000, 0)):
        Counted.looks = 0
        with pytest.raises(ValidationError):
            ChatRequest.model_validate({"messages": [Counted() for _ in range(count)]})
        assert Counted.looks <= most


def test_the_loop_goes_on_while_a_body_is_read(server: Running) -> None:
    """Other requests are answered between the beginning of one that takes long and its end."""
    body = SAYS + b",".join(b'"metadata":%d' % i for i in range(120_000)) + b',"user":0,"f":0}'
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as other:  # made before: that takes long, too
        for _ in range(20):  # a machine that does other things may give the clients no turn meanwhile
            read = pool.submit(server.post, content=body, headers={"Content-Type": "application/json"})
            answered = 0
            while not read.done():
                assert other.get(f"{server.address}/health").status_code == 200
                answered += 1
            assert read.result().json()["error"]["param"] == "f"
            if answered > 2:
                return
    raise AssertionError("nobody else was answered before the body was read")


def test_what_is_refused_says_why() -> None:
    for given, said in ((DIGITS, "an integer of 401 digits does not fit"), (b"1e999", "1e999 does not fit"),
                        (b"NaN", "seed: NaN is no JSON")):  # fmt: skip
        with pytest.raises(ApiError, match=said):
            parse_body(ChatRequest, SAYS + b'"seed":' + given + b"}")
