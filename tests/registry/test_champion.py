"""The champion pointer: moves, conflicts between processes, and its history."""

from __future__ import annotations

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from clincot.jsonl import InvalidRecord
from clincot.records import hash_json
from clincot.registry import champion
from clincot.registry.champion import Champion, ChampionMove, ChampionMoved, NoChampion
from clincot.registry.manifest import Manifest
from clincot.storage.folder_store import FolderStore
from clincot.storage.open import open_store
from clincot.storage.store import Store
from tests.support.s3_server import S3Server


def model(name: str, number: int = 0) -> Manifest:
    digest = hash_json(name)
    return Manifest(
        line="chest",
        sha256=digest,
        measured=digest,
        kind="full",
        round=number,
        licence="MIT",
        files=(),
        uri=f"s3://x/{digest}",
    )


BASE, ONE, TWO = model("base"), model("one", 1), model("two", 2)


def digests(pointer: Champion) -> list[str]:
    return [move.sha256 for move in pointer.moves]


def test_promotions_and_rollbacks_move_the_pointer(tmp_path: Path) -> None:
    """base, +one, +two, back to one, back to base: after that, two is no rollback target, but stays in the history."""
    store = FolderStore(tmp_path)
    with pytest.raises(NoChampion, match="models start DIGEST --name chest"):
        champion.read_champion(store, "chest")
    champion.create_champion_pointer(store, BASE, by="ann")
    champion.promote_champion(store, ONE, over=BASE.sha256, by="ann", reason="won", decision="decision-1")
    champion.promote_champion(store, TWO, over=ONE.sha256, by="ann", reason="won")
    with pytest.raises(ValueError, match="needs a reason"):
        champion.roll_back_champion(store, ONE, over=TWO.sha256, by="ann", reason=" ")
    back = champion.roll_back_champion(store, ONE, over=TWO.sha256, by="bo", reason="answers in French")
    assert [move.sha256 for move in back.promotion_stack] == [BASE.sha256, ONE.sha256]
    with pytest.raises(ValueError, match="is no earlier champion"):
        champion.roll_back_champion(store, TWO, over=ONE.sha256, by="bo", reason="forward is not back")
    last = champion.roll_back_champion(store, BASE, over=ONE.sha256, by="bo", reason="that one too")
    assert digests(last) == [m.sha256 for m in (BASE, ONE, TWO, ONE, BASE)]
    assert [move.kind for move in last.moves] == ["base", "promote", "promote", "rollback", "rollback"]
    assert last.moves[3].reason == "answers in French"
    assert champion.read_champion(store, "chest") == last


def test_creating_the_pointer_twice_changes_nothing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first = champion.create_champion_pointer(store, BASE, by="ann")
    assert champion.create_champion_pointer(store, BASE, by="bo") == first
    with pytest.raises(ChampionMoved, match=f"has a champion already: {BASE.sha256[:12]}"):
        champion.create_champion_pointer(store, ONE, by="bo")


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_concurrent_promotions_name_the_winner(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = FolderStore(tmp_path)
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.bucket(bucket := f"race-{uuid.uuid4().hex[:8]}")
        store = open_store(f"s3://{bucket}")
    champion.create_champion_pointer(store, BASE, by="ann")
    barrier = Barrier(2)

    def race(to: Manifest) -> str:
        barrier.wait()
        try:
            champion.promote_champion(store, to, over=BASE.sha256, by=f"racer {to.round}", reason="won")
        except ChampionMoved as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        messages = dict(zip((ONE, TWO), pool.map(race, (ONE, TWO)), strict=True))
    (winner,) = [to for to, error in messages.items() if not error]
    (loser,) = [to for to, error in messages.items() if error]
    assert digests(champion.read_champion(store, "chest")) == [BASE.sha256, winner.sha256]
    assert f"it is {winner.sha256[:12]} (round {winner.round}, promote" in messages[loser]
    assert f"by racer {winner.round}" in messages[loser]


def test_concurrent_writes_after_both_read_have_one_winner(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes on S3. Both have read the base as champion before either writes, so only the write decides."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.bucket(bucket := f"race-{uuid.uuid4().hex[:8]}")
    store = open_store(f"s3://{bucket}/models")
    champion.create_champion_pointer(store, BASE, by="ann")
    racers = []
    for to in (ONE, TWO):
        (tmp_path / to.sha256).write_text(to.model_dump_json())
        command = [
            sys.executable,
            "-m",
            "tests.support.racer",
            store.url,
            str(tmp_path / to.sha256),
            BASE.sha256,
            f"round {to.round}",
        ]
        racers.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
            )
        )
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "read\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    messages = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert messages.count("won") == 1
    winner, loser = (ONE, TWO) if messages[0] == "won" else (TWO, ONE)
    assert digests(champion.read_champion(store, "chest")) == [BASE.sha256, winner.sha256]
    (lost,) = [line for line in messages if line != "won"]
    assert f"it is {winner.sha256[:12]} (round {winner.round}, promote" in lost
    assert f"by round {winner.round})" in lost
    assert loser.sha256 not in {move.sha256 for move in champion.read_champion(store, "chest").moves}


def test_a_pointer_with_a_missing_move_is_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    champion.create_champion_pointer(store, BASE, by="ann")
    broken = ChampionMove(number=1, kind="promote", sha256=TWO.sha256, previous=ONE.sha256, reason="a move is missing")
    pointer = champion.read_champion(store, "chest")
    text = pointer.model_dump_json().replace("]}", f",{broken.model_dump_json()}]}}")
    store.delete("champions/chest.json")
    store.write_new("champions/chest.json", text.encode())
    with pytest.raises(InvalidRecord, match=r"champions/chest\.json: not a champion pointer.*does not follow"):
        champion.read_champion(store, "chest")


def test_a_moves_id_ignores_author_and_time() -> None:
    one = ChampionMove(number=0, kind="base", sha256=BASE.sha256, reason="r", uri="/a", by="ann", at="2026-01-01")
    other = ChampionMove(number=0, kind="base", sha256=BASE.sha256, reason="r", uri="s3://b", by="bo", at="2026-02-02")
    assert one.id == other.id
