"""Kubeflow component that records what a round made."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_round(
    publish: dict,
    number: int,
    ahead: int,
    run: str,
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
        run: Identifier of the pipeline run.
        checkpoint_digest: sha256 of the challenger's checkpoint.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        judgements: JSON Lines of every judge's score of every candidate, which `judge` writes.
        scores: JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.
        pairs: JSON Lines of preference pairs with their score gaps, which `pair` writes.
        pair_report: JSON report of how many pairs were made and why others were not, which `pair` writes.
        outcomes: JSON Lines of a policy's answers to the benchmark, one per question and arm, which `evaluate` writes.
        report: JSON report of the stage: all checks from `preflight`, the benchmark's metrics from `evaluate`.
        decision: JSON of the verdict (promote, keep or blocked) with its checks, which `decide` writes.
        evidence: JSON Lines of both sides' answers to every benchmark question, which `decide` writes.
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
    tasks.record_round(publish, files, number=int(number) + int(ahead), checkpoint_digest=checkpoint_digest, run_id=run)
