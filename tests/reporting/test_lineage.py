from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from clincot.drawing import BLUE, FILM_SIDE_PX, ORANGE, BoxAnnotation, ImagePanel, render_panels
from clincot.geometry import WHOLE_IMAGE, box_from_xyxy, box_to_pixels
from clincot.jsonl import InvalidRecord, hash_files, read_records
from clincot.records import (
    BenchmarkReport,
    Candidate,
    Checkpoint,
    Decision,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Record,
    Reference,
    Region,
    Study,
)
from clincot.reporting.lineage import AmbiguousId, RecordNotFound, draw_record, find_record, render_lineage
from clincot.reporting.pictures import Illustrator, NoPicture
from clincot.runs.lookup import RunRecords, grep_lines
from tests.support.runs import JUDGES, sha, write_films, write_run

PLACES: list[tuple[str, type[Record]]] = [
    ("run/round-01/pairs.jsonl", PreferencePair),
    ("run/round-01/candidates.jsonl", Candidate),
    ("run/round-01/regions.jsonl", Region),
    ("run/round-01/judgements.jsonl", Judgement),
    ("run/round-01/scores.jsonl", PanelScore),
    ("run/round-01/questions.jsonl", Question),
    ("data/studies.jsonl", Study),
    ("benchmark/references.jsonl", Reference),
    ("run/round-01/sft/outcomes.jsonl", Outcome),
    ("run/round-01/policy/record.json", Checkpoint),
    ("run/round-01/decision.json", Decision),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("provenance")
    write_films(root / "data", films=30, seed=1, split="train")
    write_films(root / "benchmark", films=16, seed=2, split="test")
    write_run(root / "run", root / "data", root / "benchmark", limit=15)
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """All of it, elsewhere, with run.json naming the copies by relative paths."""
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    run = json.loads((copy / "run" / "run.json").read_text())
    (copy / "run" / "run.json").write_text(json.dumps(run | {"data": "data", "benchmark": "benchmark"}))
    return copy


def first(path: Path, kind: type[Record]) -> Record:
    return next(read_records(path, kind))


@pytest.mark.parametrize(("file", "kind"), PLACES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_kind_is_found_by_its_id_and_by_a_prefix(root: Path, file: str, kind: type[Record]) -> None:
    record = first(root / file, kind)
    assert find_record(root / "run", record.id) == record
    assert find_record(root / "run", record.id[:-4]) == record  # 16 hexadecimal digits: no other begins so
    assert find_record(root / "run", record.id.partition("-")[2]) == record


def test_a_report_written_on_many_lines_is_found(root: Path) -> None:
    report = BenchmarkReport.model_validate_json((root / "run" / "round-01" / "report.json").read_text())
    assert find_record(root / "run", report.id) == report


def test_images_and_checkpoints_are_found_by_their_sha256(root: Path) -> None:
    study = first(root / "data" / "studies.jsonl", Study)
    assert isinstance(study, Study)
    assert find_record(root / "run", hash_files(root / "data" / study.image)) == study
    checkpoint = first(root / "run" / "round-01" / "policy" / "record.json", Checkpoint)
    assert isinstance(checkpoint, Checkpoint)
    assert find_record(root / "run", checkpoint.sha256[:16]) == checkpoint


def test_an_ambiguous_beginning_lists_what_it_could_be(root: Path) -> None:
    with pytest.raises(AmbiguousId) as caught:
        find_record(root / "run", "checkpoint")
    listed = re.findall(r"checkpoint-[0-9a-f]{20}", str(caught.value))
    assert len(set(listed)) == len(listed) == 6  # two rounds of ours, SFT and plain DPO
    with pytest.raises(AmbiguousId, match=r"and more$"):
        find_record(root / "run", "candidate-")


@pytest.mark.parametrize("given", ["pair-ffffffffffffffffffff", "", "  ", "é"])
def test_what_is_not_there_is_said_to_be_not_there(root: Path, given: str) -> None:
    with pytest.raises(RecordNotFound, match=r"no record in .*run begins with"):
        find_record(root / "run", given)


def test_a_folder_that_is_no_run_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"run\.json: no such file; expected a run folder"):
        find_record(tmp_path, "pair-1")


def test_a_pair_leads_to_everything_that_it_comes_from(root: Path) -> None:
    """From a pair the tree leads to the image, the judges, the policy and the configuration."""
    run = root / "run"
    pair = first(run / "round-02" / "pairs.jsonl", PreferencePair)
    assert isinstance(pair, PreferencePair)
    tree = render_lineage(run, pair)
    question = find_record(run, pair.question)
    assert isinstance(question, Question)
    study = find_record(run, question.study)
    assert isinstance(study, Study)
    for one in (pair.chosen, pair.rejected, pair.chosen_region, pair.rejected_region, pair.question, question.study):
        assert one in tree
    assert f"{root / 'data' / study.image}  as recorded" in tree
    assert study.sha256 in tree
    # Both sides were scored by both judges: four judgements, each with the judge's name, digest and prompt.
    given = read_records(run / "round-02" / "judgements.jsonl", Judgement)
    behind = [j for j in given if j.candidate in (pair.chosen, pair.rejected)]
    assert len(behind) == 4
    for judgement in behind:
        name = {sha(judge): judge for judge in JUDGES}[judgement.judge]
        assert f"{judgement.id}  {name} {judgement.score:.3f}" in tree
    assert tree.count(f"judge {sha('judge-a')}, prompt prompt-2") == 2
    # Round 2's candidates were written by round 1's policy; the pairs trained three policies.
    before = first(run / "round-01" / "policy" / "record.json", Checkpoint)
    assert isinstance(before, Checkpoint)
    assert tree.count(f"answered by policy {before.sha256}  round-01/policy") == 2
    assert tree.count("trained checkpoint-") == 3
    assert len(re.findall(r"trained checkpoint-\w+  round-02/(policy|sft/policy|dpo/policy)", tree)) == 3
    assert re.search(r"configuration params\.yaml\n +├─ propose [0-9a-f]{64}", tree)


def test_the_base_policy_is_named_where_the_first_round_answered(root: Path) -> None:
    candidate = first(root / "run" / "round-01" / "candidates.jsonl", Candidate)
    tree = render_lineage(root / "run", candidate)
    assert f"answered by policy {sha('base')}  the base, {root / 'models' / 'base'}" in tree


@pytest.mark.parametrize(("file", "kind"), PLACES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_kind_is_explained_down_to_its_image(root: Path, file: str, kind: type[Record]) -> None:
    record = first(root / file, kind)
    tree = render_lineage(root / "run", record)
    assert tree.startswith(record.id)
    if kind not in (Checkpoint, Decision):
        assert re.search(r"images/\d{6}\.png  as recorded\n", tree)


def test_a_tree_is_drawn_with_its_branches(root: Path) -> None:
    region = first(root / "run" / "round-01" / "regions.jsonl", Region)
    lines = render_lineage(root / "run", region).splitlines()
    assert [re.match(r"[ │├└─]*", line).group() for line in lines] == [  # type: ignore[union-attr]
        "",
        "└─ ",
        "   └─ ",
        "      ├─ ",
        "      └─ ",
    ]


def test_a_checkpoint_names_its_parent_its_pairs_and_its_section(root: Path) -> None:
    run = root / "run"
    checkpoint = first(run / "round-02" / "policy" / "record.json", Checkpoint)
    tree = render_lineage(run, checkpoint)
    assert "round-01/policy, checkpoint-" in tree
    assert f"pairs round-02/pairs.jsonl  sha256 {hash_files(run / 'round-02' / 'pairs.jsonl')}" in tree
    assert "(params.yaml's)" in tree
    assert "last of 40 logged steps" in tree
    sft = first(run / "round-02" / "sft" / "policy" / "record.json", Checkpoint)
    assert "not params.yaml's" in render_lineage(run, sft)


def test_a_chain_is_followed_to_its_start(copy: Path) -> None:
    path = copy / "run" / "round-01" / "candidates.jsonl"
    parent = first(path, Candidate)
    assert isinstance(parent, Candidate)
    fields = parent.model_dump(mode="json", exclude={"id"})
    child = Candidate.model_validate(fields | {"parent": parent.id, "step": 1, "text": "second"})
    path.write_text(child.model_dump_json() + "\n" + path.read_text())  # the child's line names its parent first
    tree = render_lineage(copy / "run", child)
    assert tree.startswith(f"{child.id}  “second” (step 2)")
    assert f"continues {parent.id}" in tree


def test_an_image_that_was_changed_or_removed_is_said_so(copy: Path) -> None:
    study = first(copy / "data" / "studies.jsonl", Study)
    assert isinstance(study, Study)
    image = copy / "data" / study.image
    Image.new("L", (96, 80)).save(image)
    assert "CHANGED since it was recorded" in render_lineage(copy / "run", study)
    image.unlink()
    assert "MISSING" in render_lineage(copy / "run", study)


def test_a_broken_link_is_named(copy: Path) -> None:
    candidate = first(copy / "run" / "round-01" / "candidates.jsonl", Candidate)
    assert isinstance(candidate, Candidate)
    (copy / "run" / "round-01" / "regions.jsonl").write_text("")
    with pytest.raises(InvalidRecord, match=f"expected {candidate.region} among its region records"):
        render_lineage(copy / "run", candidate)


def test_a_line_that_is_no_record_is_named_with_its_number(copy: Path) -> None:
    path = copy / "run" / "round-01" / "pairs.jsonl"
    pair = first(path, PreferencePair)
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace('"version":1', '"version":2')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidRecord, match=r"pairs\.jsonl:1: not a PreferencePair: version"):
        find_record(copy / "run", pair.id)


def test_the_answer_key_of_training_data_stays_closed(copy: Path) -> None:
    """A folder under the key's name: whoever opens it fails."""
    key = copy / "data" / "references.jsonl"
    secret = first(key, Reference)
    assert key not in [path for path, _ in RunRecords(copy / "run").files]
    with pytest.raises(RecordNotFound):
        find_record(copy / "run", secret.id)
    key.unlink()
    key.mkdir()
    pair = first(copy / "run" / "round-01" / "pairs.jsonl", PreferencePair)
    assert "answer key" not in render_lineage(copy / "run", pair)


def test_nor_is_it_where_the_data_set_lies_inside_the_run_folder(copy: Path) -> None:
    for name in ("data", "benchmark"):
        (copy / name).rename(copy / "run" / name)
    hidden = first(copy / "run" / "data" / "references.jsonl", Reference)
    with pytest.raises(RecordNotFound):
        find_record(copy / "run", hidden.id)
    shown = first(copy / "run" / "benchmark" / "references.jsonl", Reference)
    assert find_record(copy / "run", shown.id) == shown


def test_relative_paths_are_resolved_above_the_run_folder(copy: Path) -> None:
    assert RunRecords(copy / "run").data == copy / "data"


def test_lines_that_name_nothing_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"id":"pair-1"}\nnot json at all\n{"id":"pair-2","of":"pair-1"}\n{"id":"pair.1"}\n')
    assert [number for number, _ in grep_lines(path, ["pair-1"])] == [1, 3]
    assert [number for number, _ in grep_lines(path, ["pair-2", "pair.1"])] == [3, 4]  # a dot is a dot
    assert list(grep_lines(path, [])) == []


def test_a_box_is_drawn_where_it_is() -> None:
    """On a black film, 100 x 80 enlarged to 480 x 384, what the box changes is its outline's extent, to the pixel."""
    film = Image.new("RGB", (100, 80))
    box = box_from_xyxy((0.25, 0.5, 0.75, 0.875))
    with_box = render_panels([ImagePanel(film, (BoxAnnotation(box, BLUE),), "caption")], "title")
    without = render_panels([ImagePanel(film, (), "caption")], "title")
    changed = ImageChops.difference(with_box, without).getbbox()
    black = without.convert("L").point(lambda v: 255 * (v == 0)).getbbox()
    assert black is not None
    left, top = black[:2]
    assert (black[2] - left, black[3] - top) == (FILM_SIDE_PX, 384)
    x0, y0, x1, y1 = box_to_pixels(box, width=480, height=384)
    assert (x0, y0, x1, y1) == (120, 192, 360, 336)
    assert changed == (left + x0, top + y0, left + x1, top + y1)


def test_a_dashed_box_stays_within_its_edges() -> None:
    film = Image.new("RGB", (100, 80))
    box = box_from_xyxy((0.25, 0.5, 0.75, 0.875))
    pictures = [
        render_panels([ImagePanel(film, marks, "c")], "t") for marks in ((), (BoxAnnotation(box, ORANGE, dashed=True),))
    ]
    changed = ImageChops.difference(*pictures).getbbox()
    assert changed is not None
    assert (changed[2] - changed[0], changed[3] - changed[1]) == (240, 144)


def test_both_sides_of_a_pair_are_drawn_in_their_colours(root: Path) -> None:
    pair = first(root / "run" / "round-01" / "pairs.jsonl", PreferencePair)
    drawn = draw_record(root / "run", pair)
    middle = drawn.width // 2
    for colour, half in ((BLUE, (0, 0, middle, drawn.height)), (ORANGE, (middle, 0, drawn.width, drawn.height))):
        counts = {c: n for n, c in drawn.crop(half).getcolors(1 << 24)}
        other = ORANGE if colour == BLUE else BLUE
        assert counts[colour] > 4 * FILM_SIDE_PX  # the bar above (4 rows) and a box
        assert other not in counts


@pytest.mark.parametrize(("file", "kind"), PLACES[:9], ids=lambda value: getattr(value, "__name__", ""))
def test_pictures_are_the_same_each_time(root: Path, file: str, kind: type[Record]) -> None:
    """Every kind of record that can be drawn has a picture, with the same bytes each time."""
    record = first(root / file, kind)
    drawn = draw_record(root / "run", record)
    assert min(drawn.size) > FILM_SIDE_PX
    assert drawn.tobytes() == draw_record(root / "run", record).tobytes()


def test_what_cannot_be_seen_has_no_picture(root: Path) -> None:
    decision = first(root / "run" / "round-01" / "decision.json", Decision)
    with pytest.raises(NoPicture, match=f"{decision.id}: a Decision has no picture"):
        draw_record(root / "run", decision)


def test_the_crop_is_the_one_that_the_policy_saw(root: Path) -> None:
    """The whole image is the crop of the region 'whole image': at 64 px, then enlarged, it is not the film itself."""
    run = root / "run"
    whole = next(r for r in read_records(run / "round-01" / "regions.jsonl", Region) if r.box == WHOLE_IMAGE)
    study = RunRecords(run).get_question_study(whole.question)
    panel = Illustrator(RunRecords(run))._build_panel(whole.question, [], "", (), whole.box, None)
    assert panel.crop is not None
    assert panel.crop.size == (study.width, study.height)  # a checkpoint without views: as the image is
    candidate = next(c for c in read_records(run / "round-01" / "candidates.jsonl", Candidate) if c.region == whole.id)
    seen = Illustrator(RunRecords(run))._build_candidate_panel(candidate, BLUE, "").crop
    assert seen is not None
    assert max(seen.size) == 64  # crop_px of the base policy's clincot.json
