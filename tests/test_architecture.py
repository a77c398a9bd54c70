"""The tree tells the story, and imports point one way (STYLE.md 1): read from the source, so lazy imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tide_pipeline"

# A part may import parts of its own line and of the lines above.
ORDER = ["contracts config engine_spec recipes errors provenance", "workloads", "deployment", "models", "engine", "capture", "serve",
         "drift", "training", "registry", "build", "gate", "rollout", "plan", "simulate", "report", "stack", "defs definitions", "cli"]
LEVEL = {part: i for i, line in enumerate(ORDER) for part in line.split()}

# Who may import what.
ONLY = {
    "dagster": ("defs", "definitions", "stack"),
    "dagster_pipes": ("defs", "stack", "training.__main__"),
    "mlflow": ("registry", "stack"),
    "tensorrt_llm": ("engine.trtllm",),
    "tritonclient": ("serve",),
    "duckdb": ("drift",),
}
STANDARD_ONLY = ("contracts", "config", "engine_spec", "recipes", "errors", "provenance")
BARE = ("models", "engine", "capture", "serve")


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name inside the package, and the parsed file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


def _only_for_types(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    """Absolute names that are imported anywhere inside, except under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _only_for_types(child):
            yield from _imports(ast.Module(child.orelse, []), package)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - child.level + 1], *([base] if base else [])])
            yield from ([f"{base}.{alias.name}" for alias in child.names] if base == "tide_pipeline" else [base])
        else:
            yield from _imports(child, package)


def _all_imports() -> Iterator[tuple[str, str]]:
    for name, tree in _modules():
        is_package = (PACKAGE / Path(*name.split("."))).is_dir()
        package = f"tide_pipeline.{name}" if is_package else f"tide_pipeline.{name}".rpartition(".")[0]
        for imported in _imports(tree, package):
            yield name, imported


def test_every_part_has_its_place_in_the_order() -> None:
    parts = {path.stem for path in PACKAGE.iterdir()
             if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())}
    assert parts <= LEVEL.keys(), f"give {sorted(parts - LEVEL.keys())} a place in ORDER, as STYLE.md does"


def test_imports_point_one_way() -> None:
    wrong = []
    for name, imported in _all_imports():
        if imported.startswith("tide_pipeline."):
            here, there = name.split(".")[0], imported.split(".")[1]
            if LEVEL.get(there, 0) > LEVEL.get(here, len(ORDER)):
                wrong.append(f"{name} imports {imported}")
    assert not wrong


@pytest.mark.parametrize(("library", "allowed"), ONLY.items())
def test_heavy_libraries_stay_in_their_rooms(library: str, allowed: tuple[str, ...]) -> None:
    wrong = [f"{name} imports {imported}" for name, imported in _all_imports()
             if imported.split(".")[0] == library and not any(name == place or name.startswith(f"{place}.") for place in allowed)]
    assert not wrong


def test_the_records_need_the_standard_library_alone() -> None:
    wrong = [f"{name} imports {imported}" for name, imported in _all_imports() if name in STANDARD_ONLY
             and imported.split(".")[0] not in sys.stdlib_module_names and not imported.startswith("tide_pipeline.")]
    assert not wrong


def test_the_reader_of_imports_sees_nested_and_relative_ones() -> None:
    tree = ast.parse("""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    import duckdb
    from . import sibling
    from ..errors import TideError
    from tide_pipeline import contracts
""")
    assert list(_imports(tree, "tide_pipeline.capture")) == ["typing", "shown", "duckdb", "tide_pipeline.capture", "tide_pipeline.errors",
                                                             "tide_pipeline.contracts"]


def test_serving_imports_with_four_packages_alone() -> None:
    """In production `models, engine, capture, serve` live inside NVIDIA's image, with its torch and without our other packages."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", BARE_IMPORT, *BARE], capture_output=True, text=True, timeout=300,
                          cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "tide_pipeline.engine.embedded" in done.stdout


BARE_IMPORT = """
import importlib, importlib.metadata, pkgutil, re, sys, types

def closure(names):
    found, todo = set(), list(names)
    while todo:
        name = re.sub("[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match("[A-Za-z0-9_.-]+", r)[0] for r in wanted if "extra ==" not in r]
    return found

# tokenizers asks for huggingface-hub but never imports it; with it half of site-packages would come in
allowed = closure(["torch", "pyarrow", "safetensors", "numpy"]) | {"tokenizers"}
blocked = {top for top, dists in importlib.metadata.packages_distributions().items()
           if top != "tide_pipeline" and top not in sys.stdlib_module_names
           and not any(re.sub("[-_.]+", "-", d).lower() in allowed for d in dists)}
assert {"dagster", "mlflow", "duckdb", "rich", "typer", "httpx", "psutil"} <= blocked and "torch" not in blocked

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not installed in NVIDIA's image", name=name)

sys.meta_path.insert(0, Block())
for name in [n for n in sys.modules if n.split(".")[0] in blocked]:
    del sys.modules[name]
class Triton(types.ModuleType):                   # Triton itself gives its models this module; any name is there
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return object

sys.modules["triton_python_backend_utils"] = Triton("triton_python_backend_utils")

for part in sys.argv[1:]:
    package = importlib.import_module(f"tide_pipeline.{part}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""
