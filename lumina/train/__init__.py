"""Training under DeepSpeed: the run, its loop, its checkpoints."""

from lumina.config import Config


def train(config: Config) -> int:
    """Train as `config` says and return the exit code. See lumina.train.run."""
    from lumina.train.run import train as run

    return run(config)


def end_process(code: int) -> int:
    """End the process of a rank whose training returned `code`. See lumina.train.deepspeed.engine."""
    from lumina.train.deepspeed.engine import end_process as end

    return end(code)


__all__ = ["end_process", "train"]
