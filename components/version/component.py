"""Kubeflow component of the version stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def version(
    version: dict,
    answer: dict,
    publish: dict,
    number: int,
    ahead: int,
    run: str,
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
        publish: Settings of the model registry: store, name of the model, golden questions.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, starting at 0.
        run: Identifier of the pipeline run.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        judgements: JSON Lines of every judge's score of every candidate, which `judge` writes.
        scores: JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.
        pairs: JSON Lines of preference pairs with their score gaps, which `pair` writes.
        pair_report: JSON report of how many pairs were made and why others were not, which `pair` writes.

    Returns:
        version_record: JSON record of the preference data's version: its files, digest and revision; `version` writes
            it.
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
    origin = tasks.describe_data_origin(publish, number=int(number) + int(ahead), run_id=run)
    tasks.run_stage_task(
        "version",
        version,
        inputs,
        {"version": version_record.path},
        metrics=metrics,
        answer=answer,
        documents={"origin": origin},
    )
    return Path(version_record.path).read_text(encoding="utf-8")
