"""Let the target write the prompts that ship with it: no text of others is committed, and no draft has seen them.

Each document starts from a domain's opening token and is sampled at temperature 1 and top-p 0.95; it is then cut into prompts.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tide_pipeline.config import ServeSettings, SpeculationSettings, load_engine_spec
from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine

from .corpus import DOMAINS
from .tokenizer import DOMAIN_TOKENS

DOCUMENT_TOKENS = 300
PROMPT_TOKENS = (56, 104)
MIN_DISTINCT = 0.45               # share of different tokens: a prompt that repeats itself is answered by more of the same


def write_prompts(engine_dir: Path, counts: dict[str, int], seed: int = 0) -> None:
    """`prompts/<domain>.jsonl`, counts[domain] lines each; a domain that is not named keeps its file."""
    spec = load_engine_spec(engine_dir)
    engine = EmbeddedEngine(engine_dir / spec.model, spec, ServeSettings(queue_size=10_000, max_batch=32), SpeculationSettings())
    engine.start()
    (engine_dir / "prompts").mkdir(exist_ok=True)
    for number, domain in enumerate(DOMAINS):
        if domain not in counts:
            continue
        documents = -(-counts[domain] * 150 // DOCUMENT_TOKENS)
        streams = [engine.submit(GenerationRequest(f"{domain}-{i}", DOMAIN_TOKENS[domain], SamplingParams(
            max_tokens=DOCUMENT_TOKENS, temperature=1.0, top_p=0.95, seed=seed + 1000 * number + i, ignore_eos=True),
            deadline_s=3600.0)) for i in range(documents)]
        rng, prompts = random.Random(seed), []
        for stream in streams:
            ids = [token for chunk in stream for token in chunk.token_ids]
            while len(ids) > PROMPT_TOKENS[1]:
                cut = rng.randint(*PROMPT_TOKENS)
                piece, ids = ids[:cut], ids[cut:]
                text = engine.codec.decode(piece).strip("\ufffd")
                if len(text) > 80 and len(set(piece)) > MIN_DISTINCT * cut:
                    prompts.append(text)
        rng.shuffle(prompts)
        lines = [json.dumps({"prompt": text, "domain": domain}, ensure_ascii=False) for text in prompts[: counts[domain]]]
        (engine_dir / "prompts" / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        print(domain, len(lines), "prompts", flush=True)
    engine.close()
