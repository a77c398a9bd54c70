"""Clients in threads of their own that never stop asking until the block ends. Knows no server and no request."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Clients(ABC):
    """`with` one of these: `ask` is called in each thread, and returns soon after `stopped` is set."""

    def __init__(self, clients: int) -> None:
        self.stopped = threading.Event()
        self._threads = [threading.Thread(target=self.ask, args=(i,), daemon=True) for i in range(clients)]

    @abstractmethod
    def ask(self, client: int) -> None: ...

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join(120)
