"""Normalisation of answers, as the VQA evaluation protocols define it."""

from __future__ import annotations

import re
import unicodedata

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
