"""The round as a pipeline, top to bottom.

    preflight -> start_round -> evaluate_champion
      -> prepare -> (each shard: generate) -> pair -> version -> train -> evaluate_challenger
      -> decide -> record_round, and if promoted: publish -> deploy
      -> end_round -> page
    and, however the run ends: record_run_status

This file says which task follows which. What each task receives is in round_tasks.py, generation_tasks.py and
promotion_tasks.py, what it does is in tasks.py, and where it runs is in placement.py.

The parameters of a run reach only its first task, which checks and stores them; the others get the address of their
settings, which contains a digest (run_settings.py). The policy from which a run starts is resolved once, by
start_round, and its digest travels beside its address. So the cache of Kubeflow recognizes the same work: generation
by policy, data, judges and sections, training by pairs, policy and section, and all of them by the image.

The page follows the end of the round: it shows a round and decides nothing, so a page that fails leaves a round that
has ended, and *Retry* in the UI repeats the page alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, dsl

from clincot.jsonl import atomic_write
from clincot.pipelines import round_tasks
from clincot.pipelines.generation_tasks import build_generation
from clincot.pipelines.pipeline_builder import build_pipeline, share_components, shorten_specs
from clincot.pipelines.placement import build_pipeline_config
from clincot.pipelines.promotion_tasks import build_promotion
from clincot.pipelines.round_inputs import (
    Challenger,
    ChampionResults,
    PreferenceData,
    Round,
    RoundPosition,
    RoundResult,
    RunParameters,
    RunSettings,
    StartingPoint,
)
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.workflow_size import check_workflow_size, estimate_workflow_size

# Name inside the compiled pipeline. The names of Workflows and pods begin with it, and Kubernetes cuts host names at
# 63 characters: `round-xxxxx-metadata-0-3-retry-system-container-impl-1234567890` has exactly 63. The part in the
# middle is Kubeflow's own (backend/src/v2/compiler/argocompiler/container.go at 2.17.0).
PIPELINE_NAME = "round"


class _Subpipelines(NamedTuple):
    """The pipelines inside a pipeline. rounds: one for each round, if a run does several."""

    generate: Any
    promote: Any
    rounds: Sequence[Any]


def build_round_pipeline(plan: RoundPlan) -> Any:
    """Build the pipeline of a plan as a kfp object, to be compiled or to be called under kfp.local."""
    subpipelines = _build_subpipelines(plan)  # kfp cannot build a pipeline while it builds another
    return build_pipeline(
        PIPELINE_NAME,
        "Look before you answer: train a challenger on its own judged answers, and promote it if it is better.",
        [RunParameters],
        None,
        lambda run: _add_run(plan, run, subpipelines),
        defaults=plan.arguments,
        config=build_pipeline_config(plan.cluster),
    )


def compile_round(plan: RoundPlan, out: Path) -> None:
    """Write the pipeline as YAML. The same plan gives the same bytes (the order of keys in kfp's own files varies).

    Raises InvalidInput if a run would not finish because its Workflow object became too large for Argo.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "round.yaml"
        compiler.Compiler().compile(build_round_pipeline(plan), str(path))
        spec, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    shorten_specs(spec)
    share_components(spec, platform)
    groups = plan.cluster.count_shard_tasks(plan.rounds)
    size = estimate_workflow_size(spec, platform, groups=groups)
    check_workflow_size(size, groups=groups, rounds=plan.rounds)
    with atomic_write(out) as file:
        file.write("# A round of ClinCoT for Kubeflow Pipelines, made by `clincot pipeline compile`.\n")
        yaml.safe_dump_all([spec, platform], file, sort_keys=True, width=120)


def _add_run(plan: RoundPlan, run: RunParameters, subpipelines: _Subpipelines) -> None:
    """Add the checks, the start and the evaluation of the champion, then the rounds and their end."""
    with dsl.ExitHandler(round_tasks.add_run_status(plan, run), name="round"):
        checked = round_tasks.add_preflight(plan, run)
        started = round_tasks.add_start_round(plan, run, checked)
        addresses = {one.name: checked[one.name] for one in fields(RunSettings) if one.name.endswith("_settings")}
        settings = RunSettings(**addresses, number=started["number"], shards=run.shards)
        start = StartingPoint(
            policy=started["policy"],
            policy_digest=started["policy_digest"],
            policy_round=started["policy_round"],
        )
        evaluated = round_tasks.add_evaluate_champion(plan, settings, start)
        champion = ChampionResults(evaluated.outputs["champion_results"])
        if plan.rounds == 1:
            _add_round(
                Round(plan, settings, start, champion, 0, subpipelines.generate, subpipelines.promote, evaluated)
            )
        else:
            tasks = _add_rounds(plan, settings, start, champion, subpipelines.rounds)
            round_tasks.add_end_round(plan, settings).after(*tasks)


def _add_round(this: Round) -> RoundResult | None:
    """Add the tasks of one round; return what the next round of the run continues from, if the run does several."""
    prepared = round_tasks.add_prepare(this).outputs
    preferences = round_tasks.add_generation(this, prepared)
    data_version = round_tasks.add_version(this, preferences)
    data = PreferenceData(prepared["lap"], preferences, data_version)
    trained = round_tasks.add_train(this, data)
    results = round_tasks.add_evaluate_challenger(this, trained)
    challenger = Challenger(trained["challenger"], trained["Output"], results)
    decided = round_tasks.add_decide(this, data, challenger)
    last = round_tasks.add_promotion(this, challenger, decided)
    if this.plan.rounds == 1:
        last = round_tasks.add_end_round(this.plan, this.settings).after(last)
    round_tasks.add_page(this, challenger, decided).after(last)
    if this.plan.rounds == 1:
        return None
    champion = round_tasks.add_select_champion(this, challenger, decided)
    return RoundResult(challenger.checkpoint, challenger.digest, preferences, champion)


def _add_rounds(
    plan: RoundPlan,
    settings: RunSettings,
    start: StartingPoint,
    champion: ChampionResults,
    subpipelines: Sequence[Any],
) -> list[dsl.PipelineTask]:
    """Add the rounds of a run, each as a subpipeline that continues from the challenger of the one before."""
    tasks = []
    base = champion.champion_results
    for ahead, add_round in enumerate(subpipelines):
        task = add_round(ahead=ahead, **vars(settings), **_without_missing(start), **vars(champion))
        tasks.append(task)
        result = task.set_display_name(f"round {ahead + 1} of {plan.rounds}").outputs
        champion = ChampionResults(result["next_champion_results"])
        start = replace(
            start,
            policy_digest=result["trained_digest"],
            trained=result["trained"],
            preferences_before=result["preferences"],
            base_results=base,
        )
    return tasks


def _without_missing(start: StartingPoint) -> dict[str, Any]:
    return {name: value for name, value in vars(start).items() if value is not None}


def _build_subpipelines(plan: RoundPlan) -> _Subpipelines:
    """Build the generation and the promotion, and for a run of several rounds one subpipeline for each."""
    first, promote = build_generation(plan), build_promotion(plan)
    if plan.rounds == 1:
        return _Subpipelines(first, promote, [])
    rounds = []
    for generate, continued in ((first, False), (build_generation(plan, continued=True), True)):

        def add(
            settings: RunSettings,
            start: StartingPoint,
            champion: ChampionResults,
            position: RoundPosition,
            generate: Any = generate,
        ) -> RoundResult | None:
            return _add_round(Round(plan, settings, start, champion, position.ahead, generate, promote))

        rounds.append(
            build_pipeline(
                "later-round" if continued else "first-round",
                "One round of a run of several.",
                [RunSettings, StartingPoint, ChampionResults, RoundPosition],
                RoundResult,
                add,
                optional=continued,
            )
        )
    return _Subpipelines(first, promote, [rounds[0], *[rounds[1]] * (plan.rounds - 1)])
