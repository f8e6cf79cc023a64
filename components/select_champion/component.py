"""Who is champion for the next round of the same run: the outcomes that it is held against."""

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
    from clincot.pipelines import tasks

    champion = {"outcomes": champion_outcomes.path, "report": champion_report.path}
    challenger = {"outcomes": challenger_outcomes.path, "report": challenger_report.path}
    tasks.select_champion(verdict, champion, challenger, {"outcomes": outcomes.path, "report": report.path})
