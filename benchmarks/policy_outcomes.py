"""A policy's outcomes over several seeds' runs: means and differences with intervals clustered by patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clincot.datasets.folder import StudyIndex, load_questions
from clincot.evaluation.intervals import cluster_wilson_interval, paired_difference
from clincot.evaluation.paired import PairedMetric
from clincot.jsonl import read_records
from clincot.records import Interval, Outcome


@dataclass(frozen=True)
class PolicyOutcomes:
    """Outcomes of one policy on all questions of all seeds."""

    outcomes: Mapping[str, list[Outcome]]  # by arm, in the same order for every policy
    patients: Mapping[str, str]  # by question id
    topics: Mapping[str, str]  # by question id

    def select_topic(self, topic: str) -> PolicyOutcomes:
        """The outcomes of one topic's questions."""
        chosen = {arm: [o for o in rows if self.topics[o.question] == topic] for arm, rows in self.outcomes.items()}
        return PolicyOutcomes(chosen, self.patients, self.topics)

    def estimate_mean(self, arm: str, metric: PairedMetric) -> Interval:
        """Estimate the mean of a metric in an arm, with a 95 % interval clustered by patient."""
        rows = self.outcomes[arm]
        return cluster_wilson_interval(
            [_read_metric(o, metric) for o in rows], [self.patients[o.question] for o in rows]
        )

    def estimate_difference(
        self, other: PolicyOutcomes, arm: str, metric: PairedMetric, *, other_arm: str = ""
    ) -> Interval:
        """Estimate this policy in `arm` minus `other` in `other_arm` (default: `arm`), paired by question."""
        theirs = {o.question: o for o in other.outcomes[other_arm or arm]}
        rows = self.outcomes[arm]
        return paired_difference(
            [_read_metric(o, metric) for o in rows],
            [_read_metric(theirs[o.question], metric) for o in rows],
            [self.patients[o.question] for o in rows],
            seed=0,
        )


def read_policy_outcomes(runs: Sequence[Path], folder: str, arms: Sequence[str]) -> PolicyOutcomes:
    """Read the outcomes that lie in `folder` of each seed's run; `arms` are all arms that were measured."""
    outcomes: dict[str, list[Outcome]] = {arm: [] for arm in arms}
    patients: dict[str, str] = {}
    topics: dict[str, str] = {}
    for run in runs:
        studies = StudyIndex(run / "benchmark")
        for question in load_questions(run / "benchmark"):
            patients[question.id] = studies[question.study].patient
            topics[question.id] = question.topic
        for outcome in read_records(run / folder / "outcomes.jsonl", Outcome):
            outcomes[outcome.arm].append(outcome)
    return PolicyOutcomes(outcomes, patients, topics)


def _read_metric(outcome: Outcome, metric: PairedMetric) -> float | None:
    value = getattr(outcome, metric)
    return None if value is None else float(value)
