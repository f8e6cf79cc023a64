"""Draw values of the chart from its schema: valid ones at random places, and wrong ones of every kind.

A draw changes the values of a profile at a few places. Texts are generated from the schema's patterns, so a pattern
that is too wide shows up as an object that Kubernetes refuses.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from re import _constants as op  # type: ignore[attr-defined]  # the standard library's own parser of patterns
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import yaml

from tests.chart.params_schema import SCHEMA
from tests.chart.rendering import CHART, PROFILES

Json = dict[str, Any]
Path = tuple[str | int, ...]
HIDDEN = "hunter2-never-shown"
# Not drawn: credentials, for which the security test searches, and objects that are not the chart's.
KEPT = (("store", "accessKey"), ("store", "secretKey"), ("git", "password"), ("extraObjects",))
# Nor are volumes and their mounts, which have to agree with each other.
FREE = ("volumes", "volumeMounts")
_ASCII = [chr(code) for code in range(33, 127)]
_WORDS = [
    "a",
    "B",
    "0",
    "yes",
    "null",
    "1e3",
    "123",
    "x-y",
    "two words",
    "é",
    "{{ .Release.Name }}",
    "a: b",
    "#",
    "%s",
    '"',
]
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdigit,
    op.CATEGORY_NOT_DIGIT: lambda char: not char.isdigit(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    op.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    op.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


def _is_kept(path: Path) -> bool:
    return path in KEPT or any(name in FREE for name in path)


class Change(NamedTuple):
    """A value at a place, or its removal (as null does in Helm)."""

    path: Path
    value: Any = None
    removed: bool = False


class ValueDraws:
    """Draws sets of values from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.schema: Json = json.loads(SCHEMA.read_text(encoding="utf-8"))
        self.paths = [path for path in _list_places(self.schema, self.schema) if not _is_kept(path)]

    def draw_changes(self) -> list[Change]:
        """Draw one to six valid changes."""
        paths = self.random.sample(self.paths, self.random.randint(1, 6))
        return [Change(path, self.draw_value(find_schema(self.schema, path))) for path in paths]

    def draw_mistake(self, values: Json) -> Change:
        """Draw a removed value, one of another type, or a misspelt name, somewhere in the values."""
        path = self.random.choice([one for one in _list_values(values) if not _is_kept(one)])
        kind = self.random.choice(["null", "type", "name"])
        if kind == "null":
            return Change(path, removed=True)
        if kind == "type":
            return Change(path, self._draw_other_type(read_value(values, path)))
        return Change((*path[:-1], f"{path[-1]}x") if isinstance(path[-1], str) else path, {"no": 1})

    def _draw_other_type(self, old: Any) -> Any:
        if isinstance(old, dict | list):
            return self.random.choice([1, True, "text"])
        return self.random.choice([{"x": 1}, [{"x": []}], 1.5 if isinstance(old, str | bool) else "text"])

    def draw_value(self, schema: Json) -> Any:
        """Draw a value that the schema allows, as far as its combinations can be satisfied one by one."""
        schema = _resolve(self.schema, schema)
        if isinstance(schema.get("not"), dict) and "enum" in schema["not"]:
            return self._avoid(schema)
        for key in ("oneOf", "anyOf"):
            if key in schema and "properties" not in schema:
                return self.draw_value(self.random.choice(schema[key]))
        if "allOf" in schema and "properties" not in schema:
            return self.draw_value(_merge_all(self.schema, schema["allOf"]))
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.random.choice(schema["enum"])
        kind = schema.get("type", "object")
        if isinstance(kind, list):
            kind = self.random.choice(kind)
        draws = {
            "object": self._draw_object,
            "array": self._draw_array,
            "string": self._draw_text,
            "integer": self._draw_integer,
            "number": self._draw_number,
            "boolean": lambda _: self.random.random() < 0.5,
            "null": lambda _: None,
        }
        return draws[kind](schema)

    def _avoid(self, schema: Json) -> Any:
        rest = {key: value for key, value in schema.items() if key != "not"}
        while (drawn := self.draw_value(rest)) in schema["not"]["enum"]:
            pass
        return drawn

    def _draw_object(self, schema: Json) -> Json:
        properties = schema.get("properties", {})
        needed = set(schema.get("required", ()))
        if "oneOf" in schema:
            needed |= set(self.random.choice(schema["oneOf"]).get("required", ()))
        few = self.random.sample(sorted(properties), min(len(properties), self.random.randint(0, 4)))
        chosen = {name for name in needed | set(few) if name not in FREE}
        if not chosen and schema.get("minProperties"):
            chosen = {self.random.choice(sorted(properties))}
        out = {name: self.draw_value(properties[name]) for name in sorted(chosen)}
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            names = schema.get("propertyNames", {"pattern": "^[a-z]{1,3}$"})
            for _ in range(self.random.randint(0, 2)):
                out[self.draw_value({"type": "string", **names})] = self.draw_value(more)
        return out

    def _draw_array(self, schema: Json) -> list[Any]:
        fewest = schema.get("minItems", 0)
        length = self.random.randint(fewest, min(fewest + 2, schema.get("maxItems", 9)))
        return [self.draw_value(schema.get("items", {"type": "string"})) for _ in range(length)]

    def _draw_text(self, schema: Json) -> str:
        if "pattern" in schema:
            return self.draw_matching(schema["pattern"])
        word = self.random.choice(_WORDS)
        return word if schema.get("minLength") or self.random.random() < 0.8 else ""

    def _draw_integer(self, schema: Json) -> int:
        low: int = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        high: int = schema.get("maximum", low + 2_000_000)
        return self.random.choice([low, high, self.random.randint(low, min(high, low + 5))])

    def _draw_number(self, schema: Json) -> float:
        low: float = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high: float = schema.get("maximum", schema.get("exclusiveMaximum", low + 1))
        return float(low + (high - low) * self.random.uniform(0.1, 0.9))

    def draw_matching(self, pattern: str) -> str:
        """Draw a text that matches a pattern, of printable ASCII."""
        text = self._expand(_parser.parse(pattern))
        assert re.search(pattern, text), (pattern, text)
        return text

    def _expand(self, tokens: Any) -> str:
        return "".join(self._expand_token(kind, content) for kind, content in tokens)

    def _expand_token(self, kind: Any, content: Any) -> str:
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, inner = content
            times = self.random.choice([least, min(most, least + 1), min(most, least + self.random.randint(0, 60))])
            return "".join(self._expand(inner) for _ in range(times))
        if kind is op.SUBPATTERN:
            return self._expand(content[-1])
        if kind is op.BRANCH:
            return self._expand(self.random.choice(content[1]))
        if kind is op.LITERAL:
            return chr(content)
        if kind is op.AT:
            return ""
        return self.random.choice([char for char in _ASCII if _matches(kind, content, char)])


def _matches(kind: Any, content: Any, char: str) -> bool:
    if kind is op.ANY:
        return True
    if kind is op.NOT_LITERAL:
        return bool(ord(char) != content)
    negated = content[0][0] is op.NEGATE
    return bool(negated) != any(_is_in(part, inner, char) for part, inner in content[negated:])


def _is_in(kind: Any, content: Any, char: str) -> bool:
    if kind is op.LITERAL:
        return bool(ord(char) == content)
    if kind is op.RANGE:
        return bool(content[0] <= ord(char) <= content[1])
    return _CATEGORIES[content](char)


_INGRESS = {"kind": "Ingress", "hosts": ["a.example", "*.b.example"], "tlsSecret": "tls", "className": "nginx"}
_KSERVE_GATEWAY = {"service": "gateway", "namespace": "kserve", "host": "clincot.example.com"}
_PARENTS = [{"name": "public", "namespace": "gateways", "sectionName": "https"}]
_HTTP_ROUTE = {"kind": "HTTPRoute", "hosts": ["a.example"], "parentRefs": _PARENTS}
_ACCOUNTS = ("runner", "deployer", "server", "scheduler", "store", "bucket", "trainer")
_INGRESS_PODS = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]
KSERVE_ROUTE: Json = {"server": {"route": {**_HTTP_ROUTE, "gateway": _KSERVE_GATEWAY}}}
# Sets of values that only work together, which single draws would hardly meet.
TOGETHER: list[Json] = [
    {
        "server": {"mode": "blue-green", "route": _INGRESS},
        "networkPolicy": {"ingressController": _INGRESS_PODS},
    },
    {"server": {"mode": "blue-green", "route": _HTTP_ROUTE}, "networkPolicy": {"ingressController": _INGRESS_PODS}},
    KSERVE_ROUTE,
    {
        "serviceAccounts": {"create": False, "names": {name: f"team-{name}" for name in _ACCOUNTS}},
        "rbac": {"create": False},
    },
]


def read_bases() -> list[Json]:
    """Return complete values to start from: the defaults and the profiles, with credentials, also with TOGETHER."""
    defaults: Json = yaml.safe_load((CHART / "values.yaml").read_text())
    bases = [merge(defaults, {"store": {"existingSecret": "s3"}})]
    bases += [merge(bases[0], more) for more in TOGETHER]
    for profile in PROFILES:
        values = yaml.safe_load((CHART / f"values-{profile}.yaml").read_text())
        keys = {} if values["store"].get("existingSecret") else {"accessKey": HIDDEN, "secretKey": HIDDEN}
        bases.append(merge(merge(defaults, values), {"store": keys}))
    return bases


def merge(below: Json, above: Json) -> Json:
    """Return the values, overridden as Helm does: maps are merged, all else is replaced."""
    out = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def apply_changes(values: Json, changes: Sequence[Change]) -> Json:
    """Return a copy of the values with the changes; one whose place is gone has no effect."""
    out = copy.deepcopy(values)
    for change in changes:
        part = read_value(out, change.path[:-1])
        last = change.path[-1]
        if isinstance(part, list) and not (isinstance(last, int) and last < len(part)):
            continue
        if change.removed and part is not None:
            del part[last]  # type: ignore[arg-type]
        elif isinstance(part, dict | list):
            both = isinstance(change.value, dict) and isinstance(part, dict) and isinstance(part.get(last), dict)
            part[last] = merge(part[last], change.value) if both else copy.deepcopy(change.value)  # type: ignore[index, call-overload]
    return out


def read_value(values: Any, path: Path) -> Any:
    """Return the value at a place; None if there is none."""
    for key in path:
        present = isinstance(values, dict) and key in values
        if not present and not (isinstance(values, list) and isinstance(key, int) and key < len(values)):
            return None
        values = values[key]
    return values


def _list_values(values: Any, path: Path = ()) -> list[Path]:
    """Return every place in the values, except in free maps of labels and the like."""
    found: list[Path] = []
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        found += [(*path, key), *_list_values(value, (*path, key))]
    return found


def _list_places(root: Json, schema: Json, path: tuple[str, ...] = ()) -> list[Path]:
    """Return every named place in the schema."""
    found: list[Path] = []
    for name, inner in _resolve(root, schema).get("properties", {}).items():
        found += [(*path, name), *_list_places(root, inner, (*path, name))]
    return found


def find_schema(root: Json, path: Path) -> Json:
    """Return the schema of a place in the values."""
    schema = root
    for name in path:
        schema = _resolve(root, schema)["properties"][name]
    return schema


def _resolve(root: Json, schema: Json) -> Json:
    while "$ref" in schema:
        found = root
        for name in schema["$ref"].split("/")[1:]:
            found = found[name]
        schema = found
    return schema


def _merge_all(root: Json, parts: Sequence[Json]) -> Json:
    out: Json = {}
    for part in parts:
        out |= _resolve(root, part)
    return out
