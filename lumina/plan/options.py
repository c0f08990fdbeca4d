"""The options of `lumina estimate-time` and `lumina plan`, apart so that `lumina --help` loads nothing else."""

from __future__ import annotations

import argparse


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """The cluster, the price, and what the data is like where no file says so."""
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=_positive, default=1, metavar="N", help="machines (1)")
    cluster.add_argument("--gpus-per-node", type=_positive, default=1, metavar="M", help="GPUs in each (1)")
    cluster.add_argument("--gpu", metavar="NAME", help="such as a100-80gb or h100; without it, the one in this machine")
    cluster.add_argument(
        "--host-us",
        type=_positive,
        nargs=2,
        metavar=("F", "B"),
        help="host time of one layer, forward and backward, in us (benchmarks/host_time.py)",
    )
    cluster.add_argument("--zero", type=int, choices=[0, 1, 2, 3], help="ZeRO stage, where no --ds_config says it")
    cluster.add_argument("--price", type=float, metavar="USD", help="of one GPU-hour")
    cluster.add_argument("--measure", action="store_true", help="time a few real steps on this machine")

    data = parser.add_argument_group("data, where no --train-data is given")
    data.add_argument("--tokens", type=float, metavar="N", help="tokens in the training data (20 per parameter)")
    data.add_argument("--document-tokens", type=_positive, metavar="N", help="tokens of a conversation (the window)")
    data.add_argument("--supervised", type=float, default=1.0, metavar="SHARE", help="share of tokens learnt from (1)")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What `lumina plan` takes beside estimate-time's options."""
    parser.add_argument(
        "--quantized-weights",
        action="store_true",
        help="also try ZeRO 3 with weights gathered as 8-bit integers, which rounds them in every pass",
    )
    parser.add_argument("--write", metavar="DIR", help="write config.yaml, ds_config.json, hostfile and train.sbatch")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
