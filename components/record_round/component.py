"""Kubeflow component that records what a round made."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_round(
    settings: str,
    number: int,
    ahead: int,
    challenger_digest: str,
    run: str,
    round_files: dsl.Input[dsl.Dataset],
):
    """Record the digests and the decision of a round in the store, before anything acts on the decision.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        challenger_digest: sha256 of the challenger.
        run: Identifier of the pipeline run.
        round_files: Folder: the decision, and all files of the round.
    """
    from clincot.pipelines import tasks

    publish = tasks.read_section("record_round", settings, "publish")
    files = tasks.locate_round_files(round_files.path)
    tasks.record_round(publish, files, number=int(number) + int(ahead), checkpoint_digest=challenger_digest, run_id=run)
