"""Summary of a finished run beside the unigram baseline: `python -m lumina.train.summary RUN`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lumina.config import UserError, load
from lumina.terminal import say


def summarise(folder: Path) -> int:
    """Print the unigram baseline and the best evaluation loss, and draw RUN/loss.png. Returns 0 when the run beats the
    baseline, 1 when it does not."""
    from lumina.chat import open_tokenizer
    from lumina.data import prepare_splits, unigram_baseline
    from lumina.monitor import read_metrics
    from lumina.monitor.reports import plot_loss

    settings = folder / "config.yaml"
    if not settings.exists():
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml", "Give experiments/NAME.")
    config = load(str(settings), {}, [])
    if not config.eval_data and not config.eval_fraction:
        raise UserError(f"{folder} was trained without --eval-data, so there is nothing to compare")
    losses = [
        r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval" and r["loss"] is not None
    ]
    if not losses:
        raise UserError(f"{folder} has no evaluation yet", "Train it to its first evaluation.")
    tokenizer = open_tokenizer(config.tokenizer, config.chat_template)
    train_data, eval_data = prepare_splits(config, tokenizer)
    assert eval_data is not None
    baseline, best = unigram_baseline(train_data, eval_data, config.vocab_size), min(losses)
    plot_loss(folder, folder / "loss.png", baseline)
    say(f"Unigram baseline {baseline:.4f} | Eval loss {best:.4f} (nats per supervised token)")
    say(f"Loss curve       {folder / 'loss.png'}")
    return 0 if best < baseline else 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m lumina.train.summary",
        description="Print a run's best evaluation loss beside the unigram baseline, and draw RUN/loss.png.",
        epilog="Exit code 1 where the run is no better than the baseline, 2 where there is nothing to compare.",
    )
    run = Path("experiments/experiment")
    parser.add_argument("run", nargs="?", type=Path, default=run, metavar="RUN", help=str(run))
    try:
        return summarise(parser.parse_args().run)
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
