"""The round as a pipeline, top to bottom. Everything that happens in a task is the library's (clincot/tasks.py).

    preflight → prepare → (a shard each: propose → answer → judge) → merge → pair → version → train → evaluate → decide
      → page, and if promoted: publish → deploy; and, however it ends: finish

Parameters are one dict a config section, with the defaults of params.yaml. The policy that a round starts from is
resolved once, by preflight, into address, digest and round. Digests travel as parameters beside what they are of, so
Kubeflow's cache knows the same work again: generation by policy, data, judges, sections and image; training by pairs,
policy, section and image.

(kfp reads annotations as types: no `from __future__ import annotations` here.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kfp import compiler, dsl

from clincot.components.answer.component import answer
from clincot.components.decide.component import decide
from clincot.components.deploy.component import deploy
from clincot.components.evaluate.component import evaluate
from clincot.components.finish.component import finish
from clincot.components.judge.component import judge
from clincot.components.merge.component import merge
from clincot.components.page.component import page
from clincot.components.pair.component import pair
from clincot.components.preflight.component import preflight
from clincot.components.prepare.component import prepare
from clincot.components.propose.component import propose
from clincot.components.publish.component import publish
from clincot.components.train.component import train
from clincot.components.version.component import version
from clincot.config import Params
from clincot.deploy.service import ServiceSettings
from clincot.pipelines.cluster_settings import ClusterSettings
from clincot.pipelines.scheduling import pipeline_config, place

SECTIONS = (
    "preflight", "prepare", "propose", "answer", "judge", "pair", "version", "train", "evaluate", "decide", "publish",
    "deploy",
)  # fmt: skip
class Generated(NamedTuple):
    regions: dsl.Dataset
    candidates: dsl.Dataset
    judgements: dsl.Dataset
    scores: dsl.Dataset
    panel_report: dsl.Artifact  # fmt: skip
Values = Mapping[str, Any]  # the pipeline's parameters, by name


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed when a pipeline is compiled; all of `arguments` can be changed run by run."""

    params: Params = field(default_factory=Params)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
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
        sections["preflight"] = {  # the round's own sections are given beside it
            name: value for name, value in sections["preflight"].items() if name not in ("judge", "publish", "version")
        }
        return {
            "data": self.data, "benchmark": self.benchmark, "blind_from": self.blind_from, "calibrated_on": "",
            "number": self.number, "shards": self.shards, **sections,
            "service": self.service.model_dump(mode="json"),
        }  # fmt: skip


def round_pipeline(plan: RoundPlan) -> Any:
    """The pipeline of a plan, as kfp has it: to be compiled, or to be called under kfp.local."""
    defaults = plan.arguments
    generate = _generation(plan)  # kfp makes no pipeline while it makes another

    @dsl.pipeline(
        name="clincot-round", description="Look before you answer: one ClinCoT round.",
        pipeline_config=pipeline_config(plan.cluster),
    )  # fmt: skip
    def clincot_round(
        data: str = defaults["data"], benchmark: str = defaults["benchmark"], blind_from: str = defaults["blind_from"],
        calibrated_on: str = defaults["calibrated_on"], number: int = defaults["number"],
        shards: int = defaults["shards"], preflight: dict = defaults["preflight"],  # type: ignore[type-arg]
        prepare: dict = defaults["prepare"], propose: dict = defaults["propose"],  # type: ignore[type-arg]
        answer: dict = defaults["answer"], judge: dict = defaults["judge"],  # type: ignore[type-arg]
        pair: dict = defaults["pair"], version: dict = defaults["version"],  # type: ignore[type-arg]
        train: dict = defaults["train"], evaluate: dict = defaults["evaluate"],  # type: ignore[type-arg]
        decide: dict = defaults["decide"], publish: dict = defaults["publish"],  # type: ignore[type-arg]
        deploy: dict = defaults["deploy"], service: dict = defaults["service"],  # type: ignore[type-arg]
    ) -> None:  # fmt: skip
        values = {name: value for name, value in locals().items() if name in defaults}
        ending = place(finish(publish=publish), "finish", plan.cluster)
        ending.set_caching_options(False)
        with dsl.ExitHandler(ending, name="round"):
            _rounds(plan, values, generate)

    return clincot_round


def compile_round(plan: RoundPlan, out: Path) -> None:
    """Write the pipeline as YAML."""
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(round_pipeline(plan), str(out))


def _rounds(plan: RoundPlan, values: Values, generate: Any) -> None:
    """Preflight once, then the rounds, each from the last one's challenger."""
    looked = place(
        preflight(
            preflight=values["preflight"], judge=values["judge"], publish=values["publish"], version=values["version"],
            service=values["service"], data=values["data"], benchmark=values["benchmark"], number=values["number"],
        ),
        "preflight", plan.cluster,
    ).set_caching_options(False)  # fmt: skip
    start = looked.outputs
    standing = _evaluated(plan, values, start, policy=start["policy"], digest=start["policy_digest"])
    _one_round(plan, values, generate, start, standing)


def _one_round(plan: RoundPlan, values: Values, generate: Any, start: Values, standing: Values) -> None:
    """One round. start: what preflight resolved; standing: the champion's outcomes and report."""
    policy = {"policy": start["policy"], "policy_digest": start["policy_digest"]}
    on = {"data": values["data"], "data_digest": start["data_digest"]}
    prepared = place(
        prepare(prepare=values["prepare"], **on, number=start["number"], rounds=plan.rounds, shards=values["shards"]),
        "prepare", plan.cluster,
    )  # fmt: skip
    made = generate(
        propose=values["propose"], answer=values["answer"], judge=values["judge"], **on, **policy,
        panel_digest=start["panel_digest"], shards=prepared.outputs["Output"], questions=prepared.outputs["questions"],
    ).outputs  # fmt: skip
    paired = place(
        pair(pair=values["pair"], candidates=made["candidates"], scores=made["scores"]), "pair", plan.cluster
    ).outputs
    files = {"questions": prepared.outputs["questions"], "regions": made["regions"], "candidates": made["candidates"]}
    scored = {name: made[name] for name in ("judgements", "scores", "panel_report")}
    pairs = {"pairs": paired["pairs"], "pair_report": paired["pair_report"]}
    kept = place(
        version(version=values["version"], answer=values["answer"], **files, **scored, **pairs), "version", plan.cluster
    ).outputs
    trained = place(
        train(
            train=values["train"], answer=values["answer"], **on, **policy, pairs_digest=paired["Output"],
            image=_image(plan, "train"), version=kept["Output"], **files, pairs=paired["pairs"],
        ),
        "train", plan.cluster,
    ).outputs  # fmt: skip
    measured = _evaluated(plan, values, start, policy="", digest=trained["Output"], trained=trained["checkpoint"])
    decided = place(
        decide(
            decide=values["decide"], publish=values["publish"], **on, benchmark=values["benchmark"],
            benchmark_digest=start["benchmark_digest"], blind=values["blind_from"], calibration=values["calibrated_on"],
            champion_round=start["policy_round"], champion=standing["outcomes"], challenger=measured["outcomes"],
            panel_report=made["panel_report"], pair_report=paired["pair_report"],
        ),
        "decide", plan.cluster,
    ).outputs  # fmt: skip
    shown = page(
        **{name: values[name] for name in SECTIONS if name not in ("preflight", "deploy")}, number=start["number"],
        data=values["data"], benchmark=values["benchmark"], blind_from=values["blind_from"], policy=start["policy"],
        **files, **scored, **pairs, checkpoint=trained["checkpoint"], outcomes=measured["outcomes"],
        report=measured["report"], decision=decided["decision"], evidence=decided["evidence"],
        champion_outcomes=standing["outcomes"], champion_report=standing["report"],
    )  # fmt: skip
    place(shown, "page", plan.cluster)
    with dsl.If(decided["Output"] == "promote", name="promoted"):
        published = place(
            publish(
                publish=values["publish"], number=start["number"], benchmark=values["benchmark"],
                image=_image(plan, "publish"), checkpoint=trained["checkpoint"], report=measured["report"],
                decision=decided["decision"], panel_report=made["panel_report"],
            ),
            "publish", plan.cluster,
        ).outputs  # fmt: skip
        if plan.deploys:
            place(
                deploy(
                    deploy=values["deploy"], publish=values["publish"], service=values["service"],
                    digest=published["Output"], target=plan.target, state=plan.state,
                ),
                "deploy", plan.cluster,
            ).set_caching_options(False)  # fmt: skip


def _generation(plan: RoundPlan, *, continued: bool = False) -> Any:
    """What every shard makes, put together: a pipeline in the pipeline. continued: from a policy that this run trained.

    (In a loop kfp.local takes every parameter that comes from another task for the loop's item. Here they are inputs.)
    """
    if continued:

        @dsl.pipeline(name="generation", description="What every shard makes, and all of it together.")
        def generation(
            propose: dict, answer: dict, judge: dict, data: str, data_digest: str, policy: str,  # type: ignore[type-arg]
            policy_digest: str, panel_digest: str, shards: list, questions: dsl.Input[dsl.Dataset],  # type: ignore[type-arg]
            trained: dsl.Input[dsl.Model],
        ) -> Generated:  # fmt: skip
            return _generated(plan, locals())
    else:

        @dsl.pipeline(name="generation", description="What every shard makes, and all of it together.")
        def generation(
            propose: dict, answer: dict, judge: dict, data: str, data_digest: str, policy: str,  # type: ignore[type-arg]
            policy_digest: str, panel_digest: str, shards: list, questions: dsl.Input[dsl.Dataset],  # type: ignore[type-arg]
        ) -> Generated:  # fmt: skip
            return _generated(plan, locals())

    return generation


def _generated(plan: RoundPlan, given: Values) -> Any:
    """The tasks of the generation, from its inputs by name."""
    steps = len(plan.params.answer.steps)
    policy = {name: given[name] for name in ("policy", "policy_digest", "trained") if name in given}
    on = {name: given[name] for name in ("questions", "data", "data_digest")}
    with dsl.ParallelFor(given["shards"], name="shards", parallelism=plan.cluster.parallel_shards) as shard:
        at = {**on, "shard": shard}
        proposed = place(
            propose(propose=given["propose"], **at, **policy, image=_image(plan, "propose")), "propose", plan.cluster
        ).outputs
        before: dict[str, Any] = {}
        for _ in range(steps):
            answered = place(
                answer(
                    answer=given["answer"], steps=steps, **at, **policy, image=_image(plan, "answer"),
                    regions=proposed["regions"], **before,
                ),
                "answer", plan.cluster,
            ).outputs  # fmt: skip
            judged = place(
                judge(
                    judge=given["judge"], answer=given["answer"], **at, panel_digest=given["panel_digest"],
                    image=_image(plan, "judge"), regions=proposed["regions"], candidates=answered["candidates"],
                ),
                "judge", plan.cluster,
            ).outputs  # fmt: skip
            before = {"candidates_before": answered["candidates"], "scores_before": judged["scores"]}
    merged = place(
        merge(
            judge=given["judge"], questions=given["questions"], region_parts=dsl.Collected(proposed["regions"]),
            candidate_parts=dsl.Collected(answered["candidates"]), report_parts=dsl.Collected(judged["panel_report"]),
            judgement_parts=dsl.Collected(judged["judgements"]),
        ),
        "merge", plan.cluster,
    ).outputs  # fmt: skip
    return Generated(*(merged[name] for name in Generated._fields))


def _evaluated(plan: RoundPlan, values: Values, start: Values, *, policy: Any, digest: Any, **trained: Any) -> Values:
    """A policy's outcomes and report on the benchmark."""
    return place(
        evaluate(
            evaluate=values["evaluate"], propose=values["propose"], data=values["data"],
            data_digest=start["data_digest"], benchmark=values["benchmark"],
            benchmark_digest=start["benchmark_digest"], policy=policy, policy_digest=digest,
            image=_image(plan, "evaluate"), **trained,
        ),
        "evaluate", plan.cluster,
    ).outputs  # fmt: skip


def _image(plan: RoundPlan, task: str) -> str:
    return plan.image or plan.cluster.image(task)
