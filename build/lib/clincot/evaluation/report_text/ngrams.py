"""BLEU, ROUGE-L and METEOR of reports, each from a named package, over the tokens of a protocol.

The packages compute the scores; this module prepares their input and turns the scores into metrics with intervals:

- bleu_1 … bleu_4: sacreBLEU's corpus BLEU, unsmoothed, with one reference (equal to pycocoevalcap's and NLTK's). Its
  interval resamples clusters of reports and recomputes BLEU from their n-gram counts;
- rouge_l: rouge-score's F1 of the longest common subsequence, mean over reports. Under r2gen also rouge_l_beta_1.2,
  the same precision and recall weighted as pycocoevalcap does, which is what R2Gen's tables print;
- meteor: NLTK's METEOR (alpha .9, beta 3, gamma .5; exact, stem and WordNet synonyms), mean over reports. It is not
  the Java METEOR 1.5 of pycocoevalcap, whose numbers differ. It is absent without WordNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clincot.evaluation.intervals import MetricSums, add_mean, add_totals
from clincot.evaluation.report_text.report_protocols import R2GenVocabulary
from clincot.evaluation.report_text.wordnet import WordNetMissing, load_wordnet

BLEU_ORDERS = (1, 2, 3, 4)
COCO_BETA = 1.2
Tokens = list[str]


@dataclass(frozen=True)
class TextProtocol:
    """The tokenisation of one protocol and the metrics over its tokens; metric names begin with `name/`."""

    name: str
    reference: Callable[[str], Tokens]  # tokenises a reference report
    generated: Callable[[str], Tokens]  # tokenises a generated report
    rouge: Callable[[str, str], tuple[float, float, float]]  # (reference, generated) -> precision, recall, F1
    coco: bool  # also report ROUGE-L as pycocoevalcap weights it
    wordnet: Any | None  # NLTK's reader; None: METEOR is absent

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics of this protocol, the BLEU orders first."""
        names = [f"bleu_{order}" for order in BLEU_ORDERS] + ["rouge_l"]
        names += ["rouge_l_beta_1.2"] * self.coco + ["meteor"] * (self.wordnet is not None)
        return tuple(f"{self.name}/{name}" for name in names)

    def add_report(self, sums: MetricSums, generated: str | None, reference: str, cluster: str) -> None:
        """Add one report; None is a report that was not generated, and counts as unscored in every metric."""
        counts = None
        values: dict[str, float | None] = dict.fromkeys(self.metrics[len(BLEU_ORDERS) :])
        if generated is not None:
            counts, values = self._score_report(self.generated(generated), self.reference(reference))
        for order in BLEU_ORDERS:
            add_totals(sums, f"{self.name}/bleu_{order}", partial(corpus_bleu, order=order), counts, cluster)
        for name, value in values.items():
            add_mean(sums, name, value, cluster)

    def _score_report(self, generated: Tokens, reference: Tokens) -> tuple[list[float], dict[str, float | None]]:
        precision, recall, f1 = self.rouge(" ".join(reference), " ".join(generated))
        values: dict[str, float | None] = {f"{self.name}/rouge_l": f1}
        if self.coco:
            values[f"{self.name}/rouge_l_beta_1.2"] = f_beta_score(precision, recall, COCO_BETA)
        if self.wordnet is not None:
            from nltk.translate.meteor_score import single_meteor_score

            meteor = single_meteor_score(reference, generated, wordnet=self.wordnet)
            values[f"{self.name}/meteor"] = float(meteor)
        return count_bleu_ngrams(generated, reference), values


def build_raw_protocol(wordnet: Any | None) -> TextProtocol:
    """Build the `raw` protocol: sacreBLEU's tokens (13a) for BLEU and METEOR, rouge-score's own for ROUGE-L."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()

    def tokens(text: str) -> Tokens:
        return str(tokenizer(text)).split()

    return TextProtocol("raw", tokens, tokens, _build_rouge_scorer(None), coco=False, wordnet=wordnet)


def build_r2gen_protocol(vocabulary: R2GenVocabulary, wordnet: Any | None) -> TextProtocol:
    """Build the `r2gen` protocol, with R2Gen's tokens for all metrics."""
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # type: ignore[misc]  # rouge-score has no types
        """Splits a text that is already tokenised at its spaces."""

        def tokenize(self, text: str) -> Tokens:
            return text.split()

    return TextProtocol(
        "r2gen",
        vocabulary.tokenize_reference,
        vocabulary.tokenize_generated,
        _build_rouge_scorer(Words()),
        coco=True,
        wordnet=wordnet,
    )


def try_load_wordnet() -> tuple[Any | None, str]:
    """Return WordNet's reader and its version, or None and the reason why WordNet is missing."""
    try:
        return load_wordnet()
    except WordNetMissing as missing:
        return None, str(missing)


def describe_implementations() -> dict[str, str]:
    """Return {metric: the package that computes it, with version and settings}."""
    return {
        "bleu": f"sacrebleu {version('sacrebleu')}, corpus BLEU, no smoothing, one reference",
        "rouge_l": f"rouge-score {version('rouge-score')}, F1 of the longest common subsequence, no stemming",
        "rouge_l_beta_1.2": f"rouge-score {version('rouge-score')}'s precision and recall, weighted as pycocoevalcap "
        f"does (beta {COCO_BETA})",
        "meteor": f"NLTK {version('nltk')} METEOR, alpha 0.9, beta 3, gamma 0.5, synonyms (not METEOR 1.5)",
    }


def f_beta_score(precision: float, recall: float, beta: float) -> float:
    """Compute F_β = (1 + β²) P R / (R + β² P) of precision P and recall R; 0 if both are 0."""
    weight = beta * beta
    denominator = recall + weight * precision
    return (1 + weight) * precision * recall / denominator if denominator else 0.0


def count_bleu_ngrams(generated: Sequence[str], reference: Sequence[str]) -> list[float]:
    """Count what corpus BLEU sums over reports (10,): 4 matching n-gram counts, 4 n-gram counts, both lengths."""
    score = _load_bleu().corpus_score([" ".join(generated)], [[" ".join(reference)]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def corpus_bleu(totals_K: NDArray[np.float64], *, order: int) -> float:
    """Compute BLEU-`order`, in [0, 1], from summed `count_bleu_ngrams` (10,)."""
    correct, total = totals_K[:order].astype(int).tolist(), totals_K[4 : 4 + order].astype(int).tolist()
    score = _load_bleu().compute_bleu(
        correct, total, int(totals_K[8]), int(totals_K[9]), smooth_method="none", max_ngram_order=order
    )
    return float(score.score) / 100


@lru_cache(maxsize=1)
def _load_bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # The text is tokenised already; `force` suppresses sacreBLEU's warning about that.
    return BLEU(tokenize="none", smooth_method="none", force=True)


def _build_rouge_scorer(tokenizer: Any | None) -> Callable[[str, str], tuple[float, float, float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=tokenizer)

    def score(reference: str, generated: str) -> tuple[float, float, float]:
        rouge_l = scorer.score(reference, generated)["rougeL"]
        return float(rouge_l.precision), float(rouge_l.recall), float(rouge_l.fmeasure)

    return score
