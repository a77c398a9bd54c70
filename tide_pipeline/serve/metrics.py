"""The engine's figures as series of Triton's own metrics endpoint. Knows names; `pb_utils` is handed in. No prompt text.

Counters end in _total and run since start; rates and lengths are of the last RECENT_S. All carry target and replica.
docs/metrics.md lists them for those who read them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.engine.protocol import Engine, EngineStats
from tide_pipeline.serve.agent import RECENT_S, DraftAgent
from tide_pipeline.serve.desk import Desk
from tide_pipeline.serve.outbox import Outbox
from tide_pipeline.serve.series import HistogramSeries, Series
from tide_pipeline.serve.tally import Counts, Recent, TallySink

COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "tide_requests_finished_total": ("Requests that ended, however they did", lambda s: s.requests_finished),
    "tide_requests_failed_total": ("Requests that the engine failed", lambda s: s.requests_failed),
    "tide_tokens_out_total": ("Output tokens", lambda s: s.tokens_out),
    "tide_prompt_tokens_total": ("Prompt tokens", lambda s: s.prompt_tokens),
    "tide_target_steps_total": ("Decode and verification steps, per request", lambda s: s.target_steps),
    "tide_verify_steps_total": ("Verification steps, per request", lambda s: s.verify_steps),
    "tide_drafted_tokens_total": ("Draft tokens verified", lambda s: s.drafted_tokens),
    "tide_accepted_tokens_total": ("Draft tokens accepted", lambda s: s.accepted_tokens),
    "tide_speculation_on_seconds_total": ("Time in steps that drafted", lambda s: s.speculation_on_s),
    "tide_speculation_off_seconds_total": ("Time in steps that did not", lambda s: s.speculation_off_s),
    "tide_probe_seconds_total": ("Time spent on probes of switched-off drafts", lambda s: s.probe_s),
    "tide_dropped_tap_rows_total": ("Token rows that could not be copied off the GPU in time", lambda s: s.dropped_tap_rows),
    "tide_capture_faults_total": ("Reasons why states are not captured: the server is not as we know it", lambda s: s.capture_faults),
}
GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "tide_running_requests": ("Requests in the batch", lambda s: s.running),
    "tide_kv_tokens_used": ("Positions held in the target's KV cache", lambda s: s.kv_tokens_used),
    "tide_kv_tokens_capacity": ("Positions that fit", lambda s: s.kv_tokens_total),
}
CAPTURE_COUNTERS = {
    "tide_captured_tokens_total": ("Token rows collected", "captured_tokens"),
    "tide_dropped_tokens_total": ("Token rows dropped because the writer could not keep up", "dropped_tokens"),
    "tide_dropped_acceptance_rows_total": ("Acceptance rows dropped", "dropped_acceptance_rows"),
    "tide_written_bytes_total": ("Bytes written to the lake", "written_bytes"),
    "tide_write_errors_total": ("Shards that could not be written", "write_errors"),
    "tide_recorder_errors_total": ("Requests whose collection failed", "recorder_errors"),
}


class MetricsPublisher:
    """`publish()` once a second, from one thread."""

    def __init__(self, pb_utils: Any, engine: Engine, recorder: Recorder, tally: TallySink, desk: Desk, outbox: Outbox, agent: DraftAgent,
                 target: str) -> None:
        self._engine, self._recorder, self._desk, self._outbox, self._agent = engine, recorder, desk, outbox, agent
        self._tally, self._recent = tally, Recent(tally, RECENT_S, time.monotonic())
        labels = {"target": target, "replica": agent.replica}

        def series(name: str, description: str) -> Series:
            return Series(pb_utils, name, description, labels, is_counter=name.endswith("_total"))

        self._engine_series = [(series(n, text), figure) for n, (text, figure) in (COUNTERS | GAUGES).items()]
        self._capture_series = [(series(n, text), key) for n, (text, key) in CAPTURE_COUNTERS.items()]
        self._depth_steps = series("tide_draft_length_steps_total", "Engine steps by draft length")
        self._ended = series("tide_requests_ended_total", "Requests that ended, by finish reason; those that were refused are not in it")
        self._waiting = series("tide_waiting_requests", "Requests before the batch (Triton's queue: nv_inference_pending_request_count)")
        self._responses = series("tide_responses_waiting", "Responses that the engine has made and Triton has not taken yet")
        self._histograms = [(HistogramSeries(pb_utils, name, text, labels), of.read) for name, text, of in (
            ("tide_queue_seconds", "From a request's arrival to its first prompt chunk", desk.waits.queue),
            ("tide_ttft_seconds", "From a request's arrival to its first token", desk.waits.first_token),
            ("tide_inter_token_seconds", "Between a request's tokens, in the engine", tally.inter_token),
            ("tide_response_delay_seconds", "From a step's end to Triton having taken its response", outbox.delay))]
        self._prefill = series("tide_prefill_seconds_total", "Time in prompt chunks")
        self._sink_errors = series("tide_sink_errors_total", "Failures of the capture sink: it is switched off then")
        self._collecting = series("tide_collecting_workloads", "Workloads whose states are being collected")
        self._acceptance_length = series("tide_acceptance_length", "Tokens per verification step, bonus token included")
        self._first_position = series("tide_first_position_rate", "Share of first draft tokens accepted")
        self._positions = series("tide_position_acceptance_rate", "Share of draft tokens at a position (1 is the first) that were accepted")
        self._tokens_per_s = series("tide_tokens_per_s", "Output tokens per second after the first of each request")
        self._draft_info = series("tide_draft_info", "1 for each draft being served, by workload tag")
        self._deployed_at = series("tide_draft_deployed_timestamp_seconds", "When the draft's deployment was written, Unix time")
        self._promised = series("tide_draft_promoted_first_position_rate", "tide_first_position_rate that the gate found before promotion")
        self._deployment = series("tide_deployment", "Number of the deployment record being served")
        self._desired = series("tide_deployment_desired", "Number of the latest deployment record")
        self._mismatches = series("tide_digest_mismatches_total", "Builds refused because their bytes are not those recorded, per attempt")
        self._agent_error = series("tide_draft_agent_error", "1 while the draft agent can't do what the record says")

    def publish(self) -> None:
        stats, captured = self._engine.stats(), self._recorder.stats()
        for series, figure in self._engine_series:
            series.put(figure(stats))
        for series, key in self._capture_series:
            series.put(float(captured[key]))
        for length, steps in stats.draft_length_steps.items():
            self._depth_steps.put(steps, draft_length=str(length))
        for reason, count in self._desk.waits.finished().items():
            self._ended.put(count, finish_reason=reason)
        self._waiting.put(stats.waiting + self._desk.parked())
        self._responses.put(self._outbox.waiting())
        self._prefill.put(self._tally.prefill_s)
        self._sink_errors.put(stats.sink_errors + self._tally.errors)
        for histogram, read in self._histograms:
            histogram.put(read())
        self._collecting.put(sum(bool(on) for name, on in captured.items() if name.startswith("collecting.")))
        self._publish_drafts(stats)

    def _publish_drafts(self, stats: EngineStats) -> None:
        recent, seconds = self._recent.take(time.monotonic())
        self._tokens_per_s.put(sum(counts.emitted for counts in recent.values()) / seconds)
        served = set(stats.drafts.values())
        for version in served:
            counts = recent.get(version, Counts())
            self._acceptance_length.put(counts.acceptance_length, draft_version=version)
            self._first_position.put(counts.first_position_rate, draft_version=version)
            for position, rate in enumerate(counts.position_rates, 1):
                self._positions.put(rate, draft_version=version, position=str(position))
        since = self._agent.since
        for tag, version in stats.drafts.items():
            self._draft_info.put(1, workload=tag, draft_version=version)
            if tag in since:
                self._deployed_at.put(since[tag].at, workload=tag, draft_version=version)
                self._promised.put(since[tag].first_position, workload=tag, draft_version=version)
        for series in (self._acceptance_length, self._first_position, self._positions, self._draft_info, self._deployed_at, self._promised):
            series.clear_others("draft_version", served)
        self._deployment.put(self._agent.applied)
        self._desired.put(self._agent.desired)
        self._mismatches.put(self._agent.digest_mismatches)
        self._agent_error.put(1 if self._agent.error else 0)
