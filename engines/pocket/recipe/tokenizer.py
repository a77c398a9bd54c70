"""Train the byte-level BPE of the pocket target. Special tokens: end of text, and one that opens a document of each domain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import DOMAINS

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
DOMAIN_TOKENS = {domain: f"<|{domain}|>" for domain in DOMAINS}


def train_tokenizer(corpus_dir: Path, out_file: Path) -> None:
    """Every domain contributes the same number of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(r" {2,}(?= )|\n+ *", "isolated"),      # indentation is one unit, also in code
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=[END_OF_TEXT, *DOMAIN_TOKENS.values()], show_progress=False)
    tokenizer.train_from_iterator(_sample(corpus_dir, bytes_per_domain=3_000_000), trainer)
    tokenizer.save(str(out_file))


def _sample(corpus_dir: Path, bytes_per_domain: int) -> Iterator[str]:
    for domain in DOMAINS:
        taken = 0
        for line in (corpus_dir / f"{domain}.train.jsonl").open():
            text = json.loads(line)["text"]
            yield text
            taken += len(text)
            if taken > bytes_per_domain:
                break


def encode_corpus(corpus_dir: Path, tokenizer_file: Path) -> None:
    """Write `<domain>.<split>.npy`, uint16 token ids: documents joined as `<|domain|> text <|endoftext|>`."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end = tokenizer.token_to_id(END_OF_TEXT)
    for domain in DOMAINS:
        opening = tokenizer.token_to_id(DOMAIN_TOKENS[domain])
        for split in ("train", "heldout"):
            texts = [json.loads(line)["text"] for line in (corpus_dir / f"{domain}.{split}.jsonl").open()]
            pieces: list[int] = []
            for encoding in tokenizer.encode_batch(texts):
                pieces += [opening, *encoding.ids, end]
            np.save(corpus_dir / f"{domain}.{split}.npy", np.array(pieces, dtype=np.uint16))
