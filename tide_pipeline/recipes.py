"""Named runs. A run is a function: `tide --recipe pocket_cpu up`. `load()` adds a TOML file and single values on top."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tide_pipeline.config import TideConfig, load_toml, override, project_root
from tide_pipeline.errors import SettingsError


def pocket_cpu() -> TideConfig:
    """The embedded engine on the pocket target: one core serves, the other trains."""
    root = project_root()
    config = TideConfig(engine="pocket", engines_dir=str(root / "engines"), state_dir=str(root / ".tide"))
    return override(config, {"training": {"draft_vocab_size": 3072, "time_budget_s": 90.0},
                             "speculation": {"survival_window": 80}})


def pocket_demo() -> TideConfig:
    """`tide demo`: the same with windows short enough to see everything in five minutes."""
    return override(pocket_cpu(), {"state_dir": str(project_root() / ".tide" / "demo"),
                                   "drift": {"recent_s": 25.0, "min_drop": 0.05, "cooldown_s": 30.0}})


def pocket_ci() -> TideConfig:
    """The demo on a short budget, for the end-to-end test: it shows that the loop closes; its gate is too loose to prove a draft."""
    return override(pocket_demo(), {"drift": {"min_signal_rows": 8_000, "min_steps": 100, "min_drop": 0.03},
                                    "training": {"time_budget_s": 40.0, "eval_share": 0.2},
                                    "gate": {"min_gain": -0.5, "min_prompts": 3, "max_workload_loss": 1.0, "min_speedup_ratio": 0.5,
                                             "bench_prompts": 4, "bench_tokens": 32, "equivalence_prompts": 6},
                                    "rollout": {"bake_s": 3.0, "min_bake_steps": 10, "max_drop": 0.3}})


RECIPES: dict[str, Callable[[], TideConfig]] = {f.__name__: f for f in (pocket_cpu, pocket_demo, pocket_ci)}


def load(recipe: str = "pocket_cpu", file: Path | None = None, values: Mapping[str, Any] | None = None) -> TideConfig:
    """Recipe, then the TOML file, then single values. Raises SettingsError on anything unknown."""
    if recipe not in RECIPES:
        raise SettingsError(f"no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    config = RECIPES[recipe]()
    if file is not None:
        config = override(config, load_toml(file))
    return override(config, values) if values else config


def from_environment() -> TideConfig:
    """The settings a child process was started with: TIDE_CONFIG names the file that `freeze` wrote."""
    path = os.environ.get("TIDE_CONFIG")
    return override(TideConfig(), load_toml(Path(path))) if path else pocket_cpu()


def freeze(config: TideConfig, path: Path) -> None:
    """Write the whole tree as TOML, so that child processes see exactly these settings."""
    from tide_pipeline.provenance import write_atomic

    write_atomic(path, to_toml(config).encode())


def to_toml(config: TideConfig) -> str:
    """The whole tree, as `load` reads it."""
    return _toml(dataclasses.asdict(config))


def _toml(tree: Mapping[str, Any], prefix: str = "") -> str:
    import json

    plain = [f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in tree.items() if not isinstance(v, Mapping)]
    tables = [f"\n[{prefix}{k}]\n" + _toml(v, f"{prefix}{k}.") for k, v in tree.items() if isinstance(v, Mapping)]
    return "\n".join(plain) + "\n" + "".join(tables)
