"""What the ranks of `lumina train` refuse before they have joined each other: told once a machine, and every rank ends.

A rank that ended alone would be waited for, and what each of them meets would be said as often as there are ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lumina.commands.checks import alone
from lumina.commands.common import CommandLineError, exit_code_of

if TYPE_CHECKING:
    from lumina.config import UserError


def refuse(words: Sequence[str], error: CommandLineError) -> int:
    """Tell what the parser refuses of a command line. Returns the exit code; ends a process that is one of several
    ranks."""
    from lumina.config import UserError

    told = UserError(error.message, error.remedy)
    if words[:1] == ["train"] and _one_of_several():
        return refuse_rank(told)

    def raise_it() -> int:
        raise told

    return exit_code_of(raise_it)


def refuse_rank(error: UserError) -> int:
    """What only this rank may have met, such as a file that its node has not, ends all of them."""
    from lumina.train import end_process
    from lumina.train import refuse_rank as refuse_with_others

    return end_process(exit_code_of(lambda: refuse_with_others(error)))


def _one_of_several() -> bool:
    """Whether a launcher started several ranks, as far as its variables say so without contradiction."""
    from lumina.config import UserError

    try:
        return not alone()
    except UserError:
        return False
