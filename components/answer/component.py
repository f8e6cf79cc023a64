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
    """Answer the questions of a shard from every region; each step of a chain is a task of its own."""
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
