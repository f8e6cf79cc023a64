"""Kubeflow component that records the failure of a run."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_run_status(publish: dict, run: str, status: dsl.PipelineTaskFinalStatus) -> str:
    """Record in the store that the run failed, if its round has not ended.

    Args:
        publish: Settings of the model registry: store, name of the model, golden questions.
        run: Identifier of the pipeline run.
        status: Final status of the run, filled in by Kubeflow Pipelines.

    Returns:
        Output: What was recorded, in words.
    """
    from clincot.pipelines import tasks

    return tasks.record_run_status(publish, state=status.state, run_id=run, error=status.error_message or "")
