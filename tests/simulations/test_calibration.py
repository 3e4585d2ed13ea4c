"""Calibration files: what is read, what is refused and how it says so."""

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.hardware.calibration import NAMES, Calibration
from simulations.hardware.calibration_json import CalibrationError
from tests.simulations.calibrations import ROUND, calibration

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values),
    max_leaves=5,
)
TABLE = {"axes": {"tokens": [1, 16, 256]}, "unit": "s", "values": [1e-6, 2e-6, 9e-6], "note": "x"}


def test_what_a_file_says_is_what_there_is():
    found = calibration(tables={"gemm/float8/8x4": TABLE})
    assert (found.name, found.memory_bytes, found.memory_bandwidth) == ("round", 80e9, 2e12)
    assert found.gemm["float8"].tile == 64
    assert (found.decode_flops, found.attention_overhead_s) == (4e14, 5e-6)
    assert found.combine["network"].beta == 5e10
    assert found.dispatch == found.links  # by default
    assert found.combine["node"] == found.links["node"]
    assert (found.step_s, found.layer_s, found.sm_share) == (1e-3, 1e-6, 0.2)
    assert found.tables["gemm/float8/8x4"].at(tokens=16) == pytest.approx(2e-6)
    assert found.tables["gemm/float8/8x4"].at(tokens=[0.5, 512]) == pytest.approx([1e-6, 18e-6])
    plain = calibration(attention={})
    assert plain.prefill_flops == plain.peak_flops["bfloat16"]
    assert plain.attention_overhead_s == plain.gemm["bfloat16"].overhead_s


def test_the_hash_is_of_the_content():
    values = copy.deepcopy(ROUND)
    shuffled = {key: values[key] for key in sorted(values, reverse=True)}
    again = Calibration.from_json(json.dumps(shuffled, indent=3), "elsewhere")
    assert again.hash == calibration().hash
    assert len(again.hash) == 12
    assert set(again.hash) <= set("0123456789abcdef")
    assert calibration(memory_bytes=80e9 + 1).hash != again.hash
    assert calibration(memory_bytes=80 * 10**9).hash == again.hash  # an integer is a number too


def test_those_that_come_with_us():
    assert "h100-published" in NAMES
    for name in NAMES:
        found = Calibration.load(name)
        assert found.name == name
        assert found.provenance["source"]


def test_files(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(ROUND))
    assert Calibration.load(str(file)).name == "round"
    with pytest.raises(CalibrationError, match=r"nowhere\.json: no such file"):
        Calibration.load(str(tmp_path / "nowhere.json"))
    with pytest.raises(CalibrationError, match=r"unknown calibration 'abacus': choose from .*h100"):
        Calibration.load("abacus")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match=r"mine\.json: not readable"):
        Calibration.load(str(file))
    with pytest.raises(CalibrationError, match="not readable"):
        Calibration.from_file(tmp_path)


REFUSED: list[tuple[list[Any], Any, str]] = [
    (["version"], 2, "version must be 1, got 2"),
    (["memory_bandwidth"], 0, "memory_bandwidth must be a number > 0, got 0"),
    (["memory_bandwidth"], "fast", "memory_bandwidth must be a number > 0, got 'fast'"),
    (["memory_bytes"], True, "memory_bytes must be a number"),
    (["memory_bytes"], 10**400, "memory_bytes must be a number"),
    (["peak_flops", "float4"], 1e15, "peak_flops.float4 is unknown; known are bfloat16"),
    (["peak_flops", "float32"], 1e13, "must name the same dtypes, not float32 alone"),
    (["gemm", "float8", "tile"], 0, "gemm.float8.tile must be a number >= 1"),
    (["links", "node", "beta"], -1, "links.node.beta must be a number > 0"),
    (["links", "rail"], {}, "links.rail is unknown"),
    (["overlap", "sm_share"], 1.0, "overlap.sm_share must be a number >= 0 and <= 0.9"),
    (["overlap", "supports_two_batch"], 1, "supports_two_batch must be true or false"),
    (["range", "tokens"], [5, 1], r"range.tokens must be \[low, high\], got 5 > 1"),
    (["provenance", "date"], None, "provenance.date must be a text"),
    (["colour"], "red", "colour is unknown"),
    (["tables"], {"t": {**TABLE, "unit": "ms"}}, 'tables.t.unit must be "s"'),
    (["tables"], {"t": {**TABLE, "values": [1]}}, "tables.t is no table"),
    (["tables"], {"t": {**TABLE, "axes": {"tokens": [1, 1, 2]}}}, "tables.t is no table"),
    (["tables"], {"t": {**TABLE, "values": ["a", 1, 2]}}, "tables.t is no table"),
    (["tables"], {"t": {**TABLE, "values": [0, 1, 2]}}, "tables.t is no table"),
    (["tables"], {"t": {**TABLE, "note": math.inf}}, "tables.t holds NaN or an infinite number"),
    (["fidelity"], {"worst": [math.nan]}, "fidelity holds NaN or an infinite number"),
    (["provenance", "notes"], math.nan, "provenance holds NaN"),
    (["memory_bytes"], math.inf, "memory_bytes must be a number > 0, got inf"),
]


def changed(path: list[Any], value: Any) -> str:
    values = copy.deepcopy(ROUND)
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_refusals_name_the_key(path, value, message):
    with pytest.raises(CalibrationError, match=message) as error:
        Calibration.from_json(changed(path, value), "bad.json")
    assert str(error.value).startswith("bad.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key in ROUND if key not in ("attention", "combine")])
def test_nothing_required_may_be_missing(key):
    values = {name: value for name, value in ROUND.items() if name != key}
    with pytest.raises(CalibrationError, match=f"{key} is missing"):
        Calibration.from_json(json.dumps(values), "bad.json")


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict):
        return [here]
    return [here, *(p for key in value for p in paths(value[key], (*here, key)))]


def refusal(text: str) -> str:
    """What is said of it; empty if it is read."""
    try:
        Calibration.from_json(text, "bad.json")
    except CalibrationError as error:
        return str(error)
    return ""


@given(st.sampled_from([p for p in paths(ROUND) if p]), JSON)
def test_any_value_anywhere_is_read_or_refused(path, value):
    said = refusal(changed(list(path), value))
    assert not said or said.startswith("bad.json: ")


@given(JSON)
def test_any_table_is_read_or_refused(table):
    for text in (changed(["tables"], {"t": table}), changed(["tables"], table)):
        said = refusal(text)
        assert not said or said.startswith("bad.json: tables")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"version": 1e999}', "[]", "3"])
def test_odd_files_are_refused(text):
    assert refusal(text).startswith("bad.json: ")
    assert len(refusal(text)) < 200


@given(st.integers(0, len(json.dumps(ROUND)) - 1))
def test_truncated_files_are_refused(length):
    with pytest.raises(CalibrationError, match=r"^bad\.json: "):
        Calibration.from_json(json.dumps(ROUND)[:length], "bad.json")


def test_what_was_not_measured_is_said():
    found = calibration()
    assert found.outside("tokens", 1, 4096) is None
    assert found.outside("tokens", 1, 4097) == (
        "extrapolated: tokens beyond 1 to 4096 of calibration round"
    )
