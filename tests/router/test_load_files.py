"""Files of loads: what is written reads back, other formats give numpy's sums, bad ones are named."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from router.load import LoadFileError, LoadWindow
from router.load_files import dump_window, expert_counts, load_window, read_routing, read_window

ANY_FILE = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def filled_window() -> LoadWindow:
    rng = np.random.default_rng(0)
    window = LoadWindow(3, 16, sample_tokens=20, seed=4)
    for _ in range(5):
        window.add(rng.multinomial(500, np.ones(16) / 16, 3), rng.integers(0, 16, (3, 9, 4)))
    return window


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_a_window_goes_on_after_a_round_trip(tmp_path) -> None:
    window = filled_window()
    data = dump_window(window)
    for back in (load_window(data), read_window(write(tmp_path, "w.npz", data))):
        reference = filled_window()
        for one in (back, reference):
            one.add(np.full((3, 16), 7), np.ones((3, 30, 4), dtype=np.int64))
        ours, theirs = back.estimate(), reference.estimate()
        assert np.array_equal(ours.mean_LE, theirs.mean_LE)
        assert np.array_equal(ours.sigma_LE, theirs.sigma_LE)
        assert np.array_equal(ours.rows_LMK, theirs.rows_LMK)
        assert dump_window(back) == dump_window(reference)


def test_an_empty_window_round_trips() -> None:
    assert load_window(dump_window(LoadWindow(2, 4))).num_batches == 0


@given(
    hnp.arrays(
        np.int16, st.tuples(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4)),
        elements=st.integers(-1, 9),
    )
)  # fmt: skip
@settings(deadline=None)
def test_expert_counts_are_bincounts(ids_TLK) -> None:
    for layer, counts_E in enumerate(expert_counts(ids_TLK, 10)):
        ids = ids_TLK[:, layer].ravel()
        assert np.array_equal(counts_E, np.bincount(ids[ids >= 0], minlength=10))


def test_recorded_routing(tmp_path) -> None:
    rng = np.random.default_rng(1)
    tasks = {name: rng.integers(0, 60, (2000, 4, 6)).astype(np.uint8) for name in ("a", "b")}
    path = write(tmp_path, "routing.npz", npz(**tasks))
    window = read_window(path, batch_tokens=500, num_experts=64)
    load = window.estimate()
    assert load.mean_LE.shape == (4, 64)
    assert np.allclose(load.mean_LE.sum(axis=1), 500 * 6)
    shares_LE = expert_counts(np.concatenate(list(tasks.values())), 64) / (4000 * 6)
    assert np.allclose(load.mean_LE / 3000, shares_LE, atol=0.003)
    rows = {tuple(row) for row in load.rows_LMK[0].tolist()}
    assert rows <= {tuple(row) for ids in tasks.values() for row in ids[:, 0].tolist()}
    assert read_window(path).num_experts == 60
    back = read_routing(path)
    assert all(np.array_equal(back[name], ids) for name, ids in tasks.items())


COUNTS = np.random.default_rng(2).integers(1, 100, (5, 3, 8))


def pt(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def records():
    """Two ranks, five passes, expert 0 in two slots: as SGLang's recorder keeps them."""
    map_LS = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 3]), (3, 1))
    counts = np.concatenate([COUNTS, np.zeros((5, 3, 2), int)], axis=2)
    counts[:, :, 8] = counts[:, :, 0] // 3
    counts[:, :, 0] -= counts[:, :, 8]
    halves = {0: counts // 2, 1: counts - counts // 2}
    return {
        "last_physical_to_logical_map": torch.from_numpy(map_LS),
        "records": [
            {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary",
             "global_physical_count": torch.from_numpy(halves[rank][step])}
            for rank in (0, 1) for step in range(5)
        ],
    }  # fmt: skip


FOREIGN = {
    "sglang_stat.pt": lambda: pt({"rank": 0, "logical_count": torch.from_numpy(COUNTS)}),
    "sglang_pass.pt": lambda: pt(records()),
    "sglang.json": lambda: json.dumps({"logical_count": COUNTS.tolist()}).encode(),
    "vllm.json": lambda: json.dumps(
        {"load_history": [{"logical_expert_load": counts.tolist()} for counts in COUNTS]}
    ).encode(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_servers_dumps(tmp_path, name) -> None:
    window = read_window(write(tmp_path, name, FOREIGN[name]()))
    reference = LoadWindow(3, 8)
    for counts_LE in COUNTS:
        reference.add(counts_LE)
    assert np.array_equal(window.estimate().mean_LE, reference.estimate().mean_LE)
    assert window.num_batches == reference.num_batches


def test_one_step_without_its_axis(tmp_path) -> None:
    data = json.dumps({"logical_count": COUNTS[0].tolist()}).encode()
    window = read_window(write(tmp_path, "one.json", data))
    assert np.allclose(window.estimate().mean_LE, COUNTS[0])


class Runs:
    def __reduce__(self):
        return (print, ("a file ran code",))


def broken_state(**changes):
    return npz(format=np.array("expertmesh load window 1"), **filled_window().state() | changes)


BAD = {
    "missing.txt": (None, "No such file"),
    "kind.csv": (b"1,2", "unknown kind '.csv', expected .npz, .pt or .json"),
    "text.npz": (b"hello", "not a .npz file"),
    "empty.npz": (b"", "not a .npz file"),
    "object.npz": (npz(a=np.array([None, 1], dtype=object)), "not a .npz file of plain arrays"),
    "floats.npz": (npz(a=np.zeros((2, 2, 2))), r"array 'a' is float64 \[2, 2, 2\], expected int"),
    "flat.npz": (npz(a=np.zeros(4, int)), r"array 'a' is int64 \[4\].*\[tokens, layers, k\]"),
    "none.npz": (npz(), "no arrays"),
    "high.npz": (npz(a=np.full((1, 1, 1), 1 << 20)), "ids 1048576 to 1048576"),
    "two.npz": (npz(a=np.zeros((1, 2, 1), int), b=np.zeros((1, 3, 1), int)), "of one model"),
    "nobody.npz": (npz(a=np.full((1, 1, 1), -1)), "ids -1 to -1"),
    "future.npz": (npz(format=np.array("expertmesh load window 9")), "window 9', expected"),
    "lacking.npz": (npz(format=np.array("expertmesh load window 1")), "array 'mean' is missing"),
    "shape.npz": (broken_state(weight=np.zeros(9)), r"'weight' is float64 \[9\].*\[3\]"),
    "dtype.npz": (broken_state(rows=np.zeros((3, 20, 4))), "'rows' is float64.*expected int16"),
    "nan.npz": (broken_state(scatter=np.full((3, 16), np.nan)), "'scatter' has entries outside"),
    "ids.npz": (broken_state(rows=np.full((3, 20, 4), 16, np.int16)), "rows must be expert ids"),
    "seen.npz": (broken_state(rows_seen=np.array(3)), "'rows' has 20 tokens, expected"),
    "setting.npz": (broken_state(settings=np.zeros(5)), r"horizon\(0.0\)"),
    "text.pt": (b"hello", "not a file written by torch.save"),
    "cut.pt": (b"PK\x03\x04 and no more", "cannot be read as tensors"),
    "runs.pt": (pt({"logical_count": Runs()}), "cannot be read as tensors"),
    "other.pt": (pt([1, 2]), "expected 'logical_count' or 'records'"),
    "record.pt": (pt({"records": [{}]}), "last_physical_to_logical_map"),
    "slots.pt": (pt(records() | {"last_physical_to_logical_map": torch.zeros(3, 4).int()}), "map"),
    "shape.pt": (pt({"logical_count": torch.zeros(3)}), r"counts are \[3\], expected \[steps"),
    "nan.pt": (pt({"logical_count": torch.full((1, 1, 1), torch.nan)}), "not finite"),
    "text.json": (b"{", "not JSON"),
    "deep.json": (b"[" * 100000, "not JSON"),
    "other.json": (b"[1]", "expected 'logical_count' or 'load_history'"),
    "ragged.json": (b'{"logical_count": [[[1, 2], [3]]]}', "not an array of numbers"),
    "null.json": (b'{"load_history": [{}]}', "counts"),
    "minus.json": (b'{"logical_count": [[[1, -2]]]}', "step 0: counts must be numbers >= 0"),
    "huge.json": (b'{"logical_count": [[[1e300]]]}', "at most 1e"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, capsys, name) -> None:
    data, message = BAD[name]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(LoadFileError, match=message) as caught:
        read_window(path)
    assert str(path) in str(caught.value)
    assert "ran code" not in capsys.readouterr().out


@given(data=st.binary(max_size=300), suffix=st.sampled_from([".npz", ".pt", ".json"]))
@ANY_FILE
def test_random_bytes_never_get_further_than_an_error(tmp_path, data, suffix) -> None:
    with pytest.raises(LoadFileError):
        read_window(write(tmp_path, "random" + suffix, data))


@given(
    name=st.sampled_from(["ours.npz", "sglang_stat.pt", "sglang_pass.pt", "vllm.json"]),
    at=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
@example(name="sglang_stat.pt", at=-22, value=1, cut=False)
@example(name="ours.npz", at=-22, value=1, cut=False)
@ANY_FILE
def test_a_spoiled_byte_gives_a_window_or_a_named_error(tmp_path, name, at, value, cut) -> None:
    data = bytearray(dump_window(filled_window()) if name == "ours.npz" else FOREIGN[name]())
    at %= len(data)
    data[at] = value
    path = write(tmp_path, name, bytes(data[:at] if cut else data))
    try:
        window = read_window(path)
    except LoadFileError:
        return
    if window.num_batches:
        assert np.isfinite(window.estimate().mean_LE).all()


@given(
    name=st.sampled_from(sorted(filled_window().state())),
    array=hnp.arrays(
        st.sampled_from([np.float64, np.int16, np.int64, np.float32, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, max_side=3),
    ),
)
@example(name="weight", array=np.array([0.0, 1.0, 1.0]))
@settings(max_examples=150, deadline=None)
def test_any_array_in_place_of_ours(name, array) -> None:
    try:
        window = load_window(broken_state(**{name: array}))
    except LoadFileError:
        return
    if window.num_batches:
        assert np.isfinite(window.estimate().mean_LE).all()
