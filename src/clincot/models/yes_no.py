"""The tokens that mean yes and no, from which P(yes) is read.

Imports nothing heavy, because a KServe transformer, which only needs the ids, has no model.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from clincot.models.checkpoint import UnsupportedCheckpoint

_YES_WORDS, _NO_WORDS = ("yes", "Yes", "YES"), ("no", "No", "NO")
# A word at the start of a line and after a space are different tokens: "yes" and " yes", which byte-level vocabularies
# (GPT-2, Qwen, Llama 3) spell with U+0120 and SentencePiece ones (Llama 2, Gemma) with U+2581. Looking them up covers
# tokenizers that put a space in front of every text and so never give the token without one.
_SPACES = ("", " ", "\u0120", "\u2581")


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
    spellings = [space + word for space, word in product(_SPACES, words)]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
    ids = {tokens[0] for tokens in encoded if len(tokens) == 1}
    ids |= {tokenizer.convert_tokens_to_ids(text) for text in spellings}
    return sorted(ids - {tokenizer.unk_token_id, None})


def read_yes_no_ids(checkpoint: Path) -> tuple[int, ...]:
    """The ids for yes and no of a checkpoint folder's tokenizer; () without a tokenizer.json."""
    if not (checkpoint / "tokenizer.json").is_file():
        return ()
    from transformers import AutoTokenizer

    yes, no = find_yes_no_ids(AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False), checkpoint)
    return (*yes, *no)
