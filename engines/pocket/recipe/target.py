"""Train the pocket target: a Llama of 20 layers, grown from 4. Knows nothing of drafts.

Muon for the matrices, AdamW for the rest, bf16 autocast, a learning rate that warms up, stays and then falls to
zero over the last 40 % of the *time* budget. It begins with 4 layers and gains more as it goes (`grown`), which on a CPU buys
about twice the tokens. Deep and narrow, because a draft of one layer is then cheap beside it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .corpus import DOMAINS


@dataclass(frozen=True)
class TargetShape:
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 20
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 4096
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TargetSchedule:
    minutes: float = 120.0
    depths: tuple[tuple[float, int], ...] = ((0.0, 4), (0.2, 12), (0.45, 20))      # layers, from this share of the time on
    anneal_share: float = 0.4     # of the time, at the end
    tokens_per_step: int = 4096
    start_length: int = 256       # shorter windows (a seventh faster) until the learning rate falls
    length: int = 512             # then as long as what is served
    muon_lr: float = 0.012
    adam_lr: float = 0.003
    seed: int = 0


class Block(nn.Module):
    def __init__(self, s: TargetShape) -> None:
        super().__init__()
        d, kv = s.hidden_size, s.num_key_value_heads * s.head_dim
        self.s = s
        self.input_layernorm = nn.RMSNorm(d, eps=s.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=s.rms_norm_eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(d, s.num_attention_heads * s.head_dim, bias=False), "k_proj": nn.Linear(d, kv, bias=False),
            "v_proj": nn.Linear(d, kv, bias=False), "o_proj": nn.Linear(s.num_attention_heads * s.head_dim, d, bias=False)})
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(d, s.intermediate_size, bias=False), "up_proj": nn.Linear(d, s.intermediate_size, bias=False),
            "down_proj": nn.Linear(s.intermediate_size, d, bias=False)})

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        h = self.input_layernorm(x_BTD)

        def heads(name: str, n: int) -> Tensor:
            return self.self_attn[name](h).view(B, T, n, self.s.head_dim).transpose(1, 2)

        q = rotate(heads("q_proj", self.s.num_attention_heads), cos_TE, sin_TE)
        k = rotate(heads("k_proj", self.s.num_key_value_heads), cos_TE, sin_TE)
        v = heads("v_proj", self.s.num_key_value_heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_BTD = x_BTD + self.self_attn["o_proj"](out.transpose(1, 2).reshape(B, T, -1))
        h = self.post_attention_layernorm(x_BTD)
        return x_BTD + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


def rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos_TE + torch.cat((-right, left), dim=-1) * sin_TE


class Target(nn.Module):
    """Parameter names are those of Hugging Face's `LlamaForCausalLM` with tied embeddings."""

    def __init__(self, s: TargetShape, layers: int) -> None:
        super().__init__()
        self.s = s
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(s.vocab_size, s.hidden_size),
                                    "layers": nn.ModuleList(Block(s) for _ in range(layers)),
                                    "norm": nn.RMSNorm(s.hidden_size, eps=s.rms_norm_eps)})
        angles = torch.outer(torch.arange(s.max_position_embeddings).float(),
                             s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * s.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.model["embed_tokens"](ids_BT)
        T = ids_BT.shape[1]
        cos, sin = self.cos[:T].to(torch.bfloat16), self.sin[:T].to(torch.bfloat16)
        for block in self.model["layers"]:
            x = block(x, cos, sin)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)

    def grown(self, layers: int) -> Target:
        """The same function with more layers: each new one copies its predecessor and begins by adding nothing."""
        tall = Target(self.s, layers)
        old = self.model["layers"]
        tall.load_state_dict({k: v for k, v in self.state_dict().items() if ".layers." not in k}, strict=False)
        for i, block in enumerate(tall.model["layers"]):
            of = i * len(old) // layers
            block.load_state_dict(old[of].state_dict())
            if i and (i - 1) * len(old) // layers == of:
                nn.init.zeros_(block.self_attn["o_proj"].weight)
                nn.init.zeros_(block.mlp["down_proj"].weight)
        return tall


class Batches:
    """Random windows, every domain equally likely."""

    def __init__(self, corpus_dir: Path, split: str, seed: int) -> None:
        self.tokens = {d: np.load(corpus_dir / f"{d}.{split}.npy", mmap_mode="r") for d in DOMAINS}
        self.rng = np.random.default_rng(seed)

    def draw(self, batch: int, length: int, domain: str | None = None) -> Tensor:
        rows = []
        for i in range(batch):
            tokens = self.tokens[domain or DOMAINS[(i + self.rng.integers(len(DOMAINS))) % len(DOMAINS)]]
            start = self.rng.integers(len(tokens) - length - 1)
            rows.append(torch.from_numpy(tokens[start:start + length + 1].astype(np.int64)))
        return torch.stack(rows)


def optimizers(net: Target, plan: TargetSchedule) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in net.named_parameters() if p.dim() == 2 and "layers" in n]
    rest = [p for n, p in net.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    muon = torch.optim.Muon(matrices, lr=plan.muon_lr, momentum=0.95, weight_decay=0.02, adjust_lr_fn="original")
    adam = torch.optim.AdamW(rest, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def train_target(corpus_dir: Path, work_dir: Path, plan: TargetSchedule, shape: TargetShape | None = None, resume: bool = False,
                 device: str = "cpu", compiled_steps: bool = True) -> None:
    """Train for `plan.minutes`, log to `target.log.jsonl`, save `target.safetensors` as it goes (bf16).

    `resume` goes on from the saved weights (a new schedule, fresh optimizer state). Without `compiled_steps` nothing is compiled, which
    takes longer than a run of seconds.
    """
    prepared: Callable[[Target], Any] = torch.compile if compiled_steps else lambda net: net
    s = shape or TargetShape()
    torch.manual_seed(plan.seed)
    train, held = Batches(corpus_dir, "train", plan.seed), Batches(corpus_dir, "heldout", plan.seed + 1)
    work_dir.mkdir(parents=True, exist_ok=True)
    log = (work_dir / "target.log.jsonl").open("a")
    net = (load(work_dir / "target.safetensors", s) if resume else Target(s, plan.depths[0][1])).to(device)
    opts, compiled = optimizers(net, plan), prepared(net)
    start, step, seen, saved = time.time(), 0, 0, time.time()
    smooth, step_grown = 0.0, 0
    while (share := (time.time() - start) / (60 * plan.minutes)) < 1.0:
        wanted = max(layers for begins, layers in plan.depths if begins <= share)
        if len(net.model["layers"]) < wanted:
            net, step_grown = net.grown(wanted).to(device), step
            opts, compiled = optimizers(net, plan), prepared(net)
        factor = min(1.0, (step - step_grown + 1) / 60, (1.0 - share) / plan.anneal_share)
        for opt, base in zip(opts, (plan.muon_lr, plan.adam_lr), strict=True):
            for group in opt.param_groups:
                group["lr"] = base * factor
        length = plan.length if share >= 1.0 - plan.anneal_share else plan.start_length
        ids = train.draw(plan.tokens_per_step // length, length).to(device)
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = compiled(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids[:, 1:].numel()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            row = {"step": step, "tokens": seen, "s": round(time.time() - start), "loss": round(smooth, 4), "lr_factor": round(factor, 3)}
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if time.time() - saved > 300:
            saved = time.time()
            save(net, work_dir / "target.safetensors")
    save(net, work_dir / "target.safetensors")
    losses = held_out_losses(net, held)
    facts = {"schedule": asdict(plan), "tokens": seen, "steps": step, "held_out_loss": losses}
    (work_dir / "target.json").write_text(json.dumps(facts, indent=1))
    print(losses, flush=True)


def save(net: Target, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in net.state_dict().items()}
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.rename(path)


def load(path: Path, shape: TargetShape | None = None) -> Target:
    weights = load_file(path)
    depth = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("model.layers."))
    net = Target(shape or TargetShape(), depth)
    net.load_state_dict({k: v.float() for k, v in weights.items()})
    return net


@torch.no_grad()
def held_out_losses(net: Target, held: Batches, windows: int = 24) -> dict[str, float]:
    """Nats per token on text from files that no training window came from."""
    out = {}
    for domain in DOMAINS:
        ids = held.draw(windows, 512, domain).to(net.cos.device)
        total = 0.0
        for rows in ids.split(8):
            with torch.autocast(ids.device.type, torch.bfloat16):
                logits = net(rows[:, :-1])
            total += F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        out[domain] = round(total / ids[:, 1:].numel(), 4)
    return out
