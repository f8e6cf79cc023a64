"""Settings of a run: checked by its first task, stored under their digests, read and verified by the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clincot.config import Params
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_form import FIELD_KEYS, SECTIONS, RunForm, parse_run
from clincot.pipelines.run_settings import (
    TASK_INPUTS,
    TASK_SECTIONS,
    read_task_settings,
    write_settings,
    write_task_settings,
)
from clincot.pipelines.tasks import check_run_parameters
from clincot.storage.artifacts import ChecksumMismatch
from clincot.storage.store import KeyNotFound

FORM = RunForm(
    data="s3://sets/data/1",
    benchmark="s3://sets/benchmark/2",
    store="s3://models/line",
    model="m",
    base="",
    questions=9,
)


def form_sections(params: Params | None = None) -> dict[str, Any]:
    """The sections of the form, as Kubeflow passes them: whole numbers may be floats."""
    arguments = RoundPlan(params=params or Params()).arguments
    sections = {name: dict(value) for name, value in arguments.items() if isinstance(value, dict)}
    sections["prepare"]["seed"] = float(sections["prepare"]["seed"])
    return sections


def addresses(store: Path, **changes: dict[str, Any]) -> dict[str, str]:
    """Addresses of the settings of all tasks. changes: {section: keys that differ from the defaults}."""
    params = Params.model_validate(changes)
    sections = {name: getattr(params, name).model_dump(mode="json") for name in SECTIONS}
    sections |= {"service": {}, "launch": {}}
    inputs: dict[str, str] = {}
    for names in TASK_INPUTS.values():
        inputs |= dict.fromkeys(names, "x")
    return write_task_settings(str(store), sections, inputs)


def test_the_form_and_the_sections_are_the_parameters_of_a_round() -> None:
    params, service, launch = parse_run(FORM, form_sections())
    assert (params.publish.store, params.publish.name, params.prepare.limit) == ("s3://models/line", "m", 9)
    assert params.prepare.seed == 0
    assert service == RoundPlan().service
    assert launch == RoundPlan().launch


@pytest.mark.parametrize("section", [*SECTIONS, "service", "launch"])
def test_a_misspelt_key_of_any_section_is_refused_by_name(section: str) -> None:
    """By the first task. A key of `decide` was told after training, by decide itself."""
    sections = form_sections()
    sections[section]["min_gian"] = 1
    with pytest.raises(InvalidRecord, match=rf"(?s){section}.*min_gian"):
        parse_run(FORM, sections)


@pytest.mark.parametrize("field", ["data", "benchmark", "store"])
def test_an_empty_required_field_is_told_with_what_to_type(field: str) -> None:
    (check,) = check_run_parameters(RunForm(**{**vars(FORM), field: ""}), form_sections())
    assert (check.name, check.result) == (f"settings: {field}", "it is empty")
    assert check.remedy.startswith(f"fill in the field {field} of the run: ")


@pytest.mark.parametrize("field", sorted(FIELD_KEYS))
def test_a_field_of_the_form_is_not_set_in_its_section_too(field: str) -> None:
    section, key = FIELD_KEYS[field]
    sections = form_sections()
    sections[section][key] = "two places"
    with pytest.raises(InvalidInput, match=rf"section `{section}` contains `{key}`, which is the parameter `{field}`"):
        parse_run(FORM, sections)


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    address = write_settings(str(tmp_path), {"judge": {"quorum": 2}}, {"data": "d"})
    given = read_task_settings(address)
    assert (given.sections, given.inputs, given.store) == ({"judge": {"quorum": 2}}, {"data": "d"}, str(tmp_path))
    assert write_settings(str(tmp_path), {"judge": {"quorum": 2}}, {"data": "d"}) == address
    with pytest.raises(InvalidRecord, match="have no section 'pair', only judge"):
        given.get_section("pair")


def test_changed_settings_are_noticed(tmp_path: Path) -> None:
    address = write_settings(str(tmp_path), {"judge": {"quorum": 2}}, {})
    Path(address).write_text(Path(address).read_text().replace("2", "1"))
    with pytest.raises(ChecksumMismatch, match="somebody has changed the settings"):
        read_task_settings(address)
    Path(address).unlink()
    with pytest.raises(KeyNotFound):
        read_task_settings(address)
    with pytest.raises(InvalidInput, match="expected the address of settings"):
        read_task_settings("s3://bucket/decide.json")


def test_without_a_store_nothing_can_be_handed_on() -> None:
    with pytest.raises(InvalidInput, match="set the parameter `store`"):
        write_task_settings("", {}, {})


def test_an_address_changes_exactly_if_the_task_uses_what_has_changed(tmp_path: Path) -> None:
    """It is the key by which Kubeflow's cache recognizes the same work."""
    before = addresses(tmp_path)
    for section, change, tasks in [
        ("train", {"lr": 0.123}, {"train", "page"}),
        ("pair", {"seed": 4}, {"pair", "page"}),
        ("answer", {"seed": 4}, {"generate", "version", "train", "page"}),
        ("propose", {"seed": 4}, {"generate", "evaluate", "page"}),
        ("decide", {"seed": 4}, {"decide", "page"}),
        ("deploy", {"step_s": 4.0}, {"deploy"}),
        ("publish", {"golden": 3}, {"round", "version", "decide", "publish", "deploy", "page"}),
    ]:
        after = addresses(tmp_path, **{section: change})
        assert {name for name in before if before[name] != after[name]} == tasks, section
    assert {*before} == {*TASK_SECTIONS}
