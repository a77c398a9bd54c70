"""Training on several devices of this machine: one process on each, which find each other through a file. Knows no draft.

Over several hosts torchrun starts the same command: `torchrun --nnodes 2 --nproc-per-node 8 ... -m tide_pipeline.training ...`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

STOPPED = 130                      # exit code of a trainer that was told to stop, and left a checkpoint
AWAY = 75                          # EX_TEMPFAIL: the lake's storage does not answer
PATIENCE_S = 15.0                  # for the others to end by themselves once one has


def is_launched() -> bool:
    """Whether torchrun, or `launch`, started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m tide_pipeline.training` that many times and wait; the exit code speaks for all of them.

    A signal is passed on to every process, and each of them dies with this one.
    """
    with tempfile.TemporaryDirectory(prefix="tide-team-") as scratch:
        common = {**os.environ, "WORLD_SIZE": str(processes), "TIDE_RENDEZVOUS": f"{scratch}/rendezvous"}
        command = [sys.executable, "-m", "tide_pipeline.training", *arguments]
        team = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]

        def pass_on(number: int, _: object) -> None:
            for process in team:
                if process.poll() is None:
                    process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return _wait(team)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in team:
                process.kill()
                process.wait()


def _wait(team: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the others did not follow in time."""
    deadline = float("inf")
    while any(process.poll() is None for process in team) and time.monotonic() < deadline:
        if deadline == float("inf") and any(process.returncode for process in team):
            deadline = time.monotonic() + PATIENCE_S
        time.sleep(0.05)
    codes = [process.poll() for process in team]
    if AWAY in codes:                  # the others ended for want of the one that said why
        return AWAY
    killed = [(rank, code) for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed:
        rank, code = killed[0]
        print(f"process {rank} of {len(team)} was killed ({signal.Signals(-code).name}): "  # noqa: T201
              "the same command goes on from the last snapshot", file=sys.stderr)
        return STOPPED
    return next((code for code in codes if code), 0)
