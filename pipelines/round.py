"""The round as a pipeline, top to bottom.

    preflight -> start_round -> evaluate (champion)
      -> prepare -> (each shard: propose -> answer -> judge) -> merge -> pair -> version -> train
      -> evaluate (challenger) -> decide -> record_round -> page, and if promoted: publish -> deploy
      -> end_round
    and, however the run ends: record_run_status

This file says which task follows which. What each task receives is in round_tasks.py, generation_tasks.py and
promotion_tasks.py, what it does is in tasks.py, and where it runs is in placement.py.

Parameters are one JSON object for each section of params.yaml. The policy from which a run starts is resolved once, by
start_round. Digests travel as parameters next to what they identify, so that the cache of Kubeflow recognizes the same
work: generation by policy, data, judges, sections and image; training by pairs, policy, section and image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, dsl

from clincot.jsonl import atomic_write
from clincot.pipelines import round_tasks
from clincot.pipelines.generation_tasks import build_generation
from clincot.pipelines.pipeline_builder import build_pipeline, strip_docstrings
from clincot.pipelines.placement import build_pipeline_config
from clincot.pipelines.promotion_tasks import build_promotion
from clincot.pipelines.round_inputs import (
    Challenger,
    ChampionResults,
    PreferenceData,
    Round,
    RoundResult,
    RunParameters,
    StartingPoint,
)
from clincot.pipelines.round_plan import RoundPlan


class _Subpipelines(NamedTuple):
    """The pipelines inside a pipeline. rounds: one for each round, if a run does several."""

    generate: Any
    promote: Any
    rounds: Sequence[Any]


def build_round_pipeline(plan: RoundPlan) -> Any:
    """Build the pipeline of a plan as a kfp object, to be compiled or to be called under kfp.local."""
    subpipelines = _build_subpipelines(plan)  # kfp cannot build a pipeline while it builds another
    return build_pipeline(
        "clincot-round",
        "Look before you answer: train a challenger on its own judged answers, and promote it if it is better.",
        [RunParameters],
        None,
        lambda run: _add_run(plan, run, subpipelines),
        defaults=plan.arguments,
        config=build_pipeline_config(plan.cluster),
    )


def compile_round(plan: RoundPlan, out: Path) -> None:
    """Write the pipeline as YAML. The same plan gives the same bytes (the order of keys in kfp's own files varies)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "round.yaml"
        compiler.Compiler().compile(build_round_pipeline(plan), str(path))
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    strip_docstrings(documents[0])
    with atomic_write(out) as file:
        file.write("# A round of ClinCoT for Kubeflow Pipelines, made by `clincot pipeline compile`.\n")
        yaml.safe_dump_all(documents, file, sort_keys=True, width=120)


def _add_run(plan: RoundPlan, run: RunParameters, subpipelines: _Subpipelines) -> None:
    """Add the checks, the start and the evaluation of the champion, then the rounds and their end."""
    with dsl.ExitHandler(round_tasks.add_run_status(plan, run), name="round"):
        checked = round_tasks.add_preflight(plan, run)
        started = round_tasks.add_start_round(plan, run, checked)
        run = replace(run, number=started["number"])
        start = StartingPoint(
            data_digest=checked["data_digest"],
            benchmark_digest=checked["benchmark_digest"],
            panel_digest=checked["panel_digest"],
            policy=started["policy"],
            policy_digest=started["policy_digest"],
            policy_round=started["policy_round"],
        )
        measured = round_tasks.add_evaluate(
            plan, run, start, "evaluate: champion", policy=start.policy, policy_digest=start.policy_digest
        )
        champion = ChampionResults(measured["outcomes"], measured["report"])
        if plan.rounds == 1:
            this = Round(plan, run, start, champion, subpipelines.generate, subpipelines.promote)
            _, last_tasks = _add_round(this)
        else:
            last_tasks = _add_rounds(plan, run, start, champion, subpipelines.rounds)
        round_tasks.add_end_round(plan, run).after(*last_tasks)


def _add_round(this: Round) -> tuple[RoundResult | None, list[dsl.PipelineTask]]:
    """Add the tasks of one round.

    Returns what the next round of the run continues from, if the run does several, and the tasks that end the round.
    """
    prepared = round_tasks.add_prepare(this)
    generated = round_tasks.add_generation(this, prepared)
    paired = round_tasks.add_pair(this, prepared, generated)
    data = PreferenceData(
        lap=prepared["lap"],
        questions=prepared["questions"],
        regions=generated["regions"],
        candidates=generated["candidates"],
        judgements=generated["judgements"],
        scores=generated["scores"],
        panel_report=generated["panel_report"],
        pairs=paired["pairs"],
        pairs_digest=paired["Output"],
        pair_report=paired["pair_report"],
    )
    versioned = round_tasks.add_version(this, data)
    trained = round_tasks.add_train(this, data, versioned)
    measured = round_tasks.add_evaluate(
        this.plan,
        this.run,
        this.start,
        "evaluate: challenger",
        policy="",
        policy_digest=trained["Output"],
        trained=trained["checkpoint"],
    )
    challenger = Challenger(trained["checkpoint"], trained["Output"], measured["outcomes"], measured["report"])
    decided = round_tasks.add_decide(this, data, challenger)
    recorded = round_tasks.add_record(this, data, challenger, decided)
    paged = round_tasks.add_page(this, data, challenger, decided).after(recorded)
    promoted = round_tasks.add_promotion(this, data, challenger, decided).after(recorded)
    if this.plan.rounds == 1:
        return None, [paged, promoted]
    champion = round_tasks.add_select_champion(this, challenger, decided)
    result = RoundResult(
        challenger.checkpoint, challenger.digest, data.panel_report, champion["outcomes"], champion["report"]
    )
    return result, [paged, promoted]


def _add_rounds(
    plan: RoundPlan, run: RunParameters, start: StartingPoint, champion: ChampionResults, subpipelines: Sequence[Any]
) -> list[dsl.PipelineTask]:
    """Add the rounds of a run, each as a subpipeline that continues from the challenger of the one before."""
    tasks = []
    base = champion.champion_outcomes
    for ahead, add_round in enumerate(subpipelines):
        task = add_round(**vars(run), **_without_missing(start), **vars(champion))
        tasks.append(task)
        result = task.set_display_name(f"round {ahead + 1} of {plan.rounds}").outputs
        champion = ChampionResults(result["champion_outcomes"], result["champion_report"])
        start = replace(
            start,
            policy_digest=result["trained_digest"],
            trained=result["trained"],
            panel_report_before=result["panel_report"],
            base=base,
        )
    return tasks


def _without_missing(start: StartingPoint) -> dict[str, Any]:
    return {name: value for name, value in vars(start).items() if value is not None}


def _build_subpipelines(plan: RoundPlan) -> _Subpipelines:
    """Build the generation and the promotion, and for a run of several rounds one subpipeline for each."""
    first, promote = build_generation(plan), build_promotion(plan)
    rounds: list[Any] = []
    if plan.rounds == 1:
        return _Subpipelines(first, promote, rounds)
    later = build_generation(plan, continued=True)
    for ahead in range(plan.rounds):
        generate = later if ahead else first

        def add(
            run: RunParameters,
            start: StartingPoint,
            champion: ChampionResults,
            generate: Any = generate,
            ahead: int = ahead,
        ) -> RoundResult | None:
            result, _ = _add_round(Round(plan, run, start, champion, generate, promote, ahead))
            return result

        rounds.append(
            build_pipeline(
                f"round-{ahead + 1}",
                f"Round {ahead + 1} of {plan.rounds}.",
                [RunParameters, StartingPoint, ChampionResults],
                RoundResult,
                add,
                optional=ahead > 0,
            )
        )
    return _Subpipelines(first, promote, rounds)
