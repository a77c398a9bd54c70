"""model.yaml of a Triton model repository: arguments of LLM as text. Knows the shape of the file, not what the arguments mean.

NVIDIA's own Triton model reads it too: keys outside `triton_config` go to LLM(**). Written without a YAML library, as blocks of mappings
whose values are JSON, which is YAML.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

TRITON = {"max_batch_size": 0, "decoupled": True}


def render_model_yaml(arguments: Mapping[str, Any], line: str) -> str:
    """The whole file for a version line."""
    head = f"# Rendered by `tide build` for TensorRT-LLM {line}: edit engine.toml or the settings instead, and build again."
    return "\n".join([head, *_block({"triton_config": TRITON, **arguments})]) + "\n"


def _block(values: Mapping[Any, Any], depth: int = 0) -> Iterator[str]:
    indent = "  " * depth
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _block(value, depth + 1)
        else:
            yield f"{indent}{key}: {json.dumps(value)}"
