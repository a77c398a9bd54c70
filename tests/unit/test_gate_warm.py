"""Before the first timed prompt every draft has learned from the same prompts; nothing is run twice for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import tiny_spec, write_tiny_build
from tide_pipeline.config import GateSettings, SpeculationSettings
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.gate import bench as bench_module
from tide_pipeline.gate.bench import PLAIN, Bench, Run, benchmark_builds, faster, summarise
from tide_pipeline.models.target import Target

PROMPTS = [f"prompt number {i}" for i in range(10)]
Seen = list[tuple[str, str, bool]]     # tag, prompt, timed


@pytest.fixture
def builds(tmp_path: Path, tiny_target: Target) -> dict[str, EngineBuild]:
    return {"challenger": write_tiny_build(tmp_path / "a", tiny_target, version="v2", seed=1),
            "champion": write_tiny_build(tmp_path / "b", tiny_target)}


def bench(tiny_dir: Path, builds: dict[str, EngineBuild], monkeypatch: pytest.MonkeyPatch, prompts: list[str]) -> tuple[Bench, Seen]:
    """A benchmark of 4 timed prompts that checks the challenger, and its runs in order."""
    seen, real = Seen(), bench_module._run

    def run(engine: object, name: str, prompt: str, tag: str, **how: object) -> Run:
        seen.append((tag, prompt, name.rpartition("-")[0] == tag))
        return real(engine, name, prompt, tag, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_module, "_run", run)
    gate = GateSettings(bench_tokens=6, equivalence_prompts=len(prompts))
    return benchmark_builds(tiny_dir, tiny_spec(), builds, prompts, gate, SpeculationSettings(), timed=4, checked=("challenger",)), seen


def test_both_drafts_warm_up_alike_and_the_rest_comes_last(tiny_dir: Path, builds: dict[str, EngineBuild],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = bench(tiny_dir, builds, monkeypatch, PROMPTS)
    first = next(i for i, (_, _, timed) in enumerate(seen) if timed)
    last = max(i for i, (_, _, timed) in enumerate(seen) if timed)
    before, after = seen[:first], seen[last + 1 :]
    assert Counter(tag for tag, _, _ in before) == {"challenger": 2, "champion": 2}
    assert {prompt for tag, prompt, _ in before if tag == "challenger"} == {prompt for tag, prompt, _ in before if tag == "champion"}
    assert [tag for tag, _, _ in after] == ["challenger"] * 4, "what is only checked can't warm anybody up"
    assert Counter(tag for tag, _, _ in seen) == {PLAIN: 2, "challenger": 10, "champion": 6}, "each prompt is run once by who is checked"
    assert found.equivalence["challenger"].compared == 10 * 6 and found.equivalence["challenger"].mismatches == 0


def test_with_nothing_but_timed_prompts_these_warm_up(tiny_dir: Path, builds: dict[str, EngineBuild],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = bench(tiny_dir, builds, monkeypatch, PROMPTS[:4])
    assert Counter((tag, timed) for tag, _, timed in seen) == {("challenger", False): 2, ("champion", False): 2, (PLAIN, True): 2,
                                                               ("challenger", True): 4, ("champion", True): 4}
    assert not any(timed for _, _, timed in seen[:4])


def test_plain_decoding_is_timed_on_half_the_prompts_of_two_drafts_and_on_all_of_one(tiny_dir: Path, builds: dict[str, EngineBuild],
                                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = bench(tiny_dir, builds, monkeypatch, PROMPTS[:4])
    order = [(tag, PROMPTS.index(prompt)) for tag, prompt, timed in seen if timed]
    assert order[:3] == [(PLAIN, 0), ("challenger", 0), ("champion", 0)] and order[-3:] == [("champion", 3), ("challenger", 3), (PLAIN, 3)]
    assert found.plainly == [0, 3] and len(found.runs[PLAIN]) == 2
    report = summarise(found, "challenger", builds["challenger"], "champion")
    own = [found.runs["challenger"][i] for i in (0, 3)]
    assert (report.speedup, report.speedup_low, report.speedup_high) == faster(found.runs[PLAIN], own), "no prompt lends another its time"
    assert report.prompts == 4 and report.over_champion == faster(found.runs["champion"], found.runs["challenger"])
    assert found.equivalence["challenger"].compared == 4 * 6, "whatever was not decoded plainly is checked by a pass"
    alone, seen = bench(tiny_dir, {"challenger": builds["challenger"]}, monkeypatch, PROMPTS[:4])
    assert Counter(tag for tag, _, timed in seen if timed) == {PLAIN: 4, "challenger": 4} and alone.plainly == [0, 1, 2, 3]
