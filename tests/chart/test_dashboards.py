"""The Grafana dashboards: the files are the script's, and ask for what the operator shows."""

from __future__ import annotations

import json
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metric_names
import pytest
import yaml
from value_sets import Object

BOARDS = ("fleet", "run", "operator")


def board(chart: Path, name: str) -> Object:
    found: Object = json.loads((chart / "dashboards" / f"{name}.json").read_text())
    return found


def expressions(found: Object) -> Iterator[str]:
    for panel in found["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for choice in found["templating"]["list"]:
        if choice["type"] == "query":
            yield choice["query"]["query"]


def test_the_files_are_what_the_script_writes(root: Path, chart: Path) -> None:
    script = runpy.run_path(str(root / "docs" / "dashboards.py"))

    made = {name: script["text_of"](found) for name, found in script["dashboards"]().items()}

    assert made == {p.name: p.read_text() for p in (chart / "dashboards").glob("*.json")}, (
        "run: python docs/dashboards.py"
    )


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_asks_for_metrics_and_labels_that_exist(name: str, chart: Path) -> None:
    asked = list(expressions(board(chart, name)))

    assert len(asked) > 5
    assert [fault for expression in asked for fault in metric_names.faults(expression)] == []


def test_every_metric_is_on_a_dashboard_or_in_a_rule(chart: Path) -> None:
    text = (chart / "files" / "alerts.yaml").read_text()
    text += "".join(x for name in BOARDS for x in expressions(board(chart, name)))
    elsewhere = {"optimizer_tell_seconds", "optimizer_replay_seconds"}  # beside the ask's, no alarm

    unseen = {
        name
        for name in metric_names.NAMES
        if f"quicktune_{name}" not in text and name not in elsewhere
    }

    assert unseen == set()


@pytest.mark.parametrize("name", BOARDS)
def test_prometheus_understands_every_expression(
    name: str, chart: Path, promtool: str, tmp_path: Path
) -> None:
    """As recording rules, with Grafana's own variables replaced as Grafana does."""
    values = {"$__rate_interval": "5m", "$__range": "6h", "$namespace": "a", "$run": "b"}
    rules = []
    for number, expression in enumerate(expressions(board(chart, name))):
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        if not expression.startswith("label_values"):
            rules.append({"record": f"x:{number}", "expr": expression})
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": rules}]}))

    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_identities_are_stable_and_the_source_is_a_choice(chart: Path) -> None:
    boards = [board(chart, name) for name in BOARDS]

    assert [found["uid"] for found in boards] == [f"quicktune-{name}" for name in BOARDS]
    for found in boards:
        assert found["templating"]["list"][0]["type"] == "datasource"
        for panel in found["panels"]:
            assert panel.get("datasource", {}).get("uid", "${datasource}") == "${datasource}"
        assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])


def test_each_dashboard_is_a_config_map_that_grafana_finds(render: Any, chart: Path) -> None:
    maps = {
        next(iter(o["data"])): o
        for o in render("default")
        if o["kind"] == "ConfigMap" and "dashboard" in o["metadata"]["name"]
    }

    assert set(maps) == {f"{name}.json" for name in BOARDS}
    for name, found in maps.items():
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(found["data"][name]) == board(chart, name.removesuffix(".json"))
