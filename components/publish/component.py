"""Kubeflow component of the publish stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish(
    settings: str,
    number: int,
    ahead: int,
    challenger: dsl.Input[dsl.Model],
    challenger_results: dsl.Input[dsl.Dataset],
    evidence: dsl.Input[dsl.Dataset],
    preferences: dsl.Input[dsl.Dataset],
) -> str:
    """Publish the promoted checkpoint in the model registry, with its evidence.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        challenger: Challenger: weights, tokenizer and record.
        challenger_results: Folder: the challenger's outcomes and report.
        evidence: Folder: the decision and the answers that it compared.
        preferences: Folder: regions, candidates, judgements, scores, pairs.

    Returns:
        Output: sha256 of the published checkpoint.
    """
    from clincot.pipelines import round_files, tasks

    files = round_files.PublicationFiles(
        checkpoint=challenger.path,
        results=challenger_results.path,
        evidence=evidence.path,
        preferences=preferences.path,
    )
    return tasks.publish(settings, files, number=int(number) + int(ahead))
