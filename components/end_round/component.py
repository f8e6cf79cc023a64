"""Kubeflow component that ends the rounds of a run."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def end_round(settings: str, run: str, rounds: int) -> str:
    """Record in the store that the rounds of the run have ended, after everything that they do.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        run: Identifier of the pipeline run.
        rounds: Number of rounds in the run.

    Returns:
        Output: What was recorded, in words.
    """
    from clincot.pipelines import tasks

    publish = tasks.read_section("end_round", settings, "publish")
    return tasks.end_round(publish, run_id=run, rounds=int(rounds))
