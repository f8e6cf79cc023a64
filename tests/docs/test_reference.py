"""Generated pages of the documentation are up to date with the code."""

from __future__ import annotations

import pytest

from clincot import records
from clincot.records import Record
from clincot.stages.catalog import ARTIFACTS, STAGES
from tests.docs.generate import DOCS, PAGES, RECORD_FILES, describe_type, read_field_comments


@pytest.mark.parametrize("page", PAGES)
def test_page_is_up_to_date(page: str) -> None:
    """If this fails, run `make docs-reference` and look at the difference."""
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page]()


def test_every_artifact_of_a_stage_is_described() -> None:
    names: set[str] = set()
    for stage in STAGES:
        names.update(stage.inputs, stage.optional, stage.outputs)
    assert names <= set(ARTIFACTS)


def test_every_record_has_a_file() -> None:
    kinds = [kind.__name__ for kind in Record.__subclasses__() if kind.__module__ == records.__name__]
    assert set(RECORD_FILES) == set(kinds)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer", "minimum": 1}, "integer ≥ 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number > 0 ≤ 1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or null"),
        ({"type": "array", "items": {"$ref": "#/$defs/Box"}}, "list of Box"),
        ({"enum": ["ours", "paper"], "type": "string"}, "`ours` or `paper`"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "map to text"),
    ],
)
def test_types_are_described_in_words(schema: dict[str, object], expected: str) -> None:
    assert describe_type(schema) == expected


class Commented(Record):
    """A model with every kind of comment."""

    size: int  # pixels
    # a comment above
    name: str = ""
    plain: str = ""


def test_comments_of_fields_are_read() -> None:
    assert read_field_comments(Commented) == {"size": "pixels", "name": "a comment above", "plain": ""}
