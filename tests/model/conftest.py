from pathlib import Path

import pytest
import torch

import deploy.models
from tests.model.reference import reference_answers

MOSAIC = Path(deploy.models.__file__).parent / "mosaic"


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are promised for one thread per rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint_dir(tiny_checkpoint):
    """A tiny checkpoint's directory, or that of the bundled model."""

    def directory(name):
        if name != "mosaic":
            return tiny_checkpoint(name)
        if not (MOSAIC / "config.json").exists():
            pytest.skip("the bundled model is not in this checkout")
        return MOSAIC

    return directory


@pytest.fixture(scope="session")
def reference(checkpoint_dir):
    """transformers' answers for a checkpoint, computed once a session."""
    answers = {}

    def lookup(name):
        if name not in answers:
            answers[name] = reference_answers(checkpoint_dir(name))
        return answers[name]

    return lookup
