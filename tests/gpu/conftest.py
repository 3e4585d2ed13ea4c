"""Tests of the CUDA backend: on a GPU where there is one; Triton's interpreter checks the arithmetic elsewhere."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from comms.launch import RankPool
from tests.gpu import float8_checkpoints

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of two GPUs first: they go one by one, and others can run beside them."""
    if torch.cuda.is_available():
        items.sort(key=lambda item: "both_gpus" not in getattr(item, "fixturenames", ()))


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; tests that need one ask for it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU (bash .ci/gpu runs these tests on a machine that has one)")
    return torch.device("cuda")


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


@pytest.fixture
def both_gpus():
    """Two of them, for one test at a time: kernels that wait for the other GPU hold up those of other
    tests, which wait as well, and all take turns for minutes."""
    need_two_gpus()
    path = Path(tempfile.gettempdir()) / "expertmesh-both-gpus.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def pair():
    """Two ranks, for tests that take both GPUs."""
    need_two_gpus()
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """A CPU, and a GPU where there is one."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints by kind: "mla" and "gqa" in FP8, "mla-fp32" and "gqa-fp32" what they stand for."""
    root = tmp_path_factory.mktemp("float8")
    return {
        f"{kind}{form}": float8_checkpoints.write(root / f"{kind}{form}", kind, float8=not form)
        for kind in float8_checkpoints.KINDS
        for form in ("", "-fp32")
    }


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
