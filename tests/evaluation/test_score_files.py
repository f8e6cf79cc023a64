"""`clincot report-metrics`: the table, the JSON, and what is refused; once on real IU reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.evaluation.report_text.score_files import score_reports
from clincot.jsonl import InvalidRecord, write_records
from clincot.records import Study
from tests.support import material

WROTE = {"a": "No effusion or pneumothorax.", "b": "The heart is enlarged.", "c": "Left effusion."}
KEY = {"a": "No effusion or pneumothorax.", "b": "The heart is enlarged.", "c": "Right effusion."}


def write(path: Path, texts: dict[str, str], **more: object) -> Path:
    path.write_text("".join(json.dumps({"study": s, "text": t, **more}) + "\n" for s, t in texts.items()))
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Without WordNet, which takes seconds to read."""
    monkeypatch.setenv("CLINCOT_WORDNET", str(tmp_path))
    return {
        "references": write(tmp_path / "ref.jsonl", KEY),
        "generated": write(tmp_path / "hyp.jsonl", WROTE),
        "training": write(tmp_path / "train.jsonl", {str(n): "no effusion or pneumothorax" for n in range(3)}),
    }


def test_an_unread_study_is_unscored_in_every_metric(files: dict[str, Path]) -> None:
    write(files["generated"], {s: WROTE[s] for s in ("a", "b")})
    scores = score_reports(**files, resamples=20)
    assert {(metric.n, metric.n_unscored) for metric in scores.metrics.values()} == {(2, 1)}
    assert scores.metrics["raw/bleu_4"].value == 1.0  # the two that were written are the references
    assert scores.metrics["r2gen/rouge_l"].value == 1.0


def test_patients_are_the_clusters_where_they_are_given(files: dict[str, Path], tmp_path: Path) -> None:
    studies = [
        Study(image=f"{n}.png", sha256=f"{n:064x}", width=8, height=8, patient="p" if n < 2 else "q") for n in range(3)
    ]
    write_records(tmp_path / "studies.jsonl", studies)
    ids = dict(zip(KEY, (study.id for study in studies), strict=True))
    write(files["references"], {ids[s]: text for s, text in KEY.items()})
    write(files["generated"], {ids[s]: text for s, text in WROTE.items()})
    scores = score_reports(**files, studies=tmp_path / "studies.jsonl", resamples=20)
    assert {metric.clusters for metric in scores.metrics.values()} == {2}
    assert scores.clusters == "patients"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"generated": {**WROTE, "d": "x"}}, "1 reports are of studies without a reference in .*, for instance 'd'"),
        ({"references": {**KEY, "a": " "}}, "the reference report of study 'a' is empty"),
        ({"references": {}, "generated": {}}, "expected reference reports, found none"),
    ],
)
def test_files_that_do_not_go_together_are_refused(
    change: dict[str, dict[str, str]], says: str, files: dict[str, Path]
) -> None:
    for name, texts in change.items():
        write(files[name], texts)
    with pytest.raises(InvalidRecord, match=says):
        score_reports(**files, resamples=20)


def test_the_command_prints_names_and_absences_and_writes_json(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "report-metrics",
        "--references",
        str(files["references"]),
        "--hypotheses",
        str(files["generated"]),
        "--train",
        str(files["training"]),
        "--label",
        "three reports",
        "--resamples",
        "20",
    ]
    assert main([*arguments, "--out", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("three reports\n")
    for expected in (
        "| BLEU-4 (raw) |",
        "| ROUGE-L β 1.2 (r2gen) |",
        "- bleu: sacrebleu 2.",
        "- rouge_l: rouge-score",
        "- absent: radgraph: not asked for",
        "- absent: meteor: WordNet not found",
    ):
        assert expected.lower() in printed.lower()
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["metrics"]["raw/bleu_1"]["n"] == 3
    assert set(written["absent"]) >= {"meteor", "radgraph", "chexbert", "ratescore"}
    assert "R2Gen's models see 2 views" in printed


def test_a_missing_clinical_metric_fails_after_the_rest(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here its package is missing; where it is installed, its weights are."""
    arguments = [
        "report-metrics",
        "--references",
        str(files["references"]),
        "--hypotheses",
        str(files["generated"]),
        "--clinical",
        "radgraph",
        "--out",
        str(tmp_path / "scores.json"),
        "--resamples",
        "20",
    ]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "| BLEU-1 (raw) |" in shown.out
    assert "not computed: RadGraph F1" in shown.err
    written = json.loads((tmp_path / "scores.json").read_text())
    assert "RadGraph F1" in written["absent"]["radgraph"]
    assert "radgraph_f1" not in written["metrics"]


def test_report_text_metrics_on_iu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every report predicted by the most usual one, as a model that learnt nothing would: text overlap without any
    finding found. All of it stays in the test's own folder."""
    monkeypatch.setenv("CLINCOT_WORDNET", str(tmp_path))
    texts = [text for text, _ in material.iu_reports()]
    usual = "The heart is normal in size. The lungs are clear. No pleural effusion or pneumothorax."
    scores = score_reports(
        write(tmp_path / "ref.jsonl", {str(n): text for n, text in enumerate(texts[:300])}),
        write(tmp_path / "hyp.jsonl", {str(n): usual for n in range(300)}),
        training=write(tmp_path / "train.jsonl", {str(n): text for n, text in enumerate(texts[300:1300])}),
        label="report-text metrics on IU",
        resamples=100,
    )
    assert scores.render_table().startswith("report-text metrics on IU\n")
    rouge = scores.metrics["r2gen/rouge_l"]
    assert rouge.value is not None
    assert rouge.low is not None
    assert rouge.high is not None
    assert 0.15 < rouge.low < rouge.value < rouge.high < 0.5
    if "finding_recall" in scores.metrics:
        assert scores.metrics["finding_recall"].value == 0.0
        assert scores.metrics["finding_precision"].value is None  # it states none
