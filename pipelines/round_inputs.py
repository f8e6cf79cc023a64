"""What the parts of a round pipeline hand to each other: parameters of a run, start of a round, outputs of its tasks.

The fields of the first three become inputs of pipelines (pipeline_builder.py), so their annotations are types of kfp.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from kfp import dsl

from clincot.pipelines.round_plan import RoundPlan


@dataclass(frozen=True)
class RunParameters:
    """The parameters of a run, which the UI shows as a form."""

    recipe: str
    data: str
    benchmark: str
    blind_from: str
    calibrated_on: str
    number: int
    shards: int
    preflight: dict
    prepare: dict
    propose: dict
    answer: dict
    judge: dict
    pair: dict
    version: dict
    train: dict
    evaluate: dict
    decide: dict
    publish: dict
    deploy: dict
    service: dict
    launch: dict


@dataclass(frozen=True)
class StartingPoint:
    """What a round starts from. The last three exist from the second round of a run on."""

    data_digest: str
    benchmark_digest: str
    panel_digest: str
    policy: str
    policy_digest: str
    policy_round: int
    trained: dsl.Input[dsl.Model] = None
    panel_report_before: dsl.Input[dsl.Artifact] = None
    base: dsl.Input[dsl.Dataset] = None


@dataclass(frozen=True)
class ChampionResults:
    """Results of the champion, with which the challenger is compared."""

    champion_outcomes: dsl.Input[dsl.Dataset]
    champion_report: dsl.Input[dsl.Artifact]


class RoundResult(NamedTuple):
    """What the next round of the same run continues from."""

    trained: dsl.Model
    trained_digest: str
    panel_report: dsl.Artifact
    champion_outcomes: dsl.Dataset
    champion_report: dsl.Artifact


@dataclass(frozen=True)
class PreferenceData:
    """Outputs of the tasks from prepare to pair."""

    lap: Any
    questions: Any
    regions: Any
    candidates: Any
    judgements: Any
    scores: Any
    panel_report: Any
    pairs: Any
    pairs_digest: Any
    pair_report: Any


@dataclass(frozen=True)
class Challenger:
    """Outputs of train and evaluate."""

    checkpoint: Any
    digest: Any
    outcomes: Any
    report: Any


@dataclass(frozen=True)
class Round:
    """One round of a run, whose tasks are added to the pipeline that is being built."""

    plan: RoundPlan
    run: RunParameters
    start: StartingPoint
    champion: ChampionResults
    generate: Any  # subpipeline of generation_tasks.py
    promote: Any  # subpipeline of promotion_tasks.py
    ahead: int = 0  # position in the run
