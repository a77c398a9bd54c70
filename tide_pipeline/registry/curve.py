"""A training run's curve: metrics.jsonl as numbers and as a picture. Knows no MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tide_pipeline.errors import RegistryError

Point = dict[str, float]           # "step", "elapsed_s" and what was measured there
PANELS = (("loss", "loss"), ("acceptance_length", "acceptance length, held-out requests"))
WIDTH, HEIGHT, TOP = 360, 180, 28              # of one panel


def read_curve(folder: Path) -> list[Point]:
    """The points of `metrics.jsonl`, finite numbers only; [] for a draft that came without one."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    try:
        points = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        return [{name: float(value) for name, value in point.items() if _is_number(value)} for point in points]
    except (json.JSONDecodeError, AttributeError) as error:
        raise RegistryError(f"{file} is damaged ({error}): train again, or remove it to register the draft without its curve") from error


def series(curve: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the points that have `name`."""
    found = [(point.get("step", 0.0), point[name]) for point in curve if name in point]
    return [step for step, _ in found], [value for _, value in found]


def draw_curve(curve: Sequence[Point]) -> str:
    """Loss and acceptance over steps as SVG, written by hand: importing a plotting library takes longer than the rest."""
    panels = "".join(_panel(title, *series(curve, name), left=i * (WIDTH + 70) + 50) for i, (name, title) in enumerate(PANELS))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(PANELS) * (WIDTH + 70)} {HEIGHT + 60}" font-family="sans-serif" '
            f'font-size="11">{panels}</svg>\n')


def _panel(title: str, steps: Sequence[float], values: Sequence[float], left: int) -> str:
    if not values:
        return f'<text x="{left}" y="18">{title}: not recorded</text>'
    low, high, last = min(values), max(values), max(max(steps), 1.0)
    span = (high - low) or 1.0
    points = " ".join(f"{left + WIDTH * step / last:.1f},{TOP + HEIGHT * (high - value) / span:.1f}"
                      for step, value in zip(steps, values, strict=True))
    bottom = TOP + HEIGHT
    return (f'<text x="{left}" y="18" font-weight="bold">{title}</text>'
            f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>'
            f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="2"/>'
            f'<text x="{left - 6}" y="{TOP + 10}" text-anchor="end">{high:.2f}</text>'
            f'<text x="{left - 6}" y="{bottom}" text-anchor="end">{low:.2f}</text>'
            f'<text x="{left}" y="{bottom + 15}">0</text>'
            f'<text x="{left + WIDTH}" y="{bottom + 15}" text-anchor="end">step {last:.0f}</text>')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
