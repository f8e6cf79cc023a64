"""Batching of concurrent requests: shared forward passes, and isolation between requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clincot.prompts import Conversation, ImageView, Turn
from clincot.serving.api_errors import ApiError, RequestCancelled
from clincot.serving.request_batching import Batcher, _PendingCall
from clincot.serving.request_context import RequestContext
from tests.support.model_servers import Parrot, until


def conversation(text: str) -> Conversation:
    return (Turn("user", text),)


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def batcher(parrot: Parrot) -> Iterator[Batcher]:
    batcher = Batcher(parrot, max_batch=8, gather_s=0.0)
    yield batcher
    parrot.go.set()
    batcher.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


class EndingParrot(Parrot):
    """A policy that ends the thread that calls it, as `sys.exit` in a library does, once `go` is set."""

    def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
        self.asked.set()
        self.go.wait(timeout=300)
        raise SystemExit(1)


def write(batcher: Batcher, texts: list[str], context: RequestContext | None = None) -> list[str]:
    context = context or RequestContext(600)
    with batcher.open_policy(context) as policy:
        asked = [conversation(text) for text in texts]
        replies = policy.generate(asked, max_new_tokens=4, temperature=0.0, seeds=[0] * len(asked))
    return [reply.text for reply in replies]


def queue_calls(
    batcher: Batcher, threads: ThreadPoolExecutor, parrot: Parrot, calls: list[Callable[[], object]]
) -> list[object]:
    """Futures of calls that wait, in this order, while the model is busy with a first one."""
    first = threads.submit(write, batcher, ["first"])
    assert parrot.asked.wait(300)
    futures = []
    for n, call in enumerate(calls, start=1):
        futures.append(threads.submit(call))
        until(lambda n=n: len(batcher._waiting) == n)  # in this order
    parrot.go.set()
    first.result(timeout=300)
    return futures  # type: ignore[return-value]


def test_calls_during_a_batch_form_the_next_batch(
    batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor
) -> None:
    """Three requests with 2, 3 and 1 conversations wait for the first request and form one batch of 6."""
    texts = [["a", "b"], ["c", "d", "e"], ["f"]]
    futures = queue_calls(batcher, threads, parrot, [lambda t=t: write(batcher, t) for t in texts])  # type: ignore[misc]
    assert [f.result(timeout=300) for f in futures] == [[f"1 turns: {x}" for x in t] for t in texts]  # type: ignore[attr-defined]
    assert parrot.batches == [1, 6]


def test_a_batch_is_never_larger_than_the_limit(batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor) -> None:
    """19 conversations of one request with batches of at most 8: 8 + 8 + 3, in order."""
    texts = [str(n) for n in range(19)]
    (future,) = queue_calls(batcher, threads, parrot, [lambda: write(batcher, texts)])
    assert future.result(timeout=300) == [f"1 turns: {n}" for n in texts]  # type: ignore[attr-defined]
    assert parrot.batches == [1, 8, 8, 3]


def test_calls_of_different_kinds_share_no_batch(batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor) -> None:
    def score() -> list[float | None]:
        with batcher.open_policy(RequestContext(600)) as policy:
            return policy.p_yes([conversation("abc"), conversation("abcdef")])

    futures = queue_calls(batcher, threads, parrot, [lambda: write(batcher, ["x"]), score])
    assert futures[0].result(timeout=300) == ["1 turns: x"]  # type: ignore[attr-defined]
    assert futures[1].result(timeout=300) == [0.003, 0.006]  # type: ignore[attr-defined]
    assert parrot.batches == [1, 1, 2]


def test_equal_conversations_are_computed_once(
    batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Two uploads of one image in two folders. Of abc, abcdef and abc, only 2 conversations are scored."""

    def shown(text: str, folder: str) -> Conversation:
        return (Turn("user", text, (ImageView(str(tmp_path / folder / "film.png"), "f" * 64, None, 64),)),)

    def score(folder: str, *texts: str) -> list[float | None]:
        with batcher.open_policy(RequestContext(600)) as policy:
            return policy.p_yes([shown(text, folder) for text in texts])

    calls = [lambda: score("one", "abc", "abcdef"), lambda: score("two", "abc")]
    futures = queue_calls(batcher, threads, parrot, calls)  # type: ignore[arg-type]
    assert [f.result(timeout=300) for f in futures] == [[0.003, 0.006], [0.003]]  # type: ignore[attr-defined]
    assert parrot.batches == [1, 2]


def test_the_kind_with_most_waiting_calls_is_next(
    batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor
) -> None:
    """The oldest call asks for two probabilities, three others for a text each: the texts go first, together."""

    def score() -> list[float | None]:
        with batcher.open_policy(RequestContext(600)) as policy:
            return policy.p_yes([conversation("a"), conversation("b")])

    calls = [score, *(lambda: write(batcher, ["x"]) for _ in range(3))]
    for future in queue_calls(batcher, threads, parrot, calls):  # type: ignore[arg-type]
        future.result(timeout=300)  # type: ignore[attr-defined]
    assert parrot.batches == [1, 3, 2]


def test_no_call_is_skipped_more_than_three_times(batcher: Batcher) -> None:
    """One probability competes with two new texts each time: the fourth batch is the probability."""
    taken = []
    with batcher._changed:  # keeps the worker from taking calls
        late = _PendingCall(RequestContext(600), ("p_yes",), [(conversation("late"), 0)])
        for _ in range(4):
            fresh = [_PendingCall(RequestContext(600), ("write", 4, 0.0), [(conversation("new"), 0)]) for _ in range(2)]
            batcher._waiting = [late, *fresh]
            taken.append([work.call[0] for work, _ in batcher._take_batch()])
        batcher._waiting = []
    assert taken == [["write", "write"]] * 3 + [["p_yes"]]


def test_a_failing_request_does_not_fail_others(batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor) -> None:
    """The batch of both fails, and each call is repeated separately."""
    good, bad = queue_calls(
        batcher, threads, parrot, [lambda: write(batcher, ["good"]), lambda: write(batcher, ["bad"])]
    )
    assert good.result(timeout=300) == ["1 turns: good"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cannot encode"):
        bad.result(timeout=300)  # type: ignore[attr-defined]
    assert parrot.batches == [1, 2, 1, 1]


def test_a_cancelled_call_ends_at_once_without_a_pass(
    batcher: Batcher, parrot: Parrot, threads: ThreadPoolExecutor
) -> None:
    context = RequestContext(600)
    first = threads.submit(write, batcher, ["first"])
    assert parrot.asked.wait(300)
    gone = threads.submit(write, batcher, ["gone"], context)
    until(lambda: len(batcher._waiting) == 1)
    context.cancel()
    with pytest.raises(RequestCancelled):
        gone.result(timeout=300)  # while the model is still busy with the first
    assert not first.done()
    parrot.go.set()
    first.result(timeout=300)
    assert parrot.batches == [1]


def test_a_call_past_its_deadline_fails_with_504(batcher: Batcher, parrot: Parrot) -> None:
    began = time.monotonic()
    with pytest.raises(ApiError) as failed:
        write(batcher, ["slow"], RequestContext(0.2))
    assert failed.value.status == 504
    assert time.monotonic() - began < 300
    assert threading.active_count() < 100


def test_an_empty_call_runs_nothing(batcher: Batcher, parrot: Parrot) -> None:
    assert write(batcher, []) == []
    assert parrot.batches == []


def test_calls_that_wait_when_the_model_stops_fail_at_once(threads: ThreadPoolExecutor) -> None:
    """One call ends the model's thread while another waits; their deadline is ten minutes away."""
    parrot = EndingParrot()
    batcher = Batcher(parrot, max_batch=8, gather_s=0.0)
    calls = [threads.submit(write, batcher, ["first"])]
    assert parrot.asked.wait(300)
    calls.append(threads.submit(write, batcher, ["second"]))
    until(lambda: len(batcher._waiting) == 1)
    parrot.go.set()
    for call in calls:
        with pytest.raises(ApiError, match="the model has stopped"):
            call.result(timeout=60)
    assert not batcher.check_health()
