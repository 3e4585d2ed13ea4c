import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are promised for one thread per rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
