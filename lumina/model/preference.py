"""Direct preference optimisation (arXiv:2305.18290, equation 7; TRL's "sigmoid" loss), fused with the output layer.

The loss of a pair is -log sigmoid(beta * margin), where the margin is how much more than the reference model this one
prefers the chosen answer: the difference of the two answers' log-probabilities, less the reference's. Its gradient is
that of sum_n c_n * cross-entropy_n with c = beta * sigmoid(-beta * margin) at the chosen answer's tokens, minus that at
the rejected one's. So the margins are computed first, without a graph, and then the weighted loss of the tokens as in
any other training: logits exist for a chunk at a time, at the cost of one more vocabulary product.

What a pair is worth to the model is its answers' rewards, beta * (log p - reference log p), as the paper's section 5
has them. They cost nothing more, and the loss returns their sums beside its own (`PREFERENCE_FIGURES`, by TRL's names).

N supervised positions, D hidden width, V vocabulary, P pairs, F figures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.model.loss import output_loss, token_losses
from lumina.model.parallel.sequence import SequenceGroup

PREFERENCE_FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


@torch.no_grad()
def log_probabilities(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    mask_N: Tensor,
    document_N: Tensor,
    pairs: int,
    softcap: float | None = None,
    sequence: SequenceGroup | None = None,
) -> Tensor:
    """log p(chosen) and log p(rejected) of each pair, in nats: float64 (P, 2). Documents 2p and 2p+1 are pair p's
    answers, each the sum of its tokens' log-probabilities where the mask is not 0. Sums of thousands of tokens that
    nearly cancel: in float64. The tokens are those of all ranks of `sequence`; collective over it."""
    logs_N = -token_losses(hidden_ND, weight_VD, targets_N, softcap).double() * mask_N.double()
    # As a product: index_add_ adds in an order of its own on a GPU, and a resumed run would not be the same (law 6).
    of_DN = document_N == torch.arange(2 * pairs, device=document_N.device)[:, None]
    found_P2 = (of_DN.double() @ logs_N).view(pairs, 2)
    return found_P2 if sequence is None else sequence.sum(found_P2)


def preference_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    mask_N: Tensor,
    document_N: Tensor,
    pairs_P3: Tensor,
    beta: float,
    softcap: float | None = None,
    sequence: SequenceGroup | None = None,
) -> Tensor:
    """sum_p weight_p * -log sigmoid(beta * (margin_p - reference_p)), followed by sum_p weight_p * figure_p of each of
    PREFERENCE_FIGURES: float32 (or float64) (1 + F). The gradient is that of the first alone.

    pairs_P3: the reference model's margin, the weight of each pair, and the reference's log p(chosen), float32. The
    last is for the rewards of single answers only: NaN where it is not known, and so are they. Of the ranks of
    `sequence`, which share the tokens, the first has the sums, the others zeros, and each the gradient of its tokens.
    """
    reference_P, weight_P, reference_chosen_P = pairs_P3.double().unbind(1)
    of_pairs = hidden_ND, weight_VD, targets_N, mask_N, document_N
    chosen_P, rejected_P = log_probabilities(*of_pairs, len(pairs_P3), softcap, sequence).unbind(1)
    margin_P = chosen_P - rejected_P - reference_P
    exact = torch.promote_types(hidden_ND.dtype, torch.float32)
    loss_P, reward_P = F.softplus(-beta * margin_P), beta * (chosen_P - reference_chosen_P)
    sums_FP = torch.stack((loss_P, reward_P, reward_P - beta * margin_P, (margin_P > 0).double(), beta * margin_P))
    sums = (weight_P * sums_FP).sum(1).to(exact)
    if sequence is not None and not sequence.first:
        sums = torch.zeros_like(sums)
    if not torch.is_grad_enabled():
        return sums
    slope_P = weight_P * beta * torch.sigmoid(-beta * margin_P)
    slopes_N = torch.stack((slope_P, -slope_P), 1).flatten()[document_N]
    graph = output_loss(hidden_ND, weight_VD, targets_N, (mask_N * slopes_N).to(exact), softcap)
    loss = sums[0] + (graph - graph.detach())  # the value of the one, the gradient of the other
    return torch.cat((loss[None], sums[1:]))
