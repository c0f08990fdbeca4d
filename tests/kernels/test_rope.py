import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina.kernels import reference, rope, rope_

from tests.kernels.kernel_checks import DTYPES, check


def tables(positions: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(positions)[:, None] * inverse
    return angles.cos(), angles.sin()


def split(qkv: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as the views of a fused projection [.., S, (H + 2K) D] that the model takes."""
    both = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    return both[..., :heads, :], both[..., heads : heads + kv_heads, :]


def compare(qkv: torch.Tensor, heads: int, kv_heads: int, positions: torch.Tensor, table: int) -> None:
    head_dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    cos, sin = tables(table, head_dim)
    gradients = [torch.randn(x.shape).to(qkv.dtype) for x in split(qkv, heads, kv_heads)]
    check(
        lambda x, c, s: rope(*split(x, heads, kv_heads), c, s, positions),
        lambda x, c, s: reference.rope(*split(x, heads, kv_heads), c, s, positions),
        [qkv, cos, sin],
        gradients,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(1, 1, 1, 2), (7, 3, 1, 6), (33, 8, 2, 64), (7, 12, 4, 64), (3, 5, 3, 128), (65, 4, 4, 48), (2, 2, 1, 256)],
)
def test_rotation_and_its_gradient(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype).requires_grad_()
    compare(qkv, heads, kv_heads, torch.arange(tokens), tokens)


@settings(max_examples=20)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 20),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 5),
    half=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_drawn_shapes_and_packed_positions(
    batch: int, sequence: int, heads: int, kv_heads: int, half: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    positions = torch.tensor(
        data.draw(st.lists(st.integers(0, 30), min_size=batch * sequence, max_size=batch * sequence))
    ).view(batch, sequence)
    qkv = torch.randn(batch, sequence, (heads + 2 * kv_heads) * 2 * half).to(dtype).requires_grad_()
    compare(qkv, heads, kv_heads, positions, 31)


def test_gradients_in_attention_layout() -> None:
    """The gradient of scaled_dot_product_attention comes as [B, H, S, D] transposed: no stride joins B and S."""
    q, k = (torch.randn(2, 5, n, 8).requires_grad_() for n in (4, 2))
    cos, sin = tables(5, 8)
    gradients = [torch.randn(2, n, 5, 8).transpose(1, 2) for n in (4, 2)]
    check(
        lambda q, k, c, s: rope(q, k, c, s, torch.arange(5)),
        lambda q, k, c, s: reference.rope(q, k, c, s, torch.arange(5).expand(2, 5)),
        [q, k, cos, sin],
        gradients,
    )


def test_gradient_of_q_alone() -> None:
    q, k = torch.randn(6, 4, 16).requires_grad_(), torch.randn(6, 2, 16).requires_grad_()
    cos, sin = tables(6, 16)
    ours = torch.autograd.grad(rope(q, k, cos, sin, torch.arange(6))[0].square().sum(), (q, k), allow_unused=True)
    torch.testing.assert_close(ours[0], 2 * q.detach())  # a rotation keeps lengths
    assert ours[1] is None


def test_in_place_equals_new_and_leaves_v_alone() -> None:
    qkv = torch.randn(2, 9, (4 + 2 * 2) * 16)
    cos, sin = tables(20, 16)
    positions = torch.randint(0, 20, (2, 9))
    expected = rope(*split(qkv, 4, 2), cos, sin, positions)
    values = qkv[..., 6 * 16 :].clone()
    q, k = split(qkv, 4, 2)
    rope_(q, k, cos, sin, positions)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(qkv[..., 6 * 16 :], values)


def test_in_place_never_behind_autograd() -> None:
    q, k = torch.randn(3, 2, 8).requires_grad_(), torch.randn(3, 1, 8)
    cos, sin = tables(3, 8)
    with pytest.raises(RuntimeError, match="outside autograd"):
        rope_(q * 1.0, k, cos, sin, torch.arange(3))
    # And a tensor that someone saved for a backward is missed there, not silently wrong.
    saved = torch.randn(3, 2, 8).requires_grad_()
    product = saved * q.detach()
    with torch.no_grad():
        rope_(q.detach(), k, cos, sin, torch.arange(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_position_outside_the_table_is_nan_and_the_rest_is_not() -> None:
    q, k = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    cos, sin = tables(5, 8)
    q_out, k_out = rope(q, k, cos, sin, torch.tensor([0, 5, -1, 4]))
    for out in (q_out, k_out):
        assert out[[1, 2]].isnan().all()
        assert out[[0, 3]].isfinite().all()


def test_empty() -> None:
    cos, sin = tables(4, 8)
    q_out, k_out = rope(torch.randn(0, 4, 8), torch.randn(0, 2, 8), cos, sin, torch.zeros(0, dtype=torch.int64))
    assert q_out.shape == (0, 4, 8)
    assert k_out.shape == (0, 2, 8)


def test_refusals() -> None:
    cos, sin = tables(4, 8)
    q, k, positions = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.arange(4)
    with pytest.raises(ValueError, match="D even"):
        rope(q, torch.randn(4, 1, 6), cos, sin, positions)
    with pytest.raises(TypeError, match="one type"):
        rope(q, k.bfloat16(), cos, sin, positions)
    with pytest.raises(ValueError, match="cos and sin"):
        rope(q, k, cos[:, :2], sin[:, :2], positions)
    with pytest.raises(ValueError, match="positions"):
        rope(q, k, cos, sin, positions.float())
    with pytest.raises(ValueError, match="positions"):
        rope(q, k, cos, sin, positions[:3])
