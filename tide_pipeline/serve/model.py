"""The Triton model: the only place that joins engine, recorder and draft agent. Imported by the rendered `1/model.py`, in Triton's stub.

Threads: Triton's hands requests over, the engine's answers them, the outbox's sends the responses, the agent's swaps drafts, a watcher
frees the slots of clients that have left and publishes metrics. Prompts and outputs are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import TideConfig, load_toml, override
from tide_pipeline.engine.opening import open_engine
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.recipes import from_environment
from tide_pipeline.serve.agent import DraftAgent
from tide_pipeline.serve.answer import ErrorKind, kind_of
from tide_pipeline.serve.desk import Desk
from tide_pipeline.serve.metrics import MetricsPublisher
from tide_pipeline.serve.orphan import before_the_end, is_orphan
from tide_pipeline.serve.outbox import Outbox
from tide_pipeline.serve.repository import CONFIG_PARAMETER, REPLICA_PARAMETER, handed_over
from tide_pipeline.serve.request import parse_request
from tide_pipeline.serve.tally import TallySink

log = logging.getLogger(__name__)

SWEEP_S = 0.2                      # how long a client that has left keeps its slot, at most
METRICS_S = 1.0
ORPHAN_FLUSH_S = 5.0               # for the lake, once tritonserver is gone

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonReply:
    """One request's response sender. tritonserver 2.51 crashes when it is asked `is_cancelled` of a sender whose last response is out."""

    def __init__(self, sender: Any, outbox: Outbox) -> None:
        self._sender, self._outbox = sender, outbox
        self._lock = threading.Lock()
        self._is_ended = self._is_broken = False

    def send(self, outputs: dict[str, str], *, is_last: bool) -> None:
        def respond() -> Any:
            return pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_)) for name, text in outputs.items()])

        self._outbox.put(lambda: self._send(respond, is_last))

    def fail(self, kind: ErrorKind, message: str) -> None:
        def respond() -> Any:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{kind}: {message}", getattr(pb_utils.TritonError, kind)))

        self._outbox.put(lambda: self._send(respond, is_last=True))

    def is_cancelled(self) -> bool:
        """Whether the client has gone, or can't be told anything any more."""
        with self._lock:
            return not self._is_ended and (self._is_broken or bool(self._sender.is_cancelled()))

    def _send(self, respond: Callable[[], Any], is_last: bool) -> None:
        with self._lock:
            self._is_ended = self._is_ended or is_last
            self._is_broken = True
            self._sender.send(respond(), flags=FINAL if is_last else 0)
            self._is_broken = False


class TritonPythonModel:
    """What Triton calls: initialize once, execute per request, finalize once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Ready only when the drafts of the deployment record are loaded; without a record it serves without speculation."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        parameters = json.loads(args["model_config"])["parameters"]
        self._config = config = _settings(parameters)
        replica = parameters[REPLICA_PARAMETER]["string_value"]
        torch.set_num_threads(config.serve.threads)
        spec = load_engine_spec(config.engine_dir)
        self._desk = Desk(handed_over(config.serve))
        self._outbox = Outbox()
        self._recorder = Recorder(config.capture, config.target, config.state.lake, replica)
        before_the_end(lambda: self._recorder.flush(ORPHAN_FLUSH_S))
        tally = TallySink(self._recorder, self._desk.admitted)
        self._engine = open_engine(config, spec, tally)
        self._agent = DraftAgent(self._engine, self._recorder, tally, config, replica)
        self._agent.poll()
        self._engine.profile()
        self._engine.start()
        self._agent.publish()
        self._metrics = MetricsPublisher(pb_utils, self._engine, self._recorder, tally, self._desk, self._outbox, self._agent,
                                         config.target)
        self._stop = threading.Event()
        self._agent.start()
        self._watcher = threading.Thread(target=self._watch, name="tide-watcher", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Responses are sent later, by the engine's thread."""
        for request in requests:
            reply = TritonReply(request.get_response_sender(), self._outbox)
            try:
                self._take(request, reply)
            except Exception as error:
                kind = kind_of(error)
                if kind is ErrorKind.INTERNAL:
                    log.error("a request failed at the door: %s", type(error).__name__)
                reply.fail(kind, str(error))

    def finalize(self) -> None:
        """Triton calls this when no request is in flight, or its patience has ended."""
        self._stop.set()
        self._desk.close()
        self._agent.close()
        self._engine.close()                   # closes the sink: the lake is flushed
        self._watcher.join()
        self._outbox.close()
        self._agent.publish()

    def _take(self, request: Any, reply: TritonReply) -> None:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        asked = parse_request(arrays, json.loads(request.parameters() or "{}"), triton_id=request.request_id(),
                              default_deadline_s=self._config.serve.default_deadline_s)
        if asked.is_stop:
            found = self._desk.cancel(asked.request.request_id)
            reply.fail(ErrorKind.CANCELLED if found else ErrorKind.INVALID_ARG,
                       "the request was cancelled" if found else f"no request {asked.request.request_id!r} is running")
        else:
            self._desk.take(self._engine, asked, reply)

    def _watch(self) -> None:
        due = 0.0
        while not self._stop.wait(SWEEP_S) and not is_orphan():
            try:
                self._desk.sweep()
                if time.monotonic() >= due:
                    due = time.monotonic() + METRICS_S
                    self._metrics.publish()
            except Exception:
                log.exception("the watcher failed once; it goes on")


def _settings(parameters: dict[str, Any]) -> TideConfig:
    """The file that TIDE_CONFIG names, else the one that the repository was rendered with."""
    if os.environ.get("TIDE_CONFIG"):
        return from_environment()
    return override(TideConfig(), load_toml(Path(parameters[CONFIG_PARAMETER]["string_value"])))
