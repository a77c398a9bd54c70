"""What a draft version was worth when it was promoted, kept for good. Knows no log; early.py finds it there.

An early life that is complete is noted under `<state>/drift/`: later processes need not look for it in the log, and a draft that outlives
the log's retention keeps the acceptance it was promoted with: against what is left of the log, slow decay would not be seen. Rates only,
nothing of requests or tenants.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import from_dict
from tide_pipeline.drift.rates import RateEstimate
from tide_pipeline.provenance import write_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Early:
    """Early life of a draft on one workload, or of all it served then."""

    estimate: RateEstimate
    until: float                   # Unix seconds of its last row
    is_complete: bool


@dataclass(frozen=True, slots=True)
class EarlyLife:
    """Of one draft version. A workload that was not served then has no entry of its own."""

    overall: Early | None = None
    by_workload: Mapping[str, Early] | None = None

    def of(self, workload: str) -> Early | None:
        """What `workload` is compared with: its own early life, or that of everything where it came later."""
        return (self.by_workload or {}).get(workload, self.overall)

    @property
    def is_final(self) -> bool:
        """Nothing that is logged later changes it."""
        everyone = [self.overall, *(self.by_workload or {}).values()]
        return all(early is not None and early.is_complete for early in everyone)

    @property
    def waits_for(self) -> list[str] | None:
        """Workloads whose later rows can still count; None while those of every workload can."""
        if self.overall is None or not self.overall.is_complete:
            return None
        return [workload for workload, early in (self.by_workload or {}).items() if not early.is_complete]


def noted(config: TideConfig, version: str, steps: int) -> EarlyLife | None:
    """The early life of `steps` drafted steps that was noted for this lake; None where there is none, or none that can be read."""
    path = _path(config, version, steps)
    try:
        values = json.loads(path.read_text())
        if values["log"] != str(config.state.acceptance):
            return None
        return EarlyLife(_early(values["overall"]), {workload: _early(early) for workload, early in values["by_workload"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("can't read %s, looking into the log instead: %r", path, error)
        return None


def note(config: TideConfig, version: str, steps: int, life: EarlyLife) -> None:
    """Keep a final life. A disk that refuses costs the next process a look, no more."""
    assert life.is_final, "a life that can still change must not be kept"
    try:
        write_json(_path(config, version, steps), {"log": str(config.state.acceptance), "draft_version": version,
                                                   **dataclasses.asdict(life)})
    except OSError as error:
        _log.warning("can't note the early life of %s: %s", version, error)


def _early(values: dict[str, object]) -> Early:
    early = from_dict(Early, values)
    assert isinstance(early.estimate, RateEstimate)
    return early


def _path(config: TideConfig, version: str, steps: int) -> Path:
    return config.state.drift / quote(config.target, safe="") / f"{quote(version, safe='')}-{steps}.json"
