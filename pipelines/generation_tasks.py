"""The tasks that make preference pairs: each shard generates and scores candidates, then the shards are paired.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from kfp import dsl

from clincot.components.generate.component import generate
from clincot.components.judge.component import judge
from clincot.components.pair.component import pair
from clincot.pipelines.pipeline_builder import build_pipeline
from clincot.pipelines.placement import apply_placement
from clincot.pipelines.round_plan import RoundPlan


@dataclass(frozen=True)
class GenerationInputs:
    """Inputs of the generation subpipeline."""

    pair_settings: str
    work: str
    questions: str
    shard_groups: list
    lap: int
    trained: dsl.Input[dsl.Model] = None


class GenerationOutputs(NamedTuple):
    """The folder with the merged files of all shards and their pairs."""

    preferences: dsl.Dataset


def build_generation(plan: RoundPlan, *, continued: bool = False) -> Any:
    """Build the subpipeline of the generation. continued: it starts from a policy that this run trained.

    It is a pipeline of its own because kfp.local, inside a loop, mistakes every parameter that comes from another task
    for the item of the loop. As inputs of a pipeline they are not affected.
    """
    return build_pipeline(
        "generation",
        "Generate and score the candidates of every shard, and pair them.",
        [GenerationInputs],
        GenerationOutputs,
        lambda inputs: _add_generation(plan, inputs),
        optional=continued,
    )


def optional_artifact(name: str, artifact: Any) -> dict[str, Any]:
    """Return an optional input of a component as a keyword argument: kfp refuses None for an artifact."""
    return {} if artifact is None else {name: artifact}


def _add_generation(plan: RoundPlan, inputs: GenerationInputs) -> GenerationOutputs:
    """Add the loop over the groups of shards, and the task that merges the shards.

    A group hands on the digest of the list of its shards, not files: kfp passes everything that a task receives as one
    argument, and the descriptions of the files of 58 shards did not fit into one (MAX_ARG_STRLEN of Linux, 128 KiB).
    Judges that are all endpoints have a task of their own, so that no accelerator waits for their replies.
    """
    with dsl.ParallelFor(inputs.shard_groups, name="each group of shards") as group:
        scored = apply_placement(
            generate(
                work=inputs.work,
                group=group,
                judges=not plan.judges_apart,
                **optional_artifact("trained", inputs.trained),
            ),
            "generate",
            plan.cluster,
        )
        if plan.judges_apart:
            scored = apply_placement(
                judge(work=inputs.work, group=group, answered=scored.output), "judge", plan.cluster
            )
    paired = apply_placement(
        pair(
            settings=inputs.pair_settings,
            lap=inputs.lap,
            questions=inputs.questions,
            shards=dsl.Collected(scored.output),
        ),
        "pair",
        plan.cluster,
    )
    return GenerationOutputs(preferences=paired.outputs["preferences"])
