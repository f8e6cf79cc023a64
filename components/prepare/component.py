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
    """Select the questions of a round and split them into shards."""
    from pathlib import Path

    from clincot.pipelines import params, sharding, tasks

    with tasks.user_errors("prepare"):
        config, lap = params.build_prepare_config(prepare, int(number) + int(ahead), int(rounds))
        tasks.run_stage_task("prepare", config, {"data": data}, {"questions": questions.path}, metrics=metrics)
        return sharding.list_shard_names(Path(questions.path), int(shards)), lap
