"""Prompt files: one JSON object a line. Knows no model.

    {"prompt": "…"}                                                  the least there must be ("text" works too)
    {"prompt": "…", "domain": "de", "workload": "docs", "tenant": "acme", "max_tokens": 96, "temperature": 0.8}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_pipeline.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file; None means: as the sender's defaults say."""

    text: str
    domain: str = ""
    workload: str | None = None
    tenant: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None


def load_prompts(path: Path) -> list[Prompt]:
    """Raises InvalidRequest with the line number for a file that can't be read or a line that is no prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} can't be read as UTF-8 text: {error}") from error
    prompts = [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InvalidRequest(f'{path} holds no prompts: write one {{"prompt": "..."}} a line')
    return prompts


def domain_prompts(engine_dir: Path, domain: str) -> list[Prompt]:
    """The prompts that ship with an engine. Raises InvalidRequest naming the domains there are."""
    path = engine_dir / "prompts" / f"{domain}.jsonl"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.jsonl"))
        raise InvalidRequest(f"{engine_dir.name} ships no prompts for {domain!r}; it has: {', '.join(there) or 'none'}")
    return load_prompts(path)


def _parse(line: str, where: str) -> Prompt:
    try:
        raw: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{where}: not JSON ({error.msg})") from error
    text = raw.get("prompt", raw.get("text")) if isinstance(raw, dict) else raw if isinstance(raw, str) else None
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f'{where}: expected {{"prompt": "some text"}}')
    if not isinstance(raw, dict):
        return Prompt(text)
    fields = {"domain": str, "workload": str, "tenant": str, "max_tokens": int, "temperature": float}
    values = {}
    for name, kind in fields.items():
        if raw.get(name) is not None:
            if not isinstance(raw[name], (int, float) if kind is float else kind):
                raise InvalidRequest(f"{where}: {name} must be {kind.__name__}, got {raw[name]!r}")
            values[name] = kind(raw[name])
    return Prompt(text, **values)
