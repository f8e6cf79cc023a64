"""Published checkpoints that recipes name, whose configurations ship with the package (published_models.yaml)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from clincot.config.sections import FrozenConfig
from clincot.config.settings_file import parse_config
from clincot.fields import NonEmptyStr
from clincot.geometry import SmartResize

_FILE = Path(__file__).with_name("published_models.yaml")


class PublishedModel(FrozenConfig):
    """A published checkpoint: where it is published, and the part of its config.json that decides its costs."""

    title: NonEmptyStr
    repository: NonEmptyStr
    revision: NonEmptyStr
    checked: str
    model_type: NonEmptyStr
    vision: dict[str, Any]
    text: dict[str, Any]
    mm_tokens_per_image: int | None = None
    markers: int = 0
    resize: SmartResize | None = None

    @property
    def source(self) -> str:
        return f"config.json of {self.repository} at {self.revision[:7]}"

    def count_picture_tokens(self, width: int, height: int) -> int:
        """Image tokens of a picture of that size in pixels, without the markers around them."""
        if self.resize is not None:
            columns, rows = self.resize.compute_size(width, height)
            return columns * rows // self.resize.factor**2
        if self.mm_tokens_per_image is not None:
            return self.mm_tokens_per_image
        side: int = self.vision["image_size"] // self.vision["patch_size"]
        return side**2

    def build_config(self) -> Any:
        """The configuration as an object of transformers."""
        from transformers import AutoConfig

        fields: dict[str, Any] = {"vision_config": self.vision, "text_config": self.text}
        if self.mm_tokens_per_image is not None:
            fields["mm_tokens_per_image"] = self.mm_tokens_per_image
        if "tie_word_embeddings" in self.text:
            fields["tie_word_embeddings"] = self.text["tie_word_embeddings"]
        return AutoConfig.for_model(self.model_type, **fields)


@cache
def list_published_models() -> dict[str, PublishedModel]:
    """The shipped configurations, {name of the checkpoint's folder: model}."""
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return {name: parse_config(PublishedModel, fields, where=f"{_FILE}: {name}") for name, fields in content.items()}


def find_published_model(checkpoint: str, title: str = "") -> PublishedModel | None:
    """The model of a checkpoint's folder name (models/medgemma-4b), repository or title; None for any other one."""
    for name, model in list_published_models().items():
        if Path(checkpoint).name == name or checkpoint == model.repository or (title and title == model.title):
            return model
    return None
