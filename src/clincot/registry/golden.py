"""A round's files into a publication: report, decision, panel and golden questions, all of this very policy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from clincot.config import PublishSection
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.errors import BadInput
from clincot.geometry import Box
from clincot.jsonl import read_model, read_records
from clincot.judging.combination import PanelReport
from clincot.records import BenchmarkReport, Decision, Question, Study
from clincot.registry import champion
from clincot.registry.manifest import Golden, JudgeLine, Manifest
from clincot.registry.publication import Evidence, golden_image, publish
from clincot.storage.artifacts import fetch
from clincot.storage.open import open_store
from clincot.storage.store import Store

# A question about an image: answer, region (None: others are as likely), and how far both are from being another.
Look = Callable[[Study, Path, str], tuple[str, Box | None, float]]
LoadLook = Callable[[Path], Look]  # a checkpoint's folder -> how it answers
TRIED = 4  # golden questions are the clearest of so many times their number: a near tie may fall either way elsewhere


def publish_files(section: PublishSection, inputs: Mapping[str, Path], *, load_look: LoadLook) -> Manifest:
    """Publish `checkpoint` with what else is given: report, decision, panel_report, golden (a data-set folder).

    load_look: loads the checkpoint that answers the golden questions; called only if there are any.
    """
    store = open_store(section.store)
    judges, agreement = _panel(inputs.get("panel_report"))
    with tempfile.TemporaryDirectory() as made:
        golden: list[Golden] = []
        if "golden" in inputs and section.golden:
            golden = golden_questions(load_look(inputs["checkpoint"]), inputs["golden"], Path(made), section.golden)
        evidence = Evidence(
            report=_report(inputs.get("report")),
            decision=_decision(inputs.get("decision")),
            judges=judges,
            agreement=agreement,
            golden=golden,
            images=Path(made),
        )
        return publish(store, inputs["checkpoint"], section, evidence)


def start_line(section: PublishSection, store: Store, base: str, *, golden: str, by: str, load_look: LoadLook) -> str:
    """Publish `base` and make it the round-0 champion, where the line has none; says what was done.

    base, golden: folders, or addresses in a store. Nothing is fetched where there is a champion already.
    """
    try:
        found = champion.read_champion(store, section.name)
    except champion.NoChampion:
        pass
    else:
        return f"{section.name}: champion {found.now.sha256[:12]} (round {found.now.round}), there already"
    inputs = {"checkpoint": fetch(base)}
    if golden:
        inputs["golden"] = fetch(golden)
    manifest = publish_files(section, inputs, load_look=load_look)
    champion.start(store, manifest, by=by)
    return f"{section.name}: champion {manifest.sha256[:12]}, published from {base}"


def golden_questions(look: Look, data: Path, out: Path, count: int) -> list[Golden]:
    """The clearest of the first questions, one an image, with the policy's own answers; their images copied to `out`.

    The answer key is not read: a golden answer is what this checkpoint says, right or wrong.
    """
    studies = StudyIndex(data)
    first: dict[str, Question] = {}
    for question in islice(load_questions(data), 4 * TRIED * count):
        first.setdefault(question.study, question)
    asked = list(first.values())[: TRIED * count]
    found = []
    for position, question in enumerate(asked):
        study = studies[question.study]
        answer, box, lead = look(study, data, question.text)
        found.append((-lead, position, question.text, study, answer, box))
    if not found:
        raise BadInput(f"{data}: has no question to keep as golden")
    golden = []
    for _, _, text, study, answer, box in sorted(found, key=lambda one: one[:2])[:count]:
        image, digest = golden_image(data / study.image, out)
        golden.append(Golden(question=text, image=image, sha256=digest, answer=answer, box=box))
    return golden


def _report(path: Path | None) -> BenchmarkReport | None:
    return None if path is None else read_model(path, BenchmarkReport)


def _decision(path: Path | None) -> Decision | None:
    if path is None:
        return None
    (decision,) = read_records(path, Decision)
    return decision


def _panel(path: Path | None) -> tuple[tuple[JudgeLine, ...], float | None]:
    if path is None:
        return (), None
    report = read_model(path, PanelReport)
    judges = tuple(JudgeLine(name=one.name, digest=one.digest, scored=one.scored) for one in report.judges)
    return judges, report.alpha_calibrated.value
