"""Where the networks compute: devices that are refused, 16-bit networks, and passes that mix no devices and read no value back.

No GPU is needed: tensors on torch's `meta` device have shapes and no values. Whatever would read one raises, as does most of what mixes
devices.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import agreeing_draft, plain_pass, tiny_spec
from tide_pipeline.config import ServeSettings, SpeculationSettings
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.errors import SettingsError
from tide_pipeline.models.device import device_of, dtype_on, to_device
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.geometry import StepRows
from tide_pipeline.models.layers import DecoderLayer, KVCache
from tide_pipeline.models.linear import Linear
from tide_pipeline.models.target import Target
from tide_pipeline.models.weights import read_weights

CUDA = torch.device("cuda", 0)


# --- which device ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "message"), [
    ("gpu", "is no device"), ("", "is no device"), ("meta", "does not serve on 'meta'"), ("cuda", "sees 0 GPUs"), ("cuda:7", "cuda:7")])
def test_a_device_that_is_not_there_is_refused_with_what_to_do(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=message) as told:
        device_of(name)
    assert 'to "cpu"' in str(told.value)


def test_devices_that_are_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name) for name in ("cpu", "cpu:0", "cuda", "cuda:1")] == [
        torch.device("cpu"), torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(SettingsError, match="sees 2 GPUs"):
        device_of("cuda:2")


def test_an_engine_does_not_start_on_a_device_that_is_not_there(tiny_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(SettingsError, match=r"serve\.device is 'cuda'"):
        EmbeddedEngine(tiny_dir, tiny_spec(), ServeSettings(device="cuda"), SpeculationSettings())


def test_sixteen_bits_on_a_gpu_only() -> None:
    assert (dtype_on(torch.device("cpu")), dtype_on(CUDA)) == (torch.float32, torch.bfloat16)
    host = torch.arange(3)
    assert to_device(host, torch.device("cpu")) is host


# --- sixteen bits, on the host -----------------------------------------------------------------------------------

def test_a_target_in_bf16_is_the_target_in_fp32_but_for_rounding(tiny_dir: Path, tiny_target: Target) -> None:
    narrow, tokens = Target(tiny_dir, tiny_spec(), dtype=torch.bfloat16), list(range(1, 33))
    assert narrow.digest == tiny_target.digest
    taps, final, logits = plain_pass(narrow, tokens)
    assert taps.dtype == final.dtype == logits.dtype == narrow.new_cache(1, 4).rows.dtype == torch.bfloat16
    for got, want in zip((taps, final, logits), plain_pass(tiny_target, tokens), strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 0.02


def test_a_draft_is_where_its_target_is(tiny_dir: Path, tiny_target: Target) -> None:
    narrow, draft = Target(tiny_dir, tiny_spec(), dtype=torch.bfloat16), agreeing_draft(tiny_target)
    states = []
    for target in (narrow, tiny_target):
        runner = DraftRunner(draft, target.embedding_VD)
        cache, taps = runner.new_cache(1, 16), plain_pass(target, [1, 2, 3, 4])[0]
        state = runner.extend(taps, torch.tensor([2, 3, 4, 5]), torch.arange(4), [4], cache)[-1:]
        state = runner.step(state, torch.tensor([7]), torch.tensor([4]), cache)
        assert state.dtype == runner.empty_taps(1).dtype == cache.rows.dtype == target.dtype
        states.append(runner.logits(state).float())
    assert float((states[0] - states[1]).norm() / states[1].norm()) < 0.05


def test_a_target_from_memory_is_the_one_from_files(tiny_dir: Path, tiny_target: Target) -> None:
    weights = read_weights(tiny_dir)
    made = Target.of(tiny_target.shape, tiny_spec(), "in memory", weights)
    assert made.digest == "in memory" and not weights
    for got, want in zip(plain_pass(made, [5, 6, 7]), plain_pass(tiny_target, [5, 6, 7]), strict=True):
        assert torch.equal(got, want)


# --- without values ----------------------------------------------------------------------------------------------

META = torch.device("meta")
ROWS = {"plain": [1, 1, 1], "one": [1], "uniform": [3, 3], "ragged": [1, 4, 2]}


def on_meta(thing: Any) -> Any:
    """The same network with every tensor of it on a device that has no values."""
    if isinstance(thing, Tensor | torch.device):
        return META if isinstance(thing, torch.device) else thing.to(META)
    if isinstance(thing, list):
        return [on_meta(part) for part in thing]
    if not isinstance(thing, Target | DraftRunner | DecoderLayer | Linear | KVCache):
        return thing
    made = copy.copy(thing)
    for name, value in vars(thing).items():
        setattr(made, name, on_meta(value))
    return made


def rows_on_meta(widths: list[int]) -> StepRows:
    positions = torch.tensor([10 + j for width in widths for j in range(width)])
    return StepRows.build(positions, widths, 0, 32).to(META)


@pytest.mark.parametrize("widths", ROWS.values(), ids=ROWS.keys())
def test_a_pass_of_the_target_stays_on_its_device(tiny_dir: Path, widths: list[int]) -> None:
    target = on_meta(Target(tiny_dir, tiny_spec(), dtype=torch.bfloat16))
    taps, final = target._pass(target.new_cache(4, 32), rows_on_meta(widths), torch.zeros(sum(widths), dtype=torch.long, device=META))
    assert taps.device.type == target.logits(final).device.type == "meta"
    assert taps.shape == (sum(widths), 3 * target.shape.hidden_size)


@pytest.mark.parametrize("widths", [[1], [1, 1], [3, 3]], ids=str)
def test_a_pass_of_the_draft_stays_on_its_device(tiny_dir: Path, tiny_target: Target, widths: list[int]) -> None:
    narrow = Target(tiny_dir, tiny_spec(), dtype=torch.bfloat16)
    runner = on_meta(DraftRunner(agreeing_draft(tiny_target, vocabulary=torch.arange(0, 200, 2)), narrow.embedding_VD))
    hidden = runner.fc(runner.empty_taps(sum(widths)))
    ids = torch.zeros(sum(widths), dtype=torch.long, device=META)
    (state,) = runner._pass(runner.new_cache(4, 32), rows_on_meta(widths), ids, hidden)
    assert runner.to_target(runner.logits(state).argmax(-1)).device.type == "meta"


def test_what_reads_a_value_or_mixes_devices_would_be_seen() -> None:
    """The two tests above can fail."""
    there = torch.zeros(3, device=META)
    for wrong in (lambda: int(there.max()), lambda: there.nonzero(), lambda: there > torch.arange(3), there.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wrong()
