"""Make the draft that ships: serve text of the domains it shall know, capture, train from scratch.

It is the project's own loop by hand: the engine captures to a lake, `train_draft` reads it. Prompts come from the
corpus's training split of `seen` domains; the others stay unseen, so that a newcomer can watch real drift.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, ServeSettings, SpeculationSettings, TideConfig, override
from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.training.loop import train_draft


def capture_domains(engine_dir: Path, corpus_dir: Path, lake: Path, seen: tuple[str, ...], requests_per_domain: int,
                    split: str = "train", workload: str = "default", seed: int = 0) -> None:
    """Serve corpus prompts without speculation and capture everything; one request in four samples at 0.8."""
    spec = load_engine_spec(engine_dir)
    recorder = Recorder(CaptureSettings(mode="on"), spec.name, lake, "maker")
    engine = EmbeddedEngine(engine_dir / spec.model, spec, ServeSettings(queue_size=100_000, max_batch=32), SpeculationSettings(), recorder)
    tokenizer = Tokenizer.from_file(str(engine_dir / spec.model / "tokenizer.json"))
    engine.start()
    rng = random.Random(seed)
    streams = []
    for domain in seen:
        texts = [json.loads(line)["text"] for line in (corpus_dir / f"{domain}.{split}.jsonl").open()]
        for i in range(requests_per_domain):
            ids = tokenizer.encode(rng.choice(texts)).ids
            start = rng.randrange(max(1, len(ids) - 160))
            prompt = tokenizer.decode(ids[start : start + rng.randint(56, 160)])
            how = SamplingParams(max_tokens=96, temperature=0.8 if i % 4 == 3 else 0.0, seed=i)
            request = GenerationRequest(f"{split}-{domain}-{i}", prompt or " ", how, "off", workload, deadline_s=36_000.0)
            streams.append(engine.submit(request))
    for n, stream in enumerate(streams):
        for _ in stream:
            pass
        if n % 50 == 0:
            print(f"captured {n} of {len(streams)} requests", flush=True)
    engine.close()


def train_champion(config: TideConfig, out_dir: Path, minutes: float) -> None:
    """Train from scratch on everything captured."""
    settings = {"training": {"time_budget_s": minutes * 60.0, "replay_share": 0.0, "max_windows": 100_000, "nice": 0,
                             "optimizer": "muon", "train_lm_head": True, "draft_vocab_size": 2048}}
    checkpoint = train_draft(override(config, settings), workload="default", out_dir=out_dir, champion=None,
                             progress=lambda p: print(p, flush=True))
    print(checkpoint)
