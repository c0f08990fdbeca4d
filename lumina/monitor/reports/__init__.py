"""Reports on runs from their files: the HTML report, the list of runs, the loss curve as a picture."""

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.monitor.reports.html import render, report_command
    from lumina.monitor.reports.loss_curve import plot_loss
    from lumina.monitor.reports.run_data import RunData
    from lumina.monitor.reports.runs import list_runs, runs_command

__getattr__ = names_of(
    __name__,
    {
        "RunData": "run_data",
        "list_runs": "runs",
        "plot_loss": "loss_curve",
        "render": "html",
        "report_command": "html",
        "runs_command": "runs",
    },
)

__all__ = ["RunData", "list_runs", "plot_loss", "render", "report_command", "runs_command"]
