"""Rollouts as a state machine: whatever replicas, traffic, drivers and people do, and wherever a driver dies.

The record is real in its rules (a number is taken once) and kept in memory; `next_action` and `record_of` are the ones that run. A
driver reads, and may write much later, after others have: that is a crash between the two, a slow driver, and two drivers at once.
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tide_pipeline.config import RolloutSettings
from tide_pipeline.contracts import Deployment, ObservedState
from tide_pipeline.errors import DeploymentConflict
from tide_pipeline.rollout.bake import Evidence
from tide_pipeline.rollout.history import (
    CANARY,
    PAUSED,
    ROLLED_BACK,
    ROLLING,
    STABLE,
    UNDER_WAY,
    began_of,
    held,
    is_under_way,
    opened,
    rest_of,
    restored,
    settled,
    withdrawn,
)
from tide_pipeline.rollout.live import Rate
from tide_pipeline.rollout.plan import Action, Kind, Sight, next_action, next_count, record_of
from tide_pipeline.rollout.sequential import Gap

NAMES = tuple(f"replica-{i}" for i in range(4))
DIGESTS = {"old": "0" * 64, "new1": "1" * 64, "new2": "2" * 64}
SETTINGS = RolloutSettings(bake_s=5.0, max_bake_s=60.0, step_s=2.0, serve_timeout_s=100.0, heartbeat_s=10.0)
BETTER = Evidence(Rate(0.8, 0.01, 1000, 100), Rate(0.5, 0.01, 1000, 100), has_traffic=True)
WORSE = Evidence(Rate(0.2, 0.01, 1000, 100), Rate(0.5, 0.01, 1000, 100), has_traffic=True)
UNCLEAR = Evidence(Rate(0.4, 0.05, 40, 10), Rate(0.5, 0.05, 40, 10), has_traffic=True)
QUIET = Evidence(Rate(0.0, 0.0, 0))
AS_FAST = Gap(0.0, 0.01, 20)
TIMED = dataclasses.replace(BETTER, slower=AS_FAST, slower_than="beside it")
SOMEHOW_TIMED = dataclasses.replace(BETTER, slower=Gap(0.1, 0.15, 20))


class Record:
    """DeploymentRecord in memory."""

    def __init__(self) -> None:
        self.all = [Deployment(1, "t", {"rest": {"*": "old"}}, (), STABLE, "tide", "shipped", 1000.0)]

    def latest(self) -> Deployment:
        return self.all[-1]

    def append(self, deployment: Deployment, now: float) -> Deployment:
        if deployment.n != self.all[-1].n + 1:
            raise DeploymentConflict("somebody else was faster")
        self.all.append(dataclasses.replace(deployment, created_at=now))
        return self.all[-1]


class World(RuleBasedStateMachine):
    """Time, replicas that follow the record or don't, traffic, two drivers and a person."""

    def __init__(self) -> None:
        super().__init__()
        self.record, self.now, self.evidence = Record(), 1000.0, QUIET
        self.states = {name: self._follow(name, self.record.latest(), self.now) for name in NAMES}
        self.silent: set[str] = set()
        self.refusing: set[str] = set()
        self.cheating: set[str] = set()
        self.starting: set[str] = set()
        self.minds: list[tuple[Deployment, Sight, Action] | None] = [None, None]       # what each driver read and decided, not yet written

    # --- what happens outside ---------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.3, 1.0, 3.0, 12.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._report()

    @rule(name=st.sampled_from(NAMES), what=st.sampled_from(["silent", "refusing", "cheating", "starting", "well"]))
    def a_replica_changes(self, name: str, what: str) -> None:
        for troubled in (self.silent, self.refusing, self.cheating, self.starting):
            troubled.discard(name)
        if what != "well":
            getattr(self, what).add(name)

    @rule(evidence=st.sampled_from([BETTER, WORSE, UNCLEAR, QUIET, TIMED, SOMEHOW_TIMED]))
    def traffic_says(self, evidence: Evidence) -> None:
        self.evidence = evidence

    # --- drivers ----------------------------------------------------------------------------------------------------

    @rule(driver=st.integers(0, 1))
    def a_driver_reads(self, driver: int) -> None:
        """And may die before it writes: then this is all there was of it."""
        latest = self.record.latest()
        self.minds[driver] = (latest, self._sight(), next_action(latest, self._sight(), SETTINGS))

    @rule(driver=st.integers(0, 1))
    def a_driver_writes(self, driver: int) -> None:
        mind, self.minds[driver] = self.minds[driver], None
        if mind is None:
            return
        latest, sight, action = mind
        wanted = record_of(action, latest, f"driver {driver}", "title")
        is_stale = latest.n != self.record.latest().n
        if wanted is None:
            return
        if latest.stage == CANARY and wanted.stage in (ROLLING, STABLE):
            self._was_baked(latest, sight)
        if is_stale:
            with pytest.raises(DeploymentConflict):
                self.record.append(wanted, self.now)
        else:
            self.record.append(wanted, self.now)

    def _was_baked(self, latest: Deployment, sight: Sight) -> None:
        """Each canary has served it for so long, whenever it began to; what the gate left to them was measured."""
        assert all(sight.replicas[name].drafts == latest.groups["canary"] for name in latest.canary_replicas)
        assert all(sight.now - sight.replicas[name].serving_since >= SETTINGS.bake_s for name in latest.canary_replicas)
        assert not latest.deferred or sight.evidence in (TIMED, SOMEHOW_TIMED)

    # --- people -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: not is_under_way(self.record.latest()))
    @rule(build=st.sampled_from(["new1", "new2"]), canaries=st.integers(1, 2), deferred=st.sampled_from([(), ("benchmark",)]))
    def a_rollout_is_opened(self, build: str, canaries: int, deferred: tuple[str, ...]) -> None:
        live = [name for name in NAMES if name not in self.silent]
        if rest_of(self.record.latest())["*"] != build and len(live) > canaries:
            self._report()
            self.record.append(opened(self.record.latest(), "t", "*", build, live[:canaries], "run", "drift", deferred=deferred), self.now)

    @precondition(lambda self: is_under_way(self.record.latest()))
    @rule(what=st.sampled_from(["pause", "resume", "abort"]))
    def a_person_acts(self, what: str) -> None:
        latest = self.record.latest()
        if what == "abort":
            self.record.append(restored(latest, "t", rest_of(latest), "me", "abort"), self.now)
        elif (what == "pause") == (latest.hold == ""):
            self.record.append(held(latest, PAUSED if what == "pause" else "", "me", what), self.now)

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def each_record_follows_from_the_one_before(self) -> None:
        for before, after in zip(self.record.all, self.record.all[1:], strict=False):
            assert after.n == before.n + 1
            allowed = {STABLE: {CANARY}, ROLLED_BACK: {CANARY}, CANARY: {CANARY, ROLLING, STABLE, ROLLED_BACK},
                       ROLLING: {ROLLING, STABLE, ROLLED_BACK}}
            assert after.stage in allowed[before.stage]
            if after.stage == ROLLING and after.hold == before.hold == "":
                assert set(before.canary_replicas) < set(after.canary_replicas) or "resume" in after.reason
            if before.hold == PAUSED and after.hold == "":
                assert after.stage in (before.stage, ROLLED_BACK), "a paused rollout goes nowhere but back"

    @invariant()
    def what_is_new_was_a_canary_first(self) -> None:
        for i, deployment in enumerate(self.record.all[1:], 1):
            if rest_of(deployment) != rest_of(self.record.all[i - 1]):
                mine = [d for d in self.record.all[:i] if began_of(d) == deployment.began]
                assert deployment.stage == STABLE and mine[0].stage == CANARY and mine[0].groups["canary"] == rest_of(deployment)
                assert deployment.created_at - mine[0].created_at >= SETTINGS.bake_s

    @invariant()
    def a_rollout_comes_to_an_end_when_the_world_calms_down(self) -> None:
        """From wherever we are, by a driver that knows nothing but the record."""
        copy, now, states = Record(), self.now, dict(self.states)
        copy.all = list(self.record.all)
        if copy.latest().hold == PAUSED:
            copy.append(held(copy.latest(), "", "me", "resume"), now)
        for _ in range(40):
            latest = copy.latest()
            if not is_under_way(latest):
                break
            now += 3.0
            states = {name: self._follow(name, latest, now, states.get(name)) for name in NAMES}
            wanted = record_of(next_action(latest, Sight(states, DIGESTS, UNCLEAR, now), SETTINGS), latest, "driver", "title")
            if wanted is not None:
                copy.append(wanted, now)
        assert copy.latest().stage in (STABLE, ROLLED_BACK)
        if is_under_way(self.record.latest()) and self.record.latest().stage == CANARY and self.record.latest().deferred:
            assert copy.latest().stage == ROLLED_BACK, "nothing was timed"

    # ----------------------------------------------------------------------------------------------------------------

    def _sight(self) -> Sight:
        return Sight(dict(self.states), DIGESTS, self.evidence, self.now)

    def _follow(self, name: str, latest: Deployment, now: float, before: ObservedState | None = None) -> ObservedState:
        drafts = latest.drafts_for(name)
        since = before.serving_since if before is not None and before.drafts == drafts else now
        return ObservedState(name, "t", latest.n, drafts, {tag: DIGESTS[b] for tag, b in drafts.items()}, 2.0, 100.0, "", now, 1, 0, since)

    def _report(self) -> None:
        for name in NAMES:
            if name in self.silent:
                continue
            state = self._follow(name, self.record.latest(), self.now, self.states[name])
            if name in self.starting and state.drafts != self.states[name].drafts:
                state = dataclasses.replace(self.states[name], at=self.now)
            elif name in self.refusing:
                state = dataclasses.replace(self.states[name], error="can't load it", at=self.now)
            elif name in self.cheating:
                state = dataclasses.replace(state, draft_digests=dict.fromkeys(state.drafts, "f" * 64))
            self.states[name] = state


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=60, stateful_step_count=40)


def canary(deferred: tuple[str, ...] = ()) -> Deployment:
    return Deployment(2, "t", {"rest": {"*": "old"}, "canary": {"*": "new1"}}, NAMES[:1], CANARY, "run", "drift", 1000.0, "*", 2,
                      deferred=deferred)


def sight(latest: Deployment, evidence: Evidence, age: float, **change: object) -> Sight:
    now = latest.created_at + age
    states = {}
    for name in NAMES:
        drafts = latest.drafts_for(name)
        states[name] = ObservedState(name, "t", latest.n, drafts, {t: DIGESTS[b] for t, b in drafts.items()}, 2.0, 0.0, "", now, 1)
    states[NAMES[0]] = dataclasses.replace(states[NAMES[0]], **change)  # type: ignore[arg-type]
    return Sight(states, DIGESTS, evidence, now)


@pytest.mark.parametrize(("evidence", "age", "change", "kind", "says"), [
    (BETTER, 1.0, {}, Kind.WAIT, "bake 1 s"),
    (BETTER, 6.0, {}, Kind.WIDEN, "drop -0.30"),
    (WORSE, 1.0, {}, Kind.BACK, "drop +0.30"),
    (UNCLEAR, 30.0, {}, Kind.WAIT, "drop +0.10"),
    (UNCLEAR, 61.0, {}, Kind.WIDEN, "drop +0.10"),
    (QUIET, 6.0, {}, Kind.WAIT, "no drafted step"),
    (dataclasses.replace(QUIET, error="no lake"), 99.0, {}, Kind.WAIT, "can't be seen: no lake"),
    (dataclasses.replace(QUIET, error="no lake"), 99.0, {"at": 1005.0}, Kind.BACK, "stopped reporting"),
    (QUIET, 10.0, {}, Kind.WIDEN, "nothing was compared"),
    (BETTER, 20.0, {"at": 1005.0}, Kind.BACK, "replica-0 stopped reporting"),
    (BETTER, 6.0, {"draft_digests": {"*": "f" * 64}}, Kind.BACK, "digest mismatch: replica-0 serves ffffffffffff as build new1"),
    (BETTER, 6.0, {"deployment": 1, "drafts": {"*": "old"}}, Kind.WAIT, "waiting for replica-0"),
    (BETTER, 9.0, {"deployment": 1, "drafts": {"*": "old"}, "error": "NaN in it"}, Kind.BACK, "replica-0: NaN in it"),
    (BETTER, 101.0, {"deployment": 1, "drafts": {"*": "old"}}, Kind.BACK, "did not serve deployment 2 within 100 s"),
])
def test_each_rule_of_the_canary(evidence: Evidence, age: float, change: dict[str, object], kind: Kind, says: str) -> None:
    found = next_action(canary(), sight(canary(), evidence, age, **change), SETTINGS)
    assert found.kind is kind and says in found.reason


SLOW_START = dataclasses.replace(SETTINGS, serve_timeout_s=600.0)     # bake_s 5, max_bake_s 60
LATE = {"serving_since": 1300.0}       # a server that started for five minutes


@pytest.mark.parametrize(("evidence", "age", "change", "kind", "says"), [
    (QUIET, 299.0, {"deployment": 1, "drafts": {"*": "old"}}, Kind.WAIT, "waiting for replica-0"),
    (QUIET, 301.0, LATE, Kind.WAIT, "bake 1 s: no drafted step"),
    (BETTER, 304.0, LATE, Kind.WAIT, "bake 4 s"),
    (BETTER, 306.0, LATE, Kind.WIDEN, "drop -0.30"),
    (UNCLEAR, 359.0, LATE, Kind.WAIT, "bake 59 s"),
    (UNCLEAR, 361.0, LATE, Kind.WIDEN, "drop +0.10"),
    (WORSE, 301.0, LATE, Kind.BACK, "drop +0.30"),
    (UNCLEAR, 671.0, {"serving_since": 1650.0}, Kind.BACK, "began to serve it anew 21 s ago"),
    (UNCLEAR, 361.0, {"serving_since": 0.0}, Kind.WIDEN, "drop +0.10"),         # an older version does not say
])
def test_a_bake_begins_when_the_canary_serves(evidence: Evidence, age: float, change: dict[str, object], kind: Kind, says: str) -> None:
    found = next_action(canary(), sight(canary(), evidence, age, **change), SLOW_START)
    assert found.kind is kind and says in found.reason


@pytest.mark.parametrize(("evidence", "age", "change", "kind", "says"), [
    (BETTER, 30.0, {}, Kind.WAIT, "not timed yet, too few stretches"),
    (BETTER, 61.0, {}, Kind.BACK, "60 s did not time it, too few stretches of time to compare old and new in with 10 needed: send canary "
                                  "and controls more traffic, or raise rollout.max_bake_s"),
    (dataclasses.replace(BETTER, slower=Gap(0.0, 0.01, 9)), 61.0, {}, Kind.BACK, "9 stretches"),
    (QUIET, 11.0, {}, Kind.WAIT, "0 drafted steps of 0 requests"),
    (QUIET, 61.0, {}, Kind.BACK, "0 drafted steps of 0 requests with 30 of 8 needed: send canary"),
    (dataclasses.replace(TIMED, new=Rate(0.8, 0.1, 20, 5)), 61.0, {}, Kind.BACK, "20 drafted steps of 5 requests"),
    (QUIET, 361.0, LATE, Kind.BACK, "0 drafted steps"),
    (BETTER, 359.0, LATE, Kind.WAIT, "not timed yet"),
    (TIMED, 6.0, {}, Kind.WIDEN, "time per token, log ratio +0.00"),
    (TIMED, 4.0, {}, Kind.WAIT, "bake 4 s"),
    (SOMEHOW_TIMED, 30.0, {}, Kind.WAIT, "time per token, log ratio +0.10"),     # the interval lies across what is allowed
    (SOMEHOW_TIMED, 61.0, {}, Kind.WIDEN, "time per token, log ratio +0.10"),
    (dataclasses.replace(BETTER, slower=Gap(0.3, 0.05, 20)), 61.0, {}, Kind.BACK, "time per token, log ratio +0.30"),
    (dataclasses.replace(BETTER, slower=Gap(0.9, 0.05, 20)), 1.0, {}, Kind.BACK, "time per token, log ratio +0.90"),
    (dataclasses.replace(WORSE, slower=AS_FAST), 6.0, {}, Kind.BACK, "drop +0.30"),
])
def test_what_the_gate_left_to_the_canary_is_measured_there(evidence: Evidence, age: float, change: dict[str, object], kind: Kind,
                                                           says: str) -> None:
    """A TensorRT-LLM draft goes no wider before it was timed; with a benchmark of the gate the same sights do without."""
    found = next_action(canary(("benchmark",)), sight(canary(), evidence, age, **change), SLOW_START)
    assert found.kind is kind and says in found.reason


def test_a_pause_holds_what_was_not_timed() -> None:
    paused = held(canary(("benchmark",)), PAUSED, "me", "lunch")
    paused = dataclasses.replace(paused, created_at=1000.0)
    assert next_action(paused, sight(paused, QUIET, 300.0), SETTINGS).kind is Kind.WAIT


def test_steps_go_to_all_and_then_it_is_settled() -> None:
    latest, counts = canary(), []
    while latest.stage in UNDER_WAY:
        found = next_action(latest, sight(latest, BETTER, 6.0), SETTINGS)
        following = record_of(found, latest, "driver", "title")
        assert following is not None
        counts.append(len(following.canary_replicas))
        latest = dataclasses.replace(following, created_at=latest.created_at + 6.0)
    assert counts == [2, 4, 0] and latest.stage == STABLE and latest.groups == {"rest": {"*": "new1"}} and latest.began == 2


@given(st.integers(1, 50), st.lists(st.floats(0.01, 1.0), max_size=4))
def test_every_step_takes_more_and_the_last_takes_all(total: int, steps: list[float]) -> None:
    served = 1
    for _ in range(total):
        if served == total:
            break
        after = next_count(served, total, steps)
        assert served < after <= total
        served = after
    assert served == total


def test_ends_tell_which_rollout_they_ended() -> None:
    latest = canary()
    assert settled(latest, "a", "b").began == withdrawn(latest, "a", "b").began == 2
    assert restored(latest, "t", rest_of(latest), "me", "enough").began == 0
