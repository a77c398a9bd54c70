"""What must hold after any fault: nothing committed is lost, nothing was promoted twice, what is served is what is recorded, no place in a
pool is held by the dead, and a request is answered. Waits for each as long as the loop may take to put it right; injects nothing.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from dataclasses import dataclass

import inject

from tests.faults.loop import Loop, until
from tests.helpers import ask
from tide_pipeline.capture.reader import identity, list_windows
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.drift.views import query
from tide_pipeline.errors import RegistryError, TideError
from tide_pipeline.rollout.history import is_under_way
from tide_pipeline.training.lake_check import check_lake

ALIAS_S = 60.0                     # the alias sensor looks every 30 s


@dataclass(frozen=True)
class Before:
    """What was committed when the fault came."""

    requests: frozenset[str]
    windows: frozenset[object]
    versions: frozenset[int]
    deployments: int


def look(loop: Loop) -> Before:
    with contextlib.suppress(RegistryError):
        return Before(_requests(loop), _windows(loop), frozenset(draft.version for draft in loop.registry.list()), loop.latest().n)
    return Before(_requests(loop), _windows(loop), frozenset(), loop.latest().n)


def assert_converged(loop: Loop, before: Before) -> float:
    """All of it. Returns the seconds that it took until it held."""
    began = time.monotonic()
    until(lambda: answers(loop), "a fresh request is not answered")
    until(lambda: not is_under_way(loop.latest()), "the rollout does not end")
    until(lambda: serves_the_record(loop), "replicas serve something else than the record says")
    until(lambda: loop.slot_holders() <= alive_runs(loop), f"a dead run holds a place: {loop.slot_holders()}")
    until(lambda: champion_is_served(loop), "the champion alias does not follow", seconds=ALIAS_S)
    took = time.monotonic() - began
    assert_lake(loop, before)
    assert_once(loop, before)
    return took


def assert_lake(loop: Loop, before: Before) -> None:
    """Sound, and every row that was there is there, once."""
    findings = [finding for part in check_lake(loop.config).values() for finding in part.findings]
    assert not findings, findings
    assert before.requests <= _requests(loop), "committed acceptance rows are gone"
    assert before.windows <= _windows(loop), "committed signals are gone"


def assert_once(loop: Loop, before: Before) -> None:
    """A draft has one version, and no build was promoted twice."""
    drafts = loop.registry.list()
    assert before.versions <= {draft.version for draft in drafts}
    assert max(Counter(draft.digest for draft in drafts).values(), default=1) == 1, "one draft, two versions"
    settled = [d.groups["rest"]["*"] for d in loop.record.history() if d.stage == "stable"]
    assert len(settled) == len(set(settled)), f"promoted twice: {settled}"
    numbers = [d.n for d in loop.record.history()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= before.deployments


def answers(loop: Loop) -> bool:
    request = ask(f"fresh-{uuid.uuid4().hex}", "hello world", max_tokens=8, ignore_eos=True)
    with contextlib.suppress(TideError):
        return loop.client.generate(request).num_output_tokens == 8
    return False


def serves_the_record(loop: Loop) -> bool:
    """Every replica reports the latest deployment, freshly, with the digests that its builds have."""
    latest, config = loop.latest(), loop.config
    digests = {tag: load_build(config.state.builds, config.target, build).draft_digest for tag, build in latest.groups["rest"].items()}
    seen = read_observed(config.state.observed, config.target)
    return set(seen) == set(config.serve.replica_names) and all(
        s.deployment == latest.n and s.draft_digests == digests and not s.error and time.time() - s.at < 5 for s in seen.values())


def champion_is_served(loop: Loop) -> bool:
    build = load_build(loop.config.state.builds, loop.config.target, loop.latest().groups["rest"]["*"])
    with contextlib.suppress(RegistryError):
        draft = loop.registry.find(build.draft_digest)
        return draft is not None and loop.registry.aliases().get("champion") == draft.version
    return False


def alive_runs(loop: Loop) -> set[str]:
    """Runs that are at work, as long as a worker is."""
    return {run.run_id for run in loop.runs() if not run.over} if inject.processes(loop.id, "run_worker") else set()


def _requests(loop: Loop) -> frozenset[str]:
    rows = query(loop.config, "select request_id, count(*) from requests group by 1")[1]
    assert all(count == 1 for _, count in rows), "a request is in the log twice"
    return frozenset(str(name) for name, _ in rows)


def _windows(loop: Loop) -> frozenset[object]:
    found = [identity(window) for window in list_windows(loop.config.state.signals, loop.config.target).windows]
    assert len(found) == len(set(found)), "a window is there twice"
    return frozenset(found)
