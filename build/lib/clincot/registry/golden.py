"""Publication of a round's checkpoint with its evidence.

The evidence consists of report, decision, judges and golden questions.
"""

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

# (study, image folder, question) -> answer, region (None if several regions are equally likely), and the margin by
# which both lead the next best alternative
AnswerFn = Callable[[Study, Path, str], tuple[str, Box | None, float]]
LoadAnswerFn = Callable[[Path], AnswerFn]  # a checkpoint's folder -> how it answers
# Golden questions are the clearest of this many candidates each. A near tie could be decided differently on another
# machine, and the smoke test would then reject a correct server.
CANDIDATES_PER_GOLDEN = 4


def publish_checkpoint(config: PublishConfig, inputs: Mapping[str, Path], *, load_look: LoadAnswerFn) -> Manifest:
    """Publish a checkpoint with its evidence, and return the manifest.

    inputs: `checkpoint`, and optionally `report`, `decision`, `panel_report` and `golden` (a data-set folder).
    load_look: loads the checkpoint that answers the golden questions; it is called only if there are any.
    Raises what register_checkpoint and select_golden_questions raise.
    """
    store = open_store(config.store)
    judges, agreement = _read_panel(inputs.get("panel_report"))
    with tempfile.TemporaryDirectory() as images:
        golden: list[GoldenQuestion] = []
        if "golden" in inputs and config.golden:
            golden = select_golden_questions(
                load_look(inputs["checkpoint"]), inputs["golden"], Path(images), config.golden
            )
        evidence = PublicationEvidence(
            report=_read_report(inputs.get("report")),
            decision=_read_decision(inputs.get("decision")),
            judges=judges,
            agreement=agreement,
            golden=golden,
            images=Path(images),
        )
        return register_checkpoint(store, inputs["checkpoint"], config, evidence)


def start_model_line(
    config: PublishConfig, store: Store, base: str, *, golden: str, by: str, load_look: LoadAnswerFn
) -> str:
    """Publish `base` and make it the round-0 champion, unless the line has one.

    Returns a description of the result. Nothing is downloaded if the line already has a champion.
    base, golden: folders, or addresses in a store.
    """
    try:
        existing = champion.read_champion(store, config.name)
    except champion.NoChampion:
        pass
    else:
        now = existing.now
        return f"{config.name}: already has the champion {now.sha256[:12]} (round {now.round})"
    inputs = {"checkpoint": download_folder(base)}
    if golden:
        inputs["golden"] = download_folder(golden)
    manifest = publish_checkpoint(config, inputs, load_look=load_look)
    champion.create_champion_pointer(store, manifest, by=by)
    return f"{config.name}: champion {manifest.sha256[:12]}, published from {base}"


def select_golden_questions(answer_fn: AnswerFn, data: Path, out: Path, count: int) -> list[GoldenQuestion]:
    """Select the questions that the policy answers most clearly, one per image.

    The candidates are the first questions of the data set. The images are copied to the folder `out`. The answer key is
    not read: a golden answer is what this checkpoint answers, right or wrong. Raises InvalidInput if `data` has no
    question.
    """
    studies = StudyIndex(data)
    first: dict[str, Question] = {}
    for question in islice(load_questions(data), 4 * CANDIDATES_PER_GOLDEN * count):
        first.setdefault(question.study, question)
    candidates = list(first.values())[: CANDIDATES_PER_GOLDEN * count]
    answered = []
    for position, question in enumerate(candidates):
        study = studies[question.study]
        answer, box, lead = answer_fn(study, data, question.text)
        answered.append((-lead, position, question.text, study, answer, box))
    if not answered:
        raise InvalidInput(f"{data}: contains no question; golden questions need at least one")
    golden = []
    for _, _, text, study, answer, box in sorted(answered, key=lambda entry: entry[:2])[:count]:
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
    judges = tuple(JudgeSummary(name=judge.name, digest=judge.digest, scored=judge.scored) for judge in report.judges)
    return judges, report.alpha_calibrated.value
