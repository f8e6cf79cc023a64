"""All metrics of generated reports: those that this installation can compute, and why others are absent.

- ngrams: `raw/bleu_1` … `raw/meteor` and `r2gen/bleu_1` … `r2gen/meteor`;
- findings: `finding_precision`, `finding_recall`, `finding_f1`, with negation and side;
- clinical: `radgraph_f1`, `chexbert_f1_14`, `chexbert_f1_5`, `ratescore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clincot.evaluation.intervals import MetricSums, add_mean, add_totals
from clincot.evaluation.report_text import findings
from clincot.evaluation.report_text.clinical import CLINICAL_METRICS, ClinicalMetric, ClinicalUnavailable
from clincot.evaluation.report_text.ngrams import (
    BLEU_ORDERS,
    TextProtocol,
    build_r2gen_protocol,
    build_raw_protocol,
    describe_implementations,
    try_load_wordnet,
)
from clincot.evaluation.report_text.report_protocols import R2GenVocabulary

REPORT_METRIC_HEADINGS: dict[str, str] = {
    **{f"raw/bleu_{order}": f"BLEU-{order} (raw)" for order in BLEU_ORDERS},
    **{f"r2gen/bleu_{order}": f"BLEU-{order} (r2gen)" for order in BLEU_ORDERS},
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
    """The metrics computed for every report. Build it once: loading WordNet or weights takes seconds."""

    texts: tuple[TextProtocol, ...]
    finds: bool  # whether the finding metrics are computed
    clinical: tuple[ClinicalMetric, ...]
    by: dict[str, str]  # {metric: the package that computes it, with version and settings}
    absent: dict[str, str]  # {metric: why it is absent}

    def add_report(self, sums: MetricSums, generated: str | None, reference: str, cluster: str) -> None:
        """Add one report. None (not generated) is unscored in every metric; "" (generated, empty) is scored."""
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
        """Describe in one line what computes each metric and which metrics are absent."""
        absent = "; ".join(f"{name} ({reason})" for name, reason in self.absent.items() if reason != _NOT_REQUESTED)
        computed = "; ".join(f"{name}: {by}" for name, by in self.by.items())
        return f"report texts: {computed}" + (f"; absent: {absent}" if absent else "")


def build_report_metrics(
    training_reports: Iterable[str] | None = None, *, clinical: Sequence[str] = ()
) -> ReportMetrics:
    """Build every metric that this installation can compute; the others go to `absent` with the reason.

    training_reports: texts for R2Gen's vocabulary; None leaves the r2gen protocol out. clinical: names of
    CLINICAL_METRICS. Raises ValueError on an unknown clinical name, and if no word of the training reports is frequent
    enough.
    """
    if unknown := sorted({*clinical} - {*CLINICAL_METRICS}):
        raise ValueError(f"no clinical metric is called {', '.join(unknown)}; there are {', '.join(CLINICAL_METRICS)}")
    absent: dict[str, str] = {}
    by = describe_implementations()
    wordnet, version_or_reason = try_load_wordnet()
    if wordnet is None:
        absent["meteor"] = version_or_reason
        del by["meteor"]
    else:
        by["meteor"] += f", {version_or_reason}"
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
    """Enter the finding metrics into `by` if their package is installed, otherwise into `absent`."""
    try:
        by[name] = f"{require()}'s names, negation and side by rules; micro average over findings"
    except findings.RadlabelsMissing as missing:
        absent[name] = str(missing)
        return False
    return True


def _load_clinical_metric(
    absent: dict[str, str], by: dict[str, str], name: str, load: Callable[[], ClinicalMetric]
) -> ClinicalMetric | None:
    """Load a clinical metric and enter it into `by`; if that fails, enter the reason into `absent`."""
    try:
        metric = load()
    except ClinicalUnavailable as error:
        absent[name] = str(error)
        return None
    by[name] = metric.implementation
    return metric
