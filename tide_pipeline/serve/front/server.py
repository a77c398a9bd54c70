"""The front as an object: listens, counts, stops. Knows asyncio; no command line."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from tide_pipeline.errors import PortInUse
from tide_pipeline.serve.front.http import ClientReader
from tide_pipeline.serve.front.relay import Limits, Relay
from tide_pipeline.serve.front.replicas import Fleet
from tide_pipeline.serve.front.visit import Visit

log = logging.getLogger(__name__)

PATIENCE_S = 20.0                  # requests in flight get this long at a stop


class Front:
    """`await start()`, and it serves on the running loop until `await stop()`."""

    def __init__(self, replicas_file: Path, limits: Limits | None = None) -> None:
        self.fleet = Fleet(replicas_file)
        self.relay = Relay(self.fleet, limits or Limits())
        self.url = ""
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Knows its replicas and serves when it returns. Raises PortInUse."""
        self.fleet.read()
        await self.fleet.probe()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._protocol, host, port, backlog=self.relay.limits.connections)
        except OSError as error:
            raise PortInUse(f"port {port} of {host} can't be used ({error.strerror}): give --port a free one, or 0 for any") from error
        self.url = f"http://{host}:{self._server.sockets[0].getsockname()[1]}"
        self._watch = loop.create_task(self.fleet.watch())

    async def stop(self, patience_s: float = PATIENCE_S) -> None:
        """Take nothing new, let what is in flight end, cut what does not."""
        self._server.close()
        self.relay.stopping = True
        gives_up = time.monotonic() + patience_s
        while self.relay.in_flight and time.monotonic() < gives_up:
            await asyncio.sleep(0.02)
        ending = [*self._clients, self._watch]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for replica in self.fleet.replicas.values():
            replica.close_idle()

    def status(self) -> dict[str, Any]:
        """What /front/status says. `refused`: by status; `left`: their client went; `cut`: their replica ended within the answer."""
        counts = self.relay.counts
        return {"ready": self.fleet.ready(), "connections": len(self._clients), "in_flight": self.relay.in_flight,
                "served": counts["served"], "refused": {status: n for status, n in sorted(counts.items()) if status.isdigit()},
                "left": counts["left"], "cut": counts["cut"], "file_error": self.fleet.error,
                "replicas": [replica.told() for replica in self.fleet.replicas.values()]}

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        """One per client. asyncio.start_server can't be given a reader of ours."""
        reader = ClientReader(self.relay.limits.head_bytes)

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            most, there = self.relay.limits.connections, len(self._clients)
            if there >= 2 * most:                          # not even time to be refused
                writer.transport.abort()
                return
            visit = Visit(reader, writer, self.relay, self.status)
            task = asyncio.get_running_loop().create_task(visit.run(is_too_many=there >= most))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)

        return asyncio.StreamReaderProtocol(reader, connected)
