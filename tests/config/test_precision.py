"""What a machine lacks is refused, and auto takes the best that is there."""

import pytest

from lumina.config import UserError
from lumina.config.precision import resolve


@pytest.mark.parametrize(
    ("asked", "device", "has_bf16", "gets"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("auto", "cpu", True, "bf16"),
        ("auto", "cpu", False, "fp32"),
        ("bf16", "cpu", False, "bf16"),
        ("fp16", "cuda", True, "fp16"),
        ("fp32", "cuda", True, "fp32"),
    ],
)
def test_resolution(asked: str, device: str, has_bf16: bool, gets: str) -> None:
    assert resolve(asked, device, bf16_supported=has_bf16) == gets


@pytest.mark.parametrize(
    ("asked", "device", "says"),
    [("fp16", "cpu", "fp16 needs a GPU"), ("bf16", "cuda", "no bfloat16"), ("fp8", "cuda", "unknown precision `fp8`")],
)
def test_refusal(asked: str, device: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve(asked, device, bf16_supported=False)
