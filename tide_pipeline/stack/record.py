"""`<state>/stack.json`: what is up, where, and as which processes. Knows the file; starts and stops nothing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from tide_pipeline.config import StatePaths
from tide_pipeline.errors import StackError
from tide_pipeline.provenance import write_json
from tide_pipeline.stack.processes import ProcessRef, find


@dataclass(frozen=True)
class StackRecord:
    """One local stack. `urls`: triton, triton_grpc (host:port), triton_metrics, mlflow, dagster, dagster_code (host:port)."""

    stack_id: str
    target: str
    config_file: str
    started_at: float
    urls: dict[str, str]
    processes: tuple[ProcessRef, ...]
    ready: bool = False

    def dead(self) -> list[ProcessRef]:
        """Processes that have ended."""
        return [ref for ref in self.processes if find(ref) is None]

    def is_up(self) -> bool:
        """Ready, with every process there."""
        return self.ready and bool(self.processes) and not self.dead()


def save(state: StatePaths, record: StackRecord) -> None:
    write_json(state.root / "stack.json", dataclasses.asdict(record))


def load(state: StatePaths) -> StackRecord | None:
    """None when no stack was started here, or it was stopped. Raises StackError for a file that is not ours."""
    file = state.root / "stack.json"
    try:
        raw = json.loads(file.read_text())
        return StackRecord(**{**raw, "processes": tuple(ProcessRef(**ref) for ref in raw["processes"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StackError(f"{file} can't be read ({error}): stop what it started by hand, then remove it") from error


def forget(state: StatePaths) -> None:
    (state.root / "stack.json").unlink(missing_ok=True)


def need(state: StatePaths) -> StackRecord:
    """The running stack. Raises StackError that says what to do."""
    record = load(state)
    if record is None:
        raise StackError(f"no stack is up in {state.root}: start it with `tide up`")
    dead = record.dead()
    if dead:
        raise StackError(f"the stack in {state.root} is not whole, {', '.join(ref.name for ref in dead)} ended "
                         f"(log: {dead[0].log}): start it again with `tide up`")
    if not record.ready:
        raise StackError(f"the stack in {state.root} is still starting: wait, or `tide down` and `tide up`")
    return record
