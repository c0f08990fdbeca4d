"""Commands that plan without a model: configuration, environment, estimates."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys

from lumina.commands.common import Arguments, Command, Parser, between, json_option, load_config, print_json
from lumina.commands.train import train_options
from lumina.terminal import say

log = logging.getLogger("lumina")


def config(arguments: Arguments) -> int:
    """Show a preset or YAML file with every value filled in and explained; or the reference of all settings."""
    from lumina.config import UserError, commented_yaml, load, settings_reference

    if arguments.action == "reference":
        say(settings_reference(_flags()), end="")
        return 0
    if arguments.preset is None:
        raise UserError("no configuration", "Give one: lumina config show PRESET, or a YAML file.")
    shown = load(arguments.preset, {}, arguments.sets)
    counts = {
        "without_embeddings": shown.num_parameters(with_embeddings=False),
        "with_embeddings": shown.num_parameters(with_embeddings=True),
    }
    if arguments.json:
        print_json({"config": shown.values(), "ffn_size": shown.ffn_size, "parameters": counts})
        return 0
    say(commented_yaml(shown), end="")
    say(f"# feed-forward width: {shown.ffn_size}")
    say(f"# parameters: {counts['without_embeddings']:,} without embeddings, {counts['with_embeddings']:,} with")
    return 0


def _flags() -> dict[str, str]:
    """The flag of `lumina train` for each setting that has one."""
    parser = Parser()
    train_options(parser)
    found = {action.dest: action.option_strings[-1 if action.dest == "ds_config" else 0] for action in parser._actions}
    return {name: flag for name, flag in found.items() if flag.startswith("--")}


def _config_show_options(parser: Parser) -> None:
    parser.add_argument("action", choices=["show", "reference"], help="show, or reference: every setting in Markdown")
    parser.add_argument("preset", nargs="?", metavar="PRESET|YAML")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="any setting")
    json_option(parser)


def check_environment(arguments: Arguments) -> int:
    """Check this machine, or all of a hostfile, for training: OK, WARN or FAIL, with what to do about it."""
    if arguments.hostfile is not None:
        from lumina.cluster import preflight_command

        return preflight_command(
            arguments.hostfile,
            arguments.output_dir,
            arguments.port or 0,
            arguments.timeout or 120.0,
            json_output=arguments.json,
        )
    for name in ("output_dir", "port", "timeout"):
        if getattr(arguments, name) is not None:
            from lumina.config import UserError

            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is about the nodes of a hostfile", "Give --hostfile FILE, or leave it out.")
    return _check_this_machine(arguments.json)


def _check_this_machine(as_json: bool) -> int:
    """Print what was found; 0 when nothing FAILs, else 1."""
    log.info("checking this machine: loading PyTorch and DeepSpeed")
    from lumina.plan import check_all

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
        results = check_all()
    failed = sum(result.level == "FAIL" for result in results)
    if as_json:
        print_json({"ok": not failed, "findings": [result._asdict() for result in results]})
        return 1 if failed else 0
    for result in results:
        remedy = f"  -> {result.remedy}" if result.remedy else ""
        say(f"{result.level:4}  {result.name:22} {result.detail}{remedy}")
    warned = sum(result.level == "WARN" for result in results)
    say(f"\n{len(results)} checks: {failed} failed, {warned} warnings")
    return 1 if failed else 0


def _check_environment_options(parser: Parser) -> None:
    parser.add_argument("--hostfile", metavar="FILE", help="ask these machines, and try what is between them")
    parser.add_argument("--output-dir", metavar="DIR", help="that they must share (experiments)")
    parser.add_argument("--port", type=between(int, 0, 65535), metavar="N", help="to try between nodes (any free one)")
    parser.add_argument("--timeout", type=between(float, 1, 86400), metavar="S", help="for all of it (120)")
    json_option(parser)


def estimate_time(arguments: Arguments) -> int:
    """Estimate memory, time and cost of a run before paying for it."""
    from lumina.plan import print_estimate

    return print_estimate(load_config(arguments), arguments)


def _estimate_time_options(parser: Parser) -> None:
    train_options(parser)
    _cluster_options(parser)
    json_option(parser)


def _cluster_options(parser: Parser) -> None:
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
    data.add_argument("--document-tokens", type=_positive, metavar="N", help="tokens of a conversation (the context)")
    data.add_argument(
        "--supervised", type=float, default=1.0, metavar="SHARE", help="supervised share of the tokens (1)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def plan(arguments: Arguments) -> int:
    """Find the fastest way to train on a cluster that fits, and write the files to start it."""
    from lumina.plan import print_plan

    return print_plan(load_config(arguments), arguments)


def _plan_options(parser: Parser) -> None:
    _estimate_time_options(parser)
    parser.add_argument(
        "--quantized-weights",
        action="store_true",
        help="also try ZeRO 3 with weights gathered as 8-bit integers, which rounds them in every pass",
    )
    parser.add_argument("--write", metavar="DIR", help="write config.yaml, ds_config.json, hostfile and train.sbatch")


COMMANDS: dict[str, Command] = {
    "config": Command(config, _config_show_options),
    "check-environment": Command(check_environment, _check_environment_options),
    "estimate-time": Command(estimate_time, _estimate_time_options),
    "plan": Command(plan, _plan_options),
}
