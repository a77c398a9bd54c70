"""What the soak of the loop plays: domains in turn, faults at moments, bars. Data only; starts and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shift:
    """All traffic asks in one domain for at least so long; it goes on, up to twice that, while an adaptation is under way."""

    domain: str
    seconds: float
    recurring: bool = False            # traffic was in this domain before


@dataclass(frozen=True)
class Fault:
    """SIGKILL to every process of these roles (inject.py), so many seconds into a shift.

    `training`: into the first training in that shift or a later one; whether a shift needs one is not known before.
    """

    roles: tuple[str, ...]
    shift: int                         # its place in the plan
    after_s: float
    training: bool = False

    @property
    def name(self) -> str:
        return self.roles[0]

    @property
    def is_serving(self) -> bool:
        """Whether requests go through what is killed."""
        return bool({"supervisor", "triton", "engine", "front"} & set(self.roles))


@dataclass(frozen=True)
class Bars:
    """What must hold. Seconds, MB and shares."""

    shifts: int = 6
    seconds: float = 3600.0
    everything_else_s: float = 20.0    # of an adaptation without a fault in it: all but collect, train and bake
    rss_growth_mb: float = 96.0        # of a process, from the second quarter of its samples to the last; or rss_growth of it
    rss_growth: float = 0.20
    clean_adaptations: int = 1         # without a fault in them, so that the bar above says something
    signals_over: float = 1.5          # times retention.signal_gb: what is captured between two rounds of maintenance comes on top
    drafts_mb: float = 200.0           # per training that was launched: its folder, the registry's copy, the build
    rest_mb_per_h: float = 300.0       # logs, Dagster's storage, the acceptance log


@dataclass(frozen=True)
class Plan:
    """A soak."""

    shifts: tuple[Shift, ...]
    faults: tuple[Fault, ...]
    values: Mapping[str, Any]          # settings on top of the recipe pocket_demo
    concurrency: int
    most_s: float                      # no new shift begins after this
    maintain_every_s: float            # retain_lake, compact_lake and tidy_builds: what is a day's work is done several times
    sample_s: float = 10.0
    bars: Bars = Bars()


MLFLOW = ("mlflow", "mlflow_worker")


def full() -> Plan:
    """About 65 minutes: eight shifts over five domains, three of them back to one that was there before; nine faults."""
    domains = ("html", "py", "de", "html", "c", "en", "py", "de")
    turns, seen = [Shift("en", 240.0)], {"en"}
    for domain in domains:
        turns.append(Shift(domain, 430.0, domain in seen))
        seen.add(domain)
    faults = (Fault(("trainer",), 2, 30.0, training=True), Fault(("run_worker",), 3, 20.0, training=True),
              Fault(MLFLOW, 4, 20.0), Fault(("dagster_daemon",), 4, 200.0), Fault(("dagster_code",), 5, 30.0), Fault(("engine",), 5, 240.0),
              Fault(("front",), 6, 60.0), Fault(("supervisor",), 6, 200.0), Fault(("triton",), 7, 150.0))
    return Plan(tuple(turns), faults, {"retention": {"signal_gb": 1.5}}, concurrency=4, most_s=4_300.0, maintain_every_s=480.0)


def quick() -> Plan:
    """Some ten minutes: two shifts, one of them back, five faults; drafts too short and a gate too loose to prove anything."""
    turns = (Shift("en", 60.0), Shift("html", 240.0), Shift("en", 90.0, recurring=True))
    faults = (Fault(("trainer",), 1, 15.0, training=True), Fault(("front",), 2, 5.0), Fault(MLFLOW, 2, 12.0),
              Fault(("engine",), 2, 20.0), Fault(("dagster_daemon",), 2, 50.0))
    values = {"drift": {"min_signal_rows": 8_000, "min_steps": 100, "min_drop": 0.03}, "retention": {"signal_gb": 0.3},
              "training": {"time_budget_s": 40.0, "eval_share": 0.2},
              "gate": {"min_gain": -0.5, "min_prompts": 3, "max_workload_loss": 1.0, "min_speedup_ratio": 0.5, "bench_prompts": 4,
                       "bench_tokens": 32, "equivalence_prompts": 6},
              "rollout": {"bake_s": 3.0, "min_bake_steps": 10, "max_drop": 0.3}}
    return Plan(turns, faults, values, concurrency=4, most_s=900.0, maintain_every_s=150.0,
                bars=Bars(shifts=2, seconds=300.0, clean_adaptations=0))
