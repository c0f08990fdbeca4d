"""Training under DeepSpeed: the run, its loop, its checkpoints."""

from lumina.config import Config


def train(config: Config) -> int:
    """Train as `config` says and return the exit code. See lumina.train.run."""
    from lumina.train.run import train as run

    return run(config)


__all__ = ["train"]
