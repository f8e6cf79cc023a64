"""The tokens that mean yes and no, from which P(yes) is read.

Imports nothing heavy, because a KServe transformer, which only needs the ids, has no model.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from clincot.models.checkpoint import UnsupportedCheckpoint

_YES_WORDS, _NO_WORDS = ("yes", "Yes", "YES"), ("no", "No", "NO")
# A word at the start of a line and after a space are different tokens. SentencePiece tokenizers (Llama 2) put a space
# in front of every text, so the one without a space shows only after a line break.
_BEFORE = ("", " ", "\n")


def find_yes_no_ids(tokenizer: Any, where: object) -> tuple[list[int], list[int]]:
    """(ids for yes, ids for no): every casing that is a single token, with and without a space in front.

    Raises UnsupportedCheckpoint, naming `where`, if a word has no single token or both share one.
    """
    yes, no = _find_word_ids(tokenizer, _YES_WORDS), _find_word_ids(tokenizer, _NO_WORDS)
    remedy = "use a checkpoint whose tokenizer knows yes and no"
    if set(yes) & set(no):
        raise UnsupportedCheckpoint(
            f"{where}: the tokenizer has one token for yes and no, so P(yes) cannot be read", remedy
        )
    if not yes or not no:
        raise UnsupportedCheckpoint(
            f"{where}: the tokenizer has no single token for {'yes' if not yes else 'no'!r}, so P(yes) cannot be read",
            remedy,
        )
    return yes, no


def _find_word_ids(tokenizer: Any, words: tuple[str, ...]) -> list[int]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    line_break = encode("\n")
    found = set()
    for before, word in product(_BEFORE, words):
        ids = encode(before + word)
        if ids and ids[:-1] == (line_break if before == "\n" else []):
            found.add(ids[-1])
    return sorted(found - {tokenizer.unk_token_id})


def read_yes_no_ids(checkpoint: Path) -> tuple[int, ...]:
    """The ids for yes and no of a checkpoint folder's tokenizer; () without a tokenizer.json."""
    if not (checkpoint / "tokenizer.json").is_file():
        return ()
    from transformers import AutoTokenizer

    yes, no = find_yes_no_ids(AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False), checkpoint)
    return (*yes, *no)
