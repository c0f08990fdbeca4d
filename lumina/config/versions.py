"""Version check: the installed torch, DeepSpeed and Triton against the versions that Lumina was tried with.

The bounds are setup.py's, read from the installed package's metadata: they are written down once.
"""

from __future__ import annotations

import importlib.metadata
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lumina.config.errors import UserError
from lumina.config.installing import DISTRIBUTION, FORMER_DISTRIBUTION

if TYPE_CHECKING:
    from packaging.requirements import Requirement

log = logging.getLogger(__name__)

#: What Lumina's results depend on beyond a documented interface; other packages' bounds are pip's business.
TRIED = ("torch", "deepspeed", "triton")


class Untried(NamedTuple):
    """A version outside of its bounds. `refused`: runs would break, or be wrong without a word."""

    name: str
    version: str
    bounds: str
    refused: bool

    @property
    def remedy(self) -> str:
        return f"pip install '{self.name}{self.bounds}'"


def untried() -> list[Untried]:
    """The installed versions that are outside of their bounds; none where Lumina itself is not installed by pip.

    Older ones are refused, and so is a newer DeepSpeed, whose private names Lumina uses. A newer torch or Triton is
    allowed: a local build's label (2.11.0a0+nv) counts as its release.
    """
    from packaging.version import Version

    found = []
    for requirement in _stated():
        if requirement.name not in TRIED:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # check-environment says what is missing, and an import does
        release = Version(version).base_version
        if not requirement.specifier.contains(release):
            lows = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
            older = any(Version(release) < low for low in lows)
            refused = older or requirement.name == "deepspeed"
            found.append(Untried(requirement.name, version, str(requirement.specifier), refused))
    return found


def bounds(package: str) -> str:
    """setup.py's bounds of a package as pip takes them (">=0.19.8,<0.20"); empty where Lumina is not installed."""
    return next((str(one.specifier) for one in _stated() if one.name == package), "")


def _stated() -> list[Requirement]:
    """The requirements of the installed Lumina, in setup.py's words; of one that is installed under its former name
    too: a clone that was updated and not installed again."""
    from packaging.requirements import Requirement

    for name in (DISTRIBUTION, FORMER_DISTRIBUTION):
        if name == FORMER_DISTRIBUTION and not is_former(name):
            continue
        with suppress(importlib.metadata.PackageNotFoundError):
            return [Requirement(line) for line in importlib.metadata.requires(name) or []]
    return []


def is_former(name: str) -> bool:
    """Whether an installed distribution is a Lumina, and not another project's of that name: it requires DeepSpeed."""
    try:
        return any(line.startswith("deepspeed") for line in importlib.metadata.requires(name) or [])
    except importlib.metadata.PackageNotFoundError:
        return False


def refuse_untried() -> None:
    """UserError for versions that would break a run; a warning for those that are merely newer."""
    for one in untried():
        message = f"{one.name} {one.version} is none of the versions that Lumina was tried with ({one.bounds})"
        if one.refused:
            raise UserError(f"{message}.", f"{one.remedy}; docs/install.md lists what was tried.")
        log.warning("%s", message)
