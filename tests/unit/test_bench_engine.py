"""What the benchmark scripts do with an engine, on a tiny one: nothing here is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_engine import Population, ask, count, pick, serve

from tests.helpers import tiny_engine
from tide_pipeline.contracts import EngineBuild

PROMPTS = ["abc", "hello", "a longer one", "xyz"]


def test_served_requests_write_what_was_asked_for(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    engine = tiny_engine(tiny_dir, drafts=tiny_build)
    plain, drafted = (serve(engine, [ask(prompt, 9, speculation) for prompt in PROMPTS]) for speculation in ("off", "3"))
    assert count(plain) == 9 * len(PROMPTS) and plain == drafted


@pytest.mark.parametrize("speculation", ["off", "2", "auto"])
def test_a_population_keeps_its_size(tiny_dir: Path, tiny_build: EngineBuild, speculation: str) -> None:
    engine = tiny_engine(tiny_dir, drafts=tiny_build)
    together = Population(engine, [ask(prompt, 60, speculation) for prompt in PROMPTS])
    assert engine.stats().running == 4
    wrote = [together.advance_to(20), together.advance_to(40), together.advance_to(40)]
    assert 20 <= wrote[0] < 20 + 4 * 5 and 40 <= sum(wrote) < 40 + 4 * 5 and wrote[2] == 0 and engine.stats().running == 4
    together.leave()
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_population_that_shrinks_is_an_error(tiny_dir: Path) -> None:
    engine = tiny_engine(tiny_dir)
    together = Population(engine, [ask(prompt, 12, "off") for prompt in PROMPTS])
    with pytest.raises(RuntimeError, match="ended inside a block"):
        together.advance_to(200)


def test_a_request_that_fails_is_an_error(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_dir)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(engine.target, "forward_rows", broken)
    with pytest.raises(RuntimeError, match="ended with error"):
        serve(engine, [ask("abc", 4, "off")])


def test_prompts_are_taken_in_turn() -> None:
    assert [pick(PROMPTS, 3, round_) for round_ in range(3)] == [["abc", "hello", "a longer one"], ["xyz", "abc", "hello"],
                                                                  ["a longer one", "xyz", "abc"]]
