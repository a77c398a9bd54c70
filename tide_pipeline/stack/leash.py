"""Become another program: nicer than the parent, and told to end when the parent ends. Run by path; standard library only.

    python -I -S leash.py NICE PARENT_PID COMMAND...        PARENT_PID 0: outlive the parent
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    nice, parent, command = int(argv[0]), int(argv[1]), argv[2:]
    if nice:
        os.nice(nice)
    if parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:                         # it ended before we asked
            sys.exit("the parent has ended")
    try:
        os.execvp(command[0], command)                     # noqa: S606 a list, no shell
    except OSError as error:
        sys.exit(f"{command[0]} can't be run: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
