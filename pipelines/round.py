"""The round as a pipeline, top to bottom.

    preflight -> start_round
      -> evaluate_champion, and prepare -> (each group of shards: generate) -> pair -> version -> train
      -> evaluate_challenger -> decide -> record_round, and if promoted: publish -> deploy
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
from typing import Any

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
    FirstRoundResult,
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


def build_round_pipeline(plan: RoundPlan) -> Any:
    """Build the pipeline of a plan as a kfp object, to be compiled or to be called under kfp.local."""
    rounds = _build_rounds(plan)  # kfp cannot build a pipeline while it builds another
    return build_pipeline(
        PIPELINE_NAME,
        "Look before you answer: train a challenger on its own judged answers, and promote it if it is better.",
        [RunParameters],
        None,
        lambda run: _add_run(plan, run, rounds),
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


def _add_run(plan: RoundPlan, run: RunParameters, rounds: Sequence[Any]) -> None:
    """Add the checks and the start, then the rounds and their end. rounds: a pipeline inside the pipeline for each."""
    with dsl.ExitHandler(round_tasks.add_run_status(plan, run), name="run"):
        checked = round_tasks.add_preflight(plan, run)
        started = round_tasks.add_start_round(plan, run, checked)
        addresses = {one.name: checked[one.name] for one in fields(RunSettings) if one.name.endswith("_settings")}
        settings = RunSettings(**addresses, number=started["number"], shards=run.shards)
        start = StartingPoint(
            policy=started["policy"],
            policy_digest=started["policy_digest"],
            policy_round=started["policy_round"],
        )
        if plan.rounds == 1:
            (add_round,) = rounds
            add_round(ahead=0, **vars(settings), **_without_missing(start)).set_display_name("round")
        else:
            tasks = _add_rounds(settings, start, rounds)
            round_tasks.add_end_round(plan, settings).after(*tasks)


def _add_rounds(settings: RunSettings, start: StartingPoint, rounds: Sequence[Any]) -> list[dsl.PipelineTask]:
    """Add the rounds of a run. Each continues from the challenger of the one before."""
    tasks: list[dsl.PipelineTask] = []
    for ahead, add_round in enumerate(rounds):
        task = add_round(ahead=ahead, **vars(settings), **_without_missing(start))
        tasks.append(task.set_display_name(f"round {ahead + 1} of {len(rounds)}"))
        start = replace(
            start,
            policy_digest=task.outputs["trained_digest"],
            trained=task.outputs["trained"],
            preferences_before=task.outputs["preferences"],
            champion_results=task.outputs["next_champion_results"],
            base_results=tasks[0].outputs["champion_results"],
        )
    return tasks


def _without_missing(start: StartingPoint) -> dict[str, Any]:
    return {name: value for name, value in vars(start).items() if value is not None}


def _build_rounds(plan: RoundPlan) -> list[Any]:
    """Build each round of a run as a pipeline inside the pipeline.

    Its inputs are not drawn in the graph of the UI, where settings as outputs of preflight would lead to every task.
    """
    promote = build_promotion(plan)
    if plan.rounds == 1:
        return [_build_round(plan, "round", build_generation(plan), promote, outputs=None)]
    first = _build_round(plan, "first-round", build_generation(plan), promote, outputs=FirstRoundResult)
    continued = build_generation(plan, continued=True)
    later = _build_round(plan, "later-round", continued, promote, outputs=RoundResult)
    return [first, *[later] * (plan.rounds - 1)]


def _build_round(plan: RoundPlan, name: str, generate: Any, promote: Any, *, outputs: Any) -> Any:
    def add(settings: RunSettings, start: StartingPoint, position: RoundPosition) -> Any:
        made = _add_round(Round(plan, settings, start, position.ahead, generate, promote))
        return None if outputs is None else outputs(**{name: made[name] for name in outputs._fields})

    return build_pipeline(
        name,
        "One round, from the questions to the page.",
        [RunSettings, StartingPoint, RoundPosition],
        outputs,
        add,
        optional=outputs is RoundResult,
    )


def _add_round(this: Round) -> dict[str, Any]:
    """Add the tasks of one round; return what the next round of the same run continues from."""
    champion, evaluated = this.start.champion_results, None
    if champion is None:
        evaluated = round_tasks.add_evaluate_champion(this)
        champion = evaluated.outputs["champion_results"]
    prepared = round_tasks.add_prepare(this, evaluated).outputs
    preferences = round_tasks.add_generation(this, prepared)
    data_version = round_tasks.add_version(this, preferences)
    data = PreferenceData(prepared["lap"], preferences, data_version)
    trained = round_tasks.add_train(this, data)
    results = round_tasks.add_evaluate_challenger(this, trained)
    challenger = Challenger(trained["challenger"], trained["Output"], results)
    decided = round_tasks.add_decide(this, data, champion, challenger)
    last = round_tasks.add_promotion(this, challenger, decided)
    if this.plan.rounds == 1:
        last = round_tasks.add_end_round(this.plan, this.settings).after(last)
    round_tasks.add_page(this, champion, challenger, decided).after(last)
    if this.plan.rounds == 1:
        return {}
    return {
        "trained": challenger.checkpoint,
        "trained_digest": challenger.digest,
        "preferences": preferences,
        "next_champion_results": round_tasks.add_select_champion(this, champion, challenger, decided),
        "champion_results": champion,
    }
