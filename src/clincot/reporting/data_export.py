"""Export of data sets and preference pairs in the formats of other trainers, with a data set card.

OUT/README.md                  the card, whose header tells the Hub where the tables are
OUT/data/SPLIT-….parquet       a data set: image, question, answer, kind, options … (Hugging Face `datasets`)
OUT/llava.json, OUT/images/    a data set as LLaVA's conversations
OUT/answers/train-….parquet    pairs that differ in the answer: prompt, chosen, rejected, images, as TRL 1.16 reads
                               vision preference data (docs/source/dataset_formats.md)
OUT/regions/train-….parquet    pairs that differ in the region too. Their sides show different crops, for which
                               TRL's format has no place: images_chosen and images_rejected hold them
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.errors import InvalidInput
from clincot.images import load_cached_view
from clincot.jsonl import atomic_write
from clincot.prompts import Conversation, ImageView, PromptFormat, Turn, collect_views
from clincot.records import Question
from clincot.text import format_count
from clincot.training.rows import PairFiles, TrainingRow, read_training_rows

_BATCH_ROWS = 64
_PNG_LEVEL = 2


def check_export_folder(out: Path) -> None:
    """Raise InvalidInput unless `out` is missing or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"--out {out} is not empty; choose a folder that does not exist yet")


# ------------------------------------------------------------------------------------------------ data sets


def export_dataset(folder: Path, out: Path, *, split: str = "train", licence: str = "") -> int:
    """Write a data-set folder as a Parquet table with its images inside; return the number of rows."""
    from datasets import Features, Image, Value
    from datasets import Sequence as ListOf

    check_export_folder(out)
    text = Value("string")
    features = Features(
        {
            "image": Image(),
            "other_images": ListOf(Image()),
            "roles": ListOf(text),
            "question": text,
            "answer": text,
            "kind": text,
            "options": ListOf(text),
            "boxes": ListOf(ListOf(Value("float64"))),
            "topic": text,
            "finding": text,
            "modality": text,
            "patient": text,
            "id": text,
        }
    )
    count = _write_parquet(out / "data" / f"{split}-00000-of-00001.parquet", features, _iter_question_rows(folder))
    _write_card(
        out, {"default": {split: f"data/{split}-*"}}, licence, f"{format_count(count, 'question')} with images."
    )
    return count


def _iter_question_rows(folder: Path) -> Iterator[dict[str, Any]]:
    studies = StudyIndex(folder)
    for question, reference in zip(load_questions(folder), load_references(folder), strict=True):
        study = studies[question.study]
        yield {
            "image": _read_file(studies, question.study),
            "other_images": [_read_file(studies, other.study) for other in question.others],
            "roles": [other.role for other in question.others],
            "question": question.text,
            "answer": reference.answer,
            "kind": question.kind,
            "options": list(question.options),
            "boxes": [list(box.xyxy) for box in reference.boxes],
            "topic": question.topic,
            "finding": reference.finding,
            "modality": study.modality,
            "patient": study.patient,
            "id": question.id,
        }


def _read_file(studies: StudyIndex, study: str) -> dict[str, Any]:
    path = studies.resolve_image_path(study)
    return {"bytes": path.read_bytes(), "path": path.name}


def export_llava(folder: Path, out: Path) -> int:
    """Write a data-set folder as LLaVA conversations with their images; return the number of conversations."""
    check_export_folder(out)
    studies = StudyIndex(folder)
    (out / "images").mkdir(parents=True)
    count = 0
    with atomic_write(out / "llava.json") as file:
        for question, reference in zip(load_questions(folder), load_references(folder), strict=True):
            names = [_copy_image(studies, study, out) for study in _list_studies(question)]
            marks = "<image>\n" * len(names)
            row = {
                "id": question.id,
                "image": names[0] if len(names) == 1 else names,
                "conversations": [
                    {"from": "human", "value": marks + question.asked_text},
                    {"from": "gpt", "value": reference.answer},
                ],
            }
            file.write(("[\n" if count == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _list_studies(question: Question) -> list[str]:
    return [question.study, *(other.study for other in question.others)]


def _copy_image(studies: StudyIndex, study: str, out: Path) -> str:
    path = studies.resolve_image_path(study)
    name = f"images/{path.name}"
    if not (out / name).exists():
        shutil.copyfile(path, out / name)
    return name


# ---------------------------------------------------------------------------------------- preference pairs


@dataclass(frozen=True)
class ExportedPairs:
    """How many pairs went into each table."""

    answers: int  # the sides differ in the answer only
    regions: int


def export_pairs(
    files: PairFiles, data: Path, out: Path, views: PromptFormat, *, steps: Sequence[str], licence: str = ""
) -> ExportedPairs:
    """Write a round's pairs as tables of conversations; raises InvalidInput if there is none.

    `views`: the prompt format of the policy that wrote the candidates. `steps`: answer.steps.
    """
    from datasets import Features, Image, Value
    from datasets import Sequence as ListOf

    check_export_folder(out)
    text, number = Value("string"), Value("float64")
    part = {"type": text, "text": text}
    turns = [{"role": text, "content": [part]}]
    shared = {"prompt": turns, "chosen": turns, "rejected": turns, "images": ListOf(Image())}
    own = {"margin": number, "spread": number, "id": text}
    more = {"images_chosen": ListOf(Image()), "images_rejected": ListOf(Image())}

    def read_rows(*, same: bool) -> Iterator[dict[str, Any]]:
        for row in read_training_rows(files, data, views, steps=steps):
            built = _build_pair_row(row)
            if ("images_chosen" not in built) == same:
                yield built

    answers = _write_parquet(
        out / "answers" / "train-00000-of-00001.parquet", Features(shared | own), read_rows(same=True)
    )
    regions = _write_parquet(
        out / "regions" / "train-00000-of-00001.parquet", Features(shared | own | more), read_rows(same=False)
    )
    if answers + regions == 0:
        raise InvalidInput(f"{files.pairs}: no pairs to export")
    about = (
        f"{format_count(answers, 'preference pair')} whose sides differ in the answer (config `answers`: columns"
        f" prompt, chosen, rejected, images, as TRL reads them) and {regions} that look at different regions (config"
        " `regions`: the crops of a side are in images_chosen and images_rejected). `margin` is the difference of the"
        " judges' scores, `spread` their standard deviation."
    )
    configs = {"answers": {"train": "answers/*"}} if answers else {}
    configs |= {"regions": {"train": "regions/*"}} if regions else {}
    _write_card(out, configs, licence, about)
    return ExportedPairs(answers, regions)


def _build_pair_row(row: TrainingRow) -> dict[str, Any]:
    """The turns that both sides share are the prompt; the rest of each side follows."""
    shared = 0
    for chosen, rejected in zip(row.chosen, row.rejected, strict=False):
        if chosen != rejected:
            break
        shared += 1
    prompt, chosen_rest, rejected_rest = row.chosen[:shared], row.chosen[shared:], row.rejected[shared:]
    built: dict[str, Any] = {
        "prompt": _list_messages(prompt),
        "chosen": _list_messages(chosen_rest),
        "rejected": _list_messages(rejected_rest),
        "images": _list_images(prompt),
        "margin": row.gap,
        "spread": row.spread,
        "id": row.pair,
    }
    if any(turn.pictures for turn in (*chosen_rest, *rejected_rest)):
        built |= {"images_chosen": _list_images(chosen_rest), "images_rejected": _list_images(rejected_rest)}
    return built


def _list_messages(turns: Conversation) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": _list_parts(turn)} for turn in turns]


def _list_parts(turn: Turn) -> list[dict[str, str | None]]:
    images: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in turn.pictures]
    return [*images, {"type": "text", "text": turn.text}]


def _list_images(turns: Conversation) -> list[dict[str, Any]]:
    return [_encode_view(view) for view in collect_views(turns)]


def _encode_view(view: ImageView) -> dict[str, Any]:
    """The view as the model sees it, as PNG."""
    buffer = io.BytesIO()
    picture = load_cached_view(Path(view.path), view.box, view.side_px, view.cutout)
    picture.save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return {"bytes": buffer.getvalue(), "path": None}


# ------------------------------------------------------------------------------------------------------ files


def _write_parquet(path: Path, features: Any, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows in batches; no file if there is none. The schema tells `datasets` which columns are images."""
    import pyarrow as pa
    from pyarrow import parquet

    schema: pa.Schema = features.arrow_schema
    remaining, count = iter(rows), 0
    first = list(islice(remaining, _BATCH_ROWS))
    if not first:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with parquet.ParquetWriter(partial, schema) as writer:
        while first:
            writer.write_table(pa.Table.from_pylist(first, schema=schema), row_group_size=_BATCH_ROWS)
            count += len(first)
            first = list(islice(remaining, _BATCH_ROWS))
    partial.replace(path)
    return count


def _write_card(out: Path, configs: Mapping[str, Mapping[str, str]], licence: str, about: str) -> None:
    """Write README.md with the header from which `load_dataset` learns the tables."""
    lines = ["---", *([f"license: {licence}"] if licence else []), "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    lines += ["---", "", f"# {out.name}", "", about, ""]
    if not licence:
        lines += ["The licence is that of the source data set; state it before you publish this one.", ""]
    lines += ["Written by `clincot export`.", ""]
    with atomic_write(out / "README.md") as file:
        file.write("\n".join(lines))
