"""Kubeflow component of the stages propose, answer and judge."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def generate(
    settings: str,
    policy: str,
    policy_digest: str,
    shard: str,
    lap: int,
    questions: dsl.Input[dsl.Dataset],
    trained: dsl.Input[dsl.Model] = None,
) -> str:
    """Propose regions for the questions of a shard, answer them from every region, and let every judge score.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        policy: Address of the policy from which the run starts.
        policy_digest: sha256 of the policy that the task uses.
        shard: Name of the shard, such as 1/2.
        lap: How often earlier rounds used the questions.
        questions: Questions of the round (JSONL).
        trained: Challenger of the previous round; replaces `policy`.

    Returns:
        Output: sha256 of the files of the shard.
    """
    from clincot.pipelines import tasks

    return tasks.generate(
        settings,
        questions.path,
        policy=trained.path if trained else policy,
        policy_digest=policy_digest,
        shard=shard,
        lap=int(lap),
    )
