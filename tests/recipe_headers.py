"""The first lines of a recipe that are computed: GPUs, memory, hours and published rows.

    python -m tests.recipe_headers --write      after a change of a recipe, of the plan or of the published rows

GPUs, memory and hours are those of the plan (clincot.planning) of `clincot compare` on SLAKE's English questions.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clincot.comparison.published_rows import PublishedRow, find_published_rows, format_percent
from clincot.config import Recipe, list_recipes
from clincot.planning.cost_plan import CostPlan, PlanRequest, make_plan
from clincot.planning.gpu_memory import GIB, choose_method, count_pairs_in_pass
from clincot.planning.gpu_table import DEFAULT_GPU, read_gpus
from clincot.planning.sampled_data import DataSize
from clincot.rounds import COMPARISON_LABELS, configure_comparison

ROOT = Path(__file__).parents[1]
SLAKE = (DataSize(4919, 450), DataSize(1061, 96))  # English questions and images of its training and test split
_LINES = ("# GPUs: ", "# Memory: ", "# Hours: ", "# Published: ")
_WIDTH = 117


@cache
def plan_slake(name: str) -> CostPlan:
    """The plan of a recipe's comparison on SLAKE."""
    recipe = next(recipe for recipe in list_recipes() if recipe.name == name)
    assert recipe.policy is not None
    train = recipe.params.train
    comparisons = [(label, configure_comparison(train, method)) for method, label in COMPARISON_LABELS.items()]
    request = PlanRequest(
        params=recipe.params,
        data=SLAKE[0],
        benchmark=SLAKE[1],
        gpu=read_gpus()[DEFAULT_GPU],
        title=recipe.policy.title,
        comparisons=tuple(comparisons),
    )
    return make_plan(request)


def render_header(recipe: Recipe) -> str:
    """The computed lines of a recipe whose policy is a published model."""
    assert recipe.policy is not None
    params, plan = recipe.params, plan_slake(recipe.name)
    size = plan.policy.size
    assert size is not None
    title = recipe.policy.title
    assert size.total == recipe.policy.parameters, f"{recipe.name}: recipe.policy.parameters is not {size.total}"
    gpus = max(fit.gpus for fit in plan.fits if "the recipe" in fit.what or fit.what == "generate and judge")
    assert gpus, f"{recipe.name} does not fit on {DEFAULT_GPU}"
    sharding = "" if gpus == 1 else " (training is sharded over them: sharding: full in launch.yaml)"
    memory = {row.stage: row.memory / GIB for row in plan.rows if row.stage != "train" or row.model == "policy"}
    pairs = count_pairs_in_pass(params.train)
    texts = (
        f"{gpus} x {DEFAULT_GPU}{sharding}.",
        f"{memory['train']:.0f} GiB for training ({choose_method(size, params.train)}, {pairs} pair"
        f"{'s' * (pairs > 1)} in a pass), {memory['answer']:.0f} GiB for {params.answer.batch_size} answers at once, "
        f"{memory['judge']:.0f} GiB with the judges beside the policy; estimated as by `clincot plan`.",
        f"{plan.total_hours:.0f} GPU-hours for `clincot compare` on SLAKE ({SLAKE[0].questions:,} + "
        f"{SLAKE[1].questions:,} questions, rounds {plan.request.round_count}, one seed); estimated as by --dry-run, "
        "not measured.",
        _describe_published(title),
    )
    lines = []
    for name, text in zip(_LINES, texts, strict=True):
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=name, subsequent_indent="#   ", break_on_hyphens=False, break_long_words=False
        )
    return "\n".join(lines) + "\n"


def _describe_published(title: str) -> str:
    """The published rows of the base model and of methods on it, by benchmark and source; scorers differ."""
    parts = []
    for benchmark in ("slake", "vqa-rad", "iu-xray"):
        rows = [row for row in find_published_rows(title, benchmark) if row.policy and row.value is not None]
        sources = dict.fromkeys(row.source for row in rows)
        tables = [_describe_source(source, [row for row in rows if row.source == source]) for source in sources]
        parts.append(f"{benchmark}: {', '.join(tables) or 'not known'}")
    return "; ".join(parts) + ". Scorers differ: compare within one run."


def _describe_source(source: str, rows: Sequence[PublishedRow]) -> str:
    """Such as "open recall / closed accuracy of base 44.26 / 61.3, DPO 49.3 / 62.02 [arXiv 2412.06141, table 1]"."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    values: dict[str, list[str]] = {}
    for row in rows:
        values.setdefault(row.method, []).append(format_percent(row.value))
    results = ", ".join(f"{method} {' / '.join(numbers)}" for method, numbers in values.items())
    return f"{' / '.join(metrics)} of {results} [{source}]"


def replace_header(text: str, header: str) -> str:
    """A recipe's text with its computed lines replaced; they end at the next comment that is not indented."""
    lines = text.splitlines(keepends=True)
    start = next(at for at, line in enumerate(lines) if line.startswith(_LINES[0]))
    end = start
    while lines[end].startswith((*_LINES, "#   ")):
        end += 1
    return "".join([*lines[:start], header, *lines[end:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    for recipe in list_recipes():
        if recipe.policy is not None:
            text = recipe.path.read_text(encoding="utf-8")
            recipe.path.write_text(replace_header(text, render_header(recipe)), encoding="utf-8")
        shutil.copyfile(recipe.path, ROOT / "charts" / "clincot" / "recipes" / recipe.path.name)


if __name__ == "__main__":
    main()
