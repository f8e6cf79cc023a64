"""Kubeflow component of the decide stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def decide(
    decide: dict,
    publish: dict,
    data: str,
    data_digest: str,
    benchmark: str,
    benchmark_digest: str,
    blind: str,
    calibration: str,
    champion_round: int,
    champion: dsl.Input[dsl.Dataset],
    challenger: dsl.Input[dsl.Dataset],
    panel_report: dsl.Input[dsl.Artifact],
    pair_report: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Artifact],
    evidence: dsl.Output[dsl.Dataset],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    base: dsl.Input[dsl.Dataset] = None,
    panel_report_before: dsl.Input[dsl.Artifact] = None,
) -> str:
    """Decide whether to promote the challenger."""
    from clincot.pipelines import tasks

    base_outcomes = base.path if base else champion.path  # compared only if the run starts from the base policy
    inputs = {
        "benchmark": benchmark,
        "data": data,
        "blind": blind,
        "calibration": calibration,
        "champion": champion.path,
        "challenger": challenger.path,
        "panel_report": panel_report.path,
        "pair_report": pair_report.path,
        "base": base_outcomes if int(champion_round) == 0 else "",
        "panel_report_before": panel_report_before.path if panel_report_before else "",
    }
    outputs = {"decision": decision.path, "evidence": evidence.path, "summary": summary.path}
    return tasks.decide(decide, publish, inputs, outputs, metrics=metrics)
