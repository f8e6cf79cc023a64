"""WordNet for METEOR: NLTK's own data, or the files of Debian's package wordnet-base (WordNet 3.0)."""

from __future__ import annotations

import io
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

DEBIAN = Path("/usr/share/wordnet")
VARIABLE = "CLINCOT_WORDNET"
# wordnet-base lacks the file `lexnames` (only its manual page lists them); the position is the number.
_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
)


class WordNetMissing(LookupError):
    """WordNet is in none of the places looked at; the message says how to get it."""


def load_wordnet() -> tuple[Any, str]:
    """(reader, "WordNet" and its version). Looked for in $CLINCOT_WORDNET, NLTK's data and /usr/share/wordnet.

    Never downloaded. Raises WordNetMissing. Reading takes some seconds, so the reader is kept.
    """
    return _load(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=1)
def _load(named: str) -> tuple[Any, str]:
    import nltk

    if named:
        if not (Path(named) / "data.noun").is_file():
            raise WordNetMissing(f"WordNet not found: {VARIABLE} is {named}, which has no file data.noun")
        return _named(_reader(Path(named)))
    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        return _named(wordnet)
    if (DEBIAN / "data.noun").is_file():
        return _named(_reader(DEBIAN))
    raise WordNetMissing(
        f"WordNet not found in NLTK's data folders or {DEBIAN}: `apt-get install wordnet-base`, or name a folder with "
        f"its files in {VARIABLE}"
    )


def _named(reader: Any) -> tuple[Any, str]:
    return reader, f"WordNet {reader.get_version()}"


def _reader(folder: Path) -> Any:
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Bare(WordNetCorpusReader):  # type: ignore[misc]  # nltk has no types
        """The database files alone: English, without sense keys."""

        def open(self, file: str) -> IO[str]:
            if file == "lexnames" and not (folder / file).is_file():
                return io.StringIO("".join(f"{at:02d}\t{name}\t0\n" for at, name in enumerate(_LEXNAMES.split())))
            opened: IO[str] = super().open(file)
            return opened

        def map_wn(self, version: str = "wordnet") -> None:
            """No mapping to another WordNet: only other languages need it."""

    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # NLTK reads no files outside its data folders
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return Bare(str(folder), None)
