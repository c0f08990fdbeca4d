"""GGUF files, read by the gguf package and by transformers' own GGUF loader, which undoes llama.cpp's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lumina.config import UserError
from lumina.infer import export, import_hf, load
from tests.infer.hf.exported_runs import PROMPTS, make_base, make_run
from tests.infer.hf_models import make_hf
from tests.infer.small_models import write_small_run

gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf package")


def _field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_file_as_the_model(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path, family, "foreign")
    done = export(run, tmp_path / "out", form="gguf")
    assert done.shards == ["model-F32.gguf"]
    loaded = load(run, precision="fp32")
    named: dict[str, Any] = {"gguf_file": "model-F32.gguf"}
    if family != "qwen2":  # transformers 5.24 takes no head size out of a GGUF file; Qwen2's follows from the others
        named["head_dim"] = loaded.config.head_dim
    theirs = AutoModelForCausalLM.from_pretrained(done.folder, **named).eval()
    ids = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        expected = loaded.model(ids, torch.arange(40)[None])
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


def _forward(reader: Any, ids: list[int]) -> np.ndarray:
    """Logits in float64 of a file of llama.cpp's architecture `llama`, as its graph has it: neighbours are rotated."""
    w = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    arch = _field(reader, "general.architecture")

    def of(key: str) -> Any:
        return _field(reader, f"{arch}.{key}")

    heads, kv, d = (of(f"attention.{key}") for key in ("head_count", "head_count_kv", "key_length"))
    layers, eps, theta = of("block_count"), of("attention.layer_norm_rms_epsilon"), of("rope.freq_base")
    frequency = theta ** -(np.arange(0, d, 2) / d) / w.get("rope_freqs.weight", np.ones(d // 2))
    if reader.get_field(f"{arch}.rope.scaling.type") is not None:
        assert of("rope.scaling.type") == "linear"
        frequency = frequency / of("rope.scaling.factor")
    angle = np.arange(len(ids))[:, None, None] * frequency

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1).reshape(
            x.shape
        )

    x = w["token_embd.weight"][ids]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(layers):
        h = norm(x, f"blk.{i}.attn_norm.weight")
        q, k, v = (h @ w[f"blk.{i}.attn_{n}.weight"].T for n in "qkv")
        q, k, v = (t.reshape(len(ids), -1, d) for t in (q, k, v))
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, heads // kv, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d) + future
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(len(ids), -1) @ w[f"blk.{i}.attn_output.weight"].T
        h = norm(x, f"blk.{i}.ffn_norm.weight")
        gate = h @ w[f"blk.{i}.ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"blk.{i}.ffn_up.weight"].T)) @ w[f"blk.{i}.ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T


@pytest.mark.parametrize("kind", ["tinyllama", "llama2-long", "llama3.2"])
def test_llama_cpps_arithmetic_gives_the_logits(tmp_path: Path, kind: str) -> None:
    """Without scaling, linear, and llama3 with tied weights."""
    make_hf(tmp_path / "hf", kind)
    run = import_hf(tmp_path / "hf", tmp_path / "run")
    reader = gguf.GGUFReader(export(run, tmp_path / "out", form="gguf").folder / "model-F32.gguf")
    ids = torch.randint(0, 300, (1, 50))
    with torch.no_grad():
        own = load(run, precision="fp32").model(ids, torch.arange(50)[None])[0]
    np.testing.assert_allclose(_forward(reader, ids[0].tolist()), own.double().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("q8_0", "Q8_0")])
def test_rounding_is_that_of_the_type(tmp_path: Path, dtype: str, name: str) -> None:
    run = write_small_run(tmp_path / "run", family="qwen2")  # a hidden width of 64: two blocks a row
    done = export(run, tmp_path / "out", form="gguf", dtype=dtype)
    reader = gguf.GGUFReader(done.folder / f"model-{name}.gguf")
    assert done.bytes == sum(t.n_bytes for t in reader.tensors)
    exact = {
        t.name: t for t in gguf.GGUFReader(export(run, tmp_path / "f", form="gguf").folder / "model-F32.gguf").tensors
    }
    assert {t.name for t in reader.tensors} == exact.keys()
    for tensor in reader.tensors:
        expected, found = exact[tensor.name].data, gguf.dequantize(tensor.data, tensor.tensor_type)
        if expected.ndim == 1:
            assert np.array_equal(found, expected)
        elif tensor.tensor_type.name == "F16":
            assert np.array_equal(found, expected.astype(np.float16).astype(np.float32))
        else:
            blocks = expected.reshape(*expected.shape[:-1], -1, 32)
            step = np.abs(blocks).max(-1, keepdims=True) / 127
            assert (np.abs(found.reshape(blocks.shape) - blocks) <= 0.51 * step + 1e-3 * np.abs(blocks)).all()
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
    assert name in kinds


def test_the_vocabulary_its_ends_and_its_template(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    make_hf(tmp_path / "hf", "tinyllama")
    run = import_hf(tmp_path / "hf", tmp_path / "run", chat_template=make_base(tmp_path / "hf"))
    reader = gguf.GGUFReader(export(run, tmp_path / "out", form="gguf").folder / "model-F32.gguf")
    tokenizer = load(run).tokenizer
    tokens = _field(reader, "tokenizer.ggml.tokens")
    assert _field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert tokens[_field(reader, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert tokens[_field(reader, "tokenizer.ggml.eot_token_id")] == "<|endoftext|>"
    assert _field(reader, "tokenizer.ggml.add_bos_token") is False
    assert _field(reader, "tokenizer.chat_template") == (run / "tokenizer/chat_template.jinja").read_text()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == tokens[:3]
    # The same vocabulary put together from the file alone.
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    again = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    again.pre_tokenizer, again.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for prompt in PROMPTS:
        assert again.encode(prompt).ids == tokenizer.encode(prompt)


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", "foreign")
    with pytest.raises(UserError, match="dtype bfloat16 is not one of GGUF's here"):
        export(run, tmp_path / "out", form="gguf", dtype="bfloat16")
    with pytest.raises(UserError, match="dtype q8_0 is not one of float32"):
        export(run, tmp_path / "out", dtype="q8_0")
    path = run / "tokenizer/tokenizer.json"
    path.write_text(
        path.read_text()
        .replace('"use_regex":true', '"use_regex":false')
        .replace('"use_regex": true', '"use_regex": false')
    )
    with pytest.raises(UserError, match="cuts text in a way that has no GGUF name here"):
        export(run, tmp_path / "out", form="gguf")
    assert not (tmp_path / "out").exists()
