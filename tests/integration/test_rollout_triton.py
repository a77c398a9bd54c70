"""Three real Tritons behind the front, under load: a better draft reaches all of them, a worse one goes back, and no request fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.clients import Clients
from tests.fakes_rollout import judged
from tests.helpers import ask
from tests.serving import Place, until, write_place
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.gate.judge import DOORS
from tide_pipeline.rollout.promote import promote
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.front.replicas import ReplicaSpec, write_replicas
from tide_pipeline.serve.triton import TritonReplica

NAMES = ("replica-0", "replica-1", "replica-2")
PROMPTS = ("hello world", "abc abc abc", "the quick brown fox", "zyxw")
SETTINGS = {"serve": {"max_batch": 4, "agent_poll_s": 0.1, "report_s": 0.2}, "capture": {"mode": "off", "flush_s": 0.5},
            "rollout": {"bake_s": 1.0, "max_bake_s": 45.0, "min_bake_steps": 60, "max_drop": 0.15, "step_s": 0.3, "heartbeat_s": 30.0}}


class Load(Clients):
    """Clients that never stop asking, by the front."""

    def __init__(self, client: TritonClient, clients: int = 4) -> None:
        self._client = client
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)   # prompt -> text
        self.versions: Counter[str] = Counter()
        self.failures: list[str] = []
        super().__init__(clients)

    def ask(self, client: int) -> None:
        for i in range(1_000_000):
            if self.stopped.is_set():
                return
            prompt = PROMPTS[i % len(PROMPTS)]
            try:
                result = self._client.generate(ask(f"{client}-{i}", prompt, speculation="3", max_tokens=32, ignore_eos=True))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            self.answers[prompt][result.text] += 1
            self.versions[result.draft_version] += 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_place(tmp_path_factory.mktemp("fleet"), SETTINGS)


@pytest.fixture(scope="module")
def old(place: Place) -> EngineBuild:
    build = place.build("v1-old", noise=1.5, seed=1)
    place.deploy({"*": build.build_id})
    return build


@pytest.fixture(scope="module")
def front(place: Place, old: EngineBuild) -> Iterator[TritonClient]:
    with fleet(place) as url:
        yield TritonClient(url, "tiny")


@contextmanager
def fleet(place: Place) -> Iterator[str]:
    """Three replicas, started side by side, and a front; its url."""
    folder = place.config.state.root
    with ExitStack() as stack:
        replicas = [TritonReplica(place.config, place.config_file, replica=name) for name in NAMES]
        for replica in replicas:
            stack.callback(replica.stop)
            replica.start()
        for replica in replicas:
            replica.wait_ready(180.0)
        write_replicas(folder / "replicas.json", [ReplicaSpec(replica.replica, replica.client.url) for replica in replicas])
        process = subprocess.Popen([sys.executable, "-m", "tide_pipeline.serve.front", "--replicas", str(folder / "replicas.json"),
                                    "--state-file", str(folder / "front.json")])
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        until(lambda: (folder / "front.json").exists())
        url = json.loads((folder / "front.json").read_text())["url"]
        until(lambda: sum(r["ready"] for r in status(url)) == len(NAMES))
        yield url


def status(url: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = httpx.get(f"{url}/front/status").json()["replicas"]
    return found


def roll_out(place: Place, build: EngineBuild) -> Deployment:
    doors = {name: {"passed": True, "reason": "forced past the gate"} for name in DOORS}
    return promote(place.config, build, judged(place.config, build, doors=doors), who="test", reason="a test")


def served(place: Place) -> set[str]:
    """Digests that the replicas report."""
    return {state.draft_digests["*"] for state in read_observed(place.config.state.observed, "tiny").values()}


def test_a_full_rollout_and_a_rollback_under_load_without_a_failed_request(place: Place, old: EngineBuild, front: TritonClient) -> None:
    better, worse = place.build("v2-better", noise=0.05, seed=2), place.build("v3-worse", noise=40.0, seed=3)
    with Load(front) as load:
        until(lambda: load.versions["v1-old"] >= 20)
        done = roll_out(place, better)
        assert done.stage == "stable", done.reason
        until(lambda: served(place) == {better.draft_digest})
        history = place.record.history()
        assert [(d.stage, len(d.canary_replicas)) for d in history] == [
            ("stable", 0), ("canary", 1), ("rolling", 2), ("rolling", 3), ("stable", 0)]
        assert "on 3 control replicas" in done.reason or "on 2 control replicas" in done.reason

        back = roll_out(place, worse)
        assert back.stage == "rolled_back" and "v3-worse for '*' rolled back: " in back.reason and "drop +0." in back.reason
        until(lambda: served(place) == {better.draft_digest})
        assert all(len(d.canary_replicas) <= 1 for d in place.record.history()[5:]), "the worse draft never left its canary"
        answered = sum(load.versions.values())
        until(lambda: sum(load.versions.values()) >= answered + 20)
    assert not load.failures
    assert min(load.versions[version] for version in ("v1-old", "v2-better", "v3-worse")) > 0
    assert all(len(texts) == 1 for texts in load.answers.values()), "a draft never changes what is said"
    assert all(int(str(replica["served"])) > 20 and not replica["failed"] for replica in status(front.url))
    assert Path(place.config.state.acceptance).is_dir()
