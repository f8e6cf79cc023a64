"""The tasks of a round, one function each: what a task receives, where it runs, and what it is called.

pipelines/round.py puts them in order. Functions return the outputs of the task, or the task itself where the order of
tasks does not follow from their inputs.
"""

from __future__ import annotations

from typing import Any

from kfp import dsl

from clincot.components.decide.component import decide
from clincot.components.end_round.component import end_round
from clincot.components.evaluate_challenger.component import evaluate_challenger
from clincot.components.evaluate_champion.component import evaluate_champion
from clincot.components.page.component import page
from clincot.components.preflight.component import preflight
from clincot.components.prepare.component import prepare
from clincot.components.record_run_status.component import record_run_status
from clincot.components.select_champion.component import select_champion
from clincot.components.start_round.component import start_round
from clincot.components.train.component import train
from clincot.components.version.component import version
from clincot.pipelines.generation_tasks import optional_artifact
from clincot.pipelines.placement import apply_placement
from clincot.pipelines.round_inputs import (
    Challenger,
    PreferenceData,
    Round,
    RunParameters,
    RunSettings,
)
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_form import SECTIONS


def add_run_status(plan: RoundPlan, run: RunParameters) -> dsl.PipelineTask:
    """Add the task that runs when all others have ended, successful or not."""
    task = record_run_status(store=run.store, model=run.model, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    return apply_placement(task, "record_run_status", plan.cluster)


def add_preflight(plan: RoundPlan, run: RunParameters) -> Any:
    """Add the checks. They are the only task that receives the sections of the form."""
    return apply_placement(
        preflight(
            data=run.data,
            benchmark=run.benchmark,
            store=run.store,
            model=run.model,
            base=run.base,
            recipe=run.recipe,
            blind_from=run.blind_from,
            calibrated_on=run.calibrated_on,
            questions=run.questions,
            code=plan.code,
            **{name: getattr(run, name) for name in (*SECTIONS, "service", "launch")},
        ),
        "preflight",
        plan.cluster,
    ).outputs


def add_start_round(plan: RoundPlan, run: RunParameters, checked: Any) -> Any:
    return apply_placement(
        start_round(
            settings=checked["round_settings"],
            champion=checked["champion"],
            number=run.number,
            rounds=plan.rounds,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        ),
        "start_round",
        plan.cluster,
    ).outputs


def add_evaluate_champion(this: Round) -> dsl.PipelineTask:
    """Add the evaluation of the policy from which the run starts."""
    return apply_placement(
        evaluate_champion(
            settings=this.settings.evaluate_settings,
            policy=this.start.policy,
            policy_digest=this.start.policy_digest,
        ),
        "evaluate_champion",
        this.plan.cluster,
    )


def add_prepare(this: Round, evaluated: dsl.PipelineTask | None) -> dsl.PipelineTask:
    """Add the selection of the questions. It waits for the champion's evaluation if both cannot mount the cache."""
    task = apply_placement(
        prepare(
            settings=this.settings.prepare_settings,
            generate_settings=this.settings.generate_settings,
            policy=this.start.policy,
            policy_digest=this.start.policy_digest,
            number=this.settings.number,
            ahead=this.ahead,
            rounds=this.plan.rounds,
            shards=this.settings.shards,
            groups=this.plan.cluster.count_shard_tasks(this.plan.rounds),
        ),
        "prepare",
        this.plan.cluster,
    )
    if evaluated is not None and this.plan.cluster.runs_one_task_at_a_time:
        task.after(evaluated)
    return task


def add_generation(this: Round, prepared: Any) -> Any:
    """Add the subpipeline that makes preference pairs, shard by shard; return the folder with them."""
    task = this.generate(
        pair_settings=this.settings.pair_settings,
        work=prepared["work"],
        questions=prepared["questions"],
        shard_groups=prepared["shard_groups"],
        lap=prepared["lap"],
        **optional_artifact("trained", this.start.trained),
    )
    return task.set_display_name("generate preferences").outputs["preferences"]


def add_version(this: Round, preferences: Any) -> Any:
    return apply_placement(
        version(
            settings=this.settings.version_settings,
            number=this.settings.number,
            ahead=this.ahead,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            preferences=preferences,
        ),
        "version",
        this.plan.cluster,
    ).outputs["Output"]


def add_train(this: Round, data: PreferenceData) -> Any:
    return apply_placement(
        train(
            settings=this.settings.train_settings,
            policy=this.start.policy,
            policy_digest=this.start.policy_digest,
            lap=data.lap,
            preferences=data.preferences,
            data_version=data.data_version,
            **optional_artifact("trained", this.start.trained),
        ),
        "train",
        this.plan.cluster,
    ).outputs


def add_evaluate_challenger(this: Round, trained: Any) -> Any:
    return apply_placement(
        evaluate_challenger(settings=this.settings.evaluate_settings, challenger=trained["challenger"]),
        "evaluate_challenger",
        this.plan.cluster,
    ).outputs["challenger_results"]


def add_decide(this: Round, data: PreferenceData, champion: Any, challenger: Challenger) -> Any:
    """Add the promotion gate; return the outputs of the task."""
    return apply_placement(
        decide(
            settings=this.settings.decide_settings,
            policy_round=this.start.policy_round,
            champion_results=champion,
            challenger_results=challenger.results,
            preferences=data.preferences,
            **optional_artifact("base_results", this.start.base_results),
            **optional_artifact("preferences_before", this.start.preferences_before),
        ),
        "decide",
        this.plan.cluster,
    ).outputs


def add_promotion(this: Round, challenger: Challenger, decided: Any) -> dsl.PipelineTask:
    """Add the subpipeline that records the round, and publishes and rolls out the challenger if it is promoted."""
    task = this.promote(
        round_settings=this.settings.round_settings,
        publish_settings=this.settings.publish_settings,
        deploy_settings=this.settings.deploy_settings,
        verdict=decided["Output"],
        number=this.settings.number,
        ahead=this.ahead,
        challenger_digest=challenger.digest,
        challenger=challenger.checkpoint,
        round_files=decided["round_files"],
    )
    return task.set_display_name("record and promote")


def add_page(this: Round, champion: Any, challenger: Challenger, decided: Any) -> dsl.PipelineTask:
    return apply_placement(
        page(
            settings=this.settings.page_settings,
            number=this.settings.number,
            ahead=this.ahead,
            policy=this.start.policy,
            champion_results=champion,
            challenger=challenger.checkpoint,
            round_files=decided["round_files"],
            **optional_artifact("trained", this.start.trained),
        ),
        "page",
        this.plan.cluster,
    )


def add_select_champion(this: Round, champion: Any, challenger: Challenger, decided: Any) -> Any:
    return apply_placement(
        select_champion(
            verdict=decided["Output"],
            champion_results=champion,
            challenger_results=challenger.results,
        ),
        "select_champion",
        this.plan.cluster,
    ).outputs["next_champion_results"]


def add_end_round(plan: RoundPlan, settings: RunSettings) -> dsl.PipelineTask:
    """Add the record that the rounds of the run have ended. It has to run after everything that acts on a decision."""
    return apply_placement(
        end_round(settings=settings.round_settings, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, rounds=plan.rounds),
        "end_round",
        plan.cluster,
    )
