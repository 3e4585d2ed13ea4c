"""Tables are exact where measured, between their neighbours elsewhere, and say where they end."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.hardware.tables import Table, table_json

AXIS = st.lists(st.integers(1, 10**6), min_size=1, max_size=5, unique=True).map(sorted)


@st.composite
def grids(draw, ascending=False):
    axes = {"a": tuple(draw(AXIS)), "b": tuple(draw(AXIS))}
    shape = tuple(map(len, axes.values()))
    size = int(np.prod(shape))
    values = draw(st.lists(st.floats(1e-9, 1e3), min_size=size, max_size=size))
    values_AB = np.array(values).reshape(shape)
    if ascending:
        values_AB = np.maximum.accumulate(np.maximum.accumulate(values_AB, axis=0), axis=1)
    return Table(axes=axes, values=values_AB)


@given(grids())
def test_grid_points_are_the_measurements(table):
    a, b = np.meshgrid(*table.axes.values(), indexing="ij")
    np.testing.assert_allclose(table.at(a=a, b=b), table.values, rtol=1e-9)


@given(grids(), st.floats(1e-3, 1e7), st.floats(1e-3, 1e7))
def test_a_point_inside_lies_between_the_corners_of_its_cell(table, a, b):
    cells = []
    for points, x in zip(table.axes.values(), (a, b), strict=True):
        if not points[0] <= x <= points[-1]:
            assert not table.covers(a=a, b=b)
            return
        right = int(np.searchsorted(points, x))
        cells.append({max(right - 1, 0), min(right, len(points) - 1)})
    corners = [table.values[index] for index in itertools.product(*cells)]
    found = float(table.at(a=a, b=b))
    assert min(corners) * (1 - 1e-9) <= found <= max(corners) * (1 + 1e-9)
    assert table.covers(a=a, b=b)


@given(grids(ascending=True), st.lists(st.floats(1e-3, 1e7), min_size=4, max_size=4).map(sorted))
def test_more_is_never_faster_where_it_was_not_when_measured(table, points):
    along_a = table.at(a=points, b=table.axes["b"][0])
    along_b = table.at(a=table.axes["a"][-1], b=points)
    assert (np.diff(along_a) >= -1e-9 * along_a[1:]).all()
    assert (np.diff(along_b) >= -1e-9 * along_b[1:]).all()


def test_a_power_law_is_found_between_its_points():
    rows = np.array([1, 10, 1000])
    table = Table(axes={"tokens": tuple(rows)}, values=3e-6 * rows**0.7)
    np.testing.assert_allclose(table.at(tokens=[4, 77]), 3e-6 * np.array([4, 77]) ** 0.7)


def test_a_power_law_of_two_sizes_is_found_too():
    rows, keys = np.array([1.0, 10, 1000]), np.array([16.0, 512])
    values = np.multiply.outer(rows**0.7, keys**0.2)
    table = Table(axes={"rows": tuple(rows), "keys": tuple(keys)}, values=values)
    found = table.at(rows=[[4], [77]], keys=[20, 100, 500])
    expected = np.multiply.outer(np.array([4, 77]) ** 0.7, np.array([20, 100, 500]) ** 0.2)
    np.testing.assert_allclose(found, expected)


def test_beyond_the_grid():
    table = Table(axes={"a": (2, 4), "b": (10, 20)}, values=np.array([[1.0, 2], [3, 6]]))
    np.testing.assert_allclose(table.at(a=[1, 0, 2], b=10), [1, 1, 1])  # as at its edge
    np.testing.assert_allclose(table.at(a=[8, 4, 8], b=[20, 40, 40]), [12, 12, 24])  # in proportion
    assert not table.covers(a=8, b=20)
    assert not table.covers(a=[1, 3], b=20)
    assert table.covers(a=[2, 3, 4], b=20)


def test_without_some_points():
    table = Table(axes={"a": (1, 2, 4), "b": (1, 2)}, values=np.arange(1.0, 7).reshape(3, 2))
    less = table.without("a", [1])
    assert less.axes["a"] == (1, 4)
    np.testing.assert_array_equal(less.values, [[1, 2], [5, 6]])


def test_from_json_and_back():
    table = table_json({"tokens": [1, 2]}, [1.23456e-5, 2e-5], kernel="ours")
    assert table == {
        "kernel": "ours",
        "axes": {"tokens": [1, 2]},
        "unit": "s",
        "values": [1.235e-5, 2e-5],
    }
    assert float(Table.from_json(table).at(tokens=1)) == pytest.approx(1.235e-5)


@pytest.mark.parametrize(
    ("axes", "values", "why"),
    [
        ({}, [], "needs values of shape"),
        ({"a": (1, 2)}, [1], "needs values of shape"),
        ({"a": (2, 1)}, [1, 1], "must ascend from above 0"),
        ({"a": (0, 1)}, [1, 1], "must ascend from above 0"),
        ({"a": (1e6 - 1e-10, 1e6)}, [1, 1], "must ascend from above 0"),  # not in logarithms
        ({"a": (1, 2)}, [1, 0], "finite and > 0"),
        ({"a": (1, 2)}, [1, float("nan")], "finite and > 0"),
    ],
)
def test_tables_that_cannot_be(axes, values, why):
    with pytest.raises(ValueError, match=why):
        Table(axes=axes, values=np.array(values, dtype=float))


def test_other_axes_are_refused():
    table = Table(axes={"a": (1,)}, values=np.array([1.0]))
    with pytest.raises(ValueError, match=r"has the axes \['a'\]"):
        table.at(b=1)
