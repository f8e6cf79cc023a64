"""Kubeflow component of the pair stage, which merges the shards first."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pair(
    settings: str,
    lap: int,
    questions: str,
    shards: list,
    preferences: dsl.Output[dsl.Dataset],
):
    """Merge the shards, and build preference pairs from the scored candidates.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        lap: How often earlier rounds used the questions.
        questions: sha256 of the questions of the round.
        shards: What generate or judge returned for each group.

    Returns:
        preferences: Folder: regions, candidates, judgements, scores, pairs.
    """
    from clincot.pipelines import tasks

    preferences.metadata.update(tasks.pair(settings, questions, shards, preferences.path, lap=int(lap)))
