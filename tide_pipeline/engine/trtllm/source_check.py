"""Hold the table of facts against NVIDIA's sources, or against the installed package. Parses files; imports and runs nothing of them."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tide_pipeline.engine.trtllm.facts import ANY, Fact, Field, Table, table_for
from tide_pipeline.engine.trtllm.source_tree import PACKAGE, FoundField, Function, SourceTree
from tide_pipeline.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Checked:
    """One fact, held against the source: true when nothing is wrong."""

    fact: Fact
    wrong: tuple[str, ...] = ()

    @property
    def is_true(self) -> bool:
        return not self.wrong


@dataclass(frozen=True, slots=True)
class SourceReport:
    """All facts of one line against one tree, and the files that were read."""

    version: str
    line: str
    checks: tuple[Checked, ...]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def lost(self) -> frozenset[str]:
        """What can't be relied on: "fatal", "capture", .. as the facts call it."""
        return frozenset(check.fact.loss for check in self.checks if not check.is_true)


def check_source(folder: Path, table: Table | None = None) -> SourceReport:
    """Raises SettingsError where the folder holds no TensorRT-LLM, or one whose line has no table."""
    tree = SourceTree(folder.resolve())
    if not tree.exists:
        raise SettingsError(f"{folder} holds no {PACKAGE}/__init__.py: name a checkout of NVIDIA/TensorRT-LLM, site-packages, "
                            f"or the package itself")
    version = tree.version()
    if table is None:
        if version is None:
            raise SettingsError(f"{folder}: {PACKAGE}/version.py says no version; is the checkout complete?")
        table = table_for(version)
    return SourceReport(version or "unknown", table.line, tuple(check_fact(tree, fact) for fact in table.facts), dict(tree.digests))


def check_installed() -> SourceReport | None:
    """The package that this interpreter would import; None where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return check_source(Path(next(iter(spec.submodule_search_locations))))


def check_fact(tree: SourceTree, fact: Fact) -> Checked:
    wrong = tuple(_wrong(tree, fact))
    return Checked(fact, () if any(check_fact(tree, other).is_true for other in fact.others) else wrong)


def _wrong(tree: SourceTree, fact: Fact) -> Iterator[str]:
    if tree.module(fact.module) is None:
        yield f"there is no module {fact.module}"
        return
    if fact.public_name and not tree.exports(fact.public_name, fact.name.partition(".")[0]):
        yield f"{fact.public_name} does not export {fact.name.partition('.')[0]}"
    if fact.kind == "function":
        yield from _function(tree, fact)
    elif fact.kind == "code":
        scope = tree.find(fact.module, fact.name)
        yield from _contents(scope[1] if scope else tree.module(fact.module), fact)
    else:
        yield from _class(tree, fact)


def _class(tree: SourceTree, fact: Fact) -> Iterator[str]:
    found = tree.find(fact.module, fact.name)
    if found is None or not isinstance(found[1], ast.ClassDef):
        yield f"{fact.module} has no class {fact.name}"
        return
    own = tree.fields(fact.module, fact.name)
    fields = {alias: found for found in own.values() for alias in found.alias} | own
    for name, expected in fact.fields.items():
        if name in fields:
            yield from _field(name, expected, fields[name])
        elif not expected.optional:
            yield f"no field {name}"
    yield from (f"field {name} is back" for name in fact.absent if name in fields)
    if fact.kind == "model" and not _refuses_unknown(tree, fact):
        yield "it no longer refuses unknown keys (extra=\"forbid\")"


def _field(name: str, expected: Field, found: FoundField) -> Iterator[str]:
    if expected.default == ANY:
        pass
    elif not found.is_known:
        yield f"{name} is set by code, its default can't be read; expected {expected.default}"
    elif (expected.default is None) != (found.default is None):
        yield f"{name} has {_text(found.default) or 'no default'}, expected {expected.default or 'none'}"
    elif expected.default is not None and not _equal(expected.default, found.default):
        yield f"{name} defaults to {_text(found.default)}, expected {expected.default}"
    if missing := [alias for alias in expected.alias if alias not in found.alias]:
        yield f"{name} is no longer called {', '.join(missing)} too"


def _refuses_unknown(tree: SourceTree, fact: Fact) -> bool:
    """`model_config = ConfigDict(extra="forbid")`, or the older inner `class Config`."""
    return any(re.search(r"extra'?\s*[=:]\s*'forbid'", ast.unparse(node))
               for _, definition in tree.lineage(fact.module, fact.name) for node in definition.body
               if isinstance(node, ast.Assign | ast.AnnAssign) or (isinstance(node, ast.ClassDef) and node.name == "Config"))


def _function(tree: SourceTree, fact: Fact) -> Iterator[str]:
    found = tree.function(fact.module, fact.name)
    if found is None:
        yield f"{fact.module} has no {fact.name}"
        return
    if fact.signature is not None:
        yield from _signature(fact.signature, found[1])
    if fact.returns and not any(set(fact.returns) <= keys for keys in _returned(found[1])):
        yield f"returns no dict with {', '.join(fact.returns)}"
    yield from _contents(found[1], fact)


def _signature(expected: str, found: Function) -> Iterator[str]:
    """Ours must fit: the same names at the same places, with the same defaults. More parameters are fine when they have a default."""
    wanted = ast.parse(f"def f{expected}: ...").body[0]
    assert isinstance(wanted, ast.FunctionDef)
    ours, theirs = _parameters(wanted), _parameters(found)
    for place, (name, default) in enumerate(ours.items()):
        if name not in theirs:
            yield f"no parameter {name}"
        elif not name.startswith("*") and list(theirs).index(name) != place:
            yield f"parameter {name} is number {list(theirs).index(name)}, expected {place}"
        elif (default is None) != (theirs[name] is None) or (default is not None and not _equal(default, theirs[name])):
            yield f"parameter {name} defaults to {_text(theirs[name]) or 'nothing'}, expected {_text(default) or 'nothing'}"
    yield from (f"parameter {name} is new and has no default" for name, default in theirs.items()
                if name not in ours and default is None and not name.startswith("**"))


def _parameters(function: Function) -> dict[str, ast.expr | None]:
    """By place; a name that can only be given by keyword begins with `*`."""
    args = function.args
    places = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(places) - len(args.defaults)), *args.defaults]
    found = {arg.arg: default for arg, default in zip(places, defaults, strict=True)}
    found |= {f"*{arg.arg}": default for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)}
    return found | ({f"**{args.kwarg.arg}": None} if args.kwarg else {})


def _returned(function: Function) -> Iterator[set[str]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            yield {key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _contents(scope: ast.AST | None, fact: Fact) -> Iterator[str]:
    if not fact.contains:
        return
    nodes = list(ast.walk(scope)) if scope else []
    terms = {id(side) for node in nodes if isinstance(node, ast.BinOp) for side in (node.left, node.right)}
    there = {_dump(node) for node in nodes if isinstance(node, ast.expr) and id(node) not in terms}    # whole: `x` is not said by `x + 1`
    yield from (f"nowhere does it say {text}" for text in fact.contains if _dump(ast.parse(text, mode="eval").body) not in there)


def _equal(expected: str | ast.expr, found: ast.expr | None) -> bool:
    node = ast.parse(expected, mode="eval").body if isinstance(expected, str) else expected
    return found is not None and _dump(node) == _dump(found)


def _dump(node: ast.expr) -> str:
    """The same for the same expression, read or written to, however it is laid out."""
    return ast.dump(node).replace("Store()", "Load()").replace("Del()", "Load()")


def _text(node: ast.expr | None) -> str:
    return ast.unparse(node) if node is not None else ""
