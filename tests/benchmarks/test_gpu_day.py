"""The script for a day on a GPU, rehearsed on this CPU in full, and what it promises of a run that is cut."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/gpu_day"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a module of the script, which runs with its own folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == FOLDER:
            del sys.modules[name]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_day_is_rehearsed(tmp_path: Path) -> None:
    """Every part runs to its end on a CPU, and every check in it holds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "LUMINA_"))}
    ended = subprocess.run(
        [ROOT / "benchmarks/gpu_day.sh", "--rehearse", "--results", tmp_path, "--archive", tmp_path / "day.tar.gz"],
        capture_output=True,
        text=True,
        env=kept | {"PYTHON": sys.executable},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    listed = subprocess.run([sys.executable, FOLDER, "--list"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines()[:-1]]
    assert len(names) == 8
    assert list(dict.fromkeys(row["part"] for row in rows)) == names  # in their order, none without a figure
    assert all(row.get("ok", True) for row in rows)
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# Rehearsal on CPU")
    assert all(f"| {name} | done |" in summary for name in names)
    checks = {row["case"] for row in rows if row.get("ok")}
    assert {"kill and resume", "out of memory and rebuild", "first and second save", "batch 8 ragged"} <= checks
    assert {f"{p}, ZeRO-{stage}" for p in ("fp32", "bf16") for stage in range(4)} <= checks
    assert (tmp_path / "day.tar.gz").stat().st_size > 1000


def test_all_parts_fit_into_fifteen_minutes(load: object) -> None:
    assert sum(part.seconds for part in load("parts").PARTS) <= 14 * 60  # the rest is the machine's start


def stub(folder: Path, name: str, body: str) -> None:
    (folder / f"part_{name}.py").write_text("import os, subprocess, sys, time\n\ndef main(day):\n" + body)


def test_a_part_that_is_cut_keeps_its_figures_and_the_next_one_runs(
    load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, "slow", "    day.record('first', x=1)\n    child = subprocess.Popen(['sleep', '600'])\n"
         "    day.record('child', pid=child.pid)\n    time.sleep(600)\n")  # fmt: skip
    stub(tmp_path, "broken", "    day.record('before', x=2)\n    raise ValueError('no')\n")
    stub(tmp_path, "good", "    day.check('right', True)\n    day.skip('more', 'no card')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts, summary, main = load("parts"), load("summary"), _main()
    chosen = [parts.Part(name, 60, name, "nothing") for name in ("slow", "broken", "good")]
    monkeypatch.setattr(summary, "PARTS", chosen)
    endings = {part.name: main.run(part, tmp_path, True, 3 if part.name == "slow" else 60) for part in chosen}
    assert [how for how, _ in endings.values()] == ["cut", "FAILED", "done"]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": "good", "ca')  # half a line, as a cut may leave it
    rows = summary.read(tmp_path)
    assert [row["case"] for row in rows] == ["first", "child", "before", "broken, to its end", "right", "more"]
    assert rows[3]["error"] == "ValueError: no"
    page = summary.render({"card": "X"}, endings, rows)
    assert "| slow | cut |" in page
    assert "**WRONG** broken, to its end" in page
    assert "more: not done: no card" in page
    deadline = time.monotonic() + 60
    while _alive(rows[1]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(rows[1]["pid"])  # what a part has started ends with it


def _main() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_day_main", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_gaps_between_kernels(load: object) -> None:
    steps = load("part_steps")
    works = [steps.Work(*w) for w in ((0, 10, "a"), (4, 6, "b"), (8, 14, "c"), (20, 30, "d"), (31, 40, "e"))]
    assert steps.gaps(reversed(works)) == (33, 40, [(6, "c", "d"), (1, "d", "e")])
    assert steps.gaps([]) == (0.0, 0.0, [])


@pytest.mark.parametrize(("worse", "ok"), [(1.0, True), (1.002, False), (float("nan"), False)])
def test_losses_are_held_to_the_recorded_ones(load: object, worse: float, ok: bool) -> None:
    part, seen = load("part_losses"), []
    recorded = json.loads(part.RECORDED.read_text())["nano"]["fp32"]["0"]
    assert len(recorded["loss"]) == 20
    assert recorded["loss"][-1] < recorded["loss"][0] - 2  # it learns, so that a wrong update is seen
    found = {"loss": [*recorded["loss"][:-1], recorded["loss"][-1] * worse], "norm": recorded["norm"]}
    part.compare(SimpleNamespace(check=lambda case, good, **_: seen.append(good)), "x", "fp32", found, recorded)
    assert seen == [ok]


def test_wheels_are_collected_for_another_python(load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, asked = load("wheels"), []

    def pip(*words: str) -> bool:
        asked.append(words)
        folder, name = Path(words[words.index("-d" if words[0] == "download" else "-w") + 1]), words[-1].split("==")[0]
        if name == "deepspeed" and words[0] == "download":
            return False  # published as source
        tags = "cp312-cp312-manylinux_2_17_x86_64" if name == "orjson" else "py3-none-any"
        (folder / f"{name.replace('-', '_')}-1-{tags}.whl").write_bytes(b"x" * 1000)
        return True

    monkeypatch.setattr(wheels, "_pip", pip)
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "orjson-0-cp311-cp311-linux_x86_64.whl").touch()  # an earlier collection's
    assert wheels.collect(folder, "3.12") == 0
    assert len(list(folder.iterdir())) == len(wheels.NAMES)
    assert "wheel" in {words[0] for words in asked}
    assert all("3.12" in w for w in asked if w[0] == "download")
    assert wheels.collect(folder, "3.13") == 1  # orjson's wheel is for 3.12
    monkeypatch.setattr(wheels, "BOUND", 1000)
    assert wheels.collect(folder, "3.12") == 1  # too much to carry


def test_pins_come_from_the_constraints(load: object) -> None:
    assert load("wheels").pinned("pydantic-core").startswith("pydantic_core==")
    assert load("wheels").pinned("not-a-package") == "not-a-package"
