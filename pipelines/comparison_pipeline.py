"""The comparison of training methods as a pipeline: check, one task for each seed, the table.

    start_comparison -> (each seed: compare_seed) -> compare_table

It is what `clincot compare` runs. A seed takes the resources of `train` (cluster.yaml), the other tasks those of
`page`. (kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl

from clincot.components.compare_seed.component import compare_seed
from clincot.components.compare_table.component import compare_table
from clincot.components.start_comparison.component import start_comparison
from clincot.config import Params
from clincot.jsonl import atomic_write
from clincot.pipelines.cluster_settings import ClusterSettings
from clincot.pipelines.params import encode_params
from clincot.pipelines.pipeline_builder import build_pipeline, shorten_specs
from clincot.pipelines.placement import apply_placement, build_pipeline_config
from clincot.pipelines.workflow_size import check_workflow_size, estimate_workflow_size

PIPELINE_NAME = "comparison"
_SEEDS_AT_ONCE = 4


@dataclass(frozen=True)
class ComparisonParameters:
    """The parameters of a run, which the UI shows as a form."""

    data: str
    benchmark: str
    store: str
    base: str
    recipe: str
    set_name: str
    rounds: int
    seeds: list
    params: dict


def build_comparison_pipeline(
    params: Params, cluster: ClusterSettings, *, rounds: int = 0, seeds: tuple[int, ...] = (0,)
) -> Any:
    """Build the pipeline as a kfp object. rounds, seeds: defaults of the form; rounds 0: those of prepare.rounds."""
    content = params.model_dump(mode="json", exclude={"recipe"})
    defaults = {
        "base": "",
        "recipe": params.recipe.name,
        "set_name": "",
        "rounds": rounds,
        "seeds": list(seeds),
        "params": encode_params(content),
    }
    return build_pipeline(
        PIPELINE_NAME,
        "Compare the base, SFT on chosen, DPO and margin-DPO over rounds on the same data and seeds, in one table.",
        [ComparisonParameters],
        None,
        lambda run: _add_comparison(run, cluster),
        defaults=defaults,
        config=build_pipeline_config(cluster),
    )


def compile_comparison(
    params: Params, cluster: ClusterSettings, out: Path, *, rounds: int = 0, seeds: tuple[int, ...] = (0,)
) -> None:
    """Write the pipeline as YAML; the same arguments give the same bytes. Raises InvalidInput if it is too large."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pipeline = build_comparison_pipeline(params, cluster, rounds=rounds, seeds=seeds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparison.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        spec, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    shorten_specs(spec)
    check_workflow_size(estimate_workflow_size(spec, platform, groups=_SEEDS_AT_ONCE), groups=_SEEDS_AT_ONCE, rounds=1)
    with atomic_write(out) as file:
        file.write("# The comparison of ClinCoT for Kubeflow Pipelines, made by `clincot pipeline compile`.\n")
        yaml.safe_dump_all([spec, platform], file, sort_keys=True, width=120)


def _add_comparison(run: ComparisonParameters, cluster: ClusterSettings) -> None:
    started = apply_placement(
        start_comparison(**vars(run)),
        "start_comparison",
        cluster,
    )
    settings = started.outputs["settings"]
    with dsl.ParallelFor(started.outputs["seeds"], name="each seed", parallelism=_SEEDS_AT_ONCE) as seed:
        measured = apply_placement(compare_seed(settings=settings, seed=seed), "compare_seed", cluster)
    apply_placement(
        compare_table(settings=settings, measured=dsl.Collected(measured.output)),
        "compare_table",
        cluster,
    )
