"""A round's files into a publication: report, decision, panel and golden questions, all of this very policy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from clincot.config import PublishSection
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.deploy import champion
from clincot.deploy.manifest import Golden, JudgeLine, Manifest
from clincot.deploy.publish import Evidence, golden_image, publish
from clincot.errors import BadInput
from clincot.geometry import Box
from clincot.jsonl import read_records
from clincot.judge.combination import PanelReport
from clincot.located import fetch
from clincot.records import BenchmarkReport, Decision, Question, Study
from clincot.run_folder import read_model
from clincot.store import Store, open_store

# A question about an image: answer, region (None: others are as likely), and how far both are from being another.
Look = Callable[[Study, Path, str], tuple[str, Box | None, float]]
TRIED = 4  # golden questions are the clearest of so many times their number: a near tie may fall either way elsewhere
CLEAR = 1e-3  # lead of a region in likelihood


def publish_files(section: PublishSection, inputs: Mapping[str, Path], *, look: Look | None = None) -> Manifest:
    """Publish `checkpoint` with what else is given: report, decision, panel_report, golden (a data-set folder).

    look: how golden questions are answered; None: as `clincot serve` would, with the checkpoint loaded here.
    """
    store = open_store(section.store)
    judges, agreement = _panel(inputs.get("panel_report"))
    with tempfile.TemporaryDirectory() as made:
        golden: list[Golden] = []
        if "golden" in inputs and section.golden:
            answer = look or served_look(inputs["checkpoint"])
            golden = golden_questions(answer, inputs["golden"], Path(made), section.golden)
        evidence = Evidence(
            report=_report(inputs.get("report")), decision=_decision(inputs.get("decision")),
            judges=judges, agreement=agreement, golden=golden, images=Path(made),
        )  # fmt: skip
        return publish(store, inputs["checkpoint"], section, evidence)


def start_line(
    section: PublishSection, store: Store, base: str, *, golden: str, by: str, look: Look | None = None
) -> str:
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
    manifest = publish_files(section, inputs, look=look)
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


def served_look(checkpoint: Path) -> Look:
    """As the server answers, by the server's own code and default settings."""
    from clincot.models.load import load_policy
    from clincot.serve.settings import ServeSettings
    from clincot.serve.visual_cot import Asked, answer_question, leads

    policy, settings = load_policy(checkpoint), ServeSettings()

    def look(study: Study, folder: Path, question: str) -> tuple[str, Box | None, float]:
        answered = answer_question(Asked(study, folder, question), policy, settings)
        answer_leads, region_leads = leads(answered)
        box = answered.box if region_leads >= CLEAR else None
        return answered.answer, box, min(answer_leads, region_leads)

    return look


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
