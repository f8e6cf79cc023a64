"""Kubeflow component of the evaluate stage, for the challenger."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_challenger(
    settings: str,
    challenger: dsl.Input[dsl.Model],
    challenger_results: dsl.Output[dsl.Dataset],
):
    """Answer the benchmark with the challenger from each kind of region, and measure the answers.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        challenger: Challenger: weights, tokenizer and record.

    Returns:
        challenger_results: Folder: the challenger's outcomes and report.
    """
    from clincot.pipelines import tasks

    tasks.evaluate(settings, challenger.path, challenger_results.path)
