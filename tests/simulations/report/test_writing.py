"""Reports are whole or not there, the same each time, and made again from what they keep."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from simulations.report import build
from simulations.report.build import check_report, write_report
from simulations.report.errors import ReportError
from tests.simulations.report.results import balance_result, claims_result


def small_balance() -> dict:
    return balance_result(
        num_layers=3, num_ranks=4, num_nodes=2, num_experts=8, policies={"ours": 1.1}, points=9
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_results_give_the_same_bytes(tmp_path):
    write_report([small_balance()], tmp_path / "one")
    write_report([small_balance()], tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_how_fast_it_was_simulated_is_in_the_results_alone(tmp_path):
    write_report([claims_result() | {"steps_per_s": 123.4}], tmp_path / "one")
    write_report([claims_result() | {"steps_per_s": 567.8}], tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} == {"results.json"}


def test_a_report_is_made_again_from_its_results(tmp_path):
    """Also where the results had numpy's numbers and NaN, for which JSON has no words."""
    result = claims_result() | {"seed": np.int64(3), "tokens_per_rank": float("nan")}
    write_report([result], tmp_path / "one")
    results = str(tmp_path / "one" / "results.json")
    ran = CliRunner().invoke(app, ["simulate", "report", results, "--out", str(tmp_path / "two")])
    assert (ran.exit_code, ran.output.strip()) == (0, str(tmp_path / "two" / "report.html"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "results.json").read_text())[0]["tokens_per_rank"] is None


def test_a_later_report_replaces_an_earlier_one_and_leaves_what_is_not_its_own(tmp_path):
    write_report([small_balance()], tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_report([claims_result()], tmp_path)
    assert set(contents(tmp_path)) == {
        "report.html", "files.txt", "results.json", "claims-table.csv", "claims-commands.csv", "notes.txt",
    }  # fmt: skip
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_list_of_files_that_was_tampered_with_removes_nothing_elsewhere(tmp_path):
    outside, directory = tmp_path / "precious.txt", tmp_path / "report"
    outside.write_text("mine")
    write_report([claims_result()], directory)
    (directory / "files.txt").write_text(f"../precious.txt\n{outside}\n..\n.\nsub\n")
    (directory / "sub").mkdir()
    write_report([claims_result()], directory)
    assert outside.read_text() == "mine"
    assert (directory / "sub").is_dir()


def test_a_report_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_report([small_balance()], tmp_path / "report")
    before = contents(tmp_path / "report")
    bad = small_balance()
    bad["policies"]["ours"]["moves"] = "many"
    with pytest.raises(ReportError, match=r"policies\.ours\.moves: must be a number or null"):
        write_report([bad], tmp_path / "report")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_put", full)
    with pytest.raises(ReportError, match="report: No space left on device"):
        write_report([claims_result()], tmp_path / "report")
    assert contents(tmp_path / "report") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    (tmp_path / "a.json").write_text(json.dumps(claims_result()))
    ran = CliRunner().invoke(
        app, ["simulate", "report", str(tmp_path / "a.json"), "--out", str(tmp_path / "report")]
    )
    assert ran.exit_code == 2
    assert ran.output == "reports need matplotlib: pip install 'expertmesh[report]'\n"
    assert not (tmp_path / "report").exists()


def test_importing_the_writer_does_not_load_matplotlib():
    code = "import sys, simulations.report.build; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_directory_that_cannot_be_one_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ReportError, match="file: is not a directory: choose another"):
            check_report(where)
    check_report(tmp_path / "new" / "one")
    write_report([claims_result()], tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one" / "report.html").is_file()


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ReportError, match="at least one result"):
        write_report([], tmp_path / "report")
