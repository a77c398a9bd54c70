"""One thing that was looked at: how it is, and what to do next. Knows no check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`fail`: it will not work; `warn`: it works with something missing. Both say what to do next."""

    name: str                          # what was looked at, as "group: thing"
    state: State
    found: str                         # what is there
    todo: str = ""                     # the next step of whoever reads this; empty when all is well

    def __post_init__(self) -> None:
        assert self.todo or self.state == "ok", f"{self.name}: a finding that is not ok says what to do next"


def exit_code(findings: Iterable[Finding]) -> int:
    return int(any(finding.state == "fail" for finding in findings))


def summary(findings: Sequence[Finding]) -> str:
    """One line, such as "22 checked: 20 ok, 1 warning, 1 failure"."""
    bad = {state: sum(finding.state == state for finding in findings) for state in ("warn", "fail")}
    words = [f"{count} {word}{'s' * (count != 1)}" for count, word in ((bad["warn"], "warning"), (bad["fail"], "failure")) if count]
    return f"{len(findings)} checked: {', '.join([f'{len(findings) - sum(bad.values())} ok', *words])}"
