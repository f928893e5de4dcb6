"""The alert rules: valid, about metrics that exist, each seen to fire, resolve and stay silent."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import metric_names
import pytest
import yaml
from value_sets import Object

CASES = Path(__file__).with_name("alerts_test.yaml")


@pytest.fixture(scope="module")
def alerts(chart: Path) -> dict[str, Object]:
    rules: Any = yaml.safe_load((chart / "files" / "alerts.yaml").read_text())
    return {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}


def run_cases(
    promtool: str, rules: str, folder: Path, *, about: str = ""
) -> subprocess.CompletedProcess[str]:
    """`promtool test rules` of the cases, or of those about one alert, with these rules."""
    (folder / "alerts.yaml").write_text(rules)
    cases = yaml.safe_load(CASES.read_text())
    cases["tests"] = [test for test in cases["tests"] if test["name"].startswith(about)]
    (folder / CASES.name).write_text(yaml.safe_dump(cases))
    command = [promtool, "test", "rules", CASES.name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_alert_does_what_its_cases_say(promtool: str, chart: Path, tmp_path: Path) -> None:
    done = run_cases(promtool, (chart / "files" / "alerts.yaml").read_text(), tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cases_notice_a_changed_rule(promtool: str, chart: Path, tmp_path: Path) -> None:
    rules = (chart / "files" / "alerts.yaml").read_text()

    name = "QuickTuneCheckpointVolumeFull"
    done = run_cases(promtool, rules.replace("> 0.9", "> 0.99"), tmp_path, about=name)

    assert name in done.stdout + done.stderr
    assert done.returncode != 0


def test_every_alert_is_seen_to_fire_and_to_be_silent_before_and_after(
    alerts: dict[str, Object],
) -> None:
    cases = [
        case
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for name in alerts:
        seen = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == name]
        assert seen[:3] == [False, True, False], name


def test_rules_name_metrics_and_labels_that_the_operator_has(alerts: dict[str, Object]) -> None:
    found = {name: list(metric_names.faults(rule["expr"])) for name, rule in alerts.items()}

    assert {name: what for name, what in found.items() if what} == {}


def test_the_check_of_names_sees_a_wrong_metric_and_a_wrong_label() -> None:
    assert list(metric_names.faults("sum(quicktune_step_total)")) == [
        "no metric quicktune_step_total"
    ]
    assert list(metric_names.faults('quicktune_runs{run="a"}')) == [
        "quicktune_runs has no label run"
    ]


def test_every_alert_has_a_severity_a_summary_and_its_page(alerts: dict[str, Object]) -> None:
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert re.fullmatch(r"QuickTune[A-Z]\w+", name)


def test_the_rules_reach_prometheus_as_they_are(render: Any, chart: Path) -> None:
    (rendered,) = (o for o in render("monitored") if o["kind"] == "PrometheusRule")

    assert rendered["spec"] == yaml.safe_load((chart / "files" / "alerts.yaml").read_text())
