"""`simulate record` and `simulate twin` as their users call them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from comms.launch import RankError
from deploy.simulate.commands import simulate
from deploy.simulate.twin import arriving
from simulations.twin import record as recorder
from simulations.twin.recording import Recording
from tests.simulations.twin.runs import MOSAIC


def run(*arguments: str) -> Result:
    return CliRunner().invoke(simulate, [str(argument) for argument in arguments])


@pytest.fixture
def file(recording, tmp_path) -> Path:
    path = tmp_path / "run.npz"
    path.write_bytes(recording.to_bytes())
    return path


def test_a_recording_is_written_and_checked(tmp_path):
    """Two requests on one node: the shortest run that there is."""
    out, result_file = tmp_path / "run.npz", tmp_path / "twin.json"
    small = ["--requests", "2", "--max-tokens", "3", "--rebalances", "0", "parallel.num_nodes=1"]
    recorded = run("record", "--out", out, *small)
    assert recorded.exit_code == 0, recorded.output
    assert "steps, " in recorded.output
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    checked = run("twin", out, "--calibration", "h100-published", "--json", result_file)
    assert checked.exit_code == 0, checked.output
    result = json.loads(result_file.read_text())
    assert result["same"]
    assert [found["name"] for found in result["checks"]][:2] == ["batches", "expert loads"]
    parts = {part["name"]: part for part in result["times"]["parts"]}
    assert parts["step"]["measured_s"] > parts["experts"]["measured_s"] > 0
    assert parts["step"]["predicted_s"] > parts["experts"]["predicted_s"] > 0
    assert "measured ms" in checked.output


def test_a_difference_is_exit_code_1_and_named(recording, file, tmp_path):
    sent = recording.arrays["sent"].copy()
    sent[0, 5] += 1
    file.write_bytes(replace(recording, arrays={**recording.arrays, "sent": sent}).to_bytes())
    result_file = tmp_path / "twin.json"
    checked = run("twin", file, "--json", result_file)
    assert checked.exit_code == 1
    assert (
        "bytes by link: step 0, layer 1, rank 0: dispatch/exchange to rank 2 had" in checked.output
    )
    result = json.loads(result_file.read_text())
    assert (result["same"], "times" in result) == (False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["twin", "none.npz"], "none.npz: No such file or directory"),
        (["twin", "FILE", "--calibration", "h1000"], "unknown calibration 'h1000'"),
        (["record", "--out", "/none/run.npz"], "--out /none/run.npz: no such directory /none"),
        (["record", "--out", "run.npz", "dtpye=1"], "unknown key 'dtpye'"),
        (["record", "--out", "run.npz", "model=/none"], "/none/config.json: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*[str(file) if argument == "FILE" else argument for argument in arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    assert Recording.read(file).num_steps, "what was there is still there"


def test_truncated_files_are_refused(file):
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        result = run("twin", file)
        assert result.exit_code == 2
        assert "not a .npz file of plain arrays" in result.output


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (RankError(1, "rank 1 failed: too short"), 1, "the run failed: rank 1 failed: too short"),
        (KeyboardInterrupt(), 130, "stopped; nothing is written"),
    ],
)
def test_a_run_that_fails_writes_nothing(tmp_path, monkeypatch, error, exit_code, message):
    def failing(*_args, **_options) -> None:
        raise error

    monkeypatch.setattr(recorder, "record", failing)
    result = run("record", "--out", tmp_path / "run.npz")
    assert (result.exit_code, result.output.strip()) == (exit_code, message)
    assert list(tmp_path.iterdir()) == []


def test_requests_go_through_the_subjects():
    """English first, Python last; a model without a tokenizer gets random tokens of its own."""
    english = arriving(MOSAIC, 24, 5)
    assert len({tuple(arrival.frame["token_ids"]) for arrival in english}) == 24
    assert [arrival.iteration for arrival in english] == [3 * i for i in range(24)]
    few = arriving(MOSAIC, 2, 5)
    assert few[0].frame["token_ids"] == english[0].frame["token_ids"]
    assert few[1].frame["token_ids"] == english[12].frame["token_ids"]


def test_a_model_without_a_tokenizer(tiny_checkpoint):
    found = arriving(tiny_checkpoint("qwen3_moe_norm"), 3, 5)
    assert all(len(arrival.frame["token_ids"]) == 16 for arrival in found)
