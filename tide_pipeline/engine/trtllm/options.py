"""One engine.toml and the settings as arguments of `LLM(**arguments)`, for each version line. Pure: knows the tables of facts, no server.

Plain values only, so that the same mapping is written to model.yaml and handed to LLM. A field is set under the name its class has; one
that a version does not have is left out where its default does the same, and refused with advice where it does not.

Never set: the built-in acceptance gate. It turns speculation off and never on again.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tide_pipeline.config import TideConfig
from tide_pipeline.engine.memory import graph_batches, step_tokens
from tide_pipeline.engine.trtllm.facts import Table
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import SettingsError

LATCHES = ("acceptance_window", "acceptance_length_threshold", "acceptance_rate_window_size", "acceptance_rate_threshold")
Installed = Mapping[str, Collection[str]]


def llm_arguments(spec: EngineSpec, config: TideConfig, table: Table, *, draft: str | None, model: str | None = None,
                  schedule: Mapping[int, int] | None = None, worker_extension: str | None = None,
                  installed: Installed | None = None) -> dict[str, Any]:
    """What LLM is built with.

    Args:
        draft: folder of the draft; None serves without speculation, and so without capture.
        model: folder of a snapshot; None is the hub's, at the pinned revision.
        schedule: draft length by the largest batch it is for, such as {4: 4, 16: 2, 64: 1}; in every version in these terms.
        worker_extension: "package.module.Class" for capture behind Ray.
        installed: fields of the installed classes by class name; they are believed where they differ from the table.

    Raises:
        SettingsError: the version lacks a field that is needed, or the settings contradict each other.
    """
    top, own = _Class("TorchLlmArgs", table, installed), spec.trtllm
    top["model"] = model or spec.repo
    if model is None:
        top["revision"] = spec.revision
    top["dtype"] = own.dtype
    top["tensor_parallel_size"] = config.serve.gpus
    top["max_batch_size"] = config.serve.max_batch
    top["max_num_tokens"] = step_tokens(config.serve, draft_length(spec, config))
    top["max_seq_len"] = spec.max_context
    top["enable_chunked_prefill"] = own.chunked_prefill
    top["stream_interval"] = own.stream_interval
    top["enable_iter_perf_stats"] = True
    top["kv_cache_config"] = _kv_cache(spec, table, installed)
    top["cuda_graph_config"] = _graphs(config, table, installed)
    if own.orchestrator and config.serve.gpus > 1:
        top["orchestrator_type"] = own.orchestrator
    if worker_extension:
        top["ray_worker_extension_cls"] = worker_extension
    if draft is not None:
        top["speculative_config"] = _speculation(spec, config, table, installed, draft, schedule)
    return _with_extra(top.values, own.extra, table, installed)


def draft_length(spec: EngineSpec, config: TideConfig) -> int:
    """The longest: the buffers and graphs of the server are made for it."""
    return min(spec.max_draft_length, config.speculation.max_draft_length)


def translate_schedule(schedule: Mapping[int, int], meaning: str, longest: int, max_batch: int) -> dict[int, int]:
    """From "up to this batch size" to what a version's keys mean: "up to", or "from" this batch size on.

    Raises:
        SettingsError: a length outside 1..longest (0 leaves the draft's KV cache stale), growing with the batch, or none for `max_batch`.
    """
    keys = sorted(schedule)
    lengths = [schedule[key] for key in keys]
    if not keys or keys[0] < 1 or keys[-1] < max_batch:
        raise SettingsError(f"draft length schedule {dict(schedule)} ends before serve.max_batch = {max_batch}: above its last key nothing "
                            f"would be drafted. Add {max_batch}: 1")
    if any(not 1 <= length <= longest for length in lengths) or lengths != sorted(lengths, reverse=True):
        raise SettingsError(f"draft length schedule {dict(schedule)}: lengths must fall from at most {longest} to at least 1. With 0 the "
                            "draft's KV cache goes stale and acceptance collapses for requests in flight")
    if meaning == "up to":
        return dict(zip(keys, lengths, strict=True))
    return dict(zip([1, *(key + 1 for key in keys[:-1])], lengths, strict=True))


def _kv_cache(spec: EngineSpec, table: Table, installed: Installed | None) -> dict[str, Any]:
    cache = _Class("KvCacheConfig", table, installed)
    cache["free_gpu_memory_fraction"] = spec.trtllm.kv_fraction
    cache["enable_block_reuse"] = spec.trtllm.kv_reuse
    cache["dtype"] = spec.trtllm.kv_dtype
    return cache.values


def _graphs(config: TideConfig, table: Table, installed: Installed | None) -> dict[str, Any]:
    """A batch between two sizes is padded to the larger."""
    graphs = _Class("CudaGraphConfig", table, installed)
    graphs["batch_sizes"] = list(graph_batches(config.serve.max_batch))
    graphs["enable_padding"] = True
    return graphs.values


def _speculation(spec: EngineSpec, config: TideConfig, table: Table, installed: Installed | None, draft: str,
                 schedule: Mapping[int, int] | None) -> dict[str, Any]:
    name, longest = table.nested["speculative_config"], draft_length(spec, config)
    eagle, listed = _Class(name, table, installed), table.fields(name)
    eagle["decoding_type"] = table.names["decoding_type"]
    eagle["speculative_model_dir" if "speculative_model_dir" in listed else "speculative_model"] = draft
    eagle["max_draft_len"] = schedule[min(schedule)] if schedule else longest      # a schedule must begin with it
    eagle["eagle3_layers_to_capture"] = list(spec.capture_layers)
    if "eagle3_one_model" in eagle:
        eagle["eagle3_one_model"] = True           # the two-model path has no buffer that capture could read
    if "allow_advanced_sampling" in eagle and not listed["allow_advanced_sampling"].optional:
        eagle["allow_advanced_sampling"] = True    # without it such a version decodes every request greedily
    if schedule is not None and not table.names["one_model_length_control"]:
        raise SettingsError(f"TensorRT-LLM {table.line} can't change the draft length by batch size where capture works (one-model "
                            "EAGLE-3): run speculative and plain replicas behind the front, or use 1.3 or later")
    if schedule is not None:
        eagle["draft_len_schedule"] = translate_schedule(schedule, table.layout.schedule, longest, config.serve.max_batch)
    return eagle.values


def unverified(spec: EngineSpec, table: Table) -> list[str]:
    """Names in [trtllm.extra] that our table does not have: the server itself will judge them when it starts."""
    return [key for name, value in _flat(spec.trtllm.extra, table) for key in value if key not in table.fields(name)]


def _with_extra(arguments: dict[str, Any], extra: Mapping[str, Any], table: Table, installed: Installed | None) -> dict[str, Any]:
    """[trtllm.extra] on top, one level deep; what the rest of engine.toml decides can't be set twice."""
    for name, values in _flat(extra, table):
        nested = {cls: field for field, cls in table.nested.items()}.get(name)
        place = arguments.setdefault(nested, {}) if nested else arguments
        known = _Class(name, table, installed)
        for key, value in values.items():
            if key in place:
                raise SettingsError(f"[trtllm.extra] sets {key}, which follows from other settings already: change those")
            known.take(key, value)
        place.update(known.values)
    return arguments


def _flat(extra: Mapping[str, Any], table: Table) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """By class: LLM's own arguments first."""
    yield "TorchLlmArgs", {key: value for key, value in extra.items() if key not in table.nested}
    for key, cls in table.nested.items():
        if isinstance(extra.get(key), Mapping):
            yield cls, extra[key]


class _Class:
    """Values for one of NVIDIA's classes of settings, which refuse unknown keys: so does this, with advice."""

    def __init__(self, name: str, table: Table, installed: Installed | None) -> None:
        self.name, self.line, self.values = name, table.line, dict[str, Any]()
        self._names = {field: (field, *fact.alias) for field, fact in table.fields(name).items()}
        self._is_installed = installed is not None and name in installed
        self._known = set(installed[name]) if installed is not None and name in installed else {
            field for field, fact in table.fields(name).items() if not fact.optional}

    def __contains__(self, field: str) -> bool:
        return field in self._known

    def __setitem__(self, field: str, value: Any) -> None:
        """Under the name that there is: the field's own, or one of its aliases."""
        for name in self._names.get(field, (field,)):
            if name in self._known:
                self.values[name] = value
                return
        raise SettingsError(self._unknown(field))

    def take(self, field: str, value: Any) -> None:
        """Somebody's own choice: what the table does not list is the server's to judge, unless it looks like a slip of the pen."""
        if field in LATCHES:
            raise SettingsError(f"{field} must stay unset: TensorRT-LLM's acceptance gate turns speculation off and never on again. "
                                "Drift is handled by the pipeline")
        if field not in self._known and (self._is_installed or difflib.get_close_matches(field, self._known, n=1, cutoff=0.85)):
            raise SettingsError(self._unknown(field))
        self.values[field] = value

    def _unknown(self, field: str) -> str:
        near = difflib.get_close_matches(field, self._known, n=1)
        return (f"TensorRT-LLM {self.line}: {self.name} has no field {field!r}" + (f", did you mean {near[0]!r}?" if near else ".")
                + f" If your version has it, correct tide_pipeline/engine/trtllm/facts/{self.line}.toml "
                "(`tide doctor --trtllm-source DIR` shows what differs)")
