"""What `lumina export` writes, as transformers reads it: logits, template ids, greedy text."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer as FastTokenizer

from lumina.chat import Conversation, Message, Tokenizer, render, tokenizer_json
from lumina.cli import main
from lumina.config import ModelConfig, UserError
from lumina.config import load as load_config
from lumina.infer import Sampling, export, generate
from lumina.infer.hf.paths import parse_size
from tests.chat.drawn import as_openai, conversations, every_text, with_arguments_written_anew
from tests.infer.small_models import make_model, write_run
from tests.small_tokenizer import VOCABULARY, write_tokenizer

TOKENIZER = Tokenizer.load()
CHATS = [
    [("user", "Hello")],
    [("system", "Be brief.\n"), ("user", " What's  up?\r\n\n"), ("assistant", ""), ("user", "日本語 🙂 x")],
    [("text", "Plain text."), ("user", "a"), ("assistant", "b ")],
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export(write_run(folder / "run", make_model(seed=1, rope_theta=5000.0)), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.from_str(json.dumps(tokenizer_json(TOKENIZER)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "rms_norm_eps": 1e-3, "num_kv_heads": 1}])
def test_logits_are_equal(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(seed=2, rope_theta=777.0, **changes)
    export(write_run(tmp_path / "run", model), tmp_path / "hf", shard_size="9MB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert llama.dtype is torch.float32
    ids = torch.randint(0, 100_000, (2, 40))
    with torch.no_grad():
        expected = model(ids, torch.arange(40).expand(2, 40))
        torch.testing.assert_close(llama(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_greedy_text_is_equal(exported: Path, theirs: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(seed=1, rope_theta=5000.0)
    llama = AutoModelForCausalLM.from_pretrained(exported)
    chat = [{"role": "user", "content": "Hello, who are you?"}]
    inputs = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = llama.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prompt = TOKENIZER.prompt_ids(Conversation([Message("user", "Hello, who are you?")]))
    own = generate(model, TOKENIZER, [prompt], Sampling(temperature=0, max_length=16))[0]
    assert theirs.decode(said, skip_special_tokens=True) == TOKENIZER.decode(own.ids)


@pytest.mark.parametrize(("preset", "tied"), [("nano", False), ("debug", True)])
def test_the_presets_logits_ids_and_greedy_text_are_equal(tmp_path: Path, theirs: Any, preset: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    settings = load_config(preset, {"tie_word_embeddings": tied})
    shape = {name: getattr(settings, name) for name in ModelConfig.model_fields}
    model = make_model(seed=7, **shape)
    export(write_run(tmp_path / "run", model, world=1), tmp_path / "hf")
    shutil.rmtree(tmp_path / "run")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    chat = [{"role": "user", "content": "Hello, who are you?"}]
    inputs = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    prompt = TOKENIZER.prompt_ids(Conversation([Message("user", "Hello, who are you?")]))
    assert ids[0].tolist() == prompt
    with torch.no_grad():
        expected = model(ids, torch.arange(len(prompt))[None])
        torch.testing.assert_close(llama(ids).logits, expected, rtol=1e-5, atol=1e-5)
    said = llama.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    own = generate(model, TOKENIZER, [prompt], Sampling(temperature=0, max_length=8))[0]
    assert theirs.decode(said, skip_special_tokens=True) == TOKENIZER.decode(own.ids)
    shutil.rmtree(tmp_path / "hf")


@pytest.mark.parametrize("tied", [True, False])
def test_plain_safetensors_load_as_the_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    write_tokenizer(tmp_path / "run/tokenizer")
    model = make_model(seed=3, vocab_size=VOCABULARY, tie_word_embeddings=tied, family="qwen3", head_size=20)
    run = write_run(tmp_path / "run", model)
    done = export(run, tmp_path / "out", form="safetensors")
    assert sorted(path.name for path in done.folder.iterdir()) == ["README.md", "lumina.json", "model.safetensors"]
    monkeypatch.chdir(done.folder)
    code = (done.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code, found)  # as a reader would run it
    assert torch.equal(found["logits"], model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None]))
    sharded = export(run, tmp_path / "sharded", dtype="bfloat16", shard_size="20KB", form="safetensors")
    index = json.loads((sharded.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in model.named_parameters()}
    with pytest.raises(UserError, match="format onnx is not one of hf, safetensors"):
        export(run, tmp_path / "other", form="onnx")


@pytest.mark.parametrize("chat", CHATS)
def test_the_jinja_template_gives_the_very_ids(theirs: Any, chat: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in chat]
    conversation = Conversation([Message(role, content) for role, content in chat])
    whole = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert whole == render(TOKENIZER, conversation).ids.tolist()
    opened = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert opened == TOKENIZER.prompt_ids(conversation)


@settings(deadline=None)
@given(conversations, st.booleans(), st.sampled_from(["reasoning", "reasoning_content"]), st.booleans())
def test_tools_calls_and_reasoning_give_the_very_ids(
    theirs: Any, drawn: Conversation, parsed: bool, thinks: str, thinking: bool
) -> None:
    """The prompt's too. Without special tokens' names, which transformers reads as the tokens, and without characters
    that are not assigned: which of them are letters, the libraries' versions of Unicode differ about."""
    assigned = lambda text: "".join(c for c in text if unicodedata.category(c) != "Cn")
    conversation = every_text(drawn, lambda text: assigned(text).replace("<|", "< |") or "x")
    conversation = with_arguments_written_anew(conversation) if parsed else conversation
    messages = [as_openai(message, parsed, thinks) for message in conversation.messages]
    tools = [json.loads(tool) for tool in conversation.tools] or None
    whole = theirs.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert whole == render(TOKENIZER, conversation).ids.tolist()
    opened = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking, return_dict=True
    )
    assert opened["input_ids"] == TOKENIZER.prompt_ids(conversation, thinking=thinking)


def test_the_template_knows_the_aliases_and_no_other_role(theirs: Any) -> None:
    from jinja2 import TemplateError

    said = theirs.apply_chat_template(
        [{"role": "human", "content": "x"}, {"role": "bot", "content": "y"}], tokenize=False
    )
    assert said == "<|im_start|><|user|>x<|im_end|><|im_start|><|assistant|>y<|im_end|>"
    with pytest.raises(TemplateError, match="unknown role: critic"):
        theirs.apply_chat_template([{"role": "critic", "content": "x"}])


_SPACES = "\t\n\r \x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u200b\u2028\u202f\u3000\ufeff"


@settings(max_examples=600, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet=_SPACES + "aZé日'sSſtTKllrevd12٣0!.-_🙂", max_size=30)))
def test_the_tokenizer_gives_the_very_ids(fast: FastTokenizer, text: str) -> None:
    # A Hugging Face tokenizer takes a special token's name in plain text for the token; ours never does.
    assume(not any(name in text for name in TOKENIZER.special_ids))
    assert fast.encode(text).ids == TOKENIZER.encode(text)
    assert fast.decode(fast.encode(text).ids) == text


def test_special_tokens_have_their_ids(theirs: Any) -> None:
    for name, token in TOKENIZER.special_ids.items():
        assert theirs.convert_tokens_to_ids(name) == token
    assert (theirs.eos_token_id, theirs.pad_token_id) == (TOKENIZER.stop_id, TOKENIZER.pad_id)


def test_shards_hold_every_tensor_once_and_stay_below_the_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=3))
    done = export(run, tmp_path / "hf", dtype="bfloat16", shard_size="60KB")
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    seen: list[str] = []
    for name in done.shards:
        with safe_open(tmp_path / "hf" / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        assert all(tensor.dtype is torch.bfloat16 for tensor in tensors.values())
        fused = len(tensors) <= 3  # a matrix of ours that is larger than a shard
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000 or fused
        assert all(index["weight_map"][key] == name for key in tensors)
        seen += tensors
    assert len(seen) == len(set(seen)) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == done.bytes == 2 * make_model(num_layers=3).config.num_parameters()


def test_the_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").write_text("x")
    with pytest.raises(UserError, match="already holds something"):
        export(run, kept)
    assert [path.name for path in kept.iterdir()] == ["mine"]

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lumina.infer.hf.exporting.write_text", fails)
    with pytest.raises(OSError, match="no space left"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "run"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_it(tmp_path: Path, umask: int, mode: int) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    before = os.umask(umask)
    try:
        export(run, tmp_path / "hf")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {mode}


def test_the_command_and_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1), steps=(7,))
    assert main(["export", str(run), str(tmp_path / "hf"), "--dtype", "float16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == ["model.safetensors"]
    card = (tmp_path / "hf/README.md").read_text()
    assert "| Optimizer steps | 7 |" in card
    assert f"| Parameters | {make_model(num_layers=1).config.num_parameters():,} |" in card
    assert "Evaluation loss" not in card  # this run was never evaluated
    assert main(["export", str(run), str(tmp_path / "hf")]) == 2
    assert "already holds something" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("64k", 0), ("123", 123)])
def test_sizes(text: str, size: int) -> None:
    if size:
        assert parse_size(text) == size
    else:
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)
