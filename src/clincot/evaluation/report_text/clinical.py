"""RadGraph F1, CheXbert F1 and RaTEScore: metrics of neural readers, from the packages of their authors.

Each needs a package (the extra `clinical`; RaTEScore an environment of its own) and weights that no package carries.
What is missing makes the metric absent, with the reason; it is never 0. Nothing is downloaded here but by RaTEScore's
own loading where a hub is on line.

- radgraph_f1: entities and relations that agree, reward level `partial`, model radgraph-xl, the mean over reports;
- chexbert_f1_14, chexbert_f1_5: micro F1 over 14 (5) observations, uncertain counted as positive, as the package does;
- ratescore: the mean over reports. The package gives 0.5 to a report in which it finds no entity, an empty one too.
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
    """A metric's package or weights are missing; says which, and how to get them."""


@dataclass(frozen=True)
class ClinicalMetric:
    """One package's metrics. `score` gives a number a metric (a mean), or its totals (with `statistic`)."""

    metrics: tuple[str, ...]
    implementation: str
    score: Callable[[str, str], tuple[Any, ...]]  # (generated, reference)
    statistic: Statistic | None = None

    def add_report(self, sums: MetricSums, generated: str | None, reference: str, cluster: str) -> None:
        """Count one report in; None is a report that was not generated, unscored."""
        values = (None,) * len(self.metrics) if generated is None else self.score(generated, reference)
        for name, value in zip(self.metrics, values, strict=True):
            if self.statistic is None:
                add_mean(sums, name, value, cluster)
            else:
                add_totals(sums, name, self.statistic, value, cluster)


def load_radgraph_f1() -> ClinicalMetric:
    """Raises ClinicalUnavailable."""
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
    """Raises ClinicalUnavailable."""
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
        stated, wanted = labeller.get_label(generated.strip()), labeller.get_label(reference.strip())
        return count_labels(stated, wanted), count_labels([stated[at] for at in five], [wanted[at] for at in five])

    implementation = f"f1chexbert {version('f1chexbert')}, micro F1, uncertain as positive"
    return ClinicalMetric(("chexbert_f1_14", "chexbert_f1_5"), implementation, score, micro_f1)


def load_ratescore() -> ClinicalMetric:
    """Raises ClinicalUnavailable."""
    for name in ("RaTEScore", "medspacy"):
        _require_package(
            name, "RaTEScore", f"it needs {name} in an environment with numpy < 2, as its spaCy < 3.8 does"
        )
    try:
        import torch
        from RaTEScore import RaTEScore

        scorer = RaTEScore(use_gpu=torch.cuda.is_available())
    except (ImportError, OSError) as error:  # what transformers raises where neither cache nor hub has the weights
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


def count_labels(stated: list[int], wanted: list[int]) -> list[float]:
    """(in both, stated, wanted) of two 0/1 label vectors: what micro F1 adds up."""
    both = sum(1 for a, b in zip(stated, wanted, strict=True) if a and b)
    return [float(both), float(sum(map(bool, stated))), float(sum(map(bool, wanted)))]


def _require_package(name: str, metric: str, how: str = "`pip install 'clincot[clinical]'`") -> None:
    if importlib.util.find_spec(name) is None:
        raise ClinicalUnavailable(f"{metric}: the package {name} is not installed: {how}")


def _first_error_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
