"""A Hugging Face image-text-to-text checkpoint as policy and as judge, in this process.

In families with shareable features, each picture goes through the vision encoder once and its features are reused by
every conversation that shows it (`mm_encoder_outputs` of transformers). In other families it is encoded every time.
Where the language model allows it, the common beginnings of conversations are computed once as well
(shared_prefixes.py); otherwise every conversation is computed as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, GenerationConfig, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clincot.errors import PromptTooLong
from clincot.models.checked_encoder import build_checked_encoder
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.models.encoding import EncodedConversation, pad_rows
from clincot.models.features import FRAME_FEATURE_FAMILIES, SHARED_FEATURE_FAMILIES, PictureFeatures, list_shown
from clincot.models.inspection import list_ids, read_model_config, read_processor, refuse_without_torchvision
from clincot.models.precision import choose_dtype
from clincot.models.protocols import MIN_YES_NO_MASS, Generation
from clincot.models.sampling import SeededSampler
from clincot.models.shared_prefixes import Reply, SharedPrefixes, find_unshared_reason
from clincot.models.weight_shapes import (
    LOADING_ERRORS,
    WEIGHTS_REMEDY,
    refuse_incomplete_weights,
    refuse_loaded_adapter,
)
from clincot.models.work_count import WorkCount
from clincot.models.yes_no import find_yes_no_ids
from clincot.prompts import Conversation, ImageView, PromptFormat, load_prompt_format

# Shape suffixes: B conversations, T tokens, V vocabulary, F frames, H hidden size.

T = TypeVar("T")

_INTEGRATION_STEPS = 8  # of the integral over the gradients
_WHOLE_BATCH = 64  # conversations at once, at most, where each is computed as a whole


class VisionLanguageModel:
    """A checkpoint loaded for inference. Implements the Policy and the Judge protocol.

    batch_size: conversations that are computed at once, at most, besides the limits that the memory sets. features_mb:
    size of the cache of picture features; None: by the memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str = "",
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int = 128,
        features_mb: int | None = None,
        progress: bool = False,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.digest = hash_checkpoint(self.path) if self.path.is_dir() else f"hub:{path}"
        self.views: PromptFormat = load_prompt_format(self.path)
        self.batch_size = batch_size
        self.progress = progress
        self.work = WorkCount()
        self.refuses_long_prompts = False  # True: raise PromptTooLong instead of computing beyond the trained positions
        self.model, processor = load_checkpoint(str(path), dtype=dtype, device=device)
        self.model.eval()
        self.encoder = build_checked_encoder(self.path, processor, end_ids=list_end_ids(self.model))
        self.shares_features: bool = self.model.config.model_type in SHARED_FEATURE_FAMILIES
        self.has_frames: bool = self.model.config.model_type in FRAME_FEATURE_FAMILIES
        self._features = PictureFeatures(self.model, self.encoder, kept_mb=features_mb, work=self.work)
        self.unshared_reason = find_unshared_reason(self.model.config)  # why beginnings are not shared; "" if they are
        self._shared = SharedPrefixes(self.model, self.encoder, self._features, self.work, batch_size=batch_size)

    @property
    def token_limit(self) -> int | None:
        """The number of positions that the language model was made for; None if its config names none.

        vLLM's default limit is this key as well (derive_max_model_len_and_key), and like here, prompt and answer
        together must fit (vllm-project/vllm@017638d, vllm/renderers/params.py, TokenizeParams).
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @cached_property
    def yes_no_ids(self) -> tuple[list[int], list[int]]:
        """(ids for yes, ids for no). Raises UnsupportedCheckpoint if there are none; a policy may do without."""
        return find_yes_no_ids(self.encoder.tokenizer, self.path)

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Generation]:
        """See protocols.Policy. Each conversation samples with its own seed, independently of its batch."""
        if len(seeds) != len(conversations):
            raise ValueError(
                f"expected one seed for each conversation, got {len(conversations)} conversations, {len(seeds)} seeds"
            )
        if not conversations:
            return []
        encoded = self._encode_prompts(conversations, new_tokens=max_new_tokens)
        write = self._write_batches if self.unshared_reason else self._shared.generate_replies
        replies: dict[int, Generation] = {}
        written = write(encoded, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)
        for index, reply in self._show_progress(written, len(encoded), "writing"):
            generation = self._decode_generation(reply.ids, reply.logprobs)
            replies[index] = replace(generation, prompt_tokens=len(encoded[index].ids))
            self.work.new_tokens += len(generation.token_logprobs)
        return [replies[index] for index in range(len(encoded))]

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """See protocols.Policy. Needs one forward pass for each batch and generates nothing."""
        if not conversations:
            return []
        _ = self.yes_no_ids  # raises for a tokenizer without yes and no
        encoded = self._encode_prompts(conversations, new_tokens=1)
        if self.unshared_reason:
            scored = self._score_batches(encoded)
        else:
            scored = self._shared.score_conversations(encoded, self._read_yes_no)
        scores = dict(self._show_progress(scored, len(encoded), "scoring"))
        return [scores[index] for index in range(len(encoded))]

    def _read_yes_no(self, logits_BV: torch.Tensor) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of the next token, or None if both together have too little."""
        yes, no = self.yes_no_ids
        logp_BV = torch.log_softmax(logits_BV.float(), dim=-1)
        yes_B = torch.logsumexp(logp_BV[:, yes], dim=-1)
        no_B = torch.logsumexp(logp_BV[:, no], dim=-1)
        mass_B = yes_B.exp() + no_B.exp()  # NaN if the weights are damaged, which gives None below as well
        p_yes_B = torch.sigmoid((yes_B - no_B).double())
        scores = zip(p_yes_B.tolist(), mass_B.tolist(), strict=True)
        return [round(p_yes, 6) if mass >= MIN_YES_NO_MASS else None for p_yes, mass in scores]

    def _score_batches(self, encoded: Sequence[EncodedConversation]) -> Iterator[tuple[int, float | None]]:
        for batch in self._iter_slices(len(encoded)):
            yield from enumerate(self._read_yes_no(self._compute_next_logits(encoded[batch])), batch.start)

    def _write_batches(
        self, encoded: Sequence[EncodedConversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply]]:
        for batch in self._iter_slices(len(encoded)):
            replies = self._write_batch(encoded[batch], seeds[batch], max_new_tokens, temperature)
            yield from enumerate(replies, batch.start)

    def _iter_slices(self, count: int) -> Iterator[slice]:
        """Yield the batches of conversations that are computed as a whole."""
        size = min(self.batch_size, _WHOLE_BATCH)
        for start in range(0, count, size):
            yield slice(start, start + size)

    def compute_answer_logprobs(self, conversations: Sequence[Conversation]) -> list[float]:
        """The sum of the log-probabilities (nats) of each conversation's action tokens."""
        out: list[float] = []
        for batch in self._iter_slices(len(conversations)):
            encoded = [self.encoder.encode(conversation) for conversation in conversations[batch]]
            inputs = self._build_inputs(encoded, side="right")
            with torch.inference_mode():
                logits_BTV = self.model(**inputs).logits
            actions = [conversation.actions for conversation in encoded]
            actions_BT = pad_rows(actions, False, side="right", dtype=torch.bool)
            logp_BT = gather_token_logprobs(logits_BTV, inputs["input_ids"])
            out += (logp_BT * actions_BT[:, 1:].to(logp_BT.device)).sum(-1).tolist()
        return out

    def compute_relevance(self, conversations: Sequence[Conversation]) -> list[npt.NDArray[np.float32]]:
        """See protocols.RelevancePolicy. Needs a family whose picture features are a square grid of tokens.

        Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) along the straight path from the mean feature
        of all pictures of the call to the picture's own, evaluated at the midpoints of 8 equal intervals. Raises
        UnsupportedCheckpoint for other families.
        """
        if not self.has_frames:
            raise UnsupportedCheckpoint(
                f"{self.path}: relevance maps are read from {sorted(FRAME_FEATURE_FAMILIES)} checkpoints, this one is "
                f"{self.model.config.model_type!r}; use the windows, written or http grounder"
            )
        encoded = [self.encoder.encode(conversation, reply=True) for conversation in conversations]
        # if a picture is split into frames, the last frame shows all of it
        last_BTH = torch.cat([self.encode_pictures(one.pictures[-1:])[-1:] for one in encoded])
        mean_H = last_BTH.mean((0, 1))
        side = math.isqrt(last_BTH.shape[1])
        out: list[npt.NDArray[np.float32]] = []
        for batch in self._iter_slices(len(encoded)):
            evidence_BT = self._integrate_gradients(encoded[batch], last_BTH[batch], mean_H)
            out += list(evidence_BT.reshape(-1, side, side).float().cpu().numpy())
        return out

    def _integrate_gradients(
        self, encoded: Sequence[EncodedConversation], last_BTH: torch.Tensor, mean_H: torch.Tensor
    ) -> torch.Tensor:
        """(B, T) integrated gradients of log P(yes)/P(no) from the mean feature to each last picture's features."""
        yes, no = self.yes_no_ids
        inputs = self._build_inputs(encoded, side="left")
        features_FTH = inputs["mm_encoder_outputs"]["image"].pooler_output
        frames = [len(self.encode_pictures(one.pictures)) for one in encoded]
        last_frame_B = torch.tensor(frames, device=features_FTH.device).cumsum(0) - 1
        gradient_BTH = torch.zeros_like(last_BTH)
        for step in range(_INTEGRATION_STEPS):
            share = (step + 0.5) / _INTEGRATION_STEPS
            between_BTH = (mean_H + share * (last_BTH - mean_H)).requires_grad_(True)
            replaced_FTH = features_FTH.index_copy(0, last_frame_B, between_BTH)
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=replaced_FTH)}
            logits_BV = self.model(**inputs, logits_to_keep=1).logits[:, -1]
            log_odds_B = torch.logsumexp(logits_BV[:, yes], -1) - torch.logsumexp(logits_BV[:, no], -1)
            gradient_BTH += torch.autograd.grad(log_odds_B.sum(), between_BTH)[0] / _INTEGRATION_STEPS
        return ((last_BTH - mean_H) * gradient_BTH).sum(-1)

    def compute_next_token_logprobs(self, encoded: Sequence[EncodedConversation]) -> torch.Tensor:
        """(B, V) log-probabilities of the token that follows each conversation."""
        return torch.log_softmax(self._compute_next_logits(encoded).float(), dim=-1)

    def _compute_next_logits(self, encoded: Sequence[EncodedConversation]) -> torch.Tensor:
        """(B, V) logits of the token that follows each conversation, each computed as a whole."""
        inputs = self._build_inputs(encoded, side="left")
        self.work.prefill_tokens += sum(len(one.ids) for one in encoded)
        with torch.inference_mode():
            logits_BV: torch.Tensor = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        return logits_BV

    def _write_batch(
        self, encoded: Sequence[EncodedConversation], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[Reply]:
        inputs = self._build_inputs(encoded, side="left")
        processors = LogitsProcessorList()
        if temperature > 0:
            processors.append(SeededSampler(seeds, temperature))
        # an object, because with keywords every call compares the model's whole configuration with its defaults (20 ms)
        generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.encoder.pad_id,
            eos_token_id=sorted(self.encoder.end_ids),
        )
        with torch.inference_mode(), _without_generation_defaults(self.model):
            out = self.model.generate(**inputs, logits_processor=processors, generation_config=generation_config)
        new_BT = out.sequences[:, inputs["input_ids"].shape[1] :]
        logp_BT = torch.stack(
            [
                torch.log_softmax(step_BV.float(), -1).gather(-1, new_BT[:, t : t + 1])[:, 0]
                for t, step_BV in enumerate(out.logits)  # raw logits: the sampler's noise and temperature do not count
            ],
            dim=1,
        )
        self.work.prefill_tokens += sum(len(one.ids) for one in encoded)
        self.work.decode_tokens += new_BT.shape[0] * (new_BT.shape[1] - 1)
        return [Reply(tuple(ids), tuple(logps)) for ids, logps in zip(new_BT.tolist(), logp_BT.tolist(), strict=True)]

    def _encode_prompts(self, conversations: Sequence[Conversation], *, new_tokens: int) -> list[EncodedConversation]:
        """Encode conversations up to the reply; raises PromptTooLong if the model should refuse long prompts."""
        encoded = [self.encoder.encode(conversation, reply=True) for conversation in conversations]
        self.work.requests += len(encoded)
        self.work.prompt_tokens += sum(len(one.ids) for one in encoded)
        limit = self.token_limit if self.refuses_long_prompts else None
        if limit is not None:
            longest = max(len(one.ids) for one in encoded)
            if longest + new_tokens > limit:
                raise PromptTooLong(longest, new_tokens, limit)
        return encoded

    def _decode_generation(self, ids: Sequence[int], logps: Sequence[float]) -> Generation:
        end_of_turn = next((i for i, token in enumerate(ids) if token in self.encoder.end_ids), None)
        end = len(ids) if end_of_turn is None else end_of_turn + 1
        text = self.encoder.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        return Generation(text, tuple(round(value, 6) for value in logps[:end]), cut_off=end_of_turn is None)

    def _build_inputs(self, encoded: Sequence[EncodedConversation], *, side: str) -> dict[str, Any]:
        """The keyword arguments of the model's forward method, padded on the given side."""
        device = self.model.device
        inputs: dict[str, Any] = {
            "input_ids": pad_rows([one.ids for one in encoded], self.encoder.pad_id, side=side).to(device),
            "attention_mask": pad_rows([[1] * len(one.ids) for one in encoded], 0, side=side).to(device),
        }
        if self.encoder.type_key:
            types = pad_rows([one.types for one in encoded], 0, side=side)
            inputs[self.encoder.type_key] = types.to(device)
        pictures = list(chain.from_iterable(one.pictures for one in encoded))
        if pictures and self.shares_features:
            features = self._features.fetch(list_shown(encoded))
            inputs["mm_encoder_outputs"] = {"image": self._features.build_outputs(features)}
            grids = [feature.grid for feature in features if feature.grid is not None]
            if grids:
                inputs["image_grid_thw"] = torch.cat(grids).to(device)
        elif pictures:
            self.work.encodes += len(pictures)
            tensors = self.encoder.stack_pictures([one.pictures for one in encoded])
            inputs |= {name: tensor.to(device) for name, tensor in tensors.items()}
        return inputs

    def encode_pictures(self, pictures: Sequence[ImageView]) -> torch.Tensor:
        """(F, T, H) features of the pictures' frames, in order; each distinct picture is encoded once.

        For families with frames only.
        """
        return self._features(pictures)

    def _show_progress(self, items: Iterator[T], total: int, what: str) -> Iterator[T]:
        """The items, with a progress bar if there are so many that it will move."""
        shown = None if self.progress and total >= 4 * self.batch_size else True
        yield from tqdm(items, total=total, desc=f"{self.name}: {what}", disable=shown, leave=False)


def load_checkpoint(path: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load (model, processor) of an image-text-to-text family; UnsupportedCheckpoint says what is wrong or missing.

    dtype: see precision.choose_dtype.
    """
    config = read_model_config(path)
    processor = read_processor(path, config.model_type)
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=getattr(torch, choose_dtype(dtype, device)),
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refuse_incomplete_weights names the tensor
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        if "torchvision" in str(error).lower():
            raise refuse_without_torchvision(path, error) from error
        raise UnsupportedCheckpoint(
            f"{path}: the weights cannot be loaded into {type(config).__name__}'s model: {error}",
            WEIGHTS_REMEDY,
        ) from error
    refuse_loaded_adapter(path, model)
    refuse_incomplete_weights(path, loading)
    return model.to(device), processor


def list_end_ids(model: Any) -> list[int]:
    """The ids that end a turn by the checkpoint's generation config."""
    return list_ids(model.generation_config.eos_token_id)


def gather_token_logprobs(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """(B, T-1) log-probability (nats) of every token except the first, given the tokens before it."""
    logp_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), dim=-1)
    return logp_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]


@contextmanager
def _without_generation_defaults(model: Any) -> Iterator[None]:
    """Hide the checkpoint's generation config, from which generate() fills what is not set.

    Beams, penalties, stop strings and time limits of the checkpoint would change answers and their log-probabilities;
    its end tokens are set by the caller.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
