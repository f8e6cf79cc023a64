"""Checks of the data sets of a round: what would otherwise show only after a policy was trained.

The data set has to have questions and images for every subset. The benchmark has to have its answer key, enough
patients for the next decision, and nothing in common with the data set or with the judges' calibration data. They are
opened here as the round opens them, from the cache that its tasks share.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from pathlib import Path

from clincot.config import DecideConfig, PreflightConfig
from clincot.datasets.folder import StudyIndex, load_questions, split_rounds
from clincot.errors import UserError
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.preflight.plan_check import check_plan
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe
from clincot.promotion.cluster_tests import MIN_CLUSTERS
from clincot.promotion.error_budget import next_level
from clincot.promotion.evidence import count_applicable_questions
from clincot.promotion.gate import select_questions
from clincot.promotion.leakage import find_calibration_leakage, find_leakage
from clincot.promotion.ledger import Ledger, read_ledger, sync_ledger
from clincot.promotion.power import count_floor_questions
from clincot.records import GateFinding, Question
from clincot.storage.artifacts import download_folder, get_cache_folder
from clincot.storage.open import open_store
from clincot.text import format_count

MAX_HASHED_IMAGES = 2000  # near-duplicates are searched among so many images; a thousand films take about 10 s
_NEW_PAIR = ("", "")  # a champion and a challenger that no decision has compared yet


def build_data_set_probes(config: PreflightConfig) -> list[Probe]:
    """Build the probes of the cache and of the data sets."""
    cache = get_cache_folder()
    remedy = (
        f"give the user {os.getuid()} the right to write there: on a cluster, a volume of the group of that user "
        "(chown by an init container, fsGroup, or a storage class that gives new volumes to everyone)"
    )
    description = f"{cache}: write and delete a file as user {os.getuid()}"
    return [
        Probe("cache", description, remedy, config.timeout_s, lambda: check_cache(cache, description)),
        Probe(
            "data sets",
            "the data set and the benchmark of the round",
            "check the addresses of the data set and of the benchmark (`data`, `benchmark`)",
            config.verify_s,
            lambda: check_data_sets(config),
        ),
    ]


def check_cache(cache: Path, description: str) -> Iterator[PreflightCheck]:
    """Check that downloads can be kept; raises OSError, which names the folder, if not."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=cache) as folder:
        (Path(folder) / "probe").write_bytes(b"probe\n")
    yield pass_check("cache", description)


def check_data_sets(config: PreflightConfig) -> Iterator[PreflightCheck]:
    """Check the data sets that are named, one after the other, so that none is downloaded twice at once."""
    if not config.data and not config.benchmark:
        reason = "neither preflight.data nor preflight.benchmark names one"
        yield skip_check("data sets", "the data set and the benchmark of the round", reason)
        return
    data = yield from _open_folder("data set", config.data)
    if data is not None:
        yield from check_training_data(config, data)
    folder = yield from _open_folder("benchmark", config.benchmark)
    benchmark = None if folder is None else (yield from _read_key(config, folder))
    if benchmark is None or folder is None:
        return
    yield from check_benchmark_size(config, benchmark)
    if data is not None:
        hashed = (
            len(StudyIndex(data)) + len({question.study for question in benchmark.questions.values()})
            <= MAX_HASHED_IMAGES
        )
        findings = find_leakage(benchmark, folder, data, config.decide, near_duplicates=hashed)
        yield from _check_findings(findings, "the benchmark against the data set")
        if not hashed:
            reason = f"more than {MAX_HASHED_IMAGES} images; `decide` compares them"
            yield skip_check("leak: near-duplicates in training", "perceptual hashes of all images", reason)
        yield check_plan(config, data, folder)
    calibration = yield from _open_folder("calibration data", config.calibration)
    if calibration is not None:
        finding = find_calibration_leakage(benchmark, folder, calibration)
        yield from _check_findings([finding], "the benchmark against the judges' calibration data")


def check_training_data(config: PreflightConfig, folder: Path) -> Iterator[PreflightCheck]:
    """Check that every subset of the data set has questions, and that every image is there."""
    name, rounds = "data set", config.prepare.rounds
    probe = f"{config.data}: questions of every round, and their images"
    questions = list(load_questions(folder))
    counts = Counter(number for number, _ in split_rounds(questions, rounds=rounds, seed=config.prepare.seed))
    empty = [str(number) for number in range(rounds) if not counts[number]]
    images, missing = _check_images(folder, questions)
    if empty:
        result = f"{format_count(len(questions), 'question')}, and none in subset {', '.join(empty)} of {rounds}"
        yield fail_check(name, probe, result, "choose fewer subsets (prepare.rounds), or add images to the data set")
    elif missing:
        result = f"{len(missing)} of {images} images are missing, first {missing[0]}"
        yield fail_check(name, probe, result, "ingest the data set again, and upload it whole (`clincot pipeline put`)")
    else:
        sizes = f"subsets of {min(counts.values())} to {max(counts.values())}" if rounds > 1 else "one subset"
        yield pass_check(name, probe, f"{len(questions)} questions about {images} images; {sizes}")


def check_benchmark_size(config: PreflightConfig, benchmark: Benchmark) -> Iterator[PreflightCheck]:
    """Check that the next decision can promote at all: by its questions, and by the number of their patients.

    The sign-flip test over C patients gives at least p = 2^-C, even if every one of them favours the challenger. So at
    the level of the decision -log2(level) patients are the least. How many a gain of a given size needs depends on how
    much the answers vary, which a first decision shows: `clincot power`.
    """
    name, decide = "benchmark: size", config.decide
    probe = "questions and patients of the next decision, against the error budget"
    ledger = _read_stored_ledger(config)
    questions, reuse, problems = select_questions(_NEW_PAIR, ledger, benchmark, decide)
    if problems:
        remedy = "use a benchmark with new questions, or another setting of decide as named here"
        yield fail_check(name, probe, " ".join(problems), remedy)
        return
    level = next_level(ledger.spent, _NEW_PAIR, lifetime=decide.lifetime_error).level
    patients, needed = len({benchmark.clusters[question] for question in questions}), count_needed_patients(level)
    where = f" of slice {reuse.slice} of {reuse.slices}" if reuse.slices > 1 else ""
    have = f"{format_count(len(questions), 'question')} about {format_count(patients, 'patient')}{where}"
    if patients < needed:
        result = f"{have}; at level {level:.5f} even a unanimous result needs {needed} patients"
        remedy = (
            "use a benchmark of more patients (`clincot power DECISION` says how many questions a gain needs), fewer "
            "decide.slices, or a larger decide.lifetime_error"
        )
        yield fail_check(name, probe, result, remedy)
    else:
        yield pass_check(name, probe, f"{have}; level {level:.5f} needs at least {needed}")
        yield _check_floors(decide, benchmark, questions, level)


def _check_floors(
    decide: DecideConfig, benchmark: Benchmark, questions: Collection[str], level: float
) -> PreflightCheck:
    """Say which guarded metrics have too few questions to show their floor, even if no answer changes.

    It does not fail: a challenger that improves such a metric may still be promoted. Answer lengths are no shares, so
    nothing is known of them before a decision.
    """
    name, probe = "benchmark: floors", f"questions of each guarded metric at level {level:.5f}"
    short = []
    for metric, floor in decide.floors.enabled.items():
        count = count_applicable_questions(metric, benchmark, questions, decide.protocol)
        needed = count_floor_questions(floor, level) if metric != "answer_length" else 0
        if 0 < count < needed:
            short.append(f"{metric} ({count} of {needed} questions for a floor of {floor:g})")
    if short:
        result = (
            f"too few to show that an unchanged {', '.join(short)} keeps its floor; unless the challenger improves it, "
            "the champion stays. Use a larger benchmark, or a wider floor (decide.floors)"
        )
        return pass_check(name, probe, result)
    return pass_check(name, probe, "enough to show every floor if no answer changes")


def count_needed_patients(level: float) -> int:
    """Return the smallest C with 2^-C <= level, at least MIN_CLUSTERS."""
    return max(MIN_CLUSTERS, math.ceil(-math.log2(level)))


def _open_folder(name: str, address: str) -> Generator[PreflightCheck, None, Path | None]:
    """Yield a failed check if the data set at the address cannot be opened; return its folder, or None."""
    if not address:
        return None
    try:
        return download_folder(address)
    except (UserError, OSError) as error:
        remedy = f"correct the address of the {name}: a folder, or what `clincot pipeline put` printed"
        yield fail_check(name, f"open {address}", str(error), remedy)
        return None


def _read_key(config: PreflightConfig, folder: Path) -> Generator[PreflightCheck, None, Benchmark | None]:
    """Yield the check of the answer key; return the benchmark, or None if it cannot be used."""
    name, probe = "benchmark: answer key", f"{config.benchmark}: every question with its reference"
    try:
        benchmark = read_benchmark(folder, limit=config.evaluate.limit)
        images, missing = _check_images(folder, benchmark.questions.values())
    except (UserError, OSError) as error:
        remedy = "name a held-out data set with its answer key (references.jsonl); `clincot ingest` writes one"
        yield fail_check(name, probe, str(error), remedy)
        return None
    if missing or not benchmark.questions:
        result = f"{len(missing)} images are missing, first {missing[0]}" if missing else "it has no question"
        yield fail_check(name, probe, result, "ingest the benchmark again, and upload it whole")
        return None
    yield pass_check(name, probe, f"{len(benchmark.questions)} questions about {images} images")
    return benchmark


def _check_images(folder: Path, questions: Iterable[Question]) -> tuple[int, list[str]]:
    """Return how many images the questions are about, and those of them that do not exist."""
    index, studies = StudyIndex(folder), sorted({question.study for question in questions})
    missing = [index[study].image for study in studies if not index.resolve_image_path(study).is_file()]
    return len(studies), missing


def _read_stored_ledger(config: PreflightConfig) -> Ledger:
    """Read the ledger of the line; an empty one without a store. Raises StoreFailed, InvalidRecord."""
    if not config.publish.store:
        return Ledger()
    store, line = open_store(config.publish.store), config.publish.name
    with tempfile.TemporaryDirectory() as scratch, sync_ledger(store, line, Path(scratch) / "ledger") as folder:
        return read_ledger(folder)


def _check_findings(findings: Sequence[GateFinding], probe: str) -> Iterator[PreflightCheck]:
    """What the gate would find, as checks: what blocks there fails here."""
    for finding in findings:
        name = f"leak: {finding.name}"
        if finding.severity == "block":
            remedy = "take these out of the data set or out of the benchmark; the decision would be blocked"
            yield fail_check(name, probe, finding.reason, remedy)
        else:
            yield pass_check(name, probe, finding.reason)
