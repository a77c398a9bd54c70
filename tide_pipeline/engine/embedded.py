"""The embedded engine: continuous batching with EAGLE-3 chain drafts, in PyTorch. Knows no files but its models'.

One step of the engine thread:  admit (one prompt chunk)  ->  plan draft lengths  ->  draft  ->  verify  ->  emit.
Running requests hold cache slots 0..B-1; verification is one pass over the rows of all of them, 1 + k_i for request i, side by side.
Refused tokens leave rubbish in the caches past a request's end, which the next step overwrites before it is read.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tide_pipeline.config import ServeSettings, SpeculationSettings
from tide_pipeline.contracts import (
    ANY_WORKLOAD,
    EngineBuild,
    FinishReason,
    GenerationRequest,
    RequestClosed,
    RequestOpened,
    StepEvent,
    StepKind,
    TokenChunk,
)
from tide_pipeline.engine.control import Plan, Slot, SpeculationController
from tide_pipeline.engine.drafts import NOTHING, ResidentDraft
from tide_pipeline.engine.ledger import Ledger
from tide_pipeline.engine.outbox import Outbox
from tide_pipeline.engine.profile import profile_step_costs
from tide_pipeline.engine.protocol import EngineStats, NullSink, Sink, TokenStream, told
from tide_pipeline.engine.request import ActiveRequest
from tide_pipeline.engine.step import StepRunner
from tide_pipeline.engine.survival import RequestSurvival
from tide_pipeline.engine.tap_copies import tap_ring
from tide_pipeline.engine.text import TextCodec, TextStream
from tide_pipeline.engine.validate import check_room, validate
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.models.device import device_of
from tide_pipeline.models.target import Target

log = logging.getLogger(__name__)

BUFFER_ROWS = 1_024              # rows of one request that its draft has not seen


class EmbeddedEngine:
    """Implements `engine.protocol.Engine`. `start()` runs it in a thread; tests may call `step()` themselves."""

    def __init__(self, model_dir: Path, spec: EngineSpec, serve: ServeSettings, speculation: SpeculationSettings,
                 sink: Sink | None = None, target: Target | None = None) -> None:
        self.spec, self.serve = spec, serve
        self.target = target or Target(model_dir, spec, device_of(serve.device))
        self.codec = TextCodec(model_dir)
        self.positions = min(spec.max_context, self.target.shape.max_positions)
        self.max_depth = spec.max_draft_length
        padded = self.positions + self.max_depth + 1
        self.cache = self.target.new_cache(serve.max_batch + 1, padded)
        rows = max(serve.prefill_chunk, serve.max_batch * (1 + self.max_depth))
        self.ring = tap_ring(8, rows + serve.prefill_chunk, self.target.shape.hidden_size, len(spec.capture_layers), spec.soft_targets,
                             self.target.device)
        self._outbox = Outbox(self._sink)
        self._runner = StepRunner(self.target, self.cache, self.ring, self._outbox.poll)
        self.control = SpeculationController(speculation, self.max_depth)
        self.sink: Sink = sink or NullSink()
        self.sink.attach(self.ring, self.target.digest)
        self.ring.is_read = sink is not None
        self._padded = padded
        self._drafts: dict[str, ResidentDraft] = {}
        self._waiting: deque[ActiveRequest] = deque()
        self._prefilling: ActiveRequest | None = None
        self._running: list[ActiveRequest] = []
        self._requests: dict[str, ActiveRequest] = {}      # by id, from submission to their end
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._ledger = Ledger()

    # --- what callers use -----------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        return self.target.digest

    def start(self) -> None:
        """Run the engine in its own thread. What exists now is taken out of the garbage collector's sight: a full collection walks through
        all of PyTorch's objects, and would hold up a step for 0.1 s."""
        gc.collect()
        gc.freeze()
        if self.cache.static is not None:
            self.cache.static.warm(self.cache, self.serve.max_batch, self.positions)
        self._thread = threading.Thread(target=self._loop, name="tide-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_chunk: Callable[[TokenChunk], None] | None = None) -> TokenStream:
        """Queue a request. Raises InvalidRequest, PromptTooLong, QueueFull, EngineClosed."""
        prompt, fixed = validate(request, self.codec, self.positions, self.max_depth)
        stream = TokenStream(request.request_id, self._cancel, on_chunk)
        active = ActiveRequest(request, stream, TextStream(self.codec, request.sampling.stop), prompt, len(prompt), fixed)
        with self._wake:
            check_room(request.request_id, self._requests, len(self._waiting), self.serve.queue_size, self._closed)
            self._requests[request.request_id] = active
            self._waiting.append(active)
            self._wake.notify()
        return stream

    def set_drafts(self, drafts: Mapping[str, EngineBuild]) -> None:
        """Serve these drafts from the next request on; requests in flight keep the draft they began with."""
        resident = {d.build.build_id: d for d in self._drafts.values()}
        for build in drafts.values():
            if build.build_id not in resident:
                resident[build.build_id] = ResidentDraft(build, self.target, self.serve.max_batch, self._padded)
        with self._wake:
            self._drafts = {tag: resident[build.build_id] for tag, build in drafts.items()}
            self.control.forget({d.build.draft_version for d in resident.values()})

    def profile(self) -> None:
        """Measure what steps cost on an idle engine; needs a draft."""
        assert not (self._running or self._prefilling), "a profile writes over the caches of requests"
        if self._drafts:
            draft = next(iter(self._drafts.values()))
            profile_step_costs(self.target, self.cache, draft, self.control, self.serve.max_batch, self.positions)

    def stats(self) -> EngineStats:
        """A snapshot; may be one step old."""
        running, drafts = list(self._running), dict(self._drafts)
        rates = {tag: self.control.survival(tag, d.build.draft_version).rates()[0] for tag, d in drafts.items()}
        return EngineStats(
            engine_digest=self.target.digest, running=len(running) + (self._prefilling is not None), waiting=len(self._waiting),
            kv_tokens_used=sum(r.consumed for r in running), kv_tokens_total=self.serve.max_batch * self.positions,
            probe_s=self.control.spent_ms / 1e3, drafts={tag: d.build.draft_version for tag, d in drafts.items()},
            first_position_rate=rates, step_ms=self.control.costs.table(), dropped_tap_rows=self.ring.dropped_rows,
            **self._ledger.stats())

    def close(self) -> None:
        """Stop; requests in flight are told "cancelled"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            gc.unfreeze()
        self._waiting.clear()
        for active in list(self._requests.values()):
            self._finish(active, FinishReason.CANCELLED)
        self._outbox.flush()
        self._sink(self.sink.close)

    # --- the loop -------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_num_threads(self.serve.threads)
        while True:
            if not self._has_work():
                self._sink(lambda: self.sink.on_idle())            # of the sink that there is then
            with self._wake:
                while not (self._closed or self._has_work()):
                    self._wake.wait()
                if self._closed:
                    return
            self.step()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self._running or self._outbox)

    def step(self) -> None:
        """One prompt chunk, if a request waits for a slot that is free, then one step of all running requests."""
        try:
            self._end_cancelled()
            self._prefill()
            if self._running:
                self._decode()
            else:
                self._outbox.poll()
        except Exception as error:
            log.exception("engine step failed: %d requests are ended", len(self._running))
            for active in [*self._running, *([self._prefilling] if self._prefilling else [])]:
                self._ledger.failed += 1
                self._finish(active, FinishReason.ERROR, error=f"{type(error).__name__}: {error}")

    def _prefill(self) -> None:
        if self._prefilling is None:
            with self._wake:
                if not self._waiting or len(self._running) >= self.serve.max_batch:
                    return
                active = self._waiting.popleft()
            self._prefilling = active
            active.slot = self.serve.max_batch                    # the spare slot, until it joins the running ones
            how = active.request
            self._outbox.post(lambda: self.sink.on_open(RequestOpened(
                how.request_id, how.workload, how.tenant, tuple(active.tokens[: active.num_prompt]), how.sampling, how.speculation)))
        active, began = self._prefilling, time.perf_counter()
        start = active.consumed
        chunk = tuple(active.tokens[start : start + self.serve.prefill_chunk])
        handle, token = self._runner.prefill(active, chunk)
        self._ledger.prompt_tokens += len(chunk)
        event = StepEvent(active.request.request_id, StepKind.PREFILL, start, chunk, () if token is None else (token,), (), 0,
                          active.version, 0, 1, (time.perf_counter() - began) * 1e3, handle)
        self._outbox.post(lambda: self.sink.on_step((event,)), self.ring.ship())
        if token is not None:
            self._join(active)
            self._advance(active, *active.take([token], self.target.shape.eos_ids))

    def _join(self, active: ActiveRequest) -> None:
        """From the spare slot to the lowest free one, and to the draft it will keep to its end."""
        self._prefilling = None
        self.cache.move(active.slot, len(self._running), active.consumed)
        active.slot = len(self._running)
        self._running.append(active)
        active.first_token_at = time.monotonic()
        self.control.changed()
        with self._wake:
            draft = self._drafts.get(active.request.workload) or self._drafts.get(ANY_WORKLOAD)
        if draft is not None and active.fixed_length != 0:
            draft.join(active)
            active.survival = RequestSurvival(self.control.survival(active.request.workload, active.version, not active.greedy))
        else:
            active.waiting_taps.clear()

    def _decode(self) -> None:
        began, running, context = time.perf_counter(), list(self._running), max(r.consumed for r in self._running) + 1
        plan = self._plan(running, context)
        drafted = self._runner.propose(running, plan)
        drafted_at = time.perf_counter()
        proposals = [drafted.proposals.get(r.slot, NOTHING) for r in running]
        verdicts = self._runner.verify(running, proposals)
        ended = time.perf_counter()
        events = [v.event(plan, len(running), (ended - began) * 1e3) for v in verdicts]
        for v in verdicts:
            v.request.observe(len(v.emitted), len(v.drafted), v.accepted, v.confidences)
            self._ledger.request_steps(1, len(v.drafted) > 0, len(v.drafted), v.accepted)
        self._outbox.post(lambda: self.sink.on_step(events), self.ring.ship())
        for v in verdicts:
            self._advance(v.request, v.emitted, v.text)
        if drafted.behind <= 1 + self.max_depth:                   # a longer catch-up is no part of a step's usual cost
            rows = len(running) + sum(len(p.tokens) for p in proposals)
            self.control.costs.observe(len(running), rows, (ended - drafted_at) * 1e3, drafted.members, drafted.depth,
                                       (drafted_at - began) * 1e3, context)
        self._account(plan, drafted.depth, len(running), context, (time.perf_counter() - began) * 1e3)
        self._bound_buffers()

    def _plan(self, running: list[ActiveRequest], context: int) -> Plan:
        """Draft lengths that the requests have use for, at most to the token before their last."""
        if self.control.rests():
            return Plan([0] * len(running))
        return self.control.plan([Slot(r.survival, max(0, min(r.remaining - 1, self.positions - len(r.tokens) - 1)), r.fixed_length,
                                       r.waiting_rows, r.greedy) for r in running], context)

    def _bound_buffers(self) -> None:
        """A request that was not drafted for so long that its buffer is full is caught up if the probes' budget pays, or drafts no more."""
        for r in self._running:
            if r.draft is not None and r.waiting_rows > BUFFER_ROWS:
                if not self.control.can_pay(self.control.catch_up_ms(r.waiting_rows)):
                    r.give_up_drafting()
                    continue
                began = time.perf_counter()
                r.draft.catch_up([r])
                self.control.spend((time.perf_counter() - began) * 1e3)

    def _account(self, plan: Plan, depth: int, batch: int, context: int, ms: float) -> None:
        self._ledger.engine_step(depth, ms)
        if depth == 0:
            self.control.earn(ms)
        elif plan.kind is StepKind.PROBE:
            plain_ms = self.control.costs.load * self.control.costs.verify_ms(batch, batch, context)
            self.control.spend(max(0.0, ms - plain_ms))

    def _advance(self, r: ActiveRequest, emitted: list[int], text: str) -> None:
        """Append what a step emitted, tell the client, and end the request when it is done."""
        r.tokens.extend(emitted)
        self._ledger.tokens += len(emitted)
        reason = r.reason_to_end(self.target.shape.eos_ids, self.positions)
        if reason is None:
            self._tell(r, tuple(emitted), None, text)
        else:
            self._finish(r, reason, tuple(emitted), text + r.text.finish())

    def _end_cancelled(self) -> None:
        now = time.monotonic()

        def ended(r: ActiveRequest) -> FinishReason | None:
            if r.cancelled:
                return FinishReason.CANCELLED
            return FinishReason.DEADLINE if now - r.submitted_at > r.request.deadline_s else None

        with self._wake:
            gone = [(r, reason) for r in self._waiting if (reason := ended(r))]
            for r, _ in gone:
                self._waiting.remove(r)
        active = [*self._running, *([self._prefilling] if self._prefilling else [])]
        for r, reason in [*gone, *((r, reason) for r in active if (reason := ended(r)))]:
            self._finish(r, reason, text=r.text.finish())

    def _finish(self, r: ActiveRequest, reason: FinishReason, tokens: tuple[int, ...] = (), text: str = "", error: str = "") -> None:
        if r is self._prefilling:
            self._prefilling = None
        elif r in self._running:
            self.control.changed()
            last = self._running.pop()
            if last is not r:
                self.cache.move(last.slot, r.slot, last.consumed)
                last.slot = r.slot
                self._running[r.slot] = last
        if r.draft is not None:
            r.draft.leave(r)
        self._requests.pop(r.request.request_id, None)
        self._ledger.finished += 1
        if r.slot >= 0:
            now = time.monotonic()
            first = r.first_token_at or now
            closed = RequestClosed(r.request.request_id, reason, (first - r.submitted_at) * 1e3, (now - r.submitted_at) * 1e3, r.num_output)
            self._outbox.post(lambda: self.sink.on_close(closed))
        self._tell(r, tokens, reason, text, error)

    def _tell(self, r: ActiveRequest, tokens: tuple[int, ...], reason: FinishReason | None, text: str = "", error: str = "") -> None:
        try:
            r.stream.put(r.chunk(tokens, reason, text, error))
        except Exception:
            log.exception("a client's callback failed: its request goes on unheard")
            r.cancelled = True

    def _cancel(self, request_id: str) -> None:
        with self._wake:
            if (r := self._requests.get(request_id)) is not None:
                r.cancelled = True

    def _sink(self, call: Callable[[], None]) -> None:
        """A sink that raises is replaced: serving goes on, and the count says so."""
        if not told(call):
            self._ledger.sink_errors += 1
            self.sink, self.ring.is_read = NullSink(), False
