"""Commands that plan without a model: configuration, environment, estimates."""

from __future__ import annotations

from lumina.commands.common import Arguments, Command, Parser, json_option, load_config, print_json
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
    """Check this machine for training: each line OK, WARN or FAIL, with what to do about it."""
    from lumina.plan import check_environment_command

    return check_environment_command(json=arguments.json)


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
    "check-environment": Command(check_environment, json_option),
    "estimate-time": Command(estimate_time, _estimate_time_options),
    "plan": Command(plan, _plan_options),
}
