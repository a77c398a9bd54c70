"""What is removed from a real MLflow on SQLite and from training/, and what never is, whenever the removal dies."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes_rollout import write_engine
from tests.helpers import write_tiny_build
from tide_pipeline.build.engine import build_engine
from tide_pipeline.cli.signals import drafts_trained_on
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, DraftCheckpoint, EngineBuild, ObservedState
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.errors import BuildError, RegistryError, SettingsError
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.models.target import Target
from tide_pipeline.registry import expiry
from tide_pipeline.registry.expiry import look
from tide_pipeline.registry.registry import RegisteredDraft, Registry
from tide_pipeline.registry.shipped import register_shipped
from tide_pipeline.rollout.alias import follow_alias
from tide_pipeline.rollout.tidy import YOUNG_S
from tide_pipeline.rollout.tidy_drafts import InUse, tidy_drafts

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:mlflow.*"), pytest.mark.filterwarnings("ignore::Warning:alembic.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning")]

LATER = 2 * YOUNG_S                # nothing that a test makes is young then
Make = Callable[..., RegisteredDraft]


class Killed(BaseException): ...


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: MLflow takes seconds to make its tables. Each test has a target of its own in it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path, tiny_build: EngineBuild) -> TideConfig:
    made = write_engine(tmp_path, tiny_dir, champion=Path(tiny_build.path) / "draft")
    return override(made, {"retention": {"drafts_keep": 1}})


@pytest.fixture
def registry(uri: str, config: TideConfig, request: pytest.FixtureRequest) -> Registry:
    return Registry(uri, f"tiny-{sum(request.node.name.encode())}")


@pytest.fixture
def make(registry: Registry, tmp_path: Path, tiny_target: Target) -> Make:
    """Registers another draft; its folder is `tmp_path/<seed>/draft`."""
    def made(seed: int, parent: str = "", **lineage: str) -> RegisteredDraft:
        folder = Path(write_tiny_build(tmp_path / str(seed), tiny_target, seed=seed).path) / "draft"
        checkpoint = DraftCheckpoint(str(folder), digest_draft(folder), "tiny", tiny_target.digest, parent, 9, 2.1, 40, 5_000, 2.5)
        return registry.register(checkpoint, lineage=lineage)

    return made


def tidied(config: TideConfig, registry: Registry, in_use: InUse | None = None, **options: bool) -> tuple[int, ...]:
    return tidy_drafts(config, registry, in_use or InUse(), time.time() + LATER, **options).versions


def versions(registry: Registry) -> list[int]:
    return [draft.version for draft in registry.list()]


def stored(registry: Registry, draft: RegisteredDraft) -> set[str]:
    return {file.path for file in registry.client.list_artifacts(draft.run_id, "draft")}


def dies_after(real: Callable[..., object], times: int, changes: Iterator[int] | None = None) -> Callable[..., object]:
    """`real`, which kills instead of its call number `times` + 1; several may count together."""
    counted = iter(range(100)) if changes is None else changes

    def maybe(*args: object, **more: object) -> object:
        if next(counted) == times:
            raise Killed
        return real(*args, **more)

    return maybe


WHOLE, EMPTIED = {"draft/config.json", "draft/model.safetensors", "draft/provenance.json"}, {"draft/provenance.json"}


def test_without_settings_nothing_goes(config: TideConfig, registry: Registry, make: Make) -> None:
    draft = make(1)
    assert tidied(override(config, {"retention": {"drafts_keep": 0}}), registry) == () and stored(registry, draft) == WHOLE
    for name in ("drafts_keep", "training_keep"):
        with pytest.raises(SettingsError, match=f"retention.{name} is -1"):
            tidied(override(config, {"retention": {name: -1}}), registry)


def test_versions_that_nobody_needs_go_and_their_history_stays(config: TideConfig, registry: Registry, make: Make) -> None:
    old, newest = make(1, workload="de"), make(2)
    assert tidy_drafts(config, registry, InUse(), time.time()).versions == (), "what is younger than a week stays"
    assert tidied(config, registry, only_look=True) == (old.version,) and versions(registry) == [old.version, newest.version]
    done = tidy_drafts(config, registry, InUse(), time.time() + LATER)
    assert done.versions == (old.version,) and done.kept == {"is among the newest": 1}
    assert versions(registry) == [newest.version] and stored(registry, newest) == WHOLE and stored(registry, old) == EMPTIED
    run = registry.client.get_run(old.run_id)
    assert run.data.tags["workload"] == "de" and run.data.metrics["best_acceptance_length"] == 2.5
    assert run.data.tags[expiry.EXPIRED].startswith("20")
    assert tidied(config, registry) == ()
    again = make(1)                                                                          # the same bytes, registered anew
    assert again.version > newest.version and again.run_id != old.run_id and stored(registry, again) == WHOLE


def test_what_is_needed_stays(config: TideConfig, registry: Registry, make: Make, tmp_path: Path) -> None:
    config = override(config, {"engine": "tiny"})
    shipped = register_shipped(config, registry)
    assert shipped is not None
    parent = make(1)
    served, unneeded, named, asked, observed, used, launched, built, newest = (
        make(2, parent=parent.draft_version), make(3), make(4), make(5), make(6), make(7), make(8), make(9), make(10))
    registry.set_alias("golden", named.version)
    registry.tag(asked.version, {"request": "waiting"})
    write_observed(config.state.observed, ObservedState("replica-9", "tiny", 1, {"*": "x"}, {"*": observed.digest}, 1.0, 1.0, "", 0.0, 1))
    build = build_engine(config, tmp_path / "2" / "draft", served.draft_version, warm_up=False)
    build_engine(config, tmp_path / "9" / "draft", built.draft_version, warm_up=False)       # a rollback may want it
    stable = Deployment(1, "tiny", {"rest": {"*": build.build_id}}, (), "stable", "me", "")
    DeploymentRecord(config.state.deployments, "tiny").append(stable)
    follow_alias(config, registry, stable)
    folder = config.state.training / "run-1"
    folder.mkdir(parents=True)
    (folder / "registered.json").write_text(json.dumps({"version": used.version}))
    in_use = InUse(frozenset({"run-1"}), frozenset({launched.version}))
    done = tidy_drafts(config, registry, in_use, time.time() + LATER)
    assert done.versions == (unneeded.version,)
    assert done.kept == {"has an alias": 2, "was asked for": 1, "is served": 1, "has a build": 1, "a run uses it": 2, "was shipped": 1,
                         "is among the newest": 1, "is a parent": 1}
    assert registry.fetch(parent.version, tmp_path / "fetched").is_dir() and newest.version in versions(registry)


def test_a_build_that_cant_be_read_keeps_every_draft(config: TideConfig, registry: Registry, make: Make) -> None:
    old, _ = make(1), make(2)
    damaged = config.state.builds / "tiny" / "a1" / "build.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    with pytest.raises(BuildError, match=r"its draft may be needed: make that build again"):
        tidied(config, registry)
    assert old.version in versions(registry)


@pytest.mark.parametrize("dies_at", range(5))
def test_a_removal_that_dies_is_ended_by_the_next(dies_at: int, config: TideConfig, registry: Registry, make: Make,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each thing that it changes in MLflow after its first tag: the version, a tag, a file, a file, the last tag."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    old, newest = make(1), make(2)
    with monkeypatch.context() as patch:
        changes = iter(range(100))
        for name in ("set_tag", "delete_model_version"):
            patch.setattr(registry.client, name, dies_after(getattr(registry.client, name), dies_at + 1, changes))
        patch.setattr(LocalArtifactRepository, "delete_artifacts",
                      dies_after(LocalArtifactRepository.delete_artifacts, dies_at + 1, changes))
        with pytest.raises(Killed):
            tidied(config, registry)
    assert newest.version in versions(registry) and stored(registry, newest) == WHOLE
    if old.version in versions(registry):
        assert stored(registry, old) == WHOLE, "a version always has its bytes"
    tidied(config, registry)
    assert versions(registry) == [newest.version] and stored(registry, old) == EMPTIED
    assert look(registry, born_before=time.time() + LATER).unfinished == ()


def test_a_version_wanted_again_since_a_death_stays(config: TideConfig, registry: Registry, make: Make) -> None:
    old, _ = make(1), make(2)
    registry.client.set_tag(old.run_id, expiry.EXPIRED, expiry.BEGUN)
    registry.set_alias("golden", old.version)
    assert tidied(config, registry) == () and expiry.EXPIRED not in registry.client.get_run(old.run_id).data.tags


def test_an_alias_set_at_the_last_moment_keeps_its_version(config: TideConfig, registry: Registry, make: Make,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = make(1), make(2)
    monkeypatch.setattr("tide_pipeline.rollout.tidy_drafts.why_kept", lambda *_: registry.set_alias("champion", old.version) or {2: ""})
    assert tidied(config, registry) == () and stored(registry, old) == WHOLE
    assert expiry.EXPIRED not in registry.client.get_run(old.run_id).data.tags


def test_half_registered_drafts_are_given_up_after_a_week_and_foreign_versions_left_alone(
        config: TideConfig, registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "create_model_version", lambda *_, **__: (_ for _ in ()).throw(OSError("no answer")))
        with pytest.raises(RegistryError):
            make(1)
    foreign, _ = make(2), make(3)
    registry.client.delete_model_version_tag(registry.name, str(foreign.version), "digest")
    assert tidy_drafts(config, registry, InUse(), time.time()).given_up == 0
    assert tidy_drafts(config, registry, InUse(), time.time() + LATER).given_up == 1
    assert stored(registry, foreign) == WHOLE and tidy_drafts(config, registry, InUse(), time.time() + LATER).given_up == 0
    assert len(make(1).draft_version) > 0, "it can be registered again"


# --- training/ -----------------------------------------------------------------------------------------------------

def adaptation(config: TideConfig, name: str, age_s: float, *, registered: bool = True) -> Path:
    folder = config.state.training / name
    (folder / "fetched" / "v1-00000000").mkdir(parents=True)
    (folder / "draft").mkdir()
    certificate = {"digest": "d" * 64, "shards": {"s3://lake/a.parquet": [7]}}
    records = {"request.json": {}, "marks.json": {}, "draft/checkpoint.json": {}, "draft/provenance.json": certificate,
               **({"registered.json": {"version": 1}} if registered else {})}
    for file, facts in records.items():
        (folder / file).write_text(json.dumps(facts))
        os.utime(folder / file, (time.time() - age_s,) * 2)
    for file in ("draft/model.safetensors", "draft/resume.safetensors", "draft/run.json", "fetched/v1-00000000/model.safetensors"):
        (folder / file).write_bytes(b"12345")
    return folder


def test_old_adaptations_keep_their_records_and_lose_their_weights(config: TideConfig, registry: Registry,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(config, {"retention": {"drafts_keep": 0, "training_keep": 1}})
    old, going, newest = adaptation(config, "a", 300), adaptation(config, "b", 200), adaptation(config, "c", 100)
    lost = adaptation(config, "d", 400, registered=False)
    by_hand = config.state.training / "by-hand-20260101-000000" / "draft"
    by_hand.mkdir(parents=True)
    (by_hand / "model.safetensors").write_bytes(b"mine")
    in_use = InUse(frozenset({going.name}))
    assert tidy_drafts(config, registry, in_use, 0.0, only_look=True).adaptations == ("a",) and (old / "draft" / "run.json").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):        # in the middle: nothing is left that a training would go on from
        patch.setattr(Path, "unlink", dies_after(Path.unlink, 2))
        tidy_drafts(config, registry, in_use, 0.0)
    assert {file.name for file in (old / "draft").iterdir()} == {"checkpoint.json", "provenance.json", "model.safetensors"}
    done = tidy_drafts(config, registry, in_use, 0.0)
    assert (done.adaptations, done.freed_bytes, done.versions) == (("a",), 10, ())
    assert {file.name for file in old.rglob("*") if file.is_file()} == {"request.json", "marks.json", "registered.json", "checkpoint.json",
                                                                        "provenance.json"}
    for whole in (going, newest, lost, by_hand.parent):
        assert (whole / "draft" / "model.safetensors").exists(), whole
    assert tidy_drafts(config, registry, in_use, 0.0).adaptations == ()
    found = drafts_trained_on(config, [[("a.parquet", 7)]])
    assert [draft["digest"] for draft in found] == ["d" * 64], "who deletes windows still finds it"
