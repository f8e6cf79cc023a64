"""RadGraph F1, CheXbert F1 and RaTEScore: neural report metrics from their authors' packages.

Each needs a package (the extra `clinical`; RaTEScore needs an environment of its own) and weights that no package
includes. A metric whose package or weights are missing is absent with the reason; it is never 0. This module downloads
nothing, but RaTEScore's own loader does if it can reach the hub.

- radgraph_f1: agreement of entities and relations, reward level `partial`, model radgraph-xl, mean over reports;
- chexbert_f1_14, chexbert_f1_5: micro F1 over 14 (5) observations; as in the package, uncertain counts as positive;
- ratescore: mean over reports. The package gives 0.5 to a report without any entity, even to an empty one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clincot.evaluation.intervals import MetricSums, Statistic, add_mean, add_totals
from clincot.evaluation.report_text.findings import micro_f1

_LOAD_ONCE_HINT = "Load it once where the hub can be reached"


class ClinicalUnavailable(RuntimeError):
    """A metric's package or weights are missing; the message says which, and how to get them."""


@dataclass(frozen=True)
class ClinicalMetric:
    """The metrics of one package.

    `score` returns one item for each metric: a number, of which the metric is the mean, or with `statistic` the totals
    that it is computed from.
    """

    metrics: tuple[str, ...]
    implementation: str  # package, version and settings, for reports
    score: Callable[[str, str], tuple[Any, ...]]  # (generated, reference) -> one item for each metric
    statistic: Statistic | None = None

    def add_report(self, sums: MetricSums, generated: str | None, reference: str, cluster: str) -> None:
        """Add one report; None is a report that was not generated, and counts as unscored."""
        values = (None,) * len(self.metrics) if generated is None else self.score(generated, reference)
        for name, value in zip(self.metrics, values, strict=True):
            if self.statistic is None:
                add_mean(sums, name, value, cluster)
            else:
                add_totals(sums, name, self.statistic, value, cluster)


def load_radgraph_f1() -> ClinicalMetric:
    """Load RadGraph F1; raises ClinicalUnavailable if its package or weights are missing."""
    _require_package("radgraph", "RadGraph F1")
    from appdirs import user_cache_dir

    model = "radgraph-xl"
    weights = Path(user_cache_dir("radgraph")) / version("radgraph") / model
    if not (weights / "weights.th").is_file():
        raise ClinicalUnavailable(
            f"RadGraph F1: no weights in {weights}. {_LOAD_ONCE_HINT}: "
            f"radgraph.F1RadGraph(reward_level='partial', model_type='{model}')"
        )
    try:
        from radgraph import F1RadGraph

        scorer = F1RadGraph(reward_level="partial", model_type=model)
    except (ImportError, OSError) as error:
        raise ClinicalUnavailable(f"RadGraph F1 cannot be loaded: {_first_error_line(error)}") from error

    def score(generated: str, reference: str) -> tuple[float]:
        return (float(scorer(refs=[reference], hyps=[generated])[1][0]),)

    return ClinicalMetric(("radgraph_f1",), f"radgraph {version('radgraph')}, {model}, reward level partial", score)


def load_chexbert_f1() -> ClinicalMetric:
    """Load CheXbert F1; raises ClinicalUnavailable if its package or weights are missing."""
    _require_package("f1chexbert", "CheXbert F1")
    from appdirs import user_cache_dir

    weights = Path(user_cache_dir("chexbert")) / "chexbert.pth"
    if not weights.is_file():
        raise ClinicalUnavailable(
            f"CheXbert F1: no weights at {weights}. Put chexbert.pth of the hub's StanfordAIMI/RRG_scorers there"
        )
    try:
        from f1chexbert import F1CheXbert

        labeller = F1CheXbert()
    except (ImportError, OSError) as error:
        raise ClinicalUnavailable(f"CheXbert F1 cannot be loaded: {_first_error_line(error)}") from error
    five = [int(at) for at in labeller.target_names_5_index]

    def score(generated: str, reference: str) -> tuple[list[float], list[float]]:
        stated, expected = labeller.get_label(generated.strip()), labeller.get_label(reference.strip())
        return count_labels(stated, expected), count_labels([stated[at] for at in five], [expected[at] for at in five])

    implementation = f"f1chexbert {version('f1chexbert')}, micro F1, uncertain as positive"
    return ClinicalMetric(("chexbert_f1_14", "chexbert_f1_5"), implementation, score, micro_f1)


def load_ratescore() -> ClinicalMetric:
    """Load RaTEScore; raises ClinicalUnavailable if its packages or weights are missing."""
    for name in ("RaTEScore", "medspacy"):
        _require_package(
            name, "RaTEScore", f"it needs {name} in an environment with numpy < 2, as its spaCy < 3.8 does"
        )
    try:
        import torch
        from RaTEScore import RaTEScore

        scorer = RaTEScore(use_gpu=torch.cuda.is_available())
    except (ImportError, OSError) as error:  # transformers raises OSError if neither cache nor hub has the weights
        raise ClinicalUnavailable(
            f"RaTEScore: its weights (Angelakeke/RaTE-NER-Deberta, FremyCompany/BioLORD-2023-C) cannot be loaded: "
            f"{_first_error_line(error)}. {_LOAD_ONCE_HINT}"
        ) from error

    def score(generated: str, reference: str) -> tuple[float]:
        return (float(scorer.compute_score([generated], [reference])[0]),)

    return ClinicalMetric(("ratescore",), f"RaTEScore {version('RaTEScore')}", score)


CLINICAL_METRICS: dict[str, Callable[[], ClinicalMetric]] = {
    "radgraph": load_radgraph_f1,
    "chexbert": load_chexbert_f1,
    "ratescore": load_ratescore,
}


def count_labels(stated: list[int], expected: list[int]) -> list[float]:
    """Count the labels set in both 0/1 vectors, in the first and in the second (3,), which micro F1 adds up."""
    both = sum(1 for a, b in zip(stated, expected, strict=True) if a and b)
    return [float(both), float(sum(map(bool, stated))), float(sum(map(bool, expected)))]


def _require_package(name: str, metric: str, how: str = "`pip install 'clincot[clinical]'`") -> None:
    if importlib.util.find_spec(name) is None:
        raise ClinicalUnavailable(f"{metric}: the package {name} is not installed: {how}")


def _first_error_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
