"""Kubeflow component of the evaluate stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    evaluate: dict,
    propose: dict,
    data: str,
    data_digest: str,
    benchmark: str,
    benchmark_digest: str,
    policy: str,
    policy_digest: str,
    image: str,
    outcomes: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    trained: dsl.Input[dsl.Model] = None,
) -> str:
    """Answer the benchmark with a policy from each kind of region, and measure the answers."""
    from clincot.pipelines import params, tasks

    with tasks.user_errors("evaluate"):
        config = params.build_evaluate_config(evaluate, propose)
        reports = tasks.find_training_reports(data, benchmark)
    inputs = {"benchmark": benchmark, "policy": trained.path if trained else policy, "train_reports": reports}
    outputs = {"outcomes": outcomes.path, "report": report.path}
    return tasks.run_stage_task("evaluate", config, inputs, outputs, metrics=metrics)
