"""Answers of a real cluster in this folder; README.md describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_recording(name: str) -> Any:
    """Return the content of one file, without its suffix .json."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
