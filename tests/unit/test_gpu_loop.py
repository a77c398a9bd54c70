"""What the GPU loop is made of, as far as it runs without one: `gpu_loop.py --quick` runs the whole of it (make bench-quick)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from gpu_loop_plot import draw
from loop_target import full_size, prompts, quick_size, shipped_text
from pocket_recipe import DOMAINS

from tide_pipeline.config import project_root

POCKET = project_root() / "engines" / "pocket"
ONLY = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import gpu_loop"
ABSENT = ("duckdb", "mlflow", "dagster", "dagster_pipes", "matplotlib", "rich", "httpx", "typer", "psutil", "pandas", "scipy",
          "transformers", "tritonclient", "pytriton", "boto3")


def test_it_needs_five_packages_only() -> None:
    done = subprocess.run([sys.executable, "-c", ONLY, *ABSENT], capture_output=True, text=True, timeout=300, cwd=project_root(),
                          env={"PYTHONPATH": f"{project_root()}:{project_root() / 'benchmarks'}", "OMP_WAIT_POLICY": "passive"})
    assert done.returncode == 0, done.stderr[-2_000:]


def test_the_full_target_has_about_100_million_weights() -> None:
    s = full_size(1.0).shape
    D, q, kv = s.hidden_size, s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    weights = s.num_hidden_layers * (2 * D * q + 2 * D * kv + 3 * D * s.intermediate_size + 2 * D) + s.vocab_size * D + D
    assert 95e6 < weights < 110e6
    assert full_size(1.0).captured == (1, 7, 12) and quick_size().captured == (0, 2, 3)


def test_shipped_prompts_stand_in_for_the_text(tmp_path: Path) -> None:
    shipped_text(POCKET, tmp_path)
    for domain in DOMAINS:
        train, held_out = (np.load(tmp_path / f"{domain}.{split}.npy") for split in ("train", "heldout"))
        assert len(train) > 5 * len(held_out) > 2_500 and max(train.max(), held_out.max()) < 4_096
    some = prompts(POCKET / "target" / "tokenizer.json", tmp_path, "html", "heldout", 5)
    assert len(set(some)) == 5 and some == prompts(POCKET / "target" / "tokenizer.json", tmp_path, "html", "heldout", 5)


def test_a_result_becomes_a_picture(tmp_path: Path) -> None:
    speeds = {"off": 100.0, "stale": 120.0, "adapted": 180.0}
    result = {"machine": {"gpu": None, "cpu": "a CPU"}, "quick": True, "target": {"layers": 4, "hidden_size": 64},
              "acceptance_length": {"stale": {"html": 1.5, "en": 2.8}, "adapted": {"html": 2.6, "en": 2.7}},
              "serving": [{"batch": batch, "tokens_per_s": speeds} for batch in (1, 8)],
              "training": [{"ttt_steps": 1, "rows_per_s": {"stored": 3e3, "read anew": 2.5e3, "recomputed": 1e3}}]}
    draw(result).savefig(tmp_path / "loop.svg")
    assert (tmp_path / "loop.svg").stat().st_size > 10_000
    heights = [bar.get_height() for bar in draw(result).axes[1].patches]
    assert heights == [1.0, 1.0, 1.2, 1.2, 1.8, 1.8]                # over those without a draft
