"""Commands that look at runs."""

from __future__ import annotations

from pathlib import Path

from lumina.commands.common import Arguments, Command, Parser, json_option


def report(arguments: Arguments) -> int:
    """Write one HTML file about a run, or several compared: curves, events, restarts, sample answers, settings."""
    from lumina.checkpoint import run_path
    from lumina.monitor.reports import report_command

    out = Path(arguments.out) if arguments.out else None
    return report_command([run_path(run) for run in arguments.runs], out, show=arguments.open)


def _report_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its name under experiments/")
    parser.add_argument("--out", metavar="FILE", help="where to write it (RUN/report.html of the first run)")
    parser.add_argument("--open", action="store_true", help="then open it in the browser")


def runs(arguments: Arguments) -> int:
    """List the runs in a folder: state, step, best evaluation, age."""
    from lumina.monitor.reports import runs_command

    return runs_command(Path(arguments.folder), json=arguments.json)


def _runs_options(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default="experiments", metavar="DIR", help="(experiments)")
    json_option(parser)


COMMANDS: dict[str, Command] = {
    "report": Command(report, _report_options),
    "runs": Command(runs, _runs_options),
}
