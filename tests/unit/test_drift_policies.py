"""Drift rules over slots of traffic: what each notices, what it leaves alone, what it would cost; ADWIN and the price of adapting."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fakes_drift import acceptance_row, config_in, traffic, write_log
from tide_pipeline.config import DRIFT_POLICIES, CaptureSettings, DriftSettings, TideConfig, override
from tide_pipeline.drift.adwin import Adwin
from tide_pipeline.drift.level import Judge
from tide_pipeline.drift.policies import POLICIES, Running, remembers_since
from tide_pipeline.drift.rates import RateEstimate, clustered
from tide_pipeline.drift.replay import Known, Replay, recorded, replay
from tide_pipeline.drift.slots import Slot, Sums, weighted
from tide_pipeline.drift.worth import Price, gain_share, length, worth
from tide_pipeline.errors import SettingsError

PRICE = Price(train_s=60.0, slowdown=0.5, pay_back_s=86_400.0, depth=3)
PROMOTED = RateEstimate(0.75, 0.0004, 40, 1200, 40)


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
    policy = Running(name, DriftSettings(), CaptureSettings())
    return next((i for i, slot in enumerate(made) if policy.update(slot)), None)


@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_sees_a_collapse(name: str) -> None:
    at = first_alarm(name, slots((0.75, 200), (0.35, 100)))
    assert at is not None and 200 <= at < 240


@pytest.mark.parametrize("name", ["judge", "judge+paper", "judge+change"])
def test_ours_keep_quiet_where_nothing_changes(name: str) -> None:
    assert [first_alarm(name, slots((0.7, 1500), seed=seed)) for seed in range(4)] == [None] * 4


def test_decay_too_slow_for_two_averages_is_seen_against_the_promotion() -> None:
    """0.75 to 0.45 in 12,000 slots: the paper's short average never falls behind its long one, until chance makes it."""
    made = slots((0.75, 100), *((0.75 - 0.3 * i / 120, 60) for i in range(120)))
    at = first_alarm("judge", made)
    assert at is not None and 0.5 < made[at].rate < 0.70
    assert first_alarm("page_hinkley", made[:100]) is None


def test_a_small_fall_is_acted_on_only_with_an_alarm() -> None:
    made = slots((0.75, 200), (0.67, 400))
    assert first_alarm("judge", made) is None
    assert 200 < (first_alarm("judge+paper", made) or 0) < 500
    assert 600 < (first_alarm("judge+change", slots((0.75, 600), (0.67, 300))) or 0) < 800, "its mean has to be well known"


def test_the_table_is_what_settings_may_name() -> None:
    assert tuple(POLICIES) == DRIFT_POLICIES
    with pytest.raises(SettingsError, match=r"no policy 'nonsense': choose from judge, judge\+paper, .*adwin"):
        override(TideConfig(), {"drift": {"policy": "nonsense"}})


@pytest.mark.parametrize("name", POLICIES)
def test_whoever_reads_two_hours_of_slots_has_the_rule_as_it_runs(name: str) -> None:
    """At every slot near a whole hour, and at some in between: what a sensor that was just started says, and why."""
    made = slots((0.75, 500), (0.60, 300), (0.74, 400), (0.5, 1000), (0.3, 300))
    running = Running(name, DriftSettings(), CaptureSettings(), PROMOTED)
    spoken = [(running.update(slot), running.says) for slot in made]
    for i in (0, 50, 501, 690, 719, 720, 721, 1439, 1440, 1441, 1500, 2160, 2499):
        fresh = POLICIES[name](DriftSettings(), CaptureSettings(), PROMOTED)
        later = [slot for slot in made[:i + 1] if slot.time > remembers_since(made[i].time)]
        for slot in later:
            fresh.take(slot)
        assert (fresh.fires, fresh.says) == spoken[i], i
    assert any(fired for fired, _ in spoken) and not all(fired for fired, _ in spoken)


def test_slots_without_a_draft_are_no_baseline_and_no_error() -> None:
    """Speculation may be off when the period begins: no request drafted then."""
    running = Running("judge", DriftSettings(), CaptureSettings())
    assert not running.update(Slot(5.0, 0, 0, 0, 0.0, 0.0, 0.0, tokens=50, steps=50))
    assert running.says == "no baseline yet"


def test_a_rule_that_nobody_fed_for_hours_begins_anew() -> None:
    running = Running("paper", DriftSettings(), CaptureSettings(), PROMOTED)
    early = slots((0.75, 200))
    for slot in early:
        running.update(slot)
    late = [dataclasses.replace(slot, time=slot.time + 3 * 3600) for slot in slots((0.3, 20))]
    assert not any(running.update(slot) for slot in late), "nothing has fallen since it began"


@pytest.mark.parametrize("name", ["paper", "page_hinkley", "adwin"])
def test_an_alarm_stands_until_acceptance_is_back(name: str) -> None:
    made = slots((0.75, 200), (0.60, 250), (0.75, 150))
    policy = Running(name, DriftSettings(), CaptureSettings(), PROMOTED)
    fired = [policy.update(slot) for slot in made]
    begin = fired.index(True)
    assert 200 <= begin < 300 and all(fired[begin:450]) and not any(fired[480:])


def test_a_rule_says_why_with_its_numbers() -> None:
    said = {}
    for name in POLICIES:
        policy = Running(name, DriftSettings(), CaptureSettings(), PROMOTED)
        quiet, after = "", ""
        for i, slot in enumerate(slots((0.75, 200), (0.62, 300))):
            policy.update(slot)
            quiet, after = (policy.says, after) if i < 200 else (quiet, policy.says)
        said[name] = quiet, after
    assert re.fullmatch(r"drop -?0\.0\d \(-0\.\d\d to 0\.\d\d\): lower end < 0\.10", said["judge"][0])
    assert re.search(r"no alarm: short average 0\.7\d >= long 0\.7\d - 0\.05$", said["judge+paper"][0])
    assert re.fullmatch(r"alarm of 00:1\d:\d\d UTC: short average 0\.\d\d < long 0\.\d\d - 0\.05, now 0\.6\d; "
                        r"a real drop: 0\.1\d \(0\.0\d to 0\.\d\d\)", said["judge+paper"][1])
    assert re.search(r"UTC: Page-Hinkley finds a fall after 2\d\d values of mean 0\.7\d, now 0\.6\d; a real drop", said["judge+change"][1])
    assert re.search(r"^no alarm: ADWIN sees no fall in 200 values of mean 0\.7\d$", said["adwin"][0])
    assert re.fullmatch(r"average 0\.6\d < 0\.75 at promotion - 0\.10", said["ema"][1])


def test_the_speculation_controller_can_not_outvote_or_shout() -> None:
    """A third of the time every step drafted, the rest a hundredth: the rate is the traffic's; and probes one by one are no falls."""
    dense = [Slot(5.0 * (i + 1), 10, 300, 240, 9e3, 7.2e3, 5.8e3, steps=300) for i in range(4)]
    thin = [Slot(5.0 * (i + 5), 3, 3, 1, 3.0, 1.0, 1.0, steps=300) for i in range(8)]
    found = weighted([*dense, *thin], 0.0, 60.0)
    assert found.rate == pytest.approx((0.8 + 2 * 1 / 3) / 3, abs=0.15) and found.steps == 1224     # by drafted step: 0.79
    rng, policy = np.random.default_rng(3), Running("paper", DriftSettings(), CaptureSettings(), PROMOTED)
    hits = rng.binomial(2, 0.75, 720)
    probes = [Slot(5.0 * (i + 1), 2, 2, int(a), 2.0, float(a), float(a), steps=300) for i, a in enumerate(hits)]
    assert not any(policy.update(slot) for slot in probes)


def test_sums_are_the_estimate_of_the_requests() -> None:
    (slot, *more) = slots((0.6, 3))
    sums = Sums()
    for each in (slot, *more):
        sums.add(each)
    rate = slot.accepted / slot.drafted
    squares = (slot.aa - 2 * rate * slot.da + rate**2 * slot.dd) / slot.drafted**2
    smooth = (slot.accepted + 1) / (slot.drafted + 2)
    assert weighted((slot, *more), 0.0, 1e6).rate == sums.estimate().rate
    sums = Sums()
    sums.add(slot)
    assert sums.estimate() == clustered(rate, 300, 10, 1, squares, smooth * (1 - smooth) / 300)


def test_the_judge_gathers_thin_traffic_and_forgets_old_traffic() -> None:
    judge = Judge(DriftSettings(recent_s=20.0, min_steps=100), PROMOTED)
    for slot in slots((0.75, 40), requests=2, steps=10):
        judge.take(slot)
    assert 100 <= judge.drafted < 120 and judge.drop[1] > -1.0
    judge.take(Slot(10_000.0, 1, 10, 5, 100.0, 50.0, 25.0))
    assert judge.drafted == 10 and judge.drop == (0.0, -1.0, 1.0), "too little data is no verdict"


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
    found = replay(made, lambda baseline: Running("judge", DriftSettings(), CaptureSettings(), baseline), cooldown_s=60.0)
    assert len(found) == 1, "a draft adapted to this traffic would see no fall in it"
    assert found[0].before == pytest.approx(0.75, abs=0.03) and 0.3 < found[0].rate < 0.7 and found[0].drop > 0.1
    run = Replay(lambda _: Always(), cooldown_s=50.0)
    spoken = [run.push(("en", "v1"), slot) for _, slot in made[:100]]
    assert sum(firing is not None for firing in spoken) == 10


def test_a_replay_knows_what_the_draft_was_worth_at_promotion() -> None:
    """The recording begins when it has fallen already."""
    made = [(("en", "v1"), slot) for slot in slots((0.45, 100))]
    run = Replay(lambda baseline: Running("judge", DriftSettings(), CaptureSettings(), baseline), cooldown_s=60.0,
                 known=lambda _: Known(PROMOTED, 100.0))
    found = [firing for key, slot in made if (firing := run.push(key, slot)) is not None]
    assert len(found) == 1 and found[0].before == 0.75 and 100.0 <= found[0].time < 130.0


class Always:
    def update(self, slot: Slot) -> bool:
        return True


def test_slots_of_the_log_hold_its_requests(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    now = time.time()
    rows = list(traffic(random.Random(6), now - 60, now, 0.6, drafted_share=0.5))
    write_log(config, [*rows, acceptance_row(now - 30, request_id="has not ended", finish_reason="")])
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
