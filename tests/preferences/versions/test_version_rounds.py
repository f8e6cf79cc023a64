"""A whole round with a data repository: the checkpoint's record and its publication name the version it learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.config import PublishConfig, TrainConfig
from clincot.jsonl import InvalidRecord, hash_files, read_records, write_records
from clincot.records import Checkpoint, DataVersion
from clincot.registry.publication import PublicationEvidence, register_checkpoint
from clincot.reporting.lineage import find_record, render_lineage
from clincot.rounds import Plan, run_rounds
from clincot.stages.runner import run_stage
from clincot.storage.folder_store import FolderStore
from tests.preferences.versions.conftest import git, references
from tests.support import tiny

pytestmark = pytest.mark.slow

TRAINED_ON = ("questions", "regions", "candidates", "pairs")


def test_a_checkpoint_names_the_revision_of_its_preference_data(repository: Path, tmp_path: Path) -> None:
    policy, *judges = (tiny.write_model(tmp_path / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    params = tiny.params(judges, evaluate={"arms": ["written"]}, decide={"arm": "written", "resamples": 20})
    plan = Plan(
        run=tmp_path / "run",
        data=tiny.write_set(tmp_path / "data", key=False),
        policy=policy,
        count=1,
        params=params.model_copy(update={"version": params.version.model_copy(update={"repository": str(repository)})}),
        benchmark=tiny.write_set(tmp_path / "benchmark", seed=1, studies=2),
    )
    run_rounds(plan)
    folder = plan.run / "round-01"
    (kept,) = read_records(folder / "version.json", DataVersion)
    (record,) = read_records(folder / "policy" / "record.json", Checkpoint)
    assert (record.data, record.data_revision) == (kept.sha256, kept.revision)
    assert kept.revision == git(repository, "rev-parse", "preferences/clincot/round-0001^{commit}")
    assert (kept.line, kept.round, kept.run) == ("clincot", 1, "run")
    assert record.pairs == hash_files(folder / "pairs.jsonl") == {f.name: f.sha256 for f in kept.files}["pairs.jsonl"]
    assert f"revision {kept.revision}" in render_lineage(plan.run, find_record(plan.run, record.id))
    assert f"preferences/clincot/round-0001 of {repository}" in render_lineage(plan.run, find_record(plan.run, kept.id))
    config = PublishConfig(name="tiny", round=1)
    manifest = register_checkpoint(FolderStore(tmp_path / "store"), folder / "policy", config, PublicationEvidence())
    assert (manifest.data, manifest.data_revision) == (kept.sha256, kept.revision)

    before = references(repository), (folder / "policy" / "record.json").stat().st_mtime_ns
    run_rounds(plan)  # again: nothing to do
    assert before == (references(repository), (folder / "policy" / "record.json").stat().st_mtime_ns)
    the_version_is_no_reason_to_train_again(plan, folder, kept, params.train)


def the_version_is_no_reason_to_train_again(plan: Plan, folder: Path, kept: DataVersion, config: TrainConfig) -> None:
    """Where the data is kept does not decide what is learnt from it; a version of other pairs is a mistake."""
    inputs = {"data": plan.data, "policy": plan.policy, "version": folder / "version.json"}
    inputs |= {name: folder / f"{name}.jsonl" for name in TRAINED_ON}
    at = (folder / "policy" / "record.json").stat().st_mtime_ns
    write_records(inputs["version"], [kept.model_copy(update={"revision": "f" * 40})])
    run_stage("train", config, inputs, {"checkpoint": folder / "policy"})
    assert at == (folder / "policy" / "record.json").stat().st_mtime_ns
    files = tuple(f for f in kept.files if f.name != "pairs.jsonl")
    write_records(inputs["version"], [DataVersion.model_validate(kept.model_dump(exclude={"id"}) | {"files": files})])
    with pytest.raises(InvalidRecord, match=r"version\.json: is a version of other pairs than .*pairs\.jsonl"):
        run_stage("train", config, inputs, {"checkpoint": folder / "other"})
