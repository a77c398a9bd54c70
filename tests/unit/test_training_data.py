"""Which windows are trained on, which are held out, and what is said when there are too few."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest

from tests.fakes_training import batch_of, captured, open_target, tiny_engine, to_lake
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import CheckpointError, EngineMismatch, NotEnoughSignals
from tide_pipeline.training.batches import Sampler
from tide_pipeline.training.data import WindowSplit, find_windows, held_out_windows, is_held_out, read_fitting, split_windows
from tide_pipeline.training.look import look_through
from tide_pipeline.training.places import window_reader
from tide_pipeline.training.snapshot import RUN, load_run, save_run
from tide_pipeline.training.target_head import TargetHead, read_target_head, target_head_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    """A lake with 30 requests of de, 12 of py, and 3 of another engine."""
    config = override(tiny_engine(tmp_path_factory.mktemp("data")), {"training": {"eval_share": 0.2}})
    target = open_target(config)
    other = [dataclasses.replace(w, window=dataclasses.replace(w.window, engine_digest="other")) for w in captured(target, "de", 3, seed=9)]
    to_lake(config, captured(target, "de", 30) + captured(target, "py", 12, seed=1) + other)
    return config


def readable(config: TideConfig, split: WindowSplit, head: TargetHead) -> WindowSplit:
    return look_through(split, head, window_reader(config), 0).windows


def test_split_is_by_prompt_and_reports_what_was_left_out(config: TideConfig) -> None:
    head = target_head_of(config)
    split = find_windows(config, "de", head.digest)
    data = readable(config, split, head)
    train, held_out = ({w.prompt_digest for w in part} for part in (data.train, data.focus_held_out + data.replay_held_out))
    assert not train & held_out and len(train) + len(held_out) == 42
    assert {w.workload for w in data.focus} == {"de"} and {w.workload for w in data.replay} == {"py"}
    assert data.skipped == {"made by another engine": 3}
    assert all(is_held_out(p, 0.2) for p in held_out) and not any(is_held_out(p, 0.2) for p in train)
    assert {w.window.workload for w in read_fitting(held_out_windows(split, 2), head)} == {"de", "py"}
    assert len(read_fitting(held_out_windows(split, 2), head)) <= 4


def test_requests_with_the_same_prompt_stay_on_one_side(config: TideConfig, tmp_path: Path) -> None:
    """Traffic repeats prompts: a held-out request must not have been trained on under another id or workload."""
    target = open_target(config)
    again = [dataclasses.replace(w, window=dataclasses.replace(w.window, request_id=f"again-{i}", workload=("de", "py")[i % 2]))
             for i, w in enumerate(captured(target, "de", 30))]
    lake = override(config, {"state_dir": str(tmp_path)})
    to_lake(lake, captured(target, "de", 30) + again)
    data = readable(lake, find_windows(lake, "de", target.digest), target_head_of(config))
    train, held_out = ({tuple(w.token_ids[: w.window.num_prompt_tokens].tolist()) for w in read_states(part)}
                       for part in (data.train, data.focus_held_out + data.replay_held_out))
    assert not train & held_out and len(train) + len(held_out) == 30


def test_too_few_prompts_says_how_many(config: TideConfig) -> None:
    digest = target_head_of(config).digest
    with pytest.raises(NotEnoughSignals, match=r"0 prompts of workload 'html'.*other workloads in the lake.*'de': 30"):
        find_windows(config, "html", digest)
    with pytest.raises(NotEnoughSignals, match="at least 100 different prompts"):
        find_windows(override(config, {"training": {"min_prompts": 100}}), "de", digest)
    with pytest.raises(NotEnoughSignals, match="serve traffic"):
        find_windows(override(config, {"state_dir": config.state_dir + "-empty"}), "de", digest)


def test_another_engines_windows_are_refused(config: TideConfig) -> None:
    with pytest.raises(EngineMismatch, match=r"all 45 captured windows .* come from another engine"):
        find_windows(config, "de", "newer-digest")


def test_shipped_windows_join_the_replay_set(config: TideConfig, tmp_path: Path) -> None:
    shipped = tmp_path / "replay"
    to_lake(config, captured(open_target(config), "c", 5, seed=3), tmp_path)
    (tmp_path / "signals").rename(shipped)
    split = find_windows(config, "de", target_head_of(config).digest, shipped)
    assert {w.workload for w in split.replay + split.replay_held_out} == {"py", "c"}


def test_newest_windows_win_and_short_ones_are_left_out(config: TideConfig) -> None:
    def window(i: int, workload: str, rows: int = 20) -> SignalWindow:
        return SignalWindow("u", i, f"{workload}{i}", "t", workload, "v", "e", 0, rows, 4, f"prompt{i}", 0.0, float(i))

    settings = dataclasses.replace(config.training, max_windows=10, eval_share=0.0)
    windows = [window(i, w) for w in ("de", "py", "c") for i in range(20)] + [window(99, "de", rows=3)]
    split = split_windows(windows, "de", settings)
    assert [w.row for w in split.focus] == list(range(19, 9, -1))
    assert sorted(w.workload for w in split.replay) == ["c"] * 5 + ["py"] * 5
    assert split.skipped == {"shorter than 8 rows": 1, "older than the newest max_windows": 40}


def test_the_gate_sees_every_prompt_before_a_second_window_of_any(config: TideConfig, tmp_path: Path) -> None:
    """Nine tenths of this traffic is one prompt, newest of all: the others are judged all the same."""
    target = open_target(config)
    windows = captured(target, "de", 6)
    often = [dataclasses.replace(windows[0], window=dataclasses.replace(windows[0].window, request_id=f"often-{i}", closed_at=100.0 + i))
             for i in range(54)]
    lake = override(config, {"state_dir": str(tmp_path), "training": {"eval_share": 1.0}})
    to_lake(lake, windows + often)
    held = split_windows(list_windows(lake.state.signals, lake.target).windows, "de", lake.training)
    chosen = read_fitting(held_out_windows(held, 8), target_head_of(lake))
    assert len({s.window.prompt_digest for s in chosen}) == 6 and len(chosen) == 8
    assert [s.window.request_id for s in chosen if s.window.closed_at >= 100] == ["often-51", "often-52", "often-53"], "and the newest"


def test_repeated_prompts_count_once(config: TideConfig, tmp_path: Path) -> None:
    target = open_target(config)
    again = [dataclasses.replace(w, window=dataclasses.replace(w.window, request_id=f"{w.window.request_id}-{n}"))
             for n in range(5) for w in captured(target, "de", 7)]
    lake = override(config, {"state_dir": str(tmp_path)})
    to_lake(lake, again)
    with pytest.raises(NotEnoughSignals, match=r"at least 8 different prompts and one of each are needed"):
        find_windows(lake, "de", target.digest)


def test_a_runs_list_of_windows_is_private_and_comes_back(config: TideConfig, tmp_path: Path) -> None:
    """It holds prompt digests, which are user data: not for others to read, nor for a log that shows a window."""
    split = find_windows(config, "de", target_head_of(config).digest)
    save_run(tmp_path, {"seed": 1}, split)
    assert load_run(tmp_path, {"seed": 1}) == split
    assert stat.S_IMODE((tmp_path / RUN).stat().st_mode) == 0o600
    assert split.focus[0].prompt_digest not in repr(split.focus[0])


def test_batches_depend_on_seed_and_step_alone_and_mix_replay_evenly(config: TideConfig) -> None:
    target = open_target(config)
    focus, replay = captured(target, "de", 6), captured(target, "py", 4, seed=1)
    sampler, again = Sampler(focus, replay, 2, 40, 0.25, 7), Sampler(focus, replay, 2, 40, 0.25, 7)
    assert batch_of(sampler, 5).next_ids_BT.equal(batch_of(again, 5).next_ids_BT)
    assert not batch_of(sampler, 5).next_ids_BT.equal(batch_of(sampler, 6).next_ids_BT)
    drawn = [row[0].request_id.split("-")[0] for step in range(20) for row in batch_of(sampler, step).windows]
    assert drawn.count("py") == 10 and len(drawn) == 40
    for step in range(0, 20, 2):                                                  # one in four, never two rows of four without
        rows = batch_of(sampler, step).windows + batch_of(sampler, step + 1).windows
        assert [row[0].request_id.split("-")[0] for row in rows].count("py") == 1


def test_only_the_heads_tensors_are_needed(config: TideConfig, tmp_path: Path) -> None:
    head = target_head_of(config)
    target = open_target(config)
    assert head.digest == target.digest and head.embedding_VD.equal(target.embedding_VD) and head.lm_head_VD.equal(target.lm_head_VD)
    with pytest.raises(CheckpointError, match="no target at"):
        read_target_head(tmp_path, head.spec)
