"""The command line: one function per command, its docstring is its help. Parse, then call one function of one room.

Rooms are imported inside the commands, so that `lumina --help` and every command that reads or plans without a model
answer without loading torch. Exit codes: 0 done, 1 the command found something wrong, 2 the user's mistake (`error: …`
on stderr), 130 interrupted; `train` has its own for a run that saved and stopped on a signal (see lumina.train).
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from lumina.config import Config

Arguments = argparse.Namespace


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations (`--max` would silently become `--max-steps`), and errors in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n  See: {self.prog} --help\n")


def _between(kind: type[int] | type[float], low: float, high: float, *also: float) -> Callable[[str], float]:
    """An argparse type: a number within [low, high], or one of `also`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high or value in also):
            others = "".join(f" or {other:g}" for other in also)
            raise argparse.ArgumentTypeError(f"{text} is outside {low:g} to {high:g}{others}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


# ---------------------------------------------------------------------------------------------------------- train


def train(arguments: Arguments) -> int:
    """Train a chat model on conversations."""
    config = load_config(arguments)
    if not config.train_data and not config.data:
        from lumina.config import UserError

        raise UserError("no training data", "Give --train-data FILE [FILE …], or train_data in the YAML.")
    from lumina.train import end_process
    from lumina.train import train as run

    return end_process(run(config))


def _train_options(parser: _Parser) -> None:
    _config_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--experiment-name", metavar="NAME", help="the run's folder is OUTPUT_DIR/NAME (experiment)")
    run.add_argument("--output-dir", metavar="DIR", help="where runs are kept (experiments)")
    run.add_argument("--resume", nargs="?", const="auto", metavar="auto|RUN|CHECKPOINT", help="continue a run")
    run.add_argument("--init-from", metavar="CHECKPOINT", help="start a new run from these weights")
    run.add_argument("--ds_config", "--ds-config", dest="ds_config", metavar="JSON", help="DeepSpeed configuration")
    run.add_argument("--keep-last", type=int, metavar="N", help="checkpoints kept beside the best one (3)")
    run.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it

    data = parser.add_argument_group("data")
    _add_files(data, "--train-data", "conversations to train on (JSONL); required here or in the YAML")
    _add_files(data, "--eval-data", "conversations to evaluate on")
    _data_options(data)

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, metavar="N", help="passes over the training data (10)")
    optim.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps, whatever the epochs say")
    optim.add_argument("--lr", dest="learning_rate", type=float, metavar="LR", help="peak learning rate (1e-4)")
    optim.add_argument("--lr-scheduler", choices=["cosine", "linear", "onecycle", "constant"], help="(cosine)")
    optim.add_argument("--batch-size", type=int, metavar="N", help="samples per device and micro-batch (2)")
    optim.add_argument(
        "--grad-accum", dest="gradient_accumulation_steps", type=int, metavar="N", help="micro-batches per step (4)"
    )
    optim.add_argument("--global-batch-size", type=int, metavar="N", help="samples per step at any world size")
    optim.add_argument("--precision", metavar="auto|fp32|bf16|fp16", help="(auto)")
    optim.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (off)")
    optim.add_argument(
        "--gradient-checkpointing",
        nargs="?",
        const=True,
        type=int,
        metavar="N",
        help="recompute every layer, or every Nth, in the backward pass",
    )
    optim.add_argument("--seed", type=int, help="of the weights and the order of samples (1234)")


def _config_options(parser: _Parser) -> None:
    parser.add_argument("--config", metavar="PRESET|YAML", help="preset's name or a YAML file (medium)")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="any setting")


def _data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--packing", action=argparse.BooleanOptionalAction, help="pack conversations into windows (on)")
    group.add_argument("--overlong", choices=["split", "truncate", "drop"], help="longer than the window (split)")
    group.add_argument("--cache-dir", metavar="DIR", help="where prepared data is kept")
    group.add_argument("--num-workers", type=int, metavar="N", help="processes that prepare data (one per core)")
    group.add_argument("--eval-fraction", type=float, metavar="F", help="hold this share out of the training data (0)")
    group.add_argument("--dedup", choices=["none", "exact", "near"], help="remove duplicate conversations (none)")


def _add_files(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, nargs="+", action="extend", metavar="FILE", help=text)


def load_config(arguments: Arguments) -> Config:
    """The configuration that the parsed flags describe. A run that is resumed without --config keeps its own."""
    from lumina.config import Config, load
    from lumina.config.load import DEFAULT_PRESET

    given = vars(arguments)
    flags = {name: value for name, value in given.items() if name in Config.model_fields}
    base = arguments.config or _config_of_resumed_run(flags) or DEFAULT_PRESET
    return load(base, flags, arguments.sets)


def _config_of_resumed_run(flags: dict[str, Any]) -> str | None:
    from lumina.config.schema import RunConfig

    resume = flags.get("resume")
    if resume is None:
        return None
    if resume == "auto":
        output_dir, name = (
            flags.get(field) or RunConfig.model_fields[field].default for field in ("output_dir", "experiment_name")
        )
        return _existing(Path(output_dir) / name / "config.yaml")
    # A run's folder, or RUN/checkpoints/NAME, or a file in it.
    start = Path(resume)
    for folder in (start, *list(start.parents)[:3]):
        found = _existing(folder / "config.yaml")
        if found:
            return found
    return None


def _existing(path: Path) -> str | None:
    return str(path) if path.is_file() else None


# ---------------------------------------------------------------------------------------------------------- data


def prepare(arguments: Arguments) -> int:
    """Tokenise, mask and pack conversations into the memory-mapped files that training reads."""
    from lumina.data.commands import prepare_command

    return prepare_command(arguments.files, load_config(arguments), json=arguments.json)


def _prepare_options(parser: _Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations (JSONL)")
    _config_options(parser)
    _data_options(parser.add_argument_group("data"))
    _json_option(parser)


def validate_data(arguments: Arguments) -> int:
    """Check conversations line by line: what would be trained on, masked or dropped, and why."""
    from lumina.data.commands import validate_command

    return validate_command(
        arguments.files, create_report=arguments.create_report, json=arguments.json, fix=arguments.fix
    )


def _validate_data_options(parser: _Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations, in any format that train reads")
    parser.add_argument("--create-report", action="store_true", help="also write FILE.report.html")
    parser.add_argument("--fix", metavar="OUT", help="write the sound records to OUT, the others beside it")
    _json_option(parser)


def inspect_data(arguments: Arguments) -> int:
    """Show what the model will see of one sample: tokens, what is learned, where documents begin."""
    from lumina.data.commands import inspect_command

    return inspect_command(
        arguments.files,
        load_config(arguments),
        sample=arguments.sample,
        table=arguments.table,
        json=arguments.json,
    )


def _inspect_data_options(parser: _Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations, in any format that train reads")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="which packed sample, from 0 (0)")
    parser.add_argument("--table", action="store_true", help="also a line for each token: position, id, weight, target")
    _config_options(parser)
    _data_options(parser.add_argument_group("data"))
    _json_option(parser)


def process_oasst(arguments: Arguments) -> int:
    """Turn OpenAssistant message trees into conversations."""
    from lumina.data.commands import process_oasst_command

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "input", "output")}
    return process_oasst_command(arguments.input, arguments.output, **given)


def _process_oasst_options(parser: _Parser) -> None:
    parser.add_argument("input", metavar="IN", help="trees or flat messages")
    parser.add_argument("output", metavar="OUT", help="conversations to write (JSONL)")
    parser.add_argument("--max-conversations", type=int, metavar="N", help="stop after N conversations")
    parser.add_argument("--threads", default="all", metavar="WHICH", help="which paths of a tree (all)")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K best-ranked answers at each turn")
    parser.add_argument("--lang", metavar="A,B", help="only these languages")
    parser.add_argument("--tree-state", default="ready_for_export", metavar="A,B", help="only trees in these states")
    parser.add_argument("--include-deleted", action="store_true", help="also messages that were deleted")
    parser.add_argument("--include-synthetic", action="store_true", help="also messages that a model wrote")
    parser.add_argument("--min-quality", type=float, metavar="Q", help="only messages labelled at least this good")
    parser.add_argument("--max-toxicity", type=float, metavar="T", help="only messages labelled at most this toxic")
    _json_option(parser)


# ---------------------------------------------------------------------------------------------------------- planning


def check_environment(arguments: Arguments) -> int:
    """Check this machine for training: each line OK, WARN or FAIL, with what to do about it."""
    from lumina.plan import check_environment_command

    return check_environment_command(json=arguments.json)


def estimate_time(arguments: Arguments) -> int:
    """Estimate memory, time and cost of a run before paying for it."""
    from lumina.plan import estimate_time_command

    return estimate_time_command(load_config(arguments), arguments)


def _estimate_time_options(parser: _Parser) -> None:
    from lumina.plan.options import add_estimate_options

    _train_options(parser)
    add_estimate_options(parser)
    _json_option(parser)


def plan(arguments: Arguments) -> int:
    """Find the fastest way to train on a cluster that fits, and write the files to start it."""
    from lumina.plan import plan_command

    return plan_command(load_config(arguments), arguments)


def _plan_options(parser: _Parser) -> None:
    from lumina.plan.options import add_plan_options

    _estimate_time_options(parser)
    add_plan_options(parser)


# ---------------------------------------------------------------------------------------------------------- use


def generate(arguments: Arguments) -> int:
    """Answer a prompt with a trained model."""
    from lumina.infer import generate_command

    return generate_command(
        run=arguments.resume,
        prompt=arguments.prompt,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        max_length=arguments.max_length,
        seed=arguments.seed,
        json=arguments.json,
    )


def _generate_options(parser: _Parser) -> None:
    parser.add_argument("--resume", required=True, metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--prompt", required=True, help="what the user says")
    _sampling_options(parser)
    _json_option(parser)


def _sampling_options(parser: _Parser) -> None:
    parser.add_argument(
        "--temperature", type=_between(float, 0.1, 2.0, 0), default=0.8, help="0.1 to 2.0, or 0 for greedy (0.8)"
    )
    parser.add_argument("--top-k", type=_between(int, 1, 100), default=50, help="1 to 100 likeliest tokens (50)")
    parser.add_argument("--top-p", type=_between(float, 0.1, 1.0), default=0.9, help="0.1 to 1.0 of the mass (0.9)")
    parser.add_argument("--max-length", type=_between(int, 1, 2048), default=256, help="new tokens, 1 to 2048 (256)")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same answer")


def chat(arguments: Arguments) -> int:
    """Talk to a trained model in the terminal."""
    from lumina.infer import chat_command

    return chat_command(
        run=arguments.run,
        system=arguments.system,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        max_length=arguments.max_length,
        seed=arguments.seed,
    )


def _chat_options(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    _sampling_options(parser)


def export(arguments: Arguments) -> int:
    """Write a trained model as a folder that transformers and vLLM load."""
    from lumina.infer import export_command

    return export_command(
        run=arguments.run,
        out=arguments.out,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        json=arguments.json,
    )


def _export_options(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not hold anything yet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(float32)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest weight file (5GB)")
    _json_option(parser)


def import_(arguments: Arguments) -> int:
    """Take a Llama-shaped Hugging Face model from disk, as a run that other commands use."""
    from lumina.infer import import_command

    return import_command(source=arguments.source, out=arguments.out, json=arguments.json)


def _import_options(parser: _Parser) -> None:
    parser.add_argument("source", metavar="HF_DIR", help="folder with config.json, safetensors and tokenizer.json")
    parser.add_argument("out", metavar="OUT", help="run's folder to write, such as experiments/NAME")
    _json_option(parser)


def evaluate(arguments: Arguments) -> int:
    """Measure a model on conversations it was not trained on: loss, perplexity, bits per byte, by role and turn."""
    from lumina.infer import evaluate_command

    return evaluate_command(run=arguments.run, data=arguments.data, json=arguments.json)


def _evaluate_options(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN|CHECKPOINT", help="the trained model")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="conversations, as train reads them")
    _json_option(parser)


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


def _config_show_options(parser: _Parser) -> None:
    parser.add_argument("action", choices=["show"], help="show")
    parser.add_argument("preset", metavar="PRESET|YAML")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="any setting")
    _json_option(parser)


# ---------------------------------------------------------------------------------------------------------- the rest


class Command(NamedTuple):
    run: Callable[[Arguments], int]
    add_options: Callable[[_Parser], None]


def _json_option(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, messages on stderr")


COMMANDS: dict[str, Command] = {
    "train": Command(train, _train_options),
    "prepare": Command(prepare, _prepare_options),
    "validate-data": Command(validate_data, _validate_data_options),
    "process-oasst": Command(process_oasst, _process_oasst_options),
    "inspect": Command(inspect_data, _inspect_data_options),
    "generate": Command(generate, _generate_options),
    "chat": Command(chat, _chat_options),
    "evaluate": Command(evaluate, _evaluate_options),
    "export": Command(export, _export_options),
    "import": Command(import_, _import_options),
    "config": Command(config, _config_show_options),
    "check-environment": Command(check_environment, _json_option),
    "estimate-time": Command(estimate_time, _estimate_time_options),
    "plan": Command(plan, _plan_options),
}


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False))


def build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The whole parser, and the parser of each command."""
    from lumina import __version__

    parser = _Parser(prog="lumina", description="Train conversational transformers with DeepSpeed, and talk to them.")
    parser.add_argument("--version", action="version", version=f"lumina {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    each = {}
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        each[name] = commands.add_parser(name, help=text, description=text)
        command.add_options(each[name])
    return parser, each


def parse(argv: Sequence[str]) -> Arguments:
    """Parse, or exit 2 with a did-you-mean for an unknown command or option."""
    parser, each = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        parser.error(f"no such command: {argv[0]}.{_hint(argv[0], COMMANDS)}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = each[arguments.command]
        options = [option for option in command._option_string_actions if option.startswith("--")]
        first = unknown[0].partition("=")[0]
        hint = _hint(first, options) if first.startswith("-") else ""
        command.error(f"unknown {'option' if first.startswith('-') else 'argument'}: {unknown[0]}.{hint}")
    return arguments


def _hint(word: str, known: Sequence[str] | dict[str, Command]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        return COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lumina config show medium | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from lumina.config.errors import UserError

        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
