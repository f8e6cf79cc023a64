"""The generated pages of the documentation, computed from the code that they describe.

    python -m tests.docs.generate --write

`PAGES` maps each page to the function that renders it. tests/docs/test_reference.py compares the committed pages with
what these functions return.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import json
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client.metrics import Counter, Histogram, MetricWrapperBase
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from benchmarks.inference_ways import render_ways
from benchmarks.round import render_round
from benchmarks.scaling import render_scaling
from benchmarks.speed import PARTS, read_figures
from benchmarks.training import render_training
from clincot import records
from clincot.cli.all_commands import render_command_table
from clincot.cli.app import main as run_command
from clincot.cli.reference import render_cli_reference
from clincot.config import FrozenConfig, Params, load_params
from clincot.config.params_yaml import is_inherited
from clincot.config.sections import SECTION_NAMES
from clincot.fields import FrozenModel
from clincot.records import Record
from clincot.registry.champion import Champion, ChampionMove, build_champion_key
from clincot.runs.exporter import LineStateCollector
from clincot.runs.history import RoundOutputs
from clincot.serving import metrics as server_metrics
from clincot.stages.catalog import ARTIFACTS, STAGES
from clincot.storage.folder_store import FolderStore
from clincot.text import markdown_table
from tests.chart.permissions import render_permission_tables
from tests.chart.policy_evaluation import render_traffic_tables
from tests.chart.readme import table as chart_values_table
from tests.docs.pipeline_graph import render_graph_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RECIPE = "small-model"
REGENERATE = "This page is generated; change the code and run `make docs-reference`."
# The file of a run folder or a data set in which each record is stored.
RECORD_FILES = {
    "Study": "`studies.jsonl` of a data set",
    "Question": "`questions.jsonl` of a data set and of a round",
    "Reference": "`references.jsonl` of a data set",
    "Region": "`regions.jsonl` of a round",
    "Candidate": "`candidates.jsonl` of a round",
    "Judgement": "`judgements.jsonl` of a round",
    "PanelScore": "`scores.jsonl` of a round",
    "PreferencePair": "`pairs.jsonl` of a round",
    "DataVersion": "`version.json` of a round",
    "Checkpoint": "`record.json` of a checkpoint folder",
    "Outcome": "`outcomes.jsonl` of a round, and of `base/`",
    "BenchmarkReport": "`report.json` of a round, and of `base/`",
    "Decision": "`decision.json` of a round",
    "StartingPolicy": "the output `champion` of `preflight`",
}


# ------------------------------------------------------------------------------------------------ types of fields


def describe_type(schema: Mapping[str, Any]) -> str:
    """Describe a JSON schema in a few words: "integer ≥ 1", "`ours` or `paper`", "list of Box"."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(describe_type(option) for option in schema["anyOf"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        items = schema.get("items")
        return f"list of {describe_type(items)}" if items else "list"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"map to {describe_type(values)}" if isinstance(values, dict) else "map"
    name = {"string": "text", "boolean": "true or false"}.get(kind, kind)
    return " ".join([name, *_list_bounds(schema)])


def _list_bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for key, sign in signs.items():
        if key in schema:
            yield f"{sign} {schema[key]:g}"


def _cell(text: str) -> str:
    """Text for a table cell, on one line; markdown_table escapes the bars."""
    return " ".join(text.split())


def _value(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _docstring(kind: type[Any]) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


# ------------------------------------------------------------------------------------------------ parameters


def render_params_reference() -> str:
    """Every section and field of params.yaml, with the neutral default and the value of the demo's recipe."""
    neutral, recipe = Params(), load_params(None, recipe=RECIPE)
    lines = [
        "# Parameters",
        "",
        REGENERATE,
        "",
        "The parameters of a round have one section for each stage. Later sources win: neutral defaults, recipe, "
        "`params.yaml`, `--set section.field=value`. `clincot params` prints the parameters that apply. Unknown keys "
        "and wrong values are refused by name.",
        "",
        f"The column *{RECIPE}* shows the value of the recipe that the demo uses, if it differs from the neutral "
        "default. Sources in brackets: [ClinCoT] arXiv 2603.01124, [UV-CoT] arXiv 2504.18397, [MMedPO] arXiv "
        "2412.06141, [ODPO] arXiv 2402.10571, [mDPO] arXiv 2406.11839.",
        "",
    ]
    nested: dict[str, type[FrozenConfig]] = {}
    for name in SECTION_NAMES:
        section: FrozenConfig = getattr(neutral, name)
        lines += _render_section(name, section, getattr(recipe, name), nested)
    for name, kind in nested.items():
        lines += _render_fields_of(name, kind)
    return "\n".join(lines).rstrip("\n") + "\n"


def _render_section(
    name: str, neutral: FrozenConfig, recipe: FrozenConfig, nested: dict[str, type[FrozenConfig]]
) -> list[str]:
    kind = type(neutral)
    properties = kind.model_json_schema()["properties"]
    rows = []
    # not model_dump, which leaves some fields out at their defaults
    before, after = ({name: to_jsonable_python(value) for name, value in section} for section in (neutral, recipe))
    for field, about in kind.model_fields.items():
        if is_inherited(name, field):
            continue
        _collect_nested(about.annotation, nested)
        shown = _value(before[field])
        if isinstance(getattr(neutral, field), FrozenConfig):
            shown = f"see {type(getattr(neutral, field)).__name__}"
        differs = before[field] != after[field] and not shown.startswith("see")
        rows.append(
            [
                f"`{name}.{field}`",
                _cell(describe_type(properties[field])),
                shown,
                _value(after[field]) if differs else "",
                _cell(about.description or ""),
            ]
        )
    head = ["parameter", "type", "default", RECIPE, "meaning"]
    return [f"## {name}", "", _docstring(kind), "", markdown_table(head, rows), ""]


def _collect_nested(annotation: Any, nested: dict[str, type[FrozenConfig]]) -> None:
    """Remember the models that a field holds, unless they are sections themselves."""
    sections = {type(getattr(Params(), name)) for name in SECTION_NAMES}
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, FrozenConfig) and part not in sections:
            nested[part.__name__] = part


def _render_fields_of(name: str, kind: type[FrozenConfig]) -> list[str]:
    properties = kind.model_json_schema()["properties"]
    rows = []
    for field, about in kind.model_fields.items():
        default = "required" if about.is_required() else _value(about.default)
        rows.append([f"`{field}`", _cell(describe_type(properties[field])), default, _cell(about.description or "")])
    return [f"## {name}", "", _docstring(kind), "", markdown_table(["field", "type", "default", "meaning"], rows), ""]


# ------------------------------------------------------------------------------------------------ artifacts


def render_artifacts_reference() -> str:
    """Every input and output of the stages, and which stages read and write it."""
    lines = [
        "# Stages and artifacts",
        "",
        REGENERATE,
        "",
        "A stage reads and writes named files and folders only. The list of stages is "
        "`src/clincot/stages/catalog.py`; the command line, the loop of rounds and the Kubeflow pipeline are built "
        "from it.",
        "",
        "## Stages",
        "",
        markdown_table(["stage", "device", "what it does", "inputs", "outputs"], [_stage_row(s) for s in STAGES]),
        "",
        "Inputs in *italics* are optional.",
        "",
        "## Artifacts",
        "",
        markdown_table(["artifact", "content", "written by", "read by"], [_artifact_row(n) for n in ARTIFACTS]),
        "",
    ]
    return "\n".join(lines)


def _stage_row(stage: Any) -> list[str]:
    inputs = [f"`{name}`" for name in stage.inputs] + [f"*`{name}`*" for name in stage.optional]
    outputs = [f"`{name}`" for name in stage.outputs]
    return [f"`{stage.name}`", stage.device, _cell(stage.about), ", ".join(inputs), ", ".join(outputs)]


def _artifact_row(name: str) -> list[str]:
    writers = [f"`{stage.name}`" for stage in STAGES if name in stage.outputs]
    readers = [f"`{stage.name}`" for stage in STAGES if name in (*stage.inputs, *stage.optional)]
    return [f"`{name}`", _cell(ARTIFACTS[name]), ", ".join(writers), ", ".join(readers)]


# ------------------------------------------------------------------------------------------------ metrics


def render_metrics_reference() -> str:
    """The Prometheus metrics of the server and of the exporter of a line's rounds."""
    head = ["metric", "type", "labels", "meaning"]
    lines = [
        "# Prometheus metrics",
        "",
        REGENERATE,
        "",
        "## Model server",
        "",
        "`clincot serve` answers `GET /metrics` with the metrics of KServe's SDK and these. No label contains request "
        "content. They are defined in `src/clincot/serving/metrics.py`.",
        "",
        markdown_table(head, [_server_row(metric) for metric in _list_server_metrics()]),
        "",
        "## Rounds of a model line",
        "",
        "`clincot store watch STORE --name LINE` serves these gauges. They are read from the store at every scrape, "
        "because rounds run in pods that end. They are defined in `src/clincot/runs/exporter.py`; the chart's alerts "
        "use them.",
        "",
        markdown_table(head, _list_line_metrics()),
        "",
    ]
    return "\n".join(lines)


def _list_server_metrics() -> list[MetricWrapperBase]:
    return [value for value in vars(server_metrics).values() if isinstance(value, MetricWrapperBase)]


def _server_row(metric: MetricWrapperBase) -> list[str]:
    (family,) = metric.describe()
    name = f"{family.name}_total" if isinstance(metric, Counter) else family.name
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    about = _cell(family.documentation)
    if isinstance(metric, Histogram):
        about += f" Buckets: {', '.join(f'{bound:g}' for bound in metric._upper_bounds[:-1])}."
    return [f"`{name}`", family.type, labels, about]


def _list_line_metrics() -> list[list[str]]:
    """The gauges of a line with a champion and one recorded round, for which the exporter reports all of them."""
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        move = ChampionMove(number=0, kind="base", sha256="0" * 64, reason="example")
        pointer = Champion(line="clincot", moves=(move,))
        store.write_new(build_champion_key("clincot"), pointer.model_dump_json().encode())
        outputs = RoundOutputs(number=1, digests={}, decision="decision-0", verdict="keep", agreement=0.5)
        store.write_new("rounds/clincot/0001/made.json", outputs.model_dump_json().encode())
        families = list(LineStateCollector(store, "clincot").collect())
    return [[f"`{family.name}`", family.type, "`line`", _cell(family.documentation)] for family in families]


# ------------------------------------------------------------------------------------------------ chart values


def render_values_reference() -> str:
    """Every value of the Helm chart."""
    lines = [
        "# Chart values",
        "",
        REGENERATE,
        "",
        "Every value of `charts/clincot`, from the comments of its `values.yaml`. Unknown keys are refused. Three "
        "files to start from are next to it: `values-production.yaml`, `values-trial.yaml` and `values-cpu.yaml`.",
        "",
        chart_values_table(),
        "",
    ]
    return "\n".join(lines)


def render_network_policies() -> str:
    """Who reaches whom in each profile of the chart, evaluated on the rendered network policies."""
    lines = [
        "# Network policies",
        "",
        REGENERATE,
        "",
        "What the chart's network policies allow in each profile. Everything else is denied for the pods of the "
        "release and of its runs, except DNS (port 53). Gateways and Prometheus are the namespaces in "
        "`networkPolicy.gateway` and `networkPolicy.prometheus`; those of an ingress controller or of a Gateway for "
        "`server.route` are in `networkPolicy.ingressController`, which is empty. *Any address* is inside and outside "
        "the cluster: a network policy cannot name a host, so an address outside the cluster opens its port to all of "
        "them. A Service (`http://minio.minio.svc:9000`) opens it to its namespace only, and an IP address to itself; "
        "otherwise, restrict it with `networkPolicy.apiServer`, `networkPolicy.store` and `networkPolicy.git`. An "
        "empty list there closes the way. Ports 443 and 6443 are the API server's (`networkPolicy.apiServerPorts`); "
        "those of store, data repository, proxy, judges, grounders, endpoint and Kubeflow follow from their "
        "addresses. vLLM's port 8085, which asks for no key, is reached "
        "inside its own pod only.",
        "",
        render_traffic_tables(),
    ]
    return "\n".join(lines)


def render_permissions() -> str:
    """The chart's service accounts and the permissions that its Roles grant them."""
    lines = [
        "# Accounts and permissions",
        "",
        REGENERATE,
        "",
        "The chart creates these service accounts and grants them what the tables list. `serviceAccounts.names` gives "
        "them other names. With `serviceAccounts.create=false` the chart creates none: `serviceAccounts.names` then "
        "names existing accounts, and one account may have several entries. With `rbac.create=false` the chart creates "
        "no Role, ClusterRole or binding, and somebody else grants the same. Preflight names each permission of "
        "rollouts and TrainJobs that is missing.",
        "",
        "The chart prints the Roles and bindings for your values (with Helm 4, `--dry-run=server` instead of "
        "`--validate`):",
        "",
        "```sh",
        "helm template clincot charts/clincot -n clincot -f my-values.yaml --set rbac.create=true --validate \\",
        "  --show-only templates/rbac.yaml",
        "```",
        "",
        "Give the runner's permissions also to the account of runs that are started in the UI with an empty field "
        "Service Account (`kfp.defaultAccount`).",
        "",
        render_permission_tables(),
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ records


def render_records_page() -> str:
    """Every record with its fields, whether the id covers them, and the comments of the source."""
    module = ast.parse(inspect.getsource(records))
    about, parts = [], []
    for node in module.body:
        kind = getattr(records, node.name, None) if isinstance(node, ast.ClassDef) else None
        if isinstance(node, ast.ClassDef) and inspect.isclass(kind) and kind.__module__ == records.__name__:
            if issubclass(kind, Record):
                about += [] if kind is Record else _render_record(kind, node)
            elif issubclass(kind, FrozenModel):
                parts += _render_model(kind, node, "###")
    lines = [
        "# Records",
        "",
        REGENERATE,
        "",
        inspect.cleandoc(records.__doc__ or ""),
        "",
        "The source is `src/clincot/records.py`. A record has the fields `version` (the schema's version) and `id` "
        "besides those of its table. The column *in id* says whether the id covers the field; the other fields are "
        "provenance. JSON Lines files hold one record on each line.",
        "",
        markdown_table(["record", "id begins with", "stored in"], _list_record_files()),
        "",
        "```mermaid",
        *_render_parent_diagram(),
        "```",
        "",
        *about,
        "## Parts of records",
        "",
        *parts,
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _list_record_files() -> Iterator[list[str]]:
    for name, file in RECORD_FILES.items():
        kind = getattr(records, name)
        yield [f"[{name}](#{name.lower()})", f"`{kind.prefix}-`", file]


def _render_parent_diagram() -> list[str]:
    """A diagram of which record names which: an arrow from the parent to the child that has its id."""
    parents = (
        ("Study", "Question"),
        ("Question", "Reference"),
        ("Question", "Region"),
        ("Region", "Candidate"),
        ("Candidate", "Judgement"),
        ("Candidate", "PanelScore"),
        ("Candidate", "PreferencePair"),
        ("PreferencePair", "DataVersion"),
        ("PreferencePair", "Checkpoint"),
        ("Checkpoint", "Outcome"),
        ("Reference", "Outcome"),
        ("Outcome", "Decision"),
    )
    return ["flowchart LR", *(f"  {parent} --> {child}" for parent, child in parents)]


def _render_record(kind: type[Record], node: ast.ClassDef) -> list[str]:
    return _render_model(kind, node, "##", hidden=("version", "id"), provenance=kind.provenance)


def _render_model(
    kind: type[BaseModel],
    node: ast.ClassDef,
    heading: str,
    *,
    hidden: Sequence[str] = (),
    provenance: frozenset[str] | None = None,
) -> list[str]:
    properties = kind.model_json_schema(mode="serialization")["properties"]
    comments = read_field_comments(kind)
    rows = []
    for name, field in kind.model_fields.items():
        if name in hidden:
            continue
        key = field.serialization_alias or field.alias or name
        schema = properties.get(key) or properties[name]
        about = comments.get(name, "") or field.description or ""
        row = [f"`{key}`", _cell(describe_type(schema))]
        if provenance is not None:
            row.append("no" if name in provenance else "yes")
        rows.append([*row, _cell(about)])
    head = ["field", "type", *(["in id"] if provenance is not None else []), "meaning"]
    return [f"{heading} {kind.__name__}", "", _docstring(kind), "", markdown_table(head, rows), ""]


def read_field_comments(kind: type[BaseModel]) -> dict[str, str]:
    """Read the comments of a model's fields: at the end of the field's lines, or on lines of their own above it."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    comments = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        number = node.lineno - 1
        while lines[number - 1].lstrip().startswith("#"):
            number -= 1
            above.insert(0, _comment_of(lines[number]))
        at_end = [_comment_of(line) for line in lines[node.lineno - 1 : node.end_lineno]]
        comments[node.target.id] = " ".join(part for part in (*above, *at_end) if part)
    return comments


def _comment_of(line: str) -> str:
    """The comment of a source line; "" without one. No field of a record has a # in its code."""
    return line.partition("#")[2].strip()


def render_cli_page() -> str:
    """The reference of the command line, with bars in code written so that GitHub and MkDocs both show a plain bar."""
    pattern = re.compile(r"`([^`\n]*\\\|[^`\n]*)`")
    return pattern.sub(lambda code: f"<code>{code[1].replace(chr(92) + '|', '&#124;')}</code>", render_cli_reference())


_PLAN_MARKS = ("<!-- generated: the output of the first command above -->", "<!-- end of the generated part -->")


def render_plan_guide() -> str:
    """The guide to `clincot plan` with the output of its first command."""
    text = (DOCS / "guides" / "plan.md").read_text(encoding="utf-8")
    before, rest = text.split(_PLAN_MARKS[0])
    after = rest.split(_PLAN_MARKS[1])[1]
    command = next(line for line in before.splitlines() if line.startswith("clincot plan "))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_command(command.split()[1:]) == 0
    tables = printed.getvalue().rstrip()
    block = f"```text\n{tables}\n```"
    return f"{before}{_PLAN_MARKS[0]}\n{block}\n{_PLAN_MARKS[1]}{after}"


_SPEED_MARKS = ("<!-- generated: the tables of benchmarks/speed.json -->", "<!-- end of the generated part -->")


def render_speed_page() -> str:
    """The page about speed with the tables of the last `make bench`."""
    text = (DOCS / "speed.md").read_text(encoding="utf-8")
    before, rest = text.split(_SPEED_MARKS[0])
    after = rest.split(_SPEED_MARKS[1])[1]
    figures = read_figures()
    tables = {
        "generation": render_ways,
        "judging": render_ways,
        "round": render_round,
        "training": render_training,
        "scaling": render_scaling,
    }
    blocks = [f"## {part.capitalize()}\n\n{tables[part](figures[part]).rstrip()}" for part in PARTS if part in figures]
    return "\n\n".join([f"{before}{_SPEED_MARKS[0]}", *blocks, f"{_SPEED_MARKS[1]}{after}"])


# The table of commands is no page, but it is generated and compared like one.
PAGES: dict[str, Callable[[], str]] = {
    "../src/clincot/cli/command_table.json": render_command_table,
    "concepts/records.md": render_records_page,
    "guides/plan.md": render_plan_guide,
    "kubeflow/graph.md": partial(render_graph_page, REGENERATE),
    "speed.md": render_speed_page,
    "reference/cli.md": render_cli_page,
    "reference/params.md": render_params_reference,
    "reference/artifacts.md": render_artifacts_reference,
    "reference/metrics.md": render_metrics_reference,
    "reference/values.md": render_values_reference,
    "reference/network-policies.md": render_network_policies,
    "reference/permissions.md": render_permissions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the generated pages of the documentation.")
    parser.add_argument("--write", action="store_true", help="Write them below docs/ instead of listing what changed.")
    args = parser.parse_args()
    for name, render in PAGES.items():
        path, text = DOCS / name, render()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        print(path.relative_to(ROOT))
        if args.write:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
