"""What a result may be, and how what it may not be is told: one line, the file and the key."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.cli import app
from simulations.report.errors import ReportError
from simulations.report.reading import load_results, plain, read_result
from tests.simulations.report import results

SMALL = [
    results.balance_result(
        num_layers=2, num_ranks=4, num_nodes=2, num_experts=8, policies={"none": 1.5}, points=4
    ),
    results.serve_result(requests=10, points=5),
    results.scoreboard_result(),
    results.sweep_result(),
    results.claims_result(),
]


def changed(result, *path_and_value):
    *path, last, value = path_and_value
    out = inner = copy.deepcopy(result)
    for key in path:
        inner = inner[key]
    inner[last] = value
    return out


BALANCE, SERVE, SCOREBOARD = SMALL[:3]
WRONG = {
    'is not a result: it has no "kind"': {"seed": 1},
    "kind: 'balanse' is not one of balance, serve, sweep, scoreboard, claims": {"kind": "balanse"},
    "policies.none.throughput: must be a number or null": changed(
        BALANCE, "policies", "none", "throughput", "1e5"
    ),
    "policies.none.rank_load_LR.after: must be a list of equally long lists of numbers": changed(
        BALANCE, "policies", "none", "rank_load_LR", "after", [[1, 2], [3]]
    ),
    "policies.none.series: throughput has 3 points where step has 4": changed(
        BALANCE, "policies", "none", "series", "throughput", [1, 2, 3]
    ),
    "policies.none.rebalances[0].step: must be a number or null": changed(
        BALANCE, "policies", "none", "rebalances", [{"step": []}]
    ),
    "policies.none.step_ms_mean: must be at most 1e+30": changed(
        BALANCE, "policies", "none", "step_ms_mean", 10**400
    ),
    "policies.none.step_ms_p99: must be at most 1e+30": changed(
        BALANCE, "policies", "none", "step_ms_p99", -1e31
    ),
    "expert_load_LE.before: must have numbers of at most 1e+30": changed(
        BALANCE, "expert_load_LE", [[1e31]]
    ),
    "steps: must be a whole number, not negative": changed(BALANCE, "steps", -1),
    "events[1].time_s: must be a number or null": changed(SERVE, "events", 1, "time_s", "late"),
    "targets[2].id: field required": changed(SCOREBOARD, "targets", 2, {"what": "nameless"}),
    "warnings: input should be a valid tuple": changed(BALANCE, "warnings", "one"),
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_wrong_result_is_told_by_file_and_key(tmp_path, expected):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(WRONG[expected]))
    ran = CliRunner().invoke(
        app, ["simulate", "report", str(file), "--out", str(tmp_path / "report")]
    )
    assert (ran.exit_code, ran.output) == (2, f"{file}: {expected}\n")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON: Expecting value"),
        (b'{"kind": "balance", "poli', "is not JSON: Unterminated string"),
        (b"\xff\xfe\x00", "is not JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "brackets too deep"),
        (b"1" * 5000, "is not JSON: Exceeds the limit"),
        (b"3", 'is not a result: it has no "kind"'),
        (b'[{"kind": "claims"}, {"kind": 3}]', r'\[1\]: is not a result: it has no "kind"'),
    ],
)
def test_files_that_are_no_results_are_told(tmp_path, content, expected):
    file = tmp_path / "result.json"
    file.write_bytes(content)
    with pytest.raises(ReportError, match=expected) as told:
        load_results([file])
    assert str(told.value).startswith(str(file))
    assert "\n" not in str(told.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ReportError, match=r"none\.json: No such file"):
        load_results([tmp_path / "none.json"])
    with pytest.raises(ReportError, match="Is a directory"):
        load_results([tmp_path])


def test_unknown_and_missing_keys_are_nobodys_fault():
    read_result({"kind": "balance", "made_up": 1, "policies": {"ours": {"shoe_size": 44}}})
    for kind in ("balance", "serve", "scoreboard", "sweep", "claims"):
        read_result({"kind": kind})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


def places(value, place=()):
    """Every (container, key) below."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from places(value[key])


def complaint(result):
    try:
        read_result(plain([result])[0])
    except ReportError as error:
        return str(error)
    return ""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_stands_anywhere_a_result_is_read_or_refused_in_a_line(data):
    result = copy.deepcopy(data.draw(st.sampled_from(SMALL)))
    container, key = data.draw(st.sampled_from(list(places(result))))
    container[key] = data.draw(JSON)
    assert len(complaint(result)) < 400
    assert "\n" not in complaint(result)
