"""Captured windows for tests: a real, tiny target generates greedily and its states are kept. Nothing here is invented.

`tiny_engine` writes a Hugging Face folder with seeded random weights and its engine.toml; `captured` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import tiny_spec, write_engine_toml
from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.capture.rows import words_of
from tide_pipeline.capture.windows import ClosedWindow, prompt_digest
from tide_pipeline.capture.writer import LakeWriter
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import SamplingParams, SignalWindow
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.models.checkpoint import shape_for
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target, TargetShape
from tide_pipeline.training.batches import Batch, Sampler, pack

DIMENSIONS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 256}


def write_target(folder: Path, seed: int = 0, scale: float = 0.15) -> None:
    """A Llama folder with random weights."""
    d = DIMENSIONS
    D, I, V = d["hidden_size"], d["intermediate_size"], d["vocab_size"]  # noqa: E741
    q, kv = d["num_attention_heads"] * d["head_dim"], d["num_key_value_heads"] * d["head_dim"]
    generator = torch.Generator().manual_seed(seed)

    def w(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {"model.embed_tokens.weight": w(V, D) * 4, "model.norm.weight": torch.ones(D)}
    for i in range(d["num_hidden_layers"]):
        p = f"model.layers.{i}."
        weights |= {p + "self_attn.q_proj.weight": w(q, D), p + "self_attn.k_proj.weight": w(kv, D),
                    p + "self_attn.v_proj.weight": w(kv, D),
                    p + "self_attn.o_proj.weight": w(D, q), p + "mlp.gate_proj.weight": w(I, D), p + "mlp.up_proj.weight": w(I, D),
                    p + "mlp.down_proj.weight": w(D, I), p + "input_layernorm.weight": torch.ones(D),
                    p + "post_attention_layernorm.weight": torch.ones(D)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": True, "eos_token_id": None, **d}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def tiny_engine(root: Path, seed: int = 0) -> TideConfig:
    """Settings whose engine is a tiny target under `root`."""
    engine = root / "engines" / "tiny"
    write_target(engine / "target", seed)
    write_engine_toml(engine, tiny_spec(max_context=256, max_draft_length=5))
    return override(TideConfig(), {"engine": "tiny", "engines_dir": str(root / "engines"), "state_dir": str(root / "state")})


def open_target(config: TideConfig) -> Target:
    spec: EngineSpec = load_engine_spec(config.engine_dir)
    return Target(config.engine_dir / spec.model, spec)


def captured(target: Target, workload: str, requests: int, *, prompt: int = 8, output: int = 24, seed: int = 0,
             with_final: bool = True, vocabulary: tuple[int, int] = (0, 64)) -> list[WindowStates]:
    """Greedy generations of random prompts, as the lake would give them back."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(*vocabulary, (requests, prompt), generator=generator)
    cache = target.new_cache(requests, prompt + output)
    taps, final = target.forward(prompts, torch.arange(prompt).expand(requests, -1), cache)
    all_taps, all_final, ids = [taps], [final], [prompts]
    for t in range(prompt, prompt + output):
        new = target.logits(all_final[-1][:, -1]).argmax(-1, keepdim=True)
        ids.append(new)
        taps, final = target.forward(new, torch.full((requests, 1), t), cache)
        all_taps.append(taps)
        all_final.append(final)
    ids.append(target.logits(all_final[-1][:, -1]).argmax(-1, keepdim=True))
    rows, tokens = prompt + output, torch.cat(ids, dim=1)
    taps_BTG, final_BTD = torch.cat(all_taps, dim=1).bfloat16(), torch.cat(all_final, dim=1).bfloat16()
    return [WindowStates(
        SignalWindow("memory://", b, f"{workload}-{seed}-{b}", "default", workload, "none", target.digest, 0, rows, prompt,
                     prompt_digest(prompts[b].tolist()), 0.0, float(b)),
        tokens[b].clone(), taps_BTG[b].clone(), final_BTD[b].clone() if with_final else None) for b in range(requests)]


def to_lake(config: TideConfig, windows: list[WindowStates], lake: Path | None = None) -> None:
    """Write windows as the engine's capture would."""
    writer = LakeWriter(config.capture, config.target, lake or config.state.lake, "replica-0")
    for w in windows:
        rows = w.taps_TG if w.final_TD is None else torch.cat((w.taps_TG, w.final_TD), dim=-1)
        s, rejected = w.window, [(position, token) for position, token in w.rejected_R2.tolist()]
        assert writer.offer_window(ClosedWindow(
            s.request_id, s.tenant, s.workload, s.draft_version, s.engine_digest, "auto", SamplingParams(temperature=s.temperature),
            s.num_prompt_tokens, s.prompt_digest, s.start_pos, w.token_ids.tolist(), rejected, [words_of(rows)],
            DIMENSIONS["hidden_size"], 3, w.final_TD is not None, s.closed_at))
    assert writer.flush()
    writer.close()


def engine_with_lake(root: Path, training: Mapping[str, object], *, de: int, py: int) -> TideConfig:
    """`tiny_engine` with these training settings, and a lake with so many requests of two workloads."""
    config = override(tiny_engine(root), {"training": training})
    target = open_target(config)
    to_lake(config, captured(target, "de", de) + captured(target, "py", py, seed=1))
    return config


def random_draft(shape: TargetShape, num_taps: int = 3, seed: int = 0, vocabulary: Tensor | None = None) -> Eagle3Draft:
    """A draft with seeded weights large enough to matter."""
    torch.manual_seed(seed)
    draft = Eagle3Draft(shape_for(shape, num_taps, None if vocabulary is None else len(vocabulary)))
    with torch.no_grad():
        for p in draft.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() == 2 else 1 + 0.1 * torch.randn_like(p))
    if vocabulary is not None:
        draft.set_vocabulary(vocabulary)
    return draft


def made_up(request_id: str, rows: int, start_pos: int = 0) -> WindowStates:
    """A window whose numbers tell where they come from; no target made it."""
    base = start_pos + torch.arange(rows + 1)
    window = SignalWindow("memory://", 0, request_id, "default", "de", "none", "none", start_pos, rows, 4, request_id, 0.0, 0.0)
    return WindowStates(window, base * 7 % 61, base[:rows, None].repeat(1, 6).bfloat16(), base[:rows, None].repeat(1, 2).bfloat16())


def batch_of(sampler: Sampler[WindowStates], step: int) -> Batch:
    """The packed batch of a step."""
    return pack(sampler.slices(step), sampler.window_rows)
