"""The tasks that follow a promotion: publish the checkpoint, and roll it out.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

from dataclasses import dataclass
from typing import Any

from kfp import dsl

from clincot.components.deploy.component import deploy
from clincot.components.publish.component import publish
from clincot.pipelines.pipeline_builder import build_pipeline
from clincot.pipelines.placement import apply_placement
from clincot.pipelines.round_plan import RoundPlan


@dataclass(frozen=True)
class PromotionInputs:
    """Inputs of the promotion subpipeline."""

    publish: dict
    deploy: dict
    service: dict
    verdict: str
    number: int
    ahead: int
    benchmark: str
    benchmark_digest: str
    checkpoint: dsl.Input[dsl.Model]
    report: dsl.Input[dsl.Artifact]
    decision: dsl.Input[dsl.Artifact]
    panel_report: dsl.Input[dsl.Artifact]


def build_promotion(plan: RoundPlan) -> Any:
    """Build the subpipeline of the promotion, which does nothing if the verdict is not to promote.

    It is a pipeline of its own so that a task can follow it in both cases. kfp refuses `after` on a dsl.If, and Argo
    omits what depends on a skipped one: Kubeflow Pipelines 2.17.0 compiles every dependency to `TASK.Succeeded`
    (backend/src/v2/compiler/argocompiler/dag.go, depends). A subpipeline whose condition is false has succeeded.
    """
    return build_pipeline(
        "promotion",
        "Publish and roll out the challenger if it is promoted.",
        [PromotionInputs],
        None,
        lambda inputs: _add_promotion(plan, inputs),
    )


def _add_promotion(plan: RoundPlan, inputs: PromotionInputs) -> None:
    with dsl.If(inputs.verdict == "promote", name="if promoted"):
        published = _add_publish(plan, inputs)
        if plan.deploys:
            _add_deploy(plan, inputs, published)


def _add_publish(plan: RoundPlan, inputs: PromotionInputs) -> Any:
    return apply_placement(
        publish(
            publish=inputs.publish,
            number=inputs.number,
            ahead=inputs.ahead,
            benchmark=inputs.benchmark,
            benchmark_digest=inputs.benchmark_digest,
            image=plan.cache_image("publish"),
            checkpoint=inputs.checkpoint,
            report=inputs.report,
            decision=inputs.decision,
            panel_report=inputs.panel_report,
        ),
        "publish",
        plan.cluster,
    ).outputs


def _add_deploy(plan: RoundPlan, inputs: PromotionInputs, published: Any) -> None:
    apply_placement(
        deploy(
            deploy=inputs.deploy,
            publish=inputs.publish,
            service=inputs.service,
            digest=published["Output"],
            target=plan.target,
            state=plan.state,
        ),
        "deploy",
        plan.cluster,
    )
