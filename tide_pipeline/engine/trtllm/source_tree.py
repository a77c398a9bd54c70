"""Read classes, fields and functions of a Python package from its files. Parses, never imports. Knows no facts."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tide_pipeline.errors import SettingsError

PACKAGE = "tensorrt_llm"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class FoundField:
    """A field as it stands in the source. `default` None: there is none; `is_known` False: it is set somewhere, nobody can say to what."""

    default: ast.expr | None = None
    is_known: bool = True
    alias: tuple[str, ...] = ()


@dataclass
class SourceTree:
    """A folder that holds the package: a checkout, site-packages, or the package itself. Remembers what it read."""

    folder: Path
    digests: dict[str, str] = field(default_factory=dict)          # path inside the folder -> sha256
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder.name == PACKAGE and not (self.folder / PACKAGE).is_dir():
            self.folder = self.folder.parent

    @property
    def exists(self) -> bool:
        return (self.folder / PACKAGE / "__init__.py").is_file()

    def version(self) -> str | None:
        """`__version__` as it is written down; where that is computed, the constant that stands in for it."""
        tree = self.module(f"{PACKAGE}.version")
        found = [node.value.value for node in ast.walk(tree or ast.Module([], [])) if isinstance(node, ast.Assign)
                 and isinstance(node.value, ast.Constant) and any(ast.unparse(target) == "__version__" for target in node.targets)]
        return str(found[-1]) if found else None

    def module(self, name: str) -> ast.Module | None:
        """None where there is no such file."""
        if name not in self._trees:
            base = self.folder.joinpath(*name.split("."))
            path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
            self._trees[name] = self._read(path) if path else None
        return self._trees[name]

    def _read(self, path: Path) -> ast.Module:
        content = path.read_bytes()
        self.digests[path.relative_to(self.folder).as_posix()] = hashlib.sha256(content).hexdigest()
        try:
            return ast.parse(content, filename=str(path))
        except SyntaxError as error:
            raise SettingsError(f"{path}, line {error.lineno}: this Python can't parse it ({error.msg}). Run `tide doctor` with the Python "
                                "that serves it") from error

    def exports(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something, as far as the text tells."""
        return _says(self.module(module), name) or self._starred(module, name) is not None

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef | Function] | None:
        """A class or function of a module, or where the module takes it from: (module of the definition, definition)."""
        for _ in range(8):                                         # re-exports of re-exports, and other names of them
            tree = self.module(module)
            if tree is None:
                return None
            if (definition := _define(tree, name)) is not None:
                return module, definition
            if (origin := _imported(tree, name)) is not None:
                module, name = self._absolute(module, origin), _original(origin, name)
            elif (other := _other_name(tree, name)) is not None:
                name = other
            elif (starred := self._starred(module, name)) is not None:
                module = starred
            else:
                return None
        return None

    def _starred(self, module: str, name: str, passed: frozenset[str] = frozenset()) -> str | None:
        """The module from which `from .. import *` brings the name."""
        tree = self.module(module)
        for node in _statements(tree.body) if tree is not None and not name.startswith("_") else ():
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                origin = self._absolute(module, node)
                there = self.module(origin)
                if origin not in passed and _gives(there, name) and (
                        _says(there, name) or self._starred(origin, name, passed | {module, origin})):
                    return origin
        return None

    def _absolute(self, module: str, origin: ast.ImportFrom) -> str:
        if not origin.level:
            return origin.module or ""
        is_package = (self.folder.joinpath(*module.split(".")) / "__init__.py").is_file()
        parts = module.split(".")[: len(module.split(".")) - origin.level + is_package]
        return ".".join([*parts, *([origin.module] if origin.module else [])])

    def lineage(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases inside the package, nearest first."""
        todo, seen = [(module, name)], set()
        while todo:
            found = self.find(*todo.pop(0))
            if found is None:
                continue
            where, definition = found
            if not isinstance(definition, ast.ClassDef) or (where, definition.name) in seen:
                continue
            seen.add((where, definition.name))
            yield where, definition
            todo += [(where, ast.unparse(base)) for base in definition.bases if isinstance(base, ast.Name)]

    def fields(self, module: str, name: str) -> dict[str, FoundField]:
        """Fields, properties and attributes set on `self`, those of the bases included."""
        found: dict[str, FoundField] = {}
        lineage = [definition for _, definition in self.lineage(module, name)]
        for part in (_declared_in, _set_in):                       # what `__init__` sets may be declared by a base, with its default
            for definition in lineage:
                for key, value in part(definition).items():
                    found.setdefault(key, value)
        return found

    def function(self, module: str, name: str) -> tuple[ast.ClassDef | None, Function] | None:
        """`f` of a module or `Class.f`, inherited ones included, with the class that defines it."""
        owner, _, method = name.rpartition(".")
        if not owner:
            found = self.find(module, method)
            return (None, found[1]) if found and not isinstance(found[1], ast.ClassDef) else None
        for _, definition in self.lineage(module, owner):
            for node in definition.body:
                if isinstance(node, Function) and node.name == method:
                    return definition, node
        return None


def _declared_in(definition: ast.ClassDef) -> dict[str, FoundField]:
    found: dict[str, FoundField] = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = _declared(node.value)
        elif isinstance(node, ast.Assign):
            found |= {target.id: _declared(node.value) for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, Function) and any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
            found.setdefault(node.name, FoundField(is_known=False))
    return found


def _set_in(definition: ast.ClassDef) -> dict[str, FoundField]:
    return {name: FoundField(is_known=False) for node in definition.body if isinstance(node, Function) for name in _set_on_self(node)}


def _declared(value: ast.expr | None) -> FoundField:
    """`= 3`, `= Field(default=3, ..)`, `= field(default_factory=list)`, or nothing."""
    if not isinstance(value, ast.Call) or ast.unparse(value.func).rpartition(".")[2] not in ("Field", "field", "PrivateAttr"):
        return FoundField(value)
    given = {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
    default = given.get("default", value.args[0] if value.args else None)
    if "default_factory" in given:
        factory = ast.unparse(given["default_factory"])
        default = ast.parse({"list": "[]", "dict": "{}"}.get(factory, f"{factory}()"), mode="eval").body
    if isinstance(default, ast.Constant) and default.value is Ellipsis:
        default = None
    names = [node.value for key in ("alias", "validation_alias") if key in given for node in ast.walk(given[key])
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return FoundField(default, alias=tuple(names))


def _set_on_self(function: Function) -> Iterator[str]:
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        yield from (t.attr for t in targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those under `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse, *(s for h in getattr(node, "handlers", ()) for s in h.body)])


def _define(tree: ast.Module, name: str) -> ast.ClassDef | Function | None:
    return next((node for node in _statements(tree.body) if isinstance(node, ast.ClassDef | Function) and node.name == name), None)


def _imported(tree: ast.Module, name: str) -> ast.ImportFrom | None:
    return next((node for node in _statements(tree.body) if isinstance(node, ast.ImportFrom)
                 and any((alias.asname or alias.name) == name for alias in node.names)), None)


def _other_name(tree: ast.Module, name: str) -> str | None:
    """`Name = Other`: how a class that was renamed keeps its old name."""
    return next((node.value.id for node in _statements(tree.body) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
                 and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)), None)


def _says(tree: ast.Module | None, name: str) -> bool:
    return tree is not None and any(found(tree, name) for found in (_define, _imported, _other_name, _made_when_asked))


def _gives(tree: ast.Module | None, name: str) -> bool:
    """Whether a module's `__all__`, where it is written out, has the name."""
    listed = [node.value for node in (tree.body if tree else ()) if isinstance(node, ast.Assign)
              and isinstance(node.value, ast.List | ast.Tuple) and any(ast.unparse(target) == "__all__" for target in node.targets)]
    return not listed or any(isinstance(item, ast.Constant) and item.value == name for item in listed[0].elts)


def _made_when_asked(tree: ast.Module, name: str) -> bool:
    """A module with `__getattr__` (PEP 562) that has the name among its texts: in `__all__`, or in a table of what to import."""
    return _define(tree, "__getattr__") is not None and any(
        isinstance(text, ast.Constant) and text.value == name for node in tree.body if isinstance(node, ast.Assign)
        for text in ast.walk(node.value))


def _original(origin: ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in origin.names if (alias.asname or alias.name) == name)
