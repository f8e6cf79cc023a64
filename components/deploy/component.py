"""The published checkpoint onto the endpoint: smoke requests, traffic in steps, the champion pointer."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(deploy: dict, publish: dict, service: dict, digest: str, target: str, state: str) -> str:
    from clincot.pipelines import tasks

    return tasks.deploy(deploy, publish, service, digest=digest, target=target, state=state)
