"""A Ray that does not come up is tried once more, then told in one line, and leaves nothing."""

from pathlib import Path

import pytest
import ray

from deploy.local_ray import local_ray
from deploy.ray_connection import NoRayError


@pytest.fixture
def directories(monkeypatch):
    """Of every attempt, none of which succeeds."""
    tried = []

    def init(**options):
        tried.append(Path(options["_temp_dir"]))
        assert tried[-1].is_dir()
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    return tried


def test_a_ray_that_does_not_start(directories, caplog):
    with (
        pytest.raises(NoRayError, match="Ray does not start on this machine: The current node"),
        local_ray(1),
    ):
        raise AssertionError("there is none")
    assert len(set(directories)) == 2
    assert not any(directory.exists() for directory in directories)
    assert "trying once more" in caplog.text


def test_ctrl_c_is_not_tried_again(monkeypatch):
    def init(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt), local_ray(1):
        raise AssertionError("there is none")
