"""Dense pre-training of a small checkpoint's vision side: which patch of a frame shows which finding.

Learning from answers alone leaves fine details (a nodule's margin) at chance for a tower trained from scratch, so
the tower and the connector first learn where findings are, patch by patch, on anatomies that no evaluation uses. The
linear head that reads the connector's tokens is thrown away afterwards. Needed for the small models only; a pretrained
tower is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from clincot.models.vlm import load_checkpoint

# Shape suffixes: N frames, S pixels a side, P patches a side, C findings, H hidden size.


@dataclass(frozen=True)
class DenseFrames:
    """Frames of one image with the share of every patch that shows each finding."""

    pixels_NSS: npt.NDArray[np.uint8]
    shares_NPPC: npt.NDArray[np.float32]  # in [0, 1]


def pretrain_vision(
    checkpoint: Path, images: Iterable[DenseFrames], *, images_total: int, lr: float = 1e-3, images_a_step: int = 16,
    seed: int = 0, report_every: int = 100,
) -> list[float]:  # fmt: skip
    """Train the tower in place (the folder's weights are replaced); returns the loss, averaged every so many steps.

    Loss: binary cross-entropy of every patch and finding, against the share of the patch that shows it; where any
    finding is shown it counts 8-fold, since nine in ten patches show none.
    """
    torch.manual_seed(seed)
    model, processor = load_checkpoint(str(checkpoint))
    tower, connector = model.model.vision_model, model.model.connector
    stream = iter(images)
    first = next(stream)
    block = model.config.scale_factor  # a token stands for block x block patches
    head = nn.Linear(model.config.text_config.hidden_size, block * block * first.shares_NPPC.shape[-1])
    nn.init.constant_(head.bias, -4.0)  # few patches show anything
    parameters = [*tower.parameters(), *connector.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    steps = images_total // images_a_step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    losses: list[float] = []
    recent: list[float] = []
    mean, std = (processor.image_processor.image_mean[0], processor.image_processor.image_std[0])
    bar = tqdm(_steps(first, stream, images_a_step), total=steps, desc="pre-training the vision tower", mininterval=5)
    for pixels_NSS, shares_NPPC in bar:
        scaled_NSS = (pixels_NSS.float() / 255.0 - mean) / std
        hidden_NTH = connector(tower(pixel_values=scaled_NSS[:, None].expand(-1, 3, -1, -1)).last_hidden_state)
        wanted_NTC = by_token(shares_NPPC, block)
        weight_NT1 = 1.0 + 7.0 * (wanted_NTC.amax(-1, keepdim=True) > 0.05)
        loss = nn.functional.binary_cross_entropy_with_logits(
            head(hidden_NTH), wanted_NTC, weight=weight_NT1.expand_as(wanted_NTC)
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        recent.append(loss.item())
        if len(recent) == report_every:
            losses.append(round(sum(recent) / len(recent), 5))
            recent.clear()
            bar.set_postfix(loss=losses[-1])
    model.save_pretrained(checkpoint, safe_serialization=True)
    return losses


def by_token(shares_NPPC: torch.Tensor, block: int) -> torch.Tensor:
    """(N, P, P, C) shares of patches to (N, T, block * block * C) shares of the tokens that pixel shuffle makes."""
    frames, side, _, findings = shares_NPPC.shape
    tokens = side // block
    blocks = shares_NPPC.reshape(frames, tokens, block, tokens, block, findings).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(frames, tokens * tokens, block * block * findings)


def _steps(
    first: DenseFrames, rest: Iterator[DenseFrames], images_a_step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    batch = [first]
    for image in rest:
        if len(batch) == images_a_step:
            yield _tensors(batch)
            batch = []
        batch.append(image)
    if len(batch) == images_a_step:
        yield _tensors(batch)


def _tensors(batch: list[DenseFrames]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.concatenate([image.pixels_NSS for image in batch])
    shares = np.concatenate([image.shares_NPPC for image in batch])
    return torch.from_numpy(pixels), torch.from_numpy(shares)
