"""A Hugging Face causal language model as a judge that reads text only, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from clincot.models.checkpoint import UnsupportedCheckpoint, check_no_adapter, hash_checkpoint
from clincot.models.inspection import first_line
from clincot.models.protocols import MIN_YES_NO_MASS
from clincot.models.quiet_loading import quiet_transformers
from clincot.models.weight_shapes import (
    LOADING_ERRORS,
    WEIGHTS_REMEDY,
    refuse_incomplete_weights,
    refuse_loaded_adapter,
)
from clincot.models.yes_no import find_yes_no_ids
from clincot.prompts import Conversation, PromptFormat, load_prompt_format

# Shape suffixes: B conversations, V vocabulary.

_TEXT_ONLY_REMEDY = "give a causal language model, or leave out text_only for a model that reads images"


def read_text_config(path: str) -> Any:
    """The checkpoint's config, of a class that transformers loads as a causal language model.

    Raises UnsupportedCheckpoint for any other, and for an adapter.
    """
    check_no_adapter(Path(path))
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise _refuse_text_model(path, first_line(error)) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _refuse_text_model(path, f"config.json is a {type(config).__name__}")
    return config


def _refuse_text_model(path: str, reason: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{path}: not a causal language model that transformers can load (text_only): {reason}", _TEXT_ONLY_REMEDY
    )


def read_text_tokenizer(path: str) -> Any:
    """The checkpoint's tokenizer. Raises UnsupportedCheckpoint if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UnsupportedCheckpoint(
            f"{path}: the tokenizer cannot be loaded: {first_line(error)}",
            "copy the tokenizer's files from the published checkpoint",
        ) from error


def _load_text_model(path: str, dtype: str) -> Any:
    """The model. Raises UnsupportedCheckpoint if a tensor is missing or has another shape, instead of guessing it."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refuse_incomplete_weights names the tensor
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise UnsupportedCheckpoint(f"{path}: the weights cannot be loaded: {error}", WEIGHTS_REMEDY) from error
    refuse_loaded_adapter(path, model)
    refuse_incomplete_weights(path, loading)
    return model


class LanguageModelJudge:
    """A checkpoint without image input; implements the Judge protocol. Pictures of a conversation are not shown.

    thinking: False passes enable_thinking=False to the chat template. A tokenizer without a chat template gets the text
    followed by "Answer:". Raises UnsupportedCheckpoint if transformers cannot load the checkpoint, tensors are missing,
    or the chat template fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "",
        device: str = "cpu",
        dtype: str = "float32",
        thinking: bool = True,
        batch_size: int = 16,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.digest = hash_checkpoint(self.path) if self.path.is_dir() else f"hub:{path}"
        self.views: PromptFormat = load_prompt_format(self.path)
        self.batch_size = batch_size
        self._template: dict[str, Any] = {} if thinking else {"enable_thinking": False}
        read_text_config(str(path))
        self.tokenizer = read_text_tokenizer(str(path))
        model = _load_text_model(str(path), dtype)
        self.model = model.to(device).eval()
        self._yes, self._no = find_yes_no_ids(self.tokenizer, self.path)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the next token; None if both together have less than MIN_YES_NO_MASS."""
        out: list[float | None] = []
        for start in range(0, len(conversations), self.batch_size):
            logp_BV = self.compute_next_token_logprobs(conversations[start : start + self.batch_size])
            yes_B, no_B = (torch.logsumexp(logp_BV[:, ids], dim=-1) for ids in (self._yes, self._no))
            mass_B = yes_B.exp() + no_B.exp()
            p_yes_B = torch.sigmoid((yes_B - no_B).double())
            for p_yes, mass in zip(p_yes_B.tolist(), mass_B.tolist(), strict=True):
                out.append(round(p_yes, 6) if mass >= MIN_YES_NO_MASS else None)
        return out

    def _encode(self, conversation: Conversation) -> list[int]:
        return encode_text(self.path, self.tokenizer, conversation, self._template)

    def compute_next_token_logprobs(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(B, V) log-probabilities of the first token of each reply."""
        return self._compute_next_token_logprobs([self._encode(conversation) for conversation in conversations])

    def _compute_next_token_logprobs(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B, V) log-probabilities of the token after each row; padded on the left, with positions that skip it."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        device = self.model.device
        with torch.inference_mode():
            logits_BV = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device)
            ).logits[:, -1]
        return torch.log_softmax(logits_BV.float(), dim=-1)


def encode_text(
    path: str | Path, tokenizer: Any, conversation: Conversation, template_options: dict[str, Any]
) -> list[int]:
    """The ids of a conversation's text, after which the model replies.

    template_options: variables of the chat template. Raises UnsupportedCheckpoint if the chat template fails.
    """
    if tokenizer.chat_template is None:
        text = "\n".join(turn.text for turn in conversation)
        return list(tokenizer(f"{text}\nAnswer:")["input_ids"])
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation]
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **template_options
        )
    except (TemplateError, TypeError) as error:
        raise UnsupportedCheckpoint(
            f"{path}: the chat template fails: {type(error).__name__}: {error}",
            "copy chat_template.jinja from the published checkpoint",
        ) from error
    return list(encoded["input_ids"])
