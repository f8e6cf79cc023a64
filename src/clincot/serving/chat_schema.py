"""Requests and replies of OpenAI's chat completions.

The parameters are those of openai-python 3.57.0 (types/chat/completion_create_params.py). Every parameter is applied,
or it cannot change the answer, or only its neutral values are accepted; another value is refused by the parameter's
name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clincot.generation.visual_cot import VisualAnswer


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_StrictModel):
    type: Literal["text"]
    text: str


class ImageUrl(_StrictModel):
    url: Annotated[
        str, Field(description="A data URI (data:image/png;base64,…), or an https URL if the operator allows its host.")
    ]
    detail: Annotated[
        Literal["auto", "low", "high"] | None, Field(description="The checkpoint determines the image's resolution.")
    ] = None


class ImagePart(_StrictModel):
    type: Literal["image_url"]
    image_url: ImageUrl


TextContent = str | Annotated[list[TextPart], Field(min_length=1, max_length=16)]


class SystemMessage(_StrictModel):
    """Instructions, which are put before the first question."""

    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = None


class UserMessage(_StrictModel):
    """A question; one of them, usually the first, has the image, and further ones if the server allows them."""

    role: Literal["user"]
    content: str | Annotated[list[TextPart | ImagePart], Field(min_length=1, max_length=16)]
    name: str | None = None


class AssistantMessage(_StrictModel):
    """An earlier answer, as the server sent it."""

    role: Literal["assistant"]
    content: TextContent | None = None
    refusal: str | None = None
    name: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None
    tool_calls: Annotated[list[Any] | None, Field(max_length=0)] = None
    audio: None = None
    function_call: None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_StrictModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against observers of the network; none is added


class TextFormat(_StrictModel):
    type: Literal["text"]


class JsonFormat(_StrictModel):
    type: Literal["json_object"]


class ChainSchema(_StrictModel):
    """A JSON schema whose properties are fields of the chain (VisualAnswer)."""

    name: str
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # the content always follows the schema
    description: str | None = None


class SchemaFormat(_StrictModel):
    type: Literal["json_schema"]
    json_schema: ChainSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class Extension(_StrictModel):
    """Options beyond OpenAI's protocol (`extra_body={"clincot": …}`)."""

    return_overlay: bool = False
    return_image: bool = False
    roles: Annotated[
        list[str],
        Field(
            max_length=16,
            description="Roles of the images after the first, in order, such as `prior`; without them `image 2`, …",
        ),
    ] = []


class ChatRequest(_StrictModel):
    """A request for a chat completion. Decoding is greedy unless a temperature is given."""

    model: str
    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=64, description="Ends with the question; a user message has the image."),
    ]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="Null is 0: greedy decoding.")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="Only 1 is supported with a temperature above 0.")] = (
        None
    )
    n: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[
        int | None,
        Field(ge=1, description="Longest answer from one region; the server's own limit holds as well."),
    ] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="The newer name of max_tokens.")] = None
    stop: Annotated[
        str | Annotated[list[str], Field(max_length=4)] | None,
        Field(description="An answer ends before the first of these texts."),
    ] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63, description="Null is 0.")] = None
    response_format: ResponseFormat | None = None
    # Parameters that cannot change an answer here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Neutral values of parameters that are not supported.
    audio: None = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    function_call: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any] | None, Field(max_length=0)] = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None
    logprobs: Annotated[
        Literal[False] | None,
        Field(description="The extension `clincot` has the likelihood of the answer from each region."),
    ] = None
    metadata: Annotated[dict[str, Any] | None, Field(max_length=0)] = None
    modalities: Annotated[list[Literal["text"]] | None, Field(max_length=1)] = None
    moderation: None = None
    prediction: None = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    prompt_cache_options: None = None
    reasoning_effort: Literal["none"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any] | None, Field(max_length=0)] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=0)] = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    clincot: Extension = Extension()


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: Annotated[str | None, Field(exclude_if=lambda refusal: refusal is None)] = None


class Choice(BaseModel):
    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"] = "stop"
    logprobs: None = None


class Usage(BaseModel):
    """Tokens that the policy read and wrote for a completion, over all regions.

    They are those of every conversation in which it wrote a region or an answer, images included. Conversations in
    which it only rated windows are not counted.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A chat completion, with the chain of its first choice in the extension `clincot`.

    `usage` is null if the predictor does not count tokens. `clincot_choices` has the chain of each choice if there are
    several.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    clincot: VisualAnswer
    clincot_choices: Annotated[list[VisualAnswer] | None, Field(exclude_if=lambda chains: chains is None)] = None


class ServedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "clincot"


class ServedModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedModel]


class ModelStatus(ServedModel):
    """A model in OpenAI's protocol and in KServe's V1 protocol, whose routes have the same path."""

    name: str
    ready: bool


class ModelList(ServedModels):
    """The models in OpenAI's protocol and in KServe's V1 protocol, whose routes have the same path."""

    models: list[str]
