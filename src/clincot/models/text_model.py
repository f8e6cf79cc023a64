"""A Hugging Face causal language model as a judge that reads text only, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.models.protocols import MIN_YES_NO_MASS
from clincot.models.yes_no import find_yes_no_ids
from clincot.prompts import Conversation, PromptFormat, load_prompt_format

# Shape suffixes: B conversations, V vocabulary.


class LanguageModelJudge:
    """A checkpoint without image input; implements the Judge protocol. Pictures of a conversation are not shown.

    thinking: False passes enable_thinking=False to the chat template. A tokenizer without a chat template gets the text
    followed by "Answer:". Raises UnsupportedCheckpoint if transformers cannot load the checkpoint.
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
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise UnsupportedCheckpoint(
                f"{path}: not a causal language model that transformers can load (text_only): {error}"
            ) from error
        self.model = model.to(device).eval()
        self._yes, self._no = find_yes_no_ids(self.tokenizer, self.path)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the next token; None if both together have less than MIN_YES_NO_MASS."""
        out: list[float | None] = []
        for start in range(0, len(conversations), self.batch_size):
            rows = [self._encode(conversation) for conversation in conversations[start : start + self.batch_size]]
            logp_BV = self._compute_next_token_logprobs(rows)
            yes_B, no_B = (torch.logsumexp(logp_BV[:, ids], dim=-1) for ids in (self._yes, self._no))
            mass_B = yes_B.exp() + no_B.exp()
            p_yes_B = torch.sigmoid((yes_B - no_B).double())
            for p_yes, mass in zip(p_yes_B.tolist(), mass_B.tolist(), strict=True):
                out.append(round(p_yes, 6) if mass >= MIN_YES_NO_MASS else None)
        return out

    def _encode(self, conversation: Conversation) -> list[int]:
        if self.tokenizer.chat_template is None:
            text = "\n".join(turn.text for turn in conversation)
            return list(self.tokenizer(f"{text}\nAnswer:")["input_ids"])
        messages = [{"role": turn.role, "content": turn.text} for turn in conversation]
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **self._template
        )
        return list(encoded["input_ids"])

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
