"""Folded stacks to a flame graph: what a process did while it did something. Knows py-spy's "raw" format; no engine.

    py-spy record --function --threads -f raw -o stub.folded -d 30 -p PID
    python benchmarks/flame.py stub.folded docs/images/stub.svg --title "the stub"

py-spy's own picture counts threads that wait, carries a script, and where it can't ask the kernel it takes every waiting thread for a
busy one. Here a stack that ends in a wait is left out, thread ids are dropped, and frames name files relative to their package.
"""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

WAITING = re.compile(r"(Condition|Event|Barrier)\.wait |\.select \(|^_watch \(|\._next \(|^wait \(|^thread ")
THREAD = re.compile(r"thread \((?:0x)?[0-9A-Fa-f]+\)(?:: )?")
THREADING = re.compile(r"Thread\.(_bootstrap|_bootstrap_inner|run) \(")
DEAR = 0.0015                      # share of the samples below which a frame is not drawn
WIDTH, ROW, MARGIN, CHARACTER = 1200.0, 17, 26, 6.3
COLOURS = (("tide_pipeline/serve", "#e8955b"), ("tide_pipeline/engine", "#7fb3d5"), ("tide_pipeline/models", "#a9c9a4"),
           ("tide_pipeline/capture", "#d7bde2"), ("tide_pipeline", "#c5cbe9"), ("torch", "#d5dbdb"))
OTHER = "#f3e9d2"


@dataclass
class Frame:
    """A function below its callers."""

    name: str
    samples: int = 0
    below: dict[str, Frame] = field(default_factory=dict)

    def add(self, stack: list[str], samples: int) -> None:
        self.samples += samples
        if stack:
            self.below.setdefault(stack[0], Frame(stack[0])).add(stack[1:], samples)

    def depth(self, least: float) -> int:
        return 1 + max((frame.depth(least) for frame in self.below.values() if frame.samples >= least), default=0)


def read(lines: Iterable[str]) -> Frame:
    """The tree of all stacks that do not wait."""
    root = Frame("busy samples")
    for line in lines:
        stack, _, samples = line.rpartition(" ")
        frames = stack.split(";")
        if samples.isdigit() and not WAITING.search(frames[-1]):
            below = [relative(frame) for frame in frames[1:] if not THREADING.match(frame)]
            root.add([THREAD.sub("", frames[0]) or "thread", *below], int(samples))
    return root


def relative(frame: str) -> str:
    """Files by their place below a package, lines left out."""
    found = re.fullmatch(r"(.*) \((.*?)(?::\d+)?\)", frame)
    if found is None:
        return frame
    function, file = found.groups()
    if "site-packages/" in file:
        file = file.rpartition("site-packages/")[2]
    elif file.startswith("/"):
        file = "/".join(file.split("/")[-2:])
    return f"{function} ({file})"


def draw(root: Frame, title: str) -> str:
    least = DEAR * root.samples
    height = 2 * MARGIN + ROW * root.depth(least)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{height}" font-family="monospace" font-size="10.5">',
             f'<rect width="100%" height="100%" fill="#ffffff"/><text x="4" y="17" font-size="13">{html.escape(title)}</text>']
    _draw(root, root.samples, 0.0, MARGIN, least, parts)
    return "\n".join([*parts, "</svg>\n"])


def _draw(frame: Frame, total: int, x: float, y: int, least: float, parts: list[str]) -> None:
    width = WIDTH * frame.samples / max(1, total)
    colour = next((colour for mark, colour in COLOURS if f"({mark}" in frame.name), OTHER)
    label = f"{100 * frame.samples / max(1, total):.1f}% {frame.name}"
    shown = label[: int((width - 4) / CHARACTER)]
    text = f'<text x="{x + 2:.1f}" y="{y + 12}">{html.escape(shown)}</text>' if len(shown) > 3 else ""
    parts.append(f'<g><title>{html.escape(label)}</title><rect x="{x:.1f}" y="{y}" width="{max(width - 0.4, 0.3):.1f}" height="{ROW - 1}" '
                 f'fill="{colour}"/>{text}</g>')
    for below in sorted(frame.below.values(), key=lambda one: -one.samples):
        if below.samples >= least:
            _draw(below, total, x, y + ROW, least, parts)
        x += WIDTH * below.samples / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folded", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    root = read(args.folded.read_text().splitlines())
    args.picture.write_text(draw(root, f"{args.title or args.folded.stem}: {root.samples} busy samples"))


if __name__ == "__main__":
    main()
