"""Is the acceptance that a replay of captured windows promises the one that the engine then serves?

    python benchmarks/offline_served.py --other DRAFT --domains en html de --json benchmarks/results/offline_served_2cores.json

For each domain and temperature, the last 40 prompts, which no draft was trained on: served with draft A (the champion) at draft length 3
and captured; served with draft B (`--other`) likewise, from other seeds. Counted by the engine: accepted tokens and verification steps.

    greedy     replay of B along A's windows against what B then served, and the same of A; `equal` requests have the very same steps
    sampled    "promised": B's replay along A's windows (other texts) against what B served; "same text": each draft's replay along the
               windows that it served itself, against its count there: what is left is the luck of the accepting draws

`ratio` is replayed over served acceptance length, 1 being right, with the bootstrap 95 % interval over prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import options
from numpy.typing import NDArray
from served import Served, build_of, serve, split_prompts

from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.config import TideConfig
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.recipes import load
from tide_pipeline.training.acceptance import replay
from tide_pipeline.training.target_head import TargetHead, target_head_of

Counts = NDArray[np.float64]       # [2, R]: accepted tokens and steps of each request, prompt after prompt


def served_counts(found: Sequence[Served]) -> Counts:
    return np.array([[s.accepted for s in found], [s.verify_steps for s in found]], dtype=np.float64)


def replayed_counts(config: TideConfig, draft: Eagle3Draft, head: TargetHead, lake: Path, requests: Sequence[Served],
                    draft_length: int) -> Counts:
    """In the order of the requests; a request too short for a step has none."""
    at, counts = {s.request_id: i for i, s in enumerate(requests)}, np.zeros((2, len(requests)))
    for w in read_states(list_windows(lake / "signals", config.target).windows, strict=True):
        for found in replay(draft, head, [w], draft_length):
            counts[:, at[w.window.request_id]] += sum(found.accepted), found.steps
    return counts


def length(counts: Counts) -> float:
    return float(1 + counts[0].sum() / counts[1].sum())


def compare(replayed: Counts, served: Counts, prompts: int) -> dict[str, Any]:
    """Requests r and r + prompts share a prompt: a prompt is drawn with all its requests, on both sides alike."""
    drawn_SP = np.random.default_rng(0).integers(0, prompts, (2000, prompts))
    by_prompt = [c.reshape(2, -1, prompts).sum(1) for c in (replayed, served)]
    a_S, b_S = (1 + c[0][drawn_SP].sum(1) / c[1][drawn_SP].sum(1) for c in by_prompt)
    low, high = np.quantile(a_S / b_S, (0.025, 0.975))
    return {"replayed": round(length(replayed), 4), "served": round(length(served), 4),
            "ratio": round(length(replayed) / length(served), 4), "low": round(float(low), 4), "high": round(float(high), 4),
            "requests": served.shape[1],
            "equal": int((np.abs(replayed - served).sum(0) < 1e-9).sum()), "steps": int(served[1].sum())}


def one(config: TideConfig, drafts: dict[str, Path], head: TargetHead, domain: str, temperature: float, args: Any) -> dict[str, Any]:
    """Both drafts on one domain at one temperature."""
    _, unseen = split_prompts(config, domain, args.prompts, 0)
    asked = unseen * (1 if temperature == 0 else args.repeats)
    loaded = {name: load_draft(folder, head.shape, head.identity) for name, folder in drafts.items()}
    with tempfile.TemporaryDirectory() as scratch:
        served, lakes = {}, {}
        for i, (name, folder) in enumerate(drafts.items()):
            lakes[name] = Path(scratch) / name
            served[name] = serve(config, build_of(config, folder, name, Path(scratch) / "builds" / name), asked, domain,
                                 temperatures=(temperature,), tokens=args.tokens, speculation=str(args.length), lake=lakes[name],
                                 seed=100_000 * i)
        pairs = [("A", "A"), ("B", "A")] if temperature == 0 else [("B", "A"), ("A", "B"), ("A", "A"), ("B", "B")]
        return {f"{draft} along the text of {text}": compare(
            replayed_counts(config, loaded[draft], head, lakes[text], served[text], args.length), served_counts(served[draft]),
            args.prompts) for draft, text in pairs}


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--other", type=Path, required=True, help="folder of draft B")
    parser.add_argument("--domains", nargs="+", default=["en", "html", "de"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8, 1.0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2, help="requests of each prompt that sample")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--length", type=int, default=3, help="draft length")
    args = parser.parse_args()
    result = options.settle()
    if args.quick:
        args.domains, args.prompts, args.tokens = args.domains[:1], 4, 24
    config = load()
    head = target_head_of(config)
    drafts = {"A": config.engine_dir / load_engine_spec(config.engine_dir).champion, "B": args.other}
    result |= {"draft_length": args.length, "tokens": args.tokens, "prompts": args.prompts, "rows": {}}
    for domain in args.domains:
        for temperature in args.temperatures:
            result["rows"][f"{domain}, {temperature:g}"] = one(config, drafts, head, domain, temperature, args)
            print(domain, temperature, result["rows"][f"{domain}, {temperature:g}"], flush=True)
    options.finish(result, args)


if __name__ == "__main__":
    main()
