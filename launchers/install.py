"""Install Lumina into a virtual environment, with the tested versions that fit its PyTorch: `make install` runs this.

    python3 launchers/install.py .venv quickstart            # VENV EXTRAS; anything after them goes to pip (--dry-run)

A torch that is there already, in VENV or, where VENV is not made yet, in this Python, is kept as it is. Else pip is
asked which wheel it would take: a CUDA build demands one certain Triton and a CPU build none, so that each has a
constraints file of its own. A GPU changes only what is said: constraints that do not fit the wheel do not resolve.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COMMON = ROOT / "constraints.txt"
#: Prints version and folder of the torch of whichever Python runs it, or null.
FIND_TORCH = """
import importlib.metadata as m, json
try: torch = m.distribution("torch")
except m.PackageNotFoundError: print("null")
else: print(json.dumps([torch.version, str(torch.locate_file(""))]))
"""
#: Prints version and requirements of what is installed under the former name, which another project has on the index.
FIND_FORMER = """
import importlib.metadata as m, json
try: print(json.dumps([m.version("lumina"), m.requires("lumina") or []]))
except m.PackageNotFoundError: print("null")
"""


class Choice(NamedTuple):
    """The constraints for pip, line by line, and why, in one line."""

    constraints: list[str]
    reason: str


def bounds(setup: str) -> tuple[str, str]:
    """The lowest torch that setup.py's text allows, and the lowest that it does not."""
    found = re.search(r'"torch>=([\d.]+),<([\d.]+)"', setup)
    assert found, "setup.py states no torch>=A,<B"
    return found[1], found[2]


def within(version: str, low: str, high: str) -> bool:
    """Whether `version` ("2.11.0+cu130") lies in [low, high), by its leading numbers; a build from before a release
    ("2.11.0a0+…", as some images have) of the lowest does not, for pip."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.match(r"[\d.]+", text)[0].strip(".").split(".")]  # type: ignore[index]

    if re.match(rf"{re.escape(low)}(\.0)*(a|b|rc|\.dev)", version):
        return False
    return numbers(low) <= numbers(version) < numbers(high)


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether NVIDIA's driver shows a card here, as device files (Linux) or through WSL."""
    return any(devices.glob("nvidia[0-9]*")) or ((devices / "dxg").exists() and Path("/usr/lib/wsl/lib").is_dir())


def is_cuda_build(requirements: list[str]) -> bool:
    """Whether these requirements of a torch wheel are a CUDA build's, which name its Triton and libraries."""
    return any(re.match(r"(triton\b|nvidia-|cuda-)", requirement) for requirement in requirements)


def choose(kept: tuple[str, str] | None, wheel: tuple[str, list[str]] | None, gpu: bool, setup: str) -> Choice:
    """Which constraints to take.

    `kept`: version and folder of the torch that is installed. Without one, `wheel` is the version and the requirements
    of the wheel that pip would take. `setup` is setup.py's text. Raises ValueError, with the remedy, where the kept
    torch is one that setup.py refuses.
    """
    card = "a GPU is here" if gpu else "no GPU is here, so runs use the CPU"
    if kept is not None:
        version, folder = kept
        low, high = bounds(setup)
        if not within(version, low, high):
            raise ValueError(
                f"torch {version} in {folder} is none that Lumina was tried with: pip install "
                f"'torch>={low},<{high}' there, or remove the environment for a new one"
            )
        return Choice(
            [_include(COMMON), f"torch=={version}"], f"torch {version} in {folder} is kept: {COMMON.name}; {card}"
        )
    assert wheel is not None
    version, requirements = wheel
    if any("-cu12" in requirement for requirement in requirements):  # an older driver's: other libraries than pinned
        return Choice(
            [_include(COMMON), f"torch=={version}"],
            f"torch {version}, as pip finds it, is a CUDA 12 build: {COMMON.name}; {card}",
        )
    if is_cuda_build(requirements):
        name, kind = "constraints-cuda.txt", "CUDA"
        if not gpu:
            card += " (a CPU build is a tenth of the size: docs/install.md)"
    else:
        name, kind = "constraints-cpu.txt", "CPU"
        if gpu:
            card += ", which this torch cannot use: see docs/install.md"
    return Choice([_include(ROOT / name)], f"torch {version}, as pip finds it, is a {kind} build: {name}; {card}")


def _include(file: Path) -> str:
    """A line that takes in another constraints file, whatever its folder is called."""
    return f"-c {shlex.quote(str(file))}"


def _environment() -> dict[str, str]:
    """pip's: an image's own PIP_CONSTRAINT would be merged with ours, and contradict it."""
    return {**os.environ, "PIP_CONSTRAINT": ""}


def torch_of(python: Path) -> tuple[str, str] | None:
    """Version and folder of the torch that `python` would import."""
    answer = subprocess.run([python, "-c", FIND_TORCH], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(answer.stdout)
    return None if found is None else (found[0], found[1])


def wheel_of_pip(python: Path) -> tuple[str, list[str]]:
    """Version and requirements of the wheel that pip takes for the tested torch; its metadata alone is fetched."""
    pinned = re.search(r"^torch==\S+", (ROOT / "constraints-cuda.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned, "constraints-cuda.txt pins no torch"
    ask = [
        str(python),
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    answer = subprocess.run([*ask, pinned[0]], stdout=subprocess.PIPE, text=True, env=_environment())
    if answer.returncode:
        raise ValueError(f"pip finds no {pinned[0]} for this machine (above, in its words)")
    about = json.loads(answer.stdout)["install"][0]["metadata"]
    return about["version"], about.get("requires_dist", [])


def make_venv(venv: Path, setup: str) -> None:
    """Make `venv` unless it is there. It shares the torch of this Python if setup.py allows that one: an image's own
    build, and a machine without an index, then needs no second one."""
    if (venv / "bin/python").exists():
        _give_pip(venv)
        return
    own = torch_of(Path(sys.executable))
    shared = own is not None and within(own[0], *bounds(setup))
    subprocess.run([sys.executable, "-m", "venv", *(["--system-site-packages"] if shared else []), venv], check=True)
    if own is not None and shared and torch_of(venv / "bin/python") is None:
        # This Python is in an environment itself, whose packages are not the system's.
        place = next((venv / "lib").glob("python*/site-packages"))
        (place / "outer.pth").write_text(own[1] + "\n", encoding="utf-8")


def _give_pip(venv: Path) -> None:
    """An environment that uv made, or that was cut off while it was made, has no pip."""
    python = str(venv / "bin/python")
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        subprocess.run([python, "-m", "ensurepip", "--default-pip"], check=True, stdout=subprocess.DEVNULL)


def remove_former(python: Path) -> None:
    """Uninstall a Lumina of the name that it had up to 0.2.0: the same files would belong to two distributions. Raises
    ValueError where it is another project, whose package would be imported in place of ours."""
    answer = subprocess.run([python, "-c", FIND_FORMER], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(answer.stdout)
    if found is None:
        return
    version, requirements = found
    if not any(requirement.startswith("deepspeed") for requirement in requirements):
        raise ValueError(
            f"lumina {version} in {python.parent.parent} is another project with the same import name: "
            f"{shlex.quote(str(python))} -m pip uninstall lumina"
        )
    print(f"install: lumina {version} is now called lumina-train: the former is uninstalled", flush=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "lumina"], check=True)


def main(venv: Path, extras: str, *options: str) -> int:
    """Decide, say what was decided, and let pip install; returns pip's exit status."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    make_venv(venv, setup)
    python = (venv / "bin/python").absolute()
    kept = torch_of(python)
    try:
        choice = choose(kept, None if kept else wheel_of_pip(python), has_gpu(), setup)
        remove_former(python)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"install: {choice.reason}", flush=True)
    chosen = venv / "constraints.txt"
    chosen.write_text("".join(f"{line}\n" for line in choice.constraints), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(chosen)]
    return subprocess.run([*install, "-e", f"{ROOT}[{extras}]", *options], env=_environment()).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
