"""Kubeflow component of the version stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def version(
    settings: str,
    number: int,
    ahead: int,
    run: str,
    preferences: dsl.Input[dsl.Dataset],
    data_version: dsl.Output[dsl.Artifact],
) -> str:
    """Commit the preference data of the round to the data repository.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        run: Identifier of the pipeline run.
        preferences: Folder: regions, candidates, judgements, scores, pairs.

    Returns:
        data_version: Version of the preference data, with its tag (JSON).
        Output: sha256 of the record of the data version.
    """
    from clincot.pipelines import tasks

    versioned = tasks.version(
        settings, preferences.path, data_version.path, number=int(number) + int(ahead), run_id=run
    )
    data_version.metadata.update(versioned.where)
    return versioned.digest
