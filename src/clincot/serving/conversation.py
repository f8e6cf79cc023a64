"""A chat's messages as one question about one image, with its instructions and earlier questions.

Every message is used or refused: system messages become instructions, pairs of user and assistant messages become the
history, and the last user message is the question.
"""

from __future__ import annotations

from collections.abc import Sequence

from clincot.config.server_settings import ServeSettings
from clincot.serving.api_errors import ApiError
from clincot.serving.chat_schema import (
    AssistantMessage,
    ChatRequest,
    ImagePart,
    SystemMessage,
    TextContent,
    TextPart,
    UserMessage,
)
from clincot.serving.service import AnswerRequest


def read_conversation(request: ChatRequest, settings: ServeSettings) -> AnswerRequest:
    """The question, image, instructions and history of a chat. Raises ApiError (400) naming what is not supported."""
    instructions = [message for message in request.messages if isinstance(message, SystemMessage)]
    turns = [message for message in request.messages if not isinstance(message, SystemMessage)]
    if instructions and not settings.system_messages:
        raise _refuse_messages("system_message", "this server accepts no system messages (system_messages)")
    history, question = _pair_turns(turns)
    if len(history) > settings.max_history:
        raise _refuse_messages(
            "history_too_long",
            f"expected at most {settings.max_history} earlier questions (max_history), got {len(history)}",
        )
    return AnswerRequest(
        question=question,
        image=_find_image(turns),
        overlay=request.clincot.return_overlay,
        with_image=request.clincot.return_image,
        instructions="\n".join(_join_text(message.content) for message in instructions),
        history=history,
    )


def _pair_turns(turns: Sequence[UserMessage | AssistantMessage]) -> tuple[tuple[tuple[str, str], ...], str]:
    """(earlier questions with their answers, the last question).

    Several messages of a user in a row are one question.
    """
    history: list[tuple[str, str]] = []
    question: list[str] = []
    for turn in turns:
        if isinstance(turn, UserMessage):
            question.append(_read_question(turn))
            continue
        if not question:
            raise _refuse_messages("invalid_history", "expected an assistant message only after a user message")
        history.append(("\n".join(question), _read_answer(turn)))
        question = []
    if not question:
        raise _refuse_messages("invalid_history", "expected the last message to be a user's question")
    return tuple(history), "\n".join(question)


def _read_question(message: UserMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _read_answer(message: AssistantMessage) -> str:
    text = "" if message.content is None else _join_text(message.content)
    if not (text or message.refusal):
        raise _refuse_messages("invalid_history", "expected the content or the refusal of every assistant message")
    return text or message.refusal or ""


def _join_text(content: TextContent) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _find_image(turns: Sequence[UserMessage | AssistantMessage]) -> str:
    """The conversation's only image; the same one may be sent again with a later question."""
    images: list[str] = []
    for turn in turns:
        if isinstance(turn, UserMessage) and not isinstance(turn.content, str):
            images += [part.image_url.url for part in turn.content if isinstance(part, ImagePart)]
    distinct = list(dict.fromkeys(images))
    if len(distinct) != 1:
        raise _refuse_messages(
            "one_image",
            f"expected exactly one image, got {len(distinct)}; the model was trained and evaluated on questions about "
            "one image, so prior and lateral images are not supported",
        )
    return distinct[0]


def _refuse_messages(code: str, message: str) -> ApiError:
    return ApiError(400, code, message, param="messages")
