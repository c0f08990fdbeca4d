"""What a run shows in a terminal: the console line, or the live view with its curves."""

from lumina.monitor.terminal.console import Console, line

__all__ = ["Console", "line"]
