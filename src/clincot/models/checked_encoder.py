"""Builds the encoder of a checkpoint, and refuses a chat template or tokenizer with which it cannot work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from clincot.errors import InvalidInput
from clincot.images import InvalidImage
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.encoding import ChatTemplateError, ConversationEncoder, EncodedPictures, read_picture
from clincot.prompts import ImageView

TEMPLATE_REMEDY = (
    "copy chat_template.jinja from the published checkpoint; it has to write an image token for every picture, and to "
    "take each message's content as a list of parts"
)


class _CheckedEncoder(ConversationEncoder):
    """An encoder that names the picture which its processor refuses."""

    def _process_pictures(self, pictures: tuple[ImageView, ...]) -> EncodedPictures:
        try:
            return super()._process_pictures(pictures)
        except InvalidInput:
            raise
        except ValueError as error:  # such as Qwen-VL's "absolute aspect ratio must be smaller than 200"
            names = []
            for picture in pictures:
                width, height = read_picture(picture).size
                names.append(f"{picture.path} ({width} x {height} pixels)")
            raise InvalidImage(
                f"{', '.join(names)}: expected a picture that {type(self.processor).__name__} takes: {error}; leave "
                "the study out, or use a checkpoint of another family"
            ) from error


class NoEndTokens(UnsupportedCheckpoint):
    """Nothing says which token ends the model's turn."""


def build_checked_encoder(path: str | Path, processor: Any, *, end_ids: Sequence[int]) -> ConversationEncoder:
    """The encoder of a checkpoint. end_ids: those of its generation config.

    Raises UnsupportedCheckpoint for a chat template that fails, and NoEndTokens if neither the generation config, nor
    the tokenizer, nor the template names an end token.
    """
    stand_in = [] if end_ids or processor.tokenizer.eos_token_id is not None else [0]
    with refuse_template_errors(path):
        encoder = _CheckedEncoder(processor, end_ids=[*end_ids, *stand_in])
        if not stand_in:
            return encoder
        if encoder.end_ids != frozenset(stand_in):  # the template has one
            return _CheckedEncoder(processor, end_ids=sorted(encoder.end_ids - {*stand_in}))
    raise NoEndTokens(
        f"{path}: neither the tokenizer, nor the generation config, nor the chat template has an end token, so answers "
        "would not end",
        "copy generation_config.json and the tokenizer's files from the published checkpoint",
    )


@contextmanager
def refuse_template_errors(path: str | Path) -> Iterator[None]:
    """Turn what a chat template raises into UnsupportedCheckpoint.

    That is a syntax error, raise_exception, or an operation on a value that the template expects to be of another type,
    such as a message's content, which some templates take as one string.
    """
    try:
        yield
    except ChatTemplateError as error:
        raise UnsupportedCheckpoint(f"{path}: {error}", TEMPLATE_REMEDY) from error
    except (TemplateError, TypeError) as error:
        raise UnsupportedCheckpoint(
            f"{path}: the chat template fails: {type(error).__name__}: {error}", TEMPLATE_REMEDY
        ) from error
