"""A checkpoint behind a server, as policy and as judge: the engines `vllm` and `url`.

It gives the records that the checkpoint gives in this process. Its digest is the checkpoint's, so candidates,
judgements and calibrations name the same model. Prompts are the processor's own token ids: those of the first
requests, and of every text that contains a control word, are compared with what the server reports (vLLM's
`return_token_ids`). Answers end at the same tokens.

What differs: a server samples with another random generator, so at a temperature above 0 the same seed draws other
tokens. Sums are rounded in another order, so two tokens that are nearly equally likely may come in either order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from clincot.clients.http import HttpFailure, JsonClient, RequestRetries
from clincot.config import EngineConfig
from clincot.errors import EngineFailed
from clincot.models.chat_replies import EndpointCompletion
from clincot.models.checked_encoder import build_checked_encoder
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.models.encoding import ConversationEncoder
from clincot.models.endpoint import EndpointModel
from clincot.models.inspection import list_ids, read_model_config, read_processor
from clincot.models.protocols import Generation, JudgeReply
from clincot.models.reply_log import ReplyLog, hash_request, list_picture_keys
from clincot.models.vllm_server import CacheUse, ServedWeights, VllmServer, find_served_weights
from clincot.models.yes_no import find_yes_no_ids
from clincot.prompts import PROMPT_FORMAT_FILE, Conversation, PromptFormat, load_prompt_format

T = TypeVar("T")

CHECKED_PROMPTS = 32  # the first requests of a stage, whose token ids are compared
_NAME_DIGITS = 12  # of the digest under which a checkpoint is served
_log = logging.getLogger(__name__)


class ServedCheckpoint(EndpointModel):
    """Implements the Policy and the Judge protocol; gives no gradients, so the relevance grounder cannot use it.

    checkpoint: folder whose weights are served, with its processor. server: the one that this process has started; None
    for the engine `url`. log: replies of an interrupted run. Raises EngineFailed if the server has ended, or does not
    make the processor's token ids.
    """

    def __init__(
        self,
        checkpoint: Path,
        engine: EngineConfig,
        *,
        name: str = "",
        server: VllmServer | None = None,
        log: ReplyLog | None = None,
    ) -> None:
        weights = find_served_weights(checkpoint)
        self._checkpoint, self.server = checkpoint, server
        self._unreadable: UnsupportedCheckpoint | None = None  # why P(yes) cannot be read
        self.log = log if log is not None else ReplyLog()
        self.encoder = load_encoder(weights.base)
        try:
            yes, no = find_yes_no_ids(self.encoder.tokenizer, checkpoint)
        except UnsupportedCheckpoint as error:
            yes, no, self._unreadable = [], [], error  # a policy may do without
        super().__init__(
            engine.url if server is None else f"{server.url}/v1",
            name=name or checkpoint.name,
            model=engine.model or get_served_name(self.digest),
            api_key_env=engine.api_key_env,
            views=load_served_format(checkpoint, weights),
            timeout_s=engine.vllm.request_s,
            concurrency=engine.vllm.concurrency,
            yes_no=(*yes, *no),
            retry=RequestRetries(retries=2),
        )
        self._unchecked = CHECKED_PROMPTS
        self._check_lock = threading.Lock()
        if server is None and engine.model:
            _log.warning(
                "%s serves %s under a name of its own; that it is the checkpoint %s cannot be checked",
                self.url,
                engine.model,
                get_served_name(self.digest),
            )

    @cached_property
    def digest(self) -> str:
        """The digest of the checkpoint's files."""
        return hash_checkpoint(self._checkpoint)

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Generation]:
        """See protocols.Policy. Requests are sent in the order of their prompts, so that beginnings are shared."""
        order = sort_by_prefix(conversations)
        replies = super().generate(
            [conversations[i] for i in order],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[seeds[i] for i in order],
        )
        return _restore_order(order, replies)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """See protocols.Policy."""
        order = sort_by_prefix(conversations)
        return _restore_order(order, super().p_yes([conversations[i] for i in order]))

    def take_cache_use(self) -> CacheUse:
        """The use of the server's prefix cache since the last call, which is logged as well."""
        if self.server is None:
            return CacheUse()
        used = self.server.take_cache_use()
        _log.info("vLLM, %s: %s", self.name, used)
        return used

    def _generate_one(self, client: JsonClient, conversation: Conversation, options: dict[str, Any]) -> Generation:
        request = hash_request(conversation, ["write", self.digest, options])
        logged = self.log.get(request)
        if logged is not None:
            text, logprobs, cut_off, prompt_tokens = logged
            return Generation(text, tuple(logprobs), cut_off, prompt_tokens)
        reply = super()._generate_one(client, conversation, options)
        self.log.add(request, astuple(reply))
        return reply

    def _rate_one(self, client: JsonClient, conversation: Conversation, timeout_s: float | None = None) -> JudgeReply:
        if self._unreadable is not None:
            raise self._unreadable
        request = hash_request(conversation, ["rate", self.digest])
        logged = self.log.get(request)
        if logged is not None:
            return JudgeReply(*logged)
        reply = super()._rate_one(client, conversation, timeout_s)
        self.log.add(request, astuple(reply))
        return reply

    def _request_one(
        self,
        client: JsonClient,
        expected: str,
        read: Callable[[EndpointCompletion], T],
        conversation_and_options: tuple[Conversation, dict[str, Any]],
        *,
        timeout_s: float | None = None,
    ) -> T:
        conversation, options = conversation_and_options
        ids = self._choose_expected_ids(conversation)
        added: dict[str, Any] = {"stop_token_ids": sorted(self.encoder.end_ids)}
        if ids is not None:
            added["return_token_ids"] = True

        def read_checked(completion: EndpointCompletion) -> T:
            if ids is not None:
                self._compare_ids(completion.prompt_token_ids, ids)
            return read(completion)

        try:
            request = (conversation, {**options, **added})
            return super()._request_one(client, expected, read_checked, request, timeout_s=timeout_s)
        except HttpFailure as error:
            if self.server is None or not (error.status is None or error.status >= 500):
                raise
            failure = self.server.find_failure()
            if not failure:
                raise
            raise EngineFailed(failure) from None

    def _choose_expected_ids(self, conversation: Conversation) -> Sequence[int] | None:
        """The processor's ids of a prompt that is to be compared; None for one that is not."""
        with self._check_lock:  # the encoder's caches are not made for several threads
            if self._unchecked <= 0 and not self.encoder.has_control_words(conversation):
                return None
            self._unchecked -= 1
            return self.encoder.encode(conversation, reply=True).ids

    def _compare_ids(self, served: Any, expected: Sequence[int]) -> None:
        if served is None and self.server is None:
            return  # an endpoint that is no vLLM reports no ids
        if served != list(expected):
            count = len(served) if isinstance(served, list) else "no"
            raise EngineFailed(
                f"the server of {self.name} makes {count} token ids of a prompt, which are not the {len(expected)} of "
                f"the checkpoint's own processor, so its answers would be those to another prompt; use models.engine: "
                "transformers for this checkpoint or these questions"
            )


def load_encoder(processor: str) -> ConversationEncoder:
    """The encoder of a checkpoint whose weights are elsewhere."""
    from transformers import GenerationConfig

    config = read_model_config(processor)
    try:
        ends = list_ids(GenerationConfig.from_pretrained(processor).eos_token_id)
    except OSError:  # no generation_config.json: transformers derives it from the config then
        ends = list_ids(GenerationConfig.from_model_config(config).eos_token_id)
    return build_checked_encoder(processor, read_processor(processor, config.model_type), end_ids=ends)


def load_served_format(checkpoint: Path, weights: ServedWeights) -> PromptFormat:
    """The prompt format of a checkpoint; an adapter without one has that of its base."""
    own = weights.adapter is None or (checkpoint / PROMPT_FORMAT_FILE).is_file()
    return load_prompt_format(checkpoint if own else Path(weights.base))


def get_served_name(digest: str) -> str:
    """The name under which a checkpoint is served: the beginning of its digest."""
    return digest[:_NAME_DIGITS]


def sort_by_prefix(conversations: Sequence[Conversation]) -> list[int]:
    """Positions of the conversations, those that begin alike next to each other.

    The whole image and the question are the first turn, so all regions of a question follow each other, and all
    questions about an image do. The server's prefix cache then still holds what they share.
    """

    def spell(position: int) -> list[tuple[list[str], str]]:
        return [(list_picture_keys(turn), turn.text) for turn in conversations[position]]

    return sorted(range(len(conversations)), key=spell)


def _restore_order(order: Sequence[int], replies: Sequence[T]) -> list[T]:
    by_position = dict(zip(order, replies, strict=True))
    return [by_position[position] for position in range(len(order))]
