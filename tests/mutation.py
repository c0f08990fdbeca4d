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


GROUPS = {
    "order": Group(("data/loading/order.py",), ("data/loading/test_order.py",)),
    "packing": Group(("data/preparing/packing.py",), ("data/preparing/test_packing.py",)),
    "schedule": Group(("train/schedules/*.py",), ("train/schedules",)),
    "loss": Group(("model/loss.py",), ("model/test_output_loss.py",)),
    "chat": Group(("chat/template.py", "chat/escaping.py"), ("chat", "data/records/test_fields.py")),
    "checkpoint": Group(
        ("checkpoint/integrity.py", "checkpoint/read.py", "checkpoint/write.py", "checkpoint/format.py"),
        ("checkpoint",),
    ),
    "loop": Group(("train/loop.py", "train/step.py"), ("runs/test_learning_rate.py", "runs/test_resume.py")),
    "engine": Group(("train/deepspeed/engine.py",), ("train/deepspeed/test_engine.py",)),
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
    settings = {
        "source_paths": ["lumina"],
        "only_mutate": [f"lumina/{source}" for source in group.sources],
        "also_copy": [*COPIED[1:], *FILES],
        "pytest_add_cli_args_test_selection": [f"tests/{test}" for test in group.tests],
        "pytest_add_cli_args": ["-p", "no:xdist", "-m", "not long"],
        "timeout_multiplier": 3.0,  # many mutants never end
        "timeout_constant": 5.0,
    }
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return folder


def main(names: list[str]) -> int:
    for name in names or list(GROUPS):
        folder = prepare(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        mutmut = Path(sys.executable).with_name("mutmut")
        subprocess.run([mutmut, "run", "--max-children", "2"], cwd=folder, env=environment, check=True)
        print(f"{name}: not killed:", flush=True)
        subprocess.run([mutmut, "results"], cwd=folder, env=environment, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
