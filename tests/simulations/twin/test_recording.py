"""Recordings as files: round trips, as recorded routing, and everything that is none."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.load import LoadFileError
from router.load_files import expert_counts, read_routing, read_window
from simulations.twin.recording import Recording
from simulations.twin.replay import check


@pytest.fixture(scope="module")
def data(recording) -> bytes:
    return recording.to_bytes()


def repacked(data: bytes, **changes: Any) -> bytes:
    """The file with other arrays; None removes one. A dict changes the header."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = {key: archive[key] for key in archive.files}
    for key, value in changes.items():
        if value is None:
            del arrays[key]
        elif isinstance(value, dict):
            header = json.loads(str(arrays["header"]))
            arrays["header"] = np.array(json.dumps(header | value))
        else:
            arrays[key] = np.asarray(value)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_or_refused(data: bytes) -> None:
    """Nothing but LoadFileError, in one line that names the file."""
    message = "run.npz: "
    try:
        Recording.from_bytes(data, "run.npz")
    except LoadFileError as error:
        message = str(error)
    assert message.startswith("run.npz: ")


def test_a_file_says_all_that_the_recording_did(recording, data):
    again = Recording.from_bytes(data)
    assert again.to_bytes() == data
    assert again.config == recording.config
    assert again.model == recording.model
    assert [r[:4] for r in again.requests] == [r[:4] for r in recording.requests]
    assert [r.params for r in again.requests] == [r.params for r in recording.requests]
    assert again.rebalances == recording.rebalances
    for key, array in recording.arrays.items():
        assert np.array_equal(again.arrays[key], array)
        assert again.arrays[key].dtype == array.dtype
    assert [found.num_wrong for found in check(again)] == [0] * 6


def test_it_is_recorded_routing_too(recording, data, tmp_path):
    """The loads of its routing are what the ranks counted."""
    file = tmp_path / "run.npz"
    file.write_bytes(data)
    (name, ids_TLK), *others = read_routing(file).items()
    assert (name, others) == ("routing", [])
    assert np.array_equal(ids_TLK, recording.arrays["routing"])
    counted = recording.arrays["slot_tokens"].sum(axis=(0, 2))
    assert expert_counts(ids_TLK, 32).sum(axis=1).tolist() == counted.tolist()
    assert read_window(file, num_experts=32).num_layers == 5


def test_no_path_of_this_machine_is_in_it(recording, data):
    assert recording.config.model == "mosaic"
    with np.load(io.BytesIO(data)) as archive:
        assert "/" not in json.loads(str(archive["header"]))["config"]["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format 'none', expected 'expertmesh recording 1'"),
        ({"format": "expertmesh recording 2"}, "format 'expertmesh recording 2', expected"),
        ({"header": None}, "the header lacks"),
        ({"header": "{"}, "Expecting property name"),
        ({"slots": None}, r"arrays \['slots'\] are missing"),
        ({"more": [1]}, r"\['more'\] unknown"),
        ({"routing": np.zeros((4, 5))}, r"array 'routing' is float64 \[4, 5\], expected integers"),
        ({"steps": [0, 0, 1]}, "array 'epochs' is int64"),
        ({"header": {"looks_every": 7}}, r"looks, expected one every looks_every\(7\)"),
        ({"header": {"rebalances": [[99, 0, []]]}}, "a rebalance after more than"),
        ({"header": {"rebalances": [[1, 0, [[9, []]]]]}}, "a rebalance of layer 9"),
        ({"header": {"requests": [[0, 0, "a", [], {}]]}}, "the prompt is empty"),
        ({"header": {"requests": [[0, 0, "a", [1], {"x": 1}]]}}, "unknown sampling parameter 'x'"),
        ({"header": {"model_json": {}}}, "model_type None is not supported"),
        ({"header": {"config": {"model": "m", "dtpye": 1}}}, "unknown key 'dtpye'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(data, changes, message):
    with pytest.raises(LoadFileError, match=f"run.npz: .*{message}"):
        Recording.from_bytes(repacked(data, **changes), "run.npz")


@pytest.mark.parametrize(
    ("key", "at", "value"),
    [
        ("routing", (0, 0, 0), 32),
        ("slots", (0, 0, 0), 36),
        ("chunks", (0, 0), -1),
        ("chunks", (0, 2), 4),
        ("chunks", (0, 3), 10_000),
        ("sent", (0, 2), 8),
        ("sent", (0, 4), 4),
        ("escapes", (0, 2), -1),
        ("epochs", (0,), 99),
        ("steps", (1,), 0),
        ("plan_ends", (0,), 1 << 40),
    ],
)
def test_numbers_that_point_at_nothing(recording, data, key, at, value):
    array = recording.arrays[key].copy()
    array[at] = value
    with pytest.raises(LoadFileError, match=r"run\.npz: "):
        Recording.from_bytes(repacked(data, **{key: array}), "run.npz")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 20), st.integers(0, 255), st.booleans())
def test_damaged_files_are_refused(data, place, value, truncated):
    place %= len(data)
    damaged = data[:place] if truncated else data[:place] + bytes([value]) + data[place + 1 :]
    read_or_refused(damaged)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """To every value in nested lists and dicts, the first few of each list."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3])
    for key, value in items:
        inner = (*path, key)
        found += paths(value, inner) if isinstance(value, dict | list) else [inner]
    return found


ODD = [None, -1, 0, 3, 1e308, 10**12, "", "x", True, [], [[]], {}, {"a": 1}]


def altered_header(header: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    header = json.loads(json.dumps(header))
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return header


@settings(deadline=None, max_examples=80, derandomize=True)
@given(draw=st.data())
def test_any_header_is_refused_or_read(data, draw):
    with np.load(io.BytesIO(data)) as archive:
        header = json.loads(str(archive["header"]))
    path = draw.draw(st.sampled_from(paths(header)))
    mutant = altered_header(header, path, draw.draw(st.sampled_from(ODD)))
    read_or_refused(repacked(data, header=json.dumps(mutant)))
