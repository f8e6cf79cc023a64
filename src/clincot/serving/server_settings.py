"""What an operator sets of a server. Everything has a default that is safe to expose."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from clincot.config import FrozenConfig, ProposeConfig, Share, parse_config, parse_override_value
from clincot.fields import PositiveInt
from clincot.jsonl import InvalidRecord

Seconds = Annotated[float, Field(gt=0)]


class ServeSettings(FrozenConfig):
    """How a server looks, how much it takes on, and what it refuses."""

    propose: Annotated[
        ProposeConfig,
        Field(description="which regions an answer looks at; the whole image is always one more"),
    ] = ProposeConfig(grounders={"windows": 2, "written": 1}, temperature=0.0)
    max_new_tokens: Annotated[PositiveInt, Field(description="of an answer from one region")] = 16
    abstain_below: Annotated[
        Share, Field(description="answers of less confidence abstain; 0: never. Depends on the checkpoint")
    ] = 0.0

    running: Annotated[PositiveInt, Field(description="answers under way at once")] = 32
    waiting: Annotated[int, Field(ge=0, description="requests that wait for their turn; above: 429")] = 64
    max_batch: Annotated[PositiveInt, Field(description="conversations of one forward pass; 1: unbatched")] = 256
    gather_s: Annotated[float, Field(ge=0, description="how long a batch waits for requests under way")] = 0.004
    deadline_s: Annotated[Seconds, Field(description="of a request, from its acceptance; above: 504")] = 60.0
    body_s: Annotated[Seconds, Field(description="within which a request's body must have come; above: 408")] = 15.0
    grace_s: Annotated[Seconds, Field(description="for what was accepted, once the server is told to stop")] = 75.0

    max_body_bytes: Annotated[PositiveInt, Field(description="of a request; base64 adds a third")] = 48 << 20
    max_image_bytes: Annotated[PositiveInt, Field(description="of an image file")] = 32 << 20
    max_pixels: Annotated[PositiveInt, Field(description="of an image, read from its header")] = 30_000_000
    max_question: Annotated[PositiveInt, Field(description="characters of a question")] = 2000
    max_instances: Annotated[PositiveInt, Field(description="questions of one V1 or V2 request")] = 16
    url_hosts: Annotated[
        tuple[str, ...], Field(description="hosts from which images are fetched over https; none: no fetching")
    ] = ()
    url_s: Annotated[Seconds, Field(description="of one fetch")] = 10.0


def load_serve_settings(overrides: tuple[str, ...] = ()) -> ServeSettings:
    """The defaults with `field=value` or `propose.field=value` overrides; wrong ones are refused by name."""
    content: dict[str, Any] = ServeSettings().model_dump(mode="json")
    for one in overrides:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise InvalidRecord(f"--set {one!r}: expected field=value, for instance running=16")
        *outer, field = name.split(".")
        place = content
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise InvalidRecord(f"--set {one!r}: {key!r} has no fields")
        place[field] = parse_override_value(value, where=f"--set {one!r}")
    return parse_config(ServeSettings, content, where="serve settings")
