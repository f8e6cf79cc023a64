"""Kubeflow component that merges shards."""

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
    """Merge the regions, candidates and judgements of all shards.

    Args:
        judge: Settings of the judge panel: judges, calibration, quorum, retries.
        questions: Questions of the round (JSONL).
        region_parts: Regions of every shard.
        candidate_parts: Candidates of every shard.
        judgement_parts: Judgements of every shard.
        report_parts: Panel reports of every shard.

    Returns:
        regions: Regions proposed for every question (JSONL).
        candidates: Answers of the policy, one for each region (JSONL).
        judgements: Score of every judge for every candidate (JSONL).
        scores: Combined score of the panel for every candidate (JSONL).
        panel_report: Agreement of the judges, calibration and excluded judges (JSON).
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the merged candidates.
    """
    from clincot.pipelines import tasks

    parts = {
        "regions": [part.path for part in region_parts],
        "candidates": [part.path for part in candidate_parts],
        "judgements": [part.path for part in judgement_parts],
        "panel_report": [part.path for part in report_parts],
    }
    outputs = {
        "regions": regions.path,
        "candidates": candidates.path,
        "judgements": judgements.path,
        "scores": scores.path,
        "panel_report": panel_report.path,
    }
    return tasks.merge(judge, questions.path, parts, outputs, metrics=metrics)
