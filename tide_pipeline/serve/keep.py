"""Run a module as a child and start it again when it dies: the front's parent, as the supervisor is tritonserver's. Standard library only.

    python -m tide_pipeline.serve.keep MODULE ARGUMENTS...

Give the child a fixed port, or it comes back somewhere else. Exit codes: the child's when it ended by itself (0) or could not start (2).
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tide_pipeline.serve.process import die_with_parent, next_pause_s

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2                # before a restart; doubles
LONGEST_PAUSE_S = 10.0
COULD_NOT_START = 2


class Keeper:
    """Run it in the main thread: the child is killed with the thread that started it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """May be called from a signal handler."""
        self._stop.set()
        if self._child is not None:
            self._child.terminate()

    def run(self) -> int:
        """Until the child ends by itself, can't start the first time, or `stop`."""
        pause_s, restarts = FIRST_PAUSE_S / 2, 0
        while not self._stop.is_set():
            began = time.monotonic()
            self._child = subprocess.Popen(self._command, preexec_fn=die_with_parent)
            if self._stop.is_set():                        # it came before there was a child to tell
                self._child.terminate()
            code = self._child.wait()
            if self._stop.is_set() or code == 0 or (code == COULD_NOT_START and not restarts):
                return max(0, code)
            pause_s = next_pause_s(pause_s, time.monotonic() - began, FIRST_PAUSE_S, LONGEST_PAUSE_S)
            restarts += 1
            log.error("%s ended with code %d: restart %d in %g s", " ".join(self._command[1:3]), code, restarts, pause_s)
            self._stop.wait(pause_s)
        return 0


def main() -> int:
    if len(sys.argv) < 2:
        sys.stderr.write("which module? python -m tide_pipeline.serve.keep MODULE ARGUMENTS...\n")
        return COULD_NOT_START
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    keeper = Keeper([sys.executable, "-m", *sys.argv[1:]])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
