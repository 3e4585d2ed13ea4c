"""Files that tell how experts were loaded, as load windows.

    .npz   a window of ours (`dump_window`), or recorded routing: arrays of expert ids
           [tokens, layers, k], one or several, or the array 'routing' of a recorded run
    .pt    SGLang's expert distribution dumps (`load_dumps.py` says which)
    .json  SGLang's `logical_count`, or vLLM's `load_history`

Files come from elsewhere: nothing in them is executed, and whatever is wrong with one is a
`LoadFileError` that names the file, the array, and what was expected.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.load import LARGEST, LoadFileError, LoadWindow
from router.load_dumps import MAX_EXPERTS, json_counts, torch_counts

FORMAT = "expertmesh load window 1"
RECORDING = "expertmesh recording 1"
"""Of a recorded run, whose array 'routing' is recorded routing."""
SAMPLED_PER_BATCH = 64


def dump_window(window: LoadWindow) -> bytes:
    """The window as .npz, for `load_window` and for `read_window`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, format=np.array(FORMAT), **window.state())
    return buffer.getvalue()


def load_window(data: bytes, name: str = "load window") -> LoadWindow:
    """The window that `dump_window` wrote; LoadFileError names it by `name`."""
    arrays = npz_arrays(data, name)
    if "format" not in arrays:
        raise LoadFileError(f"{name}: no array 'format', expected '{FORMAT}'")
    return _window_of(arrays, name)


def read_window(
    path: Path, *, batch_tokens: int = 1024, num_experts: int | None = None
) -> LoadWindow:
    """The load that a file of any known kind describes.

    Recorded routing is cut into batches of `batch_tokens`; `num_experts` is for such files only,
    which may not show the last experts (default: highest id + 1).
    """
    data = _bytes_of(path)
    name = str(path)
    if path.suffix == ".npz":
        arrays = _without_run(npz_arrays(data, name))
        if "format" in arrays:
            return _window_of(arrays, name)
        return _routing_window(arrays, name, batch_tokens, num_experts)
    if path.suffix == ".pt":
        return _counts_window(torch_counts(data, name), name)
    if path.suffix == ".json":
        return _counts_window(json_counts(data, name), name)
    raise LoadFileError(f"{name}: unknown kind '{path.suffix}', expected .npz, .pt or .json")


def read_routing(path: Path) -> dict[str, NDArray[np.integer[Any]]]:
    """Every array of a recorded routing file, [tokens, layers, k] of expert ids each."""
    arrays = _without_run(npz_arrays(_bytes_of(path), str(path)))
    _check_routing(arrays, str(path))
    return arrays


def read_counts(path: Path) -> NDArray[np.float64]:
    """[steps, layers, experts]: tokens of each expert, as a dump recorded them, in steps in which
    anything happened; of a load window the mean batch, as one step.
    """
    data = _bytes_of(path)
    name = str(path)
    if path.suffix == ".npz":
        return load_window(data, name).estimate().mean_LE[None]
    if path.suffix not in (".pt", ".json"):
        raise LoadFileError(f"{name}: unknown kind '{path.suffix}', expected .npz, .pt or .json")
    read = torch_counts if path.suffix == ".pt" else json_counts
    counts_BLE = np.stack([*_steps(_checked_counts(read(data, name), name))] or [np.zeros((0, 0))])
    if not (counts_BLE.size and counts_BLE.min() >= 0 and counts_BLE.max() <= LARGEST):
        raise LoadFileError(f"{name}: counts must be from 0 to {LARGEST:.0e}, and not all 0")
    return counts_BLE


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadFileError(f"{path}: {error.strerror or error}") from error


def expert_counts(ids_TLK: NDArray[np.integer[Any]], num_experts: int) -> NDArray[np.int64]:
    """[L, E]: how often each expert was chosen in each layer; negative ids are nobody."""
    layers = ids_TLK.shape[1]
    of_layer = ids_TLK.astype(np.int64) + np.arange(layers)[:, None] * num_experts
    chosen = of_layer[ids_TLK >= 0]
    return np.bincount(chosen, minlength=layers * num_experts).reshape(layers, num_experts)


def npz_arrays(data: bytes, name: str) -> dict[str, NDArray[Any]]:
    """Every array of a .npz file; LoadFileError for anything else, naming it by `name`."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # a parser of foreign bytes may raise anything
        raise LoadFileError(f"{name}: not a .npz file of plain arrays ({error})") from error


def _without_run(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Of a recorded run only its routing."""
    if "routing" in arrays and str(arrays.get("format")) == RECORDING:
        return {"routing": arrays["routing"]}
    return arrays


def _window_of(arrays: Mapping[str, NDArray[Any]], name: str) -> LoadWindow:
    found = str(arrays["format"])
    if found != FORMAT:
        raise LoadFileError(f"{name}: format '{found[:80]}', expected '{FORMAT}'")
    try:
        return LoadWindow.from_state(arrays)
    except (ValueError, OverflowError) as error:
        raise LoadFileError(f"{name}: {error}") from error


def _check_routing(arrays: Mapping[str, NDArray[Any]], name: str) -> None:
    if not arrays:
        raise LoadFileError(f"{name}: no arrays, expected expert ids [tokens, layers, k]")
    shapes = set()
    for key, array in arrays.items():
        if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape:
            raise LoadFileError(
                f"{name}: array '{key}' is {array.dtype} {list(array.shape)}, expected integer "
                "expert ids [tokens, layers, k]"
            )
        if not (int(array.min()) >= -1 and 0 <= int(array.max()) < MAX_EXPERTS):
            raise LoadFileError(
                f"{name}: array '{key}' has ids {array.min()} to {array.max()}, expected expert ids "
                f"from 0 (-1: none) to {MAX_EXPERTS - 1}"
            )
        shapes.add(array.shape[1:])
    if len(shapes) > 1:
        raise LoadFileError(
            f"{name}: arrays differ in [layers, k]: {sorted(shapes)}; they must be of one model"
        )


def _routing_window(
    arrays: Mapping[str, NDArray[Any]], name: str, batch_tokens: int, num_experts: int | None
) -> LoadWindow:
    _check_routing(arrays, name)
    highest = max(int(array.max()) for array in arrays.values())
    experts = num_experts if num_experts is not None else highest + 1
    if not highest < experts:
        raise LoadFileError(f"{name}: expert id {highest} is not below num_experts({experts})")
    window = LoadWindow(next(iter(arrays.values())).shape[1], experts)
    for array in arrays.values():
        for start in range(0, len(array), batch_tokens):
            ids_TLK = array[start : start + batch_tokens]
            sampled_TLK = ids_TLK[:: max(1, len(ids_TLK) // SAMPLED_PER_BATCH)]
            window.add(expert_counts(ids_TLK, experts), sampled_TLK.transpose(1, 0, 2))
    return window


def _checked_counts(counts: Any, name: str) -> NDArray[np.float64]:
    """[steps, layers, experts] of finite numbers."""
    try:
        counts_BLE = np.asarray(counts, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise LoadFileError(f"{name}: counts are not an array of numbers ({error})") from error
    if counts_BLE.ndim == 2:
        counts_BLE = counts_BLE[None]
    if counts_BLE.ndim != 3 or 0 in counts_BLE.shape or counts_BLE.shape[2] > MAX_EXPERTS:
        raise LoadFileError(
            f"{name}: counts are {list(counts_BLE.shape)}, expected [steps, layers, experts]"
        )
    if not np.isfinite(counts_BLE).all():
        raise LoadFileError(f"{name}: counts are not finite")
    return counts_BLE


def _counts_window(counts: Any, name: str) -> LoadWindow:
    counts_BLE = _checked_counts(counts, name)
    window = LoadWindow(*counts_BLE.shape[1:])
    for step, counts_LE in enumerate(_steps(counts_BLE)):
        try:
            window.add(counts_LE)
        except ValueError as error:
            raise LoadFileError(f"{name}: step {step}: {error}") from error
    return window


def _steps(counts_BLE: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Steps in which anything happened: a ring buffer that was not full ends with zeros."""
    return (counts_LE for counts_LE in counts_BLE if counts_LE.any())
