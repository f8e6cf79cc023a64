"""Kubeflow component of the rollout, which is not a stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(settings: str, digest: str, target: str, state: str) -> str:
    """Roll out the published checkpoint: smoke tests, traffic in steps, then the champion pointer.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        digest: sha256 of the published checkpoint.
        target: Where to roll out: kserve or local.
        state: Folder of a local rollout; empty: serving.

    Returns:
        Output: Outcome of the rollout, in words.
    """
    from clincot.pipelines import tasks

    return tasks.deploy(settings, digest=digest, target=target, state=state)
