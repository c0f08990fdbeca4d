"""The loss curve of a run as a PNG, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from lumina.config import UserError
from lumina.monitor.metrics import read_metrics


def plot_loss(run: Path, out: Path, baseline: float | None = None) -> None:
    """Draw training and evaluation loss over steps, and the unigram baseline if given (nats per supervised token)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = list(read_metrics(run / "metrics.jsonl"))
    steps = [r for r in records if r["kind"] == "step" and r["loss"] is not None]
    evaluations = [r for r in records if r["kind"] == "eval" and r["loss"] is not None]
    if not steps:
        raise UserError(f"{run / 'metrics.jsonl'} has no steps", "Train the run first.")
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#7aa6d8", linewidth=1, label="training")
    if evaluations:
        places, losses = [r["step"] for r in evaluations], [r["loss"] for r in evaluations]
        axes.plot(places, losses, color="#c2410c", marker="o", markersize=4, label="evaluation")
    if baseline is not None:
        axes.axhline(baseline, color="#6b7280", linestyle="--", linewidth=1, label="unigram baseline")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_title(run.name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)
