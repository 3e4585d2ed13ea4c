"""Recorded routing as the measurements of balance take it."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.load_files import read_routing

Ids = NDArray[np.integer[Any]]


def read_tasks(trace: Path, *, num_experts: int, least_tokens: int) -> dict[str, Ids]:
    """ids [tokens, layers, k] of each task in a routing trace.

    Raises LoadFileError for a file that is none, ValueError for one that does not fit.
    """
    tasks = read_routing(trace)
    for name, ids_TLK in tasks.items():
        if int(ids_TLK.max()) >= num_experts or len(ids_TLK) < least_tokens:
            raise ValueError(
                f"array '{name}' has {len(ids_TLK)} tokens and expert ids up to {ids_TLK.max()}; this "
                f"measurement needs {least_tokens} tokens and ids below {num_experts}"
            )
    return tasks
