"""Terminal output of a run: the console line, or the live view with its curves."""

from lumina.monitor.terminal.console import Console, line

__all__ = ["Console", "line"]
