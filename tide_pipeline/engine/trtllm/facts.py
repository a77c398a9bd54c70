"""What we rely on in each version line of TensorRT-LLM, why, and what is lost without it. Knows the tables, not the server.

One table for each line (`facts/1.2.toml` ..). Three readers: `source_check` holds it against NVIDIA's sources, the adapter asks it what a
version calls things, and the tests generate a stand-in from it. A fact is written down once, there.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tide_pipeline.errors import SettingsError

LINES = ("1.2", "1.3", "1.4")
FOLDER = Path(__file__).parent / "facts"
ANY = "?"                              # a default that we do not rely on

Kind = Literal["model", "class", "function", "code"]
Access = Literal["public", "private"]
# What is lost without it. `fatal`: the adapter refuses to start; everything else is told once and served without.
Loss = Literal["fatal", "capture", "metric", "draft length", "in-place draft"]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a class, or a parameter: its default as Python source, `?` where any will do, None where there must be none."""

    default: str | None = ANY
    optional: bool = False             # we ask whether it is there before we use it
    alias: tuple[str, ...] = ()        # other names that set it


@dataclass(frozen=True, slots=True)
class Fact:
    """One symbol of TensorRT-LLM.

    model     a class of settings that refuses unknown keys: `fields`, and `absent` ones that an older or newer line has
    class     fields or attributes that must be there
    function  `signature`: parameters by place, name and default; `returns`: keys of a dict that it returns; `contains`: expressions in it
    code      no symbol of its own: expressions in the module (`contains`)

    A line is years of release candidates. `others` is the same fact as others of them have it (`[[fact.or]]`: the entries that differ); one
    of them has to be true.
    """

    name: str
    kind: Kind
    module: str                        # where it is defined
    access: Access
    use: str
    loss: Loss
    fields: Mapping[str, Field] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    signature: str | None = None
    returns: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    public_name: str | None = None     # where we import it from, when that is not `module`
    others: tuple[Fact, ...] = ()

    @property
    def import_from(self) -> str:
        return self.public_name or self.module


@dataclass(frozen=True, slots=True)
class Layout:
    """How a pass lies in memory; the words are those of engine/trtllm/layout.py."""

    order: tuple[str, ...]             # kinds of rows, in their order
    generation_row: str                # first row of generation i
    draft_length: str                  # attribute of the spec metadata that is K of this pass
    new_tokens: tuple[str, ...]        # shape
    new_tokens_lens: tuple[str, ...]
    hidden_states: tuple[str, ...]
    schedule: str                      # what a key of draft_len_schedule means: "from" this batch size on, or "up to" it


@dataclass(frozen=True, slots=True)
class Table:
    """All facts of a version line."""

    line: str
    layout: Layout
    facts: tuple[Fact, ...]
    names: Mapping[str, Any]           # strings on the wire: statistics, environment variables, decoding types

    def __getitem__(self, name: str) -> Fact:
        for fact in self.facts:
            if fact.name == name:
                return fact
        raise KeyError(f"no fact {name!r} in the table of TensorRT-LLM {self.line}")

    def __contains__(self, name: str) -> bool:
        return any(fact.name == name for fact in self.facts)

    @property
    def nested(self) -> Mapping[str, str]:
        """Arguments of LLM that are classes of settings themselves, with the name of the class; a draft's is named by its decoding type."""
        return {"kv_cache_config": "KvCacheConfig", "cuda_graph_config": "CudaGraphConfig",
                "speculative_config": f"{self.names['decoding_type']}DecodingConfig"}

    def fields(self, name: str) -> Mapping[str, Field]:
        return self[name].fields


def table_for(version: str) -> Table:
    """The table for an installed version, such as "1.2.1" or "1.3.0rc20". Raises SettingsError for a line that has none."""
    found = re.match(r"(\d+\.\d+)(?:\D|$)", version)
    if found is None or found[1] not in LINES:
        raise SettingsError(f"no facts about TensorRT-LLM {version}: known lines are {', '.join(LINES)}. Copy the nearest table in "
                            f"tide_pipeline/engine/trtllm/facts/ and correct it with `tide doctor --trtllm-source DIR`")
    return load_table(found[1])


@functools.cache
def load_table(line: str) -> Table:
    return parse((FOLDER / f"{line}.toml").read_text(), line)


def parse(text: str, line: str) -> Table:
    """Raises SettingsError where a table contradicts the forms above: it is edited by hand."""
    raw = tomllib.loads(text)
    if raw.get("line") != line:
        raise SettingsError(f"facts/{line}.toml says line = {raw.get('line')!r}")
    facts = tuple(_fact(entry, line) for entry in raw.get("fact", ()))
    if twice := {fact.name for fact in facts if sum(other.name == fact.name for other in facts) > 1}:
        raise SettingsError(f"facts/{line}.toml has {', '.join(sorted(twice))} more than once")
    layout: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw["layout"].items()}
    return Table(line, Layout(**layout), facts, raw.get("names", {}))


def _fact(raw: dict[str, Any], line: str) -> Fact:
    where = f"facts/{line}.toml, {raw.get('name')}"
    others = raw.pop("or", ())
    raw = {**raw, "others": tuple(_fact({**raw, **other}, line) for other in others)}
    raw = {**raw, "fields": {name: _field(value, where) for name, value in raw.get("fields", {}).items()}}
    for name in ("absent", "returns", "contains"):
        raw[name] = tuple(raw.get(name, ()))
    try:
        fact = Fact(**raw)
        for text in fact.contains:
            ast.parse(text)
        if fact.signature is not None:
            ast.parse(f"def f{fact.signature}: ...")
    except (TypeError, SyntaxError) as error:
        raise SettingsError(f"{where}: {error}") from error
    for value, allowed in ((fact.kind, Kind), (fact.access, Access), (fact.loss, Loss)):
        if value not in get_args(allowed):
            raise SettingsError(f"{where}: {value!r} is none of {', '.join(get_args(allowed))}")
    return fact


def _field(raw: str | dict[str, Any], where: str) -> Field:
    given = {"default": raw} if isinstance(raw, str) else dict(raw)
    default = given.pop("default", ANY)
    if default == "required":
        default = None
    elif default != ANY:
        ast.parse(default, mode="eval")
    try:
        return Field(default, alias=tuple(given.pop("alias", ())), **given)
    except TypeError as error:
        raise SettingsError(f"{where}: {error}") from error
