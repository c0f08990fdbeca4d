"""Mixture of experts: the settings of feed-forward layers that are many, of which each token goes through a few."""

from __future__ import annotations

from pydantic import Field

from lumina.config.schema.fields import NonNegativeInt, PositiveInt, Strict


class Experts(Strict):
    """Experts of a decoder's layers (arXiv:1701.06538, arXiv:2401.04088): each is a SwiGLU feed-forward layer, and a
    token goes through the `per_token` to which the layer's router gives the highest probabilities.

    count: experts of a layer. size: width of each; None: the dense layers'. norm_topk_prob: whether a token's
    probabilities are divided by the sum of those that were chosen. dense_layers: layers, from 0, that have an ordinary
    feed-forward layer instead.
    """

    count: PositiveInt
    per_token: PositiveInt = 2
    size: PositiveInt | None = None
    norm_topk_prob: bool = True
    dense_layers: list[NonNegativeInt] = Field(default_factory=list)

    def fault(self, layers: int) -> str | None:
        """What is wrong with these settings in a model of so many layers, None if nothing is."""
        if self.per_token > self.count:
            return f"experts: {self.per_token} per token of only {self.count}"
        dense = self.dense_layers
        if sorted(set(dense)) != dense or (dense and dense[-1] >= layers):
            return f"experts: dense_layers {dense} are not ascending layers of 0 to {layers - 1}"
        return "experts: every layer is a dense one" if len(dense) == layers else None
