"""States of a run's batches, read as the batches come up, within a fixed number of bytes. Knows draws and the reader; knows no draft.

A batch depends on seed and step alone, so what will be needed is known long before. When a window is missing, the cache is filled anew
with the windows of this batch and of the next ones, as many as fit, and each row group that holds any of them is read once. What is
trained on does not depend on the limit: only how often the lake is read does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from torch import Tensor

from tide_pipeline.capture.reader import Identity, WindowStates, identity
from tide_pipeline.config import TrainingSettings
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import SettingsError, TrainingFailed
from tide_pipeline.training.batches import Sampler, Slice
from tide_pipeline.training.look import Look, lost_windows, state_bytes
from tide_pipeline.training.places import WindowReader
from tide_pipeline.training.scale import scaled
from tide_pipeline.training.target_head import TargetHead
from tide_pipeline.training.team import Team

MB = 1_000_000
DRAWS_AHEAD = 20                   # per window, at most: after so many every one has come up

Adjust = Callable[[WindowStates], WindowStates]


class StateCache:
    """Holds states of at most `limit_bytes`; one row group more is in memory while it reads."""

    def __init__(self, reader: WindowReader, size_of: Callable[[SignalWindow], int], limit_bytes: float, adjust: Adjust) -> None:
        """`adjust` is applied to states once, on their way in, and must not change their size."""
        self.reader, self.size_of, self.limit_bytes, self.adjust = reader, size_of, limit_bytes, adjust
        self.held: dict[Identity, WindowStates] = {}

    def put(self, states: WindowStates) -> None:
        self.held[identity(states.window)] = self.adjust(states)

    def get(self, wanted: Sequence[SignalWindow], later: Iterable[SignalWindow]) -> Mapping[Identity, WindowStates]:
        """States by identity, of `wanted` and others. `later` is what will be asked for next, in order; looked at only on a miss.

        Raises:
            SettingsError: `wanted` alone is more than the limit.
            TrainingFailed: a window was deleted or damaged since the run looked through all of them.
        """
        if any(identity(window) not in self.held for window in wanted):
            self._fill(self._plan(wanted, later))
        return self.held

    def _plan(self, wanted: Sequence[SignalWindow], later: Iterable[SignalWindow]) -> dict[Identity, SignalWindow]:
        plan: dict[Identity, SignalWindow] = {}
        room = self.limit_bytes
        for window in chain(wanted, later):
            if (key := identity(window)) not in plan:
                room -= self.size_of(window)
                if room < 0:
                    break
                plan[key] = window
        if any(identity(window) not in plan for window in wanted):
            needed = sum({identity(window): self.size_of(window) for window in wanted}.values())
            raise SettingsError(f"training.cache_mb leaves {max(self.limit_bytes, 0) / MB:.3f} MB for training windows, the windows of one "
                                f"batch take {needed / MB:.3f} MB: raise it by several times the difference, or lower "
                                "training.batch_windows or training.eval_windows")
        return plan

    def _fill(self, plan: Mapping[Identity, SignalWindow]) -> None:
        for key in [key for key in self.held if key not in plan]:
            del self.held[key]
        for states in read_or_fail(self.reader, [window for key, window in plan.items() if key not in self.held]):
            self.put(states)


def read_or_fail(reader: WindowReader, windows: Sequence[SignalWindow]) -> Iterator[WindowStates]:
    """Their states, in the order of the shards.

    Raises:
        TrainingFailed: windows were deleted or damaged since the run looked through all of them.
    """
    lost: Counter[str] = Counter()
    yield from reader.read(windows, lambda _, reason: lost.update([reason]))
    if lost:
        raise TrainingFailed(lost_windows(lost, len(windows), "this run"))


def read_all(reader: WindowReader, windows: Sequence[SignalWindow]) -> list[WindowStates]:
    """The same in the order given."""
    found = {identity(states.window): states for states in read_or_fail(reader, windows)}
    return [found[identity(window)] for window in windows]


class Stream:
    """The batches of a run: what every process draws, and the states of this process's share."""

    def __init__(self, sampler: Sampler[SignalWindow], cache: StateCache, team: Team, max_steps: int) -> None:
        self.sampler, self.cache, self.team, self.max_steps = sampler, cache, team, max_steps
        self.windows = (*sampler.focus, *sampler.replay)
        self.fits = sum(map(cache.size_of, self.windows)) <= cache.limit_bytes

    def batch(self, step: int) -> tuple[list[list[Slice[SignalWindow]]], list[list[Slice[WindowStates]]]]:
        """The whole batch, unread, and this process's rows of it, read."""
        drawn = self.sampler.slices(step)
        mine = self.team.mine(drawn)
        states = self.cache.get([cut.source for row in mine for cut in row], self._later(step))
        return drawn, [[Slice(states[identity(cut.source)], cut.start, cut.rows) for cut in row] for row in mine]

    def _later(self, step: int) -> Iterator[SignalWindow]:
        """All windows if they fit, else in the order in which this process will need them."""
        if self.fits:
            return iter(self.windows)
        draws = (cut.source for s in range(step + 1, self.max_steps) for row in self.team.mine(self.sampler.slices(s)) for cut in row)
        return islice(draws, DRAWS_AHEAD * len(self.windows))

    def close(self) -> None:
        """Let go of all states."""
        self.cache.held.clear()


def open_stream(settings: TrainingSettings, look: Look, head: TargetHead, reader: WindowReader, team: Team,
                held_out: Sequence[WindowStates], scale_G: Tensor) -> Stream:
    """Batches of the training windows, within what the held-out ones leave of `cache_mb`; takes over what `look` kept."""
    s, windows = settings, look.windows
    room_bytes = s.cache_mb * MB - sum(state_bytes(states.window, head) for states in held_out)
    cache = StateCache(reader, lambda window: state_bytes(window, head), room_bytes, lambda states: scaled(states, scale_G))
    while look.kept:
        cache.put(look.kept.popitem()[1])
    return Stream(Sampler(windows.focus, windows.replay, s.batch_windows, s.window_rows, s.replay_share, s.seed), cache, team, s.max_steps)
