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
    recipe: str,
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
    """Render the page and the benchmark table of a round.

    Args:
        prepare: Settings of the question split: number of subsets, limit, seed.
        propose: Settings of the regions: grounders and their counts, hypotheses, sampling.
        answer: Settings of the answers: sampling, length, steps of a chain.
        judge: Settings of the judge panel: judges, calibration, quorum, retries.
        pair: Settings of the preference pairs: smallest score gap, pairs per question.
        version: Settings of the data repository: git address, branch, number of the version.
        train: Settings of the training: loss, margin, learning rate, batch size, adapters.
        evaluate: Settings of the evaluation: kinds of regions, answer length, resamples.
        decide: Settings of the promotion gate: error budget, smallest gain, floors, leak limits.
        publish: Settings of the model registry: store, name of the model, golden questions.
        recipe: Name of the recipe that the settings come from, for the round's page; empty: neutral.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, starting at 0.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        benchmark: Address of the held-out data set with its answer key.
        benchmark_digest: sha256 of the benchmark, part of the cache key.
        blind_from: Address of a data set whose answers the blind baseline may use; empty: no baseline.
        policy: Address of the checkpoint from which the run starts.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.
        judgements: JSON Lines of every judge's score of every candidate, which `judge` writes.
        scores: JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.
        pairs: JSON Lines of preference pairs with their score gaps, which `pair` writes.
        pair_report: JSON report of how many pairs were made and why others were not, which `pair` writes.
        outcomes: JSON Lines of a policy's answers to the benchmark, one per question and arm, which `evaluate` writes.
        report: JSON report of the stage: all checks from `preflight`, the benchmark's metrics from `evaluate`.
        decision: JSON of the verdict (promote, keep or blocked) with its checks, which `decide` writes.
        evidence: JSON Lines of both sides' answers to every benchmark question, which `decide` writes.
        checkpoint: Folder of a model's weights, tokenizer and record, which `train` writes.
        champion_outcomes: Benchmark outcomes of the champion (JSONL).
        champion_report: Benchmark report of the champion (JSON).
        trained: Checkpoint that the previous round of this run trained; replaces `policy`.

    Returns:
        looks: Page of the round: regions and pairs on the images, figures, digests (HTML).
        results: Benchmark table of the round (Markdown).
    """
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
        recipe=recipe,
    )
    tasks.page(sections, context, files, page=looks.path, results=results.path)
