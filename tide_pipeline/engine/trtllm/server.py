"""One LLM object and what hangs on it: arguments, capture, draft lengths, statistics. Knows the order in which they must be set up.

    states can be captured     one GPU        in this process (TLLM_WORKER_USE_SINGLE_PROCESS=1): classes are wrapped before LLM is built
                               several GPUs   in rank 0's worker, through Ray's worker extension (ray_worker.py; prototype in TensorRT-LLM)
    otherwise                  one warning, EngineStats.capture_faults, and serving without
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.memory import step_tokens
from tide_pipeline.engine.taps import TapRing
from tide_pipeline.engine.trtllm import in_place
from tide_pipeline.engine.trtllm.capture import PassTap
from tide_pipeline.engine.trtllm.feed import Feed
from tide_pipeline.engine.trtllm.installed import fields_of, installed_table, package, symbol, what_is_wrong
from tide_pipeline.engine.trtllm.length_override import LengthOverride
from tide_pipeline.engine.trtllm.options import draft_length, llm_arguments
from tide_pipeline.engine.trtllm.remote import RemotePasses
from tide_pipeline.engine.trtllm.schedule import StepTimes, length_at
from tide_pipeline.engine.trtllm.schedule_file import fitting, read_schedule
from tide_pipeline.engine.trtllm.shipment import Shipper
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import SettingsError

log = logging.getLogger(__name__)

WORKER = "tide_pipeline.engine.trtllm.ray_worker.TideWorker"


class Server:
    """Made at once, so that its ring is there before the cache takes the rest of the memory; built by `start`."""

    def __init__(self, config: TideConfig, spec: EngineSpec, hidden_size: int) -> None:
        self.table = installed_table()
        self._config, self._spec = config, spec
        self.max_length = draft_length(spec, config)
        self.times = StepTimes()
        self.schedule: Mapping[int, int] = {int(batch): int(length) for batch, length in config.speculation.draft_schedule}
        self.lengths: LengthOverride | None = None
        self.is_up = False
        self._llm: Any = None
        self._tap: PassTap | None = None
        self._remote: RemotePasses | None = None
        self._faults = 0
        num_taps, rows = len(spec.capture_layers), step_tokens(config.serve, self.max_length)
        self._shipper = None if self._is_remote else Shipper(rows, hidden_size, num_taps, torch.device(config.serve.device))
        self._remote = RemotePasses(rows, hidden_size, num_taps) if self._is_remote else None
        self.ring: TapRing = self._remote.ring if self._remote else self._shipper.ring       # type: ignore[union-attr]

    @property
    def capture_faults(self) -> int:
        return self._faults + (self._tap.faults if self._tap else 0) + (self._remote.faults if self._remote else 0)

    @property
    def fixed_length(self) -> int | None:
        """What every request gets; None where the batch size decides."""
        return None if self.schedule else self.max_length

    def length_at(self, batch: int) -> int:
        return length_at(self.schedule, batch) or 1 if self.schedule else self.max_length

    def start(self, build: EngineBuild | None, feed: Feed) -> None:
        """Build LLM. Raises SettingsError, and what LLM raises."""
        if wrong := what_is_wrong(self.table, "fatal"):
            raise SettingsError(f"the installed TensorRT-LLM is not as facts/{self.table.line}.toml says: {'; '.join(wrong)}. "
                                "`tide doctor` shows all differences")
        if self._config.serve.gpus == 1:
            os.environ[self.table.names["single_process"]] = "1"
        is_captured = self._prepare_capture(build, feed)
        if build and not self.schedule and self.table.names["one_model_length_control"]:
            self.schedule = fitting(read_schedule(Path(build.path)), self.max_length, self._config.serve.max_batch)
        if self.schedule and self._config.serve.gpus == 1 and not what_is_wrong(self.table, "draft length"):
            self.lengths = LengthOverride(self.table, max(self.schedule.values()))
            self.lengths.install()
        draft = str(Path(build.path) / "draft") if build else None
        arguments = llm_arguments(self._spec, self._config, self.table, draft=draft, model=str(self._config.engine_dir / self._spec.model),
                                  schedule=self.schedule or None, worker_extension=WORKER if self._is_remote else None,
                                  installed=fields_of(self.table))
        self._llm = package().LLM(**{name: self._settings(name, value) for name, value in arguments.items()})
        self.is_up = True
        if is_captured:
            self._begin_capture(feed)

    def _settings(self, name: str, value: Any) -> Any:
        """As one of NVIDIA's classes where it is one: `decoding_type` then is said by the class, which in 1.2 refuses to be told."""
        if name not in self.table.nested:
            return value
        return symbol(self.table[self.table.nested[name]])(**{key: given for key, given in value.items() if key != "decoding_type"})

    def generate(self, prompt: list[int], sampling: Mapping[str, Any]) -> Any:
        """On the thread of the event loop that will wait for it."""
        return self._llm.generate_async(prompt, package().SamplingParams(**sampling), streaming=True)

    def iteration_stats(self, timeout_s: float) -> AsyncIterator[dict[str, Any]]:
        """Those that have come in; ends when none has for so long."""
        stats: AsyncIterator[dict[str, Any]] = self._llm.get_stats_async(timeout_s)
        return stats

    def put_draft(self, build: EngineBuild) -> None:
        """Into the running server; no request may run. Raises BuildError."""
        in_place.put_draft(self._llm, self.table, build, is_remote=self._is_remote)

    def end_capture(self) -> None:
        """What is under way still comes. Can be called again."""
        if self._tap is not None:
            self._tap.remove()
        if self._remote is not None:
            self._remote.stop()

    def close(self) -> None:
        self.end_capture()
        if self.lengths is not None:
            self.lengths.remove()
        if self._llm is not None:
            self._llm.shutdown()
        self._llm, self.is_up = None, False

    @property
    def _is_remote(self) -> bool:
        return self._config.serve.gpus > 1 and self._spec.trtllm.orchestrator == "ray"

    def _prepare_capture(self, build: EngineBuild | None, feed: Feed) -> bool:
        """Whether states can be captured; says why not."""
        if build is None or not self.ring.is_read:
            return False                                   # without a draft TensorRT-LLM keeps no states
        wrong = what_is_wrong(self.table, "capture")
        if self._config.serve.gpus > 1 and not self._is_remote:
            wrong.append("several GPUs, and workers that can't be reached: set orchestrator = \"ray\" in [trtllm] of engine.toml")
        if not wrong and self._shipper is not None:
            self._tap = PassTap(self.table, self._shipper, feed, len(self._spec.capture_layers))
            feed.stop_capture = self._tap.broken
            try:
                self._tap.install()
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
        if wrong:
            self._faults += 1
            log.warning("states are not captured on this TensorRT-LLM, serving goes on without (acceptance is still recorded): %s. `tide "
                        "doctor` shows what differs from facts/%s.toml", "; ".join(wrong), self.table.line)
        return not wrong

    def _begin_capture(self, feed: Feed) -> None:
        if self._tap is not None:
            self._tap.is_on = feed.is_capturing = True
        elif self._remote is not None:
            feed.stop_capture = self._remote.broken
            feed.is_capturing = self._remote.start(self._llm, feed, self._config.serve.device)
