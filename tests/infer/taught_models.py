"""Small models that were taught a few answers by heart: reasoning, tool calls and all, said when they are asked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, pad

from lumina.chat import ChatTokenizer, Conversation, Message, Tokenizer, ToolCall, open_tokenizer
from lumina.infer import Loaded
from lumina.model import Transformer
from tests.infer.small_models import make_model
from tests.small_tokenizer import VOCABULARY, trl_template, write_agent_tokenizer

TEMPLATE = "im-roles-2"
WEATHER = (
    '{"type": "function", "function": {"name": "get_weather", "description": "The weather now", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}'
)
CALLS = (ToolCall("get_weather", '{"city": "Oslo"}'), ToolCall("get_weather", '{"city": "Bergen"}'))
REASONING, ANSWER, GREETING = "Two cities, two calls.", "Rain in Oslo, sun in Bergen.", "Hello yourself."
ASKED = Message("user", "How is the weather in Oslo and Bergen?")
CONVERSATIONS = [
    Conversation(
        [
            ASKED,
            Message("assistant", "", reasoning=REASONING, tool_calls=CALLS),
            Message("tool", "rain", name="get_weather"),
            Message("tool", "sun", name="get_weather"),
            Message("assistant", ANSWER),
        ],
        tools=(WEATHER,),
    ),
    Conversation([Message("user", "Hello"), Message("assistant", GREETING)]),
]


@functools.cache
def taught_model() -> tuple[Transformer, Tokenizer]:
    """A model of Lumina's own vocabulary that says CONVERSATIONS' answers, greedily. Made once a process: do not change
    it."""
    tokenizer = Tokenizer.load(TEMPLATE)
    model = make_model(num_layers=1, hidden_size=32, seq_length=512, init_std=0.05, tie_word_embeddings=False)
    teach(model, tokenizer, CONVERSATIONS)
    return model, tokenizer


def taught(folder: Path) -> Loaded:
    """The same, as if it had been read from a run in `folder`, which is called after it."""
    model, tokenizer = taught_model()
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    return Loaded(model, tokenizer, checkpoint, 5)


@functools.cache
def _taught_qwen3(tokenizer: Path) -> tuple[Transformer, ChatTokenizer]:
    own = open_tokenizer(write_agent_tokenizer(tokenizer, trl_template("qwen3")), None)
    shape = {"num_layers": 1, "hidden_size": 32, "seq_length": 1536, "init_std": 0.05, "tie_word_embeddings": False}
    model = make_model(vocab_size=VOCABULARY, **shape)
    teach(model, own, CONVERSATIONS)
    return model, own


def taught_qwen3(folder: Path) -> Loaded:
    """As `taught`, with a small vocabulary and Qwen3's chat template, as an imported model has them."""
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    return Loaded(*_taught_qwen3(folder / "tokenizer"), checkpoint, 5)


def teach(
    model: Transformer, tokenizer: ChatTokenizer, conversations: Sequence[Conversation], steps: int = 400
) -> None:
    """Train until each supervised token of the conversations is the likeliest by far. Raises AssertionError when
    `steps` are too few.

    The output rows of tokens that are never to be said are zero, and stand in the loss as what they add to the sum:
    100,000 rows would take a hundred times as long as the rest.
    """
    block, refused = tokenizer.render_valid(conversations)
    assert not refused
    bounds = block.message_offsets[block.conversation_offsets].tolist()
    parts = [slice(start, end) for start, end in pairwise(bounds)]
    samples = [(torch.from_numpy(block.ids[at]).long(), torch.from_numpy(block.mask[at]).bool()) for at in parts]
    said_U, number_T = torch.unique(torch.cat([ids[mask] for ids, mask in samples]), return_inverse=True)
    targets = number_T.split([int(mask.sum()) for _, mask in samples])
    rows_UD = model.output.weight[said_U].clone().requires_grad_(True)
    others = math.log(len(model.output.weight))
    model.blocks.requires_grad_(True)
    optimizer = torch.optim.AdamW([rows_UD, *model.blocks.parameters()], lr=1e-2, weight_decay=0)
    for _ in range(steps):
        worst = 0.0
        for (ids_T, mask_T), target in zip(samples, targets, strict=True):
            x_1TD = model.trunk(ids_T[None, :-1], torch.arange(len(ids_T) - 1)[None])
            logits = pad(x_1TD[0, mask_T[1:]] @ rows_UD.T, (0, 1), value=others)
            losses = cross_entropy(logits, target, reduction="none")
            losses.mean().backward()
            worst = max(worst, float(losses.detach().max()))
        optimizer.step()
        optimizer.zero_grad()
        if worst < 0.02:
            break
    assert worst < 0.02
    model.requires_grad_(False)
    model.output.weight.zero_()
    model.output.weight[said_U] = rows_UD.detach()
