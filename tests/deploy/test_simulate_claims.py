"""`expertmesh simulate claims`: what it prints, writes and refuses."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.simulate import claims_command


def run(*arguments):
    result = CliRunner().invoke(app, ["simulate", "claims", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def row(number: int):
    return {
        "id": f"claim_{number}",
        "claim": f"claim {number}",
        "published": "-60 %",
        "baseline": "flat",
        "measured": "-55 %",
        "command": "expertmesh simulate claims",
        "verdict": "partly",
        "why": "so",
        "figures": {"a": 1.5},
        "warnings": [f"extrapolated {number}", "both"],
    }


def rows_then(error):
    def rows_of(study, progress):
        yield row(1)
        yield row(2)
        if error is not None:
            raise error

    return rows_of


def test_rows_are_printed_and_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(claims_command, "rows_of", rows_then(None))
    file = tmp_path / "claims.json"
    done = run("--json", str(file), "--report", str(tmp_path / "report"))
    assert done.exit_code == 0
    assert "claim 2: partly" in done.stdout
    assert "measured: -55 %" in done.stdout
    result = json.loads(file.read_text())
    assert (result["kind"], result["rows"]) == ("claims", [row(1), row(2)])
    assert result["warnings"] == ["extrapolated 1", "both", "extrapolated 2"]
    assert "claim 1" in (tmp_path / "report" / "report.html").read_text()


def test_ctrl_c_keeps_the_rows_that_are_done(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(claims_command, "rows_of", rows_then(KeyboardInterrupt()))
    file = tmp_path / "claims.json"
    assert run("--json", str(file)).exit_code == 130
    result = json.loads(file.read_text())
    assert result["interrupted"] is True
    assert len(result["rows"]) == 2


def test_the_same_command_gives_the_same_bytes(tmp_path) -> None:
    files = [tmp_path / name for name in ("1.json", "2.json")]
    for file in files:
        assert run("--only=difference", "--steps=1", "--json", str(file)).exit_code == 0
    first, second = (json.loads(file.read_text()) for file in files)
    first.pop("command"), second.pop("command")  # pytest's
    assert json.dumps(first) == json.dumps(second)


def npz(path, ids):
    np.savez(path, task=ids)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only=speed"], "unknown claim 'speed': choose from traffic, difference"),
        (["--only="], "unknown claim ''"),
        (["--steps=0"], "steps(0) must be >= 1"),
        (["--seed=-1"], "seed(-1)"),
        (["--calibration=a100"], "unknown calibration 'a100'"),
        (["--trace=nothing.npz", "--only=difference"], "nothing.npz: No such file"),
        (["--trace=pyproject.toml", "--only=traffic"], "pyproject.toml: "),
        (["--json=/nowhere/x.json"], "/nowhere/x.json: its directory does not exist"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, words: str) -> None:
    result = run("--steps=1", "--json", str(tmp_path / "out.json"), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros((500, 5, 6), dtype=np.uint8), "expert ids of 5 layers"),
        (np.full((500, 26, 6), 64, dtype=np.uint8), "up to 64"),
        (np.zeros((500, 26, 4), dtype=np.uint8), "top-4"),
        (np.zeros((500, 26, 6)), "expected integer expert ids"),
    ],
)
def test_traces_of_other_models_are_refused_before_anything_runs(tmp_path, ids, words) -> None:
    path = npz(tmp_path / "t.npz", ids)
    result = run(f"--trace={path}", "--steps=1")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_torn_traces_are_refused(tmp_path) -> None:
    path = npz(tmp_path / "t.npz", np.zeros((500, 26, 6), dtype=np.uint8))
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        result = run(f"--trace={path}", "--steps=1")
        assert result.exit_code == 2
        assert "t.npz" in result.stderr
