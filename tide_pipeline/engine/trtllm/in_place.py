"""Put a draft into a running server. Private, opted into (serve.draft_swap = "in_place"), and only while no request runs.

Shapes, type and d2t must be those of the draft that is there: captured graphs hold its addresses. What was cached of it is dropped. The
files' digest is checked where they are read, and afterwards the weights that keep their name and shape are compared with them: a swap
that was dropped silently is known to have happened elsewhere (sgl-project/sglang#31674). Not run with NVIDIA's own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.trtllm.facts import Table
from tide_pipeline.engine.trtllm.installed import what_is_wrong
from tide_pipeline.errors import BuildError, RestartNeeded
from tide_pipeline.models.checkpoint import digest_draft

COMPARED = "fc.weight"                 # in every draft, never split or fused


def put_draft(llm: Any, table: Table, build: EngineBuild, is_remote: bool) -> None:
    """On every rank. Raises BuildError; RestartNeeded where this version has no way."""
    if wrong := what_is_wrong(table, "in-place draft"):
        raise RestartNeeded(f"a draft can't be put into this TensorRT-LLM while it runs ({'; '.join(wrong)}): set serve.draft_swap = "
                            "\"blue_green\"")
    folder = str(Path(build.path) / "draft")
    if is_remote:
        llm._collective_rpc("tide_put_draft", args=(folder, build.draft_digest))
    else:
        load_draft(llm._executor.engine, folder, build.draft_digest)


def load_draft(engine: Any, folder: str, digest: str) -> None:
    """In the process that holds the weights. Raises BuildError; the draft is then unknown, and the server must be replaced."""
    found = digest_draft(Path(folder))
    if digest and found != digest:
        raise BuildError(f"draft {folder} has digest {found[:16]}, expected {digest[:16]}: it was altered, build it again")
    weights, model = load_file(str(Path(folder) / "model.safetensors")), engine.model_engine.model
    check_d2t(model, weights)
    _between_passes(lambda: model.load_draft_weights(weights))
    engine.reset_prefix_cache()
    compare(dict(model.named_parameters()), weights)


def check_d2t(model: Any, weights: dict[str, Tensor]) -> None:
    """The draft vocabulary is in captured graphs too."""
    d2t = next((b for name, b in [*model.named_buffers(), *model.named_parameters()] if name.endswith("d2t")), None)
    if d2t is not None and "d2t" in weights and not torch.equal(d2t.cpu(), weights["d2t"].to(d2t.dtype)):
        raise RestartNeeded("this draft has another vocabulary (d2t): only a new server can serve it")


def compare(held: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Weights of the same name and shape must be those of the file. Raises BuildError where one is not, or none could be compared."""
    compared = 0
    for name, wanted in weights.items():
        same = [p for where, p in held.items() if where.endswith(name) and p.shape == wanted.shape]
        if name == COMPARED and same:
            compared += 1
            if not any(torch.equal(p.detach().cpu(), wanted.to(p.dtype)) for p in same):
                raise BuildError(f"after the swap {name} is not that of the file: the draft was not taken, restart this replica")
    if not compared:
        raise BuildError(f"after the swap {COMPARED} can't be found to compare it: restart this replica to be sure of its draft")


def _between_passes(call: Any) -> None:
    """No request runs; what the device was told before has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with torch.inference_mode():
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
