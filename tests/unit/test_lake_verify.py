"""`verify` finds every kind of damage, readers pass over it; the command line deletes and names drafts."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.fakes_capture import ENGINE, HIDDEN, TAPS, TARGET, FakeEngine, make_recorder
from tests.fakes_training import captured, open_target, tiny_engine, to_lake
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.reader import list_windows
from tide_pipeline.capture.verify import EngineFacts, verify_acceptance, verify_signals
from tide_pipeline.cli import app
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.training.target_head import target_head_of

FACTS = EngineFacts(ENGINE, HIDDEN, TAPS)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    recorder = make_recorder(tmp_path)
    engine = FakeEngine(recorder)
    for name in ("r1", "r2"):
        engine.run(name)
    recorder.close()
    return tmp_path


def kinds(lake: Path, engine: EngineFacts = FACTS) -> set[str]:
    return {finding.kind for finding in verify_signals(lake / "signals", TARGET, engine).findings}


def shard_in(lake: Path, dataset: str = "signals") -> Path:
    return Path(*live_shards(lake / dataset, TARGET))


def test_a_sound_lake(lake: Path) -> None:
    found = verify_signals(lake / "signals", TARGET, FACTS)
    assert found.is_sound and (found.shards, found.windows, found.findings) == (1, 2, [])
    assert verify_acceptance(lake / "acceptance", TARGET).is_sound


@pytest.mark.parametrize("dataset", ["signals", "acceptance"])
def test_every_flipped_bit_is_found(lake: Path, dataset: str) -> None:
    shard, chance = shard_in(lake, dataset), random.Random(7)
    whole = shard.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        shard.write_bytes(bytes(data))
        check = verify_signals if dataset == "signals" else verify_acceptance
        assert not check(lake / dataset, TARGET).is_sound


def test_truncated_copied_exposed(lake: Path) -> None:
    shard = shard_in(lake)
    copy = shard.with_name("copy-of-" + shard.name)
    shutil.copyfile(shard, copy)
    os.chmod(copy, 0o644)
    assert kinds(lake) == {"copied", "exposed"}
    index = list_windows(lake / "signals", TARGET)
    assert len(index.windows) == 2 and "repeats 2 windows" in index.skipped[0][1], "training reads each once"
    copy.write_bytes(shard.read_bytes()[:-1])
    assert kinds(lake) == {"truncated"} | ({"exposed"} & kinds(lake))


def test_another_engine(lake: Path) -> None:
    assert kinds(lake, dataclasses.replace(FACTS, digest="new")) == {"stale"}
    assert kinds(lake, dataclasses.replace(FACTS, hidden_size=8)) == {"mislabelled"}


def test_states_that_do_not_give_the_emitted_tokens_are_mislabelled(tmp_path: Path) -> None:
    config = tiny_engine(tmp_path)
    head, windows = target_head_of(config), captured(open_target(config), "de", 4)
    engine = EngineFacts(head.digest, head.shape.hidden_size, 3, head.lm_head_VD)
    to_lake(config, windows)
    assert verify_signals(config.state.signals, config.target, engine).findings == []
    assert windows[0].final_TD is not None
    to_lake(config, [dataclasses.replace(windows[0], final_TD=windows[0].final_TD.roll(3, 0), window=dataclasses.replace(
        windows[0].window, request_id="another model"))])
    (finding,) = verify_signals(config.state.signals, config.target, engine).findings
    assert finding.kind == "mislabelled" and "1 windows whose states" in finding.detail


# --- the command line -----------------------------------------------------------------------------------------------

def tide(config: TideConfig, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--state", config.state_dir, "--engine", config.engine,
                                    "--set", f"engines_dir={config.engines_dir}"])


def draft_of(folder: Path, digest: str, windows: list[SignalWindow], parent: str = "") -> None:
    folder.mkdir(parents=True)
    shards = {w.uri: [w.row] for w in windows}
    (folder / "provenance.json").write_text(json.dumps({"digest": digest, "parent": parent, "shards": shards}))


def test_delete_names_the_drafts_and_verify_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.sweep.time.sleep", lambda _: None)
    config = tiny_engine(tmp_path)
    to_lake(config, captured(open_target(config), "de", 3))
    mine, other, _ = sorted(list_windows(config.state.signals, config.target).windows, key=lambda w: w.request_id)
    draft_of(config.state.training / "a" / "draft", "aaaa1111bbbb2222", [mine])
    draft_of(config.state.builds / "b" / "draft", "cccc3333dddd4444", [other], parent="v7-aaaa1111")
    draft_of(config.state.training / "c" / "draft", "eeee5555ffff6666", [other])
    assert tide(config, "signals", "verify").exit_code == 0
    first = tide(config, "signals", "delete", "--request", mine.request_id, "--json")
    assert first.exit_code == 0, first.output
    said = json.loads(first.stdout)
    assert (said["windows"], {d["digest"][:4]: d["windows"] for d in said["drafts"]}) == (1, {"aaaa": 1, "cccc": 0})
    again = tide(config, "signals", "delete", "--request", mine.request_id)
    assert "removed 0 windows" in again.output and "aaaa1111bbbb" in again.output and "through its parent" in again.output
    assert "no draft here was trained on it" in tide(config, "signals", "delete", "--tenant", "nobody").output
    assert "either --request ID or --tenant NAME" in tide(config, "signals", "delete").stderr
    shard = Path(live_shards(config.state.signals, config.target)[0])
    shard.write_bytes(shard.read_bytes()[:-1])
    bad = tide(config, "signals", "verify", "--json")
    assert bad.exit_code == 1 and json.loads(bad.stdout)["signals"]["findings"][0]["kind"] == "truncated"
    assert tide(config, "signals", "delete", "--tenant", "nobody").exit_code == 1, "nobody can tell what the file holds"
