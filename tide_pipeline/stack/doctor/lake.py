"""Findings about where signals go: room and speed of the disk, speed of the line to a bucket, against what capture may write.

The plan is `capture.max_bytes_per_hour`. A lake on a disk is tried there; one in a bucket is tried there too, and what waits or is built
lies on the state directory's disk. Writes and removes one small file.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tide_pipeline.capture.store import Store, open_store
from tide_pipeline.config import LakeUri, TideConfig
from tide_pipeline.stack.doctor.finding import Finding

TRIAL_BYTES = 32 * 10**6
HEADROOM = 4.0                     # a window closes in bursts
KEPT_H = 24                        # hours of capture that should fit
MIN_FREE_BYTES = 2 * 10**9         # builds, checkpoints and logs, without any capture


def check_lake(config: TideConfig, trial_bytes: int = TRIAL_BYTES) -> Iterator[Finding]:
    """Raises LakeError, OSError where the bucket can't be reached."""
    lake, plan = config.state.lake, float(config.capture.max_bytes_per_hour)
    in_bucket = isinstance(lake, LakeUri)
    disk = existing(config.state.root if in_bucket else Path(str(lake)))
    yield judge_room(str(disk), shutil.disk_usage(disk).free, 0.0 if in_bucket else plan)
    if not os.access(disk, os.W_OK):
        yield Finding("disk: speed", "fail", f"{disk} can't be written", "give this user the folder, or choose another one: --state DIR")
        return
    yield judge_speed("disk: speed", time_disk(disk, trial_bytes), 0.0 if in_bucket else plan, f"at {disk}")
    if in_bucket:
        up, down = time_bucket(open_store(str(lake)), trial_bytes)
        yield judge_speed("network: to the lake", up, plan, f"to {lake}")
        yield judge_speed("network: from the lake", down, plan, f"from {lake}")


def judge_room(where: str, free_bytes: float, plan_bytes_per_h: float) -> Finding:
    free = f"{free_bytes / 1e9:.1f} GB free at {where}"
    if free_bytes < MIN_FREE_BYTES:
        return Finding("disk: room", "fail", free,
                       f"free some, or choose another folder (--state DIR): {MIN_FREE_BYTES / 1e9:.0f} GB are the least")
    needed = KEPT_H * plan_bytes_per_h
    if free_bytes < needed:
        return Finding("disk: room", "warn", f"{free}; {KEPT_H} h of capture may take {needed / 1e9:.0f} GB",
                       "lower capture.max_bytes_per_hour, or keep less (`tide signals --help`)")
    return Finding("disk: room", "ok", free)


def judge_speed(name: str, bytes_per_s: float, plan_bytes_per_h: float, where: str) -> Finding:
    """`plan_bytes_per_h` 0: nothing is captured there."""
    needed = HEADROOM * plan_bytes_per_h / 3600
    told = f"{bytes_per_s / 1e6:.0f} MB/s {where}"
    if bytes_per_s < needed:
        return Finding(name, "warn", f"{told}; capture may come at {plan_bytes_per_h / 3.6e9:.1f} MB/s, {HEADROOM:g} times that in bursts",
                       "lower capture.max_bytes_per_hour or capture.share: what can't be written is dropped and counted")
    return Finding(name, "ok", told)


def existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def time_disk(folder: Path, size: int) -> float:
    """Bytes a second into a new file, until they are on the disk."""
    trial = folder / f".tide-doctor-{uuid.uuid4().hex}"
    data = os.urandom(size)
    began = time.monotonic()
    try:
        with trial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return size / max(time.monotonic() - began, 1e-6)
    finally:
        trial.unlink(missing_ok=True)


def time_bucket(store: Store, size: int) -> tuple[float, float]:
    """Bytes a second there and back, as the writer and the trainer go. Raises OSError."""
    data = os.urandom(size)
    began = time.monotonic()
    stored = store.put_bytes(f"_doctor-{uuid.uuid4().hex}", data)
    sent = time.monotonic()
    try:
        back = store.read_bytes(stored.key)
        done = time.monotonic()
    finally:
        store.remove(stored.key)
    if back != data:
        raise OSError(f"what came back from {stored.uri} is not what was sent")
    return size / max(sent - began, 1e-6), size / max(done - sent, 1e-6)
