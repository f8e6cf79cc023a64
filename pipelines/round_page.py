"""The page and the benchmark table of one round, from files that the tasks of a pipeline left in different places.

`clincot.rounds` renders a run folder. This module arranges links to the files as such a folder, and renders it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from clincot.config import Params, RecipeReference, find_recipe, parse_config
from clincot.jsonl import atomic_write, write_json
from clincot.pipelines.params import decode_params
from clincot.pipelines.round_files import RESULT_FILES, RoundContext, RoundFiles, name_files
from clincot.pipelines.run_settings import TaskSettings
from clincot.reporting.page import write_page
from clincot.reporting.question_browser import write_question_browser
from clincot.rounds import Plan, collect_results, render_results_table, start_run
from clincot.runs.layout import ROUND_FILES
from clincot.storage.artifacts import download_folder

QUESTIONS_ARTIFACT = "round_questions"  # the component's output


def write_round_page(
    settings: TaskSettings, context: RoundContext, files: RoundFiles, *, page: Path, results: Path, questions: Path
) -> None:
    """Write the page (HTML) and the benchmark table (Markdown) of one round, and a folder with all of its questions.

    Kubeflow shows an HTML artifact without its neighbours, so the page names the folder's artifact instead of a link.
    """
    sections, inputs = settings.sections, settings.inputs
    parsed = parse_config(
        Params, {name: decode_params(section) for name, section in sections.items()}, where="settings of the run"
    )
    parsed = parsed.model_copy(update={"recipe": _describe_recipe(parsed, inputs["recipe"], sections=sections)})
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        plan = Plan(
            run=run,
            data=download_folder(inputs["data"]),
            benchmark=download_folder(inputs["benchmark"]),
            policy=download_folder(context.policy),
            params=parsed,
            count=1,
            blind_from=download_folder(inputs["blind_from"]) if inputs["blind_from"] else None,
        )
        run.mkdir()
        start_run(plan)
        _link_round(run, context, files)
        gathered = collect_results(plan)
        write_json(run / "results.json", gathered)
        title = f"ClinCoT: round {context.number}"
        write_question_browser(run, questions, title=title)
        write_page(run, page, title=title, browser_artifact=QUESTIONS_ARTIFACT)
    with atomic_write(results) as file:
        file.write(render_results_table(gathered) + "\n")


def _describe_recipe(params: Params, name: str, *, sections: Collection[str]) -> RecipeReference:
    """The recipe that the settings of a run come from, with the fields that the run changed."""
    if not name:
        return RecipeReference()
    recipe = find_recipe(name)
    changes = params.list_changes(recipe.params)
    changed = tuple(change for change in changes if change.partition(".")[0] in sections)
    return RecipeReference(name=recipe.name, digest=recipe.digest, changed=changed)


def _link_round(run: Path, context: RoundContext, files: RoundFiles) -> None:
    folder = run / "round-01"
    for name, path in files.by_name().items():
        _link_file(path, folder / ROUND_FILES[name])
    _link_file(Path(context.checkpoint), folder / "policy")
    for name, source in name_files(context.champion_results, RESULT_FILES).items():
        _link_file(Path(source), run / "base" / ROUND_FILES[name])


def _link_file(path: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(path.absolute(), link)
