"""A tracker of another installed package: given the run's records, or left behind in one line where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lumina.config import UserError, install_command, load
from lumina.monitor.tracking import RunInfo, Trackers

NOTEBOOK = """
{library}
class Notebook:
    def open(self, run):
        self.lines = (run.folder / "notebook.txt").open("a")
        return {{}}

    def scalars(self, group, step, values, time):
        self.lines.write(f"{{group}} {{step}} {{values}}\\n")

    def text(self, name, step, text):
        self.lines.write(f"{{name}} {{step}} {{text}}\\n")

    def rewind(self, step):
        return False

    def close(self):
        self.lines.close()

    def abandon(self):
        pass

THING = Notebook
"""


def follow(folder: Path) -> None:
    trackers = Trackers(["notebook"], RunInfo(folder, "tested", {}, 0))
    trackers.record({"kind": "step", "step": 1, "loss": 2.5})
    trackers.record({"kind": "event", "step": 1, "name": "events", "text": "hello"})
    trackers.close()


def test_it_is_given_the_records(install: Callable[..., None], tmp_path: Path) -> None:
    install("lumina.trackers", "notebook", NOTEBOOK.format(library=""))
    assert load("nano", {"trackers": ["notebook"]}).trackers == ["notebook"]
    folder = tmp_path / "run"
    folder.mkdir()
    follow(folder)
    assert (folder / "notebook.txt").read_text() == "train 1 {'loss': 2.5}\nevents 1 hello\n"


def test_a_library_that_is_not_there_is_one_line(
    install: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install("lumina.trackers", "notebook", NOTEBOOK.format(library="import no_such_library"))
    follow(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("notebook is no longer followed, the run goes on: the tracker notebook")
    assert "No module named 'no_such_library'" in said
    assert "\n" not in said


def test_the_library_of_one_of_ours_names_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow.tracking", None)
    Trackers(["mlflow"], RunInfo(tmp_path, "tested", {}, 0)).close()
    assert "mlflow is no longer followed, the run goes on: it needs the package mlflow" in caplog.text
    assert install_command("tracking") in caplog.text


def test_a_misspelt_one_is_told_the_near_one() -> None:
    with pytest.raises(UserError, match=r"`trackers` .*: no such tracker: wandbb. Did you mean wandb\?"):
        load("nano", {"trackers": ["wandbb"]})
