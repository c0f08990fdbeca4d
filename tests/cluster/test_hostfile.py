"""The plain command line of the README, through DeepSpeed's launcher and a hostfile, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import ssh_host
from runs import DEEPSPEED, ROOT, arguments, losses, steps
from ssh_host import needs_root

STEPS = 8
SETTINGS = {"max_steps": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}

pytestmark = [pytest.mark.cluster, needs_root]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ssh_host.prepare(tmp_path_factory.mktemp("host"))


def launcher(*words: str) -> list[str]:
    return [str(DEEPSPEED), "--hostfile", str(ROOT / "hostfile.example"), "launchers/train.py", *words]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-3), ("fp32", 1e-5)])
def test_every_stage_ends_in_the_same_losses(
    precision: str, tolerance: float, host: Path, conversations: Path, place: Path
) -> None:
    curves = {}
    for stage in ("2", "0", "1", "3", "3_offload"):
        folder = place / f"zero{stage}"
        done = ssh_host.run(
            host, launcher(*arguments(folder, conversations, stage=stage, precision=precision, **SETTINGS))
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert [record["step"] for record in steps(folder)] == list(range(1, STEPS + 1))
        assert f"ZeRO-{stage[0]}, 2 process(es)" in done.stdout
        curves[stage] = losses(folder)
    assert curves["2"][-1] < curves["2"][0]  # it learns
    for stage, curve in curves.items():
        assert curve == pytest.approx(curves["2"], abs=tolerance, rel=0), stage


def test_a_failing_rank_fails_the_launch(host: Path, place: Path) -> None:
    done = ssh_host.run(host, launcher(*arguments(place / "run", place / "missing.jsonl", stage=2, **SETTINGS)))
    assert done.returncode != 0
    assert "missing.jsonl" in done.stderr
    assert "lumina/train" not in done.stderr, "a traceback for a user's mistake"
