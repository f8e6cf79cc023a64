"""Kubeflow component of the train stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    train: dict,
    answer: dict,
    data: str,
    data_digest: str,
    policy: str,
    policy_digest: str,
    pairs_digest: str,
    image: str,
    version: str,
    launch: dict,
    lap: int,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    pairs: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    trained: dsl.Input[dsl.Model] = None,
) -> str:
    """Train the challenger on the preference pairs with margin-aware DPO."""
    from clincot.pipelines import tasks

    inputs = {
        "data": data,
        "policy": trained.path if trained else policy,
        "questions": questions.path,
        "regions": regions.path,
        "candidates": candidates.path,
        "pairs": pairs.path,
    }
    return tasks.run_stage_task(
        "train",
        train,
        inputs,
        {"checkpoint": checkpoint.path},
        metrics=metrics,
        answer=answer,
        documents={"version": version, "launch": launch},
        lap=lap,
    )
