"""Parameters: unknown names are refused by name, numbers are numbers, files say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.config import SECTION_NAMES, Params, load_params, resolve_path
from clincot.config.params_yaml import is_inherited
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord

ROOT = Path(__file__).parents[1]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_defaults_hold() -> None:
    assert load_params(None) == Params()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {learning_rate: 0.1}", "train.learning_rate"),
        ("trian: {lr: 0.1}", "trian"),
        ("propose: {grounders: {widnows: 2}}", "propose.grounders.widnows"),
        ("judge: {judges: [{name: a, path: x, wieght: 2}]}", "judge.judges.0.wieght"),
        ("train: {lr: -1}", "train.lr"),
        ("train: {lr: .inf}", "train.lr"),
        ("pair: {min_gap: .nan}", "pair.min_gap"),
        ("judge: {judges: [{name: a}]}", "judge 'a' needs either path or url"),
        ("judge: {judges: [{name: a, path: x, url: 'http://y'}]}", "judge 'a' needs either path or url"),
        ("propose: {window_sides: []}", "propose.window_sides"),
        ("propose: {window_sides: [0.0]}", "propose.window_sides"),
        ("propose: {window_sides: [1.5]}", "propose.window_sides"),
        ("answer: {steps: []}", "answer.steps"),
        ("propose: {hypotheses: 1}", "propose.hypotheses"),  # 'normal' alone, which is nowhere
        ("propose: {grounders: {whole: 1}}", "propose.grounders.whole"),
        ("- train", "parameters by section"),
        ("train: [", "not YAML"),
        ("train: {lr: 1e-4, beta: 0.1, lr: 1e-3}", "the key 'lr' is in line 1 and again in line 1; expected it once"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(text: str, named: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidRecord) as refused:
        load_params(path)
    assert str(path) in str(refused.value)
    assert named in str(refused.value)


def test_a_list_instead_of_sections_is_refused_with_overrides_too(tmp_path: Path) -> None:
    """It was an AttributeError of the override's own."""
    with pytest.raises(InvalidRecord, match="parameters by section"):
        load_params(written(tmp_path, "- train"), ("train.lr=0.1",))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"absent\.yaml: no such file"):
        load_params(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["train: {lr: 1e-5}", "train: {lr: 1.0e-5}", "train: {lr: 0.00001}"])
def test_a_number_without_a_point_is_a_number(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text."""
    assert load_params(written(tmp_path, text)).train.lr == 0.00001


def test_overrides_win_over_the_file_and_make_sections(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {lr: 0.5, epochs: 3}")
    params = load_params(path, ("train.lr=1e-5", "pair.pick=top", "propose.grounders.random=3", "judge.judges=[]"))
    assert params.train.lr == 1e-5
    assert params.train.epochs == 3
    assert params.pair.pick == "top"
    assert params.propose.grounders == {"random": 3}
    assert params.judge.judges == ()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr", "expected section.field=value"),
        ("lr=1", "expected section.field=value"),
        ("train.lr.deep=1", "'lr' is not a section"),
        ("train.lr=[", "not YAML"),
        ("train.lt=1", "train.lt"),
        ("train.lrr=1", "--set 'train.lrr=1': unknown parameter train.lrr; did you mean train.lr?"),
        ("trian.lr=1", "--set 'trian.lr=1': unknown parameter trian; did you mean train?"),
        ("train.zzzzzz=1", "--set 'train.zzzzzz=1': unknown parameter train.zzzzzz"),
        ("train.lr=-1", "--set 'train.lr=-1': train.lr: Input should be greater than 0 (got -1)"),
        ("propose.hypotheses=x", "--set 'propose.hypotheses=x': propose.hypotheses: "),
        ("judge.judges=[{name: a, pth: x}]", "judge.judges.0.pth; did you mean judge.judges.0.path?"),
        ("judge.judges=[{name: a}]", "': judge.judges.0: judge 'a' needs either path or url"),
    ],
)
def test_a_bad_override_is_shown(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord) as refused:
        load_params(written(tmp_path, "train: {lr: 0.5}"), (override,))
    assert says in str(refused.value)


def test_each_wrong_parameter_is_named_with_its_source(tmp_path: Path) -> None:
    path = written(tmp_path, "pair: {min_gapp: 0.5}")
    with pytest.raises(InvalidRecord) as refused:
        load_params(path, ("train.lrr=1", "prepare.limit=2"))
    assert f"{path}: unknown parameter pair.min_gapp; did you mean pair.min_gap?" in str(refused.value)
    assert "--set 'train.lrr=1': unknown parameter train.lrr; did you mean train.lr?" in str(refused.value)
    assert "prepare" not in str(refused.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRecord, match=r"params\.yaml: not UTF-8 text"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(InvalidRecord, match="is a directory; expected a YAML file"):
        load_params(tmp_path)


def test_the_recipe_changes_these_neutral_defaults() -> None:
    """On purpose: the shipped judges and what they know, one finding list, the controls that the results table shows,
    a gate on what is served, and a training for models a thousandth of the usual size."""
    params = load_params(None, recipe="small-model")
    assert params.list_changes(Params()) == (
        "propose.grounders",
        "propose.hypotheses",
        "answer.per_region",
        "answer.temperature",
        "judge.judges",
        "judge.calibration_file",
        "pair.min_gap",
        "pair.min_agreement",
        "pair.max_prejudice",
        "pair.per_question",
        "pair.pick",
        "pair.same_region_share",
        "pair.max_answer_bias",
        "train.beta",
        "train.margin_lambda",
        "train.nll_weight",
        "train.anchors",
        "train.lr",
        "train.epochs",
        "train.batch_size",
        "train.train_projector",
        "train.dtype",
        "evaluate.arms",
        "evaluate.propose",
        "decide.arm",
        "decide.floors",
        "serve.propose",
    )


def test_a_sections_digest_follows_its_content() -> None:
    assert load_params(None).train.digest == Params().train.digest
    assert load_params(None, ("train.lr=2e-4",)).train.digest != Params().train.digest


@pytest.mark.parametrize("config", Params.model_fields)
def test_sections_are_frozen(config: str) -> None:
    one = getattr(Params(), config)
    name = next(iter(type(one).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(one, name, getattr(one, name))


@pytest.mark.parametrize(("text", "value"), [("no", "no"), ("yes", "yes"), ("'no'", "no"), ("auto", "auto")])
def test_yes_and_no_are_words(text: str, value: str, tmp_path: Path) -> None:
    """YAML 1.1 reads `no` as false, and `--set preflight.cluster=no` was refused though its help offers it."""
    assert load_params(written(tmp_path, f"preflight: {{cluster: {text}}}")).preflight.cluster == value
    assert load_params(None, (f"preflight.cluster={text}",)).preflight.cluster == value


def test_another_word_for_yes_is_still_refused() -> None:
    with pytest.raises(InvalidRecord, match=r"preflight\.cluster: Input should be 'auto', 'yes' or 'no' \(got 1\)"):
        load_params(None, ("preflight.cluster=1",))


@pytest.mark.parametrize(
    "name", ["judge.calibration_file", "version.repository", "publish.store", "propose.http_url", "preflight.base"]
)
def test_an_empty_value_is_the_empty_text(name: str, tmp_path: Path) -> None:
    """`--set judge.calibration_file=` and `calibration_file:` say "none"; YAML reads null there."""
    section, field = name.split(".")
    for params in (load_params(None, (f"{name}=",)), load_params(written(tmp_path, f"{section}:\n  {field}:\n"))):
        assert getattr(getattr(params, section), field) == ""


def test_a_number_is_not_emptied_by_an_empty_value() -> None:
    with pytest.raises(InvalidRecord, match=r"train\.lr: Input should be a valid number"):
        load_params(None, ("train.lr=",))


@pytest.mark.parametrize("section", SECTION_NAMES)
def test_every_field_is_described_by_a_sentence(section: str) -> None:
    """The descriptions are the comments of params.yaml and the text of --help."""
    config = getattr(Params(), section)
    for name, field in type(config).model_fields.items():
        if is_inherited(section, name):
            continue
        assert field.description, f"{section}.{name}"
        assert field.description.endswith("."), f"{section}.{name}"
        assert field.description[0].isupper() or field.description[0] in "kmcβλτα'", f"{section}.{name}"


def test_shipped_names_are_resolved() -> None:
    assert resolve_path("shipped:policy") == ROOT / "assets" / "policy"
    assert resolve_path(Path("shipped:calibration.jsonl")) == ROOT / "assets" / "calibration.jsonl"
    assert resolve_path("assets/policy") == Path("assets/policy")


@pytest.mark.parametrize("name", ["polcy", "", "../params.yaml", "policy/config.json", "__init__.py"])
def test_an_unknown_shipped_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"it ships shipped:calibration\.jsonl, shipped:golden, shipped:judge-a, "):
        resolve_path(f"shipped:{name}")


def test_one_section_decides_how_answers_are_served() -> None:
    """evaluate and publish take `serve`, so that the gate, the golden questions and the server answer alike.

    What withholds an answer (abstain_below) does not decide it, so it does not change the digest.
    """
    params = load_params(None, ("serve.max_new_tokens=40", "serve.abstain_below=0.3"))
    for stage in ("evaluate", "publish"):
        assert params.get_stage_config(stage).serve == params.serve  # type: ignore[attr-defined]
    preflight = params.get_stage_config("preflight")
    assert preflight.publish == params.get_stage_config("publish")  # type: ignore[attr-defined]
    patient = params.serve.model_copy(update={"abstain_below": 0.0})
    assert patient.answer_digest == params.serve.answer_digest != Params().serve.answer_digest
    with pytest.raises(InvalidRecord, match=r"publish\.serve differs from serve; set serve alone"):
        load_params(None, ("serve.max_new_tokens=40", "publish.serve.max_new_tokens=41"))


def test_an_engine_of_one_stage_is_a_change() -> None:
    """The default engine is not dumped, so that digests stay; another one is a change like any other."""
    params = load_params(None, ("answer.engine={kind: url, url: 'http://vllm.team:8000/v1'}",))
    assert params.list_changes(Params()) == ("answer.engine",)
