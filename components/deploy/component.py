"""Kubeflow component of the rollout, which is not a stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(deploy: dict, publish: dict, service: dict, digest: str, target: str, state: str) -> str:
    """Roll out the published checkpoint: smoke tests, traffic in steps, then the champion pointer."""
    from clincot.pipelines import tasks

    return tasks.deploy(deploy, publish, service, digest=digest, target=target, state=state)
