"""Settings of a server.

The defaults are safe for a server that is reachable by clients.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from clincot.config.sections import InferenceDtype, ServeConfig
from clincot.config.settings_file import parse_config, parse_override_value
from clincot.fields import PositiveInt
from clincot.jsonl import InvalidRecord

Seconds = Annotated[float, Field(gt=0)]


class ServeSettings(ServeConfig):
    """How a server answers, how many requests it accepts, and what it refuses.

    The first settings, those of ServeConfig, are what the gate measured; a deployment takes them from the published
    checkpoint.
    """

    abstain_refusal: Annotated[
        str, Field(description="`message.refusal` of a chat completion that abstains; empty: no such field.")
    ] = "The model abstains: its confidence in an answer is too low."
    abstain_content: Annotated[
        str,
        Field(description="`message.content` of a chat completion that abstains, with {answer} in it; empty: null."),
    ] = ""
    dtype: Annotated[
        InferenceDtype,
        Field(
            description="Number type of the model in this process; auto: bfloat16 on a GPU that computes in it, else "
            "float32. The environment variable CLINCOT_DTYPE overrides it."
        ),
    ] = "auto"

    running: Annotated[PositiveInt, Field(description="Requests that are answered at the same time.")] = 32
    waiting: Annotated[
        int, Field(ge=0, description="Requests that may wait for a free slot; further ones get 429.")
    ] = 64
    max_batch: Annotated[PositiveInt, Field(description="Conversations in one forward pass; 1: no batching.")] = 256
    gather_s: Annotated[float, Field(ge=0, description="Seconds that a batch waits for other requests to join.")] = (
        0.004
    )
    deadline_s: Annotated[Seconds, Field(description="Seconds from a request's acceptance until it gets 504.")] = 60.0
    body_s: Annotated[
        Seconds, Field(description="Seconds within which a request's body must arrive, or it gets 408.")
    ] = 15.0
    grace_s: Annotated[Seconds, Field(description="Seconds for accepted requests to finish after SIGTERM.")] = 75.0

    max_body_bytes: Annotated[
        PositiveInt, Field(description="Largest request body; base64 adds a third to an image.")
    ] = 48 << 20
    max_image_bytes: Annotated[PositiveInt, Field(description="Largest image file.")] = 32 << 20
    max_pixels: Annotated[PositiveInt, Field(description="Most pixels of an image, read from its header.")] = 30_000_000
    max_question: Annotated[PositiveInt, Field(description="Longest question, in characters.")] = 2000
    max_instances: Annotated[PositiveInt, Field(description="Most questions in one V1 or V2 request.")] = 16
    url_hosts: Annotated[
        tuple[str, ...], Field(description="Hosts from which images are downloaded over https; empty: none.")
    ] = ()
    url_s: Annotated[Seconds, Field(description="Seconds for the download of one image.")] = 10.0

    @model_validator(mode="after")
    def _check_one_dtype(self) -> ServeSettings:
        if self.propose.dtype not in ("inherit", self.dtype):
            raise ValueError("propose.dtype: a server has one model for regions and answers; set dtype instead")
        return self


def load_serve_settings(overrides: tuple[str, ...] = ()) -> ServeSettings:
    """The defaults with overrides `field=value` or `propose.field=value`.

    Raises InvalidRecord naming a wrong override.
    """
    content: dict[str, Any] = ServeSettings().model_dump(mode="json")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise InvalidRecord(f"--set {override!r}: expected field=value, for instance running=16")
        *outer, field = name.split(".")
        target = content
        for key in outer:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise InvalidRecord(f"--set {override!r}: {key!r} has no fields")
        target[field] = parse_override_value(value, where=f"--set {override!r}")
    return parse_config(ServeSettings, content, where="serve settings")
