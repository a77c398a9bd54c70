"""The processes that train one draft together, and what they tell each other. Knows no draft and no data.

Every process holds the whole draft and computes its share of each batch. A sum comes out the same on every process to the last bit,
or at one of them alone, so all of them go on with the same weights and take the same decisions. One process alone is a team of one,
which talks to nobody.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tide_pipeline.errors import TrainingFailed

SILENCE = datetime.timedelta(minutes=10)       # a process that is not heard of for so long has gone


class Team:
    """Rank 0 writes files and reports; the others only compute."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mine(self, things: Sequence[Any]) -> Sequence[Any]:
        """This process's share, every `size`-th thing."""
        return things[self.rank :: self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; one message."""
        if self.size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with _together():
            dist.all_reduce(flat)
        for t, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def sum_at(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Each tensor's sum over all processes, at the one that owns it; elsewhere what it then holds means nothing."""
        if self.size > 1:
            with _together():
                _finished([dist.reduce(t, dst=owner, async_op=True) for t, owner in zip(tensors, owners, strict=True)])

    def hand_out(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Each tensor as its owner has it, to all."""
        if self.size > 1:
            with _together():
                _finished([dist.broadcast(t, src=owner, async_op=True) for t, owner in zip(tensors, owners, strict=True)])

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All processes' tensors, fp32, in the host memory of the first one; the others get nothing back. One is under way at a time."""
        assert all(t.dtype == torch.float32 for t in tensors.values())
        everyones = [json.loads(text) for text in self.everyones(json.dumps({name: list(t.shape) for name, t in tensors.items()}))]
        if not self.is_first:
            with _together():
                for t in tensors.values():
                    dist.send(t.to(self.device).contiguous(), dst=0)
            return {}
        found = {name: t.detach().cpu() for name, t in tensors.items()}
        with _together():
            for rank, shapes in enumerate(everyones[1:], 1):
                for name, shape in shapes.items():
                    received = torch.empty(shape, device=self.device)
                    dist.recv(received, src=rank)
                    found[name] = received.cpu()
        return found

    def latest(self, *values: float) -> list[float]:
        """The greatest of each value over all processes."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _together():
            dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return [float(v) for v in together.tolist()]

    def everyones(self, text: str) -> list[str]:
        """One text of each process, by rank."""
        if self.size == 1:
            return [text]
        own = text.encode()
        (longest,) = self.latest(float(len(own)))                  # as bytes: torch would pickle an object
        mine = torch.zeros(int(longest), dtype=torch.uint8)
        mine[:len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        lengths, padded = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)], [
            torch.zeros_like(mine, device=self.device) for _ in range(self.size)]
        with _together():
            dist.all_gather(lengths, torch.tensor([len(own)], device=self.device))
            dist.all_gather(padded, mine.to(self.device))
        return [bytes(part[:int(n)].tolist()).decode() for part, n in zip(padded, lengths, strict=True)]

    def wait(self) -> None:
        """Until all are here."""
        self.latest(0.0)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def _finished(messages: Sequence[Any]) -> None:
    for message in messages:
        message.wait()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingFailed(f"another process of this run has gone ({str(error).splitlines()[0][:200]}): the same command goes on "
                             "from the last snapshot") from error


def team_of_environment(devices: Sequence[str], device: str) -> Team:
    """The team that torchrun, or `launch.py`, put this process into: RANK, LOCAL_RANK and WORLD_SIZE; alone without them.

    TIDE_RENDEZVOUS names a file where the processes of one machine find each other, over the loopback interface; without it
    they use the address that torchrun gave them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team(device=devices[0] if devices else device)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    mine = devices[local % len(devices)] if devices else f"cuda:{local}" if device == "cuda" else device
    where = os.environ.get("TIDE_RENDEZVOUS")
    if where and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if mine.startswith("cuda"):
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.startswith("cuda") else "gloo", init_method=f"file://{where}" if where else "env://",
                            rank=rank, world_size=size, timeout=SILENCE)
    return Team(rank, size, mine)
