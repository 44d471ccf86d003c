"""MLflow. Without a server the run is stored in FOLDER/mlflow.db, which `mlflow ui --backend-store-uri
sqlite:///FOLDER/mlflow.db` shows; several runs may have the same folder. `server` is the URI of a tracking server; its
user and password are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from pretrain.trackers.trackers import FAILED, FINISHED, MAX_VALUES, STOPPED, UnknownRun

PACKAGES = ("mlflow", "sqlalchemy", "alembic")
MAX_PARAMETERS = 100  # in one request
MAX_CHARACTERS = 500  # of a parameter, in older servers
STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}


class Run:
    """A run of MLflow; the project is its experiment."""

    def __init__(self, options: Any, folder: Path, run_id: str):
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # the sender repeats what fails
        os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="30")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.is_new = not run_id
        self.client = MlflowClient(options.server or f"sqlite:///{folder}/mlflow.db")
        if run_id:
            self.id = run_id
            try:
                self.client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise UnknownRun(f"the run {run_id} does not exist any longer") from None
            return
        experiment = self.client.get_experiment_by_name(options.project)
        artifacts = None if options.server else (folder / "artifacts").as_uri()
        number = experiment.experiment_id if experiment else self.client.create_experiment(options.project, artifacts)
        self.id = self.client.create_run(number, run_name=options.run).info.run_id

    def add_settings(self, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        if not self.is_new:  # MLflow refuses other values for parameters that it has
            return
        parameters = [Param(_allowed(key), str(value)[:MAX_CHARACTERS]) for key, value in settings.items()]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self.client.log_batch(self.id, params=parameters[start : start + MAX_PARAMETERS])

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for step, values in rows for name, value in values.items()]
        for start in range(0, len(metrics), MAX_VALUES):
            self.client.log_batch(self.id, metrics=metrics[start : start + MAX_VALUES])

    def close(self, outcome: str) -> None:
        self.client.set_terminated(self.id, STATUS[outcome])


def _allowed(name: str) -> str:
    """The name as MLflow allows it: `a[0].b` becomes a.0.b, and other forbidden characters become _."""
    return re.sub(r"[^/\w.\- :]", "_", name.replace("[", ".").replace("]", ""))
