"""GPUs by their data sheets: peak, bandwidth, memory and price (gpus.yaml, or a file of the same form)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from clincot.config.sections import FrozenConfig
from clincot.config.settings_file import parse_config, read_settings
from clincot.errors import InvalidInput
from clincot.fields import NonEmptyStr

GPU_FILE = Path(__file__).with_name("gpus.yaml")
DEFAULT_GPU = "A100 80 GB"

_Positive = Annotated[float, Field(gt=0)]


class Gpu(FrozenConfig):
    """One kind of accelerator."""

    name: NonEmptyStr
    bf16_tflops: _Positive  # 10^12 operations a second in dense bfloat16 products
    bandwidth_gbs: _Positive  # 10^9 bytes a second of its memory
    memory_gb: _Positive  # 10^9 bytes
    source: str = ""
    price: tuple[_Positive, _Positive] | None = None  # lowest and highest USD an hour; None: not known
    price_source: str = ""

    @model_validator(mode="after")
    def _check_price(self) -> Self:
        if self.price is not None and self.price[0] > self.price[1]:
            raise ValueError(f"price: expected [lowest, highest], got {list(self.price)}")
        return self

    @property
    def operations(self) -> float:
        """Operations a second."""
        return self.bf16_tflops * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gbs * 1e9

    @property
    def memory_gib(self) -> float:
        return self.memory_gb * 1e9 / (1 << 30)


def read_gpus(path: Path = GPU_FILE) -> dict[str, Gpu]:
    """The GPUs of a table by name, in its order. Raises InvalidInput or InvalidRecord naming file and GPU."""
    content = read_settings(path, "GPUs by name, each with bf16_tflops, bandwidth_gbs and memory_gb")
    if not content:
        raise InvalidInput(f"{path}: no GPU in it; expected NAME: {{bf16_tflops, bandwidth_gbs, memory_gb}}")
    gpus = {}
    for name, fields in content.items():
        if not isinstance(fields, dict):
            raise InvalidInput(f"{path}: {name}: expected {{bf16_tflops, bandwidth_gbs, memory_gb}}, got {fields!r}")
        gpus[name] = parse_config(Gpu, {"name": name, **fields}, where=f"{path}: {name}")
    return gpus


def find_gpu(name: str, gpus: dict[str, Gpu]) -> Gpu:
    """The GPU of a name, or the only one whose name begins with it, whatever its case. Raises InvalidInput."""
    wanted = name.casefold()
    found = [gpu for known, gpu in gpus.items() if known.casefold() == wanted]
    found = found or [gpu for known, gpu in gpus.items() if known.casefold().startswith(wanted)]
    if len(found) != 1:
        raise InvalidInput(f"no GPU is called {name!r}; the table has {', '.join(gpus)}. Add yours in a file (--gpus)")
    return found[0]
