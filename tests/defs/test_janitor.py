"""A run whose worker process was killed must not hold its place for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData

from tide_pipeline.definitions import defs
from tide_pipeline.defs.janitor import is_alive, janitor_sensor
from tide_pipeline.defs.tags import WORKER
from tide_pipeline.defs.whereabouts import LAUNCHED_BY, means_this_machine_alone, say_where

ELSEWHERE = "198.51.100.7"         # kept for documentation: no machine has it
HERE = {LAUNCHED_BY: json.dumps({"host": "localhost", "socket": "/somewhere"})}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def started(instance: dg.DagsterInstance, pid: int, tags: dict[str, str] = HERE,
            status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED) -> str:
    """A run as the default run launcher and its worker leave it in the instance."""
    run = instance.create_run_for_job(defs().resolve_job_def("rollback"), status=status, tags=tags)
    instance.report_engine_event(f"Started process for run (pid: {pid}).", run, EngineEventData.in_process(pid))
    return run.run_id


def sweep(instance: dg.DagsterInstance) -> str:
    told = janitor_sensor(dg.build_sensor_context(instance=instance))
    assert isinstance(told, dg.SkipReason) and told.skip_message
    return told.skip_message


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_a_run_without_its_worker_fails(instance: dg.DagsterInstance, gone: int) -> None:
    lost, alive = started(instance, gone), started(instance, os.getpid())
    assert sweep(instance) == f"2 runs in progress, 1 without a worker, failed: {lost}"
    assert status(instance, lost) == dg.DagsterRunStatus.FAILURE
    assert status(instance, alive) == dg.DagsterRunStatus.STARTED
    assert sweep(instance) == "1 runs in progress, 0 without a worker"


def test_a_cancelled_run_whose_worker_died_ends_too(instance: dg.DagsterInstance, gone: int) -> None:
    lost = started(instance, gone, status=dg.DagsterRunStatus.CANCELING)
    sweep(instance)
    assert status(instance, lost) == dg.DagsterRunStatus.FAILURE


def test_its_pool_slot_comes_back(tmp_path: Path, gone: int) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:         # pools need a database
        storage = instance.event_log_storage
        storage.set_concurrency_slots("train_gpu", 1)
        assert storage.claim_concurrency_slot("train_gpu", started(instance, gone), "draft_checkpoint").is_claimed
        sweep(instance)
        assert storage.get_concurrency_info("train_gpu").active_slot_count == 0


@pytest.mark.parametrize("tags", [{}, {LAUNCHED_BY: json.dumps({"host": "10.0.0.7", "port": 4000})}])
def test_workers_of_other_machines_are_not_judged(instance: dg.DagsterInstance, gone: int, tags: dict[str, str]) -> None:
    elsewhere = started(instance, gone, tags)
    assert "0 without a worker" in sweep(instance)
    assert status(instance, elsewhere) == dg.DagsterRunStatus.STARTED


@pytest.fixture
def code_host(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of this machine by which, as in Compose, daemon and webserver find the code server."""
    import psutil

    addresses = [a.address for interface in psutil.net_if_addrs().values() for a in interface if a.family == socket.AF_INET]
    name = next((n for n in (socket.gethostname(), *addresses) if n not in ("localhost", "127.0.0.1") and means_this_machine_alone(n)), "")
    if not name:
        pytest.skip("this machine knows itself by no name or address but localhost")
    monkeypatch.setenv("TIDE_DAGSTER_CODE_HOST", name)
    return name


def launched_by(host: str, worker: str) -> dict[str, str]:
    return {LAUNCHED_BY: json.dumps({"host": host, "port": 4000}), WORKER: worker}


def test_a_worker_beside_a_code_server_that_others_know_by_name(instance: dg.DagsterInstance, gone: int, code_host: str) -> None:
    lost = started(instance, gone, launched_by(code_host, f"{socket.gethostname()}/{gone}"))
    alive = started(instance, os.getpid(), launched_by(code_host, ""))
    say_where(instance, alive)
    assert sweep(instance) == f"2 runs in progress, 1 without a worker, failed: {lost}"
    assert status(instance, alive) == dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize("worker", ["", "another-machine/{gone}", "{here}/1"],
                         ids=["it has not said where", "it was on the machine that had the name before", "inherited from the run before"])
def test_a_worker_that_may_be_elsewhere_is_not_judged(instance: dg.DagsterInstance, gone: int, code_host: str, worker: str) -> None:
    run_id = started(instance, gone, launched_by(code_host, worker.format(gone=gone, here=socket.gethostname())))
    assert "0 without a worker" in sweep(instance)
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize("name", [ELSEWHERE, "no-such-host.invalid"])
def test_a_name_that_means_no_machine_or_another(
        instance: dg.DagsterInstance, gone: int, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two machines may have the same host name."""
    monkeypatch.setenv("TIDE_DAGSTER_CODE_HOST", name)
    run_id = started(instance, gone, launched_by(name, f"{socket.gethostname()}/{gone}"))
    assert "0 without a worker" in sweep(instance)
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


def test_steps_that_ended_are_not_the_worker(instance: dg.DagsterInstance, gone: int) -> None:
    """The multiprocess executor reports each step's process too."""
    run_id = started(instance, os.getpid())
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_engine_event("Executing step in subprocess.", run, EngineEventData.in_process(gone))
    sweep(instance)
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


def test_a_process_id_that_is_used_again_is_another_process() -> None:
    assert is_alive(os.getpid(), time.time())
    assert not is_alive(os.getpid(), time.time() - 86_400 * 365)
