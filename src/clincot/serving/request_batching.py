"""Batching of concurrent requests, so that they share forward passes.

Each request runs its chain in its own thread and uses a `Policy` that passes its conversations to one worker thread,
the only one that touches the model. The worker forms batches by these rules:

- Calls that arrive while a batch runs form the next batch. The worker waits up to `gather_s` longer only if requests
  are in progress that have not called the model yet.
- Only calls of the same kind share a batch. The kind with the most waiting calls is next, so that requests fall into
  step and batches grow, but no call is skipped more than `_MAX_SKIPPED` times.
- Within a kind, the oldest request comes first.
- Calls whose client has disconnected, or whose deadline has passed, are dropped before they cost a forward pass.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any

from clincot.models.protocols import Generation, Policy
from clincot.prompts import Conversation, PromptFormat, Turn
from clincot.serving.api_errors import ApiError, RequestCancelled, build_deadline_error, log_unexpected_error
from clincot.serving.request_context import RequestContext

_MAX_SKIPPED = 3
_ConversationKey = tuple[tuple[str, str, tuple[str, ...]], ...]
_BatchKey = tuple[Any, ...]  # kind of call with its options: equal for all conversations of a batch


class _PendingCall:
    """One call of one request, with its progress."""

    def __init__(self, context: RequestContext, call: _BatchKey, items: Sequence[tuple[Conversation, int]]) -> None:
        self.context, self.call, self.items = context, call, items
        self.taken = 0
        self.skipped = 0  # batches of another kind that were taken first
        self.results: list[Any] = []
        self.future: Future[list[Any]] = Future()

    def add_results(self, results: Sequence[Any]) -> None:
        """Append results; with the last one the call is complete."""
        self.results += results
        if len(self.results) == len(self.items):
            with suppress(InvalidStateError):  # cancelled in the meantime
                self.future.set_result(self.results)

    def set_error(self, error: BaseException) -> None:
        """Fail the call, unless it is complete."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Batcher:
    """The worker thread in front of a model in this process.

    max_batch: most conversations in one batch. gather_s: seconds to wait for further calls. hang_s: seconds after which
    a batch counts as hung. observe: called with the kind, the size and the seconds of each batch. is_fatal: whether an
    error of the model means that all later calls fail as well.
    """

    def __init__(
        self,
        model: Policy,
        *,
        max_batch: int,
        gather_s: float,
        hang_s: float = math.inf,
        observe: Callable[[str, int, float], None] = lambda *_: None,
        is_fatal: Callable[[Exception], bool] = lambda _: False,
    ) -> None:
        self.model = model
        self._is_fatal, self._broken = is_fatal, False
        self._max_batch, self._gather_s, self._hang_s, self._observe = max_batch, gather_s, hang_s, observe
        self._waiting: list[_PendingCall] = []
        self._busy_since: float | None = None  # time.monotonic() at which the model began the running batch
        self._active = 0  # requests in progress, whether they wait for the model or not
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run_worker, name="batcher", daemon=True)
        self._thread.start()

    def check_health(self) -> bool:
        """Whether the worker runs, the model has raised no fatal error, and no batch hangs."""
        return self._thread.is_alive() and not self._broken and not self._is_hung()

    @contextmanager
    def open_policy(self, context: RequestContext) -> Iterator[Policy]:
        """The model as a Policy for one request."""
        with self._changed:
            self._active += 1
        try:
            yield _BatchedPolicy(self, context)
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the worker after the waiting calls, and wait for it, unless it hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self._is_hung():
            self._thread.join()

    def run_call(
        self, context: RequestContext, call: _BatchKey, items: Sequence[tuple[Conversation, int]]
    ) -> list[Any]:
        """Run one call in batches with others and return its results in order.

        Raises ApiError (503 if the model has stopped or hangs, 504 at the deadline), RequestCancelled if the client
        disconnects, and what the model raises.
        """
        context.check_alive()
        if not items:
            return []
        work = _PendingCall(context, call, items)

        def wake() -> None:
            work.set_error(RequestCancelled())

        context.add_cancel_callback(wake)
        try:
            with self._changed:
                if self._closed:
                    raise RuntimeError("the model was closed while a request was in progress")
                if not self.check_health():  # it would wait until its deadline
                    raise _build_stopped_error()
                self._waiting.append(work)
                self._changed.notify_all()
            return work.future.result(timeout=max(0.0, context.remaining_s))
        except TimeoutError:
            work.set_error(RequestCancelled())
            raise build_deadline_error() from None
        finally:
            context.remove_cancel_callback(wake)

    def _run_worker(self) -> None:
        try:
            while (batch := self._wait_for_batch()) is not None:
                self._work_on_batch(batch)
        except BaseException as error:  # such as SystemExit in a library; no later call would be answered
            log_unexpected_error(error)
            self._fail_waiting_calls()

    def _is_hung(self) -> bool:
        """Whether the running batch takes so long that it will hardly end."""
        began = self._busy_since
        return began is not None and time.monotonic() - began > self._hang_s

    def _fail_waiting_calls(self) -> None:
        with self._changed:
            self._broken = True
            waiting, self._waiting = self._waiting, []
        for work in waiting:
            work.set_error(_build_stopped_error())

    def _work_on_batch(self, batch: Sequence[tuple[_PendingCall, int]]) -> None:
        if not batch:
            return
        self._busy_since = began = time.monotonic()
        try:
            self._run_batch(batch)
        except Exception as error:  # it belongs to the requests, and must not end the worker
            self._note_failure(error)
            if len(batch) == 1:
                batch[0][0].set_error(error)
                return
            for part in batch:  # run each call separately, so that one bad request does not fail the others
                self._run_part(part)
        except BaseException:
            for work, _ in batch:
                work.set_error(_build_stopped_error())
            raise
        finally:
            self._busy_since = None
            seconds = time.monotonic() - began
            self._observe(batch[0][0].call[0], sum(count for _, count in batch), seconds)

    def _run_part(self, part: tuple[_PendingCall, int]) -> None:
        self._busy_since = time.monotonic()
        try:
            self._run_batch([part])
        except Exception as error:
            self._note_failure(error)
            part[0].set_error(error)

    def _note_failure(self, error: Exception) -> None:
        self._broken = self._broken or self._is_fatal(error)

    def _run_batch(self, batch: Sequence[tuple[_PendingCall, int]]) -> None:
        items: list[tuple[Conversation, int]] = []
        for work, count in batch:
            items += work.items[len(work.results) :][:count]
        kind, *options = batch[0][0].call
        conversations = [conversation for conversation, _ in items]
        results: list[Any]
        if kind == "p_yes":
            results = self._compute_p_yes(conversations)
        else:
            results = list(
                self.model.generate(
                    conversations, max_new_tokens=options[0], temperature=options[1], seeds=[seed for _, seed in items]
                )
            )
        start = 0
        for work, count in batch:
            work.add_results(results[start : start + count])
            start += count

    def _compute_p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """Compute each distinct conversation once.

        Requests about the same image often share conversations.
        """
        keys = [_build_conversation_key(conversation) for conversation in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        probabilities = dict(zip(distinct, self.model.p_yes(list(distinct.values())), strict=True))
        return [probabilities[key] for key in keys]

    def _wait_for_batch(self) -> list[tuple[_PendingCall, int]] | None:
        """Wait for the next batch; None once closed.

        A batch is a list of calls, each with the number of its conversations. An empty batch means that all waiting
        calls were dropped.
        """
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self._gather_s
            while self._is_gathering() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._drop_dead_calls()
            if not self._waiting:
                return None if self._closed else []
            return self._take_batch()

    def _drop_dead_calls(self) -> None:
        """Remove calls that have ended, and fail those whose request is no longer alive."""
        alive = []
        for work in self._waiting:
            if work.future.done():
                continue
            if work.context.live:
                alive.append(work)
            else:
                work.set_error(build_deadline_error())
        self._waiting = alive

    def _is_gathering(self) -> bool:
        """Whether waiting longer could make the next batch larger."""
        has_room = sum(len(work.items) - work.taken for work in self._waiting) < self._max_batch
        return bool(self._waiting) and has_room and len(self._waiting) < self._active and not self._closed

    def _take_batch(self) -> list[tuple[_PendingCall, int]]:
        self._waiting.sort(key=lambda work: work.context.number)
        counts = Counter(work.call for work in self._waiting)
        overdue = next((work.call for work in self._waiting if work.skipped >= _MAX_SKIPPED), None)
        call, room = overdue or max(counts, key=lambda kind: counts[kind]), self._max_batch
        batch: list[tuple[_PendingCall, int]] = []
        for work in self._waiting:
            work.skipped += work.call != call
        for work in [work for work in self._waiting if work.call == call]:
            count = min(room, len(work.items) - work.taken)
            if count == 0:
                break
            work.taken += count
            room -= count
            batch.append((work, count))
            if work.taken == len(work.items):
                self._waiting.remove(work)
        return batch


def _build_stopped_error() -> ApiError:
    """The error of a request that cannot be answered until the server is restarted (503)."""
    return ApiError(503, "model_stopped", "the model has stopped; the server has to be restarted")


def _build_conversation_key(conversation: Conversation) -> _ConversationKey:
    """A key of what the model sees, equal for copies of the same image."""
    return tuple(_build_turn_key(turn) for turn in conversation)


def _build_turn_key(turn: Turn) -> tuple[str, str, tuple[str, ...]]:
    return turn.role, turn.text, tuple(picture.key for picture in turn.pictures)


class _BatchedPolicy:
    """The Policy of one request, which runs its calls through the batcher."""

    def __init__(self, batcher: Batcher, context: RequestContext) -> None:
        self._batcher, self._context = batcher, context

    @property
    def digest(self) -> str:
        return self._batcher.model.digest

    @property
    def views(self) -> PromptFormat:
        return self._batcher.model.views

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        items = list(zip(conversations, seeds, strict=True))
        return self._batcher.run_call(self._context, ("write", max_new_tokens, temperature), items)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        return self._batcher.run_call(self._context, ("p_yes",), [(conversation, 0) for conversation in conversations])
