"""The models of a plan: their sizes and how their prompts are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clincot.config import JudgeSpec
from clincot.config.shipped import resolve_path
from clincot.errors import InvalidInput
from clincot.models.inspection import read_model_config
from clincot.planning.assumptions import Assumptions
from clincot.planning.counting_models import CountingModel, ReplyHabits, Sharing
from clincot.planning.model_sizes import ModelSize, measure_model
from clincot.planning.prompt_counters import EncodedPrompts, EstimatedPrompts, PromptCounter
from clincot.planning.published_models import find_published_model, list_published_models
from clincot.records import Study


@dataclass(frozen=True)
class PlannedModel:
    """A policy or a judge. size: None for one whose size is not known, such as a judge behind a URL."""

    name: str
    source: str
    size: ModelSize | None
    counter: PromptCounter
    exact: bool  # its prompts are counted by its own processor

    def build_counting_model(self, images: Mapping[str, Study], habits: ReplyHabits | None = None) -> CountingModel:
        """The model that counts in its place."""
        sharing = Sharing()
        if self.size is not None:
            sharing = Sharing(self.size.shares_features, self.size.shares_prefixes, self.size.has_frames)
        return CountingModel(self.name, self.counter, images, habits=habits, sharing=sharing)


def plan_checkpoint(
    name: str, checkpoint: str, images: Mapping[str, Study], assumptions: Assumptions, *, title: str = ""
) -> PlannedModel:
    """The model of a checkpoint's folder, or of a published one that is not here.

    title: of the model, by which recipes name it. Raises InvalidInput for one that is neither, and
    UnsupportedCheckpoint for a folder with a config or processor that cannot be read.
    """
    folder = resolve_path(checkpoint) if checkpoint else Path()
    if checkpoint and (folder / "config.json").is_file():
        size = measure_model(read_model_config(str(folder)))
        return PlannedModel(name, f"{checkpoint}/config.json", size, EncodedPrompts(folder), exact=True)
    published = find_published_model(checkpoint, title)
    if published is None:
        known = ", ".join(list_published_models())
        raise InvalidInput(
            f"{name}: {checkpoint or 'no checkpoint'} is no folder with a config.json, and none of the published "
            f"checkpoints whose config is known ({known}), so its size is not known; name a checkpoint's folder"
        )
    counter = EstimatedPrompts(published, images, assumptions)
    return PlannedModel(name, published.source, measure_model(published.build_config()), counter, exact=False)


def plan_judge(
    spec: JudgeSpec, policy: PlannedModel, images: Mapping[str, Study], assumptions: Assumptions
) -> PlannedModel:
    """A judge of the panel. One behind a URL, or of text only, is counted as if it read the policy's tokens."""
    if spec.url:
        return PlannedModel(spec.name, spec.url, None, policy.counter, exact=False)
    if spec.text_only:
        return PlannedModel(spec.name, f"{spec.path}, text only", None, policy.counter, exact=False)
    return plan_checkpoint(spec.name, spec.path, images, assumptions)
