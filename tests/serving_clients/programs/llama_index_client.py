"""LlamaIndex's OpenAI classes: chat, stream, history. Arguments: key, base URL, image file."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.llms.openai import OpenAI
from llama_index.llms.openai_like import OpenAILike

key, url, image = sys.argv[1], sys.argv[2], Path(sys.argv[3])
options = {"model": "policy", "api_base": url, "api_key": key, "max_retries": 0}
like = OpenAILike(is_chat_model=True, context_window=2048, **options)  # its temperature is 0.1 by default


class NamedOpenAI(OpenAI):
    """The plain class, which knows the context window of OpenAI's own models only."""

    @property
    def metadata(self):
        return like.metadata


first = ChatMessage(
    role=MessageRole.USER, blocks=[ImageBlock(image=image.read_bytes()), TextBlock(text="Is there a nodule?")]
)
system = ChatMessage(role=MessageRole.SYSTEM, content="Be brief.")
reply = like.chat([system, first])
history = [first, reply.message, ChatMessage(role=MessageRole.USER, content="Is it large?")]
streamed = "".join(chunk.delta or "" for chunk in like.stream_chat(history))
later = asyncio.run(like.achat([first]))
plain = NamedOpenAI(temperature=0, max_tokens=12, **options).chat([first])
print(
    json.dumps(
        {
            "content": reply.message.content,
            "streamed": streamed,
            "asynchronous": later.message.content,
            "openai_class": plain.message.content,
        }
    )
)
