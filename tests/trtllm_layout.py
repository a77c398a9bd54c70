"""Reads the passes of a stand-in with the layout of a table, and says where it gave something else than the network computed.

Written from the table's words alone, as a reader of NVIDIA's memory would be; the stand-in lays its rows out by hand.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tests.trtllm_stand_in import stand_in
from tide_pipeline.engine.trtllm.facts import Layout

DRAFT_LENGTH, MAX_TOKENS = 3, 24
SCHEDULES = {"from": {1: 3, 3: 2}, "up to": {2: 3, 4: 2, 8: 1}}
DRAFT_FIELD = {"1.2": "speculative_model_dir"}
PROMPT = list(range(1, 14))
PROMPTS = [PROMPT, [*PROMPT, 20, 21], [5, 6], [*range(15, 60)], [*PROMPT, 20, 22, 23], [9]]


@dataclass
class Seen:
    """One pass: its metadata and result, and the batch as it was before."""

    contexts: list[tuple[int, int, int]]       # client, start, rows
    generations: list[int]                     # clients; 0 is padding
    outputs: dict[str, Any]
    draft_length: int = -1
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    shape: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What a client has in the end."""

    prompt: int                                # length
    tokens: list[int]                          # prompt and answer


@contextmanager
def watched(layout: Layout, line: str) -> Iterator[tuple[Any, list[Seen]]]:
    """A running stand-in, and what a tap on its passes saw; K is read where the layout says it stands."""
    with mock.patch.dict(os.environ, {"TLLM_WORKER_USE_SINGLE_PROCESS": "1"}), stand_in(line) as package:
        from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine
        from tensorrt_llm._torch.speculative.eagle3 import Eagle3OneModelSpecMetadata

        seen: list[Seen] = []
        prepared: list[Any] = []
        prepare, forward = Eagle3OneModelSpecMetadata.prepare, PyTorchModelEngine.forward

        def on_prepare(metadata: Any) -> None:
            prepare(metadata)
            prepared.append((metadata, getattr(metadata, layout.draft_length)))

        def on_forward(engine: Any, batch: Any, *rest: Any) -> Any:
            this = Seen([(r.py_client_id, r.context_current_position, r.context_chunk_size) for r in batch.context_requests],
                        [r.py_client_id for r in batch.generation_requests], {})
            this.outputs = forward(engine, batch, *rest)
            metadata, this.draft_length = prepared[-1]
            this.buffer = metadata.hidden_states.clone()
            this.shape = {"max_num_tokens": metadata.max_num_tokens, "H": metadata.hidden_size, "K": this.draft_length,
                          "num_capture_layers": len(metadata.layers_to_capture), "B": len(metadata.request_ids)}
            seen.append(this)
            return this.outputs

        Eagle3OneModelSpecMetadata.prepare, PyTorchModelEngine.forward = on_prepare, on_forward
        yield package, seen


def complaints(layout: Layout, line: str, **arguments: Any) -> list[str]:
    """Empty when the layout reads every pass right."""
    with watched(layout, line) as (package, seen):
        speculative = {"max_draft_len": DRAFT_LENGTH, DRAFT_FIELD.get(line, "speculative_model"): "draft",
                       "draft_len_schedule": SCHEDULES[layout.schedule]}
        try:
            llm = package.LLM(model="m", **{"max_batch_size": 8, "max_num_tokens": 64, "speculative_config": speculative} | arguments)
        except ValueError as error:
            return [f"schedule: {error}"]
        with llm:
            texts = asyncio.run(_ask(llm, package.SamplingParams))
            assert llm._engine.error is None
            return list(_wrong(layout, seen, texts, llm._network))


async def _ask(llm: Any, params: Any) -> dict[int, Told]:
    """The later ones share a prefix with the first, and come when that is computed."""
    async def one(prompt: list[int], length: int) -> tuple[int, Told]:
        output = await llm.generate_async(prompt, params(max_tokens=length), streaming=True).aresult()
        return output.request_id, Told(len(prompt), [*prompt, *output.outputs[0].token_ids])

    first = await one(PROMPTS[0], 4)
    rest = await asyncio.gather(*[one(prompt, MAX_TOKENS // (i + 1)) for i, prompt in enumerate(PROMPTS)])
    return dict([first, *rest])


def _wrong(layout: Layout, seen: list[Seen], told: dict[int, Told], network: Any) -> Iterator[str]:
    done: dict[int, int] = defaultdict(int)                        # emitted tokens by client
    for this in seen:
        yield from _shapes(layout, this)
        yield from _draft_length(layout, this)
        try:
            rows = list(_rows(layout, this, told, done))
        except IndexError as error:
            yield f"rows: {error!r}"
            return
        for client, position, row in rows:
            expected = network.states(told[client].tokens[: position + 1], position, this.shape["num_capture_layers"])[0]
            if row >= len(this.buffer) or not torch.equal(this.buffer[row], expected):
                yield f"request {client}, position {position}: not in row {row}"
    yield from (f"request {client}: {done[client]} of {len(it.tokens) - it.prompt} tokens" for client, it in told.items()
                if done[client] != len(it.tokens) - it.prompt)


def _draft_length(layout: Layout, this: Seen) -> Iterator[str]:
    """Where it follows the schedule, it must be what the schedule says for this batch."""
    if layout.draft_length != "runtime_draft_len":
        return
    schedule, size = SCHEDULES[layout.schedule], len(this.contexts) + len(this.generations)
    up_to = [schedule[key] for key in sorted(schedule) if size <= key]
    since = [schedule[key] for key in sorted(schedule) if size >= key]
    expected = (up_to or [0])[0] if layout.schedule == "up to" else since[-1]
    if this.draft_length != expected:
        yield f"schedule: {this.draft_length} drafts for a batch of {size}, expected {expected}"


def _shapes(layout: Layout, this: Seen) -> Iterator[str]:
    found = {"new_tokens": this.outputs["new_tokens"], "new_tokens_lens": this.outputs["new_tokens_lens"], "hidden_states": this.buffer}
    for name, tensor in found.items():
        expected = tuple(eval(text, {}, dict(this.shape)) for text in getattr(layout, name))
        if tuple(tensor.shape) != expected:
            yield f"{name} is {tuple(tensor.shape)}, expected {expected}"


def _rows(layout: Layout, this: Seen, told: dict[int, Told], done: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """(client, position, row) of every row that the layout calls true."""
    lens, place = this.outputs["new_tokens_lens"].tolist(), layout.order.index
    num_ctx_tokens = sum(count for _, _, count in this.contexts)
    at = 0 if place("context") < place("generation") else len(this.generations) * (1 + this.draft_length)
    for client, start, count in this.contexts:
        yield from ((client, start + j, at + j) for j in range(count))
        at += count
        done[client] = int(start + count == told[client].prompt)
    skipped = 0 if place("generation") < place("padding") else len(lens) - len(this.contexts) - len(this.generations)
    for i, client in enumerate(this.generations, start=skipped):
        first = eval(layout.generation_row, {}, {"num_ctx_tokens": num_ctx_tokens, "i": i, "K": this.draft_length})
        position = told[client].prompt + done[client] - 1
        count = min(lens[len(this.contexts) + i], len(told[client].tokens) - position - 1)
        yield from ((client, position + j, first + j) for j in range(count))
        done[client] += count
