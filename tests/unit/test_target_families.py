"""Llama, Mistral, Qwen2 and Qwen3 checkpoints, as `transformers` writes them, give its logits and hidden states; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import ask, generate, random_draft, tiny_engine, tiny_spec, write_tiny_build, write_tokenizer
from tide_pipeline.errors import CheckpointError
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.models.rope import rotary_tables
from tide_pipeline.models.target import Target, read_shape
from tide_pipeline.models.weights import INDEX, WHOLE, read_weights
from tide_pipeline.training.target_head import read_target_head

TOKENS = 60
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 16, "vocab_size": 257, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
          "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CHECKPOINTS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama, head size from the hidden size": ("Llama", {"head_dim": None}),
    "llama, every bias of the attention": ("Llama", {"attention_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, rope llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama, rope llama3 within the original context": ("Llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "llama, rope linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama, rope dynamic": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "llama, rope yarn": ("Llama", {"rope_scaling": YARN}),
    "llama, rope yarn with every option": ("Llama", {"rope_scaling": YARN | {
        "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}}),
    "llama, rope yarn with its own attention factor": ("Llama", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, one kv head": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 24}),
    "mistral, window as long as the context": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "head_dim": "DROP"}),
    "qwen2, window switched off": ("Qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}),
    "qwen2, window above every layer": ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    "qwen2, rope yarn": ("Qwen2", {"rope_scaling": YARN, "rope_theta": 1e6}),
    "qwen3": ("Qwen3", {}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3, every bias of the attention": ("Qwen3", {"attention_bias": True, "num_key_value_heads": 4}),
}


def write_checkpoint(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", seed: int = 0,
                     **config: object) -> Path:
    """A tiny random checkpoint, saved by `transformers`. Biases and norms are random too: as made they would change nothing."""
    import transformers

    torch.manual_seed(seed)
    settings = getattr(transformers, f"{family}Config")(**{k: v for k, v in (COMMON | config).items() if v != "DROP"})
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise, mean = torch.randn_like(p), 0.0 if name.endswith("bias") else 1.0
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() == 2 else mean + 0.3 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    return folder


def edit_config(folder: Path, **values: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "DROP"}))


def theirs(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states after layers 0 and 1, after the last norm, and logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    return torch.cat(out.hidden_states[1:3], dim=-1), out.hidden_states[-1], out.logits


def ours(folder: Path, ids: Tensor, max_context: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """The same, in steps of many widths over the cache."""
    target = Target(folder, tiny_spec(capture_layers=(0, 1), max_context=max_context))
    cache, at, taps, final = target.new_cache(len(ids), ids.shape[1]), 0, [], []
    for width in (32, 1, 5, 1, 1, ids.shape[1] - 40):
        step = target.forward(ids[:, at : at + width], torch.arange(at, at + width).expand(len(ids), -1), cache)
        taps.append(step[0])
        final.append(step[1])
        at += width
    states = torch.cat(final, dim=1)
    return torch.cat(taps, dim=1), states, target.logits(states.flatten(0, 1)).view(*ids.shape, -1)


def assert_equal_to_transformers(folder: Path) -> None:
    ids = torch.randint(0, 257, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    for name, got, want in zip(("taps", "final", "logits"), ours(folder, ids), theirs(folder, ids), strict=True):
        assert float((got - want).abs().max()) <= 1e-4, name


@pytest.mark.parametrize(("family", "config"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_logits_and_taps_equal_transformers(tmp_path: Path, family: str, config: dict) -> None:
    assert_equal_to_transformers(write_checkpoint(tmp_path, family, **config))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_weights_of_bf16_equal_transformers_in_fp32(tmp_path: Path, family: str) -> None:
    """Those are the ones that models/linear.py packs."""
    assert_equal_to_transformers(write_checkpoint(tmp_path, family, dtype=torch.bfloat16))


def test_a_config_of_transformers_4_loads(tmp_path: Path) -> None:
    """rope_theta beside rope_scaling, and not in rope_parameters."""
    folder = write_checkpoint(tmp_path, "Llama", rope_scaling=LLAMA3)
    want = read_shape(folder)
    edit_config(folder, rope_parameters="DROP", rope_theta=1e4, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_type"} | {
        "type": "llama3"}, layer_types="DROP")
    assert read_shape(folder) == want
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("config", [
    {"rope_theta": 5e5, "max_position_embeddings": 131072, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
    {"rope_theta": 1e6, "max_position_embeddings": 32768, "rope_scaling": YARN | {"original_max_position_embeddings": 32768}},
    {"rope_theta": 1e6, "max_position_embeddings": 40960},
], ids=["llama 3.1", "qwen 2.5 with yarn", "qwen 3"])
def test_positions_far_out_turn_as_in_transformers(tmp_path: Path, config: dict) -> None:
    """Rounding of a frequency grows with the position: published sizes, to the 32768th token."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = LlamaConfig(**COMMON | {"head_dim": 128} | config)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(tmp_path)
    positions = torch.tensor([0, 1, 17, 4095, 8191, 20000, 32767])
    want_cos, want_sin = LlamaRotaryEmbedding(settings)(torch.zeros(1), positions.unsqueeze(0))
    cos, sin = rotary_tables(read_shape(tmp_path).rope, 128, 32768)
    torch.testing.assert_close(cos[positions], want_cos[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[positions, 64:], want_sin[0, :, 64:], rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[positions, :64], -want_sin[0, :, :64], rtol=0, atol=1e-3)


# --- shards ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "tied"), [("Llama", False), ("Mistral", True), ("Qwen2", True), ("Qwen3", False)])
def test_shards_are_one_checkpoint(tmp_path: Path, family: str, tied: bool) -> None:
    config = {"sliding_window": None} if family == "Mistral" else {}
    whole, parts = (write_checkpoint(tmp_path / size, family, shard_size=size, tie_word_embeddings=tied, **config)
                    for size in ("1GB", "20KB"))
    shards = sorted(parts.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (parts / WHOLE).exists() and (parts / INDEX).is_file()
    want, got = read_weights(whole), read_weights(parts)
    assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)
    assert_equal_to_transformers(parts)
    head, target = read_target_head(parts, tiny_spec()), Target(parts, tiny_spec())
    assert head.digest == target.digest != Target(whole, tiny_spec()).digest
    assert head.embedding_VD.equal(target.embedding_VD) and head.lm_head_VD.equal(target.lm_head_VD)
    assert head.lm_head_VD.equal(head.embedding_VD) == tied


def test_the_digest_follows_every_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "Llama", shard_size="20KB")
    seen = {Target(folder, tiny_spec()).digest}
    for shard in sorted(folder.glob("model-*.safetensors")):
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
        seen.add(Target(folder, tiny_spec()).digest)
    assert len(seen) == 1 + len(list(folder.glob("model-*.safetensors")))


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "Llama", shard_size="20KB")
    index, shards = json.loads((folder / INDEX).read_text()), sorted(folder.glob("model-*.safetensors"))

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            Target(folder, tiny_spec())

    held = shards[1].read_bytes()
    shards[1].write_bytes(held[:-10])
    refused("not a whole safetensors file")
    shards[1].write_bytes(shards[0].read_bytes())
    refused("two shards hold")
    shards[1].unlink()
    refused(f"incomplete: {shards[1].name} missing")
    shards[1].write_bytes(held)
    for weight_map, message in (({"a": "../elsewhere.safetensors"}, "not a safetensors file beside it"), ({"a": "model.bin"}, "model.bin"),
                                ({}, "lists nothing"), (None, "no weight_map")):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(message)
    names = sorted(index["weight_map"].values())
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if v != names[-1]}}))
    refused("lacks ")


# --- the ends of a network -----------------------------------------------------------------------------------------

def test_two_different_embeddings_are_not_tied_ones(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "Llama", tie_word_embeddings=True)
    weights = load_file(folder / WHOLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / WHOLE, metadata={"format": "pt"})
    assert_equal_to_transformers(folder)                          # the same twice is one
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / WHOLE, metadata={"format": "pt"})
    for reader in (Target, read_target_head):
        with pytest.raises(CheckpointError, match="ties lm_head to the embeddings"):
            reader(folder, tiny_spec())


def test_training_refuses_a_head_that_is_not_there(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "Qwen2", tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=False)
    for reader in (Target, read_target_head):
        with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
            reader(folder, tiny_spec())


@pytest.mark.parametrize(("config", "generation", "want"), [
    (3, None, (3,)), ([3, 5], None, (3, 5)), (None, None, ()), (3, [7, 3], (7, 3)), ([3, 5], 7, (7,)), ([3, 5], "absent", (3, 5)),
])
def test_eos_ids(tmp_path: Path, config: object, generation: object, want: tuple[int, ...]) -> None:
    folder = write_checkpoint(tmp_path, "Llama")
    edit_config(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({} if generation is None else {"eos_token_id": generation}))
    if generation == "absent":
        (folder / "generation_config.json").unlink()
    assert read_shape(folder).eos_ids == want


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_generation_equals_transformers_and_ends_on_any_eos_id(tmp_path: Path, family: str) -> None:
    """With a useless draft verified all along."""
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(tmp_path / "target", family, seed=3, eos_token_id=[0, 255])
    target = Target(folder, tiny_spec(max_context=64))
    build = write_tiny_build(tmp_path / "build", target, random_draft(target))
    load_draft(Path(build.path) / "draft", target.shape)
    prompt = torch.tensor([tiny_engine(folder, spec=target.spec).codec.encode("once upon")])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def want(**how: object) -> list[int]:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, pad_token_id=0, **how)
        return out[0, prompt.shape[1]:].tolist()

    free = want(eos_token_id=256)
    last = next(token for i, token in enumerate(free) if i >= 4 and token not in free[:i])
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | {"eos_token_id": [256, last]}))
    target = Target(folder, target.spec)
    build = write_tiny_build(tmp_path / "again", target, random_draft(target))
    answer, = generate(tiny_engine(folder, spec=target.spec, drafts=build), ask("r", "once upon", max_tokens=20, speculation="3"))
    assert answer.tokens == want(eos_token_id=[256, last]) == free[: free.index(last) + 1]


# --- refusals ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "values", "message"), [
    ("Llama", {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM is not supported .*Qwen3ForCausalLM"),
    ("Qwen3", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM is not supported"),
    ("Llama", {"model_type": "granite"}, "model_type granite"),
    ("Llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantisation 'awq'"),
    ("Llama", {"mlp_bias": True}, "mlp_bias True"),
    ("Llama", {"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.q_proj\.bias"),
    ("Qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("Qwen2", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, r"holds model\.layers\.0\.self_attn\.k_proj\.bias"),
    ("Qwen3", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, r"holds model\.layers\.0\.self_attn\.k_norm"),
    ("Llama", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, r"lacks model\.layers\.0\.self_attn\.q_norm"),
    ("Llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'.*it serves default, linear"),
    ("Llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "a rope type for each kind of layer"),
    ("Llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor"),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "'linear' needs factor above 0"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("Mistral", {"sliding_window": 16}, "sliding window of 16 tokens.*set max_context in engine.toml to 16 or less"),
    ("Qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2, "layer_types": "DROP"}, "sliding window of 16"),
    ("Qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, "window of 16"),
    ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types full_attention, sliding_attention"),
    ("Qwen3", {"layer_types": ["chunked_attention"]}, "layer_types chunked_attention"),
    ("Llama", {"num_key_value_heads": 3}, "4 query heads over 3"),
    ("Llama", {"head_dim": 15}, "of size 15"),
    ("Llama", {"hidden_size": "32"}, "hidden_size must be a whole number above 0, got '32'"),
    ("Llama", {"rms_norm_eps": "DROP"}, "lacks rms_norm_eps"),
    ("Llama", {"eos_token_id": ["</s>"]}, "eos_token_id must be token ids"),
], ids=str)
def test_a_network_it_cant_serve_is_refused_by_name(tmp_path: Path, family: str, values: dict, message: str) -> None:
    folder = write_checkpoint(tmp_path, family, **({"sliding_window": None} if family == "Mistral" else {}))
    edit_config(folder, **values)
    (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        Target(folder, tiny_spec(max_context=TOKENS))


def test_a_window_is_no_limit_to_a_context_as_short(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "Mistral", sliding_window=TOKENS)
    assert_equal_to_transformers(folder)
    with pytest.raises(CheckpointError, match=f"sliding window of {TOKENS}"):
        Target(folder, tiny_spec(max_context=TOKENS + 1))


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.to(torch.int8), "is int8.*not quantised ones"),
    (lambda w: w.to(torch.float8_e4m3fn), "is float8_e4m3fn.*not quantised ones"),
    (lambda w: w.index_fill(0, torch.tensor([0]), float("inf")), "holds NaN or infinite"),
])
def test_weights_it_cant_multiply_with_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    folder = write_checkpoint(tmp_path, "Llama")
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / WHOLE)
    save_file(weights | {name: change(weights[name])}, folder / WHOLE)
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        Target(folder, tiny_spec())
