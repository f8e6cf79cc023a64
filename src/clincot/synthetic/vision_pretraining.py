"""Dense pre-training of a small checkpoint's vision side: which patch of a frame shows which finding.

Learning from answers alone leaves fine details (a nodule's margin) at chance for a tower trained from scratch, so
the tower and the connector first learn where findings are, patch by patch, on anatomies that no evaluation uses. The
linear head that reads the connector's tokens is thrown away afterwards. Needed for the small models only; a pretrained
tower is left as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.fft import dct
from torch import nn
from tqdm import tqdm

from clincot.models.vlm import load_checkpoint

# Shape suffixes: N frames, S pixels a side, P patches a side, C findings, H hidden size.


WHITENING_IMAGES = 64  # images
WHICH_LOSS_WEIGHT = 0.3


@dataclass(frozen=True)
class DenseFrames:
    """Frames of one image with the share of every patch that shows each finding."""

    pixels_NSS: npt.NDArray[np.uint8]
    shares_NPPC: npt.NDArray[np.float32]  # in [0, 1]


def pretrain_vision(
    checkpoint: Path,
    images: Iterable[DenseFrames],
    *,
    images_total: int,
    lr: float = 1e-3,
    images_a_step: int = 16,
    seed: int = 0,
    report_every: int = 100,
) -> list[float]:
    """Train the tower; returns the loss, averaged every so many steps. The folder's weights are replaced at the end.

    Raises ValueError where `images` are fewer than `images_total`, or than a single step needs.

    Loss: binary cross-entropy of every patch and finding, against the share of the patch that shows it; where any
    finding is shown it counts 8-fold, since nine in ten patches show none.
    """
    torch.manual_seed(seed)
    model, processor = load_checkpoint(str(checkpoint))
    tower, connector = model.model.vision_model, model.model.connector
    stream = iter(images)
    seen = list(islice(stream, WHITENING_IMAGES))
    if not seen:
        raise ValueError("expected images to learn from, got none")
    mean, std = (processor.image_processor.image_mean[0], processor.image_processor.image_std[0])
    whiten_patches(tower, (np.concatenate([image.pixels_NSS for image in seen]) / 255.0 - mean) / std)
    block = model.config.scale_factor  # a token stands for block x block patches
    head = nn.Linear(model.config.text_config.hidden_size, block * block * seen[0].shares_NPPC.shape[-1])
    nn.init.constant_(head.bias, -4.0)  # few patches show anything
    parameters = [*tower.parameters(), *connector.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    steps = images_total // images_a_step
    if steps < 1:
        raise ValueError(f"{images_total} images are not enough for one step of {images_a_step}")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    losses: list[float] = []
    done = 0
    recent: list[float] = []
    bar = tqdm(
        islice(_iter_steps(chain(seen, stream), images_a_step), steps),
        total=steps,
        desc="pre-training the vision tower",
        mininterval=5,
    )
    for pixels_NSS, shares_NPPC in bar:
        scaled_NSS = (pixels_NSS.float() / 255.0 - mean) / std
        hidden_NTH = connector(tower(pixel_values=scaled_NSS[:, None].expand(-1, 3, -1, -1)).last_hidden_state)
        wanted_NTC = group_shares_by_token(shares_NPPC, block)
        weight_NT1 = 1.0 + 7.0 * (wanted_NTC.amax(-1, keepdim=True) > 0.05)
        logits_NTC = head(hidden_NTH)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits_NTC, wanted_NTC, weight=weight_NT1.expand_as(wanted_NTC)
        )
        loss = loss + WHICH_LOSS_WEIGHT * _compute_which_loss(logits_NTC, wanted_NTC, shares_NPPC.shape[-1])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        done += 1
        recent.append(loss.item())
        if len(recent) == report_every:
            losses.append(round(sum(recent) / len(recent), 5))
            recent.clear()
            bar.set_postfix(loss=losses[-1])
    if done < steps:
        raise ValueError(f"expected images for {steps} steps of {images_a_step}, they ended after {done}")
    _replace_weights(model, checkpoint)
    return losses


def _replace_weights(model: Any, checkpoint: Path) -> None:
    """Write the weights aside and rename them: a run that is killed meanwhile leaves the old ones whole."""
    aside = checkpoint.with_name(f"{checkpoint.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(aside, safe_serialization=True)
        (weights,) = aside.glob("*.safetensors")  # small checkpoints have one file; their config stays as it is
        weights.replace(checkpoint / weights.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def group_shares_by_token(shares_NPPC: torch.Tensor, block: int) -> torch.Tensor:
    """(N, P, P, C) shares of patches to (N, T, block * block * C) shares of the tokens that pixel shuffle makes."""
    frames, side, _, findings = shares_NPPC.shape
    tokens = side // block
    blocks = shares_NPPC.reshape(frames, tokens, block, tokens, block, findings).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(frames, tokens * tokens, block * block * findings)


def whiten_patches(tower: Any, frames_NSS: npt.NDArray[np.float64]) -> None:
    """Start the patch embedding as a whitened cosine basis: each frequency of a patch at unit variance, both signs.

    In raw pixels the finest frequencies have three hundredths of the contrast of the coarsest ones, and a tower trained
    from scratch does not come to see a nodule's margin at all (probe at chance after 100,000 frames); from this start
    it tells margins apart in nine of ten patches after 14,000 frames.
    """
    embedding = tower.embeddings.patch_embedding
    side = embedding.kernel_size[0]
    patches = frames_NSS.reshape(len(frames_NSS), frames_NSS.shape[1] // side, side, -1, side).transpose(0, 1, 3, 2, 4)
    cosine = dct(np.eye(side), norm="ortho", axis=0)
    basis = np.einsum("ai,bj->abij", cosine, cosine).reshape(side * side, side * side)
    spread = (patches.reshape(-1, side * side) @ basis.T).std(0)
    if spread.min() < 1e-6:
        raise ValueError("the first images have patches without some frequency; expected images of some texture")
    coarse_first = np.argsort([row + column for row in range(side) for column in range(side)], kind="stable")
    filters = (basis / spread[:, None])[coarse_first]
    filters = np.concatenate([filters, -filters[1:]])[: embedding.out_channels]
    with torch.no_grad():
        embedding.weight[: len(filters)] = (
            torch.from_numpy(filters).reshape(-1, 1, side, side) / 3
        )  # three equal channels
        embedding.bias.zero_()


def _compute_which_loss(logits_NTC: torch.Tensor, wanted_NTC: torch.Tensor, findings: int) -> torch.Tensor:
    """Cross-entropy of *which* finding a patch shows, over patches that show one."""
    logits, wanted = logits_NTC.reshape(-1, findings), wanted_NTC.reshape(-1, findings)
    shown = wanted.amax(-1) > 0.15
    if not bool(shown.any()):
        return logits.sum() * 0.0
    return nn.functional.cross_entropy(logits[shown], wanted[shown].argmax(-1))


def _iter_steps(images: Iterable[DenseFrames], images_a_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    batch: list[DenseFrames] = []
    for image in images:
        batch.append(image)
        if len(batch) == images_a_step:
            yield _stack_batch(batch)
            batch = []


def _stack_batch(batch: list[DenseFrames]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.concatenate([image.pixels_NSS for image in batch])
    shares = np.concatenate([image.shares_NPPC for image in batch])
    return torch.from_numpy(pixels), torch.from_numpy(shares)
