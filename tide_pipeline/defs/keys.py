"""Names of assets and pools: plain, or with TIDE_DAGSTER_PREFIX before them, where one Dagster shows several targets. Knows no asset.

A target is a code location: a code server whose TIDE_CONFIG names the target's settings. What locations share must differ in name,
and that is their assets and pools; jobs, sensors and schedules have their location beside their name.
"""

import os
from types import ModuleType
from typing import Any

import dagster as dg

PREFIX = "TIDE_DAGSTER_PREFIX"             # of asset keys: such as the target's name; empty for one target
POOLS = "TIDE_DAGSTER_POOLS"               # of pools, where it is not that of the assets: the same word for targets that share a GPU


def prefix() -> str:
    """Of this process: of a code server, and of the runs that it starts."""
    return os.environ.get(PREFIX, "")


def key_of(name: str, before: str | None = None) -> dg.AssetKey:
    """`before` is for tests; else what the environment says."""
    before = prefix() if before is None else before
    return dg.AssetKey([before, name] if before else [name])


def pool_of(name: str) -> str:
    """Such as qwen3-8b.train_gpu. Read at import, unlike all else of the environment: a pool is an argument of a decorator."""
    before = os.environ.get(POOLS, prefix())
    return f"{before}.{name}" if before else name                  # no slash: the UI has pools in its paths


def named(*names: str) -> dg.AssetSelection:
    """Assets of these names, whatever stands before."""
    return dg.AssetSelection.from_string(" or ".join(f'key:"{name}" or key:"*/{name}"' for name in names))


def prefixed(before: str, modules: list[ModuleType], specs: list[dg.AssetSpec]) -> dict[str, Any]:
    """`assets` and `asset_checks` of Definitions: those of the modules, and assets that others write."""
    external = [spec.replace_attributes(key=key_of(spec.key.path[-1], before),
                                        deps=[key_of(dep.asset_key.path[-1], before) for dep in spec.deps]) for spec in specs]
    assets = dg.load_assets_from_modules(modules, key_prefix=before or None, source_key_prefix=before or None)
    return {"assets": [*external, *assets], "asset_checks": dg.load_asset_checks_from_modules(modules, asset_key_prefix=before or None)}
