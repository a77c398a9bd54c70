"""How much of what a shift costs does training win back, and how fast? Three shifts, three seeds, 60 and 150 s of one core.

    python benchmarks/recovery.py --state DIR --collect                       # serve and capture: once
    python benchmarks/recovery.py --state DIR --costs                         # on a quiet machine: what a step costs
    python benchmarks/recovery.py --state DIR --cells html                    # train; killed and started again, it goes on
    python benchmarks/recovery.py --state DIR --pull 0.1                      # trained with champion_share = 0, moved back afterwards
    python benchmarks/recovery.py --state DIR --json benchmarks/results/recovery_2cores.json --plot docs/images/recovery.svg

recovery(t) = (a_t - a_stale) / (a_ref - a_stale): a is the acceptance length at draft length 3 on the last 40 prompts of a domain, which
nothing was trained on; a_ref is the best weights of a long training on the same windows. All of it by replay along what the target wrote
for those prompts (`offline_served.py` holds replay against serving). Old workloads (en, c) are in the replay set of every run and are
measured as well. A cell is one training, with a file of its own when it is done; a killed one goes on from its last snapshot. Break-even is
when the draft, on the held-out windows of its own training, accepts enough for a step with three drafted tokens to be worth its time at
batch 1.

A second of training is a second of processor time of the training process, evaluations included and loading not, on one thread: the
trainer's clock is replaced. So other work on the machine takes nothing from the budget (its caches still slow the step down).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import options
import torch
from recovery_summary import plot, summarise
from served import build_of, link_lakes, serve, split_prompts

import tide_pipeline.training.run
from tide_pipeline.capture.reader import WindowStates, list_windows, read_states
from tide_pipeline.config import ServeSettings, TideConfig, override
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.provenance import write_json
from tide_pipeline.recipes import load
from tide_pipeline.training.acceptance import Replay, acceptance_length, replay
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.target_head import TargetHead, target_head_of
from tide_pipeline.workloads.loops import is_looping

SHIFTS, OLD, UNSEEN, TOKENS, LENGTH = ("html", "de", "py"), ("en", "c"), 40, 96, 3
COLLECTED = {"html": 240, "de": 240, "py": 200, "en": 80, "c": 80}
BUDGETS, SEEDS, REFERENCE, REFERENCE_S, PULLED = (60, 150), 3, "reference", 400, "pulled"
ALL_CELLS: list[dict[str, Any]] = [{"shift": shift, "budget": budget, "seed": seed} for seed in range(SEEDS)
                                   for budget in (REFERENCE, *BUDGETS) for shift in SHIFTS if budget != REFERENCE or seed == 0]


def collect(config: TideConfig, state: Path) -> None:
    """Serve every domain with the shipped champion, a fifth of it sampled; the unseen prompts once greedily and once at 0.8."""
    stale = build_of(config, config.engine_dir / load_engine_spec(config.engine_dir).champion, "stale", state / "builds" / "stale")
    for domain in (*SHIFTS, *OLD):
        prompts, unseen = split_prompts(config, domain, UNSEEN, COLLECTED[domain])
        for place, asked, mixes in (("collected", prompts, [(0.0, 0.0, 0.0, 0.0, 0.8)]), ("unseen", unseen, [(0.0,), (0.8,)])):
            if not (state / place / domain).exists():
                with tempfile.TemporaryDirectory(dir=state) as scratch:
                    for mix in mixes:
                        serve(config, stale, asked, domain, temperatures=mix, tokens=TOKENS, speculation=str(LENGTH),
                              lake=Path(scratch) / "lake")
                    (state / place).mkdir(exist_ok=True)
                    (Path(scratch) / "lake").rename(state / place / domain)
                print(place, domain, len(asked), flush=True)


def windows_of(config: TideConfig, lake: Path, head: TargetHead) -> list[WindowStates]:
    """Those of four generated tokens or more, which hold a step."""
    found = read_states(list_windows(lake / "signals", config.target, engine_digest=head.digest).windows, strict=True)
    return [s for s in found if s.num_rows - s.window.num_prompt_tokens >= 3]


def measure(draft: Path, head: TargetHead, unseen: dict[str, list[WindowStates]]) -> dict[str, dict[str, float]]:
    """Acceptance lengths of a draft on the unseen prompts, by workload."""
    loaded = load_draft(draft, head.shape, head.identity)
    return {name: accepted(loaded, head, windows) for name, windows in unseen.items()}


def accepted(draft: Eagle3Draft, head: TargetHead, windows: Sequence[WindowStates]) -> dict[str, float]:
    """Acceptance lengths along windows, by kind of text and temperature."""
    return _lengths(windows, list(replay(draft, head, windows, LENGTH)))


def _lengths(windows: Sequence[WindowStates], replays: Sequence[Replay]) -> dict[str, float]:
    pairs = [(r, is_looping(w.token_ids[w.window.num_prompt_tokens - w.window.start_pos:].tolist()))
             for w, r in zip(windows, replays, strict=True)]
    greedy = [(r, loops) for r, loops in pairs if r.temperature == 0]
    splits = {"greedy": [r for r, _ in greedy], "non_looping": [r for r, loops in greedy if not loops],
              "looping": [r for r, loops in greedy if loops], "sampled_0.8": [r for r, _ in pairs if r.temperature > 0]}
    return {name: round(acceptance_length(rs), 4) for name, rs in splits.items() if rs} | {"prompts": len(greedy)}


def train(config: TideConfig, state: Path, cell: dict[str, Any], head: TargetHead, unseen: dict[str, list[WindowStates]]) -> dict[str, Any]:
    """One cell: a training on the processor's clock, and what its draft accepts."""
    tide_pipeline.training.run.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    folder = state / "drafts" / name_of(cell)
    seconds = float(REFERENCE_S if cell["budget"] == REFERENCE else cell["budget"])
    lake = link_lakes([state / "collected" / name for name in (cell["shift"], *OLD)], state / "lakes" / cell["shift"])
    config = override(config, {"lake": str(lake), "training": {"time_budget_s": seconds, "seed": cell["seed"], "nice": 0,
                                                                "eval_every_s": seconds / (20 if cell["budget"] == REFERENCE else 5)}})
    made = train_draft(config, workload=cell["shift"], out_dir=folder, champion=state / "builds" / "stale" / "draft")
    born = json.loads((folder / "provenance.json").read_text())
    curve = [[round(p["elapsed_s"], 1), round(max(p["acceptance_length"], p.get("averaged_acceptance_length", 0.0)), 3)]
             for p in born["curve"] if "acceptance_length" in p]
    return cell | {"champion_share": config.training.champion_share, "steps": made.steps, "train_s": made.train_s, "rows": made.num_rows,
                   "best_step": born["best_step"], "held_out_curve": curve,
                   "unseen": measure(folder, head, {name: unseen[name] for name in (cell["shift"], *OLD)})}


def step_costs(config: TideConfig, state: Path) -> dict[str, float]:
    """What a step with three drafted tokens costs against a plain one, batch 1: the acceptance length at which it begins to pay."""
    spec = load_engine_spec(config.engine_dir)
    engine = EmbeddedEngine(config.engine_dir / spec.model, spec, ServeSettings(max_batch=1), config.speculation)
    engine.set_drafts({"*": build_of(config, config.engine_dir / spec.champion, "stale", state / "builds" / "stale")})
    ratios = []
    for _ in range(5):
        engine.profile()
        costs = engine.control.costs
        ratios.append((costs.draft_ms(1, LENGTH) + costs.verify_ms(1, 1 + LENGTH)) / costs.verify_ms(1, 1))
    engine.close()
    return {"break_even_length": round(statistics.median(ratios), 3), "plain_step_ms": round(costs.verify_ms(1, 1), 3)}


def name_of(cell: dict[str, Any]) -> str:
    return f"{cell['shift']}-{cell['budget']}-{cell['seed']}"


def run_cells(config: TideConfig, state: Path, wanted: str, head: TargetHead) -> None:
    """Train the cells whose name holds a part of `wanted` and that nobody has done or begun elsewhere."""
    unseen = {name: windows_of(config, state / "unseen" / name, head) for name in (*SHIFTS, *OLD)}
    (state / "cells").mkdir(exist_ok=True)
    for shift in SHIFTS:
        file = state / "cells" / f"{shift}-stale.json"
        if not file.exists():
            write_json(file, measure(state / "builds" / "stale" / "draft", head, {name: unseen[name] for name in (shift, *OLD)}))
    for cell in ALL_CELLS:
        file = state / "cells" / f"{name_of(cell)}.json"
        if any(part in name_of(cell) for part in wanted.split("|")) and not file.exists():
            write_json(file, train(config, state, cell, head, unseen))
            print(file.read_text(), flush=True)


def pull_cells(config: TideConfig, state: Path, share: float, head: TargetHead) -> None:
    """Measure drafts exported as trained, `share` of the way back to the champion: what training.champion_share makes of them."""
    unseen = {name: windows_of(config, state / "unseen" / name, head) for name in (*SHIFTS, *OLD)}
    champion = config.engine_dir / load_engine_spec(config.engine_dir).champion
    begun = dict(load_draft(champion, head.shape, head.identity).named_parameters())
    (state / PULLED).mkdir(exist_ok=True)
    for cell in ALL_CELLS:
        done, file = state / "cells" / f"{name_of(cell)}.json", state / PULLED / f"{name_of(cell)}.json"
        if cell["budget"] == REFERENCE or file.exists() or not done.exists():
            continue
        folder = state / "drafts" / name_of(cell)
        if json.loads((folder / "provenance.json").read_text())["settings"].get("champion_share", 0.0):
            raise SystemExit(f"{folder} is pulled back already: train it with --set '{{\"champion_share\": 0}}'")
        draft = load_draft(folder, head.shape, head.identity)
        with torch.no_grad():
            for name, p in draft.named_parameters():
                if name != "lm_head.weight":                   # it is not trained
                    p.copy_(p.lerp(begun[name], share).bfloat16())      # as it is stored
        write_json(file, json.loads(done.read_text()) | {"champion_share": share, "pulled_afterwards": True, "unseen": {
            name: accepted(draft, head, unseen[name]) for name in (cell["shift"], *OLD)}})
        print(file.read_text(), flush=True)


def read_cells(state: Path) -> dict[str, Any]:
    """All that was measured so far: trainings, as pulled back where they were, the champion on the same prompts, and what a step costs."""
    def read(name: str) -> Any:
        file = state / name
        return json.loads(file.read_text()) if file.exists() else None

    cells = [found for cell in ALL_CELLS if (found := read(f"{PULLED}/{name_of(cell)}.json") or read(f"cells/{name_of(cell)}.json"))]
    stale = {shift: found for shift in SHIFTS if (found := read(f"cells/{shift}-stale.json"))}
    return {"cells": cells, "stale": stale, "costs": read("costs.json") or {}}


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--state", type=Path, required=True, help="directory for lakes, drafts and cells")
    parser.add_argument("--collect", action="store_true", help="serve and capture")
    parser.add_argument("--costs", action="store_true", help="measure what a step costs")
    parser.add_argument("--cells", metavar="NAMES", help="train these, such as html-60-0|de; a part of a name will do")
    parser.add_argument("--pull", type=float, metavar="SHARE", help="measure drafts exported as trained so much of the way back")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="recovery over training time, as SVG")
    parser.add_argument("--set", default="{}", help="training settings as JSON")
    args = parser.parse_args()
    result = options.settle()
    args.state.mkdir(parents=True, exist_ok=True)
    config = override(load(values={"state_dir": str(args.state)}), {"training": json.loads(args.set)})
    if args.collect:
        collect(config, args.state)
    if args.costs:
        write_json(args.state / "costs.json", step_costs(config, args.state) | {"load_1m": result["machine"]["load_1m"]})
    if args.cells:
        run_cells(config, args.state, args.cells, target_head_of(config))
    if args.pull:
        pull_cells(config, args.state, args.pull, target_head_of(config))
    if args.json or args.plot:
        result |= summarise(read_cells(args.state), SHIFTS, OLD) | {"settings": dataclasses.asdict(config.training)}
        if args.plot:
            plot(result, args.plot)
        options.finish(result, args)


if __name__ == "__main__":
    main()
