"""Finished points on disk: what is read back, what a torn file costs, what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.sweep.point_store import HEADER, PointStore, PointStoreError, key_of

RESULTS = {f"k{i}": {"status": "ok", "throughput": 1 / (i + 1), "why": "µ"} for i in range(4)}


def filled(path):
    store = PointStore(path)
    for key, result in RESULTS.items():
        store.add(key, result)
    return store


def test_results_are_on_disk_as_they_come(tmp_path) -> None:
    path = tmp_path / "points.jsonl"
    filled(path)
    assert path.read_text().startswith(HEADER)
    again = PointStore(path)
    assert len(again) == 4
    assert {key: again.get(key) for key in RESULTS} == RESULTS
    assert again.get("other") is None


@given(cut=st.integers(min_value=0))
@settings(max_examples=60, deadline=None)
def test_a_file_torn_anywhere_keeps_its_whole_lines(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "points.jsonl"
    filled(path)
    data = path.read_bytes()
    torn = data[: cut % (len(data) + 1)]
    path.write_bytes(torn)
    store = PointStore(path)
    assert len(store) == max(0, torn.count(b"\n") - 1)
    store.add("new", {"status": "ok"})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines[1:]][-1] == "new"
    assert len(PointStore(path)) == len(store)


@pytest.mark.parametrize(
    "content",
    [
        b"# expertmesh\n\nServes\n",
        b"some words",
        b"\x00\xff\n",
        HEADER.encode() + b"{}\n",
        HEADER.encode() + b"[1]\n",
        HEADER.encode() + b'{"key": "a", "result": 3}\n',
        HEADER.encode() + b'{"key": "a"\n{"key": "b", "result": {}}\n',
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path, content: bytes) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(PointStoreError, match=r"README\.md"):
        PointStore(path)
    assert path.read_bytes() == content


def test_what_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(PointStoreError, match="nowhere"):
        PointStore(tmp_path / "nowhere" / "points.jsonl")
    with pytest.raises(PointStoreError, match="directory"):
        PointStore(tmp_path)


def test_points_kept_in_memory_are_saved_for_a_later_run(tmp_path) -> None:
    path = tmp_path / "saved.jsonl"
    filled(None).save(path)
    assert PointStore(path).get("k3") == RESULTS["k3"]
    other = PointStore()
    other.add("other", {})
    other.add("k3", {})
    other.save(path)
    assert len(PointStore(path)) == 5
    assert PointStore(path).get("k3") == RESULTS["k3"]


def test_keys_depend_on_everything_but_the_order_of_names() -> None:
    assert key_of({"a": 1, "b": 2}, "x") == key_of({"b": 2, "a": 1}, "x")
    assert len({key_of({"a": 1}, "x"), key_of({"a": 2}, "x"), key_of({"a": 1}, "y")}) == 3
