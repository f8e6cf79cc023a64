"""The only list of stages. A stage is a library function over files; everything that runs one reads this list.

The command line, the loop of rounds and the pipelines call `run_stage(name, …)`. It skips a stage whose inputs,
configuration and version are those of an earlier run that finished, so an interrupted run goes on where it was. Heavy
imports happen inside the functions: importing this module brings in neither torch nor kfp.

A rollout is no stage: what it makes is the state of a cluster, which others change too, so a stamp beside a file would
say "done" where it is undone (`clincot deploy`, deploy/rollout.py).

No stage before `evaluate` is given the answer key (references.jsonl); they run where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tqdm import tqdm

from clincot import __version__, config
from clincot.asks import asked_and_answered, first_asks, merged, next_asks, question_of, steps_of
from clincot.config import Section
from clincot.errors import BadInput
from clincot.jsonl import BadRecord, file_digest, read_records, write_json, write_records, written_aside
from clincot.records import Candidate, Checkpoint, DataVersion, Outcome, PanelScore, Question, digest_of
from clincot.report_file import read_reports
from clincot.units import in_units

if TYPE_CHECKING:
    from clincot.bench.benchmark import Benchmark
    from clincot.bench.report_metrics import ReportMetrics

Metrics = dict[str, float]
Paths = Mapping[str, Path]
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One step of a round. `run(section, inputs, outputs)` reads and writes exactly the named paths."""

    name: str
    run: Callable[[Any, Paths, Paths], Metrics]
    config: type[Section]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: Literal["cpu", "gpu"]
    about: str
    optional: tuple[str, ...] = ()  # inputs that may be left out
    may_lack: tuple[str, ...] = ()  # inputs that may be missing on disk: what that means is for the stage to say
    appends_to: tuple[str, ...] = ()  # inputs that the stage adds to; given one, it is run again even if it is done
    always: bool = False  # run again even if it is done: what it looks at or changes lies outside its files
    beside: tuple[str, ...] = ()  # optional inputs that are provenance alone: another one makes no work undone
    flags: tuple[str, ...] = ()  # fields of the section that the command line also takes as --field


def preflight(section: config.PreflightSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.preflight.running import look

    return look(section, inputs, outputs)


def prepare(section: config.PrepareSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import load_questions, split_rounds

    def chosen() -> Iterator[Question]:
        subset = split_rounds(load_questions(inputs["data"]), rounds=section.rounds, seed=section.seed)
        mine = (question for number, question in subset if number == section.round)
        for taken, question in enumerate(mine):
            if section.limit and taken == section.limit:
                return
            yield question

    count = write_records(outputs["questions"], chosen())
    if count == 0:
        outputs["questions"].unlink()
        raise BadInput(f"{inputs['data']}: no question falls into round {section.round} of {section.rounds}")
    return {"questions": count}


def propose(section: config.ProposeSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.datasets.folder import StudyIndex
    from clincot.models.load import load_policy
    from clincot.propose.grounders import Written
    from clincot.propose.regions import grounders_of, propose_regions

    grounders = grounders_of(section, load_policy(inputs["policy"]))
    questions = _progress(read_records(inputs["questions"], Question), "regions", "questions")
    regions = propose_regions(questions, StudyIndex(inputs["data"]), inputs["data"], grounders, section)
    count = write_records(outputs["regions"], regions)
    return {"regions": count, "off_format": sum(g.off_format for g, _ in grounders if isinstance(g, Written))}


def answer(section: config.AnswerSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.models.load import load_policy
    from clincot.propose.candidates import answer_regions

    policy = load_policy(inputs["policy"])
    asks = next_asks(inputs, section) if "candidates_before" in inputs else first_asks(inputs)
    made = answer_regions(_progress(asks, "answers", "candidates"), inputs["data"], policy, section)
    if "candidates_before" in inputs:
        made = merged(read_records(inputs["candidates_before"], Candidate), made)
    return {"candidates": write_records(outputs["candidates"], made)}


def judge(section: config.JudgeSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.judge.panel import Ask, judge_candidates
    from clincot.models.load import load_judge

    steps = steps_of(inputs)
    asks = (
        Ask(candidate.id, ask.study, question_of(candidate, ask.question, steps), ask.region.box, candidate.text, unit)
        for unit, (ask, candidate) in in_units(asked_and_answered(inputs), lambda pair: pair[1].question)
    )
    report = judge_candidates(
        [load_judge(spec) for spec in section.judges], _progress(asks, "judgements", "candidates"), section,
        folder=inputs["data"], judgements_path=outputs["judgements"], scores_path=outputs["scores"],
    )  # fmt: skip
    write_json(outputs["panel_report"], report.model_dump(mode="json"))
    alpha = {} if report.alpha_calibrated.value is None else {"alpha": report.alpha_calibrated.value}
    return {"candidates": report.candidates, "scored": report.scored, **alpha}


def pair(section: config.PairSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.judge.pairs import make_pairs

    candidates = read_records(inputs["candidates"], Candidate)
    pairs, report = make_pairs(candidates, read_records(inputs["scores"], PanelScore), section)
    write_records(outputs["pairs"], pairs)
    write_json(outputs["pair_report"], report.model_dump(mode="json"))
    return {"pairs": len(pairs)}


def version(section: config.VersionSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.data_repository.keeping import keep_version

    kept = keep_version(section, inputs, outputs["version"])
    write_records(outputs["version"], [kept])
    return {"versioned": float(bool(kept.revision)), "pairs": kept.pairs, "files": len(kept.files), "bytes": kept.size}


def train(section: config.TrainSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.models.checkpoint import checkpoint_digest
    from clincot.models.load import forget
    from clincot.train.launch import run_training
    from clincot.train.launch_settings import load_launch
    from clincot.train.work import Work

    launch = load_launch(inputs.get("launch"))
    data, revision = _kept_as(inputs)
    work = Work(
        section=section, data=inputs["data"], questions=inputs["questions"], regions=inputs["regions"],
        candidates=inputs["candidates"], pairs=inputs["pairs"], policy=inputs["policy"], steps=steps_of(inputs),
        checkpoint=outputs["checkpoint"],
    )  # fmt: skip
    forget()  # a policy held for answering would double the memory of a large one
    metrics = run_training(work, launch)
    record = Checkpoint(
        uri=str(outputs["checkpoint"]),
        sha256=checkpoint_digest(outputs["checkpoint"]),
        parent=checkpoint_digest(inputs["policy"]),
        pairs=file_digest(inputs["pairs"]),
        config=section.digest,
        data=data,
        data_revision=revision,
    )
    write_records(outputs["checkpoint"] / "record.json", [record])
    return metrics


def evaluate(section: config.EvaluateSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.bench.report import benchmark_reports
    from clincot.datasets.folder import StudyIndex
    from clincot.evaluation import evaluate as answer_benchmark
    from clincot.models.load import load_policy

    benchmark = read_benchmark(inputs["benchmark"], limit=section.limit)
    studies = StudyIndex(inputs["benchmark"])
    outcomes = answer_benchmark(load_policy(inputs["policy"]), benchmark, studies, inputs["benchmark"], section)
    total = len(section.arms) * len(benchmark.questions)
    write_records(outputs["outcomes"], _progress(outcomes, "benchmark", "answers", total))
    (report,) = benchmark_reports(
        read_records(outputs["outcomes"], Outcome), benchmark, seed=section.seed, resamples=section.resamples,
        reports=metrics_of_reports(benchmark, inputs.get("train_reports")),
    )  # fmt: skip
    write_json(outputs["report"], report.model_dump(mode="json"))
    metrics = {}
    for arm, measured in report.metrics.items():
        for name, called in (("accuracy", "accuracy"), ("raw/rouge_l", "rouge_l"), ("finding_f1", "finding_f1")):
            if name in measured and (value := measured[name].value) is not None:
                metrics[f"{called}_{arm}"] = value
    return metrics


def decide(section: config.DecideSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot import deciding
    from clincot.bench.decision_text import markdown
    from clincot.bench.ledger import enter

    gated = deciding.decide(section, inputs, {name: _digest_or_missing(path) for name, path in sorted(inputs.items())})
    write_records(outputs["evidence"], iter(()) if gated.sides is None else gated.sides.rows())
    with written_aside(outputs["summary"]) as file:
        file.write(markdown(gated.decision))
    if gated.spending is not None and gated.asked is not None and "ledger" in inputs:
        enter(inputs["ledger"], gated.spending, gated.asked)  # before the decision: it is never acted on unspent
    write_records(outputs["decision"], [gated.decision])
    return {name: float(gated.decision.verdict == name) for name in ("promote", "keep", "blocked")}


def publish(section: config.PublishSection, inputs: Paths, outputs: Paths) -> Metrics:
    from clincot.publishing import publish_files

    manifest = publish_files(section, inputs)
    write_json(outputs["published"], manifest.model_dump(mode="json"))
    return {"files": len(manifest.files), "bytes": sum(f.size for f in manifest.files), "golden": len(manifest.golden)}


STAGES: tuple[Stage, ...] = (
    Stage("preflight", preflight, config.PreflightSection, (), ("report", "table", "champion"), "cpu",
          "stores, judges, champion, cluster and disk, looked at before anything is asked for; all failures at once",
          ("service", "launch"), always=True, flags=("base",)),
    Stage("prepare", prepare, config.PrepareSection, ("data",), ("questions",), "cpu",
          "take the questions of one round: disjoint subsets, split by image"),
    Stage("propose", propose, config.ProposeSection, ("data", "questions", "policy"), ("regions",), "gpu",
          "hypotheses about every question, grounded as regions; the whole image is always one"),
    Stage("answer", answer, config.AnswerSection, ("data", "questions", "regions", "policy"), ("candidates",), "gpu",
          "the policy answers from every region", ("candidates_before", "scores_before")),
    Stage("judge", judge, config.JudgeSection, ("data", "questions", "regions", "candidates"),
          ("judgements", "scores", "panel_report"), "gpu", "every judge scores every candidate", ("steps",)),
    Stage("pair", pair, config.PairSection, ("candidates", "scores"), ("pairs", "pair_report"), "cpu",
          "ranked candidates become preference pairs with their score gaps"),
    Stage("version", version, config.VersionSection,
          ("questions", "regions", "candidates", "judgements", "scores", "panel_report", "pairs", "pair_report"),
          ("version",), "cpu", "the preference data into the data repository: pushed, verified, committed, tagged",
          ("steps",), always=True, flags=("repository", "round")),
    Stage("train", train, config.TrainSection, ("data", "questions", "regions", "candidates", "pairs", "policy"),
          ("checkpoint",), "gpu", "margin-aware DPO on the pairs; reference: the policy it starts from",
          ("steps", "version", "launch"), beside=("version", "launch")),
    Stage("evaluate", evaluate, config.EvaluateSection, ("benchmark", "policy"), ("outcomes", "report"), "gpu",
          "the policy answers the benchmark from each kind of region, controls included", ("train_reports",)),
    Stage("decide", decide, config.DecideSection, ("benchmark", "champion", "challenger"),
          ("decision", "evidence", "summary"), "cpu",
          "does the challenger take the champion's place? (the outcomes of both)",
          ("blind", "base", "data", "calibration", "panel_report", "panel_report_before", "pair_report", "ledger"),
          may_lack=("champion", "challenger"), appends_to=("ledger",)),
    Stage("publish", publish, config.PublishSection, ("checkpoint",), ("published",), "gpu",
          "a checkpoint into the store, under its digest, with manifest, model card and golden questions",
          ("report", "decision", "panel_report", "golden"), flags=("store", "name", "adapter")),
)  # fmt: skip


def stage_named(name: str) -> Stage:
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise BadInput(f"no stage is called {name!r}; there are {', '.join(stage.name for stage in STAGES)}")


def run_stage(name: str, section: Section, inputs: Paths, outputs: Paths) -> Metrics:
    """Run a stage unless its outputs are already those of the same inputs, section and version; returns its metrics.

    Beside the first output lies a stamp, <output>.stage.json, written when the stage ended well. Raises BadRecord where
    a path is missing or not one of the stage's.
    """
    stage = stage_named(name)
    _check_paths(stage, inputs, outputs)
    named = {str(path): path_digest(path) for path in section.files if path.exists()}
    key = digest_of(
        [name, __version__, section.model_dump(mode="json"), named,
         {n: "" if n in stage.appends_to else _digest_or_missing(p)
          for n, p in sorted(inputs.items()) if n not in stage.beside}]
    )  # fmt: skip
    stamp = outputs[stage.outputs[0]].with_name(outputs[stage.outputs[0]].name + ".stage.json")
    done = _read_stamp(stamp)
    again = stage.always or bool({*inputs} & {*stage.appends_to})  # it knows itself what it has done before
    if not again and done is not None and done["key"] == key and _unchanged(done["outputs"], outputs):
        metrics: Metrics = done["metrics"]
        return metrics
    stamp.unlink(missing_ok=True)
    metrics = stage.run(section, inputs, outputs)
    written = {n: path_digest(p) for n, p in sorted(outputs.items())}
    write_json(stamp, {"stage": name, "key": key, "outputs": written, "metrics": metrics})
    return metrics


def path_digest(path: Path) -> str:
    """sha256 of a file, or of a folder's names and files; images count by the digests in studies.jsonl."""
    if path.is_file():
        return file_digest(path)
    if (path / "studies.jsonl").is_file():
        parts = [path / name for name in ("studies.jsonl", "questions.jsonl", "references.jsonl")]
        return digest_of([[p.name, file_digest(p)] for p in parts if p.is_file()])
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in {"record.json", "train_log.json"})
    return digest_of([[str(p.relative_to(path)), file_digest(p)] for p in files])


def _digest_or_missing(path: Path) -> str:
    return path_digest(path) if path.exists() else "missing"


def _kept_as(inputs: Paths) -> tuple[str, str]:
    """Which version of preference data the pairs are, for the checkpoint's record: its digest and its revision."""
    if "version" not in inputs:
        return "", ""
    (kept,) = read_records(inputs["version"], DataVersion)
    pairs = file_digest(inputs["pairs"])
    if pairs not in {file.sha256 for file in kept.files}:
        raise BadRecord(f"{inputs['version']}: is a version of other pairs than {inputs['pairs']} (sha256 {pairs})")
    return kept.sha256, kept.revision


def read_benchmark(folder: Path, *, limit: int = 0, only: Iterable[str] | None = None) -> Benchmark:
    """Questions with their answer key, cut to the first `limit` or to the ids in `only`."""
    from clincot.bench.benchmark import Benchmark
    from clincot.datasets.folder import StudyIndex, load_questions, load_references

    kept = None if only is None else set(only)
    questions = [q for q in load_questions(folder) if kept is None or q.id in kept]
    questions = questions[: limit or None]
    ids = {q.id for q in questions}
    references = [r for r in load_references(folder) if r.question in ids]
    return Benchmark.of(questions, references, StudyIndex(folder).values())


def metrics_of_reports(benchmark: Benchmark, training: Path | None) -> ReportMetrics | None:
    """What scores the benchmark's reports; None where it asks for none. training: reports.jsonl, R2Gen's vocabulary."""
    from clincot.bench.report_metrics import report_metrics

    if all(question.kind != "report" for question in benchmark.questions.values()):
        return None
    return report_metrics(None if training is None else (row.text for row in read_reports(training)))


def _check_paths(stage: Stage, inputs: Paths, outputs: Paths) -> None:
    known = {*stage.inputs, *stage.optional}
    wrong = sorted({*inputs} - known) + sorted({*outputs} ^ set(stage.outputs)) + sorted(set(stage.inputs) - {*inputs})
    if wrong:
        raise BadRecord(
            f"stage {stage.name}: inputs are {stage.inputs} (optional {stage.optional}), outputs {stage.outputs}; "
            f"missing or unknown: {', '.join(wrong)}"
        )
    for name, path in inputs.items():
        if not path.exists() and name not in stage.may_lack:
            raise BadRecord(f"stage {stage.name}: input {name!r}: {path} does not exist")


def _read_stamp(stamp: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def _unchanged(written: Mapping[str, str], outputs: Paths) -> bool:
    return all(path.exists() and written.get(name) == path_digest(path) for name, path in outputs.items())


def _progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    return iter(tqdm(items, desc=what, unit=f" {unit}", total=total, mininterval=2.0, disable=None))
