"""The families that are published in an original LLaVA layout, and their chat formats."""

from __future__ import annotations

from dataclasses import dataclass

# microsoft/LLaVA-Med 821e1c7, llava/conversation.py: conv_mistral_instruct (separator style LLAMA_2 without a system
# prompt); llava/eval/model_vqa.py puts "<image>\n" in front of the question. A turn's end is " </s>".
MISTRAL_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' ' }}{%- else -%}{{ '[INST] ' }}{%- endif -%}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}
{%- if message['role'] == 'assistant' -%}{{ ' ' + eos_token }}{%- else -%}{{ ' [/INST]' }}{%- endif -%}
{%- endfor -%}"""
# FreedomIntelligence/HuatuoGPT-Vision 546b25f, cli.py: insert_image_placeholder and preprocess_huatuo. "<|user|>" and
# "<|assistant|>" are ordinary text. A past answer ends with " \n", without an end token.
HUATUO_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|assistant|>\\n' if message['role'] == 'assistant' else '<|user|>\\n' -}}
{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{{- item['text'] if message['role'] == 'assistant' else item['text'] | trim -}}
{%- endfor -%}
{{- ' \\n' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""


@dataclass(frozen=True)
class OriginalFamily:
    """A family of checkpoints in an original layout."""

    name: str
    model_type: str  # in the original config.json
    text_type: str  # transformers' model type of the language model
    chat_template: str
    always_pads: bool  # pictures are padded to a square whatever the config's image_aspect_ratio is
    adds_bos: bool  # its tokenizer puts the beginning-of-text token in front of a conversation
    pads_with: str  # the tokenizer's attribute with the token that pads batches, as in the original


FAMILIES = {
    family.name: family
    for family in (
        OriginalFamily("llava-med", "llava_mistral", "mistral", MISTRAL_TEMPLATE, False, True, "unk_token"),
        OriginalFamily("huatuogpt-vision", "llava_qwen2", "qwen2", HUATUO_TEMPLATE, True, False, "eos_token"),
    )
}
