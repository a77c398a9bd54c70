"""Draft lengths learned from a log whose best schedule is known: found, built in, drafted by, and refused where too little was served."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.fakes_drift import acceptance_row, write_log
from tests.gpu_engines import small_config, write_gpu_draft, write_gpu_engine
from tests.helpers import ask
from tests.trtllm import write_trtllm_place
from tests.trtllm_stand_in import stand_in
from tests.unit.test_trtllm_engine import REQUESTS, LossySink, answer, serving
from tide_pipeline.build.engine import build_engine
from tide_pipeline.build.schedule import LearnedSchedule, learn_schedule
from tide_pipeline.cli import app
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import AcceptanceRow, StepKind
from tide_pipeline.engine.memory import graph_batches
from tide_pipeline.engine.trtllm.schedule import length_at
from tide_pipeline.engine.trtllm.schedule_file import read_schedule, write_schedule
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import InvalidRequest, NotEnoughSignals
from tide_pipeline.models.target import engine_digest

SIZES = graph_batches(64)
GOOD, BAD = (0.7, 0.6, 0.5), (0.5, 0.4, 0.4)       # rates by position
FIXED = ({64: 3}, {64: 1})                         # what is served until something is known
NOW = 1_000_000.0


def step_ms(batch: int, length: int) -> float:
    """What a step takes: batches are padded to a graph; reading weights 8 ms, every row 0.06 ms, every pass of the draft 0.5 ms."""
    size = next(size for size in SIZES if batch <= size)
    return 8.0 + 0.06 * size * (1 + length) + 0.5 * length


def is_best(schedule: dict[int, int], rates: Sequence[float]) -> bool:
    """Within 1 % of what the best length at every size gives."""
    chances = [rates[0], rates[0] * rates[1], rates[0] * rates[1] * rates[2]]
    rate = {size: {k: (1 + sum(chances[:k])) / step_ms(size, k) for k in (1, 2, 3)} for size in SIZES}
    return all(of[length_at(schedule, size)] > 0.99 * max(of.values()) for size, of in rate.items())


def log(config: TideConfig, rates: Sequence[float], *, version: str = "v1-one", schedules: Sequence[dict[int, int]] = FIXED,
        until: float = NOW, blocks: int = 600, seed: int = 0) -> Iterator[AcceptanceRow]:
    """As servers with these schedules would write it, by turns: blocks of 32 steps at all batch sizes; one in twenty stalled."""
    rng, digest = random.Random(seed), engine_digest(config.engine_dir / "target", load_engine_spec(config.engine_dir))
    for i in range(blocks):
        batch = rng.choice((rng.randint(1, 8), rng.randint(1, 64)))
        length = length_at(schedules[i % len(schedules)], batch)
        accepted, alive = [], 32
        for rate in rates[:length]:
            alive = sum(rng.random() < rate for _ in range(alive))
            accepted.append(alive)
        ms = 32 * step_ms(batch, length) * rng.gauss(1.0, 0.02) * (10.0 if rng.random() < 0.05 else 1.0)
        yield acceptance_row(until - (blocks - i) / 10, request_id=f"r{seed}-{i}", engine_digest=digest, draft_version=version,
                             draft_length=length, num_steps=32, drafted=(32,) * length, accepted=tuple(accepted),
                             emitted_tokens=32 + sum(accepted), mean_batch_size=float(batch), duration_ms=ms)


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return small_config(write_gpu_engine(tmp_path / "engines"), tmp_path / "state", trtllm="1.3", max_batch=64)


@pytest.fixture
def draft(tmp_path: Path, config: TideConfig) -> Path:
    return write_gpu_draft(tmp_path / "draft", load_engine_spec(config.engine_dir))


def learned(config: TideConfig, version: str = "") -> LearnedSchedule:
    return learn_schedule(config, load_engine_spec(config.engine_dir), NOW, version=version)


@pytest.mark.parametrize("rates", [GOOD, BAD], ids=["good draft", "bad draft"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_schedule_is_found(rates: Sequence[float], seed: int, config: TideConfig) -> None:
    write_log(config, log(config, rates, seed=seed), target="small")
    found = learned(config)
    assert is_best(found.schedule, rates) and len(set(found.schedule.values())) > 1 and not any(is_best(one, rates) for one in FIXED)
    assert found.chances == pytest.approx((rates[0], rates[0] * rates[1], rates[0] * rates[1] * rates[2]), abs=0.04)
    assert (found.draft_version, found.is_own, found.drafted_steps) == ("v1-one", False, 600 * 32)
    assert all(row.best >= max(row.longest, 0.99 * row.plain) for row in found.rows[:3])
    assert {cell.batch for cell in found.cells} <= set(SIZES), "batches are padded to sizes that have a graph"


def test_a_retrained_draft_is_given_other_lengths_once_it_was_served(config: TideConfig) -> None:
    """Before that, it is expected to survive as the one before it."""
    write_log(config, log(config, BAD, until=NOW - 3600, seed=1), target="small")
    before = learned(config, "v2-two")
    assert is_best(before.schedule, BAD) and not is_best(before.schedule, GOOD)
    assert (before.draft_version, before.is_own) == ("v1-one", False)
    write_log(config, log(config, GOOD, version="v2-two", seed=2), target="small")
    after = learned(config, "v2-two")
    assert is_best(after.schedule, GOOD) and not is_best(after.schedule, BAD) and (after.draft_version, after.is_own) == ("v2-two", True)
    assert is_best(learned(config, "v1-one").schedule, BAD)


def test_once_it_follows_a_schedule_older_step_times_still_count(config: TideConfig) -> None:
    """A falling schedule alone does not tell what a longer draft costs at a large batch."""
    falling = {8: 3, 32: 2, 64: 1}
    write_log(config, log(config, BAD, schedules=[falling]), target="small")
    with pytest.raises(NotEnoughSignals, match="two lengths at the same sizes"):
        learned(config)
    write_log(config, log(config, GOOD, version="v0-old", until=NOW - 10 * 86_400, seed=4), target="small")
    found = learned(config)
    assert is_best(found.schedule, BAD) and found.draft_version == "v1-one"


def test_other_engines_probes_and_old_rows_do_not_count(config: TideConfig) -> None:
    rows = list(log(config, GOOD))
    write_log(config, [*(replace(row, engine_digest="other") for row in rows), *(replace(row, is_probe=True) for row in rows),
                       *(replace(row, time=row.time - 31 * 86_400) for row in rows)], target="small")
    with pytest.raises(NotEnoughSignals):
        learned(config)


def test_too_little_says_what_to_serve_with(config: TideConfig) -> None:
    with pytest.raises(NotEnoughSignals, match=r"Serve a while with speculation.draft_schedule = \[\[64, 1\]\], and a while without"):
        learned(config)
    write_log(config, log(config, GOOD, schedules=FIXED[:1]), target="small")
    with pytest.raises(NotEnoughSignals, match=r"lengths \[3\] at sizes .* while with speculation.draft_schedule = \[\[64, 1\]\], or"):
        learned(config)
    with pytest.raises(NotEnoughSignals, match="no draft was served 500 drafted steps"):
        learned(_few(config))


def _few(config: TideConfig) -> TideConfig:
    """A lake with step times and no draft that was served long enough."""
    other = override(config, {"state_dir": f"{config.state_dir}-few"})
    write_log(other, [replace(row, draft_version="") for row in log(config, GOOD)], target="small")
    return other


# --- in a build ---------------------------------------------------------------------------------------------------------


def served_now(config: TideConfig, rates: Sequence[float], **how: object) -> None:
    write_log(config, log(config, rates, until=time.time(), **how), target="small")           # type: ignore[arg-type]


def test_a_build_takes_what_was_learned_and_says_from_what(config: TideConfig, draft: Path) -> None:
    plain = build_engine(config, draft, "v1-one")
    served_now(config, GOOD)
    build = build_engine(config, draft, "v1-one")
    assert build.build_id != plain.build_id and build.draft_digest == plain.draft_digest
    arguments = yaml.safe_load((Path(build.path) / "model_repository/small/1/model.yaml").read_text())
    assert arguments["speculative_config"]["draft_len_schedule"] == read_schedule(Path(build.path))
    assert is_best(read_schedule(Path(build.path)), GOOD)
    said = json.loads((Path(build.path) / "provenance.json").read_text())
    assert said["draft_lengths"]["learned"]["survival_of"] == "v1-one" and "schedule.json" in said["files"]
    assert said["draft_lengths"]["why"].startswith("learned from 19200 drafted steps since 20")
    assert said["draft_lengths"]["why"].endswith("by its own survival")
    assert build_engine(config, draft, "v1-one") == build, "the same log, the same build"
    told = json.loads((Path(plain.path) / "provenance.json").read_text())["draft_lengths"]
    assert told["schedule"] == {} and told["why"].startswith("one for every batch, as none were learned: since 20")
    assert read_schedule(Path(plain.path)) == {}


def test_by_hand_comes_first_and_1_2_takes_none(config: TideConfig, draft: Path) -> None:
    served_now(config, GOOD)
    by_hand = build_engine(override(config, {"speculation": {"draft_schedule": [[8, 3], [64, 2]]}}), draft, "v1-one")
    arguments = yaml.safe_load((Path(by_hand.path) / "model_repository/small/1/model.yaml").read_text())
    assert arguments["speculative_config"]["draft_len_schedule"] == {8: 3, 64: 2} and read_schedule(Path(by_hand.path)) == {}
    old = build_engine(override(config, {"serve": {"trtllm": "1.2"}}), draft, "v1-one")
    assert "draft_len_schedule" not in (Path(old.path) / "model_repository/small/1/model.yaml").read_text()
    assert "can't change it" in json.loads((Path(old.path) / "provenance.json").read_text())["draft_lengths"]["why"]


def test_a_server_drafts_by_the_schedule_of_its_build(tmp_path: Path) -> None:
    """On the stand-in: three lengths are drafted, none of which the settings name."""
    with stand_in("1.3"):
        place = write_trtllm_place(tmp_path, "1.3", {"serve": {"max_batch": 4}})
        build = place.build("v1")
        write_schedule(Path(build.path), {1: 3, 2: 2, 4: 1}, {"log": "acceptance"})
        sink = LossySink()
        with serving(place, sink) as engine:
            heard = answer(engine, *REQUESTS)
            with pytest.raises(InvalidRequest, match="its schedule decides by batch size"):
                engine.submit(ask("fixed", "hello", speculation="3"))
            assert engine.stats().capture_faults == 0 and len(heard) == len(REQUESTS)
        assert {event.draft_length for event in sink.events if event.kind is StepKind.VERIFY} == {1, 2, 3}


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.delenv("TIDE_CONFIG", raising=False)
    monkeypatch.setenv("TIDE_PROJECT_ROOT", str(Path(config.engines_dir).parent))

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--engine", "small", "--state", str(config.state.root), "--set",
                                        f"engines_dir={config.engines_dir}", "--set", "serve.gpu=h100", "--set", "serve.max_batch=64"])

    yield run


def test_tide_engines_schedule_prints_the_form_of_the_version(config: TideConfig, command: object) -> None:
    assert callable(command)
    empty = command("engines", "schedule")
    assert empty.exit_code == 2 and "speculation.draft_schedule = [[64, 1]]" in empty.stderr
    served_now(config, GOOD)
    best = learn_schedule(config, load_engine_spec(config.engine_dir), time.time()).schedule
    said = command("engines", "schedule", "--trtllm", "1.3")
    assert said.exit_code == 0, said.stderr
    by_hand = [list(pair) for pair in best.items()]
    assert f"draft_len_schedule = {best}" in said.stdout and f"speculation.draft_schedule={by_hand}" in said.stdout
    found = json.loads(command("engines", "schedule", "--json", "--since", "2h").stdout)
    assert {int(batch): length for batch, length in found["schedule"].items()} == best and found["survival_of"] == "v1-one"
    old = command("engines", "schedule", "--trtllm", "1.2")
    assert old.exit_code == 0 and f'"best_until": {found["best_until"]}' in old.stdout and "draft_len_schedule" not in old.stdout
    draft = write_gpu_draft(Path(config.engines_dir) / "d", load_engine_spec(config.engine_dir))
    built = command("build", "--trtllm", "1.3", "--draft", str(draft))
    assert built.exit_code == 0 and "draft lengths: 3 up to a batch of" in built.stdout.replace("\n", " ")
