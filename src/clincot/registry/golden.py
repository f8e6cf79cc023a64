"""A round's files into a publication: report, decision, panel and golden questions, all of this very policy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from clincot.config import PublishConfig
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.errors import InvalidInput
from clincot.geometry import Box
from clincot.jsonl import read_json_model, read_records
from clincot.judging.combination import PanelReport
from clincot.records import BenchmarkReport, Decision, Question, Study
from clincot.registry import champion
from clincot.registry.manifest import GoldenQuestion, JudgeSummary, Manifest
from clincot.registry.publication import PublicationEvidence, copy_golden_image, register_checkpoint
from clincot.storage.artifacts import download_folder
from clincot.storage.open import open_store
from clincot.storage.store import Store

# A question about an image: answer, region (None: others are as likely), and how far both are from being another.
AnswerFn = Callable[[Study, Path, str], tuple[str, Box | None, float]]
LoadAnswerFn = Callable[[Path], AnswerFn]  # a checkpoint's folder -> how it answers
CANDIDATES_PER_GOLDEN = (
    4  # golden questions are the clearest of so many times their number: a near tie may fall either way elsewhere
)


def publish_checkpoint(config: PublishConfig, inputs: Mapping[str, Path], *, load_look: LoadAnswerFn) -> Manifest:
    """Publish `checkpoint` with what else is given: report, decision, panel_report, golden (a data-set folder).

    load_look: loads the checkpoint that answers the golden questions; called only if there are any.
    """
    store = open_store(config.store)
    judges, agreement = _read_panel(inputs.get("panel_report"))
    with tempfile.TemporaryDirectory() as made:
        golden: list[GoldenQuestion] = []
        if "golden" in inputs and config.golden:
            golden = select_golden_questions(
                load_look(inputs["checkpoint"]), inputs["golden"], Path(made), config.golden
            )
        evidence = PublicationEvidence(
            report=_read_report(inputs.get("report")),
            decision=_read_decision(inputs.get("decision")),
            judges=judges,
            agreement=agreement,
            golden=golden,
            images=Path(made),
        )
        return register_checkpoint(store, inputs["checkpoint"], config, evidence)


def start_model_line(
    config: PublishConfig, store: Store, base: str, *, golden: str, by: str, load_look: LoadAnswerFn
) -> str:
    """Publish `base` and make it the round-0 champion, where the line has none; says what was done.

    base, golden: folders, or addresses in a store. Nothing is fetched where there is a champion already.
    """
    try:
        found = champion.read_champion(store, config.name)
    except champion.NoChampion:
        pass
    else:
        return f"{config.name}: champion {found.now.sha256[:12]} (round {found.now.round}), there already"
    inputs = {"checkpoint": download_folder(base)}
    if golden:
        inputs["golden"] = download_folder(golden)
    manifest = publish_checkpoint(config, inputs, load_look=load_look)
    champion.create_champion_pointer(store, manifest, by=by)
    return f"{config.name}: champion {manifest.sha256[:12]}, published from {base}"


def select_golden_questions(look: AnswerFn, data: Path, out: Path, count: int) -> list[GoldenQuestion]:
    """The clearest of the first questions, one an image, with the policy's own answers; their images copied to `out`.

    The answer key is not read: a golden answer is what this checkpoint says, right or wrong.
    """
    studies = StudyIndex(data)
    first: dict[str, Question] = {}
    for question in islice(load_questions(data), 4 * CANDIDATES_PER_GOLDEN * count):
        first.setdefault(question.study, question)
    asked = list(first.values())[: CANDIDATES_PER_GOLDEN * count]
    found = []
    for position, question in enumerate(asked):
        study = studies[question.study]
        answer, box, lead = look(study, data, question.text)
        found.append((-lead, position, question.text, study, answer, box))
    if not found:
        raise InvalidInput(f"{data}: has no question to keep as golden")
    golden = []
    for _, _, text, study, answer, box in sorted(found, key=lambda one: one[:2])[:count]:
        image, digest = copy_golden_image(data / study.image, out)
        golden.append(GoldenQuestion(question=text, image=image, sha256=digest, answer=answer, box=box))
    return golden


def _read_report(path: Path | None) -> BenchmarkReport | None:
    return None if path is None else read_json_model(path, BenchmarkReport)


def _read_decision(path: Path | None) -> Decision | None:
    if path is None:
        return None
    (decision,) = read_records(path, Decision)
    return decision


def _read_panel(path: Path | None) -> tuple[tuple[JudgeSummary, ...], float | None]:
    if path is None:
        return (), None
    report = read_json_model(path, PanelReport)
    judges = tuple(JudgeSummary(name=one.name, digest=one.digest, scored=one.scored) for one in report.judges)
    return judges, report.alpha_calibrated.value
