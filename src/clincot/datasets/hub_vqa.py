"""Ingest of tables as they are published: Hugging Face `datasets` folders, Parquet, Arrow, JSON, CSV, LLaVA, ZIP.

Columns are found by their names (clincot.datasets.columns) and tables by their layout (clincot.datasets.hub_layout).
An image is a cell with its bytes, or the name of a file beside the table or in a ZIP archive of the source. A row is

- a question with an answer; closed if the answer is yes or no or if the row says so, open otherwise;
- a multiple-choice question, if it has options: its answer is a letter or the text of an option;
- a conversation in LLaVA's format: each pair of a person's turn and the next reply is a question.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from tqdm import tqdm

from clincot.datasets.closed_answers import find_choice_fault, guess_kind, read_choice
from clincot.datasets.columns import ColumnMapping, guess_columns, parse_overrides
from clincot.datasets.hub_layout import TableFile, find_tables, read_attribution
from clincot.datasets.ingest.archives import SourceTree
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.row_pipeline import (
    FurtherImages,
    ParsedRow,
    RowPlan,
    RowSplit,
    ingest_rows,
    make_other_images,
    register_row_id,
)
from clincot.datasets.ingest.writer import SourceImage, SourceQuestion
from clincot.datasets.region_masks import MASKS_REMEDY, derive_boxes, parse_mask
from clincot.datasets.splits import check_test_share
from clincot.datasets.tables import Row, iter_table_rows
from clincot.errors import InvalidInput
from clincot.geometry import Box, RegionMask, box_from_xyxy
from clincot.jsonl import InvalidRecord
from clincot.records import OPTION_LETTERS

Kind = Literal["closed", "open", "report", "choice"]
_IMAGE_TOKEN = re.compile(r"\s*<image>\s*")
_ANSWER_CHOICES = re.compile(r"\s*Answer Choices:.*", re.DOTALL)  # MedXpertQA repeats the options in the question
_LETTER_PREFIX = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*")
_KINDS: dict[str, Kind] = {"closed": "closed", "open": "open", "report": "report", "yes/no": "closed"}
_HUMAN, _MODEL = frozenset({"human", "user"}), frozenset({"gpt", "assistant", "model"})


def ingest_hf(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    column: Sequence[str] = (),
    where: Sequence[str] = (),
    modality: str = "",
    split: RowSplit | None = None,
    further_images: FurtherImages = "keep",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read a table, a folder of tables or a ZIP archive of them into the dataset folder `out`.

    `column`: FIELD=COLUMN settings that replace guesses. `where`: COLUMN=VALUE settings; other rows are left out.
    `modality`: that of all images if no column states it. `split`: as in RowPlan; None is "by-row" if the tables or
    their rows name splits, else "given". `further_images`: as in RowPlan.

    Raises InvalidRecord if there is no table, a table is damaged or its columns are not understood; TooManyRefused if
    more rows are refused than `allow_refused`; the other rows have been written by then.
    """
    check_test_share(test_share)
    overrides, conditions = parse_overrides(column), _parse_conditions(where)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_output_folder(out, source)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf-", suffix=".partial", dir=out) as scratch:
        tree = SourceTree.open_source(source, Path(scratch))
        tables = find_tables(tree, source)
        mappings = {table.name: _map_columns(tree, table, overrides) for table in tables}
        reader = _TableReader(tree, Path(scratch), mappings, conditions, modality, further_images == "drop")
        if split is None:
            named = any(table.split or "split" in mappings[table.name].columns for table in tables)
            split = "by-row" if named else "given"
        return ingest_rows(
            lambda index: reader.iter_rows(tables, index),
            source=source,
            out=out,
            tally=IngestTally(allow_refused),
            plan=RowPlan(
                split,
                test_share,
                seed,
                salt="hf",
                link_images=True,
                further_images=further_images,
                workers=workers,
            ),
            published=read_attribution(tree),
            list_notes=reader.list_notes,
        )


def _parse_conditions(settings: Iterable[str]) -> dict[str, str]:
    conditions = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InvalidInput(f"--where: expected COLUMN=VALUE, got {setting!r}")
        conditions[name] = value
    return conditions


def _map_columns(tree: SourceTree, table: TableFile, overrides: Mapping[str, str]) -> ColumnMapping:
    """Map the columns of a table by its first rows; those of JSON may have fields that the first row lacks."""
    names: dict[str, None] = {}
    for number, row in iter_table_rows(tree.get_path(table.name)):
        if isinstance(row, dict):
            names.update(dict.fromkeys(row))
        if number >= 20:
            break
    return guess_columns(list(names), overrides, where=str(tree.root / table.name))


@dataclass
class _TableReader:
    """Turns the rows of tables into questions."""

    tree: SourceTree
    scratch: Path
    mappings: Mapping[str, ColumnMapping]
    conditions: Mapping[str, str]
    modality: str
    drop_further: bool
    notes: Counter[str] = field(default_factory=Counter)

    def iter_rows(self, tables: Sequence[TableFile], index: IngestIndex) -> Iterator[ParsedRow]:
        for table in tqdm(tables, desc="tables", unit="file", disable=None):
            mapping = self.mappings[table.name]
            for number, row in iter_table_rows(self.tree.get_path(table.name)):
                if isinstance(row, InvalidRecord):
                    yield ParsedRow(table.name, number, InvalidRow(str(row)))
                elif self._is_wanted(row, table):
                    yield from self._parse_row(row, _Position(table, number, mapping), index)

    def list_notes(self) -> list[str]:
        """The mapping of every table, once if several share it, and the counts."""
        described: dict[str, list[str]] = {}
        for name, mapping in self.mappings.items():
            described.setdefault(mapping.describe(), []).append(name)
        lines = [
            f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}" for text, names in described.items()
        ]
        return [*lines, *(f"{note}: {count}" for note, count in sorted(self.notes.items()))]

    def _is_wanted(self, row: Row, table: TableFile) -> bool:
        for column, value in self.conditions.items():
            if column not in row:
                raise InvalidRecord(f"--where {column}: {table.name} has no such column; it has {', '.join(row)}")
            if str(row[column]) != value:
                self.notes[f"rows without {column}={value}, left out"] += 1
                return False
        return True

    def _parse_row(self, row: Row, position: _Position, index: IngestIndex) -> Iterator[ParsedRow]:
        try:
            cells = _Cells(row, position.mapping)
            register_row_id(index, cells.read_text("id"), str(position), table=position.table.name)
            picture, others = self._find_images(cells, position)
            turns = _pair_turns(cells.get("conversations")) if "conversations" in position.mapping.columns else []
            if not turns:
                yield position.parse(_build_question(cells, picture, others, position))
                return
        except InvalidRow as error:
            yield position.parse(error)
            return
        self.notes["questions that follow another one of their conversation"] += len(turns) - 1
        for at, (question, answer) in enumerate(turns):
            name = f"{position}" if len(turns) == 1 else f"{position} turn {at + 1}"
            own = replace(picture, location=name)
            yield position.parse(
                SourceQuestion(
                    own,
                    question,
                    answer,
                    guess_kind(answer),
                    source_id=position.name_row(cells, at),
                    others=others,
                )
            )

    def _find_images(
        self, cells: _Cells, position: _Position
    ) -> tuple[SourceImage, tuple[tuple[SourceImage, str], ...]]:
        named = [self._store_image(value, position) for value in cells.list_images()]
        if not named:
            raise InvalidRow("image: the row has none. Give it an image, or leave it out")
        picture = SourceImage(
            location=str(position),
            image=named[0][0],
            image_name=named[0][1],
            modality=cells.read_text("modality") or self.modality,
            patient=cells.read_text("patient"),
            split=position.table.split or cells.read_text("split"),
        )
        further = named[1:]
        if further and self.drop_further:
            self.notes["further images of a question, left out as --further-images drop says"] += len(further)
            further = []
        roles = cells.list_roles(len(named))
        return picture, make_other_images(
            picture, ((path, name, roles[at]) for at, (path, name) in enumerate(further, 1))
        )

    def _store_image(self, value: Any, position: _Position) -> tuple[Path, str]:
        """Return the image's path on disk and its name in the source; raises InvalidRow."""
        content, name = value, ""
        if isinstance(value, dict):
            content, name = value.get("bytes"), value.get("path") or ""
            if content is None and name:
                content = name
        if isinstance(content, str):
            return self.tree.read_image_path(content, position.table.name), content
        if not isinstance(content, bytes):
            raise InvalidRow(f"image: expected bytes or the name of a file, got {type(content).__name__}")
        digest = hashlib.sha256(content).hexdigest()[:32]
        path = self.scratch / digest
        if not path.exists():
            path.write_bytes(content)
        return path, name or f"{digest[:12]}"


@dataclass(frozen=True)
class _Position:
    """The position of a row in the source, shown as "data/train.parquet:3"."""

    table: TableFile
    number: int
    mapping: ColumnMapping

    def __str__(self) -> str:
        return f"{self.table.name}:{self.number}"

    def parse(self, content: SourceQuestion | InvalidRow) -> ParsedRow:
        return ParsedRow(self.table.name, self.number, content)

    def name_row(self, cells: _Cells, turn: int = 0) -> str:
        name = cells.read_text("id") or str(self)
        return name if turn == 0 else f"{name}#{turn + 1}"


@dataclass(frozen=True)
class _Cells:
    """A row by field."""

    row: Row
    mapping: ColumnMapping

    def get(self, name: str) -> Any:
        column = self.mapping.columns.get(name)
        return None if column is None else self.row.get(column)

    def read_text(self, name: str) -> str:
        """A field as text; "" if it is missing. Raises InvalidRow for what is no text."""
        value = self.get(name)
        if value is None:
            return ""
        if isinstance(value, list) and len(value) == 1:  # some tables keep lists of one answer
            (value,) = value
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InvalidRow(f"{name}: expected text, got {type(value).__name__} {str(value)[:80]!r}")
        return str(value).strip()

    def list_images(self) -> list[Any]:
        """The images of the row: a list, or one; a text that is a JSON list is a list too."""
        value = self.get("image")
        if isinstance(value, str) and value.strip().startswith("["):
            value = _parse_list(value)
        values = [*(value if isinstance(value, list) else [value]), *(self.get("others") or ())]
        return [one for one in values if one is not None and one != ""]

    def list_roles(self, count: int) -> list[str]:
        value = self.get("roles")
        if value is None:
            return [f"image {at + 1}" for at in range(count)]
        if isinstance(value, list) and len(value) == count - 1:  # of the further images only
            return ["", *map(str, value)]
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, str) and v for v in value):
            raise InvalidRow(f"roles: expected a list of {count} texts, one for each image, got {value!r}")
        return value

    def list_options(self) -> tuple[str, ...]:
        """The options in their order, without their letters; raises InvalidRow."""
        value = [self.row.get(column) for column in self.mapping.lettered] or self.get("options")
        if isinstance(value, str):
            value = _parse_list(value) if value.strip() else None
        if isinstance(value, dict):
            letters = [letter for letter in OPTION_LETTERS if value.get(letter) is not None]
            if "".join(letters) != OPTION_LETTERS[: len(letters)] or set(value) - set(OPTION_LETTERS):
                raise InvalidRow(f"options: expected the letters A, B, … without a gap, got {sorted(value)}")
            value = [value[letter] for letter in letters]
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(one, str | int | None) for one in value):
            raise InvalidRow(f"options: expected a list of texts, got {str(value)[:120]!r}")
        while value and value[-1] in (None, ""):  # a table with four columns has rows with two options
            value = value[:-1]
        if not all(value):
            raise InvalidRow(f"options: one of them is empty: {value!r}")
        return _strip_letters([str(one).strip() for one in value])

    def list_boxes(self) -> tuple[Box, ...]:
        value = self.get("boxes")
        try:
            return tuple(box_from_xyxy((float(x0), float(y0), float(x1), float(y1))) for x0, y0, x1, y1 in value or ())
        except (ValidationError, TypeError, ValueError):
            raise InvalidRow(
                f"boxes: expected a list of [x0, y0, x1, y1], each from 0 to 1, got {str(value)[:120]!r}"
            ) from None

    def list_masks(self) -> tuple[RegionMask, ...]:
        """The masks of the boxes, in order."""
        value = self.get("masks") or ()
        try:
            return tuple(parse_mask(one) for one in value)
        except (TypeError, ValueError) as error:
            raise InvalidRow(f"masks: {error}. {MASKS_REMEDY}") from None

    def read_regions(self) -> tuple[tuple[Box, ...], tuple[RegionMask, ...]]:
        """The boxes and their masks; raises InvalidRow if their numbers differ."""
        masks = self.list_masks()
        try:
            return derive_boxes(masks, self.list_boxes()), masks
        except ValueError as error:
            raise InvalidRow(f"masks: {error}") from None


def _parse_list(text: str) -> Any:
    """A list or object that is written into a cell as JSON, or with Python's quotes."""
    for candidate in (text, re.sub(r"(?<![A-Za-z])'|'(?![A-Za-z])", '"', text)):
        try:
            return json.loads(candidate)
        except json.JSONDecodeError:
            continue
    raise InvalidRow(f"expected a list as JSON, got {text[:120]!r}")


def _strip_letters(options: list[str]) -> tuple[str, ...]:
    """Options without "A: ", if every one begins with its own letter."""
    matches = [_LETTER_PREFIX.match(option) for option in options]
    if all(match is not None and match[1] == OPTION_LETTERS[at] for at, match in enumerate(matches)):
        return tuple(_LETTER_PREFIX.sub("", option, count=1).strip() for option in options)
    return tuple(options)


def _build_question(
    cells: _Cells, picture: SourceImage, others: tuple[tuple[SourceImage, str], ...], position: _Position
) -> SourceQuestion:
    options = cells.list_options()
    question = _IMAGE_TOKEN.sub(" ", cells.read_text("question")).strip()
    answer = cells.read_text("answer")
    if not question:
        raise InvalidRow("question: it is empty. Write the question as text")
    if options:
        question, answer = _ANSWER_CHOICES.sub("", question), _find_right_option(cells, options, answer)
    elif not (answer := answer or cells.read_text("label")):
        raise InvalidRow("answer: it is empty. Write the answer as text")
    boxes, masks = cells.read_regions()
    return SourceQuestion(
        picture=picture,
        question=question,
        answer=answer,
        kind=_choose_kind(cells, answer, options),
        boxes=boxes,
        masks=masks,
        topic=cells.read_text("topic"),
        finding=cells.read_text("finding"),
        source_id=position.name_row(cells),
        options=options,
        others=others,
    )


def _find_right_option(cells: _Cells, options: tuple[str, ...], answer: str) -> str:
    """The text of the right option, from the answer or its label; raises InvalidRow if they disagree or name none."""
    label = cells.read_text("label")
    if label.isdigit() and label not in options:  # an index from 0
        label = OPTION_LETTERS[int(label)] if int(label) < len(options) else label
    given = [text for text in (answer, label) if text]
    for text in given:
        if fault := find_choice_fault(options, text):
            raise InvalidRow(f"options: {fault}")
    chosen = {read_choice(text, options) for text in given}
    if len(chosen) != 1:
        what = "no answer" if not chosen else f"the answer {answer!r} and the label {label!r}, which disagree"
        raise InvalidRow(f"answer: {what}. Give the letter or the text of one option")
    (at,) = chosen
    assert at is not None  # find_choice_fault has looked
    return options[at]


def _choose_kind(cells: _Cells, answer: str, options: tuple[str, ...]) -> Kind:
    if options:
        return "choice"
    stated = cells.read_text("kind").lower()
    return _KINDS[stated] if stated in _KINDS else guess_kind(answer)


def _pair_turns(turns: Any) -> list[tuple[str, str]]:
    """Pair each turn of a person with the reply; raises InvalidRow if the turns do not alternate."""
    if not isinstance(turns, list) or not turns:
        raise InvalidRow(f"conversations: expected a list of turns, got {str(turns)[:80]!r}")
    pairs: list[tuple[str, str]] = []
    question = ""
    for turn in turns:
        role, text = _read_turn(turn)
        if role in _HUMAN and not question:
            question = text
        elif role in _MODEL and question:
            pairs.append((question, text))
            question = ""
        elif role != "system":
            raise InvalidRow(f"conversations: expected a person's turn and a reply in alternation, got {role!r}")
    if question or not pairs:
        raise InvalidRow("conversations: the last question has no reply. Complete the conversation")
    if not all(question and answer for question, answer in pairs):
        raise InvalidRow("conversations: a turn is empty")
    return pairs


def _read_turn(turn: Any) -> tuple[str, str]:
    """(role, text without image tokens) of a turn in LLaVA's form (from, value) or in the chat form (role, content)."""
    if not isinstance(turn, dict):
        raise InvalidRow(f"conversations: expected an object for each turn, got {type(turn).__name__}")
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(content, list):  # parts of text and images
        content = " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if not isinstance(role, str) or not isinstance(content, str):
        raise InvalidRow(f"conversations: expected a role and a text in each turn, got {str(turn)[:80]!r}")
    return role.lower(), _IMAGE_TOKEN.sub(" ", content).strip()
