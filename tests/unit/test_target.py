"""The target computes what `transformers` computes, and refuses what it can't."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from tests.helpers import EPSILON, ask, generate, plain_pass, tiny_engine, tiny_spec, write_tiny_target
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import CheckpointError
from tide_pipeline.models.target import Target, read_shape

SHAPES = {
    "gqa": {},
    "every head its own": {"heads": 4, "kv_heads": 4, "head_dim": None},
    "one kv head": {"heads": 4, "kv_heads": 1, "head_dim": 8},
    "tied": {"tied": True},
    "wide heads": {"heads": 2, "kv_heads": 2, "head_dim": 24, "hidden": 40, "vocab": 50},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_taps_equal_transformers(tmp_path: Path, shape: dict) -> None:
    from transformers import LlamaForCausalLM

    folder = write_tiny_target(tmp_path / "target", context=1.0, seed=3, **shape)
    target = Target(folder, tiny_spec(capture_layers=(0, 2)))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, target.shape.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(ids, output_hidden_states=True)
    cache = target.new_cache(3, 17)
    taps, final = target.forward(ids, torch.arange(17).expand(3, -1), cache)
    torch.testing.assert_close(target.logits(final.flatten(0, 1)).view(3, 17, -1), want.logits, rtol=1e-4, atol=1e-4)
    layers = torch.cat((want.hidden_states[1], want.hidden_states[3]), dim=-1)     # [0] is the embedding: layer i's output is [i + 1]
    torch.testing.assert_close(taps, layers, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, want.hidden_states[-1], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_transformers_saved_loads(tmp_path: Path, tiny_dir: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny_dir).save_pretrained(tmp_path)           # its own names for rope_theta and dtype
    (tmp_path / "tokenizer.json").write_bytes((tiny_dir / "tokenizer.json").read_bytes())
    ids = list(b"the same logits")
    _, _, got = plain_pass(Target(tmp_path, tiny_spec()), ids)
    _, _, want = plain_pass(Target(tiny_dir, tiny_spec()), ids)
    torch.testing.assert_close(got, want)


def test_transformers_gives_the_same_greedy_tokens_on_the_pocket_target(pocket_dir: Path) -> None:
    """Every token of the engine is the argmax of the logits that transformers computes over the same prefix, or within 1e-4 of it."""
    from transformers import LlamaForCausalLM

    spec = load_engine_spec(pocket_dir)
    folder = pocket_dir / spec.model
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = tiny_engine(folder, spec=spec)
    for i, text in enumerate(("def main(argv):\n    ", "The following options are")):
        answer, = generate(engine, ask(str(i), text, max_tokens=24, ignore_eos=True, speculation="off"))
        prompt = engine.codec.encode(text)
        with torch.no_grad():
            logits = theirs(torch.tensor([[*prompt, *answer.tokens[:-1]]])).logits[0, len(prompt) - 1:]
        gap = logits.max(dim=-1).values - logits[torch.arange(24), torch.tensor(answer.tokens)]
        assert float(gap.max()) <= EPSILON


def test_cached_steps_of_any_width_equal_one_pass(tiny_target: Target) -> None:
    ids = torch.randint(0, 257, (1, 24), generator=torch.Generator().manual_seed(2))
    taps, final, _ = plain_pass(tiny_target, ids[0].tolist())
    cache, at = tiny_target.new_cache(1, 30), 0
    for width in (7, 1, 4, 1, 1, 10):
        got_taps, got_final = tiny_target.forward(ids[:, at : at + width], torch.arange(at, at + width).unsqueeze(0), cache)
        torch.testing.assert_close(got_taps[0], taps[at : at + width], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_final[0], final[at : at + width], rtol=1e-4, atol=1e-5)
        at += width


def test_a_batch_of_different_lengths_equals_each_alone(tiny_target: Target) -> None:
    """Slots at different positions, padding rows that leave rubbish behind, and a slot moved over another."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(0, 257, (n,), generator=generator) for n in (5, 12, 9)]
    cache = tiny_target.new_cache(4, 40)
    for slot, text in enumerate(texts):
        tiny_target.forward(text[:-4].unsqueeze(0), torch.arange(len(text) - 4).unsqueeze(0), cache, first_slot=slot)
    starts = torch.tensor([len(text) - 4 for text in texts])
    rubbish = torch.full((3, 3), 99)
    tiny_target.forward(rubbish, starts.unsqueeze(1) + torch.arange(3), cache)               # refused tokens: overwritten below
    _, final = tiny_target.forward(torch.stack([t[-4:] for t in texts]), starts.unsqueeze(1) + torch.arange(4), cache)
    for i, text in enumerate(texts):
        torch.testing.assert_close(final[i], plain_pass(tiny_target, text.tolist())[1][-4:], rtol=1e-4, atol=1e-5)
    cache.move(2, 0, 9)
    _, moved = tiny_target.forward(torch.tensor([[7]]), torch.tensor([[9]]), cache)
    torch.testing.assert_close(moved[0], plain_pass(tiny_target, [*texts[2].tolist(), 7])[1][-1:], rtol=1e-4, atol=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------------

def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


@pytest.mark.parametrize(("values", "message"), [
    ({"architectures": ["GptOssForCausalLM"]}, "GptOssForCausalLM is not supported"),
    ({"architectures": None}, "none is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"hidden_size": "DROP"}, "lacks hidden_size"),
    ({"intermediate_size": 64}, r"mlp.gate_proj.weight is \(48, 32\), config.json says \(64, 32\)"),
    ({"vocab_size": 300}, r"embed_tokens.weight is \(257, 32\)"),
    ({"num_hidden_layers": 5}, "lacks model.layers.4"),
    ({"num_hidden_layers": 3}, "holds model.layers.3"),
])
def test_a_config_it_cant_serve_is_refused(tmp_path: Path, values: dict, message: str) -> None:
    folder = write_tiny_target(tmp_path / "target")
    _edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        Target(folder, tiny_spec())


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "target")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    weights = load(whole)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            Target(folder, tiny_spec())

    file.write_bytes(whole[: len(whole) // 2])
    refused("not a whole safetensors file")
    save_file(weights | {"model.norm.weight": torch.full((32,), float("nan"))}, file)
    refused("model.norm.weight holds NaN")
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, file)
    refused("lacks lm_head.weight")
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, file)
    refused("holds model.layers.0.self_attn.q_proj.bias")
    file.unlink()
    refused("model.safetensors missing")


def test_a_missing_folder_and_a_config_that_is_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_shape(tmp_path)


@pytest.mark.parametrize("layers", [(), (0, 4), (2, 1), (1, 1, 2), (-1, 1)])
def test_capture_layers_that_do_not_fit_are_refused(tiny_dir: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="capture_layers"):
        Target(tiny_dir, tiny_spec(capture_layers=layers))


def test_the_engine_digest_follows_weights_layers_and_final_state(tmp_path: Path, tiny_dir: Path) -> None:
    base = Target(tiny_dir, tiny_spec()).digest
    assert base == Target(write_tiny_target(tmp_path / "same"), tiny_spec()).digest
    assert base != Target(write_tiny_target(tmp_path / "other", seed=1), tiny_spec()).digest
    assert base != Target(tiny_dir, tiny_spec(capture_layers=(0, 1, 3))).digest
    assert base != Target(tiny_dir, dataclasses.replace(tiny_spec(), soft_targets=False)).digest
