"""The round's preference data as a version of the data repository."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def version(
    version: dict,
    answer: dict,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    judgements: dsl.Input[dsl.Dataset],
    scores: dsl.Input[dsl.Dataset],
    panel_report: dsl.Input[dsl.Artifact],
    pairs: dsl.Input[dsl.Dataset],
    pair_report: dsl.Input[dsl.Artifact],
    version_record: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    from pathlib import Path

    from clincot.pipelines import tasks

    files = [questions, regions, candidates, judgements, scores, panel_report, pairs, pair_report]
    names = ["questions", "regions", "candidates", "judgements", "scores", "panel_report", "pairs", "pair_report"]
    inputs = {name: file.path for name, file in zip(names, files, strict=True)}
    tasks.run_stage_task("version", version, inputs, {"version": version_record.path}, metrics=metrics, answer=answer)
    return Path(version_record.path).read_text(encoding="utf-8")
