"""Publication of a round's checkpoint with its evidence.

The evidence consists of report, decision, judges and golden questions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from clincot.config import PublishConfig, ServeConfig
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.errors import InvalidInput
from clincot.evaluation.served_sample import CLEAR_LEAD, spread_evenly
from clincot.geometry import Box
from clincot.images import open_image
from clincot.jsonl import read_json_model, read_records
from clincot.judging.combination import PanelReport
from clincot.records import BenchmarkReport, Decision, Question, ServedSample, Study
from clincot.registry import champion
from clincot.registry.manifest import GoldenQuestion, JudgeSummary, Manifest
from clincot.registry.publication import PublicationEvidence, copy_golden_image, register_checkpoint
from clincot.storage.artifacts import download_folder
from clincot.storage.open import open_store
from clincot.storage.store import Store
from clincot.text import normalize_text

# (study, image folder, question) -> answer, region (None if no region leads clearly), and the margin by which the
# answer leads the next best one
AnswerFn = Callable[[Study, Path, str], tuple[str, Box | None, float]]
LoadAnswerFn = Callable[[Path, ServeConfig], AnswerFn]  # a checkpoint's folder, its settings -> how it answers
CANDIDATES_PER_GOLDEN = 4  # answered for each golden question, of which the clearest are kept
# Gray levels (of 255) by which an image is changed to see whether the answer stays. The change in the model's numbers
# is larger than any rounding between machines.
_TEST_CHANGE = 1


def publish_checkpoint(config: PublishConfig, inputs: Mapping[str, Path], *, load_look: LoadAnswerFn) -> Manifest:
    """Publish a checkpoint with its evidence, and return the manifest.

    inputs: `checkpoint`, and optionally `report`, `decision`, `panel_report` and `golden` (a data-set folder).
    load_look: loads the checkpoint that answers the golden questions; it is called only if there are any.
    Raises what register_checkpoint, select_golden_questions and select_served_questions raise, and InvalidInput if the
    decision rests on answers with other settings than `config.serve`.
    """
    store = open_store(config.store)
    judges, agreement = _read_panel(inputs.get("panel_report"))
    report, decision = _read_report(inputs.get("report")), _read_decision(inputs.get("decision"))
    check_measured_settings(decision, config.serve)
    with tempfile.TemporaryDirectory() as images:
        golden: list[GoldenQuestion] = []
        served: list[GoldenQuestion] = []
        if "golden" in inputs and config.golden:
            answer_fn = load_look(inputs["checkpoint"], config.serve)
            golden = select_golden_questions(answer_fn, inputs["golden"], Path(images), config.golden)
            if report is not None and report.served is not None:
                served = select_served_questions(answer_fn, report.served, inputs["golden"], Path(images), config)
        evidence = PublicationEvidence(
            report=report,
            decision=decision,
            judges=judges,
            agreement=agreement,
            golden=golden,
            served=served,
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


def check_measured_settings(decision: Decision | None, serve: ServeConfig) -> None:
    """Raise InvalidInput if a decision on the arm `served` was made with other settings of the server."""
    if decision is not None and decision.served and decision.served != serve.answer_digest:
        raise InvalidInput(
            f"{decision.id} rests on answers with the server settings {decision.served}, but the checkpoint is to be "
            f"served with {serve.answer_digest}; evaluate and decide with the same section serve"
        )


def select_golden_questions(answer_fn: AnswerFn, data: Path, out: Path, count: int) -> list[GoldenQuestion]:
    """Select the questions that the policy answers most clearly, at most `count`, one per image.

    The candidates are the first questions of the data set. Those whose answer leads by less than CLEAR_LEAD, or changes
    if the image is changed by one gray level, are left out: another machine could answer them differently. The images
    are copied to the folder `out`. The answer key is not read: a golden answer is what this checkpoint answers, right
    or wrong. Without a clear answer the list is empty, and the checkpoint cannot be rolled out. Raises InvalidInput if
    `data` has no question.
    """
    studies = StudyIndex(data)
    first: dict[str, Question] = {}
    for question in islice(load_questions(data), 4 * CANDIDATES_PER_GOLDEN * count):
        first.setdefault(question.study, question)
    candidates = list(first.values())[: CANDIDATES_PER_GOLDEN * count]
    if not candidates:
        raise InvalidInput(f"{data}: contains no question; golden questions need at least one")
    answered = []
    for position, question in enumerate(candidates):
        answer, box, lead = answer_fn(studies[question.study], data, question.asked_text)
        if lead >= CLEAR_LEAD:
            answered.append((-lead, position, question, answer, box))
    golden: list[GoldenQuestion] = []
    for _, _, question, answer, box in sorted(answered, key=lambda entry: entry[:2]):
        kept = _confirm_answer(answer_fn, studies[question.study], data, question.asked_text, (answer, box))
        if kept is not None:
            golden.append(_store_question(question, studies, data, out, kept))
        if len(golden) == count:
            break
    return golden


def select_served_questions(
    answer_fn: AnswerFn, sample: ServedSample, data: Path, out: Path, config: PublishConfig
) -> list[GoldenQuestion]:
    """Select benchmark questions with the answers that the gate measured in the arm `served`, at most config.served.

    Questions that `data` does not contain are left out. Raises InvalidInput if the sample was measured with other
    settings, or if this code answers a question differently.
    """
    if sample.settings != config.serve.answer_digest:
        raise InvalidInput(
            f"the report's arm served was measured with the server settings {sample.settings}, but the checkpoint is "
            f"to be served with {config.serve.answer_digest}; evaluate with the same section serve"
        )
    studies = StudyIndex(data)
    measured = {item.question: item for item in sample.answers}
    known = [question for question in load_questions(data) if question.id in measured]
    served = []
    for question in spread_evenly(known, config.served):
        expected = measured[question.id]
        answer, box, _ = answer_fn(studies[question.study], data, question.asked_text)
        if normalize_text(answer) != normalize_text(expected.answer):
            raise InvalidInput(
                f"question {question.id}: the gate measured the answer {expected.answer!r}, but the checkpoint now "
                f"answers {answer[:80]!r}; is this the evaluated checkpoint, and the code that evaluated it?"
            )
        region = box if expected.box is not None else None
        kept = _confirm_answer(answer_fn, studies[question.study], data, question.asked_text, (expected.answer, region))
        if kept is not None:
            served.append(_store_question(question, studies, data, out, kept))
    return served


def _confirm_answer(
    answer_fn: AnswerFn, study: Study, data: Path, question: str, given: tuple[str, Box | None]
) -> tuple[str, Box | None] | None:
    """The answer and its region if they stay the same on a slightly changed image; None if the answer does not.

    The region is None if only the region changes.
    """
    answer, box = given
    with tempfile.TemporaryDirectory() as folder:
        changed = _change_image(data / study.image, Path(folder))
        again, box_again, _ = answer_fn(study.model_copy(update={"image": changed.name}), changed.parent, question)
    if normalize_text(again) != normalize_text(answer):
        return None
    return answer, box if box is not None and box == box_again else None


def _change_image(image: Path, folder: Path) -> Path:
    """Write a copy in which every second pixel, as on a chessboard, is one gray level darker or brighter."""
    pixels = np.asarray(open_image(image)).astype(np.int16)
    rows, columns = np.indices(pixels.shape[:2])
    signs = np.where((rows + columns) % 2, _TEST_CHANGE, -_TEST_CHANGE)
    changed = pixels + (signs[..., None] if pixels.ndim == 3 else signs)
    path = folder / f"{image.stem}.png"
    Image.fromarray(np.clip(changed, 0, 255).astype(np.uint8)).save(path)
    return path


def _store_question(
    question: Question, studies: Mapping[str, Study], data: Path, out: Path, given: tuple[str, Box | None]
) -> GoldenQuestion:
    image, digest = copy_golden_image(data / studies[question.study].image, out)
    return GoldenQuestion(question=question.asked_text, image=image, sha256=digest, answer=given[0], box=given[1])


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
