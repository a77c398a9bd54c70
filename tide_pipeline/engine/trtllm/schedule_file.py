"""The draft lengths that were learned for a build, beside its draft. Knows the file and what a server can take of it; learns nothing.

    <build>/schedule.json     {"schedule": {"8": 3, "64": 1}, "learned": where it comes from}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tide_pipeline.engine.trtllm.schedule import as_schedule
from tide_pipeline.errors import BuildError
from tide_pipeline.provenance import write_json

FILE = "schedule.json"


def write_schedule(build: Path, schedule: Mapping[int, int], learned: Mapping[str, Any]) -> None:
    """Of a schedule {largest batch: length}; its origin goes with it."""
    write_json(build / FILE, {"schedule": {str(batch): length for batch, length in schedule.items()}, "learned": dict(learned)})


def read_schedule(build: Path) -> dict[int, int]:
    """{} where the build has none. Raises BuildError for a file that is none of ours."""
    try:
        return {int(batch): int(length) for batch, length in json.loads((build / FILE).read_text())["schedule"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(f"{build / FILE} can't be read ({error}): make the build again with `tide build`") from error


def fitting(schedule: Mapping[int, int], longest: int, max_batch: int) -> dict[int, int]:
    """For a server with other limits than the one that it was learned for: shorter drafts, more or fewer requests in a step."""
    if not schedule:
        return {}
    clipped = {batch: min(length, longest) for batch, length in sorted(schedule.items())}
    above = next((length for batch, length in clipped.items() if batch >= max_batch), list(clipped.values())[-1])
    return as_schedule({**{batch: length for batch, length in clipped.items() if batch < max_batch}, max_batch: above})
