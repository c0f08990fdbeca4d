"""MLflow, at MLFLOW_TRACKING_URI or else in RUN/mlflow."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Mapping
from typing import Any

from lumina.files import read_text, write_text
from lumina.monitor.tracking import GROUPS, RunInfo

_MAX_PARAMETER = 500  # characters that MLflow takes


class MLflow:
    """The run's id is MLFLOW_RUN_ID, or one that is kept in RUN/mlflow-run: a run that goes on does so there too."""

    def open(self, run: RunInfo) -> Mapping[str, int]:
        given = os.environ.get("MLFLOW_TRACKING_URI")
        if not given:
            # Since 3.7 MLflow asks that plain files be wanted; its databases need more than mlflow-skinny.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=given or (run.folder.resolve() / "mlflow").as_uri())
        remembered = run.folder / "mlflow-run"
        given_run = os.environ.get("MLFLOW_RUN_ID")  # the user's job looks for the run under it
        if given_run is not None or (run.step and remembered.exists()):
            self._run = given_run or read_text(remembered).strip()
            self._client.update_run(self._run, status="RUNNING")
            self._parameters(run, set(self._client.get_run(self._run).data.params))
            return {group: self._last(group) for group in GROUPS.values()} if run.step else {}
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lumina")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(number, run_name=run.name).info.run_id
        write_text(remembered, self._run)
        self._parameters(run, set())
        return {}

    def _parameters(self, run: RunInfo, there: set[str]) -> None:
        """MLflow refuses another value of a parameter that is there."""
        for key, value in run.config.items():
            if key not in there:
                self._client.log_param(self._run, key, str(value)[:_MAX_PARAMETER])

    def _last(self, group: str) -> int:
        """The last step whose figures are all there: `group/complete` is logged after them."""
        history = self._client.get_metric_history(self._run, f"{group}/complete")
        return max((point.step for point in history), default=-1)

    def scalars(self, group: str, step: int, values: Mapping[str, float], time: float | None) -> None:
        from mlflow.entities import Metric

        stamp = int(1000 * (time or clock.time()))
        metrics = [Metric(f"{group}/{name}", value, stamp, step) for name, value in values.items()]
        self._client.log_batch(self._run, [*metrics, Metric(f"{group}/complete", 1.0, stamp, step)])

    def text(self, name: str, step: int, text: str) -> None:
        self._client.log_text(self._run, text, f"{name}/{step:08d}.txt")

    def rewind(self, step: int) -> bool:
        return False  # MLflow only ever adds

    def close(self) -> None:
        self._client.set_terminated(self._run)

    def abandon(self) -> None:
        """Nothing to end: it has no process of its own."""


TRACKER = MLflow
