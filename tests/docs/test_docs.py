"""The documentation builds, its links and file names exist, and its commands are commands of the program."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.cli.app import parse

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md"))]
)
README_LINES = 130
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TOP_FOLDERS = "assets|benchmarks|charts|components|docs|examples|manifests|pipelines|recipes|scripts|src|tests"
_FILE_NAME = re.compile(rf"`((?:{_TOP_FOLDERS})/[\w./-]*)`")
_PLACEHOLDERS = ("NAME",)  # in a file name: any name


def read_page(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read_commands(page: Path) -> Iterator[str]:
    """Yield every command of the page's sh blocks, without its continuations and comments."""
    for language, block in _FENCE.findall(read_page(page)):
        if language == "sh":
            yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


CLINCOT_COMMANDS = [
    pytest.param(command, id=f"{name_page(page)}: {command[:70]}")
    for page in PAGES
    for command in read_commands(page)
    if command.removeprefix(".venv/bin/").startswith("clincot ")
]


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_relative_links_exist(page: Path) -> None:
    prose = _FENCE.sub("", read_page(page))
    targets = [link.partition("#")[0] for link in _LINK.findall(prose) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_named_files_exist(page: Path) -> None:
    """A file name in backticks that begins with a folder of the repository is a file or folder of it."""
    names = [name for name in _FILE_NAME.findall(read_page(page)) if not any(word in name for word in _PLACEHOLDERS)]
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("command", CLINCOT_COMMANDS)
def test_command_parses(command: str) -> None:
    """The command and its flags exist; nothing is run."""
    words = shlex.split(command, comments=True)
    if "--help" in words:
        with pytest.raises(SystemExit) as ended:
            parse(words[1:])
        assert ended.value.code == 0
    else:
        parse(words[1:])


def test_commands_are_found() -> None:
    assert len(CLINCOT_COMMANDS) > 40


def test_wrong_flag_is_found() -> None:
    with pytest.raises(SystemExit):
        parse(["rounds", "--no-such-flag"])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", read_page(ROOT / "Makefile"), re.MULTILINE))
    named: set[str] = set()
    for page in PAGES:
        named.update(re.findall(r"`make ([a-z0-9-]+)", read_page(page)))
        named.update(re.findall(r"^make ([a-z0-9-]+)", read_page(page), re.MULTILINE))
    assert named - targets == set()


def test_readme_is_short() -> None:
    assert len(read_page(ROOT / "README.md").splitlines()) <= README_LINES


def test_pages_have_one_title() -> None:
    for page in DOCS.rglob("*.md"):
        prose = _FENCE.sub("", read_page(page))
        assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1, name_page(page)


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    """Every page is in the navigation, and no link or anchor is broken."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    architecture = (tmp_path / "site" / "concepts" / "architecture.html").read_text(encoding="utf-8")
    assert architecture.count('class="mermaid"') == 3
    assert "fonts.googleapis.com" not in architecture
