"""From trainings after a shift to recovery, retention, break-even and a picture. Knows no draft and no lake."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

REFERENCE, HOW = "reference", ("greedy", "non_looping", "looping", "sampled_0.8")
BARS = {60: 0.75, 150: 0.90}       # recovery that is asked for, by seconds
COLOURS = ("#1b6ca8", "#c8553d", "#588157")


def summarise(measured: dict[str, Any], shifts: Sequence[str], old: Sequence[str]) -> dict[str, Any]:
    """`measured` with, for each training, the share of the loss that it won back and what old workloads kept; medians over all."""
    wanted = measured["costs"].get("break_even_length")
    by_shift: dict[str, Any] = {}
    for shift in shifts:
        stale, cells = measured["stale"].get(shift), [c for c in measured["cells"] if c["shift"] == shift]
        reference = next((c for c in cells if c["budget"] == REFERENCE), None)
        if stale and reference:
            best = reference["unseen"][shift]
            by_shift[shift] = {"stale": stale[shift], "reference": best, "cells": [
                {"budget": c["budget"], "seed": c["seed"], "recovery": recovered(c["unseen"][shift], stale[shift], best),
                 "kept": {name: kept(c["unseen"][name], stale[name]) for name in old},
                 "break_even_s": crossing(c["held_out_curve"], wanted)} for c in cells if c is not reference]}
    return measured | {"by_shift": by_shift, "medians": medians(by_shift, old)}


def recovered(now: dict[str, float], stale: dict[str, float], best: dict[str, float]) -> dict[str, float]:
    """(a_t - a_stale) / (a_ref - a_stale), where the shift cost something."""
    return {how: round((now[how] - stale[how]) / (best[how] - stale[how]), 3) for how in HOW if how in now and best[how] > stale[how]}


def kept(now: dict[str, float], stale: dict[str, float]) -> dict[str, float]:
    """Of an old workload's acceptance length."""
    return {how: round(now[how] / stale[how], 3) for how in ("greedy", "sampled_0.8")}


def medians(by_shift: dict[str, Any], old: Sequence[str]) -> dict[str, Any]:
    """Over shifts and seeds, by seconds of training."""
    found: dict[str, Any] = {}
    for budget, bar in BARS.items():
        cells = [c for shift in by_shift.values() for c in shift["cells"] if c["budget"] == budget]
        if cells:
            held = {name: [c["kept"][name]["greedy"] for c in cells] for name in old}
            found[f"{budget} s"] = {
                "trainings": len(cells), "bar": bar,
                "recovery": {how: round(statistics.median(values), 3) for how in HOW
                             if (values := [c["recovery"][how] for c in cells if how in c["recovery"]])},
                "lowest_greedy": min(c["recovery"]["greedy"] for c in cells),
                "kept": {name: {"median": round(statistics.median(values), 3), "lowest": min(values)} for name, values in held.items()},
                "break_even_s": sorted(c["break_even_s"] for c in cells if c["break_even_s"] is not None)}
    return found


def crossing(curve: Sequence[Sequence[float]], wanted: float | None) -> float | None:
    """When a curve of (seconds, acceptance length) first reaches `wanted`, on a straight line between two evaluations."""
    if wanted is None:
        return None
    for (t0, a0), (t1, a1) in zip([curve[0], *curve], curve, strict=False):
        if a1 >= wanted:
            return round(t0 + (t1 - t0) * (wanted - a0) / (a1 - a0), 1) if a1 > a0 else t1
    return None


def plot(result: dict[str, Any], file: Path) -> None:
    """Recovery on unseen prompts after each training, and the way there on the held-out windows of the 150 s ones."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "recovery", "font.size": 9}):
        drawing = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = drawing.subplots()
        for colour, (shift, found) in zip(COLOURS, result["by_shift"].items(), strict=False):
            cells = [c for c in result["cells"] if c["shift"] == shift]
            best = max(a for c in cells if c["budget"] == REFERENCE for _, a in c["held_out_curve"])
            for c in (c for c in cells if c["budget"] == 150):
                start = c["held_out_curve"][0][1]
                axes.plot([t for t, _ in c["held_out_curve"]], [100 * (a - start) / (best - start) for _, a in c["held_out_curve"]],
                          color=colour, lw=0.8, alpha=0.6)
            for i, c in enumerate(found["cells"]):
                axes.plot(c["budget"], 100 * c["recovery"]["greedy"], "o", ms=5, color=colour,
                          label=f"en, c to {shift}" if i == 0 else None)
        for seconds, bar in BARS.items():
            axes.plot([seconds - 6, seconds + 6], [100 * bar] * 2, color="#333333", lw=1.5)
        axes.set(xlabel="seconds of training on one core", ylabel="recovery, %", ylim=(0, 115), xlim=(0, 160),
                 title="What a shift costs, won back (dots: unseen prompts; lines: held-out windows; bars: what is asked for)")
        axes.title.set_fontsize(9)
        axes.grid(axis="y", lw=0.4)
        axes.legend(frameon=False, loc="lower right")
        file.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(file, format="svg", metadata={"Date": None})
