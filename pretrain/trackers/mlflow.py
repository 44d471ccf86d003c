"""MLflow. Without a server the run is stored in FOLDER/mlflow.db, which `mlflow ui --backend-store-uri
sqlite:///FOLDER/mlflow.db` shows; several runs may have the same folder. `server` is the URI of a tracking server; its
user and password are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

PACKAGES = ("mlflow", "sqlalchemy", "alembic")
MAX_PARAMETERS = 100  # in one request
MAX_CHARACTERS = 500  # of a parameter, in older servers


class Run:
    """A run of MLflow; the project is its experiment."""

    def __init__(self, options: Any, folder: Path, known: str, settings: dict[str, Any]):
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # the sender repeats what fails
        os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="30")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(options.server or f"sqlite:///{folder}/mlflow.db")
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(options.project)
        artifacts = None if options.server else (folder / "artifacts").as_uri()
        number = experiment.experiment_id if experiment else self.client.create_experiment(options.project, artifacts)
        self.id = self.client.create_run(number, run_name=options.run).info.run_id
        keys = {key: key.replace("[", ".").replace("]", "") for key in settings}  # MLflow refuses brackets
        parameters = [Param(keys[key], str(value)[:MAX_CHARACTERS]) for key, value in settings.items()]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self.client.log_batch(self.id, params=parameters[start : start + MAX_PARAMETERS])

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)
