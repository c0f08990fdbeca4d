"""Installation commands: the distribution's name on the package index, and the line that installs an extra of it.

On the package index `lumina`, our import name, is another project's distribution.
"""

from __future__ import annotations

import shlex
from pathlib import Path

DISTRIBUTION = "lumina-train"
FORMER_DISTRIBUTION = "lumina"  # up to version 0.2.0, which was installed from a clone


def install_command(extra: str = "", *options: str) -> str:
    """The shell command that installs what this Lumina requires, or an extra of setup.py too: from the clone that it is
    imported from, or by the distribution's name, which is installed and so is not looked for on the index."""
    root = Path(__file__).resolve().parents[2]
    wanted = f"[{extra}]" if extra else ""
    words = ["-e", f"{root}{wanted}"] if (root / "setup.py").is_file() else [f"{DISTRIBUTION}{wanted}"]
    return shlex.join(["pip", "install", *options, *words])
