"""Kubeflow component that renders the page of a round."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def page(
    settings: str,
    number: int,
    ahead: int,
    policy: str,
    champion_results: dsl.Input[dsl.Dataset],
    challenger: dsl.Input[dsl.Model],
    round_files: dsl.Input[dsl.Dataset],
    round_page: dsl.Output[dsl.HTML],
    round_questions: dsl.Output[dsl.Dataset],
    benchmark_table: dsl.Output[dsl.Markdown],
    trained: dsl.Input[dsl.Model] = None,
):
    """Render the page and the benchmark table of a round.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        number: Number of the run's first round; 0: the next round of the model.
        ahead: Position of this round in the run, from 0.
        policy: Address of the policy from which the run starts.
        champion_results: Folder: the champion's outcomes and report.
        challenger: Challenger: weights, tokenizer and record.
        round_files: Folder: the decision, and all files of the round.
        trained: Challenger of the previous round; replaces `policy`.

    Returns:
        round_page: Page of the round: images, figures, digests (HTML).
        round_questions: Folder: all questions of the round, to search, filter and sort (index.html).
        benchmark_table: Benchmark table of the round (Markdown).
    """
    from clincot.pipelines import round_files as layout
    from clincot.pipelines import tasks

    context = layout.RoundContext(
        number=int(number) + int(ahead),
        policy=trained.path if trained else policy,
        checkpoint=challenger.path,
        champion_results=champion_results.path,
    )
    files = tasks.locate_round_files(round_files.path)
    tasks.page(
        settings,
        context,
        files,
        page=round_page.path,
        results=benchmark_table.path,
        questions=round_questions.path,
    )
    round_page.metadata.update({"champion": policy, "round": str(context.number)})
