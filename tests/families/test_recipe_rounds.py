"""Every recipe runs `clincot rounds` from the first question to the decision, on 24 questions of VQA-RAD.

VQA-RAD is the release if it lies beside the repository, else a stand-in in its layout. The policy and the judges are
tiny checkpoints of the recipe's own families with random weights, in the folders that the recipe names; clincot-paper
and clincot-code ask a real HTTP server for their regions. Changed are the amounts, and what depends on scores that mean
something: random judges give nearly equal scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.config import Recipe, find_recipe, list_recipes, load_params
from clincot.jsonl import read_records
from clincot.models.load import unload_models
from clincot.records import Candidate, Decision, PreferencePair, Question, Region
from tests.support.families import FAMILIES, Family, has_torchvision
from tests.support.http_server import Reply, Request, serving
from tests.support.vqa_rad_release import ingest_some

pytestmark = pytest.mark.slow

QUESTIONS = 24
# The smallest two of those that need neither torchvision nor a grounding server; `make recipes` runs all.
IN_EVERY_SUITE = ("llava-med-1.5-7b", "uv-cot")
NAMES = [recipe.name for recipe in list_recipes() if recipe.policy is not None]
CHOSEN = NAMES if os.environ.get("CLINCOT_ALL_RECIPES") else IN_EVERY_SUITE
JUDGE_FAMILIES = {"huatuogpt-vision": "llava-qwen2", "medgemma": "gemma3", "lingshu": "qwen2.5-vl"}
AMOUNTS = (
    f"prepare.limit={QUESTIONS}",
    "prepare.rounds=1",
    "propose.window_sides=[0.5]",
    "serve.propose.window_sides=[0.5]",
    "answer.max_new_tokens=6",
    "evaluate.max_new_tokens=6",
    "serve.max_new_tokens=6",
    f"evaluate.limit={QUESTIONS}",
    "evaluate.resamples=20",
    "decide.resamples=20",
    "train.epochs=1",
    "train.dtype=float32",
)
RANDOM_JUDGES = ("pair.min_gap=1e-9", "pair.length_auc_tolerance=0.5")
# A policy with random weights writes no readable box, and the whole image alone makes no pair.
UNTRAINED_WRITER = ("propose.grounders={written: 10, random: 2}",)
SMALL_MODELS = ("train.lora_r=4", "train.lora_alpha=8")  # where the recipe has a LoRA; rank 128 is wider than the model


@pytest.fixture(scope="module")
def vqa_rad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingest_some(tmp_path_factory.mktemp("vqa-rad"))


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """The recipe, with a checkpoint in each folder that it names."""
    chosen = find_recipe(str(request.param))
    assert chosen.policy is not None
    checkpoints = {chosen.params.preflight.base: _find_family(chosen.policy.family)}
    for spec in chosen.params.judge.judges:
        checkpoints[spec.path] = _find_family(JUDGE_FAMILIES[spec.name])
    if any(family.needs_torchvision for family in checkpoints.values()) and not has_torchvision():
        pytest.skip("a model of the recipe needs torchvision; `make recipes` has it")
    for path, family in checkpoints.items():
        family.build(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    yield chosen
    unload_models()


def _find_family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def find_regions(request: Request) -> Reply:
    """A grounder that finds six squares for the first hypothesis."""
    name = request.body["hypotheses"][0]
    boxes = [[x / 10, y / 10, x / 10 + 0.4, y / 10 + 0.4] for x in (0, 3, 6) for y in (0, 6)]
    return 200, {"regions": [{"hypothesis": name, "box": box, "confidence": 0.5} for box in boxes]}


@pytest.mark.parametrize("recipe", CHOSEN, indirect=True)
def test_a_recipe_runs_from_questions_to_a_decision(recipe: Recipe, vqa_rad: Path, tmp_path: Path) -> None:
    overrides = [*AMOUNTS, *RANDOM_JUDGES]
    if recipe.params.train.lora_r:
        overrides += SMALL_MODELS
    if {*recipe.params.propose.grounders} == {"written"}:
        overrides += UNTRAINED_WRITER
    with serving(find_regions) as grounder:
        overrides += [f"{section}.http_url={grounder.url}/ground" for section in ("propose", "serve.propose")]
        words = ["rounds", "--recipe", recipe.name, "--run", "run", "--count", "1", "--no-page"]
        words += ["--data", str(vqa_rad / "train"), "--benchmark", str(vqa_rad / "test")]
        words += ["--policy", recipe.params.preflight.base, "--blind-from", str(vqa_rad / "train")]
        for override in overrides:
            words += ["--set", override]
        assert main(words) == 0
    folder = tmp_path / "run" / "round-01"
    questions = list(read_records(folder / "questions.jsonl", Question))
    assert len(questions) == QUESTIONS
    regions = list(read_records(folder / "regions.jsonl", Region))
    used = {region.grounder for region in regions} - {"whole"}
    assert used == {*recipe.params.propose.grounders} - {"written"} or used == {"random"}
    candidates = list(read_records(folder / "candidates.jsonl", Candidate))
    assert {candidate.question for candidate in candidates} == {question.id for question in questions}
    assert list(read_records(folder / "pairs.jsonl", PreferencePair))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {*results["rows"][1]["arms"]} == {*recipe.params.evaluate.arms}
    (decision,) = read_records(folder / "decision.json", Decision)
    assert decision.verdict in ("promote", "keep", "blocked")
    changed = {".".join(override.partition("=")[0].split(".")[:2]) for override in overrides}
    written = load_params(tmp_path / "run" / "params.yaml")
    assert {*written.recipe.changed} <= {*changed, "evaluate.propose"}  # all else is the recipe's
