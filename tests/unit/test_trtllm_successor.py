"""A draft that only a new server can serve: what the agent reports, how the supervisor tells the front. The engine is the real adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serving import Place
from tests.trtllm import write_trtllm_place
from tests.trtllm_stand_in import stand_in
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.deployment.record import read_observed, write_observed
from tide_pipeline.engine.opening import open_engine
from tide_pipeline.errors import SettingsError
from tide_pipeline.serve.agent import DraftAgent
from tide_pipeline.serve.front.replicas import ReplicaSpec, read_replicas, write_replicas
from tide_pipeline.serve.supervisor import ReplicaSupervisor
from tide_pipeline.serve.tally import TallySink


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with stand_in("1.2"):
        yield write_trtllm_place(tmp_path, "1.2")


@pytest.fixture
def agent(place: Place) -> Iterator[DraftAgent]:
    """Of a server that was started with the first draft of the record."""
    place.deploy({"*": place.build("v1").build_id})
    recorder = Recorder(place.config.capture, "tiny", place.config.state.lake, "replica-0")
    tally = TallySink(recorder)
    engine = open_engine(place.config, place.spec, tally)
    found = DraftAgent(engine, recorder, tally, place.config, "replica-0")
    assert found.poll()
    engine.start()
    yield found
    engine.close()


def test_a_replica_says_that_it_needs_a_successor_and_then_leaves_it_the_word(place: Place, agent: DraftAgent) -> None:
    second = place.build("v2", seed=1)
    place.deploy({"*": second.build_id})
    assert not agent.poll() and agent.error == "" and agent.applied == 1
    agent.publish()
    seen = read_observed(place.config.state.observed, "tiny")["replica-0"]
    assert (seen.needs_restart, seen.deployment, seen.error) == (2, 1, "")
    write_observed(place.config.state.observed, replace(seen, pid=seen.pid + 1, deployment=2, needs_restart=0))
    agent.publish()
    assert read_observed(place.config.state.observed, "tiny")["replica-0"].deployment == 2, "the successor's report stands"


def test_a_record_that_goes_back_needs_no_successor_any_more(place: Place, agent: DraftAgent) -> None:
    first = next(iter(agent.serving.values()))
    place.deploy({"*": place.build("v2", seed=1).build_id})
    agent.poll()
    assert agent.report().needs_restart == 2
    place.deploy({"*": first.build_id})
    agent.poll()
    assert (agent.report().needs_restart, agent.applied, agent.error) == (0, 3, "")


def test_the_front_follows_the_new_server(place: Place, tmp_path: Path) -> None:
    file, others = tmp_path / "replicas.json", [ReplicaSpec("replica-1", "http://127.0.0.1:2", best_until=4)]
    write_replicas(file, [ReplicaSpec("replica-0", "http://127.0.0.1:1", weight=2.0), *others])
    supervisor = ReplicaSupervisor(place.config, place.config_file, tmp_path / "state.json", "replica-0", file)
    supervisor.state.http_url = "http://127.0.0.1:3"
    supervisor._tell_front()
    assert read_replicas(file) == [ReplicaSpec("replica-0", "http://127.0.0.1:3", weight=2.0), *others]
    file.write_text("{")
    supervisor._tell_front()
    assert "front was not told" in supervisor.state.error


def test_a_replica_whose_server_is_replaced_is_not_taken_for_dead(place: Place, agent: DraftAgent, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to report while a server starts in the place of another. One that died by itself stays silent."""
    monkeypatch.setattr("tide_pipeline.serve.supervisor.BEAT_S", 0.0)
    agent.publish()
    said = read_observed(place.config.state.observed, "tiny")["replica-0"]
    write_observed(place.config.state.observed, replace(said, at=said.at - 600.0))

    class Starting:
        looks = 0

        def is_ready(self) -> bool:
            self.looks += 1
            return self.looks > 3

        def returncode(self) -> None:
            return None

    supervisor = ReplicaSupervisor(place.config, place.config_file, tmp_path / "state.json", "replica-0")
    assert supervisor._await_ready(Starting())  # type: ignore[arg-type]
    assert read_observed(place.config.state.observed, "tiny")["replica-0"].at == said.at - 600.0
    assert supervisor._await_ready(Starting(), reports=True)  # type: ignore[arg-type]
    seen = read_observed(place.config.state.observed, "tiny")["replica-0"]
    assert seen.at >= said.at and replace(seen, at=said.at) == said, "what it said, as of now"


def test_an_unknown_backend_is_named(place: Place) -> None:
    with pytest.raises(SettingsError, match="no engine for backend 'vllm'"):
        open_engine(place.config, replace(place.spec, backend="vllm"))


def test_without_tensorrt_llm_it_says_where_to_find_it(tmp_path: Path) -> None:
    place = write_trtllm_place(tmp_path, "1.3")
    with pytest.raises(SettingsError, match="NVIDIA's container"):
        open_engine(place.config, place.spec)
