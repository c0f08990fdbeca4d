"""An export behaves as the model did inside: transformers says what `lumina generate` says and ends where it ends, by
the folder's own files. The table over 20 prompts: python -m tests.infer.hf.exported_runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina.chat import Conversation, Message
from lumina.cli import main
from lumina.infer import export, import_hf, load
from tests.infer.hf.exported_runs import (
    EXPERTS,
    FAMILIES,
    KINDS,
    NEWER,
    PROMPTS,
    lumina_says,
    make_base,
    make_run,
    transformers_says,
)
from tests.infer.hf_models import make_hf

FEW = PROMPTS[:3]


@pytest.fixture(scope="module", params=[(family, kind) for family in FAMILIES for kind in KINDS], ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its export."""
    place = tmp_path_factory.mktemp("-".join(request.param))
    run = make_run(place, *request.param)
    return run, export(run, place / "out").folder


def test_text_and_stop_are_those_of_lumina_generate(exported: tuple[Path, Path]) -> None:
    run, folder = exported
    ours = lumina_says(load(run, precision="fp32"), FEW)
    assert ours == transformers_says(folder, FEW)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*NEWER, *EXPERTS])
def test_text_and_stop_of_newer_families(tmp_path: Path, family: str, kind: str) -> None:
    run = make_run(tmp_path, family, kind)
    ours = lumina_says(load(run, precision="fp32"), PROMPTS)
    assert ours == transformers_says(export(run, tmp_path / "out").folder, PROMPTS)
    assert any(one.stopped for one in ours)
    assert len({one.text for one in ours}) > 1, "random weights say the same to everything"


def test_every_file_says_the_same(exported: tuple[Path, Path]) -> None:
    """What transformers, vLLM and llama.cpp's converter each read of stops, padding and template."""
    run, folder = exported
    tokenizer = load(run, precision="fp32").tokenizer
    config, generation, settings = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert config["eos_token_id"] == generation["eos_token_id"]
    stops = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert set(stops) == tokenizer.stop_ids
    assert tokenizer.decode([stops[0]]) == settings["eos_token"] == "<|im_end|>"
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_id
    assert tokenizer.decode([tokenizer.pad_id]) == settings["pad_token"]
    assert settings["model_max_length"] == generation["max_length"] == config["max_position_embeddings"]
    if (folder / "chat_template.jinja").exists():
        assert settings["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert not {"repetition_penalty", "no_repeat_ngram_size"} & generation.keys()
    assert generation["do_sample"] is True
    spec = json.loads((folder / "tokenizer.json").read_text())
    if "added_tokens_decoder" in settings:
        flags = {int(number): token["special"] for number, token in settings["added_tokens_decoder"].items()}
        assert flags == {token["id"]: token["special"] for token in spec["added_tokens"]}
    assert not {"stops.json", "special_tokens_map.json"} & {path.name for path in folder.iterdir()}


def test_how_tokens_are_drawn_is_the_files_or_luminas(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", "tinyllama")
    make_base(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run"), "--chat-template", "chatml"]) == 0
    generation = json.loads((export(tmp_path / "run", tmp_path / "out").folder / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert "top_k" not in generation
    (tmp_path / "run/tokenizer/generation_config.json").write_text('{"eos_token_id": 0}')
    generation = json.loads((export(tmp_path / "run", tmp_path / "two").folder / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["top_p"]) == (0.8, 50, 0.9)


def test_texts_are_encoded_as_inside(tmp_path: Path) -> None:
    """A vocabulary that puts a token before every text, and settings beside it that say otherwise."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    make_hf(tmp_path / "hf", "tinyllama")
    fast = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    fast.save(str(tmp_path / "hf/tokenizer.json"))
    path = tmp_path / "hf/tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"add_bos_token": False, "auto_map": {"AutoTokenizer": ["x", "y"]}})
    )
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    own = load(tmp_path / "run").tokenizer
    theirs = AutoTokenizer.from_pretrained(export(tmp_path / "run", tmp_path / "out").folder)
    for text in ("hello there", " a\n", ""):
        assert theirs(text)["input_ids"] == own.text_ids(text)
        assert theirs.decode(own.text_ids(text), skip_special_tokens=True) == text


def test_a_template_that_writes_the_date_writes_the_recorded_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_hf(tmp_path / "hf", "tinyllama")
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    (tmp_path / "hf/chat_template.jinja").write_text(template)
    run = import_hf(tmp_path / "hf", tmp_path / "run")
    (run / "tokenizer/date.json").write_text('{"date": "2020-02-03"}')
    theirs = AutoTokenizer.from_pretrained(export(run, tmp_path / "out").folder)
    said = theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert said == "03 Feb 2020<|im_start|>x<|im_end|><|im_start|>"
    own = load(run).tokenizer
    assert own.decode(own.prompt_ids(Conversation([Message("user", "x")]))) == said
