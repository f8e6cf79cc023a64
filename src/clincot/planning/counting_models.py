"""Models that count what they are asked and compute nothing, so that the code of a round can be run to plan it.

Their replies are drawn at random: P(yes) for a window or a candidate, a region, an answer of the assumed length or of
an earlier round's answers. Every draw is seeded, so a plan is the same each time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from clincot.geometry import Box, box_from_xyxy
from clincot.models.prefix_tree import (
    BATCH_TOKENS,
    LEAVE_SHARE,
    TREE_TOKENS,
    PrefixTree,
    batch_trees,
    build_trees,
    group_replies,
)
from clincot.models.protocols import Generation
from clincot.planning.prompt_counters import CountedPicture, CountedPrompt, PromptCounter
from clincot.prompts import Conversation, PromptFormat, collect_views, format_region, get_template
from clincot.records import Study

T = TypeVar("T")

REPLY_BATCH = 128  # replies that models.vlm.VisionLanguageModel writes at once, where beginnings are shared
ENGINE_BATCH = 64  # conversations that it computes at once, where each is computed as a whole
_RELEVANCE_STEPS = 8  # forward and backward passes of models.vlm's integrated gradients
_MAP_SIDE = 8
_WORDS = [
    "small",
    "round",
    "opacity",
    "in",
    "the",
    "left",
    "lower",
    "lung",
    "zone",
    "near",
    "the",
    "heart",
    "border",
    "without",
    "effusion",
    "on",
    "this",
    "view",
]


@dataclass
class ModelCalls:
    """What a model was asked: sums over its requests. All of them can be scaled to more questions."""

    requests: float = 0.0
    prompt_tokens: float = 0.0  # of all conversations, pictures included
    prefill_tokens: float = 0.0  # the same with common beginnings counted once, where they are computed once
    padded_tokens: float = 0.0  # these with the padding of their batches
    attention_pairs: float = 0.0  # sum over the sequences of a batch of their padded tokens^2
    prompt_pairs: float = 0.0  # sum over the conversations of tokens^2, as a server computes them that shares nothing
    new_tokens: float = 0.0
    decode_tokens: float = 0.0  # rows times steps: also those of rows that have ended while others of their batch go on
    decode_context: float = 0.0  # sum over the decoded tokens of the tokens before them
    forwards: float = 0.0  # forward passes: one for the prefill of a batch, one for each further token
    decode_steps: float = 0.0
    sampled_tokens: float = 0.0  # rows times steps, the first included, at a temperature above 0
    encodes: float = 0.0  # pictures that go through the vision tower
    image_tokens: float = 0.0  # image tokens of those pictures
    image_pairs: float = 0.0  # sum over those pictures of their image tokens^2
    backward_tokens: float = 0.0  # tokens of forward passes that are followed by a backward pass
    longest: float = 0.0  # tokens of the longest conversation with its reply; not a sum

    def add(self, other: ModelCalls) -> None:
        """Add the calls of another model or stage."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, max(mine, theirs) if one.name == "longest" else mine + theirs)

    def scale(self, factor: float) -> ModelCalls:
        """The calls for `factor` times as many questions."""
        scaled = {one.name: getattr(self, one.name) * factor for one in fields(self)}
        return ModelCalls(**{**scaled, "longest": self.longest})


@dataclass(frozen=True)
class Answer:
    """A reply and how many tokens the policy generates for it, its end included."""

    text: str
    tokens: int


@dataclass(frozen=True)
class ReplyHabits:
    """What the models of a round reply: assumed, or as in an earlier round."""

    answer_share: float = 1.0
    written_kept: float = 1.0
    # those of the same conversation together, by the limit of their tokens: they agree more often than others
    answers: Mapping[int, Sequence[Sequence[Answer]]] = field(default_factory=dict)
    # windows with their P(yes) that an earlier round chose for a finding, a set for each question
    windows: Mapping[str, Sequence[Mapping[Box, float]]] = field(default_factory=dict)
    written: Sequence[Box] = ()  # regions that the policy wrote


@dataclass(frozen=True)
class Sharing:
    """What a model computes once. features: each picture (models.features), until another stage starts. prefixes: the
    common beginnings of the prompts of a call. frames: both sides of a pair are trained in one sequence.
    """

    features: bool = False
    prefixes: bool = False
    frames: bool = False


class CountingModel:
    """A policy or judge whose conversations are counted. images: the studies by the sha256 of their images."""

    def __init__(
        self,
        name: str,
        counter: PromptCounter,
        images: Mapping[str, Study],
        *,
        habits: ReplyHabits | None = None,
        sharing: Sharing = Sharing(),
        seed: int = 0,
    ) -> None:
        self.name, self.digest = name, f"plan:{name}"
        self.counter, self.images, self.sharing = counter, images, sharing
        self.habits = habits or ReplyHabits()
        self._random = random.Random(f"{name} {seed}")
        self._calls = ModelCalls()
        self._encoded: set[str] = set()
        self._answers: dict[int, Iterator[Sequence[Answer]]] = {}  # by the limit of their tokens
        self._left: dict[tuple[object, ...], list[Answer]] = {}  # of a conversation that may be asked again
        self._written = self._shuffle(self.habits.written)
        self._kept = 0.0  # written regions that should have been kept so far
        wording = get_template(counter.views).finding
        self._windows = {wording.format(finding=name): sets for name, sets in self.habits.windows.items()}
        self._chosen: dict[tuple[str, str], Mapping[Box, float]] = {}  # by image and prompt

    @property
    def views(self) -> PromptFormat:
        return self.counter.views

    def take_calls(self) -> ModelCalls:
        """What was asked since the last time; a stage after this one encodes its pictures anew."""
        calls, self._calls, self._encoded = self._calls, ModelCalls(), set()
        return calls

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """See protocols.Policy: drawn at random; the windows of a finding as for a question of an earlier round."""
        self._count(conversations, [1] * len(conversations), decoded=False)
        return [self._rate(conversation) for conversation in conversations]

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """See protocols.Policy."""
        answers = [self._reply(conversation, max_new_tokens) for conversation in conversations]
        self._count(conversations, [answer.tokens for answer in answers], decoded=True, sampled=temperature > 0)
        return [Generation(answer.text, (-0.5,) * answer.tokens) for answer in answers]

    def compute_relevance(self, conversations: Sequence[Conversation]) -> list[npt.NDArray[np.float32]]:
        """See protocols.RelevancePolicy: noise, after the passes of its integral are counted."""
        prompts = [self.counter.count_prompt(conversation) for conversation in conversations]
        self._count_pictures(prompts)
        tokens = sum(prompt.tokens for prompt in prompts) * _RELEVANCE_STEPS
        self._calls.add(
            ModelCalls(
                requests=len(prompts),
                prompt_tokens=tokens,
                padded_tokens=tokens,
                backward_tokens=tokens,
                forwards=_RELEVANCE_STEPS * len(range(0, len(prompts), ENGINE_BATCH)),
            )
        )
        draws = np.random.default_rng(self._random.getrandbits(32))
        return [draws.random((_MAP_SIDE, _MAP_SIDE)).astype(np.float32) for _ in prompts]

    def count_rows(self, rows: Sequence[Sequence[Conversation]], *, batch_size: int, packed: bool) -> ModelCalls:
        """One pass over training rows, `batch_size` rows at a time; padding is that of a batch's longest sequence."""
        counted = [self.counter.count_row(row, packed=packed) for row in rows]
        calls, seen = ModelCalls(), set[str]()
        for start in range(0, len(counted), batch_size):
            sequences = list(chain.from_iterable(counted[start : start + batch_size]))
            longest = max(sequence.tokens for sequence in sequences)
            calls.add(_count_prefill(sequences, longest))
            calls.longest = max(calls.longest, longest)
            for picture in chain.from_iterable(sequence.pictures for sequence in sequences):
                if not (self.sharing.frames and picture.key in seen):
                    seen.add(picture.key)
                    _add_encode(calls, picture)
        calls.requests = len(rows)
        return calls

    def _count(
        self, conversations: Sequence[Conversation], new: Sequence[int], *, decoded: bool, sampled: bool = False
    ) -> None:
        prompts = [self.counter.count_prompt(conversation) for conversation in conversations]
        self._count_pictures(prompts)
        if self.sharing.prefixes and prompts:
            self._calls.add(_count_shared(prompts, new, decoded=decoded, sampled=sampled))
            return
        for start in range(0, len(prompts), ENGINE_BATCH):
            batch, tokens = prompts[start : start + ENGINE_BATCH], new[start : start + ENGINE_BATCH]
            longest, steps = max(prompt.tokens for prompt in batch), max(tokens)
            calls = _count_prefill(batch, longest)
            calls.longest = longest + steps
            if decoded:  # the prefill gives the first token, every further one is a pass
                calls.new_tokens = sum(tokens)
                calls.decode_steps = steps - 1
                calls.decode_tokens = len(batch) * (steps - 1)
                calls.decode_context = len(batch) * ((steps - 1) * longest + steps * (steps - 1) / 2)
                calls.forwards += steps - 1
                calls.sampled_tokens = len(batch) * steps if sampled else 0
            self._calls.add(calls)

    def _count_pictures(self, prompts: Sequence[CountedPrompt]) -> None:
        for prompt in prompts:
            for picture in prompt.pictures:
                if not (self.sharing.features and picture.key in self._encoded):
                    self._encoded.add(picture.key)
                    _add_encode(self._calls, picture)

    def _rate(self, conversation: Conversation) -> float:
        known = self._windows.get(conversation[-1].text)
        views = collect_views(conversation)
        if not known or not views or views[-1].box is None:
            return self._random.random()
        key = (views[-1].sha256, conversation[-1].text)
        if key not in self._chosen:
            self._chosen[key] = self._random.choice(known)
        return self._chosen[key].get(views[-1].box, 0.01 * self._random.random())

    def _reply(self, conversation: Conversation, limit: int) -> Answer:
        if len(conversation) == 1:  # only the opening of a chain ends with the whole image: a region is asked for
            return self._write_region(self.images[collect_views(conversation)[0].sha256])
        views = tuple((view.sha256, view.box) for view in collect_views(conversation))
        key = (limit, views, *(turn.text for turn in conversation))
        if not self._left.get(key):
            together = next(self._open_answers(limit))
            self._left[key] = self._random.sample(together, len(together))
        return self._left[key].pop(0)

    def _open_answers(self, limit: int) -> Iterator[Sequence[Answer]]:
        if limit not in self._answers:
            made = [[one] for one in self._make_answers(max(1, round(self.habits.answer_share * limit)))]
            self._answers[limit] = self._shuffle(self.habits.answers.get(limit) or made)
        return self._answers[limit]

    def _write_region(self, study: Study) -> Answer:
        box = next(self._written, None) or self._draw_box()
        text = format_region(box, study, self.views)
        before, self._kept = self._kept, self._kept + self.habits.written_kept
        kept = math.floor(self._kept + 1e-9) > math.floor(before + 1e-9)
        return Answer(text if kept else "?", self.counter.count_text(text) + 1)

    def _shuffle(self, items: Sequence[T]) -> Iterator[T]:
        """The items again and again, each time in another order, so that means are kept; nothing if there are none."""
        while items:
            yield from self._random.sample(items, len(items))

    def _draw_box(self) -> Box:
        x, y = (round(self._random.uniform(0, 0.6), 2) for _ in range(2))
        side = round(self._random.uniform(0.2, 0.4), 2)
        return box_from_xyxy((x, y, x + side, y + side))

    def _make_answers(self, tokens: int) -> list[Answer]:
        """Different texts of `tokens` tokens, their end included."""
        answers = []
        for _ in range(16):
            text = ""
            while self.counter.count_text(longer := f"{text} {self._random.choice(_WORDS)}".strip()) < tokens:
                text = longer
            answers.append(Answer(text or "yes", tokens))
        return answers


def _add_encode(calls: ModelCalls, picture: CountedPicture) -> None:
    calls.encodes += 1
    calls.image_tokens += picture.tokens
    calls.image_pairs += picture.tokens**2


def _count_prefill(sequences: Sequence[CountedPrompt], longest: int) -> ModelCalls:
    return ModelCalls(
        requests=len(sequences),
        prompt_tokens=sum(sequence.tokens for sequence in sequences),
        prefill_tokens=sum(sequence.tokens for sequence in sequences),
        padded_tokens=longest * len(sequences),
        attention_pairs=len(sequences) * longest**2,
        prompt_pairs=sum(sequence.tokens**2 for sequence in sequences),
        forwards=1,
    )


def _count_shared(prompts: Sequence[CountedPrompt], new: Sequence[int], *, decoded: bool, sampled: bool) -> ModelCalls:
    """One call of models.shared_prefixes: tokens of its trees, and steps of replies that leave when they have ended."""
    keys = [prompt.keys for prompt in prompts if prompt.keys is not None]
    trees = build_trees(keys, max_tokens=min(TREE_TOKENS, BATCH_TOKENS))
    calls = ModelCalls(
        requests=len(prompts),
        prompt_tokens=sum(prompt.tokens for prompt in prompts),
        prompt_pairs=sum(prompt.tokens**2 for prompt in prompts),
        longest=max(prompt.tokens + tokens for prompt, tokens in zip(prompts, new, strict=True)),
    )
    groups = [trees]
    if decoded:
        groups = list(
            group_replies(trees, batch_size=REPLY_BATCH, max_tokens=1 << 40, max_new_tokens=0)  # keys and values fit
        )
    for group in groups:
        for batch in batch_trees(group, BATCH_TOKENS):
            longest = max(len(tree) for tree in batch)
            calls.prefill_tokens += sum(len(tree) for tree in batch)
            calls.padded_tokens += longest * len(batch)
            calls.attention_pairs += len(batch) * longest**2
            calls.forwards += 1
        if decoded:
            _add_decoding(calls, group, prompts, new, sampled=sampled)
    return calls


def _add_decoding(
    calls: ModelCalls,
    group: Sequence[PrefixTree],
    prompts: Sequence[CountedPrompt],
    new: Sequence[int],
    *,
    sampled: bool,
) -> None:
    """The steps of one batch of replies: an ended one stays until an eighth of the batch has ended."""
    members = list(chain.from_iterable(tree.members for tree in group))
    tokens = np.array([new[member] for member in members])
    longest = max(prompts[member].tokens for member in members)
    calls.new_tokens += int(tokens.sum())
    rows = len(members)
    calls.sampled_tokens += rows if sampled else 0
    for step in range(1, int(tokens.max())):
        going = int((tokens > step).sum())
        if rows - going >= LEAVE_SHARE * rows:
            rows = going
        calls.decode_steps += 1
        calls.forwards += 1
        calls.decode_tokens += rows
        calls.decode_context += rows * (longest + step)
        calls.sampled_tokens += rows if sampled else 0
