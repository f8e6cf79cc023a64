"""The functions that the components of a comparison call: check and store, run one seed, write the table.

A seed is one task, because its rounds follow each other and the loop of rounds resumes: its run folder is kept below
the cache ($CLINCOT_CACHE, a volume on a cluster) under the digest of the settings, so that a task that is started again
goes on where the pod before it stopped. Only what was measured leaves the task, no weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from clincot.comparison.comparison_plan import ComparisonPlan, recognize_data_set
from clincot.comparison.comparison_results import RESULTS_FILE, TABLE_FILE, collect_comparison
from clincot.config import Params, RecipeReference, find_recipe, parse_config
from clincot.errors import InvalidInput
from clincot.jsonl import read_json, write_json
from clincot.pipelines.params import JsonObject, decode_params
from clincot.pipelines.run_settings import TaskSettings, read_task_settings, write_settings
from clincot.pipelines.tasks import user_errors
from clincot.rounds import run_rounds
from clincot.runs.layout import BENCHMARK_REPORT_FILE, DECISION_FILE
from clincot.storage.artifacts import download_folder, get_cache_folder, read_digest, upload_folder

COMPARISONS_FOLDER = "comparisons"  # in the store: what was measured; in the cache: run folders
_SEED_FILE = "seed.json"
_MEASURED = ("outcomes.jsonl", BENCHMARK_REPORT_FILE, DECISION_FILE)


@dataclass(frozen=True)
class ComparisonForm:
    """The fields of the form of a run."""

    data: str
    benchmark: str
    store: str
    base: str
    recipe: str
    set_name: str
    rounds: int
    seeds: tuple[int | str, ...]


class CheckedComparison(NamedTuple):
    """What the first task hands on: the address of the settings, and the seeds as text."""

    settings: str
    seeds: list[str]


def start_comparison(form: ComparisonForm, params: JsonObject) -> CheckedComparison:
    """Check the form and the sections, and store them. Raises InvalidInput for what cannot work."""
    with user_errors("start_comparison"):
        for name in ("data", "benchmark", "store"):
            if not getattr(form, name):
                raise InvalidInput(f"the parameter `{name}` is empty; expected the address of a folder or store")
        sections = decode_params(params)
        parsed = parse_config(Params, sections, where="pipeline parameter 'params'")
        base = form.base or parsed.preflight.base
        if not base:
            raise InvalidInput("the parameter `base` is empty, and the recipe names no policy in preflight.base")
        if form.recipe:
            find_recipe(form.recipe)
        inputs = {
            "data": form.data,
            "data_digest": read_digest(form.data),
            "benchmark": form.benchmark,
            "benchmark_digest": read_digest(form.benchmark),
            "base": base,
            "base_digest": read_digest(base),
            "recipe": form.recipe,
            "set_name": form.set_name,
            "rounds": str(form.rounds or parsed.prepare.rounds),
            "seeds": json.dumps([int(seed) for seed in form.seeds]),
        }
        sections = parsed.model_dump(mode="json", exclude={"recipe"})
        _build_plan(TaskSettings(sections, inputs, form.store), Path("unused")).check()
        address = write_settings(form.store, sections, inputs)
        return CheckedComparison(address, [str(int(seed)) for seed in form.seeds])


def compare_seed(settings: str, seed: str) -> str:
    """Run the rounds of one seed, or resume them; return the address of what was measured."""
    with user_errors("compare_seed"):
        given = read_task_settings(settings)
        digest = settings.rpartition("/")[2].removesuffix(".json")
        plan = _build_plan(given, get_cache_folder().parent / COMPARISONS_FOLDER / digest)
        run_rounds(plan.build_seed_plan(int(seed)))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "measured"
            for policy in plan.list_policies().values():
                _copy_measured(plan.find_seed_folder(int(seed)) / policy, folder / policy)
            write_json(folder / _SEED_FILE, {"seed": int(seed)})
            return upload_folder(folder, f"{given.store.rstrip('/')}/{COMPARISONS_FOLDER}")


def write_table(settings: str, measured: Sequence[str], *, table: str, results: str) -> None:
    """Write the table (Markdown) and the results (JSON) of all seeds.

    measured: what compare_seed returned for each seed. A seed that is missing is named in the table.
    """
    with user_errors("compare_table"), tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        plan = _build_plan(read_task_settings(settings), run)
        for address in measured:
            folder = download_folder(address)
            seed = int(read_json(folder / _SEED_FILE)["seed"])
            shutil.copytree(folder, plan.find_seed_folder(seed))
        collect_comparison(plan)
        shutil.copyfile(run / TABLE_FILE, table)
        shutil.copyfile(run / RESULTS_FILE, results)
        print((run / TABLE_FILE).read_text(encoding="utf-8"))


def _build_plan(settings: TaskSettings, run: Path) -> ComparisonPlan:
    inputs = settings.inputs
    params = parse_config(Params, dict(settings.sections), where="settings of the comparison")
    facts = None
    if inputs["recipe"]:
        recipe = find_recipe(inputs["recipe"])
        facts = recipe.policy
        changed = tuple(params.list_changes(recipe.params))
        reference = RecipeReference(name=recipe.name, digest=recipe.digest, changed=changed)
        params = params.model_copy(update={"recipe": reference})
    benchmark = download_folder(inputs["benchmark"])
    return ComparisonPlan(
        run=run,
        data=download_folder(inputs["data"]),
        benchmark=benchmark,
        policy=download_folder(inputs["base"]),
        params=params,
        rounds=int(inputs["rounds"]),
        seeds=tuple(json.loads(inputs["seeds"])),
        facts=facts,
        set_name=inputs["set_name"] or recognize_data_set(benchmark),
    )


def _copy_measured(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in _MEASURED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
