"""Text normalisation of answers, as the VQA protocols define it."""

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
    """Lower case, without punctuation, articles or the apostrophes of contractions; "two" becomes "2".

    Number words follow the VQA evaluation that the llava-med scorer took its normalisation from ("none" is 0
    there). One departure: "<" and ">" stay, since "<5 mm" and ">5 mm" are different answers. Where nothing would
    be left ("A" as an option's letter, "-" as a finding's absence) the text is kept, so that an empty answer
    never matches.
    """
    lower = unicodedata.normalize("NFKC", text).lower().strip()
    bare = _FULL_STOP.sub("", _THOUSANDS.sub("", _APOSTROPHE.sub("", lower)))
    words = "".join(" " if _is_separator(character) else character for character in bare).split()
    kept = [_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or lower


def _is_separator(character: str) -> bool:
    """Punctuation, but for the decimal point and the unit "%"; and three symbols that the scorer strips as well."""
    return character in "=+`" or (character not in ".%" and unicodedata.category(character).startswith("P"))
