"""The numbers that ranks agree on have names: a new one shifts no other."""

from __future__ import annotations

from dataclasses import asdict, field, fields, make_dataclass
from typing import Any

import pytest
import torch

from lumina.train.agreement import StepSums, entry, pack, unpack

CPU = torch.device("cpu")
NAMES = [one.name for one in fields(StepSums)]


def values() -> dict[str, Any]:
    """A number of its own for every field; the loss is on the device."""
    return {name: float(number) for number, name in enumerate(NAMES, 1)}


@pytest.mark.parametrize("place", [0, 1, len(NAMES) // 2, len(NAMES)])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_planted_flag_shifts_no_other(place: int, on_device: bool) -> None:
    given = values()
    names = [*NAMES[:place], "planted", *NAMES[place:]]
    planted: Any = make_dataclass("Planted", [(name, Any, field(default=0.0)) for name in names])
    flag = torch.tensor(77.0) if on_device else 77.0
    packed = pack(planted(**given | {"loss": torch.tensor(given["loss"]), "planted": flag}), CPU)
    found = asdict(unpack(planted, packed.tolist()))
    assert found.pop("planted") == 77.0
    assert found == given
    assert all(float(entry(planted, packed, name)) == value for name, value in given.items())


def test_the_sum_over_ranks_is_of_each_field() -> None:
    """Two ranks, added up as the all-reduce does."""
    one, other = values(), {name: 100.0 * value for name, value in values().items()}
    packed = [pack(StepSums(**given | {"loss": torch.tensor(given["loss"])}), CPU) for given in (one, other)]
    assert packed[0].dtype == torch.float64
    assert asdict(unpack(StepSums, sum(packed).tolist())) == {name: 101.0 * value for name, value in one.items()}


def test_numbers_of_another_record_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        unpack(StepSums, [0.0] * (len(NAMES) + 1))
