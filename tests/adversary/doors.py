"""The doors through which text from elsewhere comes in, for the fuzzers: seeds, and what reads them.

A reader is given bytes and may refuse them with an error that the command line tells (EXPECTED); anything else that it
raises, and a read that does not end, is a finding. A new door is a line of DOORS.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lumina.config import UserError, load
from lumina.files import FormatError

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"

#: What the command line's outermost layer tells (lumina.config.user_error).
EXPECTED: tuple[type[Exception], ...] = (UserError, FormatError, OSError)


class Door(NamedTuple):
    read: Callable[[bytes, Path], None]  # contents, an empty folder
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()  # that mean something to the reader
    bounded: bool = False  # commands run the reader in a process with an end: that it takes for ever is no finding


_TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "thinking": "hm"}]
_JSON = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"null",
    b"true",
    b"1e999",
    b"-",
    b"NaN",
    b"9" * 40,
    b"\\u",
    b"\\ud800",
)


# --- Data, configuration, hosts ---


def _data(contents: bytes, folder: Path) -> None:
    from lumina.data import detect, read_items
    from lumina.data.formats import convert

    for name in ("data.jsonl", "data.csv"):
        path = folder / name
        path.write_bytes(contents)
        for item in read_items(str(path), detect(str(path))):
            convert(item.record)


def _data_seeds() -> list[bytes]:
    line = json.dumps({"messages": _TURNS}).encode()
    pair = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode()
    tool = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
    tree = {"role": "prompter", "text": "a", "message_id": "1", "replies": [{"role": "assistant", "text": "b"}]}
    oasst = json.dumps({"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": tree}).encode()
    shared = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}).encode()
    return [
        line + b"\n" + pair + b"\n" + oasst,
        b"[" + line + b",\n" + shared + b"]",
        json.dumps({"data": [{"messages": [*_TURNS, tool]}], "more": 1}, indent=1).encode(),
        b'prompt,response\n"a ""b""",c\nd,e\n',
        gzip.compress(line + b"\n" + shared),
        line.decode().encode("utf-16"),
    ]


def _ds_config(contents: bytes, folder: Path) -> None:
    from lumina.config.deepspeed import resolve
    from lumina.train.deepspeed import refuse_what_deepspeed_does

    path = folder / "ds.json"
    path.write_bytes(contents)
    config = load("nano", {"ds_config": str(path), "precision": "fp32"})
    refuse_what_deepspeed_does(resolve(config, 1, "cpu", bf16_supported=True).json, "ds.json")


def _ds_config_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))]


def _yaml(contents: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(contents)
    load(str(path))


def _yaml_seeds() -> list[bytes]:
    presets = [(ROOT / "lumina/config/presets" / f"{name}.yaml").read_bytes() for name in ("nano", "8b")]
    more = (
        "preset: nano\ntrain_data: [a.jsonl, b.jsonl]\ndata:\n- {path: a, weight: 0.5}\ncolumns: {prompt: question}\n"
    )
    return [*presets, more.encode(), b"a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}\nseed: 0x10\nlora_rank: !!int 3\n"]


def _set(contents: bytes, folder: Path) -> None:
    load("nano", {}, [contents.decode("utf-8", "replace")])


def _hostfile(contents: bytes, folder: Path) -> None:
    from lumina.cluster.hostfile import read_hostfile

    (folder / "hosts").write_bytes(contents)
    read_hostfile(folder / "hosts")


# --- Checkpoints and models ---


def _trainer(contents: bytes, folder: Path) -> None:
    from lumina.checkpoint import read_trainer_state

    (folder / "trainer.json").write_bytes(contents)
    read_trainer_state(folder)


def _trainer_seeds() -> list[bytes]:
    from dataclasses import asdict

    from lumina.checkpoint import TrainerState

    state = TrainerState(
        step=3, best_loss=1.5, best_step=2, model={"hidden_size": 8}, guard={"a": [1.0]}, base={"p": "q"}
    )
    return [json.dumps({**asdict(state), "optimizer_step": 3, "loss_scale": {}}).encode()]


def _manifest(contents: bytes, folder: Path) -> None:
    from lumina.checkpoint import integrity_error

    (folder / "manifest.json").write_bytes(contents)
    assert integrity_error(folder) is not None, "a checkpoint of one file is whole"


def _manifest_seeds() -> list[bytes]:
    names = ("trainer.json", "rank-00000-of-00001.safetensors")
    files = [{"name": name, "bytes": 3, "sha256": "0" * 64} for name in names]
    return [json.dumps({"format": 1, "files": files}).encode()]


def _safetensors(contents: bytes, folder: Path) -> None:
    from lumina.infer.hf.tensors import TensorFiles
    from lumina.model import Transformer

    config = load("nano", {"num_layers": 1})
    (folder / "model.safetensors").write_bytes(contents)
    import torch

    with ExitStack() as files:
        tensors = TensorFiles(folder, files)
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
        tensors.has_own_head(config)
        tensors.check(shapes, config)


def _safetensors_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    return [save({name: torch.zeros(2, 2) for name in names}, {"format": "pt"})]


@cache
def _tokenizer_files(folder: str = "") -> dict[str, bytes]:
    import tempfile

    from tests.small_tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        made = write_tokenizer(Path(scratch) / "t")
        return {path.name: path.read_bytes() for path in made.iterdir()}


def _read_tokenizer(folder: Path) -> None:
    from lumina.chat import Conversation, Message, open_tokenizer

    # In this process: in another one its bounds would make a refusal of a crash.
    tokenizer = open_tokenizer(folder, tried=True)
    tokenizer.prompt_ids(Conversation([Message("user", "ab<|im_end|>")]), None)


def _tokenizer(contents: bytes, folder: Path) -> None:
    for name, held in {**_tokenizer_files(), "tokenizer.json": contents}.items():
        (folder / name).write_bytes(held)
    _read_tokenizer(folder)


def _template(contents: bytes, folder: Path) -> None:
    for name, held in {**_tokenizer_files(), "chat_template.jinja": contents}.items():
        (folder / name).write_bytes(held)
    _read_tokenizer(folder)


def _template_seeds() -> list[bytes]:
    stock = sorted((ROOT / "lumina/infer/hf/templates").glob("*.jinja"))
    return [_tokenizer_files()["chat_template.jinja"], *(path.read_bytes() for path in stock)]


# --- The server ---


def _body(contents: bytes, folder: Path) -> None:
    from lumina.infer.serve.endpoints.chat_completions import ChatRequest
    from lumina.infer.serve.endpoints.completions import CompletionRequest
    from lumina.infer.serve.errors import ApiError
    from lumina.infer.serve.requests.reading import parse_body

    for kind in (ChatRequest, CompletionRequest):
        with suppress(ApiError):
            parse_body(kind, contents)


def _body_seeds() -> list[bytes]:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat = {
        "messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, *_TURNS],
        "tools": [tool],
        "tool_choice": "auto",
        "stop": ["a"],
        "temperature": 0.5,
        "max_tokens": 3,
        "logit_bias": {"5": -1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    }
    return [
        json.dumps(chat).encode(),
        json.dumps({"model": "m", "prompt": ["a", "b"], "n": 2, "stream": True}).encode(),
    ]


_JINJA = (
    b"{%",
    b"%}",
    b"{{",
    b"}}",
    b"for m in messages",
    b"endfor",
    b"if",
    b"endif",
    b"range(9)",
    b"|",
    b"loop",
    b"[0]",
)

DOORS: dict[str, Door] = {
    "data": Door(
        _data, _data_seeds, (*_JSON, b"\n", b'"messages"', b'"role"', b"\x1f\x8b", b"PAR1", b"ARROW1", b"\0" * 9)
    ),
    "ds_config": Door(_ds_config, _ds_config_seeds, (*_JSON, b'"auto"', b'"stage"', b'"enabled"', b'"optimizer"')),
    "yaml": Door(
        _yaml, _yaml_seeds, (b"&a", b"*a", b"<<:", b"!!int", b"---", b"[", b"{", b"? ", b"|\n", b"\t", b"2026-13-01")
    ),
    "set": Door(
        _set, lambda: [b"seed=3", b"train_data=[a, b]", b"columns={a: b}"], (b"=", b"[", b"{", b"!!", b"&a", b"*a")
    ),
    "hostfile": Door(
        _hostfile, lambda: [b"node1 slots=8\nnode2 slots=4\n# x\n"], (b"slots=", b"\n", b"-o", b"\0", b":22")
    ),
    "trainer": Door(_trainer, _trainer_seeds, _JSON),
    "manifest": Door(_manifest, _manifest_seeds, (*_JSON, b"../", b"rank-", b'"files"')),
    "safetensors": Door(
        _safetensors, _safetensors_seeds, (*_JSON, b"\xff" * 8, b'"shape"', b'"dtype"', b'"data_offsets"')
    ),
    "tokenizer": Door(
        _tokenizer,
        lambda: [_tokenizer_files()["tokenizer.json"]],
        (*_JSON, b'"Regex"', b'"(a+)+$"', b'"BPE"'),
        bounded=True,
    ),
    "template": Door(_template, _template_seeds, _JINJA, bounded=True),
    "body": Door(_body, _body_seeds, (*_JSON, b'"messages"', b'"content"', b'"role"')),
}
