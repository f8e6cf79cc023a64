"""The functions that Kubeflow components call, over the paths and parameters of a task.

The body of a component (components/<task>/component.py) calls one of these functions. The first task checks the
parameters of the run and stores them; the others get the address of their settings (run_settings.py). Policies arrive
as addresses (storage/artifacts.py), and what tasks hand to each other as files or folders with the names of a run
folder (runs/layout.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from clincot.config import (
    AnswerConfig,
    FrozenConfig,
    JudgeConfig,
    PublishConfig,
    parse_config,
)
from clincot.errors import InvalidInput, UserError
from clincot.jsonl import InvalidRecord, read_json_model, read_records, write_json
from clincot.pipelines.params import (
    JsonObject,
    build_evaluate_config,
    build_prepare_config,
    build_publish_config,
    decode_params,
    parse_stage_config,
)
from clincot.pipelines.round_files import (
    PREFERENCE_FILES,
    RESULT_FILES,
    DecisionFiles,
    RoundContext,
    RoundFiles,
    RoundOrder,
    name_files,
    summarize_round,
)
from clincot.pipelines.run_form import REQUIRED_FIELDS, SECTIONS, RunForm, parse_run, parse_section
from clincot.pipelines.run_settings import TaskSettings, read_task_settings, write_settings, write_task_settings
from clincot.pipelines.shard_generation import (
    QUESTIONS_FOLDER,
    VERSIONS_FOLDER,
    ShardInputs,
    download_shards,
    fetch_file,
    generate_shard,
    judge_shard,
    read_group_manifest,
    store_file,
    write_group_manifest,
)
from clincot.records import BenchmarkReport, DataVersion, PreferencePair, StartingPolicy, hash_json
from clincot.runs import history
from clincot.runs.layout import ROUND_FILES
from clincot.stages.base import Metrics
from clincot.stages.catalog import get_stage
from clincot.stages.runner import run_stage
from clincot.storage.artifacts import download_folder, read_digest
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store

if TYPE_CHECKING:
    from clincot.evaluation.answer_protocols import AnswerProtocol
    from clincot.preflight.preflight_report import PreflightCheck
    from clincot.runs.round_records import RunEnd

# Path of a file to which a failing task appends its error; a local run reads it to decide whether to retry.
ERRORS_ENV = "CLINCOT_TASK_ERRORS"


class MetricsArtifact(Protocol):
    """The part of kfp.dsl.Metrics that tasks use; the library does not import kfp."""

    @property
    def path(self) -> str: ...

    def log_metric(self, metric: str, value: float) -> None: ...


class CheckedRun(NamedTuple):
    """What preflight hands on: the starting policy (JSON of a StartingPolicy), and the settings of every task."""

    champion: str
    round_settings: str
    prepare_settings: str
    generate_settings: str
    pair_settings: str
    version_settings: str
    train_settings: str
    evaluate_settings: str
    decide_settings: str
    publish_settings: str
    deploy_settings: str
    page_settings: str


class PreparedRound(NamedTuple):
    """What the tasks of a round get of their questions.

    work: address of the settings of `generate`, with questions and policy. questions: their sha256. shard_groups: the
    shards of each task. lap: how often earlier rounds used the same questions.
    """

    work: str
    questions: str
    shard_groups: list[str]
    lap: int


class VersionedData(NamedTuple):
    """Where a data version is, and the sha256 under which its record is stored."""

    where: dict[str, str]
    digest: str


class RoundOrigin(NamedTuple):
    """Where a round starts: address, sha256 and round of the policy, and the number of the round."""

    policy: str
    policy_digest: str
    policy_round: int
    number: int


@contextmanager
def user_errors(task: str) -> Iterator[None]:
    """End the task with one line for errors that a user can fix; other errors keep their traceback."""
    try:
        yield
    except (UserError, OSError, MemoryError) as error:
        message = f"clincot {task}: {_describe_memory_limit(task) if isinstance(error, MemoryError) else error}"
        if os.environ.get(ERRORS_ENV):
            with Path(os.environ[ERRORS_ENV]).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"error": type(error).__name__, "message": message}) + "\n")
        sys.exit(message)


def run_stage_task(  # noqa: PLR0913 (components call it with what their artifacts are)
    stage: str,
    config: JsonObject | FrozenConfig,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    *,
    metrics: MetricsArtifact | None = None,
    answer: JsonObject | None = None,
    documents: Mapping[str, Any] | None = None,
    lap: int = 0,
) -> str:
    """Run a stage and return the digest of its first output.

    inputs: paths or addresses by input name; empty ones are left out.
    answer: the section, for stages that need the questions of a chain.
    documents: inputs by content, written to JSON files.
    lap: see `params.parse_stage_config`.
    """
    with user_errors(stage), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parsed = config if isinstance(config, FrozenConfig) else parse_stage_config(stage, config, lap=lap)
        paths = {name: _resolve_path(location) for name, location in inputs.items() if location}
        steps = [] if answer is None else _read_chain(answer)
        contents = {**(documents or {}), **({"steps": steps} if len(steps) > 1 else {})}
        for name, content in contents.items():
            paths[name] = folder / f"{name}.json"
            _write_document(paths[name], content)
        written = {name: Path(path) for name, path in outputs.items()}
        log_metrics(metrics, run_stage(stage, _download_judges(parsed), paths, written))
        return hash_path(written[get_stage(stage).outputs[0]])


def log_metrics(metrics: MetricsArtifact | None, values: Metrics) -> None:
    """Print the values, show them in the Kubeflow UI, and write them to the artifact's file.

    kfp.local treats an artifact without a file as lost, and its task as not done.
    """
    if metrics is not None:
        write_json(Path(metrics.path), dict(values))
    for name, value in values.items():
        print(f"{name} {value:g}")
        if metrics is not None:
            metrics.log_metric(name, value)


def preflight(
    form: RunForm,
    sections: Mapping[str, JsonObject],
    outputs: Mapping[str, str],
) -> CheckedRun:
    """Check everything that the run needs, then store the settings of its tasks; return where they are.

    form: the fields of the run's form that have a type of their own. sections: the other settings, by section. An
    unknown key or a bad value of any section is refused here. Nothing is stored unless every check has passed.
    """
    from clincot.preflight.checklist import write_checks

    with user_errors("preflight"):
        with tempfile.TemporaryDirectory() as temporary:
            written = {name: str(Path(temporary) / name) for name in ("report", "champion")} | dict(outputs)
            paths = {name: Path(path) for name, path in written.items()}
            try:
                wrong = check_run_parameters(form, sections)
                if wrong:
                    write_checks(wrong, paths)
                parsed, service, launch = parse_run(form, sections)
                judge = _download_judges(parsed.judge)
                assert isinstance(judge, JudgeConfig)
                config = parsed.model_copy(update={"judge": judge}).get_stage_config("preflight")
                documents = {"service": service.model_dump(mode="json"), "launch": launch.model_dump(mode="json")}
                run_stage_task("preflight", config, {}, written, documents=documents)
            finally:
                print(paths["table"].read_text(encoding="utf-8") if paths["table"].is_file() else "")
            (start,) = read_records(paths["champion"], StartingPolicy)
        inputs = {
            "data": form.data,
            "data_digest": read_digest(form.data),
            "benchmark": form.benchmark,
            "benchmark_digest": read_digest(form.benchmark),
            "blind_from": form.blind_from,
            "calibrated_on": form.calibrated_on,
            "panel_digest": hash_json([[path.name, hash_path(path)] for path in judge.files if path.exists()]),
            "recipe": form.recipe,
            "code": form.code,
        }
        checked = {name: getattr(parsed, name).model_dump(mode="json") for name in SECTIONS} | documents
        addresses = write_task_settings(form.store, checked, inputs)
        settings = {f"{task}_settings": address for task, address in addresses.items()}
        return CheckedRun(champion=start.model_dump_json(), **settings)


def check_run_parameters(form: RunForm, sections: Mapping[str, JsonObject]) -> list[PreflightCheck]:
    """Return a failed check for every section with a wrong key or value, and for every required field left empty."""
    from clincot.preflight.preflight_report import fail_check

    failed = []
    for name, what in REQUIRED_FIELDS.items():
        if not getattr(form, name):
            remedy = f"fill in the field {name} of the run: {what}"
            failed.append(fail_check(f"settings: {name}", f"the parameter {name} of the run", "it is empty", remedy))
    for name, content in sections.items():
        try:
            parse_section(form, name, content)
        except (InvalidInput, InvalidRecord) as error:
            remedy = f"correct the JSON of the field {name}; docs/reference/params.md lists the keys and their limits"
            failed.append(fail_check(f"settings: {name}", f"every key and value of {name}", str(error), remedy))
    return failed


def start_round(publish: JsonObject, champion: str, *, number: int, run_id: str, rounds: int = 1) -> RoundOrigin:
    """Start a round in the store, or resume it from the policy from which it first started.

    champion: the policy that preflight found (JSON). number: of the round; 0: the next one of the model.
    run_id: identifier of the pipeline run. rounds: how many the run consists of. Without a store nothing is recorded.
    """
    with user_errors("start_round"):
        config = _parse_publish(publish)
        start = StartingPolicy.model_validate_json(champion)
        if config.store:
            begun, notes = history.begin_round(open_store(config.store), start, number, run=run_id, rounds=rounds)
            print("\n".join((*notes, f"round {begun.number} of {start.line} starts from {begun.start.uri}")))
            start, number = begun.start, begun.number
        return RoundOrigin(start.uri, start.sha256, start.round, number or start.round + 1)


def find_training_reports(data: str, benchmark: str) -> str:
    """Return the path of the data set's reports if the benchmark asks for reports, else ""."""
    from clincot.datasets.folder import load_questions
    from clincot.datasets.reports import REPORTS_FILE

    if not any(question.kind == "report" for question in load_questions(download_folder(benchmark))):
        return ""
    path = download_folder(data) / REPORTS_FILE
    return str(path) if path.is_file() else ""


def read_section(task: str, settings: str, section: str) -> JsonObject:
    """Return a section of the settings of a task."""
    with user_errors(task):
        return read_task_settings(settings).get_section(section)


def prepare(
    settings: str, generate_settings: str, policy: tuple[str, str], order: RoundOrder, *, shards: int, groups: int
) -> PreparedRound:
    """Select the questions of a round, store them, and divide them among the tasks that generate candidates.

    policy: address and sha256. groups: largest number of tasks that process the shards.
    """
    from clincot.pipelines.sharding import group_shards, list_shard_names

    with user_errors("prepare"), tempfile.TemporaryDirectory() as temporary:
        given, generation = read_task_settings(settings), read_task_settings(generate_settings)
        config, lap = build_prepare_config(given.get_section("prepare"), order.number, order.rounds)
        path = Path(temporary) / ROUND_FILES["questions"]
        run_stage_task("prepare", config, {"data": given.inputs["data"]}, {"questions": str(path)})
        names = list_shard_names(path, shards)
        questions = store_file(open_store(given.store), QUESTIONS_FOLDER, path)
        inputs = {"policy": policy[0], "policy_digest": policy[1], "questions": questions, "lap": str(lap)}
        work = write_settings(given.store, generation.sections, {**generation.inputs, **inputs})
        return PreparedRound(work, questions, group_shards(names, groups), lap)


def generate(work: str, group: str, *, trained: str = "", judges: bool = True) -> str:
    """Generate and score the candidates of a group of shards, one after the other.

    work: address that `prepare` returned. trained: folder of a policy that replaces that of the settings. judges: False
    leaves the scores to the task `judge`. Returns the sha256 of the list of the shards' files, which are stored.
    """
    with user_errors("generate"), tempfile.TemporaryDirectory() as temporary:
        given = read_task_settings(work)
        store, lap = open_store(given.store), int(given.inputs["lap"])
        run = partial(_run_shard_stage, given, lap)
        shards = _list_shard_inputs(work, given, group, Path(temporary), trained)
        return write_group_manifest(store, [generate_shard(one, store, run, judges=judges) for one in shards])


def judge(work: str, group: str, answered: str) -> str:
    """Score the candidates of a group of shards.

    work, group: as for `generate`, which returned `answered` without judges. Returns what `generate` returns with them.
    """
    with user_errors("judge"), tempfile.TemporaryDirectory() as temporary:
        given = read_task_settings(work)
        store, lap = open_store(given.store), int(given.inputs["lap"])
        run, digests = partial(_run_shard_stage, given, lap), []
        shards = _list_shard_inputs(work, given, group, Path(temporary))
        for one, digest in zip(shards, read_group_manifest(store, answered), strict=True):
            digests.append(judge_shard(one, store, run, answered=digest))
        return write_group_manifest(store, digests)


def _list_shard_inputs(
    work: str, given: TaskSettings, group: str, folder: Path, trained: str = ""
) -> list[ShardInputs]:
    """What the stages of each shard of a group read; the questions of each shard are written into `folder`."""
    from clincot.pipelines.sharding import parse_shard_group, write_shard

    questions = fetch_file(open_store(given.store), QUESTIONS_FOLDER, given.inputs["questions"], folder)
    shards = []
    for shard in parse_shard_group(group):
        path = folder / f"{shard.replace('/', '-of-')}.jsonl"
        write_shard(questions, shard, path)
        shards.append(
            ShardInputs(
                shard=shard,
                data=given.inputs["data"],
                questions=str(path),
                policy=trained or given.inputs["policy"],
                steps=len(_read_chain(given.get_section("answer"))),
                key=hash_json([work.rpartition("/")[2], shard]),
            )
        )
    return shards


def _run_shard_stage(
    given: TaskSettings, lap: int, stage: str, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    """Run propose, answer or judge for one shard. The judges do not sample, so their seed is that of every lap."""
    judges = stage == "judge"
    run_stage_task(
        stage,
        given.get_section(stage),
        inputs,
        outputs,
        answer=given.get_section("answer") if judges else None,
        lap=0 if judges else lap,
    )


def pair(settings: str, questions: str, shards: Sequence[str], preferences: str, *, lap: int) -> dict[str, float]:
    """Merge the shards and make preference pairs from their candidates; return figures about them.

    questions: sha256 under which they are stored. shards: what `generate` returned for each group, in their order.
    preferences: the folder that is written.
    """
    from clincot.pipelines.sharding import merge_shards

    with user_errors("pair"):
        given = read_task_settings(settings)
        store = open_store(given.store)
        config = parse_config(JudgeConfig, decode_params(given.get_section("judge")), where="section 'judge'")
        files = name_files(preferences, PREFERENCE_FILES)
        asked = fetch_file(store, QUESTIONS_FOLDER, questions, Path(preferences)).rename(files["questions"])
        parts = download_shards(store, shards)
        merged = merge_shards(config, asked, parts, {name: Path(path) for name, path in files.items()})
        log_metrics(None, merged)
        run_stage_task(
            "pair",
            given.get_section("pair"),
            {name: files[name] for name in ("questions", "regions", "candidates", "judgements", "scores")},
            {name: files[name] for name in ("pairs", "pair_report")},
            lap=lap,
        )
        pairs = sum(1 for _ in read_records(Path(files["pairs"]), PreferencePair))
        return {**merged, "pairs": pairs}


def version(settings: str, preferences: str, output: str, *, number: int, run_id: str) -> VersionedData:
    """Commit the preference data to the data repository; return where it is.

    preferences: the folder that `pair` wrote. number: of the round. run_id: identifier of the pipeline run.
    """
    given = _read_settings("version", settings)
    origin = describe_data_origin(given.get_section("publish"), number=number, run_id=run_id)
    run_stage_task(
        "version",
        given.get_section("version"),
        name_files(preferences, PREFERENCE_FILES),
        {"version": output},
        answer=given.get_section("answer"),
        documents={"origin": origin},
    )
    with user_errors("version"):
        digest = store_file(open_store(given.store), VERSIONS_FOLDER, Path(output))
        (record,) = read_records(Path(output), DataVersion)
    known = {"id": record.id, "repository": record.repository, "tag": record.tag, "revision": record.revision}
    return VersionedData({name: value for name, value in known.items() if value}, digest)


def describe_data_origin(publish: JsonObject, *, number: int, run_id: str) -> dict[str, Any]:
    """Return the document `origin` of the version stage: line, round and run of the preference data."""
    from clincot.preferences.versions.tags import DataOrigin

    return DataOrigin(line=_parse_publish(publish).name, round=number, run=run_id).model_dump(mode="json")


def train(settings: str, preferences: str, data_version: str, checkpoint: str, *, policy: str, lap: int) -> str:
    """Train the challenger; return the digest of its checkpoint.

    preferences: the folder that `pair` wrote. data_version: sha256 under which the record of their version is stored.
    """
    given = _read_settings("train", settings)
    with tempfile.TemporaryDirectory() as temporary:
        with user_errors("train"):
            record = fetch_file(open_store(given.store), VERSIONS_FOLDER, data_version, Path(temporary))
        inputs = {
            "data": given.inputs["data"],
            "policy": policy,
            **name_files(preferences, ("questions", "regions", "candidates", "pairs")),
            "version": str(record),
        }
        return run_stage_task(
            "train",
            given.get_section("train"),
            inputs,
            {"checkpoint": checkpoint},
            answer=given.get_section("answer"),
            documents={"launch": given.get_section("launch")},
            lap=lap,
        )


def evaluate(settings: str, policy: str, results: str) -> None:
    """Answer the benchmark with a policy. results: folder for outcomes and report."""
    with user_errors("evaluate"):
        given = read_task_settings(settings)
        config = build_evaluate_config(given.get_section("evaluate"), given.get_section("propose"))
        benchmark = given.inputs["benchmark"]
        reports = find_training_reports(given.inputs["data"], benchmark)
    inputs = {"benchmark": benchmark, "policy": policy, "train_reports": reports}
    run_stage_task("evaluate", config, inputs, name_files(results, RESULT_FILES))


def decide(settings: str, files: DecisionFiles, *, metrics: MetricsArtifact | None = None) -> str:
    """Run the promotion gate, and copy what the round made beside its decision; return the verdict."""
    given = _read_settings("decide", settings)
    inputs, outputs = files.name_inputs(given.inputs), files.name_outputs()
    verdict = decide_with_ledger(given.get_section("decide"), given.get_section("publish"), inputs, outputs)
    with user_errors("decide"):
        files.copy_round_files()
        protocol = decode_params(given.get_section("decide")).get("protocol", "strict")
        log_metrics(metrics, _list_round_figures(verdict, files, protocol))
        return verdict


def decide_with_ledger(
    config: JsonObject, publish: JsonObject, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> str:
    """Run the stage `decide` with the error budget ledger from the store; return the verdict."""
    from clincot.promotion.ledger import sync_ledger
    from clincot.records import Decision

    with user_errors("decide"), tempfile.TemporaryDirectory() as temporary:
        registry = _parse_publish(publish)
        with sync_ledger(open_store(registry.store), registry.name, Path(temporary) / "ledger") as ledger:
            run_stage_task("decide", config, {**inputs, "ledger": str(ledger)}, outputs)
        (decision,) = read_records(Path(outputs["decision"]), Decision)
        print(f"{decision.verdict}: {'; '.join(decision.reasons)}")
        return decision.verdict


def publish(settings: str, checkpoint: str, round_files: str, *, number: int) -> str:
    """Store the promoted checkpoint in the model registry; return its sha256 there.

    round_files: the folder that `decide` wrote. number: of the round.
    """
    with user_errors("publish"), tempfile.TemporaryDirectory() as temporary:
        given = read_task_settings(settings)
        config = build_publish_config(given.get_section("publish"), number)
        published = Path(temporary) / "published.json"
        evidence = name_files(round_files, ("report", "decision", "panel_report"))
        inputs = {"checkpoint": checkpoint, **evidence, "golden": given.inputs["benchmark"]}
        run_stage_task("publish", config, inputs, {"published": str(published)})
        digest: str = json.loads(published.read_text(encoding="utf-8"))["sha256"]
        return digest


def locate_round_files(folder: str) -> RoundFiles:
    """Find the files of the round in the folder that `decide` wrote."""
    return RoundFiles.locate(folder)


def record_round(publish: JsonObject, files: RoundFiles, *, number: int, checkpoint_digest: str, run_id: str) -> None:
    """Record what a round made, before anything acts on its decision.

    A run that is interrupted after the promotion needs this record to resume the round: it tells the promotion of this
    round from one that somebody else made. The task fails if another run has decided the round (`history.RoundTaken`).
    Without a store nothing is recorded.
    """
    with user_errors("record_round"):
        config = _parse_publish(publish)
        outputs = summarize_round(files, number=number, checkpoint_digest=checkpoint_digest)
        if config.store:
            print(history.record_round_outputs(open_store(config.store), config.name, outputs, run=run_id))


def end_round(publish: JsonObject, *, run_id: str, rounds: int) -> str:
    """Record that the rounds of a run have ended; return what was recorded, in words.

    run_id: the identifier with which `start_round` recorded the round of the run. rounds: how many the run consists of.
    """
    with user_errors("end_round"):
        config = _parse_publish(publish)
        if not config.store:
            return "publish.store names no store, so nothing is recorded"
        ended = history.end_round(open_store(config.store), config.name, run=run_id, rounds=rounds)
        message = _describe_status(config.name, ended, run_id)
        print(message)
        return message


def record_run_status(publish: JsonObject, *, state: str, run_id: str, error: str) -> str:
    """Record that a run failed if its round has not ended; return what was recorded, in words.

    state: what Kubeflow Pipelines reports, from which success and failure cannot be told apart (see history.py).
    run_id: the identifier with which `start_round` recorded the round of the run. Rounds of other runs stay unchanged.
    """
    with user_errors("record_run_status"):
        config = _parse_publish(publish)
        if not config.store:
            return f"{state}: publish.store names no store, so nothing is recorded"
        store = open_store(config.store)
        recorded = history.record_run_failure(store, config.name, run=run_id, reported=state, error=error)
        message = _describe_status(config.name, recorded, run_id)
        print(message)
        return message


def deploy(settings: str, *, digest: str, target: str, state: str) -> str:
    """Roll out a published checkpoint; return the outcome in words."""
    from clincot.config import DeployConfig
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.deployment.unattended import deploy_checkpoint

    with user_errors("deploy"):
        if target not in ("kserve", "local"):
            raise InvalidInput(f"the target of a rollout must be kserve or local, got {target!r}")
        given = read_task_settings(settings)
        return deploy_checkpoint(
            parse_config(DeployConfig, decode_params(given.get_section("deploy")), where="section 'deploy'"),
            _parse_publish(given.get_section("publish")),
            parse_config(ServiceSettings, decode_params(given.get_section("service")), where="section 'service'"),
            digest,
            target=target,  # type: ignore[arg-type]
            state=Path(state or "serving"),
        )


def page(settings: str, context: RoundContext, files: RoundFiles, *, page: str, results: str, questions: str) -> None:
    """Render the page, the benchmark table and all questions of a round (`round_page.write_round_page`)."""
    from clincot.pipelines.round_page import write_round_page

    with user_errors("page"):
        given = read_task_settings(settings)
        write_round_page(given, context, files, page=Path(page), results=Path(results), questions=Path(questions))


def select_champion(verdict: str, champion: str, challenger: str, output: str) -> None:
    """Copy the benchmark results (folders) of the policy that is the champion after the decision."""
    shutil.copytree(challenger if verdict == "promote" else champion, output, dirs_exist_ok=True)


def _describe_memory_limit(task: str) -> str:
    return f"out of memory; raise stages.{task}.limits.memory in cluster.yaml, or give the task less to do at once"


def _describe_status(line: str, recorded: RunEnd, run_id: str) -> str:
    which = f"round {recorded.number} of {line}" if recorded.number else f"{line}, before a round began"
    if recorded.state == "SUCCEEDED" and recorded.run != run_id:
        return f"{which}: ended by the run {recorded.run}, so nothing is recorded of this run"
    unusual = recorded.reported not in ("", recorded.state)
    reported = f" (Kubeflow Pipelines reports {recorded.reported})" if unusual else ""
    return f"{which}: {recorded.state}{reported}{': ' * bool(recorded.error)}{recorded.error}"


def _list_round_figures(verdict: str, files: DecisionFiles, protocol: AnswerProtocol) -> Metrics:
    """Figures that tell runs apart in the UI: the verdict, and the accuracy of both policies by the recipe's protocol.

    protocol: that of the gate, see evaluation/answer_protocols.py.
    """
    from clincot.evaluation.benchmark_report import list_headline_figures

    figures = {name: float(verdict == name) for name in ("promote", "keep", "blocked")}
    for side, folder in (("champion", files.champion_results), ("challenger", files.challenger_results)):
        report = read_json_model(Path(name_files(folder, RESULT_FILES)["report"]), BenchmarkReport)
        figures |= {f"{side}_{name}": value for name, value in list_headline_figures(report, protocol).items()}
    return figures


def _read_settings(task: str, settings: str) -> TaskSettings:
    with user_errors(task):
        return read_task_settings(settings)


def _parse_publish(publish: JsonObject) -> PublishConfig:
    return parse_config(PublishConfig, decode_params(publish), where="pipeline parameter 'publish'")


def _read_chain(answer: JsonObject) -> list[str]:
    return list(parse_config(AnswerConfig, decode_params(answer), where="pipeline parameter 'answer'").steps)


def _write_document(path: Path, content: Any) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_json(path, decode_params(content) if isinstance(content, Mapping) else content)


def _resolve_path(location: str) -> Path:
    return download_folder(location) if "://" in location else Path(location)


def _download_judges(config: FrozenConfig) -> FrozenConfig:
    """Replace the addresses of judges that are in a store by local copies."""
    if not isinstance(config, JudgeConfig):
        return config
    judges = tuple(
        spec.model_copy(update={"path": str(download_folder(spec.path))}) if "://" in spec.path else spec
        for spec in config.judges
    )
    return config.model_copy(update={"judges": judges})
