"""`expertmesh bench experts | decode | dispatch --device cuda` where they cannot measure: no GPU, no such option."""

from pathlib import Path

import pytest
import torch

from tests.deploy.processes import EXPERTMESH, running

needs_none = pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what happens without a GPU, and there is one"
)


def refused(tmp_path: Path, *arguments: str) -> str:
    report = tmp_path / "report.json"
    with running([EXPERTMESH, "bench", *arguments, "--json", str(report)]) as command:
        assert command.wait(60) == 2, command.output
    assert not report.exists()
    assert "Traceback" not in command.output
    return command.output


@needs_none
@pytest.mark.parametrize(
    "arguments",
    [
        ("experts",),
        ("experts", "--layer"),
        ("decode",),
        ("decode", "--gpus", "2"),
        ("dispatch", "--device", "cuda"),
    ],
    ids=" ".join,
)
def test_without_a_gpu_they_say_so(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert "GPU" in refused(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("experts", "--device", "tpu"), "tpu"),
        (("experts", "--dtype", "int3"), "int3"),
        (("experts", "--layer", "--dtype", "int4"), "int4"),
        (("decode", "--device", "cpu"), "cpu"),
        (("decode", "--gpus", "3"), "--gpus"),
        (("decode", "--quantization", "int8"), "int8"),
        (("decode", "--tensor-parallel"), "--gpus 2"),
        (("dispatch", "--device", "tpu"), "tpu"),
        (("dispatch", "--tokens", "1", "--tokens", "2"), "--tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_named(tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    assert named in refused(tmp_path, *arguments)
