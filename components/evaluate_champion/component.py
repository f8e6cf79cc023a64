"""Kubeflow component of the evaluate stage, for the champion."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_champion(
    settings: str,
    policy: str,
    policy_digest: str,
    champion_results: dsl.Output[dsl.Dataset],
):
    """Answer the benchmark with the champion from each kind of region, and measure the answers.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        policy: Address of the policy from which the run starts.
        policy_digest: sha256 of the policy that the task uses.

    Returns:
        champion_results: Folder: the champion's outcomes and report.
    """
    from clincot.pipelines import tasks

    tasks.evaluate(settings, policy, champion_results.path)
    champion_results.metadata.update({"champion": policy, "sha256": policy_digest})
