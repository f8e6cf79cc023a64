"""Settings of a server.

The defaults are safe for a server that is reachable by clients.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clincot.config.sections import InferenceDtype, ServeConfig
from clincot.config.settings_file import parse_config, parse_override_value
from clincot.fields import PositiveInt
from clincot.jsonl import InvalidRecord

LogFormat = Literal["auto", "text", "json"]
Seconds = Annotated[float, Field(gt=0)]
TRACES_PATH = "/v1/traces"  # of OTLP over HTTP, below traces_endpoint


class ServeSettings(ServeConfig):
    """How a server answers, how many requests it accepts, and what it refuses.

    The first settings, those of ServeConfig, are what the gate measured; a deployment takes them from the published
    checkpoint.
    """

    abstain_refusal: Annotated[
        str,
        Field(
            description="`message.refusal` of a chat completion that abstains, with the {reason} in it; empty: no such "
            "field."
        ),
    ] = "The model abstains: {reason}."
    abstain_content: Annotated[
        str,
        Field(
            description="`message.content` of a chat completion that abstains, which is all that many clients show; "
            "{refusal} is the refusal and {answer} the withheld answer; empty: null."
        ),
    ] = "{refusal}"
    min_contrast: Annotated[
        int,
        Field(
            ge=0,
            le=255,
            description="Smallest difference between the dark and the bright gray levels of an image (0.1st and 99.9th "
            "percentile, of 255); an image with less is refused as blank; 0: none is.",
        ),
    ] = 4
    system_messages: Annotated[
        bool,
        Field(
            description="Whether a chat may have system messages, which are put before the question. Evaluation has "
            "none, so its results do not hold for such answers."
        ),
    ] = True
    max_history: Annotated[
        int,
        Field(
            ge=0,
            description="Most earlier questions, with their answers, in a chat; 0: only single questions. Like system "
            "messages, they are no part of the evaluation.",
        ),
    ] = 8
    sampling: Annotated[
        bool,
        Field(
            description="Whether a chat may ask for a temperature above 0. Evaluation decodes greedily, so its results "
            "do not hold for sampled answers; false: such a request is refused."
        ),
    ] = True
    max_choices: Annotated[PositiveInt, Field(description="Most choices (`n`) of a chat completion.")] = 4
    page: Annotated[bool, Field(description="Whether browsers get a page at / to try the model.")] = True
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
    hang_s: Annotated[
        Seconds,
        Field(
            description="Seconds after which a batch of the model in this process counts as hung. The server is then "
            "neither ready nor alive, so that Kubernetes restarts it."
        ),
    ] = 180.0
    deadline_s: Annotated[Seconds, Field(description="Seconds from a request's acceptance until it gets 504.")] = 60.0
    header_s: Annotated[
        Seconds, Field(description="Seconds within which a new connection must send a whole header, or it is closed.")
    ] = 10.0
    body_s: Annotated[
        Seconds, Field(description="Seconds within which a request's body must arrive, or it gets 408.")
    ] = 15.0
    idle_s: Annotated[Seconds, Field(description="Seconds that a connection may be idle after a reply.")] = 65.0
    reply_s: Annotated[
        Seconds, Field(description="Seconds that a client may leave a reply unread before its connection is closed.")
    ] = 30.0
    decode_s: Annotated[Seconds, Field(description="Seconds of processor time for the decoding of one image.")] = 10.0
    grace_s: Annotated[Seconds, Field(description="Seconds for accepted requests to finish after SIGTERM.")] = 75.0

    max_connections: Annotated[
        PositiveInt, Field(description="Connections; a further one replaces the one that waits longest for a header.")
    ] = 512
    max_body_bytes: Annotated[
        PositiveInt, Field(description="Largest request body; base64 adds a third to an image.")
    ] = 48 << 20
    max_held_bytes: Annotated[
        PositiveInt,
        Field(
            description="Bytes of the bodies of all requests together, besides the first 256 KiB of each and one body "
            "of max_body_bytes; further bodies are read when others have been answered."
        ),
    ] = 64 << 20
    max_image_bytes: Annotated[PositiveInt, Field(description="Largest image file.")] = 32 << 20
    max_pixels: Annotated[
        PositiveInt, Field(description="Most pixels of an image, by its header; a larger value needs more memory.")
    ] = 16 << 20
    max_pixels_held: Annotated[
        PositiveInt, Field(description="Pixels of the images of all running requests together; others wait.")
    ] = 32 << 20
    decode_bytes: Annotated[
        int, Field(ge=256 << 20, description="Memory of the process that decodes large images, in bytes.")
    ] = 768 << 20
    max_question: Annotated[PositiveInt, Field(description="Longest question, in characters.")] = 2000
    max_instances: Annotated[PositiveInt, Field(description="Most questions in one V1 or V2 request.")] = 16
    url_hosts: Annotated[
        tuple[str, ...], Field(description="Hosts from which images are downloaded over https; empty: none.")
    ] = ()
    log_format: Annotated[
        LogFormat, Field(description="Format of the log; auto: text on a terminal, else one JSON object a line.")
    ] = "auto"
    traces_endpoint: Annotated[
        str, Field(description="OTLP collector that gets traces over HTTP, for instance http://otel:4318; empty: none.")
    ] = ""
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
