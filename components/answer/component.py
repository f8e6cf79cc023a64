"""Kubeflow component of the answer stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def answer(
    answer: dict,
    steps: int,
    data: str,
    data_digest: str,
    policy: str,
    policy_digest: str,
    image: str,
    shard: str,
    lap: int,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    trained: dsl.Input[dsl.Model] = None,
    candidates_before: dsl.Input[dsl.Dataset] = None,
    scores_before: dsl.Input[dsl.Dataset] = None,
) -> str:
    """Answer the questions of a shard from every region; each step of a chain is a task of its own.

    Args:
        answer: Settings of the answers: sampling, length, steps of a chain.
        steps: Number of questions in a chain for which the pipeline was compiled.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        policy: Address of the checkpoint from which the run starts.
        policy_digest: sha256 of the checkpoint that the task uses, part of the cache key.
        image: Image or source version, which stands for the code in the cache key.
        shard: Shard of the questions to process, such as 1/2.
        lap: How often earlier rounds used the same questions; each time samples with new seeds.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        trained: Checkpoint that the previous round of this run trained; replaces `policy`.
        candidates_before: JSON Lines of the candidates of a chain's earlier steps, which `answer` writes.
        scores_before: JSON Lines of the scores of a chain's earlier steps, which `judge` writes.

    Returns:
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the candidates.
    """
    from clincot.pipelines import params, tasks

    inputs = {
        "data": data,
        "questions": questions.path,
        "regions": regions.path,
        "policy": trained.path if trained else policy,
        "candidates_before": candidates_before.path if candidates_before else "",
        "scores_before": scores_before.path if scores_before else "",
    }
    with tasks.user_errors("answer"):
        params.check_step_count(answer, steps)
    return tasks.run_stage_task(
        "answer", answer, inputs, {"candidates": candidates.path}, metrics=metrics, shard=shard, lap=lap
    )
