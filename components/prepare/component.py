"""Kubeflow component of the prepare stage."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    settings: str,
    number: int,
    ahead: int,
    rounds: int,
    shards: int,
    questions: dsl.Output[dsl.Dataset],
) -> NamedTuple("Prepared", [("shard_names", list), ("lap", int)]):
    """Select the questions of a round and split them into shards.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        rounds: Number of rounds in the run.
        shards: Number of shards into which the questions of a round are split.

    Returns:
        questions: Questions of the round (JSONL).
        shard_names: Names of the shards, such as 1/2 and 2/2.
        lap: How often earlier rounds used the questions.
    """
    from clincot.pipelines import tasks

    return tasks.prepare(
        settings, questions.path, number=int(number) + int(ahead), rounds=int(rounds), shards=int(shards)
    )
