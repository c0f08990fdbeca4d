"""A batch of sequences over one KV cache: each may join or leave between any two passes, the others go on.

What a sequence says must not depend on its neighbours. Three things see to that:

- Random numbers are each sequence's own (sampling.py).
- A prompt's logits come from a pass whose layout depends on that prompt alone, when callers prefill one at a time and
  no prefixes are reused. Those move logits in their last bits, as below.
- The compiled step (a CPU, up to 8 sequences in bfloat16 and 16 in float32) takes every sum in the same order whatever
  else is in the batch. Elsewhere a step's sums may be taken in another order when it has other rows, which moves a
  logit in its last bits, and with it the choice between two nearly equal ones. So in float32 a greedy choice that is
  nearer than TIE, far more than rounding can move, is taken from a pass over the sequence alone, without the cache.
  Any other choice is the same in every order of summation; this one is the same because it is the same computation.
  With that, greedy float32 answers are those of recomputation without a cache, too. Half precision on a GPU has no
  such guarantee: rounding there is as large as real differences. Nor have mixtures of experts: where a router's choice
  of experts is that near, rounding moves the logits by as much as another expert does.

Shape suffixes as in sampling.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.infer.generation.constraint import Constraint
from lumina.infer.generation.prefix_cache import LEAST, Found, PrefixCache, common
from lumina.infer.generation.sampling import FILTERS, Sampling, choose, filters, forbidden_tokens, generator, penalised
from lumina.model import Decoder, KVCache, StaticDecoder, Transformer, static_fits

TIE = (
    1e-4  # of 1 + |logit|. Orders of summation moved logits by at most 7e-7 of that at nano's shape, 1.3e-6 at debug's
)

# "window": the context is full, in the word that `lumina generate --json` and /metrics have had since 0.1.0.
Finish = Literal["stop", "length", "window"]
"""Why a sequence ended: its stop token or a stop text, max_length, or the context being full."""


@dataclass(eq=False)
class Sequence:
    """One prompt and what the model says to it, the stop token included."""

    prompt: list[int]
    sampling: Sampling
    number: int = 0  # of several answers to one request: each draws other numbers
    logprobs: int | None = None  # report the probability of each token, and of so many of the likeliest
    constraint: Constraint | None = None  # of its own: it is told each token
    generated: list[int] = field(default_factory=list)
    slot: int = -1
    fed: int = 0  # tokens of the prompt that the cache holds
    reused: int = 0  # of these, tokens whose keys and values were there already
    room: int = 0  # tokens that it may still say

    def __post_init__(self) -> None:
        self.random = generator(self.sampling, self.number)

    @property
    def special(self) -> bool:
        """Whether its next token needs all logits, not only the largest."""
        return self.logprobs is not None or self.sampling.repetition_penalty != 1 or self.constraint is not None


class Token(NamedTuple):
    """A new token; `finish` when it is its sequence's last. logprob and top (ids and theirs) are natural logarithms of
    the model's own probabilities, before any filter."""

    sequence: Sequence
    id: int
    finish: Finish | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SequenceBatch:
    """Sequences in the rows of one preallocated cache."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        rows: int,
        capacity: int,
        static: bool | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """`rows` sequences at most, of `capacity` tokens each, prompt included. `static`: decoding steps are static
        passes (see StaticDecoder); None: on a GPU they are, where they can be. With `prefixes`, a prompt goes on from
        what it has in common with a sequence of the batch, or with one that was kept there when it left."""
        weight = model.embedding.weight
        self._model, self._stop_ids, self.capacity = model, tokenizer.stop_ids, capacity
        self._cache = KVCache(model.config, rows, capacity, weight)
        self._forbidden_V = forbidden_tokens(tokenizer, model.config.vocab_size).to(weight.device)
        self._exact = weight.dtype in (torch.float32, torch.float64)
        self._decoder = Decoder(model, self._cache, self._forbidden_V)
        self._static: StaticDecoder | None = None
        if (weight.device.type == "cuda" and static_fits(model)) if static is None else static:
            self._static = StaticDecoder(
                model, self._cache, self._forbidden_V, partial(_pick, self._exact), FILTERS, told=3
            )
        self._free = list(range(rows))
        self._prefixes = prefixes
        self._joined: list[Sequence] = []
        self.going: list[Sequence] = []
        """Those that a step adds a token to."""

    @property
    def free(self) -> int:
        """How many sequences can join."""
        return len(self._free)

    def join(self, sequence: Sequence) -> None:
        """Give it the lowest free row: steps over the first rows in order need no copies."""
        assert 1 <= len(sequence.prompt) < self.capacity
        sequence.slot = heapq.heappop(self._free)
        self._joined.append(sequence)
        sequence.room = min(sequence.sampling.max_length, self.capacity - len(sequence.prompt))

    def leave(self, sequence: Sequence, keep: bool = True) -> None:
        """Free its row, whether it has ended or not. Leaving twice does nothing. `keep` is false where a pass failed: a
        row may then count tokens that it does not hold."""
        if sequence.slot < 0:
            return
        if sequence in self.going:
            self.going.remove(sequence)
        self._joined.remove(sequence)
        if keep and self._prefixes is not None:
            tokens = self._held(sequence)
            if self._prefixes.wants(tokens, self._cache.row_bytes(len(tokens))):
                self._prefixes.add(tokens, self._cache.copy_of(sequence.slot))
        self._cache.free(sequence.slot)
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = -1

    @torch.inference_mode()
    def prefill(self, sequences: Many[Sequence], most: int | None = None) -> list[Token]:
        """Feed each the next of its prompt, `most` tokens or all that is left, in one pass. What a prompt has in common
        with another sequence is not fed but copied.

        Returns the first token of each whose prompt is now complete. Raises UserError: logits that are not finite.
        """
        for sequence in sequences:
            if sequence.fed == 0 and self._prefixes is not None:
                self._reuse(sequence, self._prefixes)
        chunks = [s.prompt[s.fed :][:most] for s in sequences]
        positions = self._cache.extend([s.slot for s in sequences], [len(chunk) for chunk in chunks])
        ids = torch.tensor([token for chunk in chunks for token in chunk], device=positions.device)[None]
        x_R1D = self._model.trunk(ids, positions, cache=self._cache)
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.fed += len(chunk)
        ready = [row for row, s in enumerate(sequences) if s.fed == len(s.prompt)]
        if not ready:
            return []
        begun = [sequences[row] for row in ready]
        self.going = sorted([*self.going, *begun], key=lambda s: s.slot)
        return self._choose(begun, *self._largest(begun, self._model.output(x_R1D[ready])[:, 0]))

    def _held(self, sequence: Sequence) -> list[int]:
        """The tokens whose keys and values its row holds: never its newest one."""
        return [*sequence.prompt, *sequence.generated][: self._cache.lengths[sequence.slot]]

    def _reuse(self, sequence: Sequence, prefixes: PrefixCache) -> None:
        """Begin its row with the longest prefix of its prompt that is there."""
        found = prefixes.longest(sequence.prompt)
        ids = np.array(sequence.prompt[:-1])
        for other in self._joined:
            if other.prompt[:LEAST] != sequence.prompt[:LEAST]:
                continue
            count = common(np.array(self._held(other)), ids)
            if count >= LEAST and (found is None or count > found.length):
                found = Found(count, self._cache.view_of(other.slot))
        if found is not None:
            self._cache.begin_with(sequence.slot, found.row, found.length)
            sequence.fed = sequence.reused = found.length

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One more token for each sequence that is going. Raises UserError: logits that are not finite."""
        going = list(self.going)
        if not going:
            return []
        ids, rows = [s.generated[-1] for s in going], [s.slot for s in going]
        special = any(s.special for s in going)
        if self._static is not None:
            if special:
                return self._choose(going, *self._largest(going, self._static.logits(ids, rows)))
            return self._take(going, self._static.step(ids, rows, self._filters(going), self._most(going)), None)
        ids_R1 = torch.tensor(ids, device=self._forbidden_V.device)[:, None]
        if special:
            return self._choose(going, *self._largest(going, self._decoder.logits(ids_R1, rows)))
        return self._choose(going, *self._decoder.step(ids_R1, rows, self._most(going)), None)

    def _candidates(self, sampling: Sampling) -> int | None:
        """How many of the largest logits decide; None for all."""
        most = (2 if self._exact else 1) if sampling.greedy else sampling.top_k
        return None if most is None else min(most, len(self._forbidden_V))

    def _most(self, sequences: Many[Sequence]) -> int | None:
        each = [self._candidates(s.sampling) for s in sequences]
        return None if None in each else max(k for k in each if k is not None)

    def _largest(self, sequences: Many[Sequence], logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits, ids) of the candidates, largest first, and log-probabilities (R, V) when some sequence wants any."""
        logprobs_RV = None
        if any(s.logprobs is not None for s in sequences):
            logprobs_RV = logits_RV.float().masked_fill(self._forbidden_V, -torch.inf).log_softmax(-1)
        if any(s.sampling.repetition_penalty != 1 or s.constraint is not None for s in sequences):
            logits_RV = torch.stack([self._adjusted(s, row_V) for s, row_V in zip(sequences, logits_RV, strict=True)])
        return *self._decoder.largest(logits_RV, self._most(sequences)), logprobs_RV

    def _adjusted(self, sequence: Sequence, logits_V: Tensor) -> Tensor:
        """Not in place."""
        if sequence.sampling.repetition_penalty != 1:
            held_n = torch.tensor([*sequence.prompt, *sequence.generated], device=logits_V.device)
            logits_V = penalised(logits_V, held_n, sequence.sampling.repetition_penalty)
        if sequence.constraint is not None:
            logits_V = logits_V.masked_fill(sequence.constraint.forbidden().to(logits_V.device), -torch.inf)
        return logits_V

    def _choose(
        self, sequences: list[Sequence], kept_Rk: Tensor, ids_Rk: Tensor, logprobs_RV: Tensor | None
    ) -> list[Token]:
        # All that the host must know comes in one transfer: each is a wait for the device.
        if all(s.sampling.greedy for s in sequences):
            told_R3 = _told(self._exact, kept_Rk, ids_Rk[:, 0])
        else:
            told_R3 = _pick(self._exact, kept_Rk, ids_Rk, self._filters(sequences).to(kept_Rk.device))
        return self._take(sequences, told_R3.tolist(), logprobs_RV)

    def _filters(self, sequences: list[Sequence]) -> Tensor:
        return filters([s.sampling for s in sequences], [s.random for s in sequences])

    def _take(self, sequences: list[Sequence], told: list[list[int]], logprobs_RV: Tensor | None) -> list[Token]:
        if not all(finite for _, finite, _ in told):
            raise UserError("the model's logits are not finite", "Its training diverged: use an earlier checkpoint.")
        chosen = [
            self._alone(sequence) if near and sequence.sampling.greedy else token
            for sequence, (token, _, near) in zip(sequences, told, strict=True)
        ]
        return [self._add(s, row, chosen[row], logprobs_RV) for row, s in enumerate(sequences)]

    def _alone(self, sequence: Sequence) -> int:
        """The greedy choice of a pass over this sequence only."""
        ids = torch.tensor([*sequence.prompt, *sequence.generated], device=self._forbidden_V.device)[None]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        logits_V = self._model.output(self._model.trunk(ids, positions)[:, -1])[0]
        return int(self._adjusted(sequence, logits_V).masked_fill(self._forbidden_V, -torch.inf).argmax())

    def _add(self, sequence: Sequence, row: int, token: int, logprobs_RV: Tensor | None) -> Token:
        sequence.generated.append(token)
        sequence.room -= 1
        if sequence.constraint is not None:
            sequence.constraint.push(token)
        finish: Finish | None = None
        if token in self._stop_ids:
            finish = "stop"
        elif sequence.room == 0:
            finish = "length" if len(sequence.generated) == sequence.sampling.max_length else "window"
        if finish is not None:
            self.leave(sequence)
        if sequence.logprobs is None or logprobs_RV is None:
            return Token(sequence, token, finish)
        best = logprobs_RV[row].topk(max(1, sequence.logprobs))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))[: sequence.logprobs]
        return Token(sequence, token, finish, float(logprobs_RV[row, token]), top)


def _pick(exact: bool, kept_Rk: Tensor, ids_Rk: Tensor, settings_RF: Tensor) -> Tensor:
    """What the host is told of a step whose rows choose as `settings` say; see `_told`."""
    return _told(exact, kept_Rk, choose(kept_Rk, ids_Rk, settings_RF))


def _told(exact: bool, kept_Rk: Tensor, chosen_R: Tensor) -> Tensor:
    """What the host is told of a step, int64 (R, 3): the token, whether the logits are finite, and, in float32 and
    float64 (`exact`), whether rounding could turn a greedy choice."""
    finite_R, near_R = kept_Rk[:, 0].isfinite(), torch.zeros_like(chosen_R)
    if exact and kept_Rk.shape[1] > 1:
        near_R = kept_Rk[:, 0] - kept_Rk[:, 1] <= TIE * (1 + kept_Rk[:, 0].abs())
    return torch.stack((chosen_R, finite_R.long(), near_R.long()), 1)
