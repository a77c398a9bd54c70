"""The draft's parameters, its refusals at loading, and the runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from tests.helpers import agreeing_draft, plain_pass, random_draft, tiny_spec, write_tiny_build, write_tiny_target
from tide_pipeline.errors import CheckpointError, EngineMismatch
from tide_pipeline.models.checkpoint import DraftIdentity, digest_draft, load_draft, read_identity, save_draft
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.target import Target


@pytest.fixture
def folder(tmp_path: Path, tiny_target: Target) -> Path:
    """A draft checkpoint that may be damaged."""
    return Path(write_tiny_build(tmp_path / "build", tiny_target).path) / "draft"


def _identity(target: Target) -> DraftIdentity:
    return DraftIdentity(target.spec.name, target.digest, target.spec.capture_layers)


def test_a_saved_draft_comes_back_in_bf16(folder: Path, tiny_target: Target) -> None:
    want = agreeing_draft(tiny_target).state_dict()
    got = load_draft(folder, tiny_target.shape, _identity(tiny_target)).state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor.bfloat16().float() if tensor.is_floating_point() else tensor, rtol=0, atol=0)
    assert read_identity(folder) == _identity(tiny_target)


def test_saving_twice_gives_the_same_digest(tmp_path: Path, tiny_target: Target) -> None:
    draft = random_draft(tiny_target)
    digests = [save_draft(draft, tmp_path / name, _identity(tiny_target), {"run": name}) for name in ("a", "b")]
    assert digests[0] == digests[1] == digest_draft(tmp_path / "a")
    assert digests[0] != save_draft(random_draft(tiny_target, seed=1), tmp_path / "c", _identity(tiny_target), {})


# --- refusals ----------------------------------------------------------------------------------------------------

def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load((folder / "model.safetensors").read_bytes())
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_draft_for_another_target_is_a_mismatch(tmp_path: Path, folder: Path, tiny_target: Target) -> None:
    for shape, message in (({"hidden": 24, "heads": 2}, "hidden size 32"), ({"vocab": 200}, "vocabulary 257"),
                           ({"seed": 9}, "trained on engine")):
        other = Target(write_tiny_target(tmp_path / message, **shape), tiny_spec())
        expect = None if "seed" not in shape else _identity(other)
        with pytest.raises(EngineMismatch, match=message):
            load_draft(folder, other.shape, expect)


def test_other_captured_layers_are_a_mismatch(folder: Path, tiny_target: Target) -> None:
    expect = DraftIdentity("tiny", tiny_target.digest, (0, 1, 3))
    with pytest.raises(EngineMismatch, match=r"reads layers \(0, 1, 2\), this engine captures \(0, 1, 3\)"):
        load_draft(folder, tiny_target.shape, expect)
    _edit(folder, lambda c: (c.pop("tide"), c["eagle_config"].pop("eagle_aux_hidden_state_layer_ids")))     # a foreign draft says nothing
    with pytest.raises(EngineMismatch, match="reads 3 layers, this engine captures 2"):
        load_draft(folder, tiny_target.shape, DraftIdentity("tiny", "x", (0, 1)))


def test_a_draft_that_ends_before_the_target_is_a_mismatch(folder: Path, tiny_target: Target) -> None:
    _edit(folder, lambda c: c.update(max_position_embeddings=128))
    with pytest.raises(EngineMismatch, match="ends at position 128, the target at 256"):
        load_draft(folder, tiny_target.shape)


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
    (lambda w: w.pop("fc.weight"), "fc.weight is missing"),
    (lambda w: w.pop("d2t"), "d2t is missing"),
    (lambda w: w.update({"midlayer.extra.weight": torch.zeros(2)}), "midlayer.extra.weight is unknown"),
    (lambda w: w.update({"norm.weight": torch.ones(31)}), r"norm.weight is \(31,\), expected \(32,\)"),
    (lambda w: w.update({"lm_head.weight": torch.full((257, 32), float("nan"))}), "lm_head.weight holds NaN"),
    (lambda w: w.update({"fc.weight": torch.full((32, 96), float("inf"))}), "fc.weight holds NaN or infinite"),
    (lambda w: w["d2t"].__setitem__(-1, 1), "d2t points outside"),
    (lambda w: w["d2t"].__setitem__(0, -1), "d2t points outside"),
])
def test_malformed_weights_are_refused(folder: Path, tiny_target: Target, change: Callable, message: str) -> None:
    _rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_draft(folder, tiny_target.shape, _identity(tiny_target))


def test_a_folder_that_is_no_draft_is_refused(tmp_path: Path, folder: Path, tiny_target: Target, tiny_dir: Path) -> None:
    for place, message in ((tmp_path / "nowhere", "config.json missing"), (tiny_dir, "not an EAGLE-3 draft")):
        with pytest.raises(CheckpointError, match=message):
            load_draft(place, tiny_target.shape)
    with pytest.raises(CheckpointError, match=r"config\.json, model\.safetensors missing"):
        digest_draft(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_draft(folder, tiny_target.shape)
    _edit(folder, lambda c: c.pop("rope_theta"))
    with pytest.raises(CheckpointError, match="lacks rope_theta"):
        load_draft(folder, tiny_target.shape)
    (folder / "config.json").write_text("no json")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_draft(folder, tiny_target.shape)


# --- vocabulary --------------------------------------------------------------------------------------------------

def test_a_reduced_vocabulary_survives_the_round_trip(tmp_path: Path, tiny_target: Target) -> None:
    ids = torch.tensor([0, 3, 4, 97, 200, 256])
    build = write_tiny_build(tmp_path / "build", tiny_target, vocabulary=ids)
    draft = load_draft(Path(build.path) / "draft", tiny_target.shape, _identity(tiny_target))
    runner = DraftRunner(draft, tiny_target.embedding_VD)
    assert runner.to_target(torch.arange(6)).tolist() == ids.tolist()
    assert draft.t2d.nonzero().flatten().tolist() == ids.tolist()
    assert runner.logits(torch.zeros(2, 32)).shape == (2, 6)


def test_a_full_vocabulary_in_another_order_is_still_mapped(tiny_target: Target) -> None:
    draft = random_draft(tiny_target)
    draft.d2t[0], draft.d2t[5] = 5, -5                             # 0 and 5 change places
    assert DraftRunner(draft, tiny_target.embedding_VD).to_target(torch.tensor([0, 1, 5])).tolist() == [5, 1, 0]


# --- the runner --------------------------------------------------------------------------------------------------

def test_extend_in_one_pass_equals_row_by_row(tiny_target: Target) -> None:
    """Slots with 12, no and 5 rows, side by side."""
    runner = DraftRunner(random_draft(tiny_target), tiny_target.embedding_VD)
    ids = torch.randint(0, 257, (3, 13), generator=torch.Generator().manual_seed(5))
    taps, widths = [plain_pass(tiny_target, row.tolist())[0] for row in ids], [12, 0, 5]
    at_once = runner.extend(torch.cat([t[:w] for t, w in zip(taps, widths, strict=True)]),
                            torch.cat([row[1 : w + 1] for row, w in zip(ids, widths, strict=True)]),
                            torch.cat([torch.arange(w) for w in widths]), widths, runner.new_cache(3, 20))
    cache = runner.new_cache(3, 20)
    row_by_row = [runner.extend(taps[b][t : t + 1], ids[b][t + 1 : t + 2], torch.tensor([t]), [1], cache, first_slot=b)
                  for b, w in enumerate(widths) for t in range(w)]
    torch.testing.assert_close(at_once, torch.cat(row_by_row), rtol=1e-4, atol=1e-5)


def test_drafted_rows_are_overwritten_by_true_ones(tiny_target: Target) -> None:
    """After a verification the draft's KV holds the target's states, as if it had never drafted."""
    runner = DraftRunner(random_draft(tiny_target), tiny_target.embedding_VD)
    ids = torch.randint(0, 257, (11,), generator=torch.Generator().manual_seed(6))
    taps, at = plain_pass(tiny_target, ids.tolist())[0][:-1], torch.arange(10)
    want = runner.extend(taps, ids[1:], at, [10], runner.new_cache(1, 16))
    cache = runner.new_cache(1, 16)
    state = runner.extend(taps[:6], ids[1:7], at[:6], [6], cache)[-1:]
    for j in range(3):
        state = runner.step(state, torch.tensor([77 + j]), torch.tensor([6 + j]), cache)
    torch.testing.assert_close(runner.extend(taps[6:], ids[7:], at[6:], [4], cache), want[6:], rtol=1e-4, atol=1e-5)


def test_one_drafted_step_equals_the_formula(tiny_target: Target) -> None:
    """Row t: x = h + attention(norm(embedding), norm(h)); x += mlp(x); h is the state before. Written out once, without the cache."""
    draft = random_draft(tiny_target)
    runner, w = DraftRunner(draft, tiny_target.embedding_VD), draft.state_dict()
    h, token, eps = torch.randn(1, 32, generator=torch.Generator().manual_seed(7)), torch.tensor([42]), draft.shape.eps

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name]

    embedded = rms(tiny_target.embedding_VD[token], "midlayer.input_layernorm.weight")
    both = torch.cat((embedded, rms(h, "midlayer.hidden_norm.weight")), dim=-1)
    value = both @ w["midlayer.self_attn.v_proj.weight"].T                       # a single position: attention is the value itself
    x = h + value.view(1, 2, 1, 16).expand(1, 2, 2, 16).reshape(1, 64) @ w["midlayer.self_attn.o_proj.weight"].T
    n = rms(x, "midlayer.post_attention_layernorm.weight")
    gate = torch.nn.functional.silu(n @ w["midlayer.mlp.gate_proj.weight"].T) * (n @ w["midlayer.mlp.up_proj.weight"].T)
    x = x + gate @ w["midlayer.mlp.down_proj.weight"].T
    got = runner.step(h, token, torch.tensor([0]), runner.new_cache(1, 4))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runner.logits(got), rms(x, "norm.weight") @ w["lm_head.weight"].T, rtol=1e-4, atol=1e-4)
