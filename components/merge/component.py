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
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        region_parts: Regions of every shard.
        candidate_parts: Candidates of every shard.
        judgement_parts: Judgements of every shard.
        report_parts: Panel reports of every shard.

    Returns:
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        judgements: JSON Lines of every judge's score of every candidate, which `judge` writes.
        scores: JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.
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
