"""Normalisation of answers as the VQA protocols define it, and the layout of tables and intervals."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from clincot.records import Interval

_ARTICLES = frozenset({"a", "an", "the"})

_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

_APOSTROPHE = re.compile("['’‘ʼ]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FULL_STOP = re.compile(r"\.(?!\d)")  # a dot before a digit is a decimal point


def normalize_text(text: str) -> str:
    """Lower the case, drop punctuation, articles and apostrophes, and replace number words ("two" becomes "2").

    Number words follow the VQA evaluation from which the LLaVA-Med scorer took its normalisation ("none" becomes
    "0"). One difference: "<" and ">" stay, because "<5 mm" and ">5 mm" are different answers. A text of which nothing
    would be left (the option "A", or "-" for an absent finding) is only lowered, so an empty answer never matches it.
    """
    lower = unicodedata.normalize("NFKC", text).lower().strip()
    bare = _FULL_STOP.sub("", _THOUSANDS.sub("", _APOSTROPHE.sub("", lower)))
    words = "".join(" " if _is_separator(character) else character for character in bare).split()
    content = [_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(content or words) or lower


def _is_separator(character: str) -> bool:
    """Return whether a character separates words: punctuation except "." and "%", and the symbols "=", "+", "`"."""
    return character in "=+`" or (character not in ".%" and unicodedata.category(character).startswith("P"))


def format_count(number: int, noun: str) -> str:
    """Format a number with its noun, as in "1 image" and "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --------------------------------------------------------------------------------------------------- Markdown


def markdown_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    layout: Literal["compact", "spaced", "aligned"] = "compact",
) -> str:
    """Render a Markdown table, without a final newline; escape pipes and line breaks in cells.

    layout: "compact" draws the rule below the heading as |---|---|, "spaced" as | --- | --- |; "aligned" also pads
    every cell to the width of its column, so that the table reads well in a terminal.
    """
    escaped = [list(map(_escape_cell, row)) for row in (head, *rows)]
    if layout == "aligned":
        widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
        escaped = [list(map(str.ljust, row, widths)) for row in escaped]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    else:
        dashes = " --- " if layout == "spaced" else "---"
        rule = "|" + f"{dashes}|" * len(head)
    heading = "|" + "|".join(f" {cell} " if cell else " " for cell in escaped[0]) + "|"
    return "\n".join([heading, rule, *("| " + " | ".join(row) + " |" for row in escaped[1:])])


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line for each row, its cells two spaces apart and as wide as the widest of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def format_interval(interval: Interval | None, *, decimals: int = 3, signed: bool = False, missing: str = "–") -> str:
    """Format an interval as "value [low, high]", or as "value" if its limits are unknown.

    signed: print a plus sign before positive numbers. missing: the text for no interval and for one without a value.
    """
    if interval is None or interval.value is None:
        return missing
    number = f"{'+' if signed else ''}.{decimals}f"
    if interval.low is None or interval.high is None:
        return f"{interval.value:{number}}"
    return f"{interval.value:{number}} [{interval.low:{number}}, {interval.high:{number}}]"


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
