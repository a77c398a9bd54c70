"""Run a module as a child and start it again when it dies. The parent of every part of a stack; standard library only.

    python -m tide_pipeline.serve.keep [--first] [--whole] MODULE ARGUMENTS...

Give the child a fixed port, or it comes back somewhere else. `--first`: a first start that fails in its first seconds with any exit code
is taken at its word; without it only code 2 is ("could not start"). `--whole`: what the child leaves behind goes before it is started
again (a worker that still holds the port); without it its children may outlive it (runs of Dagster's code server). Exit codes: the
child's when it ended by itself (0) or could not start.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tide_pipeline.serve.process import HEALTHY_S, die_with_parent, end_group, next_pause_s

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2                # before a restart; doubles
LONGEST_PAUSE_S = 10.0
COULD_NOT_START = 2
GRACE_S = 10.0                     # at a stop, for what is below the child


class Keeper:
    """Run it in the main thread: the child is killed with the thread that started it."""

    def __init__(self, command: Sequence[str], *, first: bool = False, whole: bool = False) -> None:
        self._command, self._first, self._whole = command, first, whole
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """May be called from a signal handler."""
        self._stop.set()
        if self._child is not None:
            self._end(self._child)

    def run(self) -> int:
        """Until the child ends by itself, can't start the first time, or `stop`."""
        pause_s, restarts = FIRST_PAUSE_S / 2, 0
        while not self._stop.is_set():
            began = time.monotonic()
            code = self._run_once()
            ran_s = time.monotonic() - began
            if self._stop.is_set() or code == 0 or (not restarts and self._could_not_start(code, ran_s)):
                return max(0, code)
            pause_s = next_pause_s(pause_s, ran_s, FIRST_PAUSE_S, LONGEST_PAUSE_S)
            restarts += 1
            log.error("%s ended with code %d: restart %d in %g s", " ".join(self._command[1:3]), code, restarts, pause_s)
            self._stop.wait(pause_s)
        return 0

    def _run_once(self) -> int:
        child = self._child = subprocess.Popen(self._command, preexec_fn=die_with_parent, start_new_session=self._whole)
        if self._stop.is_set():                            # it came before there was a child to tell
            self._end(child)
        code = child.wait()
        if self._whole:
            end_group(child.pid, GRACE_S if self._stop.is_set() else 0.0)
        return code

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGTERM) if self._whole else child.terminate()

    def _could_not_start(self, code: int, ran_s: float) -> bool:
        return code == COULD_NOT_START or (self._first and code > 0 and ran_s < HEALTHY_S)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tide_pipeline.serve.keep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first", action="store_true", help="a first start that fails in its first seconds is final, with any exit code")
    parser.add_argument("--whole", action="store_true", help="what it leaves behind goes before it is started again")
    parser.add_argument("module", help="as for python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    keeper = Keeper([sys.executable, "-m", args.module, *args.arguments], first=args.first, whole=args.whole)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
