"""Records that another version wrote: replicas and pipeline are not upgraded at once, so each reads what it knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tide_pipeline.contracts import Deployment, EngineBuild, ObservedState, from_json
from tide_pipeline.deployment.builds import list_builds, read_build, save_build
from tide_pipeline.deployment.record import DeploymentRecord, read_observed, read_replica, write_observed

FIRST = Deployment(1, "tiny", {"rest": {"*": "b1"}}, (), "stable", "me", "first")


def add_field(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_later_version": {"x": [1]}}))


def test_a_deployment_of_a_later_version_is_followed(tmp_path: Path) -> None:
    record = DeploymentRecord(tmp_path, "tiny")
    written = record.append(FIRST)
    add_field(tmp_path / "tiny" / "000001.json")
    assert record.latest() == record.read(1) == written and record.history() == [written]


def test_what_a_replica_of_a_later_version_reports_is_read(tmp_path: Path) -> None:
    state = ObservedState("r0", "tiny", 3, {"*": "b1"}, {"b1": "d1"}, 2.5, 300.0, "", 12.5, 4711)
    write_observed(tmp_path, state)
    add_field(tmp_path / "tiny" / "r0.json")
    assert read_replica(tmp_path, "tiny", "r0") == read_observed(tmp_path, "tiny")["r0"] == state


def test_a_build_of_a_later_version_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "b1"
    folder.mkdir(parents=True)
    build = EngineBuild("b1", "tiny", "embedded", str(folder), "v1-aa", "aa", "ee", 12.5, {"steps": 3.0})
    save_build(build)
    add_field(folder / "build.json")
    assert read_build(tmp_path, "tiny", "b1") == build and list_builds(tmp_path, "tiny") == [build]


@pytest.mark.parametrize("text", ['{"n": 1}', "[]", "3"])
def test_what_is_missing_can_not_be_left_out(text: str) -> None:
    with pytest.raises(TypeError):
        from_json(Deployment, text)
