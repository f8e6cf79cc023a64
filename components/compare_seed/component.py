"""Kubeflow component that runs the rounds of one seed of a comparison."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_seed(settings: str, seed: str) -> str:
    """Run all rounds of one seed, with SFT and DPO on the same pairs, and store what was measured.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        seed: Seed of this task.

    Returns:
        Output: Address of what was measured.
    """
    from clincot.pipelines import comparison_tasks

    return comparison_tasks.compare_seed(settings, seed)
