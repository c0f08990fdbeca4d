"""Each filter against the exact distribution, computed here in float64 from its definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.config import UserError
from lumina.infer import Sampling
from lumina.infer.generation.sampling import choose, filters, generator, penalised, probabilities

VOCABULARY, DRAWS = 40, 20_000


def settings_of(samplings: Sequence[Sampling]) -> torch.Tensor:
    """`choose`'s settings, each row with the first random number of its sequence."""
    return filters(samplings, [generator(one, 0) for one in samplings])


def exact(logits_V: np.ndarray, temperature: float, top_k: int | None, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """Keep the top_k likeliest; of these the fewest whose mass reaches top_p, and that are at least min_p times as
    likely as the likeliest; renormalise."""
    p = np.exp(logits_V.astype(np.float64) / temperature)
    order = np.argsort(-logits_V)[: top_k or len(logits_V)]
    kept = np.zeros_like(p)
    kept[order] = p[order] / p[order].sum()
    mass, chosen = 0.0, []
    for token in order:
        chosen.append(token)
        mass += kept[token]
        if mass >= top_p:
            break
    final = np.zeros_like(p)
    chosen = [token for token in chosen if kept[token] >= min_p * kept.max()]
    final[chosen] = kept[chosen] / kept[chosen].sum()
    return final


def chi_square_bound(freedom: int) -> float:
    """The value that a chi-square variable exceeds once in a million (Wilson and Hilferty, 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    [
        (1.0, None, 1.0, 0.0, 1.0),
        (0.5, None, 1.0, 0.0, 1.0),
        (2.0, None, 1.0, 0.0, 1.0),
        (1.0, 5, 1.0, 0.0, 1.0),
        (1.0, None, 0.7, 0.0, 1.0),
        (1.0, None, 1.0, 0.1, 1.0),
        (1.5, None, 1.0, 0.3, 1.0),
        (1.0, None, 1.0, 0.0, 1.4),
        (1.0, None, 1.0, 0.0, 0.7),
        (0.8, 12, 0.9, 0.0, 1.0),
        (0.8, 12, 0.95, 0.2, 1.2),
        (1.3, 1, 0.1, 0.0, 1.0),
    ],
)
def test_each_filter_draws_from_the_exact_distribution(
    temperature: float, top_k: int | None, top_p: float, min_p: float, penalty: float
) -> None:
    logits_V = np.random.default_rng(0).normal(scale=1.5, size=VOCABULARY).astype(np.float32)
    logits_V[7] = -np.inf  # a forbidden token
    held = [3, 11, 11, 20, 33]
    repeated = logits_V.copy()
    repeated[held] = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)[held]
    assert {bool(above) for above in logits_V[held] > 0} == {True, False}
    expected = exact(repeated, temperature, top_k, top_p, min_p) * DRAWS
    sampling = Sampling(temperature, top_k, top_p, seed=0, min_p=min_p, repetition_penalty=penalty)
    rows = penalised(torch.from_numpy(logits_V), torch.tensor(held), penalty).repeat(100, 1)
    generators = [torch.Generator().manual_seed(row) for row in range(100)]
    kept_Rk, ids_Rk = rows.sort(descending=True)
    drawn = torch.cat([choose(kept_Rk, ids_Rk, filters([sampling] * 100, generators)) for _ in range(DRAWS // 100)])
    counts = np.bincount(drawn.numpy(), minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    common, rare = support & (expected >= 5), support & (expected < 5)
    observed = np.append(counts[common], counts[rare].sum())
    wanted = np.append(expected[common], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        assert ((observed - wanted) ** 2 / wanted).sum() < chi_square_bound(len(wanted) - 1)
    else:
        assert observed[0] == DRAWS


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60, unique=True),
    st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    st.integers(1, 100),
    st.sampled_from([0.1, 0.35, 0.8, 1.0]),
    st.sampled_from([0.0, 0.03, 0.4, 1.0]),
)
def test_candidates_are_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits_V = np.array(logits, dtype=np.float32)
    kept_Rk, ids_Rk = torch.from_numpy(logits_V)[None].sort(descending=True)
    p_Rk = probabilities(kept_Rk, settings_of([Sampling(temperature, top_k, top_p, min_p=min_p)]))
    spread = torch.zeros(1, len(logits), dtype=p_Rk.dtype).scatter_(1, ids_Rk, p_Rk)[0].numpy()
    # A token exactly at the edge of top_p or min_p may fall either way by the last bit of a sum.
    around = [(by, also) for by in (0, -1e-12, 1e-12) for also in (0, -1e-12, 1e-12)]
    edges = [exact(logits_V, temperature, top_k, top_p * (1 + by), min(1.0, min_p * (1 + also))) for by, also in around]
    assert any(np.allclose(spread, expected, rtol=1e-9, atol=1e-12) for expected in edges)


@pytest.mark.parametrize("narrow", [{"temperature": 5e-324}, {"top_p": 0.0}, {"top_p": 1e-12}, {"top_k": 1}])
def test_the_narrowest_settings_leave_the_likeliest_token(narrow: dict[str, float]) -> None:
    kept_Rk = torch.tensor([[30.0, 29.9999, -80.0], [-2.0, -3.0, -4.0]])
    sampling = Sampling(**{"temperature": 1.0, "top_k": None, "top_p": 1.0} | narrow)  # type: ignore[arg-type]
    p_Rk = probabilities(kept_Rk, settings_of([sampling] * 2))
    assert p_Rk[:, 0].tolist() == [1, 1]


def test_settings_without_an_upper_bound() -> None:
    wide = Sampling(top_k=10**30, seed=-(2**63))
    assert generator(wide, 3).initial_seed() != generator(wide, 4).initial_seed()
    assert generator(Sampling(seed=-1), 0).initial_seed() == 2**63 - 1


def test_greedy_takes_the_largest_and_needs_no_random_numbers() -> None:
    kept_Rk, ids_Rk = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.9]]).topk(2)
    random = generator(Sampling(seed=1), 0)
    before = random.get_state()
    settings_RF = filters([Sampling(temperature=0)] * 2, [random] * 2)
    assert choose(kept_Rk, ids_Rk, settings_RF).tolist() == [1, 0]
    assert torch.equal(random.get_state(), before)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": 2.5}, "temperature 2.5 is outside 0 to 2"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k 0 is less than 1"),
        ({"top_p": -0.05}, "top_p -0.05 is outside 0 to 1"),
        ({"top_p": 1.01}, "top_p"),
        ({"max_length": 0}, "max_length 0 is outside 1 to 2048"),
        ({"max_length": 2049}, "max_length"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"min_p": -0.1}, "min_p -0.1 is outside 0 to 1"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.4}, "repetition_penalty 0.4 is outside 0.5 to 2"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"stop": ("",)}, "stop takes up to 16 texts of 1 to 256 characters"),
        ({"stop": ("a",) * 17}, "stop"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**values)  # type: ignore[arg-type]


def test_rows_of_different_settings_are_chosen_as_each_alone() -> None:
    kept_Rk, ids_Rk = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)).sort(descending=True)
    samplings = [
        Sampling(0.0, seed=1),
        Sampling(1.0, None, 1.0, seed=2),
        Sampling(1.5, 3, 1.0, seed=3),
        Sampling(2.0, None, 0.4, seed=4),
        Sampling(1.0, None, 1.0, seed=5, min_p=0.3),
        Sampling(1.2, 20, 0.9, seed=6, min_p=0.01),
    ]
    settings_RF = settings_of(samplings)
    together = choose(kept_Rk, ids_Rk, settings_RF)
    rows = range(len(samplings))
    alone = [choose(kept_Rk[r : r + 1], ids_Rk[r : r + 1], settings_RF[r : r + 1]) for r in rows]
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[0] == ids_Rk[0, 0]
    cut = choose(kept_Rk[2:3, :3], ids_Rk[2:3, :3], settings_RF[2:3])  # three candidates are enough for top_k 3
    assert cut.tolist() == alone[2].tolist()
