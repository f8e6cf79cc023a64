"""Dense pre-training: patches belong to the tokens that the real connector makes of them."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clincot.models.vlm import load_checkpoint
from clincot.synthetic.tiny_model import TinyModelSpec, build_tiny_model
from clincot.synthetic.vision_pretraining import DenseFrames, group_shares_by_token, pretrain_vision, whiten_patches
from tests.support.training_builders import CORPUS

pytestmark = pytest.mark.slow

# 8 x 8 patches of 8 px, tokens of 2 x 2 patches: as the shipped models, only narrower.
SPEC = TinyModelSpec(vision_hidden=32, vision_layers=1, text_hidden=32, text_layers=1, vocabulary=700)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    build_tiny_model(folder, SPEC, CORPUS)
    return folder


def images(count: int, seed: int = 0) -> Iterator[DenseFrames]:
    """Two frames an image: noise, with a bright patch of finding 0 or a striped one of finding 1 somewhere."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pixels = rng.integers(90, 110, (2, 64, 64)).astype(np.uint8)
        shares = np.zeros((2, 8, 8, 2), np.float32)
        for frame in range(2):
            row, column, finding = rng.integers(0, 8), rng.integers(0, 8), rng.integers(0, 2)
            patch = pixels[frame, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            patch[:: 1 + finding] = 250
            shares[frame, row, column, finding] = 1.0
        yield DenseFrames(pixels, shares)


@pytest.mark.parametrize("findings", [1, 3])
def test_shares_are_grouped_as_the_pixel_shuffle_does(checkpoint: Path, findings: int) -> None:
    """The connector sees (N, P * P, H) in reading order; shares put in H's place come out token by token."""
    model, _ = load_checkpoint(str(checkpoint))
    block = model.config.scale_factor
    assert block == 2
    shares = torch.randn(3, 8, 8, findings)
    shuffled = model.model.connector.pixel_shuffle(shares.reshape(3, 64, findings), block)
    assert torch.equal(group_shares_by_token(shares, block), shuffled)


def test_the_second_tokens_block_by_hand() -> None:
    """4 x 4 patches numbered 0 … 15 in reading order, tokens of 2 x 2: the second one has 2, 3, 6 and 7."""
    shares = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert group_shares_by_token(shares, 2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_the_first_layer_starts_as_a_whitened_basis(checkpoint: Path) -> None:
    """Every filter's response has unit deviation over the patches it was whitened on; the first is the plain mean."""
    model, _ = load_checkpoint(str(checkpoint))
    tower = model.model.vision_model
    smooth = np.cumsum(np.cumsum(np.random.default_rng(0).normal(size=(40, 64, 64)), 1), 2)  # coarse outweighs fine
    frames = (smooth - smooth.mean()) / smooth.std()
    whiten_patches(tower, frames)
    pixels = torch.from_numpy(frames).float()[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        response = tower.embeddings.patch_embedding(pixels)
    spread = response.transpose(0, 1).reshape(32, -1).std(1)
    assert spread.numpy() == pytest.approx(np.ones(32), rel=0.01)
    patch_means = torch.nn.functional.avg_pool2d(pixels[:, :1], 8)[:, 0]
    correlation = np.corrcoef(response[:, 0].flatten().numpy(), patch_means.flatten().numpy())[0, 1]
    assert abs(correlation) == pytest.approx(1.0, abs=1e-4)


def test_frames_without_texture_cannot_whiten(checkpoint: Path) -> None:
    """It divided by zero, and every weight was infinite."""
    model, _ = load_checkpoint(str(checkpoint))
    with pytest.raises(ValueError, match="images of some texture"):
        whiten_patches(model.model.vision_model, np.zeros((4, 64, 64)))


def test_pre_training_learns_changes_vision_only_and_repeats(checkpoint: Path, tmp_path: Path) -> None:
    """It changes only the vision side, and a second run gives the same result."""
    folders = [Path(shutil.copytree(checkpoint, tmp_path / name)) for name in ("one", "two")]
    losses = [
        pretrain_vision(f, images(240), images_total=240, images_per_step=4, lr=3e-3, report_every=10) for f in folders
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert losses[0][-1] < 0.7 * losses[0][0]
    one, two, before = (load_file(f / "model.safetensors") for f in (*folders, checkpoint))
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name.split(".")[1] for name in one if not torch.equal(one[name], before[name])}
    assert changed == {"vision_model", "connector"}


@pytest.mark.parametrize(
    ("given", "says"), [(7, "for 2 steps of 4 images, but they ended after 1"), (0, "expected images")]
)
def test_too_few_images_are_an_error_and_leave_the_weights(
    given: int, says: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "one"))
    with pytest.raises(ValueError, match=says):
        pretrain_vision(folder, images(given), images_total=8, images_per_step=4)
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kept_bytes", [1_000, 100_000])
def test_a_disk_that_is_full_half_way_leaves_the_old_weights(kept_bytes: int, checkpoint: Path, tmp_path: Path) -> None:
    """They were written over in place: a real limit on the size of files (RLIMIT_FSIZE) left the beginning of them."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before["model.safetensors"]) > kept_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept_bytes, hard))
    try:
        with pytest.raises((OSError, SafetensorError)):
            pretrain_vision(folder, images(8), images_total=8, images_per_step=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fewer_images_than_a_step_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="3 images are not enough for one step of 4"):
        pretrain_vision(checkpoint, images(3), images_total=3, images_per_step=4)
