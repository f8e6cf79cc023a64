"""Kubeflow component of the stage judge, for judges that are endpoints."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(work: str, group: str, answered: str) -> str:
    """Let every judge, all of them endpoints, score the answers of some shards.

    Args:
        work: Address of the settings of generate, with questions and policy.
        group: Shards of this task, such as 1-4/8.
        answered: What generate returned for this group.

    Returns:
        Output: sha256 of the list of the shards' files, with scores.
    """
    from clincot.pipelines import tasks

    return tasks.judge(work, group, answered)
