"""The layer table as data: who may import whom, no cycles, every name used once, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import clincot

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {  # the packages of the installed distribution, and where their source is
    "clincot": REPOSITORY / "src" / "clincot",
    "clincot.pipelines": REPOSITORY / "pipelines",
    "clincot.components": REPOSITORY / "components",
}

# A package or root module imports from earlier lines only. The first line is the root modules, which may import each
# other as long as there is no cycle; on every other line, names joined by "+" are one room, the others are strangers.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("fields+records+geometry+config+errors+jsonl+images+text+batching+processes+waiting+prompts+drawing",),
    ("storage", "clients"),
    ("datasets", "models"),
    ("generation", "judging"),
    ("preferences", "training", "evaluation"),
    ("promotion", "registry"),
    ("deployment", "serving", "runs", "synthetic", "planning"),
    ("preflight", "reporting"),
    ("stages",),
    ("rounds",),
    ("comparison",),
    ("pipelines+components", "demo"),
    ("cli",),
    ("__main__",),
)
ROOMS = {name: (level, room) for level, rooms in enumerate(LAYERS) for room in rooms for name in room.split("+")}
MAX_ROOT_MODULES = 14
HEAVY = ("torch", "transformers", "kfp", "kubernetes")


@cache
def read_modules() -> dict[str, ast.Module]:
    """Every module of the distribution by its import name."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def list_imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Every clincot module that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; this project writes imports out"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in modules:
                    yield full
                elif node.module in modules:
                    yield node.module


def build_import_graph() -> dict[str, set[str]]:
    modules = read_modules()
    return {name: set(list_imports(tree, {*modules})) - {name, "clincot"} for name, tree in modules.items()}


def find_upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports from the same line (another room) or a later line of the table."""
    found = []
    for module, imported in sorted(graph.items()):
        if module == "clincot":
            continue
        level, room = ROOMS[module.split(".")[1]]
        for other in sorted(imported):
            other_level, other_room = ROOMS[other.split(".")[1]]
            if other_room != room and other_level >= level:
                found.append(f"{module} imports {other}")
    return found


def test_every_package_is_in_the_table() -> None:
    assert {module.split(".")[1] for module in read_modules() if module != "clincot"} == {*ROOMS}


def test_imports_point_downwards() -> None:
    assert find_upward_imports(build_import_graph()) == []


def test_an_upward_import_would_be_found() -> None:
    """Two of three are wrong: storage (line 1) may import records (line 0), not datasets (2) nor clients (also 1)."""
    graph = {"clincot.storage.s3": {"clincot.records", "clincot.datasets.folder", "clincot.clients.http"}}
    assert find_upward_imports(graph) == [
        "clincot.storage.s3 imports clincot.clients.http",
        "clincot.storage.s3 imports clincot.datasets.folder",
    ]


def test_there_is_no_import_cycle() -> None:
    try:
        TopologicalSorter(build_import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_root_stays_small() -> None:
    names = [path.name for path in FOLDERS["clincot"].glob("*.py") if path.name != "__init__.py"]
    assert len(names) <= MAX_ROOT_MODULES, f"a new module belongs into a package: {names}"


def test_a_module_name_is_used_once() -> None:
    """Apart from component.py: one a folder, as in Kubeflow's own component repositories. Packages do not count."""
    owners = defaultdict(list)
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py", "component.py"):
                owners[path.name].append(f"{package}/{path.relative_to(folder)}")
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


def test_a_class_name_is_used_once() -> None:
    owners = defaultdict(list)
    for module, tree in read_modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                owners[node.name].append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


def test_ruff_decides_the_layout() -> None:
    """No `fmt: skip`, and no comprehension inside another one's element or iterable."""
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "fmt: skip" not in text, path
            assert "fmt: off" not in text, path


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("module", sorted(read_modules()))
def test_comprehensions_are_not_nested(module: str) -> None:
    for outer in ast.walk(read_modules()[module]):
        if isinstance(outer, COMPREHENSIONS):
            inner = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS) and node is not outer]
            assert not inner, f"line {outer.lineno}: a comprehension within a comprehension; write a loop with names"
            assert len(outer.generators) < 2, f"line {outer.lineno}: a comprehension with two `for`; write a loop"


def list_heavy_imports(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    check = f"import sys; {statement}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[-1].split()


def test_a_heavy_import_would_be_found(tmp_path: Path) -> None:
    """`torch` as an empty module of our own: loading the real one would take seconds."""
    (tmp_path / "torch.py").write_text("")
    assert list_heavy_imports(f"sys.path.insert(0, {str(tmp_path)!r}); import torch") == ["torch"]


@pytest.mark.parametrize(
    "modules",
    [
        ("stages.catalog", "stages.runner"),
        ("cli.app",),
        ("rounds", "reporting.page", "reporting.lineage"),
        ("judging.panel", "preferences.pairs", "promotion.gate"),
        ("datasets.vqa_rad", "datasets.slake", "datasets.iu_xray", "datasets.jsonl_vqa"),
        ("registry.publication", "deployment.deployment", "deployment.targets.local", "deployment.prune"),
    ],
)
def test_nothing_heavy_is_imported(modules: tuple[str, ...]) -> None:
    assert list_heavy_imports("import " + ", ".join(f"clincot.{module}" for module in modules)) == []


def list_third_party(tree: ast.Module) -> set[str]:
    """Top-level names of everything a file imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_kubernetes_is_imported_by_its_client_only() -> None:
    found = {module for module, tree in read_modules().items() if "kubernetes" in list_third_party(tree)}
    assert found == {"clincot.clients.kubernetes"}


def test_kfp_is_imported_by_pipelines_and_components_only() -> None:
    """And by the command that runs them, when it is run."""
    kfp = {"kfp", "kfp_kubernetes", "kfp_server_api"}
    found = {module for module, tree in read_modules().items() if kfp & list_third_party(tree)}
    rooms = ("clincot.pipelines.", "clincot.components.")
    assert {module for module in found if not module.startswith(rooms)} <= {"clincot.cli.pipeline_commands"}


@pytest.mark.parametrize("package", ["datasets", "generation", "judging", "evaluation", "promotion"])
def test_only_the_protocols_of_models_are_known(package: str) -> None:
    for module, imported in build_import_graph().items():
        if module.startswith(f"clincot.{package}."):
            models = {other for other in imported if other.startswith("clincot.models")}
            assert models <= {"clincot.models.protocols"}, module


def list_names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


ANSWER_KEY = {"Reference", "load_references", "REFERENCES"}


def test_the_answer_key_is_not_read_by_what_makes_preference_data() -> None:
    """judging.labelled_answers is the exception by purpose: calibration is fitted on a labelled set of its own."""
    for module, tree in read_modules().items():
        makes_data = module.startswith(("clincot.generation", "clincot.judging", "clincot.preferences"))
        if makes_data and module != "clincot.judging.labelled_answers":
            assert not list_names(tree) & ANSWER_KEY, module


def test_no_stage_before_evaluate_reads_the_answer_key() -> None:
    readers = {
        module.rpartition(".")[2]
        for module, tree in read_modules().items()
        if module.startswith("clincot.stages.") and list_names(tree) & (ANSWER_KEY | {"read_benchmark", "deciding"})
    }
    assert readers == {"decide", "evaluate"}


def test_the_table_is_about_the_installed_package() -> None:
    assert Path(clincot.__file__).resolve() == FOLDERS["clincot"] / "__init__.py"
