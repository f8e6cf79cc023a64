"""Kubeflow component of the decide stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def decide(
    settings: str,
    policy_round: int,
    champion_results: dsl.Input[dsl.Dataset],
    challenger_results: dsl.Input[dsl.Dataset],
    preferences: dsl.Input[dsl.Dataset],
    decision: dsl.Output[dsl.Markdown],
    round_files: dsl.Output[dsl.Dataset],
    figures: dsl.Output[dsl.Metrics],
    base_results: dsl.Input[dsl.Dataset] = None,
    preferences_before: dsl.Input[dsl.Dataset] = None,
) -> str:
    """Decide whether to promote the challenger.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        policy_round: Round that trained the policy; 0: the base policy.
        champion_results: Folder: the champion's outcomes and report.
        challenger_results: Folder: the challenger's outcomes and report.
        preferences: Folder: regions, candidates, judgements, scores, pairs.
        base_results: Folder: the base policy's outcomes and report.
        preferences_before: Preferences of the previous round.

    Returns:
        decision: The decision and its reasons (Markdown).
        round_files: Folder: the decision, and all files of the round.
        figures: Verdict and accuracy, to compare runs.
        Output: promote, keep or blocked.
    """
    from clincot.pipelines import round_files as layout
    from clincot.pipelines import tasks

    base = base_results.path if base_results else champion_results.path
    files = layout.DecisionFiles(
        champion_results=champion_results.path,
        challenger_results=challenger_results.path,
        preferences=preferences.path,
        round_files=round_files.path,
        summary=decision.path,
        base_results=base if int(policy_round) == 0 else "",  # compared only if the run starts from the base policy
        preferences_before=preferences_before.path if preferences_before else "",
    )
    return tasks.decide(settings, files, metrics=figures)
