"""The shards' regions, candidates and judgements, put together."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge(
    judge: dict,
    questions: dsl.Input[dsl.Dataset],
    region_parts: dsl.Input[list[dsl.Dataset]],
    candidate_parts: dsl.Input[list[dsl.Dataset]],
    judgement_parts: dsl.Input[list[dsl.Dataset]],
    report_parts: dsl.Input[list[dsl.Artifact]],
    regions: dsl.Output[dsl.Dataset],
    candidates: dsl.Output[dsl.Dataset],
    judgements: dsl.Output[dsl.Dataset],
    scores: dsl.Output[dsl.Dataset],
    panel_report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    from clincot.pipelines import tasks

    collected = {"regions": region_parts, "candidates": candidate_parts, "judgements": judgement_parts}
    collected["panel_report"] = report_parts
    parts = {name: [one.path for one in artifacts] for name, artifacts in collected.items()}
    outputs = {"regions": regions.path, "candidates": candidates.path, "judgements": judgements.path}
    outputs |= {"scores": scores.path, "panel_report": panel_report.path}
    return tasks.merge(judge, questions.path, parts, outputs, metrics=metrics)
