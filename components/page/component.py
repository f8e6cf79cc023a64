"""Kubeflow component that renders the page of a round."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def page(
    settings: str,
    number: int,
    ahead: int,
    policy: str,
    questions: dsl.Input[dsl.Dataset],
    preferences: dsl.Input[dsl.Dataset],
    champion_results: dsl.Input[dsl.Dataset],
    challenger: dsl.Input[dsl.Model],
    challenger_results: dsl.Input[dsl.Dataset],
    evidence: dsl.Input[dsl.Dataset],
    round_page: dsl.Output[dsl.HTML],
    benchmark_table: dsl.Output[dsl.Markdown],
    trained: dsl.Input[dsl.Model] = None,
):
    """Render the page and the benchmark table of a round.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        policy: Address of the policy from which the run starts.
        questions: Questions of the round (JSONL).
        preferences: Folder: regions, candidates, judgements, scores, pairs.
        champion_results: Folder: the champion's outcomes and report.
        challenger: Challenger: weights, tokenizer and record.
        challenger_results: Folder: the challenger's outcomes and report.
        evidence: Folder: the decision and the answers that it compared.
        trained: Challenger of the previous round; replaces `policy`.

    Returns:
        round_page: Page of the round: images, figures, digests (HTML).
        benchmark_table: Benchmark table of the round (Markdown).
    """
    from clincot.pipelines import round_files, tasks

    files = round_files.RoundFiles.locate(
        questions.path, preferences=preferences.path, results=challenger_results.path, evidence=evidence.path
    )
    context = round_files.RoundContext(
        number=int(number) + int(ahead),
        policy=trained.path if trained else policy,
        checkpoint=challenger.path,
        champion_results=champion_results.path,
    )
    tasks.page(settings, context, files, page=round_page.path, results=benchmark_table.path)
    round_page.metadata.update({"champion": policy, "round": str(context.number)})
