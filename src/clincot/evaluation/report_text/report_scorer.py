"""All metrics of generated reports: which can be computed here, by what, and why the others cannot.

Metrics by name: `raw/bleu_1` … and `r2gen/bleu_1` … (report_text), `finding_precision`, `finding_recall`, `finding_f1`
(findings, with negation and side), `radgraph_f1`, `chexbert_f1_14`, `chexbert_f1_5`, `ratescore` (clinical).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clincot.evaluation.intervals import MetricSums, add_mean, add_totals
from clincot.evaluation.report_text import findings
from clincot.evaluation.report_text.clinical import CLINICAL_METRICS, ClinicalMetric, ClinicalUnavailable
from clincot.evaluation.report_text.ngrams import (
    TextProtocol,
    build_r2gen_protocol,
    build_raw_protocol,
    describe_implementations,
    try_load_wordnet,
)
from clincot.evaluation.report_text.report_protocols import R2GenVocabulary

REPORT_METRIC_HEADINGS: dict[str, str] = {
    **{f"{p}/bleu_{n}": f"BLEU-{n} ({p})" for p in ("raw", "r2gen") for n in (1, 2, 3, 4)},
    "raw/rouge_l": "ROUGE-L (raw)",
    "r2gen/rouge_l": "ROUGE-L (r2gen)",
    "r2gen/rouge_l_beta_1.2": "ROUGE-L β 1.2 (r2gen)",
    "raw/meteor": "METEOR (raw)",
    "r2gen/meteor": "METEOR (r2gen)",
    "finding_precision": "finding precision",
    "finding_recall": "finding recall",
    "finding_f1": "finding F1",
    "radgraph_f1": "RadGraph F1",
    "chexbert_f1_14": "CheXbert F1 (14)",
    "chexbert_f1_5": "CheXbert F1 (5)",
    "ratescore": "RaTEScore",
    "report_words": "report words",
}
_FINDING_STATISTICS = {
    "finding_precision": findings.finding_precision,
    "finding_recall": findings.finding_recall,
    "finding_f1": findings.micro_f1,
}
_NO_TRAINING_REPORTS = "the r2gen protocol replaces rare words of the training reports, and none were given"
_NOT_REQUESTED = "not asked for"


@dataclass(frozen=True)
class ReportMetrics:
    """What is computed of every report. Made once: reading WordNet or weights takes seconds."""

    texts: tuple[TextProtocol, ...]
    finds: bool
    clinical: tuple[ClinicalMetric, ...]
    by: dict[str, str]  # {metric: the package and settings that compute it}
    absent: dict[str, str]  # {metric: why it is absent}

    def add_report(self, sums: MetricSums, generated: str | None, reference: str, cluster: str) -> None:
        """Count one report in. None: it was not generated, and is unscored in every metric; "" was, and is scored."""
        for text in self.texts:
            text.add_report(sums, generated, reference, cluster)
        if self.finds:
            counts = None if generated is None else findings.count_findings(generated, reference)
            for name, statistic in _FINDING_STATISTICS.items():
                add_totals(sums, name, statistic, counts, cluster)
        for metric in self.clinical:
            metric.add_report(sums, generated, reference, cluster)
        add_mean(sums, "report_words", None if generated is None else len(generated.split()), cluster)

    def describe_metrics(self) -> str:
        """What computes the metrics, and what is absent, in one line."""
        absent = "; ".join(f"{name} ({reason})" for name, reason in self.absent.items() if reason != _NOT_REQUESTED)
        computed = "; ".join(f"{name}: {by}" for name, by in self.by.items())
        return f"report texts: {computed}" + (f"; absent: {absent}" if absent else "")


def build_report_metrics(
    training_reports: Iterable[str] | None = None, *, clinical: Sequence[str] = ()
) -> ReportMetrics:
    """Everything that can be computed here. Training reports are R2Gen's vocabulary; clinical: names of CLINICAL.

    What cannot be computed goes to `absent` with its reason. Raises ValueError on an unknown clinical name or training
    reports without a word that is frequent enough.
    """
    if unknown := sorted({*clinical} - {*CLINICAL_METRICS}):
        raise ValueError(f"no clinical metric is called {', '.join(unknown)}; there are {', '.join(CLINICAL_METRICS)}")
    absent: dict[str, str] = {}
    by = describe_implementations()
    wordnet, told = try_load_wordnet()
    if wordnet is None:
        absent["meteor"] = told
        del by["meteor"]
    else:
        by["meteor"] += f", {told}"
    texts = [build_raw_protocol(wordnet)]
    if training_reports is None:
        absent["r2gen"] = _NO_TRAINING_REPORTS
        del by["rouge_l_beta_1.2"]
    else:
        vocabulary = R2GenVocabulary.from_reports(training_reports)
        texts.append(build_r2gen_protocol(vocabulary, wordnet))
        by["r2gen"] = f"vocabulary of {len(vocabulary.words)} words from {vocabulary.reports} training reports"
    finds = _enable_finding_metrics(absent, by, "finding", findings.require_radlabels)
    loaded = [_load_clinical_metric(absent, by, name, CLINICAL_METRICS[name]) for name in clinical]
    absent |= {name: _NOT_REQUESTED for name in CLINICAL_METRICS if name not in clinical}
    return ReportMetrics(tuple(texts), finds, tuple(m for m in loaded if m is not None), by, absent)


def _enable_finding_metrics(absent: dict[str, str], by: dict[str, str], name: str, require: Callable[[], str]) -> bool:
    try:
        by[name] = f"{require()}'s names, negation and side by rules; micro average over findings"
    except findings.RadlabelsMissing as missing:
        absent[name] = str(missing)
        return False
    return True


def _load_clinical_metric(
    absent: dict[str, str], by: dict[str, str], name: str, load: Callable[[], ClinicalMetric]
) -> ClinicalMetric | None:
    try:
        metric = load()
    except ClinicalUnavailable as error:
        absent[name] = str(error)
        return None
    by[name] = metric.implementation
    return metric
