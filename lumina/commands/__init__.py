"""The command line's commands, a file for each room: one function per command, whose docstring is its help, and one
that adds its options. A new command is those two and a row in its file's COMMANDS; a new file is a row here as well.

Rooms are imported inside the functions, so that `lumina --help` and every command that reads or plans without a model
answer without loading torch.
"""

from lumina.commands import checkpoints, cluster, data, infer, monitor, plan, tokenizer, train
from lumina.commands.common import Arguments, Command, CommandLineError, Parser, exit_code_of
from lumina.commands.refusing import refuse

COMMANDS: dict[str, Command] = {
    **train.COMMANDS,
    **checkpoints.COMMANDS,
    **data.COMMANDS,
    **tokenizer.COMMANDS,
    **infer.COMMANDS,
    **monitor.COMMANDS,
    **plan.COMMANDS,
    **cluster.COMMANDS,
}

__all__ = ["COMMANDS", "Arguments", "Command", "CommandLineError", "Parser", "exit_code_of", "refuse"]
