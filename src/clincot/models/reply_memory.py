"""A policy that remembers its greedy replies, for stages that ask the same conversations more than once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

from clincot.models.protocols import Generation, Policy, PolicyWrapper, RelevancePolicy, has_gradients
from clincot.prompts import Conversation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")

# About 1 kB each with its conversation: at most 200 MB. Beyond it the oldest are forgotten and asked again.
MAX_REMEMBERED = 200_000


class RememberingPolicy(PolicyWrapper):
    """A policy whose greedy replies and P(yes) are computed once for each distinct conversation.

    An evaluation asks the windows of a finding for the arm `served` and again for the arm `windows`, and each question
    about a finding asks the same windows of its image. Sampled replies are not remembered.
    """

    def __init__(self, policy: Policy, *, max_remembered: int = MAX_REMEMBERED) -> None:
        super().__init__(policy)
        self._probabilities: dict[Hashable, float | None] = {}
        self._replies: dict[Hashable, Generation] = {}
        self._max_remembered = max_remembered

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """See protocols.Policy. A greedy reply does not depend on the seed."""
        if temperature > 0:
            return super().generate(conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

        def reply(missing: Sequence[Conversation]) -> list[Generation]:
            return self._policy.generate(
                missing, max_new_tokens=max_new_tokens, temperature=0.0, seeds=[0] * len(missing)
            )

        return self._recall(self._replies, conversations, reply, detail=max_new_tokens)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """See protocols.Policy."""
        return self._recall(self._probabilities, conversations, self._policy.p_yes)

    def _recall(
        self,
        memory: dict[Hashable, T],
        conversations: Sequence[Conversation],
        ask: Callable[[Sequence[Conversation]], list[T]],
        detail: int = 0,
    ) -> list[T]:
        keys = [(conversation, detail) for conversation in conversations]
        missing = {key: key[0] for key in keys if key not in memory}
        known = {key: memory[key] for key in keys if key in memory}  # the new replies may push them out of the memory
        if missing:
            known |= zip(missing, ask(list(missing.values())), strict=True)
            memory |= {key: known[key] for key in missing}
        while len(memory) > self._max_remembered:
            del memory[next(iter(memory))]
        return [known[key] for key in keys]


class RememberingRelevancePolicy(RememberingPolicy):
    """The same for a policy that can tell which patches speak for a finding; those maps are not remembered."""

    _policy: RelevancePolicy

    def compute_relevance(self, conversations: Sequence[Conversation]) -> list[npt.NDArray[np.float32]]:
        """See protocols.RelevancePolicy."""
        return self._policy.compute_relevance(conversations)


def remember_replies(policy: Policy) -> RememberingPolicy:
    """Wrap a policy so that it answers each distinct greedy conversation once."""
    return RememberingRelevancePolicy(policy) if has_gradients(policy) else RememberingPolicy(policy)
