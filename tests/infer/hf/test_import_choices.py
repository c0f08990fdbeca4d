"""What `lumina import` decides and says: another output matrix than config.json says, ids beyond the embedding, stop
ids, sliding windows, chat templates for base models, and folders that are something else."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file

from lumina.chat import Conversation, Message
from lumina.cli import main
from lumina.config import UserError
from lumina.config import load as settings
from lumina.infer import IMPORT_RECORD, export, import_hf, load
from tests.infer.hf_models import make_hf
from tests.small_tokenizer import CHATML, END, VOCABULARY, write_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_hf(folder / "tied", "smollm2")
    make_hf(folder / "untied", "tinyllama")
    make_hf(folder / "mistral", "mistral")
    return folder


def _copy(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | changes))
    return target


def _notes(run: Path) -> list[str]:
    notes: list[str] = json.loads((run / "import.json").read_text())["notes"]
    return notes


def _logits_are_transformers(run: Path, source: Path, length: int = 30) -> None:
    from transformers import AutoModelForCausalLM

    loaded = load(run, precision="fp32")
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = loaded.model(ids, torch.arange(length)[None])
        torch.testing.assert_close(own, reference(ids).logits, rtol=1e-5, atol=1e-5)


# --- The output matrix ----------------------------------------------------------------------------


def test_a_head_that_differs_from_the_tied_embedding_is_used_and_said(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _copy(made / "tied", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 8.0  # one number of the last row
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "lumina"):
        run = import_hf(source, tmp_path / "run")
    assert "the model is untied" in caplog.text
    assert load(run).config.tie_word_embeddings is False
    assert _notes(run) == [note for note in _notes(run) if "output matrix" in note] != []
    _logits_are_transformers(run, source)


def test_a_copy_of_the_embedding_as_head_stays_tied(made: Path, tmp_path: Path) -> None:
    source = _copy(made / "tied", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run = import_hf(source, tmp_path / "run")
    assert load(run).config.tie_word_embeddings is True
    assert _notes(run) == []
    del tensors["model.embed_tokens.weight"]  # transformers then takes the one that is there for both
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    again = import_hf(source, tmp_path / "again")
    _logits_are_transformers(again, source)
    assert torch.equal(load(run).model.embedding.weight, load(again).model.embedding.weight)


# --- Ids beyond the embedding ---------------------------------------------------------------------


def _with_more_ids(source: Path, count: int) -> Path:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<more {i}>" for i in range(count)])
    tokenizer.save(str(source / "tokenizer.json"))
    return source


def test_ids_beyond_the_embedding_are_refused_or_given_the_mean(made: Path, tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "t")
    room = VOCABULARY - len(json.loads((ids / "tokenizer.json").read_text())["model"]["vocab"])
    fits = _with_more_ids(_copy(made / "untied", tmp_path / "fits"), room)
    assert load(import_hf(fits, tmp_path / "fits-run")).config.vocab_size == VOCABULARY
    source = _with_more_ids(_copy(made / "untied", tmp_path / "hf"), room + 3)
    with pytest.raises(UserError, match=r"has 515 ids, the model's embedding only 512 rows\n.*--grow-vocabulary"):
        import_hf(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = import_hf(source, tmp_path / "run", grow_vocabulary=True)
    assert "576 rows for 512" in _notes(run)[0]
    loaded, tensors = load(run, precision="fp32"), load_file(source / "model.safetensors")
    for name, ours in (("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "output")):
        weight, stored = getattr(loaded.model, ours).weight, tensors[name].float()
        assert torch.equal(weight[:512], stored)
        mean = stored.double().mean(0).expand(64, -1)
        torch.testing.assert_close(weight[512:].double(), mean, rtol=1e-5, atol=1e-6)
    assert loaded.tokenizer.decode([514]) == "<more 114>"
    shutil.copyfile(source / "tokenizer.json", tmp_path / "fits-run/tokenizer/tokenizer.json")
    with pytest.raises(UserError, match="has 515 ids, the model only 512"):
        load(tmp_path / "fits-run")


# --- Stop ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": None}, [7], {2, 7}),  # 2 is the template's own end
        ({}, 7, {2, 7}),
        ({"eos_token_id": [0, 5]}, 7, {0, 2, 5}),
    ],
)
def test_a_null_hides_nothing(made: Path, tmp_path: Path, generation: Any, config: Any, stops: set[int]) -> None:
    source = _copy(made / "untied", tmp_path / "hf", eos_token_id=config)
    (source / "generation_config.json").write_text(json.dumps(generation))
    assert load(import_hf(source, tmp_path / "run")).tokenizer.stop_ids == stops


# --- Sliding windows ------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [96, 4096])
def test_a_window_that_no_position_exceeds_is_taken(made: Path, tmp_path: Path, window: int) -> None:
    source = _copy(made / "mistral", tmp_path / "hf", sliding_window=window)
    _logits_are_transformers(import_hf(source, tmp_path / "run"), source, length=96)


def test_a_window_narrower_than_the_context(made: Path, tmp_path: Path) -> None:
    source = _copy(made / "mistral", tmp_path / "hf", sliding_window=20)
    _logits_are_transformers(import_hf(source, tmp_path / "run"), source)
    run = import_hf(source, tmp_path / "short", context_length=20)
    assert load(run).context_length == 20
    assert json.loads((run / IMPORT_RECORD).read_text())["notes"] == [
        "the context length is 20, as the import was told; the model has 96 (max_position_embeddings)"
    ]
    _logits_are_transformers(run, source, length=20)
    with pytest.raises(UserError, match="context length 97 is not between 2 and the model's 96"):
        import_hf(source, tmp_path / "other", context_length=97)


def test_a_shorter_context_leaves_rope_scaling_as_it_is(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", "llama3.2")
    values = json.loads((tmp_path / "hf/config.json").read_text())
    del values["rope_parameters"]["original_max_position_embeddings"]  # transformers then takes the context length
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    run = import_hf(tmp_path / "hf", tmp_path / "run", context_length=40)
    _logits_are_transformers(run, tmp_path / "hf")
    config = settings("nano", {"init_from": str(run)})
    assert (config.seq_length, config.trained_seq_length) == (40, 96), "from which longer contexts count"


# --- Chat templates -------------------------------------------------------------------------------

CHAT = [Message("system", "Be brief."), Message("user", "hello"), Message("assistant", "you?"), Message("user", "so")]


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A base model: no template, and answers would end with the end of a document."""
    source = _copy(made / "untied", tmp_path / "base", eos_token_id=0)
    (source / "chat_template.jinja").unlink()
    (source / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    return source


@pytest.mark.parametrize(
    ("name", "opened", "stop"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyou?"
            "<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        (
            "llama3",
            "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
            "\n\nyou?<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (
            "zephyr",
            "<|system|>\nBe brief.<|endoftext|>\n<|user|>\nhello<|endoftext|>\n<|assistant|>\nyou?<|endoftext|>\n"
            "<|user|>\nso<|endoftext|>\n<|assistant|>\n",
            "<|endoftext|>",
        ),
        (
            "mistral",
            "<|endoftext|>[INST] Be brief.\n\nhello [/INST] you?<|endoftext|>[INST] so [/INST]",
            "<|endoftext|>",
        ),
    ],
)
def test_a_base_model_with_a_stock_template(base: Path, tmp_path: Path, name: str, opened: str, stop: str) -> None:
    from tokenizers import Tokenizer

    run = import_hf(base, tmp_path / "run", chat_template=name)
    tokenizer = load(run).tokenizer
    tokenizer.check_trainable()
    prompt = tokenizer.prompt_ids(Conversation(CHAT))
    assert tokenizer.decode(prompt) == opened
    # Special tokens are whole: the kept files say so to `tokenizers` alone too.
    kept = Tokenizer.from_file(str(run / "tokenizer/tokenizer.json"))
    assert kept.encode(opened, add_special_tokens=False).ids == prompt
    assert kept.token_to_id(stop) in tokenizer.stop_ids
    ids, spans = tokenizer.message_spans(Conversation([*CHAT, Message("assistant", "today")]))[-1]
    supervised = ids[spans[-1].start : spans[-1].end]
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(supervised).strip() == "today" + stop
    assert supervised[-1] in tokenizer.stop_ids
    # The template is an ordinary one: jinja2 by itself gives the same text.
    text = (run / "tokenizer/chat_template.jinja").read_text()
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    said = plain.render(
        messages=[{"role": m.role, "content": m.content} for m in CHAT],
        add_generation_prompt=True,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    assert said == opened


def test_tokens_of_a_template_that_the_vocabulary_lacks_are_added_where_there_is_room(
    base: Path, tmp_path: Path
) -> None:
    run = import_hf(base, tmp_path / "run", chat_template="llama3")
    assert "lacked <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in _notes(run)[0]
    room = VOCABULARY - load(run).tokenizer.vocab_size
    full = _with_more_ids(base, room + 1)
    with pytest.raises(UserError, match="513 ids, the model's embedding only 512 rows"):
        import_hf(full, tmp_path / "full", chat_template="llama3")
    grown = load(import_hf(full, tmp_path / "full", chat_template="llama3", grow_vocabulary=True))
    assert grown.config.vocab_size == 576
    prompt = grown.tokenizer.prompt_ids(Conversation([Message("user", "a")]))
    assert max(prompt) == max(grown.tokenizer.stop_ids) == 512  # <|eot_id|>


def test_a_template_from_a_file(base: Path, tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}"
    own += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (tmp_path / "first.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"chat template .*first.jinja does not suit this vocabulary: "):
        import_hf(base, tmp_path / "run", chat_template=str(tmp_path / "first.jinja"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "endless.jinja").write_text(own.replace("END", "'\\n'"))
    endless = load(import_hf(base, tmp_path / "endless", chat_template=str(tmp_path / "endless.jinja"))).tokenizer
    ids, spans = endless.message_spans(Conversation([Message("user", "x"), Message("assistant", "y")]))[-1]
    assert ids[spans[-1].end - 1] == 0  # without an end of the template's own, that of a document
    (tmp_path / "own.jinja").write_text(own.replace("END", f"'{END}'"))
    run = import_hf(base, tmp_path / "run", chat_template=str(tmp_path / "own.jinja"))
    tokenizer = load(run).tokenizer
    assert tokenizer.decode(tokenizer.prompt_ids(Conversation([Message("user", "x")]))) == f"user: x{END}assistant: "
    assert tokenizer.stop_ids == {0, 2}  # what ends a document, and what the template ends a turn with
    with pytest.raises(UserError, match="chat template alpacca is neither a file nor a stock template"):
        import_hf(base, tmp_path / "other", chat_template="alpacca")


def test_a_template_from_a_file_that_writes_the_date_has_one_recorded(base: Path, tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text("{{ 'Today: ' + strftime_now('%Y-%m-%d') }}" + CHATML)
    run = import_hf(base, tmp_path / "run", chat_template=str(tmp_path / "dated.jinja"))
    recorded = json.loads(next(run.rglob("date.json")).read_text())["date"]
    tokenizer = load(run).tokenizer
    assert tokenizer.decode(tokenizer.prompt_ids(Conversation([Message("user", "x")]))).startswith(f"Today: {recorded}")


def test_a_base_model_without_one_is_said(base: Path, tmp_path: Path) -> None:
    assert "no chat template" in _notes(import_hf(base, tmp_path / "run"))[0]


# --- Folders that are something else --------------------------------------------------------------


def test_each_gets_one_sentence_and_its_remedy(made: Path, tmp_path: Path) -> None:
    def refused(source: Path | str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            import_hf(source, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("acme-org/Acme-7B.v1", r"names on a hub are not looked up\n.*hf download acme-org/Acme-7B.v1 --local-dir")
    refused(tmp_path / "nowhere", r"there is no such folder")
    refused(made / "tied/config.json", r"it is a file\n.*folder that holds config.json")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, r"holds an adapter \(adapter_config.json\), not a whole model\n.*merge_and_unload")

    source = _copy(made / "untied", tmp_path / "hf")
    whole = (source / "model.safetensors").read_bytes()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    run = import_hf(source, tmp_path / "stale")  # an index beside the one file is left over: transformers' choice
    _logits_are_transformers(run, source)
    (source / "model.safetensors").unlink()
    refused(source, r"names model-00001-of-00002.safetensors, which is missing\n.*download")
    (source / "model-00001-of-00002.safetensors").write_bytes(whole)
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model-00002-of-00002.safetensors").write_bytes(whole)
    refused(source, r"is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")
    (source / "model.safetensors.index.json").unlink()
    refused(source, r"has model-00001-of-00002.safetensors but neither model.safetensors nor model.safetensors.index")
    for path in source.glob("*.safetensors"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    refused(source, r"pytorch_model.bin: a pickle.*\n.*save_pretrained")
    (source / "pytorch_model.bin").unlink()
    (source / "model.Q4_K_M.gguf").write_bytes(b"")
    refused(source, r"rounded for llama.cpp\n.*safetensors that it was made from")
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(source, r"Git LFS's pointer to one\n.*git lfs pull")


def test_the_options_of_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["import", str(base), str(tmp_path / "run"), "--chat-template", "chatml", "--context-length", "64", "--json"]
    assert main(line) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["notes"] == _notes(tmp_path / "run")
    assert load(tmp_path / "run").context_length == 64


def test_stacked_experts_are_taken_in_and_released_names_given_out(tmp_path: Path) -> None:
    """transformers 5 stacks experts' matrices in memory, and files may hold them so."""
    from transformers import AutoModelForCausalLM

    for family in ("mixtral", "qwen3_moe"):
        make_hf(tmp_path / family, family)
        released = load_file(tmp_path / family / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / family / "model.safetensors")
        export(import_hf(tmp_path / family, tmp_path / f"{family}-run"), tmp_path / f"{family}-out", dtype="bfloat16")
        after = load_file(tmp_path / f"{family}-out" / "model.safetensors")
        assert after.keys() == released.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in released.items())
