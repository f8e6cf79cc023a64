"""The round as a pipeline, top to bottom. Everything that happens in a task is the library's (clincot/tasks.py).

    preflight → prepare → (a shard each: propose → answer → judge) → merge → pair → version → train → evaluate → decide
      → page, and if promoted: publish → deploy; and, however it ends: record_run_status

Parameters are one dict a config section, with the defaults of params.yaml. The policy that a round starts from is
resolved once, by preflight, into address, digest and round. Digests travel as parameters beside what they are of, so
Kubeflow's cache knows the same work again: generation by policy, data, judges, sections and image; training by pairs,
policy, section and image.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, dsl

from clincot.components.answer.component import answer
from clincot.components.decide.component import decide
from clincot.components.deploy.component import deploy
from clincot.components.evaluate.component import evaluate
from clincot.components.judge.component import judge
from clincot.components.merge.component import merge
from clincot.components.page.component import page
from clincot.components.pair.component import pair
from clincot.components.preflight.component import preflight
from clincot.components.prepare.component import prepare
from clincot.components.propose.component import propose
from clincot.components.publish.component import publish
from clincot.components.record_run_status.component import record_run_status
from clincot.components.select_champion.component import select_champion
from clincot.components.train.component import train
from clincot.components.version.component import version
from clincot.config import Params
from clincot.deployment.service_settings import ServiceSettings
from clincot.jsonl import atomic_write
from clincot.pipelines.cluster_settings import ClusterSettings
from clincot.pipelines.params import encode_params
from clincot.pipelines.placement import apply_placement, build_pipeline_config
from clincot.training.launch_settings import LaunchSettings

SECTIONS = (
    "preflight",
    "prepare",
    "propose",
    "answer",
    "judge",
    "pair",
    "version",
    "train",
    "evaluate",
    "decide",
    "publish",
    "deploy",
)


class GenerationOutputs(NamedTuple):
    regions: dsl.Dataset
    candidates: dsl.Dataset
    judgements: dsl.Dataset
    scores: dsl.Dataset
    panel_report: dsl.Artifact


class RoundArtifacts(NamedTuple):
    trained: dsl.Model
    trained_digest: str
    panel_report: dsl.Artifact
    champion_outcomes: dsl.Dataset
    champion_report: dsl.Artifact


_START_OUTPUTS = (
    "policy",
    "policy_digest",
    "policy_round",
    "number",
    "data_digest",
    "benchmark_digest",
    "panel_digest",
)
_ROUND_INPUTS: dict[str, Any] = {  # what a round is given, with its type
    **dict.fromkeys(("data", "benchmark", "blind_from", "calibrated_on"), str),
    "shards": int,
    **{name: dict for name in SECTIONS if name != "preflight"},
    "service": dict,
    "launch": dict,
    **dict.fromkeys(_START_OUTPUTS, str),
    "policy_round": int,
    "number": int,
    "champion_outcomes": dsl.Input[dsl.Dataset],
    "champion_report": dsl.Input[dsl.Artifact],
}
PipelineValues = Mapping[str, Any]  # the pipeline's parameters, by name


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed when a pipeline is compiled; all of `arguments` can be changed run by run."""

    params: Params = field(default_factory=Params)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    data: str = ""
    benchmark: str = ""
    blind_from: str = ""
    shards: int = 1
    rounds: int = 1  # in one run
    deploys: bool = True
    number: int = 0  # of the (first) round; 0: the next one of the line
    target: str = "kserve"
    state: str = ""
    image: str = ""  # what stands for the code in cache keys; empty: the cluster's images

    @property
    def arguments(self) -> dict[str, Any]:
        """The pipeline's parameters with their defaults."""
        sections = {name: getattr(self.params, name).model_dump(mode="json") for name in SECTIONS}
        for name in ("judge", "publish", "version"):  # the round's own, given beside it
            del sections["preflight"][name]
        sections |= {name: getattr(self, name).model_dump(mode="json") for name in ("service", "launch")}
        return {
            "data": self.data,
            "benchmark": self.benchmark,
            "blind_from": self.blind_from,
            "calibrated_on": "",
            "number": self.number,
            "shards": self.shards,
            **{name: encode_params(content) for name, content in sections.items()},
        }


def build_round_pipeline(plan: RoundPlan) -> Any:
    """The pipeline of a plan, as kfp has it: to be compiled, or to be called under kfp.local."""
    defaults = plan.arguments
    rounds = _build_round_subpipelines(plan)  # kfp makes no pipeline while it makes another

    @dsl.pipeline(
        name="clincot-round",
        description="Look before you answer: one ClinCoT round.",
        pipeline_config=build_pipeline_config(plan.cluster),
    )
    def clincot_round(
        data: str = defaults["data"],
        benchmark: str = defaults["benchmark"],
        blind_from: str = defaults["blind_from"],
        calibrated_on: str = defaults["calibrated_on"],
        number: int = defaults["number"],
        shards: int = defaults["shards"],
        preflight: dict = defaults["preflight"],
        prepare: dict = defaults["prepare"],
        propose: dict = defaults["propose"],
        answer: dict = defaults["answer"],
        judge: dict = defaults["judge"],
        pair: dict = defaults["pair"],
        version: dict = defaults["version"],
        train: dict = defaults["train"],
        evaluate: dict = defaults["evaluate"],
        decide: dict = defaults["decide"],
        publish: dict = defaults["publish"],
        deploy: dict = defaults["deploy"],
        service: dict = defaults["service"],
        launch: dict = defaults["launch"],
    ) -> None:
        values = {name: value for name, value in locals().items() if name in defaults}
        ending = apply_placement(
            record_run_status(publish=publish, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER), "record_run_status", plan.cluster
        )
        ending.set_caching_options(False)
        with dsl.ExitHandler(ending, name="round"):
            _add_rounds(plan, values, rounds)

    return clincot_round


def compile_round(plan: RoundPlan, out: Path) -> None:
    """Write the pipeline as YAML: the same bytes for the same plan (kfp's own differ in the order of keys)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "round.yaml"
        compiler.Compiler().compile(build_round_pipeline(plan), str(path))
        parts = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    with atomic_write(out) as file:
        file.write("# A round of ClinCoT for Kubeflow Pipelines, made by `clincot pipeline compile`.\n")
        yaml.safe_dump_all(parts, file, sort_keys=True, width=120)


def _add_rounds(plan: RoundPlan, values: PipelineValues, rounds: Sequence[Any]) -> None:
    """Preflight once, then the rounds, each from the last one's challenger. One alone lies flat in the pipeline."""
    looked = apply_placement(
        preflight(
            preflight=values["preflight"],
            judge=values["judge"],
            publish=values["publish"],
            version=values["version"],
            service=values["service"],
            launch=values["launch"],
            data=values["data"],
            benchmark=values["benchmark"],
            number=values["number"],
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        ),
        "preflight",
        plan.cluster,
    ).set_caching_options(False)
    start = {name: looked.outputs[name] for name in _START_OUTPUTS}
    base = _add_evaluation(plan, values, start, policy=start["policy"], digest=start["policy_digest"])
    champion = {"champion_outcomes": base["outcomes"], "champion_report": base["report"]}
    if len(rounds) == 1:
        _add_round(plan, {**values, **start, **champion}, rounds[0])
        return
    given = {name: values[name] for name in _ROUND_INPUTS if name in values} | start
    before: dict[str, Any] = {}
    for one in rounds:
        made = one(**given, **champion, **before).outputs
        champion = {"champion_outcomes": made["champion_outcomes"], "champion_report": made["champion_report"]}
        before = {"trained": made["trained"], "panel_report_before": made["panel_report"], "base": base["outcomes"]}
        given["policy_digest"] = made["trained_digest"]


def _build_round_subpipelines(plan: RoundPlan) -> list[Any]:
    """The rounds of a run as pipelines in the pipeline; of one round alone, its generation."""
    if plan.rounds == 1:
        return [_build_generation(plan)]
    generations = [_build_generation(plan, continued=again) for again in (False, True)]
    parts = []
    for ahead in range(plan.rounds):
        more = {
            "trained": dsl.Input[dsl.Model],
            "panel_report_before": dsl.Input[dsl.Artifact],
            "base": dsl.Input[dsl.Dataset],
        }

        def body(given: PipelineValues, ahead: int = ahead) -> Any:
            return _add_round(plan, given, generations[ahead > 0], ahead)

        about = f"Round {ahead + 1} of {plan.rounds}"
        inputs = {**_ROUND_INPUTS, **(more if ahead else {})}
        parts.append(_build_subpipeline(f"round-{ahead + 1}", about, inputs, RoundArtifacts, body))
    return parts


def _add_round(plan: RoundPlan, given: PipelineValues, generate: Any, ahead: int = 0) -> Any:
    """One round, from its inputs by name (_ROUND); returns what the next round of the run starts from (Rounded)."""
    number = {"number": given["number"], "ahead": ahead}
    policy = {name: given[name] for name in ("policy", "policy_digest", "trained") if name in given}
    on = {"data": given["data"], "data_digest": given["data_digest"]}
    tested = {"benchmark": given["benchmark"], "benchmark_digest": given["benchmark_digest"]}
    prepared = apply_placement(
        prepare(prepare=given["prepare"], **on, **number, rounds=plan.rounds, shards=given["shards"]),
        "prepare",
        plan.cluster,
    ).outputs
    made = generate(
        propose=given["propose"],
        answer=given["answer"],
        judge=given["judge"],
        **on,
        **policy,
        panel_digest=given["panel_digest"],
        shards=prepared["shards"],
        lap=prepared["lap"],
        questions=prepared["questions"],
    ).outputs
    paired = apply_placement(
        pair(pair=given["pair"], lap=prepared["lap"], candidates=made["candidates"], scores=made["scores"]),
        "pair",
        plan.cluster,
    ).outputs
    files = {"questions": prepared["questions"], "regions": made["regions"], "candidates": made["candidates"]}
    scored = {name: made[name] for name in ("judgements", "scores", "panel_report")}
    pairs = {"pairs": paired["pairs"], "pair_report": paired["pair_report"]}
    kept = apply_placement(
        version(version=given["version"], answer=given["answer"], **files, **scored, **pairs), "version", plan.cluster
    ).outputs
    learnt = apply_placement(
        train(
            train=given["train"],
            answer=given["answer"],
            **on,
            **policy,
            pairs_digest=paired["Output"],
            image=_select_image(plan, "train"),
            version=kept["Output"],
            launch=given["launch"],
            lap=prepared["lap"],
            **files,
            pairs=paired["pairs"],
        ),
        "train",
        plan.cluster,
    ).outputs
    measured = _add_evaluation(plan, given, given, policy="", digest=learnt["Output"], trained=learnt["checkpoint"])
    earlier = {name: given[name] for name in ("panel_report_before", "base") if name in given}
    decided = apply_placement(
        decide(
            decide=given["decide"],
            publish=given["publish"],
            **on,
            **tested,
            blind=given["blind_from"],
            calibration=given["calibrated_on"],
            champion_round=given["policy_round"],
            champion=given["champion_outcomes"],
            challenger=measured["outcomes"],
            panel_report=made["panel_report"],
            pair_report=paired["pair_report"],
            **earlier,
        ),
        "decide",
        plan.cluster,
    ).outputs
    champion = {name: given[name] for name in ("champion_outcomes", "champion_report")}
    sections = {name: given[name] for name in SECTIONS if name not in ("preflight", "deploy")}
    shown = page(
        **sections,
        **number,
        **on,
        **tested,
        blind_from=given["blind_from"],
        policy=given["policy"],
        **files,
        **scored,
        **pairs,
        checkpoint=learnt["checkpoint"],
        outcomes=measured["outcomes"],
        report=measured["report"],
        decision=decided["decision"],
        evidence=decided["evidence"],
        **champion,
        **{name: given[name] for name in ("trained",) if name in given},
    )
    apply_placement(shown, "page", plan.cluster)
    evidence = {
        "checkpoint": learnt["checkpoint"],
        "report": measured["report"],
        "decision": decided["decision"],
        "panel_report": made["panel_report"],
    }
    _add_promotion(plan, given, decided["Output"], {**number, **tested, **evidence})
    if plan.rounds == 1:
        return None
    stands = apply_placement(
        select_champion(
            verdict=decided["Output"],
            challenger_outcomes=measured["outcomes"],
            challenger_report=measured["report"],
            **champion,
        ),
        "select_champion",
        plan.cluster,
    ).outputs
    return RoundArtifacts(
        learnt["checkpoint"], learnt["Output"], made["panel_report"], stands["outcomes"], stands["report"]
    )


def _add_promotion(plan: RoundPlan, given: PipelineValues, verdict: Any, challenger: PipelineValues) -> None:
    """If it was promoted: published, and rolled out."""
    with dsl.If(verdict == "promote", name="promoted"):
        published = apply_placement(
            publish(publish=given["publish"], image=_select_image(plan, "publish"), **challenger),
            "publish",
            plan.cluster,
        ).outputs
        if plan.deploys:
            apply_placement(
                deploy(
                    deploy=given["deploy"],
                    publish=given["publish"],
                    service=given["service"],
                    digest=published["Output"],
                    target=plan.target,
                    state=plan.state,
                ),
                "deploy",
                plan.cluster,
            ).set_caching_options(False)


def _build_subpipeline(
    name: str, about: str, inputs: Mapping[str, Any], outputs: Any, body: Callable[[PipelineValues], Any]
) -> Any:
    """A pipeline in the pipeline: inputs by name and type, outputs a NamedTuple, the tasks made by `body`."""

    def part(*given: Any, **named: Any) -> Any:
        return body(part.__signature__.bind(*given, **named).arguments)  # type: ignore[attr-defined]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    part.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(one, kind, annotation=annotation) for one, annotation in inputs.items()],
        return_annotation=outputs,
    )
    return dsl.pipeline(name=name, description=about)(part)


def _build_generation(plan: RoundPlan, *, continued: bool = False) -> Any:
    """What every shard makes, put together. continued: from a policy that this run trained.

    (In a loop kfp.local takes every parameter that comes from another task for the loop's item. Here they are inputs.)
    """
    texts = ("data", "data_digest", "policy", "policy_digest", "panel_digest")
    inputs = {"propose": dict, "answer": dict, "judge": dict, **dict.fromkeys(texts, str), "shards": list, "lap": int}
    inputs |= {"questions": dsl.Input[dsl.Dataset], **({"trained": dsl.Input[dsl.Model]} if continued else {})}
    about = "What every shard makes, and all of it together."
    return _build_subpipeline(
        "generation", about, inputs, GenerationOutputs, lambda given: _add_generation(plan, given)
    )


def _add_generation(plan: RoundPlan, given: PipelineValues) -> Any:
    """The tasks of the generation, from its inputs by name."""
    steps = len(plan.params.answer.steps)
    policy = {name: given[name] for name in ("policy", "policy_digest", "trained") if name in given}
    on = {name: given[name] for name in ("questions", "data", "data_digest")}
    lap = {"lap": given["lap"]}
    with dsl.ParallelFor(given["shards"], name="shards", parallelism=plan.cluster.parallel_shards) as shard:
        at = {**on, "shard": shard}
        proposed = apply_placement(
            propose(propose=given["propose"], **at, **lap, **policy, image=_select_image(plan, "propose")),
            "propose",
            plan.cluster,
        ).outputs
        before: dict[str, Any] = {}
        for _ in range(steps):
            answered = apply_placement(
                answer(
                    answer=given["answer"],
                    steps=steps,
                    **at,
                    **lap,
                    **policy,
                    image=_select_image(plan, "answer"),
                    regions=proposed["regions"],
                    **before,
                ),
                "answer",
                plan.cluster,
            ).outputs
            judged = apply_placement(
                judge(
                    judge=given["judge"],
                    answer=given["answer"],
                    **at,
                    panel_digest=given["panel_digest"],
                    image=_select_image(plan, "judge"),
                    regions=proposed["regions"],
                    candidates=answered["candidates"],
                ),
                "judge",
                plan.cluster,
            ).outputs
            before = {"candidates_before": answered["candidates"], "scores_before": judged["scores"]}
    merged = apply_placement(
        merge(
            judge=given["judge"],
            questions=given["questions"],
            region_parts=dsl.Collected(proposed["regions"]),
            candidate_parts=dsl.Collected(answered["candidates"]),
            report_parts=dsl.Collected(judged["panel_report"]),
            judgement_parts=dsl.Collected(judged["judgements"]),
        ),
        "merge",
        plan.cluster,
    ).outputs
    return GenerationOutputs(*(merged[name] for name in GenerationOutputs._fields))


def _add_evaluation(
    plan: RoundPlan, values: PipelineValues, start: PipelineValues, *, policy: Any, digest: Any, **trained: Any
) -> PipelineValues:
    """A policy's outcomes and report on the benchmark."""
    measured: PipelineValues = apply_placement(
        evaluate(
            evaluate=values["evaluate"],
            propose=values["propose"],
            data=values["data"],
            data_digest=start["data_digest"],
            benchmark=values["benchmark"],
            benchmark_digest=start["benchmark_digest"],
            policy=policy,
            policy_digest=digest,
            image=_select_image(plan, "evaluate"),
            **trained,
        ),
        "evaluate",
        plan.cluster,
    ).outputs
    return measured


def _select_image(plan: RoundPlan, task: str) -> str:
    return plan.image or plan.cluster.select_image(task)
