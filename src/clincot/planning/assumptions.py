"""What a plan assumes beyond recipe, data and data sheets, each with its default and where it is from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from clincot.errors import InvalidInput


def _assume(default: float, meaning: str, source: str, *, least: float = 0.0, most: float = float("inf")) -> Any:
    metadata = {"meaning": meaning, "source": source, "least": least, "most": most}
    return field(default=default, metadata=metadata)


def _assume_share(default: float, meaning: str, source: str) -> Any:
    return _assume(default, meaning, source, least=0.0, most=1.0)


def _assume_utilization(default: float, meaning: str, source: str) -> Any:
    return _assume(default, meaning, source, least=1e-6, most=1.0)


_NOT_MEASURED = "assumed; not measured on this GPU"


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan; `clincot plan --assume NAME=VALUE` replaces one."""

    prefill_utilization: float = _assume_utilization(
        0.4, "share of the peak in prefill", f"{_NOT_MEASURED}; .76 is the best of PaLM 540B (arXiv 2211.05102)"
    )
    vision_utilization: float = _assume_utilization(0.3, "share of the peak in the vision tower", _NOT_MEASURED)
    decode_bandwidth: float = _assume_utilization(
        0.6, "share of the memory bandwidth while tokens are written one by one", _NOT_MEASURED
    )
    train_utilization: float = _assume_utilization(
        0.35, "share of the peak in training", f"{_NOT_MEASURED}; .38 to .43 is Llama 3's (arXiv 2407.21783, table 4)"
    )
    layer_s: float = _assume(
        5e-4, "seconds of Python and kernel launches for a layer in a forward pass of transformers", _NOT_MEASURED
    )
    request_s: float = _assume(
        1e-3,
        "seconds of the CPU for a request: template, tokens, records",
        "the small model on one core (benchmarks/plan_accuracy.py)",
    )
    picture_s: float = _assume(
        0.02,
        "seconds of the CPU for a picture: decode, crop, resize",
        "a PNG of 1,024 x 1,024 pixels on one core: .03 to decode it for two pictures, .005 for each",
    )
    draw_s: float = _assume(
        1.5e-8, "seconds of the CPU to draw the noise of one vocabulary entry of a sampled token", "numpy on one core"
    )
    step_s: float = _assume(0.0, "seconds of an optimizer step beyond its operations and bytes", _NOT_MEASURED)
    cache_hits: float = _assume_share(
        0.6, "share of prompt tokens in the prefix cache; vLLM only", "7 regions, 2 judges: 275 of 793 million distinct"
    )
    answer_share: float = _assume_share(
        1.0, "tokens of an answer as a share of max_new_tokens", "the most there can be; --like measures it"
    )
    written_kept: float = _assume_share(
        1.0, "share of the written regions that are read and kept", "the most there can be; --like measures it"
    )
    characters_per_token: float = _assume(
        4.0, "characters of a text token, where no tokenizer is at hand", "rule of thumb for English", least=0.1
    )
    turn_tokens: float = _assume(8.0, "tokens of a chat template for each turn, where none is at hand", "assumed")
    question_characters: float = _assume(
        40.0, "length of a question, where only their number is given", "assumed", least=1.0
    )
    findings_per_question: float = _assume(
        1.15, "(image, finding) pairs for each question, where only their number is given", "SLAKE: 5,637 of 4,919"
    )
    film_px: float = _assume(1024.0, "side of an image in pixels, where only their number is given", "SLAKE", least=64)
    shard_hours: float = _assume(
        4.0, "hours that a shard may take", "a task that is lost repeats one stage", least=0.01
    )

    def describe(self) -> Iterator[tuple[str, float, str, str]]:
        """(name, value, meaning, source) of each assumption; the source of one that was set says so."""
        for one in fields(self):
            value = getattr(self, one.name)
            source = one.metadata["source"] if value == one.default else "set (--assume)"
            yield one.name, value, one.metadata["meaning"], source


def parse_assumptions(words: Iterable[str], base: Assumptions | None = None) -> Assumptions:
    """The assumptions with those of NAME=VALUE replaced. Raises InvalidInput for an unknown name or a bad value."""
    known = {one.name: one.metadata for one in fields(Assumptions)}
    changed: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            raise InvalidInput(f"--assume {word}: no assumption is called {name!r}; there are {', '.join(known)}")
        try:
            value = float(text)
        except ValueError:
            raise InvalidInput(f"--assume {word}: expected a number, got {text!r}") from None
        if not known[name]["least"] <= value <= known[name]["most"]:
            raise InvalidInput(
                f"--assume {word}: expected {known[name]['least']:g} to {known[name]['most']:g}, got {text}"
            )
        changed[name] = value
    return replace(base or Assumptions(), **changed)
