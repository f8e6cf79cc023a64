"""The policy answers the questions of a shard from every region; one step of a chain a task."""

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
    from clincot.pipelines import params, tasks

    inputs = {"data": data, "questions": questions.path, "regions": regions.path}
    inputs["policy"] = trained.path if trained else policy
    if candidates_before and scores_before:
        inputs |= {"candidates_before": candidates_before.path, "scores_before": scores_before.path}
    with tasks.user_errors("answer"):
        params.check_step_count(answer, steps)
    return tasks.run_stage_task(
        "answer", answer, inputs, {"candidates": candidates.path}, metrics=metrics, shard=shard, lap=lap
    )
