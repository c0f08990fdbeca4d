"""Fields that say whether a message is supervised, or an answer a good one: names we know, and what others read like.

A flag that is not known and says no is no reason to guess, nor one to teach what it stands beside: `says_not_to_learn`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# By true or 1 the message is supervised; by true or 1 it is not.
FLAGS = (
    *("weight", "train", "training", "trainable", "loss", "loss_mask", "learn", "supervised"),
    *("is_trainable", "do_train", "compute_loss", "calculate_loss", "train_on_output", "train_on_turn", "loss_weight"),
)
MASKS = ("masked", "is_masked", "no_train", "no_loss", "ignore_loss", "mask_loss", "skip_loss")
# Whether an answer is a good one, as data sets for KTO say it.
VERDICTS = frozenset({"label", "kto_tag", "kto_label", "desirable", "is_desirable"})

_ABOUT_TRAINING = frozenset(
    {
        "train", "trained", "training", "trainable", "loss", "mask", "masked", "masking", "learn", "learned",
        "learnable", "supervise", "supervised",
    }
)  # fmt: skip
_AGAINST_IT = frozenset(
    {
        "no", "not", "non", "dont", "ignore", "ignored", "skip", "skipped", "exclude", "excluded", "without",
        "disable", "disabled", "mask", "masked", "masking",
    }
)  # fmt: skip
# Other words beside these make a number, not a flag: train_steps.
_AROUND_IT = frozenset(
    {
        "is", "do", "on", "to", "for", "use", "used", "in", "from", "include", "included", "compute", "calculate",
        "calc", "this", "turn", "it", "be", "should", "can", "need", "needs", "require", "requires", "has", "with",
        "message", "answer", "assistant", "output", "response",
    }
)  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@lru_cache(maxsize=1000)
def _words(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(name))


def says_not_to_learn(name: str, value: Any) -> bool:
    """Whether an unknown field reads like a flag by which a message or record is not to be supervised: `use_in_loss:
    false`, `skipTraining: 1`."""
    if type(value) not in (bool, int, float, str):
        return False
    no = is_no(value, number=True)
    if not no and str(value).strip().lower() not in ("true", "1", "1.0"):
        return False
    words = _words(name)
    if words.isdisjoint(_ABOUT_TRAINING):
        return False
    if type(value) in (int, float) and not words <= _ABOUT_TRAINING | _AGAINST_IT | _AROUND_IT:
        return False
    return no == words.isdisjoint(_AGAINST_IT)


def is_no(value: Any, number: bool) -> bool:
    """Whether a value is false, spelt in any way; 0 too, where `number`."""
    return str(value).strip().lower() in (("false", "0", "0.0") if number else ("false",))
