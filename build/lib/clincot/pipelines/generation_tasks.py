"""The tasks that generate and score candidates: each shard proposes, answers and judges, then the shards are merged.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from kfp import dsl

from clincot.components.answer.component import answer
from clincot.components.judge.component import judge
from clincot.components.merge.component import merge
from clincot.components.propose.component import propose
from clincot.pipelines.pipeline_builder import build_pipeline
from clincot.pipelines.placement import apply_placement
from clincot.pipelines.round_plan import RoundPlan


@dataclass(frozen=True)
class GenerationInputs:
    """Inputs of the generation subpipeline."""

    propose: dict
    answer: dict
    judge: dict
    data: str
    data_digest: str
    policy: str
    policy_digest: str
    panel_digest: str
    shard_names: list
    lap: int
    questions: dsl.Input[dsl.Dataset]
    trained: dsl.Input[dsl.Model] = None


class GenerationOutputs(NamedTuple):
    """Merged files of all shards."""

    regions: dsl.Dataset
    candidates: dsl.Dataset
    judgements: dsl.Dataset
    scores: dsl.Dataset
    panel_report: dsl.Artifact


def build_generation(plan: RoundPlan, *, continued: bool = False) -> Any:
    """Build the subpipeline of the generation. continued: it starts from a policy that this run trained.

    It is a pipeline of its own because kfp.local, inside a loop, mistakes every parameter that comes from another task
    for the item of the loop. As inputs of a pipeline they are not affected.
    """
    return build_pipeline(
        "generation",
        "Generate and score the candidates of every shard, and merge the shards.",
        [GenerationInputs],
        GenerationOutputs,
        lambda inputs: _add_generation(plan, inputs),
        optional=continued,
    )


def optional_artifact(name: str, artifact: Any) -> dict[str, Any]:
    """Return an optional input of a component as a keyword argument: kfp refuses None for an artifact."""
    return {} if artifact is None else {name: artifact}


def _add_generation(plan: RoundPlan, inputs: GenerationInputs) -> GenerationOutputs:
    with dsl.ParallelFor(
        inputs.shard_names, name="generate (one shard)", parallelism=plan.cluster.parallel_shards
    ) as shard:
        proposed = _add_propose(plan, inputs, shard)
        answered, judged = _add_step(plan, inputs, shard, proposed, step=1)
        for step in range(2, len(plan.params.answer.steps) + 1):
            answered, judged = _add_step(plan, inputs, shard, proposed, step, answered, judged)
    merged = apply_placement(
        merge(
            judge=inputs.judge,
            questions=inputs.questions,
            region_parts=dsl.Collected(proposed["regions"]),
            candidate_parts=dsl.Collected(answered["candidates"]),
            report_parts=dsl.Collected(judged["panel_report"]),
            judgement_parts=dsl.Collected(judged["judgements"]),
        ),
        "merge",
        plan.cluster,
    ).outputs
    return GenerationOutputs(
        regions=merged["regions"],
        candidates=merged["candidates"],
        judgements=merged["judgements"],
        scores=merged["scores"],
        panel_report=merged["panel_report"],
    )


def _add_propose(plan: RoundPlan, inputs: GenerationInputs, shard: Any) -> Any:
    return apply_placement(
        propose(
            propose=inputs.propose,
            data=inputs.data,
            data_digest=inputs.data_digest,
            policy=inputs.policy,
            policy_digest=inputs.policy_digest,
            image=plan.cache_image("propose"),
            shard=shard,
            lap=inputs.lap,
            questions=inputs.questions,
            **optional_artifact("trained", inputs.trained),
        ),
        "propose",
        plan.cluster,
    ).outputs


def _add_step(
    plan: RoundPlan,
    inputs: GenerationInputs,
    shard: Any,
    proposed: Any,
    step: int,
    answered_before: Any = None,
    judged_before: Any = None,
) -> tuple[Any, Any]:
    """Add one step of a chain, which answers and judges; later steps build on the one before. Returns their outputs."""
    steps = len(plan.params.answer.steps)
    suffix = f": step {step} of {steps}" if steps > 1 else ""
    answered = apply_placement(
        answer(
            answer=inputs.answer,
            steps=steps,
            data=inputs.data,
            data_digest=inputs.data_digest,
            policy=inputs.policy,
            policy_digest=inputs.policy_digest,
            image=plan.cache_image("answer"),
            shard=shard,
            lap=inputs.lap,
            questions=inputs.questions,
            regions=proposed["regions"],
            **optional_artifact("trained", inputs.trained),
            **optional_artifact("candidates_before", answered_before and answered_before["candidates"]),
            **optional_artifact("scores_before", judged_before and judged_before["scores"]),
        ),
        "answer",
        plan.cluster,
        display_name=f"answer questions{suffix}",
    ).outputs
    judged = apply_placement(
        judge(
            judge=inputs.judge,
            answer=inputs.answer,
            data=inputs.data,
            data_digest=inputs.data_digest,
            panel_digest=inputs.panel_digest,
            image=plan.cache_image("judge"),
            shard=shard,
            questions=inputs.questions,
            regions=proposed["regions"],
            candidates=answered["candidates"],
        ),
        "judge",
        plan.cluster,
        display_name=f"judge candidates{suffix}",
    ).outputs
    return answered, judged
