"""Conversations to token ids and tensors, the same way for answering, judging and training.

The checkpoint's own chat template renders a conversation, its own processor says what each picture becomes in the text,
and its own tokenizer turns the whole text into ids. So a model is fed exactly what its processor makes (tests/families
compares), and the tokens that the policy wrote are known from character offsets. Three things are added:

- Control words in a question or an answer are spelled out as text, so that no data set ends a turn or shows a picture.
- Where the template does not end the assistant's turn with an end token (LLaVA-1.5), a turn that counts in a loss gets
  one, as in the family's own training, so that the policy learns to stop.
- A family without a chat template (PaliGemma) gets the prompt layout that its processor documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clincot.errors import InvalidInput
from clincot.geometry import REGION_MARKUP
from clincot.images import measure_image, open_image, render_view
from clincot.models.sized_cache import SizedCache
from clincot.prompts import Conversation, ImageView, collect_views

# Shape suffixes: B conversations, T tokens.

Tensors = dict[str, torch.Tensor]
_TEXT_KEYS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "text_replacement_offsets",
}
_TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
_TEXTS_KEPT = 4096  # texts of pictures
_ROWS_KEPT = 1024  # encoded texts, of some 50 bytes a token; a server has new ones with every region
LARGE_PIXELS = 2 << 20  # of an image whose views are worth rendering ahead
RENDERED_PIXELS = 16 << 20  # of all views that are kept; Pillow has four bytes of each
_FIRST_HIDDEN = 0xF0000  # private characters that stand for control words while a text is rendered and cut


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures of one conversation as the processor makes them."""

    texts: tuple[str, ...]  # what replaces each placeholder in the text
    tensors: Tensors


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation: token ids, which of them the policy wrote, and its pictures in order."""

    ids: tuple[int, ...]
    actions: tuple[bool, ...]
    pictures: tuple[ImageView, ...]
    types: tuple[int, ...] = ()  # modality of each token, where the model reads it (ConversationEncoder.type_key)
    picture_tokens: tuple[int, ...] = ()  # image tokens of each picture


class ChatTemplateError(InvalidInput):
    """The checkpoint's chat template or processor cannot express the conversation."""


def read_picture(picture: ImageView) -> Image.Image:
    """The pixels of a view; not to be changed, since others may be given the same image."""
    return _rendered_ahead.get(picture.key) or _render_picture(picture)


def render_ahead(pictures: Iterable[ImageView]) -> None:
    """Render the views of large images in this thread, so that the one that runs the model finds them ready.

    A view of 16 megapixels takes a tenth of a second, in which the model would stand still for all other requests.
    Views of their file's own size are left out, since they are as large as the file.
    """
    for picture in pictures:
        is_large = picture.side_px is not None and _count_pixels(picture.path) > LARGE_PIXELS
        if is_large and picture.key not in _rendered_ahead:
            _rendered_ahead.add(picture.key, _render_picture(picture))
            _rendered_ahead.shrink(RENDERED_PIXELS)


_rendered_ahead: SizedCache[Image.Image] = SizedCache(lambda view: view.width * view.height)


def _render_picture(picture: ImageView) -> Image.Image:
    return render_view(_open_cached(picture.path), picture.box, picture.side_px, picture.cutout)


@lru_cache(maxsize=4)  # a question's crops all come from the same file; one of 16 megapixels takes 48 MB
def _open_cached(path: str) -> Image.Image:
    return open_image(Path(path))


@lru_cache(maxsize=1024)
def _count_pixels(path: str) -> int:
    width, height = measure_image(Path(path))
    return width * height


@dataclass(frozen=True)
class _RenderedTurns:
    """A conversation as text, with the character spans of the turns that the policy wrote."""

    text: str
    actions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _EncodedText:
    """The tokens of a conversation's text, as in EncodedConversation."""

    ids: tuple[int, ...]
    actions: tuple[bool, ...]
    types: tuple[int, ...]


class ConversationEncoder:
    """Encodes conversations for one processor (tokenizer, image processor and chat template).

    end_ids: further ids that end a turn, for instance those of the checkpoint's generation config.
    """

    def __init__(self, processor: Any, *, end_ids: Sequence[int] = (), pictures_kept: int = 128) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.placeholder: str = getattr(processor, "boi_token", None) or processor.image_token
        self.image_ids = frozenset(i for i in processor.image_token_ids if i is not None)
        # A control word in a question or an answer is text: it is hidden behind a private character while the template
        # is rendered and cut, and then spelled out, so that no data set ends a turn or shows a picture.
        words = _list_control_words(self.tokenizer, self.placeholder)
        self._hidden = {word: chr(_FIRST_HIDDEN + n) for n, word in enumerate(words)}
        self._words = {hidden: word for word, hidden in self._hidden.items()}
        # The markers of a region are tokens, as the policy writes them: a whole region is left as it is.
        self._control = re.compile("|".join([REGION_MARKUP, *map(re.escape, self._hidden)]))
        self._spelled = re.compile(f"([{''.join(self._words)}])")
        self._template = lru_cache(maxsize=_ROWS_KEPT)(self._apply_template)
        self._count_text_tokens = lru_cache(maxsize=_TEXTS_KEPT)(self._count_image_ids)
        # One finding is looked for in many windows, whose conversations differ in the picture only.
        self._encode_row = lru_cache(maxsize=_ROWS_KEPT)(self._encode_text)
        # Pixels are large and needed once; texts are small and needed by every conversation.
        self._pictures: Callable[[tuple[ImageView, ...]], EncodedPictures]
        self._pictures = lru_cache(maxsize=pictures_kept)(self._process_pictures)
        self._picture_texts: dict[tuple[ImageView, ...], tuple[str, ...]] = {}
        # LLaVA-OneVision tiles a picture only if it is the conversation's only one.
        self.pictures_are_independent = "num_image_tokens" not in vars(processor)
        # Idefics3 without splitting makes one frame of any picture, so one picture's text is every picture's.
        self._one_frame = getattr(processor.image_processor, "do_image_splitting", None) is False
        self.type_key, self._adds_special = self._probe_processor()
        self.end_ids = frozenset(_find_end_ids(self.tokenizer)) | {int(i) for i in end_ids} | self._find_turn_end()
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else min(self.end_ids)
        self._end_texts = tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.end_ids)))
        self._end_text: str = self.tokenizer.eos_token or self._end_texts[0]

    # --- pictures

    def encode_pictures(self, pictures: Sequence[ImageView]) -> EncodedPictures:
        """All pictures of one conversation."""
        if not self.pictures_are_independent:
            return self._pictures(tuple(pictures))
        encoded = [self._pictures((picture,)) for picture in pictures]
        texts = tuple(one.texts[0] for one in encoded)
        return EncodedPictures(texts, concatenate_pictures([one.tensors for one in encoded]))

    def encode_separately(self, pictures: Sequence[ImageView]) -> list[Tensors]:
        """The tensors of each picture as the only one of a conversation; nothing is kept.

        Pictures of one size are processed in one call: for a tiny model the calls would cost more than the tower.
        """
        images = [read_picture(picture) for picture in pictures]
        if not self._one_frame or () not in self._picture_texts or len({image.size for image in images}) > 1:
            return [self._pictures((picture,)).tensors for picture in pictures]
        out = _select_tensors(self.processor.image_processor([images], return_tensors="pt"))
        names = list(out)
        split = [torch.split(out[name], 1, dim=1) for name in names]
        return [dict(zip(names, parts, strict=True)) for parts in zip(*split, strict=True)]

    def encode_together(self, pictures: Sequence[ImageView]) -> EncodedPictures:
        """All pictures of one conversation, in one call of the processor; nothing is kept."""
        return self._process_pictures(tuple(pictures))

    def stack_pictures(self, pictures: Sequence[Sequence[ImageView]]) -> Tensors:
        """The image tensors of a batch, given the pictures of each conversation; {} where none has a picture."""
        return batch_pictures([self.encode_pictures(of_one).tensors for of_one in pictures if of_one])

    def count_image_tokens(self, picture: ImageView) -> int:
        """How many image tokens stand for a picture that a conversation shows by itself."""
        (text,) = self._read_picture_texts((picture,))
        return self._count_text_tokens(text)

    def _read_picture_texts(self, pictures: tuple[ImageView, ...]) -> tuple[str, ...]:
        """What replaces each picture's placeholder, without keeping its pixels."""
        if self.pictures_are_independent and len(pictures) > 1:
            return tuple(self._read_picture_texts((picture,))[0] for picture in pictures)
        key = () if self._one_frame else pictures
        if key not in self._picture_texts:
            if len(self._picture_texts) >= _TEXTS_KEPT:  # a server sees pictures without end
                self._picture_texts.clear()
            self._picture_texts[key] = self._pictures(pictures).texts
        return self._picture_texts[key]

    def _process_pictures(self, pictures: tuple[ImageView, ...]) -> EncodedPictures:
        images = [[read_picture(picture) for picture in pictures]]
        if self._one_frame and () in self._picture_texts:  # tokenising the same placeholder again would double the time
            out = self.processor.image_processor(images, return_tensors="pt")
            return EncodedPictures(self._picture_texts[()] * len(pictures), _select_tensors(out))
        return self._run_processor(images)

    def _run_processor(self, images: list[list[Image.Image]]) -> EncodedPictures:
        out = self.processor(
            text=[self.placeholder * len(images[0])],
            images=images,
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        (offsets,) = out["text_replacement_offsets"]
        return EncodedPictures(tuple(one["replacement"] for one in offsets), _select_tensors(out))

    def _probe_processor(self) -> tuple[str, bool]:
        """(name of the token type tensor or "", whether special tokens are added), as the processor itself does."""
        blank = [[Image.new("RGB", (64, 64))]]
        out = self.processor(text=[self.placeholder], images=blank, return_tensors="pt")
        type_key = next((key for key in _TYPE_KEYS if key in out), "")
        ids = out["input_ids"][0].tolist()
        bos = self.tokenizer.bos_token_id
        return type_key, bos is not None and ids[0] == bos and not self.placeholder.startswith(self.tokenizer.bos_token)

    # --- conversations

    def encode(self, conversation: Conversation, *, reply: bool = False) -> EncodedConversation:
        """Token ids of a conversation; with `reply` it ends where the assistant's next turn begins."""
        pictures = tuple(collect_views(conversation))
        rendered = self._render_turns(conversation, reply=reply)
        parts = rendered.text.split(self.placeholder)
        if len(parts) != len(pictures) + 1:
            raise ChatTemplateError(
                f"the chat template shows {len(parts) - 1} picture placeholders of a conversation with "
                f"{len(pictures)} pictures"
            )
        texts = self._read_picture_texts(pictures) if pictures else ()
        text, spans = _expand_placeholders(parts, texts, len(self.placeholder), rendered.actions)
        row = self._encode_row(text, tuple(spans))
        tokens = tuple(map(self._count_text_tokens, texts))
        return EncodedConversation(row.ids, row.actions, pictures, row.types, tokens)

    def _encode_text(self, text: str, spans: tuple[tuple[int, int], ...]) -> _EncodedText:
        """Tokens of a whole text; spans: the characters that the policy wrote."""
        ids, offsets = self._tokenize_text(text)
        actions = tuple(_is_inside(offset, spans) for offset in offsets)
        types = self._find_types(ids, actions) if self.type_key else ()
        return _EncodedText(ids, actions, types)

    def has_control_words(self, conversation: Conversation) -> bool:
        """Whether a turn contains a control word of the tokenizer as text, which is spelled out here."""
        return any(self._hide_control_words(turn.text) != turn.text for turn in conversation)

    def _count_image_ids(self, text: str) -> int:
        """How many image tokens the text of a picture has."""
        return sum(token in self.image_ids for token in self._tokenize_text(text)[0])

    def _find_types(self, ids: Sequence[int], actions: Sequence[bool]) -> tuple[int, ...]:
        if self.processor.chat_template is None:  # PaliGemma: 0 for the prompt, 1 for the answer
            return tuple(int(action) for action in actions)
        (types,) = self.processor.create_mm_token_type_ids([list(ids)])
        return tuple(types)

    def _render_turns(self, conversation: Conversation, *, reply: bool) -> _RenderedTurns:
        """The conversation by the chat template, and where the policy's own turns are in it.

        A turn that the policy wrote follows the very text that it was asked with, also where the template writes a past
        turn's head in another way (LLaVA-OneVision's has a space more).
        """
        if self.processor.chat_template is None:
            return self._render_prefix_layout(conversation, reply=reply)
        whole = self._render_conversation(conversation, reply=reply)
        pieces: list[str] = []
        spans = []
        done = length = 0  # characters of `whole` that are in pieces; characters of the pieces
        for position, turn in enumerate(conversation):
            if not turn.action:
                continue
            past = self._render_conversation(conversation[:position], reply=False)
            asked = self._render_conversation(conversation[:position], reply=True)
            if not (whole.startswith(past) and asked.startswith(past)):
                raise ChatTemplateError("the chat template rewrites earlier turns when later ones are added")
            head = asked[len(past) :]
            spoken, replaced = self._cut_turn(whole[len(past) :], head, turn.text)
            pieces += [whole[done : len(past)], head, spoken]
            length += len(past) - done + len(head)
            spans.append((length, length + len(spoken)))
            length += len(spoken)
            done = len(past) + replaced
        pieces.append(whole[done:])
        return _RenderedTurns("".join(pieces), tuple(spans))

    def _cut_turn(self, rendered: str, head: str, text: str) -> tuple[str, int]:
        """(a turn up to and with its end token, how many characters of `rendered` it replaces).

        rendered: the conversation from this turn on. head: what the template writes before a reply. What follows the
        end token (mostly a newline) is the template's, not the policy's.
        """
        same = 0  # characters that a past turn's head shares with the head of a reply
        while rendered[same : same + 1] == head[same : same + 1] != "":
            same += 1
        text = self._hide_control_words(text).strip()
        start = rendered.find(text, same)
        if start < 0:
            raise ChatTemplateError(f"the chat template does not show the assistant's turn as it is: {text!r}")
        gap = rendered[len(head) : start] if rendered.startswith(head) else ""
        if gap.strip():  # a thinking block, which the policy did not write
            raise ChatTemplateError(f"the chat template puts {gap!r} before the assistant's turn")
        end = start + len(text)
        closing = rendered[end:]
        for word in self._end_texts:
            if closing.lstrip().startswith(word):
                skipped = end + len(closing) - len(closing.lstrip()) + len(word)
                return gap + rendered[start:skipped], skipped
        return gap + text + self._end_text, end

    def _render_prefix_layout(self, conversation: Conversation, *, reply: bool) -> _RenderedTurns:
        """PaliGemma's layout: all images, <bos>, the texts of all turns in lines, and the answer with its end token."""
        acting = [position for position, turn in enumerate(conversation) if turn.action]
        trained = not reply and bool(acting) and acting[-1] == len(conversation) - 1
        if len(acting) > 1 and not reply:
            raise ChatTemplateError(
                "this checkpoint's layout puts all images in front, so a region that it writes would see its own crop; "
                "train it on regions of a grounder (propose.grounders without 'written')"
            )
        prompt = conversation[:-1] if trained else conversation
        lines = "\n".join(self._hide_control_words(turn.text) for turn in prompt)
        text = self.placeholder * sum(len(turn.pictures) for turn in conversation)
        text += f"{self.tokenizer.bos_token}{lines}\n"
        if not trained:
            return _RenderedTurns(text, ())
        answer = self._hide_control_words(conversation[-1].text) + self._end_text
        return _RenderedTurns(text + answer, ((len(text), len(text) + len(answer)),))

    def _render_conversation(self, conversation: Conversation, *, reply: bool) -> str:
        # What is rendered depends on how many pictures a turn has, not on which: the same words come again and again.
        turns = tuple((turn.role, len(turn.pictures), self._hide_control_words(turn.text)) for turn in conversation)
        return self._template(turns, reply)

    def _hide_control_words(self, text: str) -> str:
        return self._control.sub(lambda found: self._hidden.get(found[0], found[0]), text)

    def _apply_template(self, turns: tuple[tuple[str, int, str], ...], reply: bool) -> str:
        messages = []
        for role, pictures, text in turns:
            shown = [{"type": "image"} for _ in range(pictures)]
            messages.append({"role": role, "content": [*shown, {"type": "text", "text": text}]})
        rendered: str = self.processor.apply_chat_template(messages, add_generation_prompt=reply, tokenize=False)
        return rendered

    def _tokenize_text(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """(ids, character offsets) of a rendered text, special tokens in front where the processor adds them."""
        bos = self.tokenizer.bos_token
        special = self._adds_special and not (bos is not None and text.startswith(bos))
        if not self._spelled.search(text):
            encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
            return tuple(encoded["input_ids"]), tuple(encoded["offset_mapping"])
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part in self._spelled.split(text):
            word = self._words.get(part)
            if part:
                options = {"split_special_tokens": True} if word is not None else {}
                encoded = self.tokenizer(
                    part if word is None else word,
                    add_special_tokens=special and start == 0,
                    return_offsets_mapping=True,
                    **options,
                )
                ids += encoded["input_ids"]
                for begin, end in encoded["offset_mapping"]:
                    offsets.append((start, start + 1) if word is not None else (start + begin, start + end))
            start += len(part)
        return tuple(ids), tuple(offsets)

    def _find_turn_end(self) -> set[int]:
        """The special token with which the chat template closes an assistant's turn, if it does."""
        if self.processor.chat_template is None:
            return set()
        answer = "xyzzy"  # a word that no template writes itself
        after = self._apply_template((("user", 0, "a"), ("assistant", 0, answer)), False)
        closing = after.partition(answer)[2].lstrip()
        for word in sorted(self._hidden, key=len, reverse=True):
            if closing.startswith(word):
                return {self.tokenizer.convert_tokens_to_ids(word)}
        return set()


def _expand_placeholders(
    parts: Sequence[str], texts: Sequence[str], placeholder: int, spans: Sequence[tuple[int, int]]
) -> tuple[str, list[tuple[int, int]]]:
    """The text with every picture's own text in place of its placeholder, and the spans moved along."""
    moved = list(spans)
    out = parts[0]
    read = len(parts[0])  # characters of the text before expansion
    for text, part in zip(texts, parts[1:], strict=True):
        grown = len(text) - placeholder
        moved = [
            (a + grown, b + grown) if old >= read else (a, b) for (a, b), (old, _) in zip(moved, spans, strict=True)
        ]
        out += text + part
        read += placeholder + len(part)
    return out, moved


def _is_inside(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a token has a character of a span; a token of no characters (an added special one) has none."""
    return any(offset[0] < end and offset[1] > start for start, end in spans)


def _select_tensors(out: Any) -> Tensors:
    return {name: value for name, value in out.items() if name not in _TEXT_KEYS and isinstance(value, torch.Tensor)}


def _list_control_words(tokenizer: Any, placeholder: str) -> list[str]:
    """The tokenizer's special tokens as text, the longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | {placeholder}, key=lambda word: (-len(word), word))


def _find_end_ids(tokenizer: Any) -> set[int]:
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_utterance>")}
    return {i for i in ids if isinstance(i, int) and i != tokenizer.unk_token_id}


def pad_rows(
    rows: Sequence[Sequence[int | bool]], value: int | bool, *, side: str, dtype: torch.dtype = torch.long
) -> torch.Tensor:
    """Rows of differing length to one (B, T) tensor, padded on the given side."""
    longest = max(len(row) for row in rows)
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor(
        [[*f, *row] if side == "left" else [*row, *f] for f, row in zip(fill, rows, strict=True)], dtype=dtype
    )


def concatenate_pictures(pictures: Sequence[Tensors]) -> Tensors:
    """The tensors of one conversation's pictures, each processed by itself, as if they had been processed together."""
    if len(pictures) == 1:
        return pictures[0]
    if "pixel_attention_mask" in pictures[0]:  # Idefics3, SmolVLM: (1, frames, C, H, W) a picture
        frames = {}
        for name in pictures[0]:
            frames[name] = torch.cat([tensors[name] for tensors in pictures], dim=1)
        return frames
    return batch_pictures(pictures)


def batch_pictures(conversations: Sequence[Tensors]) -> Tensors:
    """The image tensors of several conversations as one batch; {} if there is none.

    Idefics3 and SmolVLM want (B, most frames, C, H, W), LLaVA-NeXT and LLaVA-OneVision (pictures, most tiles, C, H, W),
    both padded with zeros. The tensors of the others are concatenated.
    """
    if not conversations:
        return {}
    first = conversations[0]
    batch: Tensors = {}
    for name in first:
        tensors = [one[name] for one in conversations]
        ragged = first["pixel_values"].ndim == 5 and name in ("pixel_values", "pixel_attention_mask")
        batch[name] = torch.cat([_pad_tiles(one, tensors) for one in tensors]) if ragged else torch.cat(tensors)
    return batch


def _pad_tiles(tensor: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros after the last tile (dimension 1), up to the most that any of the tensors has."""
    missing = max(one.shape[1] for one in tensors) - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))], dim=1)
