"""The dashboard, the alerts and the operations guide speak of the metrics that there are, and of all."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import PATIENCE_S, serve
from tests.server.test_control_balance import QUICK, Ranks, more_traffic
from tests.server.test_metrics import REPORT

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/expertmesh.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/grafana/alerts.yaml").read_text())
GUIDE = (ROOT / "docs/operations.md").read_text()
NAME = re.compile(r"\b(?:expertmesh:|process_)\w+")
LAST_TO_COME = ("step_seconds_total", "eplb_balancedness")
SELECTOR = re.compile(r"((?:expertmesh:|process_)\w+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def labels_of():
    """The labels of every sample that a server with replicas and ranks exposes, by its name."""
    ranks = Ranks()
    with serve(*QUICK, num_replicas=2, make_rebalancer=ranks.rebalancer) as serving:
        leader = serving.leaders[1]
        frame = leader._frame
        leader._frame = lambda events: frame(events) | {"stats": REPORT}
        serving.client.generate([5], max_tokens=2)
        deadline = time.monotonic() + PATIENCE_S
        while serving.client.balance().window_s == 0:
            assert time.monotonic() < deadline
        serving.do(more_traffic, ranks)
        text = ""
        while not all(f"{name}{{" in text for name in LAST_TO_COME):
            assert time.monotonic() < deadline
            text = serving.do(serving.metrics.exposition).decode()
        serving.do(ranks.flipping.cancel)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def metrics(labels_of):
    """Names as people say them: histograms once."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels_of}


def panels():
    return [panel for panel in DASHBOARD["panels"] if panel["type"] not in ("row", "text")]


def queries():
    drawn = [target["expr"] for panel in panels() for target in panel["targets"]]
    alerting = [rule["expr"] for rule in rules()]
    asked = [each["query"]["query"] for each in DASHBOARD["templating"]["list"][1:]]
    return [*drawn, *alerting, *asked]


def rules():
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def test_every_query_names_metrics_and_labels_that_exist(labels_of):
    for query in queries():
        names = NAME.findall(query)
        assert names, query
        assert set(names) <= set(labels_of), query
        for name, selectors in SELECTOR.findall(query):
            asked = set(re.findall(r"(\w+)\s*[=!]", selectors))
            assert asked <= labels_of[name], query
        grouped = {
            label.strip()
            for labels in re.findall(r"by \(([^)]*)\)", query)
            for label in labels.split(",")
        }
        assert grouped <= set().union(*(labels_of[name] for name in names)), query


def test_legends_name_labels_that_the_query_leaves():
    for panel in panels():
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                by = re.search(r"sum by \(([^)]*)\)", target["expr"])
                assert by is None or label in by[1], target["expr"]
                assert by is not None or "sum(" not in target["expr"], target["expr"]


def test_every_metric_has_a_panel_or_a_reason_for_having_none(metrics):
    reasons = "\n".join(
        panel["options"]["content"] for panel in DASHBOARD["panels"] if panel["type"] == "text"
    )
    drawn = "\n".join(target["expr"] for panel in panels() for target in panel["targets"])
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in NAME.findall(drawn)}
    explained = set(NAME.findall(reasons))
    ours = {metric for metric in metrics if metric.startswith("expertmesh:")}
    assert not ours - named - explained
    assert not named & explained, "drawn, so it needs no reason"


def test_every_metric_is_explained_in_the_guide(metrics):
    ours = {metric for metric in metrics if metric.startswith("expertmesh:")}
    rows = re.findall(r"^\| `(expertmesh:\w+)(?:\{(\w+(?:,\w+)*)\})?` \|", GUIDE, re.MULTILINE)
    assert {name for name, _ in rows} == ours
    assert len(rows) == len(ours), "one entry each"


def test_the_guide_names_the_labels(labels_of):
    rows = re.findall(r"^\| `(expertmesh:\w+)\{(\w+(?:,\w+)*)\}` \|", GUIDE, re.MULTILINE)
    for name, labels in rows:
        assert set(labels.split(",")) <= labels_of[name], name


def test_every_alert_is_explained_in_the_guide():
    assert [rule["alert"] for rule in rules()] == re.findall(
        r"^\| `(Expertmesh\w+)` \|", GUIDE, re.MULTILINE
    )
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_the_dashboard_is_one_that_grafana_imports():
    assert DASHBOARD["schemaVersion"] >= 39
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    variables = [each["name"] for each in DASHBOARD["templating"]["list"]]
    assert variables == ["datasource", "model"]
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows[:6] == ["Traffic", "Latency", "Engine", "Balance of experts", "Network", "Errors"]
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not own & cells, f"{panel['title']} lies on another panel"
        cells |= own
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]


def test_options_that_the_guide_names_exist():
    from cluster.config import ServeConfig

    tree = ServeConfig(model="x").model_dump()
    for section, option in set(re.findall(r"`(\w+)\.(\w+)(?:=\w+)?`", GUIDE)):
        if section in tree:
            assert option in tree[section], f"{section}.{option}"
