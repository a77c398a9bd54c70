"""`tide drafts` over drafts that were really trained and registered: from MLflow on SQLite, and from their folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.fakes_training import captured, open_target, tiny_engine, to_lake
from tide_pipeline.capture.reader import list_windows
from tide_pipeline.cli import app
from tide_pipeline.config import TideConfig, TrainingSettings, override
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.recipes import freeze
from tide_pipeline.registry.registry import Registry
from tide_pipeline.training.loop import train_draft

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:mlflow.*"), pytest.mark.filterwarnings("ignore::Warning:alembic.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafts, the second trained from the first with another seed after more traffic; both registered."""
    root = tmp_path_factory.mktemp("drafts")
    config = override(tiny_engine(root), {"training": {"max_steps": 8, "time_budget_s": 60.0, "min_prompts": 8, "eval_share": 0.3}})
    freeze(config, root / "settings.toml")
    target = open_target(config)
    to_lake(config, captured(target, "de", 16))
    first = train_draft(config, workload="de", out_dir=root / "first")
    registry = Registry(f"sqlite:///{root}/mlflow.db", config.target)
    registry.register(first, lineage={"workload": "de"})
    to_lake(config, captured(target, "de", 16, seed=1))
    again = override(config, {"training": {"seed": 5, "learning_rate": 0.004}})
    second = train_draft(again, workload="de", out_dir=root / "second", champion=root / "first", parent="v1-" + first.digest[:8])
    registry.register(second, lineage={"workload": "de", "origin": "the test"})
    registry.set_alias("champion", 2)
    return root


@pytest.fixture(autouse=True)
def _mlflow(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_MLFLOW_URI", f"sqlite:///{place}/mlflow.db")


def tide(place: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["drafts", *words, "--config", str(place / "settings.toml")])


def as_json(place: Path, *words: str) -> Any:
    done = tide(place, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_list(place: Path) -> None:
    one, two = as_json(place, "list")
    assert (one["version"], one["alias"], two["alias"], two["parent"]) == (1, "", "champion", one["draft"])
    assert (two["workload"], two["origin"]) == ("de", "the test") and float(two["acceptance_length"]) >= 1.0
    told = tide(place, "list").output
    assert two["draft"] in told and "champion" in told


def test_show_names_windows_parent_code_settings_seed_and_metrics(place: Path) -> None:
    found = as_json(place, "show", "2")
    assert found["draft"]["parent_digest"] == digest_draft(place / "first") and found["draft"]["alias"] == "champion"
    assert found["settings"]["seed"] == 5 and found["settings"]["learning_rate"] == 0.004
    assert found["metrics"]["start_acceptance_length"] >= 1.0 and found["metrics"]["steps"] == 8
    assert found["code"]["git_sha"] and found["code"]["package torch"] and "other" not in found
    assert sum(len(shard["rows"]) for shard in found["windows"].values()) == found["metrics"]["windows"]
    for name in ("champion", "v2", found["draft"]["draft_version"], found["draft"]["digest"][:12]):
        assert as_json(place, "show", name) == found
    told = tide(place, "show", "2").output
    assert "windows: " in told and " of 2 shards" in told and "learning_rate" in told and "0.004" in told


def test_digests_are_those_of_the_lake(place: Path) -> None:
    """Whoever still has the windows can prove that a draft was trained on them."""
    config: TideConfig = tiny_config(place)
    windows = {(w.uri, w.row): w.digest for w in list_windows(config.state.signals, "tiny").windows}
    for uri, shard in as_json(place, "show", str(place / "second"))["windows"].items():
        digests = [windows[uri, row] for row in shard["rows"]]
        assert all(len(digest) == 64 for digest in digests)
        assert shard["digest"] == hashlib.sha256("\n".join(digests).encode()).hexdigest()


def test_diff_shows_only_what_differs(place: Path) -> None:
    found = as_json(place, "diff", "1", "champion")
    assert found["settings"] == {"seed": {"a": 0, "b": 5}, "learning_rate": {"a": TrainingSettings().learning_rate, "b": 0.004}}
    assert found["draft"]["parent"]["a"] is None and "workload" not in found["draft"] and "code" not in found
    (new,) = found["windows"].values()                                 # the old shard is in both, with the same rows of it
    assert new["a"] is None and new["b"]["rows"]
    told = tide(place, "diff", "1", "champion").output
    assert "learning_rate" in told and "ttt_steps" not in told


def test_a_folder_is_as_good_as_its_version(place: Path) -> None:
    found = as_json(place, "diff", "2", str(place / "second"))
    assert set(found) <= {"draft", "metrics", "other"}, found                              # the registry's own names for it
    assert "are the same draft" in tide(place, "diff", "2", "champion").output
    alone = as_json(place, "diff", str(place / "first"), str(place / "second"))
    assert alone["settings"]["seed"] == {"a": 0, "b": 5}


@pytest.mark.parametrize(("words", "told"), [
    (("show", "7"), "nothing was read"),
    (("show", "v9-deadbeef"), "no draft is called 'v9-deadbeef'"),
    (("diff", "1", "nowhere/draft"), "no draft is called 'nowhere/draft'"),
    (("show", "."), "is no draft checkpoint"),
])
def test_what_is_not_there(words: tuple[str, ...], told: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = tide(place, *words)
    assert done.exit_code == 2 and told in done.output, done.output


def test_a_folder_altered_after_training_is_not_told_about(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (folder / name).write_bytes((place / "first" / name).read_bytes())
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    done = tide(place, "show", str(folder))
    assert done.exit_code == 2 and "altered after training" in done.output


def tiny_config(place: Path) -> TideConfig:
    return override(TideConfig(), {"engine": "tiny", "engines_dir": str(place / "engines"), "state_dir": str(place / "state")})
