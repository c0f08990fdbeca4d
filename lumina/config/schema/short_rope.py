"""RoPE scaling in short, `TYPE` or `TYPE:FACTOR`, for a run that goes on from another's weights at a longer context:
the rest follows from the length that those were trained at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lumina.config.errors import UserError, explain_values
from lumina.config.schema.model import RopeScaling

TYPES = ("linear", "llama3", "yarn")
_LLAMA_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_WHOLE = "or the whole mapping: --set 'rope_scaling={type: …, factor: …, original_max_position_embeddings: …}'"


def rope_scaling_of(text: str, seq_length: Any, base: Mapping[str, Any]) -> dict[str, Any] | None:
    """The setting `rope_scaling` that `text` stands for: `none`, or one of TYPES with a factor, by default the base's
    (1 where it scales nothing) times as much as `seq_length` is longer than its own length. The rest is as in the base.
    base: the settings of the weights that the run begins with, or of the run itself where it is resumed.

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
    scaling = _scaling_of(kind, base)
    length = _own_length(base, scaling)
    if length is None and (factor is None or kind != "linear"):
        raise UserError(
            f"rope_scaling {text} counts from the length that a model was trained at, and none is known",
            f"Add --init-from RUN, {_WHOLE}.",
        )
    if factor is None:
        if not isinstance(seq_length, int) or length is None or seq_length <= length:
            raise UserError(
                f"rope_scaling {text} is for a context longer than the model's own {length} tokens, and seq_length is "
                f"{seq_length}: nothing gets longer",
                f"Add --seq-length N, give the factor ({kind}:4), or leave rope_scaling out.",
            )
        factor = scaling["factor"] * seq_length / length
    if factor != scaling["factor"]:
        scaling.pop("attention_factor", None)  # which goes by the factor
    return scaling | {"factor": factor}


def trained_length(run: Mapping[str, Any]) -> int | None:
    """The longest context that the weights of a run with these settings were trained at, in tokens, in it or before."""
    lengths = [run.get(name) for name in ("seq_length", "trained_seq_length")]
    return max((length for length in lengths if isinstance(length, int)), default=None)


def is_short_for(text: str, scaling: Any) -> bool:
    """Whether the setting `scaling` of a run may have been given as `text` when the run began: of the same type, and of
    the same factor where `text` has one."""
    if not isinstance(scaling, Mapping):
        return text == "none"
    kind, _, given = text.partition(":")
    return bool(kind == scaling.get("type") and (not given or _number(given) == scaling.get("factor")))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _scaling_of(kind: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of type `kind` that the weights know: their own, or one by 1 from the length they were trained at."""
    known, length = base.get("rope_scaling"), trained_length(base)
    if isinstance(known, Mapping):
        if known.get("type") != kind:
            raise UserError(
                f"the weights know positions that are scaled by {known.get('type')} already, and those of {kind} are "
                "others",
                f"Stay with {known.get('type')}, {_WHOLE}.",
            )
        try:
            return RopeScaling.model_validate(known).model_dump()
        except ValidationError as error:
            raise UserError(f"rope_scaling of the weights' run: {explain_values(error)}") from None
    original = {} if kind == "linear" else {"original_max_position_embeddings": length}
    return {"type": kind, "factor": 1.0, **original, **(_LLAMA_3_1 if kind == "llama3" else {})}


def _own_length(base: Mapping[str, Any], scaling: Mapping[str, Any]) -> int | None:
    """The context length that the weights have without more scaling, in tokens: the longest that they were trained at,
    or what their scaling is made for where that is longer."""
    original = scaling.get("original_max_position_embeddings")
    made_for = round(original * scaling["factor"]) if isinstance(original, int) else 0
    return max(trained_length(base) or 0, made_for) or None
