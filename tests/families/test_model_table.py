"""The table of models in the documentation says what the tests run."""

from __future__ import annotations

from tests.families.model_table import PAGE, list_checks, render_page
from tests.support.families import FAMILIES


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), "python -m tests.families.model_table --write"


def test_every_family_and_every_file_of_tests_is_on_the_page() -> None:
    text = render_page()
    assert all(f"| {family.name} | {family.medical_models} |" in text for family in FAMILIES)
    modules = {path.name for path in PAGE.parents[2].joinpath("tests", "families").glob("test_*.py")}
    assert {check.module for check in list_checks()} == modules - {"test_model_table.py", "test_recipe_rounds.py"}
