"""Drift rules over slots of traffic: what each notices, what it leaves alone, what it would cost; ADWIN and the price of adapting."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fakes_drift import config_in, traffic, write_log
from tide_pipeline.config import CaptureSettings, DriftSettings, TideConfig, override
from tide_pipeline.drift.adwin import Adwin
from tide_pipeline.drift.policies import POLICIES, Judge, Slot, Sums
from tide_pipeline.drift.rates import clustered
from tide_pipeline.drift.replay import Replay, recorded, replay
from tide_pipeline.drift.worth import Price, gain_share, length, worth

PRICE = Price(train_s=60.0, slowdown=0.5, pay_back_s=86_400.0, depth=3)


def slots(*levels: tuple[float, int], seed: int = 0, requests: int = 10, steps: int = 30) -> list[Slot]:
    """(level, number of slots) after one another, 5 s each."""
    rng, out = np.random.default_rng(seed), []
    for level, count in levels:
        for _ in range(count):
            a = rng.binomial(steps, np.clip(rng.normal(level, 0.1, requests), 0, 1))
            out.append(Slot(5.0 * (len(out) + 1), requests, requests * steps, int(a.sum()), float(requests * steps**2),
                            float(steps * a.sum()), float((a * a).sum()), tokens=int(a.sum()) + requests * steps, steps=requests * steps))
    return out


def first_alarm(name: str, made: list[Slot]) -> int | None:
    policy = POLICIES[name](DriftSettings(), CaptureSettings())
    return next((i for i, slot in enumerate(made) if policy.update(slot)), None)


@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_sees_a_collapse(name: str) -> None:
    at = first_alarm(name, slots((0.75, 200), (0.35, 100)))
    assert at is not None and 200 <= at < 240


@pytest.mark.parametrize("name", ["judge", "judge+paper"])
def test_ours_keep_quiet_where_nothing_changes(name: str) -> None:
    assert [first_alarm(name, slots((0.7, 1500), seed=seed)) for seed in range(4)] == [None] * 4


def test_decay_too_slow_for_two_averages_is_seen_against_the_promotion() -> None:
    """0.75 to 0.45 in 12,000 slots: the paper's short average never falls behind its long one, until chance makes it."""
    made = slots((0.75, 100), *((0.75 - 0.3 * i / 120, 60) for i in range(120)))
    at = first_alarm("judge", made)
    assert at is not None and 0.5 < made[at].rate < 0.70
    assert first_alarm("page_hinkley", made[:100]) is None


def test_a_small_fall_is_acted_on_only_with_the_averages() -> None:
    made = slots((0.75, 200), (0.67, 400))
    assert first_alarm("judge", made) is None
    assert 200 < (first_alarm("judge+paper", made) or 0) < 500


def test_sums_are_the_estimate_of_the_requests() -> None:
    (slot, *more) = slots((0.6, 3))
    sums = Sums()
    for each in (slot, *more):
        sums.add(each)
    for each in more:
        sums.add(each, -1)
    rate = slot.accepted / slot.drafted
    squares = (slot.aa - 2 * rate * slot.da + rate**2 * slot.dd) / slot.drafted**2
    smooth = (slot.accepted + 1) / (slot.drafted + 2)
    assert sums.estimate() == clustered(rate, 300, 10, 1, squares, smooth * (1 - smooth) / 300)


def test_the_judge_gathers_thin_traffic_and_forgets_old_traffic() -> None:
    judge = Judge(DriftSettings(recent_s=20.0, min_steps=100))
    for slot in slots((0.75, 40), requests=2, steps=10):
        judge.update(slot)
    assert judge.is_calibrated and 100 <= judge.recent.drafted < 120
    judge.update(Slot(10_000.0, 1, 10, 5, 100.0, 50.0, 25.0))
    assert judge.recent.drafted == 10 and judge.low == -1.0, "too little data is no verdict"


@pytest.mark.parametrize("delta", [0.002, 0.05])
def test_adwin_keeps_what_fits_and_drops_what_does_not(delta: float) -> None:
    rng = random.Random(1)
    adwin = Adwin(delta)
    assert not any(adwin.update(rng.gauss(0.7, 0.03)) for _ in range(2000)) and adwin.width == 2000
    assert adwin.mean == pytest.approx(0.7, abs=0.01)
    assert any(adwin.update(rng.gauss(0.5, 0.03)) for _ in range(64)), "a fall is an alarm"
    assert not any(adwin.update(rng.gauss(0.9, 0.03)) for _ in range(200)), "a rise is none"
    assert adwin.width < 400 and adwin.mean > 0.8


def test_adwin_adds_up_its_window() -> None:
    rng, adwin = random.Random(2), Adwin()
    values = [rng.random() for _ in range(777)]
    for value in values:
        adwin.update(value)
    kept = values[-adwin.width:]
    assert adwin.mean == pytest.approx(sum(kept) / len(kept))


def test_a_replay_cools_down_and_begins_anew() -> None:
    made = [(("en", "v1"), slot) for slot in slots((0.75, 200), (0.35, 600))]
    found = replay(made, lambda: Judge(DriftSettings()), cooldown_s=60.0)
    assert len(found) == 1, "a draft adapted to this traffic would see no fall in it"
    assert found[0].before == pytest.approx(0.75, abs=0.03) and 0.3 < found[0].rate < 0.7 and found[0].drop > 0.1
    run = Replay(Always, cooldown_s=50.0)
    spoken = [run.push(("en", "v1"), slot) for _, slot in made[:100]]
    assert sum(firing is not None for firing in spoken) == 10


class Always:
    def update(self, slot: Slot) -> bool:
        return True


def test_slots_of_the_log_hold_its_requests(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    now = time.time()
    rows = list(traffic(random.Random(6), now - 60, now, 0.6, drafted_share=0.5))
    write_log(config, rows)
    found = list(recorded(config, now - 61, now + 1, 5.0))
    assert {key for key, _ in found} == {("en", "v1")} and [slot.time for _, slot in found] == sorted(slot.time for _, slot in found)
    assert sum(slot.drafted for _, slot in found) == sum(row.drafted[0] for row in rows if row.drafted)
    assert sum(slot.accepted for _, slot in found) == sum(row.accepted[0] for row in rows if row.accepted)
    assert sum(slot.steps for _, slot in found) == sum(row.num_steps for row in rows)
    assert sum(slot.requests for _, slot in found) == len({row.request_id for row in rows if row.drafted})


def test_what_an_adaptation_is_worth() -> None:
    assert length(0.5, 3) == 1.875 and gain_share(0.5, 0.0, PRICE) == 0.0
    assert gain_share(0.4, 0.4, PRICE) == pytest.approx(length(0.7, 3) / length(0.4, 3) - 1)
    much = worth(rate=0.4, drop=0.4, tokens_per_s=100.0, all_tokens_per_s=100.0, price=PRICE)
    assert much.is_worth and much.price == 3000.0 and much.pay_back_s == pytest.approx(3000 / (100 * gain_share(0.4, 0.4, PRICE)))
    rare = worth(rate=0.4, drop=0.4, tokens_per_s=0.01, all_tokens_per_s=100.0, price=PRICE)
    assert not rare.is_worth and rare.reason == ("not worth it: 3,000 tokens of training in 149 h, at 0.0 tokens/s more on 0.0 "
                                                 "(drift.pay_back_s is 24 h)")
    gone = worth(rate=0.4, drop=0.4, tokens_per_s=0.0, all_tokens_per_s=100.0, price=PRICE)
    assert not gone.is_worth and "never" in gone.reason
    free = Price.of(override(TideConfig(), {"drift": {"training_slowdown": 0.0}}))
    assert worth(rate=0.4, drop=0.0, tokens_per_s=0.0, all_tokens_per_s=1.0, price=free).is_worth, "where training costs serving nothing"
