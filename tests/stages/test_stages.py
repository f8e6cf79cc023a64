"""The stages on real files, with untrained checkpoints, in a folder without an answer key as long as there can be."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clincot.config import SECTION_NAMES, JudgeSpec, Params, PrepareConfig
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord, read_records, write_records
from clincot.records import (
    Candidate,
    Checkpoint,
    Decision,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Record,
    Region,
)
from clincot.runs.layout import read_judge_names
from clincot.stages.base import Metrics
from clincot.stages.catalog import STAGES, get_stage
from clincot.stages.runner import run_stage
from clincot.storage.digests import hash_path
from tests.support import tiny
from tests.support.http_server import free_port

pytestmark = pytest.mark.slow

MADE = ("questions", "regions", "candidates", "judgements", "scores", "pairs")


@dataclass(frozen=True)
class Workshop:
    """Everything a round needs, and where a round puts its files."""

    data: Path  # without references.jsonl
    benchmark: Path
    policy: Path
    params: Params

    def paths(self, out: Path, names: tuple[str, ...]) -> dict[str, Path]:
        given = {"data": self.data, "benchmark": self.benchmark, "policy": self.policy}
        return {name: given.get(name, out / _file(name)) for name in names}

    def run(self, name: str, out: Path, params: Params | None = None, **other: Path) -> Metrics:
        stage = get_stage(name)
        inputs = {**self.paths(out, stage.inputs), **{k: v for k, v in other.items() if k not in stage.outputs}}
        outputs = {**self.paths(out, stage.outputs), **{k: v for k, v in other.items() if k in stage.outputs}}
        return run_stage(name, getattr(params or self.params, name), inputs, outputs)


def _file(name: str) -> str:
    if name == "checkpoint":
        return "policy"
    return f"{name}.json" if name in {"panel_report", "pair_report", "report", "decision"} else f"{name}.jsonl"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("shop")
    policy, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    return Workshop(
        data=tiny.write_set(folder / "data", key=False),
        benchmark=tiny.write_set(folder / "benchmark", seed=1, studies=3),
        policy=policy,
        params=tiny.params(judges),
    )


@pytest.fixture(scope="module")
def done(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round's files up to the pairs, made stage by stage. Not to be changed."""
    out = tmp_path_factory.mktemp("done")
    for name in ("prepare", "propose", "answer", "judge", "pair"):
        shop.run(name, out)
    return out


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """The same files with their stamps and times, to be changed."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


KINDS: dict[str, type[Record]] = {
    "questions": Question,
    "regions": Region,
    "candidates": Candidate,
    "judgements": Judgement,
    "scores": PanelScore,
    "pairs": PreferencePair,
}


def test_preference_data_is_made_where_there_is_no_answer_key(shop: Workshop, done: Path) -> None:
    """6 studies with 2 questions each; at most 2 windows, a random square and the whole image a question."""
    assert not (shop.data / "references.jsonl").exists()
    made = {name: list(read_records(done / f"{name}.jsonl", kind)) for name, kind in KINDS.items()}
    assert len(made["questions"]) == 12
    assert len(made["candidates"]) == len(made["regions"]) == len(made["scores"])
    assert 12 * 2 < len(made["regions"]) <= 12 * 4
    assert len(made["judgements"]) == 2 * len(made["candidates"])
    assert 0 < len(made["pairs"]) <= 2 * 12


def test_a_whole_round_to_its_decision(shop: Workshop, copy: Path) -> None:
    """Up to the checkpoint without a key; from there on the benchmark's. The champion is what the round began with."""
    base = copy / "base"
    base.mkdir()
    shop.run("evaluate", base, outcomes=base / "outcomes.jsonl", report=base / "report.json")
    metrics = shop.run("train", copy)
    assert metrics
    trained = copy / "policy"
    (record,) = read_records(trained / "record.json", Checkpoint)
    assert record.parent != record.sha256
    assert record.config == shop.params.train.digest
    shop.run("evaluate", copy, policy=trained)
    outcomes = list(read_records(copy / "outcomes.jsonl", Outcome))
    assert len(outcomes) == 3 * 6  # arms x questions
    assert {o.policy for o in outcomes} == {record.sha256}
    inputs = {"champion": base / "outcomes.jsonl", "challenger": copy / "outcomes.jsonl"}
    assert shop.run("decide", copy, **inputs) == {"promote": 0.0, "keep": 0.0, "blocked": 1.0}
    (decision,) = read_records(copy / "decision.json", Decision)
    assert (decision.champion, decision.challenger) == (record.parent, record.sha256)
    assert decision.verdict == "blocked"  # 3 patients are too few to decide on
    assert (copy / "summary.jsonl").read_text().startswith("# blocked\n")


def test_the_same_work_is_the_same_bytes_in_another_folder(shop: Workshop, done: Path, tmp_path: Path) -> None:
    for name in ("prepare", "propose", "answer", "judge", "pair"):
        shop.run(name, tmp_path)
    for name in MADE:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (done / f"{name}.jsonl").read_bytes(), name
    for name in ("panel_report", "pair_report"):
        assert (tmp_path / f"{name}.json").read_bytes() == (done / f"{name}.json").read_bytes(), name


def test_what_is_done_is_not_done_again(shop: Workshop, copy: Path) -> None:
    before = times(copy)
    first = json.loads((copy / "pairs.jsonl.stage.json").read_text())["metrics"]
    for name in ("prepare", "propose", "answer", "judge"):
        shop.run(name, copy)
    assert shop.run("pair", copy) == first
    assert times(copy) == before


def test_a_changed_learning_rate_trains_again_and_nothing_else(shop: Workshop, copy: Path) -> None:
    shop.run("train", copy)
    before = times(copy)
    other = shop.params.model_copy(update={"train": shop.params.train.model_copy(update={"lr": 3e-3})})
    for name in ("prepare", "propose", "answer", "judge", "pair", "train"):
        shop.run(name, copy, other)
    changed = {name for name, time in times(copy).items() if before.get(name) != time}
    assert "policy/model.safetensors" in changed
    assert {name.split("/")[0] for name in changed} == {"policy", "policy.stage.json"}


@pytest.mark.parametrize("harm", ["changed", "deleted", "stamp deleted", "stamp cut off"])
def test_what_was_harmed_is_made_again_to_the_same_bytes(harm: str, shop: Workshop, copy: Path) -> None:
    scores, stamp = copy / "pairs.jsonl", copy / "pairs.jsonl.stage.json"
    good = scores.read_bytes()
    if harm == "changed":
        scores.write_bytes(good[: len(good) // 2])
    elif harm == "deleted":
        scores.unlink()
    elif harm == "stamp deleted":
        stamp.unlink()
    else:
        stamp.write_text(stamp.read_text()[:20])
    before = times(copy)
    shop.run("pair", copy)
    assert scores.read_bytes() == good
    assert times(copy) != before


def test_a_judge_that_was_trained_anew_judges_again(shop: Workshop, copy: Path, tmp_path: Path) -> None:
    """The bug: the stamp knew a judge by its path alone, so its scores stayed those of the judge before it."""
    spec = shop.params.judge.judges[0]
    judge = Path(shutil.copytree(spec.path, tmp_path / spec.name))
    others = (spec.model_copy(update={"path": str(judge)}), *shop.params.judge.judges[1:])
    params = shop.params.model_copy(update={"judge": shop.params.judge.model_copy(update={"judges": others})})
    shop.run("judge", copy, params)
    before = (copy / "judgements.jsonl").read_bytes()
    shutil.rmtree(judge)
    tiny.write_model(judge, seed=9)
    from clincot.models.load import unload_models

    unload_models()  # as in another process
    shop.run("judge", copy, params)
    assert (copy / "judgements.jsonl").read_bytes() != before


@pytest.mark.parametrize(("name", "output"), [("propose", "regions"), ("answer", "candidates"), ("judge", "scores")])
def test_an_interrupted_stage_leaves_nothing_behind_and_goes_on_to_the_same_bytes(
    name: str, output: str, shop: Workshop, copy: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the stage's stream."""
    for made in get_stage(name).outputs:
        (copy / _file(made)).unlink()

    def interrupted(items: Iterator[object], *rest: object, **named: object) -> Iterator[object]:
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(f"clincot.stages.{name}.show_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shop.run(name, copy)
    assert not [p.name for p in copy.iterdir() if p.name.startswith(output)]
    assert not list(copy.glob("*.partial"))
    shop.run(name, copy)
    assert (copy / f"{output}.jsonl").read_bytes() == (done / f"{output}.jsonl").read_bytes()


def test_an_endpoint_that_is_down_costs_its_votes_and_not_the_stage(shop: Workshop, copy: Path) -> None:
    """Two judges in this process, quorum 2, and an endpoint on a port where nothing listens."""
    dead = JudgeSpec(name="dead", url=f"http://127.0.0.1:{free_port()}/v1")
    update = {"judges": (*shop.params.judge.judges, dead), "retries": 1, "retry_delay_s": 0.0}
    before = (copy / "scores.jsonl").read_bytes()
    params = shop.params.model_copy(update={"judge": shop.params.judge.model_copy(update=update)})
    shop.run("judge", copy, params)
    assert (copy / "scores.jsonl").read_bytes() == before
    report = json.loads((copy / "panel_report.json").read_text())
    assert [(judge["name"], "ConnectError" in judge["left_out"]) for judge in report["judges"]] == [
        ("a", False),
        ("b", False),
        ("dead", True),
    ]
    (copy / "panel_report.json").rename(copy / "panel.report.json")
    assert set(read_judge_names(copy).values()) == {"a", "b"}


@pytest.mark.parametrize("name", ["propose", "answer", "judge"])
def test_a_disk_that_is_full_half_way_spoils_nothing_and_a_second_run_goes_on(
    name: str, shop: Workshop, copy: Path, done: Path
) -> None:
    """A real limit on the size of files (RLIMIT_FSIZE), at half of what the stage writes first."""
    first = _file(get_stage(name).outputs[0])
    whole = (done / first).stat().st_size
    for made in get_stage(name).outputs:
        (copy / _file(made)).unlink()
    before = {path.name: path.read_bytes() for path in copy.iterdir() if not path.name.endswith(".stage.json")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            shop.run(name, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {path.name: path.read_bytes() for path in copy.iterdir() if not path.name.endswith(".stage.json")}
    after.pop(".judgements.jsonl.progress", None)  # from which the second run goes on
    assert after == before
    shop.run(name, copy)
    assert not (copy / ".judgements.jsonl.progress").exists()
    assert (copy / first).read_bytes() == (done / first).read_bytes()


def test_an_interrupted_run_again_does_not_pass_for_done(
    shop: Workshop, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other settings and old outputs in place: after the interruption the old ones are not taken for the new."""
    other = shop.params.model_copy(update={"answer": shop.params.answer.model_copy(update={"seed": 5})})
    old = (copy / "candidates.jsonl").read_bytes()

    def broken(items: Iterator[object], *rest: object) -> Iterator[object]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr("clincot.stages.answer.show_progress", broken)
        with pytest.raises(KeyboardInterrupt):
            shop.run("answer", copy, other)
    shop.run("answer", copy, other)
    assert (copy / "candidates.jsonl").read_bytes() != old


def test_a_round_never_shows_the_reference(shop: Workshop, copy: Path) -> None:
    """The reference is the answer key; `clincot calibrate` may show it, the judge stage refuses."""
    (copy / "scores.jsonl").unlink()
    update = {"judge": shop.params.judge.model_copy(update={"show_reference": True})}
    with pytest.raises(InvalidInput, match=r"judge\.show_reference is for `clincot calibrate` only"):
        shop.run("judge", copy, shop.params.model_copy(update=update))
    assert not (copy / "scores.jsonl").exists()


def test_unknown_and_missing_paths_are_named(shop: Workshop, tmp_path: Path) -> None:
    config = shop.params.prepare
    questions = {"questions": tmp_path / "questions.jsonl"}
    with pytest.raises(InvalidRecord, match=r"stage prepare: .*missing or unknown: policy"):
        run_stage("prepare", config, {"data": shop.data, "policy": shop.policy}, questions)
    with pytest.raises(InvalidRecord, match="missing or unknown: data"):
        run_stage("prepare", config, {}, questions)
    with pytest.raises(InvalidRecord, match="missing or unknown: questions"):
        run_stage("prepare", config, {"data": shop.data}, {})
    with pytest.raises(InvalidRecord, match=r"input 'data': .*nowhere does not exist"):
        run_stage("prepare", config, {"data": tmp_path / "nowhere"}, questions)
    with pytest.raises(
        ValueError, match=r"'trian'.*prepare, propose, answer, judge, pair, version, train, evaluate, decide"
    ):
        get_stage("trian")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["data/questions.jsonl", "data/new.jsonl", "data/../data/new.jsonl", "link/q.jsonl"])
def test_an_output_inside_an_input_folder_is_refused(target: str, shop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(shop.data, tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.*")}
    with pytest.raises(InvalidRecord, match=r"output 'questions' \(.*\) is inside input 'data' \(.*data\)"):
        run_stage("prepare", PrepareConfig(rounds=1), {"data": tmp_path / "data"}, {"questions": tmp_path / target})
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.*")} == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("data/studies.jsonl", "output 'regions' .* is inside input 'data'"),
        ("questions.jsonl", "output 'regions' .* is input 'questions'"),
        (".", "output 'regions' .* contains input 'data'"),
    ],
)
def test_an_output_that_is_an_input_is_refused(target: str, message: str, shop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(shop.data, tmp_path / "data")
    shutil.copy(shop.data / "questions.jsonl", tmp_path / "questions.jsonl")
    inputs = {"data": tmp_path / "data", "questions": tmp_path / "questions.jsonl", "policy": shop.policy}
    before = (tmp_path / "questions.jsonl").read_bytes()
    with pytest.raises(InvalidRecord, match=message):
        run_stage("propose", shop.params.propose, inputs, {"regions": tmp_path / target})
    assert (tmp_path / "questions.jsonl").read_bytes() == before


def test_a_round_without_a_question_is_an_error_and_no_empty_file(shop: Workshop, tmp_path: Path) -> None:
    config = shop.params.prepare.model_copy(update={"rounds": 1000, "round": 0})
    with pytest.raises(ValueError, match="no question falls into round 0 of 1000"):
        run_stage("prepare", config, {"data": shop.data}, {"questions": tmp_path / "questions.jsonl"})
    assert list(tmp_path.iterdir()) == []


def test_rounds_share_no_study_and_a_limit_takes_the_first(shop: Workshop, tmp_path: Path) -> None:
    taken: list[list[Question]] = []
    for number in range(2):
        out = tmp_path / f"{number}.jsonl"
        config = shop.params.prepare.model_copy(update={"rounds": 2, "round": number})
        run_stage("prepare", config, {"data": shop.data}, {"questions": out})
        taken.append(list(read_records(out, Question)))
    studies = [{q.study for q in questions} for questions in taken]
    assert not studies[0] & studies[1]
    assert len(studies[0] | studies[1]) == 6
    config = shop.params.prepare.model_copy(update={"limit": 3})
    run_stage("prepare", config, {"data": shop.data}, {"questions": tmp_path / "few.jsonl"})
    everything = list(read_records(shop.data / "questions.jsonl", Question))
    assert list(read_records(tmp_path / "few.jsonl", Question)) == everything[:3]


def test_candidates_that_are_not_those_of_the_questions_are_refused(shop: Workshop, copy: Path) -> None:
    lines = (copy / "candidates.jsonl").read_text().splitlines(keepends=True)
    other = copy / "other.jsonl"
    per_question = [json.loads(line)["question"] for line in lines]
    first = [line for line, q in zip(lines, per_question, strict=True) if q == per_question[0]]
    rest = lines[len(first) :]
    other.write_text("".join([*rest, *first]))
    with pytest.raises(InvalidRecord, match=rf"other\.jsonl: expected candidates of {per_question[0]}"):
        shop.run("judge", copy, candidates=other)
    other.write_text("".join(lines[: -len(first)]))
    with pytest.raises(
        InvalidRecord, match=r"other\.jsonl: expected candidates of question-\w+, got the end of the file"
    ):
        shop.run("judge", copy, candidates=other)


def test_a_folders_digest_follows_what_decides_and_not_the_logs(shop: Workshop, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shop.policy, tmp_path / "policy"))
    before = hash_path(folder)
    assert before == hash_path(shop.policy)
    (folder / "train_log.json").write_text("[]")
    assert hash_path(folder) == before
    (folder / "clincot.json").write_text("{}")
    assert hash_path(folder) != before
    data = Path(shutil.copytree(shop.data, tmp_path / "data"))
    assert hash_path(data) == hash_path(shop.data)
    (data / "questions.jsonl").write_text("")
    assert hash_path(data) != hash_path(shop.data)


def test_the_list_of_stages_hangs_together() -> None:
    """Every input is the output of an earlier stage or given from outside, and every section is in Params."""
    given = {"data", "benchmark", "policy", "champion", "challenger"}
    for stage in STAGES:
        assert set(stage.inputs) <= given, stage.name
        assert Params.model_fields[stage.name].annotation is stage.config
        given |= set(stage.outputs)
    # `deploy` has a section and is no stage: it waits for a cluster and for people, and writes no files of a round.
    # `serve` holds for evaluate, publish and the server, `models` for all stages that load one
    # (Params.get_stage_config), `tracking` for the loop of rounds.
    assert (*(stage.name for stage in STAGES), "deploy", "serve", "models", "tracking") == SECTION_NAMES


def test_judging_again_follows_the_chains_questions(shop: Workshop, copy: Path) -> None:
    """With other steps a stage that had ended is not taken for done; without a word of them nothing changes."""
    before = (copy / "judgements.jsonl").read_bytes()
    steps = copy / "steps.json"
    steps.write_text('["{question}"]')
    shop.run("judge", copy, steps=steps)
    assert (copy / "judgements.jsonl").read_bytes() == before
    steps.write_text('["What is seen?"]')
    shop.run("judge", copy, steps=steps)
    assert (copy / "judgements.jsonl").read_bytes() != before


def test_steps_that_do_not_fit_the_candidates_are_refused(shop: Workshop, copy: Path) -> None:
    first, *rest = read_records(copy / "candidates.jsonl", Candidate)
    later = first.model_copy(update={"id": "", "step": 1, "parent": rest[0].id})
    write_records(copy / "longer.jsonl", [Candidate.model_validate(later.model_dump()), *rest])
    with pytest.raises(
        InvalidRecord, match=r"candidate-\w+ is of step 1, but the chain has 1 step\(s\); give the steps"
    ):
        shop.run("judge", copy, candidates=copy / "longer.jsonl")
    for wrong, came in (
        ("[", r"steps\.json:1: expected a JSON list .*got no JSON"),
        ('"?"', "got '\\?'"),
        ("[]", "got"),
    ):
        (copy / "steps.json").write_text(wrong)
        for stage in ("judge", "train"):
            with pytest.raises(InvalidRecord, match=came):
                shop.run(stage, copy, steps=copy / "steps.json", candidates=copy / "longer.jsonl")


def test_scores_that_are_not_those_of_the_candidates_are_refused(shop: Workshop, copy: Path) -> None:
    """Before a next step; they were taken in order, whosever they were."""
    lines = (copy / "scores.jsonl").read_text().splitlines(keepends=True)
    steps = shop.params.answer.model_copy(update={"steps": ("{question}", "Why?")})
    params = shop.params.model_copy(update={"answer": steps})
    other = copy / "other.jsonl"
    before = {"candidates_before": copy / "candidates.jsonl", "scores_before": other}
    for wrong, came in ((lines[1:], "the one of candidate-"), (lines[:-1], "the end of the file")):
        other.write_text("".join(wrong))
        with pytest.raises(InvalidRecord, match=rf"other\.jsonl: expected the score of candidate-\w+, got {came}"):
            shop.run("answer", copy, params, candidates=copy / "next.jsonl", **before)
    assert not (copy / "next.jsonl").exists()
