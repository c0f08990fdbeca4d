"""Presets, the early README's YAML, precedence, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lumina.config import MIN_VOCAB, Config, UserError, load, preset_names

EARLY_YAML = """\
# config/custom.yaml
model_name: "custom_model"
hidden_size: 1024
num_layers: 24
num_heads: 16
num_kv_heads: 4
seq_length: 4096
vocab_size: 50304

learning_rate: 1e-4
batch_size: 4
gradient_accumulation_steps: 4
max_grad_norm: 1.0
weight_decay: 0.01

precision: "fp16"
compile: true
gradient_checkpointing: true

# Scheduler options
lr_scheduler: "cosine"
warmup_ratio: 0.1
min_lr: 1e-6

# Training behavior
early_stopping_patience: 5
eval_every_n_batches: 500
save_every_n_batches: 1000
health_check_interval: 100
"""


def write(folder: Path, text: str) -> str:
    path = folder / "custom.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_seeds_yaml_loads_verbatim(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = load(write(tmp_path, EARLY_YAML))
    expected = {
        "model_name": "custom_model",
        "hidden_size": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "num_kv_heads": 4,
        "seq_length": 4096,
        "learning_rate": 1e-4,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "precision": "fp16",
        "compile": True,
        "gradient_checkpointing": True,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "min_lr": 1e-6,
        "early_stopping_patience": 5,
        "eval_every_n_batches": 500,
        "save_every_n_batches": 1000,
        "health_check_interval": 100,
    }
    got = {name: getattr(config, name) for name in expected}
    assert got == expected
    assert [type(got[name]) for name in expected] == [type(value) for value in expected.values()]
    # Its 50,304 rows do not hold cl100k_base: raised, and said so.
    assert config.vocab_size == 100_352
    assert "vocab_size 50304" in caplog.text
    assert config.explicit == frozenset(expected) | {"vocab_size"}


def test_the_vocabulary_is_the_tokenizers() -> None:
    from lumina.chat import Tokenizer

    assert Tokenizer.load().vocab_size == MIN_VOCAB


def test_no_warning_when_the_vocabulary_is_large_enough(caplog: pytest.LogCaptureFixture) -> None:
    assert load("nano", sets=["vocab_size=100480"]).vocab_size == 100_480
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("preset", "shape", "ffn", "millions_without", "millions_with"),
    [
        ("debug", (512, 8, 8, 2, 1024), 1408, 22.6, 73.9),
        ("small", (768, 12, 12, 4, 2048), 2048, 75.5, 152.6),
        ("medium", (1024, 24, 16, 4, 4096), 2752, 265.9, 368.6),
        ("large", (2048, 32, 32, 8, 8192), 5504, 1417.8, 1623.3),
        ("1b", (2048, 16, 16, 8, 4096), 8192, 1006.7, 1212.2),
        ("3b", (3072, 28, 24, 8, 8192), 8192, 2818.7, 3127.0),
        ("8b", (4096, 32, 32, 8, 8192), 14336, 6979.6, 7801.7),
    ],
)
def test_preset_shapes_and_sizes(
    preset: str, shape: tuple[int, ...], ffn: int, millions_without: float, millions_with: float
) -> None:
    config = load(preset)
    names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "seq_length")
    assert tuple(getattr(config, name) for name in names) == shape
    assert config.ffn_size == ffn
    assert round(config.num_parameters(with_embeddings=False) / 1e6, 1) == millions_without
    assert round(config.num_parameters(with_embeddings=True) / 1e6, 1) == millions_with
    assert config.explicit == frozenset()


@pytest.mark.parametrize(("preset", "count"), [("1b", 1_212_221_440), ("3b", 3_127_028_736), ("8b", 7_801_671_680)])
def test_presets_with_heads_of_128(preset: str, count: int) -> None:
    """As many parameters as the real model has, whose heads are of 128."""
    import torch

    from lumina.model import Transformer

    config = load(preset)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters() == count
    assert config.head_dim == 128


def test_presets_come_smallest_first() -> None:
    counts = [load(name).num_parameters() for name in preset_names()]
    assert counts == sorted(counts)


def test_parameter_count_is_that_of_transformers_llama() -> None:
    """transformers counts its own modules; ours is a formula."""
    transformers = pytest.importorskip("transformers")
    import torch

    for tied in (True, False):
        config = load("nano", sets=[f"tie_word_embeddings={tied}", "intermediate_size=320"])
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    hidden_size=config.hidden_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    intermediate_size=320,
                    vocab_size=config.vocab_size,
                    tie_word_embeddings=tied,
                )
            )
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@given(in_file=st.booleans(), in_flag=st.booleans(), in_set=st.booleans(), values=st.permutations([3e-4, 5e-4, 7e-4]))
def test_precedence(
    tmp_path_factory: pytest.TempPathFactory, in_file: bool, in_flag: bool, in_set: bool, values: list[float]
) -> None:
    """preset < YAML < flags < --set, whichever of them are there; None means that a flag was not given."""
    path = write(tmp_path_factory.mktemp("c"), f"preset: nano\n{f'learning_rate: {values[0]}' if in_file else ''}\n")
    config = load(
        path,
        {"learning_rate": values[1] if in_flag else None},
        [f"learning_rate={values[2]}"] if in_set else [],
    )
    layers = [1e-4, *(v for v, there in zip(values, (in_file, in_flag, in_set), strict=True) if there)]
    assert config.learning_rate == layers[-1]
    assert config.explicit == ({"learning_rate"} if len(layers) > 1 else set())
    assert config.hidden_size == 256


def test_a_yaml_without_a_preset_starts_from_medium(tmp_path: Path) -> None:
    assert load(write(tmp_path, "epochs: 3\n")).hidden_size == load("medium").hidden_size


@pytest.mark.parametrize("preset", preset_names())
def test_yaml_round_trip(tmp_path: Path, preset: str) -> None:
    config = load(preset, {"train_data": ["ä b.jsonl", "c: d"]}, ["gradient_checkpointing=3", "min_lr=3e-9"])
    again = load(write(tmp_path, config.to_yaml()))
    assert again.values() == config.values()
    assert yaml.safe_load(config.to_yaml()).keys() == Config.model_fields.keys() - {"resume"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5e-3", 5e-4), ("1.0e-4", 1e-4), ("+2e-04", 2e-4), ("1", 1.0)],
)
def test_exponents_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    config = load(write(tmp_path, f"learning_rate: {text}\n"))
    assert config.learning_rate == value
    assert load("nano", sets=[f"learning_rate={text}"]).learning_rate == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\n", "line 1: unknown key `a`"),
        ("epochs: 1\n\nhiden_size: 4\n", "line 3: unknown key `hiden_size`. Did you mean `hidden_size`?"),
        ("lr: 1e-3\n", "Did you mean `learning_rate`?"),
        ("epochs: 1\nepochs: 2\n", "line 2: `epochs` was already given on line 1"),
        ("data:\n- path: a\n  path: b\n", "line 3: not valid YAML: `path` is given twice"),
        ("rope_scaling: {type: linear, [1]: 2}\n", "line 1: not valid YAML: found unhashable key"),
        ("epochs: [1\n", "not valid YAML"),
        ("- epochs\n", "not a mapping"),
        ("epochs: 1\nbatch_size: none\n", "line 2: `batch_size` (given 'none')"),
        ("epochs: 0\n", "line 1: `epochs` (given 0): input should be greater than 0"),
        ("learning_rate: .inf\n", "`learning_rate`"),
        ("precision: fp8\n", "`precision` (given 'fp8')"),
        ("hidden_size: 100\nnum_heads: 16\n", "hidden_size 100 is not a multiple of num_heads 16"),
        ("num_kv_heads: 3\n", "num_heads 16 is not a multiple of num_kv_heads 3"),
        ("min_lr: 1\n", "min_lr 1 is above learning_rate 0.0001"),
        ("preset: larg\n", "line 1: no preset is called `larg`. Did you mean `large`?"),
    ],
)
def test_refused_by_name_and_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in caught.value.message


def test_flags_and_sets_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"--set epoch=3: unknown key `epoch`. Did you mean `epochs`"):
        load("nano", sets=["epoch=3"])
    with pytest.raises(UserError, match="expected key=value"):
        load("nano", sets=["epochs"])
    with pytest.raises(UserError, match=r"the command line: `batch_size` \(given -1\)"):
        load("nano", {"batch_size": -1})


def test_a_missing_preset_or_file() -> None:
    with pytest.raises(UserError, match=r"Did you mean `medium`\?"):
        load("meduim")
    with pytest.raises(UserError, match=r"no such configuration file: config/x\.yaml"):
        load("config/x.yaml")


def test_checkpointing_forms() -> None:
    every = {
        text: load("nano", sets=[f"gradient_checkpointing={text}"]).checkpoint_every for text in ("false", "true", "4")
    }
    assert every == {"false": 0, "true": 1, "4": 4}


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    text = "data:\n- &first {path: a, weight: 0.5}\n- {<<: *first, path: b}\n"
    assert [(source.path, source.weight) for source in load(write(tmp_path, text)).data] == [("a", 0.5), ("b", 0.5)]


def test_a_text_is_a_list_of_one(tmp_path: Path) -> None:
    """Wherever the schema has a list of texts or of mappings."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "preset: nano\ntrain_data: a.jsonl\neval_data: b.jsonl\ntrackers: wandb\ndisabled_rules: loss-spike\n"
        "sample_prompts: 'Hello, you'\nlora_targets: q_proj\ndata: {path: c.jsonl, weight: 2}\n"
    )
    config = load(str(file))
    assert config.train_data == ["a.jsonl"]
    assert config.eval_data == ["b.jsonl"]
    assert config.trackers == ["wandb"]
    assert config.sample_prompts == ["Hello, you"]
    assert config.lora_targets == ["q_proj"]
    assert [(source.path, source.weight) for source in config.data] == [("c.jsonl", 2.0)]
    file.write_text("preset: nano\ndata: c.jsonl\n")
    assert [source.path for source in load(str(file)).data] == ["c.jsonl"]
    file.write_text("preset: nano\ndata: [c.jsonl, {path: d.jsonl}]\n")
    assert [source.path for source in load(str(file)).data] == ["c.jsonl", "d.jsonl"]
    assert load("nano", sets=["train_data=x.jsonl"]).train_data == ["x.jsonl"]
    for wrong in ("train_data: 7", "data: {weight: 2}", "trackers: nobody"):
        file.write_text(f"preset: nano\n{wrong}\n")
        with pytest.raises(UserError):
            load(str(file))


def test_the_default_floor_follows_a_small_rate() -> None:
    """5e-7 is a usual rate of preference training, below the default floor; a floor that was set is not touched."""
    config = load("nano", {"learning_rate": 5e-7})
    assert config.min_lr == pytest.approx(5e-9)
    assert load("nano", {"learning_rate": 1e-5}).min_lr == 1e-6
    with pytest.raises(UserError, match="min_lr 1e-06 is above learning_rate 5e-07"):
        load("nano", {"learning_rate": 5e-7, "min_lr": 1e-6})


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "medium"),
        ({"seq_length": 64, "vocab_size": 100_480}, "medium"),
        ({"hidden_size": 1024}, "medium"),
        ({"hidden_size": 64, "num_layers": 2}, "lumina"),
        ({"intermediate_size": 128}, "lumina"),
        ({"hidden_size": 64, "model_name": "mine"}, "mine"),
    ],
)
def test_a_preset_s_name_is_that_of_its_sizes(flags: dict[str, Any], name: str) -> None:
    assert load("medium", flags).model_name == name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"compile": True}, "compile"),
        ({"lora_rank": 4, "lora_dropout": 0.1}, "lora_dropout"),
        ({"float8": "tensorwise"}, "float8 tensorwise"),
        ({"family": "qwen3_moe", "experts": {"count": 4}}, "experts"),
    ],
)
def test_feed_forwards_that_cannot_be_tiled(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"mlp_tile_tokens does not work together with {told}; leave one of the two"):
        load("nano", settings | {"mlp_tile_tokens": 64})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"compile": True}, "does not work together with compile; leave one of the two"),
        ({"lora_rank": 4, "lora_dropout": 0.1}, "does not work together with lora_dropout"),
        ({"float8": "tensorwise"}, "does not work together with float8 tensorwise"),
        ({"family": "olmo2"}, "does not work together with family olmo2"),
        (
            {"num_kv_heads": 1},
            "2 does not divide the 4 query heads and 1 key/value heads into groups; set it to one of 1",
        ),
        (
            {"float8": "rowwise", "head_size": 24, "num_heads": 6, "num_kv_heads": 6},
            "2 does not divide .* one of 1, 3$",
        ),
        ({"sequence_parallel_size": 4}, "2 does not divide .* groups, each of which 4 ranks share; set it to one of 1"),
    ],
)
def test_heads_that_cannot_be_grouped(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"attention_head_groups {told}"):
        load("nano", settings | {"attention_head_groups": 2})


def test_only_recomputed_layers_have_inputs_to_offload() -> None:
    assert load("nano", {"activation_offloading": True, "gradient_checkpointing": 2}).activation_offloading
    with pytest.raises(UserError, match=r"activation_offloading.*set gradient_checkpointing"):
        load("nano", {"activation_offloading": True})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_heads": 4, "num_kv_heads": 2, "sequence_parallel_size": 3}, "3 does not divide num_heads 4.* 1, 2, 4"),
        ({"num_heads": 4, "sequence_parallel_size": 2, "compile": True}, "2 does not work together with compile"),
        (
            {"family": "qwen3_moe", "experts": {"count": 4}, "num_heads": 4, "sequence_parallel_size": 2},
            "2 does not work together with experts",
        ),
    ],
)
def test_rows_that_cannot_be_shared(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        load("nano", settings)
    assert str(caught.value).count("sequence_parallel_size") >= 1


# --- A resume by the command that began the run ---

_SHAPED = (
    "hidden_size",
    "num_layers",
    "num_kv_heads",
    "seq_length",
    "family",
    "rope_theta",
    "rope_scaling",
    "tokenizer",
)
_BASE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 1, "rope_theta": 1e6, "family": "qwen2"}


@pytest.mark.parametrize(
    ("written", "own_file", "more"),
    [
        ("nothing", False, {"objective": "dpo", "lora_rank": 4}),
        ("settings", True, {"seq_length": 2048, "rope_scaling": "yarn"}),
        ("checkpoint", False, {}),
        ("checkpoint", False, {"seq_length": 2048, "rope_scaling": "yarn"}),
        ("checkpoint", True, {"seq_length": 2048, "rope_scaling": "linear", "rope_theta": 5e5}),
    ],
)
def test_the_command_that_began_a_run_resumes_it(
    written: str, own_file: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    """Over weights of another shape than the preset's: of the run that has a checkpoint its own settings go before the
    preset's, of another those of what it begins with; what the user writes down goes before both. `own_file`: the
    command names a YAML file, and what the run began with no more; run.json knows it."""
    (tmp_path / "base/tokenizer").mkdir(parents=True)
    values = load("nano", {"seq_length": 1024, **_BASE}).values() | {"tokenizer": "tokenizer"}
    (tmp_path / "base/config.yaml").write_text(yaml.safe_dump(values))
    place: dict[str, Any] = {"output_dir": str(tmp_path), "experiment_name": "run"}
    given = {"init_from": str(tmp_path / "base"), **more, **place}
    preset = write(tmp_path, "preset: nano\nlearning_rate: 1e-3\n") if own_file else "nano"
    first = load(preset, given)
    assert load(preset, {**given, "resume": "auto"}).values() == first.values() | {"resume": "auto"}, "which begins it"
    if written != "nothing":
        run = tmp_path / "run"
        (run / "tokenizer").mkdir(parents=True)
        (run / "config.yaml").write_text(first.replace(tokenizer="tokenizer").to_yaml("init_from"))
        (run / "run.json").write_text(json.dumps({"config": first.model_dump(mode="json")}))
        if written == "checkpoint":
            (run / "checkpoints/step-00000003").mkdir(parents=True)
            (tmp_path / "base/config.yaml").unlink()  # which is not needed any more
    if own_file and written != "nothing":
        del given["init_from"]
    tokenizer = str(tmp_path / ("run" if written == "checkpoint" else "base") / "tokenizer")
    for resume in ("auto", str(tmp_path / "run"))[: 2 if written == "checkpoint" else 1]:
        again = load(preset, {**given, "resume": resume})
        expected = {name: getattr(first, name) for name in _SHAPED} | {"tokenizer": tokenizer}
        assert {name: getattr(again, name) for name in _SHAPED} == expected
        assert again.trained_seq_length == first.trained_seq_length == 1024
        assert again.explicit == first.explicit - {"init_from"} | {"resume"} | given.keys() & {"init_from"}
        other = load(preset, {**given, "resume": resume, "hidden_size": 32, "rope_theta": 7.0})
        assert (other.hidden_size, other.rope_theta) == (32, 7.0), "which the run then refuses"


def test_a_run_from_scratch_is_resumed_by_its_own_preset(tmp_path: Path) -> None:
    """Another preset is another model, which the run refuses: nothing of the run is taken in its place."""
    place: dict[str, Any] = {"output_dir": str(tmp_path), "experiment_name": "run"}
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    first = load("nano", place)
    (tmp_path / "run/config.yaml").write_text(first.to_yaml("init_from"))
    (tmp_path / "run/run.json").write_text(json.dumps({"config": first.model_dump(mode="json")}))
    assert load("debug", {**place, "resume": "auto"}).hidden_size == load("debug").hidden_size


def test_a_run_within_another_runs_folder_is_no_part_of_it(tmp_path: Path) -> None:
    """`--resume auto` looks at that folder alone, whether it begins the run or goes on."""
    outer = tmp_path / "outer"
    for folder, settings in ((tmp_path / "base", _BASE), (outer, {"seq_length": 1024, **_BASE})):
        folder.mkdir()
        (folder / "config.yaml").write_text(load("nano", settings).to_yaml())
    (outer / "run.json").write_text(json.dumps({"config": {"init_from": str(tmp_path / "base")}}))
    fresh = load("nano", place := {"output_dir": str(outer), "experiment_name": "inner"})
    assert load("nano", {**place, "resume": "auto"}).values() == fresh.values() | {"resume": "auto"}
    (outer / "inner/checkpoints/step-00000003").mkdir(parents=True)
    assert load("nano", {**place, "resume": "auto"}).hidden_size == fresh.hidden_size
    began = load("nano", {"resume": str(outer / "checkpoints/step-00000001")})
    assert began.num_layers == _BASE["num_layers"], "a checkpoint of the outer run means that"
