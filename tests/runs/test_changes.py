"""Nothing is silent between a run's starts: each says what it goes on from; what differs is shown or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lumina.checkpoint import read_trainer_state
from tests.earlier_versions import as_of_0_2
from tests.runs import Runs, arguments, losses, newest, write_conversations

QUICK = {
    "max_steps": 3,
    "precision": "fp32",
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_every_n_batches": 1,
}
CONSTANT = {**QUICK, "lr_scheduler": "constant", "warmup_ratio": 0}


@pytest.fixture(scope="module")
def trained(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints under the cosine schedule."""
    run = tmp_path_factory.mktemp("trained") / "run"
    job = runs.train(arguments(run, conversations, **QUICK))
    assert "begins from scratch: weights drawn with seed 1234" in job.stdout()
    return run


@pytest.fixture
def run(trained: Path, place: Path) -> Path:
    return shutil.copytree(trained, place / "run")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 99}, "seed 99, was 1234"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001, was 1e-05"),
        ({"max_steps": 5}, "max_steps 5, was 3: step 2 of the 3 that were taken had the learning rate"),
        ({"warmup_ratio": 0.9}, "warmup_ratio 0.9, was 0.1"),
        ({"lr_scheduler": "linear"}, "lr_scheduler linear, was cosine"),
        ({"seq_length": 32}, "seq_length 32, was 64"),
        ({"packing": False}, "packing False, was True"),
        ({"global_batch_size": 4}, "global_batch_size 2, not 4"),
        ({"objective": "dpo"}, "objective dpo, was sft"),
    ],
    ids=str,
)
def test_what_the_taken_steps_hang_on_is_refused_by_name(
    runs: Runs, run: Path, conversations: Path, changed: dict[str, object], says: str
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    said = runs.refusal([*arguments(run, conversations, **{**QUICK, **changed}), "--resume", "auto"])
    assert says in said
    assert "--init-from" in said or "global_batch_size" in said
    assert (run / "metrics.jsonl").read_bytes() == before


def test_other_contents_of_the_data_are_refused(runs: Runs, run: Path, place: Path) -> None:
    other = write_conversations(place / "other.jsonl", 20, seed=99)
    said = runs.refusal([*arguments(run, other, **QUICK), "--resume", "auto"])
    assert "the training data is not what" in said
    assert "other.jsonl" in said


def test_what_is_legal_is_shown(runs: Runs, run: Path, conversations: Path) -> None:
    changed = {"learning_rate": 2e-4, "weight_decay": 0.1, "num_workers": 2, "gradient_accumulation_steps": 3}
    argv = [*arguments(run, conversations, **{**QUICK, **changed}), "--resume", "auto"]
    said = runs.train(argv).stdout()
    assert f"goes on from {run}/checkpoints/step-00000003, step 3" in said
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith(("changed: ", "kept: "))]
    assert lines[:2] == ["changed: learning_rate 0.0002, was 0.0001", "changed: weight_decay 0.1, was 0.01"]
    assert lines[2].startswith("kept: the global batch of 2 samples, of the run's first start")
    assert len(lines) == 3, "num_workers is nobody's concern"
    assert "changed: " not in runs.train(argv).stdout(), "the next start finds it as it is"


def test_a_longer_run_is_legal_where_no_taken_step_would_have_been_another(
    runs: Runs, place: Path, conversations: Path
) -> None:
    run = place / "run"
    runs.train(arguments(run, conversations, **CONSTANT))
    said = runs.train([*arguments(run, conversations, **{**CONSTANT, "max_steps": 5}), "--resume", "auto"]).stdout()
    assert "changed: max_steps 5, was 3" in said
    assert len(losses(run)) == 5


def test_a_run_begun_from_another_and_its_configuration(
    runs: Runs, trained: Path, place: Path, conversations: Path
) -> None:
    run = place / "tuned"
    argv = arguments(run, conversations, **QUICK)
    job = runs.train([*argv, "--init-from", str(trained)])
    assert f"begins with the weights of {trained}/checkpoints/step-00000003, step 3" in job.stdout()
    first = losses(run)
    runs.train([*argv, "--resume", "auto"])
    assert not {"resume", "init_from"} & yaml.safe_load((run / "config.yaml").read_text()).keys()

    # Ended before its first checkpoint, it begins again with what it began with, and not with other weights.
    shutil.rmtree(run / "checkpoints")
    job = runs.train([*argv, "--resume", "auto"])
    assert f"begins with the weights of {trained}/checkpoints/step-00000003, step 3" in job.stdout()
    assert losses(run) == first


def test_a_copy_of_a_runs_configuration_begins_a_run_of_its_own(
    runs: Runs, run: Path, place: Path, conversations: Path
) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    copy = place / "copy.yaml"
    copy.write_text(yaml.safe_dump({**settings, "resume": str(run)}))  # as 0.2.0 wrote it
    argv = ["--config", str(copy), "--output-dir", str(place), "--experiment-name", "own"]
    job = runs.train([*argv, "--set", f"tokenizer={run / 'tokenizer'}"])
    assert "begins from scratch" in job.stdout()
    assert f"`resume: {run}` belongs to one start" in job.stderr()


def test_a_moved_run_goes_on_where_it_is(runs: Runs, run: Path, place: Path, trained: Path) -> None:
    """`--resume RUN` alone means this folder, not the one that its config.yaml remembers."""
    moved = run.rename(place / "moved")
    before = (trained / "train.log").read_bytes()
    said = runs.train(["--resume", str(moved)]).stdout()
    assert f"goes on from {moved}/checkpoints/step-00000003, step 3" in said
    assert (trained / "train.log").read_bytes() == before


def test_a_checkpoint_says_in_what_its_rotary_angles_are(run: Path) -> None:
    assert read_trainer_state(newest(run))[0].rotary_angles == "float32"


@pytest.mark.long  # what is said of which checkpoint is what tests/checkpoint/test_model_shape.py holds
def test_other_rotary_angles_are_said_once(runs: Runs, place: Path, conversations: Path) -> None:
    """Of a context above 131,072 tokens, whose angles were float32's up to 0.2.0."""
    run, settings = place / "run", {**CONSTANT, "seq_length": 131_080, "batch_size": 1, "global_batch_size": 1}
    resumed = lambda steps: runs.train(
        [*arguments(run, conversations, **{**settings, "max_steps": steps}), "--resume", "auto"]
    ).stdout()
    assert "rotary angles" not in resumed(2)
    as_of_0_2(run)
    said = resumed(3)
    assert f"WARNING: {run}/checkpoints/step-00000002: its 2 steps, or the first of them, may have been" in said
    assert "rotary angles" not in resumed(4)
