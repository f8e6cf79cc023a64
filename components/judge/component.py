"""Kubeflow component of the judge stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(
    judge: dict,
    answer: dict,
    data: str,
    data_digest: str,
    panel_digest: str,
    image: str,
    shard: str,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    judgements: dsl.Output[dsl.Dataset],
    scores: dsl.Output[dsl.Dataset],
    panel_report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Let every judge score every candidate of a shard."""
    from clincot.pipelines import tasks

    inputs = {"data": data, "questions": questions.path, "regions": regions.path, "candidates": candidates.path}
    outputs = {"judgements": judgements.path, "scores": scores.path, "panel_report": panel_report.path}
    return tasks.run_stage_task("judge", judge, inputs, outputs, metrics=metrics, shard=shard, answer=answer)
