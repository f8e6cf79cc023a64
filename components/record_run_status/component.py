"""How the run ended, for the store's records; what it left behind is taken away."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def record_run_status(publish: dict, run: str, status: dsl.PipelineTaskFinalStatus) -> str:
    from clincot.pipelines import tasks

    return tasks.record_run_status(publish, state=status.state, run_id=run, error=status.error_message or "")
