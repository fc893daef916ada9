"""docs/deploy/: the dashboard and the alerts speak of metrics that exist, and every alert fires when it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from server import metrics
from server.settings import Settings
from tests.harness import ROOT

DEPLOY = ROOT / "docs" / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]

SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds to everything."""
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}

NAME = re.compile(r"(?<!\w)(?:waybill|process|python|up)(?:_\w+)?\b(?=\s*(\{[^}]*\})?)")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
MATCHED = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPED = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def own() -> dict[str, set[str]]:
    """Every series of ours and its labels."""
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[str(metric._type)]:
                found[metric._name + suffix] = set(metric._labelnames) | ({"le"} if suffix == "_bucket" else set())
    return found


def known() -> dict[str, set[str]]:
    """Every series that a scrape of a process brings: ours, those of the Prometheus client, and the scrape's own."""
    theirs = {
        sample.name: set(sample.labels)
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(("process_", "python_"))
    }
    return {"up": set(), **theirs, **own()}


def used(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(series, labels that are matched) of an expression."""
    for match in NAME.finditer(STRING.sub('""', expression)):
        yield match[0], set(MATCHED.findall(match[1] or ""))


def check(expression: str) -> None:
    series = known()
    there = set(SCRAPED)
    names = list(used(expression))
    assert names, f"no metric in {expression}"
    for name, labels in names:
        assert name in series, f"{name} does not exist: {expression}"
        assert labels <= series[name] | SCRAPED, f"{name} has no {labels - series[name] - SCRAPED}: {expression}"
        there |= series[name]
    for group in GROUPED.findall(STRING.sub('""', expression)):
        assert {label.strip() for label in group.split(",") if label.strip()} <= there, expression


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Prometheus' own checker; a machine without it skips, CI does not."""
    found = shutil.which("promtool")
    if found is None:
        assert os.environ.get("CI") != "true", "CI needs promtool (Debian: prometheus)"
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run([found, *args], capture_output=True, text=True, check=False, timeout=60)


# the dashboard


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["schemaVersion"] >= 41
    assert DASHBOARD["id"] is None, "an id of another Grafana"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(
            set(re.findall(r"\$(\w+)", one["expr"])) <= variables | {"__rate_interval"} for one in panel["targets"]
        )


@pytest.mark.parametrize("expression", expressions())
def test_a_panel_shows_what_exists(expression: str) -> None:
    check(expression)
    for name, labels in used(expression):
        assert labels >= SCRAPED, f"{name} ignores the chosen job and instance: {expression}"


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for expression in expressions() for name, _ in used(expression)}
    metrics_shown = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert not {re.sub("_(bucket|sum|count)$", "", name) for name in own()} - metrics_shown


def test_prometheus_understands_every_panel(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:number_{n}", "expr": text.replace("$__rate_interval", "5m")}
        for n, text in enumerate(expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


# the alerts


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("page", "warn")
    assert rule["annotations"].keys() == {"summary", "description"}
    settings = re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)+\b", rule["annotations"]["description"])
    assert {name.lower() for name in settings} <= set(Settings.__struct_fields__), settings


STEADY = "1+0x240"
BUCKETS = ("0.25", "1", "5", "+Inf")
GOOD = {
    "up": STEADY,
    "waybill_ready": STEADY,
    "waybill_database_up": STEADY,
    "waybill_bus_up": STEADY,
    'waybill_db_connections{state="busy"}': "3+0x240",
    'waybill_db_connections{state="idle"}': "7+0x240",
    "waybill_db_pool_size": "10+0x240",
    "waybill_bus_losses_total": "0+0x240",
    "waybill_revocations_overdue_total": "0+0x240",
    "waybill_oldest_unsent_seconds": "1+0x240",
    "waybill_oldest_job_seconds": "1+0x240",
    'waybill_reconciliation_differences_total{provider="stripe",kind="extra"}': "0+0x240",
    'waybill_jobs_held{why="dead"}': "0+0x240",
    'waybill_jobs_held{why="parked"}': "0+0x240",
    "waybill_oldest_webhook_seconds": "1+0x240",
    'waybill_webhooks_left{why="parked"}': "3+0x240",
    'waybill_webhooks_left{why="dead"}': "0+0x240",
    "waybill_gap_events_total": "0+0x240",
    "waybill_events_published_total": "0+150x240",
    'waybill_http_requests_total{status="200"}': "0+1500x240",
    'waybill_http_requests_total{status="503"}': "0+1x240",
    "waybill_rates_not_counted_total": "0+0x240",
    "waybill_trail_dropped_total": "0+0x240",
    "waybill_connections_open": "100+0x240",
    "waybill_connections_max": "20000+0x240",
    "process_open_fds": "100+0x240",
    "process_max_fds": "65536+0x240",
    "process_start_time_seconds": "7+0x240",
    **{f'waybill_http_request_seconds_bucket{{route="/r",le="{le}"}}': "0+1500x240" for le in BUCKETS},
    # a long poll that waits as long as it was asked to is not slow
    **{f'waybill_http_request_seconds_bucket{{route="/e/events",le="{le}"}}': "0+0x240" for le in BUCKETS[:3]},
    'waybill_http_request_seconds_bucket{route="/e/events",le="+Inf"}': "0+1500x240",
    **{f'waybill_loop_lag_seconds_bucket{{le="{le}"}}': "0+150x240" for le in BUCKETS},
}
"""One process that does well, scraped every 15 seconds for an hour."""

BAD: dict[str, dict[str, str]] = {
    "WaybillGone": {"up": "0+0x240"},
    "WaybillDown": {"up": "0+0x240"},
    "WaybillNotReady": {"waybill_ready": "0+0x240"},
    "WaybillDatabaseGone": {"waybill_database_up": "0+0x240"},
    "WaybillDatabasePoolFull": {'waybill_db_connections{state="busy"}': "10+0x240"},
    "WaybillBusAway": {"waybill_bus_up": "0+0x240"},
    "WaybillBusLost": {"waybill_bus_losses_total": "0+0.1x240"},
    "WaybillRevocationsOverdue": {"waybill_revocations_overdue_total": "0+0x100 1+0x140"},
    "WaybillEventsUnsent": {"waybill_oldest_unsent_seconds": "0+15x240"},
    "WaybillJobsLate": {"waybill_oldest_job_seconds": "0+15x240"},
    "WaybillBooksDiffer": {
        'waybill_reconciliation_differences_total{provider="stripe",kind="extra"}': "0+0x100 1+0x140"
    },
    "WaybillJobsHeld": {'waybill_jobs_held{why="parked"}': "1+0x240"},
    "WaybillWebhooksDead": {'waybill_webhooks_left{why="dead"}': "1+0x240"},
    "WaybillWebhooksLate": {"waybill_oldest_webhook_seconds": "0+15x240"},
    "WaybillEventsMissTheBus": {"waybill_gap_events_total": "0+15x240"},
    "WaybillErrors": {'waybill_http_requests_total{status="500"}': "0+30x240"},
    "WaybillSlow": {f'waybill_http_request_seconds_bucket{{route="/r",le="{le}"}}': "0+1450x240" for le in BUCKETS[:2]},
    "WaybillLoopLags": {'waybill_loop_lag_seconds_bucket{le="0.25"}': "0+100x240"},
    "WaybillRatesNotCounted": {"waybill_rates_not_counted_total": "0+150x240"},
    "WaybillTrailDropped": {"waybill_trail_dropped_total": "0+1x240"},
    "WaybillConnectionsNearLimit": {"waybill_connections_open": "17000+0x240"},
    "WaybillOpenFilesNearLimit": {"process_open_fds": "60000+0x240"},
    "WaybillRestarts": {"process_start_time_seconds": "7+1x240"},
}
"""What of it is otherwise when an alert should fire."""
TOGETHER = {frozenset({"WaybillGone", "WaybillDown"})}
"""Alerts that one fault fires."""


def scenario(changes: dict[str, str], firing: set[str]) -> dict[str, Any]:
    def series(name: str) -> str:
        plain, _, labels = name.partition("{")
        return f'{plain}{{job="waybill",instance="a",{labels or "}"}'

    return {
        "interval": "15s",
        "input_series": [{"series": series(name), "values": values} for name, values in {**GOOD, **changes}.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "50m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)],
            }
        ],
    }


def test_every_alert_fires_when_it_should_and_none_else(tmp_path: Path) -> None:
    assert BAD.keys() == {rule["alert"] for rule in RULES}
    tests = [scenario({}, set())]
    for name, changes in BAD.items():
        tests.append(scenario(changes, next((set(names) for names in TOGETHER if name in names), {name})))
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": tests}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    done = promtool("check", "rules", DEPLOY / "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr
