"""What made a draft, in sections, and what two differ in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tide_pipeline import provenance
from tide_pipeline.config import project_root
from tide_pipeline.registry.pedigree import differences, pedigree

BORN = {"workload": "de", "parent": "v1-00000000", "settings": {"learning_rate": 0.001, "seed": 3}, "seed": 3, "steps": 9,
        "acceptance_length": 2.5, "shards": {"lake/a.parquet": [0, 2]}, "shard_digests": {"lake/a.parquet": "ab"}, "skipped": {},
        "curve": [{"step": 0}], "digest": "d1", "created_at": 0.5, "git_sha": "abc", "packages": {"torch": "2.13.0"}, "note": "by hand"}


def test_every_fact_has_one_place() -> None:
    found = pedigree(BORN, {"version": 4, "windows": "2", "alias": ""})
    assert found == {
        "draft": {"version": 4, "workload": "de", "digest": "d1", "parent": "v1-00000000", "created_at": "1970-01-01 00:00:00 UTC"},
        "metrics": {"acceptance_length": 2.5, "steps": 9, "windows": "2"},
        "windows": {"lake/a.parquet": {"rows": [0, 2], "digest": "ab"}},
        "settings": {"seed": 3, "learning_rate": 0.001},
        "code": {"git_sha": "abc", "package torch": "2.13.0"},
        "other": {"note": "by hand"}}


def test_only_what_differs_is_told() -> None:
    other = BORN | {"settings": {"learning_rate": 0.002, "seed": 3, "optimizer": "muon"},
                    "shards": {"lake/a.parquet": [0], "lake/b.parquet": [1]}}
    a, b = pedigree(BORN, {}), pedigree(other, {})
    assert differences(a, pedigree(BORN, {})) == {}
    assert differences(a, b) == {
        "windows": {"lake/a.parquet": ({"rows": [0, 2], "digest": "ab"}, {"rows": [0], "digest": "ab"}),
                    "lake/b.parquet": (None, {"rows": [1], "digest": ""})},
        "settings": {"learning_rate": (0.001, 0.002), "optimizer": (None, "muon")}}


def test_older_certificates_are_read() -> None:
    """The shipped champion's has neither shards nor a parent's digest."""
    found = pedigree(json.loads((project_root() / "engines" / "pocket" / "champion" / "provenance.json").read_text()), {})
    assert found["metrics"]["prompts"] == 1331 and found["code"]["package torch"] and "windows" not in found and "other" not in found
    assert pedigree({}, {}) == {}


def test_a_certificate_tells_code_that_was_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tide_pipeline" / "provenance.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(file))

    def code() -> tuple[str, str]:
        provenance._git_sha.cache_clear()
        provenance._git_changes.cache_clear()
        born = provenance.birth_certificate()
        return born["git_sha"], born["git_changes"]

    sha, changes = code()
    assert len(sha) == 40 and changes == ""
    file.write_text("a = 2\n")
    assert code() == code() and code()[0] == sha and len(code()[1]) == 16
    monkeypatch.setenv("PATH", "")                         # an image without git
    assert code() == ("unknown", "")
    monkeypatch.undo()
    code()
