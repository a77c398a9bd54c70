"""Named runs. A run is a function: `tide --recipe pocket_cpu up`. `load()` adds a TOML file and single values on top.

An engine that serves on GPUs has its runs beside it, in `engines/<name>/recipes.toml`: a table for each class of serving and of training
GPU, joined by name: `tide --recipe qwen3-8b/h100+l40s up`.
"""

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
    return override(config, {"training": {"draft_vocab_size": 3072, "time_budget_s": 90.0, "champion_share": 0.1},
                             "speculation": {"survival_window": 80}})


def pocket_demo() -> TideConfig:
    """`tide demo`: the same with windows short enough to see everything in five minutes."""
    return override(pocket_cpu(), {"state_dir": str(project_root() / ".tide" / "demo"),
                                   "capture": {"flush_s": 1.0},
                                   "drift": {"recent_s": 25.0, "min_drop": 0.05, "cooldown_s": 30.0},
                                   "rollout": {"mode": "auto"}})


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
    if recipe in RECIPES:
        config = RECIPES[recipe]()
    elif "/" in recipe:
        config = on_gpus(recipe, project_root() / "engines")
    else:
        raise SettingsError(f"no recipe {recipe!r}; there are: {', '.join(RECIPES)}, and ENGINE/SERVING+TRAINING for the engines of "
                            "`tide engines list`, such as qwen3-8b/h100+l40s")
    if file is not None:
        config = override(config, load_toml(file))
    return override(config, values) if values else config


def on_gpus(recipe: str, engines: Path) -> TideConfig:
    """`engine/serving+training` from the engine's recipes.toml; the training half may be left out. Raises SettingsError."""
    engine, _, hardware = recipe.partition("/")
    serving, _, training = hardware.partition("+")
    tables = gpu_tables(engines / engine)
    config = TideConfig(engine=engine, engines_dir=str(engines), state_dir=str(engines.parent / ".tide" / engine))
    config = override(config, tables.get("base", {}))
    for kind, name in (("serve", serving), ("train", training)):
        if name and name not in tables.get(kind, {}):
            there = ", ".join(tables.get(kind, {})) or "none"
            raise SettingsError(f"recipe {recipe!r}: {engine} has no [{kind}.{name}], there are: {there}. Add a table to "
                                f"{engines / engine / 'recipes.toml'}")
        config = override(config, tables[kind][name]) if name else config
    return config


def first_recipe(engine_dir: Path) -> str:
    """The recipe of the serving GPU that recipes.toml names first. Raises SettingsError."""
    for gpu in gpu_tables(engine_dir).get("serve", {}):
        return f"{engine_dir.name}/{gpu}"
    raise SettingsError(f"{engine_dir / 'recipes.toml'} has no [serve.<gpu>] table: add one for the GPUs that will serve {engine_dir.name}")


def gpu_tables(engine_dir: Path) -> dict[str, Any]:
    """recipes.toml of an engine, its three tables checked; {} for an engine without one. Raises SettingsError."""
    file = engine_dir / "recipes.toml"
    if not engine_dir.is_dir():
        raise SettingsError(f"no engine {engine_dir.name!r}: `tide engines list` shows them")
    tables = load_toml(file) if file.exists() else {}
    if unknown := sorted(tables.keys() - {"base", "serve", "train"}):
        raise SettingsError(f"{file}: unknown table [{unknown[0]}]; there are [base], [serve.<gpu>] and [train.<gpu>]")
    return tables


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
