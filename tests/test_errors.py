"""Errors for the user reach the process that prints them."""

import pickle

import pytest

from clincot.clients.kubernetes import ClusterFailed
from clincot.config import PairConfig
from clincot.errors import InvalidInput, PromptTooLong, UserError
from clincot.preferences.pairs import NoPairs, make_pairs
from tests.support.judging_builders import candidate, score_of


def run_out_of_pairs() -> NoPairs:
    """Two candidates whose scores are equal make no pair."""
    candidates = [candidate("yes"), candidate("no")]
    with pytest.raises(NoPairs) as caught:
        make_pairs(candidates, [score_of(one, 0.5) for one in candidates], PairConfig())
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("a.jsonl, line 3: no answer"),
        PromptTooLong(tokens=900, new_tokens=200, limit=1000),
        ClusterFailed("forbidden", status=403),
        run_out_of_pairs(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_message_and_facts_in_another_process(error: UserError) -> None:
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert vars(restored) == vars(error)
