"""What the arrays of a recording must be, before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.load_dumps import MAX_EXPERTS

Arrays = Mapping[str, NDArray[Any]]

STAGES = (
    "dispatch/exchange",
    "dispatch/scatter",
    "combine/reduce",
    "combine/exchange",
    "dispatch",
    "combine",
    "counts/node",
    "counts/rail",
)
"""By their numbers in `sent`."""

_SHAPES = {
    "routing": "TLK",
    "chunks": "C4",
    "steps": "I",
    "epochs": "I",
    "sampled": "X4",
    "escapes": "X5",
    "plans": "B",
    "plan_ends": "J",
    "slots": "TLK",
    "slot_tokens": "QLS",
    "routed": "NRLE",
    "sent": "X6",
    "seconds": "QR",
    "phases": "QRP",
}
_FLOATS = ("seconds", "phases")


def check_shapes(arrays: Arrays, sizes: Mapping[str, int]) -> None:
    """ValueError unless all arrays are there, with the sizes that their letters stand for.

    A letter is the same size in all of them, but X; of those in `sizes` it is known.
    """
    if set(arrays) != set(_SHAPES):
        lacking, unknown = sorted(set(_SHAPES) - set(arrays)), sorted(set(arrays) - set(_SHAPES))
        raise ValueError(f"arrays {lacking} are missing, {unknown} unknown")
    if sizes["E"] > MAX_EXPERTS:
        raise ValueError(f"num_experts({sizes['E']}) must be at most {MAX_EXPERTS}")
    known = dict(sizes)
    for key, letters in _SHAPES.items():
        array = arrays[key]
        _check_shape(key, array, letters, known)
        known.update({x: n for x, n in zip(letters, array.shape, strict=True) if x not in "X456"})


def _check_shape(key: str, array: NDArray[Any], letters: str, known: Mapping[str, int]) -> None:
    wanted = [int(x) if x.isdigit() else known.get(x, -1) for x in letters]
    kind = "f" if key in _FLOATS else "iu"
    sizes_fit = array.ndim == len(letters) and all(
        want in (-1, have) for want, have in zip(wanted, array.shape, strict=True)
    )
    if not sizes_fit or array.dtype.kind not in kind:
        shown = ", ".join(str(want) if want >= 0 else "any" for want in wanted)
        kinds = "floats" if key in _FLOATS else "integers"
        raise ValueError(
            f"array '{key}' is {array.dtype} {list(array.shape)}, expected {kinds} [{shown}]"
        )


def check_values(
    arrays: Arrays, *, num_experts: int, num_slots: int, num_ranks: int, num_replicas: int
) -> None:
    """ValueError for a number that points at nothing; shapes are right."""
    num_steps, num_tokens = len(arrays["seconds"]), len(arrays["routing"])
    chunks, steps, ends = arrays["chunks"], arrays["steps"], arrays["plan_ends"]
    if num_steps == 0 or len(chunks) < num_ranks:
        raise ValueError(f"{num_steps} steps with {len(chunks)} chunks: nothing ran")
    if len(ends) != len(steps) * num_replicas:
        raise ValueError(
            f"array 'plan_ends' has {len(ends)} entries, expected one for each of {len(steps)} "
            f"iterations and {num_replicas} replicas"
        )
    _check_range("routing", arrays["routing"], -1, num_experts)
    _check_range("slots", arrays["slots"], -1, num_slots)
    _check_range("chunks", chunks[:, 0], 0, num_steps)
    _check_range("chunks", chunks[:, 1], 0, len(chunks))
    _check_range("chunks", chunks[:, 2], 0, num_ranks)
    _check_range("chunks", chunks[:, 3], 0, num_tokens + 1)
    _check_range("sent", arrays["sent"][:, 2], 0, len(STAGES))
    for table in ("sent", "escapes"):
        _check_range(table, arrays[table][:, -3:-1], 0, num_ranks)
    _check_range("plan_ends", ends, 0, len(arrays["plans"]) + 1)
    if (np.diff(ends) < 0).any():
        raise ValueError("array 'plan_ends' must ascend")
    if steps[steps >= 0].tolist() != [*range(num_steps)]:
        raise ValueError(f"array 'steps' must have each of {num_steps} steps once, in order")
    if int(chunks[:, 3].sum()) != num_tokens:
        raise ValueError(
            f"array 'chunks' tells of {chunks[:, 3].sum()} tokens, 'routing' of {num_tokens}"
        )


def _check_range(key: str, array: NDArray[Any], low: int, end: int) -> None:
    if array.size and not (low <= int(array.min()) and int(array.max()) < end):
        raise ValueError(
            f"array '{key}' has {array.min()} to {array.max()}, expected {low} to {end - 1}"
        )
