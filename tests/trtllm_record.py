"""The record of what was read of NVIDIA's files: docs/trtllm-source-check.json. `python -m tests.trtllm_record` takes over changed facts.

A fact that changed loses where it was read: whoever changes it reads it again and says so in the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tide_pipeline.engine.trtllm.facts import LINES, Fact, Layout, load_table

RECORD = Path(__file__).parent.parent / "docs" / "trtllm-source-check.json"


def fingerprint(fact: Fact | Layout) -> str:
    """Of all that is checked; the words about it don't count."""
    told = repr(fact) if isinstance(fact, Layout) else repr(
        (fact.name, fact.kind, fact.module, fact.public_name, sorted(fact.fields.items()), fact.absent, fact.signature, fact.returns,
         fact.contains, *(fingerprint(other) for other in fact.others)))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def take_over() -> list[str]:
    """Names of the facts that were not, or no longer, those that were read."""
    record, changed = json.loads(RECORD.read_text()), []
    for line in LINES:
        table, entries = load_table(line), record["lines"][line]["facts"]
        now = {**{fact.name: fingerprint(fact) for fact in table.facts}, "[layout]": fingerprint(table.layout)}
        for name in [name for name in now if entries.get(name, {}).get("fingerprint") != now[name]]:
            entries[name] = {"fingerprint": now[name], "read_in": []}
            changed.append(f"{line} {name}")
        record["lines"][line]["facts"] = {name: entries[name] for name in now}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return changed


if __name__ == "__main__":
    print("\n".join(take_over()) or "nothing changed")
