"""The installed tensorrt_llm, asked: its version, its classes, and whether they are as the table of facts says. Imports it, builds nothing.

`tide doctor --trtllm-source` reads sources without importing them; this asks the live classes, right before they are relied upon.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tide_pipeline.engine.trtllm.facts import Fact, Loss, Table, table_for
from tide_pipeline.errors import SettingsError


def package() -> ModuleType:
    """tensorrt_llm itself. Raises SettingsError where there is none."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise SettingsError("backend trtllm needs the package tensorrt_llm: serve in NVIDIA's container (docs/gpu-quickstart.md), or use "
                            "an engine with backend = \"embedded\"")
    return importlib.import_module("tensorrt_llm")


def installed_table() -> Table:
    """Facts about the version that is here. Raises SettingsError."""
    return table_for(str(package().__version__))


def symbol(fact: Fact) -> Any:
    """The class that a fact speaks of, or the function; of a method, its class. Raises what importing raises, AttributeError."""
    module = importlib.import_module(fact.import_from)
    return getattr(module, fact.name.partition(".")[0])


def fields_of(table: Table) -> dict[str, frozenset[str]]:
    """By class of settings: the fields that it takes, as it says itself."""
    found = {}
    for fact in table.facts:
        if fact.kind == "model":
            found[fact.name] = _names(symbol(fact))
    return {name: names for name, names in found.items() if names}


def what_is_wrong(table: Table, loss: Loss) -> list[str]:
    """One sentence for each fact whose absence costs `loss`, and which does not hold."""
    return [f"{fact.name}: {wrong}" for fact in table.facts if fact.loss == loss
            and not any(not list(_wrong(other)) for other in fact.others) for wrong in _wrong(fact)]


def _wrong(fact: Fact) -> Iterator[str]:
    try:
        found = symbol(fact)
    except (ImportError, AttributeError) as error:
        yield f"not there ({error})"
        return
    if fact.kind == "function":
        yield from _wrong_function(fact, found)
    elif fact.kind in ("class", "model"):
        there = _names(found)
        if there:                                      # of other classes `__init__` sets what there is: the sources tell (source_check)
            yield from (f"no field {name}" for name, field in fact.fields.items() if not field.optional and name not in there)


def _wrong_function(fact: Fact, found: Any) -> Iterator[str]:
    owner, _, method = fact.name.partition(".")
    function = getattr(found, method, None) if method else found
    if function is None:
        yield f"{owner} has no {method}"
        return
    if fact.signature is None:
        return
    wanted, taken = _parameters(fact.signature), list(inspect.signature(function).parameters.values())
    named = [p.name for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if any(p.kind is p.VAR_POSITIONAL for p in taken):     # a decorator that hides what is behind it
        wanted = wanted[: len(named)]
    if named[: len(wanted)] != wanted:
        yield f"takes ({', '.join(named)}), expected ({', '.join(wanted)})"
    more = [p.name for p in taken[len(wanted):] if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if more:
        yield f"also needs {', '.join(more)}"


def _parameters(signature: str) -> list[str]:
    definition = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    a = definition.args
    return [p.arg for p in (*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs)]


def _names(found: Any) -> frozenset[str]:
    """Fields of a class of settings or of data, by all their names, and what pydantic keeps on the class; empty for other classes."""
    fields = getattr(found, "model_fields", None) or getattr(found, "__dataclass_fields__", None) or {}
    return frozenset({*fields, *(alias for field in fields.values() for alias in _aliases(field)), *getattr(found, "__class_vars__", ())})


def _aliases(field: Any) -> Iterator[str]:
    for alias in (getattr(field, "alias", None), getattr(field, "validation_alias", None)):
        for choice in getattr(alias, "choices", [alias]):
            if isinstance(choice, str):
                yield choice
