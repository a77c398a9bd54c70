"""States and tokens of TensorRT-LLM's passes on a GPU: written on the server's stream in one thread, read and released in another.

NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import queue
import threading
import time

import pytest
import torch

from tide_pipeline.engine.trtllm.shipment import Shipment, Shipper

pytestmark = pytest.mark.gpu
PASSES, ROWS, WIDTH = 400, 512, 3 * 1_024


def test_every_pass_arrives_whole_or_is_counted(device: torch.device) -> None:
    """The buffer is overwritten right after each pass, as the next one does; the reader is now fast, now slow."""
    shipper, shipped = Shipper(ROWS, WIDTH // 3, 3, device), queue.SimpleQueue[tuple[int, int, Shipment] | None]()
    kept = dropped = 0

    def serve() -> None:
        buffer = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device=device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for number in range(PASSES):
                rows = 1 + number * 37 % ROWS
                buffer.fill_(float(number % 251))
                numbers = [torch.full((4, 3), number, dtype=torch.int32, device=device), torch.arange(4, device=device)]
                shipped.put((number, rows, shipper.ship(buffer[:rows], numbers)))
                buffer.fill_(-1.0)
        shipped.put(None)

    server = threading.Thread(target=serve)
    server.start()
    while (entry := shipped.get()) is not None:
        number, rows, shipment = entry
        while not shipment.is_ready():
            time.sleep(0)
        assert shipment.numbers() == [[[number] * 3] * 4, [0, 1, 2, 3]]
        if shipment.handle is None:
            dropped += rows
        else:
            kept += 1
            assert bool((shipper.ring.rows(shipment.handle) == float(number % 251)).all()) and shipment.handle.stop == rows
        shipment.release()
        if number % 50 < 10:
            time.sleep(0.002)
    server.join()
    assert kept > 0 and shipper.ring.dropped_rows == dropped
