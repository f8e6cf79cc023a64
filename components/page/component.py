"""Kubeflow component that renders the page of a round."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def page(
    prepare: dict,
    propose: dict,
    answer: dict,
    judge: dict,
    pair: dict,
    version: dict,
    train: dict,
    evaluate: dict,
    decide: dict,
    publish: dict,
    number: int,
    ahead: int,
    data: str,
    data_digest: str,
    benchmark: str,
    benchmark_digest: str,
    blind_from: str,
    policy: str,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    judgements: dsl.Input[dsl.Dataset],
    scores: dsl.Input[dsl.Dataset],
    panel_report: dsl.Input[dsl.Artifact],
    pairs: dsl.Input[dsl.Dataset],
    pair_report: dsl.Input[dsl.Artifact],
    outcomes: dsl.Input[dsl.Dataset],
    report: dsl.Input[dsl.Artifact],
    decision: dsl.Input[dsl.Artifact],
    evidence: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    champion_outcomes: dsl.Input[dsl.Dataset],
    champion_report: dsl.Input[dsl.Artifact],
    looks: dsl.Output[dsl.HTML],
    results: dsl.Output[dsl.Markdown],
    trained: dsl.Input[dsl.Model] = None,
):
    """Render the page and the benchmark table of a round."""
    from clincot.pipelines import round_files, tasks

    sections = {
        "prepare": prepare,
        "propose": propose,
        "answer": answer,
        "judge": judge,
        "pair": pair,
        "version": version,
        "train": train,
        "evaluate": evaluate,
        "decide": decide,
        "publish": publish,
    }
    files = round_files.RoundFiles(
        questions=questions.path,
        regions=regions.path,
        candidates=candidates.path,
        judgements=judgements.path,
        scores=scores.path,
        panel_report=panel_report.path,
        pairs=pairs.path,
        pair_report=pair_report.path,
        outcomes=outcomes.path,
        report=report.path,
        decision=decision.path,
        evidence=evidence.path,
    )
    context = round_files.RoundContext(
        number=int(number) + int(ahead),
        data=data,
        benchmark=benchmark,
        blind_from=blind_from,
        policy=trained.path if trained else policy,
        checkpoint=checkpoint.path,
        champion_outcomes=champion_outcomes.path,
        champion_report=champion_report.path,
    )
    tasks.page(sections, context, files, page=looks.path, results=results.path)
