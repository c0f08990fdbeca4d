"""Sampling: from logits to the next token.

Filters apply in the order that transformers uses: repetition penalty on the logits, then temperature, top-k, top-p on
what top-k left, min-p. One uniform number per token and sequence picks from the remaining probabilities, likeliest
first, so a sequence's tokens depend on its own seed and not on its neighbours in a batch.

Shape suffixes: R sequences, V vocabulary, k candidates, n ids, F numbers that say how to choose.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina.chat import ChatTokenizer
from lumina.config import UserError

TEMPERATURES, TOP_PS, LENGTHS = (0.0, 2.0), (0.0, 1.0), (1, 2048)
MIN_PS, PENALTIES, STOPS, STOP_LENGTH = (0.0, 1.0), (0.5, 2.0), 16, 256
FILTERS = 5  # numbers that say how a token is chosen


@dataclass(frozen=True)
class Sampling:
    """How to choose, and when to end.

    temperature 0 is greedy; top_k None, or more than there are tokens, top_p 1 and min_p 0 filter nothing; top_k 1 and
    top_p 0 leave the likeliest token. min_p keeps tokens that are at least that
    share as likely as the likeliest (arXiv:2407.01082). repetition_penalty divides the positive logits of tokens that
    prompt or answer hold, and multiplies the negative ones (arXiv:1909.05858, section 4.1); 1 is none. An answer ends
    before the first of the `stop` texts that it would hold. seed is any integer of 64 bits with its sign; None draws
    one.

    Raises SamplingError (a UserError) when a value is outside its range.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 0.9
    max_length: int = 256
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, TEMPERATURES)
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError("top_k", f"{self.top_k} is less than 1")
        _within("top_p", self.top_p, TOP_PS)
        _within("max_length", self.max_length, LENGTHS)
        _within("min_p", self.min_p, MIN_PS)
        _within("repetition_penalty", self.repetition_penalty, PENALTIES)
        if len(self.stop) > STOPS or not all(1 <= len(text) <= STOP_LENGTH for text in self.stop):
            raise SamplingError("stop", f"takes up to {STOPS} texts of 1 to {STOP_LENGTH} characters")
        if self.seed is None:
            object.__setattr__(self, "seed", int.from_bytes(os.urandom(4), "little"))
        elif not -(2**63) <= self.seed < 2**63:
            raise SamplingError("seed", f"{self.seed} is outside -2^63 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class SamplingError(UserError):
    """A setting of Sampling that is out of range; the message is `setting` and `reason`."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting} {reason}")
        self.setting, self.reason = setting, reason


def _within(name: str, value: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not (math.isfinite(value) and low <= value <= high):
        raise SamplingError(name, f"{value:g} is outside {low:g} to {high:g}")


def forbidden_tokens(tokenizer: ChatTokenizer, vocab_size: int) -> Tensor:
    """Ids that are never sampled: bool (V), all but text and the stop tokens."""
    return ~torch.from_numpy(tokenizer.allowed_tokens(vocab_size))


def generator(sampling: Sampling, sequence: int) -> torch.Generator:
    """The random numbers of one sequence of a batch."""
    assert sampling.seed is not None
    return torch.Generator().manual_seed((sampling.seed + sequence) % 2**63)


def filters(samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """How to choose a token for each of R sequences: float64 (R, FILTERS) on the host, of each row the next random
    number of its sequence (greedy ones use none), temperature, top_k, top_p, min_p; infinite is no filter."""
    settings_RF = torch.zeros(len(samplings), FILTERS, dtype=torch.float64)
    for row_F, sampling, own in zip(settings_RF, samplings, generators, strict=True):
        top_k = math.inf if sampling.top_k is None else float(sampling.top_k)
        top_p = math.inf if sampling.top_p >= 1 else sampling.top_p
        row_F[1:] = torch.tensor([sampling.temperature, top_k, top_p, sampling.min_p], dtype=torch.float64)
        if not sampling.greedy:
            row_F[:1].uniform_(generator=own)
    return settings_RF


def probabilities(kept_Rk: Tensor, settings_RF: Tensor) -> Tensor:
    """Probabilities (float64) of candidates whose logits are given, largest first: temperature, then top-k, top-p and
    min-p, which leave some of them 0. settings: float64, of `filters`. Asks the device for nothing, and its shapes
    are its inputs': a CUDA graph can hold it."""
    temperature_R1, top_k_R1, top_p_R1, min_p_R1 = (settings_RF[:, at : at + 1] for at in range(1, FILTERS))
    # Against the largest, so that no temperature above 0 is too small: what overflows is minus infinity.
    wide_Rk = (kept_Rk.double() - kept_Rk[:, :1].double()) / torch.where(temperature_R1 > 0, temperature_R1, 1.0)
    rank_k = torch.arange(kept_Rk.shape[1], device=kept_Rk.device)
    p_Rk = wide_Rk.masked_fill(rank_k >= top_k_R1, -torch.inf).softmax(-1)
    before_Rk = (p_Rk.cumsum(-1) - p_Rk).masked_fill(rank_k == 0, -1)  # the likeliest token always stays
    p_Rk = p_Rk.masked_fill(before_Rk >= top_p_R1, 0)  # the token that crosses top-p stays
    p_Rk = p_Rk / p_Rk.sum(-1, keepdim=True)
    p_Rk = p_Rk.masked_fill(p_Rk < min_p_R1 * p_Rk[:, :1], 0)
    return p_Rk / p_Rk.sum(-1, keepdim=True)


def penalised(logits_V: Tensor, ids_n: Tensor, penalty: float) -> Tensor:
    """The logits of one sequence with those of the tokens it holds (int64 ids, repeats allowed) made less likely, or
    more when the penalty is below 1. Not in place."""
    held_n = logits_V[ids_n]
    return logits_V.index_copy(0, ids_n, torch.where(held_n > 0, held_n / penalty, held_n * penalty))


def choose(kept_Rk: Tensor, ids_Rk: Tensor, settings_RF: Tensor) -> Tensor:
    """The next token of each sequence, int64 (R,), of its candidates: their logits, largest first, and their ids. The
    candidates are the largest top_k at least, or all. settings as in `probabilities`, and like there nothing is asked
    of the device."""
    uniform_R1, temperature_R1 = settings_RF[:, :1], settings_RF[:, 1:2]
    sums_Rk = probabilities(kept_Rk, settings_RF).cumsum(-1)
    picked_R1 = torch.searchsorted(sums_Rk, uniform_R1 * sums_Rk[:, -1:], right=True)
    picked_R1 = picked_R1.clamp_(max=ids_Rk.shape[1] - 1).masked_fill_(temperature_R1 == 0, 0)
    return ids_Rk.gather(1, picked_R1)[:, 0]
