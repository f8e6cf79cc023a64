"""The tasks of a round, one function each: what a task receives, where it runs, and what it is called.

pipelines/round.py puts them in order. Functions return the outputs of the task, or the task itself where the order of
tasks does not follow from their inputs.
"""

from __future__ import annotations

from typing import Any

from kfp import dsl

from clincot.components.decide.component import decide
from clincot.components.end_round.component import end_round
from clincot.components.evaluate.component import evaluate
from clincot.components.page.component import page
from clincot.components.pair.component import pair
from clincot.components.preflight.component import preflight
from clincot.components.prepare.component import prepare
from clincot.components.record_round.component import record_round
from clincot.components.record_run_status.component import record_run_status
from clincot.components.select_champion.component import select_champion
from clincot.components.start_round.component import start_round
from clincot.components.train.component import train
from clincot.components.version.component import version
from clincot.pipelines.generation_tasks import optional_artifact
from clincot.pipelines.placement import apply_placement
from clincot.pipelines.round_inputs import Challenger, PreferenceData, Round, RunParameters, StartingPoint
from clincot.pipelines.round_plan import RoundPlan


def add_run_status(plan: RoundPlan, run: RunParameters) -> dsl.PipelineTask:
    """Add the task that runs when all others have ended, successful or not."""
    task = record_run_status(publish=run.publish, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    return apply_placement(task, "record_run_status", plan.cluster)


def add_preflight(plan: RoundPlan, run: RunParameters) -> Any:
    return apply_placement(
        preflight(
            preflight=run.preflight,
            prepare=run.prepare,
            propose=run.propose,
            answer=run.answer,
            judge=run.judge,
            pair=run.pair,
            version=run.version,
            train=run.train,
            evaluate=run.evaluate,
            decide=run.decide,
            publish=run.publish,
            deploy=run.deploy,
            service=run.service,
            launch=run.launch,
            data=run.data,
            benchmark=run.benchmark,
            calibrated_on=run.calibrated_on,
        ),
        "preflight",
        plan.cluster,
    ).outputs


def add_start_round(plan: RoundPlan, run: RunParameters, checked: Any) -> Any:
    return apply_placement(
        start_round(
            publish=run.publish,
            number=run.number,
            rounds=plan.rounds,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            champion=checked["champion"],
        ),
        "start_round",
        plan.cluster,
    ).outputs


def add_prepare(this: Round) -> Any:
    return apply_placement(
        prepare(
            prepare=this.run.prepare,
            data=this.run.data,
            data_digest=this.start.data_digest,
            number=this.run.number,
            ahead=this.ahead,
            rounds=this.plan.rounds,
            shards=this.run.shards,
        ),
        "prepare",
        this.plan.cluster,
    ).outputs


def add_generation(this: Round, prepared: Any) -> Any:
    """Add the subpipeline that generates and scores candidates, shard by shard."""
    task = this.generate(
        propose=this.run.propose,
        answer=this.run.answer,
        judge=this.run.judge,
        data=this.run.data,
        data_digest=this.start.data_digest,
        policy=this.start.policy,
        policy_digest=this.start.policy_digest,
        panel_digest=this.start.panel_digest,
        shard_names=prepared["shard_names"],
        lap=prepared["lap"],
        questions=prepared["questions"],
        **optional_artifact("trained", this.start.trained),
    )
    return task.set_display_name("generate (all shards)").outputs


def add_pair(this: Round, prepared: Any, generated: Any) -> Any:
    return apply_placement(
        pair(
            pair=this.run.pair,
            lap=prepared["lap"],
            candidates=generated["candidates"],
            scores=generated["scores"],
        ),
        "pair",
        this.plan.cluster,
    ).outputs


def add_version(this: Round, data: PreferenceData) -> Any:
    return apply_placement(
        version(
            version=this.run.version,
            answer=this.run.answer,
            publish=this.run.publish,
            number=this.run.number,
            ahead=this.ahead,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            questions=data.questions,
            regions=data.regions,
            candidates=data.candidates,
            judgements=data.judgements,
            scores=data.scores,
            panel_report=data.panel_report,
            pairs=data.pairs,
            pair_report=data.pair_report,
        ),
        "version",
        this.plan.cluster,
    ).outputs


def add_train(this: Round, data: PreferenceData, versioned: Any) -> Any:
    return apply_placement(
        train(
            train=this.run.train,
            answer=this.run.answer,
            data=this.run.data,
            data_digest=this.start.data_digest,
            policy=this.start.policy,
            policy_digest=this.start.policy_digest,
            pairs_digest=data.pairs_digest,
            image=this.plan.cache_image("train"),
            version=versioned["Output"],
            launch=this.run.launch,
            lap=data.lap,
            questions=data.questions,
            regions=data.regions,
            candidates=data.candidates,
            pairs=data.pairs,
            **optional_artifact("trained", this.start.trained),
        ),
        "train",
        this.plan.cluster,
    ).outputs


def add_evaluate(
    plan: RoundPlan,
    run: RunParameters,
    start: StartingPoint,
    display_name: str,
    *,
    policy: Any,
    policy_digest: Any,
    trained: Any = None,
) -> Any:
    """Add the evaluation of a policy on the benchmark; return the outputs of the task."""
    return apply_placement(
        evaluate(
            evaluate=run.evaluate,
            propose=run.propose,
            data=run.data,
            data_digest=start.data_digest,
            benchmark=run.benchmark,
            benchmark_digest=start.benchmark_digest,
            policy=policy,
            policy_digest=policy_digest,
            image=plan.cache_image("evaluate"),
            **optional_artifact("trained", trained),
        ),
        "evaluate",
        plan.cluster,
        display_name=display_name,
    ).outputs


def add_decide(this: Round, data: PreferenceData, challenger: Challenger) -> Any:
    """Add the promotion gate; return the outputs of the task."""
    return apply_placement(
        decide(
            decide=this.run.decide,
            publish=this.run.publish,
            data=this.run.data,
            data_digest=this.start.data_digest,
            benchmark=this.run.benchmark,
            benchmark_digest=this.start.benchmark_digest,
            blind=this.run.blind_from,
            calibration=this.run.calibrated_on,
            champion_round=this.start.policy_round,
            champion=this.champion.champion_outcomes,
            challenger=challenger.outcomes,
            panel_report=data.panel_report,
            pair_report=data.pair_report,
            **optional_artifact("base", this.start.base),
            **optional_artifact("panel_report_before", this.start.panel_report_before),
        ),
        "decide",
        this.plan.cluster,
    ).outputs


def _list_round_files(data: PreferenceData, challenger: Challenger, decided: Any) -> dict[str, Any]:
    """The artifacts of a round that its record and its page are made from, by the name of the input."""
    return {
        "questions": data.questions,
        "regions": data.regions,
        "candidates": data.candidates,
        "judgements": data.judgements,
        "scores": data.scores,
        "panel_report": data.panel_report,
        "pairs": data.pairs,
        "pair_report": data.pair_report,
        "outcomes": challenger.outcomes,
        "report": challenger.report,
        "decision": decided["decision"],
        "evidence": decided["evidence"],
    }


def add_record(this: Round, data: PreferenceData, challenger: Challenger, decided: Any) -> dsl.PipelineTask:
    """Add the record of the round. It runs before anything acts on the decision, so that a retry can resume."""
    return apply_placement(
        record_round(
            publish=this.run.publish,
            number=this.run.number,
            ahead=this.ahead,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            checkpoint_digest=challenger.digest,
            **_list_round_files(data, challenger, decided),
        ),
        "record_round",
        this.plan.cluster,
    )


def add_page(this: Round, data: PreferenceData, challenger: Challenger, decided: Any) -> dsl.PipelineTask:
    return apply_placement(
        page(
            prepare=this.run.prepare,
            propose=this.run.propose,
            answer=this.run.answer,
            judge=this.run.judge,
            pair=this.run.pair,
            version=this.run.version,
            train=this.run.train,
            evaluate=this.run.evaluate,
            decide=this.run.decide,
            publish=this.run.publish,
            recipe=this.run.recipe,
            number=this.run.number,
            ahead=this.ahead,
            data=this.run.data,
            data_digest=this.start.data_digest,
            benchmark=this.run.benchmark,
            benchmark_digest=this.start.benchmark_digest,
            blind_from=this.run.blind_from,
            policy=this.start.policy,
            **_list_round_files(data, challenger, decided),
            checkpoint=challenger.checkpoint,
            champion_outcomes=this.champion.champion_outcomes,
            champion_report=this.champion.champion_report,
            **optional_artifact("trained", this.start.trained),
        ),
        "page",
        this.plan.cluster,
    )


def add_promotion(this: Round, data: PreferenceData, challenger: Challenger, decided: Any) -> dsl.PipelineTask:
    """Add the subpipeline that publishes and rolls out the challenger if it is promoted."""
    task = this.promote(
        publish=this.run.publish,
        deploy=this.run.deploy,
        service=this.run.service,
        verdict=decided["Output"],
        number=this.run.number,
        ahead=this.ahead,
        benchmark=this.run.benchmark,
        benchmark_digest=this.start.benchmark_digest,
        checkpoint=challenger.checkpoint,
        report=challenger.report,
        decision=decided["decision"],
        panel_report=data.panel_report,
    )
    return task.set_display_name("promote")


def add_select_champion(this: Round, challenger: Challenger, decided: Any) -> Any:
    return apply_placement(
        select_champion(
            verdict=decided["Output"],
            champion_outcomes=this.champion.champion_outcomes,
            champion_report=this.champion.champion_report,
            challenger_outcomes=challenger.outcomes,
            challenger_report=challenger.report,
        ),
        "select_champion",
        this.plan.cluster,
    ).outputs


def add_end_round(plan: RoundPlan, run: RunParameters) -> dsl.PipelineTask:
    """Add the record that the rounds of the run have ended. It has to run after all their tasks."""
    return apply_placement(
        end_round(publish=run.publish, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, rounds=plan.rounds),
        "end_round",
        plan.cluster,
    )
