"""Kubeflow component of the stages propose, answer and judge."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def generate(work: str, group: str, judges: bool, trained: dsl.Input[dsl.Model] = None) -> str:
    """Propose regions for the questions of some shards, answer them from every region, and let every judge score.

    Args:
        work: Address of the settings of generate, with questions and policy.
        group: Shards of this task, such as 1-4/8.
        judges: Whether the judges score the answers too; otherwise judge does.
        trained: Challenger of the previous round; replaces `policy`.

    Returns:
        Output: sha256 of the list of the shards' files.
    """
    from clincot.pipelines import tasks

    return tasks.generate(work, group, trained=trained.path if trained else "", judges=judges)
