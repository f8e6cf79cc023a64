"""A remembering policy asks each distinct greedy conversation once, and returns what the policy itself returns."""

from __future__ import annotations

from collections.abc import Sequence

from clincot.models.protocols import Generation
from clincot.models.reply_memory import RememberingPolicy, remember_replies
from clincot.prompts import Conversation, Turn


class CountingPolicy:
    """Replies with the text of the last turn; counts the conversations that it was asked."""

    digest = "counting"
    views = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        assert len(seeds) == len(conversations)
        self.asked += [conversation[-1].text for conversation in conversations]
        return [Generation(f"{c[-1].text} {max_new_tokens}", ()) for c in conversations]

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self.asked += [conversation[-1].text for conversation in conversations]
        return [None if c[-1].text == "?" else len(c[-1].text) / 10 for c in conversations]


def ask(*texts: str) -> list[Conversation]:
    return [(Turn("user", text),) for text in texts]


def test_p_yes_is_asked_once_for_each_distinct_conversation_in_the_order_of_the_call() -> None:
    policy = CountingPolicy()
    remembering = remember_replies(policy)
    assert remembering.p_yes(ask("a", "bb", "a", "?")) == [0.1, 0.2, 0.1, None]
    assert remembering.p_yes(ask("?", "ccc", "bb")) == [None, 0.3, 0.2], "an unreadable P(yes) is remembered too"
    assert policy.asked == ["a", "bb", "?", "ccc"]


def test_greedy_replies_are_remembered_with_their_length_limit_and_samples_are_not() -> None:
    policy = CountingPolicy()
    remembering = remember_replies(policy)

    def texts(limit: int, temperature: float, *asked: str) -> list[str]:
        seeds = list(range(len(asked)))
        replies = remembering.generate(ask(*asked), max_new_tokens=limit, temperature=temperature, seeds=seeds)
        return [reply.text for reply in replies]

    assert texts(16, 0.0, "a", "b", "a") == ["a 16", "b 16", "a 16"]
    assert texts(16, 0.0, "b") == ["b 16"]
    assert texts(8, 0.0, "b") == ["b 8"], "another limit may cut the reply off"
    assert policy.asked == ["a", "b", "b"]
    texts(16, 1.0, "a", "a")
    assert policy.asked == ["a", "b", "b", "a", "a"]


def test_what_no_longer_fits_is_asked_again() -> None:
    policy = CountingPolicy()
    remembering = RememberingPolicy(policy, max_remembered=2)
    assert remembering.p_yes(ask("a", "bb", "ccc")) == [0.1, 0.2, 0.3], "a call larger than the memory is answered"
    assert remembering.p_yes(ask("ccc", "a")) == [0.3, 0.1]
    assert policy.asked == ["a", "bb", "ccc", "a"]
