"""What closed and multiple-choice questions are answered with: words for yes and no in each language, and options.

The scoring protocols, the rules of the answer format and the readers of data sets look words up here, so that a
language is added in one place. A word counts only if it is the whole answer, after `text.normalize_text`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clincot.records import OPTION_LETTERS
from clincot.text import normalize_text

Polarity = Literal["yes", "no"]


@dataclass(frozen=True)
class ClosedWords:
    """The words of one language, normalised."""

    yes: frozenset[str]
    no: frozenset[str]
    unsure: frozenset[str] = frozenset()


def _list_words(text: str) -> frozenset[str]:
    return frozenset(map(normalize_text, text.split(",")))


# Chinese answers a question with its verb, so it has many words for yes. They are those of SLAKE's Chinese closed
# questions (xiaoman-zhang/PMC-VQA, commit 97358cdb, Slake1.0/*.json) and their traditional forms.
LANGUAGES: dict[str, ClosedWords] = {
    "en": ClosedWords(
        yes=_list_words("yes"),
        no=_list_words("no"),
        unsure=_list_words("unknown,unsure,not sure,I do not know,I don't know,cannot tell,cannot say"),
    ),
    "zh": ClosedWords(
        yes=_list_words("是的,是,有,存在,包含,包括,可以,能,对,對,会,會"),
        no=_list_words("不是,否,不,没有,沒有,无,無,不存在,不包含,不包括,不可以,不能,不对,不對,不会,不會"),
        unsure=_list_words("不知道,不清楚,不确定,不確定,未知,无法判断,無法判斷,无法确定,看不出来"),
    ),
    "de": ClosedWords(_list_words("ja"), _list_words("nein"), _list_words("unklar,ich weiß nicht,nicht beurteilbar")),
    "es": ClosedWords(_list_words("sí,si"), _list_words("no"), _list_words("no sé,no lo sé,desconocido")),
    "fr": ClosedWords(_list_words("oui"), _list_words("non"), _list_words("je ne sais pas,inconnu")),
    "it": ClosedWords(_list_words("sì,si"), _list_words("no"), _list_words("non so,sconosciuto")),
    "pt": ClosedWords(_list_words("sim"), _list_words("não,nao"), _list_words("não sei,desconhecido")),
    "nl": ClosedWords(_list_words("ja"), _list_words("nee"), _list_words("onbekend,weet ik niet")),
    "pl": ClosedWords(_list_words("tak"), _list_words("nie"), _list_words("nie wiem")),
    "ru": ClosedWords(_list_words("да"), _list_words("нет"), _list_words("не знаю,неизвестно")),
    "tr": ClosedWords(_list_words("evet,var"), _list_words("hayır,yok"), _list_words("bilmiyorum")),
    "ar": ClosedWords(_list_words("نعم"), _list_words("لا"), _list_words("لا أعرف")),
    "ja": ClosedWords(
        _list_words("はい,あります,ある"), _list_words("いいえ,ありません,ない"), _list_words("わかりません,不明")
    ),
    "ko": ClosedWords(
        _list_words("예,네,있습니다"), _list_words("아니요,아니오,없습니다"), _list_words("모르겠습니다")
    ),
    "vi": ClosedWords(_list_words("có"), _list_words("không"), _list_words("không biết,không rõ")),
}
_UNSURE = frozenset[str]().union(*(words.unsure for words in LANGUAGES.values()))


def read_closed_words(text: str) -> frozenset[tuple[str, Polarity]]:
    """Return {(language, "yes" or "no")} of an answer that is nothing but such a word; empty for any other answer."""
    word = normalize_text(text)
    found: set[tuple[str, Polarity]] = set()
    for language, words in LANGUAGES.items():
        if word in words.yes:
            found.add((language, "yes"))
        if word in words.no:
            found.add((language, "no"))
    return frozenset(found)


def read_polarity(text: str) -> Polarity | None:
    """Return "yes" or "no" for an answer that is nothing but such a word, in any language of the table."""
    return next((polarity for _, polarity in read_closed_words(text)), None)


def guess_kind(answer: str) -> Literal["closed", "open"]:
    """The kind of a question whose source does not state it: closed if its answer is yes or no, else open."""
    return "closed" if read_polarity(answer) is not None else "open"


def is_same_closed_word(one: str, other: str) -> bool:
    """Whether two answers are words of one language for the same side of a yes-or-no question, as 是 and 是的 are."""
    return bool(read_closed_words(one) & read_closed_words(other))


def list_closed_words(reference: str) -> frozenset[str]:
    """List the words for yes and no of the languages that a reference is such a word of; empty if it is none."""
    words = frozenset[str]()
    for language, _ in read_closed_words(reference):
        words |= LANGUAGES[language].yes | LANGUAGES[language].no
    return words


def begins_with_yes(text: str) -> bool:
    """Whether an answer begins with a word for yes, in any format.

    In a language without spaces, no word for no may begin the answer at the same place or contain the word for yes.
    """
    normal = normalize_text(text)
    first = normal.split()[:1]
    if first and read_polarity(first[0]) is not None:
        return read_polarity(first[0]) == "yes"
    for language in ("zh", "ja"):
        words = LANGUAGES[language]
        if any(len(word) > 1 and normal.startswith(word) for word in words.no):
            return False
        if any(len(word) > 1 and normal.startswith(word) for word in words.yes):
            return True
    return False


def is_abstention(text: str) -> bool:
    """Whether an answer is empty or says that its author does not know."""
    word = normalize_text(text)
    return not word or word in _UNSURE


def split_words(text: str) -> list[str]:
    """Split a normalised text into words; each Chinese character and each Japanese kana is a word of its own.

    These scripts put no spaces between words. Overlap is then counted by characters, as in the evaluation of the
    Chinese reading benchmark CMRC 2018 (Cui et al., EMNLP 2019).
    """
    words: list[str] = []
    for word in normalize_text(text).split():
        words += split_unspaced(word)
    return words


# A Chinese character or a kana, or a run of anything else.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def split_unspaced(word: str) -> list[str]:
    """Split a word without spaces at each Chinese character and kana."""
    return _UNSPACED.findall(word)


# -------------------------------------------------------------------------------------- multiple choice

# "B", "(b)", "B.", "**B**", "Answer: B", "The answer is (B)"; what follows the letter is matched separately.
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct |final |best )?(?:answer|option|choice)(?: is)?\s*[:：]?\s*|答案(?:是|为)?\s*[:：]?\s*)?"
    r"[(\[（]?\*{0,2}([A-Za-z])\*{0,2}[)\]）]?(?=$|[\s.,:：。、)*])[\s.,:：。、*]*(.*)",
    re.IGNORECASE | re.DOTALL,
)


def read_choice(answer: str, options: Sequence[str]) -> int | None:
    """Return the position of the option that an answer names by its letter, its text or both; None if it names none.

    A letter with a text is the option only if the text is that option's, so "B. pneumonia" is none if B is another
    finding. A text that is itself a single letter is looked up among the texts first.
    """
    texts = [normalize_text(option) for option in options]
    if (normal := normalize_text(answer)) in texts:
        return texts.index(normal)
    match = _LETTER.fullmatch(" ".join(answer.split()))
    if match is None:
        return None
    at, rest = OPTION_LETTERS.index(match[1].upper()), match[2].strip()
    if at >= len(texts) or (rest and normalize_text(rest) != texts[at]):
        return None
    return at


def find_choice_fault(options: Sequence[str], answer: str) -> str:
    """Say why options and their right answer are unusable; "" if they are not."""
    texts = [normalize_text(option) for option in options]
    if not 2 <= len(options) <= len(OPTION_LETTERS):
        return f"expected 2 to {len(OPTION_LETTERS)} options, got {len(options)}"
    if not all(option.strip() for option in options):
        return f"option {OPTION_LETTERS[[not option.strip() for option in options].index(True)]} is empty"
    if repeated := [text for text in dict.fromkeys(texts) if texts.count(text) > 1]:
        return f"{texts.count(repeated[0])} options read {repeated[0]!r}"
    if read_choice(answer, options) is None:
        return f"the answer {answer!r} is none of the options {', '.join(map(repr, options))}, nor the letter of one"
    return ""
