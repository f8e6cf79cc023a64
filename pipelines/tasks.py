"""What the Kubeflow components call: a stage, or what surrounds the stages, over the paths and parameters of a task.

A component's body is a call of these functions and nothing else (components/<task>/component.py). Parameters come as
Kubeflow gives them (sections as dicts whose whole numbers may be floats), data sets and policies as addresses
(located.py), everything between tasks as files.
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
from typing import Any, Protocol

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
from clincot.storage.artifacts import download_folder, find_stale_downloads, read_digest
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store

ERRORS_ENV = (
    "CLINCOT_TASK_ERRORS"  # file to which a failing task appends its error, for whoever runs tasks on a machine
)


class MetricsArtifact(Protocol):
    """kfp.dsl.Metrics, without kfp."""

    @property
    def path(self) -> str: ...

    def log_metric(self, metric: str, value: float) -> None: ...


@contextmanager
def user_errors(task: str) -> Iterator[None]:
    """Errors for the user end the task with their message alone; faults of the program keep their traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        message = f"clincot {task}: {error}"
        if os.environ.get(ERRORS_ENV):
            with Path(os.environ[ERRORS_ENV]).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"error": type(error).__name__, "message": message}) + "\n")
        sys.exit(message)


def run_stage_task(
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
    """Run a stage; returns the digest of its first output.

    inputs: paths, or addresses; those that are empty are left out. shard: of the questions, all that the stage is
    given. answer: its section, for the stages that need the questions of a chain. documents: inputs by their content,
    written as JSON. lap: see section_of.
    """
    with user_errors(stage), tempfile.TemporaryDirectory() as made:
        parsed = config if isinstance(config, FrozenConfig) else parse_stage_config(stage, config, lap=lap)
        at = {name: _resolve_path(place) for name, place in inputs.items() if place}
        if shard:
            from clincot.pipelines.sharding import write_shard

            write_shard(at["questions"], shard, Path(made) / "questions.jsonl")
            at["questions"] = Path(made) / "questions.jsonl"
        given = dict(documents or {})
        if (
            answer is not None
            and len(steps := parse_config(AnswerConfig, decode_params(answer), where="answer").steps) > 1
        ):
            given["steps"] = list(steps)
        for name, content in given.items():
            at[name] = Path(made) / f"{name}.json"
            if isinstance(content, str):
                at[name].write_text(content, encoding="utf-8")
            else:
                write_json(at[name], decode_params(content) if isinstance(content, Mapping) else content)
        places = {name: Path(path) for name, path in outputs.items()}
        log_metrics(metrics, run_stage(stage, _download_judges(parsed), at, places))
        return hash_path(places[get_stage(stage).outputs[0]])


def log_metrics(metrics: MetricsArtifact | None, values: Metrics) -> None:
    """The values for the Kubeflow UI, and as a file: kfp.local takes an artifact without one for lost, and its task for
    not done."""
    if metrics is not None:
        write_json(Path(metrics.path), dict(values))
    for name, value in values.items():
        print(f"{name} {value:g}")
        if metrics is not None:
            metrics.log_metric(name, value)


def preflight(
    params: Mapping[str, JsonObject],
    service: JsonObject,
    launch: JsonObject,
    outputs: Mapping[str, str],
    *,
    data: str,
    benchmark: str,
    number: int,
    run_id: str,
    metrics: MetricsArtifact | None = None,
) -> tuple[str, str, int, int, str, str, str]:
    """Look at everything, and resolve what the round starts from and works on. run_id: of the pipeline's run.

    params: sections preflight, judge, publish and version. Returns policy address, digest and round; the number of this
    round; the digests of data, benchmark and of the judges' files.
    """
    from clincot.records import StartingPolicy

    with user_errors("preflight"):
        parsed = parse_config(
            Params, {name: decode_params(one) for name, one in params.items()}, where="pipeline parameters"
        )
        judge = _download_judges(parsed.judge)
        assert isinstance(judge, JudgeConfig)
        config = parsed.model_copy(update={"judge": judge}).get_stage_config("preflight")
        digests = [read_digest(address) for address in (data, benchmark)]
        panel = hash_json([[path.name, hash_path(path)] for path in judge.files if path.exists()])
        try:
            documents = {"service": decode_params(service), "launch": decode_params(launch)}
            run_stage_task("preflight", config, {}, outputs, metrics=metrics, documents=documents)
        finally:
            table = Path(outputs["table"])
            print(table.read_text(encoding="utf-8") if table.is_file() else "")
        (start,) = read_records(Path(outputs["champion"]), StartingPolicy)
        if parsed.publish.store:
            store = open_store(parsed.publish.store)
            begun = history.begin_round(store, start, number, run=run_id)
            start, number = begun.start, begun.number
        return start.uri, start.sha256, start.round, number or start.round + 1, *digests, panel  # type: ignore[return-value]


def find_training_reports(data: str, benchmark: str) -> str:
    """The data set's reports where the benchmark asks for reports, else ""."""
    from clincot.datasets.folder import load_questions
    from clincot.datasets.reports import REPORTS_FILE

    asked = any(question.kind == "report" for question in load_questions(download_folder(benchmark)))
    place = download_folder(data) / REPORTS_FILE if asked else None
    return str(place) if place is not None and place.is_file() else ""


def merge(
    judge: JsonObject,
    questions: str,
    parts: Mapping[str, Sequence[str]],
    outputs: Mapping[str, str],
    *,
    metrics: MetricsArtifact | None = None,
) -> str:
    """Put the shards together (shards.merge_shards); returns the digest of the candidates."""
    from clincot.pipelines.sharding import merge_shards

    with user_errors("merge"):
        config = parse_config(JudgeConfig, decode_params(judge), where="pipeline parameter 'judge'")
        places = {name: Path(path) for name, path in outputs.items()}
        files = {name: [Path(path) for path in paths] for name, paths in parts.items()}
        log_metrics(metrics, merge_shards(config, Path(questions), files, places))
        return hash_path(places["candidates"])


def decide(
    config: JsonObject,
    publish: JsonObject,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    *,
    metrics: MetricsArtifact | None = None,
) -> str:
    """The gate, with the line's ledger from the store; returns the verdict."""
    from clincot.promotion.ledger import sync_ledger
    from clincot.records import Decision

    with user_errors("decide"), tempfile.TemporaryDirectory() as made:
        where = parse_config(PublishConfig, decode_params(publish), where="pipeline parameter 'publish'")
        if where.store:
            with sync_ledger(open_store(where.store), where.name, Path(made) / "ledger") as ledger:
                run_stage_task("decide", config, {**inputs, "ledger": str(ledger)}, outputs, metrics=metrics)
        else:
            run_stage_task("decide", config, inputs, outputs, metrics=metrics)
        (decision,) = read_records(Path(outputs["decision"]), Decision)
        print(f"{decision.verdict}: {'; '.join(decision.reasons)}")
        return decision.verdict


def record_run_status(publish: JsonObject, *, state: str, run_id: str, error: str) -> str:
    """Record how a run ended, and take away what fetches left behind; returns what was recorded, in words.

    run_id: as preflight was given it, which says the round; another run's is left alone.
    """
    with user_errors("record_run_status"):
        where = parse_config(PublishConfig, decode_params(publish), where="pipeline parameter 'publish'")
        for folder in find_stale_downloads():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"removed {folder}")
        if not where.store:
            return f"{state}: no store is named (publish.store), so nothing is recorded"
        ended = history.end_round(open_store(where.store), where.name, run=run_id, state=state, error=error)
        which = f"round {ended.number} of {where.name}" if ended.number else f"{where.name}, before a round began"
        return f"{which}: {state}{': ' * bool(error)}{error}"


def _resolve_path(place: str) -> Path:
    return download_folder(place) if "://" in place else Path(place)


def _download_judges(config: FrozenConfig) -> FrozenConfig:
    """Judges whose checkpoints lie in a store, fetched."""
    if not isinstance(config, JudgeConfig):
        return config
    specs = tuple(
        spec.model_copy(update={"path": str(download_folder(spec.path))}) if "://" in spec.path else spec
        for spec in config.judges
    )
    return config.model_copy(update={"judges": specs})


def deploy(
    config: JsonObject, publish: JsonObject, service: JsonObject, *, digest: str, target: str, state: str
) -> str:
    """Roll a published checkpoint out; returns how it ended."""
    from clincot.config import DeployConfig
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.deployment.unattended import deploy_checkpoint

    with user_errors("deploy"):
        if target not in ("kserve", "local"):
            raise InvalidInput(f"a rollout's target is kserve or local, got {target!r}")
        return deploy_checkpoint(
            parse_config(DeployConfig, decode_params(config), where="pipeline parameter 'deploy'"),
            parse_config(PublishConfig, decode_params(publish), where="pipeline parameter 'publish'"),
            parse_config(ServiceSettings, decode_params(service), where="pipeline parameter 'service'"),
            digest,
            target=target,  # type: ignore[arg-type]
            state=Path(state or "serving"),
        )


def page(
    sections: Mapping[str, JsonObject],
    *,
    number: int,
    data: str,
    benchmark: str,
    blind_from: str,
    policy: str,
    made: Mapping[str, str],
    champion: Mapping[str, str],
    page: str,
    results: str,
) -> None:
    """The round's page and benchmark table (round_page.show_round)."""
    from clincot.pipelines.round_page import write_round_page

    with user_errors("page"):
        write_round_page(
            sections,
            number=int(number),
            data=data,
            benchmark=benchmark,
            blind_from=blind_from,
            policy=policy,
            made=made,
            champion=champion,
            page=Path(page),
            results=Path(results),
        )


def select_champion(
    verdict: str, champion: Mapping[str, str], challenger: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    """The files of whoever is champion after a decision."""
    for name, path in (challenger if verdict == "promote" else champion).items():
        shutil.copyfile(path, outputs[name])
