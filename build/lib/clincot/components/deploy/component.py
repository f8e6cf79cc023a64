"""Kubeflow component of the rollout, which is not a stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(deploy: dict, publish: dict, service: dict, digest: str, target: str, state: str) -> str:
    """Roll out the published checkpoint: smoke tests, traffic in steps, then the champion pointer.

    Args:
        deploy: Settings of the rollout: traffic steps, time limits, smoke tests, approval.
        publish: Settings of the model registry: store, name of the model, golden questions.
        service: Settings of the InferenceService: name, namespace, engine, images, resources.
        digest: sha256 of the published checkpoint to roll out.
        target: Where to roll out: kserve or local.
        state: Folder for the state of a local rollout; empty: serving.

    Returns:
        Output: Outcome of the rollout, in words.
    """
    from clincot.pipelines import tasks

    return tasks.deploy(deploy, publish, service, digest=digest, target=target, state=state)
