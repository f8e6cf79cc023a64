"""Kubeflow component that writes the table of a comparison."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_table(
    settings: str,
    measured: list,
    comparison_table: dsl.Output[dsl.Markdown],
    comparison: dsl.Output[dsl.Dataset],
):
    """Write the table of a comparison over all seeds, with the published rows beside it.

    Args:
        settings: Address of the task's settings, which ends in their sha256.
        measured: Addresses of what was measured, one for each seed.

    Returns:
        comparison_table: Table of the comparison (Markdown).
        comparison: Results of the comparison (JSON).
    """
    from clincot.pipelines import comparison_tasks

    comparison_tasks.write_table(settings, measured, table=comparison_table.path, results=comparison.path)
