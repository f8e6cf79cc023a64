"""What lies between two versions, by hand first, then through the command line on a real repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.errors import InvalidInput
from clincot.preferences.versions.version_history import compare_pairs, find_version
from clincot.records import DataVersion, PreferencePair
from tests.preferences.versions.conftest import make_round

pytestmark = pytest.mark.slow


def pair(
    chosen: str, rejected: str, high: float, low: float, *, question: str = "q1", spread: float = 0.1
) -> PreferencePair:
    return PreferencePair(
        question=question,
        chosen=chosen,
        rejected=rejected,
        chosen_region="r1",
        rejected_region="r2",
        chosen_score=high,
        rejected_score=low,
        spread=spread,
    )


def test_added_removed_rescored_and_turned() -> None:
    """Both have: c1-c2 as it was; c3-c4 with gap .4 -> .5; c5-c6 turned: seen from c5, .8 over .5 became .3 under .7.

    Gap changes over those three: 0, +.1, -.4 - .3 = -.7; mean -.2, size (.1 + .7) / 3.
    A alone: c7-c8, of a question that B does not ask. B alone: c1-c9 of a known question, d1-d2 of a new one.
    """
    a = [
        pair("c1", "c2", 0.9, 0.1),
        pair("c3", "c4", 0.6, 0.2),
        pair("c5", "c6", 0.8, 0.5),
        pair("c7", "c8", 0.9, 0.4, question="q2"),
    ]
    b = [
        pair("c1", "c2", 0.9, 0.1),
        pair("c3", "c4", 0.75, 0.25),
        pair("c6", "c5", 0.7, 0.3),
        pair("c1", "c9", 1, 0.5),
        pair("d1", "d2", 0.7, 0.2, question="q3"),
    ]
    found = compare_pairs(a, b)
    assert (found.in_a, found.in_b, found.added, found.removed) == (4, 5, 2, 1)
    assert (found.added_of_new_questions, found.removed_of_gone_questions) == (1, 1)
    assert (found.unchanged, found.rescored, found.turned) == (1, 2, 1)
    assert found.gap is not None
    assert found.gap.mean == pytest.approx(-0.2)
    assert found.gap.mean_absolute == pytest.approx(0.8 / 3)
    assert (found.gap.lowest, found.gap.median, found.gap.highest) == pytest.approx((-0.7, 0.0, 0.1))
    assert found.chosen_score is not None
    assert found.chosen_score.lowest == pytest.approx(0.3 - 0.8)
    assert found.rejected_score is not None
    assert found.rejected_score.highest == pytest.approx(0.7 - 0.5)
    assert found.mean_gap_a == pytest.approx((0.8 + 0.4 + 0.3 + 0.5) / 4)
    assert found.mean_gap_b == pytest.approx((0.8 + 0.5 + 0.4 + 0.5 + 0.5) / 5)


def test_nothing_in_common_has_no_movement() -> None:
    found = compare_pairs([pair("c1", "c2", 0.9, 0.1)], [])
    assert (found.added, found.removed, found.gap, found.mean_gap_b) == (0, 1, None, None)


def version(number: int, revision: str) -> DataVersion:
    return DataVersion(
        sha256="0" * 64,
        files=(),
        pairs=1,
        questions=1,
        candidates=2,
        policies=("p",),
        judges={},
        alpha=None,
        revision=revision,
        tag=f"preferences/round-{number:04d}",
        round=number,
    )


def test_a_version_is_named_by_round_tag_or_commit() -> None:
    known = [version(1, "aaaaaa1" + "0" * 33), version(2, "aaaaaa2" + "0" * 33)]
    for given, number in (("1", 1), ("preferences/round-0002", 2), ("0002", 2), ("aaaaaa2", 2)):
        assert find_version(known, given, "repo").round == number
    with pytest.raises(
        InvalidInput, match=r"'aaaaaa' names 2 versions: preferences/round-0001, .*; name one by its tag"
    ):
        find_version(known, "aaaaaa", "repo")
    for given in ("3", "round"):
        with pytest.raises(
            InvalidInput, match=r"no version is called .*there are: preferences/round-0001, preferences/round-"
        ):
            find_version(known, given, "repo")


def test_a_round_of_several_lines_is_named_with_its_line() -> None:
    known = [
        version(1, "aaaaaa1" + "0" * 33),
        version(1, "aaaaaa2" + "0" * 33).model_copy(
            update={"line": "nodules", "tag": "preferences/nodules/round-0001"}
        ),
        version(2, "aaaaaa3" + "0" * 33).model_copy(
            update={"line": "nodules", "tag": "preferences/nodules/round-0002"}
        ),
    ]
    for given, expected in (("nodules/1", known[1]), ("nodules/round-0001", known[1]), ("2", known[2])):
        assert find_version(known, given, "repo") == expected
    with pytest.raises(InvalidInput, match=r"'1' names 2 versions: preferences/round-0001, preferences/nodules/round-"):
        find_version(known, "1", "repo")


def test_log_and_diff_of_a_repository(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answers, judged again by judges that take .1 off every right one: all 6 pairs are re-scored by -.1."""
    main(["data", "log", "--repository", str(repository)])
    assert capsys.readouterr().out == "no version yet\n"
    first, second = make_round(tmp_path / "a", seed=50), make_round(tmp_path / "b", seed=50, doubt=0.1)
    first.keep(repository)
    second.keep(repository)
    capsys.readouterr()
    assert main(["data", "log", "--repository", str(repository)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "version",
        "commit",
        "run",
        "pairs",
        "questions",
        "size",
        "agreement",
        "judges",
        "policy",
        "sha256",
    ]
    for row, kept in zip(rows, (first.kept, second.kept), strict=True):
        (policy,) = kept.policies
        for told in (kept.tag, kept.revision[:10], policy[:12], kept.sha256[:12], f"{kept.alpha:.3f}", "judge-a "):
            assert told in row
        assert re.search(rf" 6 +3 +{kept.size / 1e6:.2f} MB ", row)

    assert main(["data", "diff", "1", second.kept.tag, "--repository", str(repository), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pairs"]
    assert (found["added"], found["removed"], found["rescored"], found["turned"]) == (0, 0, 6, 0)
    assert found["chosen_score"]["mean"] == pytest.approx(-0.1)
    assert found["rejected_score"]["mean"] == pytest.approx(0)
    assert found["gap"]["highest"] == pytest.approx(-0.1)
    assert main(["data", "diff", "1", "2", "--repository", str(repository)]) == 0
    told = capsys.readouterr().out
    assert "re-scored 6, 0 of them the other way round" in told
    assert "gap: moved by -0.100 on average (0.100 in size)" in told
    assert main(["data", "diff", "1", "7", "--repository", str(repository)]) == 1
    assert "no version is called '7'" in capsys.readouterr().err
    assert main(["data", "log", "--params", "/dev/null"]) == 1
    assert "no data repository is named" in capsys.readouterr().err
