"""What a report page shows, as plain values. Knows neither files nor HTML. Whatever is left empty gets no section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tide_pipeline.contracts import Deployment, DriftVerdict, GateVerdict
from tide_pipeline.drift.series import Bucket
from tide_pipeline.report.savings import Savings


@dataclass(frozen=True)
class Span:
    """Something that took a while, from one Unix time to another."""

    begin: float
    end: float
    label: str


@dataclass(frozen=True)
class Drift:
    """What an adaptation was launched for."""

    at: float                      # Unix seconds of the first verdict that said so
    workload: str
    draft_version: str             # that was trained for it
    reason: str


@dataclass(frozen=True)
class Trained:
    """One training, and what it cost. Lengths are acceptance lengths on held-out requests, 0 where none was measured."""

    draft_version: str             # "" where it left no draft
    ended: float                   # Unix seconds; without a draft when it was last heard of
    seconds: float                 # of the training devices together; without a draft at least
    rows: int
    start_length: float
    length: float
    began: float
    without_draft: str = ""        # which run it was and what it was doing last


@dataclass(frozen=True)
class ReportData:
    """One page.

    A phase has any of: name, text, prompts, acceptance_length, tokens_per_s, plain_tokens_per_s, speedup, speedup_low, speedup_high,
    speedup_fixed, and splits: a list of the same (looping / non-looping, greedy / temperature 0.8).
    A training point has elapsed_s and either loss or acceptance_length, as in a draft's metrics.jsonl.
    """

    title: str = "tide_pipeline"
    headline: str = ""                                                     # made from the phases where it is empty
    since: float | None = None                                             # Unix seconds; from the series where they are None
    until: float | None = None
    phases: Sequence[Mapping[str, Any]] = ()
    series: Sequence[Bucket] = ()
    marks: Sequence[tuple[float, str]] = ()                                # moments: phases, drift, rollouts
    spans: Sequence[Span] = ()                                             # training runs
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)      # draft version -> points
    stages_s: Mapping[str, float] = field(default_factory=dict)            # seconds by stage, in order
    drifts: Sequence[Drift] = ()
    verdicts: Sequence[DriftVerdict] = ()                                  # at the end of the period
    trainings: Sequence[Trained] = ()
    untimed_trainings: int = 0                                             # of the period that left no record of their seconds
    savings: Savings | None = None
    gates: Sequence[GateVerdict] = ()
    deployments: Sequence[Deployment] = ()
    versions: Mapping[str, str] = field(default_factory=dict)              # build id -> draft version
    facts: Mapping[str, str] = field(default_factory=dict)                 # machine, packages, settings
