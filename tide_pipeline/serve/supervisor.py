"""ReplicaSupervisor: parent of one tritonserver. Restarts it with back-off, stops it on SIGTERM, never leaves it behind.

    python -m tide_pipeline.serve.supervisor --config FILE --state-file FILE [--replica NAME] [--replicas-file FILE]

A server whose engine can't change its draft while it runs (TensorRT-LLM) says so in its observed state, and gets a successor: started
beside it, made known to the front through the replicas file, then the old one drains (serve.draft_swap = "blue_green"; needs memory for
two); or started in its place, on its ports ("restart", and whatever is set where no replicas file is given, as in Compose: whoever asks a
fixed address would not find another). A successor beside that does not get ready changes nothing; one in its place is started again. While
one is started in the place of another nobody is there to report: the supervisor does, or the replica would count as dead for those minutes.

Its state file (JSON, replaced whole) tells pids, addresses, restarts and what it is doing. Exit codes: 0 stopped, 2 could not start.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tide_pipeline.config import TideConfig, load_toml, override
from tide_pipeline.deployment.record import read_replica, write_observed
from tide_pipeline.errors import TideError
from tide_pipeline.provenance import write_json
from tide_pipeline.serve.front.change import change_replicas
from tide_pipeline.serve.front.replicas import READ_S
from tide_pipeline.serve.process import next_pause_s
from tide_pipeline.serve.triton import Ports, TritonReplica

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5                # before a restart; doubles
LONGEST_PAUSE_S = 30.0
POLL_S = 0.2
BEAT_S = 2.0                       # between two reports for a server that is being started


@dataclass
class SupervisorState:
    """What the state file says. `state`: starting, ready, restarting, failed or stopped."""

    replica: str
    model: str
    state: str = "starting"
    pid: int = 0                   # of the supervisor
    triton_pid: int = 0
    http_url: str = ""
    grpc_url: str = ""             # host:port
    metrics_url: str = ""
    restarts: int = 0
    successions: int = 0           # times a new server took over for another draft
    error: str = ""                # of the last start or death
    log: str = ""
    at: float = 0.0


class ReplicaSupervisor:
    """Run it in the main thread: the server is killed with the thread that started it."""

    def __init__(self, config: TideConfig, config_file: Path, state_file: Path, replica: str = "",
                 replicas_file: Path | None = None) -> None:
        self._replica = TritonReplica(config, config_file, replica=replica)
        self._config, self._config_file, self._state_file, self._replicas_file = config, config_file, state_file, replicas_file
        self._tried = 0                            # number of the deployment that a successor was last started for
        self.state = SupervisorState(self._replica.replica, config.target, pid=os.getpid(), log=str(self._replica.log))
        self._stop = threading.Event()
        self._was_ready = False

    def stop(self) -> None:
        """May be called from a signal handler."""
        self._stop.set()

    def run(self) -> int:
        """Until `stop`; the exit code."""
        pause_s = FIRST_PAUSE_S
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                if not self._serve() and not self._was_ready and not self._stop.is_set():
                    self._tell("failed")
                    return 2
                if self._stop.is_set():
                    break
                pause_s = next_pause_s(pause_s, time.monotonic() - began, FIRST_PAUSE_S, LONGEST_PAUSE_S)
                self.state.restarts += 1
                self._tell("restarting", f"{self.state.error}; again in {pause_s:g} s")
                self._stop.wait(pause_s)
            self._replica.stop()
            self._tell("stopped")
            return 0
        finally:
            self._replica.stop()

    def _serve(self) -> bool:
        """Start and watch one server until it ends or we are stopped. False when it did not get ready."""
        try:
            self._replica.start()
            self._tell("starting")
            ready = self._await_ready(self._replica)
        except TideError as error:
            self.state.error = str(error)
            log.error("%s", error)
            self._replica.stop()
            return False
        if ready:
            self._was_ready = True
            self._tell("ready")
            self._tell_front()                         # the port may be another one than that of the server before
            while self._replica.returncode() is None and not self._stop.wait(POLL_S):
                if (wanted := self._wanted()) > self._tried:
                    self._tried = wanted
                    self._succeed(wanted)
        if not self._stop.is_set():
            self.state.error = f"tritonserver ended with code {self._replica.returncode()}"
            log.error("%s, see %s", self.state.error, self._replica.log)
            self._replica.stop()                       # also one that was never started
        return ready

    def _wanted(self) -> int:
        """Number of the deployment that the server can't change to; 0 for none."""
        seen = read_replica(self._config.state.observed, self._config.target, self._replica.replica)
        return seen.needs_restart if seen is not None else 0

    def _succeed(self, wanted: int) -> None:
        """A new server for that deployment."""
        old, swap = self._replica, self._config.serve.draft_swap
        beside = swap != "restart" and self._replicas_file is not None
        why = f" ({swap} needs --replicas-file, to tell the front of another address)" if not beside and swap != "restart" else ""
        log.info("deployment %d needs a new server, %s the old one%s", wanted, "beside" if beside else "in place of", why)
        assert old.ports is not None, "it has been ready"
        ports = Ports(0, 0, 0) if beside else old.ports
        stack = replace(self._config.stack, triton_http_port=ports.http, triton_grpc_port=ports.grpc, triton_metrics_port=ports.metrics)
        new = TritonReplica(replace(self._config, stack=stack), self._config_file, replica=old.replica)
        if not beside:
            old.stop()
        try:
            new.start()
            ready = self._await_ready(new, reports=not beside)
        except TideError as error:
            self._tell(self.state.state, str(error))
            log.error("no successor for deployment %d: %s", wanted, error)
            ready = False
        if not ready:
            new.stop()
            if beside:
                return
        self._replica = new                        # one that replaces it in its place and does not get ready is started again by `run`
        self.state.successions += 1
        self._tell("ready" if ready else "restarting")
        if beside:
            self._tell_front()
            self._stop.wait(2 * READ_S)            # until the front has read it; Triton then ends what is in flight
            old.stop()

    def _report(self) -> None:
        """What the replica last said of itself, as of now."""
        seen = read_replica(self._config.state.observed, self._config.target, self._replica.replica)
        if seen is not None:
            write_observed(self._config.state.observed, replace(seen, at=time.time()))

    def _tell_front(self) -> None:
        """Requests go to the new address."""
        if self._replicas_file is None or not self._replicas_file.exists():        # a stack writes it when all replicas are there
            return
        try:
            change_replicas(self._replicas_file, lambda spec: replace(spec, url=self.state.http_url)
                            if spec.name == self._replica.replica else spec)
        except (OSError, TideError) as error:
            self._tell(self.state.state, f"the front was not told of the new server: {error}")
            log.error("%s", self.state.error)

    def _await_ready(self, replica: TritonReplica, reports: bool = False) -> bool:
        """As `wait_ready`, but gives way to `stop`. With `reports` the replica counts as alive meanwhile."""
        reported = time.monotonic()
        gives_up = reported + self._config.stack.start_timeout_s
        while not self._stop.is_set():
            if replica.is_ready():
                return True
            if reports and time.monotonic() - reported > BEAT_S:
                reported = time.monotonic()
                self._report()
            if replica.returncode() is not None or time.monotonic() > gives_up:
                replica.wait_ready(0.0)                # raises, with what the log says
            time.sleep(POLL_S / 2)
        return False

    def _tell(self, state: str, error: str | None = None) -> None:
        self.state.state, self.state.at = state, time.time()
        if error is not None:
            self.state.error = error
        if self._replica.ports is not None and state in ("starting", "ready"):
            host, ports = self._config.stack.host, self._replica.ports
            self.state.triton_pid = self._replica.pid
            self.state.http_url, self.state.grpc_url = f"http://{host}:{ports.http}", f"{host}:{ports.grpc}"
            self.state.metrics_url = f"http://{host}:{ports.metrics}/metrics"
        write_json(self._state_file, asdict(self.state))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tide_pipeline.serve.supervisor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="settings, as recipes.freeze writes them")
    parser.add_argument("--state-file", type=Path, required=True, help="where to tell pids, addresses and restarts (JSON)")
    parser.add_argument("--replica", default="", help="name in the deployment record (default: serve.replica)")
    parser.add_argument("--replicas-file", type=Path, help="the front's: its entry of this replica follows a server that takes over; "
                                                           "without it a successor gets the ports of the old server")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        supervisor = ReplicaSupervisor(override(TideConfig(), load_toml(args.config)), args.config, args.state_file, args.replica,
                                       args.replicas_file)
    except TideError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    code = supervisor.run()
    if code:
        sys.stderr.write(f"{supervisor.state.error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
