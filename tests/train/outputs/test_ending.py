"""What a run says at its end names what is lost, where things are and the command that comes next."""

from pathlib import Path

import pytest

from lumina.train.outputs import ending
from lumina.train.outputs.ending import interrupted, resuming_command, stopping, summary

RUN = Path("experiments/my run")


@pytest.mark.parametrize(
    ("launched", "said"),
    [
        (["deepspeed", "--num_gpus", "2", "my train.py"], "deepspeed --num_gpus 2 'my train.py' --resume auto"),
        (["torchrun", "train.py", "--resume", "auto"], "torchrun train.py --resume auto"),
        (["lumina", "launch", "train", "--resume=auto"], "lumina launch train --resume=auto"),
    ],
)
def test_a_launched_job_is_resumed_by_its_own_command_line(
    launched: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "launch_command", lambda: launched)
    assert resuming_command(RUN, 4) == said


def test_the_resuming_command_can_be_pasted() -> None:
    assert resuming_command(RUN, 1) == "lumina train --resume 'experiments/my run'"
    assert resuming_command(RUN, 4) == "the same command with --resume auto"


def test_the_first_press_says_what_the_second_would_lose() -> None:
    assert stopping("SIGINT", 17, 10) == (
        "SIGINT: the step at work is ended and saved, then the run ends. Press Ctrl-C again to leave at once: 7 "
        "steps since the checkpoint of step 10 are lost. Passes of the next step that have begun are taken again when "
        "the run goes on."
    )
    assert "1 step since the beginning" in stopping("SIGINT", 1, 0)
    assert stopping("SIGTERM", 17, 10).startswith(
        "SIGTERM: the step at work is ended and saved, then the run ends. Passes"
    )


def test_the_second_press_says_what_is_lost() -> None:
    assert interrupted(RUN, 1, 17, 10) == (
        "Interrupted at step 17 without saving: 7 steps since the checkpoint of step 10 are lost. "
        "To go on: lumina train --resume 'experiments/my run'"
    )
    assert "nothing is lost" in interrupted(RUN, 1, 10, 10)
    assert interrupted(RUN, 1, 3, 0).endswith("3 steps since the beginning are lost. No checkpoint was written.")


def test_the_summary() -> None:
    first, where, following = summary(RUN, 300, (4.1234, 250), 751.2, 120, 1_234_567)
    assert first == (
        "Finished: 300 steps (120 of them in this start) in 0:12:31, 1,234,567 tokens, "
        "best evaluation 4.1234 at step 250"
    )
    assert "experiments/my run" in where
    assert "lumina chat 'experiments/my run'" in following
    assert summary(RUN, 3, None, 1.0, 3, 9)[0] == "Finished: 3 steps in 0:00:01, 9 tokens, not evaluated"
