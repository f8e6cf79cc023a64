"""Published results of the policies that recipes are for, with their sources.

They stand beside measured rows for orientation. Scorers differ: the base model LLaVA-Med 1.5 has 64 % of VQA-RAD's
closed questions in one table and 53 % by another scorer, so a difference to these rows is no measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clincot.text import markdown_table

WARNING = (
    "Published rows are other people's measurements with other scorers, prompts and splits: the same base model "
    "differs by 11 points between two of them (MedEvalKit issue 13). Compare methods within one run only."
)
_MMEDPO = "arXiv 2412.06141, table 1"
_LINGSHU = "arXiv 2506.07044, table 6"
_LLAVA_MED, _MEDGEMMA = "LLaVA-Med 1.5 7B", "MedGemma 4B"


@dataclass(frozen=True)
class PublishedRow:
    """One published result."""

    policy: str  # title of the policy; "": of another one, on the same data
    method: str
    benchmark: str  # as `clincot compare` names it: slake, vqa-rad, iu-xray
    metric: str
    value: float | None  # in percent; None: not known
    source: str


def _list_mmedpo_rows() -> Iterable[PublishedRow]:
    rows = {
        "slake": (
            ("base", 44.26, 61.30),
            ("DPO", 49.30, 62.02),
            ("STLLaVA-Med", 48.65, 61.75),
            ("POVID", 52.43, 70.35),
            ("FiSAO", 52.69, 70.46),
            ("MMedPO", 53.99, 73.08),
            ("SFT", 50.45, 65.62),
            ("SFT, then MMedPO", 55.23, 75.24),
        ),
        "vqa-rad": (
            ("base", 29.24, 63.97),
            ("DPO", 29.76, 64.70),
            ("MMedPO", 36.36, 66.54),
            ("SFT", 31.38, 64.26),
        ),
    }
    for benchmark, results in rows.items():
        for method, recall, closed in results:
            yield PublishedRow(_LLAVA_MED, method, benchmark, "open recall", recall, _MMEDPO)
            yield PublishedRow(_LLAVA_MED, method, benchmark, "closed accuracy", closed, _MMEDPO)


def _list_base_rows() -> Iterable[PublishedRow]:
    """The base models by one scorer (MedEvalKit); the LLaVA-Med of that table is version 1.5, as its toolkit loads."""
    for policy, vqa_rad, slake in (
        (_LLAVA_MED, 53.7, 48.0),
        ("HuatuoGPT-Vision 7B", 67.0, 67.8),
        (_MEDGEMMA, 72.5, 76.4),
        ("Qwen2.5-VL 7B", 64.5, 67.2),
        ("Lingshu 7B", 67.9, 83.1),
    ):
        yield PublishedRow(policy, "base", "vqa-rad", "accuracy", vqa_rad, _LINGSHU)
        yield PublishedRow(policy, "base", "slake", "accuracy", slake, _LINGSHU)


PUBLISHED_ROWS: tuple[PublishedRow, ...] = (
    *_list_mmedpo_rows(),
    *_list_base_rows(),
    PublishedRow(_LLAVA_MED, "base", "vqa-rad", "closed accuracy", 53.0, "MedEvalKit, issue 13"),
    PublishedRow(
        _MEDGEMMA, "base", "vqa-rad", "accuracy", 49.9, "its technical report, as quoted in MedEvalKit, issue 21"
    ),
    *(
        PublishedRow(_LLAVA_MED, "ClinCoT", benchmark, "any", None, "arXiv 2603.01124: its tables are not public text")
        for benchmark in ("slake", "vqa-rad", "iu-xray")
    ),
    PublishedRow("", "MedVR", "slake", "accuracy", 85.3, "arXiv 2604.08203"),
    PublishedRow("", "MedVR", "vqa-rad", "accuracy", 74.4, "arXiv 2604.08203"),
)


def find_published_rows(policy: str, benchmark: str) -> list[PublishedRow]:
    """The rows of a policy on a benchmark, then those of other policies on it."""
    of_benchmark = [row for row in PUBLISHED_ROWS if row.benchmark == benchmark]
    ours = [row for row in of_benchmark if policy and row.policy == policy]
    return ours + [row for row in of_benchmark if not row.policy]


def render_published_rows(rows: Iterable[PublishedRow]) -> str:
    """Render them as a Markdown table with their sources."""
    head = ("published", "method", "metric", "%", "source")
    cells = [
        (row.policy or "another policy", row.method, row.metric, format_percent(row.value), row.source) for row in rows
    ]
    return markdown_table(head, cells)


def format_percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:g}"
