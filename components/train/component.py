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
    """Train the challenger on the preference pairs with margin-aware DPO.

    Args:
        train: Settings of the training: loss, margin, learning rate, batch size, adapters.
        answer: Settings of the answers: sampling, length, steps of a chain.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        policy: Address of the checkpoint from which the run starts.
        policy_digest: sha256 of the checkpoint that the task uses, part of the cache key.
        pairs_digest: sha256 of the preference pairs, part of the cache key.
        image: Image or source version, which stands for the code in the cache key.
        version: Record of the data version as JSON, kept with the checkpoint.
        launch: How training is started: in the task, with torchrun, or as a TrainJob.
        lap: How often earlier rounds used the same questions; each time samples with new seeds.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        pairs: JSON Lines of preference pairs with their score gaps, which `pair` writes.
        trained: Checkpoint that the previous round of this run trained; replaces `policy`.

    Returns:
        checkpoint: Folder of a model's weights, tokenizer and record, which `train` writes.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the challenger's checkpoint.
    """
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
