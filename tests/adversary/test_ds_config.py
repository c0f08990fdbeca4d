"""Door: a DeepSpeed JSON. Each line: the document, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina.config import UserError, load
from lumina.config.deepspeed import Resolved, read_json, resolve
from lumina.config.deepspeed_keys import PASSED_ON


def resolved(document: Any) -> Resolved:
    config = load("nano", {"ds_config": "ds.json"})
    return resolve(config, 2, "cuda", bf16_supported=True, document=document)


REFUSED: list[tuple[Any, str]] = [
    ({"fp16": {"enabled": 1}}, "`fp16.enabled` is 1; it must be a valid boolean"),
    ({"fp16": {"enabled": "true"}}, "`fp16.enabled` is 'true'"),
    ({"fp16": True}, "`fp16` is True; it must be"),
    ({"bf16": None}, "`bf16` is None; it must be"),
    ({"bf16": []}, "`bf16` is []; it must be"),
    ({"bf16": {"check_grad_overflow": 0}}, "`bf16.check_grad_overflow` is 0"),
    ({"train_batch_size": 0}, "`train_batch_size` is 0; it must be greater than 0"),
    ({"train_batch_size": True}, "`train_batch_size` is True"),
    ({"train_batch_size": 8.5}, "`train_batch_size` is 8.5"),
    ({"train_batch_size": "8"}, "`train_batch_size` is '8'"),
    ({"train_micro_batch_size_per_gpu": -1}, "`train_micro_batch_size_per_gpu` is -1"),
    ({"gradient_accumulation_steps": None}, "`gradient_accumulation_steps` is None"),
    ({"gradient_clipping": "1.0"}, "`gradient_clipping` is '1.0'"),
    ({"gradient_clipping": -1}, "`gradient_clipping` is -1"),
    ({"gradient_clipping": True}, "`gradient_clipping` is True"),
    ({"steps_per_print": "x"}, "`steps_per_print` is 'x'"),
    ({"zero_optimization": True}, "`zero_optimization` is True"),
    ({"zero_optimization": [1]}, "`zero_optimization` is [1]"),
    ({"zero_optimization": {"stage": 4}}, "`zero_optimization.stage` is 4; it must be 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": True}}, "`zero_optimization.stage` is True"),
    ({"zero_optimization": {"stage": "2"}}, "`zero_optimization.stage` is '2'"),
    ({"zero_optimization": {"stage": 2.0}}, "`zero_optimization.stage` is 2.0"),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
        "`zero_optimization.reduce_bucket_size` is 'big'",
    ),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1.5}}, "`zero_optimization.reduce_bucket_size` is 1.5"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": 1}}, "`zero_optimization.overlap_comm` is 1"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "`zero_optimization.offload_optimizer` is 'cpu'"),
    ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, "offload_optimizer.device` is 'disk'"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "no checkpoint can hold"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "no checkpoint can hold"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "`zero_optimization.mics_shard_size` is not supported"),
    ({"optimizer": []}, "`optimizer` is []"),
    ({"optimizer": {"type": 3}}, "`optimizer.type` is 3"),
    ({"optimizer": {"type": "AdamW", "params": None}}, "`optimizer.params` is None"),
    ({"optimizer": {"params": {"lr": "3e-4"}}}, "`optimizer.params.lr` is '3e-4'"),
    ({"optimizer": {"params": {"lr": 0}}}, "`learning_rate`"),
    ({"optimizer": {"params": {"lr": -1e-4}}}, "`optimizer.params.lr` is -0.0001"),
    ({"optimizer": {"params": {"betas": 0.9}}}, "`optimizer.params.betas` is 0.9"),
    ({"optimizer": {"params": {"betas": [0.9]}}}, "`optimizer.params.betas` is [0.9]"),
    ({"optimizer": {"params": {"betas": [0.9, None]}}}, "`optimizer.params.betas` is [0.9, None]"),
    ({"optimizer": {"params": {"betas": [0.9, 1.5]}}}, "`adam_beta2`"),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode = false is not supported"),
    ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad = true is not supported"),
    (
        {"optimizer": {"params": {"bias_correction": False}}},
        "optimizer.params.bias_correction = false is not supported",
    ),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type `Lion`"),
    ({"gradient_cliping": 1.0}, "unknown key `gradient_cliping`. Did you mean `gradient_clipping`?"),
    ({"zero_optimisation": {"stage": 2}}, "Did you mean `zero_optimization`?"),
    ({"train_micro_batch_size": 2}, "Did you mean `train_micro_batch_size_per_gpu`?"),
    ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel` is not supported"),
    (
        {"sequence_parallel_size": 2},
        "`sequence_parallel_size` is not supported: Lumina's own shares rows between ranks: --sequence-parallel P",
    ),
]


@pytest.mark.parametrize(("document", "said"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_a_value_is_refused_with_its_path(document: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(document)
    assert said in str(caught.value)
    assert str(caught.value).startswith("ds.json")


SAID = [
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "changes nothing at stage 0"),
    ({"my_own_block": {"a": 1}}, "my_own_block is no key of DeepSpeed's that Lumina knows: it is passed on"),
    ({"optimizer": {"params": {"lr": 5e-7}}}, "learning_rate = 5e-07"),
]


@pytest.mark.parametrize(("document", "said"), SAID, ids=lambda value: json.dumps(value)[:40])
def test_what_changes_nothing_or_is_not_known_is_said(document: Any, said: str) -> None:
    assert any(said in line for line in resolved(document).report)


TAKEN: list[Any] = [
    {},
    {"optimizer": None},
    {"fp16": {"enabled": "auto"}, "bf16": {"enabled": True, "loss_scale": 0}},
    {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 500_000_000}},
    {"optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": ["auto", "auto"], "torch_adam": True}}},
    {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
    {key: {} for key in PASSED_ON},
]


@pytest.mark.parametrize("document", TAKEN, ids=lambda value: json.dumps(value)[:40])
def test_what_users_write_is_taken(document: Any) -> None:
    got = resolved(document).json
    assert all(key in got for key in document if key != "optimizer"), "unknown and known keys are passed on"


def test_a_rate_below_the_floor_lowers_the_floor() -> None:
    config = resolved({"optimizer": {"params": {"lr": 5e-7}}}).config
    assert (config.learning_rate, config.min_lr) == (5e-7, 5e-9)


def test_deepspeed_reads_the_keys_that_are_passed_on() -> None:
    """Each is a text in DeepSpeed's sources: a misspelt one here would hide a user's misspelling."""
    import deepspeed

    folder = Path(deepspeed.__file__).parent
    names = ("config*.py", "*config.py", "constants.py")
    sources = "".join(p.read_text(encoding="utf-8") for name in names for p in folder.rglob(name))
    assert [key for key in PASSED_ON if f'"{key}"' not in sources and f"'{key}'" not in sources] == []


DEEPSPEED_REFUSES: list[tuple[Any, str]] = [
    ({"zero_optimization": {"stage": 2, "no_such_key": 1}}, "no_such_key"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": "perhaps"}}, "round_robin_gradients"),
    ({"zero_optimization": {"stage": 2, "cpu_offload_params": True}}, "cpu_offload_params"),
    ({"fp16": {"enabled": False, "loss_scale_windw": 1}}, "loss_scale_windw"),
    ({"communication_data_type": "fp99"}, "fp99"),
    ({"torch_autocast": {"enabled": True, "dtype": "int3"}}, "int3"),
    ({"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}, "sum"),
    ({"gradient_allreduce_op": 3}, "3"),
    ({"data_types": {"grad_accum_dtype": "x"}, "comms_logger": {"enabled": "perhaps"}}, "perhaps"),
    ({"checkpoint": 3}, "DeepSpeed refuses"),
    ({"checkpoint": {"tag_validation": "X"}}, "tag_validation"),
    ({"compile": {"no_such": 1}}, "no_such"),
    ({"flops_profiler": []}, "DeepSpeed refuses"),
]


@pytest.mark.parametrize(("document", "said"), DEEPSPEED_REFUSES, ids=lambda value: json.dumps(value)[:40])
def test_what_deepspeed_refuses_is_one_message(document: Any, said: str) -> None:
    from lumina.train.deepspeed import refuse_what_deepspeed_does

    config = load("nano", {"ds_config": "ds.json", "precision": "fp32"})
    filled = resolve(config, 1, "cpu", bf16_supported=True, document=document).json
    with pytest.raises(UserError) as caught:
        refuse_what_deepspeed_does(filled, "ds.json")
    assert "ds.json: DeepSpeed refuses" in str(caught.value)
    assert said in str(caught.value)


FILES = [
    (b"", "line 1, column 1: not valid JSON"),
    (b"\xff\xfe", "it is not UTF-8 text"),
    (b"[1]", "is not a JSON object"),
    (b'{"a": 1, "a": 2}', "`a` is given twice"),
    (b'{"gradient_clipping": NaN}', "NaN is no number"),
    (b'{"gradient_clipping": 1e999}', "1e999 is no number"),
    (b'{"train_batch_size": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b'{"a":' * 50_000, "nested too deeply"),
    (b" " * (1 << 20) + b"{}", "it has more than"),
]


@pytest.mark.parametrize(("contents", "said"), FILES, ids=lambda value: repr(value)[:30])
def test_what_is_no_json_is_said(tmp_path: Path, contents: bytes, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(contents)
    with pytest.raises(UserError) as caught:
        read_json(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
