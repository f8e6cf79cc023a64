"""Log the metrics of every round to experiment trackers; off by default (the section `tracking`).

A run of the tracker is a run of rounds, or a model on a cluster; its steps are the rounds, with the base policy as step
0. The names of metrics:

    benchmark/<arm>/<metric>        values of the benchmark's report, with …/low and …/high of their 95 % intervals
    training/<metric>               means of the last tenth of the steps, training/preference_share, …/margin_share
    pairs, judges/alpha             number of pairs, agreement of the judges
    decision/difference             challenger - champion, with …/low and …/high
    decision/promote                1 if the round promoted, else 0; decision/blocked likewise
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clincot.clients.trackers import TrackedRun, check_trackers, flatten_params, open_tracker
from clincot.config import Params, TrackingConfig
from clincot.errors import InvalidInput
from clincot.jsonl import read_json, read_json_model, write_json
from clincot.judging.combination import PanelReport
from clincot.records import BenchmarkReport, Decision, Interval, hash_json
from clincot.training.term_summary import average_metric, select_last_steps, summarize_terms

_log = logging.getLogger(__name__)

_TRAINING_METRICS = ("loss", "dpo_loss", "nll", "reward_margin", "accuracy", "margin_logits", "grad_norm")


@dataclass(frozen=True)
class TrackedFiles:
    """The files of a round whose metrics are logged; None where there is none, as for the base policy."""

    report: Path
    train_log: Path | None = None
    decision: Path | None = None
    panel_report: Path | None = None
    pair_report: Path | None = None


def collect_metrics(files: TrackedFiles) -> dict[str, float]:
    """All metrics of one step."""
    metrics = dict(_read_benchmark(read_json_model(files.report, BenchmarkReport)))
    if files.train_log is not None and files.train_log.is_file():
        metrics |= _read_training(read_json(files.train_log))
    if files.pair_report is not None:
        pairs = read_json(files.pair_report).get("pairs")
        metrics |= {"pairs": float(pairs)} if isinstance(pairs, int) else {}
    if files.panel_report is not None:
        alpha = read_json_model(files.panel_report, PanelReport).alpha_calibrated.value
        metrics |= {} if alpha is None else {"judges/alpha": alpha}
    if files.decision is not None:
        decision = read_json_model(files.decision, Decision)
        metrics |= _name_interval("decision/difference", decision.difference)
        metrics["decision/promote"] = float(decision.verdict == "promote")
        metrics["decision/blocked"] = float(decision.verdict == "blocked")
    return metrics


def track_step(config: TrackingConfig, run: TrackedRun, files: TrackedFiles, *, step: int, marker: Path) -> None:
    """Log one round, unless the same metrics have been logged to the same trackers before.

    marker: a file that remembers it, so that a resumed run does not log twice. A tracker that fails is a warning, since
    a lost connection should not end a round; with `required` it raises InvalidInput.
    """
    metrics = collect_metrics(files)
    logged = read_json(marker) if marker.is_file() else {}
    for name in config.to:
        key = hash_json([name, run.experiment, run.name, step, metrics])
        if logged.get(name) == key:
            continue
        try:
            check_trackers([name], setting="tracking.to")
            tracker = open_tracker(name, run)
            tracker.log(metrics, step)
            tracker.close()
        except Exception as error:  # each package has errors of its own, and its service others
            message = f"round {step} was not logged to {name}: {type(error).__name__}: {error}"
            if config.required:
                raise InvalidInput(message) from error
            _log.warning(message)
            continue
        logged[name] = key
        write_json(marker, logged)


def describe_tracked_run(params: Params, *, name: str, folder: Path) -> TrackedRun:
    """The run that a tracker shows, with the parameters that decide the results and the recipe's name and digest."""
    content = params.model_dump(mode="json", exclude={"tracking", "recipe"})
    recipe = params.describe_recipe()
    shown = flatten_params({**content, "recipe": {"name": recipe["name"], "digest": recipe["digest"]}})
    home = Path(params.tracking.folder) if params.tracking.folder else folder
    return TrackedRun(params.tracking.experiment, name, home, shown)


def _read_benchmark(report: BenchmarkReport) -> Iterator[tuple[str, float]]:
    for arm, metrics in report.metrics.items():
        for name, interval in metrics.items():
            yield from _name_interval(f"benchmark/{arm}/{name}", interval).items()


def _name_interval(name: str, interval: Interval) -> dict[str, float]:
    parts = {name: interval.value, f"{name}/low": interval.low, f"{name}/high": interval.high}
    return {part: value for part, value in parts.items() if value is not None}


def _read_training(log: list[Mapping[str, Any]]) -> dict[str, float]:
    tail, terms = select_last_steps(log), summarize_terms(log)
    averages = {name: average_metric(tail, name) for name in _TRAINING_METRICS}
    averages |= {"preference_share": terms.preference_share, "margin_share": terms.margin_share}
    metrics = {f"training/{name}": value for name, value in averages.items() if value is not None}
    return metrics | {"training/steps": float(len(log))}
