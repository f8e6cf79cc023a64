"""Kubeflow component that records the failure of a run."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_run_status(store: str, model: str, run: str, status: dsl.PipelineTaskFinalStatus) -> str:
    """Record in the store that the run failed, if its round has not ended.

    Args:
        store: Required. Folder or `s3://bucket/prefix` for checkpoints, champion and records.
        model: Name of the model whose checkpoints succeed one another.
        run: Identifier of the pipeline run.
        status: Final status of the run, from Kubeflow Pipelines.

    Returns:
        Output: What was recorded, in words.
    """
    from clincot.pipelines import tasks

    publish = {"store": store, "name": model}
    return tasks.record_run_status(publish, state=status.state, run_id=run, error=status.error_message or "")
