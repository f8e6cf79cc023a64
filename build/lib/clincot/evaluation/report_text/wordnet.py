"""WordNet for METEOR: NLTK's own data or the files of Debian's package wordnet-base (WordNet 3.0)."""

from __future__ import annotations

import io
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

DEBIAN_WORDNET = Path("/usr/share/wordnet")
WORDNET_VARIABLE = "CLINCOT_WORDNET"
# wordnet-base lacks the file `lexnames`, which only its manual page lists; a name's position is its number.
_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
)


class WordNetMissing(LookupError):
    """WordNet is not in any of the known locations; the message says how to install it."""


def load_wordnet() -> tuple[Any, str]:
    """Return a WordNet reader and its name with version, such as "WordNet 3.0".

    Looks in $CLINCOT_WORDNET, NLTK's data and /usr/share/wordnet, in this order, and downloads nothing. The reader is
    cached, because loading takes seconds. Raises WordNetMissing.
    """
    return _find_wordnet(os.environ.get(WORDNET_VARIABLE, ""))


@lru_cache(maxsize=1)
def _find_wordnet(named: str) -> tuple[Any, str]:
    import nltk

    if named:
        if not (Path(named) / "data.noun").is_file():
            raise WordNetMissing(f"WordNet not found: {WORDNET_VARIABLE} is {named}, which has no file data.noun")
        return _with_version(_open_reader(Path(named)))
    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        return _with_version(wordnet)
    if (DEBIAN_WORDNET / "data.noun").is_file():
        return _with_version(_open_reader(DEBIAN_WORDNET))
    raise WordNetMissing(
        f"WordNet not found in NLTK's data folders or {DEBIAN_WORDNET}: `apt-get install wordnet-base`, or name a "
        f"folder with its files in {WORDNET_VARIABLE}"
    )


def _with_version(reader: Any) -> tuple[Any, str]:
    return reader, f"WordNet {reader.get_version()}"


def _open_reader(folder: Path) -> Any:
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Bare(WordNetCorpusReader):  # type: ignore[misc]  # nltk has no types
        """Reader of the bare database files: English only, without sense keys."""

        def open(self, file: str) -> IO[str]:
            if file == "lexnames" and not (folder / file).is_file():
                return io.StringIO("".join(f"{at:02d}\t{name}\t0\n" for at, name in enumerate(_LEXNAMES.split())))
            opened: IO[str] = super().open(file)
            return opened

        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the mapping to other WordNet versions, which only other languages need."""

    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # NLTK refuses to read files outside its data folders
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return Bare(str(folder), None)
