"""docs/signals.md tells the truth: its examples run on a lake that we wrote, and it names every column."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import pytest

from tests.fakes_capture import FakeEngine, make_recorder
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA

DOC = (Path(__file__).parents[2] / "docs" / "signals.md").read_text()


@pytest.fixture(autouse=True)
def _lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make_recorder(tmp_path / ".tide" / "lake")
    FakeEngine(recorder).run("r")
    recorder.close()
    monkeypatch.chdir(tmp_path)


def test_sql_examples() -> None:
    answers = [duckdb.sql(text).fetchall() for text in re.findall(r"```sql\n(.*?)```", DOC, re.S)]
    assert answers[0] == [("prose", "v1", 1.0, 3.0)]
    assert answers[1][0][:3] == ("prose", 1, 13)


def test_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    exec(code, {})
    assert capsys.readouterr().out == "r 0 14 (13, 3, 4)\n"


@pytest.mark.parametrize("column", sorted({*ACCEPTANCE_SCHEMA.names, *SIGNALS_SCHEMA.names}))
def test_every_column_is_explained(column: str) -> None:
    assert re.search(rf"^\|.*`{column}`", DOC, re.M)
