"""Calibration of judges on a small labelled set of real image files, by judges whose knowledge is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clincot.config import JudgeConfig, JudgeSpec
from clincot.datasets.folder import load_questions, load_references
from clincot.errors import UserError
from clincot.jsonl import read_records
from clincot.judging.calibration import Calibration, CalibrationRefused
from clincot.models.protocols import Judge
from clincot.prompts import Conversation, PromptFormat
from clincot.records import hash_json
from clincot.training import calibrate_judges
from clincot.training.calibrate_judges import fit_judge_calibrations, measure_judges
from tests.support import tiny


class Reader:
    """Knows the key of a data set, and says `right` or `wrong` as P(yes), give or take, with errors now and then.

    What it is asked is read from the very conversation: picture file, question and proposed answer.
    """

    views = PromptFormat(wording="brief")

    def __init__(self, data: Path, name: str, *, right: float, wrong: float, silent: bool = False) -> None:
        self.name, self.digest = name, f"digest-of-{name}"
        self.right, self.wrong, self.silent = right, wrong, silent
        self.asked = 0
        key = {r.question: r.answer for r in load_references(data)}
        self._answers: dict[str, set[str]] = {}
        for q in load_questions(data):
            self._answers.setdefault(q.text, set()).add(key[q.id])
        studies = {s.id: s.sha256 for s in calibrate_judges.StudyIndex(data).values()}
        self._key = {(studies[q.study], q.text): key[q.id] for q in load_questions(data)}

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self.asked += len(conversations)
        return [None if self.silent and n % 10 == 0 else self._score(c) for n, c in enumerate(conversations)]

    def _score(self, conversation: Conversation) -> float:
        (turn,) = conversation
        image = turn.pictures[0].sha256
        (question,) = [text for text in self._answers if text in turn.text]
        answer = turn.text.partition(question)[2].strip(" ?")
        noise = np.random.default_rng(int(hash_json([image, turn.text, self.name])[:12], 16)).normal(0, 0.12)
        said = self.right if answer == self._key[image, question] else self.wrong
        return float(np.clip(said + noise, 0.01, 0.99))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 films with two questions each; whether a zone is upper or lower depends on the film."""
    return tiny.write_set(tmp_path_factory.mktemp("labelled") / "data", studies=60)


@pytest.fixture
def panel(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[Judge]:
    """Two judges that know (one of them too sure of itself), under the names by which params.yaml calls them."""
    judges: list[Judge] = [Reader(data, "modest", right=0.65, wrong=0.4), Reader(data, "sure", right=0.97, wrong=0.75)]
    seat(judges, monkeypatch)
    return judges


def seat(judges: Sequence[Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {judge.name: judge for judge in judges}
    monkeypatch.setattr(calibrate_judges, "load_judge", lambda spec, dtype: by_name[spec.name])


def config(*names: str, **other: object) -> JudgeConfig:
    return JudgeConfig.model_validate({"judges": [JudgeSpec(name=name, path=name) for name in names], **other})


def test_one_calibration_a_judge_and_a_table_of_both(panel: list[Judge], data: Path, tmp_path: Path) -> None:
    """Every question once: 120 of them, by both judges. The one that says .75 of wrong answers is mended most."""
    out = tmp_path / "calibration.jsonl"
    table = fit_judge_calibrations(config("modest", "sure"), data, out, limit=400).splitlines()
    fitted = list(read_records(out, Calibration))
    assert [(c.judge, c.method) for c in fitted] == [("digest-of-modest", "platt"), ("digest-of-sure", "platt")]
    assert table[0] == "| judge | n | AUC | ECE before | after | Brier before | after |"
    for line, judge, calibration in zip(table[2:], panel, fitted, strict=True):
        before, after = calibration.before, calibration.after
        assert before is not None
        assert after is not None
        numbers = (before.auc, before.ece, after.ece, before.brier, after.brier)
        assert line == f"| {judge.name} | {before.n} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |"
        # presence is always "yes" here, so there is no wrong answer to choose but of another topic, now and then
        assert before.n == 120
        assert before.auc > 0.8
    sure = fitted[1]
    assert sure.before is not None
    assert sure.after is not None
    assert sure.after.ece < sure.before.ece
    assert sure.after.brier < sure.before.brier
    assert sure.calibrate_score(0.6) < 0.4 < 0.8 < sure.calibrate_score(0.97)


def test_the_same_judges_and_labels_are_the_same_bytes(panel: list[Judge], data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit_judge_calibrations(config("modest", "sure"), data, tmp_path / name, limit=400)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_limit_asks_the_first_questions_only(panel: list[Judge], data: Path, tmp_path: Path) -> None:
    fit_judge_calibrations(config("modest", "sure"), data, tmp_path / "c", limit=50)
    assert [judge.asked for judge in panel] == [50, 50]  # type: ignore[attr-defined]
    with pytest.raises(CalibrationRefused, match=r"judge digest-of-modest: 10 scored labelled samples .*at least 40"):
        fit_judge_calibrations(config("modest"), data, tmp_path / "few", limit=10)
    assert not (tmp_path / "few").exists()


def test_what_a_judge_could_not_score_is_left_aside_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None for every tenth of 120: 108 are left."""
    seat([Reader(data, "silent", right=0.8, wrong=0.2, silent=True)], monkeypatch)
    fit_judge_calibrations(config("silent"), data, tmp_path / "c", limit=400)
    (fitted,) = read_records(tmp_path / "c", Calibration)
    assert fitted.n_unscored == 12
    assert fitted.before is not None
    assert fitted.before.n == 108


@pytest.mark.parametrize(("right", "wrong"), [(0.3, 0.6), (0.5, 0.5)])
def test_an_uninformative_judge_is_refused_and_writes_nothing(
    right: float, wrong: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worse than chance, or at chance; the good one beside it does not get a file of its own."""
    seat([Reader(data, "good", right=0.8, wrong=0.2), Reader(data, "bad", right=right, wrong=wrong)], monkeypatch)
    with pytest.raises(CalibrationRefused, match="judge digest-of-bad: ") as refused:
        fit_judge_calibrations(config("good", "bad"), data, tmp_path / "c", limit=400)
    assert isinstance(refused.value, UserError)
    assert list(tmp_path.iterdir()) == []


def test_identity_has_nothing_to_fit(panel: list[Judge], data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration is identity, which needs no fit; set it to platt or"):
        fit_judge_calibrations(config("modest", calibration="identity"), data, tmp_path / "c", limit=400)
    assert panel[0].asked == 0  # type: ignore[attr-defined]


def test_measured_reliability_is_raw_and_with_the_calibration(panel: list[Judge], data: Path, tmp_path: Path) -> None:
    """These judges know the key wherever they look, so the crop makes no difference to them; a file of curves does."""
    raw = measure_judges(config("modest", "sure"), data, limit=400)
    assert [row["name"] for row in raw] == ["modest", "sure"]
    for row in raw:
        assert row["auc_oracle"] > 0.8
        assert row["auc_random"] > 0.8
        assert row["ece"] == row["ece_raw"]
    fit_judge_calibrations(config("modest", "sure"), data, tmp_path / "c", limit=400)
    mended = measure_judges(config("modest", "sure", calibration_file=str(tmp_path / "c")), data, limit=400)
    assert [row["ece_raw"] for row in mended] == [row["ece_raw"] for row in raw]
    assert mended[1]["ece"] < mended[1]["ece_raw"]


def test_measuring_a_judge_that_leaves_answers_unscored_says_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seat([Reader(data, "silent", right=0.8, wrong=0.2, silent=True)], monkeypatch)
    with pytest.raises(ValueError, match=r"judge silent: \d+ of \d+ labelled answers got no score"):
        measure_judges(config("silent"), data, limit=400)


def test_a_data_set_without_its_key_is_refused(panel: list[Judge], tmp_path: Path) -> None:
    asked = tiny.write_set(tmp_path / "asked", key=False)
    with pytest.raises(UserError, match=r"references\.jsonl"):
        fit_judge_calibrations(config("modest"), asked, tmp_path / "c", limit=400)


class TextReader(Reader):
    """Says what the reference in its prompt says."""

    def _score(self, conversation: Conversation) -> float:
        text = conversation[0].text
        answer = text.partition("Proposed answer: ")[2].partition("\n")[0]
        reference = text.partition("Reference answer: ")[2].partition("\n")[0]
        return 0.9 if reference == answer else 0.3 + 0.01 * (len(text) % 7)


def test_a_reference_is_shown_here_and_the_calibration_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calibration is of another digest, so that no round can use it. Without the reference it knows nothing."""
    seat([TextReader(data, "text", right=0.5, wrong=0.5)], monkeypatch)
    spec = JudgeSpec(name="text", path="text", text_only=True)
    out = tmp_path / "calibration.jsonl"
    fit_judge_calibrations(JudgeConfig(judges=(spec,), show_reference=True), data, out, limit=400)
    (fitted,) = read_records(out, Calibration)
    assert fitted.judge == "digest-of-text+reference"
    assert fitted.before is not None
    assert fitted.before.auc == 1.0
    with pytest.raises(CalibrationRefused):
        fit_judge_calibrations(JudgeConfig(judges=(spec,)), data, out, limit=400)
