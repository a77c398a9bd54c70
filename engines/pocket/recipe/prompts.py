"""Let the target write the prompts that ship with it: no text of others is committed, and no draft has seen them.

Each document starts from a domain's opening token and is sampled at temperature 1 and top-p 0.95; it is then cut into prompts. The
target wanders from domain to domain as it writes: a piece that reads more like another one (token counts) is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tide_pipeline.config import ServeSettings, SpeculationSettings
from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import load_engine_spec

from .corpus import DOMAINS
from .tokenizer import DOMAIN_TOKENS, VOCAB_SIZE

DOCUMENT_TOKENS = 300
PROMPT_TOKENS = (56, 104)
MIN_DISTINCT = 0.45               # share of different tokens: a prompt that repeats itself is answered by more of the same


def write_prompts(engine_dir: Path, corpus_dir: Path, counts: dict[str, int], seed: int = 0) -> None:
    """`prompts/<domain>.jsonl`, counts[domain] lines each; a domain that is not named keeps its file."""
    spec = load_engine_spec(engine_dir)
    engine = EmbeddedEngine(engine_dir / spec.model, spec, ServeSettings(queue_size=10_000, max_batch=32), SpeculationSettings())
    engine.start()
    (engine_dir / "prompts").mkdir(exist_ok=True)
    reader = Reader(corpus_dir)
    for number, domain in enumerate(DOMAINS):
        if domain not in counts:
            continue
        rng, prompts, written = random.Random(seed), list[str](), 0
        while len(prompts) < counts[domain]:
            first = seed + 100_000 * number + written
            documents = _write(engine, domain, range(first, first + 8 + (counts[domain] - len(prompts)) // 2))
            written += len(documents)
            for ids in documents:
                while len(ids) > PROMPT_TOKENS[1]:
                    cut = rng.randint(*PROMPT_TOKENS)
                    piece, ids = ids[:cut], ids[cut:]
                    text = engine.codec.decode(piece).strip("\ufffd")
                    if len(text) > 80 and len(set(piece)) > MIN_DISTINCT * cut and reader.domain_of(piece) == domain:
                        prompts.append(text)
        rng.shuffle(prompts)
        lines = [json.dumps({"prompt": text, "domain": domain}, ensure_ascii=False) for text in prompts[: counts[domain]]]
        (engine_dir / "prompts" / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        print(domain, len(lines), "prompts of", written, "documents", flush=True)
    engine.close()


class Reader:
    """Naive Bayes over token counts: which domain a piece of text reads like."""

    def __init__(self, corpus_dir: Path) -> None:
        counts = np.stack([np.bincount(np.load(corpus_dir / f"{d}.train.npy", mmap_mode="r"), minlength=VOCAB_SIZE) for d in DOMAINS])
        self._log_shares = np.log((counts + 0.5) / (counts + 0.5).sum(1, keepdims=True))

    def domain_of(self, ids: Sequence[int]) -> str:
        return DOMAINS[int(self._log_shares[:, np.asarray(ids)].sum(1).argmax())]


def _write(engine: EmbeddedEngine, domain: str, seeds: range) -> list[list[int]]:
    """A document per seed, as token ids."""
    streams = [engine.submit(GenerationRequest(f"{domain}-{seed}", DOMAIN_TOKENS[domain], SamplingParams(
        max_tokens=DOCUMENT_TOKENS, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True), deadline_s=3600.0)) for seed in seeds]
    return [[token for chunk in stream for token in chunk.token_ids] for stream in streams]
