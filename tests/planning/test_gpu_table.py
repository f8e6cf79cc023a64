"""The table of GPUs: what the shipped one holds, and what a user's own may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.errors import InvalidInput
from clincot.planning.gpu_table import DEFAULT_GPU, find_gpu, read_gpus


def test_every_shipped_figure_has_a_source() -> None:
    gpus = read_gpus()
    assert DEFAULT_GPU in gpus
    for gpu in gpus.values():
        assert gpu.source, gpu.name
        assert (gpu.price is None) == (not gpu.price_source), f"{gpu.name}: a price needs its source and date"


def test_a_gpu_is_found_by_the_beginning_of_its_name() -> None:
    gpus = read_gpus()
    assert find_gpu("h100", gpus).name == "H100 80 GB"
    with pytest.raises(InvalidInput, match=r"no GPU is called 'H'; the table has A100 80 GB, H100 80 GB"):
        find_gpu("H", gpus)  # H100 and H200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no GPU in it"),
        ("Mine: 3", r"Mine: expected \{bf16_tflops, bandwidth_gbs, memory_gb\}, got 3"),
        ("Mine: {bf16_tflops: 10, bandwidth_gbs: 100}", "memory_gb"),
        ("Mine: {bf16_tflops: -1, bandwidth_gbs: 100, memory_gb: 8}", "bf16_tflops"),
        ("Mine: {bf16_tflops: 1, bandwidth_gbs: 1, memory_gb: 8, price: [3, 2]}", r"expected \[lowest, highest\]"),
    ],
)
def test_a_bad_table_is_refused_with_file_and_gpu(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=message) as found:
        read_gpus(path)
    assert str(path) in str(found.value)
