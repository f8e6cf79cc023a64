"""Experiment trackers: MLflow, Weights & Biases and TensorBoard behind one small interface.

Their packages are extras (`clincot[tracking]`) and are imported when a tracker is opened. Addresses and keys come from
the environment variables of each tracker (MLFLOW_TRACKING_URI, WANDB_API_KEY, …), never from parameters.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from clincot.errors import InvalidInput

TrackerName = Literal["mlflow", "tensorboard", "wandb"]  # also the names of their packages
_RUN_TAG = "clincot.run"  # finds the run of an earlier process in MLflow
_MAX_PARAM_CHARS = 500  # MLflow's server allows 6000, its older ones 500
_BATCH = 100  # most params in one request to MLflow
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")  # of an address


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows as one run; opening it again continues it."""

    experiment: str  # MLflow's experiment, W&B's project
    name: str
    folder: Path  # of TensorBoard's event files
    params: Mapping[str, str] = field(default_factory=dict)  # shown beside the metrics; see flatten_params


class Tracker(Protocol):
    """An open run of one tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log finite numbers at a step."""
        ...

    def close(self) -> None:
        """Write what is pending and end the run."""
        ...


def check_trackers(names: Iterable[TrackerName], *, setting: str) -> None:
    """Raise InvalidInput for a tracker whose package is not installed. setting: the parameter that names it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InvalidInput(
                f"{setting} has {name}, whose package is not installed here; run pip install 'clincot[tracking]', or "
                f"leave {name} out"
            )


def open_tracker(name: TrackerName, run: TrackedRun) -> Tracker:
    """Start the run, or continue it. Raises what the tracker's package raises."""
    if name == "mlflow":
        return _MlflowRun(run)
    return _WandbRun(run) if name == "wandb" else _TensorBoardRun(run)


def flatten_params(content: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Settings as {dotted name: text}, without the credentials that an address may hold."""
    flat: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_params(value, prefix=f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _CREDENTIALS.sub("", str(value))[:_MAX_PARAM_CHARS]
    return flat


class _MlflowRun:
    """A run of MLflow, by its client: nothing global is set, so that a training in this process may use MLflow too."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient  # type: ignore[import-not-found]
        from mlflow.entities import Metric, Param  # type: ignore[import-not-found]

        self._client: Any = MlflowClient()
        self._metric = Metric
        found = self._client.get_experiment_by_name(run.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(run.experiment)
        quoted = run.name.replace("'", "_")
        earlier = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{quoted}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(experiment, run_name=run.name, tags={_RUN_TAG: quoted})
        self._id = created.info.run_id
        params = [Param(name, value) for name, value in run.params.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in _list_finite(metrics)]
        )

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _WandbRun:
    """A run of Weights & Biases, whose id is a hash of its name, so that it is continued."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # type: ignore[import-not-found]

        identity = hashlib.sha256(f"{run.experiment}/{run.name}".encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=run.experiment,
            name=run.name,
            id=identity,
            resume="allow",
            config=dict(run.params),
            dir=str(run.folder),
            reinit="create_new",
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(_list_finite(metrics)), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoardRun:
    """Event files of TensorBoard."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / re.sub(r"[^\w.-]+", "-", run.name)
        continued = folder.is_dir()
        self._writer: Any = SummaryWriter(log_dir=str(folder))  # type: ignore[no-untyped-call]
        if run.params and not continued:
            lines = [f"    {name}: {value}" for name, value in run.params.items()]
            self._writer.add_text("params", "\n".join(lines))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in _list_finite(metrics):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _list_finite(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in metrics.items() if math.isfinite(value)]
