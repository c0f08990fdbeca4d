"""The kernels run in Triton's interpreter here, on CPU tensors, and every fresh tensor is poisoned with NaN."""

import os
import sys

import pytest

# The interpreter is chosen where kernels are decorated. Tests that need the compiler start a process without these.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from hypothesis import Phase, settings

# The same cases on every run: a bound on rounding errors must not fail by an unlucky draw. Mutants need no small
# example.
settings.register_profile("kernels", deadline=None, derandomize=True, database=None)
settings.register_profile("mutant", settings.get_profile("kernels"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutant" if os.environ.get("LUMINA_MUTANT") else "kernels")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the interpreter nothing here means anything: say so once, clearly."""
    if not triton.knobs.runtime.interpret:
        raise pytest.UsageError(
            "triton was imported before tests/kernels/conftest.py chose its interpreter: set TRITON_INTERPRET=1"
        )


@pytest.fixture(autouse=True)
def few_multiprocessors() -> object:
    """Plan for a card of eight multiprocessors: full blocks of rows, and persistent programs that walk several."""
    from lumina.kernels import launch

    with launch.planned_for(8):
        yield


@pytest.fixture(autouse=True)
def poison() -> object:
    """torch.empty gives NaN, so that an element which no kernel wrote is seen."""
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
