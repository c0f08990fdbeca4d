"""Commands of the train room."""

from __future__ import annotations

import argparse
import sys
import traceback

from lumina.commands.checks import alone, before_training
from lumina.commands.common import (
    Arguments,
    Command,
    Parser,
    add_files,
    config_options,
    data_options,
    exit_code_of,
    load_config,
)
from lumina.commands.refusing import refuse_rank
from lumina.terminal import say


def train(arguments: Arguments) -> int:
    """Train a chat model on conversations."""
    from lumina.config import UserError, user_error
    from lumina.files import FormatError

    try:
        config = load_config(arguments)
        if not config.train_data and not config.data:
            raise UserError("no training data", "Give --train-data FILE [FILE …], or train_data in the YAML.")
        before_training(config, arguments.yes)
    except (UserError, OSError, FormatError, UnicodeError) as error:
        if alone():
            raise
        return refuse_rank(error if isinstance(error, UserError) else user_error(error))
    from lumina.train import LostRankError, end_process, train_rank

    ends_here = arguments.own_process or not alone()
    try:
        code = exit_code_of(lambda: train_rank(config), disks=False)
    except LostRankError as error:  # that rank's own log has the traceback
        say(f"error: {error}", file=sys.stderr)
        code = 1
    except Exception:
        if not ends_here:
            raise
        traceback.print_exc()
        code = 1
    return end_process(code) if ends_here else code


def train_options(parser: Parser) -> None:
    config_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--experiment-name", metavar="NAME", help="the run's folder is OUTPUT_DIR/NAME (experiment)")
    run.add_argument("--output-dir", metavar="DIR", help="where runs are kept (experiments)")
    run.add_argument("--resume", nargs="?", const="auto", metavar="auto|RUN|CHECKPOINT", help="continue a run")
    run.add_argument("--init-from", metavar="CHECKPOINT", help="start a new run from these weights")
    run.add_argument("--lora-rank", type=int, metavar="R", help="train adapters of this rank, not the weights (0: off)")
    run.add_argument("--lora-alpha", type=float, metavar="A", help="adapters count A / R times (twice the rank)")
    run.add_argument("--lora-dropout", type=float, metavar="P", help="of the adapters' inputs (0)")
    run.add_argument("--lora-targets", nargs="+", metavar="NAME", help="q_proj, up_proj, … (all seven projections)")
    run.add_argument("--ds_config", "--ds-config", dest="ds_config", metavar="JSON", help="DeepSpeed configuration")
    run.add_argument(
        "--eval-every", dest="eval_every_n_batches", type=int, metavar="N", help="steps between evaluations (500)"
    )
    run.add_argument(
        "--save-every", dest="save_every_n_batches", type=int, metavar="N", help="steps between checkpoints (1000)"
    )
    run.add_argument("--keep-last", type=int, metavar="N", help="checkpoints kept beside the best one (3)")
    run.add_argument(
        "--tracker",
        dest="trackers",
        action="append",
        metavar="NAME",
        help="also send the curves there ({TRACKERS}); may be given several times",
    )
    run.add_argument("--profile", action="store_true", default=None, help="trace a few early steps (RUN/profile)")
    run.add_argument("--yes", action="store_true", help="train a large model on a CPU without being asked")
    run.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it

    data = parser.add_argument_group("data")
    add_files(data, "--train-data", "conversations to train on (JSONL); required here or in the YAML")
    add_files(data, "--eval-data", "conversations to evaluate on")
    data_options(data)

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--objective", metavar="NAME", help="{OBJECTIVES} (sft)")
    optim.add_argument(
        "--dpo-beta", type=float, metavar="B", help="how strongly the model is held to the reference model (0.1)"
    )
    optim.add_argument("--epochs", type=int, metavar="N", help="passes over the training data (10)")
    optim.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps, whatever the epochs say")
    optim.add_argument("--lr", dest="learning_rate", type=float, metavar="LR", help="peak learning rate (1e-4)")
    optim.add_argument("--lr-scheduler", metavar="NAME", help="{SCHEDULES} (cosine)")
    optim.add_argument("--batch-size", type=int, metavar="N", help="samples per device and micro-batch (2)")
    optim.add_argument(
        "--grad-accum", dest="gradient_accumulation_steps", type=int, metavar="N", help="micro-batches per step (4)"
    )
    optim.add_argument("--global-batch-size", type=int, metavar="N", help="samples per step at any world size")
    optim.add_argument("--precision", metavar="auto|fp32|bf16|fp16", help="(auto)")
    optim.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (off)")
    optim.add_argument(
        "--float8", choices=["tensorwise", "rowwise"], help="multiply the blocks' matrices in 8 bits, scaled so (off)"
    )
    optim.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="the same bits at every run on a GPU too; costs time and memory in attention's backward pass (off)",
    )
    optim.add_argument(
        "--gradient-checkpointing",
        nargs="?",
        const=True,
        type=int,
        metavar="N",
        help="recompute every layer, or every Nth, in the backward pass",
    )
    optim.add_argument(
        "--activation-offloading",
        action=argparse.BooleanOptionalAction,
        help="keep the inputs of recomputed layers in the host's memory (off)",
    )
    optim.add_argument(
        "--mlp-tile-tokens",
        type=int,
        metavar="N",
        help="compute the feed-forward N tokens at a time, again in the backward pass, for long contexts (all)",
    )
    optim.add_argument(
        "--attention-head-groups",
        type=int,
        metavar="G",
        help="compute attention for one of G groups of heads at a time, for long contexts (1: all at once)",
    )
    optim.add_argument(
        "--sequence-parallel",
        dest="sequence_parallel_size",
        type=int,
        metavar="P",
        help="P neighbouring ranks share each micro-batch's tokens, for long contexts (1: off)",
    )
    optim.add_argument(
        "--rope-scaling",
        metavar="TYPE[:FACTOR]",
        help="linear, llama3 or yarn: go on with --init-from's weights at a longer --seq-length (off)",
    )
    optim.add_argument("--seed", type=int, help="of the weights and the order of samples (1234)")


COMMANDS: dict[str, Command] = {
    "train": Command(train, train_options),
}
