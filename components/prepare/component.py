"""Kubeflow component of the prepare stage."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    prepare: dict,
    data: str,
    data_digest: str,
    number: int,
    ahead: int,
    rounds: int,
    shards: int,
    questions: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Prepared", [("shard_names", list), ("lap", int)]):
    """Select the questions of a round and split them into shards.

    Args:
        prepare: Settings of the question split: number of subsets, limit, seed.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, starting at 0.
        rounds: Number of rounds in the run.
        shards: Number of shards into which the questions are split.

    Returns:
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        metrics: Figures of the task for the Kubeflow UI.
        shard_names: Names of the shards, such as 1/2 and 2/2.
        lap: How often earlier rounds used the same questions; each time samples with new seeds.
    """
    from pathlib import Path

    from clincot.pipelines import params, sharding, tasks

    with tasks.user_errors("prepare"):
        config, lap = params.build_prepare_config(prepare, int(number) + int(ahead), int(rounds))
        tasks.run_stage_task("prepare", config, {"data": data}, {"questions": questions.path}, metrics=metrics)
        return sharding.list_shard_names(Path(questions.path), int(shards)), lap
