"""Layouts of Hugging Face data sets on disk: which files are tables, and which split each belongs to.

FOLDER/dataset_dict.json, FOLDER/train/{state.json, dataset_info.json, data-00000-of-00001.arrow}
                                                  written by DatasetDict.save_to_disk (datasets 5.2.0)
FOLDER/data/train-00000-of-00002.parquet          a repository of the Hub
FOLDER/train.json, FOLDER/MM/test.jsonl           files named after their split
FOLDER/README.md                                  the data set's card, whose header may state the licence
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from clincot.datasets.ingest.archives import SourceTree
from clincot.datasets.ingest.ingest_report import DatasetAttribution
from clincot.jsonl import InvalidRecord

_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv")
# Files of a data set that are no tables of rows.
_NO_TABLES = frozenset(
    {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "metadata_info.json"}
)
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "validate": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class TableFile:
    """A table of a source and the split that its name states; "" if it states none."""

    name: str  # path in the source
    split: str


def find_tables(tree: SourceTree, source: Path) -> list[TableFile]:
    """List the tables, those of the test split first: a row that is in two splits is kept in test.

    A file is the only table; of a folder or an archive every table counts, but of several formats of one table (the
    same name with another suffix) only the first of Parquet, Arrow and text. Raises InvalidRecord if there is none.
    """
    if source.is_file() and source.name in tree.files and source.suffix.lower() != ".zip":
        return [TableFile(source.name, _find_split(source.name))]
    names = [name for name in tree.iter_names(*_SUFFIXES) if PurePosixPath(name).name not in _NO_TABLES]
    saved = _list_saved_tables(tree)
    names = saved or names
    if not names:
        raise InvalidRecord(f"{source}: expected tables ({', '.join(_SUFFIXES)}), found {len(tree.files)} other files")
    best: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _SUFFIXES.index(PurePosixPath(name).suffix.lower())):
        best.setdefault(str(PurePosixPath(name).with_suffix("")), name)
    tables = [TableFile(name, _find_split(name)) for name in sorted(best.values())]
    return sorted(tables, key=lambda table: table.split != "test")


def _list_saved_tables(tree: SourceTree) -> list[str]:
    """The Arrow files that save_to_disk's state.json lists; a cache of `map` beside them is not among them."""
    listed = []
    for name in tree.iter_names("state.json"):
        if PurePosixPath(name).name != "state.json":
            continue
        folder = PurePosixPath(name).parent
        state = _read_json_object(tree.get_path(name))
        for entry in state.get("_data_files", []):
            path = (folder / str(entry.get("filename"))).as_posix()
            if path not in tree.files:
                raise InvalidRecord(
                    f"{tree.root}: {name} lists the file {path}, which is missing; copy the whole folder"
                )
            listed.append(path)
    return listed


def _find_split(name: str) -> str:
    """The split that a path states: in its file's name, else in the folder nearest to it."""
    for part in reversed(PurePosixPath(name).with_suffix("").parts):
        words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLIT_WORDS]
        if len(set(words)) == 1:
            return words[0]
    return ""


def read_attribution(tree: SourceTree) -> DatasetAttribution:
    """The licence that the card's YAML header states; "" if there is no card or no header."""
    if "README.md" not in tree.files:
        return DatasetAttribution()
    text = tree.get_path("README.md").read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return DatasetAttribution()
    licence = header.get("license", "") if isinstance(header, dict) else ""
    return DatasetAttribution(licence=", ".join(map(str, licence)) if isinstance(licence, list) else str(licence))


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRecord(f"{path}: not JSON ({error}); copy the folder again") from None
    if not isinstance(content, dict):
        raise InvalidRecord(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
