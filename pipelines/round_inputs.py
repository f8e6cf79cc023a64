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

    data: str
    benchmark: str
    store: str
    model: str
    base: str
    recipe: str
    blind_from: str
    calibrated_on: str
    number: int
    questions: int
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
class RunSettings:
    """What the tasks of a round get of the parameters: addresses of their settings, and two numbers."""

    round_settings: str
    prepare_settings: str
    generate_settings: str
    pair_settings: str
    version_settings: str
    train_settings: str
    evaluate_settings: str
    decide_settings: str
    publish_settings: str
    deploy_settings: str
    page_settings: str
    number: int
    shards: int


@dataclass(frozen=True)
class StartingPoint:
    """What a round starts from. The last four exist from the second round of a run on."""

    policy: str
    policy_digest: str
    policy_round: int
    trained: dsl.Input[dsl.Model] = None
    preferences_before: dsl.Input[dsl.Dataset] = None
    champion_results: dsl.Input[dsl.Dataset] = None
    base_results: dsl.Input[dsl.Dataset] = None


@dataclass(frozen=True)
class RoundPosition:
    """Which round of the run it is, from 0."""

    ahead: int


class RoundResult(NamedTuple):
    """What the next round of the same run continues from."""

    trained: dsl.Model
    trained_digest: str
    preferences: dsl.Dataset
    next_champion_results: dsl.Dataset


class FirstRoundResult(NamedTuple):
    """What the later rounds continue from: the results of the starting policy as well."""

    trained: dsl.Model
    trained_digest: str
    preferences: dsl.Dataset
    next_champion_results: dsl.Dataset
    champion_results: dsl.Dataset


@dataclass(frozen=True)
class PreferenceData:
    """Outputs of the tasks from prepare to version."""

    lap: Any
    preferences: Any
    data_version: Any


@dataclass(frozen=True)
class Challenger:
    """Outputs of train and of the evaluation of the challenger."""

    checkpoint: Any
    digest: Any
    results: Any


@dataclass(frozen=True)
class Round:
    """One round of a run, whose tasks are added to the pipeline that is being built."""

    plan: RoundPlan
    settings: RunSettings
    start: StartingPoint
    ahead: Any  # position in the run, from 0
    generate: Any  # subpipeline of generation_tasks.py
    promote: Any  # subpipeline of promotion_tasks.py
