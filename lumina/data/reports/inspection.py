"""`lumina inspect`: exactly what the model will see of a sample, token by token."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from lumina.chat import ChatTokenizer
from lumina.data.loading.dataset import PackedDataset

SUPERVISED, CONTEXT, SPECIAL = "green", "default", "magenta"


SHOWN_ENDS = 2000  # tokens that are shown of a long sample's beginning, and of its end


def describe_sample(
    dataset: PackedDataset, sample: int, tokenizer: ChatTokenizer, ends: int | None = None
) -> dict[str, Any]:
    """A sample's documents with every token's id, text, position, target and weight, from the batch that training
    gets. `round_trip` says whether every text between special tokens, decoded and encoded again, gives the same ids
    (one that was split may not). ends: so many tokens of the sample's beginning and of its end alone; `left_out` counts
    a document's others, which come after the first `head` of its tokens."""
    batch = dataset.batch([sample])
    total = len(batch.ids_T)
    head, tail = (total, total) if ends is None or total <= 2 * ends else (ends, total - ends)
    documents = []
    bounds = batch.cu_seqlens_D.tolist()
    for chunk, first, last in zip(dataset.chunks_of(sample), bounds[:-1], bounds[1:], strict=True):
        ids = batch.ids_T[first:last].tolist()
        assert np.array_equal(chunk.ids, ids)
        kept = [*range(first, min(last, head)), *range(max(first, tail), last)]
        documents.append(
            {
                "source": f"{chunk.source}:{chunk.line}",
                "context_tokens": chunk.context,
                "text": tokenizer.decode(ids),
                "round_trip": _round_trips(ids, tokenizer),
                "tokens": [
                    {
                        "position": int(batch.positions_T[i]),
                        "id": int(batch.ids_T[i]),
                        "text": tokenizer.token_bytes(int(batch.ids_T[i])).decode("utf-8", "replace"),
                        "target": int(batch.targets_T[i]) if batch.weights_T[i] else None,
                        "weight": float(batch.weights_T[i]),
                        "supervised": bool(chunk.mask[i - first]),
                    }
                    for i in kept
                ],
                "head": max(0, min(last, head) - first),
                "left_out": last - first - len(kept),
            }
        )
    return {
        "sample": sample,
        "tokens": int(dataset.tokens_per_sample[sample]),
        "supervised": int(dataset.supervised_per_sample[sample]),
        "documents": documents,
    }


def _round_trips(ids: list[int], tokenizer: ChatTokenizer) -> bool:
    return all(tokenizer.encode(tokenizer.decode(run)) == run for run in _plain_runs(ids, tokenizer))


def _plain_runs(ids: list[int], tokenizer: ChatTokenizer) -> list[list[int]]:
    """The stretches of ordinary tokens between special tokens."""
    groups = groupby(ids, key=tokenizer.is_special)
    return [list(run) for control, run in groups if not control]


def render_sample(description: dict[str, Any], tokenizer: ChatTokenizer, table: bool) -> list[Text]:
    """The description as coloured lines: running text, and with `table` a line for each token too.

    Green is supervised, magenta a special token, plain is context; without colours, supervised tokens stand in «».
    """
    out = [
        Text(
            f"sample {description['sample']}: {description['tokens']:,} tokens, "
            f"{description['supervised']:,} supervised, {len(description['documents'])} documents",
            style="bold",
        )
    ]
    unseen = [document for document in description["documents"] if not document["tokens"]]
    for number, document in enumerate(description["documents"], 1):
        if not document["tokens"]:
            if document is unseen[0]:
                tokens = sum(one["left_out"] for one in unseen)
                out.append(Text(f"── {len(unseen):,} documents left out, {tokens:,} tokens", style="cyan"))
            continue
        count = document["context_tokens"]
        inside = f", begins with {count:,} token(s) from earlier in the conversation" if count else ""
        trip = "round-trips" if document["round_trip"] else "does NOT round-trip"
        out.append(Text(f"── document {number}: {document['source']}{inside}; {trip}", style="cyan"))
        head, tail = document["tokens"][: document["head"]], document["tokens"][document["head"] :]
        out += _shown(head, tokenizer, table) if head else []
        if document["left_out"]:
            out.append(Text(f"── {document['left_out']:,} tokens left out (--whole shows them)", style="cyan"))
        out += _shown(tail, tokenizer, table) if tail else []
    return out


def _shown(tokens: list[dict[str, Any]], tokenizer: ChatTokenizer, table: bool) -> list[Text]:
    lines = [coloured(tokens, tokenizer)]
    if table:
        for token in tokens:
            target = f"-> {token['target']}" if token["weight"] else ""
            row = f"{token['position']:>6} {token['id']:>7} {token['weight']:.0f} {target:<10} {token['text']!r}"
            lines.append(Text(row, style=_style(token, tokenizer)))
    return lines


def coloured(tokens: list[dict[str, Any]], tokenizer: ChatTokenizer) -> Text:
    """Tokens as running text, the supervised ones in «». Runs of one style are decoded together: a character may be
    spread over several tokens."""
    line = Text()
    for supervised, part in groupby(tokens, key=lambda token: token["supervised"]):
        line.append("«" if supervised else "", style="dim")
        for style, run in groupby(part, key=lambda token: _style(token, tokenizer)):
            line.append(tokenizer.decode(token["id"] for token in run), style=style)
        line.append("»" if supervised else "", style="dim")
    return line


def _style(token: dict[str, Any], tokenizer: ChatTokenizer) -> str:
    colour = SUPERVISED if token["supervised"] else CONTEXT
    return f"bold {SPECIAL}" if tokenizer.is_special(token["id"]) and not token["supervised"] else colour
