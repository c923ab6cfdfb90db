"""MLflow: a store of files in `RUN/mlflow`, or the server that `MLFLOW_TRACKING_URI` names.

Look at it with `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlflow`, where the whole of MLflow is
installed.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from himoe.train.writers.base import PROJECT, RunIdentity, flatten

LONGEST_PARAMETER = 500  # characters, the smallest limit among its stores


class MLflow:
    """One run of the experiment `himoe`, found again by its tag when a run is resumed."""

    def __init__(self, run: RunIdentity) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its database store needs more packages

        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports] - reads them while imported
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlflow").resolve().as_uri()
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        earlier = self._client.search_runs([experiment], f"tags.himoe_run = '{run.id}'", max_results=1)
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            created = self._client.create_run(experiment, run_name=run.name, tags={"himoe_run": run.id})
            self._run = created.info.run_id
            values = {key: str(value)[:LONGEST_PARAMETER] for key, value in run.config.items()}
            self._client.log_batch(self._run, params=[Param(key, value) for key, value in values.items()])

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the line's numbers."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, line["step"]) for name, value in flatten(line).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run)
