"""Render the Triton model repository of an engine. Knows Triton's file formats; starts nothing.

    <into>/<target>/config.pbtxt      tensors, the queue, which settings file and replica
    <into>/<target>/1/model.py        imports TritonPythonModel from this package
    <into>/<target>/1/model.yaml      for TensorRT-LLM: what LLM is built with
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tide_pipeline.config import ServeSettings, TideConfig
from tide_pipeline.provenance import write_atomic
from tide_pipeline.serve.tensors import INPUTS, OUTPUTS, TensorSpec

CONFIG_PARAMETER = "tide_config"       # settings file, unless the environment has TIDE_CONFIG
REPLICA_PARAMETER = "tide_replica"

MODEL_PY = '''"""Rendered by tide_pipeline.serve.repository: edit that instead."""

import os
import sys

# Triton's stub runs an isolated interpreter, which does not read PYTHONPATH by itself.
sys.path.extend(place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in sys.path)

from tide_pipeline.serve.orphan import watch_parent  # noqa: E402

watch_parent()

from tide_pipeline.serve.model import TritonPythonModel  # noqa: E402, F401
'''


def render_model_repository(config: TideConfig, into: Path, *, replica: str, config_file: Path, model_yaml: str = "") -> Path:
    """Write the repository of `config.target` and return its folder, to be given to tritonserver as --model-repository."""
    model = into / config.target
    write_atomic(model / "1" / "model.py", MODEL_PY.encode())
    if model_yaml:
        write_atomic(model / "1" / "model.yaml", model_yaml.encode())
    write_atomic(model / "config.pbtxt", render_config(config, replica, config_file).encode())
    return into


def render_config(config: TideConfig, replica: str, config_file: Path) -> str:
    """config.pbtxt. The dynamic batcher never batches here (max_batch_size 0): it is the queue whose overflow Triton answers with 503."""
    deadline_us = int(config.serve.default_deadline_s * 1e6)
    return f'''# Rendered by tide_pipeline.serve.repository: edit that instead.
name: {json.dumps(config.target)}
backend: "python"
max_batch_size: 0

model_transaction_policy {{
  decoupled: true
}}

instance_group [
  {{
    count: 1
    kind: KIND_CPU
  }}
]

dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {triton_queue_size(config.serve)}
    default_timeout_microseconds: {deadline_us}
    timeout_action: REJECT
  }}
}}

input [
{_tensors(INPUTS)}
]

output [
{_tensors(OUTPUTS)}
]

{_parameter(CONFIG_PARAMETER, str(config_file))}
{_parameter(REPLICA_PARAMETER, replica)}
'''


def handed_over(serve: ServeSettings) -> int:
    """Requests that may wait inside the engine; the others wait in Triton's queue, where a client that leaves is noticed."""
    return min(serve.max_batch, max(1, serve.queue_size // 4))


def triton_queue_size(serve: ServeSettings) -> int:
    """All of them: a burst meets Triton's queue before any of it is handed over. 0 would mean no limit."""
    return max(1, serve.queue_size)


def _tensors(specs: Iterable[TensorSpec]) -> str:
    return ",\n".join(_tensor(spec, is_input=specs is INPUTS) for spec in specs)


def _tensor(spec: TensorSpec, is_input: bool) -> str:
    optional = "\n    optional: true" if is_input and spec.optional else ""
    return f'  {{\n    name: "{spec.name}"\n    data_type: {spec.data_type}\n    dims: [ {spec.dims} ]{optional}\n  }}'


def _parameter(key: str, value: str) -> str:
    return f"parameters {{\n  key: {json.dumps(key)}\n  value: {{ string_value: {json.dumps(value)} }}\n}}"
