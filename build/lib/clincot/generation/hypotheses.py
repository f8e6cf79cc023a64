"""Hypotheses: findings to look for, chosen from the question, the modality and a vocabulary.

The vocabulary is this project's own: common names of findings in chest radiographs, CT of head and abdomen and MR of
the brain, with the synonyms that questions use. It chooses what to look for and is not an ontology. Negation is ignored
on purpose: "no effusion?" is a reason to look for an effusion.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

NORMAL = "normal"

# finding -> synonyms, in the singular and in American spelling; plurals and -ae-/-oe-/-our- are matched as well.
FINDINGS: dict[str, tuple[str, ...]] = {
    # chest
    "nodule": ("nodular", "nodular opacity", "coin lesion"),
    "pleural effusion": (
        "effusion",
        "pleural fluid",
        "hydrothorax",
        "hemothorax",
        "fluid in the pleural space",
        "blunted costophrenic angle",
        "costophrenic angle blunting",
        "blunting of the costophrenic angle",
    ),
    "consolidation": (
        "consolidated",
        "infiltrate",
        "infiltration",
        "airspace disease",
        "airspace opacity",
        "air bronchogram",
    ),
    "pneumothorax": ("pneumothoraces", "ptx", "hydropneumothorax"),
    "cardiomegaly": (
        "enlarged heart",
        "heart enlargement",
        "enlargement of the heart",
        "cardiac enlargement",
        "heart size",
        "enlarged cardiac silhouette",
        "enlarged cardiomediastinal silhouette",
        "cardiac hypertrophy",
    ),
    "atelectasis": ("atelectatic", "collapse", "collapsed lung", "lung volume loss"),
    "pneumonia": ("pneumonic", "bronchopneumonia"),
    "pulmonary edema": ("lung edema", "pulmonary congestion", "vascular congestion", "kerley line", "heart failure"),
    "opacity": ("opacification", "opacified", "ground glass"),
    "emphysema": ("emphysematous", "copd", "bulla", "bullous"),
    "hyperinflation": ("hyperinflated", "hyperexpanded", "air trapping", "flattened diaphragm"),
    "interstitial lung disease": (
        "pulmonary fibrosis",
        "lung fibrosis",
        "fibrosis",
        "interstitial marking",
        "interstitial opacity",
        "interstitial pattern",
    ),
    "bronchiectasis": ("bronchiectatic",),
    "tuberculosis": ("tb", "miliary"),
    "cavitary lesion": ("cavitary", "cavitary mass", "cavitation"),  # not "cavity", which is a place
    "granuloma": ("granulomatous",),
    "hilar enlargement": (
        "enlarged hilum",
        "prominent hilum",
        "hilar lymphadenopathy",
        "hilar adenopathy",
        "hilar mass",
    ),
    "widened mediastinum": ("mediastinal widening", "wide mediastinum", "mediastinal mass"),
    "pneumomediastinum": ("mediastinal air",),
    "tracheal deviation": ("deviated trachea", "deviation of the trachea", "tracheal shift"),
    "elevated hemidiaphragm": ("raised hemidiaphragm", "elevated diaphragm", "elevation of the hemidiaphragm"),
    "pleural thickening": ("pleural plaque",),
    "pericardial effusion": ("pericardial fluid",),
    "rib fracture": ("fractured rib", "broken rib"),
    "subcutaneous emphysema": ("subcutaneous air", "subcutaneous gas"),
    "pulmonary embolism": ("pulmonary embolus", "embolism", "embolus"),
    "hiatal hernia": ("hiatus hernia",),
    "scoliosis": ("scoliotic",),
    "medical device": (
        "catheter",
        "central line",
        "picc line",
        "endotracheal tube",
        "nasogastric tube",
        "chest tube",
        "tube",
        "pacemaker",
        "stent",
        "sternotomy wire",
    ),
    # head
    "hemorrhage": ("hemorrhagic", "bleed", "bleeding", "intracranial hemorrhage", "intraparenchymal hemorrhage"),
    "hematoma": (),
    "subdural hematoma": ("subdural hemorrhage", "subdural collection", "subdural"),
    "epidural hematoma": ("extradural hematoma", "epidural hemorrhage", "epidural", "extradural"),
    "subarachnoid hemorrhage": ("subarachnoid blood",),
    "infarct": ("infarction", "infarcted", "stroke", "ischemia", "ischemic", "restricted diffusion"),
    "midline shift": ("shift of the midline", "shifted midline", "midline shifted", "midline deviation"),
    "mass effect": (),
    "hydrocephalus": ("ventriculomegaly", "enlarged ventricle", "dilated ventricle", "ventricular enlargement"),
    "cerebral edema": ("brain edema", "vasogenic edema", "sulcal effacement", "brain swelling"),
    "brain tumor": ("brain mass", "glioma", "glioblastoma", "astrocytoma", "intracranial mass"),
    "meningioma": (),
    "ring enhancing lesion": ("ring enhancement", "ring enhancing"),
    "white matter lesion": (
        "white matter hyperintensity",
        "white matter disease",
        "hyperintensity",
        "leukoaraiosis",
        "small vessel disease",
    ),
    "multiple sclerosis": ("demyelination", "demyelinating"),
    "brain herniation": ("herniation", "herniated"),
    "atrophy": ("atrophic", "atrophied"),
    "skull fracture": ("fractured skull", "calvarial fracture"),
    "pneumocephalus": ("intracranial air",),
    "sinusitis": ("sinus opacification", "sinus disease"),
    # abdomen
    "liver lesion": ("liver mass", "liver metastasis", "hepatic lesion", "hepatic mass", "hepatic metastasis"),
    "cirrhosis": ("cirrhotic",),
    "hepatic steatosis": ("fatty liver", "steatosis"),
    "hepatomegaly": ("enlarged liver",),
    "splenomegaly": ("enlarged spleen",),
    "gallstone": ("cholelithiasis",),
    "cholecystitis": ("gallbladder wall thickening",),
    "pancreatitis": ("inflamed pancreas",),
    "pancreatic mass": ("pancreatic lesion",),
    "renal cyst": ("kidney cyst",),
    "renal mass": ("kidney mass", "renal lesion", "kidney lesion"),
    "kidney stone": ("renal stone", "nephrolithiasis", "renal calculus", "renal calculi"),
    "hydronephrosis": ("hydronephrotic",),
    "ascites": ("free fluid", "abdominal fluid", "peritoneal fluid"),
    "pneumoperitoneum": (
        "free air",
        "free gas",
        "intraperitoneal air",
        "subdiaphragmatic air",
        "air under the diaphragm",
        "air below the diaphragm",
    ),
    "bowel obstruction": ("obstruction", "dilated bowel", "dilated bowel loop", "distended bowel", "ileus"),
    "bowel wall thickening": ("wall thickening", "thickened bowel"),
    "intussusception": (),
    "appendicitis": ("inflamed appendix",),
    "diverticulitis": ("diverticulosis", "diverticulum"),
    "fat stranding": ("stranding",),
    "hernia": (),
    "aortic aneurysm": ("aaa", "dilated aorta", "aortic dilation"),
    # anywhere
    "lesion": ("lesional",),
    "mass": (),
    "tumor": ("neoplasm", "neoplastic", "malignancy", "malignant", "cancer", "carcinoma"),
    "metastasis": ("metastatic",),
    "cyst": ("cystic",),
    "abscess": (),
    "fluid collection": ("air fluid level", "loculated fluid"),
    "edema": ("edematous", "swelling", "swollen"),
    "calcification": ("calcified",),
    "lymphadenopathy": ("adenopathy", "enlarged lymph node"),
    "aneurysm": ("aneurysmal",),
    "fracture": ("fractured", "broken bone"),
    "foreign body": ("foreign object",),
}

# What to look for when the question names no finding, the likeliest first.
VOCABULARIES: dict[str, tuple[str, ...]] = {
    "chest": (
        "nodule",
        "pleural effusion",
        "consolidation",
        "pneumothorax",
        "cardiomegaly",
        "atelectasis",
        "pneumonia",
        "pulmonary edema",
        "opacity",
        "mass",
        "rib fracture",
        "emphysema",
        "interstitial lung disease",
        "hilar enlargement",
        "widened mediastinum",
        "elevated hemidiaphragm",
        "tracheal deviation",
        "pneumoperitoneum",
        "aortic aneurysm",
        "medical device",
    ),
    "head CT": (
        "hemorrhage",
        "infarct",
        "mass",
        "midline shift",
        "hydrocephalus",
        "cerebral edema",
        "subdural hematoma",
        "epidural hematoma",
        "subarachnoid hemorrhage",
        "skull fracture",
        "atrophy",
        "calcification",
        "sinusitis",
    ),
    "brain MR": (
        "brain tumor",
        "infarct",
        "white matter lesion",
        "cerebral edema",
        "hydrocephalus",
        "hemorrhage",
        "ring enhancing lesion",
        "midline shift",
        "multiple sclerosis",
        "atrophy",
        "meningioma",
        "abscess",
        "sinusitis",
    ),
    "abdomen": (
        "mass",
        "liver lesion",
        "ascites",
        "bowel obstruction",
        "fat stranding",
        "renal cyst",
        "kidney stone",
        "hydronephrosis",
        "gallstone",
        "pancreatitis",
        "appendicitis",
        "diverticulitis",
        "aortic aneurysm",
        "lymphadenopathy",
        "pneumoperitoneum",
        "bowel wall thickening",
        "hepatic steatosis",
        "splenomegaly",
        "cholecystitis",
        "renal mass",
        "pancreatic mass",
        "abscess",
    ),
    "general": ("lesion", "mass", "fracture", "hemorrhage", "fluid collection", "calcification", "edema", "cyst"),
}

# Body part -> the words that indicate it.
_BODY_PART_WORDS: dict[str, str] = {
    "chest": "chest thorax thoracic cxr lung pulmonary pleura pleural heart cardiac mediastinum mediastinal rib "
    "trachea",
    "head": "head brain cranial intracranial skull cerebral cerebellum cerebellar ventricle sulcus gyrus neuro",
    "abdomen": "abdomen abdominal abd pelvis pelvic liver hepatic kidney renal spleen splenic pancreas pancreatic "
    "bowel colon stomach gallbladder appendix intestine peritoneum",
    "general": "hand wrist elbow shoulder knee ankle foot hip leg arm femur tibia breast mammography skin neck spine",
}
_RADIOGRAPH_WORDS = {"radiograph", "radiography", "xray", "cr", "dx"}  # chest, unless another body part is named
_MR_WORDS = {"mr", "mri", "flair", "dwi"}
_CT_WORDS = {"ct", "cect", "ncct"}

# Organ words of a question -> the findings of a vocabulary that are moved to the front.
_ORGAN_FINDINGS: dict[str, tuple[str, ...]] = {
    "heart cardiac cardiothoracic": ("cardiomegaly",),
    "pleura pleural costophrenic": ("pleural effusion", "pneumothorax"),
    "diaphragm hemidiaphragm": ("elevated hemidiaphragm", "pleural effusion", "pneumoperitoneum"),
    "mediastinum mediastinal": ("widened mediastinum",),
    "hilum hilar": ("hilar enlargement",),
    "trachea tracheal": ("tracheal deviation",),
    "rib": ("rib fracture",),
    "aorta aortic": ("aortic aneurysm",),
    "ventricle": ("hydrocephalus",),
    "skull": ("skull fracture",),
    "sinus": ("sinusitis",),
    "midline": ("midline shift",),
    "sulcus gyrus cortex": ("atrophy", "cerebral edema"),
    "liver hepatic": ("liver lesion", "hepatic steatosis"),
    "spleen splenic": ("splenomegaly",),
    "gallbladder": ("gallstone", "cholecystitis"),
    "pancreas pancreatic": ("pancreatitis", "pancreatic mass"),
    "kidney renal": ("renal cyst", "renal mass", "kidney stone", "hydronephrosis"),
    "bowel colon intestine": ("bowel obstruction", "bowel wall thickening", "diverticulitis"),
    "appendix": ("appendicitis",),
    "peritoneum peritoneal": ("ascites", "pneumoperitoneum"),
}


def choose_hypotheses(question: str, *, modality: str = "", limit: int = 6) -> tuple[str, ...]:
    """Choose at most `limit` hypotheses; the last one is always "normal", which counts towards the limit.

    A question that names findings gets only those, in its order: looking for anything else would take regions away from
    them. Any other question gets the vocabulary of the modality, with the findings of organs that it names first.
    """
    if limit < 1:
        raise ValueError(f"expected room for at least 'normal', got a limit of {limit}")
    words = _split_words(question)
    findings = _find_named_findings(words) or _choose_vocabulary(words, _split_words(modality))
    return (*findings[: limit - 1], NORMAL)


def _find_named_findings(words: Sequence[str]) -> list[str]:
    """The findings that a question names, in its order; of overlapping names the longest ("pericardial effusion")."""
    return list(dict.fromkeys(_FINDING_BY_FORM[form] for form in _FINDING_PATTERN.findall(" ".join(words))))


def _choose_vocabulary(question: Sequence[str], modality: Sequence[str]) -> list[str]:
    """The findings of the body part that the modality, or else the question, names; findings of named organs first."""
    words = {*modality, *question}
    body_part = _find_body_part(modality) or _find_body_part(question)
    if not body_part:  # a radiograph without a body part is most likely one of the chest
        radiograph = words & _RADIOGRAPH_WORDS or "x ray" in " ".join(modality) or "x ray" in " ".join(question)
        body_part = "chest" if radiograph else "general"
    names = [body_part]
    if body_part == "head":
        by_modality = (("head CT", _CT_WORDS), ("brain MR", _MR_WORDS))
        names = [name for name, modality_words in by_modality if words & modality_words] or ["head CT", "brain MR"]
    # with two vocabularies, their findings alternate, so that a limit cuts both alike
    interleaved = chain.from_iterable(zip_longest(*(VOCABULARIES[name] for name in names)))
    findings = list(dict.fromkeys(finding for finding in interleaved if finding is not None))
    of_named_organs: set[str] = set()
    for word in question:
        of_named_organs.update(_FINDINGS_BY_ORGAN.get(word, ()))
    return sorted(findings, key=lambda finding: finding not in of_named_organs)  # stable: otherwise in their order


def _find_body_part(words: Sequence[str]) -> str:
    return next((_BODY_PART_BY_FORM[word] for word in words if word in _BODY_PART_BY_FORM), "")


def _split_words(text: str) -> list[str]:
    """Lower-case words in American spelling, without punctuation.

    "X-ray: no Haemorrhage?" becomes x, ray, no, hemorrhage.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    spelled = plain.replace("ae", "e").replace("oe", "e").replace("our", "or")
    return re.sub(r"[\W_]+", " ", spelled).split()


def _inflect_term(term: str) -> set[str]:
    """A term and its plurals, spelled as _split_words spells them."""
    forms = {term, f"{term}s"}
    if term.endswith(("s", "x", "z", "ch", "sh")):
        forms.add(f"{term}es")
    for singular, plural in (("y", "ies"), ("is", "es"), ("um", "a"), ("us", "i"), ("a", "ae"), ("x", "ces")):
        if term.endswith(singular):
            forms.add(term.removesuffix(singular) + plural)
    return {" ".join(_split_words(form)) for form in forms}


def _index_forms(named: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """Map every form of a term to the name of its entry; a form of two entries is a mistake in the tables above."""
    index: dict[str, str] = {}
    for name, terms in named:
        forms: set[str] = set()
        for term in terms:
            forms |= _inflect_term(term)
        for form in sorted(forms):
            if index.setdefault(form, name) != name:
                raise ValueError(f"{form!r} names both {index[form]!r} and {name!r}")
    return index


def _index_organ_findings() -> dict[str, tuple[str, ...]]:
    """Map every form of an organ word to the findings of that organ."""
    index: dict[str, tuple[str, ...]] = {}
    for words, findings in _ORGAN_FINDINGS.items():
        for word in words.split():
            index.update(dict.fromkeys(_inflect_term(word), findings))
    return index


_FINDING_BY_FORM = _index_forms((finding, (finding, *synonyms)) for finding, synonyms in FINDINGS.items())
_FINDING_PATTERN = re.compile(
    rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, _FINDING_BY_FORM), key=lambda t: (-len(t), t)))})(?!\w)"
)
_BODY_PART_BY_FORM = _index_forms((body_part, words.split()) for body_part, words in _BODY_PART_WORDS.items())
_FINDINGS_BY_ORGAN = _index_organ_findings()
