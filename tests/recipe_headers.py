"""The first lines of a recipe that are computed: GPUs, memory, hours and published rows.

    python -m tests.recipe_headers --write      after a change of a recipe, of the estimates or of the published rows

Memory is what `clincot doctor` estimates for the published sizes of the policy (tests/support/published_models.py),
hours what `clincot compare --dry-run` estimates for SLAKE's English questions.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from clincot.comparison.published_rows import PublishedRow, find_published_rows, format_percent
from clincot.config import Recipe, list_recipes
from clincot.preflight.gpu_hours import GPU, Workload, estimate_costs, sum_hours
from clincot.preflight.gpu_memory import (
    GIB,
    SHARE_USED,
    choose_method,
    count_pairs_in_pass,
    estimate_serving,
    estimate_training,
    measure_model,
)
from tests.support.published_models import PUBLISHED

ROOT = Path(__file__).parents[1]
SLAKE = (4919, 1061)  # English questions of its training and test split
GPU_GIB = 80e9 / GIB
_WORDS = 160  # tokens of texts in a conversation
_LINES = ("# GPUs: ", "# Memory: ", "# Hours: ", "# Published: ")
_WIDTH = 117


def count_gpus(gib: float) -> int:
    """The smallest power of two of GPUs over which the memory can be sharded."""
    count = 1
    while gib / count > GPU_GIB * SHARE_USED:
        count *= 2
    return count


def render_header(recipe: Recipe) -> str:
    """The computed lines of a recipe whose policy is a published model."""
    assert recipe.policy is not None
    params, policy = recipe.params, recipe.policy
    size = measure_model(PUBLISHED[policy.title]())
    assert size.total == policy.parameters, f"{recipe.name}: recipe.policy.parameters is not {size.total}"
    tokens = policy.image_tokens + policy.crop_tokens + _WORDS + params.answer.max_new_tokens
    training = estimate_training(size, params.train, tokens=tokens)
    batch = params.answer.batch_size
    answering = estimate_serving(size, tokens=tokens, batch=batch)
    gpus = count_gpus(max(training.gib, answering.gib))
    rounds = params.prepare.rounds
    hours = sum_hours(estimate_costs(params, policy, Workload(*SLAKE, rounds, 1)))
    sharding = "" if gpus == 1 else " (training is sharded over them: sharding: full in launch.yaml)"
    pairs = count_pairs_in_pass(params.train)
    texts = (
        f"{gpus} x {GPU}{sharding}.",
        f"{training.gib:.0f} GiB for training ({choose_method(size, params.train)}, {pairs} pair"
        f"{'s' * (pairs > 1)} in a pass), {answering.gib:.0f} GiB for {batch} answers at once; estimated as by "
        "`clincot doctor`.",
        f"{hours:.0f} GPU-hours for `clincot compare` on SLAKE ({SLAKE[0]:,} + {SLAKE[1]:,} questions, "
        f"rounds {rounds}, one seed); estimated as by --dry-run, not measured.",
        _describe_published(policy.title),
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
