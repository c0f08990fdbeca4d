"""`lumina inspect`: exactly what the model will see of a sample, token by token."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from lumina.chat import AnyTokenizer
from lumina.data.loading.dataset import PackedDataset

LEARNED, CONTEXT, CONTROL = "green", "default", "magenta"


def describe(dataset: PackedDataset, sample: int, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """A sample's documents with every token's id, text, position, target and weight, from the batch that training
    gets. `round_trip` says whether every text between control tokens, decoded and encoded again, gives the same ids
    (one that the window has cut may not)."""
    batch = dataset.batch([sample])
    documents = []
    bounds = batch.cu_seqlens_D.tolist()
    for piece, first, last in zip(dataset.pieces_of(sample), bounds[:-1], bounds[1:], strict=True):
        ids = batch.ids_T[first:last].tolist()
        assert np.array_equal(piece.ids, ids)
        documents.append(
            {
                "source": f"{piece.source}:{piece.line}",
                "begins_inside_a_message": piece.context,
                "text": tokenizer.decode(ids),
                "round_trip": all(
                    tokenizer.encode(tokenizer.decode(run)) == run for run in _plain_runs(ids, tokenizer)
                ),
                "tokens": [
                    {
                        "position": int(batch.positions_T[i]),
                        "id": int(batch.ids_T[i]),
                        "text": tokenizer.token_bytes(int(batch.ids_T[i])).decode("utf-8", "replace"),
                        "target": int(batch.targets_T[i]) if batch.weights_T[i] else None,
                        "weight": float(batch.weights_T[i]),
                        "learned": bool(piece.mask[i - first]),
                    }
                    for i in range(first, last)
                ],
            }
        )
    return {
        "sample": sample,
        "tokens": int(dataset.tokens_per_sample[sample]),
        "supervised": int(dataset.supervised_per_sample[sample]),
        "documents": documents,
    }


def _round_trips(ids: list[int], tokenizer: AnyTokenizer) -> bool:
    return all(tokenizer.encode(tokenizer.decode(run)) == run for run in _plain_runs(ids, tokenizer))


def _plain_runs(ids: list[int], tokenizer: AnyTokenizer) -> list[list[int]]:
    """The stretches of ordinary tokens between control tokens."""
    groups = groupby(ids, key=tokenizer.is_control)
    return [list(run) for control, run in groups if not control]


def render_sample(description: dict[str, Any], tokenizer: AnyTokenizer, table: bool) -> list[Text]:
    """The description as coloured lines: running text, and with `table` a line for each token too.

    Green is learned, magenta a control token, plain is context; without colours, learned tokens stand in «».
    """
    out = [
        Text(
            f"sample {description['sample']}: {description['tokens']:,} tokens, {description['supervised']:,} learned, "
            f"{len(description['documents'])} documents",
            style="bold",
        )
    ]
    for number, document in enumerate(description["documents"], 1):
        inside = ", begins inside a message" if document["begins_inside_a_message"] else ""
        trip = "round-trips" if document["round_trip"] else "does NOT round-trip"
        out.append(Text(f"── document {number}: {document['source']}{inside}; {trip}", style="cyan"))
        line = Text()
        # Runs of one style are decoded together: a character may be spread over several tokens.
        for learned, part in groupby(document["tokens"], key=lambda token: token["learned"]):
            line.append("«" if learned else "", style="dim")
            for style, run in groupby(part, key=lambda token: _style(token, tokenizer)):
                line.append(tokenizer.decode(token["id"] for token in run), style=style)
            line.append("»" if learned else "", style="dim")
        out.append(line)
        if table:
            for token in document["tokens"]:
                target = f"-> {token['target']}" if token["weight"] else ""
                row = f"{token['position']:>6} {token['id']:>7} {token['weight']:.0f} {target:<10} {token['text']!r}"
                out.append(Text(row, style=_style(token, tokenizer)))
    return out


def _style(token: dict[str, Any], tokenizer: AnyTokenizer) -> str:
    colour = LEARNED if token["learned"] else CONTEXT
    return f"bold {CONTROL}" if tokenizer.is_control(token["id"]) and not token["learned"] else colour
