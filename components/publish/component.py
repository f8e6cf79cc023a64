"""Kubeflow component of the publish stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish(
    settings: str,
    number: int,
    ahead: int,
    challenger: dsl.Input[dsl.Model],
    round_files: dsl.Input[dsl.Dataset],
) -> str:
    """Publish the promoted checkpoint in the model registry, with its evidence.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        challenger: Challenger: weights, tokenizer and record.
        round_files: Folder: the decision, and all files of the round.

    Returns:
        Output: sha256 of the published checkpoint.
    """
    from clincot.pipelines import tasks

    return tasks.publish(settings, challenger.path, round_files.path, number=int(number) + int(ahead))
