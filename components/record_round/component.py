"""Kubeflow component that records what a round made."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_round(
    settings: str,
    number: int,
    ahead: int,
    challenger_digest: str,
    questions: dsl.Input[dsl.Dataset],
    preferences: dsl.Input[dsl.Dataset],
    challenger_results: dsl.Input[dsl.Dataset],
    evidence: dsl.Input[dsl.Dataset],
):
    """Record the digests and the decision of a round in the store, before anything acts on the decision.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        challenger_digest: sha256 of the challenger.
        questions: Questions of the round (JSONL).
        preferences: Folder: regions, candidates, judgements, scores, pairs.
        challenger_results: Folder: the challenger's outcomes and report.
        evidence: Folder: the decision and the answers that it compared.
    """
    from clincot.pipelines import round_files, tasks

    publish = tasks.read_section("record_round", settings, "publish")
    files = round_files.RoundFiles.locate(
        questions.path, preferences=preferences.path, results=challenger_results.path, evidence=evidence.path
    )
    tasks.record_round(publish, files, number=int(number) + int(ahead), checkpoint_digest=challenger_digest)
