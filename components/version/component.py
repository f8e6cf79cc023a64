"""Kubeflow component of the version stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def version(
    version: dict,
    answer: dict,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    judgements: dsl.Input[dsl.Dataset],
    scores: dsl.Input[dsl.Dataset],
    panel_report: dsl.Input[dsl.Artifact],
    pairs: dsl.Input[dsl.Dataset],
    pair_report: dsl.Input[dsl.Artifact],
    version_record: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Commit the preference data of the round to the data repository.

    Args:
        version: Settings of the data repository: git address, branch, number of the version.
        answer: Settings of the answers: sampling, length, steps of a chain.
        questions: Questions of the round (JSONL).
        regions: Regions proposed for every question (JSONL).
        candidates: Answers of the policy, one for each region (JSONL).
        judgements: Score of every judge for every candidate (JSONL).
        scores: Combined score of the panel for every candidate (JSONL).
        panel_report: Agreement of the judges, calibration and excluded judges (JSON).
        pairs: Preference pairs with their score gaps (JSONL).
        pair_report: Counts and checks of the preference pairs (JSON).

    Returns:
        version_record: Record of the data version (JSONL, one record).
        metrics: Figures of the task for the Kubeflow UI.
        Output: Record of the data version as JSON.
    """
    from pathlib import Path

    from clincot.pipelines import tasks

    inputs = {
        "questions": questions.path,
        "regions": regions.path,
        "candidates": candidates.path,
        "judgements": judgements.path,
        "scores": scores.path,
        "panel_report": panel_report.path,
        "pairs": pairs.path,
        "pair_report": pair_report.path,
    }
    tasks.run_stage_task("version", version, inputs, {"version": version_record.path}, metrics=metrics, answer=answer)
    return Path(version_record.path).read_text(encoding="utf-8")
