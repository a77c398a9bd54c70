"""Faults of the soak: kill on time, start again what nobody else starts, note when it was back. Knows the stack's record and its services.

A part whose parent brings it back is left to it. One that stands in the stack's record and stays dead is started again with the very
command it had, as systemd or Kubernetes would on a server: told in the result as "started_by": "the soak".
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inject
from soak_loop_plan import Fault

from tide_pipeline.config import StatePaths
from tide_pipeline.stack import probes, record, services
from tide_pipeline.stack.local import LocalStack
from tide_pipeline.stack.processes import Service, find, start
from tide_pipeline.stack.services import Place

PATIENCE_S = 6.0                   # for a parent to bring back what was killed
BACK_WITHIN_S = 240.0              # later it counts as not come back
SERVICES: Mapping[str, Callable[[Place], Service]] = {
    "mlflow": services.mlflow_server, "front": services.front, "dagster_code": services.dagster_code, "dagster_web": services.dagster_web,
    "dagster_daemon": services.dagster_daemon}


@dataclass
class Injected:
    """One fault that was carried out. Times are Unix seconds."""

    fault: Fault
    turn: int                      # in which it happened
    at: float
    killed: list[int]
    back_at: float = 0.0
    started_by: str = "its parent"

    def as_dict(self, began: float) -> dict[str, Any]:
        return {"role": self.fault.name, "turn": self.turn, "at_s": round(self.at - began, 1), "processes": len(self.killed),
                "back_after_s": round(self.back_at - self.at, 1) if self.back_at else None, "started_by": self.started_by}


@dataclass
class Faults:
    """Call `tick` about once a second, from a thread that stays: what it starts ends with that thread."""

    stack: LocalStack
    waiting: list[Fault]
    done: list[Injected] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state: StatePaths = self.stack.state
        self.stack_id = self.stack.record.stack_id
        self._dead_since: dict[str, float] = {}
        self._trainer_since: dict[str, float] = {}

    def tick(self, turn: int, elapsed_s: float) -> None:
        for fault in [f for f in self.waiting if self._is_due(f, turn, elapsed_s)]:
            at = time.time()
            killed = [pid for role in fault.roles for pid in inject.kill(self.stack_id, role, every=True)]
            if killed:
                self.waiting.remove(fault)
                self.done.append(Injected(fault, turn, at, killed))
        self._start_what_stays_dead()
        for one in self.done:
            if not one.back_at and time.time() - one.at < BACK_WITHIN_S and self._is_back(one):
                one.back_at = time.time()

    def under_way(self) -> bool:
        """Whether something killed is not back yet."""
        return any(not one.back_at and time.time() - one.at < BACK_WITHIN_S for one in self.done)

    def _is_due(self, fault: Fault, turn: int, elapsed_s: float) -> bool:
        if not fault.training:
            return turn == fault.shift and elapsed_s >= fault.after_s
        if turn >= fault.shift and inject.processes(self.stack_id, "trainer"):
            since = self._trainer_since.setdefault(fault.name, time.time())
            return time.time() - since >= fault.after_s
        self._trainer_since.pop(fault.name, None)
        return False

    def _start_what_stays_dead(self) -> None:
        found = record.load(self.state)
        if found is None:
            return
        for ref in found.dead():
            since = self._dead_since.setdefault(ref.name, time.time())
            if time.time() - since < PATIENCE_S:
                continue
            del self._dead_since[ref.name]
            fresh = start(self._service(found, ref.name), bound=True)
            found = dataclasses.replace(found, processes=tuple(fresh if p.name == ref.name else p for p in found.processes))
            record.save(self.state, found)
            for one in self.done:
                if not one.back_at and ref.name in (*one.fault.roles, *(("replica",) if one.fault.name == "supervisor" else ())):
                    one.started_by = "the soak"
        self._dead_since = {ref.name: self._dead_since[ref.name] for ref in found.dead() if ref.name in self._dead_since}

    def _service(self, found: record.StackRecord, name: str) -> Service:
        place = Place(self.stack.config, Path(found.config_file), found.stack_id)
        if name in SERVICES:
            made = SERVICES[name](place)
        else:
            number = int(name.rpartition("_")[2]) if "_" in name else 0
            replica = place.config.serve.replica_names[number]
            settings = place.config_file if number == 0 else place.config_file.with_name(f"settings-{replica}.toml")
            made = services.replica(place, replica, settings)
        return dataclasses.replace(made, log=made.log.with_name(f"{made.log.stem}-again-{time.time():.0f}.log"))

    def _is_back(self, one: Injected) -> bool:
        """As its users would see it. A run worker is back when its run is no longer held: the next one is a new run."""
        urls, name = self.stack.record.urls, one.fault.name
        if name == "run_worker":
            return bool(self._others(one, "run_worker"))
        if name == "mlflow":
            return probes.answers(f"{urls['mlflow']}/health", "OK")
        if name == "dagster_daemon":
            return probes.daemon_beats(urls["dagster"], one.at)
        if name == "dagster_code":
            host, _, port = urls["dagster_code"].rpartition(":")
            return probes.listens(host, int(port)) and probes.definitions_are_loaded(urls["dagster"])
        if one.fault.is_serving:
            return bool(self._others(one, name)) and self._every_replica_is_ready()
        return bool(self._others(one, name))

    def _others(self, one: Injected, role: str) -> Sequence[int]:
        return [p.pid for p in inject.processes(self.stack_id, role) if p.pid not in one.killed]

    def _every_replica_is_ready(self) -> bool:
        files = [self.state.root / f"{name}.json" for name in self.stack.config.serve.replica_names]
        supervisors = [ref for ref in (record.load(self.state) or self.stack.record).processes if ref.name.startswith("replica")]
        return (all(find(ref) is not None for ref in supervisors) and all(probes.supervisor_is_ready(file) for file in files)
                and probes.answers(f"{self.stack.triton_url}/v2/models/{self.stack.record.target}/ready"))
