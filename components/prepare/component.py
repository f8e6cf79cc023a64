"""The questions of one round, and the shards that they are worked on in."""

from typing import NamedTuple

from clincot.components import IMAGE
from kfp import dsl


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
) -> NamedTuple("Prepared", [("shards", list), ("lap", int)]):
    from pathlib import Path

    from clincot.pipelines import sharding as sharding
    from clincot.pipelines import tasks

    with tasks.told("prepare"):
        section, lap = tasks.prepare_section(prepare, int(number) + int(ahead), int(rounds))
        tasks.run("prepare", section, {"data": data}, {"questions": questions.path}, metrics=metrics)
        return sharding.shard_names(Path(questions.path), int(shards)), lap
