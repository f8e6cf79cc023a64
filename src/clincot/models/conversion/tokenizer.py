"""The tokenizer of an original checkpoint with an image token, held to the original's own tokens."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AddedToken, AutoTokenizer, LlamaTokenizer

from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.conversion.original_families import OriginalFamily

IMAGE_TOKEN = "<image>"
PROBES = ("[INST] Is this <|user|>\n", "\nWhich  zone is the nodule in? 12 %")  # texts before and after a picture


def read_tokenizer(source: Path, family: OriginalFamily) -> Any:
    """The original's tokenizer with the image token and a padding token.

    Raises UnsupportedCheckpoint if it would not produce the original's tokens: no beginning-of-text token where the
    original has one, or another reading of the text after a picture. The original tokenizes the parts before and after
    a picture by themselves (tokenizer_image_token in mm_utils.py).
    """
    tokenizer = _load_tokenizer(source, family)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = getattr(tokenizer, family.pads_with) or tokenizer.eos_token
    before, after = PROBES
    first, second = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]
    if family.adds_bos:
        if tokenizer.bos_token_id is None or first[:1] != [tokenizer.bos_token_id]:
            raise UnsupportedCheckpoint(
                f"{source}: its tokenizer does not put {tokenizer.bos_token} in front of a text"
            )
        second = second[1:]
    expected = [*first, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *second]
    if tokenizer(before + IMAGE_TOKEN + after)["input_ids"] != expected:
        raise UnsupportedCheckpoint(
            f"{source}: its tokenizer reads the text after {IMAGE_TOKEN} differently from a text by itself, which is "
            "how the original reads it; its tokenizer.json must put a space in front of every part (prepend_scheme "
            '"always", or a Prepend normalizer)'
        )
    return tokenizer


def _load_tokenizer(source: Path, family: OriginalFamily) -> Any:
    """From tokenizer.json or vocabulary and merges; from tokenizer.model only where there is nothing else.

    Without tokenizer.json, AutoTokenizer of transformers 5.19.0 reads Mistral's tokenizer.model as a TokenizersBackend
    that leaves out SentencePiece's space in front of a text; LlamaTokenizer with legacy=True keeps it.
    """
    path = source / "tokenizer.model"
    if (source / "tokenizer.json").is_file() or not path.is_file():
        try:
            config = CONFIG_MAPPING[family.text_type]()
            return AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UnsupportedCheckpoint(f"{source}: its tokenizer cannot be loaded: {error}") from error
    try:
        pieces = import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))
        tokenizer = LlamaTokenizer.from_pretrained(source, legacy=True)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise UnsupportedCheckpoint(
            f"{path}: reading it without a tokenizer.json needs SentencePiece: pip install 'sentencepiece==0.2.0' "
            f"protobuf ({error})"
        ) from error
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.encode(text):
            raise UnsupportedCheckpoint(f"{path}: transformers reads {text!r} differently from SentencePiece")
    return tokenizer
