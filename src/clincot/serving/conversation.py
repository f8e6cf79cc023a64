"""A chat's messages as one question about an image, with its instructions, earlier questions and further images.

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
from clincot.serving.service import AnswerRequest, FurtherImage, check_image_count


def read_conversation(request: ChatRequest, settings: ServeSettings) -> AnswerRequest:
    """The question, images, instructions and history of a chat. Raises ApiError (400) naming what is not supported."""
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
    image, *others = _find_images(turns, settings)
    return AnswerRequest(
        question=question,
        image=image,
        others=_add_roles(others, request.clincot.roles),
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


def _add_roles(others: Sequence[str], roles: Sequence[str]) -> tuple[FurtherImage, ...]:
    """The further images with their roles, which the extension gives for all of them or for none."""
    if roles and len(roles) != len(others):
        message = f"expected a role for each image after the first, which are {len(others)}, got {len(roles)}"
        raise ApiError(400, "invalid_role", message, param="clincot.roles")
    return tuple(FurtherImage(image, role) for image, role in zip(others, roles or [""] * len(others), strict=True))


def _join_text(content: TextContent) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _find_images(turns: Sequence[UserMessage | AssistantMessage], settings: ServeSettings) -> list[str]:
    """The conversation's images, in the order in which they are sent.

    The same images may be sent again with a later question, but no others: which one the question is about would not be
    known.
    """
    sent: list[dict[str, None]] = [{}]  # distinct images of each question, which may have several messages in a row
    for turn in turns:
        if isinstance(turn, AssistantMessage):
            sent.append({})
        elif not isinstance(turn.content, str):
            sent[-1] |= dict.fromkeys(part.image_url.url for part in turn.content if isinstance(part, ImagePart))
    given = [list(images) for images in sent if images]
    if not given:
        raise _refuse_messages("no_image", "expected an image in a user message")
    check_image_count(len(set().union(*given)), settings, "messages")
    if any(images != given[0] for images in given):
        expected = "expected every question that sends images to send the same ones in the same order"
        raise _refuse_messages("different_images", expected)
    return given[0]


def _refuse_messages(code: str, message: str) -> ApiError:
    return ApiError(400, code, message, param="messages")
