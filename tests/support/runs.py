"""A small but complete run folder: real records and images, and the project's own panel, pairs and reports.

Only the models are simulated, from a seed: an answer is right more often if the region shows the finding, and a judge
scores right answers higher.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image

from clincot.config import DecideConfig, EvaluateConfig, JudgeConfig, JudgeSpec, PairConfig, Params
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.benchmark_report import build_benchmark_reports
from clincot.evaluation.blind_baseline import BlindBaseline
from clincot.evaluation.grounding import best_iou, hits_reference
from clincot.evaluation.vqa import is_correct
from clincot.geometry import WHOLE_IMAGE, Box, box_from_pixels, box_from_xyxy, compute_coverage, crop_square
from clincot.jsonl import hash_files, read_records, write_records
from clincot.judging.calibration import make_identity_calibration
from clincot.judging.combination import PanelMember, ScoreCombiner
from clincot.preferences.pairs import make_pairs
from clincot.promotion.gate import Comparison, run_gate
from clincot.prompts import PromptFormat, save_prompt_format
from clincot.records import (
    Candidate,
    Checkpoint,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Reference,
    Region,
    Study,
)
from clincot.rounds import Plan, collect_results

JUDGES = ("judge-a", "judge-b")
ARMS: tuple[Literal["written", "random", "oracle"], ...] = ("written", "random", "oracle")
PAIRING = PairConfig(min_gap=0.2)
VIEWS = PromptFormat(wording="brief", whole_grid=2, whole_px=64, crop_px=64, min_crop=0.25)
WIDTH, HEIGHT = 96, 80


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write_films(folder: Path, *, films: int, seed: int, split: str, modality: str = "squares") -> None:
    """Write a data set of noisy images with one bright square each; the question asks for the square's side."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    studies, questions, references = [], [], []
    for number in range(films):
        pixels = rng.integers(20, 90, (HEIGHT, WIDTH)).astype(np.uint8)
        x, y = int(rng.integers(4, WIDTH - 20)), int(rng.integers(4, HEIGHT - 20))
        pixels[y : y + 14, x : x + 14] = 230
        name = f"images/{number:06d}.png"
        Image.fromarray(pixels).save(folder / name)
        studies.append(
            Study(
                image=name,
                sha256=hash_files(folder / name),
                width=WIDTH,
                height=HEIGHT,
                modality=modality,
                patient=f"{split}-{number // 2}",
                split=split,
            )
        )
        side = "left" if x + 7 < WIDTH / 2 else "right"
        question = Question(study=studies[-1].id, text="On which side is the <square>?", kind="open", topic="side")
        boxes = (box_from_pixels(x, y, x + 14, y + 14, width=WIDTH, height=HEIGHT),)
        questions.append(question)
        references.append(Reference(question=question.id, answer=side, boxes=boxes, finding="square"))
    write_records(folder / "studies.jsonl", studies)
    write_records(folder / "questions.jsonl", questions)
    write_records(folder / "references.jsonl", references)


class _Set:
    """A data set in memory, with the possible answers of every question text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.studies = list(read_records(folder / "studies.jsonl", Study))
        self.questions = list(read_records(folder / "questions.jsonl", Question))
        self.references = {r.question: r for r in read_records(folder / "references.jsonl", Reference)}
        self.answers: dict[tuple[str, str], list[str]] = {}
        for q in self.questions:
            known = self.answers.setdefault((q.topic, q.text), [])
            if self.references[q.id].answer not in known:
                known.append(self.references[q.id].answer)


class SimulatedPolicy:
    """Looks at the right region with probability `skill`; answers right with 0.9 there and 0.45 elsewhere."""

    def __init__(self, known: _Set, digest: str, skill: float, rng: np.random.Generator) -> None:
        self.known, self.digest, self.skill, self.rng = known, digest, skill, rng

    def box(self, question: Question) -> Box:
        boxes = self.known.references[question.id].boxes
        if boxes and self.rng.random() < self.skill:
            near = boxes[int(self.rng.integers(len(boxes)))]
            dx, dy = self.rng.uniform(-0.05, 0.05, 2)
            x0, y0 = min(max(near.x0 + dx, 0), 0.7), min(max(near.y0 + dy, 0), 0.7)
            return box_from_xyxy((x0, y0, x0 + 0.25, y0 + 0.25))
        x0, y0 = self.rng.uniform(0, 0.75, 2)
        return box_from_xyxy((x0, y0, x0 + 0.25, y0 + 0.25))

    def answer(self, question: Question, box: Box) -> str:
        reference = self.known.references[question.id]
        sees = box != WHOLE_IMAGE and any(compute_coverage(b, by=box) > 0.5 for b in reference.boxes)
        if self.rng.random() < (0.9 if sees else 0.45):
            return reference.answer
        others = [a for a in self.known.answers[question.topic, question.text] if a != reference.answer]
        return others[int(self.rng.integers(len(others)))] if others else "no"


def write_run(run: Path, data: Path, benchmark: Path, *, rounds: int = 2, seed: int = 0, limit: int = 40) -> None:
    """Write a finished run with this number of rounds over a data set and a benchmark."""
    rng = np.random.default_rng(seed)
    asked, tested = _Set(data), _Set(benchmark)
    board = Benchmark.from_records(tested.questions, tested.references.values(), tested.studies)
    run.mkdir(parents=True)
    models = run.parent / "models"
    for name in ("base", *JUDGES):
        (models / name).mkdir(parents=True, exist_ok=True)
        save_prompt_format(models / name, VIEWS)
    judges = tuple(JudgeSpec(name=judge, path=str(models / judge)) for judge in JUDGES)
    params = Params(
        judge=JudgeConfig(judges=judges, calibration="identity"),
        pair=PAIRING,
        evaluate=EvaluateConfig(arms=ARMS, resamples=50),
        decide=DecideConfig(resamples=50),
    )
    plan = Plan(
        run=run,
        data=data,
        benchmark=benchmark,
        policy=models / "base",
        params=params,
        count=rounds,
        comparisons=("sft", "dpo"),
    )
    start = {"data": data, "benchmark": benchmark, "policy": plan.policy}
    described = {
        **{name: str(path) for name, path in start.items()},
        "start_from": "challenger",
        "comparisons": list(plan.comparisons),
        "blind_from": None,
        "judges": [judge.model_dump(mode="json") for judge in judges],
        "recipe": params.describe_recipe(),
    }
    _json(run / "run.json", described)
    (run / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False))
    skill, policy = 0.4, sha("base")
    _evaluate(run / "base", tested, board, policy, skill, rng)
    blind = BlindBaseline.fit(tested.questions, tested.references.values())
    for number in range(1, rounds + 1):
        folder = run / f"round-{number:02d}"
        questions = asked.questions[(number - 1) * limit :][:limit]
        pairs = _preferences(folder, asked, questions, SimulatedPolicy(asked, policy, skill, rng), rng)
        for name in plan.comparisons:
            other = _train(folder / name / "policy", policy, folder / "pairs.jsonl", params, rng, sft=name == "sft")
            _evaluate(folder / name, tested, board, other, skill + 0.05, rng)
        champion, policy = policy, _train(folder / "policy", policy, folder / "pairs.jsonl", params, rng)
        skill += 0.15
        _evaluate(folder, tested, board, policy, skill, rng)
        before = run / "base" if number == 1 else run / f"round-{number - 1:02d}"
        case = Comparison(
            champion=champion,
            challenger=policy,
            champion_outcomes=read_records(before / "outcomes.jsonl", Outcome),
            challenger_outcomes=read_records(folder / "outcomes.jsonl", Outcome),
            blind_outcomes=blind.iter_outcomes(board),
        )
        gated = run_gate(case, board, params.decide)
        assert gated.sides is not None
        write_records(folder / "evidence.jsonl", gated.sides.iter_rows())
        assert len(pairs) > 3
        write_records(folder / "decision.json", [gated.decision])
    _json(run / "results.json", collect_results(plan))


def _preferences(
    folder: Path, asked: _Set, questions: Sequence[Question], policy: SimulatedPolicy, rng: np.random.Generator
) -> list[PreferencePair]:
    """Write questions, regions, candidates, judgements, scores and pairs of a round, with their reports."""
    regions, candidates, judgements = [], [], []
    for question in questions:
        finding = asked.references[question.id].finding or "nodule"
        for grounder, count in (("windows", 2), ("written", 3), ("whole", 1)):
            for _ in range(count):
                box = WHOLE_IMAGE if grounder == "whole" else policy.box(question)
                name = "whole image" if grounder == "whole" else finding
                confidence = 0.0 if grounder == "whole" else round(float(rng.uniform(0.3, 0.95)), 4)
                region = Region(
                    question=question.id, hypothesis=name, box=box, confidence=confidence, grounder=grounder
                )
                regions.append(region)
                candidates.append(
                    Candidate(
                        question=question.id,
                        region=region.id,
                        text=policy.answer(question, box),
                        token_logprobs=(-0.2, -0.1),
                        region_written=grounder == "written",
                        policy=policy.digest,
                        prompt="prompt-1",
                        seed=len(candidates),
                        temperature=0.7,
                    )
                )
                right = candidates[-1].text == asked.references[question.id].answer
                for judge in JUDGES:
                    score = float(np.clip(rng.normal(0.78 if right else 0.3, 0.12), 0.01, 0.99))
                    given: dict[str, object] = {"score": round(score, 6)}
                    if len(judgements) == 9:
                        given = {"score": None, "reason": "neither yes nor no has a probability to speak of"}
                    judgements.append(
                        Judgement.model_validate(
                            {"candidate": candidates[-1].id, "judge": sha(judge), "prompt": "prompt-2", **given}
                        )
                    )
    combination = ScoreCombiner(
        [PanelMember(name=judge, weight=1.0, calibration=make_identity_calibration(sha(judge))) for judge in JUDGES],
        quorum=2,
    )
    scores = list[PanelScore](combination.score_candidates(judgements))
    pairs, report = make_pairs(candidates, scores, PAIRING)
    for name, records in (
        ("questions", questions),
        ("regions", regions),
        ("candidates", candidates),
        ("judgements", judgements),
        ("scores", scores),
        ("pairs", pairs),
    ):
        write_records(folder / f"{name}.jsonl", records)
    _json(folder / "panel.report.json", combination.build_report().model_dump(mode="json"))
    _json(folder / "pairs.report.json", report.model_dump(mode="json"))
    return pairs


def _train(
    folder: Path, parent: str, pairs: Path, params: Params, rng: np.random.Generator, *, sft: bool = False
) -> str:
    """Write a checkpoint folder without weights, with a training log like the trainers'."""
    folder.mkdir(parents=True)
    save_prompt_format(folder, VIEWS)
    digest = sha(f"{folder.parent.parent.name} {folder.parent.name}")
    config = params.train.model_copy(update={"loss": "sft"}) if sft else params.train
    checkpoint = Checkpoint(
        uri=str(folder), sha256=digest, parent=parent, pairs=hash_files(pairs), config=config.digest
    )
    write_records(folder / "record.json", [checkpoint])
    log = []
    for step in range(1, 41):
        gone = step / 40
        noise = rng.normal(0, 0.02, 4)
        entry = {"step": step, "loss": 0.95 - 0.25 * gone + noise[0], "nll": 0.4 - 0.1 * gone + noise[3]}
        if not sft:
            entry |= {
                "dpo_loss": 0.87 - 0.25 * gone + noise[0],
                "accuracy": min(1.0, 0.5 + 0.35 * gone + noise[1]),
                "reward_margin": 0.7 * gone + noise[2],
                "margin_logits": 0.42 + noise[1] / 4,
            }
        log.append({name: round(float(value), 6) for name, value in entry.items()})
    _json(folder / "train_log.json", log)
    return digest


def _evaluate(
    folder: Path, tested: _Set, board: Benchmark, digest: str, skill: float, rng: np.random.Generator
) -> None:
    """Write outcomes.jsonl and report.json of one policy."""
    policy = SimulatedPolicy(tested, digest, skill, rng)
    outcomes = []
    for arm in ARMS:
        policy.skill = {"written": skill, "random": 0.0, "oracle": 1.0}[arm]
        for question in tested.questions:
            reference = tested.references[question.id]
            box = policy.box(question)
            answer = policy.answer(question, box)
            shown = crop_square(box, min_side=VIEWS.min_crop, aspect=WIDTH / HEIGHT)
            outcomes.append(
                Outcome(
                    question=question.id,
                    policy=digest,
                    arm=arm,
                    box=box,
                    answer=answer,
                    reference=reference.id,
                    correct=is_correct(answer, reference.answer, question.kind),
                    hit=hits_reference(shown, reference.boxes),
                    iou=best_iou(shown, reference.boxes),
                    off_format=False,
                )
            )
    write_records(folder / "outcomes.jsonl", outcomes)
    (report,) = build_benchmark_reports(outcomes, board, resamples=50)
    _json(folder / "report.json", report.model_dump(mode="json"))


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
