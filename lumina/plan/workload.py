"""What one optimizer step does, counted: matrix-product FLOPs, bytes through memory, bytes between ranks.

A product of (m, k) and (k, n) is 2mkn FLOPs. A token at position p of its document attends to p + 1 keys, so documents
of L tokens cost (L + 1) / 2 keys per token on average: packing never pays for attention across documents. The output
layer runs at supervised positions only. Backward is twice forward for matrix products; flash attention recomputes its
scores, 2.5 times forward (arXiv:2307.08691, section 4). Recomputation is counted as work but not as model FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina.config import ModelConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
QUANTIZED = 1.002  # bytes of a gathered 8-bit weight: one, and a float32 scale for each group of 2,048


@dataclass(frozen=True)
class Shape:
    """The run's shape on each rank, as far as cost depends on it."""

    micro_batch: int  # samples of up to seq_length tokens
    accumulation: int
    world: int
    precision: str
    stage: int = 0
    hpz: int = 0  # ranks of a node that keep a second copy of stage 3's weights among them (arXiv:2306.10209); 0: none
    offload_optimizer: bool = False
    offload_params: bool = False
    checkpoint_every: int = 0  # every nth layer is recomputed; 0: none
    document_tokens: float | None = None  # None: documents fill the window
    supervised: float = 1.0  # share of tokens that the loss looks at
    fill: float = 1.0  # tokens of a sample / seq_length
    overlap: bool = True  # gradients are reduced beside the backward pass
    bucket: int = 0  # elements of a gradient bucket: the last one is reduced when nothing is left to hide it
    # Stages 1 and 2: each rank receives its share of the gradients alone. DeepSpeed all-reduces whole buckets instead.
    reduce_scatter: bool = False
    reuse: int = 0  # stage 3: a weight used again within so many elements stays gathered between forward and backward
    quantized_weights: bool = False  # stage 3 gathers weights as 8-bit integers (qwZ, arXiv:2306.10209)

    @property
    def element(self) -> int:
        """Bytes of an element of weights and activations."""
        return BYTES[self.precision]


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Elements of one layer's matrices."""
    h, d = model.hidden_size, model.head_dim
    return h * d * (2 * model.num_heads + 2 * model.num_kv_heads) + 3 * h * model.ffn_size


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass, by part."""

    layers: float  # matrix products of all layers
    attention: float  # scores and weighted values of all layers
    output: float  # the vocabulary product, averaged over supervised and other tokens

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.output

    @property
    def model(self) -> float:
        """Forward and backward without recomputation: what MFU counts."""
        return 3 * self.forward


def flops_per_token(model: ModelConfig, shape: Shape) -> Flops:
    """Forward FLOPs of one token."""
    document = min(shape.document_tokens or model.seq_length, model.seq_length)
    keys = (document + 1) / 2
    width = model.num_heads * model.head_dim
    return Flops(
        layers=2.0 * model.num_layers * layer_matrix_parameters(model),
        attention=4.0 * model.num_layers * width * keys,
        output=2.0 * model.hidden_size * model.vocab_size * shape.supervised,
    )


def recomputed_share(model: ModelConfig, shape: Shape) -> float:
    """Share of the layers whose forward pass runs twice."""
    if not shape.checkpoint_every:
        return 0.0
    return -(-model.num_layers // shape.checkpoint_every) / model.num_layers


def memory_bytes_per_token(model: ModelConfig, shape: Shape) -> float:
    """Bytes that element-wise passes move per token, forward and backward, with the fused kernels of lumina.kernels:
    the fewest that each can move (norm and residual 8 + 8 bytes per element in bf16, rotary 4 + 4, SwiGLU 6 + 10, and
    five passes over the logits: product out, statistics, gradient in and out, product in)."""
    scale = shape.element / 2
    h, f = model.hidden_size, model.ffn_size
    rotated = (model.num_heads + model.num_kv_heads) * model.head_dim
    normed = rotated if model.qk_norm else 0  # read and written; in the backward pass two are read
    forward = 2 * 8 * h + 4 * rotated + 4 * normed + 6 * f
    backward = 2 * 8 * h + 4 * rotated + 6 * normed + 10 * f
    layers = model.num_layers * (forward * (1 + recomputed_share(model, shape)) + backward)
    return scale * (layers + 5 * 2 * model.vocab_size * shape.supervised)


def optimizer_bytes(model: ModelConfig, shape: Shape) -> float:
    """Bytes that AdamW moves per rank and step: master weight and two moments read and written, gradient read, weight
    written."""
    own = model.num_parameters() / (shape.world if shape.stage else 1)
    return own * (3 * 8 + 2 * shape.element)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank receives in one step, by what they are (ring or equivalent collectives: the volumes of the
    ZeRO paper, arXiv:1910.02054, section 7)."""

    gradients: float
    weights: float
    near: float = 0.0  # weights that come from ranks of the same node only

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.near


def traffic(model: ModelConfig, shape: Shape) -> Traffic:
    """Communication of one step, as DeepSpeed 0.19.8 does it. Stage 0 all-reduces gradients once; 1 reduces them once
    and gathers the new weights; 2 reduces after every micro-batch; 3 also gathers weights before every forward and
    every backward pass, the latter within the node where hpZ keeps a copy there.

    Stages 1 and 2 reduce by all-reduces of whole buckets (use_multi_rank_bucket_allreduce, its default), of which each
    rank keeps its share: twice the bytes of stage 3's reduce-scatter.
    """
    share = (shape.world - 1) / shape.world
    whole = model.num_parameters() * shape.element * share
    reduced = whole if shape.reduce_scatter or shape.stage == 3 else 2 * whole
    if shape.stage == 0:
        return Traffic(2 * whole, 0.0)
    if shape.stage == 1:
        return Traffic(reduced, whole)
    if shape.stage == 2:
        return Traffic(reduced * shape.accumulation, whole)
    gathered = whole / shape.element * QUANTIZED if shape.quantized_weights else whole
    # Elements between a weight's two uses are twice those between it and the model's end.
    again = 1 - min(1.0, shape.reuse / 2 / model.num_parameters())
    if shape.hpz > 1:
        near = again * model.num_parameters() * shape.element * (shape.hpz - 1) / shape.hpz
        return Traffic(reduced * shape.accumulation, gathered * shape.accumulation, near * shape.accumulation)
    return Traffic(reduced * shape.accumulation, (1 + again) * gathered * shape.accumulation)
