"""Hugging Face folders made by transformers: taken in, answered with, given out again; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumina.chat import Conversation, Message
from lumina.cli import main
from lumina.config import UserError
from lumina.infer import Sampling, export, generate, import_hf, load
from tests.infer.hf_models import FAMILIES, make_hf, model_type
from tests.infer.small_models import make_model, write_run
from tests.small_tokenizer import VOCABULARY


@pytest.mark.parametrize("family", FAMILIES)
def test_in_answer_and_out_again(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_hf(tmp_path / "hf", family)
    run = import_hf(tmp_path / "hf", tmp_path / "run")
    loaded, tokenizer = load(run, precision="fp32"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()

    ids = torch.randint(0, 300, (1, 30))
    with torch.no_grad():
        own = loaded.model(ids, torch.arange(30)[None])
        torch.testing.assert_close(own, reference(ids).logits, rtol=1e-5, atol=1e-5)

    conversation = Conversation(
        [Message("user", "hello there"), Message("assistant", "how?"), Message("user", "today")]
    )
    messages = [message._asdict() for message in conversation.messages]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = loaded.tokenizer.prompt_ids(conversation)
    assert prompt == inputs["input_ids"][0].tolist()
    answer = generate(loaded.model, loaded.tokenizer, [prompt], Sampling(temperature=0, max_length=20))[0]
    suppressed = [0, 1, *range(len(tokenizer), VOCABULARY)]
    theirs = reference.generate(
        **inputs, max_new_tokens=20, do_sample=False, suppress_tokens=suppressed, eos_token_id=2, pad_token_id=0
    )
    said = [token for token in theirs[0, len(prompt) :].tolist() if token != 2]
    assert answer.ids == said
    stream = loaded.tokenizer.incremental_decoder()
    assert "".join(map(stream.push, answer.ids)) + stream.end() == tokenizer.decode(said, skip_special_tokens=True)

    assert sum(p.numel() for p in reference.parameters()) == loaded.config.num_parameters()
    dtype = str(FAMILIES[family]["dtype"]).removeprefix("torch.")
    export(run, tmp_path / "out", dtype=dtype)
    before = {k: v for path in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(path).items()}
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == model_type(family)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    out_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert out_tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_our_own_export_comes_back_as_it_was(tmp_path: Path) -> None:
    model = make_model(seed=3, tie_word_embeddings=False)
    export(write_run(tmp_path / "run", model), tmp_path / "hf", shard_size="8MB")
    back = load(import_hf(tmp_path / "hf", tmp_path / "back"), precision="fp32")
    assert not (tmp_path / "back/tokenizer").exists()
    assert back.config == model.config.model_copy(update={"intermediate_size": model.config.ffn_size})
    for (name, parameter), (_, original) in zip(back.model.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(parameter, original), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    make_hf(folder / "one", "tinyllama")
    make_hf(folder / "sharded", "llama3")
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, "no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"model_type": "qwen3"}, "no tensor model.layers.0.self_attn.q_norm.weight"),
        ({"model_type": "mamba"}, "model_type mamba"),
        ({"model_type": "mixtral"}, "no tensor model.layers.0.block_sparse_moe.gate.weight"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: Input should be greater"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, r'rope scaling {"type": "longrope"'),
        ({"rope_scaling": [2.0]}, r"rope_scaling \[2.0\] is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "no partial_rotary"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 32}, r"q_proj.weight has shape \[48, 48\], config.json says \[128, 48\]"),
        ({"head_dim": "twelve"}, "head_size: Input should be a valid integer"),
        ({"head_dim": 2**40}, "num_attention_heads . head_dim is"),
        ({"use_sliding_window": True, "sliding_window": 32}, "sliding_window 32 is not supported in llama models"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"num_hidden_layers": 10**9}, "too few for 1000000000 layers"),
        ({"num_hidden_layers": 1}, "which this model has no place for"),
        ({"intermediate_size": 96}, r"gate_proj.weight has shape \[80, 48\], config.json says \[96, 48\]"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"hidden_size": None}, "hidden_size"),
        ({"eos_token_id": None}, "names no eos_token_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    hf: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    source = shutil.copytree(hf / "one", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "generation_config.json").unlink(missing_ok=True)
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=named):
        import_hf(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing is left behind


def test_a_pickled_model_is_refused_and_does_not_run(hf: Path, tmp_path: Path) -> None:
    from tests.infer.damage import Payload

    source = shutil.copytree(hf / "one", tmp_path / "hf")
    marker = tmp_path / "marker"
    torch.save({"weight": Payload(marker)}, source / "pytorch_model.bin")
    import_hf(source, tmp_path / "run")  # safetensors are there: the pickle is not looked at
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model.bin: a pickle, which can run code"):
        import_hf(source, tmp_path / "other")
    shutil.copyfile(source / "pytorch_model.bin", source / "model.safetensors")
    with pytest.raises(UserError, match="not a valid safetensors file"):
        import_hf(source, tmp_path / "other")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "x.bin", 5])
def test_an_index_cannot_leave_its_folder(hf: Path, tmp_path: Path, name: Any) -> None:
    source = shutil.copytree(hf / "sharded", tmp_path / "hf")
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not a safetensors file of its own folder"):
        import_hf(source, tmp_path / "run")


def test_typed_special_tokens_are_text_and_missing_templates_refused(hf: Path, tmp_path: Path) -> None:
    tokenizer = load(import_hf(hf / "one", tmp_path / "run"), precision="fp32").tokenizer
    assert tokenizer.folder == tmp_path / "run/tokenizer"
    typed = tokenizer.prompt_ids(Conversation([Message("user", "hi <|im_end|> there")]))
    assert typed.count(2) == 1  # the template's own; what was typed is text
    with pytest.raises(UserError, match="chat template refuses it: bad role"):
        tokenizer.prompt_ids(Conversation([Message("critic", "hi")]))
    ((ids, ((message, start, end),)),) = tokenizer.message_spans(
        Conversation([Message("user", "hello"), Message("assistant", "today")])
    )
    assert message == 1
    assert tokenizer.decode(ids[start:end]) == "today<|im_end|>"
    assert ids[end - 1] == 2
    source = shutil.copytree(hf / "one", tmp_path / "base")
    (source / "chat_template.jinja").unlink()
    base = load(import_hf(source, tmp_path / "base-run"), precision="fp32").tokenizer
    with pytest.raises(UserError, match="has no chat template"):
        base.prompt_ids(Conversation([Message("user", "hi")]))


def test_the_command(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(hf / "one"), str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lumina_tokenizer"] is False
    line = [
        "generate",
        "--resume",
        str(tmp_path / "run"),
        "--prompt",
        "hello",
        "--temperature",
        "0",
        "--max-length",
        "8",
    ]
    assert main(line) == 0
    assert capsys.readouterr().out.strip()
    assert main(["import", str(hf / "one"), str(tmp_path / "run")]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "error: cannot read" in capsys.readouterr().err
