"""Does the challenger take the champion's place?"""

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
    from clincot.pipelines import tasks

    inputs = {"benchmark": benchmark, "data": data, "blind": blind, "calibration": calibration}
    inputs |= {"champion": champion.path, "challenger": challenger.path}
    inputs |= {"panel_report": panel_report.path, "pair_report": pair_report.path}
    if int(champion_round) == 0:  # the run began at the base policy
        inputs["base"] = base.path if base else champion.path
    inputs["panel_report_before"] = panel_report_before.path if panel_report_before else ""
    outputs = {"decision": decision.path, "evidence": evidence.path, "summary": summary.path}
    return tasks.decide(decide, publish, inputs, outputs, metrics=metrics)
