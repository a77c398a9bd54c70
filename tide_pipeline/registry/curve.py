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


def plot_curve(curve: Sequence[Point], into: Path) -> Path:
    """Loss and acceptance over steps, as PNG. Agg alone: needs no screen and touches no global figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        axes.plot(*series(curve, name), marker="o" if name == "acceptance_length" else "")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(into, format="png", dpi=100)
    return into


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
