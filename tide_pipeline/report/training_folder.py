"""What the records of one training tell of its time, `training/<run>/`. Knows files; knows no builds and no period.

    request.json, settings.toml   what it was asked for, of which target, on how many devices; `tide train` leaves no request
    draft/checkpoint.json         there is a draft; draft/provenance.json has its seconds and curve, registered.json its version
    draft/metrics.jsonl           seconds of training up to the last evaluation or snapshot, earlier attempts included
    draft/progress.json           the trainer's last word: when, and how much of its budget it had used
    marks.json                    when Dagster began the last attempt

All of them stay when builds and weights go. A training without a draft failed, was killed or still goes; what it did after its last word
no file knows, so the seconds told of it are the least it took.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tide_pipeline.config import TideConfig
from tide_pipeline.provenance import read_record

BY_HAND = "by hand"


@dataclass(frozen=True)
class TrainingFolder:
    """Records are {} where they are not there or can't be read."""

    path: Path

    @cached_property
    def request(self) -> Mapping[str, Any]:
        return read_record(self.path / "request.json")

    @cached_property
    def checkpoint(self) -> Mapping[str, Any]:
        return read_record(self.path / "draft" / "checkpoint.json")

    @cached_property
    def progress(self) -> Mapping[str, Any]:
        return read_record(self.path / "draft" / "progress.json")

    @cached_property
    def build(self) -> Mapping[str, Any]:
        return read_record(self.path / "build.json")

    @cached_property
    def marks(self) -> dict[str, float]:
        record = read_record(self.path / "marks.json")
        return {name: at for name in record if (at := number(record, name))}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        try:
            return tomllib.loads((self.path / "settings.toml").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def certificate(self) -> Mapping[str, Any]:
        """The draft's, with its curve; {} without a draft, or where it tells no time."""
        found = read_record(self.path / "draft" / "provenance.json") if self.digest else {}
        return found if number(found, "created_at") and "train_s" in found else {}

    @property
    def target(self) -> str:
        """"" where nothing tells."""
        return str(self.checkpoint.get("target") or self.build.get("target") or self.settings.get("engine") or "")

    @property
    def digest(self) -> str:
        """Of the draft; "" without one."""
        return str(self.checkpoint.get("digest", ""))

    @cached_property
    def draft_version(self) -> str:
        """As MLflow calls it, or its build; "" where it reached neither."""
        return str(read_record(self.path / "registered.json").get("draft_version") or self.build.get("draft_version") or "")

    @property
    def run(self) -> str:
        """As Dagster's UI shows it."""
        return f"run {self.path.name[:8]}" if self.request else BY_HAND

    @property
    def devices(self) -> int:
        training = self.settings.get("training")
        return max(1, len(training.get("train_devices", ()))) if isinstance(training, Mapping) else 1

    @property
    def least_s(self) -> float:
        """Seconds of a training without a draft: the most that one of its files tells. 0 where none does."""
        share, left = number(self.progress, "share"), number(self.progress, "time_left_s")
        by_share = left * share / (1 - share) if 0 < share < 1 else 0.0    # the trainer says what is left at the pace so far
        begun, last_word = self.marks.get("begun", 0.0), number(self.progress, "at")
        return max(by_share, self._on_curve_s(), last_word - begun if begun and last_word else 0.0)

    @property
    def last_heard(self) -> float:
        """Unix seconds: of the trainer's last word, else of the last mark, else of the last record."""
        written = (file.stat().st_mtime for file in self.path.glob("*.json"))
        return number(self.progress, "at") or max(self.marks.values(), default=0.0) or max(written, default=0.0)

    def _on_curve_s(self) -> float:
        try:
            last = (self.path / "draft" / "metrics.jsonl").read_text().rstrip().rpartition("\n")[2]
            return number(json.loads(last), "elapsed_s")
        except (OSError, ValueError):
            return 0.0


def training_folders(config: TideConfig) -> list[TrainingFolder]:
    """Of the target, and those that don't tell whose they are. Folders in which nothing was trained are passed over."""
    folders = [TrainingFolder(path) for path in sorted(config.state.training.glob("*/"))]
    return [f for f in folders if ("begun" in f.marks or f.progress or f.checkpoint) and f.target in ("", config.target)]


def number(record: Mapping[str, Any], name: str) -> float:
    """0 where it is none."""
    found = record.get(name) if isinstance(record, Mapping) else None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else 0.0
