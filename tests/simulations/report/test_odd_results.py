"""Results that are poor, huge, hostile or cut short still make a readable page."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from simulations.report.chapter import slugs
from simulations.report.page import chapters_of, page_of
from simulations.report.reading import plain, read_result
from tests.simulations.report.html_page import parsed
from tests.simulations.report.results import balance_result, claims_result, serve_result

NAN = math.nan


def page(*made):
    """The parsed page of results."""
    return parsed(page_of(chapters_of([read_result(one) for one in plain(made)])))


def tiny(**changes):
    kept = {"num_layers": 1, "num_ranks": 2, "num_nodes": 1, "num_experts": 4, "points": 1}
    return balance_result(**{**kept, "policies": {"ours": 1.1}, **changes})


@pytest.mark.parametrize("kind", ["balance", "serve", "scoreboard", "sweep", "claims"])
def test_a_result_that_says_nothing_but_its_kind(kind):
    shown = page({"kind": kind})
    assert shown.one("article").one("h1").words()
    assert not shown.all("figure")


def test_one_policy_one_layer_one_point():
    shown = page(tiny())
    assert not shown.all(class_="best"), "one alone is not the best"
    assert {figure.attributes["id"] for figure in shown.all("figure")} >= {
        "balance-over-time", "balance-ranks-ours", "balance-waterfall",
    }  # fmt: skip


def blanked(value):
    """The same with every number not known."""
    if isinstance(value, dict):
        return {key: blanked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [blanked(inner) for inner in value]
    return NAN if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.mark.parametrize("make", [tiny, lambda: serve_result(requests=9, points=4)])
def test_figures_that_are_all_unknown_are_dashes(make):
    result = blanked(make())
    shown = page(result)
    cells = shown.one("table", id=f"{result['kind']}-{TABLES[result['kind']]}-numbers").all("td")
    assert all(cell.words() in ("–", "s", "ms") for cell in cells)


TABLES = {"balance": "policies", "serve": "latency"}


def test_series_that_are_empty_or_missing_leave_their_pictures_out():
    result = tiny()
    result["policies"]["ours"]["series"] = {"step": [], "balancedness": []}
    del result["policies"]["ours"]["rank_load_LR"], result["policies"]["ours"]["layer_ms"]
    shown = page(result)
    names = [figure.attributes["id"] for figure in shown.all("figure")]
    assert names == ["balance-node-traffic", "balance-experts"]


def test_an_interrupted_run_says_so_first():
    shown = page({**tiny(), "interrupted": True, "steps": 137})
    callout = shown.one("p", class_="bad").words()
    assert "Interrupted." in callout
    assert "137 steps" in callout


def test_ten_thousand_ranks_are_a_small_page():
    """Maps are made coarse, so that neither picture nor page grows with the cluster."""
    result = balance_result(
        num_layers=3, num_ranks=9936, num_nodes=70, num_experts=256, policies={"ours": 1.05}
    )
    chapters = chapters_of([read_result(one) for one in plain([result])])
    html = page_of(chapters)
    assert len(html) < 1_000_000
    assert "the busiest of each 32" in html
    (data,) = [d for d in chapters[0].data_files() if d.name == "balance-ranks-ours-after"]
    assert len(data.csv().splitlines()) == 1 + 3 * 9936, "the file has every rank"


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; background: url(//evil.example) } </style><b>",
    "--></svg></figure><script>alert(1)</script><!--",
    r"$\frac{1}{$",
    "{{ 7 * 7 }}{% raw %}",
    "漢字 😀 العربية",
    "\x00\x1b[31m\ud800\u202e",
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_nothing_else(name):
    """A model, a policy, a warning or a unit of somebody else's file cannot become part of the page."""
    result = tiny(policies={name: 1.2})
    del result["expert_load_LE"], result["policies"][name]["rank_load_LR"]
    result |= {"model": {"name": name, name: name}, "warnings": [name], "command": [name]}
    claims = claims_result()
    claims["rows"][0] |= {"claim": name, "verdict": name}
    shown = page(result, claims)
    assert len(shown.all("script")) == 1
    assert not shown.all("img")
    assert not shown.all("b")
    assert not [e for e in shown.all() if any(a.startswith("on") for a in e.attributes)]
    assert all("evil" not in (e.attributes.get("style") or "") for e in shown.all())
    if name.isprintable() and len(name) < 100:
        assert name in shown.one("article", id="balance").one("h1").words()
        assert name in shown.one("table", id="balance-policies-numbers").words()
    assert "49" not in shown.one("article", id="claims").words()


@example(["a-2", "a", "A"])
@given(st.lists(st.text("aA-. é2", max_size=4)))
def test_policies_whose_file_names_would_be_alike_keep_apart(names):
    parts = slugs(names)
    assert len(set(parts)) == len(names)
    assert all(re.fullmatch("[a-z0-9-]+", part) for part in parts)


def test_arrays_of_numpy_are_welcome():
    result = tiny()
    as_arrays = json.loads(json.dumps(result))
    loads = as_arrays["policies"]["ours"]["rank_load_LR"]
    loads["before"] = np.array(loads["before"])
    assert plain([as_arrays]) == plain([result])
