"""Losses of the routers of a mixture of experts, and how evenly they spread the tokens.

Both losses are defined document by document, and a document counts by the weight of its supervised tokens, as its
cross-entropy does. So they are sums over documents, divided once by the whole global batch's true count, and do not
depend on what is packed together, on micro-batches, accumulation or ranks (law 2). Of a document of T tokens, over the
L layers with experts together, K experts a token:

    load balancing   E * sum_e (c_e / LT) (p_e / LT): c_e tokens that went to expert e, p_e the sum of its probabilities
                     (arXiv:2101.03961, equations 4 to 6, over the layers together as transformers has it; K when even)
    z                mean over tokens and layers of logsumexp(logits)^2 (arXiv:2202.08906, equation 5)

transformers computes the first over all tokens of a micro-batch, which no sum over micro-batches gives back: the two
are equal where a micro-batch is one document. Documents that nothing is supervised in, such as padding, take no part.

Shape suffixes: T tokens, E experts, K experts a token, G documents, L layers with experts, N supervised positions, P
pairs, C = 2E + 2 columns of sums.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lumina.config import ModelConfig


class Routed(NamedTuple):
    """A router's answer: the weights, float32, and numbers of each token's experts, and its logits in float32 with
    their softmax."""

    weights_TK: Tensor
    experts_TK: Tensor
    logits_TE: Tensor
    probabilities_TE: Tensor


@dataclass(frozen=True)
class DocumentMembers:
    """Which of T tokens are a document's, as ones and zeros: sums over documents are a product, since adding up by
    index has an order of its own on a GPU, and a resumed run would not be the same (law 6)."""

    members_GT: Tensor
    tokens_G: Tensor

    @classmethod
    def of(cls, ids_BS: Tensor, cu_seqlens: Tensor | None) -> DocumentMembers:
        """Documents as Transformer.forward takes them: between the edges, or each row is one."""
        batch, length = ids_BS.shape
        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch + 1, device=ids_BS.device) * length
        places_T = torch.arange(batch * length, device=ids_BS.device)
        members_GT = (places_T >= cu_seqlens[:-1, None]) & (places_T < cu_seqlens[1:, None])
        return cls(members_GT.float(), cu_seqlens.diff().float())

    def sums(self, routed: Routed) -> Tensor:
        """Of each document: each expert's probabilities, each expert's tokens, the squared log-sum-exp of the logits,
        and the entropy of the probabilities in nats: float32 (G, C). The first and the third have gradients."""
        squares_T1 = routed.logits_TE.logsumexp(-1, keepdim=True).square()
        with torch.no_grad():
            chosen_TE = torch.zeros_like(routed.logits_TE).scatter_(1, routed.experts_TK, 1.0)
            logs_TE = routed.logits_TE.log_softmax(-1)
            entropy_T1 = -(routed.probabilities_TE * logs_TE).sum(-1, keepdim=True)
        columns_TC = torch.cat((routed.probabilities_TE, chosen_TE, squares_T1, entropy_T1), -1)
        return self.members_GT.to(columns_TC.dtype) @ columns_TC


class Routing:
    """The routing of one forward pass with a loss: its documents, what each counts, and the sums of each layer with
    experts, in the layers' order."""

    def __init__(self, members: DocumentMembers, weights_G: Tensor) -> None:
        self.members, self.weights_G = members, weights_G
        self.sums: list[Tensor] = []

    @classmethod
    def of(
        cls,
        ids_BS: Tensor,
        cu_seqlens: Tensor | None,
        weights_N: Tensor,
        supervised_N: Tensor | None,
        pairs_P3: Tensor | None,
    ) -> Routing:
        """Arguments as in Transformer.forward. A document counts the sum of its supervised tokens' weights; of
        preference pairs, whose answers are the first documents, half of its pair's."""
        members = DocumentMembers.of(ids_BS, cu_seqlens)
        if pairs_P3 is not None:
            weights_G = torch.zeros_like(members.tokens_G)
            weights_G[: 2 * len(pairs_P3)] = pairs_P3[:, 1].repeat_interleave(2).float() / 2
            return cls(members, weights_G)
        weights_T = weights_N.flatten().float()
        if supervised_N is not None:
            # Position 0 may be named often, with one weight that is not 0 at most: no order of adding tells.
            weights_T = weights_T.new_zeros(ids_BS.numel()).index_add_(0, supervised_N, weights_T)
        return cls(members, members.members_GT @ weights_T)

    def losses(self) -> tuple[Tensor, Tensor]:
        """The load-balancing loss and the z-loss, each weighted by document and added up: 0-dimensional."""
        layers, columns_GC = len(self.sums), torch.stack(self.sums).sum(0)
        experts = columns_GC.shape[1] // 2 - 1
        probabilities_GE, chosen_GE, squares_G1, _ = columns_GC.split([experts, experts, 1, 1], -1)  # type: ignore[no-untyped-call]
        rows_G = layers * self.members.tokens_G
        balance_G = experts * (chosen_GE.detach() * probabilities_GE).sum(-1) / rows_G.square()
        return (self.weights_G * balance_G).sum(), (self.weights_G * squares_G1[:, 0] / rows_G).sum()

    def counts(self, loss: Tensor) -> Tensor:
        """What `expert_balance` is made of, to be added up over micro-batches and ranks: float64 (L*E + 4). loss: the
        first of `losses`. Documents without weight are left out."""
        sums_LGC = torch.stack(self.sums).detach().double()
        part_G = (self.weights_G > 0).double()
        columns_LC = (part_G[:, None] * sums_LGC).sum(1)
        totals = columns_LC[:, -1].sum(), (part_G * self.members.tokens_G).sum(), loss.detach().double()
        experts = columns_LC.shape[1] // 2 - 1
        own = (columns_LC[:, experts:-2].flatten(), torch.stack([*totals, self.weights_G.double().sum()]))
        return torch.cat(own)


# --- Balance --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertBalance:
    """How evenly a step's tokens went to the experts; of the documents that take part in the losses.

    load: tokens of the expert that has most over the mean of its layer, in the worst layer; 1 is even. idle: share of
    the experts that no token went to. entropy: of the router's probabilities, in nats, the mean over tokens and layers.
    loss: the load-balancing loss, the mean over supervised tokens; K when even. 0-dimensional tensors or numbers.
    """

    load: Tensor | float
    idle: Tensor | float
    entropy: Tensor | float
    loss: Tensor | float


def expert_balance(counts: Tensor, config: ModelConfig) -> Tensor:
    """The fields of ExpertBalance, in their order, from a sum of `Routing.counts`: float64 (4); NaN where no document
    took part."""
    assert config.experts is not None
    counts_LE = counts[:-4].view(config.expert_layers, config.experts.count)
    entropy, tokens, loss, weight = counts[-4:].unbind()
    most_L = counts_LE.amax(-1) * config.experts.count / (tokens * config.experts.per_token)
    found = ExpertBalance(
        load=most_L.amax(),
        idle=torch.where(tokens > 0, (counts_LE == 0).double().mean(), torch.nan),
        entropy=entropy / (tokens * config.expert_layers),
        loss=loss / weight,
    )
    return torch.stack([torch.as_tensor(getattr(found, field.name)) for field in fields(found)])
