"""A disk that fills up and a bucket that stops answering, under a real replica: answers go on, what was committed stays, the rest comes.

And a bucket that stops answering an adaptation: what was trained waits for it, and is judged once it is back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import inject
import pytest

from tests.faults.converged import assert_converged, assert_lake, look, serves_the_record
from tests.faults.load import Load
from tests.faults.loop import PATIENCE_S, Loop, tiny_loop, until
from tide_pipeline.config import StackSettings
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.drift.views import query
from tide_pipeline.provenance import write_json
from tide_pipeline.serve.process import choose_ports

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::ResourceWarning")]

FULL_S, SILENT_S = 8.0, 60.0
EVENTS = """
query Log($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events { __typename ... on MessageEvent { stepKey } } } } }
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def fill(place: Path) -> Path:
    """Until not a byte is left."""
    file = place / "filler"
    with file.open("wb", buffering=0) as stream:
        for size in (2**20, 2**12):
            with contextlib.suppress(OSError):
                while stream.write(bytes(size)) == size:
                    pass
    assert os.statvfs(place).f_bavail == 0
    return file


def test_a_full_disk_costs_no_answer(small_disk: Path) -> None:
    """State, lake and logs are on it. A server that dies meanwhile comes back when there is room."""
    with tiny_loop(small_disk, parts=("replica",)) as loop:
        before = look(loop)
        with Load(loop.client, name="full") as load:
            until(lambda: len(load.answered) >= 10)
            filler, answered = fill(small_disk), len(load.answered)
            full_at = time.monotonic()
            time.sleep(FULL_S)
            assert not load.failures and len(load.answered) > answered
            with pytest.raises(OSError, match="No space"):
                write_json(loop.record.folder / "000002.json", {"n": "x" * 10_000}, exclusive=True)
            assert [d.n for d in DeploymentRecord(loop.config.state.deployments, "tiny").history()] == [1]
            gap_s = load.gap_s(full_at, time.monotonic())
            assert inject.kill(loop.id, "triton")
            time.sleep(FULL_S / 2)
            filler.unlink()
            room_at = time.monotonic()
            until(lambda: serves_the_record(loop), "the replica does not come back")
            back_s = time.monotonic() - room_at
            answered = len(load.answered)
            until(lambda: len(load.answered) >= answered + 10)
        load.assert_same_answers()
        until(lambda: len(_names(loop, "full")) > 10, "the log does not go on")
        print(f"FAULT full disk: {FULL_S:.0f} s without a failed request, longest wait for a token {gap_s:.1f} s; a server killed then is "
              f"back {back_s:.1f} s after there is room")
        assert_lake(loop, before)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """moto's server as a process of its own, with a bucket "tide" in it."""
    pytest.importorskip("moto.server")
    import boto3

    port = choose_ports(StackSettings(), ("front_port",))[0]
    url = f"http://127.0.0.1:{port}"
    for name, value in (("AWS_ENDPOINT_URL_S3", url), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
                        ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    with (tmp_path / "moto.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        def made() -> bool:
            with contextlib.suppress(Exception):
                boto3.client("s3").create_bucket(Bucket="tide")
                return True
            return False

        until(made, "moto does not answer")
        yield server
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait()


def test_a_bucket_that_is_silent_for_a_minute_costs_no_answer(tmp_path: Path, bucket: subprocess.Popen[bytes]) -> None:
    with tiny_loop(tmp_path, {"lake": "s3://tide/lake"}, parts=("replica",)) as loop:
        until(lambda: len(_names(loop, "before")) == 24, "the traffic before is not in the bucket")
        before = look(loop)
        with Load(loop.client, clients=2, name="silent") as load:
            until(lambda: len(load.answered) >= 10)
            bucket.send_signal(signal.SIGSTOP)
            silent_at, answered = time.monotonic(), len(load.answered)
            time.sleep(SILENT_S)
            answered_then = len(load.answered) - answered
            gap_s = load.gap_s(silent_at, time.monotonic())
            bucket.send_signal(signal.SIGCONT)
            back_at, count = time.monotonic(), len(load.answered)
            until(lambda: len(load.answered) >= count + 10)
        assert not load.failures and answered_then > 10
        load.assert_same_answers()
        last = sum(load.versions.values())
        until(lambda: len(_names(loop, "silent")) >= min(last, 20), "what was answered meanwhile does not arrive")
        logged, after_s = len(_names(loop, "silent")), time.monotonic() - back_at
        print(f"FAULT silent bucket: {SILENT_S:.0f} s, {answered_then} requests answered then, longest wait for a token {gap_s:.1f} s; "
              f"{logged} of {last} in the log {after_s:.1f} s after it answered again")
        assert_lake(loop, before)


def test_a_bucket_that_is_silent_longer_than_the_gate_has_patience(tmp_path: Path, bucket: subprocess.Popen[bytes]) -> None:
    """From before the gate asks for its windows until it has given up on them: the client tries three times, for half a minute each."""
    with tiny_loop(tmp_path, {"lake": "s3://tide/lake"}) as loop:
        until(lambda: len(_names(loop, "before")) == 24, "the traffic before is not in the bucket")
        before, run_id = look(loop), loop.launch("bucket away")
        loop.await_step(run_id, "registered_draft")
        bucket.send_signal(signal.SIGSTOP)
        silent_at = time.monotonic()
        until(lambda: "benchmark_report" in _retried(loop, run_id), "the gate did not ask for another try", seconds=2 * PATIENCE_S)
        silent_s = time.monotonic() - silent_at
        assert loop.run(run_id).status == "STARTED"
        bucket.send_signal(signal.SIGCONT)
        back_at = time.monotonic()
        view = loop.await_success(run_id)
        assert view.run_id == run_id and _retried(loop, run_id) == {"benchmark_report"}, "trained once, and no attempt was lost"
        ended_s = time.monotonic() - back_at
        print(f"FAULT silent bucket at the gate: {silent_s:.0f} s, the run ended {ended_s:.1f} s after it answered again, "
              f"converged after {assert_converged(loop, before):.1f} s")


def _retried(loop: Loop, run_id: str) -> set[str]:
    """Steps that were, or will be, tried again."""
    events = loop.graphql(EVENTS, {"id": run_id}).get("logsForRun", {}).get("events", [])
    return {event["stepKey"] for event in events if event["__typename"] == "ExecutionStepUpForRetryEvent"}


def _names(loop: Loop, prefix: str) -> set[str]:
    with contextlib.suppress(Exception):
        return {str(row[0]) for row in query(loop.config, "select request_id from requests")[1] if str(row[0]).startswith(f"{prefix}-")}
    return set()
