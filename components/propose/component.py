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
    """Propose regions for every question of a shard.

    Args:
        propose: Settings of the regions: grounders and their counts, hypotheses, sampling.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        policy: Address of the checkpoint from which the run starts.
        policy_digest: sha256 of the checkpoint that the task uses, part of the cache key.
        image: Image or source version, which stands for the code in the cache key.
        shard: Shard of the questions to process, such as 1/2.
        lap: How often earlier rounds used the same questions; each time samples with new seeds.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        trained: Checkpoint that the previous round of this run trained; replaces `policy`.

    Returns:
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the regions.
    """
    from clincot.pipelines import tasks

    inputs = {"data": data, "questions": questions.path, "policy": trained.path if trained else policy}
    return tasks.run_stage_task(
        "propose", propose, inputs, {"regions": regions.path}, metrics=metrics, shard=shard, lap=lap
    )
