"""The tasks that act on a decision: record the round and, after a promotion, publish the checkpoint and roll it out.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

from dataclasses import dataclass
from typing import Any

from kfp import dsl

from clincot.components.deploy.component import deploy
from clincot.components.publish.component import publish
from clincot.components.record_round.component import record_round
from clincot.pipelines.pipeline_builder import build_pipeline
from clincot.pipelines.placement import apply_placement
from clincot.pipelines.round_plan import RoundPlan


@dataclass(frozen=True)
class PromotionInputs:
    """Inputs of the promotion subpipeline."""

    round_settings: str
    publish_settings: str
    deploy_settings: str
    verdict: str
    number: int
    ahead: int
    challenger_digest: str
    challenger: dsl.Input[dsl.Model]
    round_files: dsl.Input[dsl.Dataset]


def build_promotion(plan: RoundPlan) -> Any:
    """Build the subpipeline of the promotion, which only records the round if the verdict is not to promote.

    It is a pipeline of its own so that a task can follow it in both cases. kfp refuses `after` on a dsl.If, and Argo
    omits what depends on a skipped one: Kubeflow Pipelines 2.17.0 compiles every dependency to `TASK.Succeeded`
    (backend/src/v2/compiler/argocompiler/dag.go, depends). A subpipeline whose condition is false has succeeded.
    """
    return build_pipeline(
        "promotion",
        "Record the round, then publish and roll out the challenger if it is promoted.",
        [PromotionInputs],
        None,
        lambda inputs: _add_promotion(plan, inputs),
    )


def _add_promotion(plan: RoundPlan, inputs: PromotionInputs) -> None:
    recorded = apply_placement(
        record_round(
            settings=inputs.round_settings,
            number=inputs.number,
            ahead=inputs.ahead,
            challenger_digest=inputs.challenger_digest,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            round_files=inputs.round_files,
        ),
        "record_round",
        plan.cluster,
    )
    with dsl.If(inputs.verdict == "promote", name="if promoted"):
        published = _add_publish(plan, inputs).after(recorded)
        if plan.deploys:
            _add_deploy(plan, inputs, published)


def _add_publish(plan: RoundPlan, inputs: PromotionInputs) -> Any:
    return apply_placement(
        publish(
            settings=inputs.publish_settings,
            number=inputs.number,
            ahead=inputs.ahead,
            challenger=inputs.challenger,
            round_files=inputs.round_files,
        ),
        "publish",
        plan.cluster,
    )


def _add_deploy(plan: RoundPlan, inputs: PromotionInputs, published: Any) -> None:
    apply_placement(
        deploy(settings=inputs.deploy_settings, digest=published.output, target=plan.target, state=plan.state),
        "deploy",
        plan.cluster,
    )
