"""The tokens that mean yes and no, from which P(yes) is read.

Imports nothing heavy, because a KServe transformer, which only needs the ids, has no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clincot.models.checkpoint import UnsupportedCheckpoint

_YES_WORDS, _NO_WORDS = ("yes", "Yes", " yes", " Yes", "YES"), ("no", "No", " no", " No", "NO")


def find_yes_no_ids(tokenizer: Any, where: object) -> tuple[list[int], list[int]]:
    """(ids for yes, ids for no): every casing that is a single token.

    Raises UnsupportedCheckpoint, naming `where`, if a word has no single token or both share one.
    """

    def ids(words: tuple[str, ...]) -> list[int]:
        tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return sorted({t[0] for t in tokens if len(t) == 1 and t[0] != tokenizer.unk_token_id})

    yes, no = ids(_YES_WORDS), ids(_NO_WORDS)
    if set(yes) & set(no):
        raise UnsupportedCheckpoint(f"{where}: the tokenizer has one token for yes and no, so P(yes) cannot be read")
    if not yes or not no:
        raise UnsupportedCheckpoint(
            f"{where}: the tokenizer has no single token for {'yes' if not yes else 'no'!r}, so P(yes) cannot be read; "
            "use a checkpoint whose tokenizer knows yes and no"
        )
    return yes, no


def read_yes_no_ids(checkpoint: Path) -> tuple[int, ...]:
    """The ids for yes and no of a checkpoint folder's tokenizer; () without a tokenizer.json."""
    if not (checkpoint / "tokenizer.json").is_file():
        return ()
    from transformers import AutoTokenizer

    yes, no = find_yes_no_ids(AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False), checkpoint)
    return (*yes, *no)
