"""Mutation testing of the laws, by hand (`make mutation`):

    python -m tests.mutation [GROUP ...]        # all groups without one; GROUP: a key of GROUPS

mutmut changes the sources of a group one place at a time, in a copy of the tree under build/mutation/, and runs the
group's tests: what they do not notice has survived. docs/mutation.md keeps what did, and why it may. Afterwards
`cd build/mutation/GROUP && mutmut show NAME` prints a mutant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("lumina", "kernels", "tests", "ds_configs", "launchers", "benchmarks", "docs")
FILES = ("pyproject.toml", "setup.py", "README.md", "CHANGELOG.md")


class Group(NamedTuple):
    sources: tuple[str, ...]  # relative to lumina/
    tests: tuple[str, ...]  # relative to tests/
    leave: str = "long"  # marks (-m "not ...") of tests that are left out
    names: str = ""  # and names (-k "not ...") of such
    sample: str = "*"  # which mutants, by the digit that the number of each ends in: "*[05]" is a fifth of a function's


GROUPS = {
    "order": Group(("data/loading/order.py",), ("data/loading/test_order.py",)),
    "packing": Group(("data/preparing/packing.py",), ("data/preparing/test_packing.py",)),
    "schedule": Group(("train/schedules/*.py",), ("train/schedules",)),
    "loss": Group(("model/loss.py",), ("model/test_output_loss.py",), names="compiled", sample="*[38]"),
    "chat": Group(
        ("chat/template.py", "chat/hf/escaping.py"),
        (
            "chat/test_template.py",
            "chat/hf/test_escaping.py",
            "chat/hf/test_tokenizer.py",
            "data/records/test_fields.py",
        ),
        names="very_same_data",  # eleven seconds
        sample="*[37]",
    ),
    "checkpoint": Group(
        ("checkpoint/integrity.py", "checkpoint/read.py", "checkpoint/write.py", "checkpoint/format.py"),
        (
            "checkpoint/test_write.py",
            "checkpoint/test_read.py",
            "checkpoint/test_saver.py",
            "checkpoint/test_integrity.py",
        ),
        sample="*[37]",
    ),
    # In this process: what runs in one that a test starts is not seen as covered.
    "loop": Group(("train/loop.py", "train/step.py"), ("train/test_loop.py", "train/test_deferred.py"), sample="*[37]"),
    "engine": Group(("train/deepspeed/engine.py",), ("train/deepspeed/test_engine.py",), sample="*[37]"),
}


def prepare(name: str) -> Path:
    """A copy of the tree that mutmut is configured in."""
    folder = ROOT / "build/mutation" / name
    shutil.rmtree(folder, ignore_errors=True)
    for one in COPIED:
        shutil.copytree(ROOT / one, folder / one, ignore=shutil.ignore_patterns("__pycache__"))
    for one in FILES:
        shutil.copy(ROOT / one, folder)
    group = GROUPS[name]
    arguments = ["-p", "no:xdist", "-m", f"not ({group.leave})"]
    if group.names:
        arguments += ["-k", f"not ({group.names})"]
    settings = {
        "source_paths": ["lumina"],
        "only_mutate": [f"lumina/{source}" for source in group.sources],
        "also_copy": [*COPIED[1:], *FILES],
        "pytest_add_cli_args_test_selection": [f"tests/{test}" for test in group.tests],
        "pytest_add_cli_args": arguments,
        "process_isolation": "forkserver",  # of one that has run no test: threads of torch's outlive no fork
        "timeout_multiplier": 3.0,  # many mutants never end
        "timeout_constant": 20.0,  # seconds, times the multiplier: on a loaded machine a test takes as long to begin
    }
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return folder


def main(names: list[str]) -> int:
    for name in names or list(GROUPS):
        folder = prepare(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        mutmut = Path(sys.executable).with_name("mutmut")
        command = [mutmut, "run", "--max-children", "2", GROUPS[name].sample]
        subprocess.run(command, cwd=folder, env=environment, check=True)
        print(f"{name}: not killed:", flush=True)
        subprocess.run([mutmut, "results"], cwd=folder, env=environment, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
