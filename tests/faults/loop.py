"""One whole stack on a tiny engine, brought up for a module of fault tests: launch adaptations, watch them, look into Dagster's pools.

Everything is real: Triton behind the front, MLflow's server, Dagster's daemon, code server and webserver, the trainer. The engine is tiny
and the gate open, so that an adaptation takes seconds; what is proven is that it comes to its end, not that its draft is better.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import inject

from tests.helpers import ask, tiny_spec, write_engine_toml, write_tiny_build, write_tiny_target
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import NothingToRollBack, StackError
from tide_pipeline.models.target import Target
from tide_pipeline.registry.registry import Registry
from tide_pipeline.rollout import rollback
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.stack.local import PARTS, LocalStack
from tide_pipeline.stack.runs import RunView, runs_of

PATIENCE_S = 180.0                 # a machine may be busy; every wait ends as soon as the thing is there
SETTINGS: dict[str, Any] = {
    "serve": {"agent_poll_s": 0.2, "report_s": 0.5},
    "capture": {"mode": "on", "flush_s": 0.5},
    "drift": {"min_drop": 0.95},                           # runs are launched by the tests, none by the sensor
    "training": {"time_budget_s": 8.0, "eval_every_s": 2.0, "checkpoint_every_s": 0.5, "min_prompts": 4, "eval_share": 0.25},
    "gate": {"min_gain": -9.0, "max_workload_loss": 9.0, "min_speedup_ratio": 0.0, "min_prompts": 2, "bootstrap": 50,
             "bench_prompts": 2, "bench_tokens": 16, "equivalence_prompts": 2},
    "rollout": {"mode": "auto", "bake_s": 5.0, "max_bake_s": 15.0, "min_bake_steps": 10, "min_bake_requests": 2, "max_drop": 0.9,
                "max_slowdown": 9.0, "heartbeat_s": 20.0}}
LAUNCH = """
mutation Launch($config: RunConfigData!, $tags: [ExecutionTag!]!) {
  launchRun(executionParams: { runConfigData: $config, executionMetadata: { tags: $tags },
      selector: { repositoryLocationName: "tide_pipeline", repositoryName: "__repository__", pipelineName: "adapt_draft" } }) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }
"""
SLOTS = '{ instance { concurrencyLimit(concurrencyKey: "train_gpu") { claimedSlots { runId stepKey } } } }'
FAILURES = """
query Log($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events { __typename ... on MessageEvent { message }
    ... on ExecutionStepFailureEvent { error { message causes { message } } } } } } }
"""
WORDS = ("hello world", "abc abc abc", "the quick brown fox", "zyxw vuts", "lorem ipsum", "one two three", "aaa bbb", "to be or not to be")


@dataclass
class Loop:
    """A running stack and what tests ask of it."""

    config: TideConfig
    stack: LocalStack
    told: dict[str, float] = field(default_factory=dict)   # what took how many seconds

    @property
    def id(self) -> str:
        return self.stack.record.stack_id

    @property
    def client(self) -> TritonClient:
        return TritonClient(self.stack.triton_url, self.config.target)

    @property
    def record(self) -> DeploymentRecord:
        return DeploymentRecord(self.config.state.deployments, self.config.target)

    @property
    def registry(self) -> Registry:
        return Registry(self.stack.mlflow_url, self.config.target)

    def latest(self) -> Deployment:
        found = self.record.latest()
        assert found is not None
        return found

    def traffic(self, requests: int, name: str) -> None:
        """Answered requests, captured into the lake."""
        for i, words in zip(range(requests), itertools.cycle(WORDS), strict=False):
            self.client.generate(ask(f"{name}-{i}", f"{words} {i}", max_tokens=48, ignore_eos=True, temperature=0.7, seed=i))

    def launch(self, reason: str) -> str:
        """The id of a new adapt_draft run, from the shipped draft. Asked again while the webserver is away."""
        with contextlib.suppress(NothingToRollBack):           # a draft that can't get better would be trained to itself
            while True:
                rollback(self.config, who="test", reason="the next fault begins with the shipped draft")
        config = {"ops": {"draft_checkpoint": {"config": {"workload": "default", "reason": reason}}}}
        tags = [{"key": "tide/target", "value": self.config.target}, {"key": "tide/workload", "value": "default"}]
        found: dict[str, Any] = {}

        def launched() -> bool:
            found.update(self.graphql(LAUNCH, {"config": config, "tags": tags}).get("launchRun") or {})
            return found.get("__typename") == "LaunchRunSuccess"

        until(launched, f"launching said {found}")
        return str(found["run"]["runId"])

    def graphql(self, query: str, variables: dict[str, Any] | None = None) -> dict[str, Any]:
        """{} while nobody answers."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.post(f"{self.stack.dagster_url}/graphql", json={"query": query, "variables": variables or {}}, timeout=30)
            return answer.json().get("data") or {}
        return {}

    def run(self, run_id: str) -> RunView:
        """A run, or the one that went on with it."""
        found = self.runs()
        mine = next(view for view in found if view.run_id == run_id)
        again = [view for view in found if view.tags.get("dagster/parent_run_id") == run_id]
        return self.run(again[0].run_id) if again else mine

    def runs(self) -> list[RunView]:
        found: list[RunView] = []

        def answered() -> bool:
            with contextlib.suppress(StackError):
                found[:] = runs_of(self.stack.dagster_url, "adapt_draft", timeout_s=30)
                return True
            return False

        until(answered, "the webserver did not list the runs")
        return found

    def await_step(self, run_id: str, key: str) -> None:
        """Until a step of the run has begun."""
        def has_begun() -> bool:
            view = self.run(run_id)
            assert view.status != "SUCCESS", f"the run ended before it was seen in {key}"
            return key in view.steps and view.steps[key].started > 0

        until(has_begun, f"{key} did not begin")

    def await_success(self, run_id: str) -> RunView:
        """Until the run, or the one that went on with it, has succeeded."""
        def succeeded() -> bool:
            view = self.run(run_id)
            if view.over and view.status != "SUCCESS":         # Dagster decides within seconds whether it goes on
                time.sleep(20.0)
                view = self.run(run_id)
                assert not (view.over and view.status != "SUCCESS"), f"{view.status}: {self.why(view.run_id)}"
            return view.status == "SUCCESS"

        until(succeeded, "the run did not end", seconds=2 * PATIENCE_S)
        return self.run(run_id)

    def why(self, run_id: str) -> str:
        """What the run's log says of failures."""
        events = self.graphql(FAILURES, {"id": run_id}).get("logsForRun", {}).get("events", [])
        return "; ".join(f"{e.get('message')} {e.get('error') or ''}" for e in events if "Failure" in e["__typename"])

    def slot_holders(self) -> set[str]:
        """Runs that hold a place in the training pool."""
        limit = self.graphql(SLOTS).get("instance", {}).get("concurrencyLimit") or {}
        return {slot["runId"] for slot in limit.get("claimedSlots", [])}

    def pid(self, role: str) -> int:
        return inject.wait_for(self.id, role, PATIENCE_S).pid

    def kill_and_await(self, role: str) -> float:
        """Kill it, wait until another plays its role; the seconds that took."""
        before, began = [p.pid for p in inject.processes(self.id, role)], time.monotonic()
        assert inject.kill(self.id, role), f"no {role} to kill"
        inject.wait_for(self.id, role, PATIENCE_S, other_than=before)
        return time.monotonic() - began


@contextlib.contextmanager
def tiny_loop(folder: Path, values: dict[str, Any] | None = None, parts: Sequence[str] = PARTS) -> Iterator[Loop]:
    """A stack with a shipped draft and captured traffic; down afterwards."""
    config = override(write_engine(folder), values or {})
    stack = LocalStack.up(config, bound=True, parts=parts)
    try:
        loop = Loop(config, stack)
        loop.traffic(24, "before")
        yield loop
    finally:
        stack.down()


def write_engine(folder: Path) -> TideConfig:
    engine = folder / "engines" / "tiny"
    write_tiny_target(engine / "target", max_positions=256)
    target = Target(engine / "target", tiny_spec(max_context=256))
    shipped = write_tiny_build(folder / "shipped", target, noise=0.5)
    Path(shipped.path, "draft").rename(engine / "champion")
    write_engine_toml(engine, tiny_spec(max_context=256, champion="champion"))
    return override(TideConfig(engine="tiny", engines_dir=str(folder / "engines"), state_dir=str(folder / "state")), SETTINGS)


def until(condition: Callable[[], bool], otherwise: str = "it never came true", seconds: float = PATIENCE_S) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, otherwise
        time.sleep(0.25)
    return time.monotonic() - began
