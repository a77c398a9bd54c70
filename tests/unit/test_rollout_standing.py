"""When a verdict no longer opens the door: what happened since. No replica, no weights; records, builds and reports are real."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes_rollout import judged
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.deployment.builds import DRAFT_FILES, build_dir, save_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import GateNotPassed, RolloutRefused
from tide_pipeline.gate.run import load_verdict
from tide_pipeline.provenance import digest_files
from tide_pipeline.rollout import by_hand, rollback
from tide_pipeline.rollout.history import STABLE, following, opened, rest_of, settled, withdrawn
from tide_pipeline.rollout.promote import promote, propose

End = Callable[[TideConfig, DeploymentRecord], Deployment]


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return override(TideConfig(), {"engine": "tiny", "state_dir": str(tmp_path)})


@pytest.fixture
def record(config: TideConfig) -> DeploymentRecord:
    return DeploymentRecord(config.state.deployments, config.target)


def build(config: TideConfig, version: str) -> EngineBuild:
    """A build whose bytes are what its record says; nothing here loads them."""
    folder = build_dir(config.state.builds, config.target, version)
    for name in DRAFT_FILES:
        (folder / "draft").mkdir(parents=True, exist_ok=True)
        (folder / "draft" / name).write_text(version)
    digest = digest_files({name: folder / "draft" / name for name in DRAFT_FILES})
    made = EngineBuild(version, config.target, "embedded", str(folder), f"{version}-{digest[:8]}", digest, "e", time.time())
    save_build(made)
    return made


def serve(record: DeploymentRecord, **drafts: EngineBuild) -> Deployment:
    """`any` stands for every workload."""
    rest = {"*" if tag == "any" else tag: made.build_id for tag, made in drafts.items()}
    return record.append(following(record.latest(), record.target, {"rest": rest}, (), STABLE, "test", "served"))


def go(config: TideConfig, made: EngineBuild, workload: str = "*", *, by_person: bool = False) -> Deployment:
    """As whoever comes with the last verdict on disk, be it a run that is run again."""
    return promote(config, made, load_verdict(config, made.build_id), workload=workload, who="a run", reason="drift", by_person=by_person)


def canary(record: DeploymentRecord, made: EngineBuild, workload: str = "*") -> Deployment:
    return record.append(opened(record.latest(), record.target, workload, made.build_id, ["replica-0"], "a run", "drift"))


def by_traffic(config: TideConfig, record: DeploymentRecord) -> Deployment:
    latest = record.latest()
    assert latest is not None
    return record.append(withdrawn(latest, "rollout sensor", "acceptance fell"))


def by_a_person(config: TideConfig, record: DeploymentRecord) -> Deployment:
    return by_hand.abort(config, who="me", reason="not today")


def after_it_was_served(config: TideConfig, record: DeploymentRecord) -> Deployment:
    latest = record.latest()
    assert latest is not None
    record.append(settled(latest, "rollout sensor", "fine"))
    return rollback(config, who="me", reason="time-outs")


@pytest.mark.parametrize("end", [by_traffic, by_a_person, after_it_was_served])
def test_what_was_taken_back_comes_again_with_a_new_verdict_or_a_person(config: TideConfig, record: DeploymentRecord, end: End) -> None:
    old, new = build(config, "a1"), build(config, "b2")
    serve(record, any=old)
    judged(config, new, at=time.time() - 60)
    canary(record, new)
    ended = end(config, record)
    for attempt in (lambda: go(config, new),
                    lambda: propose(config, new, load_verdict(config, new.build_id), who="a run", reason="drift")):
        with pytest.raises(RolloutRefused, match=rf"taken back by {ended.who} .*{ended.reason}.*`tide gate b2 --workload de`"):
            attempt()
    assert record.latest() == ended
    assert go(config, new, by_person=True).groups["rest"] == {"*": "b2"}
    rollback(config, who="me", reason="again")
    judged(config, new)
    assert go(config, new).groups["rest"] == {"*": "b2"}


def test_a_proposal_that_was_dropped_is_not_made_again(config: TideConfig, record: DeploymentRecord) -> None:
    serve(record, any=build(config, "a1"))
    new = build(config, "b2")
    verdict = judged(config, new, at=time.time() - 60)
    propose(config, new, verdict, who="a run", reason="drift")
    dropped = by_hand.abort(config, who="me", reason="no")
    with pytest.raises(RolloutRefused, match="taken back by me"):
        propose(config, new, verdict, who="a run", reason="drift")
    assert record.latest() == dropped


def test_what_became_of_others_is_no_reason(config: TideConfig, record: DeploymentRecord) -> None:
    old, new, other = (build(config, name) for name in ("a1", "b2", "c3"))
    serve(record, any=old)
    judged(config, new, at=time.time() - 60)
    canary(record, other)
    by_traffic(config, record)
    canary(record, new, "code")
    by_traffic(config, record)
    latest = record.latest()
    assert go(config, new).groups["rest"] == {"*": "b2"} and rest_of(latest) == {"*": "a1"}


def test_a_verdict_is_held_against_what_is_served_now(config: TideConfig, record: DeploymentRecord) -> None:
    """b2 was better than a1. Nobody asked whether it is better than c3, which came after it, nor whether a1 is."""
    old, new, newest = (build(config, name) for name in ("a1", "b2", "c3"))
    serve(record, any=old)
    judged(config, new, "de")
    serve(record, any=newest)
    for attempt in (lambda: go(config, new), lambda: go(config, new, by_person=True),
                    lambda: propose(config, new, load_verdict(config, new.build_id), who="a run", reason="drift")):
        with pytest.raises(GateNotPassed, match=rf"passed against {old.draft_version}, and {newest.draft_version} serves 'de' now"
                                                r".*`tide gate b2 --workload de`.*`tide rollback`"):
            attempt()
    assert [d.n for d in record.history()] == [1, 2]
    judged(config, new, "de")
    assert go(config, new).groups["rest"] == {"*": "b2"}


def test_a_champion_that_went_is_no_champion(config: TideConfig, record: DeploymentRecord) -> None:
    old, champion, new = (build(config, name) for name in ("a1", "b2", "c3"))
    serve(record, any=old)
    serve(record, any=champion)
    judged(config, new)
    rollback(config, who="me", reason="time-outs")
    with pytest.raises(GateNotPassed, match="serves 'de' now"):
        go(config, new)


def test_the_first_draft_of_all_has_nothing_to_be_held_against(config: TideConfig, record: DeploymentRecord) -> None:
    first, second = build(config, "a1"), build(config, "b2")
    judged(config, first)
    judged(config, second)
    assert go(config, first).groups["rest"] == {"*": "a1"}
    with pytest.raises(GateNotPassed, match=f"passed against no draft, and {first.draft_version} serves 'de' now"):
        go(config, second)


def test_a_verdict_about_one_workload_says_nothing_of_another(config: TideConfig, record: DeploymentRecord) -> None:
    old, own, new = (build(config, name) for name in ("a1", "b2", "c3"))
    serve(record, any=old)
    judged(config, new, "de")
    with pytest.raises(GateNotPassed, match=r"is about workload 'de', not 'code'.*`tide gate c3 --workload code`"):
        go(config, new, "code")
    assert go(config, new, "de").groups["rest"] == {"*": "a1", "de": "c3"}, "a draft of its own"
    serve(record, any=old, de=own)
    judged(config, new, "de")
    with pytest.raises(GateNotPassed, match=r"'de' has a draft of its own.*--workload de"):
        go(config, new)
    assert go(config, new, "de").groups["rest"] == {"*": "a1", "de": "c3"}
    judged(config, own, "py")
    assert go(config, own).groups["rest"] == {"*": "b2", "de": "c3"}


def test_a_proposal_waits_for_days(config: TideConfig, record: DeploymentRecord) -> None:
    """Nothing else is served meanwhile, or it is no longer the latest record."""
    serve(record, any=build(config, "a1"))
    new = build(config, "b2")
    propose(config, new, judged(config, new, at=time.time() - 5 * 86_400), who="a run", reason="drift")
    assert by_hand.approve(config, who="me", reason="good").groups["rest"] == {"*": "b2"}
