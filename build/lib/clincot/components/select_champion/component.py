"""Kubeflow component that selects the champion for the next round of a run."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select_champion(
    verdict: str,
    champion_outcomes: dsl.Input[dsl.Dataset],
    champion_report: dsl.Input[dsl.Artifact],
    challenger_outcomes: dsl.Input[dsl.Dataset],
    challenger_report: dsl.Input[dsl.Artifact],
    outcomes: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.Artifact],
):
    """Select the outcomes against which the next round of the same run compares its challenger.

    Args:
        verdict: Verdict of the promotion gate: promote, keep or blocked.
        champion_outcomes: Benchmark outcomes of the champion (JSONL).
        champion_report: Benchmark report of the champion (JSON).
        challenger_outcomes: Benchmark outcomes of the challenger (JSONL).
        challenger_report: Benchmark report of the challenger (JSON).

    Returns:
        outcomes: Benchmark outcomes of the champion after the decision (JSONL).
        report: Benchmark report of the champion after the decision (JSON).
    """
    from clincot.pipelines import tasks

    champion = {"outcomes": champion_outcomes.path, "report": champion_report.path}
    challenger = {"outcomes": challenger_outcomes.path, "report": challenger_report.path}
    tasks.select_champion(verdict, champion, challenger, {"outcomes": outcomes.path, "report": report.path})
