"""What cannot be served is refused in plain words, soon, and leaves nothing behind."""

import shutil
from pathlib import Path

import pytest

from deploy.settings import BUNDLED_MODELS
from tests.deploy.processes import EXPERTMESH, Traces, running


@pytest.fixture
def damaged_model(tmp_path: Path) -> Path:
    directory = tmp_path / "damaged"
    shutil.copytree(BUNDLED_MODELS["mosaic"], directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return directory


def test_unknown_key() -> None:
    with running([EXPERTMESH, "serve", "scheduler.max_num_sequences=4"]) as command:
        assert command.wait(60) == 2
    assert "scheduler.max_num_seqs" in command.output


def test_damaged_checkpoint_names_the_file(damaged_model: Path) -> None:
    before = Traces.now()
    with running([EXPERTMESH, "serve", f"model={damaged_model}"]) as command:
        assert command.wait(120) == 2, command.output
    assert "model.safetensors" in command.output
    assert "Traceback" not in command.output
    assert Traces.now().left_since(before) == {}


def test_unsupported_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with running([EXPERTMESH, "serve", f"model={tmp_path}"]) as command:
        assert command.wait(60) == 2, command.output
    assert "gpt2" in command.output
    assert "deepseek_v3" in command.output
