"""A policy that always gives the reference answer passes the gate, on the answers of every data set with a reader.

The closed answers of SLAKE are all 91 of its release (xiaoman-zhang/PMC-VQA, commit 97358cdb, Slake1.0/*.json); 32.3 %
of the Chinese and 1.8 % of the English ones used to count as off format, against 2 % that the gate allows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clincot.config import DecideConfig, EvaluateConfig
from clincot.datasets.folder import StudyIndex
from clincot.datasets.hub_vqa import ingest_hf
from clincot.datasets.jsonl_vqa import ingest_jsonl
from clincot.datasets.slake import ingest_slake
from clincot.datasets.vqa_rad import ingest_vqa_rad
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.benchmark_report import build_benchmark_reports
from clincot.evaluation.blind_baseline import BlindBaseline
from clincot.evaluation.evaluator import evaluate_policy
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.models.protocols import Generation
from clincot.promotion.gate import Comparison, run_gate
from clincot.prompts import Conversation
from clincot.records import Outcome
from tests.datasets import test_slake as slake
from tests.datasets import test_vqa_rad as vqa_rad
from tests.support.bright import BrightPolicy

PATIENTS = 120
SLAKE_ZH = """
不是 不包含 包含 是的 没有 有 肺 肝脏 不可以 可以 横断面 存在 是 左侧 T1 T2 心脏 右侧 脾脏 冠状面 不正常 包括 肾脏 CT
小肠 X光 核磁共振 白色 直肠 不包括 不存在 低密度 高密度 左肾 否 膀胱 胃 顶部 健康 结肠 都是 灰色 右下 食管 正常 肺脏
几乎相等 十二指肠 左肾脏 左肺 右肺 无异常
"""
SLAKE_EN = """
Yes,No,Lung,Liver,Heart,Right,Transverse Plane,Left,T2,Coronal Plane,T1,Kidney,Spleen,Colon,Small Bowel,CT,MRI,
Hyperdense,Rectum,Bladder,Right Kidney,X-Ray,Hypodense,White,Left Kidney,Esophagus,Both,Left Lung,Lower Right,Top,
Almost the same,Gray,Spinal Cord,Duodenum,Stomach,Right Lung,Small bowel,Spinal cord,Right lung
"""


def cycle(answers: Sequence[str]) -> list[str]:
    return [answers[number % len(answers)] for number in range(PATIENTS)]


def build_slake(folder: Path, language: str, answers: Sequence[str]) -> Path:
    rows = [
        slake.row(10 + n, n, q_lang=language, question=f"{n}?", answer=answer, content_type=f"Organ{n // 2 % 2}")
        for n, answer in enumerate(cycle(answers))
    ]
    others = {part: [slake.row(at, 500 + at, q_lang=language)] for at, part in enumerate(("train", "validate"), 1)}
    source = slake.release(folder / "source", test=rows, **others)
    ingest_slake(source, folder / "out", language="zh" if language == "zh" else "en", workers=1)
    return folder / "out" / "test"


def build_vqa_rad(folder: Path) -> Path:
    """Its test set has the closed answers "Left" and "Both" beside yes and no, and open ones."""
    answers = cycle(["Yes", "No", "Left", "Both", "yes", "no ", "Right side", "Axial"])
    rows = [
        vqa_rad.row(n, f"{n}.png", phrase_type="test_freeform", answer=answer, question=f"{n}?",
                    answer_type="OPEN" if n % 8 > 5 else "CLOSED", question_type=f"TYPE{n % 3}")
        for n, answer in enumerate(answers)
    ]  # fmt: off
    source = vqa_rad.release(folder / "source", [*rows, vqa_rad.row(900, "train.png")])
    ingest_vqa_rad(source, folder / "out", split="official", workers=1)
    return folder / "out" / "test"


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16), dtype=np.uint8)).save(path)


def build_jsonl(folder: Path, answers: Sequence[str]) -> Path:
    source = folder / "source"
    for n in range(PATIENTS):
        write_image(source / f"{n}.png", n)
    rows = [
        {"image": f"{n}.png", "question": f"{n}?", "answer": a, "kind": "closed"} for n, a in enumerate(cycle(answers))
    ]
    (source / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest_jsonl(source / "rows.jsonl", folder / "out", workers=1)
    return folder / "out"


def build_choices(folder: Path) -> Path:
    """The columns of PMC-VQA."""
    source = folder / "source"
    for n in range(PATIENTS):
        write_image(source / "images" / f"{n}.png", n)
    with (source / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Figure_path", "Question", "Choice A", "Choice B", "Answer", "Answer_label"])
        for n in range(PATIENTS):
            right = n % 2
            row = [f"{n}.png", f"{n}?", f" A:Mass {n} ", f" B:Cyst {n} ", f"{['Mass', 'Cyst'][right]} {n}", "AB"[right]]
            writer.writerow(row)
    ingest_hf(source, folder / "out", workers=1)
    return folder / "out" / "test"


class Answerer(BrightPolicy):
    """Gives the answer of a table to the question that a conversation begins with."""

    def __init__(self, name: str, answers: dict[str, str]) -> None:
        super().__init__()
        self.digest, self.answers = name, answers

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        asked = [conversation[0].text.partition("?")[0] + "?" for conversation in conversations]
        return [Generation(self.answers[question], (-0.1,), cut_off=False) for question in asked]


def answer_all(name: str, answers: dict[str, str], benchmark: Benchmark, folder: Path) -> list[Outcome]:
    config = EvaluateConfig.model_validate({"arms": ["whole"]})
    return list(evaluate_policy(Answerer(name, answers), benchmark, StudyIndex(folder), folder, config))


SETS: dict[str, Callable[[Path], Path]] = {
    "slake-zh": lambda folder: build_slake(folder, "zh", SLAKE_ZH.split()),
    "slake-en": lambda folder: build_slake(folder, "en", SLAKE_EN.replace("\n", "").strip().split(",")),
    "vqa-rad": build_vqa_rad,
    "jsonl-yes-no": lambda folder: build_jsonl(folder, ["yes", "no"]),
    "jsonl-languages": lambda folder: build_jsonl(folder, ["sí", "no", "ja", "nein", "はい", "いいえ", "Да.", "нет"]),
    "hf-choice": build_choices,
}


# Both policies look at the whole image, so there is no hit-rate to guard.
SECTION = {"arm": "whole", "resamples": 100, "floors": {"hit_rate": None}}


@pytest.mark.parametrize("name", SETS)
def test_the_reference_answers_pass_the_gate(name: str, tmp_path: Path) -> None:
    folder = SETS[name](tmp_path)
    benchmark = read_benchmark(folder)
    key = {question.text: benchmark.references[question.id].answer for question in benchmark.questions.values()}
    assert len(key) == PATIENTS
    perfect = answer_all("perfect", key, benchmark, folder)
    assert [outcome.correct for outcome in perfect] == [True] * PATIENTS
    assert not [outcome.answer for outcome in perfect if outcome.off_format]
    wrong = answer_all("wrong", dict.fromkeys(key, "zebra"), benchmark, folder)
    assert all(outcome.off_format for outcome in wrong if benchmark.questions[outcome.question].kind != "open")
    questions = list(benchmark.questions.values())
    blind = BlindBaseline.fit(questions[:1], benchmark.references.values()).iter_outcomes(benchmark)
    case = Comparison(
        champion="wrong",
        challenger="perfect",
        champion_outcomes=wrong,
        challenger_outcomes=perfect,
        blind_outcomes=list(blind),
    )
    decision = run_gate(case, benchmark, DecideConfig.model_validate(SECTION)).decision
    assert decision.verdict == "promote", "\n".join(decision.reasons)


def test_a_language_has_several_words_for_each_side(tmp_path: Path) -> None:
    """是 for 是的 is right and in format; 不是 for 是的 is wrong and in format; yes for 是的 is neither."""
    folder = build_slake(tmp_path, "zh", ["是的", "不包含"])
    benchmark = read_benchmark(folder)
    for answer, right, off in (("是", 60, 0), ("不是", 60, 0), ("yes", 0, 120)):
        outcomes = answer_all("one", {q.text: answer for q in benchmark.questions.values()}, benchmark, folder)
        assert sum(bool(outcome.correct) for outcome in outcomes) == right
        assert sum(outcome.off_format for outcome in outcomes) == off


def test_every_protocol_reads_chinese(tmp_path: Path) -> None:
    """llava-med's closed accuracy of the references was 0 of 420."""
    folder = build_slake(tmp_path, "zh", ["是的", "没有", "包含", "不包含"])
    benchmark = read_benchmark(folder)
    key = {question.text: benchmark.references[question.id].answer for question in benchmark.questions.values()}
    outcomes = answer_all("perfect", key, benchmark, folder)
    (report,) = build_benchmark_reports(outcomes, benchmark, resamples=10)
    figures = {name: interval.value for name, interval in report.metrics["whole"].items()}
    for metric in ("accuracy", "closed_accuracy", "llava_med_closed_accuracy", "parsed_accuracy", "token_f1"):
        assert figures[metric] == 1.0, metric
    assert figures["off_format"] == 0.0
