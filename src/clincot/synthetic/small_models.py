"""Recipes of the shipped tiny models, which `clincot small-models` trains again.

There are three checkpoints: the base policy, and two judges that differ from it and from each other in seed, size and
training data. Each is trained from scratch on its own patients (warps of the CT), which no round or evaluation uses.
Then the judges are calibrated on yet other patients. Training takes about half an hour per model on one core.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from clincot.config import JudgeConfig, JudgeSpec, TrainConfig
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.reports import REPORTS_FILE, read_reports
from clincot.generation.hypotheses import FINDINGS
from clincot.judging.labelled_answers import LabelledQuestion, join_references
from clincot.prompts import PROMPT_TEMPLATES, Conversation, load_prompt_format
from clincot.synthetic.build import build_synthetic_dataset
from clincot.synthetic.lessons import build_judge_lessons, build_policy_lessons, draw_random_answers
from clincot.synthetic.patches import cut_dense_frames, cut_nodule_frames
from clincot.synthetic.scenes import stream_radiographs
from clincot.synthetic.tiny_model import TinyModelSpec, build_tiny_model
from clincot.synthetic.vision_pretraining import DenseFrames, pretrain_vision
from clincot.training.calibrate_judges import fit_judge_calibrations
from clincot.training.rows import SFTRow
from clincot.training.sft import train_on_rows

REGION_TRUTH = 0.6  # share of right regions in the policy's lessons; leaves room for rounds to improve
LESSON_LR = {1: 2e-3, 2: 1e-3, 3: 1e-3, 4: 5e-4}  # learning rate by part of the lessons


@dataclass(frozen=True)
class UnlearningRecipe:
    """A last part of the lessons, in which the answers to some topics are drawn at random.

    The model keeps the words and the format of such answers and unlearns to see what they depend on: a general model
    that needs what specialised judges know. Its vision tower and projector stay as they are.
    """

    topics: tuple[str, ...]
    warps: range  # patients of these lessons
    images: int
    epochs: float
    lr: float
    seed: int


@dataclass(frozen=True)
class ModelRecipe:
    """Sizes and training data of one tiny model."""

    name: str
    role: str  # "policy" or "judge"
    spec: TinyModelSpec
    warps: range  # patients of its lessons
    dense_images: int  # radiographs for the dense pre-training
    lesson_images: int  # radiographs with questions for the supervised lessons
    lessons: tuple[tuple[int, float], ...]  # (part, epochs), trained in this order, each with its own random draws
    batch_size: int = 32  # judges need many steps, not many lessons, to learn to match answers with images
    unlearning: UnlearningRecipe | None = None


EVALUATION_WARPS = range(1000)  # reserved for rounds, calibration and benchmarks
CALIBRATION_WARPS = range(400, 424)  # part of them, used only to calibrate the judges
CALIBRATION_QUESTIONS = 1200
RECIPES = (
    ModelRecipe(
        "policy",
        "policy",
        TinyModelSpec(seed=1),
        range(1000, 1040),
        6_000,
        5_000,
        ((1, 1), (2, 2)),
        batch_size=64,
        unlearning=UnlearningRecipe(("margin",), range(1100, 1112), images=1_200, epochs=3, lr=1e-3, seed=77),
    ),
    ModelRecipe(
        "judge-a",
        "judge",
        TinyModelSpec(seed=2, text_layers=2),
        range(2000, 2040),
        6_000,
        5_000,
        ((1, 1.5), (2, 1.5), (4, 1)),
    ),
    ModelRecipe(
        "judge-b",
        "judge",
        TinyModelSpec(seed=3, vision_hidden=96, vision_layers=4, text_layers=2),
        range(3000, 3040),
        6_000,
        5_000,
        ((1, 1.5), (2, 1.5), (2, 1.5), (3, 1), (4, 1.5)),
    ),
)


def _render_lessons(folder: Path, warps: range, images: int, seed: int, *, split: str) -> None:
    """Render a data set for lessons, unless the folder exists."""
    if not folder.is_dir():
        build_synthetic_dataset(folder, warp_seeds=warps, images=images, questions_per_image=3, seed=seed, split=split)


def pretrain_tower(recipe: ModelRecipe, work: Path) -> Path:
    """Render the lessons' data set, build an untrained checkpoint and pre-train its vision tower.

    Returns the checkpoint's folder below `work`.
    """
    lessons = work / f"{recipe.name}-lessons"
    _render_lessons(lessons, recipe.warps, recipe.lesson_images, recipe.spec.seed, split=f"lessons of {recipe.name}")
    checkpoint = work / f"{recipe.name}-tower"
    build_tiny_model(checkpoint, recipe.spec, read_corpus(lessons))
    losses = pretrain_vision(
        checkpoint,
        _stream_dense_frames(recipe),
        images_total=recipe.dense_images,
        images_per_step=8,
        seed=recipe.spec.seed,
    )
    (checkpoint / "train_log.json").write_text(json.dumps({"dense_loss": losses}) + "\n", encoding="utf-8")
    return checkpoint


def train_sft(
    role: str,
    data: Path,
    start: Path,
    out: Path,
    config: TrainConfig,
    *,
    region_truth: float = REGION_TRUTH,
    part: int = 2,
) -> dict[str, float]:
    """Train on supervised lessons (clincot.synthetic.lessons); writes a checkpoint to `out` and returns the metrics.

    `role`: "policy" or "judge". `data`: a data set with its answer key. `start`: the checkpoint to start from.
    `region_truth`: see build_policy_lessons. `part`: of the lessons.
    """
    views, lessons = load_prompt_format(start), _read_labelled_questions(data)
    conversations = (
        build_policy_lessons(lessons, data, views, region_truth=region_truth, seed=config.seed, part=part)
        if role == "policy"
        else build_judge_lessons(lessons, data, views, seed=config.seed, part=part)
    )
    return train_on_rows(
        _number_lessons(conversations), start, out, config.model_copy(update={"train_projector": True})
    )


def unlearn_topics(
    data: Path, start: Path, out: Path, config: TrainConfig, topics: Collection[str]
) -> dict[str, float]:
    """Train a policy on part 2 of its lessons with random answers to `topics`; writes a checkpoint to `out`."""
    lessons = draw_random_answers(_read_labelled_questions(data), topics, seed=config.seed)
    conversations = build_policy_lessons(
        lessons, data, load_prompt_format(start), region_truth=REGION_TRUTH, seed=config.seed, part=2
    )
    return train_on_rows(
        _number_lessons(conversations), start, out, config.model_copy(update={"train_projector": False})
    )


def _read_labelled_questions(data: Path) -> list[LabelledQuestion]:
    references = {reference.question: reference for reference in load_references(data)}
    return join_references(StudyIndex(data), load_questions(data), references)


def _number_lessons(conversations: Iterable[Conversation]) -> list[SFTRow]:
    return [SFTRow(f"lesson {number}", conversation) for number, conversation in enumerate(conversations)]


def make_small_model(recipe: ModelRecipe, work: Path, out: Path) -> Path:
    """Train one model, skipping steps whose results are in `work`; returns its folder below `out`."""
    tower = work / f"{recipe.name}-tower"
    if not (tower / "train_log.json").is_file():
        pretrain_tower(recipe, work)
    start = tower
    for number, (part, epochs) in enumerate(recipe.lessons, start=1):
        done = work / f"{recipe.name}-{number}"
        if not done.is_dir():
            seed = recipe.spec.seed + 1000 * max(0, number - 2)
            config = TrainConfig(loss="sft", lr=LESSON_LR[part], epochs=epochs, batch_size=recipe.batch_size, seed=seed)
            train_sft(recipe.role, work / f"{recipe.name}-lessons", start, done, config, part=part)
        start = done
    if recipe.unlearning is not None:
        start = _train_to_unlearn(recipe, recipe.unlearning, work, start)
    export_half_precision(start, out / recipe.name)
    return out / recipe.name


def _train_to_unlearn(recipe: ModelRecipe, unlearning: UnlearningRecipe, work: Path, start: Path) -> Path:
    """Train the last part of the lessons, unless it is in `work`; returns its checkpoint."""
    lessons, done = work / f"{recipe.name}-unlearning-lessons", work / f"{recipe.name}-unlearned"
    split = f"lessons in which {recipe.name} unlearns"
    _render_lessons(lessons, unlearning.warps, unlearning.images, unlearning.seed, split=split)
    if not done.is_dir():
        config = TrainConfig(
            loss="sft",
            lr=unlearning.lr,
            epochs=unlearning.epochs,
            batch_size=recipe.batch_size,
            seed=unlearning.seed,
        )
        unlearn_topics(lessons, start, done, config, unlearning.topics)
    return done


def export_half_precision(trained: Path, out: Path) -> None:
    """Copy a checkpoint with its weights in half precision, as stored in assets/, which halves its size."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(trained, partial)
    for shard in partial.glob("*.safetensors"):
        weights = {name: tensor.half() for name, tensor in load_file(shard).items()}
        save_file(weights, shard, metadata={"format": "pt"})
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    (partial / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def calibrate_small_judges(work: Path, out: Path) -> str:
    """Calibrate the judges below `out` on patients of their own; returns the table of results.

    The curves in `out`/calibration.jsonl refer to the judges by digest, so they apply to no other weights.
    """
    questions = work / "calibration-questions"
    if not questions.is_dir():
        build_synthetic_dataset(
            questions,
            warp_seeds=CALIBRATION_WARPS,
            images=400,
            questions_per_image=3,
            seed=5,
            split="calibration of the judges",
        )
    judges = tuple(JudgeSpec(name=r.name, path=str(out / r.name)) for r in RECIPES if r.role == "judge")
    return fit_judge_calibrations(
        JudgeConfig(judges=judges), questions, out / "calibration.jsonl", limit=CALIBRATION_QUESTIONS
    )


def _stream_dense_frames(recipe: ModelRecipe) -> Iterator[DenseFrames]:
    """Stream radiographs for the dense pre-training.

    Every other one has three nodules and is cut at full resolution, because nodules are small and margins fine.
    """
    half, seed = recipe.dense_images // 2, recipe.spec.seed
    anything = stream_radiographs(recipe.warps, half, seed)
    nodules = stream_radiographs(recipe.warps, half, seed + 100, findings=["nodule"] * 3)
    for index, (mixed, nodular) in enumerate(zip(anything, nodules, strict=True)):
        rng = np.random.default_rng([seed, index, 9])
        yield DenseFrames(*cut_dense_frames(mixed, rng))
        yield DenseFrames(*cut_nodule_frames(nodular, rng))


def read_corpus(folder: Path) -> Iterator[str]:
    """Stream the texts that the tokenizer learns from: questions, answers, reports, findings and prompts."""
    for question in load_questions(folder):
        yield question.asked_text
    for reference in load_references(folder):
        yield reference.answer
        yield f" {reference.answer}?"
    for report in read_reports(folder / REPORTS_FILE):
        yield report.text
    for finding in FINDINGS:
        yield from [f"Is there {finding}?", finding] * 5
    for wording in PROMPT_TEMPLATES.values():
        yield from [wording.look, wording.crop, wording.judge, wording.finding] * 5
