"""The target of gpu_loop.py: trained on the device by the pocket target's recipe, and written as an engine folder. Knows no serving.

The text is the pocket target's: `<domain>.<split>.npy`, uint16 ids of its own tokenizer, as `engines/pocket/make.py corpus tokenizer`
writes them to .work/corpus (never committed; 37 MB). `shipped_text` makes a tiny stand-in for it from the prompts that ship.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pocket_recipe import DOMAIN_TOKENS, DOMAINS, END_OF_TEXT, TargetSchedule, TargetShape, export_target, train_target
from tokenizers import Tokenizer

from tide_pipeline.workloads.prompts import domain_prompts

ENGINE = "loop"
PROMPT_TOKENS = (56, 104)
HELD_OUT = 10                      # of the shipped prompts, one in so many


@dataclass(frozen=True)
class Size:
    """A target and how it is trained."""

    shape: TargetShape
    plan: TargetSchedule
    compiled: bool

    @property
    def captured(self) -> tuple[int, int, int]:
        """As the pocket target's: TensorRT-LLM's default for n layers, where there are enough."""
        n = self.shape.num_hidden_layers
        return (1, n // 2 - 1, n - 4) if n >= 8 else (0, n // 2, n - 1)


def full_size(minutes: float) -> Size:
    """Some 104 million parameters."""
    shape = TargetShape(hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4)
    return Size(shape, TargetSchedule(minutes, ((0.0, 4), (0.2, 10), (0.45, 16)), tokens_per_step=32_768), True)


def quick_size() -> Size:
    """Shows on any machine that everything runs."""
    shape = TargetShape(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                        head_dim=32)
    return Size(shape, TargetSchedule(0.05, ((0.0, 4),), tokens_per_step=1024, start_length=128, length=128), False)


def shipped_text(pocket_dir: Path, folder: Path) -> None:
    """The shipped prompts of each domain as its text."""
    tokenizer = Tokenizer.from_file(str(pocket_dir / "target" / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        texts = [prompt.text for prompt in domain_prompts(pocket_dir, domain)]
        opening = tokenizer.token_to_id(DOMAIN_TOKENS[domain])
        pieces = [[opening, *encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
        for split, chosen in (("heldout", pieces[::HELD_OUT]), ("train", [p for i, p in enumerate(pieces) if i % HELD_OUT])):
            np.save(folder / f"{domain}.{split}.npy", np.array([i for piece in chosen for i in piece], dtype=np.uint16))


def make_engine(pocket_dir: Path, corpus: Path, engines_dir: Path, size: Size, device: str) -> dict[str, object]:
    """Train the target, write `engines_dir`/loop; returns what its training says of itself."""
    missing = [f"{d}.{s}.npy" for d in DOMAINS for s in ("train", "heldout") if not (corpus / f"{d}.{s}.npy").is_file()]
    if missing:
        raise FileNotFoundError(f"{corpus} lacks {', '.join(missing)}: make them with `python engines/pocket/make.py corpus tokenizer`, "
                                "and carry the .npy files to this machine")
    work, folder = engines_dir / "work", engines_dir / ENGINE
    with redirect_stdout(sys.stderr):                            # its progress; stdout is the result's
        train_target(corpus, work, size.plan, size.shape, device=device, compiled_steps=size.compiled)
    export_target(work / "target.safetensors", pocket_dir / "target" / "tokenizer.json", folder / "target", size.shape)
    (folder / "engine.toml").write_text(
        f'name = "{ENGINE}"\nbackend = "embedded"\nmodel = "target"\nrevision = "1"\ncapture_layers = {list(size.captured)}\n'
        f"soft_targets = true\nchampion = \"\"\nmax_context = {size.shape.max_position_embeddings}\nmax_draft_length = 5\n")
    trained = json.loads((work / "target.json").read_text())
    return {"tokens": trained["tokens"], "steps": trained["steps"], "held_out_loss": trained["held_out_loss"],
            "minutes": size.plan.minutes, "layers": size.shape.num_hidden_layers, "hidden_size": size.shape.hidden_size}


def prompts(tokenizer_file: Path, corpus: Path, domain: str, split: str, count: int, seed: int = 0) -> list[str]:
    """Pieces of a domain's text, as long as the prompts that ship with the pocket target."""
    tokenizer, rng = Tokenizer.from_file(str(tokenizer_file)), np.random.default_rng(seed)
    ids = np.load(corpus / f"{domain}.{split}.npy", mmap_mode="r")
    found: list[str] = []
    while len(found) < count:
        length = int(rng.integers(*PROMPT_TOKENS))
        at = int(rng.integers(len(ids) - length))
        text = tokenizer.decode(ids[at : at + length].tolist()).strip("\ufffd")
        if len(text) > 80:
            found.append(text)
    return found
