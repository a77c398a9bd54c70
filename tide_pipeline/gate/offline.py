"""First door of the gate: champion and challenger replayed over the same held-out windows. Knows no engine and no verdict.

Acceptance lengths are per simulated verification step (training/acceptance.py says how a window is walked). The interval of
the gain comes from a bootstrap that draws whole prompts: steps of one request are not independent, nor are requests that
repeat a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.config import GateSettings, TideConfig
from tide_pipeline.contracts import EngineBuild, PairedAcceptance, SignalWindow
from tide_pipeline.errors import NotEnoughSignals
from tide_pipeline.gate.judge import BENCHED
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.acceptance import Head, Replay, replay
from tide_pipeline.training.data import find_windows, held_out_windows, read_fitting
from tide_pipeline.training.target_head import TargetHead, target_head_of

SAMPLED = " (sampled)"             # suffix of a workload's windows with temperature > 0, where it also has greedy ones

Cluster = tuple[str, bool, str]    # workload, sampled or greedy, prompt digest


def by_prompt(replays: Iterable[Replay]) -> dict[Cluster, Replay]:
    """Windows of one prompt, added up."""
    found: dict[Cluster, Replay] = {}
    for one in replays:
        cluster = one.workload, one.temperature > 0, one.prompt_digest
        found[cluster] = found[cluster] + one if cluster in found else one
    return found


def paired_acceptance(champion: Eagle3Draft, challenger: Eagle3Draft, head: Head, states: Sequence[WindowStates],
                      settings: GateSettings, focus_workload: str, seed: int = 0) -> PairedAcceptance:
    """`compare` of two drafts, replayed over the same windows."""
    a, b = (replay(draft, head, states, settings.draft_length) for draft in (champion, challenger))
    return compare(a, b, settings, focus_workload, seed)


def compare(champion: Iterable[Replay], challenger: Iterable[Replay], settings: GateSettings, focus_workload: str,
            seed: int = 0) -> PairedAcceptance:
    """The gain on the drifted workload with its 95 % interval, and the same for every other workload.

    Both hold the same windows. Greedy ones count; a workload's sampled ones are listed beside them, and stand in where it has no
    greedy ones.

    Raises:
        NotEnoughSignals: no held-out request of the drifted workload is long enough to hold a step.
    """
    a, b = by_prompt(champion), by_prompt(challenger)
    by_workload = {name: _compare(a, b, ids, settings.bootstrap, seed) for name, ids in sorted(_groups(a).items())}
    if focus_workload not in by_workload:
        raise NotEnoughSignals(f"no held-out request of workload {focus_workload!r} has 3 or more generated tokens "
                               f"(held-out workloads: {', '.join(by_workload) or 'none'}): capture more before judging a draft")
    focus = by_workload[focus_workload]
    return PairedAcceptance(focus["champion"], focus["challenger"], focus["gain"], focus["gain_low"], focus["gain_high"],
                            int(focus["prompts"]), int(focus["rows"]), by_workload)


def held_out_states(config: TideConfig, workload: str, *, focus_since: float = 0.0) -> tuple[TargetHead, list[WindowStates]]:
    """What no draft may have been trained on: up to `gate.windows` held-out windows of each workload, and the target's head.

    Raises:
        NotEnoughSignals, EngineMismatch: as for training.
    """
    head = target_head_of(config)
    return head, read_fitting(windows_to_judge_on(config, head, workload, focus_since), head)


def windows_to_judge_on(config: TideConfig, head: TargetHead, workload: str, focus_since: float) -> list[SignalWindow]:
    """Those windows as they lie in the lake now. Raises NotEnoughSignals, EngineMismatch."""
    return held_out_windows(find_windows(config, workload, head.digest, focus_since=focus_since), config.gate.windows)


def load_built(head: TargetHead, build: EngineBuild) -> Eagle3Draft:
    """The draft of a build, where the head is. Raises CheckpointError, EngineMismatch when it can't be loaded on this engine."""
    return load_draft(Path(build.path) / "draft", head.shape, head.identity).to(head.embedding_VD.device)


def replay_device(config: TideConfig, backend: str) -> str:
    """Where drafts are replayed. With the head of a target that fills serving GPUs a core takes hours: the training GPU, where one is."""
    wanted = torch.device(next(iter(config.training.train_devices), config.training.device))
    is_there = wanted.type == "cuda" and (wanted.index or 0) < torch.cuda.device_count()
    return str(wanted) if is_there and backend not in BENCHED else "cpu"


def _groups(clusters: Iterable[Cluster]) -> dict[str, list[Cluster]]:
    """Workload -> its prompts, sampled ones apart where there are greedy ones too."""
    clusters = list(clusters)
    with_greedy = {workload for workload, is_sampled, _ in clusters if not is_sampled}
    groups: dict[str, list[Cluster]] = {}
    for cluster in clusters:
        workload, is_sampled, _ = cluster
        groups.setdefault(workload + SAMPLED if is_sampled and workload in with_greedy else workload, []).append(cluster)
    return groups


def _compare(a: Mapping[Cluster, Replay], b: Mapping[Cluster, Replay], prompts: Sequence[Cluster], draws: int,
             seed: int) -> dict[str, float]:
    champions, challengers = [a[p] for p in prompts], [b[p] for p in prompts]
    chosen_SP = np.random.default_rng(seed).integers(0, len(prompts), (draws, len(prompts)))
    champion, challenger = _steps(champions), _steps(challengers)
    gains_S = _length(challenger, chosen_SP) - _length(champion, chosen_SP)
    everyone_P = np.arange(len(prompts))
    low, high = np.quantile(gains_S, (0.025, 0.975))
    was, now = float(_length(champion, everyone_P)), float(_length(challenger, everyone_P))
    gain, wider = now - was, few_prompts(len(prompts))
    return {"champion": was, "challenger": now, "gain": gain,
            "gain_low": gain + (float(low) - gain) * wider, "gain_high": gain + (float(high) - gain) * wider,
            "champion_first_position": first_position(champions), "challenger_first_position": first_position(challengers),
            "prompts": float(len(prompts)), "rows": float(sum(r.rows for r in champions))}


def few_prompts(prompts: int) -> float:
    """How much wider than the bootstrap's percentiles a 95 % interval must be: 1.28 for 8 prompts, 1.01 for 100.

    Resampling n prompts shows (n-1)/n of their variance, and an estimate of it from n calls for Student's t in place of the normal
    quantile z (its expansion in 1/(n-1)). Without this a gate with 8 prompts lets 6 to 7 % of equal drafts through.
    """
    z, free = 1.959964, max(prompts - 1, 1)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(t / z * np.sqrt((free + 1) / free))


def first_position(replays: Iterable[Replay]) -> float:
    """Share of steps that accepted the first drafted token."""
    found = list(replays)
    return sum(r.accepted[0] for r in found) / max(sum(r.steps for r in found), 1)


def _steps(replays: Sequence[Replay]) -> NDArray[np.float64]:
    """[2, P]: accepted tokens and steps of each prompt."""
    return np.array([[sum(r.accepted) for r in replays], [r.steps for r in replays]], dtype=np.float64)


def _length(steps_2P: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Acceptance length over the chosen prompts (last axis): per step, not per prompt."""
    accepted, steps = steps_2P[:, chosen].sum(-1)
    lengths: NDArray[np.float64] = 1.0 + accepted / steps
    return lengths
