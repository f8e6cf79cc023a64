"""Hypotheses from questions: what is named comes first and alone, else the vocabulary of the place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clincot.generation.hypotheses import FINDINGS, VOCABULARIES, choose_hypotheses
from clincot.synthetic.lesions import FINDINGS as BENCHMARK
from clincot.synthetic.question_templates import TOPIC_ANSWERS, TOPIC_FINDINGS, list_wordings


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Is there a nodule?", ("nodule",)),
        ("How many NODULES are there?", ("nodule",)),
        ("Is there a pleural effusion on the left?", ("pleural effusion",)),
        ("Are there effusions or a pneumothorax?", ("pleural effusion", "pneumothorax")),
        ("Pneumothorax, or effusion?", ("pneumothorax", "pleural effusion")),  # in the question's order
        ("Is there no consolidation?", ("consolidation",)),  # negation is no reason not to look
        ("Is there a pericardial effusion?", ("pericardial effusion",)),  # not a pleural one
        ("Are the fractured ribs on the left?", ("rib fracture",)),
        ("Are there metastases?", ("metastasis",)),
        ("Do you see masses?", ("mass",)),
        ("Are there calcified nodules, nodular opacities or a nodule?", ("calcification", "nodule")),  # each once
        ("Are bullae present?", ("emphysema",)),
        ("Is there a haemorrhage, oedema or a tumour?", ("hemorrhage", "edema", "tumor")),
        ("Ring-enhancing lesion?", ("ring enhancing lesion",)),
        ("Are there diverticula?", ("diverticulitis",)),
        ("Do you see abscesses, or kidney stones?", ("abscess", "kidney stone")),
        ("Is the nodule smooth, spiculated or cavitating?", ("nodule",)),
    ],
)
def test_findings_that_a_question_names(question: str, named: tuple[str, ...]) -> None:
    for modality in ("", "chest x-ray", "head CT or MR"):
        assert choose_hypotheses(question, modality=modality) == (*named, "normal")


@pytest.mark.parametrize(
    "question",
    ["Is the massive heart shadow left?", "Is this cystoscopy?", "Is the abdominal cavity seen?", "Nodulex?"],
)
def test_words_match_whole(question: str) -> None:
    """ "massive" is no mass, "cystoscopy" no cyst: nothing is named, so the vocabulary is listed."""
    assert choose_hypotheses(question, modality="knee x-ray") == choose_hypotheses("?", modality="knee x-ray")


CHEST = ("nodule", "pleural effusion", "consolidation", "pneumothorax", "cardiomegaly", "normal")


@pytest.mark.parametrize("modality", ["chest x-ray", "rendered radiograph", "CXR", "X-ray", "CT thorax", "XRAY"])
def test_a_radiograph_is_searched_for_the_findings_of_a_chest(modality: str) -> None:
    assert choose_hypotheses("What is the finding?", modality=modality) == CHEST


def test_the_limit_counts_normal() -> None:
    assert choose_hypotheses("What is the finding?", modality="CXR", limit=3) == (
        "nodule",
        "pleural effusion",
        "normal",
    )
    assert choose_hypotheses("Nodule, mass, cyst or edema?", limit=3) == ("nodule", "mass", "normal")
    assert choose_hypotheses("Nodule?", limit=1) == ("normal",)
    assert choose_hypotheses("?", modality="CXR", limit=500) == (*VOCABULARIES["chest"], "normal")
    with pytest.raises(ValueError, match="got a limit of 0"):
        choose_hypotheses("Nodule?", limit=0)


def test_organs_of_the_question_come_first() -> None:
    assert choose_hypotheses("Is the heart enlarged?", modality="CXR", limit=3) == ("cardiomegaly", "nodule", "normal")
    assert choose_hypotheses("Are the ribs intact?", modality="CXR", limit=2) == ("rib fracture", "normal")
    assert choose_hypotheses("Are the kidneys normal?", modality="abdominal CT", limit=3)[:2] == (
        "renal cyst",
        "kidney stone",
    )


def test_the_question_names_the_body_part_if_modality_does_not() -> None:
    assert choose_hypotheses("What is in the liver?")[0] == "liver lesion"
    assert choose_hypotheses("Which lobe of the brain is it?", modality="CT")[:-1] == VOCABULARIES["head CT"][:5]
    assert choose_hypotheses("What is wrong with the brain on this MRI?")[:-1] == VOCABULARIES["brain MR"][:5]
    assert choose_hypotheses("Where is it?", modality="knee x-ray")[:-1] == VOCABULARIES["general"][:5]
    assert choose_hypotheses("Where is it?")[:-1] == VOCABULARIES["general"][:5]
    assert choose_hypotheses("Where is it in the wrist?", modality="x-ray")[:-1] == VOCABULARIES["general"][:5]
    assert choose_hypotheses("¿Dónde está? 在哪里")[:-1] == VOCABULARIES["general"][:5]


def test_a_head_that_may_be_ct_or_mr_gets_both_in_turn() -> None:
    """VQA-RAD says no more than that. CT: hemorrhage, infarct, mass; MR: brain tumor, infarct, white matter lesion."""
    assert choose_hypotheses("What is the pathology?", modality="head CT or MR", limit=6) == (
        "hemorrhage",
        "brain tumor",
        "infarct",
        "mass",
        "white matter lesion",
        "normal",
    )


@pytest.mark.parametrize("finding", BENCHMARK)
def test_every_benchmark_question_gets_its_own_finding(finding: str) -> None:
    """A question that names a finding gets it; one that asks which (no finding named) gets all five."""
    for topic, subjects in TOPIC_FINDINGS.items():
        for _, text in list_wordings(topic, finding if finding in subjects else next(iter(subjects))):
            named = choose_hypotheses(text, modality="rendered radiograph")
            if finding in subjects:
                assert named == (finding, "normal"), text
            if "" in subjects:
                assert named == CHEST, text
    assert set(CHEST[:-1]) == set(BENCHMARK) == set(TOPIC_ANSWERS["which finding"])


@pytest.mark.parametrize("finding", FINDINGS)
def test_findings_match_by_name_plural_and_synonyms(finding: str) -> None:
    """Every finding is recognised by its name, its plural and its synonyms."""
    for term in (finding, *FINDINGS[finding]):
        assert choose_hypotheses(f"Is there {term.upper()}?") == (finding, "normal"), term


def test_the_vocabularies_hold_known_findings_once() -> None:
    for place, listed in VOCABULARIES.items():
        assert set(listed) <= set(FINDINGS), place
        assert len(set(listed)) == len(listed), place
    assert "normal" not in FINDINGS


def test_the_same_in_every_process() -> None:
    """Sets of words are used inside; their order differs from process to process and must not show."""
    code = (
        "from clincot.generation.hypotheses import choose_hypotheses as h\n"
        "print([h(q, modality=m, limit=9) for q in ('what?', 'heart and ribs?', 'nodules or masses?')"
        " for m in ('', 'CXR', 'head CT or MR')])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""
