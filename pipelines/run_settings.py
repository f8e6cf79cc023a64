"""The settings of a run: checked once by the first task, then read by the others from the store.

A task of a pipeline gets one address instead of sections as JSON, because Argo keeps every argument of a task in up to
eight places of the Workflow object, which may have 1 MB (see workflow_size.py). The address is
`<store>/settings/<sha256>.json`. The file holds the sections that the task uses, and the data sets with their digests,
and its name is the hash of its content. So the address changes exactly if something changes that the task depends on,
and the cache of Kubeflow Pipelines recognizes the same work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord
from clincot.pipelines.params import JsonObject
from clincot.storage.artifacts import read_content, store_content
from clincot.storage.open import open_store

SETTINGS_FOLDER = "settings"
# {task, or tasks that share their settings: sections that it uses}
TASK_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "round": ("publish",),
    "prepare": ("prepare",),
    "generate": ("propose", "answer", "judge"),
    "pair": ("judge", "pair"),
    "version": ("version", "answer", "publish"),
    "train": ("train", "answer", "launch"),
    "evaluate": ("evaluate", "propose"),
    "decide": ("decide", "publish"),
    "publish": ("publish",),
    "deploy": ("deploy", "publish", "service"),
    "page": (
        "prepare",
        "propose",
        "answer",
        "judge",
        "pair",
        "version",
        "train",
        "evaluate",
        "decide",
        "publish",
    ),
}
_DATA = ("data", "data_digest")
_BENCHMARK = ("benchmark", "benchmark_digest")
# {task: data sets that it reads, with their digests, and what else its result depends on}
TASK_INPUTS: Mapping[str, tuple[str, ...]] = {
    "prepare": _DATA,
    "generate": (*_DATA, "panel_digest", "code"),
    "train": (*_DATA, "code"),
    "evaluate": (*_DATA, *_BENCHMARK, "code"),
    "decide": (*_DATA, *_BENCHMARK, "blind_from", "calibrated_on"),
    "publish": (*_BENCHMARK, "code"),
    "page": (*_DATA, *_BENCHMARK, "blind_from", "recipe"),
}


@dataclass(frozen=True)
class TaskSettings:
    """What a task works with. inputs: addresses and digests by name; store: address of the run's store."""

    sections: Mapping[str, JsonObject]
    inputs: Mapping[str, str]
    store: str

    def get_section(self, name: str) -> JsonObject:
        """Return a section. Raises InvalidRecord if the settings do not contain it."""
        if name not in self.sections:
            raise InvalidRecord(f"the settings of this task have no section {name!r}, only {', '.join(self.sections)}")
        return self.sections[name]


def write_task_settings(store: str, sections: Mapping[str, JsonObject], inputs: Mapping[str, str]) -> dict[str, str]:
    """Store the settings of every task; return their addresses, {task: address}.

    sections: checked sections by name. inputs: all names of TASK_INPUTS. Raises InvalidInput without a store.
    """
    if not store:
        raise InvalidInput("the run has no store: set the parameter `store` to a folder or s3://bucket/prefix")
    addresses = {}
    for task, names in TASK_SECTIONS.items():
        used = {name: inputs[name] for name in TASK_INPUTS.get(task, ())}
        addresses[task] = write_settings(store, {name: sections[name] for name in names}, used)
    return addresses


def write_settings(store: str, sections: Mapping[str, JsonObject], inputs: Mapping[str, str]) -> str:
    """Store settings under the hash of their content; return their address."""
    digest = store_content(open_store(store), SETTINGS_FOLDER, encode_settings(sections, inputs))
    return f"{store.rstrip('/')}/{SETTINGS_FOLDER}/{digest}.json"


def encode_settings(sections: Mapping[str, JsonObject], inputs: Mapping[str, str]) -> bytes:
    """Encode settings as canonical JSON: the same settings are the same bytes."""
    content = {"inputs": dict(inputs), "sections": {name: dict(section) for name, section in sections.items()}}
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode()


def read_task_settings(address: str) -> TaskSettings:
    """Read settings and check them against their digest.

    Raises ChecksumMismatch if the stored content has changed, InvalidInput for another address, KeyNotFound.
    """
    folder, _, name = address.rpartition("/")
    store, _, parent = folder.rpartition("/")
    if parent != SETTINGS_FOLDER or not store or not name.endswith(".json"):
        raise InvalidInput(
            f"expected the address of settings, <store>/{SETTINGS_FOLDER}/<sha256>.json, got {address!r}"
        )
    digest = name.removesuffix(".json")
    content = read_content(open_store(store), SETTINGS_FOLDER, digest, what="the settings")
    decoded: dict[str, Any] = json.loads(content)
    return TaskSettings(decoded["sections"], decoded["inputs"], store)
