"""Drafts in a real MLflow on SQLite: registered once, found again, their bytes verified on the way back."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.fakes_rollout import write_engine
from tests.helpers import write_tiny_build
from tide_pipeline.build.engine import build_engine
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, DraftCheckpoint, EngineBuild
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import RegistryAway, RegistryError
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.models.target import Target
from tide_pipeline.registry.client import without_password
from tide_pipeline.registry.registry import RegisteredDraft, Registry, default_uri
from tide_pipeline.registry.shipped import register_shipped
from tide_pipeline.rollout.alias import Followed, answer_request, asked_workload, follow_alias, waiting_request
from tide_pipeline.rollout.challenger import challenge, step_down
from tide_pipeline.rollout.history import opened, settled, withdrawn

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:mlflow.*"), pytest.mark.filterwarnings("ignore::Warning:alembic.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, tiny_build: EngineBuild) -> TideConfig:
    return write_engine(tmp_path_factory.mktemp("registry"), tiny_dir, champion=Path(tiny_build.path) / "draft")


@pytest.fixture(scope="module")
def registry(config: TideConfig) -> Registry:
    """One database for the module: MLflow takes seconds to make its tables. Each test registers drafts of its own."""
    return Registry(default_uri(config), config.target)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_target: Target, request: pytest.FixtureRequest) -> DraftCheckpoint:
    """What training leaves behind: the draft, its curve, and a run.json that points into the lake."""
    folder = Path(write_tiny_build(tmp_path / "trained", tiny_target, seed=sum(request.node.name.encode())).path) / "draft"
    points = [{"step": 0, "elapsed_s": 0.0, "acceptance_length": 1.5}, {"step": 7, "elapsed_s": 1.0, "loss": 3.2, "rows_per_s": 900.0},
              {"step": 9, "elapsed_s": 2.0, "loss": float("nan")}, {"step": 9, "elapsed_s": 2.1, "acceptance_length": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    (folder / "run.json").write_text('{"windows": "references into the lake"}')
    facts = json.loads((folder / "provenance.json").read_text()) | {"settings": {"learning_rate": 0.001}, "start_acceptance_length": 1.5}
    (folder / "provenance.json").write_text(json.dumps(facts))
    return DraftCheckpoint(str(folder), digest_draft(folder), "tiny", tiny_target.digest, "shipped-00000000", 9, 2.1, 40, 5_000, 2.5)


def test_a_draft_becomes_a_version_with_its_lineage_curve_and_files(registry: Registry, checkpoint: DraftCheckpoint,
                                                                 tmp_path: Path) -> None:
    draft = registry.register(checkpoint, lineage={"workload": "de", "dagster_run_id": "run-1", "windows": 40})
    assert draft.draft_version == f"v{draft.version}-{checkpoint.digest[:8]}"
    assert registry.get(draft.version).digest == checkpoint.digest == registry.find(checkpoint.digest).digest  # type: ignore[union-attr]
    tags = registry.get(draft.version).tags
    assert (tags["parent"], tags["workload"], tags["dagster_run_id"], tags["rows"]) == ("shipped-00000000", "de", "run-1", "5000")
    assert (tags["engine_digest"], tags["draft_version"]) == (checkpoint.engine_digest, draft.draft_version)

    run = registry.client.get_run(draft.run_id)
    assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == "0.001"
    assert run.data.metrics["best_acceptance_length"] == 2.5 and run.data.metrics["loss"] == 3.2        # NaN is no point
    history = registry.client.get_metric_history(draft.run_id, "acceptance_length")
    assert [(m.step, m.value) for m in history] == [(0, 1.5), (9, 2.5)]

    def names(path: str) -> set[str]:
        return {f.path for f in registry.client.list_artifacts(draft.run_id, path)}

    assert names("draft") == {"draft/config.json", "draft/model.safetensors", "draft/provenance.json"}
    svg = registry.client.download_artifacts(draft.run_id, "curve.svg", str(tmp_path))
    assert [panel.get("points", "").count(",") for panel in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}polyline")] == [1, 2]
    assert names("") == {"draft", "metrics.jsonl", "curve.svg"}, "run.json stays on the training machine"


def test_registering_again_gives_the_first_version(registry: Registry, checkpoint: DraftCheckpoint) -> None:
    first = registry.register(checkpoint, lineage={"workload": "de"})
    again = registry.register(checkpoint, lineage={"workload": "de", "dagster_run_id": "a retry"})
    assert (again.version, again.run_id) == (first.version, first.run_id)
    assert len([d for d in registry.list() if d.digest == checkpoint.digest]) == 1


def test_a_registration_that_died_half_way_is_taken_up_again(registry: Registry, checkpoint: DraftCheckpoint,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "log_artifact", dies)
        with pytest.raises(RegistryError, match="No space left"):
            registry.register(checkpoint, lineage={})
    assert registry.find(checkpoint.digest) is None
    draft = registry.register(checkpoint, lineage={})
    assert registry.client.get_run(draft.run_id).info.status == "FINISHED"
    runs = registry.client.search_runs([registry.client.get_run(draft.run_id).info.experiment_id], f"tags.digest = '{checkpoint.digest}'")
    assert len(runs) == 1


def test_fetched_bytes_are_verified(registry: Registry, checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    draft = registry.register(checkpoint, lineage={})
    folder = registry.fetch(draft.version, tmp_path / "got")
    assert digest_draft(folder) == checkpoint.digest and (folder / "provenance.json").is_file()
    assert registry.fetch(draft.version, folder) == folder, "what is there and right is not fetched twice"

    stored = Path(registry.client.get_run(draft.run_id).info.artifact_uri.removeprefix("file://")) / "draft" / "model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RegistryError, match="other bytes"):
        registry.fetch(draft.version, tmp_path / "altered")
    stored.unlink()
    with pytest.raises(RegistryError, match=r"lacks config\.json or model"):
        registry.fetch(draft.version, tmp_path / "gone")
    assert not {"altered", "gone"} & {p.name for p in tmp_path.iterdir()} and not list(tmp_path.glob(".*"))
    with pytest.raises(RegistryError, match="exists and is not"):
        registry.fetch(draft.version, tmp_path)


def test_a_draft_altered_after_training_is_not_registered(registry: Registry, checkpoint: DraftCheckpoint) -> None:
    config_file = Path(checkpoint.path) / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    with pytest.raises(RegistryError, match="altered after training"):
        registry.register(checkpoint, lineage={})


def test_tags_are_single_values(registry: Registry, checkpoint: DraftCheckpoint) -> None:
    with pytest.raises(RegistryError, match="single value"):
        registry.register(checkpoint, lineage={"prompts": ["what somebody said"]})
    draft = registry.register(checkpoint, lineage={})
    registry.tag(draft.version, {"gate_passed": True, "gate_offline": "gain 0.9"})
    assert registry.get(draft.version).tags["gate_passed"] == "True"


def test_the_shipped_draft_begins_the_lineage(config: TideConfig, registry: Registry) -> None:
    draft = register_shipped(config, registry)
    assert draft is not None and draft.draft_version == f"shipped-{draft.digest[:8]}"
    assert registry.alias("champion") == draft.version
    registry.set_alias("champion", 1)
    assert register_shipped(config, registry) == draft and registry.alias("champion") == 1, "an alias that points somewhere stays"
    assert registry.alias("nobody") is None and Registry(registry.uri, "other").alias("champion") is None
    assert register_shipped(override(config, {"engine": "bare"}), registry) is None


def test_an_mlflow_that_is_away_is_said_at_once(config: TideConfig, checkpoint: DraftCheckpoint) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://somebody:secret@127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(RegistryAway, match=r"http://127.0.0.1:\d+ can't be used.*`tide up`") as caught:
        Registry(uri, "tiny").register(checkpoint, lineage={})
    assert time.monotonic() - began < 15 and "secret" not in str(caught.value)


def test_a_server_that_answers_nonsense_is_an_error_of_ours(nonsense: str) -> None:
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1"):
        Registry(nonsense, "tiny").alias("champion")


@pytest.fixture
def nonsense() -> Iterator[str]:
    """A server that is no MLflow."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_passwords_are_not_shown() -> None:
    assert without_password("postgresql://me:pw@db/mlflow") == "postgresql://db/mlflow"


def test_aliases_follow_what_is_served(config: TideConfig, registry: Registry, checkpoint: DraftCheckpoint) -> None:
    draft = registry.register(checkpoint, lineage={})
    build = build_engine(config, Path(checkpoint.path), draft.draft_version, warm_up=False)
    canary = Deployment(1, "tiny", {"rest": {}, "canary": {"*": build.build_id}}, ("a",), "canary", "me", "")
    assert follow_alias(config, registry, canary).champions == {}
    stable = Deployment(2, "tiny", {"rest": {"*": build.build_id, "de/docs": build.build_id}}, (), "stable", "me", "")
    assert follow_alias(config, registry, stable).champions == {"champion": draft.version, "champion-de-docs": draft.version}
    assert registry.alias("champion") == registry.alias("champion-de-docs") == draft.version
    assert follow_alias(config, Registry(registry.uri, "other"), stable).champions == {}, "a draft nobody registered has no version"


@pytest.fixture
def two(config: TideConfig, registry: Registry, checkpoint: DraftCheckpoint, tmp_path: Path,
        tiny_target: Target) -> tuple[Deployment, RegisteredDraft, RegisteredDraft]:
    """A deployment that serves one registered draft, and another registered draft that nobody serves."""
    draft = registry.register(checkpoint, lineage={})
    folder = Path(write_tiny_build(tmp_path / "other", tiny_target, seed=10_000 + draft.version).path) / "draft"
    other = registry.register(replace(checkpoint, path=str(folder), digest=digest_draft(folder)), lineage={"workload": "de"})
    build = build_engine(config, Path(checkpoint.path), draft.draft_version, warm_up=False)
    stable = Deployment(1, "tiny", {"rest": {"*": build.build_id}}, (), "stable", "me", "")
    follow_alias(config, registry, stable)
    return stable, draft, other


def test_an_alias_moved_by_hand_is_put_back_and_its_version_asked_for(
        config: TideConfig, registry: Registry, two: tuple[Deployment, RegisteredDraft, RegisteredDraft]) -> None:
    stable, served, other = two
    assert follow_alias(config, registry, stable) == Followed({"champion": served.version})
    registry.set_alias("champion", other.version)                      # what somebody does in MLflow's pages
    assert follow_alias(config, registry, stable).requested == {"champion": other.version}
    assert registry.alias("champion") == served.version and registry.alias("challenger") == other.version
    asked = waiting_request(registry)
    assert asked is not None and (asked.version, asked.workload) == (other.version, "de") and asked.requested_at
    assert follow_alias(config, registry, stable).requested == {}, "asked once"
    answer_request(registry, other.version, "refused by the gate")
    assert waiting_request(registry) is None and registry.get(other.version).tags["request"] == "refused by the gate"


def test_a_workloads_alias_asks_for_that_workload(
        config: TideConfig, registry: Registry, two: tuple[Deployment, RegisteredDraft, RegisteredDraft]) -> None:
    """Moving champion-code to a draft that was trained for de: it is judged on code, and would serve code alone."""
    stable, _, other = two
    both = replace(stable, groups={"rest": {**stable.groups["rest"], "code": stable.groups["rest"]["*"]}})
    follow_alias(config, registry, both)
    registry.set_alias("champion-code", other.version)
    assert follow_alias(config, registry, both).requested == {"champion-code": other.version}
    asked = waiting_request(registry)
    assert asked is not None and (asked.version, asked.workload) == (other.version, "code")
    answer_request(registry, other.version, "refused by the gate")
    assert asked_workload(registry.get(other.version)) == "de", "asked for again, by hand, it is what it was trained for"


@pytest.mark.parametrize("label", ["../../elsewhere", "/tmp/elsewhere", "..", "a b", "x" * 65])
def test_a_label_that_somebody_wrote_into_mlflow_is_no_path(registry: Registry, checkpoint: DraftCheckpoint, label: str) -> None:
    draft = registry.register(checkpoint, lineage={})
    registry.tag(draft.version, {"label": label})
    assert registry.get(draft.version).draft_version == f"v{draft.version}-{draft.digest[:8]}"
    registry.tag(draft.version, {"label": "", "digest": f"../{draft.digest[3:]}"})
    with pytest.raises(RegistryError, match="has no digest tag"):
        registry.get(draft.version)
    registry.tag(draft.version, {"digest": draft.digest})


def test_an_alias_that_lags_or_is_gone_is_no_request(config: TideConfig, registry: Registry,
                                                     two: tuple[Deployment, RegisteredDraft, RegisteredDraft]) -> None:
    """A driver that died between the record and the alias leaves the alias where this module put it."""
    stable, _, other = two
    build = build_engine(config, registry.fetch(other.version, config.state.root / f"fetched-{other.version}"), other.draft_version,
                         warm_up=False)
    later = replace(stable, n=2, groups={"rest": {"*": build.build_id}})
    assert follow_alias(config, registry, later) == Followed({"champion": other.version})
    registry.client.delete_registered_model_alias(registry.name, "champion")
    assert follow_alias(config, registry, later) == Followed({"champion": other.version}) and registry.alias("champion") == other.version
    assert follow_alias(config, registry, replace(stable, stage="rolling", groups={"rest": {"*": "x"}, "canary": {"*": "y"}})) == Followed()


def test_a_version_whose_bytes_were_altered_is_refused_by_their_digest(
        registry: Registry, two: tuple[Deployment, RegisteredDraft, RegisteredDraft], tmp_path: Path) -> None:
    _, _, other = two
    uri = registry.client.get_run(other.run_id).info.artifact_uri.removeprefix("file://")
    weights = Path(uri) / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(RegistryError, match=r"other bytes .*The artifact store was altered"):
        registry.fetch(other.version, tmp_path / "altered")
    weights.unlink()
    with pytest.raises(RegistryError) as caught:
        registry.fetch(other.version, tmp_path / "gone")
    assert caught.type is RegistryError, "nobody waits for it to come back"
    assert not (tmp_path / "altered").exists() and not (tmp_path / "gone").exists()


@pytest.fixture
def way(config: TideConfig, registry: Registry, two: tuple[Deployment, RegisteredDraft, RegisteredDraft],
        tmp_path: Path) -> tuple[TideConfig, RegisteredDraft, RegisteredDraft, EngineBuild]:
    """A record of its own that serves one registered draft; another one is registered and built."""
    config = override(config, {"state_dir": str(tmp_path / "state")})
    _, served, other = two
    builds = [build_engine(config, registry.fetch(d.version, tmp_path / d.draft_version), d.draft_version, warm_up=False)
              for d in (served, other)]
    DeploymentRecord(config.state.deployments, "tiny").append(Deployment(1, "tiny", {"rest": {"*": builds[0].build_id}}, (), "stable",
                                                                         "me", ""))
    registry.drop_alias("challenger")
    return config, served, other, builds[1]


Way = tuple[TideConfig, RegisteredDraft, RegisteredDraft, EngineBuild]


def followed(config: TideConfig, registry: Registry) -> int | None:
    """Where the challenger stands after a look of the sensor."""
    latest = DeploymentRecord(config.state.deployments, "tiny").latest()
    assert latest is not None
    follow_alias(config, registry, latest)
    return registry.alias("challenger")


def test_a_trained_version_is_challenger_until_it_is_served_and_asks_for_nothing(registry: Registry, way: Way) -> None:
    config, served, other, build = way
    record = DeploymentRecord(config.state.deployments, "tiny")
    assert followed(config, registry) is None
    assert challenge(registry, other.version) == other.version and waiting_request(registry) is None
    registry.tag(other.version, {"gate": "passed"})
    assert followed(config, registry) == other.version, "passed, and in mode observe nobody deploys it"
    canary = record.append(opened(record.latest(), "tiny", "*", build.build_id, ["a"], "me", ""))
    assert followed(config, registry) == other.version and registry.alias("champion") == served.version
    record.append(settled(canary, "me", ""))
    assert followed(config, registry) is None and registry.alias("champion") == other.version
    assert challenge(registry, other.version) and followed(config, registry) is None, "registered again, and served already"


def test_a_version_that_was_rolled_back_is_no_challenger(registry: Registry, way: Way) -> None:
    config, _, other, build = way
    record = DeploymentRecord(config.state.deployments, "tiny")
    canary = record.append(opened(record.latest(), "tiny", "*", build.build_id, ["a"], "me", "by hand"))
    assert followed(config, registry) == other.version, "a person rolled it out: nobody had named it"
    back = record.append(withdrawn(canary, "me", "slower"))
    assert followed(config, registry) is None
    challenge(registry, other.version)
    assert followed(config, registry) == other.version, "before the gate once more: that rollout was another story"
    record.append(opened(back, "tiny", "*", build.build_id, [], "me", ""))
    assert followed(config, registry) == other.version and record.latest().stage == "proposed"  # type: ignore[union-attr]
    registry.drop_alias("challenger")
    assert followed(config, registry) == other.version, "what a died process left undone is done by the next look"


def test_a_refused_version_is_no_challenger(registry: Registry, way: Way) -> None:
    config, served, other, _ = way
    challenge(registry, other.version)
    step_down(registry, served.version)
    assert registry.alias("challenger") == other.version, "another one was refused"
    step_down(registry, other.version)
    assert registry.alias("challenger") is None
    challenge(registry, other.version)
    registry.tag(other.version, {"gate": "refused"})                   # and there the process died
    assert followed(config, registry) is None


def test_a_waiting_request_is_not_disturbed(registry: Registry, way: Way) -> None:
    config, served, other, build = way
    record = DeploymentRecord(config.state.deployments, "tiny")
    followed(config, registry)
    registry.set_alias("champion", other.version)
    assert followed(config, registry) == other.version
    asked = waiting_request(registry)
    assert challenge(registry, served.version) == other.version, "trained meanwhile"
    step_down(registry, other.version)
    canary = record.append(opened(record.latest(), "tiny", "*", build.build_id, ["a"], "me", ""))
    record.append(withdrawn(canary, "me", "slower"))
    assert followed(config, registry) == other.version and waiting_request(registry) == asked
    registry.drop_alias("challenger")                                  # a race lost: the request is the tag
    assert waiting_request(registry) == asked
    answer_request(registry, other.version, "refused by the gate")
    registry.set_alias("challenger", other.version)
    assert waiting_request(registry) is None and followed(config, registry) is None


def test_a_challenger_that_somebody_put_on_a_foreign_version_gives_way(registry: Registry, way: Way) -> None:
    config, _, other, _ = way
    foreign = registry.client.create_model_version(registry.name, "somewhere", other.run_id)
    registry.set_alias("challenger", int(foreign.version))
    assert followed(config, registry) == int(foreign.version) and challenge(registry, other.version) == other.version
    registry.client.delete_model_version(registry.name, foreign.version)
