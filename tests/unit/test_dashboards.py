"""Alert rules and the Grafana dashboard against docs/metrics.md: every metric is there, with the labels that are asked for.

`promql_parser` reads the expressions as Prometheus does. Where `promtool` is installed, it checks the rules and runs their unit tests.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tests.compose import load
from tide_pipeline.config import project_root

DOCKER = project_root() / "docker"
COMMON = {"target", "replica"}
SCRAPED = {"job", "instance"}                              # Prometheus adds them to every series
PARTS = ("_bucket", "_sum", "_count")
OF_PROMETHEUS = {"up": set[str]()}


def documented() -> dict[str, set[str]]:
    """Name -> labels, from the table of docs/metrics.md; histograms as the three series that they are."""
    found: dict[str, set[str]] = {name: set(labels) for name, labels in OF_PROMETHEUS.items()}
    for line in (project_root() / "docs" / "metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `tide_"):
            continue
        name, labels = cells[0].strip("`"), set(re.findall(r"`(\w+)`", cells[3]))
        if cells[1] == "histogram":
            found |= {name + part: COMMON | ({"le"} if part == "_bucket" else set()) for part in PARTS}
        else:
            found[name] = COMMON | labels
    return found


def selectors(expr: Any) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels it is matched by) of each selector inside a parsed expression."""
    if isinstance(expr, promql.VectorSelector):
        yield expr.name, {matcher.name for matcher in expr.matchers.matchers}
    for part in ("expr", "lhs", "rhs", "vs", "vector_selector"):
        if (inside := getattr(expr, part, None)) is not None:
            yield from selectors(inside)
    for argument in getattr(expr, "args", None) or []:
        yield from selectors(argument)


def grouped(text: str) -> set[str]:
    """Labels that an expression groups by or joins on."""
    return {label for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", text) for label in re.split(r"[,\s]+", group) if label}


def wrong_in(text: str) -> list[str]:
    """What an expression asks for that is not there."""
    known, used = documented(), set(selectors_of(text))
    unknown = sorted({name for name, _ in used} - known.keys())
    labels = {name: set(labels) for name, labels in used}
    missing = [f"{name} has no label {label}" for name in sorted(labels.keys() & known.keys()) for label in
               sorted(labels[name] - known[name] - SCRAPED)]
    anywhere = set().union(*(known.get(name, set()) for name, _ in used)) | SCRAPED
    return [*(f"{name} is not in docs/metrics.md" for name in unknown), *missing,
            *(f"nothing here has a label {label}" for label in sorted(grouped(text) - anywhere))]


def selectors_of(text: str) -> list[tuple[str, frozenset[str]]]:
    return [(name, frozenset(labels)) for name, labels in selectors(promql.parse(text))]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "tide.json").read_text())
    return found


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return [*panels, *(note["expr"] for note in dashboard()["annotations"]["list"])]


def test_expressions_are_read_whole() -> None:
    text = ('sum by (replica) (rate(tide_a_total{x="1"}[5m] offset 1h)) / on (y) avg_over_time((tide_b > 0)[1d:5m]) '
            "or histogram_quantile(0.9, tide_c)")
    assert {name: set(labels) for name, labels in selectors_of(text)} == {"tide_a_total": {"x"}, "tide_b": set(), "tide_c": set()}
    assert grouped(text) == {"replica", "y"}
    assert wrong_in('sum by (tenant) (tide_tokens_out_total{tenant="a"}) + tide_magic_total') == [
        "tide_magic_total is not in docs/metrics.md", "tide_tokens_out_total has no label tenant", "nothing here has a label tenant"]
    assert {"tide_ttft_seconds_bucket", "tide_deployment", "up"} <= documented().keys() and len(documented()) > 40


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_is_published(rule: dict[str, Any]) -> None:
    assert wrong_in(rule["expr"]) == []
    summary = rule["annotations"]["summary"]
    assert set(re.findall(r"\$labels\.(\w+)", summary)) <= COMMON | SCRAPED
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert re.search(r":|;", summary), "says what it is and what to do, or what it means"


def test_every_alert_that_was_asked_for_is_there_and_tested() -> None:
    names = {rule["alert"] for rule in rules()}
    assert {"AcceptanceCollapse", "CaptureFailedOpen", "StaleDraft", "DigestMismatch", "DraftUnusable", "ReplicaBehind", "DropsRise",
            "ReplicaDown"} <= names
    tests = "".join(path.read_text() for path in DOCKER.glob("alerts*_test.yml"))
    assert all(name in tests for name in names)


def test_both_ways_of_losing_capture_are_told() -> None:
    """The sink's, and the TensorRT-LLM adapter's, which serves on without its taps."""
    alert, = (rule["expr"] for rule in rules() if rule["alert"] == "CaptureFailedOpen")
    told = [{name for name, _ in selectors_of(text.replace("$target", "t").replace("$replica", "r"))} for text in (alert, *expressions())]
    assert all(any(metric in names for names in told[1:]) and metric in told[0]
               for metric in ("tide_sink_errors_total", "tide_capture_faults_total"))


@pytest.mark.parametrize("text", sorted(set(expressions())))
def test_the_dashboard_asks_for_what_is_published(text: str) -> None:
    assert wrong_in(text.replace("$target", "t").replace("$replica", "r")) == []


def test_the_dashboard_is_whole() -> None:
    panels, source = dashboard()["panels"], yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert len({panel["id"] for panel in panels}) == len(panels) and all(panel["title"] for panel in panels)
    uid = source["datasources"][0]["uid"]
    assert {panel["datasource"]["uid"] for panel in panels if "datasource" in panel} == {uid}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        p = panel["gridPos"]
        cells = {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
        assert not cells & taken and p["x"] + p["w"] <= 24, panel["title"]
        taken |= cells
    for variable in dashboard()["templating"]["list"]:
        metric, label = re.fullmatch(r"label_values\((\w+)[^,]*(?:\{[^}]*\})?, (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert label in documented()[metric]


def test_grafana_and_prometheus_find_their_files() -> None:
    services = load()["services"]
    places = {text.split(":")[1]: text.split(":")[0] for name in ("grafana", "prometheus") for text in services[name]["volumes"]}
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/tide.yml").read_text())["providers"][0]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert provider["options"]["path"] in places and home == f"{provider['options']['path']}/tide.json"
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    assert f"--config.file={'/etc/prometheus/prometheus.yml'}" in services["prometheus"]["command"]
    assert {"/etc/prometheus/prometheus.yml", *(f"/etc/prometheus/{name}" for name in config["rule_files"])} <= places.keys()
    host, port = config["scrape_configs"][0]["static_configs"][0]["targets"][0].split(":")
    assert all(host in services[name]["networks"]["inside"]["aliases"] for name in ("tide", "triton")) and port == "8002"
    retention = next(word for word in services["prometheus"]["command"] if "retention.time" in word)
    assert int(re.sub(r"\D", "", retention)) > 7, "StaleDraft looks back a week"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian, Ubuntu: apt install prometheus)")
def test_promtool_agrees() -> None:
    tests = sorted(map(str, DOCKER.glob("alerts*_test.yml")))
    for command in (["check", "config", str(DOCKER / "prometheus.yml")], ["test", "rules", *tests]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr
