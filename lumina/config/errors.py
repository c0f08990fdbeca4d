"""The one exception for a user's mistake, and the hint that goes with a misspelt name.

An error of a file system is a user's mistake too: `user_error` words it.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from lumina.files import FormatError

if TYPE_CHECKING:
    from pydantic import ValidationError

_REMEDIES = {
    errno.ENOSPC: "Free some space, or choose another place (df -h and df -i show what is left).",
    errno.EDQUOT: "Free some space, or choose another place: this user's share of the disk is used up.",
    errno.EACCES: "Change its permissions, or choose another place.",
    errno.EPERM: "Change its permissions, or choose another place.",
    errno.EROFS: "Its file system is mounted read-only: choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 65536.",
}


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    The command line prints it as ``error: …`` on stderr and exits 2, without a traceback. Broken invariants of the
    program itself are `assert`s and keep theirs.

    repeated: every rank of this machine raises it, and the one with local rank 0 prints it.
    """

    repeated = False

    def __init__(self, message: str, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message}\n  {remedy}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as `` Did you mean `hidden_size`?`` (leading space), or the empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""


def user_error(error: OSError | FormatError | UnicodeError) -> UserError:
    """What a file system, or a file's contents, did, as one message: the path, the reason, and what helps. Rooms say
    more where they know more; this is for what comes through them, and the command line's outermost layer tells it."""
    if not isinstance(error, OSError):
        told = UserError(str(error))
    else:
        paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
        reason = error.strerror or str(error) or type(error).__name__
        remedy = _REMEDIES.get(error.errno) if error.errno is not None else None
        told = UserError(f"{' -> '.join(paths)}: {reason}" if paths else reason, remedy)
    told.repeated = getattr(error, "repeated", False)
    return told


def explain_values(error: ValidationError, origin: Mapping[str, str] = MappingProxyType({})) -> str:
    """pydantic's findings as one line each: where, which key, which value, what was expected."""
    found: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if not name:
            found.setdefault(message, message)
        elif name in found:  # a union (`bool or int`) reports once per member
            found[name] += f", or {message.removeprefix('input ')}"
        else:
            shown = repr(item["input"])
            shown = shown if len(shown) <= 200 else shown[:200] + "…"
            given = "" if item["type"] == "missing" else f" (given {shown})"
            at = f"{origin[name]}: " if name in origin else ""
            found[name] = f"{at}`{name}`{given}: {message}"
    return "; ".join(found.values())
