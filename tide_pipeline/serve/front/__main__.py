"""`python -m tide_pipeline.serve.front`: the front as a process. Exit codes: 0 stopped by a signal, 2 could not start."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

from tide_pipeline.errors import TideError
from tide_pipeline.provenance import write_json
from tide_pipeline.serve import front as package
from tide_pipeline.serve.front.relay import Limits
from tide_pipeline.serve.front.server import Front

log = logging.getLogger("tide_pipeline.serve.front")


async def serve(args: argparse.Namespace) -> int:
    """Until SIGTERM or SIGINT."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    front = Front(args.replicas, Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)}))
    try:
        await front.start(args.host, args.port)
    except TideError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    write_json(args.state_file, {"state": "ready", "pid": os.getpid(), "url": front.url, "at": time.time()})
    log.info("listening at %s", front.url)
    await stopped.wait()
    log.info("stopping")
    await front.stop()
    write_json(args.state_file, {"state": "stopped", "pid": os.getpid(), "url": front.url, "at": time.time()})
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tide_pipeline.serve.front", description=(package.__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=Path, required=True, help="JSON file of replicas, watched (see replicas.py)")
    parser.add_argument("--state-file", type=Path, required=True, help="where to tell state, pid and url (JSON)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 for any free one")
    for limit in fields(Limits):
        default = getattr(Limits, limit.name)
        parser.add_argument(f"--{limit.name.replace('_', '-')}", type=type(default), default=default)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    return asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
