"""What made a draft, in sections of named values, and what differs between two. Knows certificates and tags; asks no MLflow.

    draft      version, digests, parent, workload, when        metrics   what training measured; the curve stays in the run
    windows    shard -> rows trained on, and their digest       settings  of training
    code       commit, packages, machine
A certificate of another make keeps what it says: names that belong nowhere else stand under `other`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

Pedigree = dict[str, dict[str, Any]]

DRAFT = ("version", "draft_version", "alias", "target", "workload", "digest", "engine_digest", "parent", "parent_digest", "origin",
         "recipe", "focus_since", "captured_since", "captured_until", "created_at")
METRICS = ("acceptance_length", "trained_acceptance_length", "start_acceptance_length", "replay_acceptance_length", "steps", "best_step",
           "best_weights", "stopped_early", "train_s", "windows", "rows", "requests", "prompts", "processes", "kept_bytes", "micro_batches")
CODE = ("git_sha", "git_changes", "python", "machine")
SECTIONS = ("draft", "metrics", "windows", "settings", "code", "other")
_PLACES = {name: section for section, names in (("draft", DRAFT), ("metrics", METRICS), ("code", CODE)) for name in names}
_LEFT_OUT = ("curve", "shards", "shard_digests", "settings", "packages")


def pedigree(provenance: Mapping[str, Any], more: Mapping[str, Any]) -> Pedigree:
    """`more` is what the registry or the folder says; where the certificate says it too, the certificate stands."""
    facts = {**more, **provenance}
    found: Pedigree = {section: {} for section in SECTIONS}
    for name in (*DRAFT, *METRICS, *CODE, *sorted(facts.keys() - _PLACES.keys())):
        if name in facts and name not in _LEFT_OUT and facts[name] not in (None, "", {}, []):
            found[_PLACES.get(name, "other")][name] = _readable(name, facts[name])
    found["windows"] = _windows(facts)
    settings, packages = (value if isinstance(value := facts.get(name), dict) else {} for name in ("settings", "packages"))
    found["settings"] = {"seed": facts["seed"]} | settings if "seed" in facts else dict(settings)
    found["other"].pop("seed", None)
    found["code"] |= {f"package {name}": version for name, version in sorted(packages.items())}
    return {section: values for section, values in found.items() if values}


def differences(a: Pedigree, b: Pedigree) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Section -> name -> (of a, of b) where they are not equal; None where one of them says nothing."""
    found = {section: {name: (a.get(section, {}).get(name), b.get(section, {}).get(name))
                       for name in [*a.get(section, {}), *(n for n in b.get(section, {}) if n not in a.get(section, {}))]
                       if a.get(section, {}).get(name) != b.get(section, {}).get(name)}
             for section in SECTIONS}
    return {section: values for section, values in found.items() if values}


def _windows(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Shard uri -> its rows that were trained on, and the digest over their windows' digests; older certificates have no digest."""
    shards, digests = (value if isinstance(value := facts.get(name), dict) else {} for name in ("shards", "shard_digests"))
    return {uri: {"rows": rows, "digest": digests.get(uri, "")} for uri, rows in shards.items()}


def _readable(name: str, value: Any) -> Any:
    if name in ("created_at", "focus_since") and isinstance(value, int | float):
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value)) if value else "always"
    return value
