"""Any bytes may arrive: known inputs are replayed, and new ones searched for, guided by coverage."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.fuzzer import read_corpus
from tests.fuzz.request_path import RequestPath

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 12


def test_inputs_of_the_corpus_do_no_harm():
    inputs = read_corpus()
    assert {data[0] % 3 for data in inputs if data} == {0, 1, 2}, "requests, and frames both ways"
    path = RequestPath()
    try:
        for data in inputs:
            path.run(data)
    finally:
        path.close()


def test_fuzzing_finds_no_harm(tmp_path):
    pytest.importorskip("atheris", reason="atheris runs on Python up to 3.12 on x86-64 only")
    command = [sys.executable, "-m", "tests.fuzz.fuzzer", str(tmp_path / "inputs")]
    options = [
        f"-max_total_time={SECONDS}",
        f"-artifact_prefix={tmp_path}/",
        "-print_final_stats=1",
    ]
    fuzzing = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    report = fuzzing.stdout + fuzzing.stderr
    harmful = [file.read_bytes() for file in tmp_path.glob("*-*") if file.is_file()]
    assert fuzzing.returncode == 0, f"{harmful}\n{report[-4000:]}"
    assert "stat::number_of_executed_units" in report
