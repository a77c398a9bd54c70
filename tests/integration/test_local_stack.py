"""MLflow's server and Dagster's three processes for real, on definitions of ten lines: up, a job by hand, down, nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.helpers import ask, write_tiny_engine
from tide_pipeline import recipes
from tide_pipeline.config import StackSettings
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.errors import StackError
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.process import choose_ports
from tide_pipeline.stack import services
from tide_pipeline.stack.local import LocalStack
from tide_pipeline.stack.processes import STACK_ID
from tide_pipeline.stack.runs import runs_of

pytestmark = pytest.mark.e2e           # half a minute each on a quiet machine

DEFINITIONS = """
    import os
    import dagster as dg

    class Asked(dg.Config):
        workload: str
        reason: str

    @dg.op(pool="train_gpu")
    def draft_checkpoint(context, config: Asked) -> None:
        assert os.environ["TIDE_MLFLOW_URI"].startswith("http://127.0.0.1:") and os.environ["TIDE_CONFIG"]
        context.log.info(config.workload)

    @dg.job(executor_def=dg.in_process_executor)
    def adapt_draft() -> None:
        draft_checkpoint()

    defs = dg.Definitions(jobs=[adapt_draft])
"""


def family(stack_id: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(STACK_ID) == stack_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_up_launch_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_definitions.py").write_text(textwrap.dedent(DEFINITIONS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(services.__file__).parents[2])]))
    before = {path.name: path.stat().st_mtime for path in services.dagster_home().glob("*.yaml")}
    config = recipes.load(values={"state_dir": str(tmp_path / "state")})
    told: list[str] = []
    stack = LocalStack.up(config, say=told.append, bound=True, parts=("mlflow", "dagster"), definitions="small_definitions")
    try:
        assert {line.split()[0] for line in told} == {"mlflow", "dagster"}
        assert httpx.get(f"{stack.mlflow_url}/api/2.0/mlflow/experiments/get", params={"experiment_id": "0"}).status_code == 200
        done = subprocess.run(["sh", "-c", stack.launch_line()], capture_output=True, text=True, cwd="/", timeout=120,
                              env={"PATH": os.environ["PATH"]})
        assert done.returncode == 0, done.stderr
        gives_up = time.monotonic() + 120
        while not (runs := runs_of(stack.dagster_url, "adapt_draft")) or not runs[0].over:
            assert time.monotonic() < gives_up, runs
            time.sleep(0.2)
        assert runs[0].status == "SUCCESS" and runs[0].tags["tide/target"] == "pocket"
        assert len(family(stack.record.stack_id)) >= 5
        assert (config.state.dagster / "history" / "runs.db").is_file() and list((config.state.dagster / "logs").iterdir())
    finally:
        killed = stack.down()
    assert killed == [] and family(stack.record.stack_id) == []
    assert {path.name: path.stat().st_mtime for path in services.dagster_home().glob("*.yaml")} == before
    assert not list(services.dagster_home().glob("*.db")), "Dagster's data belongs under the state directory"


def test_definitions_that_do_not_load_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_definitions.py").write_text("raise RuntimeError('no such asset')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(services.__file__).parents[2])]))
    config = recipes.load(values={"state_dir": str(tmp_path / "state")})
    with pytest.raises(StackError, match="no such asset"):
        LocalStack.up(config, parts=("dagster",), definitions="broken_definitions")
    assert LocalStack.running(config.state) is None


def test_the_whole_stack_in_the_foreground(tmp_path: Path) -> None:
    """What docker-compose.yml runs: every part, a fixed port, traffic, SIGTERM, nothing left."""
    state, engines, tide = tmp_path / "state", write_engine(tmp_path / "engines"), str(Path(sys.executable).with_name("tide"))
    shared = ["--state", str(state), "--set", f"engines_dir={json.dumps(str(engines))}", "--set", 'engine="tiny"']
    port = choose_ports(StackSettings(), ("front_port",))[0]
    with (tmp_path / "up.log").open("w") as log:
        stack = subprocess.Popen([tide, "up", "--foreground", *shared, "--set", 'stack.host="0.0.0.0"',
                                  "--set", f"stack.front_port={port}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        gives_up = time.monotonic() + 300
        while "tide down" not in (tmp_path / "up.log").read_text():
            assert stack.poll() is None and time.monotonic() < gives_up, (tmp_path / "up.log").read_text()
            time.sleep(0.5)
        status = json.loads(subprocess.check_output([tide, "status", "--json", "--state", str(state)]))
        assert status["up"] and status["target"] == "tiny" and status["urls"]["triton"] == f"http://127.0.0.1:{port}"
        sent = json.loads(subprocess.check_output([tide, "traffic", "--state", str(state), "--domain", "ab", "--requests", "12",
                                                   "--max-tokens", "8", "--json"]))
        assert sent["finished"] == 12 and sent["failed"] == 0 and sent["output_tokens"] == 96
        stack_id = json.loads((state / "stack.json").read_text())["stack_id"]
        stack.terminate()
        assert stack.wait(120) == 0, (tmp_path / "up.log").read_text()
        assert family(stack_id) == [] and not (state / "stack.json").exists()
    finally:
        stack.kill()
        stack.wait()


def test_several_replicas_behind_one_front(tmp_path: Path) -> None:
    """serve.replicas: each with ports and a name of its own, all of them gone afterwards."""
    config = recipes.load(values={"state_dir": str(tmp_path / "state"), "engines_dir": str(write_engine(tmp_path / "engines")),
                                  "engine": "tiny", "serve": {"replicas": 2, "report_s": 0.2}})
    stack = LocalStack.up(config, bound=True, parts=("replica",))
    try:
        replicas = httpx.get(f"{stack.triton_url}/front/status").json()["replicas"]
        assert [r["name"] for r in replicas] == ["replica-0", "replica-1"] and all(r["ready"] for r in replicas)
        assert len({r["url"] for r in replicas}) == 2
        assert {ref.name for ref in stack.record.processes} == {"replica", "replica_1", "front"}
        assert set(read_observed(config.state.observed, "tiny")) == {"replica-0", "replica-1"}
        client = TritonClient(stack.triton_url, "tiny")
        for i in range(8):
            assert client.generate(ask(f"r-{i}", "abc", max_tokens=4, ignore_eos=True)).num_output_tokens == 4
        assert all(r["served"] == 4 for r in httpx.get(f"{stack.triton_url}/front/status").json()["replicas"])
    finally:
        killed = stack.down()
    assert killed == [] and family(stack.record.stack_id) == []


def write_engine(engines: Path) -> Path:
    """engines/tiny: a tiny target without a draft, and prompts of domain "ab"."""
    folder = write_tiny_engine(engines)
    (folder / "prompts").mkdir()
    (folder / "prompts" / "ab.jsonl").write_text("".join(json.dumps({"prompt": "abc " * n}) + "\n" for n in range(1, 9)))
    return engines
