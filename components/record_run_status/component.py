"""Kubeflow component that records how a run ended."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_run_status(publish: dict, run: str, status: dsl.PipelineTaskFinalStatus) -> str:
    """Record in the store how the run ended."""
    from clincot.pipelines import tasks

    return tasks.record_run_status(publish, state=status.state, run_id=run, error=status.error_message or "")
