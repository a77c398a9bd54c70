"""A period of the past that a draft is to be trained on. Knows times in UTC; knows no lake and no draft.

    Span.of("2026-11-20T09:00", "2026-11-20T12:00")     from the first to just before the second; "" leaves an end open
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from tide_pipeline.errors import InvalidRequest


@dataclass(frozen=True)
class Span:
    """Unix seconds; windows closed at `since` or later, and before `until`."""

    since: float = 0.0
    until: float = math.inf

    @classmethod
    def of(cls, since: str, until: str, now: float | None = None) -> Span:
        """Of two times in ISO 8601; one without an offset is UTC. Raises InvalidRequest when nothing can have been captured then."""
        span = cls(_moment(since, "since") if since else 0.0, _moment(until, "until") if until else math.inf)
        if span.since >= span.until:
            raise InvalidRequest(f"since {since} is not before until {until}: exchange them, or leave one out")
        if span.since > (time.time() if now is None else now):
            raise InvalidRequest(f"since {since} (UTC) is in the future, nothing can have been captured then: is it local time? Add its "
                                 "offset, such as +01:00")
        return span

    @property
    def is_all(self) -> bool:
        return self == Span()

    def __contains__(self, moment: float) -> bool:
        return self.since <= moment < self.until

    def __str__(self) -> str:
        """For people, and for errors."""
        named = [f"{word} {text}" for word, text in zip(("since", "until"), self.texts, strict=True) if text]
        return " ".join(named) or "at any time"

    @property
    def texts(self) -> tuple[str, str]:
        """As `of` reads them; the same text for the same period."""
        return tuple(_text(at) if 0 < at < math.inf else "" for at in (self.since, self.until))  # type: ignore[return-value]

    @property
    def facts(self) -> dict[str, str]:
        """For certificates and tags; {} where any time will do."""
        return {name: text for name, text in zip(("captured_since", "captured_until"), self.texts, strict=True) if text}


ALWAYS = Span()


def _moment(text: str, name: str) -> float:
    try:
        read = datetime.fromisoformat(text.strip())
        return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name} {text!r} is no time: write it as 2026-11-20T09:00 (UTC)") from error


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
