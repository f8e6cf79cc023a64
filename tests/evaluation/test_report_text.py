"""BLEU, ROUGE-L and METEOR against independent implementations, on real pairs of reports."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import numpy as np
import pytest

from clincot.evaluation.intervals import MetricSums
from clincot.evaluation.report_text.ngrams import (
    TextProtocol,
    build_r2gen_protocol,
    build_raw_protocol,
    corpus_bleu,
    count_bleu_ngrams,
    f_beta_score,
)
from clincot.evaluation.report_text.report_protocols import R2GenVocabulary
from tests.support import material

PAIRS = 220


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """(generated, reference): reports of different patients, so that they agree here and there."""
    texts = [text for text, _ in material.iu_reports()[: PAIRS + 1]]
    return list(pairwise(texts))


@pytest.fixture(scope="module", params=["raw", "r2gen"])
def protocol(request: pytest.FixtureRequest) -> TextProtocol:
    """Without WordNet, which takes seconds to read; METEOR has a test of its own."""
    if request.param == "raw":
        return build_raw_protocol(None)
    return build_r2gen_protocol(
        R2GenVocabulary.from_reports(text for text, _ in material.iu_reports()[1000:3000]), None
    )


def scores(protocol: TextProtocol, pairs: list[tuple[str, str]]) -> dict[str, float]:
    sums: MetricSums = {}
    for number, (generated, reference) in enumerate(pairs):
        protocol.add_report(sums, generated, reference, f"patient-{number}")
    values = {name: metric.compute_interval(seed=0, resamples=1).value for name, metric in sums.items()}
    return {name: value for name, value in values.items() if value is not None}


def tokens(protocol: TextProtocol, pairs: list[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    return [protocol.generated(g) for g, _ in pairs], [protocol.reference(r) for _, r in pairs]


def test_bleu_is_nltks_and_pycocoevalcaps(protocol: TextProtocol, pairs: list[tuple[str, str]]) -> None:
    from nltk.translate.bleu_score import corpus_bleu as nltk_bleu

    sys.path.insert(0, str(material.coco_scorers()))
    from pycocoevalcap.bleu.bleu import Bleu

    ours = scores(protocol, pairs)
    generated, references = tokens(protocol, pairs)
    coco, _ = Bleu(4).compute_score(
        {i: [" ".join(r)] for i, r in enumerate(references)},
        {i: [" ".join(g)] for i, g in enumerate(generated)},
        verbose=0,
    )
    for order in (1, 2, 3, 4):
        value = ours[f"{protocol.name}/bleu_{order}"]
        assert 0.02 < value < 0.6
        theirs = nltk_bleu([[r] for r in references], generated, weights=(1 / order,) * order)
        assert value == pytest.approx(theirs, abs=1e-6)
        assert value == pytest.approx(coco[order - 1], abs=1e-6)


def longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(row[j], before[j + 1])
    return row[-1]


def test_rouge_l_is_the_definition_and_pycocoevalcaps(pairs: list[tuple[str, str]]) -> None:
    vocabulary = R2GenVocabulary.from_reports(text for text, _ in material.iu_reports()[1000:3000])
    protocol = build_r2gen_protocol(vocabulary, None)
    sys.path.insert(0, str(material.coco_scorers()))
    from pycocoevalcap.rouge.rouge import Rouge

    ours = scores(protocol, pairs)
    generated, references = tokens(protocol, pairs)
    common = [longest_common(g, r) for g, r in zip(generated, references, strict=True)]
    f1 = [2 * n / (len(g) + len(r)) for n, g, r in zip(common, generated, references, strict=True)]
    assert ours["r2gen/rouge_l"] == pytest.approx(np.mean(f1), abs=1e-6)
    coco, _ = Rouge().compute_score(
        {i: [" ".join(r)] for i, r in enumerate(references)}, {i: [" ".join(g)] for i, g in enumerate(generated)}
    )
    assert ours["r2gen/rouge_l_beta_1.2"] == pytest.approx(coco, abs=1e-6)


def test_raw_rouge_l_is_rouge_scores(pairs: list[tuple[str, str]]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    theirs = np.mean([scorer.score(target=r, prediction=g)["rougeL"].fmeasure for g, r in pairs])
    assert scores(build_raw_protocol(None), pairs)["raw/rouge_l"] == pytest.approx(theirs, abs=1e-6)


def test_meteor_is_nltks_mean(pairs: list[tuple[str, str]]) -> None:
    """NLTK called by itself, on tokens that sacreBLEU's own function made."""
    material.need_wordnet()
    from nltk.translate.meteor_score import meteor_score
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    from clincot.evaluation.report_text.wordnet import load_wordnet

    wordnet, version = load_wordnet()
    assert version.startswith("WordNet 3")
    cut = Tokenizer13a()
    theirs = [meteor_score([cut(r).split()], cut(g).split(), wordnet=wordnet) for g, r in pairs]
    ours = scores(build_raw_protocol(wordnet), pairs)
    assert ours["raw/meteor"] == pytest.approx(np.mean(theirs), abs=1e-6)
    assert 0.1 < ours["raw/meteor"] < 0.6
    # fluid/liquid are synonyms and effusions/effusion share a stem: 2 of 2 words in one chunk, penalty .5 * (1/2)³
    assert meteor_score([["effusion", "fluid"]], ["effusions", "liquid"], wordnet=wordnet) == (
        pytest.approx(1 - 0.5 / 8)
    )


def test_identical_report_scores_1_missing_one_is_unscored() -> None:
    protocol = build_raw_protocol(None)
    sums: MetricSums = {}
    protocol.add_report(sums, "No pleural effusion is seen.", "No pleural effusion is seen.", "a")
    protocol.add_report(sums, None, "The heart is enlarged.", "b")
    for metric in sums.values():
        interval = metric.compute_interval(seed=0)
        assert (interval.value, interval.n, interval.n_unscored, interval.clusters) == (1.0, 1, 1, 1)


def test_an_empty_report_scores_0_but_is_scored() -> None:
    sums: MetricSums = {}
    build_raw_protocol(None).add_report(sums, "", "The heart is enlarged.", "a")
    assert {metric.compute_interval(seed=0).value for metric in sums.values()} == {0.0}
    assert {metric.compute_interval(seed=0).n for metric in sums.values()} == {1}


def test_bleu_by_hand() -> None:
    """ "no effusion seen" against "no effusion is seen": 3 of 3 words, 1 of 2 pairs, 3 words against 4."""
    counts = np.array(count_bleu_ngrams(["no", "effusion", "seen"], ["no", "effusion", "is", "seen"]))
    brevity = math.exp(1 - 4 / 3)
    assert corpus_bleu(counts, order=1) == pytest.approx(brevity)
    assert corpus_bleu(counts, order=2) == pytest.approx(brevity * math.sqrt(1 * 1 / 2))
    assert corpus_bleu(counts, order=3) == 0.0  # no triple is shared: unsmoothed, that is 0


def test_f_beta_weighs_recall() -> None:
    assert f_beta_score(0.5, 0.5, 1.2) == pytest.approx(0.5)
    assert f_beta_score(0.2, 0.8, 1.2) > f_beta_score(0.8, 0.2, 1.2)
    assert f_beta_score(0.0, 0.0, 1.2) == 0.0
