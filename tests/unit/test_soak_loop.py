"""The soak of the loop: its sums and rules, on made-up runs; its traffic, against a server that refuses and hangs up. Nothing is timed."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import inject
import pytest
from soak_loop_faults import Faults, Injected
from soak_loop_judge import Adaptation, Turn, excused, expected_refusal, medians, missed, outcome, requests, stages
from soak_loop_plan import Bars, Fault, Plan, Shift, full, quick
from soak_loop_traffic import Lost, Tally, Traffic
from soak_loop_watch import Sample, disk, memory, unbounded

from tide_pipeline.contracts import Deployment, DriftVerdict, GateVerdict
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.stack.runs import RunView, Step
from tide_pipeline.workloads.prompts import Prompt

BARS = Bars()
STARTS = {"draft_checkpoint": (160.0, 250.0), "registered_draft": (251.0, 253.0), "draft_engine": (253.0, 257.0),
          "benchmark_report": (257.0, 265.0), "live_draft": (266.0, 275.0)}


def run_view(status: str = "SUCCESS", created: float = 155.0, steps: dict[str, tuple[float, float]] = STARTS) -> RunView:
    return RunView("0123456789", status, created, created, 275.0, {}, {k: Step(k, "SUCCESS", a, b) for k, (a, b) in steps.items()})


def deployment(n: int, stage: str, at: float, began: int = 2, reason: str = "why", who: str = "dagster run 01234567") -> Deployment:
    return Deployment(n, "pocket", {"rest": {"*": "b"}}, (), stage, who, reason, at, "*", began)


HISTORY = [deployment(2, "canary", 267.0), deployment(3, "rolling", 273.0, who="rollout sensor"),
           deployment(4, "stable", 274.5, reason="gain of one", who="rollout sensor")]


def turn(verdict: DriftVerdict | None = None) -> Turn:
    return Turn(1, Shift("html", 200.0), 100.0, 400.0, [(300.0, verdict)] if verdict else [])


def verdict(*, drifted: bool, enough: bool = True) -> DriftVerdict:
    return DriftVerdict("pocket", "default", drifted, enough, 0.5, 0.7, 0.2, 0.1, 0.3, 500, 500, "v1", "the numbers")


def gate(passed: bool) -> GateVerdict:
    return GateVerdict(passed, {"offline": {"passed": passed, "reason": "gain +0.01"}}, "v1", "v2", "d")


def test_a_shift_that_was_adapted_to() -> None:
    found = outcome(turn(), [Adaptation(run_view(), 110.0, gate(True))], HISTORY)
    assert found["outcome"] == "adapted" and found["why"] == "gain of one" and found["runs"] == ["SUCCESS"]


def test_a_shift_that_was_judged_not_worth_it() -> None:
    steady = outcome(turn(verdict(drifted=False)), [], HISTORY)
    assert steady["outcome"] == "judged not worth it" and "the numbers" in steady["why"]
    refused = outcome(turn(verdict(drifted=True)), [Adaptation(run_view("FAILURE"), 110.0, gate(False))], [])
    assert refused["outcome"] == "judged not worth it" and "gain +0.01" in refused["why"]
    back = outcome(turn(verdict(drifted=True)), [Adaptation(run_view("FAILURE"), 110.0, gate(True))],
                   [deployment(2, "canary", 267.0), deployment(3, "rolled_back", 273.0, reason="slower")])
    assert back["outcome"] == "judged not worth it" and "slower" in back["why"]


@pytest.mark.parametrize("last", [None, verdict(drifted=True), verdict(drifted=False, enough=False)])
def test_a_shift_that_nobody_decided(last: DriftVerdict | None) -> None:
    late = Adaptation(run_view(created=500.0), 110.0, gate(True))          # of the next shift
    assert outcome(turn(last), [late], HISTORY)["outcome"] == "undecided"
    assert outcome(turn(last), [Adaptation(run_view("FAILURE"), 110.0, None)], [])["outcome"] == "undecided"


def test_stages_add_up() -> None:
    found = stages(100.0, Adaptation(run_view(), 110.0, gate(True)), HISTORY, recent_s=25.0)
    assert found == {"detect": 35.0, "collect": 20.0, "launch": 5.0, "train": 90.0, "register": 2.0, "build": 4.0, "gate": 8.0,
                     "roll out": 3.0, "bake": 6.0, "between": 2.0, "total": 175.0, "everything else": 59.0}
    ahead = stages(100.0, Adaptation(run_view(), 110.0, gate(True), collected=158.0), HISTORY, recent_s=25.0)
    assert (ahead["collect"], ahead["launch"], ahead["everything else"]) == (23.0, 2.0, 56.0), "the run was asked for before all was there"
    parts = [s for name, s in found.items() if name not in ("total", "everything else")]
    assert sum(parts) == pytest.approx(found["total"])
    assert stages(100.0, Adaptation(run_view(), 110.0, gate(True)), HISTORY[:2], 25.0) == {}       # not stable
    half = dict(list(STARTS.items())[:3])
    assert stages(100.0, Adaptation(run_view(steps=half), 110.0, None), HISTORY, 25.0) == {}
    clean, faulty = {"stages_s": {"total": 10.0}, "faults": []}, {"stages_s": {"total": 99.0}, "faults": ["trainer"]}
    assert medians([clean, clean, faulty]) == {"total": 10.0} and medians([faulty]) == {}


ENGINE = Injected(Fault(("engine",), 1, 0.0), turn=1, at=50.0, killed=[1], back_at=60.0)
FRONT = Injected(Fault(("front",), 1, 0.0), turn=1, at=50.0, killed=[3], back_at=60.0)
MLFLOW = Injected(Fault(("mlflow", "mlflow_worker"), 1, 0.0), turn=1, at=50.0, killed=[2], back_at=60.0)


def test_which_requests_may_be_lost() -> None:
    served, later = Lost(49.0, 50.2, "en", "cut"), Lost(51.0, 52.0, "en", "cut")
    assert excused(served, [ENGINE]) == "engine" and excused(served, [MLFLOW]) == "" and excused(later, [FRONT]) == ""
    assert excused(later, [ENGINE]) == "engine (going down)" and excused(Lost(61.0, 62.0, "en", "cut"), [ENGINE]) == ""
    assert expected_refusal(later, [ENGINE]) and not expected_refusal(later, [MLFLOW])
    assert not expected_refusal(Lost(70.0, 70.1, "en", "503"), [ENGINE]) and not expected_refusal(Lost(40.0, 40.1, "en", "503"), [ENGINE])
    found = requests(Tally(finished=5, failed=[served, Lost(70.0, 71.0, "en", "cut")], refused=[later]), [ENGINE, MLFLOW])
    assert found["failed_while_killed"] == {"engine": 1} and found["failed_otherwise"] == 1 and found["refused_with_nothing_down"] == 0


def sound() -> dict[str, object]:
    shift = {"turn": 1, "domain": "html", "outcome": "adapted", "why": ""}
    return {"seconds": 3700.0, "shifts": [shift] * 6, "unbounded_memory": [], "unbounded_disk": [], "faults_left": [],
            "requests": {"failed_otherwise": 0, "refused_with_nothing_down": 0, "first_errors": []},
            "faults": [{"role": "engine", "back_after_s": 3.0}],
            "adaptations": [{"faults": [], "stages_s": {"everything else": 19.0}},
                            {"faults": ["engine"], "stages_s": {"everything else": 90.0}}]}


@pytest.mark.parametrize(("change", "says"), [
    ({"shifts": []}, "0 of 6 shifts"), ({"seconds": 100.0}, "100 of 3600 s"), ({"unbounded_memory": ["engine"]}, "memory of engine"),
    ({"unbounded_disk": ["signals"]}, "disk of signals"), ({"faults_left": ["front"]}, "front was never killed"),
    ({"faults": [{"role": "front", "back_after_s": None}]}, "front was not back"), ({"adaptations": []}, "no adaptation without a fault"),
    ({"adaptations": [{"faults": [], "stages_s": {"everything else": 21.0}}]}, "21.0 s"),
    ({"requests": {"failed_otherwise": 2, "refused_with_nothing_down": 0, "first_errors": ["cut"]}}, "2 requests failed"),
    ({"requests": {"failed_otherwise": 0, "refused_with_nothing_down": 1, "first_errors": ["503"]}}, "1 requests were refused"),
    ({"shifts": [{"turn": 1, "domain": "html", "outcome": "undecided", "why": "late"}] * 6}, "shift 1 to html is undecided: late")])
def test_a_missed_bar_is_named(change: dict[str, object], says: str) -> None:
    assert missed(sound(), BARS) == []
    assert any(says in line for line in missed(sound() | change, BARS))


def looks(mb: list[float], signals: list[float], role: str = "engine") -> list[Sample]:
    return [Sample(60.0 * i, {role: {7: m}}, {"signals": s, "builds": 10.0, "logs": 1.0})
            for i, (m, s) in enumerate(zip(mb, signals, strict=True))]


def test_memory_that_grows_is_told() -> None:
    flat, leak = looks([500.0] * 40, [1.0] * 40), looks([500.0 + 10 * i for i in range(40)], [1.0] * 40)
    assert memory(flat, BARS)["engine"]["bounded"] is True and unbounded(memory(leak, BARS)) == ["engine"]
    assert memory(leak[:5], BARS)["engine"] == {"processes": 1, "peak_mb": 540.0, "samples": 5}
    assert unbounded(memory(looks([500.0 + 10 * i for i in range(40)], [1.0] * 40, "trainer"), BARS)) == []


def test_disk_that_grows_is_told() -> None:
    assert unbounded(disk(looks([1.0] * 3, [1.0, 749.0, 10.0]), BARS, 0.5, 1)) == []
    assert unbounded(disk(looks([1.0] * 3, [1.0, 751.0, 10.0]), BARS, 0.5, 1)) == ["signals"]
    grown = [*looks([1.0], [1.0]), Sample(3600.0, {}, {"signals": 1.0, "builds": 900.0, "logs": 400.0})]
    assert unbounded(disk(grown, BARS, 0.5, 4)) == ["drafts", "rest"]


def test_a_training_that_comes_later_than_planned_is_killed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a shift needs a training is not known before: twice the run worker was to die in one that needed none."""
    training: list[int] = []
    monkeypatch.setattr(inject, "processes", lambda stack_id, role: training)
    faults = Faults.__new__(Faults)
    faults.stack_id, faults._trainer_since = "s", {}
    late, other = Fault(("run_worker",), 3, 0.0, training=True), Fault(("engine",), 3, 10.0)
    assert not faults._is_due(late, 3, 100.0) and faults._is_due(other, 3, 100.0) and not faults._is_due(other, 4, 100.0)
    training.append(1)
    assert not faults._is_due(late, 2, 100.0) and faults._is_due(late, 4, 5.0)


@pytest.mark.parametrize("plan", [full(), quick()])
def test_plans_are_what_the_bars_ask_for(plan: Plan) -> None:
    domains = [shift.domain for shift in plan.shifts]
    assert len(domains) - 1 >= plan.bars.shifts and sum(shift.seconds for shift in plan.shifts) >= plan.bars.seconds
    assert all(a != b for a, b in itertools.pairwise(domains))
    assert [s.recurring for s in plan.shifts] == [d in domains[:i] for i, d in enumerate(domains)] and any(s.recurring for s in plan.shifts)
    for fault in plan.faults:
        assert set(fault.roles) <= set(inject.ROLES) and fault.shift < len(domains)
        assert fault.training or fault.after_s < plan.shifts[fault.shift].seconds


ANSWER = {"text_output": "x", "num_output_tokens": 3, "total_draft_tokens": 0, "total_accepted_draft_tokens": 0, "verify_steps": 0,
          "target_steps": 3, "draft_version": "", "finish_reason": "length"}


class Moody(BaseHTTPRequestHandler):
    """Refuses the first request, hangs up on prompts "cut", answers the rest."""

    refusals = 1

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).refusals:
            type(self).refusals -= 1
            self._say(503, {"error": "no replica takes requests"})
        elif asked["text_input"] == "cut":
            self.close_connection = True
        else:
            self._say(200, ANSWER)

    def _say(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def moody() -> Iterator[str]:
    Moody.refusals = 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_traffic_accounts_for_every_request(moody: str) -> None:
    traffic = Traffic(TritonClient(moody, "pocket"), {"en": [Prompt("one"), Prompt("two")], "de": [Prompt("cut")]}, 1)
    traffic.turn_to(0, "en")
    gives_up = time.monotonic() + 60.0
    while traffic.tally.finished < 3 and time.monotonic() < gives_up:
        time.sleep(0.05)
    traffic.turn_to(1, "de")
    while not traffic.tally.failed and time.monotonic() < gives_up:
        time.sleep(0.05)
    tally = traffic.stop()
    assert tally.finished >= 3 and tally.tokens == 3 * tally.finished
    assert [lost.error.partition(":")[0] for lost in tally.refused] == ["EngineClosed"]
    assert tally.failed and all(lost.domain == "de" and lost.ended_at >= lost.sent_at for lost in tally.failed)
    assert set(tally.first_sent) == {0, 1} and tally.first_sent[0] < tally.first_sent[1]
