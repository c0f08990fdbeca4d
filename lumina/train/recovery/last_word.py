"""Why one rank ends, for those that lose it: a file in the run's folder, since it is the only thing that all of them
still have. The process group's store goes with rank 0, and the others sit in a collective until the rank is gone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lumina.config import UserError
from lumina.files import read_json, write_json
from lumina.train.deepspeed import Ranks

FILE = "ending.json"


class RestartError(RuntimeError):
    """This start must end, and the next one resumes. Nothing is saved first: the ranks may be at different steps."""


class LastWord:
    """Of the ranks of one start. What a rank alone comes to, memory that runs out in the middle of a collective or a
    file that it alone cannot read, so ends all of them with one message and the same exit code: 2 for a UserError, and
    1 for a RestartError, after which a launcher starts them again."""

    def __init__(self, ranks: Ranks, folder: Path, may_write: Callable[[], bool] = lambda: True) -> None:
        """`may_write`: false once another start owns the run's `folder`."""
        self._ranks, self._file, self._may_write = ranks, folder / FILE, may_write

    def leave(self, error: UserError | RestartError) -> None:
        """Before this rank ends by `error`. A disk that refuses it leaves the others with what they meet themselves."""
        if self._ranks.world == 1 or not self._may_write():
            return
        said = {"start": self._ranks.start, "rank": self._ranks.rank, "host": socket.gethostname()}
        user = {"message": error.message, "remedy": error.remedy} if isinstance(error, UserError) else None
        with suppress(OSError):
            write_json(self._file, {**said, "user": user, "restart": None if user else str(error)})

    def found(self) -> UserError | RestartError | None:
        """What another rank of this start has left, for one that has lost a rank."""
        try:
            said = read_json(self._file)
            if said["start"] != self._ranks.start or said["rank"] == self._ranks.rank:
                return None
            if said["user"] is None:
                return RestartError(said["restart"])
            error = UserError(said["user"]["message"], said["user"]["remedy"])
            # Told by the rank that met it, and by one of every other machine, whose log may be its own.
            error.repeated = said["host"] == socket.gethostname() or self._ranks.local_rank != 0
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return error
