"""The engine on TensorRT-LLM's LLM API (PyTorch backend): requests in, chunks out. Knows public calls; capture.py has what is private.

    submit ─► waiting ─► LLM.generate_async ─► one response a step ─► TokenChunk       on one thread with an event loop
                                            └► passes, if capture is on ─► feed ─► sink

One draft per server: TensorRT-LLM loads it when it starts. Another one means another server (serve/supervisor.py, blue/green), or, opted
into, a private call that puts it into this one while no request runs (in_place.py). Text, stop strings, queue and deadlines are ours.
Written against facts (facts/*.toml) and run with a stand-in; not on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild, FinishReason, GenerationRequest, RequestClosed, RequestOpened
from tide_pipeline.engine.ledger import Ledger
from tide_pipeline.engine.protocol import EngineStats, NullSink, Sink, TokenStream
from tide_pipeline.engine.request import ActiveRequest
from tide_pipeline.engine.text import TextCodec, TextStream
from tide_pipeline.engine.trtllm.draft import checked_draft, one_draft
from tide_pipeline.engine.trtllm.feed import Feed
from tide_pipeline.engine.trtllm.layout import End
from tide_pipeline.engine.trtllm.options import draft_length
from tide_pipeline.engine.trtllm.sampling import REASONS, Totals, sampling_arguments, totals
from tide_pipeline.engine.trtllm.server import Server
from tide_pipeline.engine.validate import check_room, validate
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import BuildError, InvalidRequest, RestartNeeded, SettingsError
from tide_pipeline.models.families import read_outline
from tide_pipeline.models.target import engine_digest

log = logging.getLogger(__name__)

STATS_S = 1.0
IN_PLACE_PATIENCE_S = 60.0             # for requests in flight, before a draft is put into a running server


class TrtllmEngine:
    """Implements `engine.protocol.Engine`. `set_drafts` before `start` says which draft the server is built with."""

    def __init__(self, config: TideConfig, spec: EngineSpec, sink: Sink | None = None) -> None:
        self.spec, self.serve, self._config = spec, config.serve, config
        self._model = config.engine_dir / spec.model
        self.codec = _codec(self._model, spec)
        hidden_size, self.eos_ids = read_outline(self._model)
        self.digest = engine_digest(self._model, spec)
        self.positions, self.max_depth = spec.max_context, draft_length(spec, config)
        self._ledger = Ledger()
        self._server = Server(config, spec, hidden_size)
        self._feed = Feed(sink or NullSink(), self._ledger, self._server.times)
        (sink or NullSink()).attach(self._server.ring, self.digest)
        self._server.ring.is_read = sink is not None
        self._build: EngineBuild | None = None
        self._tags: tuple[str, ...] = ()
        self._lock = threading.Lock()                      # of what follows, down to _closed
        self._waiting: deque[ActiveRequest] = deque()
        self._requests: dict[str, ActiveRequest] = {}
        self._is_paused = self._closed = False
        self._running: dict[str, tuple[ActiveRequest, Any, int]] = {}      # by id: request, its output, its number at the server
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._server_stats: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tide-engine", daemon=True)

    # --- what callers use -----------------------------------------------------------------------------------------

    def profile(self) -> None:
        """TensorRT-LLM chooses draft lengths by its schedule: nothing to measure on an idle server."""

    def start(self) -> None:
        """Build the server: weights, graphs, warm-up. Minutes on a GPU. Raises SettingsError, and what LLM raises."""
        self._server.start(self._build, self._feed)
        self._feed.start()
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._watch_stats(), self._loop)

    def submit(self, request: GenerationRequest, on_chunk: Callable[..., None] | None = None) -> TokenStream:
        """Queue a request. Raises InvalidRequest, PromptTooLong, QueueFull, EngineClosed."""
        prompt, fixed = validate(request, self.codec, self.positions, self.max_depth)
        self._refuse_length(fixed)
        stream = TokenStream(request.request_id, self._cancel, on_chunk)
        active = ActiveRequest(request, stream, TextStream(self.codec, request.sampling.stop), prompt, len(prompt), fixed)
        with self._lock:
            check_room(request.request_id, self._requests, len(self._waiting), self.serve.queue_size, self._closed)
            self._requests[request.request_id] = active
            self._waiting.append(active)
        self._loop.call_soon_threadsafe(self._arrive, active)
        return stream

    def set_drafts(self, drafts: Mapping[str, EngineBuild]) -> None:
        """Before `start`: what the server is built with. Afterwards RestartNeeded, unless serve.draft_swap is "in_place".

        Raises:
            BuildError: several drafts, or one that was altered.
            RestartNeeded: only a new server can serve this; it is verified already.
        """
        build = one_draft(drafts)
        if build is not None:
            checked_draft(build, self.spec)
        is_same = build is not None and self._build is not None and build.draft_digest == self._build.draft_digest
        if self._server.is_up and not is_same:
            if self.serve.draft_swap != "in_place" or build is None or self._build is None:
                wanted = build.draft_version if build else "none"
                raise RestartNeeded(f"TensorRT-LLM can't change its draft to {wanted} while it runs: a new server has to take over "
                                    "(the supervisor does that)")
            self._put_in_place(build)
        self._build, self._tags = build, tuple(drafts)

    def stats(self) -> EngineStats:
        """A snapshot. Cache figures are the server's own, where it gives them."""
        cache = self._server_stats.get("kvCacheStats") or {}
        block = int(cache.get("tokensPerBlock", 0))
        return EngineStats(
            engine_digest=self.digest, running=len(self._running), waiting=len(self._waiting),
            kv_tokens_used=block * int(cache.get("usedNumBlocks", 0)), kv_tokens_total=block * int(cache.get("maxNumBlocks", 0)),
            probe_s=0.0, drafts={tag: self._build.draft_version for tag in self._tags if self._build},
            step_ms=self._server.times.table(), dropped_tap_rows=self._server.ring.dropped_rows,
            capture_faults=self._server.capture_faults, **self._ledger.stats())

    def close(self) -> None:
        """Stop; requests in flight are told "cancelled"."""
        with self._lock:
            self._closed = True
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._server.end_capture()
            self._feed.close()
        self._server.close()
        self._loop.close()

    # --- the loop's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _arrive(self, r: ActiveRequest) -> None:
        remaining_s = r.request.deadline_s - (time.monotonic() - r.submitted_at)
        if r.request.request_id in self._requests:
            self._deadlines[r.request.request_id] = self._loop.call_later(max(0.0, remaining_s), self._end, r, FinishReason.DEADLINE)
        self._admit()

    def _admit(self) -> None:
        """As many run as the server has places: the others wait here, where they can be counted and refused."""
        while len(self._running) < self.serve.max_batch:
            with self._lock:
                if not self._waiting or self._is_paused or self._closed:
                    return
                r = self._waiting.popleft()
            try:
                self._begin(r)
            except Exception as error:
                self._fail(r, error)

    def _begin(self, r: ActiveRequest) -> None:
        how, prompt = r.request, tuple(r.tokens)
        r.version = self._build.draft_version if self._build else ""
        opened = RequestOpened(how.request_id, how.workload, how.tenant, prompt, how.sampling, how.speculation)
        end = End(r.num_prompt + how.sampling.max_tokens, () if how.sampling.ignore_eos else self.eos_ids)
        with self._feed.opening() as tell:
            output = self._server.generate(list(prompt), sampling_arguments(how, self.eos_ids))
            tell(output.request_id, opened, end, r.version)
        self._ledger.prompt_tokens += r.num_prompt
        self._running[how.request_id] = r, output, output.request_id
        self._tasks[how.request_id] = self._loop.create_task(self._answer(r, output))

    async def _answer(self, r: ActiveRequest, output: Any) -> None:
        try:
            async for response in output:
                if self._advance(r, response):
                    return
            self._end(r, FinishReason.CANCELLED)
        except Exception as error:
            self._fail(r, error)

    def _advance(self, r: ActiveRequest, response: Any) -> bool:
        """What a response adds: told to the client and the feed; true when the request is over."""
        now, first = time.monotonic(), r.first_token_at == 0.0
        step_ms, r.first_token_at = (now - (r.submitted_at if first else r.last_step_at)) * 1e3, r.first_token_at or now
        r.last_step_at = now
        said = response.outputs[0]
        emitted, text = r.take(list(said.token_ids[r.num_output:]), self.eos_ids)
        r.tokens.extend(emitted)
        self._ledger.tokens += len(emitted)
        length = self._server.length_at(len(self._running)) if self._build else 0
        if emitted and not first:
            accepted = min(len(emitted) - 1, length)
            r.observe(len(emitted), length, accepted, ())
        self._feed.streamed(response.request_id, tuple(emitted), length, len(self._running), step_ms)
        reason = r.reason_to_end(self.eos_ids, self.positions) if emitted else None
        if reason is None and response.finished:
            reason = REASONS.get(str(said.finish_reason), FinishReason.STOP)
        if reason is None:
            self._tell(r, tuple(emitted), None, text)
            return False
        self._settle(r, response, length)
        if not response.finished:
            self._abort(response)
        self._finish(r, reason, tuple(emitted), text + r.text.finish())
        return True

    def _settle(self, r: ActiveRequest, response: Any, length: int) -> None:
        """The totals of a request: the server's own count, where there is one."""
        final = totals(response, r.num_output, length, Totals(r.target_steps, r.verify_steps, r.drafted_tokens, r.accepted_tokens))
        r.target_steps, r.verify_steps, r.drafted_tokens, r.accepted_tokens = (final.target_steps, final.verify_steps, final.drafted,
                                                                               final.accepted)

    def _end(self, r: ActiveRequest, reason: FinishReason) -> None:
        """Cancelled or late, waiting or running."""
        request_id = r.request.request_id
        if self._requests.get(request_id) is not r:
            return
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(r)
        if (running := self._running.get(request_id)) is not None:
            self._abort(running[1])
        task = self._tasks.get(request_id)
        self._finish(r, reason, text=r.text.finish())
        if task is not None and task is not asyncio.current_task(self._loop):
            task.cancel()

    def _fail(self, r: ActiveRequest, error: Exception) -> None:
        log.error("a request failed in TensorRT-LLM: %s", type(error).__name__)        # its text could quote a prompt
        self._ledger.failed += 1
        self._finish(r, FinishReason.ERROR, error=f"{type(error).__name__}: {error}")

    def _finish(self, r: ActiveRequest, reason: FinishReason, tokens: tuple[int, ...] = (), text: str = "", error: str = "") -> None:
        request_id = r.request.request_id
        with self._lock:
            self._requests.pop(request_id, None)
        if (timer := self._deadlines.pop(request_id, None)) is not None:
            timer.cancel()
        self._tasks.pop(request_id, None)
        self._ledger.finished += 1
        if (running := self._running.pop(request_id, None)) is not None:
            self._ledger.request_steps(r.target_steps, r.verify_steps, r.drafted_tokens, r.accepted_tokens)
            now = time.monotonic()
            self._feed.close_request(running[2], RequestClosed(request_id, reason, ((r.first_token_at or now) - r.submitted_at) * 1e3,
                                                               (now - r.submitted_at) * 1e3, r.num_output), tuple(r.tokens[r.num_prompt:]))
        self._tell(r, tokens, reason, text, error)
        self._admit()

    def _tell(self, r: ActiveRequest, tokens: tuple[int, ...], reason: FinishReason | None, text: str = "", error: str = "") -> None:
        try:
            r.stream.put(r.chunk(tokens, reason, text, error))
        except Exception:
            log.exception("a client's callback failed: its request goes on unheard")
            self._cancel(r.request.request_id)

    def _abort(self, output: Any) -> None:
        with contextlib.suppress(Exception):               # it may have ended meanwhile
            output.abort()

    async def _stop(self) -> None:
        for r in list(self._requests.values()):
            self._end(r, FinishReason.CANCELLED)
        tasks = [t for t in asyncio.all_tasks(self._loop) if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_stats(self) -> None:
        """Iteration statistics are the server's newest; without them the cache's figures are 0."""
        try:
            while True:
                async for stats in self._server.iteration_stats(STATS_S):
                    self._server_stats = stats
                await asyncio.sleep(STATS_S)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.warning("TensorRT-LLM gives no iteration statistics (%s): figures of its cache stay 0", type(error).__name__)

    # --- any thread -----------------------------------------------------------------------------------------------

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            r = self._requests.get(request_id)
        if r is not None:
            self._loop.call_soon_threadsafe(self._end, r, FinishReason.CANCELLED)

    def _refuse_length(self, fixed: int | None) -> None:
        """TensorRT-LLM has no switch per request: what it can't do is said, not ignored."""
        served = self._server.fixed_length if self._build else 0
        if fixed is not None and fixed != served:
            raise InvalidRequest(f"speculation={'off' if fixed == 0 else fixed} can't be had on this replica: TensorRT-LLM has no switch "
                                 f"per request, {_what(served)}. Ask for auto" + (", or a plain replica" if fixed == 0 else ""))

    def _put_in_place(self, build: EngineBuild) -> None:
        """No request mixes two drafts: those in flight end first, the others wait."""
        self._is_paused = True
        try:
            gives_up = time.monotonic() + IN_PLACE_PATIENCE_S
            while self._running:
                if time.monotonic() > gives_up:
                    raise BuildError(f"requests in flight did not end within {IN_PLACE_PATIENCE_S:.0f} s: the draft is tried again")
                time.sleep(0.01)
            self._server.put_draft(build)
            self._build = build                            # before anybody who waited is let in under its name
        finally:
            self._is_paused = False
            self._loop.call_soon_threadsafe(self._admit)


def _what(served: int | None) -> str:
    return ("it serves without a draft" if served == 0 else "its schedule decides by batch size" if served is None
            else f"it drafts {served} tokens for every one")


def _codec(model: Path, spec: EngineSpec) -> TextCodec:
    if not (model / "tokenizer.json").is_file():
        where = f"{spec.repo} at {spec.revision}" if spec.repo else "the target"
        raise SettingsError(f"{model}/tokenizer.json is not there: put a snapshot of {where} into {model}")
    return TextCodec(model)
