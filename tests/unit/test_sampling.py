"""Sampling is exact: what speculation emits is distributed as the target's own distribution, and a wrong rule shows.

Two chi-square tests through the real engine on a vocabulary of six:
- joint: thousands of short answers to one prompt, against the probability of every pair of tokens, enumerated;
- along the way: long answers, counts of each token against the sum of the target's probabilities along the path (a martingale,
  so the difference is normal with covariance sum(diag(p) - p p^T)).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import (
    agreeing_draft,
    ask,
    chi_square_p,
    generate,
    plain_pass,
    tiny_engine,
    tiny_spec,
    write_tiny_build,
    write_tiny_target,
)
from tide_pipeline.contracts import EngineBuild, GenerationRequest, SamplingParams
from tide_pipeline.engine import step
from tide_pipeline.engine.control import Plan
from tide_pipeline.engine.drafts import Proposal, ResidentDraft, Round
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.sampling import Purpose, accept_greedy, accept_sampled, distribution, draw, uniform
from tide_pipeline.models.target import Target

V = 6
PROMPT = "abcab"
HOW = {"temperature": {"temperature": 0.9}, "top-k": {"temperature": 1.3, "top_k": 3}, "top-p": {"temperature": 1.1, "top_p": 0.8}}


# --- the pieces ---------------------------------------------------------------------------------------------------

def test_uniform_looks_uniform_in_every_key() -> None:
    for keys in ([(s, 7, 1) for s in range(20_000)], [(3, p, 2) for p in range(20_000)], [(s, s, 3) for s in range(20_000)],
                 [(s, p, q) for s in range(100) for p in range(67) for q in Purpose]):
        u = torch.tensor([uniform(s, p, Purpose(q)) for s, p, q in keys], dtype=torch.float64)
        assert float(u.min()) >= 0.0 and float(u.max()) < 1.0
        counts = torch.histc(u, 50, 0, 1)
        want = len(keys) / 50
        assert chi_square_p(float(((counts - want) ** 2 / want).sum()), 49) > 1e-4
        assert abs(float(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1])) < 0.03


def test_uniform_takes_any_whole_number_as_seed() -> None:
    assert len({uniform(seed, 0, Purpose.DRAFT) for seed in (0, -1, 2**63, 2**64 - 2, 10**30)}) == 5


def _expected_distribution(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Written again, slowly, from the definition."""
    p = (logits.double() / temperature).softmax(-1)
    ranked = sorted(range(len(p)), key=lambda i: -float(p[i]))
    kept = ranked[:top_k] if top_k else ranked
    p = torch.tensor([float(p[i]) if i in kept else 0.0 for i in range(len(p))], dtype=torch.float64)
    p /= p.sum()
    mass, inside = 0.0, []
    for i in ranked:
        if mass < top_p:
            inside.append(i)
        mass += float(p[i])
    p = torch.tensor([float(p[i]) if i in inside else 0.0 for i in range(len(p))], dtype=torch.float64)
    return p / p.sum()


@pytest.mark.parametrize("how", [{"temperature": 0.7}, {"temperature": 2.0, "top_k": 4}, {"temperature": 1.0, "top_p": 0.6},
                                 {"temperature": 1.5, "top_k": 5, "top_p": 0.9}, {"temperature": 1.0, "top_k": 1},
                                 {"temperature": 1.0, "top_p": 1e-9}])
def test_distribution_is_what_its_definition_says(how: dict) -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) * 2
    got = distribution(logits, SamplingParams(**how))
    for row, p in zip(logits, got, strict=True):
        torch.testing.assert_close(p, _expected_distribution(row, **how), rtol=1e-9, atol=1e-12)


def test_no_allowed_temperature_overflows() -> None:
    logits = torch.tensor([[-80.0, 3.0, 90.0, 89.0]])
    for temperature in (5e-324, 1e-300, 1e-9, 10.0):
        p = distribution(logits, SamplingParams(temperature=temperature))
        assert torch.isfinite(p).all() and float(p.sum()) == pytest.approx(1.0)


def test_draw_inverts_the_cumulative_distribution() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert [draw(p, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-16)] == [1, 1, 3, 3, 4, 4]


def test_accept_greedy() -> None:
    assert accept_greedy([], [4]) == (0, [4])
    assert accept_greedy([1, 2, 3], [1, 2, 3, 9]) == (3, [1, 2, 3, 9])
    assert accept_greedy([1, 7, 3], [1, 2, 3, 9]) == (1, [1, 2])


def test_accept_sampled_emits_p_for_explicit_p_and_q() -> None:
    """One drafted token, thousands of seeds: acceptance is sum(min(p, q)), the first token is p, the bonus token is p of its row."""
    q = torch.tensor([0.1, 0.6, 0.3, 0.0], dtype=torch.float64)
    p = torch.tensor([[0.3, 0.2, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    n, first, bonus, accepted = 6_000, torch.zeros(4), torch.zeros(4), 0
    for seed in range(n):
        token = draw(q, uniform(seed, 11, Purpose.DRAFT))
        kept, emitted = accept_sampled([token], q.unsqueeze(0), p, seed, 11)
        assert len(emitted) == kept + 1
        accepted += kept
        first[emitted[0]] += 1
        if kept:
            bonus[emitted[1]] += 1
    overlap = float(torch.minimum(p[0], q).sum())
    assert accepted / n == pytest.approx(overlap, abs=4 * (overlap * (1 - overlap) / n) ** 0.5)
    assert chi_square_p(float(((first - n * p[0]) ** 2 / (n * p[0])).sum()), 3) > 1e-4
    assert bonus[0] == bonus[3] == 0 and abs(float(bonus[1] - bonus[2])) < 4 * accepted**0.5


def test_accept_sampled_keeps_everything_when_q_is_p() -> None:
    p = torch.full((4, 5), 0.2, dtype=torch.float64)
    for seed in range(200):
        assert accept_sampled([1, 2, 3], p[:3].clone(), p, seed, 5)[0] == 3


# --- through the engine -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Target, EngineBuild]:
    """A target of six tokens and a draft that is right now and then."""
    root = tmp_path_factory.mktemp("six")
    folder = write_tiny_target(root / "target", layers=2, vocab=V, hidden=16, heads=2, kv_heads=2, head_dim=8, intermediate=24, eos=None,
                               context=0.5, sharpness=0.4, max_positions=128)
    target = Target(folder, tiny_spec(capture_layers=(0, 1), max_context=128))
    return folder, target, write_tiny_build(root / "build", target, agreeing_draft(target, noise=0.8))


def _engine(small: tuple[Path, Target, EngineBuild], max_batch: int = 16) -> EmbeddedEngine:
    folder, target, build = small
    return tiny_engine(folder, spec=target.spec, drafts=build, max_batch=max_batch, queue_size=10_000)


def _make_drafting_cheap(engine: EmbeddedEngine) -> None:
    """Costs of a machine on which the controller drafts, of some requests more than of others."""
    engine.control.costs.profile({(m, d, 64): 0.2 * d for m in (1, 16) for d in range(1, 5)},
                                 {(b, b * w, 64): 4.0 + 0.08 * b * w for b in (1, 16) for w in range(1, 6)})


def _along_the_way(small: tuple[Path, Target, EngineBuild], length: int | str, how: dict,
                   company: Sequence[GenerationRequest] = ()) -> tuple[float, float]:
    """p-value of the counts of each token, and the share of accepted draft tokens."""
    answers, tokens = 12, 110
    engine = _engine(small)
    _make_drafting_cheap(engine)
    prompt = engine.codec.encode(PROMPT)
    heard = generate(engine, *company, *[ask(f"{length}-{i}", PROMPT, speculation=str(length), max_tokens=tokens, seed=4_000 + i, **how)
                                         for i in range(answers)])[len(company):]
    difference, covariance = torch.zeros(V, dtype=torch.float64), torch.zeros(V, V, dtype=torch.float64)
    for answer in heard:
        assert len(answer.tokens) == tokens
        _, _, logits = plain_pass(small[1], [*prompt, *answer.tokens[:-1]])
        for row, token in zip(logits[len(prompt) - 1:], answer.tokens, strict=True):
            p = _expected_distribution(row, **how)
            difference -= p
            difference[token] += 1
            covariance += p.diag() - torch.outer(p, p)
    statistic = float(difference[:-1] @ torch.linalg.solve(covariance[:-1, :-1], difference[:-1]))
    stats = engine.stats()
    return chi_square_p(statistic, V - 1), stats.accepted_tokens / max(stats.drafted_tokens, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_sampled_tokens_are_distributed_as_the_targets(small: tuple[Path, Target, EngineBuild], length: int, how: dict) -> None:
    p, accepted = _along_the_way(small, length, how)
    assert p > 1e-4
    assert 0.1 < accepted < 0.95, "the draft must be right and wrong for this test to mean anything"


def _joint(small: tuple[Path, Target, EngineBuild], length: int, how: dict, answers: int = 500) -> float:
    """p-value of pairs of tokens 2 and 3 (the first that speculation emits) over many answers to one prompt."""
    engine = _engine(small)
    prompt = engine.codec.encode(PROMPT)
    joint = torch.zeros(V, V, dtype=torch.float64)
    for first, second in itertools.product(range(V), repeat=2):
        _, _, logits = plain_pass(small[1], [*prompt, first, second])
        p1, p2, p3 = (_expected_distribution(row, **how) for row in logits[-3:])
        joint[second] += p1[first] * p2[second] * p3
    heard = generate(engine, *[ask(str(i), PROMPT, speculation=str(length), max_tokens=length + 2, seed=i, **how) for i in range(answers)])
    counts = torch.zeros(V, V)
    for answer in heard:
        counts[answer.tokens[1], answer.tokens[2]] += 1
    want = joint.flatten() * answers
    big = want >= 5
    observed = torch.cat((counts.flatten()[big], counts.flatten()[~big].sum().unsqueeze(0)))
    expected = torch.cat((want[big], want[~big].sum().unsqueeze(0)))
    kept = expected > 0
    return chi_square_p(float(((observed - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1)


def test_pairs_of_tokens_have_the_targets_joint_distribution(small: tuple[Path, Target, EngineBuild]) -> None:
    assert _joint(small, 2, HOW["temperature"]) > 1e-4


def _always(drafted: list[int], q_KV: Tensor | None, p_WV: Tensor, seed: int, position: int) -> tuple[int, list[int]]:
    """Wrong: takes whatever was drafted."""
    return len(drafted), [*drafted, draw(p_WV[len(drafted)], uniform(seed, position + len(drafted), Purpose.EMIT))]


def _no_residual(drafted: list[int], q_KV: Tensor | None, p_WV: Tensor, seed: int, position: int) -> tuple[int, list[int]]:
    """Wrong: draws from p, not from max(0, p - q), after a refusal."""
    for i, token in enumerate(drafted):
        assert q_KV is not None
        if uniform(seed, position + i, Purpose.ACCEPT) >= min(1.0, float(p_WV[i][token] / q_KV[i][token])):
            return i, [*drafted[:i], draw(p_WV[i], uniform(seed, position + i, Purpose.EMIT))]
    return _always(drafted, q_KV, p_WV, seed, position)


@pytest.mark.parametrize("rule", [_always, _no_residual])
def test_a_wrong_rule_fails_both_tests(small: tuple[Path, Target, EngineBuild], monkeypatch: pytest.MonkeyPatch, rule: object) -> None:
    monkeypatch.setattr(step, "accept_sampled", rule)
    assert _joint(small, 2, HOW["temperature"]) < 1e-6
    assert _along_the_way(small, 3, HOW["temperature"])[0] < 1e-6


# --- stopping by confidence ---------------------------------------------------------------------------------------

def _company(count: int) -> list[GenerationRequest]:
    return [ask(f"greedy-{i}", PROMPT + "a" * i, max_tokens=100, ignore_eos=True) for i in range(count)]


def test_a_step_that_stops_by_confidence_leaves_sampling_exact(small: tuple[Path, Target, EngineBuild]) -> None:
    """Sampled requests beside greedy ones, whose confidence decides how deep all are drafted."""
    p, accepted = _along_the_way(small, "auto", HOW["temperature"], _company(4))
    assert p > 1e-4 and 0.1 < accepted < 0.95


PROPOSE = ResidentDraft.propose


def _by_the_drawn_token(draft: ResidentDraft, plan: Plan) -> Round:
    """Wrong: a token that turned out to be a likely one ends the draft."""
    drafted = PROPOSE(draft, plan)
    for slot, proposal in drafted.proposals.items():
        if (q := proposal.q_KV) is not None:
            kept = next((i for i, token in enumerate(proposal.tokens) if q[i][token] > 0.6), len(proposal.tokens))
            drafted.proposals[slot] = Proposal(proposal.tokens[:kept], q[:kept] if kept else None)
    return drafted


def test_a_stop_rule_that_looks_at_the_drawn_token_is_not(small: tuple[Path, Target, EngineBuild], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResidentDraft, "propose", _by_the_drawn_token)
    assert _joint(small, 2, HOW["temperature"]) < 1e-6


# --- keyed by seed and position -----------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_tokens_in_any_company(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    how = {"temperature": 1.0, "top_p": 0.95, "seed": 12, "max_tokens": 24, "speculation": "3"}
    alone, = generate(tiny_engine(tiny_dir, drafts=tiny_build), ask("x", "the prompt", **how))
    crowd = [ask(f"other-{i}", "z" * (3 * i + 1), temperature=0.7 * i, seed=i, max_tokens=9 + i, speculation=("off", "auto", "2")[i])
             for i in range(3)]
    together = generate(tiny_engine(tiny_dir, drafts=tiny_build), crowd[0], crowd[1], ask("x", "the prompt", **how), crowd[2])
    assert together[2].tokens == alone.tokens
    other, = generate(tiny_engine(tiny_dir, drafts=tiny_build), ask("x", "the prompt", **{**how, "seed": 13}))
    assert other.tokens != alone.tokens


def test_a_draft_vocabulary_that_names_a_token_twice_stays_exact(tmp_path: Path, small: tuple[Path, Target, EngineBuild]) -> None:
    folder, target, _ = small
    draft = agreeing_draft(target, noise=0.8, vocabulary=torch.tensor([1, 2, 3, 4, 5]))
    draft.d2t.copy_(torch.tensor([1, 0, 1, 1, 1]))               # draft ids 0 and 1 both stand for token 1
    twice = (folder, target, write_tiny_build(tmp_path / "build", target, draft, version="twice"))
    assert _along_the_way(twice, 3, HOW["temperature"])[0] > 1e-4


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_equals_sorting_all_of_it(spread: float, top_p: float) -> None:
    """Peaked rows need only the head, flat ones the whole."""
    logits_NV = spread * torch.randn(3, 4096, generator=torch.Generator().manual_seed(1))
    p_NV = logits_NV.double().softmax(-1)
    for p_V, got_V in zip(p_NV, distribution(logits_NV, SamplingParams(temperature=1.0, top_p=top_p)), strict=True):
        ordered, order = p_V.sort(descending=True)
        kept = order[: int((ordered.cumsum(0) - ordered < top_p).sum())]
        want_V = torch.zeros_like(p_V).index_put_((kept,), p_V[kept])
        torch.testing.assert_close(got_V, want_V / want_V.sum())
