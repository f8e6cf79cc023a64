"""The functions that Kubeflow components call, over the paths and parameters of a task.

The body of a component (components/<task>/component.py) calls one of these functions. Parameters arrive as Kubeflow
passes them (sections as JSON objects whose integers may be floats), data sets and policies as addresses
(storage/artifacts.py), and everything between tasks as files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from clincot.config import (
    AnswerConfig,
    FrozenConfig,
    JudgeConfig,
    Params,
    PublishConfig,
    parse_config,
)
from clincot.errors import InvalidInput, UserError
from clincot.jsonl import read_records, write_json
from clincot.pipelines.params import JsonObject, decode_params, parse_stage_config
from clincot.records import hash_json
from clincot.runs import history
from clincot.stages.base import Metrics
from clincot.stages.catalog import get_stage
from clincot.stages.runner import run_stage
from clincot.storage.artifacts import download_folder, read_digest
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store

if TYPE_CHECKING:
    from clincot.pipelines.round_files import RoundContext, RoundFiles
    from clincot.runs.history import RoundStart, RunEnd

# Path of a file to which a failing task appends its error; a local run reads it to decide whether to retry.
ERRORS_ENV = "CLINCOT_TASK_ERRORS"


class MetricsArtifact(Protocol):
    """The part of kfp.dsl.Metrics that tasks use; the library does not import kfp."""

    @property
    def path(self) -> str: ...

    def log_metric(self, metric: str, value: float) -> None: ...


class InputDigests(NamedTuple):
    """sha256 of what a round works on: data set, benchmark, files of the judges."""

    data_digest: str
    benchmark_digest: str
    panel_digest: str


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
    shard: str = "",
    answer: JsonObject | None = None,
    documents: Mapping[str, Any] | None = None,
    lap: int = 0,
) -> str:
    """Run a stage and return the digest of its first output.

    inputs: paths or addresses by input name; empty ones are left out.
    shard: which share of the questions to process, such as 1/2; empty: all of them.
    answer: the section, for stages that need the questions of a chain.
    documents: inputs by content, written to JSON files.
    lap: see `params.parse_stage_config`.
    """
    with user_errors(stage), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parsed = config if isinstance(config, FrozenConfig) else parse_stage_config(stage, config, lap=lap)
        paths = {name: _resolve_path(location) for name, location in inputs.items() if location}
        if shard:
            from clincot.pipelines.sharding import write_shard

            write_shard(paths["questions"], shard, folder / "questions.jsonl")
            paths["questions"] = folder / "questions.jsonl"
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
    sections: Mapping[str, JsonObject],
    service: JsonObject,
    launch: JsonObject,
    outputs: Mapping[str, str],
    *,
    data: str,
    benchmark: str,
    metrics: MetricsArtifact | None = None,
) -> InputDigests:
    """Check everything that the round needs, without changing anything; return the digests of its inputs.

    sections: preflight, and those that it checks (INHERITED_BY_PREFLIGHT).
    """
    with user_errors("preflight"):
        parsed = parse_config(
            Params, {name: decode_params(section) for name, section in sections.items()}, where="pipeline parameters"
        )
        judge = _download_judges(parsed.judge)
        assert isinstance(judge, JudgeConfig)
        config = parsed.model_copy(update={"judge": judge}).get_stage_config("preflight")
        digests = InputDigests(
            data_digest=read_digest(data),
            benchmark_digest=read_digest(benchmark),
            panel_digest=hash_json([[path.name, hash_path(path)] for path in judge.files if path.exists()]),
        )
        try:
            documents = {"service": decode_params(service), "launch": decode_params(launch)}
            run_stage_task("preflight", config, {}, outputs, metrics=metrics, documents=documents)
        finally:
            table = Path(outputs["table"])
            print(table.read_text(encoding="utf-8") if table.is_file() else "")
        return digests


def start_round(publish: JsonObject, champion: str, *, number: int, run_id: str) -> RoundOrigin:
    """Start a round in the store, or resume it from the policy from which it first started.

    champion: path of the policy that preflight found. number: of the round; 0: the next one of the model.
    run_id: identifier of the pipeline run. Without a store nothing is recorded.
    """
    from clincot.records import StartingPolicy

    with user_errors("start_round"):
        config = _parse_publish(publish)
        (start,) = read_records(Path(champion), StartingPolicy)
        if config.store:
            store = open_store(config.store)
            interrupted = history.find_open_round(store, start.line, number)
            started = history.begin_round(store, start, number, run=run_id)
            if interrupted is not None:
                print(_describe_resumption(interrupted, started))
            start, number = started.start, started.number
        return RoundOrigin(start.uri, start.sha256, start.round, number or start.round + 1)


def find_training_reports(data: str, benchmark: str) -> str:
    """Return the path of the data set's reports if the benchmark asks for reports, else ""."""
    from clincot.datasets.folder import load_questions
    from clincot.datasets.reports import REPORTS_FILE

    if not any(question.kind == "report" for question in load_questions(download_folder(benchmark))):
        return ""
    path = download_folder(data) / REPORTS_FILE
    return str(path) if path.is_file() else ""


def merge(
    judge: JsonObject,
    questions: str,
    parts: Mapping[str, Sequence[str]],
    outputs: Mapping[str, str],
    *,
    metrics: MetricsArtifact | None = None,
) -> str:
    """Merge the files of the shards (`sharding.merge_shards`); return the digest of the candidates."""
    from clincot.pipelines.sharding import merge_shards

    with user_errors("merge"):
        config = parse_config(JudgeConfig, decode_params(judge), where="pipeline parameter 'judge'")
        merged = {name: Path(path) for name, path in outputs.items()}
        files = {}
        for name, paths in parts.items():
            files[name] = [Path(path) for path in paths]
        log_metrics(metrics, merge_shards(config, Path(questions), files, merged))
        return hash_path(merged["candidates"])


def decide(
    config: JsonObject,
    publish: JsonObject,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    *,
    metrics: MetricsArtifact | None = None,
) -> str:
    """Run the promotion gate with the error budget ledger from the store; return the verdict."""
    from clincot.promotion.ledger import sync_ledger
    from clincot.records import Decision

    with user_errors("decide"), tempfile.TemporaryDirectory() as temporary:
        registry = _parse_publish(publish)
        if registry.store:
            with sync_ledger(open_store(registry.store), registry.name, Path(temporary) / "ledger") as ledger:
                run_stage_task("decide", config, {**inputs, "ledger": str(ledger)}, outputs, metrics=metrics)
        else:
            run_stage_task("decide", config, inputs, outputs, metrics=metrics)
        (decision,) = read_records(Path(outputs["decision"]), Decision)
        print(f"{decision.verdict}: {'; '.join(decision.reasons)}")
        return decision.verdict


def record_round(publish: JsonObject, files: RoundFiles, *, number: int, checkpoint_digest: str) -> None:
    """Record what a round made, before anything acts on its decision.

    A run that is interrupted after the promotion needs this record to resume the round: it tells the promotion of this
    round from one that somebody else made. Without a store nothing is recorded.
    """
    from clincot.pipelines.round_files import summarize_round

    with user_errors("record_round"):
        config = _parse_publish(publish)
        outputs = summarize_round(files, number=number, checkpoint_digest=checkpoint_digest)
        if config.store:
            history.record_round_outputs(open_store(config.store), config.name, outputs)


def end_round(publish: JsonObject, *, run_id: str, rounds: int) -> str:
    """Record that the rounds of a run have ended; return what was recorded, in words.

    run_id: the identifier with which `start_round` recorded the round of the run. rounds: how many the run consists of.
    """
    with user_errors("end_round"):
        config = _parse_publish(publish)
        if not config.store:
            return "publish.store names no store, so nothing is recorded"
        ended = history.end_round(open_store(config.store), config.name, run=run_id, rounds=rounds)
        message = f"round {ended.number} of {config.name}: {ended.state}"
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


def deploy(
    config: JsonObject, publish: JsonObject, service: JsonObject, *, digest: str, target: str, state: str
) -> str:
    """Roll out a published checkpoint; return the outcome in words."""
    from clincot.config import DeployConfig
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.deployment.unattended import deploy_checkpoint

    with user_errors("deploy"):
        if target not in ("kserve", "local"):
            raise InvalidInput(f"the target of a rollout must be kserve or local, got {target!r}")
        return deploy_checkpoint(
            parse_config(DeployConfig, decode_params(config), where="pipeline parameter 'deploy'"),
            _parse_publish(publish),
            parse_config(ServiceSettings, decode_params(service), where="pipeline parameter 'service'"),
            digest,
            target=target,  # type: ignore[arg-type]
            state=Path(state or "serving"),
        )


def page(
    sections: Mapping[str, JsonObject], context: RoundContext, files: RoundFiles, *, page: str, results: str
) -> None:
    """Render the page and the benchmark table of a round (`round_page.write_round_page`)."""
    from clincot.pipelines.round_page import write_round_page

    with user_errors("page"):
        write_round_page(sections, context, files, page=Path(page), results=Path(results))


def select_champion(
    verdict: str, champion: Mapping[str, str], challenger: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    """Copy the files of the policy that is the champion after the decision."""
    for name, path in (challenger if verdict == "promote" else champion).items():
        shutil.copyfile(path, outputs[name])


def _describe_memory_limit(task: str) -> str:
    return f"out of memory; raise stages.{task}.limits.memory in cluster.yaml, or give the task less to do at once"


def _describe_resumption(interrupted: RoundStart, started: RoundStart) -> str:
    begun = f"round {started.number} of {started.start.line} began in an earlier run and has not ended"
    if started.start == interrupted.start:
        return f"{begun}: this run resumes it from {started.start.uri}"
    return f"{begun}: the champion has changed since, so this run begins it again from {started.start.uri}"


def _describe_status(line: str, recorded: RunEnd, run_id: str) -> str:
    which = f"round {recorded.number} of {line}" if recorded.number else f"{line}, before a round began"
    if recorded.state == "SUCCEEDED" and recorded.run != run_id:
        return f"{which}: ended by the run {recorded.run}, so nothing is recorded of this run"
    unusual = recorded.reported not in ("", recorded.state)
    reported = f" (Kubeflow Pipelines reports {recorded.reported})" if unusual else ""
    return f"{which}: {recorded.state}{reported}{': ' * bool(recorded.error)}{recorded.error}"


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
