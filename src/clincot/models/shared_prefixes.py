"""Forward passes in which every common beginning of conversations is computed once.

`score_conversations` computes the token that follows each conversation, `generate_replies` whole replies. Both lay the
conversations out as trees (prefix_tree.py). A reply then continues from the keys and values of its own conversation,
which are gathered from its tree. Trees of similar length share a batch, whose size follows from the memory that a token
takes; replies that have ended leave their batch.

A family takes part if its language model reads causally and takes positions and a mask of our own:
`find_unshared_reason` says which do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from clincot.models.encoding import ConversationEncoder, EncodedConversation, pad_rows
from clincot.models.features import SHARED_FEATURE_FAMILIES, PictureFeature, PictureFeatures, list_shown
from clincot.models.prefix_tree import (
    BATCH_TOKENS,
    LEAVE_SHARE,
    TREE_TOKENS,
    Indices,
    PrefixTree,
    batch_trees,
    build_keys,
    build_trees,
    group_replies,
)
from clincot.models.sampling import SeededSampler
from clincot.models.work_count import WorkCount
from clincot.prompts import ImageView

# Shape suffixes: B conversations, R trees, T tokens of a tree, L tokens of a conversation, S slots of a cache,
# V vocabulary, H hidden size.

# Language models that read causally and whose attention takes a mask of shape (R, 1, T, T).
CAUSAL_TEXT_MODELS = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma3_text",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
    }
)
UNSHARED_FAMILIES = {"paligemma": "it reads a whole prompt in both directions, so no part of it is computed apart"}
_IMAGE_BLOCK_FAMILIES = {"gemma3"}  # the tokens of a picture see each other in both directions

# Of a GPU's memory, for a batch's activations, and the same for its keys and values. Not of what is free: a batch has
# to be the same in each run and shard, because its composition can change the last digit of a result (batching.py).
_GPU_MEMORY_SHARE = 0.125


@dataclass(frozen=True)
class Reply:
    """The ids that the model wrote, its end of turn included, and their log-probabilities in nats at temperature 1."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def find_unshared_reason(config: Any) -> str:
    """Why the beginnings of prompts cannot be shared in a model of this config; "" if they can."""
    kind, text = config.model_type, config.get_text_config()
    if kind in UNSHARED_FAMILIES:
        return UNSHARED_FAMILIES[kind]
    if kind not in SHARED_FEATURE_FAMILIES:
        return f"the family {kind!r} is not known to place pictures by token ids only"
    if text.model_type not in CAUSAL_TEXT_MODELS:
        return f"the language model {text.model_type!r} is not known to read causally"
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if windows and text.model_type != "gemma3_text":
        return f"the language model {text.model_type!r} has layers with a sliding window"
    if text._attn_implementation not in ("sdpa", "eager", None):  # None: not loaded yet, which takes sdpa
        return f"the attention {text._attn_implementation!r} takes no mask"
    return ""


class SharedPrefixes:
    """Computes conversations of one model with their common beginnings shared.

    batch_tokens: of a batch of trees, at most; None: by the memory. batch_size: replies that are written at once, at
    most.
    """

    def __init__(
        self,
        model: Any,
        encoder: ConversationEncoder,
        features: PictureFeatures,
        work: WorkCount,
        *,
        batch_size: int,
        batch_tokens: int | None = None,
    ) -> None:
        self.model, self.encoder, self.features, self.work = model, encoder, features, work
        self.batch_size = batch_size
        self._fixed_batch_tokens = batch_tokens
        self._text = model.config.get_text_config()
        self._blocks = model.config.model_type in _IMAGE_BLOCK_FAMILIES
        self._window: int | None = getattr(self._text, "sliding_window", None)
        self._layered = self._text.model_type == "gemma3_text"  # each kind of layer has a mask of its own
        self._three_positions = hasattr(model.model, "get_rope_index")  # Qwen's frame, row and column of a token
        if self._text.model_type not in ("mistral", "gemma3_text"):
            self._window = None  # Qwen's configs name one that no layer has

    def score_conversations(
        self, encoded: Sequence[EncodedConversation], read: Callable[[torch.Tensor], list[Any]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, what `read` makes of the (B, V) logits of the next token) of every conversation."""
        layout = _Layout(encoded, self.encoder.image_ids)
        limit = self._choose_batch_tokens()
        for batch in batch_trees(layout.build_trees(limit), limit):
            logits_BV, _ = self._prefill(layout, batch, cache=None)
            yield from zip(_list_members(batch), read(logits_BV), strict=True)

    def generate_replies(
        self, encoded: Sequence[EncodedConversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) of every conversation. temperature 0 is greedy; a conversation samples with its seed."""
        layout = _Layout(encoded, self.encoder.image_ids)
        limit = self._choose_batch_tokens()
        groups = group_replies(
            layout.build_trees(limit),
            batch_size=self.batch_size,
            max_tokens=self._choose_cache_tokens(),
            max_new_tokens=max_new_tokens,
        )
        for group in groups:
            parts = []
            for batch in batch_trees(group, limit):
                cache = DynamicCache()
                logits_BV, positions_B = self._prefill(layout, batch, cache=cache)
                parts.append(_gather_conversations(batch, cache, logits_BV, positions_B))
            running = _join_parts(parts)
            members = running.members
            sampler = SeededSampler([seeds[index] for index in members], temperature) if temperature > 0 else None
            replies = self._decode(running, sampler, max_new_tokens)
            yield from zip(members, replies, strict=True)

    def _prefill(
        self, layout: _Layout, trees: Sequence[PrefixTree], *, cache: DynamicCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, V) logits of the token after each conversation, (B,) the position of that token)."""
        device = self.model.device
        rows = [layout.starts[tree.owners] + tree.depths for tree in trees]  # (T,) indices into the layout's tokens
        first_at = np.concatenate([layout.picture_at[row] for row in rows])
        shown = [layout.pictures[number] for number in first_at[first_at >= 0]]
        features = self.features.fetch(shown) if shown else []
        ids_RT = _pad([layout.ids[row] for row in rows], self.encoder.pad_id)
        ends_RT = _pad([tree.ends for tree in trees], -1)
        depths_RT = _pad([tree.depths for tree in trees], 0)
        blocks_RT = _pad([layout.blocks[row] for row in rows], -1)
        masks = self._build_tree_masks(ends_RT.to(device), depths_RT.to(device), blocks_RT.to(device))
        positions, next_B = self._compute_positions(layout, trees, depths_RT, features, shown)
        inputs: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if features:
            inputs["mm_encoder_outputs"] = {"image": self.features.build_outputs(features)}
        with torch.inference_mode():
            hidden_RTH = self.model.model(
                input_ids=ids_RT.to(device),
                attention_mask=masks,
                position_ids=positions.to(device),
                use_cache=cache is not None,
                **inputs,
            ).last_hidden_state
            last_B = [int(path[-1]) for path in _list_paths(trees)]
            logits_BV = self.model.get_output_embeddings()(hidden_RTH[_list_rows(trees), last_B])
        self.work.prefill_tokens += sum(len(tree) for tree in trees)
        return logits_BV, next_B

    def _compute_positions(
        self,
        layout: _Layout,
        trees: Sequence[PrefixTree],
        depths_RT: torch.Tensor,
        features: Sequence[PictureFeature],
        shown: Sequence[tuple[ImageView, bool]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(position_ids as the model takes them, (B,) the position after each conversation).

        Qwen's positions of an image token are three, its frame, row and column; they come from its own method.
        """
        members = _list_members(trees)
        if not self._three_positions:
            return depths_RT, torch.tensor([len(layout.encoded[index].ids) for index in members])
        grids = {picture.key: feature.grid for (picture, _), feature in zip(shown, features, strict=True)}
        encoded = [layout.encoded[index] for index in members]
        ids_BL = pad_rows([one.ids for one in encoded], self.encoder.pad_id, side="right")
        types_BL = pad_rows([one.types for one in encoded], 0, side="right")
        valid_BL = pad_rows([[1] * len(one.ids) for one in encoded], 0, side="right")
        of_pictures = [grids[picture.key] for picture, _ in list_shown(encoded)]
        positions_3BL, delta_B1 = self.model.model.get_rope_index(
            ids_BL,
            mm_token_type_ids=types_BL,
            image_grid_thw=torch.cat([grid.cpu() for grid in of_pictures if grid is not None]) if of_pictures else None,
            attention_mask=valid_BL,
        )
        row_of = {index: row for row, index in enumerate(members)}
        positions_3RT = torch.zeros((3, *depths_RT.shape), dtype=torch.long)
        for row, tree in enumerate(trees):
            owners = torch.tensor([row_of[int(owner)] for owner in tree.owners])
            positions_3RT[:, row, : len(tree)] = positions_3BL[:, owners, torch.from_numpy(tree.depths)]
        return positions_3RT, valid_BL.sum(-1) + delta_B1[:, 0]

    def _decode(self, running: _Running, sampler: SeededSampler | None, max_new_tokens: int) -> list[Reply]:
        """Continue every conversation until it ends its turn."""
        device = self.model.device
        ends = torch.tensor(sorted(self.encoder.end_ids), device=device)
        ids: list[list[int]] = [[] for _ in running.lengths.tolist()]
        logprobs: list[list[float]] = [[] for _ in ids]
        rows = list(range(len(ids)))  # the conversation of each row of the batch
        going = torch.ones(len(ids), dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            scores_BV = running.logits if sampler is None else sampler(None, running.logits)
            chosen_B = scores_BV.argmax(-1)
            logp_B = torch.log_softmax(running.logits.float(), -1).gather(-1, chosen_B[:, None])[:, 0]
            for row, token, logp, writes in zip(rows, chosen_B.tolist(), logp_B.tolist(), going.tolist(), strict=True):
                if writes:
                    ids[row].append(token)
                    logprobs[row].append(logp)
            going &= ~torch.isin(chosen_B, ends)
            left = int(going.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            if len(rows) - left >= LEAVE_SHARE * len(rows):
                kept = going.nonzero()[:, 0]
                running.keep_rows(kept)
                rows, chosen_B, going = [rows[i] for i in kept.tolist()], chosen_B[kept], going[kept]
                if sampler is not None:
                    sampler.keep_rows(kept.tolist())
            positions_B = running.next_positions + step
            position_ids = positions_B[:, None].expand(3, -1, -1) if self._three_positions else positions_B[:, None]
            with torch.inference_mode():
                running.logits = self.model(
                    input_ids=chosen_B[:, None],
                    attention_mask=self._build_step_masks(running, step + 1),
                    position_ids=position_ids,
                    past_key_values=running.cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            self.work.decode_tokens += len(rows)
        return [Reply(tuple(one), tuple(logps)) for one, logps in zip(ids, logprobs, strict=True)]

    def _build_tree_masks(self, ends_RT: torch.Tensor, depths_RT: torch.Tensor, blocks_RT: torch.Tensor) -> Any:
        """The attention masks of trees: a token sees itself and its ancestors, and in a picture all of the picture."""
        at_T = torch.arange(ends_RT.shape[1], device=ends_RT.device)
        seen_RTT = (at_T <= at_T[:, None]) & (at_T[:, None] < ends_RT[:, None, :])
        seen_RTT = seen_RTT | torch.eye(len(at_T), dtype=torch.bool, device=at_T.device)  # padding sees itself
        near_RTT = depths_RT[:, :, None] - depths_RT[:, None, :]
        picture_RTT = None
        if self._blocks:
            picture_RTT = (blocks_RT[:, :, None] == blocks_RT[:, None, :]) & (blocks_RT >= 0)[:, None, :]
        return self._finish_masks(seen_RTT, near_RTT, picture_RTT)

    def _build_step_masks(self, running: _Running, written: int) -> Any:
        """The masks of one more token of each conversation, of which `written` are in the cache with it."""
        slots = running.slots + written
        at_S = torch.arange(slots, device=running.lengths.device)
        lengths_B1 = running.lengths[:, None]
        seen_BS = (at_S < lengths_B1) | (at_S >= running.slots)
        depths_BS = torch.where(at_S < running.slots, at_S, lengths_B1 + at_S - running.slots)
        near_BS = lengths_B1 + written - 1 - depths_BS
        return self._finish_masks(seen_BS[:, None], near_BS[:, None], None)

    def _finish_masks(self, seen: torch.Tensor, distance: torch.Tensor, picture: torch.Tensor | None) -> Any:
        """The masks (…, 1, T, S) as the attention takes them: one, or one for each kind of layer.

        seen, distance: (…, T, S) whether a token is visible, and how many tokens of its conversation it is away.
        """
        windowed = seen if self._window is None else seen & (distance < self._window)
        if picture is not None:
            seen, windowed = seen | picture, windowed | picture
        if not self._layered:
            return self._convert_mask(windowed)
        return {
            "full_attention": self._convert_mask(seen),
            "sliding_attention": self._convert_mask(windowed),
        }

    def _convert_mask(self, seen: torch.Tensor) -> torch.Tensor:
        mask = seen[:, None]
        if self._text._attn_implementation == "sdpa":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _choose_batch_tokens(self) -> int:
        """Tokens of a batch of trees."""
        if self._fixed_batch_tokens is not None:
            return self._fixed_batch_tokens
        if self.model.device.type != "cuda":
            return BATCH_TOKENS
        text = self._text
        numbers = 12 * text.hidden_size + 4 * text.intermediate_size  # that a layer holds of a token at once
        return max(TREE_TOKENS, int(self._get_memory_bytes() // (numbers * self.model.dtype.itemsize)))

    def _choose_cache_tokens(self) -> int:
        """Tokens whose keys and values are held at once."""
        text = self._text
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        token_bytes = 2 * text.num_hidden_layers * heads * head * self.model.dtype.itemsize
        return max(TREE_TOKENS, int(self._get_memory_bytes() // token_bytes))

    def _get_memory_bytes(self) -> int:
        """Memory for one purpose: a share of a GPU's, a gigabyte on a processor."""
        if self.model.device.type != "cuda":
            return 1 << 30
        return int(torch.cuda.get_device_properties(self.model.device).total_memory * _GPU_MEMORY_SHARE)


class _Layout:
    """All tokens of some conversations in one row, with what the forward pass needs to know of each.

    starts (B,): where each conversation begins. ids, blocks, picture_at: for each token its id, the number of its
    picture or -1, and the number of the picture that begins with it or -1. pictures: by number, with whether their
    conversation shows no other.
    """

    def __init__(self, encoded: Sequence[EncodedConversation], image_ids: frozenset[int]) -> None:
        self.encoded = encoded
        self.keys = build_keys(encoded, image_ids)
        lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
        self.starts: Indices = np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64)
        self.ids: Indices = np.concatenate([np.array(one.ids, dtype=np.int64) for one in encoded])
        is_image = np.concatenate(self.keys) < 0
        counts = list(chain.from_iterable(one.picture_tokens for one in encoded))
        self.pictures = list_shown(encoded)
        self.blocks: Indices = np.full(len(self.ids), -1, np.int64)
        self.blocks[is_image] = np.repeat(np.arange(len(counts)), counts)
        self.picture_at: Indices = np.full(len(self.ids), -1, np.int64)
        if counts:
            firsts = is_image.nonzero()[0][np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)]
            self.picture_at[firsts] = np.arange(len(counts))

    def build_trees(self, batch_tokens: int) -> list[PrefixTree]:
        return build_trees(self.keys, max_tokens=min(TREE_TOKENS, batch_tokens))


@dataclass
class _Running:
    """Conversations that are being continued: one row each, with its keys and values from the first slot on.

    logits (B, V) of the next token. lengths (B,): tokens of the conversation. next_positions (B,): of the token after
    it. slots: of the longest conversation.
    """

    members: tuple[int, ...]
    cache: DynamicCache
    logits: torch.Tensor
    lengths: torch.Tensor
    next_positions: torch.Tensor
    slots: int

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.lengths, self.next_positions = self.lengths[rows], self.next_positions[rows]


def _gather_conversations(
    trees: Sequence[PrefixTree], cache: DynamicCache, logits_BV: torch.Tensor, next_B: torch.Tensor
) -> _Running:
    """The keys and values of each conversation, from those of its tree."""
    device = logits_BV.device
    paths = _list_paths(trees)
    paths_BL = _pad(paths, 0).to(device)
    row_B1 = torch.tensor(_list_rows(trees), device=device)[:, None]
    for layer in cache.layers:
        # indexing before and after a slice puts the slice's dimension last but one: (B, L, heads, head size)
        layer.keys = layer.keys[row_B1, :, paths_BL].transpose(1, 2)
        layer.values = layer.values[row_B1, :, paths_BL].transpose(1, 2)
    lengths_B = torch.tensor([len(path) for path in paths], device=device)
    return _Running(tuple(_list_members(trees)), cache, logits_BV, lengths_B, next_B.to(device), paths_BL.shape[1])


def _join_parts(parts: Sequence[_Running]) -> _Running:
    """All conversations in one batch, with slots for the longest of them."""
    if len(parts) == 1:
        return parts[0]
    slots = max(part.slots for part in parts)
    cache = parts[0].cache
    for number, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            padded = [
                torch.nn.functional.pad(getattr(part.cache.layers[number], name), (0, 0, 0, slots - part.slots))
                for part in parts
            ]
            setattr(layer, name, torch.cat(padded))
    return _Running(
        tuple(chain.from_iterable(part.members for part in parts)),
        cache,
        torch.cat([part.logits for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.next_positions for part in parts]),
        slots,
    )


def _list_members(trees: Sequence[PrefixTree]) -> list[int]:
    """The conversations of all trees."""
    return list(chain.from_iterable(tree.members for tree in trees))


def _list_paths(trees: Sequence[PrefixTree]) -> list[Indices]:
    """The tokens of each of these conversations in its tree."""
    return list(chain.from_iterable(tree.paths for tree in trees))


def _list_rows(trees: Sequence[PrefixTree]) -> list[int]:
    """The tree of each of these conversations."""
    return list(chain.from_iterable([row] * len(tree.members) for row, tree in enumerate(trees)))


def _pad(rows: Sequence[Indices], value: int) -> torch.Tensor:
    """Rows of differing length as one (B, T) tensor, padded on the right."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, np.int64)
    for row, line in zip(rows, out, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)
