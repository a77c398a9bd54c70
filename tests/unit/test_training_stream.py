"""Training from a lake larger than the memory it may have, and from one that maintenance works on: the same draft, to the last bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.fakes_training import captured, open_target, tiny_engine, to_lake
from tide_pipeline.capture import encode, reader
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.delete import delete
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.reader import WindowStates, identity, list_windows
from tide_pipeline.capture.retain import Retention, retain
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import NotEnoughSignals, SettingsError, TrainingFailed
from tide_pipeline.training import places
from tide_pipeline.training.batches import Sampler, Slice
from tide_pipeline.training.data import find_windows
from tide_pipeline.training.look import look_through, state_bytes
from tide_pipeline.training.loop import TrainingInterrupted, train_draft
from tide_pipeline.training.places import GONE, window_reader
from tide_pipeline.training.snapshot import load_run
from tide_pipeline.training.stream import MB, StateCache, Stream
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.team import Team

EXACT = {"time_budget_s": 0.0, "max_steps": 16, "eval_every_steps": 8, "eval_windows": 2, "eval_share": 0.2, "window_rows": 48,
         "learning_rate": 5e-3, "warmup_steps": 3, "checkpoint_every_s": 1e9}
SMALL_MB = 0.08                    # a batch takes up to 0.035, the held-out windows 0.018, the lake some 0.5


def make_lake(root: Path) -> TideConfig:
    """52 requests of 32 rows in 26 shards."""
    config = override(tiny_engine(root), {"training": EXACT, "capture": {"shard_rows": 64}})
    target = open_target(config)
    to_lake(config, captured(target, "de", 40) + captured(target, "py", 12, seed=1))
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    """Not to be rewritten."""
    return make_lake(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def in_memory(config: TideConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft that everything else has to end with."""
    folder = tmp_path_factory.mktemp("memory")
    train_draft(config, workload="de", out_dir=folder)
    return folder


def same_draft(a: Path, b: Path) -> bool:
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    return all(one[name].equal(two[name]) for name in one)


def with_cache(config: TideConfig, cache_mb: float) -> TideConfig:
    return override(config, {"training": {"cache_mb": cache_mb}})


def at_step(step: int, do: Callable[[], object]) -> Callable[[], bool]:
    """A `should_stop` that never stops, and does something at one step."""
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        if len(asked) == step:
            do()
        return False
    return should_stop


class Reads:
    """Stands around `read_states`: how often windows are read, and how many bytes of states anybody holds, of all that were ever made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[str] = []
        self.most_bytes = 0
        self.made: list[weakref.ref[WindowStates]] = []
        real = WindowStates.__init__

        def init(states: WindowStates, *args: Any, **kwargs: Any) -> None:
            real(states, *args, **kwargs)
            self.made.append(weakref.ref(states))

        monkeypatch.setattr(WindowStates, "__init__", init)
        monkeypatch.setattr(places, "read_states", self)

    def alive(self) -> int:
        states = [s for ref in self.made if (s := ref()) is not None]
        self.made = [weakref.ref(s) for s in states]
        tensors = {t.data_ptr(): t.nbytes for s in states for t in (s.taps_TG, s.token_ids, s.final_TD, s.rejected_R2) if t is not None}
        return sum(tensors.values())

    def __call__(self, windows: Sequence[SignalWindow], **options: Any) -> Iterator[WindowStates]:
        for states in reader.read_states(windows, **options):
            self.windows.append(states.window.request_id)
            self.most_bytes = max(self.most_bytes, self.alive())
            yield states


def test_a_lake_of_several_times_the_limit_gives_the_same_draft(config: TideConfig, in_memory: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    windows, head = list_windows(config.state.signals, config.target).windows, target_head_of(config)
    assert sum(state_bytes(w, head) for w in windows) > 5 * SMALL_MB * MB
    reads, seen = Reads(monkeypatch), list[int]()
    train_draft(with_cache(config, SMALL_MB), workload="de", out_dir=tmp_path, should_stop=lambda: bool(seen.append(reads.alive())))
    assert same_draft(in_memory, tmp_path)
    window = state_bytes(windows[0], head)
    assert 0.5 * SMALL_MB * MB < max(seen) <= SMALL_MB * MB, "after a step"
    assert reads.most_bytes <= SMALL_MB * MB + 2 * window, "while reading: the window under way, as it is read and as it is held"
    assert len(reads.windows) > 2 * len(windows), "it was really read again and again"


def test_everything_is_read_once_where_it_fits(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    train_draft(config, workload="de", out_dir=tmp_path)
    split = find_windows(config, "de", target_head_of(config).digest)
    assert len(reads.windows) <= sum(map(len, split.parts)) + 4, "and the held-out ones that are measured on"
    assert reads.most_bytes > 3 * SMALL_MB * MB


def test_another_cache_may_go_on_with_a_run(config: TideConfig, in_memory: Path, tmp_path: Path) -> None:
    """It is what one would lower after running out of memory."""
    with pytest.raises(TrainingInterrupted):
        train_draft(config, workload="de", out_dir=tmp_path, should_stop=iter([False] * 4 + [True]).__next__)
    train_draft(with_cache(config, SMALL_MB), workload="de", out_dir=tmp_path)
    assert same_draft(in_memory, tmp_path)


def test_a_cache_that_cannot_hold_a_batch_says_so(config: TideConfig, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"training\.cache_mb leaves 0\.003 MB .* the windows of one batch take 0\.0\d\d MB: raise"):
        train_draft(with_cache(config, 0.02), workload="de", out_dir=tmp_path)


def test_only_the_row_groups_that_hold_a_window_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_engine(tmp_path)
    monkeypatch.setattr(encode, "GROUP_BYTES", 20_000)                             # two windows
    to_lake(config, captured(open_target(config), "de", 10))
    (shard,) = live_shards(config.state.signals, config.target)
    groups: list[int] = []
    real = reader.parquet_file

    class Spy:
        def __init__(self, stream: Any, **options: Any) -> None:
            self.file = real(stream, **options)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read_row_group(self, group: int, **options: Any) -> Any:
            groups.append(group)
            return self.file.read_row_group(group, **options)

    windows = sorted(list_windows(config.state.signals, config.target).windows, key=lambda w: w.row)
    monkeypatch.setattr(reader, "parquet_file", Spy)
    head = target_head_of(config)
    cache = StateCache(window_reader(config), lambda w: state_bytes(w, head), MB, lambda states: states)
    held = cache.get([windows[7], windows[2]], [windows[6], windows[3]])
    assert len(windows) == 10 and groups == [1, 3], "the next windows come from groups that are read anyway: once each"
    assert set(held) == {identity(windows[i]) for i in (2, 3, 6, 7)}
    cache.get([windows[3]], [])
    assert groups == [1, 3] and str(shard) == windows[0].uri


def test_each_process_reads_its_own_rows(config: TideConfig) -> None:
    head, found = target_head_of(config), list_windows(config.state.signals, config.target).windows
    windows = sorted(found, key=lambda w: (w.workload, w.closed_at))
    sampler = Sampler(windows[:40], windows[40:], 4, 48, 0.4, 3)
    for rank in (0, 1):
        cache = StateCache(window_reader(config), lambda w: state_bytes(w, head), 6 * state_bytes(windows[0], head), lambda states: states)
        stream = Stream(sampler, cache, Team(rank, 2), 100)
        assert not stream.fits
        for step in range(6):
            drawn, mine = stream.batch(step)
            assert drawn == sampler.slices(step)
            assert [[Slice(cut.source.window, cut.start, cut.rows) for cut in row] for row in mine] == drawn[rank::2]
            assert len(cache.held) <= 6


# --- maintenance while a run is under way --------------------------------------------------------------------------

@pytest.mark.parametrize("cache_mb", [SMALL_MB, 4_096.0])
def test_a_run_goes_on_after_its_shards_were_compacted(in_memory: Path, tmp_path: Path, cache_mb: float) -> None:
    config = with_cache(make_lake(tmp_path / "engine"), cache_mb)
    with pytest.raises(TrainingInterrupted):
        train_draft(config, workload="de", out_dir=tmp_path / "out", should_stop=iter([False] * 4 + [True]).__next__)
    old = {w.uri for w in list_windows(config.state.signals, config.target).windows}
    compact(config.state.lake, grace_s=0.0, settle_s=0.0)
    assert not any(Path(uri).exists() for uri in old) and len(live_shards(config.state.signals, config.target)) < 3
    train_draft(config, workload="de", out_dir=tmp_path / "out")
    assert same_draft(in_memory, tmp_path / "out")


def test_shards_compacted_while_it_trains_are_found_again(in_memory: Path, tmp_path: Path) -> None:
    config = with_cache(make_lake(tmp_path / "engine"), SMALL_MB)
    stop = at_step(5, lambda: compact(config.state.lake, grace_s=0.0, settle_s=0.0))
    train_draft(config, workload="de", out_dir=tmp_path / "out", should_stop=stop)
    assert same_draft(in_memory, tmp_path / "out") and len(live_shards(config.state.signals, config.target)) < 3


def test_a_run_whose_windows_were_deleted_says_what_to_do(tmp_path: Path) -> None:
    config = make_lake(tmp_path / "engine")
    with pytest.raises(TrainingInterrupted):
        train_draft(config, workload="de", out_dir=tmp_path / "out", should_stop=lambda: True)
    pinned = load_run(tmp_path / "out", {})
    assert pinned is not None
    total = sum(map(len, pinned.parts))
    delete(config.state.lake, request_id=pinned.replay[0].request_id, settle_s=0.0)
    with pytest.raises(TrainingFailed, match=rf"^1 of the {total} windows that the run in .*/out began with can't be read \(1 deleted or "
                                             r"expired.*remove its folder and train again"):
        train_draft(config, workload="de", out_dir=tmp_path / "out")
    made = train_draft(config, workload="de", out_dir=tmp_path / "new")
    assert made.num_windows == len(pinned.train) - 1
    retain(config.state.lake, Retention(signals_bytes=0))
    with pytest.raises(TrainingFailed, match=rf"^{total} of the {total} windows"):
        train_draft(config, workload="de", out_dir=tmp_path / "out")


def test_windows_that_go_while_it_trains_end_a_run_that_needs_them_again(tmp_path: Path) -> None:
    config = with_cache(make_lake(tmp_path / "engine"), SMALL_MB)
    stop = at_step(3, lambda: retain(config.state.lake, Retention(signals_bytes=0)))
    with pytest.raises(TrainingFailed, match=r"windows that this run began with can't be read \(\d+ deleted or expired"):
        train_draft(config, workload="de", out_dir=tmp_path / "out", should_stop=stop)


def test_windows_that_go_before_the_first_step_are_skipped_and_counted(tmp_path: Path) -> None:
    config = make_lake(tmp_path / "engine")
    head = target_head_of(config)
    split = find_windows(config, "de", head.digest)
    compact(config.state.lake, grace_s=0.0, settle_s=0.0)
    delete(config.state.lake, request_id=split.focus[0].request_id, settle_s=0.0)
    look = look_through(split, head, window_reader(config), 0)
    assert look.windows.skipped == {GONE: 1} and look.kept == {}
    assert {identity(w) for w in look.windows.focus} == {identity(w) for w in split.focus[1:]}
    assert [w.closed_at for w in look.windows.focus] == sorted(w.closed_at for w in split.focus[1:])
    retain(config.state.lake, Retention(signals_bytes=0))
    with pytest.raises(NotEnoughSignals, match=r"0 readable windows to train on and 0 held out; skipped: .*deleted or expired"):
        look_through(split, head, window_reader(config), 0)
