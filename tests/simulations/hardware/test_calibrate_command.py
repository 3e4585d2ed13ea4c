"""`expertmesh calibrate`: what it refuses before measuring, and that it leaves no half file."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from deploy.calibrate import calibrate_command
from simulations.hardware import calibrate
from simulations.hardware.calibration import CalibrationError
from tests.simulations.calibrations import ROUND

EXPERTMESH = str(Path(sys.executable).with_name("expertmesh"))


@pytest.fixture
def no_measuring(monkeypatch):
    def measured(*_args, **_kwargs):
        raise AssertionError("measured before it refused")

    monkeypatch.setattr(calibrate, "cpu_calibration", measured)
    monkeypatch.setattr(calibrate, "gpu_calibration", measured)


@pytest.mark.usefixtures("no_measuring")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, got 'tpu'"),
        ({"model_names": "gpt"}, "unknown preset 'gpt': choose from deepseek-v3"),
        ({"model_names": "mosaic,deepseek-v3"}, "--model: several only on a GPU with our kernels"),
        ({"kernels": "cublas"}, "--kernels must be ours or library, got 'cublas'"),
        ({"out": "."}, "is a directory: name a file in it"),
        ({"out": "missing/here.json"}, "there is no directory"),
        ({"out": "no_json"}, "name it *.json"),
    ],
)
def test_refused_in_one_line(options, message, tmp_path, capsys):
    out = tmp_path / options.pop("out", "here.json")
    chosen = {"device": "cpu", "model_names": "mosaic", **options}
    assert calibrate_command(**chosen, quick=True, out=out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert calibrate_command("cuda", None, quick=True, out=out) == 2
    assert capsys.readouterr().err == "no GPU that torch can use: choose --device cpu\n"
    assert not out.exists()


def test_what_does_not_validate_is_not_written(tmp_path):
    with pytest.raises(CalibrationError, match="memory_bandwidth must be a number > 0"):
        calibrate.write(tmp_path / "bad.json", {**ROUND, "memory_bandwidth": 0})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "round.json"
    calibrate.write(out, ROUND)
    before = out.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate.write(out, {**ROUND, "memory_bytes": 1.0})
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_lists_are_written_on_one_line(tmp_path):
    calibrate.write(tmp_path / "round.json", ROUND)
    text = (tmp_path / "round.json").read_text()
    assert json.loads(text) == ROUND
    assert '"tokens": [1, 4096]' in text


def test_ctrl_c_leaves_nothing(tmp_path):
    out = tmp_path / "here.json"
    command = [EXPERTMESH, "calibrate", "--device", "cpu", "--quick", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while len(parent.children(recursive=True)) < 4:  # ranks: it measures
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = parent.children(recursive=True)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == len(children), alive
