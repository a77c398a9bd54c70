"""`tide`: help that teaches, JSON that parses, errors in one line, settings from where they should come."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from tests.helpers import write_tiny_engine
from tide_pipeline import recipes
from tide_pipeline.cli import app
from tide_pipeline.cli.app import ORDER, Choice, hoist, parse_value
from tide_pipeline.cli.traffic import Fitter, Tally
from tide_pipeline.config import StatePaths
from tide_pipeline.contracts import Deployment, GenerationRequest, ObservedState
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.errors import InvalidRequest, SettingsError
from tide_pipeline.serve.client import GenerationResult
from tide_pipeline.stack import record
from tide_pipeline.stack.local import LocalStack


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIDE_CONFIG", "TIDE_MLFLOW_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def state(tmp_path: Path) -> StatePaths:
    return StatePaths(tmp_path / "state")


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """engines/ with a tiny target and two prompts of domain "ab"."""
    folder = write_tiny_engine(tmp_path / "engines")
    (folder / "prompts").mkdir()
    (folder / "prompts" / "ab.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "' + "long " * 60 + 'end"}\n')
    return folder.parent


def tide(*words: str, state: StatePaths | None = None) -> Result:
    return CliRunner().invoke(app, [*words, *(["--state", str(state.root)] if state else [])])


def plain(result: Result) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


# --- help ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ORDER)
def test_every_command_teaches_with_an_example(command: str) -> None:
    result = tide(command, "--help")
    assert result.exit_code == 0 and f"tide {command}" in plain(result).removeprefix(f"Usage: tide {command}"), plain(result)


def test_help_lists_all_commands_in_the_order_of_the_loop() -> None:
    text = plain(tide("--help"))
    assert [command for command in re.findall(r"\b(\w+)\b", text) if command in ORDER]
    places = [re.search(rf" {command} [A-Z]", text) for command in ORDER]
    assert all(places) and [m.start() for m in places if m] == sorted(m.start() for m in places if m)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "mlflow", "dagster", "duckdb", "pyarrow", "psutil", "httpx", "matplotlib")
    script = f"import sys; import tide_pipeline.cli; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- settings -----------------------------------------------------------------------------------------------------

def test_config_prints_what_config_reads(tmp_path: Path, state: StatePaths) -> None:
    shown = tide("config", "--set", "drift.min_drop=0.25", "--set", "training.optimizer=muon", state=state)
    assert shown.exit_code == 0, shown.output
    assert tomllib.loads(shown.stdout)["drift"]["min_drop"] == 0.25 and tomllib.loads(shown.stdout)["training"]["optimizer"] == "muon"
    (tmp_path / "mine.toml").write_text(shown.stdout)
    again = tide("config", "--config", str(tmp_path / "mine.toml"))
    assert again.stdout == shown.stdout
    short = json.loads(tide("config", "--json", "--recipe", "pocket_ci").stdout)
    assert short["training"]["time_budget_s"] == recipes.load("pocket_ci").training.time_budget_s


def test_shared_options_stand_anywhere() -> None:
    assert hoist(["up", "--json", "--set", "a.b=1", "--state=x", "--debug"]) == ["--set", "a.b=1", "--state=x", "--debug", "up", "--json"]
    assert hoist(["sql", "--", "--state", "x"]) == ["sql", "--", "--state", "x"]


@pytest.mark.parametrize(("words", "said"), [
    (("config", "--set", "drift.min_drp=0.2"), "unknown key 'min_drp', did you mean 'min_drop'?"),
    (("config", "--set", "drift.min_drop"), "expected key=value"),
    (("config", "--set", "drift.min_drop=high"), "settings.drift.min_drop: expected float"),
    (("config", "--recipe", "pocket_tpu"), "no recipe 'pocket_tpu'; there are: pocket_cpu"),
    (("config", "--config", "nowhere.toml"), "no settings file at nowhere.toml"),
    (("traffic",), "either --prompts FILE.jsonl or --domain NAME"),
    (("traffic", "--domain", "en"), "start it with `tide up`"),
    (("traffic", "--domain", "en", "--to", "de"), "leave out --to, or choose --scenario abrupt"),
    (("traffic", "--domain", "en", "--scenario", "abrupt"), "say to which with --to NAME"),
    (("traffic", "--domain", "en", "--scenario", "gradual", "--to", "en"), "got en to en: name each once"),
    (("traffic", "--domain", "en", "--scenario", "gradual", "--to", "de", "--to", "c"), "one other domain, got de, c"),
    (("down",), "no stack is up"),
    (("build",), "either --version N or --draft DIR"),
    (("build", "--draft", "nowhere"), "nowhere is no draft checkpoint"),
    (("register", "nowhere"), "nowhere is no draft checkpoint"),
    (("gate", "0123456789abcdef"), "is missing or incomplete"),
    (("rollout", "../../etc"), "is no build id"),
    (("rollback", "--reason", "test"), "nothing of pocket was ever deployed"),
    (("sql", "drop table requests"), "one statement that reads"),
    (("sql", "select nothing"), "views: acceptance"),
    (("sql", "select 1", "--json", "--csv"), "not both"),
])
def test_errors_are_one_line_and_exit_code_2(words: tuple[str, ...], said: str, state: StatePaths) -> None:
    result = tide(*words, state=state)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and said in result.stderr, result.output
    assert "Traceback" not in result.output and result.stdout == ""


def test_a_file_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    result = CliRunner().invoke(app, ["status", "--state", str(tmp_path / "a")])
    assert result.exit_code == 2 and "Invalid value for '--state'" in result.stderr and "Traceback" not in result.output


def test_debug_shows_the_traceback(state: StatePaths) -> None:
    assert isinstance(tide("--debug", "config", "--set", "nonsense", state=state).exception, SettingsError)


def test_values_are_toml_and_bare_words() -> None:
    assert parse_value("a.b=[1, 2]") == {"a": {"b": [1, 2]}} and parse_value("x=true") == {"x": True}
    assert parse_value("serve.device=cuda:0") == {"serve": {"device": "cuda:0"}} and parse_value('x="1"') == {"x": "1"}


def test_commands_take_the_settings_of_the_stack_that_is_up(state: StatePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = LocalStack.up(recipes.load("pocket_ci", values={"state_dir": str(state.root), "drift": {"recent_s": 7.0}}), parts=())
    record.save(state, dataclasses.replace(stack.record, ready=True))
    monkeypatch.setattr(record.StackRecord, "is_up", lambda self: True)
    found = Choice(state=state.root).settings()
    assert found.drift.recent_s == 7.0 and found.stack.mlflow_port > 0
    assert Choice(state=state.root, values=("drift.recent_s=9",)).settings().drift.recent_s == 9.0
    assert Choice(state=state.root, recipe="pocket_cpu").settings().drift.recent_s == 60.0, "a named recipe wins"
    assert Choice(state=state.root).settings(fresh=True).stack.mlflow_port == 0, "a new stack chooses its own ports"
    monkeypatch.setenv("TIDE_CONFIG", stack.record.config_file)
    assert Choice().settings().drift.recent_s == 7.0


# --- commands that only look --------------------------------------------------------------------------------------

def test_status_without_a_stack(state: StatePaths) -> None:
    assert "stack down (tide up)" in tide("status", state=state).stdout
    found = json.loads(tide("status", "--json", state=state).stdout)
    assert found["up"] is False and found["replicas"] == [] and found["drift"] == [] and found["deployment"] is None


def test_status_and_deployments_tell_what_is_served(state: StatePaths) -> None:
    history = DeploymentRecord(state.deployments, "pocket")
    history.append(Deployment(1, "pocket", {"rest": {"*": "aa"}}, (), "stable", "tide", "shipped with the engine"))
    history.append(Deployment(2, "pocket", {"rest": {"*": "bb"}}, (), "stable", "me", "better"))
    write_observed(state.observed, ObservedState("replica-0", "pocket", 2, {"*": "bb"}, {"*": "d"}, 2.5, 123.0, "", time.time(), 1))
    text = tide("status", state=state).stdout
    assert "replica-0" in text and "*: bb" in text and "2.50" in text and "deployment 2 (stable)" in text and "by me: better" in text
    assert [d["n"] for d in json.loads(tide("deployments", "--json", state=state).stdout)] == [2, 1]
    assert "shipped with the engine" in tide("deployments", state=state).stdout


def test_sql_in_three_shapes(state: StatePaths) -> None:
    query = "select 1 as one, 'a,b' as two union all select 2, null order by one"
    assert json.loads(tide("sql", query, "--json", state=state).stdout) == [{"one": 1, "two": "a,b"}, {"one": 2, "two": None}]
    assert tide("sql", query, "--csv", state=state).stdout == 'one,two\n1,"a,b"\n2,\n'
    assert tide("sql", query, state=state).stdout.split()[:4] == ["one", "two", "1", "a,b"]


def test_drift_with_nothing_to_judge(state: StatePaths) -> None:
    assert json.loads(tide("drift", "--json", state=state).stdout) == []
    assert "nothing to judge" in tide("drift", state=state).stdout


def test_rollout_asks_before_it_acts(state: StatePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    import tide_pipeline.deployment.builds
    import tide_pipeline.gate.run
    import tide_pipeline.rollout.promote

    class Build:
        draft_version = "v2-abc"

    monkeypatch.setattr(tide_pipeline.deployment.builds, "load_build", lambda *_: Build())
    monkeypatch.setattr(tide_pipeline.gate.run, "load_verdict", lambda *_: None)
    monkeypatch.setattr(tide_pipeline.rollout.promote, "check_verdict", lambda *_: None)
    result = tide("rollout", "0123456789abcdef", state=state)
    assert result.exit_code == 2 and "pass --yes" in result.stderr


def test_rollout_is_held_let_go_and_told_by_hand(state: StatePaths) -> None:
    assert "nothing was ever deployed" in tide("rollout", "status", state=state).stdout
    assert "nothing of pocket was ever deployed" in tide("rollout", "pin", state=state).stderr
    record = DeploymentRecord(state.deployments, "pocket")
    record.append(Deployment(1, "pocket", {"rest": {"*": "aa"}}, (), "stable", "tide", "shipped with the engine"))
    record.append(Deployment(2, "pocket", {"rest": {"*": "aa"}, "canary": {"*": "bb"}}, ("replica-0",), "canary", "run 7", "drift",
                             time.time(), "*", 2))
    write_observed(state.observed, ObservedState("replica-0", "pocket", 2, {"*": "bb"}, {"*": "d"}, 2.5, 123.0, "", time.time(), 1))
    write_observed(state.observed, ObservedState("replica-1", "pocket", 1, {"*": "aa"}, {"*": "d"}, 1.9, 99.0, "", time.time() - 60, 1))
    for word, stage, hold in (("pause", "canary", "paused"), ("resume", "canary", "")):
        done = json.loads(tide("rollout", word, "--reason", "lunch", "--json", state=state).stdout)
        assert (done["stage"], done["hold"], done["reason"]) == (stage, hold, "lunch")
    seen = tide("top", "--once", state=state).stdout
    assert "mode observe: deployment 4, canary" in seen and "rolls out *: bb" in seen and "wait: waiting for replica-0" in seen
    found = {r["name"]: r for r in json.loads(tide("top", "--json", state=state).stdout)["replicas"]}
    assert found["replica-0"]["group"] == "new" and found["replica-0"]["state"] == "behind" and found["replica-1"]["state"] == "silent"
    assert "is being rolled out" in tide("rollout", "pin", state=state).stderr
    assert json.loads(tide("rollout", "abort", "--json", state=state).stdout)["groups"] == {"rest": {"*": "aa"}}
    assert json.loads(tide("rollout", "pin", "--json", state=state).stdout)["hold"] == "pinned"
    assert "next: pinned by" in tide("rollout", "status", state=state).stdout
    told = json.loads(tide("rollout", "history", "--json", state=state).stdout)
    assert [line["what"] for line in told] == ["pinned", "rolled back", "resumed", "paused", "canary on replica-0 (rollout 2)",
                                               "served by all"]
    assert told[2]["why"] == "lunch" and told[-1]["who"] == "tide"


@pytest.mark.parametrize("words", [("rollout", word) for word in ("start", "approve", "advance", "status", "pause", "resume", "abort",
                                                                  "pin", "unpin", "history")])
def test_rollout_commands_teach_with_an_example(words: tuple[str, ...]) -> None:
    result = tide(*words, "--help")
    assert result.exit_code == 0 and f"tide {' '.join(words)}" in plain(result).removeprefix(f"Usage: tide {' '.join(words)}")


# --- traffic ------------------------------------------------------------------------------------------------------

class EchoClient:
    """Answers every prompt with three tokens, two of them drafted and accepted; refuses what holds an X."""

    prompts: ClassVar[list[GenerationRequest]] = []

    def __init__(self, url: str, model: str) -> None:
        assert model == "tiny"

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.prompts.append(request)
        if "X" in request.prompt:
            raise InvalidRequest("no X")
        return GenerationResult("...", 3, 2, 2, 1, 1, "v1", "length", 0.01, 0.01)


@pytest.fixture
def served(state: StatePaths, engines: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that point `tide` at a stack whose Triton is an echo."""
    import tide_pipeline.serve.client

    values: dict[str, Any] = {"state_dir": str(state.root), "engines_dir": str(engines), "engine": "tiny"}
    stack = LocalStack.up(recipes.load(values=values), parts=())
    record.save(state, dataclasses.replace(stack.record, ready=True))
    monkeypatch.setattr(record.StackRecord, "is_up", lambda self: True)
    monkeypatch.setattr(tide_pipeline.serve.client, "TritonClient", EchoClient)
    monkeypatch.setattr("tide_pipeline.cli.traffic.SHOW_EVERY_S", 0.01)
    monkeypatch.setattr(EchoClient, "prompts", [])
    return ["--state", str(state.root), "traffic"]


def test_traffic_counts_and_cuts(served: list[str]) -> None:
    result = tide(*served, "--domain", "ab", "--requests", "5", "--max-tokens", "16", "--workload", "w", "--tenant", "t",
                  "--speculation", "3", "--temperature", "0.5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found | {"seconds": 0, "tokens_per_s": 0} == {
        "requests": 5, "failed": 0, "truncated": 1, "finished": 5, "output_tokens": 15, "seconds": 0, "tokens_per_s": 0,
        "acceptance_length": 3.0, "tokens_per_step": 3.0, "draft_versions": {"v1": 5}, "last_error": ""}
    asked = EchoClient.prompts[0]
    assert (asked.workload, asked.tenant, asked.speculation, asked.sampling.temperature) == ("w", "t", "3", 0.5)
    assert {len(p.prompt) for p in EchoClient.prompts} == {3, 96 - 16} and all(p.prompt[-3:] in ("abc", "end") for p in EchoClient.prompts)


def test_traffic_of_a_file_reports_failures(served: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "tenant": "acme"}\n{"prompt": "X"}\n')
    result = tide(*served, "--prompts", str(tmp_path / "mine.jsonl"), "--max-tokens", "16")
    assert result.exit_code == 1 and "1 answered, 1 failed" in result.stdout and "last error: no X" in result.stdout
    assert {p.tenant for p in EchoClient.prompts} == {"acme", "default"}


@pytest.mark.parametrize(("words", "sent"), [
    (["--scenario", "steady", "--requests", "3"], "aAa"),
    (["--scenario", "abrupt", "--to", "cd"], "aAacd"),
    (["--scenario", "abrupt", "--to", "cd", "--requests", "8"], "aAaAcdec"),
    (["--scenario", "gradual", "--to", "cd", "--requests", "4"], "aAac"),
    (["--scenario", "recurring", "--to", "cd", "--to", "fg", "--requests", "6"], "acfAdg"),
])
def test_traffic_follows_a_scenario(served: list[str], engines: Path, words: list[str], sent: str) -> None:
    for name, letters in (("ab", "aA"), ("cd", "cde"), ("fg", "fg")):
        (engines / "tiny" / "prompts" / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in letters))
    result = tide(*served, "--domain", "ab", *words, "--concurrency", "1", "--max-tokens", "16", "--json")
    assert result.exit_code == 0, result.output
    assert "".join(p.prompt for p in EchoClient.prompts) == sent


def test_a_file_can_be_what_traffic_changes_from(served: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "m"}\n{"prompt": "n"}\n')
    tide(*served, "--prompts", str(tmp_path / "mine.jsonl"), "--scenario", "abrupt", "--to", "ab", "--concurrency", "1",
         "--max-tokens", "16")
    assert [p.prompt[-3:] for p in EchoClient.prompts] == ["m", "n", "abc", "end"]


def test_a_scenario_that_is_none_names_those_there_are(served: list[str]) -> None:
    result = tide(*served, "--domain", "ab", "--scenario", "sudden")
    assert result.exit_code == 2 and "'steady', 'abrupt', 'gradual', 'recurring'" in plain(result)


def test_an_answer_that_fills_the_context_is_refused(served: list[str]) -> None:
    result = tide(*served, "--domain", "ab", "--max-tokens", "96")
    assert result.exit_code == 2 and "leaves no room for a prompt in a context of 96 tokens" in result.stderr


def test_an_unknown_domain_names_the_known_ones(served: list[str]) -> None:
    assert "it has: ab" in tide(*served, "--domain", "klingon").stderr


def test_cutting_keeps_the_end_and_whole_characters(engines: Path) -> None:
    fitter = Fitter(engines / "tiny")
    kept = fitter.fit("ü" * 100, 76)
    assert kept == "ü" * 10 and fitter.cut == 1, "20 tokens are left, ü is two"
    assert fitter.fit("short", 76) == "short" and fitter.cut == 1


def test_a_tally_without_answers_has_no_acceptance() -> None:
    assert Tally(EchoClient("", "tiny")).as_dict()["acceptance_length"] is None         # type: ignore[arg-type]
