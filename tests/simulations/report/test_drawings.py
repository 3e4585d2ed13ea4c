"""What is on the pictures, against plain computations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from simulations.report import balance_figures, serve_figures, sweep_figures
from simulations.report.heat_maps import coarse
from simulations.report.reading import read_result
from simulations.report.serve_result import ParetoPoint
from simulations.report.style import LOAD_MAP, colour_of, dashes_of, readable_on, styled
from simulations.report.sweep_grid import laid_out
from simulations.report.waterfall import waterfall
from tests.simulations.report.results import POLICIES, balance_result, serve_result, sweep_result


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers()
)
def test_a_coarse_map_shows_the_busiest_of_each_block(rows, columns, max_rows, max_columns, seed):
    rng = np.random.default_rng(abs(seed))
    loads = np.where(rng.random((rows, columns)) < 0.2, np.nan, rng.random((rows, columns)))
    shown, tall, broad = coarse(loads, max_rows, max_columns)
    assert shown.shape[0] <= max_rows
    assert shown.shape[1] <= max_columns
    for r in range(shown.shape[0]):
        for c in range(shown.shape[1]):
            block = loads[r * tall : (r + 1) * tall, c * broad : (c + 1) * broad]
            known = [value for value in block.ravel().tolist() if value == value]
            assert np.array_equal(shown[r, c], max(known, default=np.nan), equal_nan=True)
    assert shown.shape == (-(-rows // tall), -(-columns // broad))


def bars_of(policy_changes):
    """(left, width) of the waterfall's bars that count, and the title, of one policy."""
    result = balance_result(num_layers=1, num_ranks=2, num_nodes=1, policies={"ours": 1.1})
    result["policies"]["ours"]["layer_ms"] = policy_changes
    with styled():
        figure = Figure()
        waterfall(figure, read_result(result))
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if bar.get_linestyle() == "solid"]
    return [(bar.get_x(), bar.get_width()) for bar in bars], axes.get_title("left")


def test_each_bar_of_the_waterfall_begins_where_the_last_one_ends():
    """The end is all computation and the exposed part of communication."""
    layer_ms = {
        "attention": 4, "gate": 1, "shared": 2, "dispatch": 3, "experts": 5, "combine": 5,
        "exposed": 2, "hidden": 6,
    }  # fmt: skip
    bars, title = bars_of(layer_ms)
    assert len(bars) == 6
    now = 0.0
    for left, width in bars:
        assert left == pytest.approx(now)
        now += width
    assert now == pytest.approx(4 + 1 + 2 + 5 + 2)
    assert "14.000 ms a layer" in title


def test_serial_communication_is_all_exposed():
    bars, _ = bars_of({"attention": 1, "dispatch": 2, "experts": 3, "combine": 4, "hidden": 0})
    assert sum(width for _, width in bars) == pytest.approx(10)


def test_curves_are_the_series_of_the_result():
    made = balance_result(points=50)
    figure = Figure()
    balance_figures.over_time(figure, read_result(made))
    served, throughput, moves = figure.axes
    for panel, key in ((served, "balancedness"), (throughput, "throughput")):
        assert len(panel.lines) == len(POLICIES)
        for line, name in zip(panel.lines, POLICIES, strict=True):
            series = made["policies"][name]["series"]
            assert line.get_xdata().tolist() == series["step"]
            assert line.get_ydata().tolist() == series[key]
            assert line.get_color() == colour_of(name, list(POLICIES))
    assert "tokens/s" in throughput.get_ylabel()
    ticks = {line.get_color(): line.get_xdata() for line in moves.lines}
    assert list(ticks[colour_of("eplb", [])]) == list(range(200, 2000, 200))


def test_events_are_marked_in_every_panel():
    figure = Figure()
    serve_figures.over_time(figure, read_result(serve_result()))
    for panel in figure.axes:
        marks = [line.get_xdata()[0] for line in panel.lines if len(line.get_xdata()) == 2]
        assert marks == [30.0, 50.0, 65.0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_else_beats(pairs):
    points = [ParetoPoint(tokens_per_s_per_user=a, tokens_per_s_per_rank=b) for a, b in pairs]
    figure = Figure()
    serve_figures.pareto(figure, points)
    (line,) = figure.axes[0].lines
    front = {
        (a, b)
        for a, b in pairs
        if not any((c > a and d >= b) or (c >= a and d > b) for c, d in pairs)
    }
    assert set(zip(line.get_xdata(), line.get_ydata(), strict=True)) == front


def test_a_sweep_shows_what_users_and_ranks_get_of_each_point():
    points = read_result(sweep_result()).points
    figure = Figure()
    sweep_figures.pareto(figure, points, tpot_ms=50.0)
    (axes,) = figure.axes
    shown = {tuple(pair) for cloud in axes.collections for pair in cloud.get_offsets().tolist()}
    results = [made["result"] for made in sweep_result()["points"]]
    assert shown == {
        (1000 / r["tpot_ms"], r["tokens_per_s_per_rank"]) for r in results if "tpot_ms" in r
    }
    assert axes.lines[-1].get_xdata() == [20.0, 20.0]


def test_a_sweep_has_each_point_in_its_cell():
    result = read_result(sweep_result())
    grid = laid_out(result.points)
    assert (grid.panel_axis, grid.column_axis) == ("policy", "tokens_per_rank")
    assert grid.panels == ["none", "eplb", "ours"]
    assert grid.columns == [32, 64, 128, 256]
    table = sweep_figures.numbers_of(grid, "throughput")
    assert table.shape == (3, 6, 4)
    for made in sweep_result()["points"]:
        point = made["point"]
        m = ("none", "eplb", "ours").index(point["policy"])
        place = (point["num_nodes"], point["num_redundant_experts"])
        r = [(n, e) for n in (4, 8) for e in (0, 32, 64)].index(place)
        c = (32, 64, 128, 256).index(point["tokens_per_rank"])
        expected = made["result"].get("throughput", np.nan)
        assert np.array_equal(table[m, r, c], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (1.234, "1.23"), (99.96, "100"), (999.4, "999"), (999.6, "1.00k"),
     (-12_345, "−12.3k"), (4.56e6, "4.56M"), (float("nan"), "–"), (1e20, "1.0e+20")],
)  # fmt: skip
def test_numbers_in_cells_are_short(value, text):
    assert sweep_figures.compact(value) == text


def test_no_two_policies_look_alike():
    names = [*POLICIES, "mine", "theirs"]
    looks = [(colour_of(name, names), str(dashes_of(name, names))) for name in names]
    assert len({colour for colour, _ in looks}) == len(names)
    assert len({dashes for _, dashes in looks[:5]}) == 5


@given(st.floats(0, 1))
def test_numbers_on_colours_can_be_read(value):
    """Contrast of at least 4.5 : 1 (WCAG AA) between a cell and what is written on it."""

    def luminance(colour):
        parts = np.asarray(colour[:3])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    cell = LOAD_MAP(value)
    text = readable_on(cell)
    written = tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    light, dark = sorted((luminance(cell), luminance(written)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5
