"""LangChain's ChatOpenAI: a conversation, a stream, structured output. Arguments: key, base URL, image file."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Finding(BaseModel):
    """The part of the chain that this program asks for."""

    answer: str
    confidence: float


def ask_question(text: str, image: Path) -> HumanMessage:
    encoded = base64.b64encode(image.read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    return HumanMessage([picture, {"type": "text", "text": text}])


key, url, image = sys.argv[1], sys.argv[2], Path(sys.argv[3])
model = ChatOpenAI(model="policy", base_url=url, api_key=key, temperature=0.1, max_retries=0, stream_usage=True)
first = ask_question("Is there a nodule?", image)
reply = model.invoke([SystemMessage("Be brief."), first])
messages = [first, AIMessage(str(reply.content)), HumanMessage("Is it large?")]
streamed = None
for chunk in model.stream(messages):
    streamed = chunk if streamed is None else streamed + chunk
assert streamed is not None
finding = None
if not reply.additional_kwargs.get("refusal"):
    finding = model.with_structured_output(Finding, method="json_schema").invoke([first]).model_dump()
later = asyncio.run(model.ainvoke([first]))
print(
    json.dumps(
        {
            "content": reply.content,
            "refusal": reply.additional_kwargs.get("refusal"),
            "finish": reply.response_metadata["finish_reason"],
            "usage": reply.usage_metadata,
            "streamed": streamed.content,
            "streamed_usage": streamed.usage_metadata,
            "finding": finding,
            "asynchronous": later.content,
        }
    )
)
