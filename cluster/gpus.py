"""Which GPU is a rank's, where several ranks share a host.

Every process sees the GPUs of all of them, numbered alike, and has one: torch shares memory only between
ranks whose devices have different numbers.
"""

import os
from collections.abc import Sequence

import torch


def see_gpus(gpus: Sequence[str]) -> None:
    """Use the first of these GPUs, and reach the memory of the others.

    For a process that was shown its own alone, as Ray does. To be called before anything has asked for a
    GPU: from then on the driver does not look again.
    """
    in_order = sorted(set(gpus))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(in_order)
    torch.cuda.set_device(in_order.index(gpus[0]))


def take_gpu(rank: int) -> None:
    """Use the GPU of that rank, in a process that sees all of the host's; nothing where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
