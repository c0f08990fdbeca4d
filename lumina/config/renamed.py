"""Renamed settings: the names and values of an earlier version, which are still read.

YAML files, `--set` pairs and the config.yaml of old runs go through `upgrade`, which says in one line what the new
names are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from lumina.config.errors import UserError

log = logging.getLogger("lumina.config")

_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Renamed(NamedTuple):
    """`new`: the setting's name now. `values`: what true and false mean now, where the setting was a flag."""

    new: str
    values: Mapping[bool, str] | None = None


# Settings, and with a dot the keys inside a nested one; all of version 0.1.0.
RENAMED: dict[str, Renamed] = {
    "answer_spike": Renamed("on_spike"),
    "answer_out_of_memory": Renamed("on_oom", {True: "halve_micro_batch", False: "fail"}),
    "answer_corrupt_sample": Renamed("on_corrupt_sample", {True: "zero_weight", False: "fail"}),
    "health_off": Renamed("disabled_rules"),
    "rope_scaling.original_window": Renamed("rope_scaling.original_max_position_embeddings"),
}


def upgrade(values: Mapping[str, Any], where: str, *, warn: bool = True) -> dict[str, Any]:
    """`values` under today's names, in the same order; one warning names those that changed, unless `warn` is false.
    `where` is what they were read from, for messages.

    Raises:
        UserError: a setting is given under both names, or a flag's value is neither true nor false.
    """
    found, upgraded = _upgrade(values, where, "")
    if found and warn:
        now = ", ".join(f"{old} is {RENAMED[old].new}" for old in found)
        log.warning("%s: read by the names of an earlier version: %s now", where, now)
    return upgraded


def new_name(name: str) -> str:
    """What the setting `name` is called today."""
    return RENAMED[name].new if name in RENAMED else name


def _upgrade(values: Mapping[str, Any], where: str, prefix: str) -> tuple[list[str], dict[str, Any]]:
    found, upgraded = [], {}
    for name, value in values.items():
        old = f"{prefix}{name}"
        if isinstance(value, Mapping):
            inner, value = _upgrade(value, where, f"{old}.")
            found += inner
        if old in RENAMED:
            found.append(old)
            now, meanings = RENAMED[old]
            name = now.removeprefix(prefix)
            if name in values:
                raise UserError(f"{where}: `{old}` is the old name of `{now}`, and both are given", f"Remove `{old}`.")
            value = value if meanings is None else _meaning(old, value, meanings, where)
        upgraded[name] = value
    return found, upgraded


def _meaning(old: str, value: Any, meanings: Mapping[bool, str], where: str) -> str:
    flag = value if isinstance(value, bool) else _FLAGS.get(str(value).lower())
    if flag is None:
        raise UserError(f"{where}: `{old}` (given {value!r}) was true or false", f"Set {RENAMED[old].new} instead.")
    return meanings[flag]
