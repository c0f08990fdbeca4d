"""Lumina from Python: what can be imported, how fast, and that a process may train, generate and train again."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import lumina
from lumina import Callback, UserError, evaluate, export, generate, load_config, load_model, train
from tests.runs.processes import clean_environment
from tests.small_tokenizer import VOCABULARY, write_tokenizer


def loaded_by(code: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after this code."""
    report = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.split()
    )


def test_every_name_is_there() -> None:
    for name in lumina.__all__:
        assert getattr(lumina, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        lumina.tain  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    """What takes seconds: torch and its compiler, DeepSpeed. `import lumina` needs no pydantic either."""
    assert not loaded_by("import lumina") & {"torch", "deepspeed", "pydantic", "numpy"}
    assert not loaded_by("from lumina import Config, train") & {"torch", "deepspeed", "transformers"}


def test_train_is_the_function_whatever_was_imported_before() -> None:
    code = "import lumina.train.run\nfrom lumina import train\nprint(callable(train), lumina.train.run.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "lumina.train.run"]


def alone(body: Callable[[Path, Path], None], folder: Path, data: Path) -> None:
    """Run in a process of its own: the process group that `train` leaves is no other test's."""
    name = f"from {__name__} import {body.__name__} as body"
    code = f"import sys; from pathlib import Path; {name}; body(*map(Path, sys.argv[1:]))"
    write_tokenizer(folder / "tokenizer")
    environment = {**clean_environment(), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(folder), str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def tiny(folder: Path, data: Path, name: str) -> lumina.Config:
    return load_config(
        "nano",
        tokenizer=str(
            folder / "tokenizer" if (folder / "tokenizer").exists() else write_tokenizer(folder / "tokenizer")
        ),
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        seq_length=64,
        train_data=[str(data)],
        output_dir=str(folder),
        experiment_name=name,
        batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=3,
        num_workers=1,
    )


class Count(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, context: lumina.Context, result: lumina.StepResult) -> None:
        self.losses.append(result.loss)


def alive_engines() -> int:
    from lumina.train.deepspeed import Engine

    return sum(isinstance(found, Engine) for found in gc.get_objects())


class Raise(Callback):
    def before_step(self, context: lumina.Context) -> None:
        assert alive_engines() == 1
        raise KeyboardInterrupt  # as the second press of a notebook's button does


def train_under_each_stage(folder: Path, data: Path) -> None:
    for stage in range(4):
        settings = {"ds_config": str(Path(__file__).parents[1] / "ds_configs" / f"zero{stage}.json")}
        assert train(tiny(folder, data, f"stage{stage}").replace(**settings)).finished
        assert alive_engines() == 0, f"stage {stage}"
        with pytest.raises(KeyboardInterrupt):
            train(tiny(folder, data, f"interrupted{stage}").replace(**settings), callbacks=[Raise()])
        gc.collect()
        assert alive_engines() == 0, f"stage {stage}, interrupted"


@pytest.mark.long
def test_the_engine_of_a_run_is_gone_after_it(tmp_path: Path, conversations: Path) -> None:
    """A notebook trains many times: each engine, a GPU's memory, stayed until the process ended."""
    alone(train_under_each_stage, tmp_path, conversations)


REFUSING = """
from lumina import UserError

def refusing(config, total_steps):
    raise UserError(f"not for {total_steps} steps", "Take more.")
"""


def train_with_a_refusing_schedule(folder: Path, data: Path) -> None:
    import logging

    installed = folder / "installed"
    (info := installed / "refusing-1.0.dist-info").mkdir(parents=True)
    (installed / "refusing.py").write_text(REFUSING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: refusing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lumina.schedules]\nrefusing = refusing:refusing\n")
    sys.path.insert(0, str(installed))
    with pytest.raises(UserError, match="not for 3 steps"):
        train(tiny(folder, data, "refused").replace(lr_scheduler="refusing"))
    assert not (folder / "refused").exists(), "the folder is claimed when the run can start"
    assert logging.getLogger("lumina").handlers == []
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lumina")]


def test_a_refused_run_leaves_nothing(tmp_path: Path, conversations: Path) -> None:
    alone(train_with_a_refusing_schedule, tmp_path, conversations)


def train_twice(folder: Path, data: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = [Count(), Count()]
    runs = [train(tiny(folder, data, f"run{i}"), callbacks=[seen[i]]) for i in range(2)]
    assert signal.getsignal(signal.SIGINT) is before
    assert [run.folder for run in runs] == [folder / "run0", folder / "run1"]
    assert all(run.finished for run in runs)
    losses = [[record["loss"] for record in run.metrics()] for run in runs]
    assert losses[0] == losses[1] == pytest.approx(seen[0].losses)
    assert len(losses[0]) == 3
    assert alive_engines() == 0
    assert {record["kind"] for record in runs[0].metrics(None)} >= {"step"}
    with pytest.raises(UserError, match="already holds checkpoints"):
        train(tiny(folder, data, "run0"))
    done: list[lumina.TrainedRun] = []  # a thread gets no signals
    worker = threading.Thread(target=lambda: done.append(train(tiny(folder, data, "thread"))))
    worker.start()
    worker.join(240)
    assert done[0].finished


def test_train_twice_in_one_process(tmp_path: Path, conversations: Path) -> None:
    """The same run twice is the same to the bit; the callback sees what metrics.jsonl has; handlers are put back."""
    alone(train_twice, tmp_path, conversations)


def train_and_use(folder: Path, data: Path) -> None:
    run = train(tiny(folder, data, "used"))
    model = load_model(run.folder, "fp32")
    once = generate(model, "hello there", max_length=5, seed=3)
    again = generate(run.folder, [{"role": "user", "content": "hello there"}], max_length=5, seed=3)
    assert once.ids == again.ids
    told = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    brief = generate(model, "hello there", system="be brief", max_length=5, temperature=0)
    assert brief.ids == generate(model, told, max_length=5, temperature=0).ids
    with pytest.raises(UserError, match="ends with a message of the user's"):
        generate(model, [{"role": "assistant", "content": "hello"}])
    figures = evaluate(model, [str(data)])
    assert figures["conversations"] > 0
    assert figures["loss"] > 0
    assert (export(run.folder, folder / "out") / "model.safetensors").is_file()


def test_a_trained_model_is_used(tmp_path: Path, conversations: Path) -> None:
    alone(train_and_use, tmp_path, conversations)


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="Did you mean `max_steps`"):
        load_config("nano", max_step=3)
