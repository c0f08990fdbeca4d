"""Fresh tensors are full of NaN here, so that an element which an operator forgot to write is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lumina.model import cpu


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice: with the compiled CPU loops, and with plain torch as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "lib", lambda: None)
    elif cpu.lib() is None:
        pytest.skip("no C compiler here: the compiled CPU loops cannot be tested")
    return str(request.param)


@pytest.fixture
def compiled() -> None:
    """Needs the compiled CPU loops."""
    if cpu.lib() is None:
        pytest.skip("no C compiler here: the compiled CPU loops cannot be tested")
