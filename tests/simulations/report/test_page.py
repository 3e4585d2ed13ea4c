"""The page: whole, self-contained, and saying what the results say."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from simulations import scoreboard
from simulations.report.build import write_report
from tests.simulations.report import results
from tests.simulations.report.html_page import parsed


def test_every_kind_of_result_has_a_chapter(page):
    names = [article.attributes["id"] for article in page.all("article")]
    assert names == ["balance", "serve", "scoreboard", "sweep", "claims"]


def test_a_head_says_what_was_simulated_and_how(page):
    head = page.all("article")[0].one("dl", class_="facts").words()
    for known in (
        "deepseek-v3", "nodes 8", "lognormal", "2,000", "seed 7", "h100-published (0123456789ab)",
        "0.1.0", "context 4,096 · phase decode", "expertmesh simulate balance --preset deepseek-v3 --nodes 8",
    ):  # fmt: skip
        assert known in head
    assert "tokens 4096 is beyond the measured range" in page.all("article")[0].words()


def test_pictures_of_all_that_was_asked_for_are_there(page, directory):
    pictures = {figure.attributes["id"] for figure in page.all("figure")}
    assert pictures >= {
        "balance-over-time", "balance-planned-served", "balance-node-traffic", "balance-waterfall",
        "balance-experts", "serve-latencies", "serve-over-time", "serve-pareto", "serve-memory",
        "scoreboard-scatter", "scoreboard-errors", "sweep-throughput",
    }  # fmt: skip
    assert {f"balance-ranks-{name.replace('_', '-')}" for name in results.POLICIES} <= pictures


def test_files_of_pictures_have_two_pixels_for_each_of_the_page(page, directory):
    for figure in page.all("figure"):
        content = (directory / f"{figure.attributes['id']}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        in_page = int(re.search(r"\d+", figure.one("div", role="img").attributes["style"])[0])
        assert 2 * in_page - 2 <= width <= 2 * in_page + 2
        left, top, right, bottom = map(float, figure.one("svg").attributes["viewbox"].split())
        assert width / height == pytest.approx((right - left) / (bottom - top), rel=0.01)


def test_every_picture_says_in_words_what_is_on_it(page):
    for figure in page.all("figure"):
        drawing = figure.one("div", role="img")
        assert len(drawing.attributes["aria-label"]) > 20
        assert drawing.one("svg").attributes["aria-hidden"] == "true"
        assert figure.one("figcaption").one("h3").words()


def test_nothing_is_loaded_from_anywhere(page, directory):
    """No address in any attribute but names of files beside the page; no import in style or script."""
    for element in page.all():
        for name, value in element.attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                local = value.startswith(("#", "data:image/png;base64,"))
                assert local or (directory / value).is_file(), (element.tag, name, value[:80])
            if not name.startswith("xmlns"):
                assert "//" not in (value or "").partition("base64,")[0], (element.tag, name)
        if element.tag in ("style", "script"):
            assert not re.search(r"https?:|@import|fetch|import\(|XMLHttp", element.text)
    assert not page.all("link")
    assert not page.all("iframe")


def test_ids_are_given_once_and_references_lead_somewhere(page, directory):
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    text = (directory / "report.html").read_text()
    for reference in re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', text):
        assert "".join(reference) in ids


def test_pictures_take_the_colour_of_the_page(page):
    """Ink must not be black on a dark page: no text or line has a fixed dark colour."""
    for figure in page.all("figure"):
        svg = figure.one("svg")
        styles = " ".join(e.attributes.get("style") or "" for e in svg.all())
        assert "currentColor" in styles
        assert "#000000" not in styles
        assert "width" not in svg.attributes


def test_a_policy_has_one_colour_in_all_pictures_and_tables(page):
    """Ours is the blue of the palette wherever it is named, and no other swatch is."""
    swatches: dict[str, set[str]] = {}
    for swatch in page.all("span", class_="swatch"):
        name = " ".join(swatch.parent.text.split())
        swatches.setdefault(name, set()).add(swatch.attributes["style"])
    assert swatches["ours"] == {"background: #0072b2"}
    assert swatches["EPLB"] == {"background: #e69f00"}
    assert all(len(colours) == 1 for colours in swatches.values())
    assert len(set.union(*swatches.values())) == len(swatches) == 5
    assert "#0072b2" in figure_styles(page, "balance-over-time")


def figure_styles(page, name):
    return " ".join(e.attributes.get("style") or "" for e in page.one("figure", id=name).all())


def test_the_table_of_policies_has_the_results_numbers(page):
    table = page.one("table", id="balance-policies-numbers")
    rows = {row.children[0].words(): [c.words() for c in row.children] for row in table.all("tr")}
    made = results.balance_result()["policies"]["ours"]
    first = results.balance_result()["policies"]["none"]["throughput"]
    assert rows["ours"][1] == f"{made['throughput']:,.0f}"
    assert rows["ours"][2] == f"+{100 * (made['throughput'] / first - 1):.1f}"
    assert rows["ours"][3:7] == ["1.020", "1.224", "1.006", "2.8"]
    best = [cell.words() for cell in table.all(class_="best")]
    assert rows["ours"][1:9] == best


def test_files_of_numbers_have_headers_with_units_and_all_digits(directory):
    made = results.balance_result()["policies"]["ours"]
    rows = list(csv.reader((directory / "balance-policies.csv").read_text().splitlines()))
    assert rows[0][:3] == ["policy", "throughput (tokens/s)", "gain (%)"]
    assert float(rows[-1][1]) == pytest.approx(made["throughput"], rel=1e-11)
    cells = records(directory / "balance-ranks-ours-after.csv")
    loads_LR = np.array(made["rank_load_LR"]["after"])
    assert len(cells) == loads_LR.size
    for cell in cells[::97]:
        expected = loads_LR[int(cell["layer"]), int(cell["rank"])]
        assert float(cell["load"]) == pytest.approx(expected, rel=1e-11)
    series = records(directory / "balance-series-ours.csv")
    assert list(series[0]) == ["step", "balancedness", "planned_balancedness", "throughput"]
    assert [float(row["throughput"]) for row in series] == pytest.approx(
        made["series"]["throughput"], rel=1e-11
    )


def records(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_every_file_named_in_the_page_is_there_and_the_other_way_round(page, directory):
    named = {a.attributes["href"] for a in page.all("a")} - {None}
    named = {name for name in named if not name.startswith("#")}
    assert named | {"report.html", "files.txt"} == {path.name for path in directory.iterdir()}


def test_targets_orderings_and_claims_are_listed(page):
    targets = page.one("table", id="scoreboard-targets-numbers")
    assert len(targets.all("tr")) == 1 + 24
    assert targets.words().count("in-sample") == targets.words().count("blind") == 12
    soft = page.one("table", id="scoreboard-soft-numbers")
    assert "a mean of 24 hours" in soft.words()
    orderings = page.one("table", id="scoreboard-orderings-numbers").words()
    assert orderings.count("wrong") == orderings.count("b256 1.208 > b64 1.01 > no gain 1") == 1
    assert "median error of the blind ones is 3.1 %" in page.words()
    claims = page.one("table", id="claims-table-numbers")
    assert [tone.words() for tone in claims.all("span", class_="tone")] == ["reproduces", "partly"]
    commands = page.one("table", id="claims-commands-numbers")
    assert "expertmesh simulate claims --only traffic" in commands.all("code")[0].words()


def test_the_best_cluster_of_a_sweep_comes_first_and_is_marked(page):
    points = results.sweep_result()["points"]
    best = max(point["result"].get("throughput", 0) for point in points)
    first_row = page.one("table", id="sweep-best-numbers").one("tbody").children[0]
    assert f"{best:,.0f}" in first_row.words()
    assert "★" in page.one("figure", id="sweep-throughput").words()
    everything = page.one("table", id="sweep-points-numbers")
    assert everything.words().count("does not fit") == 12
    assert page.one("figure", id="sweep-throughput").words().count("−4.20 GB") == 12
    in_time = page.one("table", id="sweep-best-in-time-numbers").one("tbody").children
    assert all(float(row.children[-2].words()) <= 60 for row in in_time)
    assert len(everything.all("tr")) == 1 + len(points)


def test_two_results_of_a_kind_are_two_chapters(tmp_path):
    claims = results.claims_result()
    page = parsed(write_report([claims, claims], tmp_path / "report"))
    assert [article.attributes["id"] for article in page.all("article")] == ["claims", "claims-2"]
    assert (tmp_path / "report" / "claims-2-table.csv").is_file()


def test_blind_targets_given_loads_stand_apart(tmp_path):
    """The committed scoreboard: what it says twice is told apart, with errors as they are stored."""
    stored = json.loads((Path(scoreboard.__file__).parent / "scoreboard.json").read_text())
    words = parsed(write_report([stored], tmp_path / "report")).words()
    for name, whose in (("blind", "blind ones"), ("blind_attached", "given the experts' loads,")):
        worst = abs(stored[name]["worst_error"])
        assert f"{whose} is {abs(stored[name]['median_error']):.1%}".replace("%", " %") in words
        assert f"the worst {worst:.1%}".replace("%", " %") in words
    assert words.count("given loads") == len(stored["attached"]) > 0
