"""The public names of `clincot`: complete, imported on first use, and cheap until then."""

from __future__ import annotations

import subprocess
import sys

import pytest

import clincot
from clincot import records
from clincot.fields import FrozenModel

HEAVY = ("torch", "transformers", "yaml", "pydantic", "numpy", "PIL", "scipy", "sklearn", "botocore", "tenacity")


def list_loaded_modules(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    check = f"import sys; {statement}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert list_loaded_modules("import clincot; clincot.__version__; dir(clincot)") == []


def test_using_the_public_names_does_not_load_torch() -> None:
    loaded = list_loaded_modules("from clincot import Params, Plan, Study, run_rounds")
    assert "pydantic" in loaded
    assert not {"torch", "transformers"} & {*loaded}


@pytest.mark.parametrize("name", clincot.__all__)
def test_a_public_name_can_be_imported(name: str) -> None:
    assert name in dir(clincot)
    assert getattr(clincot, name) is not None


def test_every_record_is_public() -> None:
    classes = {name: value for name, value in vars(records).items() if isinstance(value, type)}
    subclasses = {name for name, value in classes.items() if issubclass(value, records.Record)}
    assert subclasses <= {*clincot.__all__}
    for name in subclasses:
        assert getattr(clincot, name) is classes[name]
        assert issubclass(classes[name], FrozenModel)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'clincot' has no attribute 'Trainer'"):
        clincot.Trainer  # noqa: B018
