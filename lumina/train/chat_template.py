"""Which of Lumina's chat templates a run is trained with: what its checkpoint or its initial weights were taught."""

from __future__ import annotations

import logging
from pathlib import Path

from lumina.chat import NEWEST_TEMPLATE, recorded_template
from lumina.checkpoint import read_trainer_state
from lumina.config import Config, UserError

log = logging.getLogger("lumina")


def with_template(config: Config, resumed: Path | None, weights: Path | None) -> Config:
    """`config` with the name of the template: that of the checkpoint `resumed` which the run goes on from; else the
    setting; else what the checkpoint `weights` that it begins with was taught; else the newest. Unchanged where the
    tokenizer is an imported model's. UserError where the setting differs from the checkpoint to go on from."""
    if config.tokenizer is not None:
        return config
    if resumed is not None:
        taught = _taught(resumed)
        if config.chat_template not in (None, taught):
            raise UserError(
                f"{resumed} was trained with the chat template {taught}, not {config.chat_template}",
                "Leave chat_template out to go on, or start another run with --init-from.",
            )
        return config.replace(chat_template=taught)
    if config.chat_template is not None:
        return config
    return config.replace(chat_template=NEWEST_TEMPLATE if weights is None else _taught(weights))


def say_taught(weights: Path, config: Config) -> None:
    """Say which template the checkpoint `weights` was taught, where that is not the newest, or not what the run that
    begins with it is trained with."""
    if config.tokenizer is not None:
        return
    taught, used = _taught(weights), config.chat_template
    if taught != used:
        log.warning("%s was taught the chat template %s; this run is trained with %s", weights, taught, used)
    elif taught != NEWEST_TEMPLATE:
        log.info("chat template %s, which %s was taught (the newest: %s)", taught, weights, NEWEST_TEMPLATE)


def _taught(source: Path) -> str:
    return recorded_template(read_trainer_state(source)[0].chat_template)
