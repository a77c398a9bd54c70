"""Write the trained target as a Hugging Face folder that `transformers` and the embedded engine load alike."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from .target import TargetShape
from .tokenizer import END_OF_TEXT


def export_target(weights: Path, tokenizer: Path, out_dir: Path, shape: TargetShape | None = None) -> None:
    """config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json, generation_config.json."""
    out_dir.mkdir(parents=True, exist_ok=True)
    depth = 1 + max(int(name.split(".")[2]) for name in load_file(weights) if name.startswith("model.layers."))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(shape or TargetShape()), "num_hidden_layers": depth,
              "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
              "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16"}
    files = {"config.json": config,
             "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT,
                                       "model_max_length": config["max_position_embeddings"]}}
    for name, value in files.items():
        (out_dir / name).write_text(json.dumps(value, indent=2) + "\n")
    shutil.copy(weights, out_dir / "model.safetensors")
    shutil.copy(tokenizer, out_dir / "tokenizer.json")
