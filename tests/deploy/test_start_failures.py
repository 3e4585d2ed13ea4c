"""What cannot be served is refused in plain words, soon, and leaves nothing behind."""

import shutil
import socket
from pathlib import Path

import pytest
import ray

import deploy.job
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


def test_no_ray_where_it_was_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "http://127.0.0.1:8265"):
        with running([EXPERTMESH, "serve"], RAY_ADDRESS=address) as command:
            assert command.wait(60) == 3, command.output
        (line,) = command.lines
        assert line.startswith(f"no Ray cluster at '{address}': ")
        assert "set RAY_ADDRESS to HOST:PORT of a Ray that runs" in line


def test_a_private_ray_that_cannot_start(tmp_path: Path) -> None:
    """The kernel refuses sockets whose path is as long as that."""
    directory = tmp_path / ("x" * 80)
    directory.mkdir()
    with running([EXPERTMESH, "serve"], TMPDIR=str(directory)) as command:
        assert command.wait(60) == 3, command.output
    assert command.lines[-1].startswith("Ray does not start on this machine: ")
    assert command.lines[-1].endswith("; set TMPDIR to a shorter path")
    assert "Traceback" not in command.output
    assert list(directory.iterdir()) == []


def test_a_job_outside_of_any_ray(monkeypatch, capsys) -> None:
    def init(address: str, **options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify one.")

    monkeypatch.setattr(ray, "init", init)
    config = Path(deploy.job.__file__).with_name("configs") / "one_node.yaml"
    assert deploy.job.main(["--config", str(config)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("no Ray cluster at 'auto': Could not find any running Ray instance; ")
    assert "ray job submit" in error
    assert error.count("\n") == 1
