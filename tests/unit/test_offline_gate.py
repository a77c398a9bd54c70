"""Batched replay against a slow walk with the inference runner; the paired comparison and its interval."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.fakes_training import captured, open_target, random_draft, tiny_engine, to_lake
from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.config import GateSettings, TideConfig, override
from tide_pipeline.errors import NotEnoughSignals
from tide_pipeline.gate.offline import by_prompt, held_out_states, paired_acceptance
from tide_pipeline.models.eagle3 import DraftRunner, Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.training.acceptance import replay


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return tiny_engine(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def target(config: TideConfig) -> Target:
    return open_target(config)


def slow_walk(draft: Eagle3Draft, target: Target, w: WindowStates, draft_length: int) -> tuple[int, list[int]]:
    """What the engine does: extend by the true rows, chain greedily up to the token before the last, compare, go on behind the bonus."""
    runner = DraftRunner(draft, target.embedding_VD)
    x, taps = w.token_ids, w.taps_TG.float()
    anchor, steps, by_position = w.window.num_prompt_tokens - 1 - w.window.start_pos, 0, [0] * draft_length
    while (length := min(draft_length, len(x) - anchor - 3)) > 0:
        cache = runner.new_cache(1, 128)
        state = runner.extend(taps[: anchor + 1], x[1 : anchor + 2], torch.arange(anchor + 1), [anchor + 1], cache)[-1:]
        drafted: list[int] = []
        for i in range(length):
            if i:
                state = runner.step(state, torch.tensor(drafted[-1:]), torch.tensor([anchor + i]), cache)
            drafted.append(int(runner.to_target(runner.logits(state).argmax(-1))))
        emitted = x[anchor + 2 : anchor + 2 + length].tolist()
        n = next((i for i in range(length) if drafted[i] != emitted[i]), length)
        steps += 1
        for i in range(n):
            by_position[i] += 1
        anchor += n + 1
    return steps, by_position


def some_good_draft(target: Target, vocabulary: torch.Tensor | None = None) -> Eagle3Draft:
    """Random, but its output leans on the newest token as the tiny target does: some chains hit."""
    draft = random_draft(target.shape, vocabulary=vocabulary)
    with torch.no_grad():
        draft.fc.weight.mul_(0.05)
        draft.lm_head.weight.copy_(target.lm_head_VD if vocabulary is None else target.lm_head_VD[vocabulary])
        draft.fc.weight[:, -32:] += torch.eye(32)
    return draft


@pytest.mark.parametrize("draft_length", [1, 3, 5])
@pytest.mark.parametrize("reduced", [False, True])
def test_batched_replay_equals_the_slow_walk(target: Target, draft_length: int, reduced: bool) -> None:
    windows = captured(target, "py", 5, prompt=7, output=30) + captured(target, "de", 3, prompt=4, output=12, seed=2)
    draft = some_good_draft(target, torch.arange(0, 64, 2) if reduced else None)
    found = by_prompt(replay(draft, target, windows, draft_length))
    total = 0
    for w in windows:
        steps, by_position = slow_walk(draft, target, w, draft_length)
        one = found[w.window.workload, False, w.window.prompt_digest]
        assert (one.steps, list(one.accepted)) == (steps, by_position)
        total += sum(by_position)
    assert reduced or total > 10                                                 # the comparison is about something


def test_a_windows_start_and_the_requests_other_windows_are_counted(target: Target) -> None:
    """A window that begins behind the prompt is walked from its first row; windows of one request add up."""
    (w,) = captured(target, "py", 1, prompt=6, output=30)
    assert w.final_TD is not None
    head = WindowStates(dataclasses.replace(w.window, num_rows=16), w.token_ids[:17], w.taps_TG[:16], w.final_TD[:16])
    tail = WindowStates(dataclasses.replace(w.window, start_pos=16, num_rows=20), w.token_ids[16:], w.taps_TG[16:], w.final_TD[16:])
    draft = some_good_draft(target)
    a, b, both = (one for part in ([head], [tail], [head, tail])
                  for one in by_prompt(replay(draft, target, part, 3)).values())
    assert both.steps == a.steps + b.steps and both.rows == 36
    assert by_prompt(replay(draft, target, [WindowStates(w.window, w.token_ids[:8], w.taps_TG[:7], None)], 3)) == {}
    short = WindowStates(dataclasses.replace(w.window, start_pos=16, num_rows=3), w.token_ids[16:20], w.taps_TG[16:19], w.final_TD[16:19])
    (one,) = by_prompt(replay(draft, target, [short], 5)).values()
    assert one.steps == 1 and one.accepted[1:] == (0, 0, 0, 0)                   # room for one drafted token before the last


def test_equal_drafts_gain_nothing_and_a_better_one_gains(target: Target) -> None:
    windows = captured(target, "py", 12, output=40) + captured(target, "de", 12, output=40, seed=1)
    good, bad, settings = some_good_draft(target), random_draft(target.shape, seed=5), GateSettings(bootstrap=200)
    same = paired_acceptance(good, good, target, windows, settings, "de")
    assert same.gain == same.gain_low == same.gain_high == 0 and same.prompts == 12
    better = paired_acceptance(bad, good, target, windows, settings, "de")
    assert better.gain_low > 0 and better.gain_low <= better.gain <= better.gain_high
    assert set(better.by_workload) == {"py", "de"} and better.by_workload["de"]["gain"] == better.gain
    assert better == paired_acceptance(bad, good, target, windows, settings, "de")
    with pytest.raises(NotEnoughSignals, match=r"'html'.*de, py"):
        paired_acceptance(bad, good, target, windows, settings, "html")


def test_sampled_requests_stand_apart_from_greedy_ones(target: Target) -> None:
    windows = captured(target, "py", 4)
    hot = [dataclasses.replace(w, window=dataclasses.replace(w.window, temperature=0.8, request_id=f"hot{i}"))
           for i, w in enumerate(captured(target, "py", 3, seed=4))]
    draft, settings = some_good_draft(target), GateSettings(bootstrap=50)
    both = paired_acceptance(draft, draft, target, windows + hot, settings, "py")
    assert both.prompts == 4 and both.by_workload["py (sampled)"]["prompts"] == 3
    assert paired_acceptance(draft, draft, target, hot, settings, "py").prompts == 3


def test_a_prompt_counts_once_however_often_it_was_asked(target: Target) -> None:
    """Ten requests of each prompt are no better evidence than one: same gain, same interval, same number of prompts."""
    windows = captured(target, "py", 8, output=40)
    often = [dataclasses.replace(w, window=dataclasses.replace(w.window, request_id=f"{w.window.request_id}-{n}"))
             for n in range(10) for w in windows]
    good, bad, settings = some_good_draft(target), random_draft(target.shape, seed=5), GateSettings(bootstrap=200)
    once, ten_times = (paired_acceptance(bad, good, target, part, settings, "py") for part in (windows, often))
    assert once.gain_low < once.gain_high and once.prompts == ten_times.prompts == 8 and ten_times.rows == 10 * once.rows
    assert (once.gain, once.gain_low, once.gain_high) == pytest.approx((ten_times.gain, ten_times.gain_low, ten_times.gain_high))


def test_a_prompt_of_two_workloads_counts_in_each(target: Target) -> None:
    windows = captured(target, "py", 4)
    both = windows + [dataclasses.replace(w, window=dataclasses.replace(w.window, workload="de", temperature=0.8)) for w in windows]
    draft = some_good_draft(target)
    found = paired_acceptance(draft, draft, target, both, GateSettings(bootstrap=50), "de")
    assert {name: numbers["prompts"] for name, numbers in found.by_workload.items()} == {"py": 4, "de": 4}


def test_the_interval_covers_the_truth_at_its_rate() -> None:
    """Two drafts of the same quality over 24 prompts: about 5 in 100 intervals may exclude zero, and half of those upward."""
    from tide_pipeline.gate.offline import _compare
    from tide_pipeline.training.acceptance import Replay

    rng, upward = np.random.default_rng(0), 0
    for trial in range(300):
        rates = rng.uniform(0.4, 0.9, 24)                                        # prompts differ more than steps do
        a, b = ({("w", False, str(i)): Replay(str(i), "w", 0.0, 30, (int(rng.binomial(30, r)),), 90) for i, r in enumerate(rates)}
                for _ in range(2))
        upward += _compare(a, b, list(a), 200, trial)["gain_low"] > 0
    assert upward / 300 < 0.05


def test_held_out_states_come_from_the_lake(config: TideConfig, target: Target) -> None:
    config = override(config, {"training": {"eval_share": 0.3}, "gate": {"windows": 3}})
    to_lake(config, captured(target, "py", 20) + captured(target, "de", 20, seed=1))
    head, states = held_out_states(config, "de")
    assert head.digest == target.digest
    assert sorted({s.window.workload for s in states}) == ["de", "py"] and len(states) == 6
