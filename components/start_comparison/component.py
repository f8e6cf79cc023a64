"""Kubeflow component that checks a comparison of training methods before any GPU works."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def start_comparison(
    data: str,
    benchmark: str,
    store: str,
    base: str,
    recipe: str,
    set_name: str,
    rounds: int,
    seeds: list,
    params: dict,
) -> NamedTuple("Comparison", [("settings", str), ("seeds", list)]):
    """Check the parameters of a comparison and store them.

    Args:
        data: Required. Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        benchmark: Required. Address of the held-out data set with its answer key.
        store: Required. Folder or `s3://bucket/prefix` for checkpoints, champion and records.
        base: Starting policy: a checkpoint's address; empty: preflight.base.
        recipe: Name of the recipe that the settings come from; empty: neutral.
        set_name: Name of the benchmark for its published rows; empty: as its ingest report says.
        rounds: Number of rounds; 0: as prepare.rounds says.
        seeds: Seeds of the comparison: a JSON list of integers.
        params: All settings of the comparison, by section of params.yaml.

    Returns:
        settings: Address of the settings of the comparison, which ends in their sha256.
        seeds: Seeds of the comparison: a JSON list of integers.
    """
    from clincot.pipelines import comparison_tasks

    form = comparison_tasks.ComparisonForm(data, benchmark, store, base, recipe, set_name, int(rounds), tuple(seeds))
    return comparison_tasks.start_comparison(form, params)
