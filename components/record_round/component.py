"""Kubeflow component that records what a round made."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_round(
    publish: dict,
    number: int,
    ahead: int,
    checkpoint_digest: str,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    judgements: dsl.Input[dsl.Dataset],
    scores: dsl.Input[dsl.Dataset],
    panel_report: dsl.Input[dsl.Artifact],
    pairs: dsl.Input[dsl.Dataset],
    pair_report: dsl.Input[dsl.Artifact],
    outcomes: dsl.Input[dsl.Dataset],
    report: dsl.Input[dsl.Artifact],
    decision: dsl.Input[dsl.Artifact],
    evidence: dsl.Input[dsl.Dataset],
):
    """Record the digests and the decision of a round in the store, before anything acts on the decision."""
    from clincot.pipelines import round_files, tasks

    files = round_files.RoundFiles(
        questions=questions.path,
        regions=regions.path,
        candidates=candidates.path,
        judgements=judgements.path,
        scores=scores.path,
        panel_report=panel_report.path,
        pairs=pairs.path,
        pair_report=pair_report.path,
        outcomes=outcomes.path,
        report=report.path,
        decision=decision.path,
        evidence=evidence.path,
    )
    tasks.record_round(publish, files, number=int(number) + int(ahead), checkpoint_digest=checkpoint_digest)
