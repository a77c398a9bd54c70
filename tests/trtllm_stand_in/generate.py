"""From the table of facts to the files of a package. What the classes do comes from `runtime/`, copied beside them as `_stand_in`."""

from __future__ import annotations

import ast
import shutil
from collections import defaultdict
from pathlib import Path

from tide_pipeline.engine.trtllm.facts import ANY, Fact, Field, Table, load_table

VERSIONS = {"1.2": "1.2.1", "1.3": "1.3.0rc20", "1.4": "1.4.0rc0"}
RUNTIME = Path(__file__).parent / "runtime"
DATA = ("SpecMetadata", "Eagle3OneModelSpecMetadata", "SamplingParams", "CompletionOutput")
BASES = {"Eagle3OneModelSpecMetadata": "SpecMetadata", "LLM": "Server", "RequestOutput": "StreamedOutput", "LlmRequest": "RequestState",
         "ScheduledRequests": "Batch", "PyTorchModelEngine": "PassRunner"}
# What a method does, in words of the runtime; those that are not here return what the table says they return.
BODIES = {
    "LLM.generate_async": "return super().generate_async(inputs, sampling_params, streaming=streaming)",
    "LLM.get_stats_async": "return super().get_stats_async(timeout)",
    "LLM.shutdown": "super().shutdown()",
    "LLM._collective_rpc": "return super().collective_rpc(method, args, kwargs, unique_reply_rank)",
    "Eagle3OneModelSpecMetadata.__post_init__": "metadata.post_init(self)",
    "Eagle3OneModelSpecMetadata.prepare": "metadata.prepare(self)",
    "PyTorchModelEngine.forward": "return super().run({first})",
    "get_draft_len_for_batch_size": "return metadata.draft_len_for_batch_size(draft_len_schedule, batch_size)",
    "control_action_decorator": "return func if func is not None else lambda wrapped: wrapped",
}
HEAD = '''"""Generated from the table of facts about TensorRT-LLM {line} for tests. Nothing of NVIDIA's."""

from __future__ import annotations

import torch
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tensorrt_llm._stand_in import metadata
from tensorrt_llm._stand_in.api import Server
from tensorrt_llm._stand_in.outputs import StreamedOutput
from tensorrt_llm._stand_in.passes import PassRunner
from tensorrt_llm._stand_in.requests import Batch, RequestState
'''
STRICT = '''

class StrictBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, populate_by_name=True)
'''


def write_stand_in(folder: Path, line: str, table: Table | None = None, version: str | None = None) -> Path:
    """`folder/tensorrt_llm`, importable with `folder` on the path."""
    table = table or load_table(line)
    package = folder / "tensorrt_llm"
    shutil.copytree(RUNTIME, package / "_stand_in", ignore=shutil.ignore_patterns("__pycache__"))
    texts = module_texts(table)
    for name, text in texts.items():
        target = folder.joinpath(*name.split("."))
        is_package = any(other.startswith(f"{name}.") for other in texts)
        target = target / "__init__.py" if is_package else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for path in [p for p in package.rglob("*") if p.is_dir() and not (p / "__init__.py").exists()]:
        (path / "__init__.py").touch()
    (package / "version.py").write_text(f'__version__ = "{version or VERSIONS[line]}"\n')
    return package


def module_texts(table: Table) -> dict[str, str]:
    """Source by dotted name."""
    modules: dict[str, list[Fact]] = defaultdict(list)
    for fact in table.facts:
        modules[fact.module].append(fact)
    texts = {name: _module(table, name, facts) for name, facts in modules.items()}
    exports: dict[str, list[str]] = defaultdict(list)
    for fact in table.facts:
        if fact.public_name:
            exports[fact.public_name].append(f"from {fact.module} import {fact.name.partition('.')[0]}")
    for name, lines in exports.items():
        texts[name] = texts.get(name, "") + "\n".join(dict.fromkeys(sorted(lines))) + "\n"
    texts["tensorrt_llm"] = "from tensorrt_llm.version import __version__\n" + texts.get("tensorrt_llm", "")
    return texts


def _module(table: Table, name: str, facts: list[Fact]) -> str:
    text = HEAD.format(line=table.line)
    if any(fact.kind == "model" for fact in facts):
        text += STRICT
    if name.endswith("speculative.eagle3"):
        text += "\nfrom tensorrt_llm._torch.speculative.interface import SpecMetadata\n"
    owners = dict.fromkeys(fact.name.partition(".")[0] for fact in facts if "." in fact.name or fact.kind != "function")
    for owner in owners:
        text += _class(table, owner, [fact for fact in facts if fact.name.partition(".")[0] == owner])
    return text + "".join(f"\n\n{_function(fact, '')}" for fact in facts if fact.kind == "function" and "." not in fact.name)


def _class(table: Table, name: str, facts: list[Fact]) -> str:
    own = next((fact for fact in facts if fact.kind in ("class", "model")), None)
    base = "StrictBaseModel" if own is not None and own.kind == "model" else BASES.get(name, "object")
    lines = ["@dataclass(kw_only=True)" if name in DATA else "", f"class {name}({base}):", f'    """{(own or facts[0]).use}."""']
    if own is not None:
        lines += [f"    {_field(field_name, value, own.kind == 'model')}" for field_name, value in own.fields.items()]
    if name == "ScheduledRequests" and own is not None:
        lines += ["    def __init__(self) -> None:", *[f"        self.{field_name} = []" for field_name in own.fields]]
    if name == table.nested["speculative_config"]:
        lines += ["    def model_post_init(self, context: Any) -> None:", f"        metadata.check_eagle(self, {table.layout.schedule!r})"]
    methods = [_function(fact, "    ") for fact in facts if fact.kind == "function"]
    code = [_sayings(fact, "    ") for fact in facts if fact.kind == "code"]
    return "\n\n" + "\n".join(line for line in lines if line) + "\n" + "".join(f"\n{text}" for text in [*methods, *code])


def _field(name: str, value: Field, is_model: bool) -> str:
    default = "None" if value.default == ANY else value.default
    if (name, default) == ("decoding_type", "'Eagle'"):            # of the class, not of its objects: who gives it is refused
        return f"{name}: ClassVar[str] = {default}"
    if value.alias:
        names = ", ".join(repr(alias) for alias in (name, *value.alias))
        return f"{name}: Any = Field(default={default}, validation_alias=AliasChoices({names}))"
    if default is None:
        return f"{name}: Any"
    if default == "[]" and not is_model:
        return f"{name}: Any = field(default_factory=list)"
    return f"{name}: Any = {default}"


def _function(fact: Fact, indent: str) -> str:
    name, signature = fact.name.rpartition(".")[2], fact.signature or "(self, *args, **kwargs)"
    parameters = [arg.arg for arg in ast.parse(f"def f{signature}: ...").body[0].args.args]    # type: ignore[attr-defined]
    body = [f'{indent}    """{fact.use}."""']
    if fact.contains:
        body.append(_sayings(fact, f"{indent}    ").rstrip())
    if fact.name in BODIES:
        body.append(f"{indent}    {BODIES[fact.name].format(first=parameters[1] if len(parameters) > 1 else '')}")
    elif fact.returns:
        body.append(f"{indent}    return {{{', '.join(f'{key!r}: None' for key in fact.returns)}}}")
    return f"{indent}def {name}{signature}:\n" + "\n".join(body) + "\n"


def _sayings(fact: Fact, indent: str) -> str:
    """What the sources say there; for the reader of sources, never run."""
    self_ = "self, " if indent == "    " and fact.kind == "code" else ""
    return f"{indent}def _in_the_sources({self_}**names):\n" + "".join(f"{indent}    {text}\n" for text in fact.contains)
