"""The protocol `parsed`: what an answer in sentences commits itself to, as pure functions of strings.

Medical vision-language models answer "Yes, there is a small left pleural effusion." where the reference is "yes".
The protocol `strict` calls that off format, and `llava-med` looks for substrings. This one reads three kinds of
commitment and compares them with the reference:

- yes or no, said outright or by a statement about what the question asks for ("no evidence of effusion");
- one of the alternatives that the question offers ("left or right?"), or a side;
- a number with its unit.

An answer that says two things, or hedges ("cannot be excluded"), commits itself to nothing. It is unscored and counted,
never guessed. So is every reference of another kind: those are for exact match or for a panel of judges.

Negation follows the idea of NegEx (Chapman et al., J. Biomed. Inform. 34, 2001): a cue negates the words after it up to
the end of the clause, or the words before it ("is not seen"). English and Chinese are read; tests/evaluation holds 200
sentences with the reading that a person gave them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from clincot.datasets.closed_answers import read_polarity
from clincot.text import normalize_text

# A word of an answer is its yes or no if the sentence ends or goes on after it: "no effusion" is a statement.
_ALONE = r"(?=\s*(?:$|[,.;:!，。；：！—-])|\s+(?:there|it|this|the|that|i|we)\b)"
_YES = re.compile(
    rf"^(?:yes|yeah|yep|correct|affirmative|indeed|true|certainly|definitely|是的?|对|有|存在|可见|包含|包括|可以|能){_ALONE}"
)
_NO = re.compile(
    rf"^(?:no|nope|incorrect|negative|false|否|不是?|没有?|无|未见|不存在|不包含|不包括|不可以|不能){_ALONE}"
)
_BOTH_WORDS = re.compile(r"\b(?:yes (?:and|or) no|no (?:and|or) yes|yes / no|yes/no)\b")
_HEDGES = re.compile(
    r"\b(?:may|might|could|possib\w+|perhaps|maybe|questionable|equivocal|indeterminate|uncertain|unclear|unsure|"
    r"not sure|not certain|not possible to|(?:can ?not|can't|unable to|difficult to|hard to|impossible to)"
    r" (?:be )?(?:definitively |reliably |fully |completely |entirely )?"
    r"(?:exclude\w*|rule[d]? out|determine\w*|assess\w*|tell|say|confirm\w*|answer\w*|evaluate\w*|judge\w*)|"
    r"not (?:be )?excluded|cannot exclude|versus|vs)\b"
    r"|可能|也许|不确定|不能确定|无法|难以|疑似|不排除|不除外|不能排除|待排"
)
_SENTENCES = re.compile(r"(?<=[.!?;。！？；])\s*|\n+")
_CLAUSE_ENDS = re.compile(
    r",? \b(?:but|however|although|though|yet|while|whereas|except|apart from|aside from|otherwise|rather|instead)\b"
    r"|, (?=there (?:is|are)\b|which\b|and there\b)|\band (?=(?:is|are|was|were|has|have|does|do) )"
    r"|，(?:但|而|却)|但是?|然而"
)
_BEFORE = re.compile(
    r"\b(?:no|not|nothing|without|absence of|negative for|free of|lack of|lacks|never|neither|nor|none of|denies|"
    r"ruled? out|"
    r"rules out|unlikely|cannot see|can not see|don't see|do not see|does not|doesn't|isn't|aren't|fails? to|absent)\b"
    r"|没有|未见|未发现|未显示|不存在|不是|并非|无"
)
_AFTER = re.compile(
    r"\b(?:(?:is|are|was|were|has|have|can) (?:not|n't)|isn't|aren't|wasn't|(?:has|have) resolved|"
    r"cannot be (?:seen|identified|visuali[sz]ed)|"
    r"(?:is|are|was|were|appears?|looks?) (?:absent|unlikely|excluded|ruled out|negative)|"
    r"not (?:seen|present|visible|identified|evident|demonstrated|appreciated|detected|observed))\b"
    r"|(?:不存在|未见|没有|不明显|阴性|不可见|未显示)"
)
_NOT_NEGATED = re.compile(r"\bnot only\b|\bno (?:doubt|longer absent)\b|\bnot without\b")
_ABNORMAL = re.compile(r"\b(?:abnormal\w*|not normal|异常|不正常)\b|异常|不正常")
_NORMALITY = re.compile(r"\b(?:normal|unremarkable|healthy|clear)\b|正常|清晰")
# Words of a question that do not say what it asks for.
_FUNCTION_WORD = re.compile(
    r"a|an|the|is|are|was|were|be|been|do|does|did|can|could|there|this|that|these|those|it|its|in|on|of|at|to|from|by|"
    r"for|with|and|or|any|some|image|picture|film|scan|x|ray|xray|radiograph|mri|ct|chest|patient|shows?|shown|see|seen|"
    r"visible|present|evidence|signs?|identified|demonstrates?|have|has|find|findings?|which|what|where|who|how|many|"
    r"much|you|we|i|one"
)
_PLACE = re.compile(r"\b(?:in|on|under|within|at|below|above|over|near)\b.*")  # where it is asked for
_CHINESE_ASKING = re.compile(
    r"这张|该|此|图像|图片|图|影像|片子|胸片|患者|病人|中|里|上|是否|有没有|是不是|存在|出现|显示|可见|有|是|吗|呢|的|任何|什么|否"
)
_SIDES = {
    "left": re.compile(r"\bleft(?:-sided)?\b|左"),
    "right": re.compile(r"\bright(?:-sided)?\b|右"),
    "bilateral": re.compile(
        r"\b(?:bilateral(?:ly)?|both (?:sides|lungs|lobes|kidneys|hemispheres))\b|双侧|两侧|双肺|两肺"
    ),
}
_UNITS = {"mm": ("length", 1.0), "cm": ("length", 10.0), "m": ("length", 1000.0), "%": ("share", 1.0)}
_UNIT_NAMES = {"millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "percent": "%"}
_NUMBER_WORD = re.compile(r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|none)\b")
_NUMBER = re.compile(
    r"(?<![\w.])(\d+(?:\.\d+)?)\s*(mm|cm|m|%|millimet(?:er|re)s?|centimet(?:er|re)s?|percent)?(?![\w.]*\d)",
    re.IGNORECASE,
)


def can_parse(question: str, reference: str) -> bool:
    """Whether the protocol reads references of this kind: yes or no, a side, a quantity, or an offered alternative.

    A reference that the protocol would not grade as right itself ("both", of two alternatives) is of no such kind.
    """
    return _grade(reference, question, reference) is True


def grade_parsed(answer: str, question: str, reference: str) -> bool | None:
    """Whether an answer commits itself to the reference; None if it does to nothing, or if can_parse is False.

    `question` says what a statement has to be about, and which alternatives there are.
    """
    return _grade(answer, question, reference) if can_parse(question, reference) else None


def _grade(answer: str, question: str, reference: str) -> bool | None:
    expected = _read_reference(reference)
    if expected in ("yes", "no"):
        said = parse_yes_no(answer, question)
    elif expected in _SIDES:
        said = parse_side(answer)
    elif _is_bare_quantity(reference):
        quantity, found = parse_quantity(reference), parse_quantity(answer)
        return None if quantity is None or found is None or found[0] != quantity[0] else found[1] == quantity[1]
    else:
        said = parse_alternative(answer, _list_alternatives(question))
    return None if said is None else said == expected


def read_yes_no(reference: str) -> str:
    """ "yes" or "no" if an answer key says so, in English or Chinese; "" for a reference of another kind."""
    word = _read_reference(reference)
    return word if word in ("yes", "no") else ""


def parse_yes_no(answer: str, question: str) -> str | None:
    """Read "yes" or "no" from an answer; None if it says neither, both, or hedges."""
    text = _prepare(answer)
    if not text or _BOTH_WORDS.search(text) or _HEDGES.search(text):
        return None
    outright = _read_outright(text)
    if outright is None:
        return _read_statement(text, question)
    later = _read_outright_again(text)
    return None if later is not None and later != outright else outright


def parse_side(answer: str) -> str | None:
    """Read "left", "right" or "bilateral"; None if the answer names none, or left and right apart, or denies one."""
    text = _prepare(answer)
    if _HEDGES.search(text):
        return None
    named = [side for side, pattern in _SIDES.items() if _find_asserted(text, pattern)]
    if "bilateral" in named:
        return "bilateral"
    return named[0] if len(named) == 1 else None


def parse_alternative(answer: str, alternatives: Sequence[str]) -> str | None:
    """Read the one of the alternatives that an answer names; None if it names none, several, or only denies it."""
    text = _prepare(answer)
    if _HEDGES.search(text):
        return None
    distinct = list(dict.fromkeys(alternatives))
    named = [word for word in distinct if word and _find_asserted(text, re.compile(rf"(?<!\w){re.escape(word)}(?!\w)"))]
    # "upper lobe" names "lobe" too: what is part of another named alternative was not meant
    listed = "\n".join(named)
    whole = [word for word in named if listed.count(word) == 1]
    return whole[0] if len(whole) == 1 and len(distinct) > 1 else None


def parse_quantity(text: str) -> tuple[str, float] | None:
    """Read (dimension, value): "2.5 cm" is ("length", 25.0) in mm, "three" is ("", 3.0); None for none or several."""
    found = set()
    for number, unit in _NUMBER.findall(_prepare(text, spell_numbers=True)):
        name = unit.lower().removesuffix("s")
        dimension, factor = _UNITS.get(_UNIT_NAMES.get(name, name), ("", 1.0))
        found.add((dimension, round(float(number) * factor, 6)))
    return found.pop() if len(found) == 1 else None


def _prepare(text: str, *, spell_numbers: bool = False) -> str:
    """Lower the case and unify quotes and spaces; `spell_numbers` turns number words into digits."""
    text = " ".join(text.lower().replace("’", "'").replace("*", "").split()).strip("\"' ")
    if spell_numbers:
        return _NUMBER_WORD.sub(lambda match: normalize_text(match[0]), text)
    return text


def _read_reference(reference: str) -> str:
    if (polarity := read_polarity(reference)) is not None:
        return polarity
    word = normalize_text(reference)
    return {"左": "left", "左侧": "left", "右": "right", "右侧": "right", "双侧": "bilateral", "both": "bilateral"}.get(
        word, word
    )


def _read_outright(text: str) -> str | None:
    """Yes or no as the first word of an answer, or as its conclusion ("the answer is yes")."""
    text = re.sub(r"^(?:(?:the )?answer(?: is)?:? |based on [^,]*, |in (?:this|the) [^,]*, |答案是?[:：]?)", "", text)
    if _NO.match(text):
        return "no"
    return "yes" if _YES.match(text) else None


def _read_outright_again(text: str) -> str | None:
    """A second yes or no that begins a later sentence."""
    for sentence in [part for part in _SENTENCES.split(text) if part][1:]:
        if (said := _read_outright(sentence)) is not None:
            return said
    return None


def _read_statement(text: str, question: str) -> str | None:
    """Yes or no from statements about what the question asks for; None without one, or if they disagree."""
    asked = _prepare(question)
    if _NORMALITY.search(asked) or _ABNORMAL.search(asked):
        return _read_normality(text, abnormal=bool(_ABNORMAL.search(asked)))
    topic = _find_topic_word(asked)
    said = {
        "no" if _is_negated(clause, match.start(), match.end()) else "yes"
        for clause in _iter_clauses(text)
        if topic and (match := _match_word(topic, clause)) and not _names_other_side(clause, asked)
    }
    return said.pop() if len(said) == 1 else None


def _read_normality(text: str, *, abnormal: bool) -> str | None:
    """Whether an answer calls something normal, for a question that asks for it; `abnormal`: asks for the opposite."""
    is_abnormal, without = bool(_ABNORMAL.search(text)), _ABNORMAL.sub(" ", text)
    is_normal = _find_asserted(without, _NORMALITY)
    denied = bool(_NORMALITY.search(without)) and not is_normal
    if is_abnormal and not _find_asserted(text, _ABNORMAL):  # "no abnormality"
        is_abnormal, is_normal = False, True
    if (is_abnormal or denied) == is_normal:
        return None
    return "yes" if is_normal != abnormal else "no"


def _find_topic_word(question: str) -> str:
    """The word of a question that a statement has to name to answer it: what is asked for, or what is said of it.

    In "Is there a mass in the left lung?" it is "mass", in "Is the trachea midline?" it is "midline"; "" without one.
    """
    chinese = re.findall(r"[\u4e00-\u9fff]+", question)
    if chinese:
        words = [word for word in _CHINESE_ASKING.sub(" ", " ".join(chinese)).split() if len(word) > 1]
        return words[-1] if words else ""
    words = [
        word for word in re.findall(r"[a-z][a-z-]+", _PLACE.sub("", question)) if not _FUNCTION_WORD.fullmatch(word)
    ]
    return words[-1] if words else ""


def _match_word(word: str, clause: str) -> re.Match[str] | None:
    """Where a clause names a word, in the singular or the plural."""
    if not word.isascii():
        return re.search(re.escape(word), clause)
    return re.search(rf"\b{re.escape(word.removesuffix('s').removesuffix('e'))}\w*", clause)


def _names_other_side(clause: str, question: str) -> bool:
    """Whether a question asks about one side and a clause speaks of the other side alone."""
    for side, other in (("left", "right"), ("right", "left")):
        if _SIDES[side].search(question) and not _SIDES[other].search(question):
            return bool(_SIDES[other].search(clause)) and not _SIDES[side].search(clause)
    return False


def _iter_clauses(text: str) -> Iterator[str]:
    for sentence in _SENTENCES.split(text):
        yield from (clause for clause in _CLAUSE_ENDS.split(sentence) if clause and clause.strip())


def _is_negated(clause: str, start: int, end: int) -> bool:
    """Whether a cue of negation before or after the words at [start, end) applies to them."""
    before = _NOT_NEGATED.sub(" ", clause[:start])
    return bool(_BEFORE.search(before) or _AFTER.search(clause[end:]))


def _find_asserted(text: str, pattern: re.Pattern[str]) -> bool:
    """Whether some clause names the pattern without negating it."""
    for clause in _iter_clauses(text):
        for match in pattern.finditer(clause):
            if not _is_negated(clause, match.start(), match.end()):
                return True
    return False


def _list_alternatives(question: str) -> list[str]:
    """The alternatives that a question offers: "smooth, spiculated or cavitating", "left or right"."""
    text = _prepare(question).rstrip("?？ ")
    if " or " in text:
        before, last = text.rsplit(" or ", 1)
        *earlier, previous = before.split(", ")
        listed = [part.split()[-1] for part in (*earlier[1:], previous) if part.split()]
        if earlier:
            listed.insert(0, earlier[0].split()[-1])
        words = last.split()
        return [normalize_text(word) for word in (*listed, *words[:1], last)]
    match = re.search(r"([\u4e00-\u9fff]{1,4})还是([\u4e00-\u9fff]{1,4})", text)
    return [] if match is None else [match.group(1), match.group(2)]


def _is_bare_quantity(reference: str) -> bool:
    """Whether a reference is a quantity and nothing else, as "2 cm" and "three" are and "T2" is not."""
    rest, quantities = _NUMBER.subn(" ", _prepare(reference, spell_numbers=True))
    return quantities == 1 and not re.search(r"[\w\u4e00-\u9fff]", rest)
