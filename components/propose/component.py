"""Kubeflow component of the propose stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def propose(
    propose: dict,
    data: str,
    data_digest: str,
    policy: str,
    policy_digest: str,
    image: str,
    shard: str,
    lap: int,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    trained: dsl.Input[dsl.Model] = None,
) -> str:
    """Propose regions for every question of a shard."""
    from clincot.pipelines import tasks

    inputs = {"data": data, "questions": questions.path, "policy": trained.path if trained else policy}
    return tasks.run_stage_task(
        "propose", propose, inputs, {"regions": regions.path}, metrics=metrics, shard=shard, lap=lap
    )
