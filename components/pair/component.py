"""Kubeflow component of the pair stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pair(
    pair: dict,
    lap: int,
    candidates: dsl.Input[dsl.Dataset],
    scores: dsl.Input[dsl.Dataset],
    pairs: dsl.Output[dsl.Dataset],
    pair_report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Build preference pairs from the scored candidates.

    Args:
        pair: Settings of the preference pairs: smallest score gap, pairs per question.
        lap: How often earlier rounds used the same questions; each time samples with new seeds.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        scores: JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.

    Returns:
        pairs: JSON Lines of preference pairs with their score gaps, which `pair` writes.
        pair_report: JSON report of how many pairs were made and why others were not, which `pair` writes.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the preference pairs.
    """
    from clincot.pipelines import tasks

    inputs = {"candidates": candidates.path, "scores": scores.path}
    outputs = {"pairs": pairs.path, "pair_report": pair_report.path}
    return tasks.run_stage_task("pair", pair, inputs, outputs, metrics=metrics, lap=lap)
