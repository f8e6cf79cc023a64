"""Requests that are under way at once share forward passes.

Each request runs its chain in a thread of its own and asks a `Policy` as if it were alone. That policy hands the
conversations to one worker, the only thread that touches the model, which takes together whatever waits: what gathers
while a batch runs is the next batch. It waits `gather_s` longer only while requests are under way that have not asked
yet. Calls of one kind share a batch; the kind that most requests wait for comes next, so that requests fall into step
and batches grow, but no request is passed over more than `_PASSED_OVER` times. Of one kind the oldest comes first. Work
whose client has gone, or whose deadline has passed, is dropped before it costs a forward pass.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any

from clincot.models.protocols import Generation, Policy
from clincot.prompts import Conversation, PromptFormat
from clincot.serving.api_errors import RequestCancelled, build_deadline_error
from clincot.serving.request_context import RequestContext

_MAX_PASSED_OVER = 3
_ConversationKey = tuple[tuple[str, str, tuple[str, ...]], ...]
_BatchKey = tuple[Any, ...]  # what conversations of one batch have in common


class _PendingCall:
    """One call of one request: its conversations, how many are taken, and the results so far."""

    def __init__(self, ticket: RequestContext, call: _BatchKey, items: Sequence[tuple[Conversation, int]]) -> None:
        self.ticket, self.call, self.items = ticket, call, items
        self.taken = 0
        self.passed_over = 0
        self.results: list[Any] = []
        self.future: Future[list[Any]] = Future()

    def add_results(self, results: Sequence[Any]) -> None:
        self.results += results
        if len(self.results) == len(self.items):
            with suppress(InvalidStateError):  # cancelled meanwhile
                self.future.set_result(self.results)

    def set_error(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Batcher:
    """The worker in front of a model in this process. `observe(call, size)` hears of every batch."""

    def __init__(
        self, model: Policy, *, max_batch: int, gather_s: float, observe: Callable[[str, int], None] = lambda *_: None
    ) -> None:
        self.model = model
        self._max_batch, self._gather_s, self._observe = max_batch, gather_s, observe
        self._waiting: list[_PendingCall] = []
        self._active = 0  # requests under way, whether they wait for the model or not
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run_worker, name="batcher", daemon=True)
        self._thread.start()

    @contextmanager
    def open_policy(self, ticket: RequestContext) -> Iterator[Policy]:
        """The model as one request sees it."""
        with self._changed:
            self._active += 1
        try:
            yield _BatchedPolicy(self, ticket)
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def run_call(self, ticket: RequestContext, call: _BatchKey, items: Sequence[tuple[Conversation, int]]) -> list[Any]:
        """The results of one call, in order; waits for them no longer than the ticket lives."""
        ticket.check_alive()
        if not items:
            return []
        work = _PendingCall(ticket, call, items)

        def wake() -> None:
            work.set_error(RequestCancelled())

        ticket.add_cancel_callback(wake)
        try:
            with self._changed:
                if self._closed:
                    raise RuntimeError("the model was closed while a request was under way")
                self._waiting.append(work)
                self._changed.notify_all()
            return work.future.result(timeout=max(0.0, ticket.remaining_s))
        except TimeoutError:
            work.set_error(RequestCancelled())
            raise build_deadline_error() from None
        finally:
            ticket.remove_cancel_callback(wake)

    def _run_worker(self) -> None:
        while (batch := self._wait_for_batch()) is not None:
            if not batch:
                continue
            self._observe(batch[0][0].call[0], sum(count for _, count in batch))
            try:
                self._run_batch(batch)
            except Exception as error:  # whatever it is belongs to the requests, not to the worker
                if len(batch) == 1:
                    batch[0][0].set_error(error)
                    continue
                for alone in batch:  # one bad request must not take its neighbours with it
                    try:
                        self._run_batch([alone])
                    except Exception as own:
                        alone[0].set_error(own)

    def _run_batch(self, batch: Sequence[tuple[_PendingCall, int]]) -> None:
        items = [item for work, count in batch for item in work.items[len(work.results) :][:count]]
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
        at = 0
        for work, count in batch:
            work.add_results(results[at : at + count])
            at += count

    def _compute_p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """Every window once, however many of the requests ask about it: questions about one image often do."""
        asked = [_build_conversation_key(conversation) for conversation in conversations]
        distinct = dict(zip(asked, conversations, strict=True))
        odds = dict(zip(distinct, self.model.p_yes(list(distinct.values())), strict=True))
        return [odds[content] for content in asked]

    def _wait_for_batch(self) -> list[tuple[_PendingCall, int]] | None:
        """(work, how many of its conversations) of one call's kind, oldest request first; None once closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self._gather_s
            while self._is_gathering() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._waiting = [w for w in self._waiting if not w.future.done()]
            for work in [w for w in self._waiting if not w.ticket.live]:
                work.set_error(build_deadline_error())
                self._waiting.remove(work)
            if not self._waiting:
                return None if self._closed else []
            return self._take_batch()

    def _is_gathering(self) -> bool:
        room = sum(len(w.items) - w.taken for w in self._waiting) < self._max_batch
        return bool(self._waiting) and room and len(self._waiting) < self._active and not self._closed

    def _take_batch(self) -> list[tuple[_PendingCall, int]]:
        self._waiting.sort(key=lambda w: w.ticket.number)
        asked = Counter(work.call for work in self._waiting)
        late = next((work.call for work in self._waiting if work.passed_over >= _MAX_PASSED_OVER), None)
        call, room = late or max(asked, key=lambda one: asked[one]), self._max_batch
        batch: list[tuple[_PendingCall, int]] = []
        for work in self._waiting:
            work.passed_over += work.call != call
        for work in [w for w in self._waiting if w.call == call]:
            count = min(room, len(work.items) - work.taken)
            if count == 0:
                break
            work.taken += count
            room -= count
            batch.append((work, count))
            if work.taken == len(work.items):
                self._waiting.remove(work)
        return batch


def _build_conversation_key(conversation: Conversation) -> _ConversationKey:
    """What a model sees of a conversation: two requests' copies of an image are one."""
    return tuple((turn.role, turn.text, tuple(p.key for p in turn.pictures)) for turn in conversation)


class _BatchedPolicy:
    """The Policy protocol for one request."""

    def __init__(self, batcher: Batcher, ticket: RequestContext) -> None:
        self._batcher, self._ticket = batcher, ticket

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
        return self._batcher.run_call(self._ticket, ("write", max_new_tokens, temperature), items)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        return self._batcher.run_call(self._ticket, ("p_yes",), [(conversation, 0) for conversation in conversations])
