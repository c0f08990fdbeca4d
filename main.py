"""The original command lines, word for word, handed to `lumina`'s commands.

python main.py --config medium --train-data data/train.jsonl          lumina train --config medium …
python main.py --process-oasst IN OUT --max-conversations 10000       lumina process-oasst IN OUT …
python main.py --validate-data FILE --create-report                   lumina validate-data FILE --create-report
python main.py --check-environment                                    lumina check-environment
python main.py --estimate-time --config medium                        lumina estimate-time --config medium
python main.py --test-generation --resume RUN                         lumina generate --resume RUN --prompt …
"""

import sys
from pathlib import Path

from lumina.cli import main

# Flag that chooses the command; the words after it (if any) come first on the new command line.
COMMAND_OF_FLAG = {
    "--process-oasst": "process-oasst",
    "--validate-data": "validate-data",
    "--check-environment": "check-environment",
    "--estimate-time": "estimate-time",
    "--test-generation": "generate",
}
DEFAULT_DATA = Path("data/train.jsonl")
TEST_PROMPT = "Hello, how are you?"


def translate(argv: list[str]) -> list[str]:
    """The arguments of `lumina` for an original command line; training when no flag asks for something else."""
    chosen = [word for word in argv if word in COMMAND_OF_FLAG]
    if len(chosen) > 1:
        sys.exit(f"error: {' and '.join(chosen)} cannot be used together")
    if not chosen:
        if argv in (["-h"], ["--help"]):
            print(__doc__)
            sys.exit(0)
        return ["train", *argv, *_default_data(argv)]
    at = argv.index(chosen[0])
    # The flag's own words move to the front with it, the options around it keep their order.
    rest = [*argv[at + 1 :], *argv[:at]]
    if chosen[0] == "--test-generation" and "--prompt" not in rest:
        rest += ["--prompt", TEST_PROMPT]
    return [COMMAND_OF_FLAG[chosen[0]], *rest]


def _default_data(argv: list[str]) -> list[str]:
    """The original's tuning lines (`--batch-size 1 --grad-accum 8`) name no data; they mean data/train.jsonl."""
    names_data = any(word.partition("=")[0] in ("--train-data", "--resume") for word in argv)
    named_yaml = any(word.endswith((".yaml", ".yml")) for word in argv)
    if names_data or named_yaml or not DEFAULT_DATA.is_file():
        return []
    print(f"no --train-data given: using {DEFAULT_DATA}", file=sys.stderr)
    return ["--train-data", str(DEFAULT_DATA)]


if __name__ == "__main__":
    sys.exit(main(translate(sys.argv[1:])))
