"""The draft agent against a real engine, record and builds on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import ask, drain, generate, submit
from tests.serving import Place, poison, write_place
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.deployment.builds import save_build
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.serve import agent as agent_module
from tide_pipeline.serve.agent import DraftAgent
from tide_pipeline.serve.tally import TallySink


class Replica:
    """Engine, recorder and agent, without Triton."""

    def __init__(self, place: Place, name: str = "replica-0") -> None:
        config = place.config
        self.recorder = Recorder(config.capture, config.target, config.state.lake, name)
        tally = TallySink(self.recorder)
        self.engine = EmbeddedEngine(config.engine_dir / "target", place.spec, config.serve, config.speculation, tally)
        self.agent = DraftAgent(self.engine, self.recorder, tally, config, name)

    def versions(self) -> dict[str, str]:
        return self.engine.stats().drafts


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return write_place(tmp_path)


@pytest.fixture
def replica(place: Place) -> Replica:
    return Replica(place)


def test_serves_without_a_record(replica: Replica) -> None:
    assert not replica.agent.poll()
    assert replica.versions() == {} and replica.agent.error == ""


def test_swaps_to_what_the_record_says(place: Place, replica: Replica) -> None:
    first, second = place.build("v1"), place.build("v2", seed=1)
    place.deploy({"*": first.build_id})
    assert replica.agent.poll() and replica.versions() == {"*": "v1"}
    assert not replica.agent.poll()
    place.deploy({"*": first.build_id, "de": second.build_id})
    assert replica.agent.poll() and replica.versions() == {"*": "v1", "de": "v2"}
    generate(replica.engine, ask("a", "hello", workload="de", speculation="3", max_tokens=12))
    replica.agent.publish()
    seen = read_observed(place.config.state.observed, "tiny")["replica-0"]
    assert (seen.deployment, seen.drafts, seen.error) == (2, {"*": first.build_id, "de": second.build_id}, "")
    assert seen.draft_digests["de"] == second.draft_digest and seen.acceptance_length >= 1.0


def test_it_tells_since_when_it_serves_what_it_does(place: Place, replica: Replica) -> None:
    """From its first report of it, as a server that still warms up answers nobody; another number of the same drafts changes nothing."""
    first, second = place.build("v1"), place.build("v2", seed=1)
    place.deploy({"*": first.build_id})
    replica.agent.poll()
    began = time.time()
    since = replica.agent.report().serving_since
    assert since >= began
    place.deploy({"*": first.build_id})
    replica.agent.poll()
    assert replica.agent.report().deployment == 2 and replica.agent.report().serving_since == since
    place.deploy({"*": second.build_id})
    replica.agent.poll()
    replica.agent.publish()
    assert read_observed(place.config.state.observed, "tiny")["replica-0"].serving_since > since


def test_a_canary_replica_serves_its_own_group(place: Place, replica: Replica) -> None:
    first, second = place.build("v1"), place.build("v2", seed=1)
    groups = {"rest": {"*": first.build_id}, "canary": {"*": second.build_id}}
    place.deploy({}, groups=groups, canary_replicas=("replica-1",), stage="canary")
    other = Replica(place, "replica-1")
    replica.agent.poll(), other.agent.poll()
    assert (replica.versions(), other.versions()) == ({"*": "v1"}, {"*": "v2"})


def rewrite(build: EngineBuild, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    """Change weights and config.json of its draft, digests in order: it looks like a build that was made so."""
    folder = Path(build.path) / "draft"
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    save_build(replace(build, draft_digest=digest_draft(folder)))


def of_another_target(build: EngineBuild) -> None:
    rewrite(build, lambda weights, config: config["tide"].update(engine_digest="0123456789abcdef"))


def of_other_shapes(build: EngineBuild) -> None:
    rewrite(build, lambda weights, config: weights.update({"norm.weight": torch.ones(7)}))


def of_fewer_layers(build: EngineBuild) -> None:
    rewrite(build, lambda weights, config: weights.update({"fc.weight": weights["fc.weight"][:, :64].contiguous()}))


def pointing_outside(build: EngineBuild) -> None:
    rewrite(build, lambda weights, config: weights["d2t"].__setitem__(-1, 10_000))


def altered(build: EngineBuild) -> None:
    """One byte changed, recorded digest kept."""
    path = Path(build.path) / "draft" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


def missing(build: EngineBuild) -> None:
    (Path(build.path) / "build.json").unlink()


@pytest.mark.parametrize(("harm", "says"), [
    (poison, "NaN"), (altered, "altered"), (missing, "missing or incomplete"), (of_another_target, "was trained on engine"),
    (of_other_shapes, "norm.weight is"), (of_fewer_layers, "reads 2 layers"), (pointing_outside, "d2t points outside")])
def test_a_bad_build_changes_nothing_but_the_report(place: Place, replica: Replica, harm: Callable[[EngineBuild], None], says: str) -> None:
    good, bad = place.build("v1"), place.build("v2", seed=1)
    place.deploy({"*": good.build_id})
    replica.agent.poll()
    running = submit(replica.engine, ask("a", "hello", speculation="3", max_tokens=12, ignore_eos=True))
    replica.engine.step()
    harm(bad)
    place.deploy({"*": bad.build_id})
    assert not replica.agent.poll()
    drain(replica.engine)
    assert running.chunks[-1].draft_version == "v1" and running.chunks[-1].num_output_tokens == 12
    assert replica.versions() == {"*": "v1"} and says in replica.agent.error
    report = replica.agent.report()
    assert report.deployment == 1 and report.drafts == {"*": good.build_id} and says in report.error
    assert (replica.agent.desired, replica.agent.digest_mismatches) == (2, 1 if harm is altered else 0)
    place.deploy({"*": good.build_id})                      # rolled back: no pause, and the error is gone
    replica.agent.poll()
    assert replica.agent.error == "" and replica.agent.report().deployment == 3


def test_a_build_that_arrives_late_is_served_after_a_pause(place: Place, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    build = place.build("v1")
    hidden = Path(build.path).with_name("hidden")
    Path(build.path).rename(hidden)
    place.deploy({"*": build.build_id})
    assert not replica.agent.poll() and replica.agent.error
    hidden.rename(build.path)
    assert not replica.agent.poll(), "it is not tried again at once"
    monkeypatch.setattr(agent_module.time, "monotonic", lambda: 1e12)
    assert replica.agent.poll() and replica.agent.error == ""


def test_an_unreadable_record_keeps_what_is_served(place: Place, replica: Replica) -> None:
    build = place.build("v1")
    place.deploy({"*": build.build_id})
    replica.agent.poll()
    broken = place.record.folder / "000002.json"
    broken.write_text("{")
    assert not replica.agent.poll()
    assert replica.versions() == {"*": "v1"} and "can't be read" in replica.agent.error
    broken.unlink()
    replica.agent.poll()
    assert replica.agent.error == ""


def test_the_thread_polls_and_reports(place: Place, replica: Replica) -> None:
    build = place.build("v1")
    place.deploy({"*": build.build_id})
    replica.agent.start()
    for _ in range(100):
        if (seen := read_observed(place.config.state.observed, "tiny").get("replica-0")) and seen.deployment == 1:
            break
        time.sleep(0.05)
    replica.agent.close()
    assert seen is not None and seen.drafts == {"*": build.build_id}
