"""`tide doctor`: exit codes, JSON that parses, words that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.trtllm_stand_in import write_stand_in
from tide_pipeline.cli import app
from tide_pipeline.stack.doctor import checks
from tide_pipeline.stack.doctor.checks import Asked, examine
from tide_pipeline.stack.doctor.finding import Finding


def doctor(*words: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *words])


def test_a_true_tree_passes_and_a_changed_one_fails(tmp_path: Path) -> None:
    write_stand_in(tmp_path, "1.2")
    passed = doctor("--trtllm-source", str(tmp_path))
    assert passed.exit_code == 0 and "1.2.1, held against the facts of line 1.2" in passed.output
    file = tmp_path / "tensorrt_llm" / "_torch" / "speculative" / "eagle3.py"
    file.write_text(file.read_text().replace("hidden_states: Any", "states: Any", 1))
    failed = doctor("--trtllm-source", str(tmp_path))
    assert failed.exit_code == 1 and "no field hidden_states" in failed.output and "1 failure" in failed.output


def test_json_is_findings(tmp_path: Path) -> None:
    write_stand_in(tmp_path, "1.3")
    told = doctor("--json", "--trtllm-source", str(tmp_path))
    assert told.exit_code == 0
    findings = json.loads(told.stdout)
    assert {finding["state"] for finding in findings} == {"ok"} and set(findings[0]) == {"name", "state", "found", "todo"}


def test_without_tensorrt_llm_it_says_so() -> None:
    told = doctor()
    assert told.exit_code == 0 and "not installed in this Python" in told.output


def test_a_folder_without_it_is_a_failure_not_a_traceback(tmp_path: Path) -> None:
    told = doctor("--trtllm-source", str(tmp_path))
    assert told.exit_code == 1 and "name a checkout of NVIDIA/TensorRT-LLM" in told.output


def test_help_teaches() -> None:
    text = " ".join(doctor("--help").output.split())
    assert "parsed, never imported" in text and "Exit code 1" in text


def test_a_check_that_can_t_be_made_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(asked: Asked) -> list[Finding]:
        raise OSError("no such device")

    monkeypatch.setitem(checks.CHECKS, "device", broken)
    assert list(examine(Asked()))[-1] == Finding("device", "fail", "no such device", "put that right and run tide doctor again")
