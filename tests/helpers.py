"""Tiny real parts for tests: a Hugging Face Llama folder, a draft that often agrees with it, an engine over both.

Nothing here is a stand-in: the same files load in `transformers` and in the embedded engine. Weights are seeded and random, the
embedding outweighs the layers, so that a draft which looks at the last token alone guesses right most of the time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tide_pipeline.config import ServeSettings, SpeculationSettings
from tide_pipeline.contracts import (
    EngineBuild,
    FinishReason,
    GenerationRequest,
    RequestClosed,
    RequestOpened,
    SamplingParams,
    StepEvent,
    TokenChunk,
)
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.protocol import Sink
from tide_pipeline.engine.taps import TapRing
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.models.checkpoint import DraftIdentity, digest_draft, save_draft, shape_for
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target, read_weights

END_OF_TEXT = "<|endoftext|>"
EPSILON = 1e-4                         # logit gap below which two tokens count as tied (fp32, ARCHITECTURE.md)
BYTES_VOCAB = 257                      # end of text and every byte


# --- a target ----------------------------------------------------------------------------------------------------

def write_tokenizer(folder: Path, vocab: int = BYTES_VOCAB) -> None:
    """A byte-level tokenizer without merges: end of text is 0, then small letters, then the other bytes, as far as `vocab` goes."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    alphabet = letters + sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    ids = {END_OF_TEXT: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet[: vocab - 1])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_tiny_target(folder: Path, *, layers: int = 4, vocab: int = BYTES_VOCAB, hidden: int = 32, heads: int = 4, kv_heads: int = 2,
                      head_dim: int | None = 16, intermediate: int = 48, max_positions: int = 256, tied: bool = False, eos: int | None = 0,
                      context: float = 0.2, sharpness: float = 0.5, seed: int = 0) -> Path:
    """A Llama folder. `context` scales what the layers add to the last token's embedding, `sharpness` the logits' spread."""
    generator = torch.Generator().manual_seed(seed)
    size = head_dim or hidden // heads

    def w(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * gain / shape[-1] ** 0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    embedding = torch.randn(vocab, hidden, generator=generator)
    embedding[:, 0] = 0.0
    embedding *= (hidden - 4.0) ** 0.5 / embedding.norm(dim=-1, keepdim=True)
    embedding[:, 0] = 2.0                                      # a constant feature: `agreeing_draft` attends by it
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm()}
    if not tied:
        weights["lm_head.weight"] = torch.randn(vocab, hidden, generator=generator) * sharpness
    for i in range(layers):
        p = f"model.layers.{i}."
        weights |= {p + "self_attn.q_proj.weight": w(heads * size, hidden), p + "self_attn.k_proj.weight": w(kv_heads * size, hidden),
                    p + "self_attn.v_proj.weight": w(kv_heads * size, hidden),
                    p + "self_attn.o_proj.weight": w(hidden, heads * size, gain=context),
                    p + "mlp.gate_proj.weight": w(intermediate, hidden), p + "mlp.up_proj.weight": w(intermediate, hidden),
                    p + "mlp.down_proj.weight": w(hidden, intermediate, gain=context),
                    p + "input_layernorm.weight": norm(), p + "post_attention_layernorm.weight": norm()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
              "max_position_embeddings": max_positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
              "tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": eos,
              "torch_dtype": "float32", **({"head_dim": head_dim} if head_dim else {})}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, vocab)
    return folder


def tiny_spec(*, name: str = "tiny", capture_layers: tuple[int, ...] = (0, 1, 2), soft_targets: bool = True, max_context: int = 96,
              max_draft_length: int = 4, champion: str = "") -> EngineSpec:
    return EngineSpec(name, "embedded", "target", "1", capture_layers, soft_targets, champion, max_context, max_draft_length)


def write_tiny_engine(engines: Path) -> Path:
    """engines/tiny: a tiny target without a draft, and the engine.toml of `tiny_spec`. Returns the folder."""
    folder = engines / "tiny"
    write_tiny_target(folder / "target")
    write_engine_toml(folder, tiny_spec())
    return folder


def write_engine_toml(folder: Path, spec: EngineSpec) -> None:
    """`folder/engine.toml`, of an embedded engine: its tables are left out."""
    plain = {key: value for key, value in asdict(spec).items() if not isinstance(value, dict)}
    (folder / "engine.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items()))


# --- a draft -----------------------------------------------------------------------------------------------------

def random_draft(target: Target, *, vocabulary: Tensor | None = None, gain: float = 1.0, seed: int = 0) -> Eagle3Draft:
    """Seeded random weights; with `vocabulary` (sorted target ids) a reduced one."""
    generator = torch.Generator().manual_seed(seed)
    draft = Eagle3Draft(shape_for(target.shape, len(target.spec.capture_layers), None if vocabulary is None else len(vocabulary)))
    with torch.no_grad():
        for p in draft.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * gain / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + 0.1 * noise)
    if vocabulary is not None:
        draft.set_vocabulary(vocabulary)
    return draft


def agreeing_draft(target: Target, *, noise: float = 0.1, vocabulary: Tensor | None = None, seed: int = 0) -> Eagle3Draft:
    """A draft that copies the last token's embedding (attention to itself, by the constant feature) and reads the target's lm_head.

    The target does the same plus what its layers add, so the two agree often, and less with more `noise`.
    """
    draft, s = random_draft(target, vocabulary=vocabulary, seed=seed), target.shape
    D, E, groups = s.hidden_size, s.heads.size, s.heads.query // s.heads.kv
    assert s.heads.kv * E >= D, "the copying head needs values as wide as the hidden state"
    attention = draft.midlayer["self_attn"]
    with torch.no_grad():
        rms = float(target.embedding_VD.norm(dim=-1).mean()) / D**0.5
        for name in ("q_proj", "k_proj"):
            attention[name].weight.zero_()
            attention[name].weight[:, 0] = 4.0                 # the same query and key everywhere: rotation makes the own position win
        attention["v_proj"].weight.zero_()
        attention["v_proj"].weight[:D, :D] = torch.eye(D) * rms          # the token's embedding ..
        attention["v_proj"].weight[:D, D:] = -torch.eye(D) * rms         # .. in the place of what the residual brings along
        attention["o_proj"].weight.zero_()
        for d in range(D):
            attention["o_proj"].weight[d, (d // E) * groups * E + d % E] = 1.0
        draft.midlayer["mlp"]["down_proj"].weight.mul_(0.1)
        draft.midlayer["input_layernorm"].weight.fill_(1.0)
        draft.midlayer["hidden_norm"].weight.fill_(1.0)
        draft.norm.weight.copy_(target.norm)
        head = target.lm_head_VD if vocabulary is None else target.lm_head_VD[vocabulary]
        generator = torch.Generator().manual_seed(seed)
        draft.lm_head.weight.copy_(head + noise * head.std() * torch.randn(head.shape, generator=generator))
    return draft


def write_tiny_build(folder: Path, target: Target, draft: Eagle3Draft | None = None, *, version: str = "v1", noise: float = 0.1,
                     vocabulary: Tensor | None = None, seed: int = 0) -> EngineBuild:
    """Save a draft (by default one that often agrees) as `folder/draft` and describe it."""
    draft = draft if draft is not None else agreeing_draft(target, noise=noise, vocabulary=vocabulary, seed=seed)
    identity = DraftIdentity(target.spec.name, target.digest, target.spec.capture_layers)
    save_draft(draft, folder / "draft", identity, {"recipe": "test"})
    digest = digest_draft(folder / "draft")
    return EngineBuild(digest[:16], target.spec.name, "embedded", str(folder), version, digest, target.digest, time.time())


# --- an engine ---------------------------------------------------------------------------------------------------

def tiny_engine(target_dir: Path, *, spec: EngineSpec | None = None, drafts: Mapping[str, EngineBuild] | EngineBuild | None = None,
                sink: Sink | None = None, max_batch: int = 4, queue_size: int = 64, prefill_chunk: int = 16,
                speculation: SpeculationSettings | None = None, device: str = "cpu") -> EmbeddedEngine:
    """An engine that is not started: call `step()`, or `drain` below. A single build serves every workload."""
    serve = ServeSettings(device, max_batch=max_batch, queue_size=queue_size, prefill_chunk=prefill_chunk)
    engine = EmbeddedEngine(target_dir, spec or tiny_spec(), serve, speculation or SpeculationSettings(), sink)
    if drafts is not None:
        engine.set_drafts({"*": drafts} if isinstance(drafts, EngineBuild) else drafts)
    return engine


def ask(request_id: str, prompt: str, *, speculation: str = "auto", workload: str = "default", tenant: str = "default",
        deadline_s: float = 120.0, **sampling: object) -> GenerationRequest:
    """A request; keyword arguments are SamplingParams'."""
    return GenerationRequest(request_id, prompt, SamplingParams(**sampling), speculation, workload, tenant, deadline_s)  # type: ignore[arg-type]


@dataclass
class Answer:
    """What a client heard."""

    chunks: list[TokenChunk] = field(default_factory=list)

    def __call__(self, chunk: TokenChunk) -> None:
        assert self.finish_reason is None, "a chunk after the last one"
        self.chunks.append(chunk)

    @property
    def tokens(self) -> list[int]:
        return [t for chunk in self.chunks for t in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def last(self) -> TokenChunk:
        return self.chunks[-1]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason if self.chunks else None


def submit(engine: EmbeddedEngine, request: GenerationRequest) -> Answer:
    answer = Answer()
    engine.submit(request, answer)
    return answer


def busy(engine: EmbeddedEngine) -> bool:
    stats = engine.stats()
    return stats.running + stats.waiting > 0


def drain(engine: EmbeddedEngine, each_step: Callable[[], None] | None = None, limit: int = 5_000) -> None:
    """Step until nothing runs or waits."""
    for _ in range(limit):
        if not busy(engine):
            return
        engine.step()
        if each_step is not None:
            each_step()
    raise AssertionError(f"the engine was still busy after {limit} steps")


def generate(engine: EmbeddedEngine, *requests: GenerationRequest) -> list[Answer]:
    """Submit all, step until done."""
    answers = [submit(engine, request) for request in requests]
    drain(engine)
    return answers


# --- what a sink saw ---------------------------------------------------------------------------------------------

@dataclass
class Seen:
    """One request as a sink saw it: its events, and the states of every row in order."""

    opened: RequestOpened
    events: list[StepEvent] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)         # [n, width] bf16 each
    closed: RequestClosed | None = None

    @property
    def row_tokens(self) -> list[int]:
        return [t for event in self.events for t in event.row_tokens]

    @property
    def emitted(self) -> list[int]:
        return [t for event in self.events for t in event.emitted]

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.states)


class RecordingSink:
    """Keeps everything; checks the order of calls that `Sink` promises."""

    def __init__(self) -> None:
        self.requests: dict[str, Seen] = {}
        self.is_closed = False

    def attach(self, ring: TapRing, engine_digest: str) -> None:
        self.ring, self.engine_digest = ring, engine_digest

    def on_open(self, opened: RequestOpened) -> None:
        assert opened.request_id not in self.requests or self.requests[opened.request_id].closed is not None
        self.requests[opened.request_id] = Seen(opened)

    def on_step(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            seen = self.requests[event.request_id]
            assert seen.closed is None and event.taps is not None
            seen.events.append(event)
            seen.states.append(self.ring.rows(event.taps).clone())

    def on_close(self, closed: RequestClosed) -> None:
        assert self.requests[closed.request_id].closed is None
        self.requests[closed.request_id].closed = closed

    def on_idle(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


# --- the yardsticks ----------------------------------------------------------------------------------------------

def plain_pass(target: Target, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass over a whole sequence: taps [T, G * D], final states [T, D], logits [T, V]."""
    cache = target.new_cache(1, len(tokens))
    taps, final = target.forward(torch.tensor([list(tokens)]), torch.arange(len(tokens)).unsqueeze(0), cache)
    return taps[0], final[0], target.logits(final[0])


def count_ties(target: Target, prompt: Sequence[int], emitted: Sequence[int], epsilon: float = EPSILON) -> int:
    """Greedy equivalence: every emitted token is the argmax of a plain pass over its prefix, or within epsilon of it (counted)."""
    if not emitted:
        return 0
    _, _, logits = plain_pass(target, [*prompt, *emitted[:-1]])
    rows = logits[len(prompt) - 1:]
    chosen = rows[torch.arange(len(emitted)), torch.tensor(list(emitted))]
    gap = rows.max(dim=-1).values - chosen
    assert float(gap.max()) <= epsilon, f"token {int(gap.argmax())} of {list(emitted)} is {float(gap.max()):.2e} below the argmax"
    return int((gap > 0).sum())


def assert_states_match(target: Target, tokens: Sequence[int], rows: Tensor) -> None:
    """Stored bf16 rows [n, taps | final] equal a plain pass over the sequence, within bf16 rounding."""
    taps, final, _ = plain_pass(target, tokens)
    want = torch.cat((taps, final), dim=-1)[: len(rows), : rows.shape[1]]
    torch.testing.assert_close(rows.float(), want, rtol=2**-8, atol=2e-4)


def chi_square_p(statistic: float, degrees: int) -> float:
    """Probability of a chi-square value at least this large."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return read_weights(folder)
