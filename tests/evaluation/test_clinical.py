"""Clinical metrics: absent with a reason where their package or weights are missing, never a number."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from clincot.evaluation.intervals import ClusterTotals
from clincot.evaluation.report_text.clinical import CLINICAL_METRICS, ClinicalUnavailable, count_labels
from clincot.evaluation.report_text.findings import micro_f1
from clincot.evaluation.report_text.report_scorer import build_report_metrics

PACKAGES = {"radgraph": "radgraph", "chexbert": "f1chexbert", "ratescore": "RaTEScore"}


@pytest.mark.parametrize("name", CLINICAL_METRICS)
def test_a_missing_package_is_named_with_what_to_do(name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is not None:
        pytest.skip(f"{PACKAGES[name]} is installed here")
    with pytest.raises(ClinicalUnavailable, match=rf"the package {PACKAGES[name]} is not installed: .+"):
        CLINICAL_METRICS[name]()


@pytest.mark.parametrize(("name", "package"), [("radgraph", "radgraph"), ("chexbert", "f1chexbert")])
def test_missing_weights_are_named_with_their_place(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ClinicalUnavailable, match=rf"no weights (in|at) {tmp_path}"):
        CLINICAL_METRICS[name]()


def test_a_missing_metric_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A WordNet that is not there, no training reports, and clinical metrics that were not asked for."""
    monkeypatch.setenv("CLINCOT_WORDNET", "/nowhere")
    metrics = build_report_metrics()
    assert metrics.absent["meteor"] == "WordNet not found: CLINCOT_WORDNET is /nowhere, which has no file data.noun"
    assert "none were given" in metrics.absent["r2gen"]
    assert {metrics.absent[name] for name in CLINICAL_METRICS} == {"not asked for"}
    sums: dict[str, object] = {}
    metrics.add_report(sums, "No effusion.", "No effusion.", "patient")  # type: ignore[arg-type]
    assert not [name for name in sums if "meteor" in name or "r2gen" in name or name in ("radgraph_f1", "ratescore")]
    assert "absent: meteor (WordNet not found" in metrics.describe_metrics()


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="no clinical metric is called green; there are radgraph, chexbert, ratescore"):
        build_report_metrics(clinical=["green"])


def test_labels_become_micro_f1() -> None:
    """[1,1,0] against [1,0,1]: 1 in both of 2 and 2; with [0,1,0] against [0,1,0]: 2 of 3 and 3, F1 4/6."""
    totals = ClusterTotals(micro_f1)
    totals.add(count_labels([1, 1, 0], [1, 0, 1]), "a")
    totals.add(count_labels([0, 1, 0], [0, 1, 0]), "b")
    assert totals.compute_interval(seed=0).value == pytest.approx(4 / 6, abs=1e-6)
