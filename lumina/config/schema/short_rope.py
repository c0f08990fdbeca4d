"""RoPE scaling in short, `TYPE` or `TYPE:FACTOR`, for a run that goes on from another's weights at a longer context:
the rest follows from the length that those were trained at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina.config.errors import UserError

TYPES = ("linear", "llama3", "yarn")
_LLAMA_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_WHOLE = "or the whole mapping: --set 'rope_scaling={type: …, factor: …, original_max_position_embeddings: …}'"


def rope_scaling_of(text: str, seq_length: Any, base: Mapping[str, Any]) -> dict[str, Any] | None:
    """The setting `rope_scaling` that `text` stands for: `none`, or one of TYPES with a factor, by default as much as
    `seq_length` is longer than the model was trained at first. base: the settings of the weights that the run begins
    with, or of the run itself where it is resumed.

    Raises:
        UserError: another text; no length is known, or a longer one is not asked for; the weights know other positions.
    """
    if text == "none":
        return None
    kind, _, given = text.partition(":")
    factor = _number(given)
    if kind not in TYPES or (given and (factor is None or not 1 <= factor < float("inf"))):
        raise UserError(
            f"rope_scaling {text} is not TYPE or TYPE:FACTOR with a TYPE of {', '.join(TYPES)} and a FACTOR from 1",
            f"For example yarn, or yarn:4, {_WHOLE}.",
        )
    first = _first_length(kind, base)
    if first is None and (factor is None or kind != "linear"):
        raise UserError(
            f"rope_scaling {text} counts from the length that a model was trained at, and none is known",
            f"Add --init-from RUN, {_WHOLE}.",
        )
    if factor is None:
        if not isinstance(seq_length, int) or first is None or seq_length <= first:
            raise UserError(
                f"rope_scaling {text} is for a context longer than the {first} tokens that the model was trained at, "
                f"and seq_length is {seq_length}",
                f"Add --seq-length N, or give the factor: {kind}:4.",
            )
        factor = seq_length / first
    more = {} if kind == "linear" else {"original_max_position_embeddings": first}
    return {"type": kind, "factor": factor, **more, **(_LLAMA_3_1 if kind == "llama3" else {})}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _first_length(kind: str, base: Mapping[str, Any]) -> int | None:
    """The context length that the weights were trained at before any scaling."""
    length, scaling = base.get("seq_length"), base.get("rope_scaling")
    if not isinstance(length, int):
        return None
    if not isinstance(scaling, Mapping):
        return length
    if scaling.get("type") != kind:
        raise UserError(
            f"the weights know positions that are scaled by {scaling.get('type')} already, and those of {kind} are "
            "others",
            f"Stay with {scaling.get('type')}, {_WHOLE}.",
        )
    first = scaling.get("original_max_position_embeddings")
    if isinstance(first, int):
        return first
    factor = scaling.get("factor")
    return round(length / factor) if isinstance(factor, int | float) and factor >= 1 else length
