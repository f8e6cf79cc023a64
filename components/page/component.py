"""What the round looks like: regions and pairs on radiographs, the benchmark table, the digests."""

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
    checkpoint: dsl.Input[dsl.Model],
    outcomes: dsl.Input[dsl.Dataset],
    report: dsl.Input[dsl.Artifact],
    decision: dsl.Input[dsl.Artifact],
    evidence: dsl.Input[dsl.Dataset],
    champion_outcomes: dsl.Input[dsl.Dataset],
    champion_report: dsl.Input[dsl.Artifact],
    looks: dsl.Output[dsl.HTML],
    results: dsl.Output[dsl.Markdown],
    trained: dsl.Input[dsl.Model] = None,
):
    from clincot.pipelines import tasks

    sections = {"prepare": prepare, "propose": propose, "answer": answer, "judge": judge, "pair": pair}
    sections |= {"version": version, "train": train, "evaluate": evaluate, "decide": decide, "publish": publish}
    made = {"questions": questions, "regions": regions, "candidates": candidates, "judgements": judgements}
    made |= {"scores": scores, "panel_report": panel_report, "pairs": pairs, "pair_report": pair_report}
    made |= {"checkpoint": checkpoint, "outcomes": outcomes, "report": report, "decision": decision}
    tasks.page(
        sections,
        number=int(number) + int(ahead),
        data=data,
        benchmark=benchmark,
        blind_from=blind_from,
        policy=trained.path if trained else policy,
        page=looks.path,
        results=results.path,
        made={name: artifact.path for name, artifact in {**made, "evidence": evidence}.items()},
        champion={"outcomes": champion_outcomes.path, "report": champion_report.path},
    )
