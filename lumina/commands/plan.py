"""Commands that plan without a model: configuration, environment, estimates."""

from __future__ import annotations

from lumina.commands.common import Arguments, Command, Parser, between, json_option, load_config, print_json
from lumina.commands.train import train_options


def config(arguments: Arguments) -> int:
    """Show a preset or YAML file with every value filled in, and its true parameter counts."""
    from lumina.config import load

    shown = load(arguments.preset, {}, arguments.sets)
    counts = {
        "without_embeddings": shown.num_parameters(with_embeddings=False),
        "with_embeddings": shown.num_parameters(with_embeddings=True),
    }
    if arguments.json:
        print_json({"config": shown.values(), "ffn_size": shown.ffn_size, "parameters": counts})
        return 0
    print(shown.to_yaml(), end="")
    print(f"# feed-forward width: {shown.ffn_size}")
    print(f"# parameters: {counts['without_embeddings']:,} without embeddings, {counts['with_embeddings']:,} with")
    return 0


def _config_show_options(parser: Parser) -> None:
    parser.add_argument("action", choices=["show"], help="show")
    parser.add_argument("preset", metavar="PRESET|YAML")
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
    from lumina.plan import check_environment_command

    return check_environment_command(json=arguments.json)


def _check_environment_options(parser: Parser) -> None:
    parser.add_argument("--hostfile", metavar="FILE", help="ask these machines, and try what is between them")
    parser.add_argument("--output-dir", metavar="DIR", help="that they must share (experiments)")
    parser.add_argument("--port", type=between(int, 0, 65535), metavar="N", help="to try between nodes (any free one)")
    parser.add_argument("--timeout", type=between(float, 1, 86400), metavar="S", help="for all of it (120)")
    json_option(parser)


def estimate_time(arguments: Arguments) -> int:
    """Estimate memory, time and cost of a run before paying for it."""
    from lumina.plan import estimate_time_command

    return estimate_time_command(load_config(arguments), arguments)


def _estimate_time_options(parser: Parser) -> None:
    from lumina.plan.options import add_estimate_options

    train_options(parser)
    add_estimate_options(parser)
    json_option(parser)


def plan(arguments: Arguments) -> int:
    """Find the fastest way to train on a cluster that fits, and write the files to start it."""
    from lumina.plan import plan_command

    return plan_command(load_config(arguments), arguments)


def _plan_options(parser: Parser) -> None:
    from lumina.plan.options import add_plan_options

    _estimate_time_options(parser)
    add_plan_options(parser)


COMMANDS: dict[str, Command] = {
    "config": Command(config, _config_show_options),
    "check-environment": Command(check_environment, _check_environment_options),
    "estimate-time": Command(estimate_time, _estimate_time_options),
    "plan": Command(plan, _plan_options),
}
