"""How often the offline door errs, on simulated traffic: no difference between drafts, a true gain of 0.1, workloads that lose.

Tokens are simulated, not acceptance lengths: prompts differ in how predictable they are (looping ones very), a token has a difficulty that
both drafts meet, each draft has a skill on each prompt, and the engine's greedy walk with draft length 3 is made over them. The
spreads are those of real drafts on the pocket target; `test_it_looks_like_the_real_thing` holds them to what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tide_pipeline.config import GateSettings
from tide_pipeline.contracts import PairedAcceptance
from tide_pipeline.gate.judge import offline_door
from tide_pipeline.gate.offline import Cluster, _compare, few_prompts
from tide_pipeline.training.acceptance import Replay

SETTINGS = replace(GateSettings(), bootstrap=300)
TOKENS, DEPTH = 95, SETTINGS.draft_length      # generated tokens of a request; longest chain
GAIN_PER_SKILL = 1.2                           # acceptance length
DEFAULT = SETTINGS.windows

Floats = NDArray[np.floating]
Walks = NDArray[np.int64]                      # [trial, prompt, accepted | steps]


@dataclass(frozen=True)
class Traffic:
    """Everything in standard deviations of a token's difficulty."""

    ease: float                    # of a token for both drafts
    prompt_spread: float
    shared: float                  # of the difficulty's variance, met by both drafts alike
    skill_spread: float            # of one draft between prompts, beside the other's


TRAFFIC = {"even": Traffic(0.87, 0.3, 0.98, 0.08), "uneven": Traffic(0.45, 0.5, 0.97, 0.12)}     # like html and like de


def walks(rng: np.random.Generator, traffic: Traffic, ease_TP: Floats, difficulty: Floats) -> Walks:
    """The engine's greedy walk over tokens that a draft gets right where their difficulty is below its ease."""
    own = rng.standard_normal(difficulty.shape, dtype=np.float32)
    right = np.sqrt(traffic.shared) * difficulty + np.sqrt(1 - traffic.shared) * own < ease_TP
    accepted, steps, chain = (np.zeros(ease_TP.shape, dtype=np.int64) for _ in range(3))
    for hit in right:
        goes_on = hit & (chain < DEPTH)
        accepted += goes_on
        steps += ~goes_on                                                        # the target's own token ends a step
        chain = np.where(goes_on, chain + 1, 0)
    return np.stack((accepted, np.maximum(steps, 1)), axis=-1)


def drafts(seed: int, kind: str, trials: int, prompts: int, gains: tuple[float, ...]) -> list[Walks]:
    """Several drafts on the same prompts; `gains` are their true acceptance lengths against each other."""
    rng, traffic = np.random.default_rng(seed), TRAFFIC[kind]
    shape = trials, prompts
    ease = traffic.ease + traffic.prompt_spread * rng.standard_normal(shape)
    difficulty = rng.standard_normal((TOKENS, *shape), dtype=np.float32)
    return [walks(rng, traffic, ease + traffic.skill_spread * rng.standard_normal(shape) + gain / GAIN_PER_SKILL, difficulty)
            for gain in gains]


def replays(walk_P2: Walks, workload: str) -> dict[Cluster, Replay]:
    return {(workload, False, str(i)): Replay(str(i), workload, 0.0, int(steps), (int(accepted), 0, 0), TOKENS)
            for i, (accepted, steps) in enumerate(walk_P2)}


def compared(champion: Walks, challenger: Walks, trial: int, workload: str = "new") -> dict[str, float]:
    """What the gate's own bootstrap says of one trial."""
    a, b = (replays(walk[trial], workload) for walk in (champion, challenger))
    return _compare(a, b, list(a), SETTINGS.bootstrap, trial)


def passed(focus: dict[str, float], **others: dict[str, float]) -> bool:
    paired = PairedAcceptance(focus["champion"], focus["challenger"], focus["gain"], focus["gain_low"], focus["gain_high"],
                              int(focus["prompts"]), int(focus["rows"]), {"new": focus, **others})
    return bool(offline_door(paired, SETTINGS, "new")["passed"])


def promoted(champion: Walks, challenger: Walks) -> float:
    """Share of trials in which the door opens."""
    return float(np.mean([passed(compared(champion, challenger, trial)) for trial in range(len(champion))]))


def lengths(walk: Walks) -> Floats:
    """Acceptance length of each trial, by step."""
    found: Floats = 1 + walk[..., 0].sum(1) / walk[..., 1].sum(1)
    return found


@pytest.mark.parametrize(("kind", "length", "prompt_spread", "gain_spread", "noise"), [
    ("even", 2.9, 0.42, 0.22, 0.21), ("uneven", 2.3, 0.60, 0.24, 0.26)])
def test_it_looks_like_the_real_thing(kind: str, length: float, prompt_spread: float, gain_spread: float, noise: float) -> None:
    """Measured on 166 and 135 held-out prompts, drafts trained from the same windows with two seeds (docs/training.md)."""
    a, b = drafts(0, kind, 120, 96, (0.0, 0.0))
    per_prompt = [1 + walk[..., 0] / walk[..., 1] for walk in (a, b)]
    assert lengths(a).mean() == pytest.approx(length, abs=0.12)
    assert per_prompt[0].std(1).mean() == pytest.approx(prompt_spread, rel=0.15)
    assert (per_prompt[1] - per_prompt[0]).std(1).mean() == pytest.approx(gain_spread, rel=0.15)
    assert (lengths(b) - lengths(a)).std() * 96**0.5 == pytest.approx(noise, rel=0.2)
    better = drafts(1, kind, 120, 96, (0.0, 0.1))
    assert (lengths(better[1]) - lengths(better[0])).mean() == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("kind", TRAFFIC)
@pytest.mark.parametrize(("prompts", "trials"), [(SETTINGS.min_prompts, 800), (DEFAULT, 300)])
def test_no_difference_is_rarely_promoted(kind: str, prompts: int, trials: int) -> None:
    assert promoted(*drafts(2, kind, trials, prompts, (0.0, 0.0))) <= 0.05


@pytest.mark.parametrize("kind", TRAFFIC)
def test_the_best_of_several_evaluations_is_rarely_promoted(kind: str) -> None:
    """A run exports the best of its evaluations on the newest 32 held-out windows, which the gate looks at too: worse than two seeds."""
    champion, *evaluations = drafts(3, kind, 300, DEFAULT, (0.0,) * 5)
    chosen = np.argmax([lengths(walk[:, :32]) for walk in evaluations], axis=0)
    challenger = np.stack([evaluations[best][trial] for trial, best in enumerate(chosen)])
    assert promoted(champion, challenger) <= 0.05


@pytest.mark.parametrize("kind", TRAFFIC)
def test_a_gain_of_a_tenth_is_found(kind: str) -> None:
    assert promoted(*drafts(4, kind, 300, DEFAULT, (0.0, 0.1))) >= 0.90


@pytest.mark.parametrize("kind", TRAFFIC)
@pytest.mark.parametrize(("prompts", "loss", "least", "most"), [(DEFAULT, 0.0, 0.95, 1.0), (32, 0.0, 0.95, 1.0), (DEFAULT, 0.25, 0.0, 0.05),
                                                                (32, 0.3, 0.0, 0.05)])
def test_another_workload_that_loses_closes_the_door(kind: str, prompts: int, loss: float, least: float, most: float) -> None:
    sure = {"champion": 1.8, "challenger": 2.8, "gain": 1.0, "gain_low": 0.9, "gain_high": 1.1, "prompts": 48.0, "rows": 1e4}
    champion, challenger = drafts(5, kind, 150, prompts, (0.0, -loss))
    share = np.mean([passed(sure, old=compared(champion, challenger, trial, "old")) for trial in range(len(champion))])
    assert least <= share <= most


def test_few_prompts_widen_the_interval() -> None:
    """Student's t over the normal quantile, from the tables: 2.365 with 7 degrees of freedom, 1.984 with 99."""
    assert few_prompts(8) == pytest.approx(2.365 / 1.96 * (8 / 7) ** 0.5, rel=0.005)
    assert few_prompts(100) == pytest.approx(1.984 / 1.96 * (100 / 99) ** 0.5, rel=0.001)
