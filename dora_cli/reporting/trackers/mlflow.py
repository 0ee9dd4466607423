"""MLflow: on the server of ``MLFLOW_TRACKING_URI``, or in ``RUN/mlflow/mlflow.db``."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from dora_cli.reporting.trackers.base import FAILED, FINISHED, Scalar, tool

BATCH = 100  # parameters, and 1,000 metrics, are the most that a server takes at once
LONGEST = 500  # characters of a parameter that old servers keep


class Mlflow:
    """An experiment is the project, a run the run."""

    packages: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, *, offline: bool) -> None:
        self.offline = offline

    @classmethod
    def check(cls, *, offline: bool) -> None:
        pass

    def start(self, folder: Path, project: str, name: str, config: Mapping[str, Scalar], known: str | None) -> str:
        if self.offline:
            os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        self.entities = tool("mlflow.entities")
        place = folder.absolute() / "mlflow"
        server = os.environ.get("MLFLOW_TRACKING_URI") if not self.offline else None
        if not server:
            place.mkdir(exist_ok=True)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of every table
            logging.getLogger("alembic").setLevel(logging.WARNING)
        self.client = tool("mlflow").MlflowClient(tracking_uri=server or f"sqlite:///{place / 'mlflow.db'}")
        if known is not None:
            self.run = known
            self.client.update_run(known, status="RUNNING")
            return known
        experiment = self.client.get_experiment_by_name(project)
        artifacts = None if server else (place / "artifacts").as_uri()
        identity = experiment.experiment_id if experiment else self.client.create_experiment(project, artifacts)
        self.run = self.client.create_run(identity, run_name=name).info.run_id
        params = [self.entities.Param(key, str(value)[:LONGEST]) for key, value in config.items()]
        for first in range(0, len(params), BATCH):
            self.client.log_batch(self.run, params=params[first : first + BATCH])
        return str(self.run)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, float(value), now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), BATCH * 10):
            self.client.log_batch(self.run, metrics=metrics[first : first + BATCH * 10])

    def close(self, summary: Mapping[str, float], state: str) -> None:
        if summary:
            self.log(int(summary["train/steps"]), {f"summary/{name}": value for name, value in summary.items()})
        self.client.set_terminated(self.run, {FINISHED: "FINISHED", FAILED: "FAILED"}.get(state, "KILLED"))
