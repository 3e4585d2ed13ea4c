"""Tests of the CUDA backend: on a GPU where there is one; Triton's interpreter checks the arithmetic elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; tests that need one ask for it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU (bash .ci/gpu runs these tests on a machine that has one)")
    return torch.device("cuda")


@pytest.fixture
def interpreted():
    """Run a function of a test module, `module:function`, in a process whose Triton interprets kernels.

    The variable must be set before Triton is imported, and would change the kernels of other tests.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the kernels themselves are tested here")
    pytest.importorskip("triton", reason="needs triton (the extra gpu)")

    def run(target: str, *arguments: str, timeout_s: float = 120) -> str:
        module, function = target.split(":")
        code = f"import sys; from {module} import {function} as f; f(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
