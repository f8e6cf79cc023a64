"""Kubeflow component that selects the champion for the next round of a run."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select_champion(
    verdict: str,
    champion_results: dsl.Input[dsl.Dataset],
    challenger_results: dsl.Input[dsl.Dataset],
    next_champion_results: dsl.Output[dsl.Dataset],
):
    """Select the results against which the next round of the same run compares its challenger.

    Args:
        verdict: promote, keep or blocked.
        champion_results: Folder: the champion's outcomes and report.
        challenger_results: Folder: the challenger's outcomes and report.

    Returns:
        next_champion_results: Results of the champion after the decision.
    """
    from clincot.pipelines import tasks

    tasks.select_champion(verdict, champion_results.path, challenger_results.path, next_champion_results.path)
