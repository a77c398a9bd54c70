"""On which machine a run's worker is. Knows tags, names and addresses; judges no run.

The default run launcher tags a run with the code server that spawned its worker. `localhost` is this machine. Any other name may mean
another machine tomorrow, so the worker itself says in a tag where it is: a process id that is gone here says nothing about one there.
"""

import json
import os
import socket
from collections.abc import Mapping

import dagster as dg

from tide_pipeline.defs.tags import WORKER

LAUNCHED_BY = ".dagster/grpc_info"         # tag of the default run launcher
HERE = ("localhost", "127.0.0.1", "0.0.0.0", "::1")      # noqa: S104 - names of this machine, nothing is bound


def say_where(instance: dg.DagsterInstance, run_id: str) -> None:
    """Called by a run's worker. A run that is run again inherits the tag: it counts only with the id of its own worker."""
    instance.add_run_tags(run_id, {WORKER: _worker(os.getpid())})


def is_of_this_machine(run: dg.DagsterRun, pid: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the worker with this process id was spawned by the code server of this machine. In doubt it was not.

    A code server known by another name (Compose: `dagster-code`) counts when it is the one at TIDE_DAGSTER_CODE_HOST, that name means
    this machine alone, and the worker gave this machine's host name. Two machines behind one name need host names of their own.
    """
    if _host(run) in HERE:
        return True
    return may_be_of_this_machine(run, environment) and run.tags.get(WORKER) == _worker(pid) and means_this_machine_alone(_host(run))


def may_be_of_this_machine(run: dg.DagsterRun, environment: Mapping[str, str] = os.environ) -> bool:
    """Cheap, from the run's tags."""
    return _host(run) in (*HERE, environment.get("TIDE_DAGSTER_CODE_HOST") or "localhost")


def means_this_machine_alone(name: str) -> bool:
    """Whether every address of a name is one of this machine's."""
    import psutil

    try:
        named = {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    ours = {address.address.partition("%")[0] for interface in psutil.net_if_addrs().values() for address in interface}
    return bool(named) and named <= ours


def _host(run: dg.DagsterRun) -> str:
    return str(json.loads(run.tags.get(LAUNCHED_BY, "{}")).get("host", ""))


def _worker(pid: int) -> str:
    return f"{socket.gethostname()}/{pid}"
