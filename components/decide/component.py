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
    """Decide whether to promote the challenger.

    Args:
        decide: Settings of the promotion gate: error budget, smallest gain, floors, leak limits.
        publish: Settings of the model registry: store, name of the model, golden questions.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        benchmark: Address of the held-out data set with its answer key.
        benchmark_digest: sha256 of the benchmark, part of the cache key.
        blind: Address of a data set whose answers the blind baseline may use; empty: no baseline.
        calibration: Address of the data set on which the judges were calibrated, for the leak check.
        champion_round: Round that trained the checkpoint from which the run starts; 0: the base policy.
        champion: Benchmark outcomes of the champion (JSONL).
        challenger: JSON Lines of the challenger's benchmark outcomes, which `evaluate` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.
        pair_report: JSON report of how many pairs were made and why others were not, which `pair` writes.
        base: JSON Lines of the base policy's benchmark outcomes, which `evaluate` writes for the policy of round 0.
        panel_report_before: JSON report of the judges of the previous round, compared to find a shift of their scores.

    Returns:
        decision: JSON of the verdict (promote, keep or blocked) with its checks, which `decide` writes.
        evidence: JSON Lines of both sides' answers to every benchmark question, which `decide` writes.
        summary: Markdown text of the decision and its reasons, which `decide` writes.
        metrics: Figures of the task for the Kubeflow UI.
        Output: Verdict of the promotion gate: promote, keep or blocked.
    """
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
