"""A real write failure, half way: a subprocess whose files may not grow beyond a limit (RLIMIT_FSIZE, EFBIG)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clincot.datasets.folder import load_questions
from clincot.datasets.jsonl_vqa import ingest_jsonl
from clincot.jsonl import read_records, write_records
from clincot.records import Question

INGEST = """
import resource, sys
from pathlib import Path
from clincot.datasets.jsonl_vqa import ingest_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
ingest_jsonl(Path(sys.argv[1]), Path(sys.argv[2]))
"""
WRITE = """
import resource, sys
from pathlib import Path
from clincot.jsonl import write_records
from clincot.records import Question
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
write_records(Path(sys.argv[1]), (Question(study="study-1", text=f"Question {n}?", kind="open") for n in range(1000)))
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four images of about 12 kB with fifty questions each: about 40 kB of questions."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for image in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{image}.png")
        lines += [
            json.dumps({"image": f"{image}.png", "question": f"Is finding {n} there?", "answer": "no"})
            for n in range(50)
        ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("limit", [8_000, 20_000], ids=["while copying an image", "while writing questions"])
def test_full_disk_keeps_the_old_data_and_a_rerun_finishes(source: Path, tmp_path: Path, limit: int) -> None:
    out = tmp_path / "out"
    before = source.with_name("before.jsonl")
    Image.new("L", (8, 8)).save(source.with_name("old.png"))
    before.write_text(json.dumps({"image": "old.png", "question": "Old?", "answer": "yes"}) + "\n")
    ingest_jsonl(before, out)
    old = contents(out)

    failed = run(INGEST, source, out, limit)
    assert failed.returncode == 1
    assert f"while writing {out}; the folder's previous contents are unchanged" in failed.stderr
    assert "Free some disk space and run the same command again" in failed.stderr
    left = contents(out)
    assert {name: left[name] for name in old} == old
    assert [question.text for question in load_questions(out)] == ["Old?"]
    # Beside it only whole images, which the next run need not copy again.
    added = {name: content for name, content in left.items() if name not in old}
    originals = {path.read_bytes() for path in source.parent.glob("?.png")}
    assert all(name.startswith("images/") and content in originals for name, content in added.items())
    assert bool(added) == (limit == 20_000)

    ingest_jsonl(source, out)
    ingest_jsonl(source, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_disk_full_while_writing_records(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write_records(path, [Question(study="study-1", text="Old?", kind="open")])
    failed = run(WRITE, path)
    assert failed.returncode == 1
    assert "File too large" in failed.stderr
    assert [record.text for record in read_records(path, Question)] == ["Old?"]
    assert [file.name for file in tmp_path.iterdir()] == ["questions.jsonl"]


def test_disk_full_at_the_last_flush_renames_nothing(tmp_path: Path) -> None:
    """Studies are renamed before questions: without all being on disk first, new studies met old questions."""
    Image.new("L", (8, 8), 1).save(tmp_path / "old.png")
    Image.new("L", (8, 8), 2).save(tmp_path / "new.png")
    (tmp_path / "old.jsonl").write_text(json.dumps({"image": "old.png", "question": "Old?", "answer": "yes"}) + "\n")
    lines = (json.dumps({"image": "new.png", "question": f"{n}?", "answer": "no"}) + "\n" for n in range(20))
    (tmp_path / "new.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    ingest_jsonl(tmp_path / "old.jsonl", out)
    old = contents(out)
    # 20 questions are about 3 kB: less than a write buffer (8 kB), more than the limit; the one study fits in it.
    assert run(INGEST, tmp_path / "new.jsonl", out, 1_000).returncode == 1
    assert {name: content for name, content in contents(out).items() if name in old} == old
    assert [question.text for question in load_questions(out)] == ["Old?"]
