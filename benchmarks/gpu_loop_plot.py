"""The result of gpu_loop.py as a picture: acceptance, serving speed, training speed. Needs matplotlib; measures nothing.

    python benchmarks/gpu_loop_plot.py benchmarks/results/gpu_loop.json docs/images/gpu_loop.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"off": "#9aa0a6", "stale": "#d98f4e", "adapted": "#3f7fbf", "stored": "#3f7fbf", "read anew": "#8fb4d9", "recomputed": "#9aa0a6"}


def draw(result: Mapping[str, Any]) -> Figure:
    """Three panels side by side."""
    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    lengths = result["acceptance_length"]
    domains = list(next(iter(lengths.values())))
    bars(left, domains, {name: [of[domain] for domain in domains] for name, of in lengths.items()})
    left.set_title("acceptance length, 3 drafted tokens")
    serving = result["serving"]
    bars(middle, [f"batch {cell['batch']}" for cell in serving],
         {name: [cell["tokens_per_s"][name] / cell["tokens_per_s"]["off"] for cell in serving] for name in serving[0]["tokens_per_s"]})
    middle.set_title("output tokens/s over those without a draft")
    bars(right, [f"TTT {cell['ttt_steps']}" for cell in result["training"]],
         {name: [cell["rows_per_s"][name] for cell in result["training"]] for name in result["training"][0]["rows_per_s"]})
    right.set_title("training rows/s")
    device = result["machine"]["gpu"] or result["machine"]["cpu"]
    quick = ", quick form: the figures mean nothing" if result["quick"] else ""
    figure.suptitle(f"the loop on {device}, target of {result['target']['layers']} layers x {result['target']['hidden_size']}{quick}")
    return figure


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Groups side by side, a bar of each series in each."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        made = axes.bar([g + (i + 0.5) * width - 0.4 for g in range(len(groups))], values, width, label=name, color=COLOURS[name])
        axes.bar_label(made, fmt="{:,.2f}" if max(values) < 100 else "{:,.0f}", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, low + 1.35 * (high - low))                    # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what gpu_loop.py --json wrote")
    parser.add_argument("picture", type=Path, help=".svg or .png")
    args = parser.parse_args()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(args.result.read_text())).savefig(args.picture)


if __name__ == "__main__":
    main()
