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
    """Record the digests and the decision of a round in the store, before anything acts on the decision.

    Args:
        publish: Settings of the model registry: store, name of the model, golden questions.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, starting at 0.
        checkpoint_digest: sha256 of the challenger's checkpoint.
        questions: Questions of the round (JSONL).
        regions: Regions proposed for every question (JSONL).
        candidates: Answers of the policy, one for each region (JSONL).
        judgements: Score of every judge for every candidate (JSONL).
        scores: Combined score of the panel for every candidate (JSONL).
        panel_report: Agreement of the judges, calibration and excluded judges (JSON).
        pairs: Preference pairs with their score gaps (JSONL).
        pair_report: Counts and checks of the preference pairs (JSON).
        outcomes: Answer to every benchmark question for each kind of region (JSONL).
        report: Benchmark metrics with their intervals (JSON).
        decision: Decision of the promotion gate (JSONL, one record).
        evidence: Paired scores on which the decision rests (JSONL).
    """
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
