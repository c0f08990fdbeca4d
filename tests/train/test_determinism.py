"""`deterministic: true`: what it sets, that nothing in a step raises under it, and that attention is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.config import UserError
from lumina.model import attention as attention_module
from lumina.train.determinism import WORKSPACE, set_deterministic
from tests.runs import Runs, arguments, final, write_conversations
from tests.train.tiny_engines import make_engine, train_step

# Operators without a deterministic form on CUDA that a model of this kind could use: of the list in the docstring of
# torch.use_deterministic_algorithms (2.13), by their names in ATen. `cumsum` raises for floating point alone.
RAISING = ("nll_loss", "cumsum", "bincount", "histc", "put_", "median", "kthvalue", "scatter_reduce", "_ctc_loss")


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    cudnn, filled = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    environment: dict[str, str] = {}
    set_deterministic(environment)
    yield environment
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_what_is_set(switched_on: dict[str, str]) -> None:
    assert switched_on == {WORKSPACE: ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", [WORKSPACE, "LUMINA_KERNELS_AUTOTUNE"])
def test_what_would_undo_it_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        set_deterministic({name: "1"})
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_user_chose_for_nccl_stays(switched_on: dict[str, str]) -> None:
    environment = {WORKSPACE: ":16:8", "NCCL_ALGO": "Ring"}
    set_deterministic(environment)
    assert environment == {WORKSPACE: ":16:8", "NCCL_ALGO": "Ring"}


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.suspects: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.names.add(name)
        base = name.split(".")[0]
        whole_numbers = bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point()
        if any(base.startswith(raising) for raising in RAISING) and not whole_numbers:
            self.suspects.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "fp32")])
def test_no_operation_of_a_step_would_raise_on_a_gpu(stage: int, precision: str, switched_on: dict[str, str]) -> None:
    """Nothing of a step is on torch's list; and on the CPU, which has a list too, the step runs."""
    made = make_engine(stage, precision)
    with Recorded() as recorded:
        assert train_step(made, 0)[2]
        assert train_step(made, 1)[2]
    assert {"mm", "index_select"} <= {name.split(".")[0] for name in recorded.names}, "it saw the step"
    assert recorded.suspects == []


def test_flash_attention_is_told(monkeypatch: pytest.MonkeyPatch, switched_on: dict[str, str]) -> None:
    """flash-attn takes an argument; torch's own kernels read the global switch (checked in their source)."""
    seen: list[dict[str, Any]] = []
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda q, *_, **options: seen.append(options) or q  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    attention_module._varlen_kernels.clear()
    try:
        kernel = attention_module._varlen_kernel(torch.bfloat16)
        assert kernel is not None
        q = torch.zeros(4, 2, 8)
        edges = torch.tensor([0, 4], dtype=torch.int32)
        kernel.attend(q, q, q, edges, 4, None, None)
        torch.use_deterministic_algorithms(False)
        kernel.attend(q, q, q, edges, 4, None, None)
    finally:
        attention_module._varlen_kernels.clear()
    assert seen == [{"causal": True, "deterministic": True}, {"causal": True}]


def test_torchs_hopper_kernels_read_the_switch() -> None:
    source = Path(torch.nn.attention.__file__).with_name("_fa3.py")
    if not source.is_file():
        pytest.skip("this torch has no FlashAttention 3")
    assert "torch.are_deterministic_algorithms_enabled()" in source.read_text(encoding="utf-8")


@pytest.mark.timeout(900)
def test_a_run_repeats_itself_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", 40, seed=3)
    states = []
    for name in ("one", "two"):
        argv = arguments(tmp_path / name, data, stage=2, max_steps=3, deterministic=True, precision="bf16")
        runs.train(argv, 2)
        states.append(final(tmp_path / name, 3))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
