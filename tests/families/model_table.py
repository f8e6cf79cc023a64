"""The page docs/reference/models.md, from the list of families and the tests that run on each of them.

python -m tests.families.model_table --write
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clincot.models.shared_prefixes import UNSHARED_FAMILIES
from tests.support.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "models.md"
FIXTURES = {"family", "checkpoint", "model"}  # a test with one of them runs once for each family

HEAD = """\
# Models

This page is generated; change the code and run `python -m tests.families.model_table --write`.

A checkpoint is a folder of safetensors of one of these families of Hugging Face transformers, as policy and as judge in
the process. It is fed exactly what its own processor makes. A judge behind a URL may be of any family.
"""

SOURCE = """\
What was run: every test below, on a tiny checkpoint with random weights for each family. It is made of the family's own
configuration, model, tokenizer and processor classes, with special tokens, chat template and end tokens in the shape of
the published checkpoint in the column "copied in shape". The published weights themselves are not part of the tests.

Families with a video processor need torchvision, also to look at single images: install the version that belongs to
your torch. SmolVLM needs `num2words` as well. `make test` skips these families where torchvision is missing;
`make test-families` runs all of them in an environment of its own.
"""

PRECISION = """\
## Number type

Models are loaded for inference in bfloat16 on a GPU that computes in it (Ampere and later), and in float32 elsewhere.

| setting | holds for |
| --- | --- |
| `models.dtype` in params.yaml | every stage, and `clincot calibrate`: `auto`, `float32`, `bfloat16` or `float16` |
| `propose.dtype`, `answer.dtype`, `judge.dtype`, `evaluate.dtype` | one stage; `inherit` takes `models.dtype` |
| `clincot serve --set dtype=float32` | a server that runs the model in its process |
| `CLINCOT_DTYPE=float32` (environment variable) | everything in the process, over all other settings |

Training has its own setting, `train.dtype`.
"""


SHARING = """\
## What is computed once

In all of these families a picture or crop goes through the vision encoder once, and its features are kept for every
conversation that shows it (256 MB on a processor, 5 % of a GPU's memory). The common beginnings of the prompts of a
stage (system text, pictures, question, region) are computed once too, and every region, candidate and finding continues
from them; see [Speed](../speed.md). Exceptions, whose conversations are computed as a whole:

{exceptions}

The same holds for a language model with sliding windows other than Gemma 3 and Mistral, and for attention that takes no
mask, such as `flash_attention_2`.
"""


class Check(NamedTuple):
    """A test that runs once for each family."""

    module: str
    title: str


def list_checks() -> Iterator[Check]:
    """The tests of tests/families that use a family's fixture, in the order of their files."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if is_test and FIXTURES & {argument.arg for argument in node.args.args}:
                yield Check(path.name, node.name.removeprefix("test_").replace("_", " "))


def render_page() -> str:
    """The page as it should be."""
    rows = "\n".join(_render_row(family) for family in FAMILIES)
    header = "| family | medical models | copied in shape | end tokens | needs |\n| --- | --- | --- | --- | --- |"
    exceptions = "\n".join(f"- {name}: {reason}." for name, reason in UNSHARED_FAMILIES.items())
    sharing = SHARING.format(exceptions=exceptions)
    return "\n".join([HEAD, f"{header}\n{rows}\n", SOURCE, _render_checks(), sharing, PRECISION])


def _render_row(family: Family) -> str:
    ends = ", ".join(f"`{_escape(token)}`" for token in family.end_tokens)
    needs = "torchvision" if family.needs_torchvision else ""
    return f"| {family.name} | {family.medical_models} | `{family.source}` | {ends} | {needs} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _render_checks() -> str:
    lines = ["## What was run on each family", ""]
    checks = list(list_checks())
    for module in dict.fromkeys(check.module for check in checks):
        lines += [f"`tests/families/{module}`:", ""]
        lines += [f"- {check.title}" for check in checks if check.module == module]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(render_page(), encoding="utf-8")
    else:
        print(render_page(), end="")
