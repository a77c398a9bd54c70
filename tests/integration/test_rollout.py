"""Rollouts over replicas that pull: what is served at the end, what the record says, and that a crash loses nothing."""

from __future__ import annotations

import dataclasses
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes_rollout import FakeReplica, judged, write_engine
from tests.helpers import write_tiny_build
from tests.serving import until
from tide_pipeline.build.engine import build_engine
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.deployment.record import DeploymentRecord, read_observed
from tide_pipeline.errors import DeploymentConflict, GateNotPassed, RolloutRefused
from tide_pipeline.models.target import Target
from tide_pipeline.rollout import by_hand, drive, plan, rollback
from tide_pipeline.rollout import replicas as replicas_module
from tide_pipeline.rollout.drive import Driver
from tide_pipeline.rollout.initial import ensure_initial
from tide_pipeline.rollout.plan import Kind
from tide_pipeline.rollout.promote import promote, propose


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "POLL_S", 0.05)
    monkeypatch.setattr(plan, "QUIET_S", 0.3)
    monkeypatch.setattr(replicas_module, "POLL_S", 0.02)
    monkeypatch.setattr(replicas_module, "ERROR_GRACE_S", 0.2)


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path, tiny_build: EngineBuild) -> TideConfig:
    config = write_engine(tmp_path, tiny_dir, champion=Path(tiny_build.path) / "draft")
    return override(config, {"capture": {"flush_s": 0.1}})


@pytest.fixture
def champion(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setattr("tide_pipeline.build.engine.warm_up_draft", lambda *_: {})
    found = ensure_initial(config)
    assert found is not None
    return found


@pytest.fixture
def challenger(config: TideConfig, champion: Deployment, tmp_path: Path, tiny_target: Target) -> EngineBuild:
    draft = Path(write_tiny_build(tmp_path / "new", tiny_target, seed=5).path) / "draft"
    return build_engine(config, draft, "v2-" + "5" * 8, warm_up=False)


def stages(config: TideConfig) -> list[str]:
    return [d.stage for d in DeploymentRecord(config.state.deployments, config.target).history()]


def go(config: TideConfig, build: EngineBuild, **kwargs: str) -> Deployment:
    return promote(config, build, judged(config, build), who="test", reason="drift on de", **kwargs)  # type: ignore[arg-type]


def test_the_first_deployment_is_what_the_engine_ships(config: TideConfig, champion: Deployment) -> None:
    assert (champion.n, champion.stage, champion.reason) == (1, "stable", "shipped with the engine")
    assert ensure_initial(config) == champion
    assert ensure_initial(override(config, {"engine": "bare"})) is None


def test_one_replica_is_canary_and_rest(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    told: list[str] = []
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}) as replica:
        replica.serve(10)
        done = promote(config, challenger, judged(config, challenger), who="test", reason="drift on de", progress=told.append)
        assert replica.served["*"] == challenger
    assert stages(config) == ["stable", "canary", "stable"] and done.n == 3
    assert done.groups == {"rest": {"*": challenger.build_id}} and done.who == "test"
    assert "drift on de" in done.reason and "first-position acceptance 0." in done.reason
    assert told[0].startswith("canary on replica-0") and any(text.startswith("bake") for text in told)
    assert go(config, challenger) == done, "asked again, nothing happens"


def test_only_the_canary_serves_the_new_draft_until_it_is_baked(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    with ExitStack() as stack:
        one, two, three = (stack.enter_context(FakeReplica(config, f"replica-{i}", rates={challenger.draft_digest: 0.8})) for i in range(3))
        done = go(config, challenger, workload="de")
        assert all(r.served["de"] == challenger and r.served["*"].build_id == champion.groups["rest"]["*"] for r in (one, two, three))
        until(lambda: read_observed(config.state.observed, "tiny")["replica-2"].deployment >= done.n)
    history = DeploymentRecord(config.state.deployments, "tiny").history()
    assert stages(config) == ["stable", "canary", "rolling", "rolling", "stable"]
    assert [len(d.canary_replicas) for d in history] == [0, 1, 2, 3, 0] and {d.began for d in history} == {0, 2}
    assert [d.first_position for d in history] == [0.0, 0.8, 0.8, 0.8, 0.8], "what the gate promised goes with the rollout"
    assert history[1].canary_replicas == ("replica-0",) and history[3].groups["rest"] == champion.groups["rest"]
    served = [["de" in seen for seen in r.digests_seen] for r in (one, two, three)]
    assert [seen.index(True) for seen in served] == [1, 2, 3], "one after the other"


def test_a_draft_that_is_worse_on_live_traffic_goes_back(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.1}) as replica:
        replica.serve(10)
        done = go(config, challenger)
        assert stages(config) == ["stable", "canary", "rolled_back"] and done.groups == champion.groups
        assert "drop +0." in done.reason and "before 0." in done.reason
        deadline = threading.Event()
        while replica.served["*"].draft_digest == challenger.draft_digest and not deadline.wait(0.02):
            pass


def test_without_recent_traffic_the_gates_figure_is_the_baseline(config: TideConfig, champion: Deployment, challenger: EngineBuild,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "QUIET_S", 30.0)
    with FakeReplica(config, "replica-0", traffic=True, rates={challenger.draft_digest: 0.05, "": 0.0}) as replica:
        replica.traffic = False
        done_in = threading.Timer(0.3, lambda: setattr(replica, "traffic", True))
        done_in.start()
        done = go(override(config, {"drift": {"recent_s": 0.001}}), challenger)
    assert done.stage == "rolled_back" and "before 0.30" in done.reason


def test_a_bake_without_traffic_promotes_with_a_note(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    with FakeReplica(config, "replica-0", traffic=False):
        done = go(config, challenger)
    assert done.stage == "stable" and "no traffic during the bake" in done.reason


def test_without_any_replica_the_record_moves_alone(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    done = go(config, challenger)
    assert stages(config) == ["stable", "stable"] and "no replica was live" in done.reason


def test_a_build_that_replicas_refuse_goes_back(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    with FakeReplica(config, "replica-0", breaks_on=challenger.draft_digest):
        done = go(config, challenger)
    assert done.stage == "rolled_back" and "can't be loaded here" in done.reason


def test_a_canary_that_dies_takes_its_draft_with_it(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    config = override(config, {"rollout": {"max_bake_s": 2.5, "heartbeat_s": 1.0}})
    with FakeReplica(config, "replica-0", dies_on=challenger.draft_digest):
        done = go(config, challenger)
    assert done.stage == "rolled_back" and "stopped reporting" in done.reason


def test_a_replica_of_the_rest_that_fails_takes_all_back(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    with (FakeReplica(config, "replica-0"), FakeReplica(config, "replica-1", breaks_on=challenger.draft_digest)):
        done = go(config, challenger)
    assert stages(config) == ["stable", "canary", "rolling", "rolled_back"] and "replica-1" in done.reason
    assert done.groups == champion.groups


def test_a_killed_rollout_goes_on_with_its_canary(config: TideConfig, champion: Deployment, challenger: EngineBuild,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}):
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "drive", dies)
            with pytest.raises(Killed):
                go(config, challenger)
        assert stages(config) == ["stable", "canary"]
        assert go(config, challenger).stage == "stable"
    assert stages(config) == ["stable", "canary", "stable"], "no second canary was opened"


def test_anyone_goes_on_with_a_rollout_whose_driver_was_killed(config: TideConfig, champion: Deployment, challenger: EngineBuild,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is the only state: a new driver for every single step, as a sensor has it."""
    monkeypatch.setattr(Driver, "drive", lambda self, n, progress: self.record.latest())
    kinds = []
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}), FakeReplica(config, "replica-1"):
        assert go(config, challenger).stage == "canary"
        gives_up = time.monotonic() + 30
        while stages(config)[-1] != "stable":
            assert time.monotonic() < gives_up, kinds
            step = Driver(config, "somebody else").advance()
            if step.wrote:
                kinds.append(step.action.kind)
            time.sleep(0.05)
    assert kinds == [Kind.WIDEN, Kind.SETTLE]
    last = DeploymentRecord(config.state.deployments, config.target).history()[-1]
    assert last.who == "somebody else" and last.reason.startswith("drift on de; v2-55555555 for '*': ")
    assert Driver(config, "somebody else").advance().action.kind is Kind.NONE


def test_two_drivers_at_a_time_are_one(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    results: list[Deployment] = []
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}), FakeReplica(config, "replica-1"):
        both = [threading.Thread(target=lambda: results.append(go(config, challenger))) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(60)
    assert stages(config) == ["stable", "canary", "rolling", "stable"] and results[0] == results[1]


def test_pause_resume_and_abort(config: TideConfig, champion: Deployment, challenger: EngineBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "drive", lambda self, n, progress: self.record.latest())
    with pytest.raises(RolloutRefused, match="no rollout of tiny is under way"):
        by_hand.pause(config, who="me", reason="lunch")
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}), FakeReplica(config, "replica-1"):
        go(config, challenger)
        paused = by_hand.pause(config, who="me", reason="lunch")
        assert (paused.n, paused.stage, paused.hold, paused.began) == (3, "canary", "paused", 2)
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            step = Driver(config, "sensor").advance()
            assert step.action.kind is Kind.WAIT and step.deployment == paused
            time.sleep(0.1)
        assert step.action.reason == "paused by me: lunch"
        assert by_hand.resume(config, who="me", reason="back").hold == ""
        gives_up = time.monotonic() + 30
        while stages(config)[-1] != "rolling":
            assert time.monotonic() < gives_up
            Driver(config, "sensor").advance()
            time.sleep(0.05)
        done = by_hand.abort(config, who="me", reason="changed my mind")
        assert (done.stage, done.groups, done.who, done.reason) == ("rolled_back", champion.groups, "me", "changed my mind")


def test_what_is_pinned_stays(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    pinned = by_hand.pin(config, who="me", reason="the demo is today")
    assert pinned.groups == champion.groups and pinned.hold == "pinned"
    for attempt in (go, lambda *_: propose(config, challenger, judged(config, challenger), who="test", reason="drift")):
        with pytest.raises(RolloutRefused, match=r"pinned by me \(the demo is today\).*unpin"):
            attempt(config, challenger)
    assert by_hand.unpin(config, who="me", reason="over").hold == ""
    with pytest.raises(RolloutRefused, match="not pinned"):
        by_hand.unpin(config, who="me", reason="again")


def test_a_proposal_is_served_by_nobody_until_it_is_approved(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}) as replica:
        verdict = judged(config, challenger)
        proposed = propose(config, challenger, verdict, who="run 1", reason="drift on de")
        assert proposed.stage == "proposed" and propose(config, challenger, verdict, who="run 2", reason="again") == proposed
        time.sleep(0.3)
        assert replica.served["*"].build_id == champion.groups["rest"]["*"] and Driver(config, "sensor").advance().action.kind is Kind.NONE
        done = by_hand.approve(config, who="me", reason="looks good")
        assert replica.served["*"] == challenger
    assert stages(config) == ["stable", "proposed", "canary", "stable"] and "looks good" in done.reason
    with pytest.raises(RolloutRefused, match="nothing is proposed"):
        by_hand.approve(config, who="me", reason="again")


class Killed(BaseException): ...


def dies(*_: object) -> None:
    raise Killed


def test_an_approval_that_was_killed_goes_on_with_its_rollout_and_tells_how_it_ended(
        config: TideConfig, champion: Deployment, challenger: EngineBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    proposed = propose(config, challenger, judged(config, challenger), who="run 1", reason="drift on de")
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}):
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "drive", dies)
            with pytest.raises(Killed):
                by_hand.approve(config, who="run 2", reason="looks good")
        assert stages(config) == ["stable", "proposed", "canary"]
        done = by_hand.approve(config, who="run 3", reason="looks good")
    assert stages(config) == ["stable", "proposed", "canary", "stable"] and done.groups["rest"] == {"*": challenger.build_id}
    assert by_hand.approve(config, who="run 4", reason="looks good", after=proposed.n) == done
    with pytest.raises(RolloutRefused, match="nothing is proposed"):
        by_hand.approve(config, who="somebody", reason="again")


def test_an_approval_is_of_one_proposal(config: TideConfig, champion: Deployment, challenger: EngineBuild, tmp_path: Path,
                                        tiny_target: Target) -> None:
    """Who died over the first one did not look at the second."""
    other = build_engine(config, Path(write_tiny_build(tmp_path / "other", tiny_target, seed=6).path) / "draft", "v3", warm_up=False)
    first = propose(config, challenger, judged(config, challenger), who="run 1", reason="drift on de")
    second = propose(config, other, judged(config, other), who="run 2", reason="drift again")
    with pytest.raises(RolloutRefused, match=rf"build {challenger.build_id}, which deployment {first.n} proposed, was never rolled out"):
        by_hand.approve(config, who="run 3", reason="looks good", after=first.n)
    assert DeploymentRecord(config.state.deployments, "tiny").latest() == second
    assert by_hand.approve(config, who="run 3", reason="looks good", after=second.n).groups["rest"] == {"*": other.build_id}


def test_a_build_named_by_a_person_is_rolled_out_once_however_often_its_run_is_killed(
        config: TideConfig, champion: Deployment, challenger: EngineBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateNotPassed, match="tide gate"):
        by_hand.begin(config, challenger.build_id, who="run 1", reason="by hand")
    judged(config, challenger)
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.1}) as replica:
        replica.serve(10)
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "drive", dies)
            with pytest.raises(Killed):
                by_hand.begin(config, challenger.build_id, who="run 1", reason="by hand")
        done = by_hand.begin(config, challenger.build_id, who="run 2", reason="by hand", after=champion.n)
        assert stages(config) == ["stable", "canary", "rolled_back"] and "drop +0." in done.reason
        again = by_hand.begin(config, challenger.build_id, who="run 3", reason="by hand", after=champion.n)
        assert again == done, "what live traffic sent back is not tried again by a run that was killed"
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "drive", dies)
            with pytest.raises(Killed):
                by_hand.begin(config, challenger.build_id, who="ada", reason="once more")
    assert stages(config)[-1] == "canary", "a person may insist"


def test_a_rollout_that_nobody_could_watch_is_told_to_whoever_was_killed_after_it(
        config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    judged(config, challenger)
    done = by_hand.begin(config, challenger.build_id, who="run 1", reason="by hand")
    rollback(config, who="ada", reason="no")
    assert by_hand.begin(config, challenger.build_id, who="run 2", reason="by hand", after=champion.n) == done


def test_a_proposal_can_be_dropped(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    propose(config, challenger, judged(config, challenger), who="run 1", reason="drift on de")
    assert by_hand.abort(config, who="me", reason="no").groups == champion.groups


def test_replicas_that_are_all_silent_are_no_reason_to_skip_the_canary(config: TideConfig, champion: Deployment,
                                                                      challenger: EngineBuild) -> None:
    config = override(config, {"rollout": {"heartbeat_s": 0.3}})
    with FakeReplica(config, "replica-0"):
        pass
    time.sleep(0.5)
    with pytest.raises(RolloutRefused, match="nobody could be watched"):
        go(config, challenger)
    assert stages(config) == ["stable"]


def test_reports_that_can_not_be_read_are_no_reason_to_skip_the_canary(config: TideConfig, champion: Deployment,
                                                                       challenger: EngineBuild) -> None:
    """Replicas of another version report without a field that this one needs: nobody knows how they are, and there are some."""
    config = override(config, {"rollout": {"heartbeat_s": 0.3}})
    folder = config.state.observed / "tiny"
    folder.mkdir(parents=True)
    (folder / "replica-1.json").write_text('{"replica": "replica-1", "at": 12.5}')
    (folder / "replica-2.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RolloutRefused, match=r"reports of replica-1, replica-2 can't be read by this version"):
        go(config, challenger)
    assert stages(config) == ["stable"]


def test_two_rollouts_at_a_time_are_refused(config: TideConfig, champion: Deployment, challenger: EngineBuild, tmp_path: Path,
                                            tiny_target: Target) -> None:
    record = DeploymentRecord(config.state.deployments, "tiny")
    record.append(Deployment(2, "tiny", champion.groups | {"canary": {"*": "somebody"}}, ("replica-9",), "canary", "other", "theirs"))
    with pytest.raises(DeploymentConflict, match="by other is under way"):
        go(config, challenger)


def test_a_rollback_by_hand_ends_a_bake(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    config = override(config, {"rollout": {"bake_s": 30.0, "max_bake_s": 60.0}})
    undo = threading.Timer(1.0, lambda: rollback(config, who="me", reason="enough"))
    with FakeReplica(config, "replica-0"), pytest.raises(DeploymentConflict, match="enough"):
        undo.start()
        go(config, challenger)
    assert stages(config) == ["stable", "canary", "rolled_back"]


def test_nothing_is_promoted_without_the_gate(config: TideConfig, champion: Deployment, challenger: EngineBuild) -> None:
    good = judged(config, challenger)
    closed = {**good.doors, "equivalence": {"passed": False, "reason": "3 of 400 greedy tokens differ"}}
    for verdict, says in ((dataclasses.replace(good, passed=False), "did not pass"), (dataclasses.replace(good, doors=closed), "3 of 400"),
                          (dataclasses.replace(good, doors={}), "did not pass"),
                          (dataclasses.replace(good, challenger_digest="0" * 64), "verdict is about draft 0000")):
        with pytest.raises(GateNotPassed, match=says):
            promote(config, challenger, verdict, who="test", reason="")
    weights = Path(challenger.path) / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(GateNotPassed, match="altered"):
        promote(config, challenger, good, who="test", reason="")
    assert stages(config) == ["stable"]
