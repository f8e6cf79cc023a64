"""Which column of a table is the question, the answer, the image and so on: guessed by name, shown, and overridable.

The names are those of published data sets (the tests name where each layout was read). A guess is by name only, never
by looking at the cells, so that the same table is always read in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord
from clincot.records import OPTION_LETTERS

# field -> the names of its column, without case, spaces and marks; the first that a table has is taken.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "images", "imagepath", "imagepaths", "figurepath", "imgname", "img", "imagename", "imagefile"),
        *("filename", "picture", "path"),
    ),
    "others": ("otherimages",),
    "question": ("question", "query", "problem", "prompt", "instruction", "input"),
    "answer": ("answer", "anwser", "gtanswer", "answers", "response", "solution", "output"),
    "label": ("answerlabel", "anwserlabel", "answeridx", "answerletter", "label", "correctoption"),
    "options": ("options", "choices"),
    "conversations": ("conversations", "conversatons", "messages"),  # the second spelling is LLaVA-Med's
    "kind": ("answertype", "kind"),
    "topic": ("topic", "contenttype", "questiontype", "medicaltask"),
    "modality": ("modality", "modalitytype"),
    "patient": ("patient", "patientid", "subjectid"),
    "split": ("split",),
    "roles": ("roles", "imageroles", "views"),
    "boxes": ("boxes",),
    "masks": ("masks",),
    "finding": ("finding",),
    "id": ("id", "qid", "questionid"),
}
FIELDS = tuple(COLUMN_NAMES)
_OPTION_COLUMN = re.compile(r"(?:option|choice)s?([a-j])")


@dataclass(frozen=True)
class ColumnMapping:
    """The column of each field, and the columns of lettered options in their order."""

    columns: Mapping[str, str]
    lettered: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the report: what was read from where, and what was not read."""
        parts = [f"{name} from {column!r}" for name, column in self.columns.items()]
        parts += [f"options from {', '.join(map(repr, self.lettered))}"] * bool(self.lettered)
        left = f"; not read: {', '.join(map(repr, self.unused))}" if self.unused else ""
        return f"columns: {', '.join(parts)}{left}"


def parse_overrides(settings: Iterable[str]) -> dict[str, str]:
    """Parse FIELD=COLUMN settings; COLUMN may be empty, so that the field is not read. Raises InvalidInput."""
    overrides = {}
    for setting in settings:
        name, equals, column = setting.partition("=")
        if not equals or name not in FIELDS:
            raise InvalidInput(f"--column: expected FIELD=COLUMN with a FIELD of {', '.join(FIELDS)}, got {setting!r}")
        overrides[name] = column
    return overrides


def guess_columns(names: Sequence[str], overrides: Mapping[str, str], *, where: str) -> ColumnMapping:
    """Map fields to the columns of a table.

    Raises InvalidRecord, with the table's columns, if an override names none of them or if image, question or answer
    are not found.
    """
    by_plain: dict[str, str] = {}
    for name in names:
        by_plain.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), name)
    columns = {}
    for field, known in COLUMN_NAMES.items():
        if field in overrides:
            if overrides[field] and overrides[field] not in names:
                raise InvalidRecord(
                    _describe_missing(where, names, f"--column {field}: no column {overrides[field]!r}")
                )
            column = overrides[field]
        else:
            column = next((by_plain[name] for name in known if name in by_plain), "")
        if column:
            columns[field] = column
    lettered = {} if "options" in columns else _find_lettered(by_plain)
    used = {*columns.values(), *lettered.values()}
    _check_complete(columns, bool(lettered), names, where)
    return ColumnMapping(
        columns=columns,
        lettered=tuple(lettered[letter] for letter in sorted(lettered)),
        unused=tuple(name for name in names if name not in used),
    )


def _find_lettered(by_plain: Mapping[str, str]) -> dict[str, str]:
    """Find {letter: column} of columns such as "option_A" and "Choice A"; they must begin with A and have no gap."""
    found = {}
    for plain, name in by_plain.items():
        if match := _OPTION_COLUMN.fullmatch(plain):
            found[match[1].upper()] = name
    complete = OPTION_LETTERS[: len(found)]
    return found if "".join(sorted(found)) == complete else {}


def _check_complete(columns: Mapping[str, str], lettered: bool, names: Sequence[str], where: str) -> None:
    needed = ["image"] if "conversations" in columns else ["image", "question"]
    missing = [field for field in needed if field not in columns]
    has_answer = bool({"conversations", "answer", "label"} & set(columns))
    if not has_answer:
        missing.append("answer")
    if missing:
        raise InvalidRecord(
            _describe_missing(where, names, f"no column is known to hold the {' and the '.join(missing)}")
        )


def _describe_missing(where: str, names: Sequence[str], fault: str) -> str:
    return (
        f"{where}: {fault}. The columns are {', '.join(map(repr, names))}; name one with --column FIELD=COLUMN, for"
        f" instance --column question={names[0] if names else 'text'}"
    )
