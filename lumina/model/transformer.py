"""The decoder: Llama's shape, read top to bottom.

Shape suffixes: B sequences, S positions, D hidden width, H query heads, K key/value heads, d head width, F feed-forward
width, V vocabulary, N supervised positions, P positions in the rotary table.

References: Llama 2 (arXiv:2307.09288) for the arrangement, GQA (arXiv:2305.13245), RoPE (arXiv:2104.09864, the
rotate-half form), SwiGLU (arXiv:2002.05202), RMSNorm (arXiv:1910.07467). That is what `Structure` and the settings of
ModelConfig say by default; where a family says otherwise, its file in lumina/model/families has the reference.

A training batch is one row (B = 1) of documents laid end to end without padding; `cu_seqlens` says where they meet.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lumina.config import ModelConfig
from lumina.model import ops
from lumina.model.attention import Documents, Scoring, attention, refuse_cudnn
from lumina.model.attention import bind as bind_attention
from lumina.model.experts import ExpertFeedForward
from lumina.model.experts import bind as bind_experts
from lumina.model.layers.linear import draw, linear
from lumina.model.layers.norm import RMSNorm, Sum
from lumina.model.loss import loss_by_position, output_loss
from lumina.model.memory.head_groups import HeadGroups, by_head_groups
from lumina.model.memory.offload import HostCopies
from lumina.model.memory.recompute import recomputed
from lumina.model.memory.tiles import tiled
from lumina.model.parallel.sequence import SequenceGroup
from lumina.model.preference import log_probabilities, preference_loss
from lumina.model.routing import DocumentMembers, Routing

if TYPE_CHECKING:
    from lumina.model.cache import KVCache


class Attention(nn.Module):
    """Grouped-query attention over one fused projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        window = config.layers[layer].window
        self.scoring = Scoring(window, config.attention_scale, config.attention_softcap)
        biased, std = config.structure.qkv_bias, config.init_std
        self.qkv = linear(config.hidden_size, sum(self.heads) * self.head_dim, std, biased)
        self.out = linear(config.num_heads * self.head_dim, config.hidden_size, std / math.sqrt(2 * config.num_layers))
        self.qk_norm = config.structure.qk_norm
        normed = {"head": (1, 1), "width": self.heads[:2], None: ()}[self.qk_norm]
        norms = [RMSNorm(heads * self.head_dim, config) for heads in normed]
        self.q_norm = norms[0] if norms else None
        self.k_norm = norms[1] if norms else None
        self.groups = 1  # of heads, one at a time

    def forward(
        self, x_BSD: Tensor, rotary: ops.Rotary | None, docs: Documents | None, cache: KVCache | None
    ) -> Tensor:
        qkv_BSnd = self.qkv(x_BSD).view(*x_BSD.shape[:2], -1, self.head_dim)
        if self.groups > 1 and cache is None:
            normed = [
                parameter for norm in (self.q_norm, self.k_norm) if norm is not None for parameter in norm.parameters()
            ]
            o_BSHd = by_head_groups(self._in_groups(x_BSD.detach(), rotary, docs), qkv_BSnd, normed)
            return self.out(o_BSHd.flatten(2))  # type: ignore[no-any-return]
        q_BSHd, k_BSKd, v_BSKd = qkv_BSnd.split(self.heads, dim=2)
        del qkv_BSnd
        alone = docs is not None and docs.sequence is None
        if alone and rotary is not None and self.q_norm is None and torch.is_grad_enabled():
            v_BSKd = v_BSKd.clone()  # attention keeps it, and a view would keep the projection of all three
        q_BSHd, k_BSKd = self._turned(q_BSHd, k_BSKd, rotary)
        if cache is not None:
            o_BSHd = cache.attend(self.layer, q_BSHd, k_BSKd, v_BSKd, self.scoring)
        else:
            o_BSHd = attention(q_BSHd, k_BSKd, v_BSKd, docs, self.scoring)
        return self.out(o_BSHd.flatten(2))  # type: ignore[no-any-return]

    def _in_groups(self, x_BSD: Tensor, rotary: ops.Rotary | None, docs: Documents | None) -> HeadGroups:
        def project(heads: slice) -> Tensor:
            rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
            return self.qkv.of_rows(x_BSD, rows).view(*x_BSD.shape[:2], -1, self.head_dim)

        own = docs if docs is None or docs.sequence is None else replace(docs, sequence=None)
        return HeadGroups(
            self.groups,
            self.heads[:2],
            project,
            partial(self._turned, rotary=rotary),
            partial(attention, docs=own, scoring=self.scoring),
            None if docs is None else docs.sequence,
        )

    def _turned(self, q_BSHd: Tensor, k_BSKd: Tensor, rotary: ops.Rotary | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed where the family does and rotated."""
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSKd = self._normed(self.q_norm, q_BSHd), self._normed(self.k_norm, k_BSKd)
        return (q_BSHd, k_BSKd) if rotary is None else ops.rope(q_BSHd, k_BSKd, rotary)

    def _normed(self, norm: RMSNorm, x_BSnd: Tensor) -> Tensor:
        normed: Tensor = norm(x_BSnd if self.qk_norm == "head" else x_BSnd.flatten(2))[0]
        return normed.view(x_BSnd.shape)


class FeedForward(nn.Module):
    """Gated feed-forward (SwiGLU, GeGLU) over one fused gate/up projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = linear(config.hidden_size, 2 * config.ffn_size, config.init_std)
        self.down = linear(config.ffn_size, config.hidden_size, config.init_std / math.sqrt(2 * config.num_layers))
        self.activation = config.structure.activation

    def forward(self, x_BSD: Tensor) -> Tensor:
        gated = ops.swiglu if self.activation == "silu" else ops.geglu
        return self.down(gated(self.gate_up(x_BSD)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and feed-forward, with norms before them, after them, or both. Takes and returns (delta,
    residual), so that each add is fused with the norm after it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.arrangement, self.multiplier = config.structure.arrangement, config.residual_multiplier
        self.tile_tokens = 0  # tokens of the feed-forward at a time; 0: all
        before = self.arrangement != "post-norm"
        self.attention_norm = RMSNorm(config.hidden_size, config) if before else Sum()
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config) if before else Sum()
        self.feed_forward = ExpertFeedForward(config) if config.has_experts(layer) else FeedForward(config)
        if self.arrangement != "pre-norm":
            self.attention_post_norm = RMSNorm(config.hidden_size, config)
            self.feed_forward_post_norm = RMSNorm(config.hidden_size, config)

    def forward(
        self,
        delta_BSD: Tensor,
        residual_BSD: Tensor | None,
        rotary: ops.Rotary | None,
        docs: Documents | None = None,
        cache: KVCache | None = None,
        members: DocumentMembers | None = None,
        summed: bool = False,
        recomputing: bool = False,
    ) -> tuple[Tensor, ...]:
        """(delta, residual); with `members` and in a layer that has experts, also what they sum up of the routing.
        summed: delta is the sum of both already. recomputing: only the graph is wanted, so that a tiled feed-forward's
        delta is NaN."""
        normed_BSD, residual_BSD = self.attention_norm(delta_BSD, residual_BSD, summed)
        delta_BSD = self.attention(normed_BSD, rotary, docs, cache)
        if self.arrangement != "pre-norm":
            delta_BSD, _ = self.attention_post_norm(delta_BSD)
        delta_BSD = self._scaled(delta_BSD)
        if isinstance(self.feed_forward, ExpertFeedForward):
            normed_BSD, residual_BSD = self.feed_forward_norm(delta_BSD, residual_BSD)
            delta_BSD, *sums = self.feed_forward(normed_BSD, members)
            if self.arrangement != "pre-norm":
                delta_BSD, _ = self.feed_forward_post_norm(delta_BSD)
            return self._scaled(delta_BSD), residual_BSD, *sums
        if self.tile_tokens and (torch.is_grad_enabled() or delta_BSD.shape[:2].numel() > self.tile_tokens):
            parts = [part for name, part in self.named_children() if name.startswith("feed_forward")]
            parameters = [parameter for part in parts for parameter in part.parameters()]
            given = self._feed_forward, parameters, self.tile_tokens, delta_BSD, residual_BSD
            delta_BSD, residual_BSD = tiled(*given, recomputing=recomputing)
        else:
            delta_BSD, residual_BSD = self._feed_forward(delta_BSD, residual_BSD)
        return self._scaled(delta_BSD), residual_BSD

    def _feed_forward(self, delta_BSD: Tensor, residual_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of a layer without experts, norms and all: each token on its own."""
        normed_BSD, residual_BSD = self.feed_forward_norm(delta_BSD, residual_BSD)
        delta_BSD = self.feed_forward(normed_BSD)
        if self.arrangement != "pre-norm":
            delta_BSD, _ = self.feed_forward_post_norm(delta_BSD)
        return delta_BSD, residual_BSD

    def _scaled(self, delta_BSD: Tensor) -> Tensor:
        return delta_BSD if self.multiplier == 1.0 else delta_BSD * self.multiplier


class Embedding(nn.Module):
    """Token embedding. Its gradient is sparse when the output layer shares the weight: the dense gradient of the
    output layer is already there, and adding a few rows to it costs less than a second dense one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        draw(self.weight, config.init_std)
        self.sparse = config.tie_word_embeddings
        self.scale = config.embedding_scale

    def forward(self, ids_BS: Tensor) -> Tensor:
        # torch.compile cannot take a sparse gradient through its graph.
        sparse = self.sparse and self.weight.device.type == "cpu" and not torch.compiler.is_compiling()
        x_BSD = torch.nn.functional.embedding(ids_BS, self.weight, sparse=sparse)
        if self.scale == 1.0:
            return x_BSD
        # Rounded to the weights' type, as the models were trained; on the host, which then waits for nothing.
        return x_BSD * torch.tensor(self.scale, dtype=x_BSD.dtype).item()


class Output(nn.Module):
    """The vocabulary projection: logits for inference, the loss for training. The loss lives here, inside the module
    that owns the weight, because ZeRO-3 gathers a weight only around its owner's forward."""

    def __init__(self, weight: nn.Parameter, config: ModelConfig) -> None:
        super().__init__()
        self.weight = weight
        self.scale, self.softcap = config.logit_scale, config.logit_softcap
        self.sequence: SequenceGroup | None = None

    def forward(
        self,
        x_BSD: Tensor,
        targets_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        supervised_N: Tensor | None = None,
        documents_N: Tensor | None = None,
        pairs_P3: Tensor | None = None,
        beta: float | None = None,
        before_N: Tensor | None = None,
    ) -> Tensor:
        """Arguments as in Transformer.forward; before_N: as in loss_by_position. Nothing here looks for the supervised
        positions: a search whose result has as many rows as it finds would make the host wait for the device and break
        a compiled graph."""
        if self.scale != 1.0:  # the product's, at the cost of its narrower operand
            x_BSD = x_BSD * self.scale
        if targets_N is None or weights_N is None:
            logits_BSV = torch.nn.functional.linear(x_BSD, self.weight)
            return logits_BSV if self.softcap is None else self.softcap * torch.tanh(logits_BSV / self.softcap)
        hidden_ND = x_BSD.flatten(0, 1)
        if supervised_N is not None:
            hidden_ND = hidden_ND.index_select(0, supervised_N)
        of_tokens = hidden_ND, self.weight, targets_N.flatten(), weights_N.flatten()
        if before_N is not None:
            return loss_by_position(*of_tokens, before_N, self.softcap)
        if pairs_P3 is None:
            return output_loss(*of_tokens, self.softcap)
        assert documents_N is not None, "a pair's answers are documents: each supervised token has one"
        of_pairs = hidden_ND, self.weight, targets_N, weights_N, documents_N
        if beta is None:
            return log_probabilities(*of_pairs, len(pairs_P3), self.softcap, self.sequence)
        return preference_loss(*of_pairs, pairs_P3, beta, self.softcap, self.sequence)


class Transformer(nn.Module):
    """The model. `forward` returns logits (B, S, V), or the weighted sum of token losses when targets are given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        refuse_cudnn()
        ops.bind()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ropes = [layer.rope for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config)
        if config.tie_word_embeddings:
            self.output = Output(self.embedding.weight, config)
        else:
            weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            draw(weight, config.init_std)
            self.output = Output(weight, config)
        self.checkpoint_every = 0  # 0: keep all activations; n: recompute every nth layer in the backward pass
        self.host_copies: HostCopies | None = None  # where recomputed layers' inputs wait; None: on the device
        self.tile_tokens, self.head_groups = 0, 1
        self.sequence: SequenceGroup | None = None
        self.at_layer: Any = lambda layer, out_BSD: None  # called with each layer's number and what comes out of it
        self._routing_counts: Tensor | None = None

    def share_rows(self, sequence: SequenceGroup) -> None:
        """From now on a row of documents is shared by these ranks: `forward` is given this rank's part of ids,
        positions and supervised positions (counted within the part), and the documents of the whole row; it returns
        this rank's part of the loss, and what is of whole pairs on the group's first rank (with `beta`) or on all of
        them. Passes with a cache are each rank's own as before."""
        self.sequence = self.output.sequence = sequence

    def tile_feed_forward(self, tokens: int) -> None:
        """From now on compute the feed-forward of layers without experts that many tokens at a time, again in the
        backward pass; 0: all at once, and keep what is inside. The results are the same."""
        self.tile_tokens = tokens
        for block in self.blocks:
            block.tile_tokens = tokens  # type: ignore[assignment]

    def group_heads(self, groups: int) -> None:
        """From now on compute attention for a group of heads at a time, of so many groups; 1: for all at once. The
        results are the same."""
        self.head_groups = groups
        for block in self.blocks:
            block.attention.groups = groups  # type: ignore[union-attr]

    def forward(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        cu_seqlens_D: Tensor | None = None,
        max_seqlen: int | None = None,
        targets_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        supervised_N: Tensor | None = None,
        documents_N: Tensor | None = None,
        pairs_P3: Tensor | None = None,
        beta: float | None = None,
        bounds: tuple[int, ...] | None = None,
        by_position: bool = False,
    ) -> Tensor:
        """Logits (B, S, V) or, with targets, a float32 scalar: sum over positions of weight * cross-entropy in nats.
        With pairs (lumina.model.preference), whose documents come first, the sums of the pairs' losses and figures at
        `beta` (1 + F), or without one their answers' log-probabilities (P, 2). With `by_position`, which is for
        evaluations of single answers and needs `supervised`, what loss_by_position returns.

        ids, positions: int64 (B, S). targets int64 and weights float32 are those of the positions `supervised` (N,
        int64, counted over B*S), or of every position, (B, S), where that is not given; the output layer is computed
        there only. With pairs, documents (N, int64) names the document of each. cu_seqlens: int32, document boundaries
        over B*S starting at 0, given only with B = 1; without it every row is one causal document. bounds: the same
        numbers on the host, which spares a device the question. With a cache, ids and positions are those of its
        announced pass, and the logits are of each row's newest position only: (R, 1, V).
        """
        routing = None
        if self.training and self.config.experts is not None and weights_N is not None:
            routing = Routing.of(ids_BS, cu_seqlens_D, weights_N, supervised_N, pairs_P3)
        normed_BSD = self.trunk(ids_BS, positions_BS, cu_seqlens_D, max_seqlen, cache, bounds, routing)
        assert supervised_N is not None or not by_position
        before_N = positions_BS.flatten()[supervised_N] + 1 if by_position else None  # the target is the next token
        wanted = targets_N, weights_N, supervised_N, documents_N, pairs_P3, beta, before_N
        out: Tensor = self.output(normed_BSD, *wanted)
        return out if routing is None else self._with_router_losses(out, routing)

    def _with_router_losses(self, loss: Tensor, routing: Routing) -> Tensor:
        """The value of the loss, with the gradient of the routers' losses added (lumina.model.routing): what is shown
        and compared is the cross-entropy, as without experts."""
        balance, squares = routing.losses()
        counts = routing.counts(balance)
        self._routing_counts = counts if self._routing_counts is None else self._routing_counts + counts
        if not (self.config.router_aux_loss_coef or self.config.router_z_loss_coef):
            return loss
        added = self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * squares
        return loss + (added - added.detach())

    def take_routing_counts(self) -> Tensor | None:
        """What `lumina.model.expert_balance` reads of the forward passes with a loss since the last call: float64, to
        be added up over ranks; None where no layer has experts."""
        counts, self._routing_counts = self._routing_counts, None
        return counts

    def trunk(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        cu_seqlens_D: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
        bounds: tuple[int, ...] | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """What the output layer reads: (B, S, D). Arguments as in `forward`; `routing` is added to."""
        docs = None if cache is not None else Documents.of(ids_BS, cu_seqlens_D, max_seqlen, bounds, self.sequence)
        rotaries = {rope: None if rope is None else ops.Rotary.of(positions_BS, *rope) for rope in set(self.ropes)}
        delta_BSD = self.embedding(ids_BS)
        residual_BSD: Tensor | None = None
        members = None if routing is None else routing.members
        for layer, block in enumerate(self.blocks):
            rotary = rotaries[self.ropes[layer]]
            if self.checkpoint_every and self.training and layer % self.checkpoint_every == 0:
                given = delta_BSD, residual_BSD, rotary, docs, None, members
                delta_BSD, residual_BSD, *sums = recomputed(block, self.host_copies, *given)
            else:
                delta_BSD, residual_BSD, *sums = block(delta_BSD, residual_BSD, rotary, docs, cache, members)
            if routing is not None:
                routing.sums.extend(sums)
            self.at_layer(layer, delta_BSD)
        normed_BSD, _ = self.norm(delta_BSD, residual_BSD)
        return normed_BSD if cache is None else cache.newest(normed_BSD)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile the blocks, each on its own (`options`: torch.compile's). They share their graphs: one of the
        first block, which has no residual yet, and one of all others, whatever their number; sizes are symbolic, so
        that other token counts do not compile anew. The embedding, the output layer and the loss stay as they are:
        their shapes follow the batch, and their time is in few large kernels."""
        ops.bind()
        bind_attention()
        bind_experts()
        for block in self.blocks:
            block.compile(**({"dynamic": True} | options))

    @property
    def compiled(self) -> bool:
        """Whether the blocks are compiled."""
        return any(block._compiled_call_impl is not None for block in self.blocks)
