"""Kubeflow component that ends the rounds of a run."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def end_round(publish: dict, run: str, rounds: int) -> str:
    """Record in the store that the rounds of the run have ended, after everything that they do.

    Args:
        publish: Settings of the model registry: store, name of the model, golden questions.
        run: Identifier of the pipeline run.
        rounds: Number of rounds in the run.

    Returns:
        Output: What was recorded, in words.
    """
    from clincot.pipelines import tasks

    return tasks.end_round(publish, run_id=run, rounds=int(rounds))
