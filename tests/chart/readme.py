"""Generate the table of values in the chart's README from values.yaml, and the schema of its parameters.

    python -m tests.chart.readme --write

The comments of values.yaml have the notation of helm-docs. A comment "# -- …" above a key describes the key with all
keys below it; "# @default -- …" gives its default in words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from tests.chart.params_schema import SCHEMA, render_schema
from tests.chart.rendering import CHART

BEGIN, END = "<!-- values: begin -->", "<!-- values: end -->"
README, VALUES = CHART / "README.md", CHART / "values.yaml"


class Row(NamedTuple):
    key: str
    default: str
    about: str


def rows() -> Iterator[Row]:
    """Yield every described key, in the order of the file.

    Raises ValueError for a value without a description.
    """
    text = VALUES.read_text(encoding="utf-8")
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    yield from _below(root, "", text.splitlines())


def _below(node: yaml.MappingNode, path: str, lines: list[str]) -> Iterator[Row]:
    for key, value in node.value:
        name = f"{path}{key.value}"
        about, default = _comment(lines, key.start_mark.line)
        if about:
            shown = default or json.dumps(yaml.safe_load(yaml.serialize(value)), ensure_ascii=False)
            yield Row(name, shown, about)
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _below(value, f"{name}.", lines)
        else:
            raise ValueError(
                f"{VALUES}:{key.start_mark.line + 1}: {name} has no description; expected a comment # -- …"
            )


def _comment(lines: list[str], line: int) -> tuple[str, str]:
    """Return (description, default in words) of the comment right above a line."""
    above = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].strip().removeprefix("#").strip())
    start = next((n for n, text in enumerate(above) if text.startswith("-- ")), None)
    if start is None:
        return "", ""
    default = next((text.partition("-- ")[2] for text in above if text.startswith("@default")), "")
    about = " ".join(text for text in above[start:] if not text.startswith("@default"))
    return about.removeprefix("-- "), default


def table() -> str:
    out = ["| value | default | meaning |", "|---|---|---|"]
    for row in rows():
        cells = (
            f"`{row.key}`",
            row.default if " " in row.default and "{" not in row.default else f"`{row.default}`",
            row.about,
        )
        out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(out)


def readme() -> str:
    """Return the README with an up-to-date table."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(readme(), encoding="utf-8")
        SCHEMA.write_text(render_schema(), encoding="utf-8")
    else:
        print(table())
