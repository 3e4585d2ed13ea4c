"""The committed scoreboard is what the command gives, and no error grows unseen."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from simulations.scoreboard import board, orderings, targets

STORED = Path(board.__file__).parent / "scoreboard.json"
ROUNDING = 0.002
"""Of an error: what another version of numpy may draw."""


@cache
def _result() -> dict[str, Any]:
    return board.run()


@cache
def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return stored


@pytest.mark.parametrize("part", ["targets", "soft", "attached"])
def test_no_error_grew(part: str) -> None:
    stored = {row["id"]: row for row in _stored()[part]}
    for row in _result()[part]:
        assert abs(row["error"]) <= abs(stored[row["id"]]["error"]) + ROUNDING, row["id"]


def test_constants_flags_and_figures_are_those_of_the_file() -> None:
    """Whoever changes one writes the file anew, and the change shows."""
    result, stored = _result(), _stored()
    assert result["calibrations"] == stored["calibrations"]
    for part in ("targets", "soft", "attached"):
        for row, kept in zip(result[part], stored[part], strict=True):
            same = ("id", "published", "blind", "conditions", "source")
            assert {key: row[key] for key in same} == {key: kept[key] for key in same}


def test_errors_are_of_the_numbers_beside_them() -> None:
    for row in _stored()["targets"]:
        error = row["predicted"] / row["published"] - 1
        assert row["error"] == pytest.approx(error, abs=2e-4), row["id"]


def test_statistics_are_of_the_blind_targets() -> None:
    errors = [abs(row["error"]) for row in _result()["targets"] if row["blind"]]
    assert _result()["blind"] == {
        "targets": len(errors),
        "median_error": pytest.approx(median(errors), abs=1e-4),
        "worst_error": max(errors),
    }


def test_loads_attached_are_those_of_the_blind_targets_and_none_is_blind() -> None:
    """Predictions whose experts' loads do not matter stay as they are."""
    blind = {row["id"]: row for row in _result()["targets"] if row["blind"]}
    attached = {row["id"]: row for row in _result()["attached"]}
    assert blind.keys() == attached.keys()
    assert not any(row["blind"] for row in attached.values())
    same = [name for name in blind if blind[name]["predicted"] == attached[name]["predicted"]]
    assert same == ["S6-perfect"]
    assert _result()["blind_attached"]["worst_error"] == max(
        abs(row["error"]) for row in attached.values()
    )


def test_all_orderings_come_out_as_published() -> None:
    rows = _result()["orderings"]
    assert len(rows) == 10
    assert [row["id"] for row in rows if not row["right"]] == []


def test_blind_are_the_deployments_that_no_constant_comes_from() -> None:
    for target in targets.read_targets():
        assert target.blind == (target.id[:2] in ("S6", "S7", "S8", "S9")), target.id


def test_in_sample_figures_are_met() -> None:
    assert _result()["in_sample"]["median_error"] < 0.02


def test_the_command_prints_80_columns_and_writes_its_result(tmp_path: Path) -> None:
    file = tmp_path / "board.json"
    outcome = CliRunner().invoke(app, ["simulate", "scoreboard", "--json", str(file)])
    assert outcome.exit_code == 0, outcome.output
    assert max(map(len, outcome.output.splitlines())) <= 80
    assert "Blind: no constant has seen these" in outcome.output
    assert json.loads(file.read_text(encoding="utf-8")) == _result()


def test_a_directory_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "board.json"
    outcome = CliRunner().invoke(app, ["simulate", "scoreboard", "--json", str(file)])
    assert outcome.exit_code == 2
    assert "its directory does not exist" in outcome.output


def _ordering(*values: float, slack: float = 0.0) -> dict[str, Any]:
    items = {f"{i}": {"kind": "constant", "value": value} for i, value in enumerate(values)}
    return orderings.Ordering(id="o", what="w", source="s", items=items, slack=slack).result()


def test_an_ordering_is_strict_unless_it_has_slack() -> None:
    assert _ordering(3, 2, 1)["right"]
    assert not _ordering(3, 1, 2)["right"]
    assert _ordering(3, 1, 2)["predicted"] == ["0", "2", "1"]
    assert not _ordering(2, 2)["right"]
    assert _ordering(2, 2, slack=0.01)["right"]
    assert not _ordering(2, 2.1, slack=0.01)["right"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"published": 0.0}, "target x: published must be > 0, got 0.0"),
        ({"blind": True, "soft": True}, "target x: a soft target cannot be blind"),
        ({"colour": "red"}, "target x: .*colour"),
    ],
)
def test_a_target_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    target = {
        "id": "x",
        "what": "w",
        "source": "s",
        "unit": "u",
        "published": 1.0,
        "kind": "bound",
        "blind": False,
        "conditions": {},
    }
    file = tmp_path / "targets.json"
    file.write_text(json.dumps([target]), encoding="utf-8")
    assert targets.read_targets(file)[0].id == "x"
    file.write_text(json.dumps([{**target, **change}]), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        targets.read_targets(file)
    file.write_text(json.dumps([target, target]), encoding="utf-8")
    with pytest.raises(ValueError, match="target x is there twice"):
        targets.read_targets(file)


def test_an_ordering_needs_two_items() -> None:
    with pytest.raises(ValueError, match="ordering o: needs two items, got 1"):
        _ordering(1)
