"""Kubeflow component of the prepare stage."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    settings: str,
    generate_settings: str,
    policy: str,
    policy_digest: str,
    number: int,
    ahead: int,
    rounds: int,
    shards: int,
    groups: int,
) -> NamedTuple("PreparedRound", [("work", str), ("questions", str), ("shard_groups", list), ("lap", int)]):
    """Select the questions of a round, and divide them among the tasks that generate candidates.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        generate_settings: Settings of generate.
        policy: Address of the policy from which the run starts.
        policy_digest: sha256 of the policy that the task uses.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        rounds: Number of rounds in the run.
        shards: Number of shards into which the questions of a round are split.
        groups: Largest number of tasks that process shards.

    Returns:
        work: Address of the settings of generate, with questions and policy.
        questions: sha256 of the questions of the round.
        shard_groups: Shards of each task, such as 1-4/8 and 5-8/8.
        lap: How often earlier rounds used the questions.
    """
    from clincot.pipelines import round_files, tasks

    order = round_files.RoundOrder(number=int(number) + int(ahead), rounds=int(rounds))
    return tasks.prepare(
        settings, generate_settings, (policy, policy_digest), order, shards=int(shards), groups=int(groups)
    )
