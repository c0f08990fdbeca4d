"""The list of DeepSpeed's private names is all that is used of them and holds for the installed version; a name that is
gone ends the start."""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from lumina.train.deepspeed import init_process_group, startup, surface
from lumina.train.deepspeed.half_precision import LossScale
from lumina.train.deepspeed.surface import Wrapper
from tests.train.tiny_engines import batch, make_engine

ROOT = Path(__file__).parents[3]
ROOM = ROOT / "lumina" / "train" / "deepspeed"
LISTED = {name.name for name in surface.NAMES}
#: Documented by DeepSpeed.
PUBLIC = {
    "CPUAdamBuilder",
    "DeepSpeedCPUAdam",
    "Init",
    "current_stream",
    "default_stream",
    "destroy",
    "init_distributed",
    "initialize",
    "module",
    "resolves_data_dependency",
    "safe_get_local_grad",
    "set_gradient_accumulation_boundary",
    "set_z3_leaf_modules",
    "synchronize",
}
PUBLIC_MODULES = {
    "deepspeed",
    "deepspeed.accelerator",
    "deepspeed.utils",
    "deepspeed.ops.adam",
    "deepspeed.ops.op_builder",
    # docs: Activation Checkpointing, by this path
    "deepspeed.runtime.activation_checkpointing.checkpointing",
}


def trees(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text())


def accessed(tree: ast.Module) -> set[str]:
    """Names of attributes, written out or given to getattr and its like or to vars(...)[...]."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        elif (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and ast.unparse(node.value).startswith(("vars(", "self._replaced"))
        ):
            found.add(node.slice.value)
    return {name for name in found if isinstance(name, str)}


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of DeepSpeed; name is empty for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            yield from ((module, one.name) for one in node.names if module.split(".")[0] == "deepspeed")
        elif isinstance(node, ast.Import):
            yield from ((one.name, "") for one in node.names if one.name.split(".")[0] == "deepspeed")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("deepspeed."):
            yield node.value, ""


def defined(tree: ast.Module) -> Iterator[str]:
    """Names of functions, classes and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def others() -> set[str]:
    """Names that objects of torch and of the standard library have: no sign of DeepSpeed."""
    objects: list[Any] = [
        torch,
        torch.Tensor,
        torch.nn.Module,
        torch.optim.AdamW,
        torch.distributed,
        torch.cuda,
        torch.nn,
        torch.linalg,
        torch.autograd,
        os,
        sys.modules["logging"],
        Path,
        slice(0),
        builtins,
        "",
        {},
        [],
    ]
    return {name for one in objects for name in dir(one)}


@pytest.fixture(scope="module")
def theirs() -> set[str]:
    """Every name that DeepSpeed's own source defines, where Lumina could meet it."""
    root = Path(deepspeed.__file__).parent
    folders = [root / name for name in ("runtime", "comm", "utils", "accelerator", "ops/op_builder")]
    names = {name for _, tree in trees(*folders) for name in defined(tree)}
    # What an import binds in a module is replaced in it by name.
    return names | {"get_accelerator", "is_invalid_grad_norm"}


def test_what_the_folder_uses_is_what_is_listed(theirs: set[str]) -> None:
    ours = {name for _, tree in trees(ROOM) for name in defined(tree)}
    used: set[str] = set()
    modules: set[tuple[str, str]] = set()
    for path, tree in trees(ROOM):
        if path.name != "surface.py":
            used |= accessed(tree)
            modules |= set(imported(tree))
    owners = {name.owner.replace(":", ".") for name in surface.NAMES}
    unlisted = (used & theirs) - others() - ours - LISTED - PUBLIC
    assert unlisted == set(), "private names of DeepSpeed that surface.py does not list"
    for module, name in modules:
        path_ = ".".join(filter(None, (module, name)))
        known = name in LISTED | PUBLIC or any(owner == path_ or owner.startswith(f"{path_}.") for owner in owners)
        assert known or (module in PUBLIC_MODULES and not name), f"{path_} is neither listed nor public"
    # Collectives are taken from the list itself, a loss scale's state by LossScale's names, a constructor's arguments
    # are given by DeepSpeed, and a module is imported for what its import does.
    by_other_means = {*surface.COLLECTIVES, *LossScale.NAMES, "__init__", "MuonWithAuxAdam"}
    assert LISTED - used - {name for _, name in modules} - by_other_means == set(), "listed, and not used"


def test_nothing_outside_of_the_folder_uses_them() -> None:
    folders = (ROOT / "lumina", ROOT / "kernels", ROOT / "launchers")
    outside = [(path, tree) for path, tree in trees(*folders) if ROOM not in path.parents]
    everywhere = {name for _, tree in outside for name in defined(tree)}
    telling = LISTED - others() - everywhere - PUBLIC - {"is_compatible"}  # the builder's, public
    assert {"_hp_mapping", "ds_tensor", "fp32_partitioned_groups_flat", "_get_norm_groups"} <= telling
    for path, tree in outside:
        assert accessed(tree) & telling == set(), path
        assert {module for module, _ in imported(tree)} <= PUBLIC_MODULES, path


WRAPPERS: list[tuple[Wrapper, int, str, dict[str, Any]]] = [
    (Wrapper.NONE, 0, "fp32", {}),
    (Wrapper.HALF, 0, "bf16", {}),
    (Wrapper.HALF, 0, "fp16", {}),
    (Wrapper.ZERO_1_2, 1, "fp32", {}),
    (Wrapper.BF16, 1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
    (Wrapper.ZERO_1_2, 2, "fp16", {}),
    (Wrapper.ZERO_1_2, 1, "bf16", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    (Wrapper.ZERO_3, 3, "bf16", {}),
    (Wrapper.ZERO_3, 3, "fp16", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
]


def test_the_installed_deepspeed_has_every_name() -> None:
    """By its code, as the start looks at it, and on real engines of every wrapper, in the middle of a step."""
    init_process_group()
    surface.check()
    seen: set[tuple[str, str]] = set()
    of_instances = {
        surface.ENGINE: lambda made: made.ds,
        surface.ZERO_1_2: lambda made: made.wrapped if made.wrapper is Wrapper.ZERO_1_2 else None,
        surface.ZERO_3: lambda made: made.wrapped if made.wrapper is Wrapper.ZERO_3 else None,
        surface.BF16: lambda made: made.wrapped if made.wrapper is Wrapper.BF16 else None,
        surface.SCALER: lambda made: made.wrapped.loss_scaler if made.fp16 and made.stage else None,
        f"{surface.OFFLOAD}:DeepSpeedZeRoOffload": lambda made: (
            made.wrapped.parameter_offload if made.wrapper is Wrapper.ZERO_3 else None
        ),
        f"{surface.INIT}._convert_to_deepspeed_param": lambda made: (
            next(made.model.parameters()) if made.wrapper is Wrapper.ZERO_3 else None
        ),
    }
    for wrapper, stage, precision, json in WRAPPERS:
        made = make_engine(stage, precision, json=json)
        assert made.wrapper is wrapper
        made.accumulate(batch(1), 1 / 40, last=True)
        for name in surface.NAMES:
            instance = of_instances[name.owner](made) if name.owner in of_instances else None
            if instance is not None and hasattr(instance, name.name):
                seen.add((name.owner, name.name))
        if wrapper in (Wrapper.ZERO_1_2, Wrapper.BF16):
            parameter: Any = next(made.model.parameters())
            mapping = parameter._hp_mapping
            assert mapping.get_lp_grad_fragment(parameter._index_in_param_group) is not None
            assert mapping.lp_fragment_address.numel == mapping.hp_fragment_address.numel == parameter.numel()
        made.step()
    padding = {(surface.ZERO_1_2, "_zero_padding")}  # given to gradients, not to the wrapper
    expected = {(name.owner, name.name) for name in surface.NAMES if name.owner in of_instances}
    assert expected - padding - seen == set()


def test_an_unknown_wrapper_is_refused() -> None:
    with pytest.raises(Exception, match="which Lumina does not know"):
        Wrapper.of(object())


START = """
import importlib.machinery, importlib.metadata, os, re, sys
old, new, version, stated = sys.argv[1:]
importlib.metadata.requires = lambda name: [stated]
Loader = importlib.machinery.SourceFileLoader
def get_code(self, name):  # a copy of DeepSpeed in which one name is another one
    path = self.get_filename(name)
    source = self.get_data(path).decode()
    if name.startswith("deepspeed"):
        source = re.sub(old, new, source)
    return self.source_to_code(source, path)
if old:
    plain = Loader.get_code
    Loader.get_code = lambda self, name: (get_code if name.startswith("deepspeed") else plain)(self, name)
if version:
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "deepspeed" else real(name)
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
from lumina.config import UserError
from lumina.train.deepspeed import init_process_group
try:
    init_process_group()
except UserError as error:
    sys.exit(str(error))
"""


STATED = re.search(r'"(deepspeed[^"]*)"', (ROOT / "setup.py").read_text())[1]  # type: ignore[index]


def start(old: str = "", new: str = "", version: str = "") -> str:
    """What the start of a rank says on such a DeepSpeed; nothing where it succeeds. No engine is built."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER", "OMPI", "SLURM"))}
    done = subprocess.run(
        [sys.executable, "-c", START, old, new, version, STATED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not done.returncode:
        return ""
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_renamed_name_ends_the_start_by_name() -> None:
    """A method that is replaced, an attribute of instances and a parameter, each under another name."""
    pattern = r"\b(_get_norm_groups|single_partition_of_fp32_groups|has_overflow)\b"
    said = start(pattern, r"\1_renamed")
    for name in ("_get_norm_groups", "single_partition_of_fp32_groups", "_update_scale takes (has_overflow_renamed)"):
        assert name in said
    assert "pip install 'deepspeed<0.20,>=0.19.8'" in said
    assert "scaled_global_norm" not in said, "what is there is not complained of"


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0"])
def test_an_untried_version_is_refused(version: str) -> None:
    said = start(version=version)
    assert f"deepspeed {version}" in said
    assert "pip install 'deepspeed<0.20,>=0.19.8'" in said


def test_a_start_checks_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it passes on the installed version."""
    called: list[str] = []
    monkeypatch.setattr(surface, "check", lambda: called.append("check"))
    startup.init_process_group()
    assert called == ["check"]
