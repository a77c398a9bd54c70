"""What drafts saved, on logs whose answer is known: costs of steps, seconds against no speculation, regimes, speeds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tests.fakes_drift import acceptance_row, config_in, write_log
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import AcceptanceRow
from tide_pipeline.report.replayed import NEAREST, Accepted, shares
from tide_pipeline.report.savings import NONE, STATIC, Interval, Savings, find_savings, interval, speed
from tide_pipeline.report.savings_page import in_words, savings_section
from tide_pipeline.report.step_costs import drawn_weights, find_costs, served_steps

SINCE, UNTIL, BUCKET_S = 1.7e9, 1.7e9 + 600, 10.0
COST = {0: 1.0, 3: 1.5}                    # of a step of each draft length
PLAIN_MS = 20.0
EMITTED = 3.0                              # tokens of a drafted step


def row(rng: random.Random, at: float, length: int, load: float, batch: int = 2, version: str = "v1") -> AcceptanceRow:
    steps = 20
    ms = steps * PLAIN_MS * COST[length] * load * rng.lognormvariate(0.0, 0.1)
    return acceptance_row(at, request_id=f"r{at:.3f}-{length}", draft_version=version, draft_length=length, num_steps=steps,
                          drafted=(steps,) * length, accepted=(steps,) * min(length, 2), mean_batch_size=float(batch), duration_ms=ms,
                          emitted_tokens=round(steps * (EMITTED if length else 1)))


def busy_hour(config: TideConfig, drafted_share: float = 0.9) -> None:
    """Two halves: mostly drafted on an idle machine, then mostly plain on one that is three times as slow."""
    rng, rows = random.Random(3), []
    for i in range(1200):
        at, is_late = SINCE + i * 0.5 + 0.01, i >= 600
        is_drafted = rng.random() < (1 - drafted_share if is_late else drafted_share)
        rows.append(row(rng, at, 3 if is_drafted else 0, 3.0 if is_late else 1.0))
    write_log(config, rows)


def savings(config: TideConfig, static: str = "") -> Savings:
    found = find_savings(config, SINCE, UNTIL, BUCKET_S, static=static, drafts={}, training=[(SINCE + 60, 10.0)])
    assert found is not None
    return found


def test_costs_are_found_whatever_the_load_was(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    busy_hour(config)
    steps = served_steps(config, SINCE, UNTIL, BUCKET_S)
    kinds, _ = steps.kinds
    ratio_SK = find_costs(config, SINCE, UNTIL, kinds, drawn_weights())
    found = ratio_SK[:, kinds.index((3, 2))]
    assert found[0] == pytest.approx(1.5, rel=0.03)        # logged times alone say 0.6: plain steps stand where the machine was slow
    assert np.quantile(found[1:], 0.025) < 1.5 < np.quantile(found[1:], 0.975)
    assert ratio_SK[0, kinds.index((0, 2))] == 1.0


def test_saved_against_no_speculation(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    busy_hour(config)
    found, steps = savings(config), served_steps(config, SINCE, UNTIL, BUCKET_S)
    drafted_s = float(steps.device_ms_N[steps.length_N == 3].sum()) / 1e3
    against = found.against[0]
    right = drafted_s * (EMITTED / 1.5 - 1.0)              # twice as fast as plain where it drafted, nothing elsewhere
    assert against.name == NONE and against.judged_share == pytest.approx(1.0)
    assert against.saved_s.estimate == pytest.approx(right, rel=0.06)
    assert against.saved_s.low < right < against.saved_s.high
    assert found.served_s == pytest.approx(float(steps.ms_N.sum()) / 2e3)          # two requests share a step
    assert against.line[-1][1] == pytest.approx(against.saved_s.estimate) and found.training_s == 10.0


def test_nothing_is_claimed_where_nothing_tells(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    write_log(config, [row(random.Random(1), SINCE + 0.5 * i, 3, 1.0, version="v2") for i in range(1, 200)])
    found = savings(config, static="v1")
    assert not found.against and savings_section(found, SINCE, UNTIL) == "" and in_words(found) == ""


def test_the_static_draft_is_no_faster_than_itself(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    busy_hour(config)
    against = {a.name: a for a in savings(config, static="v1").against}
    assert against[STATIC].saved_s == Interval(0.0, 0.0, 0.0) and against[STATIC].judged_share == pytest.approx(1.0)


def test_no_step_no_savings(tmp_path: Path) -> None:
    assert find_savings(config_in(tmp_path), SINCE, UNTIL, BUCKET_S, static="", drafts={}, training=()) is None


def accepted(at: list[float], prompts: list[int]) -> Accepted:
    ones = np.ones((len(at), 2))
    return Accepted(np.array(at), np.array(prompts), ones * 0.5, ones[:, 0], ones * 0.2, ones[:, 0])


def test_a_moment_is_judged_by_the_nearest_windows() -> None:
    found = accepted([float(i) for i in range(40)], list(range(40)))
    assert sorted(found.nearest(20.0, 5.0).tolist()) == list(range(14, 26)) and found.prompts == 40
    assert found.nearest(46.0, 5.0).tolist() == [] and len(found.nearest(44.0, 5.0)) == NEAREST


def test_a_draft_is_as_fast_as_its_best_length() -> None:
    shares_SL = shares(np.array([[8.0, 4.0], [2.0, 0.0]]), np.array([10.0, 10.0]), np.array([[1.0, 1.0], [1.0, 0.0]]))
    assert shares_SL.tolist() == [[0.5, 0.2], [0.8, 0.4]]
    assert speed(np.array([[0.5, 0.2]]), np.array([[1.2, 1.6]])).tolist() == pytest.approx([1.5 / 1.2])
    assert speed(np.array([[0.5, 0.2]]), np.array([[1.2, np.nan]])).tolist() == pytest.approx([1.5 / 1.2])   # a length never served
    assert speed(np.array([[0.1, 0.0]]), np.array([[1.2, 1.6]])).tolist() == [1.0]                           # then it is not used at all


def test_few_prompts_widen_an_interval() -> None:
    draws = np.concatenate([[1.0], np.linspace(0.8, 1.2, 200)])
    one, few = interval(draws), interval(draws, 8)
    assert one.low == pytest.approx(0.81, abs=0.01) and few.low < one.low < 1.0 < one.high < few.high
    assert interval(np.array([1.0, *[np.nan] * 200])).high == float("inf")


def test_the_section_says_what_it_is(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    busy_hour(config)
    text = savings_section(savings(config, static="v1"), SINCE, UNTIL)
    for said in ("with no speculation", "with the static draft", "net, s", "1.5", "counts as one of serving", "<svg"):
        assert said in text, said
    assert "of serving saved against no speculation" in in_words(savings(config))
