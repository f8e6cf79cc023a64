"""Does γ make a policy look where the next step needs it? A tiny model in a world where one look is not enough.

    python -m benchmarks.two_look_policy --seeds 0 1 2

A film is grey with four squares of fine stripes, across or upright, which are invisible at the size of the whole image
and clear in a crop. "Are they alike?" is about the upper left and the lower right one; the other two say nothing. So no
single look is right more often than chance, and of two looks the first has to see one of the pair and the second the
other one, while the first is described in words only.

The policy is a real one (synthetic/tiny_model.py), taught to write one of the squares at random, to describe a crop,
and to answer from a description and a crop. Everything from the regions that it writes to the training is the project's
own code: propose_regions, plan_next_step, make_pairs with γ, margin-DPO. The judges are simulated, so that the figure
is about γ and not about judges: right answers score 0.8 and wrong ones 0.2 on average, and every description 0.5, each
with a standard deviation of 0.1, because descriptions of all squares are equally right.

The figure is the share of right answers on films that no lesson and no round has used, greedily decoded, where the
policy writes both regions itself.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from clincot.config import AnswerConfig, PairConfig, ProposeConfig, TrainConfig
from clincot.generation.candidates import GenerationRequest, answer_regions, plan_first_step, plan_next_step
from clincot.generation.regions import build_grounders, propose_regions
from clincot.geometry import Box, box_from_xyxy, compute_iou, parse_region
from clincot.jsonl import hash_files, write_json
from clincot.models.vlm import VisionLanguageModel
from clincot.preferences.pairs import make_pairs
from clincot.prompts import (
    ChainStep,
    Conversation,
    Turn,
    answer_prompt,
    build_crop_view,
    chain_prompt,
    get_template,
    region_prompt,
    with_answer,
)
from clincot.records import Candidate, PanelScore, Question, Region, Study
from clincot.synthetic.tiny_model import TinyModelSpec, build_tiny_model
from clincot.text import markdown_table
from clincot.training.margin_dpo import train_on_pairs
from clincot.training.rows import SFTRow, SourceRecords, build_training_rows
from clincot.training.sft import train_on_rows

SEEN, ALIKE = "What is seen?", "Are they alike?"
SIDE_PX = 256
CORNERS = ((0.1, 0.1), (0.65, 0.1), (0.1, 0.65), (0.65, 0.65))  # of the squares, a quarter of the film wide
SQUARES = tuple(box_from_xyxy((x, y, x + 0.25, y + 0.25)) for x, y in CORNERS)
PAIR = (0, 3)  # the squares that the question is about
WORDS = ("across", "upright")
SPEC = TinyModelSpec(
    vision_hidden=64,
    vision_layers=1,
    text_hidden=96,
    text_layers=3,
    patch_px=16,
    tokens_per_side=2,
    vocabulary=700,
)


@dataclass(frozen=True)
class StripedFilm:
    """A film, and what its squares show: 0 across, 1 upright."""

    study: Study
    stripes: tuple[int, ...]

    @property
    def question(self) -> Question:
        return Question(study=self.study.id, text=ALIKE, kind="closed")

    @property
    def answer(self) -> str:
        return "yes" if self.stripes[PAIR[0]] == self.stripes[PAIR[1]] else "no"

    def describe(self, square: int) -> str:
        return WORDS[self.stripes[square]]


def draw_films(folder: Path, count: int, *, seed: int) -> list[StripedFilm]:
    """Write films of `folder`/images; the pair is alike in half of them, on average."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    across = np.where(np.arange(64)[:, None] % 2, 60, -60) + np.zeros((64, 64))
    films = []
    for number in range(count):
        stripes = tuple(int(value) for value in rng.integers(0, 2, 4))
        pixels_HW = np.full((SIDE_PX, SIDE_PX), 128.0) + rng.normal(0, 4, (SIDE_PX, SIDE_PX))
        for (x, y), upright in zip(CORNERS, stripes, strict=True):
            left, top = round(x * SIDE_PX), round(y * SIDE_PX)
            pixels_HW[top : top + 64, left : left + 64] += across.T if upright else across
        name = f"images/{seed}-{number}.png"
        Image.fromarray(pixels_HW.clip(0, 255).astype(np.uint8)).save(folder / name)
        study = Study(image=name, sha256=hash_files(folder / name), width=SIDE_PX, height=SIDE_PX, patient=f"{number}")
        films.append(StripedFilm(study, stripes))
    return films


def build_lessons(
    films: Sequence[StripedFilm], folder: Path, policy: VisionLanguageModel, *, seed: int, looks: bool
) -> Iterator[SFTRow]:
    """Lessons of the base policy: what a crop shows, and (looks) chains whose regions are any of the squares.

    Half of the chains look at the pair, so that the answer can be learnt; regions are learnt from the others alone,
    where they are drawn evenly, and so is the answer of those that cannot know it.
    """
    rng, views = random.Random(seed), policy.views
    for film in films:
        for square in rng.sample(range(4), 2):
            crop = build_crop_view(film.study, folder, views, SQUARES[square])
            yield SFTRow("crop", with_answer((Turn("user", SEEN, (crop,)),), film.describe(square)))
        if not looks:
            continue
        first, second = rng.choice((PAIR, PAIR[::-1]))
        yield SFTRow("pair", _build_chain(film, folder, policy, first, second, film.answer, written=False))
        first, second = rng.randrange(4), rng.randrange(4)
        known = {first, second} == {*PAIR}
        answer = film.answer if known else rng.choice(("yes", "no"))
        yield SFTRow("any", _build_chain(film, folder, policy, first, second, answer, written=True))
        step = ChainStep(SEEN, SQUARES[first], True, film.describe(first))
        yield SFTRow("first", chain_prompt(film.study, folder, views, [step]))
        step = ChainStep(ALIKE, SQUARES[second], True, rng.choice(("yes", "no")))
        yield SFTRow("single", chain_prompt(film.study, folder, views, [step]))


def _build_chain(
    film: StripedFilm,
    folder: Path,
    policy: VisionLanguageModel,
    first: int,
    second: int,
    answer: str,
    *,
    written: bool,
) -> Conversation:
    steps = [
        ChainStep(SEEN, SQUARES[first], False, film.describe(first)),
        ChainStep(ALIKE, SQUARES[second], written, answer),
    ]
    return chain_prompt(film.study, folder, policy.views, steps)


def teach_base(folder: Path, *, films: int, epochs: int, seed: int) -> Path:
    """Train the base policy; return its folder."""
    corpus = [f"{SEEN} {ALIKE} {' '.join(WORDS)} yes no"] * 20
    build_tiny_model(folder / "untrained", SPEC, corpus)
    taught = draw_films(folder, films, seed=seed)
    policy = VisionLanguageModel(folder / "untrained")
    config = TrainConfig(
        loss="sft",
        lr=1e-3,
        batch_size=32,
        freeze_vision=False,
        train_projector=True,
        dtype="float32",
        warmup_ratio=0.05,
    )
    crops = list(build_lessons(taught, folder, policy, seed=seed, looks=False))
    train_on_rows(crops, folder / "untrained", folder / "seeing", config.model_copy(update={"epochs": 4.0}))
    chains = list(build_lessons(taught, folder, policy, seed=seed + 1, looks=True))
    metrics = train_on_rows(
        chains, folder / "seeing", folder / "base", config.model_copy(update={"epochs": float(epochs)})
    )
    print(f"base policy: {metrics}", flush=True)
    return folder / "base"


def measure_policy(checkpoint: Path, films: Sequence[StripedFilm], folder: Path, *, looks: int) -> tuple[float, float]:
    """(share of right answers, share of chains whose looks saw the pair) of a policy that writes its own regions."""
    policy = VisionLanguageModel(checkpoint)
    views = policy.views
    steps: list[list[ChainStep]] = [[] for _ in films]
    for question in (SEEN, ALIKE)[-looks:]:
        openings = []
        for film, before in zip(films, steps, strict=True):
            if before:
                turn = Turn("user", get_template(views).look.format(question=question))
                openings.append((*chain_prompt(film.study, folder, views, before), turn))
            else:
                openings.append(region_prompt(film.study, folder, views, question))
        replies = policy.generate(openings, max_new_tokens=24, temperature=0.0, seeds=[0] * len(films))
        boxes = [parse_region(reply.text, views.region_form, (SIDE_PX, SIDE_PX)) or SQUARES[1] for reply in replies]
        asked = [
            answer_prompt(opening, film.study, folder, views, ChainStep(question, box, True))
            for opening, film, box in zip(openings, films, boxes, strict=True)
        ]
        answers = policy.generate(asked, max_new_tokens=4, temperature=0.0, seeds=[0] * len(films))
        for before, box, reply in zip(steps, boxes, answers, strict=True):
            before.append(ChainStep(question, box, True, reply.text))
    right = [chain[-1].answer == film.answer for chain, film in zip(steps, films, strict=True)]
    saw = [{_find_square(step.box) for step in chain} >= {*PAIR} for chain in steps]
    return fmean(right), fmean(saw)


def _find_square(box: Box) -> int:
    overlaps = [compute_iou(box, square) for square in SQUARES]
    return overlaps.index(max(overlaps)) if max(overlaps) > 0.3 else -1


def run_round(
    start: Path, out: Path, films: Sequence[StripedFilm], folder: Path, *, gamma: float, looks: int, seed: int
) -> dict[str, float]:
    """One round: regions, chains, simulated scores, pairs credited with γ, margin-DPO from `start` to `out`."""
    policy, rng = VisionLanguageModel(start), random.Random(seed)
    studies = {film.study.id: film.study for film in films}
    truths = {film.question.id: film.answer for film in films}
    propose = ProposeConfig(grounders={"written": 8}, temperature=1.0, seed=seed)
    questions = [film.question for film in films]
    regions = list(propose_regions(questions, studies, folder, build_grounders(propose, policy), propose))
    answer = AnswerConfig(steps=(SEEN, ALIKE)[-looks:], max_new_tokens=4, seed=seed, temperature=1.0)
    answered: list[tuple[GenerationRequest, Candidate, float | None]] = []
    requests = list(plan_first_step(questions, studies, regions))
    for step in range(looks):
        if step:
            requests = []
            for question in questions:
                requests += plan_next_step([one for one in answered if one[0].question.id == question.id])
        for request, candidate in zip(requests, answer_regions(requests, folder, policy, answer), strict=True):
            mean = 0.5
            if step == looks - 1:
                mean = 0.8 if candidate.text == truths[candidate.question] else 0.2
            answered.append((request, candidate, min(1.0, max(0.0, rng.gauss(mean, 0.1)))))
    answered.sort(key=lambda one: questions.index(one[0].question))
    candidates = [candidate for _, candidate, _ in answered]
    scores = [PanelScore(candidate=one.id, score=score, spread=0.0, judges=2) for _, one, score in answered]
    pairs, _ = make_pairs(
        candidates,
        scores,
        PairConfig(
            gamma=gamma, min_gap=0.1, per_question=4, same_region_share=0.3, length_auc_tolerance=0.5, seed=seed
        ),
    )
    sources = SourceRecords(
        {one.id: one for one in candidates},
        {region.id: region for region in _list_regions(answered)},
        {question.id: question for question in questions},
        studies,
    )
    rows = list(build_training_rows(pairs, sources, folder, policy.views, steps=answer.steps))
    config = TrainConfig(
        lr=3e-4, epochs=4.0, batch_size=32, nll_weight=0.1, freeze_vision=True, dtype="float32", seed=seed
    )
    metrics = train_on_pairs(rows, start, out, config)
    return metrics | {"pairs of the first look": float(sum(pair.step == 0 for pair in pairs))}


def _list_regions(answered: Sequence[tuple[GenerationRequest, Candidate, float | None]]) -> Iterator[Region]:
    for request, _, _ in answered:
        yield request.region
        yield from (region for region, _ in request.before)


def compare_credits(folder: Path, *, seed: int, films: int, rounds: int, lessons: int, epochs: int) -> dict[str, float]:
    """{row: share of right answers, and of chains that saw the pair} of the base and after the rounds of every arm."""
    base = teach_base(folder, films=lessons, epochs=epochs, seed=1000 + seed)
    test = draw_films(folder, 200, seed=5000 + seed)
    results: dict[str, float] = {}
    for looks in (1, 2):
        results[f"base, looks {looks}"], results[f"base, saw the pair, looks {looks}"] = measure_policy(
            base, test, folder, looks=looks
        )
    print(results, flush=True)
    arms = {"one look": (1, 0.0), "two looks, γ 0": (2, 0.0), "two looks, γ 1": (2, 1.0)}
    for name, (looks, gamma) in arms.items():
        policy = base
        for number in range(rounds):
            out = folder / f"arm-{looks}-{gamma:g}-{number}"
            asked = draw_films(folder, films, seed=2000 + 10 * seed + number)
            metrics = run_round(policy, out, asked, folder, gamma=gamma, looks=looks, seed=seed + number)
            print(name, number + 1, {key: round(value, 3) for key, value in metrics.items()}, flush=True)
            policy = out
        results[name], results[f"{name}, saw the pair"] = measure_policy(policy, test, folder, looks=looks)
        print(name, results[name], results[f"{name}, saw the pair"], flush=True)
    return results


def main() -> None:
    """Print a table with a row for the base and for each arm, means over the seeds."""
    parser = argparse.ArgumentParser(description="Compare one look with two, with and without γ, on a tiny model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--films", type=int, default=200, help="Films of a round.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lessons", type=int, default=1500, help="Films that the base policy is taught on.")
    parser.add_argument("--epochs", type=int, default=4, help="Passes over the chains among the lessons.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/two_look_policy.json"))
    options = parser.parse_args()
    by_seed = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory(prefix="two-looks-") as folder:
            by_seed[seed] = compare_credits(
                Path(folder),
                seed=seed,
                films=options.films,
                rounds=options.rounds,
                lessons=options.lessons,
                epochs=options.epochs,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, by_seed)
    names = [("base, looks 2", "base, two looks"), ("one look", "one look"), ("two looks, γ 0", "two looks, γ 0")]
    names.append(("two looks, γ 1", "two looks, γ 1"))
    rows = []
    for key, label in names:
        saw = "base, saw the pair, looks 2" if key.startswith("base") else f"{key}, saw the pair"
        values = [results[key] for results in by_seed.values()]
        rows.append(
            (
                label,
                f"{fmean(values):.3f}",
                ", ".join(f"{value:.3f}" for value in values),
                f"{fmean(results[saw] for results in by_seed.values()):.3f}",
            )
        )
    print(markdown_table(("", "right answers", "by seed", "saw the pair"), rows))


if __name__ == "__main__":
    main()
