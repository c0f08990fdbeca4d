"""The DeepSpeed JSON: filled, consistent, accepted by DeepSpeed itself, and refused where it contradicts."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config import Config, UserError, load
from lumina.config.deepspeed import Resolved, resolve
from lumina.config.deepspeed_keys import REFUSED_KEYS

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def write(folder: Path, document: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def resolved(document: dict[str, Any], folder: Path, world: int = 2, **flags: Any) -> Resolved:
    return resolve(load("nano", {"ds_config": write(folder, document), **flags}), world, "cpu", bf16_supported=True)


def accepted_by_deepspeed(document: dict[str, Any], world: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's own reading of the document at a world size, without starting processes."""
    from deepspeed.runtime import config as deepspeed_config

    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: world)
    return deepspeed_config.DeepSpeedConfig(document)


@pytest.mark.parametrize(
    ("world", "size", "accumulation", "padded"), [(2, 2, 4, 8), (4, 2, 2, 8), (4, 4, 4, 8), (8, 2, 1, 8)]
)
def test_ranks_that_share_rows_count_once(
    world: int, size: int, accumulation: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 samples in micro-batches of 2; DeepSpeed, which is not told, counts every rank."""
    given = {"global_batch_size": 7, "batch_size": 2, "sequence_parallel_size": size, "num_heads": 4}
    answer = resolve(load("nano", given), world, "cpu")
    assert answer.config.gradient_accumulation_steps == accumulation
    assert answer.config.global_batch_size == 7
    read = accepted_by_deepspeed(json.loads(json.dumps(answer.json)), world, monkeypatch)
    assert read.train_batch_size == padded * size
    assert read.gradient_accumulation_steps == accumulation
    del given["global_batch_size"]
    unset = resolve(load("nano", {**given, "gradient_accumulation_steps": 3}), world, "cpu")
    assert unset.config.global_batch_size == 2 * 3 * world // size


def test_there_is_a_file_per_stage() -> None:
    assert [file.stem for file in FILES] == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("file", [None, *FILES], ids=lambda file: file.stem if file else "built-in")
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_file_is_filled_and_accepted(
    file: Path | None, world: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("nano", {"ds_config": str(file) if file else None, "precision": precision, "global_batch_size": 7})
    answer = resolve(config, world, "cpu")
    assert "auto" not in json.dumps(answer.json)
    read = accepted_by_deepspeed(json.loads(json.dumps(answer.json)), world, monkeypatch)
    assert read.train_micro_batch_size_per_gpu == 2
    assert read.train_batch_size >= 7
    assert read.gradient_clipping == config.max_grad_norm
    assert read.bfloat16_config.enabled is (precision == "bf16")
    assert read.float16_config.enabled is False
    if file:
        assert read.zero_config.stage == int(file.stem[4])
    else:
        assert read.zero_config.stage == (0 if world == 1 else 2)


@given(
    micro=st.integers(1, 9),
    accumulation=st.integers(1, 9),
    wanted=st.none() | st.integers(1, 500),
    world=st.integers(1, 70),
)
def test_batch_sizes_hold_the_global_batch(micro: int, accumulation: int, wanted: int | None, world: int) -> None:
    flags = {"batch_size": micro, "gradient_accumulation_steps": accumulation, "global_batch_size": wanted}
    answer = resolve(load("nano", flags), world, "cpu", bf16_supported=True)
    got = answer.json
    total = got["train_batch_size"]
    assert total == got["train_micro_batch_size_per_gpu"] * got["gradient_accumulation_steps"] * world
    assert got["train_micro_batch_size_per_gpu"] == micro
    need = wanted if wanted is not None else micro * accumulation * world
    assert answer.config.global_batch_size == need
    assert total >= need
    # One micro-batch fewer would not hold it.
    assert micro * (got["gradient_accumulation_steps"] - 1) < ceil(need / world)
    if wanted is None:
        assert total == need


def test_a_plain_users_json_wins_over_defaults(tmp_path: Path) -> None:
    answer = resolved(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.5,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 3e-4, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.2},
            },
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "round_robin_gradients": True},
        },
        tmp_path,
    )
    assert answer.json["gradient_accumulation_steps"] == 4
    assert answer.json["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "round_robin_gradients": True}
    expected = {
        "batch_size": 4,
        "global_batch_size": 32,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.5,
        "learning_rate": 3e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_eps": 1e-6,
        "weight_decay": 0.2,
    }
    assert {name: getattr(answer.config, name) for name in expected} == expected
    text = "\n".join(answer.report)
    for line in ("batch_size = 4 (from train_micro", "learning_rate = 0.0003 (from optimizer.params.lr"):
        assert line in text


@pytest.mark.parametrize(
    ("document", "flags", "names"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            {"batch_size": 2},
            ("train_micro_batch_size_per_gpu = 4", "batch_size = 2"),
        ),
        (
            {"gradient_accumulation_steps": 8},
            {"gradient_accumulation_steps": 2},
            ("= 8", "gradient_accumulation_steps = 2"),
        ),
        ({"train_batch_size": 64}, {"global_batch_size": 32}, ("train_batch_size = 64", "global_batch_size = 32")),
        ({"train_batch_size": 64}, {"gradient_accumulation_steps": 2}, ("64", "gradient_accumulation_steps = 2")),
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}, ("gradient_clipping = 0.5", "max_grad_norm = 1.0")),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, ("bf16.enabled", "precision = fp32")),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, ("bf16.enabled", "precision = bf16")),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
            {"learning_rate": 1e-4},
            ("optimizer.params.lr = 0.0003", "learning_rate = 0.0001"),
        ),
    ],
)
def test_contradictions_are_refused_by_both_names(
    tmp_path: Path, document: dict[str, Any], flags: dict[str, Any], names: tuple[str, str]
) -> None:
    with pytest.raises(UserError) as caught:
        resolved(document, tmp_path, **flags)
    assert all(name in str(caught.value) for name in names)
    # The same JSON is fine when the user did not write the setting down …
    if "train_batch_size" not in document:
        resolved(document, tmp_path)
    # … and the same setting is fine with "auto".
    resolved({}, tmp_path, **flags)


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_removed_keys_are_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"`{key}` is not supported: "):
        resolved({key: {}}, tmp_path)


def test_every_key_that_deepspeed_removed_is_known_here() -> None:
    from deepspeed.runtime import config as deepspeed_config

    removed = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    assert set(removed) <= set(REFUSED_KEYS)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both true"),
        ({"fp16": {"enabled": True}}, "fp16 needs a GPU"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type `Lion`"),
        ({"zero_optimization": {"stage": 2, "sub_group": "auto"}}, "zero_optimization.sub_group"),
        ({"zero_optimization": {"stage": "auto"}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm = false"),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, "takes 4"),
    ],
)
def test_other_mistakes(tmp_path: Path, document: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(document, tmp_path)
    assert says in str(caught.value)


def test_the_look_at_gradients_stays_on(tmp_path: Path) -> None:
    found = resolved({"bf16": {"enabled": True, "check_grad_overflow": False}}, tmp_path)
    assert found.json["bf16"]["check_grad_overflow"] is True
    assert any("check_grad_overflow" in line for line in found.report)


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"a": 1,}', "line 1, column"), ('{"a": 1, "a": 2}', "`a` is given twice"), ("[]", "not a JSON object")],
)
def test_unreadable_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        resolve(load("nano", {"ds_config": str(path)}), 1, "cpu")
    assert says in str(caught.value)
    with pytest.raises(UserError, match="cannot read the DeepSpeed configuration"):
        resolve(load("nano", {"ds_config": str(tmp_path / "absent.json")}), 1, "cpu")


def test_the_resolved_configuration_resolves_again_to_itself(tmp_path: Path) -> None:
    """A run's config.yaml makes every value explicit; resuming at another world size must not contradict it."""
    document = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}
    first = resolved(document, tmp_path, world=2)
    saved = tmp_path / "config.yaml"
    saved.write_text(first.config.to_yaml(), encoding="utf-8")
    again = resolve(load(str(saved)), 3, "cpu", bf16_supported=True)
    assert isinstance(again.config, Config)
    assert again.config.global_batch_size == first.config.global_batch_size == 32
    assert again.json["gradient_accumulation_steps"] == 3  # 36 places for 32 samples


def test_bf16_without_instructions_for_it_is_warned_of() -> None:
    warned = lambda precision, native: any(
        "no bf16 instructions" in line
        for line in resolve(load("nano", {"precision": precision}), 1, "cpu", bf16_supported=native).report
    )
    assert warned("bf16", False)
    assert not warned("bf16", True)
    assert not warned("auto", False)
